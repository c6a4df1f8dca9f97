# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import dataclass, field, fields

from trl import DPOConfig, KTOConfig

from .key_content import EXTRACTORS, check_extractor, languages


@dataclass
class _DegreeConfig:
    """What [`SSPOConfig`] and [`SSPOKTOConfig`] share, and document."""

    num_degrees: int = field(default=3, metadata={"help": "Number N >= 2 of preference degrees."})
    chosen_weight: float = field(
        default=0.2,
        metadata={
            "help": "Weight γ_w >= 0 of the degree loss of the chosen (desirable) responses. 0 switches it off."
        },
    )
    rejected_weight: float = field(
        default=0.2,
        metadata={
            "help": "Weight γ_l >= 0 of the degree loss of the rejected (undesirable) responses. 0 switches it off."
        },
    )
    degree_sampling: str = field(
        default="all",
        metadata={
            "help": "Levels of a response that a step trains on: 'all' N of them, or one that is drawn ('one').",
            "choices": ["all", "one"],
        },
    )
    removal: str = field(
        default="hidden_states",
        metadata={
            "help": "How key content is taken away: 'hidden_states' leaves out the states of its tokens in the forward pass that "
            "the alignment loss makes anyway, 'text' runs the shortened texts through the model.",
            "choices": ["hidden_states", "text"],
        },
    )
    extractor: str = field(
        default="rake",
        metadata={
            "help": "Extractor of key phrases. 'random' is the control: as many tokens as 'rake' drops, at random places.",
            "choices": list(EXTRACTORS),
        },
    )
    language: str = field(default="en", metadata={"help": "Code of the responses' language, of its stop words."})
    stop_words: list[str] | None = field(
        default=None, metadata={"help": "Words that are never key content, in the place of the language's stop words."}
    )
    shared_head: bool = field(
        default=False, metadata={"help": "Whether one head serves the chosen and the rejected responses."}
    )
    head_hidden_size: int = field(default=256, metadata={"help": "Size of the hidden layer of the heads' MLPs."})
    head_learning_rate: float = field(
        default=1e-3,
        metadata={"help": "Initial learning rate of the heads, whose schedule is that of `learning_rate`."},
    )
    head_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the heads."})

    @property
    def trains_heads(self) -> bool:
        """Whether there is a degree loss at all."""
        return self.chosen_weight > 0 or self.rejected_weight > 0

    def _check_degree_options(self) -> None:
        for option in fields(_DegreeConfig):
            # `HfArgumentParser` checks "choices" on the command line only
            choices, value = option.metadata.get("choices"), getattr(self, option.name)
            if choices and value not in choices:
                raise ValueError(f"`{option.name}` must be one of {choices}, got {value!r}.")
        for name, minimum, what in (
            ("num_degrees", 2, "the heads tell at least a whole response from a shortened one"),
            ("head_hidden_size", 1, "it is the size of a layer"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"`{name}` must be a whole number >= {minimum}, got {value!r}: {what}.")
        for name, what in (
            ("chosen_weight", "it is the weight of a loss; use 0 to switch it off"),
            ("rejected_weight", "it is the weight of a loss; use 0 to switch it off"),
            ("head_learning_rate", "to train no heads, set `chosen_weight` and `rejected_weight` to 0"),
            ("head_weight_decay", "use 0 for none"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"`{name}` must be finite and >= 0, got {value!r}: {what}.")
        if isinstance(self.stop_words, str):
            raise ValueError(
                f"`stop_words` must be a list of words, got {self.stop_words!r}. Use `[{self.stop_words!r}]`."
            )
        if not self.trains_heads:
            return
        if self.language not in languages():
            raise ValueError(
                f"`language={self.language!r}` has no stop words here. Use one of {', '.join(languages())}; for another language, "
                "pass its `stop_words` and leave `language` at its default."
            )
        check_extractor(self.extractor)
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` is not supported with the degree heads: it copies the policy parameter by parameter, and "
                "the reference has no heads. Set `sync_ref_model=False`."
            )
        if self.extractor == "yake" and self.language in ("ja", "zh"):
            raise ValueError(
                f"`extractor='yake'` finds no words in `language={self.language!r}`, which is written without spaces. Use "
                "`extractor='rake'` or `extractor='position_rank'`."
            )
        for name in ("lomo", "layerwise"):
            if name in str(getattr(self.optim, "value", self.optim)):
                raise ValueError(
                    f"`optim={getattr(self.optim, 'value', self.optim)!r}` is not supported: it has one learning rate for each layer "
                    "of its own, and the heads need theirs. Use another optimizer."
                )


@dataclass
class SSPOConfig(_DegreeConfig, DPOConfig):
    r"""
    Configuration class for the [`SSPOTrainer`].

    This class includes only the parameters that are specific to SSPO training. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] and [`~trl.DPOConfig`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the degree losses

        num_degrees (`int`, *optional*, defaults to `3`):
            Number N >= 2 of preference degrees: from 0, the whole response, to N-1, the response without its key content.
        chosen_weight (`float`, *optional*, defaults to `0.2`):
            Weight γ_w >= 0 of the degree loss of the chosen responses. `0` switches it off.
        rejected_weight (`float`, *optional*, defaults to `0.2`):
            Weight γ_l >= 0 of the degree loss of the rejected responses. `0` switches it off.
        degree_sampling (`str`, *optional*, defaults to `"all"`):
            Levels of a response that a step trains on: `"all"` N of them, or `"one"` that is drawn. An evaluation takes all.

        > Parameters that control the removal of key content

        removal (`str`, *optional*, defaults to `"hidden_states"`):
            `"hidden_states"`: the states of the removed tokens are left out of those of the forward pass that the alignment loss
            makes anyway. `"text"`: the shortened texts are run through the model, so that no later state has seen what was
            removed; costs N-1 forward passes (one with `degree_sampling="one"`).
        extractor (`str`, *optional*, defaults to `"rake"`):
            Extractor of key phrases: `"rake"`, `"yake"`, `"position_rank"`, or `"random"`, the control: as many tokens as with
            `"rake"`, at random places.
        language (`str`, *optional*, defaults to `"en"`):
            Code of the responses' language, of its stop words.
        stop_words (`list[str]`, *optional*):
            Words that are never key content, in the place of the language's stop words.

        > Parameters that control the heads

        shared_head (`bool`, *optional*, defaults to `False`):
            Whether one head serves the chosen and the rejected responses.
        head_hidden_size (`int`, *optional*, defaults to `256`):
            Size of the hidden layer of the heads' MLPs.
        head_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Initial learning rate of the heads, which start from nothing. Its schedule is that of `learning_rate`.
        head_weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of the heads.
    """

    def __post_init__(self):
        super().__post_init__()
        self._check_degree_options()


@dataclass
class SSPOKTOConfig(_DegreeConfig, KTOConfig):
    r"""
    Configuration class for the [`SSPOKTOTrainer`].

    Its parameters besides those of [`~trl.KTOConfig`] are those of [`SSPOConfig`], with the desirable responses in the place of
    the chosen ones, and the undesirable ones in the place of the rejected.
    """

    def __post_init__(self):
        super().__post_init__()
        self._check_degree_options()
