# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
How much memory a training takes on each device. An estimate, of which the first part is exact:

- **States**: weights, gradients, AdamW's two moments, and the reference. By 16-bit mixed precision as `Trainer` does
  it, weights, gradients and moments all have the dtype that the weights were loaded in (TRL's default: float32, 4 + 4
  + 8 bytes a parameter). DeepSpeed keeps weights and gradients in 16 bits and a copy in 32 bits with the moments (2 +
  2 + 12), and divides the last among N devices (ZeRO-1), the gradients too (2), and the weights (3), as in [ZeRO's
  paper](https://huggingface.co/papers/1910.02054). FSDP divides all of 4 + 4 + 8. LoRA trains its adapters only, in
  float32, and its reference is the model without them.
- **Activations**: with gradient checkpointing the input of each layer, and all of one; without, all of all. What a
  layer keeps was counted on Llama: `8 H + 2 H_kv + 4 I` numbers a token (hidden size H, that of keys and values, that
  of the MLP), attention without its matrix; autocast keeps 26 H bytes more.
- **The rest**: what docs/distributed.md has counted (16-bit copies that autocast makes of 32-bit weights, buckets,
  layers that are gathered, the copies of the optimizer's step), the LM head's gradient in 32 bits and its tile of logits
  (TRL never has all of them), the cache of generation; and 1 GiB for CUDA and its libraries, our rule of thumb.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import calculate_maximum_sizes
from transformers import PretrainedConfig

from .models import ModelFacts, empty_model
from .plan import Launch, Plan


GIB = 2**30
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
# A tile of TRL's fused LM head: tokens and columns of the vocabulary
_TILE = (4096, 8192)
_CUDA = 1.0 * GIB
_BUCKET = 1e9  # bytes of DeepSpeed's, by default
_GROUP = 1e9  # parameters that ZeRO-3 gathers, and updates, at once at most
# Bytes of the optimizer's states for each parameter of float32
_OPTIMIZERS = (("8bit", 2), ("4bit", 1), ("adafactor", 0.1), ("sgd", 0), ("lion", 4), ("adamw", 8))


@dataclass(frozen=True)
class ModelSize:
    """
    How large a model is.

    Args:
        parameters (`int`):
            Of the model, without adapters.
        trainable (`int`):
            Those that are trained: all of them, or those of the adapter.
        embeddings (`int`):
            Those of the input embedding and the LM head.
        multiplied (`int`):
            Those that each token is multiplied with: without an input embedding of its own, and of experts those that
            a token is sent to.
        largest_layer (`int`):
            Those of the largest layer.
        layers, hidden, key_value, mlp, vocabulary (`int`):
            Its dimensions; `mlp` of the experts that a token is sent to, taken together.
    """

    parameters: int
    trainable: int
    embeddings: int
    multiplied: int
    largest_layer: int
    layers: int
    hidden: int
    key_value: int
    mlp: int
    vocabulary: int


def _first(config: PretrainedConfig, *names: str, default: int | None = None) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), default)


