# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What is evaluated, saved and pushed of the unrolled form: θ', which solves the problem, and not θ, which the optimizer moves.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from ..metrics import MetricTotals
from .checks import check_deployment
from .sft_data import chosen_half


class DeploymentMixin:
    """The part of [`StablePOTrainer`] that turns θ into θ' and back."""

    def _init_deployment(self) -> None:
        self._is_deployed = False  # the weights are θ', for good or for the moment
        self._saves_checkpoint = False
        if self._deploys:
            self.callback_handler.callbacks.insert(0, _DeployAtTheEnd(self))  # before those that upload the weights

    @contextmanager
    def _deployed(self) -> Iterator[None]:
        """
        The weights that solve the unrolled problem, θ' and not θ, for as long as the block runs. Of another form, or in the middle
        of a step: those that would be deployed after the last one.
        """
        if self._is_deployed:
            yield
            return
        with self._at_home():
            if not self._deploys:
                yield
                return
            if self.is_deepspeed_enabled and self.model_wrapped is self.model:
                raise RuntimeError(
                    "Under DeepSpeed, the unrolled form can be evaluated and saved from the first step of the training on, and "
                    "not before. Use `eval_on_start=True` for an evaluation at the start."
                )
            if self.inner is None:
                self.inner = self._make_inner_step()
            with self.inner.saved():
                self._deploy()
                self._is_deployed = True
                try:
                    yield
                finally:
                    self._is_deployed = False

    def _at_home(self) -> AbstractContextManager:
        """In the middle of an unrolled step, θ for the block."""
        return self.inner.back_home() if self.inner is not None and self.inner.is_away else nullcontext()

    @property
    def _deploys(self) -> bool:
        return self.args.bilevel == "unrolled" and self.args.deploy_inner_steps > 0

    def _deploy_for_good(self) -> None:
        if self.inner is None:
            self.inner = self._make_inner_step()
        self.inner.save()  # `train` goes back there if the steps do not come to their end
        self._deploy()
        self.inner.stay()
        self._is_deployed = True

    def _deploy(self) -> None:
        """Moves from θ to θ'."""
        totals, self._totals["train"] = self._totals["train"], MetricTotals()  # these steps are not training's
        was_training = self.inner.model.training
        self.inner.model.train(self.args.gradient_checkpointing)  # which evaluation mode would switch off
        try:
            self._descend(self._deployment_batches(), self.inner.move)
        finally:
            self.inner.model.train(was_training)
            self._totals["train"] = totals

    def _deployment_batches(self) -> Iterator[list[dict[str, Any]]]:
        """The same rows each time: for each step as many micro-batches as a step of the optimizer has."""
        size, accumulation = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        steps, world, rank = (
            self.args.deploy_inner_steps,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )
        if self._sft_batches is not None:
            for step in range(steps):
                yield [self._sft_batches[step * accumulation + micro_step] for micro_step in range(accumulation)]
            return
        rows = self.train_dataset
        if isinstance(rows, Dataset):
            generator = torch.Generator().manual_seed(self.args.seed)
            rows = rows.select(torch.randperm(len(rows), generator=generator).tolist())
        rows = list(islice(rows, size * accumulation * world * steps))
        check_deployment(self.args, len(rows), world)  # for all processes alike
        for step in range(steps):
            share = rows[step * size * accumulation * world : (step + 1) * size * accumulation * world][rank::world]
            batches = [self.data_collator(share[first : first + size]) for first in range(0, len(share), size)]
            yield [chosen_half(self._prepare_inputs(batch)) for batch in batches]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        # Of the unrolled form: a checkpoint, for resuming, is θ, anything else θ'
        with self._at_home() if self._saves_checkpoint else self._deployed():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saves_checkpoint = False


class _DeployAtTheEnd(TrainerCallback):
    """After the best model is loaded, and before the other callbacks see what the training has come to."""

    def __init__(self, trainer: DeploymentMixin):
        self._trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        self._trainer._deploy_for_good()
