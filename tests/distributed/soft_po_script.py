# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The scenarios of Soft PO that the distributed tests run, see `run_scripts.py`."""

import hashlib
import json
import os
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import load_from_disk
from peft import LoraConfig

from trl_spo import SoftPOConfig, SoftPOTrainer
from trl_spo._compat import DistributedBackend
from trl_spo.soft_po.online_samples import OnlineSample


SCENARIOS = {
    # The same online samples, whatever the number of processes
    "given_samples": {"beta": 0.5},
    "accumulation": {"beta": 0.5, "gradient_accumulation_steps": 2},
    "lora": {"beta": 0.5, "learning_rate": 1e-2},
    "lora_checkpointing": {
        "beta": 0.5,
        "learning_rate": 1e-2,
        "gradient_checkpointing": True,
        "kl_estimator": "score",
    },
    "no_kl": {"beta": 0.0, "calibration": "none", "alpha": 0.5},
    "sigmoid_weights": {
        "beta": 0.0,
        "calibration": "none",
        "alpha": 0.5,
        "weighting": "sigmoid",
        "gradient_accumulation_steps": 2,
    },
    # The eval dataset does not divide among the processes
    "evaluation": {"beta": 0.5, "weighting": "sigmoid", "eval_online_samples": 6, "per_device_eval_batch_size": 3},
    "bf16": {"beta": 0.5, "bf16": True},
    # Samples of its own for each process
    "sampling": {"beta": 0.5, "max_steps": 8, "resample_steps": 1, "online_samples_per_step": 64},
}
GLOBAL_BATCH = 8


def given_samples(model: torch.nn.Module, prompts: list[tuple[int, list[int]]], *seed: int) -> list[OnlineSample]:
    """Completions that depend on the prompt's row only."""
    return [OnlineSample(row, ids, [4 + (5 * row + 3 * t) % 20 for t in range(6)] + [1], True) for row, ids in prompts]


def checksum(trainer: SoftPOTrainer) -> str:
    """Of the reference's weights, gathered."""
    digest = hashlib.sha256()
    parameters = list(trainer.ref_model.parameters())
    with DistributedBackend(trainer.accelerator).gather_params(parameters):
        for parameter in parameters:
            digest.update(parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def run(world: Path, out: Path, scenario: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    options = {
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "alpha": 0.1,
        "resample_steps": 2,
        "online_samples_per_step": 8,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        **SCENARIOS[scenario],
    }
    options["online_samples_per_step"] //= processes
    accumulation = options.get("gradient_accumulation_steps", 1)
    args = SoftPOConfig(
        output_dir=str(out / scenario),
        per_device_train_batch_size=GLOBAL_BATCH // processes // accumulation,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if deepspeed else None,  # without it DeepSpeed looks for one that this machine lacks
        **{"bf16": False, **options},
    )
    dataset = load_from_disk(str(world / "dataset"))
    trainer = SoftPOTrainer(
        model=str(world / "model"),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(7)) if scenario == "evaluation" else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if "lora" in scenario else None,
    )
    drawn: list[list[int]] = []
    if args.beta > 0:
        draw = trainer.sampler.sample if scenario == "sampling" else given_samples

        def sample(*args):
            samples = draw(*args)
            drawn.extend(sample.completion_ids for sample in samples)
            return samples

        trainer.sampler.sample = sample
    before = None if trainer.ref_model is None else checksum(trainer)
    trainer.train()
    after = None if trainer.ref_model is None else checksum(trainer)
    trainer.save_model(str(out / scenario))
    evaluation = trainer.evaluate(trainer.eval_dataset) if scenario == "evaluation" else None
    drawn_by_rank = gather_object([drawn])
    if trainer.accelerator.is_main_process:
        report = {
            "distributed_type": str(trainer.accelerator.distributed_type),
            "processes": trainer.accelerator.num_processes,
            "reference": [before, after],
            "drawn": drawn_by_rank,
            "evaluation": evaluation,
            "log": trainer.state.log_history,
        }
        (out / scenario / "report.json").write_text(json.dumps(report))
