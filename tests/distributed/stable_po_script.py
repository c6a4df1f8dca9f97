# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The scenarios of Stable PO that the distributed tests run, see `run_scripts.py`."""

import json
import os
from pathlib import Path

from datasets import load_from_disk
from peft import LoraConfig

from trl_spo import StablePOConfig, StablePOTrainer


PENALTY = {"penalty_weight": 5.0, "upper_loss": ["apo_down"]}  # which lowers the chosen responses' probability
ALTERNATING = {"bilevel": "alternating", "inner_learning_rate": 0.05}
UNROLLED = {"bilevel": "unrolled", "inner_learning_rate": 0.05}
SCENARIOS = {
    "penalty": PENALTY,
    "penalty_lower_level": {**PENALTY, "penalty_anchor": "lower_level", "inner_learning_rate": 0.05},
    "penalty_accumulation": {**PENALTY, "gradient_accumulation_steps": 4},
    "penalty_lora": {**PENALTY, "learning_rate": 1e-2},
    "alternating": ALTERNATING,
    "alternating_inner": {**ALTERNATING, "learning_rate": 1e-6},
    "alternating_accumulation": {**ALTERNATING, "gradient_accumulation_steps": 4, "inner_steps": 2},
    "alternating_lora": {**ALTERNATING, "learning_rate": 1e-2, "gradient_checkpointing": True},
    "unrolled": {**UNROLLED, "eval_strategy": "steps", "eval_steps": 2},
    "unrolled_accumulation": {**UNROLLED, "gradient_accumulation_steps": 4, "inner_steps": 2},
    "unrolled_lora": {**UNROLLED, "learning_rate": 1e-2},
    "alternating_auto": {"bilevel": "alternating", "inner_step_fraction": 1e-2},
    "penalty_sft": {**PENALTY, "sft_batch_size": 8},
    "alternating_sft": {**ALTERNATING, "sft_batch_size": 8},
    "mix": {**PENALTY, "upper_loss": ["apo_down", "simpo"], "loss_weights": [1.0, 0.5]},
    "simpo": {**PENALTY, "upper_loss": ["simpo"], "penalty_anchor": "lower_level", "inner_learning_rate": 0.05},
    "alphadpo": {**PENALTY, "upper_loss": ["alphadpo"]},
}
BF16 = {"alternating_bf16": {**ALTERNATING, "learning_rate": 1e-6, "bf16": True}}
GLOBAL_BATCH = 16


def run(world: Path, out: Path, scenario: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    options = {
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        **({} if SCENARIOS.get(scenario, {}).get("upper_loss") in (["simpo"], ["alphadpo"]) else {"beta": 0.5}),
        "gradient_checkpointing": False,
        "bf16": False,
        **(SCENARIOS | BF16)[scenario],
    }
    accumulation = options.get("gradient_accumulation_steps", 1)
    if "sft_batch_size" in options:
        options["sft_batch_size"] //= processes
    args = StablePOConfig(
        output_dir=str(out / scenario),
        per_device_train_batch_size=GLOBAL_BATCH // processes // accumulation,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if deepspeed else None,  # without it DeepSpeed looks for one that this machine lacks
        **options,
    )
    dataset = load_from_disk(str(world / "dataset"))
    trainer = StablePOTrainer(
        model=str(world / "model"),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(8)),
        sft_dataset=dataset.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
        if "sft" in scenario
        else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if "lora" in scenario else None,
    )
    trainer.train()
    trainer.save_model(str(out / scenario))
    evaluation = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        report = {
            "distributed_type": str(trainer.accelerator.distributed_type),
            "processes": trainer.accelerator.num_processes,
            "evaluation": evaluation,
            "log": trainer.state.log_history,
        }
        (out / scenario / "report.json").write_text(json.dumps(report))
