# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import textwrap
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
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

from .._compat import get_config_model_id
from ..preference_checks import check_preferences
from .degree_mixin import DegreeMixin, check_texts
from .sspo_config import SSPOConfig


class SSPOTrainer(DegreeMixin, DPOTrainer):
    """
    Trainer for Self-supervised Preference Optimization (SSPO), proposed in the paper [Self-supervised Preference Optimization:
    Enhance Your Language Model with Preference Degree Awareness](https://huggingface.co/papers/2409.17791).

    To any loss of [`~trl.DPOTrainer`] it adds the losses of two heads, which learn from the policy's hidden states how much of the
    key content has been taken from a chosen and from a rejected response. How it departs from the paper: the encoding of
    positions, the size of the heads and what happens to responses without key content are our choice.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_spo import SSPOTrainer

    >>> dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

    >>> trainer = SSPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model, chosen as in [`~trl.DPOTrainer`]: by default the initial policy.
        args ([`SSPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            As in [`~trl.DPOTrainer`]. One of your own may only pad and truncate.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs as in [`~trl.DPOTrainer`] (`prompt`, `chosen`, `rejected`), standard or conversational. The text is needed, from which the
            key content is extracted.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `dict[str, Dataset | IterableDataset]`):
            Dataset to use for evaluation. It must meet the same requirements as `train_dataset`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Fast tokenizer. If `None`, it is loaded from the model's name.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            As in [`~trl.DPOTrainer`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            As in [`~trl.DPOTrainer`].
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            As in [`~trl.DPOTrainer`]. The heads are added to the optimizer as a group of its own.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            As in [`~trl.DPOTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            As in [`~trl.DPOTrainer`]. The heads are trained in full.
    """

    _tag_names = ["trl", "dpo", "trl-spo", "sspo"]
    _name = "SSPO"
    _paper = {
        "title": "Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree Awareness",
        "id": "2409.17791",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{li2024selfsupervised,
                title     = {{Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree Awareness}},
                author    = {Jian Li and Haojing Huang and Yujia Zhang and Pengfei Xu and Xi Chen and Rui Song and Lida Shi and Jingwen Wang and Hao Xu},
                booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2024},
                pages     = {14452--14466},
                year      = 2024,
            }"""),
    }
    _columns = ("chosen", "rejected")

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        ref_model: PreTrainedModel | None = None,
        args: SSPOConfig | None = None,
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
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SSPOConfig(f"{model_name.split('/')[-1]}-SSPO")
        elif not isinstance(args, SSPOConfig):
            raise TypeError(f"`args` must be a `SSPOConfig`, got `{type(args).__name__}`.")
        check_texts(train_dataset, "train", args)
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
        self._init_degrees()

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: SSPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        check_texts(dataset, dataset_name, args)
        dataset = check_preferences(dataset, dataset_name, allow_lists=False)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def compute_ref_log_probs(self, model, inputs):
        # TRL passes what it does not know on to the model
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "token_degrees"})

    def _is_chosen(self, inputs: dict[str, Any]) -> torch.Tensor:
        rows = torch.arange(len(inputs["input_ids"]), device=inputs["input_ids"].device)
        return rows < len(rows) // 2
