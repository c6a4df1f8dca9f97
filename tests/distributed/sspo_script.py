# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The scenarios of SSPO that the distributed tests run, see `run_scripts.py`."""

import json
import os
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from peft import LoraConfig

from trl_spo import SSPOConfig, SSPOKTOConfig, SSPOKTOTrainer, SSPOTrainer


# So that a response has several phrases, which are dropped one after another
STOP_WORDS = [f"w{i}" for i in range(0, 20, 3)]
# So that most responses have no key content
MOST_WORDS = [f"w{i}" for i in range(18)]
LORA = {"learning_rate": 1e-2}
KTO = {"loss_type": "apo_zero_unpaired", "gradient_accumulation_steps": 4}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # what has been trained least
}
SCENARIOS = {
    "default": {},
    "shared_one": {"shared_head": True, "degree_sampling": "one", "num_degrees": 4, **EVALUATION},
    "ipo_checkpointing": {"loss_type": ["ipo"], "gradient_checkpointing": True},
    "text": {"removal": "text", "gradient_checkpointing": True, **EVALUATION},
    "text_one": {"removal": "text", "degree_sampling": "one"},
    "empty_accumulation": {"gradient_accumulation_steps": 4, "stop_words": MOST_WORDS},
    "rejected_only": {"chosen_weight": 0.0, "rejected_weight": 1.0},
    "precomputed": {"precompute_ref_log_probs": True},
    "fixed_heads": {"head_learning_rate": 0.0},
    "decayed_heads": {"head_learning_rate": 1e-2, "head_weight_decay": 50.0},
    "best": BEST,
    "lora_text": {**LORA, "removal": "text"},
    "lora_best": {**LORA, **BEST, "gradient_checkpointing": True},
    "kto_apo": KTO,
}
# Its KL pairs the responses of a process's batch, so that it depends on how many processes there are
UNEQUAL = {"kto": {**KTO, "loss_type": "kto", "precompute_ref_log_probs": True}}
BF16 = {"bf16": {"bf16": True}, "bf16_lora_text": {**LORA, "bf16": True, "removal": "text"}}
# With which the model may not run twice. TRL sets it where PEFT meets ZeRO-3
REENTRANT = {
    "reentrant": {
        **LORA,
        "removal": "text",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
}
# Whose evaluations have no example twice, so that all of their metrics, by which the best model is chosen, are those of one process
UNPADDED = ("text", "best", "lora_best")
GLOBAL_BATCH = 16


def unpaired(dataset: Dataset) -> Dataset:
    def one_of(row: dict[str, str], i: int) -> dict[str, str | bool]:
        return {"completion": row["chosen" if i % 3 else "rejected"], "label": i % 3 > 0}

    # Beside the dataset's files, where TRL then keeps what it precomputes, and both processes find it
    with PartialState().main_process_first():
        return dataset.map(one_of, with_indices=True, remove_columns=["chosen", "rejected"])


def train(world: Path, out: Path, scenario: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    options = {
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "beta": 0.5,
        "stop_words": STOP_WORDS,
        "head_hidden_size": 15,  # of an odd size, which ZeRO has to pad
        "head_learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        **(SCENARIOS | UNEQUAL | BF16 | REENTRANT)[scenario],
    }
    config, trainer_class = (SSPOKTOConfig, SSPOKTOTrainer) if "kto" in scenario else (SSPOConfig, SSPOTrainer)
    args = config(
        output_dir=str(out / scenario),
        per_device_train_batch_size=GLOBAL_BATCH // processes // options.get("gradient_accumulation_steps", 1),
        per_device_eval_batch_size=4 // processes,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if deepspeed else None,  # without it DeepSpeed looks for one that this machine lacks
        **options,
    )
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        # By default ZeRO-3 keeps parameters as small as all of these whole
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    dataset = load_from_disk(str(world / "dataset"))
    if "kto" in scenario:
        dataset = unpaired(dataset)
    trainer = trainer_class(
        model=str(world / "model"),
        args=args,
        train_dataset=dataset,
        # By default, the last batch has one example for each but one of the processes
        eval_dataset=dataset.select(range(8 if scenario in UNPADDED else 7)),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if "lora" in scenario else None,
    )
    if trainer.accelerator.is_main_process:
        trainer.degree_heads.save_pretrained(out / scenario / "start")
    batches, compute_loss = [], trainer.compute_loss

    def compute_loss_and_count(model, inputs, *args, **kwargs):
        if model.training:
            key = (inputs["token_degrees"] > 0).any(dim=1)
            batches.append({"key": int(key.sum()), "labels": sorted(set(inputs.get("label", torch.ones(0)).tolist()))})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss_and_count
    trainer.train()
    trainer.save_model(str(out / scenario))
    evaluation = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        report = {
            "distributed_type": str(trainer.accelerator.distributed_type),
            "processes": trainer.accelerator.num_processes,
            "evaluation": evaluation,
            "log": trainer.state.log_history,
            "best": trainer.state.best_model_checkpoint,
            "batches": batches,
        }
        (out / scenario / "report.json").write_text(json.dumps(report))


def run(world: Path, out: Path, scenario: str) -> None:
    if scenario not in REENTRANT:
        train(world, out, scenario)
        return
    try:
        train(world, out, scenario)
    except ValueError as error:
        (out / f"{scenario}_{PartialState().process_index}.txt").write_text(str(error))
