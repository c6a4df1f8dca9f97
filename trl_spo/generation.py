# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What generation must leave as it was: the global random state, the model's mode and its generation config."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from transformers import GenerationConfig


@contextmanager
def own_random_state(device: torch.device, *seed: int) -> Iterator[None]:
    """Draws in this context depend on `seed` only, and leave the global random state as it was."""
    devices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        yield


@contextmanager
def evaluation_mode(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Puts the model into evaluation mode, and back into the one it was in."""
    training = accelerator.unwrap_model(
        model
    ).training  # a DeepSpeed engine's own flag does not follow that of its module
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def only_generation_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """
    Hides the model's own generation config, whose `repetition_penalty`, `min_p`, `suppress_tokens`, ... would fill in what
    `config` leaves unset and so change the distribution that is sampled from.
    """
    holders = [model, model.get_base_model()] if is_peft_model(model) else [model]
    originals = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, original in zip(holders, originals, strict=True):
            holder.generation_config = original
