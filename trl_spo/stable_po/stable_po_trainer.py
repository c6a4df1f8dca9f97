# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction
from trl import DPOTrainer

from .. import losses
from .._compat import get_config_model_id, no_reference_model
from ..metrics import MetricTotals
from ..model_card import save_model_card
from ..preference_checks import check_preferences, columns_of
from .checks import (
    check_anchor,
    check_deployment,
    check_inner_steps,
    check_lower_level,
    check_stream,
    check_upper_loss,
)
from .deployment import DeploymentMixin
from .inner_step import InnerStep, inner_product, norm
from .sft_data import SFTBatches, chosen_half, prepare_sft_dataset
from .stable_po_config import OWN_LOSSES, REFERENCE_FREE, TRL_LOSSES, StablePOConfig


logger = get_logger(__name__)

# Share of the parameters that an inner step must change in low precision, below which it is warned about
_MIN_CHANGED = 0.5


class StablePOTrainer(DeploymentMixin, DPOTrainer):
    """
    Trainer for Stable Preference Optimization (Stable PO), proposed in the paper [Stable Preference Optimization: A Bilevel
    Approach to Catastrophic Preference Shift](https://huggingface.co/papers/2507.07723).

    The upper level optimises any DPO-style preference loss, the lower level is supervised fine-tuning on the chosen responses
    and defines the region that the upper level may not leave. How it departs from the paper: the constants, the anchor of the
    penalty and the form of the regularizer are our choice.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_spo import StablePOTrainer

    >>> dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

    >>> trainer = StablePOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model, chosen as in [`~trl.DPOTrainer`]: by default the initial policy. There is none if nothing reads
            it.
        args ([`StablePOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            As in [`~trl.DPOTrainer`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs as in [`~trl.DPOTrainer`] (`prompt`, `chosen`, `rejected`), standard or conversational.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `dict[str, Dataset | IterableDataset]`):
            Dataset to use for evaluation. It must meet the same requirements as `train_dataset`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            As in [`~trl.DPOTrainer`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            As in [`~trl.DPOTrainer`].
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            As in [`~trl.DPOTrainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            As in [`~trl.DPOTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            As in [`~trl.DPOTrainer`].
        sft_dataset ([`~datasets.Dataset`], *optional*):
            Data of the lower level, in the formats of [`~trl.SFTTrainer`]: language modelling (`text` or `messages`) or
            prompt-completion. Defaults to the chosen responses of the batch.
    """

    _tag_names = ["trl", "dpo", "trl-spo", "stable-po"]
    _name = "Stable PO"
    _paper = {
        "title": "Stable Preference Optimization: A Bilevel Approach to Catastrophic Preference Shift",
        "id": "2507.07723",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{jian2025stable,
                title   = {{Stable Preference Optimization: A Bilevel Approach to Catastrophic Preference Shift}},
                author  = {Chengtao Jian and Kai Yang and Tianhao Gao and Wuguang Ni and Keying Yang and Bowen Xiao and Jiajun Liu and Ye Ouyang},
                year    = 2025,
                eprint  = {arXiv:2507.07723},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        ref_model: PreTrainedModel | None = None,
        args: StablePOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,  # noqa: F821
        sft_dataset: Dataset | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = StablePOConfig(f"{model_name.split('/')[-1]}-StablePO")
        elif not isinstance(args, StablePOConfig):
            raise TypeError(f"`args` must be a `StablePOConfig`, got `{type(args).__name__}`.")
        if isinstance(train_dataset, Dataset | IterableDataset):
            columns_of(train_dataset, "train")  # raises if it is empty, which TRL does not say
        check_upper_loss(args)
        check_lower_level(args, sft_dataset)
        check_stream(args, train_dataset)
        if ref_model is not None and not args.reads_reference:
            raise ValueError(
                f"`ref_model` is given, but nothing reads it with `upper_loss={args.upper_loss!r}`, `bilevel={args.bilevel!r}` and "
                f"`regularizer={args.regularizer!r}`. Leave it out."
            )
        with nullcontext() if args.reads_reference else no_reference_model(isinstance(model, str)):
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        weights = args.loss_weights or [1.0] * len(args.upper_loss)
        upper = list(zip(args.upper_loss, weights, strict=True))
        self.loss_types = [name for name, _ in upper if name in TRL_LOSSES]  # what TRL's part of the loss adds up
        self.loss_weights = [weight for name, weight in upper if name in TRL_LOSSES]
        self._own_losses = [(name, weight) for name, weight in upper if name in OWN_LOSSES]

        self._totals = {"train": MetricTotals(), "eval": MetricTotals()}
        self._eval_prefix = "eval"
        self._micro_step = 0  # index of the next micro-batch in the optimizer step
        self._batches: list[dict[str, Any]] = []  # of the optimizer step, for the lower level
        self._anchors: list[torch.Tensor] = []  # SFT loss of the lower level in nats, of each of them
        self.inner: InnerStep | None = None
        self._init_deployment()
        # Nats and tokens of the outer forward passes
        self._sft_after = torch.zeros(2, device=self.accelerator.device)
        if args.takes_inner_steps:
            check_inner_steps(self.model, args, self.accelerator, self._is_vlm)
        has_reference = self.ref_model is not None or is_peft_model(self.model)
        check_anchor(args, sft_dataset is not None, has_reference or not args.precompute_ref_log_probs)
        if self._deploys and sft_dataset is None and isinstance(self.train_dataset, Dataset):
            check_deployment(args, len(self.train_dataset), self.accelerator.num_processes)
        self._sft_batches: SFTBatches | None = None
        if sft_dataset is not None:
            rows = prepare_sft_dataset(sft_dataset, self._tokenizer, args)
            size = args.sft_batch_size or args.per_device_train_batch_size
            self._sft_batches = SFTBatches(rows, size, self._tokenizer.pad_token_id, args.seed, self.accelerator)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: StablePOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        dataset = check_preferences(dataset, dataset_name, allow_lists=False)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if next(iter(dataset), None) is None:
            raise ValueError(
                f"The {dataset_name} dataset is empty after dropping the prompts that fill `max_length={args.max_length}`. Set a "
                "larger `max_length`."
            )
        return dataset

    # Loss

    @staticmethod
    def _model_kwargs(inputs: dict[str, Any]) -> dict[str, Any]:
        # A key that the model does not know it may silently swallow
        ours = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
        return {**{key: value for key, value in inputs.items() if key not in ours}, "use_cache": False}

    def _forward(self, model, inputs, **kwargs) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Outputs of the fused LM head, log-probability of each token, mask of the positions that predict a completion."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**self._model_kwargs(inputs), **kwargs, labels=labels, fused_lm_head=True)
        token_mask = inputs["completion_mask"][:, 1:]
        # Prompt-learning PEFT prepends virtual tokens to the outputs; keep the positions of the real tokens
        return outputs, outputs.log_probs[:, -token_mask.size(1) :], token_mask

    def _reference_logps(self, inputs: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The reference's log-probabilities of the chosen and the rejected responses, as far as they are read."""
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        if not self.args.reads_reference:
            return None, None
        needs_pairs = any(name not in REFERENCE_FREE for name in self.args.upper_loss)
        if needs_pairs or self._is_vlm:  # images do not come in halves
            return self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        floor = self.args.regularizer == "floor" and self.args.regularizer_weight > 0
        if floor or (self._anchor_is_reference and self._sft_batches is None):
            return self._plain_reference_logps(chosen_half(inputs)), None
        return None, None

    def _plain_reference_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """Of a batch of responses that are not in pairs."""
        # TRL's method returns two halves, whatever they are
        return torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, batch))

    def _compute_loss(self, model, inputs, return_outputs):
        mode = "train" if self.model.training else "eval"
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs, token_logps, token_mask = self._forward(model, inputs, **router)
        chosen_logps, rejected_logps = token_logps.sum(dim=1).chunk(2)
        chosen_lengths, rejected_lengths = token_mask.sum(dim=1).clamp(min=1).chunk(2)
        ref_chosen_logps, ref_rejected_logps = self._reference_logps(inputs)

        loss = self._trl_loss(outputs, inputs, ref_chosen_logps, ref_rejected_logps)
        for name, weight in self._own_losses:
            loss = loss + weight * self._own_loss(
                name,
                (chosen_logps, rejected_logps),
                (ref_chosen_logps, ref_rejected_logps),
                (chosen_lengths, rejected_lengths),
            )

        totals, gather = self._totals[mode], self.accelerator.gather
        if mode == "train":
            loss = loss + self._regularizer(chosen_logps, ref_chosen_logps, chosen_lengths)
        else:  # the last batch is padded with rows that do not count twice
            gather = self.accelerator.gather_for_metrics
        # Of both levels: sums over the chosen tokens, so that the mean is that of all processes' tokens
        nll = -chosen_logps
        sft_nll, sft_tokens = gather(nll.detach()), gather(chosen_lengths)
        totals.add("stable/sft_loss", sft_nll, sft_tokens)
        if mode == "train" and self.inner is not None:
            self._sft_after += torch.stack([sft_nll.sum(), sft_tokens.sum()])
        if mode == "train" and self.args.bilevel == "penalty" and self.args.penalty_weight > 0:
            loss = loss + self._penalty(model, nll, ref_chosen_logps, chosen_lengths)
        for name, logps, reference in (
            ("chosen", chosen_logps, ref_chosen_logps),
            ("rejected", rejected_logps, ref_rejected_logps),
        ):
            if reference is not None and self.ld_alpha is None:  # with it, the reference's are of another kind
                change = gather(logps.detach() - reference)
                totals.add(f"logps/{name}_change", change)
                if name == "chosen":
                    totals.add("displacement/share", (change < 0).float())
        if return_outputs:  # for `compute_metrics`: the fused LM head does not build the logits
            with torch.no_grad():
                outputs = model(**self._model_kwargs(inputs))
        return (loss, outputs) if return_outputs else loss

    def _trl_loss(self, outputs, inputs, ref_chosen_logps, ref_rejected_logps) -> torch.Tensor | float:
        """TRL's losses among the upper losses, and all of DPO's metrics, of a forward pass that has been made already."""
        if ref_rejected_logps is None:  # no loss reads the reference; the metrics then are those of a uniform one
            zeros = torch.zeros(len(inputs["input_ids"]) // 2, device=outputs.log_probs.device)
            ref_chosen_logps = ref_rejected_logps = zeros
        inputs = {**inputs, "ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
        precompute, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            return super()._compute_loss(lambda **kwargs: outputs, inputs, False)
        finally:
            self.precompute_ref_logps = precompute

    def _own_loss(self, name: str, logps: tuple, ref_logps: tuple, lengths: tuple) -> torch.Tensor:
        args = self.args
        match name:
            case "cpo":
                return losses.cpo_loss(*logps, lengths[0], self.beta, args.cpo_alpha).mean()
            case "simpo":
                return losses.simpo_loss(*logps, *lengths, args.simpo_beta, args.simpo_gamma).mean()
        ratios = [ours - theirs for ours, theirs in zip(logps, ref_logps, strict=True)]
        match name:
            case "dpop":
                return losses.dpop_loss(*ratios, self.beta, args.dpop_lambda).mean()
            case "rdpo":
                return losses.rdpo_loss(*ratios, *lengths, self.beta, args.rdpo_alpha).mean()
            case "alphadpo":
                margins = self.accelerator.gather(losses.alphadpo_margins(*ratios, *lengths, args.simpo_beta))
                constants = (args.simpo_beta, args.simpo_gamma, args.alphadpo_alpha, margins)
                return losses.alphadpo_loss(*logps, *ref_logps, *lengths, *constants).mean()
        raise ValueError(f"Unknown upper loss: {name!r}. Should be one of {list(OWN_LOSSES)}.")

    def _regularizer(self, chosen_logps, ref_chosen_logps, lengths) -> torch.Tensor | float:
        if self.args.regularizer == "none" or self.args.regularizer_weight == 0:
            return 0.0
        if self.args.regularizer == "nll":
            values = losses.nll_regularizer(chosen_logps, lengths)
        else:
            values = losses.floor_regularizer(chosen_logps, ref_chosen_logps, lengths)
        self._totals["train"].add("stable/regularizer", self.accelerator.gather(values.detach()))
        return self.args.regularizer_weight * values.mean()

    @property
    def _anchor_is_reference(self) -> bool:
        args = self.args
        return args.bilevel == "penalty" and args.penalty_weight > 0 and args.penalty_anchor == "reference"

    def _penalty(self, model, chosen_nll, ref_chosen_logps, chosen_lengths) -> torch.Tensor:
        """The hinge on the SFT loss of this micro-batch of all processes."""
        if self._sft_batches is None:
            nll, tokens = chosen_nll.sum(), chosen_lengths.sum()
        else:
            batch = self._sft_batches[self._sft_number(self._micro_step)]
            nll, tokens = self._sft_nll(model, batch)
        if self.args.penalty_anchor == "lower_level":
            anchor = self._anchors[self._micro_step]
        elif self._sft_batches is None:
            anchor = -ref_chosen_logps.sum()
        else:
            anchor = -self._plain_reference_logps(batch).sum()
        sums = torch.stack([nll.detach(), anchor.to(nll), tokens.to(nll)])
        ours, theirs, all_tokens = self.accelerator.reduce(sums, "sum")
        # The value is that of all processes' tokens; the gradient of this one's tokens is scaled so that the mean over processes,
        # which DDP takes, is the gradient of the value
        part = nll * self.accelerator.num_processes / all_tokens
        sft_loss = ours / all_tokens + (part - part.detach())
        penalty = losses.sft_penalty(sft_loss, theirs / all_tokens, self.args.penalty_slack)
        self._totals["train"].add("stable/penalty_active", (penalty.detach() > 0).float())
        self._totals["train"].add("stable/penalty", penalty.detach())
        return self.args.penalty_weight * penalty

    # Lower level

    def _sft_nll(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        _, token_logps, token_mask = self._forward(model, batch)
        return -token_logps.sum(), token_mask.sum()

    def _sft_nll_unfused(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`~StablePOTrainer._sft_nll`], of operations that can be differentiated twice."""
        token_mask = batch["completion_mask"][:, 1:]
        logits = model(**self._model_kwargs(batch)).logits[:, :-1][:, -token_mask.size(1) :]
        logps = torch.log_softmax(logits.float(), dim=-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        return -(logps * token_mask).sum(), token_mask.sum()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # Called once an optimizer step, with all of its micro-batches
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_step = 0
        self._num_micro_steps = len(batches)
        self._batches = batches if self.args.takes_inner_steps else []
        return batches, num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        is_last = self._micro_step == self._num_micro_steps - 1
        try:
            if self._micro_step == 0 and self.args.takes_inner_steps:
                model.train()
                self._begin_step()
            hold = is_last and self.inner is not None and self.inner.is_away
            with self._engine_step_held() if hold and self.is_deepspeed_enabled else nullcontext():
                loss = super().training_step(model, inputs, num_items_in_batch)
            self._micro_step += 1
            if is_last and self.args.takes_inner_steps:
                self._end_step()
            return loss
        except BaseException:  # Ctrl-C too
            if self.inner is not None:
                self.inner.restore()
            raise

    def train(self, *args, **kwargs):
        self._is_deployed = False
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.inner is not None:
                self.inner.restore()  # if something outside of `training_step` stopped in the middle of a step

    def _sft_number(self, micro_step: int, inner_step: int = 0) -> int:
        """Of a batch of `sft_dataset`: as many of them as micro-batches, in each inner step others."""
        inner_steps = self.args.inner_steps if self.args.bilevel != "penalty" else 1
        done = self.state.global_step * inner_steps + inner_step
        return done * self.args.gradient_accumulation_steps + micro_step

    def _lower_level_batches(self) -> list[list[dict[str, Any]]]:
        """
        The batches of each inner step: all micro-batches of the optimizer step, so that one large batch and many small ones
        agree, or those of `sft_dataset`.
        """
        steps, micro_steps = range(self.args.inner_steps), range(len(self._batches))
        if self._sft_batches is None:
            return [[chosen_half(self._prepare_inputs(batch)) for batch in self._batches]] * len(steps)
        if self.args.bilevel == "penalty":  # those that the penalty is on
            return [[self._sft_batches[self._sft_number(micro_step)] for micro_step in micro_steps]] * len(steps)
        return [
            [self._sft_batches[self._sft_number(micro_step, step)] for micro_step in micro_steps] for step in steps
        ]

    def _begin_step(self) -> None:
        """The lower level's steps."""
        if self.inner is None:
            self.inner = self._make_inner_step()
        self.inner.restore()  # if the epoch was stopped between the micro-batches of a step
        steps, totals = self._lower_level_batches(), self._totals["train"]
        if self.args.bilevel == "penalty":
            with self.inner.saved():
                before, gradient, rate = self._descend(steps, self.inner.move)
                self._warn_if_rounded_away(gradient, rate)
                del gradient  # it takes as much memory as the parameters
                after, self._anchors = self._sft_loss_at(steps[0])
            totals.add("stable/sft_gain", before - after)
            return
        if self.args.bilevel == "unrolled":
            self.inner.save()
        move = self.inner.move_for_good if self.args.bilevel == "alternating" else self.inner.move
        before, self._last_gradient, self._last_rate = self._descend(steps, move)
        self._corrected_on = steps[0] if self.args.hypergradient != "first_order" else None
        if self._sft_batches is None:
            self._sft_before = before
            self._sft_after = torch.zeros_like(self._sft_after)
        elif self._will_log:  # a forward pass more
            totals.add("stable/sft_gain", before - self._sft_loss_at(steps[0])[0])
        if not (self.args.bilevel == "alternating" and self.is_deepspeed_enabled):
            # DeepSpeed's master weights keep what the others round away
            self._warn_if_rounded_away(self._last_gradient, self._last_rate)
        if not self._will_log:
            self._last_gradient = None  # it takes as much memory as the parameters

    @torch.no_grad()
    def _sft_loss_at(self, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The SFT loss of the batches of all processes, and the sum over the tokens of each of this process's."""
        with self.accelerator.autocast():
            parts = [self._sft_nll(self.inner.model, batch) for batch in batches]
        total, tokens = self.accelerator.reduce(torch.tensor(parts, device=self.accelerator.device).sum(dim=0), "sum")
        return total / tokens, [nll for nll, _ in parts]

    @property
    def _will_log(self) -> bool:
        step, every = self.state.global_step + 1, self.state.logging_steps
        return step == 1 or (every > 0 and step % every == 0)

    def _make_inner_step(self) -> InnerStep:
        model = self.accelerator.unwrap_model(self.model_wrapped)
        return InnerStep(model, self.accelerator, self._sft_nll, self.args.gradient_checkpointing_kwargs)

    def _descend(
        self, steps: Iterable[list[dict[str, Any]]], move: Callable
    ) -> tuple[torch.Tensor, list[torch.Tensor], float]:
        """
        Takes a step of the lower level for each of the lists of batches; returns the SFT loss before them, and the gradient and
        the rate of the last.
        """
        size, path, first_loss = self.inner.norm(), 0.0, None
        for batches in steps:
            gradient, loss = self.inner.gradient(batches)
            first_loss = loss if first_loss is None else first_loss
            length = norm(gradient)
            if not length.isfinite():
                raise FloatingPointError(
                    f"The SFT gradient of the lower level is not finite at step {self.state.global_step}. Try a smaller "
                    "`learning_rate`, a smaller `inner_learning_rate`, and `bf16` instead of `fp16`. Nothing was saved for this "
                    "step; resume from the last checkpoint."
                )
            if self.args.inner_learning_rate == "auto":
                rate = (self.args.inner_step_fraction * size / length).item() if length > 0 else 0.0
            else:
                rate = self.args.inner_learning_rate
            move(gradient, -rate)
            path += rate * length.item()
        self._totals["train"].add("stable/inner_step_norm", path / size.cpu())
        return first_loss, gradient, rate

    def _end_step(self) -> None:
        """After the outer backward: back to θ, and the gradient that the optimizer takes."""
        if self.args.bilevel == "penalty":
            return
        if self._sft_batches is None:
            self._totals["train"].add("stable/sft_gain", self._sft_before - self._sft_after[0] / self._sft_after[1])
        outer = []
        if not self.is_deepspeed_enabled:
            outer = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.inner.parameters]
        if self._last_gradient is not None and outer:
            product = inner_product(self._last_gradient, outer)
            lengths = norm(self._last_gradient) * norm(outer)
            if lengths > 0:
                self._totals["train"].add("stable/gradient_cosine", (product / lengths).cpu())
        if self.args.bilevel == "unrolled":
            self.inner.restore()
            if self.args.hypergradient != "first_order":
                self._correct_gradient(outer)
            if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
                self.accelerator.deepspeed_engine_wrapped.engine.step()
        self._last_gradient = None

    def _correct_gradient(self, outer: list[torch.Tensor]) -> None:
        """`(I - η ∇²L_SFT(θ)) ∇U(θ')` in the place of `∇U(θ')`."""
        if self.args.hypergradient == "exact":
            product = self.inner.hessian_product(self._corrected_on, outer, self._sft_nll_unfused)
        else:
            product = self.inner.difference_product(self._corrected_on, outer)
        for parameter, gradient, correction in zip(self.inner.parameters, outer, product, strict=True):
            parameter.grad = gradient - self._last_rate * correction.to(gradient.dtype)

    @contextmanager
    def _engine_step_held(self) -> Iterator[None]:
        """`accelerator.backward` also steps DeepSpeed's engine, which must see θ and not θ'."""
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        engine.step = lambda *args, **kwargs: None
        try:
            yield
        finally:
            del engine.step  # the class's own again

    def _warn_if_rounded_away(self, gradient: list[torch.Tensor], rate: float) -> None:
        if self.state.global_step > 0:
            return
        changed = self.inner.share_that_moves(gradient, -rate)
        if changed < _MIN_CHANGED:
            logger.warning(
                f"The inner step changes only {changed:.1%} of the trained parameters: the others round it away in their "
                "precision. Use `inner_learning_rate` or `inner_step_fraction` of a larger value, or keep the weights in float32."
            )

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._eval_prefix = metric_key_prefix
        self._totals["eval"] = MetricTotals()
        with self._deployed():
            return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if self.model.training else ("eval", f"{self._eval_prefix}_")
        logs.update({prefix + name: value for name, value in self._totals[mode].pop().items()})
        super().log(logs, start_time)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        settings = ("upper_loss", "beta", "bilevel", "regularizer")
        if self.args.bilevel == "penalty":
            settings += ("penalty_weight", "penalty_slack", "penalty_anchor")
        if self.args.takes_inner_steps:
            settings += ("inner_steps", "inner_learning_rate")
        if self.args.bilevel == "unrolled":
            settings += ("hypergradient", "deploy_inner_steps")
        save_model_card(self, model_name, dataset_name, tags, {name: getattr(self.args, name) for name in settings})
