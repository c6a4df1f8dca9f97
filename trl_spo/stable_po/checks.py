# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What `StablePOTrainer` refuses at construction."""

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .stable_po_config import OWN_LOSSES, StablePOConfig


def check_upper_loss(args: StablePOConfig) -> None:
    """Raises a `ValueError` if the upper losses cannot be had with the other options."""
    own = [name for name in args.upper_loss if name in OWN_LOSSES]
    if args.use_weighting and own:
        raise ValueError(
            f"`use_weighting=True` weighs TRL's losses only, and `upper_loss` has {own}. Set `use_weighting=False`."
        )
    if args.f_divergence_type != "reverse_kl" and own:
        raise ValueError(
            f"`f_divergence_type={args.f_divergence_type!r}` changes TRL's losses only, and `upper_loss` has {own}. Use "
            "'reverse_kl'."
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


def check_anchor(args: StablePOConfig, has_sft_dataset: bool, has_reference: bool) -> None:
    """Raises a `ValueError` if the penalty's anchor is a reference that is not there when it is read."""
    is_read = args.bilevel == "penalty" and args.penalty_anchor == "reference" and args.penalty_weight > 0
    if is_read and has_sft_dataset and not has_reference:
        raise ValueError(
            "`precompute_ref_log_probs=True` keeps no reference, and with `sft_dataset` the penalty's anchor needs it during the "
            "training. Set `precompute_ref_log_probs=False`, pass a `ref_model`, or use `penalty_anchor='lower_level'`."
        )


def check_deployment(args: StablePOConfig, num_rows: int, world_size: int) -> None:
    """Raises a `ValueError` if there are too few rows for the steps that turn θ into θ'."""
    needed = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size * args.deploy_inner_steps
    if num_rows < needed:
        raise ValueError(
            f"`deploy_inner_steps={args.deploy_inner_steps}` takes {needed} rows, batches like those of the training, and the train "
            f"dataset has {num_rows}. Use fewer steps or smaller batches."
        )


def check_stream(args: StablePOConfig, train_dataset: Dataset | IterableDataset) -> None:
    """
    Raises a `ValueError` if the hypergradient could not be that of one optimizer step: a stream may end within it, and its
    gradient is then added to that of the next.
    """
    corrected = args.bilevel == "unrolled" and args.hypergradient != "first_order"
    if corrected and args.gradient_accumulation_steps > 1 and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            f"`hypergradient={args.hypergradient!r}` with `gradient_accumulation_steps={args.gradient_accumulation_steps}` is not "
            "supported on a dataset that streams, which may end within a step. Use `gradient_accumulation_steps=1`, a dataset that "
            "does not stream, or `hypergradient='first_order'`."
        )


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
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(f"{form} is not supported on a model whose parameters are sharded already. {way_out}")
    if args.bilevel == "alternating" and args.enable_jit_checkpoint:
        raise ValueError(
            "`enable_jit_checkpoint=True` is not supported with `bilevel='alternating'`: it saves in the middle of a step, and a "
            "resumed run would take the inner step twice. Use `save_strategy='steps'`."
        )
    for name in ("lomo", "layerwise", "schedule_free"):
        if name in str(getattr(args.optim, "value", args.optim)):
            raise ValueError(
                f"{form} is not supported with `optim={getattr(args.optim, 'value', args.optim)!r}`, which writes the weights "
                f"outside of its own step. Use another optimizer. {way_out}"
            )
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    if plugin is not None and plugin.zero_stage == 3:
        zero = plugin.deepspeed_config["zero_optimization"]
        for name, plain in (
            ("zero_hpz_partition_size", 1),
            ("mics_shard_size", -1),
            ("zero_quantized_weights", False),
        ):
            if zero.get(name, plain) not in ("auto", plain):
                raise ValueError(
                    f"{form} is not supported with `{name}: {zero[name]}` in the DeepSpeed config: it keeps the weights in a second "
                    f"place, which an inner step would not reach. Leave it out. {way_out}"
                )
        if (zero.get("offload_param") or {}).get("device") == "nvme":
            raise ValueError(
                f"{form} is not supported with the parameters offloaded to NVMe. Offload them to the CPU. {way_out}"
            )
    if args.bilevel == "unrolled" and args.deploy_inner_steps > 0:
        if plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
            raise ValueError(
                f"{form} under ZeRO-3 needs `zero3_save_16bit_model: true` in the accelerate config: without it the master "
                "weights are saved, which are θ, and not the θ' that solves the problem."
            )
    if args.bilevel != "unrolled" or args.hypergradient == "first_order":
        return
    form = f"`hypergradient={args.hypergradient!r}`"
    if accelerator.distributed_type == "DEEPSPEED":
        raise ValueError(
            f"{form} is not supported with DeepSpeed, which keeps the outer gradient to itself. Use "
            "`hypergradient='first_order'`, or run without DeepSpeed."
        )
    if any(_draws(module) for module in model.modules()) or args.neftune_noise_alpha:
        raise ValueError(
            f"{form} combines gradients of several forward passes, which dropout and NEFTune's noise make those of different "
            "functions. Use `disable_dropout=True`, `attention_dropout=0` in the model's config and no `neftune_noise_alpha`, or "
            "`hypergradient='first_order'`."
        )
    if args.hypergradient == "finite_difference":
        low = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4}
        precision = next((name for name in ("bf16", "fp16", "tf32") if getattr(args, name)), None)
        if precision is not None or low:
            reason = f"`{precision}=True`" if precision else f"weights in {', '.join(sorted(low))}"
            raise ValueError(
                f"{form} takes the difference of two gradients that are very near each other, and {reason} leaves only rounding "
                "errors of it. Train in float32, or use `hypergradient='first_order'`."
            )
        return
    if getattr(model, "use_kernels", False):
        raise ValueError(
            f"{form} needs a second derivative, which the kernels of `use_kernels=True` do not have. Load the model without "
            "them, or use `hypergradient='first_order'`."
        )
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
            f"{form} needs a second derivative, which quantized layers do not have. Use `hypergradient='first_order'`."
        )


def _draws(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training."""
    attention = getattr(module, "attention_dropout", 0)
    return (isinstance(module, nn.Dropout) and module.p > 0) or (isinstance(attention, float) and attention > 0)
