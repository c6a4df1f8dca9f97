# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What `StablePOTrainer` refuses at construction."""

from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel

from .stable_po_config import OWN_LOSSES, StablePOConfig


def check_upper_loss(args: StablePOConfig) -> None:
    """Raises a `ValueError` if the upper losses cannot be had with the other options."""
    own = [name for name in args.upper_loss if name in OWN_LOSSES]
    if args.use_weighting and own:
        raise ValueError(
            f"`use_weighting=True` weighs TRL's losses only, and `upper_loss` has {own}. Set `use_weighting=False`."
        )
    if "alphadpo" in own and args.per_device_train_batch_size * args.world_size < 2:
        raise ValueError(
            "`upper_loss='alphadpo'` standardises margins over the batch, and `per_device_train_batch_size=1` in one process "
            "makes batches of one pair. Use at least 2."
        )


def check_lower_level(args: StablePOConfig, sft_dataset: Dataset | None) -> None:
    """Raises a `ValueError` if the data of the lower level and the options do not go together."""
    if sft_dataset is None and args.sft_batch_size is not None:
        raise ValueError(
            f"`sft_batch_size={args.sft_batch_size}` is read with `sft_dataset` only. Pass one, or leave `sft_batch_size` out."
        )
    if sft_dataset is not None and not args.takes_inner_steps and args.penalty_weight == 0:
        raise ValueError("`sft_dataset` is given, but with `penalty_weight=0` nothing reads it. Leave it out.")


def check_inner_steps(model: PreTrainedModel, args: StablePOConfig, accelerator: Accelerator, is_vlm: bool) -> None:
    """Raises a `ValueError` if the steps of the lower level cannot be taken exactly on this model."""
    form = f"`bilevel={args.bilevel!r}`" if args.bilevel != "penalty" else "`penalty_anchor='lower_level'`"
    way_out = "Use `bilevel='penalty'` with `penalty_anchor='reference'`, which takes no steps of its own."
    if is_vlm:
        raise ValueError(f"{form} is supported for text models only. {way_out}")
    if accelerator.distributed_type == "FSDP":
        raise ValueError(f"{form} is not supported with FSDP, whose parameters are sharded on the way. {way_out}")
    parallelism = accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallelism, name, 1) > 1:
            raise ValueError(f"{form} is not supported with `{name}={getattr(parallelism, name)}`. {way_out}")
    if args.bilevel != "unrolled" or args.hypergradient == "first_order":
        return
    form = f"`hypergradient={args.hypergradient!r}`"
    if accelerator.distributed_type == "DEEPSPEED":
        raise ValueError(
            f"{form} is not supported with DeepSpeed, which keeps the outer gradient to itself. Use "
            "`hypergradient='first_order'`, or run without DeepSpeed."
        )
    if args.hypergradient != "exact":
        return
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise ValueError(
            f"{form} needs a second derivative, which `attn_implementation={attention!r}` does not have. Use 'eager' or 'sdpa', "
            "or `hypergradient='finite_difference'`."
        )
    for name in ("torch_compile", "use_liger_kernel"):
        if getattr(args, name):
            raise ValueError(
                f"{form} needs a second derivative, which the fused operations of `{name}=True` do not have. Set "
                f"`{name}=False`, or use `hypergradient='finite_difference'`."
            )
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        raise ValueError(
            f"{form} needs a second derivative, which quantized layers do not have. Use `hypergradient='finite_difference'`."
        )
