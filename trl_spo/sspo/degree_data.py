# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""From the text of a dataset to the degrees of its tokens, and from there into the batch."""

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .._compat import global_then_local_main_first, is_conversational
from .key_content import key_phrases, shuffled_degrees, token_degrees


def add_degrees(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    num_degrees: int,
    extractor: str,
    language: str,
    stop_words: Sequence[str] | None,
    seed: int,
) -> dict[str, Any]:
    """
    The degrees of the tokens of an example that TRL has tokenized.

    Args:
        example (`dict[str, Any]`):
            A row with `prompt`, the texts `columns`, and their tokens `prompt_ids` and `*_ids`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Fast tokenizer.
        columns (`Sequence[str]`):
            Columns of the responses.
        num_degrees (`int`):
            N >= 2.
        extractor (`str`):
            Extractor of key phrases.
        language (`str`):
            Code of the language.
        stop_words (`Sequence[str]`, *optional*):
            Words in the place of the language's stop words.
        seed (`int`):
            Seed of the extractor `"random"`.

    Returns:
        `dict[str, Any]`: for each column `*_degrees` (`list[int]`, one for each of `*_ids`) and `*_key_tokens` (how many are not 0).
    """
    output = {}
    for column in columns:
        text, spans, offsets = _locate(example, column, tokenizer)
        start, end = (spans[0][0], spans[-1][1]) if spans else (0, 0)
        content = "\n" * (end - start)  # what is between the messages ends the phrases
        for left, right in spans:
            content = content[: left - start] + text[left:right] + content[right - start :]
        ids, special = example[f"{column}_ids"], _special_ids(tokenizer)
        inside = [
            (max(left, start) - start, min(right, end) - start)
            if token not in special and any(left < e and s < right for s, e in spans)
            else (0, 0)
            for (left, right), token in zip(offsets, ids, strict=True)
        ]
        phrases = key_phrases(content, "rake" if extractor == "random" else extractor, language, stop_words)
        degrees = token_degrees(inside, phrases, num_degrees)
        if extractor == "random":
            degrees = shuffled_degrees(degrees, inside, (seed, zlib.crc32(content.encode())))
        output[f"{column}_degrees"] = degrees
        output[f"{column}_key_tokens"] = sum(degree > 0 for degree in degrees)
    return output


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    # A word that the tokenizer does not know is content all the same
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def _locate(
    example: dict[str, Any], column: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
    """The text as it was tokenized, where in it the response's own words are, and where the tokens of the response are."""
    prompt, completion = example["prompt"], example[column]
    if is_conversational(example):
        tools = example.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        kwargs = {"tools": tools, **example.get("chat_template_kwargs", {})}
        text = tokenizer.apply_chat_template(prompt + completion, tokenize=False, **kwargs)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    else:
        text = prompt + completion
        encoding = tokenizer(text, return_offsets_mapping=True)
    if encoding["input_ids"] != example["prompt_ids"] + example[f"{column}_ids"]:
        raise ValueError(
            f"The tokens in `prompt_ids` and `{column}_ids` are not those of the text in `prompt` and `{column}`, which begins "
            f"with {text[:80]!r}: the places of its key phrases cannot be known. Let the trainer tokenize, and pass it the "
            "tokenizer itself, not a processor."
        )
    offsets = encoding["offset_mapping"][len(example["prompt_ids"]) :]
    if not is_conversational(example):
        end = len(text) - len(tokenizer.eos_token) if text.endswith(tokenizer.eos_token) else len(text)
        return text, [(len(prompt), end)] if end > len(prompt) else [], offsets

    spans, cursor = [], offsets[0][0] if offsets else len(text)
    for message in completion:
        if message["role"] != "assistant":
            continue
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        for part in (part.strip() for part in parts):
            place = text.find(part, cursor)
            if place < 0:
                raise ValueError(
                    f"The chat template changes the text of `{column}`, so that its key phrases have no places: {part[:80]!r} "
                    f"is not in {text[cursor : cursor + 120]!r}. Use a template that renders the content of a message as it is, "
                    "or write the content as the template renders it."
                )
            if part:
                spans.append((place, place + len(part)))
            cursor = place + len(part)
    return text, spans, offsets


def map_degrees(
    dataset: Dataset | IterableDataset, name: str, num_proc: int | None, **kwargs
) -> Dataset | IterableDataset:
    """Runs [`add_degrees`] over a dataset, once: `datasets` keeps the result. Same arguments, and those of `Dataset.map`."""
    map_kwargs = {}
    if isinstance(dataset, Dataset):  # `IterableDataset.map` supports neither
        map_kwargs = {"num_proc": num_proc, "desc": f"Extracting key content from {name} dataset"}
    with global_then_local_main_first():
        return dataset.map(add_degrees, fn_kwargs=kwargs, **map_kwargs)


class DegreeCollator:
    """
    Adds `token_degrees`, in the places of the completion's tokens, to what another collator makes of the examples.

    Args:
        collator (`Callable`):
            Collator whose rows are those of the first of `columns`, then those of the second. It gives a `completion_mask`.
        columns (`Sequence[str]`):
            Columns of the responses.
        truncation_mode (`str`):
            `"keep_start"` or `"keep_end"`: which end of a response is left where the collator truncates it.
    """

    def __init__(self, collator: Callable, columns: Sequence[str], truncation_mode: str):
        self.collator = collator
        self.columns = columns
        self.truncation_mode = truncation_mode

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        mask = batch["completion_mask"]
        degrees = torch.zeros_like(mask)
        rows = [example[f"{column}_degrees"] for column in self.columns for example in examples]
        for i, row in enumerate(rows):
            places = mask[i].nonzero().squeeze(1)
            if len(places) > len(row):
                raise ValueError(
                    f"The data collator made {len(places)} tokens of a completion that has {len(row)}: the degrees of its tokens "
                    "have no places. Use TRL's collator, or one that only pads and truncates."
                )
            kept = row[: len(places)] if self.truncation_mode == "keep_start" else row[len(row) - len(places) :]
            degrees[i, places] = torch.tensor(kept, dtype=degrees.dtype)
        batch["token_degrees"] = degrees
        return batch


def draw_levels(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, num_degrees: int, seed: int, step: int
) -> torch.Tensor:
    """
    One level for each row, from the seed, the step and the row's tokens alone: the same in a resumed run, and however many
    processes there are.

    Args:
        input_ids (`torch.Tensor` of shape `(R, L)`):
            Tokens.
        attention_mask (`torch.Tensor` of shape `(R, L)`):
            Which of them are not padding.
        num_degrees (`int`):
            N.
        seed (`int`):
            Seed.
        step (`int`):
            Step of the optimizer.

    Returns:
        `torch.Tensor` of shape `(R, 1)`: from 0 to N-1.
    """
    rows = zip(input_ids.cpu().numpy(), attention_mask.cpu().numpy().astype(bool), strict=True)
    levels = [
        np.random.default_rng((seed, step, zlib.crc32(row[mask].tobytes()))).integers(num_degrees)
        for row, mask in rows
    ]
    return torch.tensor(levels, device=input_ids.device).unsqueeze(1)
