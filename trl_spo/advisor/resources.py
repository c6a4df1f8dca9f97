# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Whether a training fits, and how long it takes: findings from the estimates of memory and time.

Time is that of the multiplications, at a stated share of what the GPU can do at best: a multiplication and an addition
for each parameter and token forward, twice as many backward, once more forward with gradient checkpointing, and
forward through the reference; with LoRA, half of the backward pass, since frozen weights have no gradients. Online
samples are generated one token after another, each of which reads all weights from the GPU's memory.
"""

from dataclasses import replace
from math import ceil
from typing import Any

from .findings import Finding
from .gpus import Gpu
from .memory import GIB, ModelSize, estimate_memory
from .plan import Launch, Plan, read_launch


# Share of a GPU's best that a training gets. Our assumption; 0.3 to 0.5 is what large trainings report
UTILISATION = 0.35
# Share of a GPU's memory that an estimate may fill
_FULL = 0.9
_FEW_STEPS = 50
_ALTERNATIVES = ("zero2", "zero3", "fsdp2", "zero3_offload")


def in_words(number: float) -> str:
    """A large number."""
    return f"{number / 1e9:.3g} billion" if number >= 1e8 else f"{number / 1e6:.3g} million"


def rows_of_step(plan: Plan, launch: Launch) -> int:
    """Rows of a step of the optimizer."""
    return plan.get("per_device_train_batch_size") * plan.get("gradient_accumulation_steps") * launch.num_processes


def optimizer_steps(plan: Plan, launch: Launch, rows: int | None) -> int | None:
    """Steps of the optimizer in a training on so many rows; `None` if their number decides, and is not known."""
    if plan.get("max_steps") > 0:
        return plan.get("max_steps")
    if rows is None:
        return None
    return max(ceil(rows / rows_of_step(plan, launch) * plan.get("num_train_epochs")), 1)


def training_flops(size: ModelSize, plan: Plan, tokens: float) -> float:
    """
    Floating-point operations of a training, without generation.

    Args:
        size ([`ModelSize`]):
            The model.
        plan ([`Plan`]):
            The training.
        tokens (`float`):
            Tokens that go through the policy.
    """
    backward = 2 if plan.get("use_peft") else 4
    passes = 2 + backward + (2 if plan.checkpointing else 0)
    if plan.reads_reference and not plan.get("precompute_ref_log_probs"):
        passes += 2
    if plan.takes_apart:  # each response once more with another prompt, through both
        passes += 4
    return passes * size.multiplied * tokens


def estimate_time(
    size: ModelSize, plan: Plan, launch: Launch, gpu: Gpu, steps: int, sequences: float, mean_tokens: float
) -> dict[str, Any] | None:
    """
    How long a training takes.

    Args:
        size ([`ModelSize`]):
            The model.
        plan ([`Plan`]):
            The training.
        launch ([`Launch`]):
            Its processes.
        gpu ([`Gpu`]):
            Each device.
        steps (`int`):
            Steps of the optimizer.
        sequences (`float`):
            Sequences of a row, as the trainer counts rows.
        mean_tokens (`float`):
            Mean length of a sequence.

    Returns:
        `dict[str, Any]`, *optional*: `steps`, `tokens`, `hours`, and those of `generation` among them. `None` if the
        speed of the GPU is not known.
    """
    if gpu.flops is None:
        return None
    tokens = steps * rows_of_step(plan, launch) * sequences * mean_tokens
    flops, generation = training_flops(size, plan, tokens), 0.0
    if plan.method == "soft_po" and plan.get("beta") > 0:
        length = plan.get("max_completion_length")
        online = steps * plan.get("online_samples_per_step") * launch.num_processes * (mean_tokens / 2 + length)
        flops += training_flops(size, plan, online)
        generation = (
            ceil(steps / plan.get("resample_steps")) * length * 2 * size.parameters / (gpu.bandwidth * UTILISATION)
        )
    seconds = flops / (launch.num_processes * gpu.flops * UTILISATION) + generation
    return {"steps": steps, "tokens": tokens, "hours": seconds / 3600, "generation": generation / 3600}


def _which_fit(size: ModelSize, plan: Plan, launch: Launch, gpu: Gpu, tokens: int, responses: int) -> list[str]:
    """What could be changed for it to fit."""
    fits = []

    def try_it(name: str, changed: Plan, how: Launch) -> None:
        if estimate_memory(size, changed, how, tokens, responses).total <= _FULL * gpu.memory * GIB:
            fits.append(name)

    batch = 2 if plan.takes_apart else 1  # KTO needs two
    changed = {
        "per_device_train_batch_size": batch,
        "gradient_checkpointing": True,
        "activation_checkpointing": None,
    }
    smaller = replace(plan, options=plan.options | changed)
    try_it(f"a batch size of {batch} a device and gradient checkpointing", smaller, launch)
    for name in _ALTERNATIVES:
        if name != launch.name:
            try_it(f"`--accelerate_config {name}`", plan, read_launch(name, launch.num_processes))
    return fits


def resource_findings(
    size: ModelSize,
    plan: Plan,
    launch: Launch,
    gpu: Gpu | None,
    rows: int | None,
    sequences: float,
    mean_tokens: float,
    longest: int,
    responses: int = 2,
) -> list[Finding]:
    """
    Memory and time, both estimated.

    Args:
        size ([`ModelSize`]):
            The model.
        plan ([`Plan`]):
            The training.
        launch ([`Launch`]):
            Its processes.
        gpu ([`Gpu`], *optional*):
            Each device.
        rows (`int`, *optional*):
            Of the train split, as the trainer counts them, if that is known.
        sequences (`float`):
            Sequences of a row.
        mean_tokens (`float`):
            Mean length of a sequence.
        longest (`int`):
            Length of the longest one.
        responses (`int`, *optional*, defaults to `2`):
            Responses of the row that has the most.

    Returns:
        `list[Finding]`
    """
    memory = estimate_memory(size, plan, launch, longest, responses)
    of_states = sum(memory.states.values()) / GIB
    parts = ", ".join(
        f"{name} {value / GIB:.3g}" for name, value in (memory.states | memory.working).items() if value >= 0.005 * GIB
    )
    where = f"{launch.num_processes} {'process' if launch.num_processes == 1 else 'processes'}"
    where += f" of `{launch.name}`" if launch.name else ""
    detail = (
        f"Estimate for {in_words(size.parameters)} parameters, of which {in_words(size.trainable)} are trained, {where}, sequences of {longest} tokens: "
        f"{memory.total / GIB:.3g} GiB a device ({parts})."
    )
    if memory.cpu:
        detail += f" {memory.cpu / GIB:.3g} GiB a process in the memory of the CPU."
    data = {
        **memory.to_dict(),
        "parameters": size.parameters,
        "trainable": size.trainable,
        "processes": launch.num_processes,
        "estimate": True,
    }
    severity, title, remedy = "info", "Memory (estimate)", ""
    if gpu is not None:
        data |= {"gpu": gpu.name, "gpu_memory": gpu.memory}
        detail += f" {gpu.name} has {gpu.memory:.0f} GiB."
        if memory.total > _FULL * gpu.memory * GIB:
            sure = of_states > gpu.memory
            severity, title = (
                ("error", "It does not fit into memory")
                if sure
                else ("warning", "It may not fit into memory (estimate)")
            )
            if sure:
                detail += f" {of_states:.3g} GiB of it are weights, gradients, optimizer and reference, which is no estimate."
            fits = _which_fit(size, plan, launch, gpu, longest, responses)
            lora = (
                ""
                if plan.get("use_peft")
                else " LoRA (`--use_peft`) needs neither gradients of all weights nor a second model."
            )
            remedy = (
                f"By the same estimate, it fits with {', or '.join(fits)}."
                if fits
                else "More devices, or a shorter `max_length`."
            ) + lora
            data["fits"] = fits
    elif not launch.cpu:
        remedy = "Name the GPU (`--gpu h100`) to hear whether it fits, and how long it takes."
    findings = [Finding("memory", severity, title, detail, remedy, data)]
    steps = optimizer_steps(plan, launch, rows)
    if steps is None:
        return findings
    if steps < _FEW_STEPS:
        findings.append(
            Finding(
                "few_steps",
                "warning",
                "Few steps of the optimizer",
                f"{steps} steps in all, by the batch size, {plan.get('gradient_accumulation_steps')} accumulated, and {plan.get('num_train_epochs'):g} epochs.",
                "Smaller batches, or more epochs.",
                {"steps": steps},
            )
        )
    time = None if gpu is None else estimate_time(size, plan, launch, gpu, steps, sequences, mean_tokens)
    if time is not None:
        hours = time["hours"]
        text = f"{hours:.1f} h" if hours >= 1 else f"{max(hours * 60, 1):.0f} min"
        generation = f", {time['generation'] / hours:.0%} of it generation" if time["generation"] else ""
        findings.append(
            Finding(
                "time",
                "info",
                "Time (estimate)",
                f"{text} on {launch.num_processes} {gpu.name}{generation}: {time['steps']} steps, {in_words(time['tokens'])} tokens, at an assumed "
                f"{UTILISATION:.0%} of the GPU's best. Take it as right within a factor of two, evaluation and loading left out.",
                "",
                {**time, "gpu": gpu.name, "utilisation": UTILISATION, "estimate": True},
            )
        )
    return findings
