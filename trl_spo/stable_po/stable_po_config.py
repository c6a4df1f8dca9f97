# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import dataclass, field, fields

from trl import DPOConfig


# Upper losses that TRL's DPOTrainer has, and those of `trl_spo.losses`
TRL_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
OWN_LOSSES = ("cpo", "dpop", "rdpo", "simpo", "alphadpo")
REFERENCE_FREE = ("sft", "cpo", "simpo")
# Options that only some upper losses read: option -> those losses
_LOSS_OPTIONS = {
    "cpo_alpha": ("cpo",),
    "dpop_lambda": ("dpop",),
    "rdpo_alpha": ("rdpo",),
    "simpo_beta": ("simpo", "alphadpo"),
    "simpo_gamma": ("simpo", "alphadpo"),
    "alphadpo_alpha": ("alphadpo",),
    "label_smoothing": ("exo_pair", "robust", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
    "f_divergence_type": TRL_LOSSES,
    "f_alpha_divergence_coef": TRL_LOSSES,
    "use_weighting": TRL_LOSSES,
}
# Options that only some forms read: option -> those forms
_FORM_OPTIONS = {
    "inner_steps": ("alternating", "unrolled", "lower_level anchor"),
    "inner_learning_rate": ("alternating", "unrolled", "lower_level anchor"),
    "inner_step_fraction": ("alternating", "unrolled", "lower_level anchor"),
    "hypergradient": ("unrolled",),
    "deploy_inner_steps": ("unrolled",),
    "penalty_weight": ("penalty",),
    "penalty_slack": ("penalty",),
    "penalty_anchor": ("penalty",),
}


@dataclass
class StablePOConfig(DPOConfig):
    r"""
    Configuration class for the [`StablePOTrainer`].

    This class includes only the parameters that are specific to Stable PO training. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] and [`~trl.DPOConfig`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the upper level

        upper_loss (`str` or `list[str]`, *optional*, defaults to `"sigmoid"`):
            Preference loss, or several, weighted by `loss_weights`: any `loss_type` of [`~trl.DPOConfig`], `"cpo"`, `"dpop"`,
            `"rdpo"`, `"simpo"` or `"alphadpo"`. Takes the place of `loss_type`.
        regularizer (`str`, *optional*, defaults to `"none"`):
            R, which rewards an absolute rise of the chosen responses' probability: `"nll"` (`-log π(y_w) / |y_w|`), `"floor"`
            (`[log π_ref(y_w) - log π(y_w)]_+ / |y_w|`) or `"none"`.
        regularizer_weight (`float`, *optional*, defaults to `1.0`):
            Weight λ >= 0 of R.
        cpo_alpha (`float`, *optional*, defaults to `1.0`):
            Weight of CPO's behaviour cloning.
        dpop_lambda (`float`, *optional*, defaults to `50.0`):
            λ of DPOP.
        rdpo_alpha (`float`, *optional*, defaults to `0.01`):
            Length penalty α of R-DPO, in reward per token.
        simpo_beta (`float`, *optional*, defaults to `2.0`):
            β of SimPO and AlphaDPO, whose log-probabilities are means per token. The other losses read `beta`.
        simpo_gamma (`float`, *optional*, defaults to `1.0`):
            Target margin γ of SimPO and AlphaDPO, in units of their reward.
        alphadpo_alpha (`float`, *optional*, defaults to `0.1`):
            Weight α of AlphaDPO's margin of each pair.

        > Parameters that control the lower level

        bilevel (`str`, *optional*, defaults to `"penalty"`):
            How the lower level, supervised fine-tuning, binds the upper one: `"penalty"` (adds
            `w [L_SFT(θ) - L_SFT(anchor) - ε]_+` to the loss), `"alternating"` (`inner_steps` SFT steps before each step of the
            optimizer) or `"unrolled"` (minimises the upper loss *after* `inner_steps` SFT steps, which are taken back; for
            comparison).
        penalty_weight (`float`, *optional*, defaults to `10.0`):
            w >= 0.
        penalty_slack (`float`, *optional*, defaults to `0.0`):
            ε >= 0, in nats per token.
        penalty_anchor (`str`, *optional*, defaults to `"reference"`):
            `"reference"` (its SFT loss on the same batch) or `"lower_level"` (that of the policy after `inner_steps` SFT steps).
        inner_steps (`int`, *optional*, defaults to `1`):
            K, SFT steps of the lower level for each step of the optimizer.
        inner_learning_rate (`float` or `"auto"`, *optional*, defaults to `"auto"`):
            η > 0 of the inner steps, which are plain gradient descent. `"auto"`: η such that a step has
            `inner_step_fraction` times the norm of the trained parameters.
        inner_step_fraction (`float`, *optional*, defaults to `1e-4`):
            Length of an inner step relative to the norm of the trained parameters, with `inner_learning_rate="auto"`.
        hypergradient (`str`, *optional*, defaults to `"first_order"`):
            Gradient of `bilevel="unrolled"`: `"first_order"` (`∇U(θ')`), `"exact"` (`(I - η ∇²L_SFT) ∇U(θ')` by double backward)
            or `"finite_difference"` (the same by a central difference).
        deploy_inner_steps (`int`, *optional*, defaults to `1`):
            With `bilevel="unrolled"`, SFT steps that turn the final θ into the θ' that is evaluated, saved and pushed.
        sft_batch_size (`int`, *optional*):
            Rows of `sft_dataset` per device and micro-batch. Defaults to `per_device_train_batch_size`. An inner step takes as many
            such batches as an optimizer step has micro-batches.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS

    # Parameters that control the upper level
    upper_loss: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Preference loss or losses: any `loss_type` of DPOConfig, 'cpo', 'dpop', 'rdpo', 'simpo', 'alphadpo'."
        },
    )
    regularizer: str = field(
        default="none",
        metadata={
            "help": "R, which rewards an absolute rise of the chosen responses' probability: 'none', 'nll' or 'floor'.",
            "choices": ["none", "nll", "floor"],
        },
    )
    regularizer_weight: float = field(default=1.0, metadata={"help": "Weight λ >= 0 of the regularizer."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of CPO's behaviour cloning."})
    dpop_lambda: float = field(default=50.0, metadata={"help": "λ of DPOP."})
    rdpo_alpha: float = field(default=0.01, metadata={"help": "Length penalty α of R-DPO, in reward per token."})
    simpo_beta: float = field(
        default=2.0, metadata={"help": "β of SimPO and AlphaDPO, whose log-probabilities are means per token."}
    )
    simpo_gamma: float = field(default=1.0, metadata={"help": "Target margin γ of SimPO and AlphaDPO."})
    alphadpo_alpha: float = field(default=0.1, metadata={"help": "Weight α of AlphaDPO's margin of each pair."})

    # Parameters that control the lower level
    bilevel: str = field(
        default="penalty",
        metadata={
            "help": "How the lower level, supervised fine-tuning, binds the upper one: 'penalty', 'alternating' or "
            "'unrolled'.",
            "choices": ["penalty", "alternating", "unrolled"],
        },
    )
    penalty_weight: float = field(default=10.0, metadata={"help": "Weight w >= 0 of the penalty."})
    penalty_slack: float = field(default=0.0, metadata={"help": "Slack ε >= 0 of the penalty, in nats per token."})
    penalty_anchor: str = field(
        default="reference",
        metadata={
            "help": "'reference' (its SFT loss on the same batch) or 'lower_level' (that of the policy after `inner_steps` "
            "SFT steps).",
            "choices": ["reference", "lower_level"],
        },
    )
    inner_steps: int = field(
        default=1, metadata={"help": "SFT steps of the lower level for each step of the optimizer."}
    )
    inner_learning_rate: str = field(  # a float too: the type is that of the command line, where "auto" must pass
        default="auto",
        metadata={
            "help": "Learning rate η > 0 of the inner steps, or 'auto': such that a step has `inner_step_fraction` times the "
            "norm of the trained parameters."
        },
    )
    inner_step_fraction: float = field(
        default=1e-4,
        metadata={"help": "Length of an inner step relative to the norm of the trained parameters, with 'auto'."},
    )
    hypergradient: str = field(
        default="first_order",
        metadata={
            "help": "Gradient of `bilevel='unrolled'`: 'first_order', 'exact' or 'finite_difference'.",
            "choices": ["first_order", "exact", "finite_difference"],
        },
    )
    deploy_inner_steps: int = field(
        default=1,
        metadata={
            "help": "With `bilevel='unrolled'`, SFT steps that turn the final θ into the θ' that is evaluated, saved and "
            "pushed. 0: none."
        },
    )
    sft_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of `sft_dataset` per device and micro-batch. Defaults to `per_device_train_batch_size`."
        },
    )

    def __post_init__(self):
        if isinstance(self.upper_loss, str):
            self.upper_loss = [self.upper_loss]
        self._check_upper_loss()
        # TRL's loss_type are those of the upper losses that are TRL's, so that its own checks of their options apply
        trl_losses = [name for name in self.upper_loss if name in TRL_LOSSES]
        if self.loss_type not in ("sigmoid", ["sigmoid"], trl_losses or ["sigmoid"]):
            raise ValueError(
                f"`loss_type={self.loss_type!r}` is not read: the preference loss of Stable PO is `upper_loss` "
                f"({self.upper_loss!r}). Set `upper_loss={self.loss_type!r}` instead."
            )
        loss_weights, self.loss_weights = self.loss_weights, None  # as many as upper losses, which TRL does not know
        self.loss_type = trl_losses or ["sigmoid"]
        super().__post_init__()
        self.loss_weights = loss_weights
        self._check_ranges()
        self._check_choices()
        self._check_combination()

    @property
    def takes_inner_steps(self) -> bool:
        """Whether the lower level's own steps are taken."""
        return self.bilevel != "penalty" or (self.penalty_anchor == "lower_level" and self.penalty_weight > 0)

    @property
    def reads_reference(self) -> bool:
        """Whether anything in the loss reads the reference."""
        return (
            any(name not in REFERENCE_FREE for name in self.upper_loss)
            or (self.bilevel == "penalty" and self.penalty_anchor == "reference" and self.penalty_weight > 0)
            or (self.regularizer == "floor" and self.regularizer_weight > 0)
        )

    def _check_upper_loss(self) -> None:
        known = TRL_LOSSES + OWN_LOSSES
        for name in self.upper_loss:
            if name not in known:
                raise ValueError(f"`upper_loss` has {name!r}, which is unknown. Should be one of {list(known)}.")
        if not self.upper_loss:
            raise ValueError(f"`upper_loss` is empty. Name at least one of {list(known)}.")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.upper_loss):
            raise ValueError(
                "`loss_weights` must have the same length as `upper_loss` when combining multiple losses. "
                f"Got {len(self.loss_weights)} weights for {len(self.upper_loss)} losses."
            )

    def _check_ranges(self) -> None:
        def require(name: str, minimum: float, what: str, strict: bool = False, whole: bool = False) -> None:
            value = getattr(self, name)
            good = isinstance(value, int if whole else int | float) and math.isfinite(value)
            if not good or value < minimum or (strict and value == minimum):
                kind = "a whole number" if whole else "finite"
                raise ValueError(
                    f"`{name}` must be {kind} and {'>' if strict else '>='} {minimum}, got {value!r}: {what}."
                )

        require("regularizer_weight", 0, "it is the weight of the regularizer; use 0 to switch it off")
        require("penalty_weight", 0, "it is the weight of the penalty; use 0 to switch it off")
        require(
            "penalty_slack", 0, "it is how far the SFT loss may rise, in nats per token, before the penalty sets in"
        )
        require(
            "inner_steps",
            1,
            "to train without a lower level use `bilevel='penalty'` with `penalty_weight=0`",
            whole=True,
        )
        require("deploy_inner_steps", 0, "use 0 to deploy θ itself", whole=True)
        require("inner_step_fraction", 0, "it is the length of an inner step; try 1e-4", strict=True)
        for name in ("cpo_alpha", "dpop_lambda", "simpo_gamma", "alphadpo_alpha"):
            require(name, 0, f"it is a constant of {' and '.join(_LOSS_OPTIONS[name])}")
        require("rdpo_alpha", -math.inf, "it is the reward per token that R-DPO discounts")
        require("simpo_beta", 0, "it is the inverse temperature of simpo and alphadpo", strict=True)
        if self.sft_batch_size is not None:
            require("sft_batch_size", 1, "it is the number of rows of `sft_dataset` in a micro-batch", whole=True)
        # A number on the command line or in a YAML file may come as a string
        if isinstance(self.inner_learning_rate, str) and self.inner_learning_rate != "auto":
            try:
                self.inner_learning_rate = float(self.inner_learning_rate)
            except ValueError:
                raise ValueError(
                    f"`inner_learning_rate` must be a number or 'auto', got {self.inner_learning_rate!r}."
                ) from None
        if self.inner_learning_rate != "auto":
            require(
                "inner_learning_rate",
                0,
                "it is the length of the inner steps; to take none, use `bilevel='penalty'`",
                True,
            )

    def _check_choices(self) -> None:
        # `HfArgumentParser` checks "choices" on the command line only
        for option in fields(self):
            choices, value = option.metadata.get("choices"), getattr(self, option.name)
            if option.name in StablePOConfig.__annotations__ and choices and value not in choices:
                raise ValueError(f"`{option.name}` must be one of {choices}, got {value!r}.")

    def _check_combination(self) -> None:
        def is_default(name: str) -> bool:
            return getattr(self, name) == type(self).__dataclass_fields__[name].default

        for name, readers in _LOSS_OPTIONS.items():
            if not is_default(name) and not set(readers) & set(self.upper_loss):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is not read by `upper_loss={self.upper_loss!r}`, only by "
                    f"{list(readers)}. Leave it at its default, or change `upper_loss`."
                )
        if not is_default("beta") and set(self.upper_loss) <= {"simpo", "alphadpo"}:
            raise ValueError(
                f"`beta={self.beta}` is not read by `upper_loss={self.upper_loss!r}`, whose β is `simpo_beta`. Set that one, and "
                "leave `beta` at its default."
            )
        if self.regularizer == "none" and not is_default("regularizer_weight"):
            raise ValueError(
                f"`regularizer_weight={self.regularizer_weight}` is not read with `regularizer='none'`. Set `regularizer` to "
                "'nll' or 'floor', or leave the weight out."
            )
        for name in ("penalty_slack", "penalty_anchor"):
            if self.bilevel == "penalty" and self.penalty_weight == 0 and not is_default(name):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is not read with `penalty_weight=0`. Set a weight, or leave it out."
                )
        forms = {self.bilevel} | ({"lower_level anchor"} if self.takes_inner_steps else set())
        for name, readers in _FORM_OPTIONS.items():
            if not is_default(name) and not forms & set(readers):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is not read with `bilevel={self.bilevel!r}`"
                    + (f" and `penalty_anchor={self.penalty_anchor!r}`" if self.bilevel == "penalty" else "")
                    + f", only with {', '.join(readers)}. Leave it at its default, or change `bilevel`."
                )
        if self.inner_learning_rate != "auto" and not is_default("inner_step_fraction"):
            raise ValueError(
                f"`inner_step_fraction={self.inner_step_fraction}` is read with `inner_learning_rate='auto'` only, and it is "
                f"{self.inner_learning_rate}. Leave one of them out."
            )
        if self.hypergradient != "first_order" and self.inner_steps > 1:
            raise ValueError(
                f"`hypergradient={self.hypergradient!r}` supports `inner_steps=1` only, got {self.inner_steps}: the product of "
                "several steps' Jacobians is not built. Use `hypergradient='first_order'` for more steps."
            )
        if self.ld_alpha is not None and (self.reads_reference and self.penalty_anchor == "reference"):
            if self.bilevel == "penalty" and self.penalty_weight > 0:
                raise ValueError(
                    f"`ld_alpha={self.ld_alpha}` is not supported with `penalty_anchor='reference'`, which needs the plain "
                    "log-probabilities of the reference. Use `ld_alpha=None`, or another `bilevel`."
                )
        if self.ld_alpha is not None and (self.regularizer == "floor" or set(self.upper_loss) & set(OWN_LOSSES)):
            raise ValueError(
                f"`ld_alpha={self.ld_alpha}` is supported with TRL's losses and without `regularizer='floor'` only. Use "
                "`ld_alpha=None`."
            )
        if self.bilevel == "unrolled":
            self._check_deployment()
        if self.sync_ref_model and not self.reads_reference:
            raise ValueError(
                f"`sync_ref_model=True` but nothing reads the reference with `upper_loss={self.upper_loss!r}`, "
                f"`bilevel={self.bilevel!r}` and `regularizer={self.regularizer!r}`. Set `sync_ref_model=False`."
            )

    def _check_deployment(self) -> None:
        """What would let θ out where θ' is meant."""
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` is not supported with `bilevel='unrolled'`: the reference would become θ, and not the θ' "
                "that solves the problem. Set `sync_ref_model=False`, or use another `bilevel`."
            )
        if self.deploy_inner_steps == 0:
            return
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(
                f"`hub_strategy={getattr(self.hub_strategy, 'value', self.hub_strategy)!r}` pushes checkpoints, which are θ with "
                "`bilevel='unrolled'`, and not the θ' that solves the problem. Set `hub_strategy='end'`."
            )
        if self.save_only_model:
            raise ValueError(
                "`save_only_model=True` leaves checkpoints that cannot be resumed, and with `bilevel='unrolled'` they are θ, and "
                "not the θ' that solves the problem. Set `save_only_model=False`; `save_model` at the end saves θ'."
            )
