# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
from datasets import Dataset

from trl_spo import SSPOConfig, SSPOKTOConfig, SSPOKTOTrainer, SSPOTrainer


# Few, so that the short responses of the tests have several phrases
STOP_WORDS = ["was", "a", "and", "with", "the", "is", "my", "not", "it"]

DEFAULTS = {
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
    "head_hidden_size": 8,
    "head_learning_rate": 0.5,
    "stop_words": STOP_WORDS,
}


@pytest.fixture
def make_trainer(model_path, pairs, tmp_path):
    """Makes a trainer of the tiny Llama on the eight pairs; keyword arguments go to the config, those of the trainer in `trainer_kwargs`."""

    def make(trainer_kwargs=None, **kwargs):
        args = SSPOConfig(**{"output_dir": str(tmp_path / "output"), **DEFAULTS, **kwargs})
        return SSPOTrainer(args=args, **{"model": model_path, "train_dataset": pairs, **(trainer_kwargs or {})})

    return make


@pytest.fixture
def unpaired(pairs):
    """The 16 responses of the eight pairs, desirable and undesirable in turn."""
    rows = []
    for pair in pairs:
        rows += [
            {"prompt": pair["prompt"], "completion": pair["chosen"], "label": True},
            {"prompt": pair["prompt"], "completion": pair["rejected"], "label": False},
        ]
    return Dataset.from_list(rows)


@pytest.fixture
def make_kto_trainer(model_path, unpaired, tmp_path):
    """As `make_trainer`, of `SSPOKTOTrainer`."""

    def make(trainer_kwargs=None, **kwargs):
        args = SSPOKTOConfig(**{"output_dir": str(tmp_path / "output"), **DEFAULTS, **kwargs})
        return SSPOKTOTrainer(args=args, **{"model": model_path, "train_dataset": unpaired, **(trainer_kwargs or {})})

    return make


@pytest.fixture
def heads_of():
    """A function that copies the weights of a trainer's heads."""

    def copy(trainer):
        return {name: parameter.detach().clone() for name, parameter in trainer.degree_heads.named_parameters()}

    return copy