def measure_model(facts: ModelFacts, plan: Plan) -> ModelSize:
    """
    How large a model is, without loading it.

    Args:
        facts ([`ModelFacts`]):
            What its files say.
        plan ([`Plan`]):
            The training, which may have an adapter.

    Returns:
        [`ModelSize`]

    Raises:
        `ValueError`: PEFT does not know which layers of this architecture to adapt, or the architecture is none of a
        language model.
    """
    model, config = empty_model(facts), facts.config.get_text_config()
    named = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in named.values())
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = inputs is head
    experts = sum(parameter.numel() for name, parameter in named.items() if ".experts." in name)
    of_token = _first(config, "num_experts_per_tok", "num_experts_per_token", "top_k_experts", default=1)
    number = _first(config, "num_local_experts", "num_experts", "n_routed_experts", default=1)
    active = total - experts + experts * min(of_token, number) // max(number, 1)
    _, (largest, _) = calculate_maximum_sizes(model)  # bytes of float32
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    heads = _first(config, "num_attention_heads", "n_head", default=1)
    head_size = _first(config, "head_dim", default=hidden // heads)
    mlp = _first(config, "moe_intermediate_size", default=None) if experts else None
    mlp = mlp or _first(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    trainable = total
    if plan.get("use_peft"):
        trainable = _adapter_parameters(model, plan)
    return ModelSize(
        parameters=total,
        trainable=trainable,
        embeddings=inputs.numel() + (0 if tied else head.numel()),
        multiplied=active - (0 if tied else inputs.numel()),
        largest_layer=int(largest) // 4,
        layers=_first(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        key_value=_first(config, "num_key_value_heads", default=heads) * head_size,
        mlp=mlp * (min(of_token, number) if experts else 1),
        vocabulary=_first(config, "vocab_size"),
    )


def _adapter_parameters(model: torch.nn.Module, plan: Plan) -> int:
    from peft import get_peft_model
    from trl import ModelConfig, get_peft_config

    from .plan import defaults_of

    options = ModelConfig(**{name: plan.get(name) for name in defaults_of(ModelConfig)})
    adapted = get_peft_model(model, get_peft_config(options), low_cpu_mem_usage=True)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class Memory:
    """
    Bytes on each device, and in the memory of the CPU for each process.

    Args:
        states (`dict[str, float]`):
            Weights, gradients, optimizer, reference: what is there at each step.
        working (`dict[str, float]`):
            What comes and goes.
        cpu (`float`):
            What is offloaded.
    """

    states: dict[str, float]
    working: dict[str, float]
    cpu: float

    @property
    def total(self) -> float:
        """All of it on a device."""
        return sum(self.states.values()) + sum(self.working.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in GiB."""
        return {
            "states": {name: value / GIB for name, value in self.states.items()},
            "working": {name: value / GIB for name, value in self.working.items()},
            "total": self.total / GIB,
            "cpu": self.cpu / GIB,
        }


def _weight_bytes(size: ModelSize, plan: Plan, each: float) -> float:
    """Of the model without adapters."""
    if plan.get("load_in_4bit"):  # a scale for each 64 weights
        return 0.5625 * (size.parameters - size.embeddings) + each * size.embeddings
    if plan.get("load_in_8bit"):
        return 1.0 * (size.parameters - size.embeddings) + each * size.embeddings
    return each * size.parameters


def states(size: ModelSize, plan: Plan, launch: Launch, dtype: int) -> tuple[dict[str, float], float]:
    """
    Bytes of what is there at each step.

    Args:
        size ([`ModelSize`]):
            The model.
        plan ([`Plan`]):
            The training.
        launch ([`Launch`]):
            Its processes.
        dtype (`int`):
            Bytes of a weight as it is loaded.

    Returns:
        `tuple[dict[str, float], float]`: on each device, by name; and in the memory of the CPU, for each process.
    """
    n, lora = launch.num_processes, bool(plan.get("use_peft"))
    optimizer = str(getattr(plan.get("optim"), "value", plan.get("optim")))
    moments = next((each for part, each in _OPTIMIZERS if part in optimizer), 8)
    quantized = plan.get("load_in_4bit") or plan.get("load_in_8bit")
    # PEFT keeps adapters in float32, but TRL those of quantized models in bfloat16
    trained = (2 if quantized else 4) if lora else dtype
    frozen = _weight_bytes(size, plan, dtype) if lora else 0.0
    if launch.deepspeed:
        each = 2 if plan.mixed_precision else 4
        frozen = _weight_bytes(size, plan, each) if lora else 0.0
        stage = launch.zero_stage
        weights = frozen + each * size.trainable
        gradients = each * size.trainable
        kept = (4 + moments) * size.trainable
        found = {
            "weights": weights / (n if stage == 3 else 1),
            "gradients": gradients / (n if stage >= 2 else 1),
            "optimizer": kept / (n if stage >= 1 else 1),
        }
        reference = _weight_bytes(size, plan, each) / (n if stage == 3 else 1)
    elif launch.fsdp:
        found = {
            "weights": (frozen + (4 if plan.mixed_precision else trained) * size.trainable) / n,
            "gradients": (4 if plan.mixed_precision else trained) * size.trainable / n,
            "optimizer": moments * size.trainable * (4 if plan.mixed_precision else trained) / 4 / n,
        }
        reference = _weight_bytes(size, plan, dtype) / n
    else:
        found = {
            "weights": frozen + trained * size.trainable,
            "gradients": float(trained * size.trainable),
            "optimizer": moments * size.trainable * trained / 4,
        }
        reference = _weight_bytes(size, plan, dtype)
    found["reference"] = reference if _keeps_reference(plan) else 0.0
    cpu = 0.0
    if launch.offload_optimizer:  # with the gradients that it reads
        cpu += found["optimizer"] + 6 * size.trainable / n
        found["optimizer"] = found["gradients"] = 0.0
    if launch.offload_parameters:
        cpu += found["weights"] + found["reference"]
        found["weights"] = found["reference"] = 0.0
    return {name: float(value) for name, value in found.items()}, float(cpu)


def _keeps_reference(plan: Plan) -> bool:
    """Whether a second model is in memory throughout the training."""
    if plan.get("use_peft") or not plan.reads_reference:
        return False
    # Soft PO's regularizer needs it all the same
    return not plan.get("precompute_ref_log_probs") or (plan.method == "soft_po" and plan.get("beta") > 0)


def layer_bytes(size: ModelSize, number: int, residual: int) -> float:
    """
    Bytes that a layer keeps of a token for its backward pass.

    Args:
        size ([`ModelSize`]):
            The model.
        number (`int`):
            Bytes of a number that is multiplied.
        residual (`int`):
            Bytes of a number of the hidden states between layers.
    """
    extra = 26 if residual > number else 4 if number == 2 else 0
    return number * (8 * size.hidden + 2 * size.key_value + 4 * size.mlp) + extra * size.hidden


def estimate_memory(size: ModelSize, plan: Plan, launch: Launch, tokens: int, responses: int = 2) -> Memory:
    """
    What a training takes on each device.

    Args:
        size ([`ModelSize`]):
            The model.
        plan ([`Plan`]):
            The training.
        launch ([`Launch`]):
            Its processes.
        tokens (`int`):
            Length of the longest sequence, to which the others of its batch are padded.
        responses (`int`, *optional*, defaults to `2`):
            Responses of a row: of the longest list.

    Returns:
        [`Memory`]
    """
    dtype = _DTYPES.get(plan.dtype, 2)  # "auto" is that of the file, and these have 16 bits as a rule
    found, cpu = states(size, plan, launch, dtype)
    number = 2 if plan.mixed_precision or dtype == 2 else 4
    residual = 4 if number == 4 or (plan.mixed_precision and not launch.deepspeed and dtype == 4) else 2
    batch, length = plan.sequences(responses), tokens
    samples = 0
    if plan.method == "soft_po" and plan.get("beta") > 0:  # which has a backward pass of its own
        length_of_sample = tokens + plan.get("max_completion_length")
        if plan.get("online_samples_per_step") * length_of_sample > batch * length:
            batch, length = plan.get("online_samples_per_step"), length_of_sample
        samples = (plan.get("online_buffer_size") or plan.get("online_samples_per_step")) * length_of_sample
    at_once = batch * length
    of_layer = at_once * layer_bytes(size, number, residual)
    inputs = size.layers * at_once * size.hidden * residual
    working = {
        "activations": inputs + of_layer if plan.checkpointing else size.layers * of_layer,
        "hidden states and LM head": at_once * size.hidden * 12.0
        + size.vocabulary * size.hidden * (0 if plan.get("use_peft") else 4)
        + number * min(at_once, _TILE[0]) * min(size.vocabulary, _TILE[1]),
        **_of_launch(size, plan, launch, dtype, found),
    }
    if plan.method == "stable_po" and plan.get("bilevel") != "penalty":
        working["inner step"] = found["gradients"]
    if samples and not plan.get("use_vllm"):
        working["cache of generation"] = 2.0 * samples * size.layers * size.key_value * number
    if launch.deepspeed:  # gradients in 32 bits and a copy of them, when there are no activations
        trained = size.trainable / (launch.num_processes if launch.zero_stage else 1)
        step = 6.0 * (min(trained, _GROUP) if launch.zero_stage == 3 else trained) * (not launch.offload_optimizer)
        still_there = ("bucket", "gathered layers") if launch.zero_stage == 3 else ()
        gone = sum(value for name, value in working.items() if name not in still_there)
        working["step of the optimizer"] = max(step - gone, 0.0)
    if not launch.cpu:
        working["CUDA"] = _CUDA
    return Memory(found, working, cpu)


def _of_launch(size: ModelSize, plan: Plan, launch: Launch, dtype: int, found: dict[str, float]) -> dict[str, float]:
    """What is there besides because of how the training is launched, as counted in docs/distributed.md."""
    models = 2 if _keeps_reference(plan) else 1
    if launch.deepspeed:
        gathered = 2.0 * models * min(size.parameters, _GROUP) if launch.zero_stage == 3 else 0.0
        return {"bucket": _BUCKET if launch.zero_stage else 0.0, "gathered layers": gathered}
    if launch.fsdp:  # TRL shards the reference in one piece
        whole = 4.0 * size.parameters if models == 2 else 0.0
        return {"gathered layers": max(whole, 8.0 * size.largest_layer)}
    quantized = plan.get("load_in_4bit") or plan.get("load_in_8bit")
    # Autocast keeps copies of the weights that are trained; of frozen ones, checkpointing leaves those of one layer
    casts = plan.mixed_precision and dtype == 4 and not quantized and not (plan.get("use_peft") and plan.checkpointing)
    return {
        "16-bit copies": 2.0 * models * size.parameters if casts else 0.0,
        "buckets of gradients": found["gradients"] if launch.num_processes > 1 else 0.0,
    }
