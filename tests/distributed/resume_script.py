# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the resume tests run: `resume_script.py WORLD RUN...`, in one process or several, where a RUN is OUT/KIND@KILL_AT.

Each run trains ten steps with a checkpoint every second one, in the folder OUT/KIND. With KILL_AT >= 0 the last process kills itself,
as a machine that goes away would, in the middle of that optimizer step; with -1 it runs to the end, from the last checkpoint if
there is one.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from leaving import leave
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint

from trl_spo import SoftPOConfig, SoftPOTrainer, SSPOConfig, SSPOTrainer, StablePOConfig, StablePOTrainer


SOFT_PO = {
    "beta": 0.5,
    "resample_steps": 3,  # so that checkpoints fall on buffers of every age
    "online_samples_per_step": 4,
    "online_buffer_size": 12,
    "importance_sampling_cap": 2.0,
    "max_completion_length": 8,
}
SSPO = {
    "degree_sampling": "one",
    "stop_words": [f"w{i}" for i in range(0, 20, 3)],
    "head_hidden_size": 15,
    "head_weight_decay": 0.1,
}
KINDS = {
    "full": SOFT_PO,
    "lora": SOFT_PO,
    "penalty_sft": {"upper_loss": "apo_down", "penalty_weight": 5.0},
    "alternating": {"bilevel": "alternating", "inner_learning_rate": 0.05, "inner_steps": 2},
    "unrolled": {"bilevel": "unrolled", "inner_learning_rate": 0.05},
    "unrolled_lora": {"bilevel": "unrolled", "inner_learning_rate": 0.05},
    "sspo": SSPO,
    "sspo_lora": SSPO,
    "sspo_four_degrees": {**SSPO, "num_degrees": 4},
}


def main(world: Path, out: Path, kill_at: int) -> None:
    kind = out.name
    lora, deepspeed = "lora" in kind, os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if KINDS[kind] is SOFT_PO:
        config, trainer_class = SoftPOConfig, SoftPOTrainer
    elif kind.startswith("sspo"):
        config, trainer_class = SSPOConfig, SSPOTrainer
    else:
        config, trainer_class = StablePOConfig, StablePOTrainer
    args = config(
        output_dir=str(out),
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2 if lora else 1e-3,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        ddp_backend="gloo" if deepspeed else None,  # without it DeepSpeed looks for one that this machine lacks
        report_to="none",
        save_steps=2,
        logging_steps=1,
        **KINDS[kind],
    )
    if kind.startswith("sspo") and deepspeed and args.deepspeed_plugin.zero_stage == 3:
        # By default ZeRO-3 keeps parameters as small as all of these whole
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    dataset = load_from_disk(str(world / "dataset"))
    sft = {"sft_dataset": dataset.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")}
    trainer = trainer_class(
        model=str(world / "model"),
        args=args,
        train_dataset=dataset,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1) if lora else None,
        **(sft if "sft" in kind else {}),
    )
    if kill_at >= 0 and trainer.accelerator.process_index == trainer.accelerator.num_processes - 1:
        step, calls = trainer.training_step, [0]

        def training_step(*args, **kwargs):
            calls[0] += 1
            if trainer.state.global_step == kill_at and calls[0] % 2 == 0:  # the second micro-batch
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        trainer.training_step = training_step
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.exists() else None)
    trainer.save_model(str(out / "final"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        folder, kill_at = name.rsplit("@", 1)
        main(Path(sys.argv[1]), Path(folder), int(kill_at))
    leave()
