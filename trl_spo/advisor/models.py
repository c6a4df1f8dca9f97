# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What can be said of a model without its weights."""

import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file


class NoLanguageModel(ValueError):
    """A model that is none of a language alone."""


@dataclass(frozen=True)
class ModelFacts:
    """
    What a model's files say, without its weights.

    Args:
        name (`str`):
            Path or name.
        config ([`~transformers.PretrainedConfig`]):
            Its config.
        stop_ids (`set[int]`):
            Tokens that stop its generation.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer.
        kwargs (`dict[str, Any]`, *optional*):
            Of `from_pretrained`, to load the weights that belong to it.
    """

    name: str
    config: PretrainedConfig
    stop_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens, if the config says so."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens."""
        return getattr(self.config.get_text_config(), "vocab_size", None)


def _ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def read_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelFacts:
    """
    Reads the config, the generation config and the tokenizer of a model.

    Args:
        name (`str`):
            Path or name.
        revision (`str`, *optional*):
            On the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether its own code may run.

    Returns:
        [`ModelFacts`]

    Raises:
        `ValueError`: there is no such model, or it is an adapter.
    """
    kwargs: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        try:
            adapter = find_adapter_config_file(name, revision=kwargs["revision"])
        except OSError:  # there is nothing of that name, which the first error says
            adapter = None
        if adapter is not None:
            base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
            raise ValueError(
                f"The model {name!r} is an adapter of {base!r}. Merge it (`model.merge_and_unload()`) and save the whole model, or name "
                "the model that it was trained on."
            ) from error
        raise ValueError(f"The model {name!r} cannot be read: {error}") from error
    try:
        generation = GenerationConfig.from_pretrained(name, revision=kwargs["revision"])
    except OSError:  # a model need not have one
        generation = None
    stop_ids = _ids(getattr(generation, "eos_token_id", None)) or _ids(
        getattr(config.get_text_config(), "eos_token_id", None)
    )
    return ModelFacts(name, config, stop_ids, tokenizer, kwargs)


def empty_model(facts: ModelFacts, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """
    The model without weights, on the device `meta`: its parameters have shapes, and take no memory.

    Raises:
        [`NoLanguageModel`]: transformers has no causal language model for the config.
    """
    config = deepcopy(facts.config)  # into which the dtype is written
    try:
        with init_empty_weights(include_buffers=True):  # or each would be made in memory first
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    except ValueError as error:
        raise NoLanguageModel(f"'{facts.name}' is no causal language model: {error}") from error
    model.tie_weights()
    return model


def fits_here(model: PreTrainedModel, facts: ModelFacts) -> str | None:
    """
    Whether the weights may be loaded on this machine without asking: into half of the memory that is free on its
    device.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model without weights.
        facts ([`ModelFacts`]):
            What its files say, the dtype of the weights among it.

    Returns:
        `str`, *optional*: why not.
    """
    each = (getattr(facts.config, "dtype", None) or torch.float32).itemsize
    needed = each * sum(parameter.numel() for parameter in model.parameters())
    if torch.cuda.is_available():
        free, where = torch.cuda.mem_get_info()[0], "this machine's GPU"
    else:
        free, where = psutil.virtual_memory().available, "this machine"
    if needed <= free / 2:
        return None
    return f"'{facts.name}' has {needed / 2**30:.3g} GiB of weights, and {where} has {free / 2**30:.3g} GiB free."
