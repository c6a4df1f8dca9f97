# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from torch.utils.data import DataLoader
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
from .._compat import (
    disable_gradient_checkpointing,
    get_config_model_id,
    no_reference_model,
    use_adapter,
)
from ..generation import own_random_state
from ..metrics import MetricTotals
from ..model_card import save_model_card
from ..preference_checks import check_preferences, columns_of
from .checks import check_context, check_parallelism, check_policy, check_vocabulary, load_reference, refuse_vision
from .online_kl import OnlineKL, OnlineKLOutput
from .online_samples import CompletionSampler, OnlineSample, PromptSource, SampleBuffer
from .preference_data import (
    DataCollatorForSoftPO,
    ListLayout,
    add_row_ids,
    check_any_left,
    prepare_lists,
    prepare_prompts,
)
from .preference_metrics import add_preference_metrics, per_example_table
from .soft_po_config import SoftPOConfig


logger = get_logger(__name__)

# First numbers of the seeds of draws, so that training's and evaluation's are not the same
_TRAIN, _EVAL = 0, 1

# Mean |α (log π(y_w) - log π(y_l))| at the start above which pairs look as if the model had not sampled them: the loss
# then mostly pulls together likelihoods that differ for other reasons than the preference
_OFF_POLICY_GAP = 4.0

# Mean weight at the start below which the pairs hardly count
_VANISHING_WEIGHT = 1e-2


