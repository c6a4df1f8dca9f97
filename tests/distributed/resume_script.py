# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the resume tests run, in one process (`resume_script.py WORLD RUN...`) or several (see `run_scripts.py`). A RUN is OUT/KIND@END.

Each run trains ten steps with a checkpoint every second one, in the folder OUT/KIND, from the last checkpoint if there is one. With a
step for END the last process kills itself, as a machine that goes away would, in the middle of that optimizer step; with "end" it
runs to the end, and with "error" it has to fail, and leaves its error in OUT/KIND.txt.

Every run has processes of its own. They are forked when all is imported, which takes longer than a run.
"""

import importlib
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from peft import LoraConfig
from process import begin, leave
from torch.distributed import TCPStore
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


def train(world: Path, out: Path, kill_at: int | None) -> None:
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
    if kill_at is not None and is_last_process():
        step, calls = trainer.training_step, [0]

        def training_step(*args, **kwargs):
            calls[0] += 1
            if trainer.state.global_step == kill_at and calls[0] % 2 == 0:  # the second micro-batch
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        trainer.training_step = training_step
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.exists() else None)
    trainer.save_model(str(out / "final"))


def is_last_process() -> bool:
    return int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def forked(function: Callable[[], None], stderr: Path | None) -> int:
    """The exit code of a process that calls the function, and has what it says of an error in a file."""
    pid = os.fork()
    if pid == 0:
        try:
            random.seed()  # as in a process of its own, so that what is drawn without a seed differs among them
            np.random.seed()
            torch.seed()
            function()
            leave()
        except BaseException:
            if stderr is None:
                traceback.print_exc()
            else:
                stderr.write_text(traceback.format_exc())
        finally:
            sys.stderr.flush()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_each(world: Path, runs: list[str]) -> None:
    """The runs one after another. What is in this process has no process group yet."""
    for name in ("deepspeed", "rake_nltk"):  # which each run would import
        importlib.import_module(name)
    given, store = dict(os.environ), None
    if "RANK" in os.environ:
        # Each run has a store of its own, or its processes would meet those of the run before. The launcher's tells them where.
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for number, name in enumerate(runs):
        folder, end = name.rsplit("@", 1)
        if store is not None:
            if os.environ["RANK"] == "0":
                store.set(f"port of run {number}", free_port())
            os.environ["MASTER_PORT"] = store.get(f"port of run {number}").decode()  # waits for it
        kill_at = int(end) if end.isdigit() else None
        stderr = Path(f"{folder}.txt") if end == "error" and is_last_process() else None
        code = forked(partial(train, world, Path(folder), kill_at), stderr)
        if kill_at is None:
            expected = code == (0 if end == "end" else 1)
        elif is_last_process():
            last = get_last_checkpoint(folder)
            expected = code == -signal.SIGKILL and last.endswith(f"checkpoint-{kill_at // 2 * 2}")
        else:  # fails when it misses the other
            expected = code == 1
        if not expected:
            sys.exit(f"{name} ended with {code}")
    os.environ.clear()
    os.environ.update(given)


if __name__ == "__main__":
    begin()
    run_each(Path(sys.argv[1]), sys.argv[2:])
