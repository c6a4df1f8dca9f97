# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The token ids that the trainers would make of rows, and how many there are."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .rows import Rows, row_of


# Characters that are tokenized; of a larger dataset, rows are drawn at random
BUDGET = 8_000_000
_BATCH = 64
_TAIL = 8  # tokens at the end of an answer among which is its end-of-sequence token, and maybe a line break
# Columns that chat templates read besides the messages
FOR_TEMPLATE = ("tools", "chat_template_kwargs")


class TemplateFails(ValueError):
    """The chat template cannot render a row."""


@dataclass
class TokenCounts:
    """
    What the trainers make of rows.

    n rows have m responses; where a method takes a pair apart, each of its responses is a row to it.

    Attributes:
        rows (`np.ndarray` of shape `(n,)`):
            Indices of the rows.
        exact (`bool`):
            Whether these are all rows of the dataset.
        prompts (`np.ndarray` of shape `(n,)`):
            Tokens of the prompts, as they are at inference.
        owners (`np.ndarray` of shape `(m,)`):
            Of each response, its place in `rows`.
        starts (`np.ndarray` of shape `(m,)`):
            Where it starts in its sequence, which is where the loss starts to count.
        lengths (`np.ndarray` of shape `(m,)`):
            Tokens of its sequence, prompt and response together, before anything is cut.
        kept (`np.ndarray` of shape `(m,)`):
            Tokens of its sequence that are left by `max_length`.
        answers (`np.ndarray` of shape `(m,)`):
            Tokens of the response among them, 0 where its row is dropped.
        double_bos, double_eos, ends (`np.ndarray` of shape `(m,)`):
            Whether its sequence begins with two BOS, ends with two EOS, and has among its last tokens the tokenizer's
            EOS or another one that stops the model's generation.
        alike (`np.ndarray` of shape `(n,)`):
            Whether the responses of a row are the same once they are cut, and were not before.
        largest (`int`):
            Largest token id.
        lost (`list[str]`):
            The ends of prompts that are not in the sequences, the most frequent one first.
    """

    rows: np.ndarray
    exact: bool
    prompts: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    double_bos: list[bool] = field(default_factory=list)
    double_eos: list[bool] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    alike: list[bool] = field(default_factory=list)
    largest: int = 0
    lost: dict[str, int] = field(default_factory=dict)


def draw_rows(rows: Rows, seed: int, budget: int = BUDGET) -> tuple[np.ndarray, bool]:
    """Indices of rows of about `budget` characters, all of them if they have no more, and whether these are all."""
    characters = rows.prompt_characters + np.bincount(rows.rows, rows.characters, minlength=len(rows))
    if characters.sum() <= budget:
        return np.arange(len(rows)), True
    order = np.random.default_rng(seed).permutation(len(rows))
    number = max(int(np.searchsorted(np.cumsum(characters[order]), budget)), 1)
    return np.sort(order[:number]), False


def _encode(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, rows: Rows, indices: np.ndarray
) -> Iterator[tuple[int, list[int], list[list[int]]]]:
    """Of each row its index, the ids of the prompt alone, and those of prompt and response together: as TRL's `_prepare_dataset` makes them."""
    from .._compat import _tokenize

    columns = [*rows.shape.columns, *(name for name in FOR_TEMPLATE if name in dataset.column_names)]
    chosen = dataset.select(indices).select_columns(columns)
    if rows.shape.conversational:
        for index, example in zip(indices, chosen, strict=True):
            prompt, responses, _ = row_of(example, rows.shape)
            tools = example.get("tools")
            kwargs = {
                "tools": json.loads(tools) if isinstance(tools, str) else tools,
                **(example.get("chat_template_kwargs") or {}),
            }
            if not isinstance(prompt, list) or any(response is None for response in responses):
                continue
            try:
                prompt_ids = _tokenize(tokenizer, prompt, add_generation_prompt=True, **kwargs)["input_ids"]
                full = [_tokenize(tokenizer, prompt + response, **kwargs)["input_ids"] for response in responses]
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                raise TemplateFails(f"Row {index}: {type(error).__name__}: {error}") from error
            yield int(index), prompt_ids, full
        return
    eos = tokenizer.eos_token
    for start in range(0, len(indices), _BATCH):
        batch, texts = [], []
        for index, example in zip(
            indices[start : start + _BATCH],
            chosen.select(range(start, min(start + _BATCH, len(indices)))),
            strict=True,
        ):
            prompt, responses, _ = row_of(example, rows.shape)
            if prompt is None or any(response is None for response in responses):
                continue
            batch.append((int(index), len(responses)))
            texts += [prompt, *(prompt + (one if one.endswith(eos) else one + eos) for one in responses)]
        ids = tokenizer(text=texts, verbose=False)["input_ids"] if texts else []
        for index, number in batch:
            yield index, ids[0], ids[1 : number + 1]
            ids = ids[number + 1 :]


