# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Preference data of Soft PO: pairs as in TRL, and lists of completions with a best one, a ranking or scores."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .._compat import DataCollatorForPreference, _tokenize, common_prefix_length, is_conversational, pad
from ..losses import competitors
from .soft_po_config import SoftPOConfig


logger = get_logger(__name__)


def _ranks(example: dict[str, Any]) -> list[int]:
    """Rank of each completion, 0 the best; those that are equally good share their rank."""
    n = len(example["completions"])
    if example.get("best") is not None:
        return [int(i != example["best"]) for i in range(n)]
    if example.get("ranking") is not None:
        return [list(example["ranking"]).index(i) for i in range(n)]
    return [sum(other > score for other in set(example["scores"])) for score in example["scores"]]


def prepare_lists(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    args: SoftPOConfig,
    name: str,
) -> Dataset | IterableDataset:
    """
    Tokenizes lists as `DPOTrainer` does pairs: chat templates and tools applied, EOS added to what is not conversational,
    the completions starting where they diverge from the tokenized prompt, prompts that fill `max_length` dropped.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Lists, checked with [`check_preferences`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        args ([`SoftPOConfig`]):
            Configuration.
        name (`str`):
            What the messages call the dataset.

    Returns:
        The dataset with the columns `prompt_ids`, `completion_ids` (one list of ids a completion) and `ranks`.
    """

    def tokenize(example: dict[str, Any]) -> dict[str, Any]:
        prompt = example["prompt"]
        if is_conversational({"prompt": prompt}):
            tools = example.get("tools")
            tools = json.loads(tools) if isinstance(tools, str) else tools
            template_kwargs = {"tools": tools, **(example.get("chat_template_kwargs") or {})}
            prompt_ids = _tokenize(processing_class, prompt, add_generation_prompt=True, **template_kwargs)[
                "input_ids"
            ]
            full = [
                _tokenize(processing_class, prompt + completion, **template_kwargs)["input_ids"]
                for completion in example["completions"]
            ]
        else:
            eos = processing_class.eos_token
            prompt_ids = _tokenize(processing_class, prompt)["input_ids"]
            full = [
                _tokenize(processing_class, prompt + completion.removesuffix(eos) + eos)["input_ids"]
                for completion in example["completions"]
            ]
        start = min(common_prefix_length(prompt_ids, ids) for ids in full)
        if start < len(prompt_ids):
            logger.warning_once(
                "The tokenized prompt is not a prefix of the tokenized prompt+completion, so its end is left out of the training "
                f"sequence: {processing_class.decode(prompt_ids[start:])!r}. Use a chat template that renders the prompt the same "
                "way in both cases, or end the prompt on a token boundary. This is shown once, but likely applies to every row."
            )
        return {
            "prompt_ids": prompt_ids[:start],
            "completion_ids": [ids[start:] for ids in full],
            "ranks": _ranks(example),
        }

    return _tokenize_and_drop(dataset, tokenize, args, name)


