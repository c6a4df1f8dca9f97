# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the resume tests run: `resume_script.py WORLD OUT KILL_AT`.

Trains ten steps with a checkpoint every second one. With KILL_AT >= 0 the process kills itself, as a machine that goes
away would, in the middle of that optimizer step; with -1 it runs to the end, from the last checkpoint if there is one.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint

from trl_spo import SoftPOConfig, SoftPOTrainer


def main(world: Path, out: Path, kill_at: int, lora: bool) -> None:
    args = SoftPOConfig(
        output_dir=str(out),
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2 if lora else 1e-3,
        beta=0.5,
        resample_steps=3,  # so that checkpoints fall on buffers of every age
        online_samples_per_step=4,
        online_buffer_size=12,
        importance_sampling_cap=2.0,
        max_completion_length=8,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_steps=2,
        logging_steps=1,
    )
    trainer = SoftPOTrainer(
        model=str(world / "model"),
        args=args,
        train_dataset=load_from_disk(str(world / "dataset")),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1) if lora else None,
    )
    if kill_at >= 0:
        step = trainer.training_step

        def training_step(*args, **kwargs):
            if trainer.state.global_step == kill_at and trainer._micro_step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        trainer.training_step = training_step
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.exists() else None)
    trainer.save_model(str(out / "final"))
    trainer.accelerator.end_training()  # else Gloo's threads may abort the process while it exits


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), "lora" in sys.argv[4:])
