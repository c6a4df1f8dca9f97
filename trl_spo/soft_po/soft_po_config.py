# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import dataclass, field, fields
from typing import Any

from trl import DPOConfig


# Options of DPO that Soft PO does not read
_DPO_ONLY_OPTIONS = (
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
    "discopop_tau",
    "padding_free",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)

# Values at which a sampling option leaves the model's own distribution as it is
_NEUTRAL_SAMPLING = {
    "do_sample": (True,),
    "num_beams": (1,),
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (0, -1, None),
    "min_p": (0.0, None),
    "typical_p": (1.0,),
    "repetition_penalty": (1.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
}

# Options of generation that only concern how it runs: of transformers' `GenerationConfig`, and of vLLM's `SamplingParams`
_HARMLESS_KWARGS = ("use_cache", "cache_config", "compile_config", "disable_compile", "prefill_chunk_size")
_HARMLESS_VLLM_KWARGS = ("detokenize", "skip_special_tokens", "spaces_between_special_tokens")


@dataclass
class SoftPOConfig(DPOConfig):
    r"""
    Configuration class for the [`SoftPOTrainer`].

    This class includes only the parameters that are specific to Soft PO training. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] and [`~trl.DPOConfig`] documentation. The options of
    [`~trl.DPOConfig`] that choose DPO's loss (`loss_type`, `label_smoothing`, `f_divergence_type`, `ld_alpha`, ...) are
    refused: Soft PO's loss does not read them.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the preference loss

        alpha (`float`, *optional*, defaults to `0.1`):
            Softness α > 0. The preference loss alone is minimised by `softmax(r/α)`, with `calibration="reference"` by
            `π_ref exp(r/α)`: the smaller, the sharper. The counterpart of DPO's `beta`.
        weighting (`str`, *optional*, defaults to `"none"`):
            Weights μ of the pairs, which turn down responses that the model itself finds improbable: `"none"` (all 1),
            `"power"` (`(π_w + π_l)^γ`) or `"sigmoid"` (`2σ(c (v - mean v))` with `v = (π_w + π_l)^γ` and the mean over the
            global batch, or over the eval dataset; with gradient accumulation, and in evaluation, this costs a forward
            pass of its own).
        gamma (`float`, *optional*, defaults to `0.05`):
            Exponent γ >= 0 of the weights. Sequence probabilities are tiny, so useful values are small.
        weighting_scale (`float`, *optional*, defaults to `1.0`):
            Slope c > 0 of `weighting="sigmoid"`.
        logp_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"` (the paper's) or `"mean"` per completion token. With the mean, the theorem on the minimiser no longer
            holds.
        calibration (`str`, *optional*, defaults to `"reference"`):
            `"none"`: the paper's loss, on `log π`. `"reference"`: on `log π - log π_ref`; costs the reference's forward pass
            on the pairs, or none with `precompute_ref_log_probs=True`.

        > Parameters that control the global regularizer

        beta (`float`, *optional*, defaults to `0.1`):
            Weight β >= 0 of `D_KL(π||π_ref)` over the model's own samples. 0 switches sampling and (without calibration)
            the reference off altogether.
        kl_estimator (`str`, *optional*, defaults to `"token"`):
            `"token"` (the paper's: low variance, its gradient leaves out how the prefixes move) or `"score"` (adds the
            reward-to-go of the KL: the exact gradient, of more variance).
        resample_steps (`int`, *optional*, defaults to `8`):
            T, the optimizer steps after which new samples are drawn from the model.
        online_samples_per_step (`int`, *optional*, defaults to `4`):
            Sequences that the KL is taken over, per device and optimizer step.
        online_buffer_size (`int`, *optional*):
            Sequences drawn per device at each resampling, a multiple of `online_samples_per_step`; the steps take their
            share in turn. Defaults to `online_samples_per_step`: the same sequences until they are redrawn.
        importance_sampling_cap (`float`, *optional*):
            If set, each sample's KL is multiplied by `min(π(y)/π_old(y), cap)`, which corrects for the steps since the
            sample was drawn. Not corrected by default; `staleness/ratio` tells how much there is to correct.
        eval_online_samples (`int`, *optional*, defaults to `64`):
            Sequences, over all devices, that each evaluation measures the KL on, from held-out prompts.

        > Parameters that control generation

        max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum length in tokens of an online sample.
        temperature (`float`, *optional*, defaults to `1.0`):
            Only 1 is accepted, and likewise `top_p` 1, `top_k` 0, `min_p` `None` and `repetition_penalty` 1: samples of
            anything but the model's own distribution estimate another divergence.
        top_p (`float`, *optional*, defaults to `1.0`):
            See `temperature`.
        top_k (`int`, *optional*, defaults to `0`):
            See `temperature`.
        min_p (`float`, *optional*):
            See `temperature`.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            See `temperature`.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Additional keyword arguments for [`~transformers.GenerationConfig`], or for `SamplingParams` with vLLM, that do
            not change the distribution.
        cache_implementation (`str`, *optional*):
            Implementation of the cache method for faster generation when `use_vllm` is set to `False`.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Whether to gather the weights of a DeepSpeed ZeRO-3 model for generation. Without, generation is much slower
            and takes less memory.

        > Parameters that control generation acceleration powered by vLLM

        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to draw the online samples with vLLM.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"server"` or `"colocate"`.
        vllm_model_impl (`str`, *optional*, defaults to `"vllm"`):
            Model implementation backend for vLLM, `"vllm"` or `"transformers"`.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Whether to put vLLM to sleep between the samplings.
        vllm_server_base_url (`str`, *optional*):
            Base URL of the vLLM server. If provided, `vllm_server_host` and `vllm_server_port` are ignored.
        vllm_server_host (`str`, *optional*, defaults to `"0.0.0.0"`):
            Host of the vLLM server.
        vllm_server_port (`int`, *optional*, defaults to `8000`):
            Port of the vLLM server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the vLLM server.
        vllm_group_port (`int`, *optional*, defaults to `51216`):
            Port of the weight-update group.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory for a colocated vLLM.
        vllm_max_model_length (`int`, *optional*):
            Context window of a colocated vLLM: at least the longest prompt plus `max_completion_length`.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Tensor parallel size of a colocated vLLM.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + ["generation_kwargs"]

    # Parameters that control the preference loss
    alpha: float = field(
        default=0.1,
        metadata={
            "help": "Softness α > 0. The preference loss alone is minimised by `softmax(r/α)`, with "
            "`calibration='reference'` by `π_ref exp(r/α)`: the smaller, the sharper."
        },
    )
    weighting: str = field(
        default="none",
        metadata={
            "help": "Weights μ of the pairs: 'none', 'power' or 'sigmoid'.",
            "choices": ["none", "power", "sigmoid"],
        },
    )
    gamma: float = field(
        default=0.05,
        metadata={"help": "Exponent γ >= 0 of the weights. Useful values are small."},
    )
    weighting_scale: float = field(
        default=1.0,
        metadata={"help": "Slope c > 0 of `weighting='sigmoid'`."},
    )
    logp_reduction: str = field(
        default="sum",
        metadata={
            "help": "'sum' (the paper's) or 'mean' per completion token of the log-probabilities.",
            "choices": ["sum", "mean"],
        },
    )
    calibration: str = field(
        default="reference",
        metadata={
            "help": "'none': the paper's loss, on log π. 'reference': on log π - log π_ref; costs the reference's forward "
            "pass on the pairs, or none with `precompute_ref_log_probs=True`.",
            "choices": ["none", "reference"],
        },
    )

    # Parameters that control the global regularizer
    beta: float = field(
        default=0.1,
        metadata={
            "help": "Weight β >= 0 of the KL divergence to the reference over the model's own samples. 0 switches "
            "sampling and (without calibration) the reference off altogether."
        },
    )
    kl_estimator: str = field(
        default="token",
        metadata={
            "help": "'token' (the paper's: low variance, biased gradient) or 'score' (exact gradient, more variance).",
            "choices": ["token", "score"],
        },
    )
    resample_steps: int = field(
        default=8,
        metadata={"help": "Optimizer steps after which new samples are drawn from the model."},
    )
    online_samples_per_step: int = field(
        default=4,
        metadata={"help": "Sequences that the KL is taken over, per device and optimizer step."},
    )
    online_buffer_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences drawn per device at each resampling, a multiple of `online_samples_per_step`; the steps "
            "take their share in turn. Defaults to `online_samples_per_step`."
        },
    )
    importance_sampling_cap: float | None = field(
        default=None,
        metadata={
            "help": "If set, each sample's KL is multiplied by min(π(y)/π_old(y), cap), which corrects for the steps "
            "since the sample was drawn."
        },
    )
    eval_online_samples: int = field(
        default=64,
        metadata={"help": "Sequences, over all devices, that each evaluation measures the KL on."},
    )

    # Parameters that control generation
    max_completion_length: int = field(
        default=256,
        metadata={"help": "Maximum length in tokens of an online sample."},
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Only 1 is accepted: samples of another distribution estimate another divergence."},
    )
    top_p: float = field(default=1.0, metadata={"help": "Only 1 is accepted, see `temperature`."})
    top_k: int = field(default=0, metadata={"help": "Only 0 is accepted, see `temperature`."})
    min_p: float | None = field(default=None, metadata={"help": "Only None is accepted, see `temperature`."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Only 1 is accepted, see `temperature`."})
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Additional keyword arguments for `GenerationConfig`, or for `SamplingParams` with vLLM, that do not "
            "change the distribution."
        },
    )
    cache_implementation: str | None = field(
        default=None,
        metadata={"help": "Implementation of the cache method for faster generation when use_vllm is set to False."},
    )
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Whether to gather the weights of a DeepSpeed ZeRO-3 model for generation. Without, generation is "
            "much slower and takes less memory."
        },
    )

    # Parameters that control generation acceleration powered by vLLM
    use_vllm: bool = field(
        default=False,
        metadata={"help": "Whether to draw the online samples with vLLM."},
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={"help": "'server' or 'colocate'.", "choices": ["server", "colocate"]},
    )
    vllm_model_impl: str = field(
        default="vllm",
        metadata={"help": "Model implementation backend for vLLM, 'vllm' or 'transformers'."},
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={"help": "Whether to put vLLM to sleep between the samplings."},
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={"help": "Base URL of the vLLM server."},
    )
    vllm_server_host: str = field(
        default="0.0.0.0",
        metadata={"help": "Host of the vLLM server. Ignored if `vllm_server_base_url` is provided."},
    )
    vllm_server_port: int = field(
        default=8000,
        metadata={"help": "Port of the vLLM server. Ignored if `vllm_server_base_url` is provided."},
    )
    vllm_server_timeout: float = field(
        default=240.0,
        metadata={"help": "Seconds to wait for the vLLM server."},
    )
    vllm_group_port: int = field(
        default=51216,
        metadata={"help": "Port of the vLLM weight-update group."},
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={"help": "Share of the GPU's memory for a colocated vLLM."},
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={
            "help": "Context window of a colocated vLLM: at least the longest prompt plus max_completion_length."
        },
    )
    vllm_tensor_parallel_size: int = field(
        default=1,
        metadata={"help": "Tensor parallel size of a colocated vLLM."},
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_ranges()
        self._check_choices()
        self._check_dpo_options()
        self._check_sampling()

    def _check_ranges(self) -> None:
        def require(name: str, minimum: float, what: str, strict: bool = False) -> None:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                good = False
            else:
                good = value > minimum if strict else value >= minimum
            if not good:
                bound = f"{'>' if strict else '>='} {minimum}"
                raise ValueError(f"`{name}` must be finite and {bound}, got {value}: {what}.")

        def require_count(name: str, what: str) -> None:
            require(name, 1, what)
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"`{name}` must be a whole number, got {getattr(self, name)!r}: {what}.")

        require("alpha", 0, "it is the softness of the preference loss; try values from 0.05 to 0.3", strict=True)
        require("beta", 0, "it is the weight of the KL regularizer; use 0 to switch it off")
        require("gamma", 0, "it is the exponent of the weights; use 0 or `weighting='none'` for weights of 1")
        require("weighting_scale", 0, "it is the slope of `weighting='sigmoid'`", strict=True)
        require_count(
            "resample_steps", "new samples are drawn every `resample_steps` optimizer steps; use 1 for each step"
        )
        require_count("online_samples_per_step", "to train without the KL regularizer set `beta=0`")
        require_count("eval_online_samples", "to evaluate without the KL set `beta=0`")
        require_count("max_completion_length", "it is the length of an online sample in tokens")
        if self.importance_sampling_cap is not None:
            require("importance_sampling_cap", 0, "use `None` for no correction", strict=True)
        if self.online_buffer_size is None:
            self.online_buffer_size = self.online_samples_per_step
        require_count("online_buffer_size", "it is the number of sequences drawn at each resampling")
        if self.online_buffer_size % self.online_samples_per_step != 0:
            raise ValueError(
                f"`online_buffer_size` ({self.online_buffer_size}) must be a multiple of `online_samples_per_step` "
                f"({self.online_samples_per_step}), which the steps take from it in turn; use "
                f"{max(1, round(self.online_buffer_size / self.online_samples_per_step)) * self.online_samples_per_step}."
            )

    def _check_choices(self) -> None:
        # `HfArgumentParser` checks "choices" on the command line only
        for option in fields(self):
            choices, value = option.metadata.get("choices"), getattr(self, option.name)
            if option.name in SoftPOConfig.__annotations__ and choices and value not in choices:
                raise ValueError(f"`{option.name}` must be one of {choices}, got {value!r}.")

    def _check_dpo_options(self) -> None:
        defaults = DPOConfig.__dataclass_fields__
        for name in _DPO_ONLY_OPTIONS:
            option, value = defaults[name], getattr(self, name)
            default = option.default_factory() if callable(option.default_factory) else option.default
            if value != default:
                raise ValueError(
                    f"`{name}={value!r}` is an option of DPO that Soft PO does not read. Leave it at its default "
                    f"({default!r}), or use `trl.DPOTrainer`."
                )
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` is not supported: the reference's hidden states are kept with the online samples, "
                "so a reference that moves would be out of date. Set `sync_ref_model=False`."
            )
        if self.precompute_ref_log_probs and self.calibration == "none":
            raise ValueError(
                "`precompute_ref_log_probs=True` is meaningless with `calibration='none'`, whose loss never reads the "
                "reference's log-probabilities of the pairs. Set one of `precompute_ref_log_probs=False` and "
                "`calibration='reference'`."
            )

    def _check_sampling(self) -> None:
        options = {
            name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        }
        harmless = _HARMLESS_VLLM_KWARGS if self.use_vllm else _HARMLESS_KWARGS
        for name, value in [*options.items(), *(self.generation_kwargs or {}).items()]:
            neutral = _NEUTRAL_SAMPLING.get(name)
            if neutral is None and name not in harmless:
                raise ValueError(
                    f"`generation_kwargs` has `{name}={value!r}`, which may change the distribution that is sampled from, "
                    "while the regularizer is the KL divergence of the model's own. Remove it; supported are "
                    f"{list(harmless)}."
                )
            if neutral is not None and value not in neutral:
                raise ValueError(
                    f"`{name}={value}` is not supported: the regularizer is the KL divergence of the model's own "
                    f"distribution, and samples drawn with another `{name}` would estimate another divergence. Set "
                    f"`{name}={neutral[0]}`."
                )
        # The others are at a value that changes nothing, and not every backend knows them
        self.generation_kwargs = {k: v for k, v in (self.generation_kwargs or {}).items() if k in harmless} or None
