# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What `SoftPOTrainer` refuses at construction, and the reference that it loads for itself."""

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from .._compat import create_model_from_path, get_config_model_id
from .soft_po_config import SoftPOConfig


def refuse_vision(reason: str) -> None:
    """Raises the `ValueError` of a vision-language model."""
    raise ValueError(
        f"`SoftPOTrainer` trains text models, but {reason}. Train the language model alone, or use `trl.DPOTrainer` for "
        "vision-language models."
    )


def check_policy(model: PreTrainedModel, beta: float) -> None:
    """Raises a `ValueError` if the backbone of the policy is not all that its distribution depends on."""
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"`beta={beta}` is not supported with the prompt-learning PEFT method "
            f"{model.active_peft_config.peft_type.value}: the KL regularizer runs the backbone, which would not see the learned "
            "prompt. Use LoRA, or set `beta=0`."
        )


def check_vocabulary(model: PreTrainedModel, ref_model: PreTrainedModel) -> None:
    """Raises a `ValueError` if the two do not share a vocabulary."""
    ours, theirs = (one.config.get_text_config().vocab_size for one in (model, ref_model))
    if ours != theirs:
        raise ValueError(
            f"`ref_model` has a vocabulary of {theirs} tokens and `model` one of {ours}: their distributions cannot be "
            "compared. Pass a `ref_model` with the model's tokenizer, or leave it out."
        )


def check_parallelism(accelerator: Accelerator, beta: float) -> None:
    """Raises a `ValueError` if the model is distributed in a way that the KL regularizer cannot work with."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            f"`beta={beta}` is not supported with `fsdp_version: 1`, which frees the reference's LM head after each of its "
            "forward passes. Set `fsdp_version: 2` in the accelerate config, or use DeepSpeed."
        )
    parallelism = accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallelism, name, 1) > 1:
            raise ValueError(
                f"`beta={beta}` is not supported with `{name}={getattr(parallelism, name)}`: the processes of a group would "
                "each draw online samples of their own. Use ZeRO-3 or FSDP2, or set `beta=0`."
            )


def check_context(dataset: Dataset | IterableDataset, config: PreTrainedConfig, args: SoftPOConfig) -> None:
    """Raises a `ValueError` if a prompt has no tokens, or no room for an online sample in the model's context."""
    if isinstance(dataset, IterableDataset):
        return  # known only when its rows are read
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = [len(ids) for ids in dataset["prompt_ids"]]
    if 0 in lengths:
        raise ValueError(
            f"The prompt of row {dataset['row_id'][lengths.index(0)]} has no tokens, so that no online sample can answer "
            "it. Remove the row, use a tokenizer that adds a BOS token, or set `beta=0`."
        )
    longest = max(lengths)
    if limit is not None and longest + args.max_completion_length > limit:
        room = limit - args.max_completion_length
        too_long = sum(length > room for length in lengths)
        ways = []
        if longest < limit:
            ways.append(f"set `max_completion_length` to at most {limit - longest}")
        if too_long < len(lengths):
            ways.append(f"remove the {too_long} of {len(lengths)} prompts that have more than {room} tokens")
        if not ways:
            ways.append("remove the longest prompts and set a smaller `max_completion_length`")
        raise ValueError(
            f"The longest prompt ({longest} tokens) and `max_completion_length={args.max_completion_length}` exceed the "
            f"model's context of {limit} tokens. To go on, {', or '.join(ways)}."
        )


def load_reference(
    model: str | PreTrainedModel, args: SoftPOConfig, quantization_config: BitsAndBytesConfig | None
) -> PreTrainedModel:
    """A copy of the initial policy, loaded as `DPOTrainer` loads its reference."""
    kwargs = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if isinstance(model, str):
        return create_model_from_path(model, **kwargs)
    kwargs.setdefault("dtype", model.dtype)
    kwargs.setdefault("attn_implementation", model.config._attn_implementation)
    return create_model_from_path(get_config_model_id(model.config), **kwargs)