class SoftPOTrainer(DPOTrainer):
    """
    Trainer for Soft Preference Optimization (Soft PO), proposed in the paper [Soft Preference Optimization: Aligning
    Language Models to Expert Distributions](https://huggingface.co/papers/2405.00747).

    The preference loss is the cross-entropy of the model's own softened preferences; the regularizer is the KL divergence to
    the reference over the whole output distribution, on samples that the model draws every `resample_steps` steps. How it
    departs from the paper: the loss works by default on `log π - log π_ref` (`calibration="none"` is the paper's), so that
    responses which the model did not sample do not drown the preference in differences of likelihood and length.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_spo import SoftPOTrainer

    >>> dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

    >>> trainer = SoftPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.DPOTrainer`]. Text models only.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model, chosen as in [`~trl.DPOTrainer`]: by default the initial policy. With `beta=0` and
            `calibration="none"` there is none.
        args ([`SoftPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function to use to form a batch. Will default to [`DataCollatorForSoftPO`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs as in [`~trl.DPOTrainer`] (`prompt`, `chosen`, `rejected`), or lists: `prompt`, `completions` (strings or
            message lists, whose number may differ from row to row) and one of `best` (index), `ranking` (indices, best
            first) and `scores` (floats; equal scores are ties). Standard or conversational.
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
        regularization_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Prompts (column `prompt`, standard or conversational) that the KL regularizer's samples answer. Defaults to the
            training prompts.
    """

    _tag_names = ["trl", "dpo", "trl-spo", "soft-po"]
    _name = "Soft PO"
    _paper = {
        "title": "Soft Preference Optimization: Aligning Language Models to Expert Distributions",
        "id": "2405.00747",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{sharifnassab2024soft,
                title   = {{Soft Preference Optimization: Aligning Language Models to Expert Distributions}},
                author  = {Arsalan Sharifnassab and Saber Salehkaleybar and Sina Ghiassian and Surya Kanoria and Dale Schuurmans},
                year    = 2024,
                eprint  = {arXiv:2405.00747},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        ref_model: PreTrainedModel | None = None,
        args: SoftPOConfig | None = None,
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
        regularization_dataset: Dataset | IterableDataset | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SoftPOConfig(f"{model_name.split('/')[-1]}-SoftPO")
        elif not isinstance(args, SoftPOConfig):
            raise TypeError(f"`args` must be a `SoftPOConfig`, got `{type(args).__name__}`.")
        if isinstance(processing_class, ProcessorMixin):
            refuse_vision(f"`processing_class` is a `{type(processing_class).__name__}`")
        if isinstance(train_dataset, Dataset | IterableDataset):
            columns = columns_of(train_dataset, "train")
            if columns & {"image", "images"}:
                refuse_vision(f"the train dataset has the columns {sorted(columns & {'image', 'images'})}")
        if regularization_dataset is not None:
            if args.beta == 0:
                raise ValueError(
                    "`regularization_dataset` is given but `beta=0`, which switches the regularizer off. Set `beta`, or "
                    "leave `regularization_dataset` out."
                )
            columns = columns_of(regularization_dataset, "regularization")
            if "prompt" not in columns:
                raise ValueError(
                    f"`regularization_dataset` needs a `prompt` column, but its columns are {sorted(columns)}. Rename one."
                )

        uses_reference = args.beta > 0 or args.calibration == "reference"
        if args.beta > 0 and args.precompute_ref_log_probs and ref_model is None and peft_config is None:
            # `DPOTrainer` keeps no reference then, but the KL regularizer needs it
            if isinstance(model, str) or not is_peft_model(model):
                ref_model = load_reference(model, args, quantization_config)

        elif ref_model is not None and not uses_reference:
            raise ValueError(
                "`ref_model` is given, but with `beta=0` and `calibration='none'` nothing reads it. Leave it out, or set `beta` or "
                "`calibration='reference'`."
            )

        with nullcontext() if uses_reference else no_reference_model(isinstance(model, str)):
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
        if self._is_vlm:
            refuse_vision(f"the model's processor is a `{type(self.processing_class).__name__}`")
        if self.beta > 0:
            check_policy(self.model, self.beta)
            check_parallelism(self.accelerator, self.beta)
            if self.ref_model is not None:
                check_vocabulary(*map(self.accelerator.unwrap_model, (self.model, self.ref_model)))

        if data_collator is None:
            self.data_collator = DataCollatorForSoftPO(
                pad_token_id=self._tokenizer.pad_token_id,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )

        self._totals = {"train": MetricTotals(), "eval": MetricTotals()}
        self._mass_mean: torch.Tensor | None = None  # of the optimizer step, for weighting="sigmoid"
        self._eval_mass_mean: torch.Tensor | None = None  # of the evaluation, likewise
        self._eval_prefix = "eval"
        self._micro_step = 0  # index of the next micro-batch in the optimizer step

        # KL regularizer
        if self.beta > 0:
            dataset = self.train_dataset
            if regularization_dataset is not None:
                dataset = prepare_prompts(regularization_dataset, self._tokenizer, args, "regularization")
            self._prompts = PromptSource(dataset, args.seed)
            check_context(dataset, self.model.config, args)
            self.sampler = CompletionSampler(self.model, args, self.accelerator, self._tokenizer)
            self.sample_buffer = SampleBuffer(args)
            self.online_kl = OnlineKL(self.ref_model, args, self.accelerator, self._tokenizer.pad_token_id)
            self._eval_prompts: PromptSource | None = None
            self._eval_kl: float | None = None

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: SoftPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        dataset = add_row_ids(check_preferences(dataset, dataset_name))
        if "completions" not in columns_of(dataset, dataset_name):
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            return check_any_left(dataset, args, dataset_name)
        if args.precompute_ref_log_probs:
            raise ValueError(
                f"`precompute_ref_log_probs=True` supports pairs only, and the {dataset_name} dataset holds lists "
                "(`completions`). Set `precompute_ref_log_probs=False`."
            )
        return prepare_lists(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in ("completion_ids", "ranks", "row_id"):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def compute_ref_log_probs(self, model, inputs):
        inputs = {key: value for key, value in inputs.items() if key != "row_ids"}
        return super().compute_ref_log_probs(model, inputs)

    # Preference loss

    def _compute_loss(self, model, inputs, return_outputs):
        mode = "train" if self.model.training else "eval"
        outputs, logps, token_mask = self._forward(model, inputs, with_router_logits=self.aux_loss_enabled)
        lengths = token_mask.sum(dim=1)

        layout = ListLayout(inputs)
        log_pi = self._reduce(logps, lengths)
        scores = log_pi
        if self.args.calibration == "reference":
            scores = log_pi - self._reduce(self._reference_logps(inputs), lengths)
        scores = layout.arrange(scores)
        weights = self._weights(layout.arrange(log_pi), layout)
        if layout.is_pairs:
            per_example_loss = losses.soft_preference_loss(*scores.unbind(dim=1), self.args.alpha, weights[:, 0])
        else:
            per_example_loss = losses.soft_ranking_loss(scores, self.args.alpha, layout.mask, weights, layout.ranks)
        loss = per_example_loss.mean()

        def per_response(token_values: torch.Tensor) -> torch.Tensor:
            return layout.arrange((token_values[:, -token_mask.size(1) :].detach() * token_mask).sum(dim=1))

        table = per_example_table(
            layout,
            alpha=self.args.alpha,
            loss=per_example_loss.detach(),
            scores=scores.detach(),
            logps=layout.arrange(logps.detach()),
            weights=weights,
            tokens=layout.arrange(lengths),
            entropy=per_response(outputs.entropy),
            logits=per_response(outputs.mean_logits),
            top1=per_response(outputs.is_top1),
        )
        self._add_preference_metrics(mode, table, inputs.get("row_ids"))
        if mode == "train":
            num_tokens = self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += num_tokens // self._tp_size
        elif self.beta > 0:
            loss = loss + self.beta * self._eval_kl
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            self._totals[mode].add("aux_loss", self.accelerator.gather(outputs.aux_loss.detach().reshape(1)))
        if return_outputs:  # for `compute_metrics`: the fused LM head does not build the logits
            with torch.no_grad():
                outputs = model(**self._model_kwargs(inputs))
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def _model_kwargs(inputs: dict[str, Any]) -> dict[str, Any]:
        # A key that the model does not know it may silently swallow
        ours = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", "list_sizes", "ranks", "row_ids"}
        return {**{key: value for key, value in inputs.items() if key not in ours}, "use_cache": False}

    def _forward(self, model, inputs, with_router_logits=False) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Outputs of the fused LM head, log-probability of each response, mask of the positions that predict it."""
        model_kwargs = self._model_kwargs(inputs)
        if with_router_logits:
            model_kwargs["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)
        token_mask = inputs["completion_mask"][:, 1:]
        # Prompt-learning PEFT prepends virtual tokens to the outputs; keep the positions of the real tokens
        return outputs, outputs.log_probs[:, -token_mask.size(1) :].sum(dim=1), token_mask

    def _reduce(self, logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return logps if self.args.logp_reduction == "sum" else logps / lengths.clamp(min=1)

    @torch.no_grad()
    def _reference_logps(self, inputs: dict[str, Any]) -> torch.Tensor:
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is not None:
                return self._forward(self.ref_model, inputs)[1]
            policy = self.accelerator.unwrap_model(self.model)
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                return self._forward(self.model, inputs)[1]

    def _weights(self, log_pi: torch.Tensor, layout: ListLayout) -> torch.Tensor:
        """Weights μ_k of shape `(B, n)`: each is that of the responses in the `k`-th denominator."""
        terms, log_pi, in_denominator = layout.denominators(log_pi)
        mean = self._mass_mean if self.model.training else self._eval_mass_mean
        if self.args.weighting == "sigmoid" and mean is None:
            mass = losses.probability_mass(log_pi, self.args.gamma, in_denominator)
            totals = self.accelerator.gather(torch.stack([mass.sum(), mass.new_tensor(len(mass))]).unsqueeze(0))
            mean = totals[:, 0].sum() / totals[:, 1].sum()
        weights = losses.pair_weights(
            log_pi, self.args.weighting, self.args.gamma, in_denominator, self.args.weighting_scale, mean
        )
        return weights.new_zeros(terms.shape).masked_scatter(terms, weights)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # Called once an optimizer step, with all of its micro-batches
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_step = 0
        self._mass_mean = None
        if self.args.weighting == "sigmoid" and len(batches) > 1:
            self.model_wrapped.train()  # an evaluation has left it in the other mode
            self._mass_mean = self._mean_mass(self.model_wrapped, batches, self.accelerator.gather)
        return batches, num_items_in_batch

    @torch.no_grad()
    def _mean_mass(
        self, model: nn.Module, batches: Iterable[dict[str, Any]], gather: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Mean of `v` over batches of all processes, which no single one of them knows: a forward pass of its own."""
        totals = torch.zeros(2, device=self.accelerator.device)
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            for inputs in batches:
                inputs = self._prepare_inputs(inputs)
                _, logps, token_mask = self._forward(model, inputs)
                layout = ListLayout(inputs)
                log_pi = layout.arrange(self._reduce(logps, token_mask.sum(dim=1)))
                terms, log_pi, in_denominator = layout.denominators(log_pi)
                mass = losses.probability_mass(log_pi, self.args.gamma, in_denominator)
                mass = mass.new_zeros(terms.shape).masked_scatter(terms, mass)
                totals += gather(torch.stack([mass.sum(dim=1), terms.sum(dim=1)], dim=1)).sum(dim=0)
        return totals[0] / totals[1]

    def _add_preference_metrics(self, mode: str, table: dict[str, torch.Tensor], row_ids: torch.Tensor | None) -> None:
        # In training all micro-batches of a step are fetched ahead, so `gather_for_metrics` would take each for the last one
        # and leave out rows that were trained on
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        columns = gather(torch.stack([column.float() for column in table.values()], dim=1)).cpu().unbind(dim=1)
        table = dict(zip(table, columns, strict=True))
        if mode == "train":
            self._check_finite("loss", table["loss"], row_ids)
            if self.state.global_step == 0 and self._micro_step == 0:
                self._warn_at_the_start(table)
        add_preference_metrics(self._totals[mode], table)

    def _check_finite(self, what: str, values: torch.Tensor, row_ids: torch.Tensor | None) -> None:
        # `values` are gathered, so that every process raises and none is left waiting
        if values.isfinite().all():
            return
        rows = None if row_ids is None else self.accelerator.gather(row_ids.to(self.accelerator.device)).tolist()
        raise FloatingPointError(
            f"The {what} is not finite at step {self.state.global_step}, on the rows {rows} of the dataset: "
            f"{values.tolist()}. Try a smaller `learning_rate`, a smaller `max_grad_norm`, `bf16` instead of `fp16`, and look "
            "at those rows. Nothing was saved for this step; resume from the last checkpoint."
        )

    def _warn_at_the_start(self, table: dict[str, torch.Tensor]) -> None:
        weight = (table["weights"].sum() / table["terms"].sum().clamp(min=1)).item()
        if self.args.weighting == "power" and weight < _VANISHING_WEIGHT:
            logger.warning(
                f"The weights of the pairs are {weight:.1e} on average: with `gamma={self.args.gamma}` the probabilities of whole "
                "responses all but switch the preference loss off against the KL regularizer. Use a smaller `gamma`, or "
                "`weighting='sigmoid'`, whose weights are near 1."
            )
        # Before the first step the policy is the reference, so this costs no forward pass of the reference
        gap = (
            (table["rewards/chosen"] - table["rewards/rejected"]).abs().mean().item()
        )  # rewards are α times the scores
        if self.args.calibration == "none" and gap > _OFF_POLICY_GAP:
            logger.warning(
                f"The pairs look off-policy: at the start, |log π(chosen) - log π(rejected)| is {gap:.1f} times 1/α on average "
                f"(α={self.args.alpha}). With `calibration='none'` such differences in likelihood and length drown the "
                "preference. Use `calibration='reference'`, a smaller `alpha`, or pairs that the model sampled."
            )

    # KL regularizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        samples = self._take_samples(model) if self.beta > 0 else []
        # Pairs and samples each have a backward of their own, so that at no time both graphs are in memory. The pairs come
        # first: theirs is the larger graph as a rule, and at its peak there are no gradients yet.
        with self._without_gradient_sync(model) if samples else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        chunks = list(self.online_kl.chunks(samples)) if samples else []
        for i, chunk in enumerate(chunks, start=1):
            sync = nullcontext() if i == len(chunks) else self._without_gradient_sync(model)
            with sync, self.maybe_activation_offload_context:
                output = self.online_kl(model, chunk)
                self._add_kl_metrics("train", output, chunk)
                kl_loss = self.beta * output.loss.sum() / self.args.online_samples_per_step
                # DeepSpeed would divide by the accumulation steps
                kwargs = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                self.accelerator.backward(kl_loss, **kwargs)
            loss = loss + kl_loss.detach()
        self._micro_step += 1
        return loss

    def _take_samples(self, model: nn.Module) -> list[OnlineSample]:
        """The online samples of this micro-batch, drawn anew when they are due."""
        step, buffer = self.state.global_step, self.sample_buffer
        model.train()
        if self._micro_step == 0:
            if buffer.is_due(step):
                n, rank = self.args.online_buffer_size, self.accelerator.process_index
                prompts = self._prompts.take((buffer.round * self.accelerator.num_processes + rank) * n, n)
                buffer.replace(self.sampler.sample(model, prompts, self.args.seed, _TRAIN, buffer.round, rank), step)
                self.online_kl.annotate(model, buffer.samples)
            elif buffer.samples[0].reference_hidden is None:  # restored from a checkpoint
                self.online_kl.annotate(model, buffer.samples)
        return buffer.micro_batch(step, self._micro_step, self.current_gradient_accumulation_steps)

    @contextmanager
    def _without_gradient_sync(self, model: nn.Module) -> Iterator[None]:
        """For a backward pass that another one follows before the optimizer steps."""
        state = self.accelerator.gradient_state
        if self.is_deepspeed_enabled:
            # `accelerator.backward` also steps the engine at the boundary, which the last backward is
            sync = state.sync_gradients
            state._set_sync_gradients(False)
            try:
                yield
            finally:
                state._set_sync_gradients(sync)
        elif self.is_fsdp_enabled:
            yield  # reduces into the shards, and adds up; unreduced gradients would take the whole model's memory
        else:
            with self.accelerator.no_sync(model):
                yield

    def _add_kl_metrics(self, mode: str, output: OnlineKLOutput, samples: list[OnlineSample]) -> torch.Tensor:
        columns = [output.loss.detach(), output.kl, output.entropy, output.ratio, output.length, output.terminated]
        table = self.accelerator.gather(torch.stack([column.float() for column in columns], dim=1)).cpu()
        loss, kl, entropy, ratio, length, terminated = table.unbind(dim=1)
        row_ids = torch.tensor([sample.row_id for sample in samples])
        self._check_finite("KL of the online samples", loss, row_ids)
        totals = self._totals[mode]
        totals.add("loss/kl", self.beta * loss)
        totals.add("kl/online", kl)
        totals.add_std("kl/estimator_std", kl)
        totals.add("entropy/online", entropy)
        totals.add("staleness/ratio", ratio)
        totals.add("samples/length", length)
        totals.add("samples/terminated", terminated)
        return kl

    # Evaluation

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        self._totals["eval"] = MetricTotals()  # `predict` has left its own
        self._eval_prefix = metric_key_prefix
        # `IterableDatasetShard` hides the dataset, and would show each process a part of it
        self._eval_rows = getattr(dataloader.dataset, "dataset", dataloader.dataset)
        self._eval_mass_mean = None
        if self.beta > 0:
            self._eval_prompts, self._eval_kl = PromptSource(self._eval_rows, self.args.seed), None
        # Data loaders too draw from the global random state, which dropout in training goes on from
        with own_random_state(self.accelerator.device, self.args.seed, _EVAL):
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.args.weighting == "sigmoid" and self._eval_mass_mean is None:
            rows = DataLoader(self._eval_rows, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)
            # Without the rows that pad the last batch of some processes
            gather = self.accelerator.gather_for_metrics
            self._eval_mass_mean = self._mean_mass(model, self.accelerator.prepare(rows), gather)
        if self.beta > 0 and self._eval_kl is None:
            # Not `model`, which in training is the unwrapped one: its ZeRO-3 hooks would stay on during generation
            self._eval_kl = self._measure_eval_kl(self.model_wrapped)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    @torch.no_grad()
    def _measure_eval_kl(self, model: nn.Module) -> float:
        """The regularizer on held-out prompts, by draws that are the same at each evaluation."""
        n, rank, size = self.args.eval_online_samples, self.accelerator.process_index, self.args.online_buffer_size
        if isinstance(self._eval_prompts.dataset, Dataset):
            n = min(n, len(self._eval_prompts.dataset))
        per_process = math.ceil(n / self.accelerator.num_processes)
        prompts = self._eval_prompts.take(rank * per_process, per_process)
        kl = []
        for first in range(0, per_process, size):  # no more at once than in training
            samples = self.sampler.sample(model, prompts[first : first + size], self.args.seed, _EVAL, rank, first)
            self.online_kl.annotate(model, samples)
            for chunk in self.online_kl.chunks(samples):
                kl.append(self._add_kl_metrics("eval", self.online_kl(model, chunk), chunk))
        return torch.cat(kl).mean().item()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Under the prefix of `evaluate`, so that several eval datasets do not write over each other as in TRL
        mode, prefix = ("train", "") if self.model.training else ("eval", f"{self._eval_prefix}_")
        logs.update({prefix + name: value for name, value in self._totals[mode].pop().items()})
        super().log(logs, start_time)

    # Checkpoints and model card

    def _sample_buffer_file(self, checkpoint: str) -> Path:
        return Path(checkpoint, f"online_samples_{self.accelerator.process_index}.json")

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.beta > 0 and self.sample_buffer.samples:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self._sample_buffer_file(output_dir).write_text(json.dumps(self.sample_buffer.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.beta == 0 or checkpoint is None:
            return
        file = self._sample_buffer_file(checkpoint)
        saved = len(list(Path(checkpoint).glob("online_samples_*.json")))
        usable = torch.tensor([float(file.is_file() and saved == self.accelerator.num_processes)]).to(self.args.device)
        if self.accelerator.gather(usable).min() > 0:  # on all processes or on none: drawing is collective
            self.sample_buffer.load_state_dict(json.loads(file.read_text()))
            return
        self.sample_buffer.round = self.state.global_step // self.args.resample_steps + 1  # not the first draws again
        logger.warning(
            f"{checkpoint} holds the online samples of {saved} processes and this run has "
            f"{self.accelerator.num_processes}: new ones are drawn, so the run will differ from an uninterrupted one."
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        settings = ("alpha", "beta", "calibration", "logp_reduction", "weighting", "gamma", "kl_estimator")
        settings += ("resample_steps", "online_samples_per_step", "online_buffer_size", "max_completion_length")
        save_model_card(self, model_name, dataset_name, tags, {name: getattr(self.args, name) for name in settings})