def add_row_ids(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Numbers the rows, in the column `row_id`, so that a message can name those of a batch."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda _, i: {"row_id": i}, with_indices=True)
    if "row_id" in dataset.column_names:
        dataset = dataset.remove_columns("row_id")
    return dataset.add_column("row_id", list(range(len(dataset))))


@dataclass
class DataCollatorForSoftPO(DataCollatorForPreference):
    """
    Data collator for pairs, as [`~trl.trainer.dpo_trainer.DataCollatorForPreference`], and for lists.

    A batch of lists holds the sequences of all of its lists one after the other, right-padded: `"input_ids"`,
    `"attention_mask"` and `"completion_mask"` of shape `(Σ n, L)`, and with them `"list_sizes"` `(B,)` and `"ranks"` `(Σ n,)`.
    Both kinds carry the `"row_ids"` `(B,)` of their examples.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "completion_ids" in examples[0]:
            batch = self._collate_lists(examples)
        else:
            batch = super().torch_call(examples)
        if "row_id" in examples[0]:
            batch["row_ids"] = torch.tensor([example["row_id"] for example in examples])
        return batch

    def _collate_lists(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, completion_mask = [], []
        kept = slice(None) if self.max_length is None else slice(self.max_length)
        if self.max_length is not None and self.truncation_mode == "keep_end":
            kept = slice(-self.max_length, None)
        for example in examples:
            for ids in example["completion_ids"]:
                input_ids.append(torch.tensor((example["prompt_ids"] + ids)[kept]))
                completion_mask.append(torch.tensor(([0] * len(example["prompt_ids"]) + [1] * len(ids))[kept]))

        def pad_right(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
            return pad(tensors, value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)

        return {
            "input_ids": pad_right(input_ids, self.pad_token_id),
            "attention_mask": pad_right([torch.ones_like(ids) for ids in input_ids], 0),
            "completion_mask": pad_right(completion_mask, 0),
            "list_sizes": torch.tensor([len(example["completion_ids"]) for example in examples]),
            "ranks": torch.tensor([rank for example in examples for rank in example["ranks"]]),
        }


def prepare_prompts(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    args: SoftPOConfig,
    name: str,
) -> Dataset | IterableDataset:
    """Tokenizes the `prompt` column, standard or conversational, into `prompt_ids`, and drops as [`prepare_lists`] does."""

    def tokenize(example: dict[str, Any]) -> dict[str, Any]:
        template_kwargs: dict[str, Any] = {}
        if is_conversational({"prompt": example["prompt"]}):
            tools = example.get("tools")
            tools = json.loads(tools) if isinstance(tools, str) else tools
            template_kwargs = {
                "tools": tools,
                **(example.get("chat_template_kwargs") or {}),
                "add_generation_prompt": True,
            }
        return {"prompt_ids": _tokenize(processing_class, example["prompt"], **template_kwargs)["input_ids"]}

    return _tokenize_and_drop(add_row_ids(dataset), tokenize, args, name)


def _tokenize_and_drop(
    dataset: Dataset | IterableDataset, tokenize: Callable[[dict], dict], args: SoftPOConfig, name: str
) -> Dataset | IterableDataset:
    def arguments(desc: str) -> dict[str, Any]:
        streams = isinstance(dataset, IterableDataset)  # takes neither `num_proc` nor `desc`
        return {} if streams else {"num_proc": args.dataset_num_proc, "desc": desc}

    with args.main_process_first(desc="dataset map"):
        dataset = dataset.map(tokenize, **arguments(f"Tokenizing {name} dataset"))
        if args.max_length is not None and args.truncation_mode == "keep_start":
            dataset = dataset.filter(
                lambda example: len(example["prompt_ids"]) < args.max_length,
                **arguments(f"Dropping fully truncated examples from {name} dataset"),
            )
    return check_any_left(dataset, args, name)


def check_any_left(dataset: Dataset | IterableDataset, args: SoftPOConfig, name: str) -> Dataset | IterableDataset:
    """Raises a `ValueError` if no row has a prompt shorter than `max_length`."""
    if next(iter(dataset), None) is None:
        raise ValueError(
            f"The {name} dataset is empty after dropping the prompts that fill `max_length={args.max_length}`. Set a larger "
            "`max_length`."
        )
    return dataset


class ListLayout:
    """
    How a batch's sequences belong together: one row an example, one column a response, `(B, n)`.

    A pair is a list of two, the chosen response first.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            Batch of [`DataCollatorForSoftPO`] or of [`~trl.trainer.dpo_trainer.DataCollatorForPreference`].

    Attributes:
        is_pairs (`bool`):
            Whether the batch holds pairs.
        mask (`torch.Tensor` of shape `(B, n)`):
            Which responses exist.
        ranks (`torch.Tensor` of shape `(B, n)`):
            Rank of each response, 0 the best.
    """

    def __init__(self, inputs: dict[str, Any]):
        self.is_pairs = "list_sizes" not in inputs
        self._sizes = None if self.is_pairs else inputs["list_sizes"].tolist()
        self.mask = self.arrange(torch.ones_like(inputs["input_ids"][:, 0], dtype=torch.bool))
        if self.is_pairs:
            self.ranks = torch.arange(2, device=self.mask.device).expand_as(self.mask)
        else:
            self.ranks = self.arrange(inputs["ranks"])

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """Brings values of the batch's sequences, `(sequences,)`, to `(B, n)`, padded with 0."""
        if self._sizes is None:
            return torch.stack(values.chunk(2), dim=1)  # the batch is [chosen, rejected]
        return pad_sequence(values.split(self._sizes), batch_first=True)

    def denominators(self, log_pi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The terms of the loss that compare anything, `(B, n)`, and of each of them the log-probabilities of its list's
        responses and which are in its denominator, `(terms, n)`.
        """
        in_denominator = competitors(self.mask, self.ranks)
        terms = in_denominator.sum(dim=2) > 1
        return terms, log_pi.unsqueeze(1).expand_as(in_denominator)[terms], in_denominator[terms]
