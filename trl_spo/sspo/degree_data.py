# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""From the text of a dataset to the degrees of its tokens, and from there into the batch."""

import json
import zlib
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .._compat import global_then_local_main_first, is_conversational
from .key_content import PACKAGES, key_phrases, shuffled_degrees, token_degrees


def add_degrees(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    num_degrees: int,
    extractor: str,
    language: str,
    stop_words: Sequence[str] | None,
    seed: int,
    special_ids: Collection[int],
    versions: Collection[str] = (),
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
        special_ids (`Collection[int]`):
            Tokens that are not content, see [`special_token_ids`].
        versions (`Collection[str]`, *optional*):
            Of the packages that the result depends on. They are not read: `datasets` keeps a result for as long as the function's
            name and arguments are the same.

    Returns:
        `dict[str, Any]`: for each column `*_degrees` (`list[int]`, one for each of `*_ids`) and `*_key_tokens` (how many are not 0).
    """
    output = {}
    unknown = tokenizer.unk_token_id
    for column in columns:
        text, spans, offsets = _locate(example, column, tokenizer)
        # What is not the response's own ends the phrases: the prompt, the template, other roles' messages, special tokens
        content, is_own = ["\n"] * len(text), bytearray(len(text))
        for left, right in spans:
            content[left:right] = text[left:right]
            is_own[left:right] = b"\1" * (right - left)
        for token, (left, right) in zip(example["prompt_ids"] + example[f"{column}_ids"], offsets, strict=True):
            # A word that the tokenizer does not know is content all the same
            if token in special_ids and (token != unknown or text[left:right].strip() == tokenizer.unk_token):
                content[left:right] = "\n" * (right - left)
                is_own[left:right] = bytes(right - left)
        start, end = (spans[0][0], spans[-1][1]) if spans else (0, 0)
        content = "".join(content[start:end])
        inside = [
            (max(left - start, 0), right - start) if is_own.find(1, left, right) >= 0 else (0, 0)
            for left, right in offsets[len(example["prompt_ids"]) :]
        ]
        phrases = key_phrases(content, "rake" if extractor == "random" else extractor, language, stop_words)
        degrees = token_degrees(inside, phrases, num_degrees)
        if extractor == "random":
            degrees = shuffled_degrees(degrees, inside, (seed, zlib.crc32(content.encode())))
        output[f"{column}_degrees"] = degrees
        output[f"{column}_key_tokens"] = sum(degree > 0 for degree in degrees)
    return output


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens of a tokenizer, also those that have no name such as `eos_token`."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _locate(
    example: dict[str, Any], column: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
    """The text as it was tokenized, where in it the response's own words are, and where its tokens are."""
    prompt, completion = example["prompt"], example[column]
    if is_conversational(example):
        tools = example.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        kwargs = {"tools": tools, **example.get("chat_template_kwargs", {})}

        def render(completion):
            return tokenizer.apply_chat_template(prompt + completion, tokenize=False, **kwargs)

        text = render(completion)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = _message_spans(text, completion, column, render)
    else:
        text = prompt + completion
        encoding = tokenizer(text, return_offsets_mapping=True)
        spans = [(len(prompt), len(text))] if completion else []
    if encoding["input_ids"] != example["prompt_ids"] + example[f"{column}_ids"]:
        raise ValueError(
            f"The tokens in `prompt_ids` and `{column}_ids` are not those of the text in `prompt` and `{column}`, which begins "
            f"with {text[:80]!r}: the places of its key phrases cannot be known. Let the trainer tokenize, and pass it the "
            "tokenizer itself, not a processor."
        )
    return text, spans, encoding["offset_mapping"]


def _message_spans(
    text: str, completion: list[dict[str, Any]], column: str, render: Callable[[list[dict[str, Any]]], str]
) -> list[tuple[int, int]]:
    """
    Where the assistant's words are in the text that the chat template makes of a completion. A search for them would find them in the
    template or in another message too. So the completion is rendered again, with a marker after each of them.
    """
    marker = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)
    parts = []

    def mark(part: str) -> str:
        end = len(part.rstrip())
        if end == 0:
            return part
        parts.append(part.strip())
        return part[:end] + marker + part[end:]

    marked = []
    for message in completion:
        content = message.get("content")
        if message["role"] == "assistant" and content:
            if isinstance(content, str):
                content = mark(content)
            else:
                content = [{**part, "text": mark(part["text"])} if part.get("text") else part for part in content]
            message = {**message, "content": content}
        marked.append(message)

    spans, pieces, end = [], render(marked).split(marker), 0
    if len(pieces) == len(parts) + 1 and "".join(pieces) == text:
        for part, piece in zip(parts, pieces, strict=False):
            end += len(piece)
            if text.endswith(part, 0, end):
                spans.append((end - len(part), end))
    if len(spans) < len(parts):
        raise ValueError(
            f"The chat template changes the text of `{column}`, so that its key phrases have no places: it makes {text[-200:]!r} "
            f"of {parts[-1][-80:]!r}. Use a template that renders the content of a message as it is, or write the content as the "
            "template renders it."
        )
    return spans


def map_degrees(
    dataset: Dataset | IterableDataset, name: str, num_proc: int | None, **kwargs
) -> Dataset | IterableDataset:
    """Runs [`add_degrees`] over a dataset, once: `datasets` keeps the result. Same arguments, and those of `Dataset.map`."""
    map_kwargs = {}
    if isinstance(dataset, Dataset):  # `IterableDataset.map` supports neither
        map_kwargs = {"num_proc": num_proc, "desc": f"Extracting key content from {name} dataset"}
    kwargs["special_ids"] = sorted(special_token_ids(kwargs["tokenizer"]))
    packages = ("trl-spo", "stop-words", "rake-nltk", *PACKAGES.get(kwargs["extractor"], ()))
    kwargs["versions"] = [version(package) for package in packages]
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
        degrees = torch.zeros_like(mask, dtype=torch.long)
        rows = [
            (example[f"{column}_ids"], example[f"{column}_degrees"]) for column in self.columns for example in examples
        ]
        for i, (ids, row) in enumerate(rows):
            places = mask[i].nonzero().squeeze(1)
            kept = slice(len(places)) if self.truncation_mode == "keep_start" else slice(len(row) - len(places), None)
            if batch["input_ids"][i, places].tolist() != ids[kept]:
                raise ValueError(
                    f"The data collator made {len(places)} tokens of a completion that has {len(ids)}, and they are not the "
                    f"{'first' if self.truncation_mode == 'keep_start' else 'last'} of them: the degrees of its tokens have no places. "
                    "Use TRL's collator, or one that only pads and truncates."
                )
            degrees[i, places] = torch.tensor(row[kept], dtype=degrees.dtype)
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
