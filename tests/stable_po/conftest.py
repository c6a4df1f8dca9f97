# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from trl_spo import StablePOConfig, StablePOTrainer


@pytest.fixture
def make_trainer(model_path, pairs, tmp_path):
    """Makes a trainer of the tiny Llama on the eight pairs; keyword arguments go to the config, those of the trainer in `trainer_kwargs`."""

    def make(trainer_kwargs=None, **kwargs):
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "optim": "sgd",
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "beta": 0.5,
        }
        if kwargs.get("upper_loss") in ("simpo", "alphadpo"):
            del defaults["beta"]  # which is refused
        args = StablePOConfig(**{**defaults, **kwargs})
        arguments = {"model": model_path, "train_dataset": pairs, **(trainer_kwargs or {})}
        return StablePOTrainer(args=args, **arguments)

    return make