def count_tokens(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    rows: Rows,
    stop_ids: set[int],
    max_length: int | None,
    truncation_mode: str = "keep_start",
    apart: bool = False,
    seed: int = 0,
    budget: int = BUDGET,
) -> TokenCounts:
    """
    Tokenizes rows as the trainers do.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model, with an EOS token.
        dataset ([`~datasets.Dataset`]):
            The dataset.
        rows ([`Rows`]):
            Its rows.
        stop_ids (`set[int]`):
            Tokens that stop the model's generation.
        max_length (`int`, *optional*):
            Of the trainer's config.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            Of the trainer's config.
        apart (`bool`, *optional*, defaults to `False`):
            Whether the method takes pairs apart (KTO), so that each response has a start of its own.
        seed (`int`, *optional*, defaults to `0`):
            Of the rows that are drawn.
        budget (`int`, *optional*):
            Characters that are tokenized.

    Returns:
        [`TokenCounts`]

    Raises:
        [`TemplateFails`]: the chat template cannot render a row.
    """
    from .._compat import common_prefix_length

    indices, exact = draw_rows(rows, seed, budget)
    counts = TokenCounts(indices, exact)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    kept, keep_end = slice(None) if max_length is None else slice(max_length), truncation_mode == "keep_end"
    if max_length is not None and keep_end:
        kept = slice(-max_length, None)
    used, lost = [], {}
    for index, prompt, full in _encode(tokenizer, dataset, rows, indices):
        starts = [common_prefix_length(prompt, ids) for ids in full]
        if not apart and starts:
            starts = [min(starts)] * len(starts)
        for ids, start in zip(full, starts, strict=True):
            counts.owners.append(len(used))
            counts.starts.append(start)
            counts.lengths.append(len(ids))
            left = len(ids[kept])
            counts.kept.append(left)
            counts.answers.append(min(len(ids) - start, left) if keep_end else max(left - start, 0))
            counts.double_bos.append(bos is not None and ids[:2] == [bos, bos])
            counts.double_eos.append(ids[-2:] == [eos, eos])
            tail = set(ids[-_TAIL:] if rows.shape.conversational else ids[-1:])
            counts.ends.append(bool(tail & {eos, *stop_ids}))
            counts.largest = max(counts.largest, max(ids, default=0))
        whole, cut = {tuple(ids) for ids in full}, {tuple(ids[kept]) for ids in full}
        counts.alike.append(rows.shape.kind == "pairs" and len(whole) > 1 and len(cut) == 1)
        counts.prompts.append(len(prompt))
        used.append(index)
        if starts and min(starts) < len(prompt):
            text = tokenizer.decode(prompt[min(starts) :])
            lost[text] = lost.get(text, 0) + 1
    counts.rows = np.array(used, dtype=np.int64)
    counts.lost = dict(sorted(lost.items(), key=lambda item: -item[1]))
    for name in (
        "prompts",
        "owners",
        "starts",
        "lengths",
        "kept",
        "answers",
        "double_bos",
        "double_eos",
        "ends",
        "alike",
    ):
        setattr(counts, name, np.array(getattr(counts, name)))
    return counts
