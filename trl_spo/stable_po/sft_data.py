# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The lower level's own data: datasets for supervised fine-tuning, in the formats of TRL's SFTTrainer."""

import json
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .._compat import _tokenize, common_prefix_length, is_conversational, pad
from .stable_po_config import StablePOConfig


_FORMATS = "language modelling (`text`, or `messages`) or prompt-completion (`prompt` and `completion`)"


def prepare_sft_dataset(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: StablePOConfig) -> Dataset:
    """
    Tokenizes a dataset for the lower level.

    Args:
        dataset ([`~datasets.Dataset`]):
            With a column `text`, or `messages`, or `prompt` and `completion` (standard or conversational), as in
            [`~trl.SFTTrainer`]. The loss is on all tokens, of a prompt-completion dataset on those of the completion.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the policy.
        args ([`StablePOConfig`]):
            Whose `max_length` is the longest sequence.

    Returns:
        [`~datasets.Dataset`]: with `input_ids` and `completion_mask`.

    Raises:
        `TypeError`, `ValueError`: if it is of another type or format, or empty.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`sft_dataset` must be a `Dataset`, got `{type(dataset).__name__}`: its rows are drawn by number, so that a "
            "resumed run draws the same. Load it without `streaming=True`."
        )
    columns = set(dataset.column_names)
    if not (columns & {"text", "messages"} or columns >= {"prompt", "completion"}):
        raise ValueError(
            f"`sft_dataset` has the columns {sorted(columns)}. It must be {_FORMATS}: rename its columns."
        )
    if len(dataset) == 0:
        raise ValueError(
            "`sft_dataset` is empty. Pass one with rows, or leave it out: the chosen responses are used then."
        )

    def ids_of(text: Any, template_kwargs: dict[str, Any], **kwargs) -> list[int]:
        return _tokenize(tokenizer, text, **template_kwargs, **kwargs)["input_ids"]

    def with_eos(text: str) -> str:
        return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token

    def tokenize(example: dict[str, Any]) -> dict[str, list[int]]:
        template_kwargs: dict[str, Any] = {}
        if is_conversational(example):
            tools = example.get("tools")
            tools = json.loads(tools) if isinstance(tools, str) else tools
            template_kwargs = {"tools": tools, **(example.get("chat_template_kwargs") or {})}
        if "completion" not in example:
            ids = ids_of(example["messages"] if template_kwargs else with_eos(example["text"]), template_kwargs)
            mask = [1] * len(ids)
        else:
            prompt, completion = example["prompt"], example["completion"]
            generation = {"add_generation_prompt": True} if template_kwargs else {}
            prompt_ids = ids_of(prompt, template_kwargs, **generation)
            ids = ids_of(prompt + (completion if template_kwargs else with_eos(completion)), template_kwargs)
            start = common_prefix_length(prompt_ids, ids)
            mask = [0] * start + [1] * (len(ids) - start)
        return {"input_ids": ids[: args.max_length], "completion_mask": mask[: args.max_length]}

    with args.main_process_first(desc="dataset map"):
        arguments = {"num_proc": args.dataset_num_proc, "remove_columns": dataset.column_names}
        dataset = dataset.map(tokenize, desc="Tokenizing SFT dataset", **arguments)
        # The first token has nothing before it that predicts it
        dataset = dataset.filter(lambda example: any(example["completion_mask"][1:]), desc="Dropping empty SFT rows")
    if len(dataset) == 0:
        raise ValueError(
            f"`sft_dataset` is empty after dropping the rows without a token to learn within `max_length={args.max_length}`. "
            "Set a larger `max_length`."
        )
    return dataset


class SFTBatches:
    """
    Batches by their number: the same for any number of processes, and again in a run that is resumed.

    Args:
        dataset ([`~datasets.Dataset`]):
            Of [`prepare_sft_dataset`].
        batch_size (`int`):
            Rows per process.
        pad_token_id (`int`):
            Token that fills the shorter rows up.
        seed (`int`):
            Of the order, which is another one in each epoch.
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.
    """

    def __init__(self, dataset: Dataset, batch_size: int, pad_token_id: int, seed: int, accelerator: Accelerator):
        self.dataset, self.batch_size, self.pad_token_id = dataset, batch_size, pad_token_id
        self.seed, self.accelerator = seed, accelerator
        self._orders: dict[int, list[int]] = {}

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.dataset), generator=generator).tolist()
            self._orders = {**{e: o for e, o in self._orders.items() if e == epoch - 1}, epoch: order}
        return self._orders[epoch]

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """This process's share of a batch."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = number * self.batch_size * world + rank
        places = range(first, first + self.batch_size * world, world)
        size = len(self.dataset)
        rows = [self.dataset[self._order(place // size)[place % size]] for place in places]
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        masks = [torch.tensor(row["completion_mask"]) for row in rows]
        batch = {
            "input_ids": pad(ids, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0),
            "completion_mask": pad(masks, padding_value=0),
        }
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}


def chosen_half(inputs: dict[str, Any]) -> dict[str, Any]:
    """The chosen responses of a batch of TRL's collator, which puts them before the rejected ones."""
    count = len(inputs["input_ids"]) // 2
    return {
        name: value[:count]
        for name, value in inputs.items()
        if name in ("input_ids", "attention_mask", "completion_mask")
    }
