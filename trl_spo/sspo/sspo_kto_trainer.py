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
from trl import KTOTrainer

from .._compat import get_config_model_id
from ..preference_checks import check_unpaired_preferences
from .degree_mixin import DegreeMixin, PolicyWithDegrees, check_texts
from .sspo_config import SSPOKTOConfig


class SSPOKTOTrainer(DegreeMixin, KTOTrainer):
    """
    Trainer for Self-supervised Preference Optimization (SSPO) with KTO: for responses that are not in pairs. See [`SSPOTrainer`].

    The chosen head learns on the desirable, the rejected head on the undesirable responses.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_spo import SSPOKTOTrainer

    >>> dataset = load_dataset("trl-lib/kto-mix-14k", split="train")

    >>> trainer = SSPOKTOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.KTOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model, chosen as in [`~trl.KTOTrainer`]: by default the initial policy.
        args ([`SSPOKTOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            As in [`~trl.KTOTrainer`]. One of your own may only pad and truncate.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            As in [`~trl.KTOTrainer`] (`prompt`, `completion`, `label`), or pairs, which are taken apart; standard or conversational. The text is needed, from which the
            key content is extracted.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `dict[str, Dataset | IterableDataset]`):
            Dataset to use for evaluation. It must meet the same requirements as `train_dataset`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Fast tokenizer. If `None`, it is loaded from the model's name.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            As in [`~trl.KTOTrainer`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            As in [`~trl.KTOTrainer`].
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            As in [`~trl.KTOTrainer`]. The heads are added to the optimizer as a group of its own.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            As in [`~trl.KTOTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            As in [`~trl.KTOTrainer`]. The heads are trained in full.
    """

    _tag_names = ["trl", "kto", "trl-spo", "sspo-kto"]
    _name = "SSPO-KTO"
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
    _columns = ("completion",)

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        ref_model: PreTrainedModel | None = None,
        args: SSPOKTOConfig | None = None,
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
            args = SSPOKTOConfig(f"{model_name.split('/')[-1]}-SSPO-KTO")
        elif not isinstance(args, SSPOKTOConfig):
            raise TypeError(f"`args` must be a `SSPOKTOConfig`, got `{type(args).__name__}`.")
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
        args: SSPOKTOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        check_texts(dataset, dataset_name, args)
        dataset = check_unpaired_preferences(dataset, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _compute_kl_logps(self, model, batch):
        # Of other responses than those of the batch, whose degrees are not asked for
        return super()._compute_kl_logps(model.model if isinstance(model, PolicyWithDegrees) else model, batch)

    def _is_chosen(self, inputs: dict[str, Any]) -> torch.Tensor:
        return inputs["label"].bool()
