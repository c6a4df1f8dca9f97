# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
One pass over a preference dataset that keeps numbers only: of each text a hash and a length, so that a large dataset
does not have to fit into memory, and all that compares texts is a comparison of numbers.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..synthetic.near_duplicates import normalized
from .shape import Shape


_BATCH = 1000
# Shorter texts are often in others by chance
_LONG_ENOUGH = 20


@dataclass(frozen=True)
class Rows:
    """
    What is kept of the rows of a dataset.

    N rows have R responses: two of a pair, as many as there are of a list, one of an unpaired row. Hashes are those of
    the process: equal if and only if (but for one chance in 2^64) the texts are. Those of normalized texts do without
    case and white space.

    Attributes:
        shape ([`Shape`]):
            Of the dataset.
        prompts (`np.ndarray` of shape `(N,)`):
            Hashes of the normalized prompts.
        prompt_characters (`np.ndarray` of shape `(N,)`):
            Their lengths.
        keys (`np.ndarray` of shape `(N,)`):
            Hashes of the whole rows, normalized: prompt, responses, and which is better.
        responses, exact (`np.ndarray` of shape `(R,)`):
            Hashes of the responses, normalized and as they are.
        rows (`np.ndarray` of shape `(R,)`):
            The row of each response.
        ranks (`np.ndarray` of shape `(R,)`):
            0 for the best: the chosen one, the first of a list, a desirable one; those that are equally good share
            their rank.
        characters (`np.ndarray` of shape `(R,)`):
            Their lengths.
        empty, blank (`np.ndarray` of shape `(R,)`):
            Which have nothing in them, as the trainers see it, and which have white space only.
        flags (`dict[str, np.ndarray]` of shape `(N,)`):
            `missing`: a value is `None`. `together`: a prompt runs into a response without anything between.
            `repeats_prompt`: a response begins with the prompt. `no_split`: the prompt would be within chosen and
            rejected, and one of them is empty. `no_prompt`: they have nothing in common. `other_prompt`: they have
            different questions in them. `cut_word`: the prompt that chosen and rejected have in common ends
            within a word. `not_assistant`: a response does not end with a message of the assistant.
            `prompt_of_assistant`: the prompt does. `bad_label`: the label of an unpaired row is neither true nor
            false.
    """

    shape: Shape
    prompts: np.ndarray
    prompt_characters: np.ndarray
    keys: np.ndarray
    responses: np.ndarray
    exact: np.ndarray
    rows: np.ndarray
    ranks: np.ndarray
    characters: np.ndarray
    empty: np.ndarray
    blank: np.ndarray
    flags: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.prompts)

    def pairs(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of values of the responses of pairs, those of the chosen and of the rejected ones."""
        return values[::2], values[1::2]


FLAGS = (
    "missing",
    "together",
    "repeats_prompt",
    "no_prompt",
    "no_split",
    "other_prompt",
    "cut_word",
    "not_assistant",
    "prompt_of_assistant",
    "bad_label",
)


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """
    What [`~trl.extract_prompt`] does to a pair whose prompt is left inside of chosen and rejected, without going
    through them character by character.

    Args:
        chosen, rejected (`str` or `list[dict]`):
            Prompt and response together.

    Returns:
        `tuple`: prompt, chosen and rejected.

    Raises:
        `ValueError`: one of the two is empty, which TRL has no answer to.
    """
    length = min(len(chosen), len(rejected))
    if length == 0:
        raise ValueError("`chosen` or `rejected` is empty, so that they have no prompt in common.")
    if chosen[:length] == rejected[:length]:
        index = length - 1  # as TRL has it: the last one is left for the response
    else:
        low, high = 0, length  # the first `low` are equal, the first `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if chosen[low:middle] == rejected[low:middle] else (low, middle)
        index = low - 1 if chosen[low - 1] == " " else low
    return chosen[:index], chosen[index:], rejected[index:]


def text_of(message: dict[str, Any]) -> str:
    """The text of a message: of one in parts, of those that have any, and calls of tools in JSON."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "\n".join(part.get("text") or "" for part in content)
    calls = message.get("tool_calls")
    return content + json.dumps(calls, sort_keys=True, default=str) if calls else content


def as_text(value: str | list[dict[str, Any]] | None) -> str:
    """A prompt or a response as one text."""
    if value is None or isinstance(value, str):
        return value or ""
    return "\n".join(text_of(message) for message in value)


def ranks_of(example: dict[str, Any]) -> list[int]:
    """Rank of each completion of a list, 0 the best, as Soft PO's loss takes them; those of a list that it refuses are all 0."""
    completions = example["completions"] or []
    n = len(completions)
    if example.get("best") is not None:
        return [int(i != example["best"]) for i in range(n)]
    if example.get("ranking") is not None:
        ranking = list(example["ranking"])
        return [ranking.index(i) for i in range(n)] if sorted(ranking) == list(range(n)) else [0] * n
    scores = example.get("scores") or []
    if len(scores) != n or any(score is None for score in scores):
        return [0] * n
    return [sum(other > score for other in set(scores)) for score in scores]


def row_of(example: dict[str, Any], shape: Shape) -> tuple[Any, list[Any], list[int]]:
    """Prompt, responses and their ranks of a row."""
    prompt = None if shape.implicit_prompt else example["prompt"]
    if shape.kind == "lists":
        return prompt, list(example["completions"] or []), ranks_of(example)
    if shape.kind == "unpaired":
        return prompt, [example["completion"]], [int(not example["label"])]
    chosen, rejected = example["chosen"], example["rejected"]
    if shape.implicit_prompt and chosen and rejected:
        prompt, chosen, rejected = split_prompt(chosen, rejected)
    return prompt, [chosen, rejected], [0, 1]


def _is_empty(response: Any) -> bool:
    """As `trl_spo.preference_checks` has it: of messages, the last one counts."""
    if not response or isinstance(response, str):
        return not response
    return not (response[-1].get("content") or response[-1].get("tool_calls"))


def _key(value: Any) -> int:
    if isinstance(value, list):
        value = [{"role": message.get("role"), "content": text_of(message)} for message in value]
    return hash(normalized(value or ""))


def _flags_of(prompt: Any, responses: list[Any], shape: Shape) -> dict[str, bool]:
    implicit = shape.implicit_prompt
    found = {"missing": (prompt is None and not implicit) or any(one is None for one in responses)}
    found["no_split"] = implicit and any(one is not None and len(one) == 0 for one in responses)
    responses = [one for one in responses if one]
    split = implicit and len(responses) == 2
    if shape.conversational:
        found["not_assistant"] = any(one[-1].get("role") != "assistant" for one in responses)
        found["prompt_of_assistant"] = bool(prompt) and prompt[-1].get("role") == "assistant"
        found["repeats_prompt"] = bool(prompt) and any(one[: len(prompt)] == prompt for one in responses)
        # Two conversations that part at what the user says, or before
        found["other_prompt"] = split and any(one[0].get("role") in ("user", "system") for one in responses)
        found["no_prompt"] = split and not prompt and not found["other_prompt"]
    elif prompt is not None or implicit:
        prompt = prompt or ""
        found["no_prompt"] = split and not prompt.strip()
        found["cut_word"] = split and prompt[-1:].isalnum() and any(one[0].isalnum() for one in responses)
        found["together"] = not implicit and any(
            not (prompt[-1:] or " ").isspace() and not one[0].isspace() for one in responses
        )
        found["repeats_prompt"] = len(prompt) >= _LONG_ENOUGH and any(one.startswith(prompt) for one in responses)
    return found


def read_rows(dataset: Dataset, shape: Shape) -> Rows:
    """
    Goes through a dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preferences.
        shape ([`Shape`]):
            Of the dataset, one that has a `kind`.

    Returns:
        [`Rows`]
    """
    prompts, prompt_characters, keys = [], [], []
    responses, exact, owners, ranks, characters, empty, blank = ([] for _ in range(7))
    flags: dict[str, list[bool]] = {name: [] for name in FLAGS}
    for batch in dataset.select_columns(shape.columns).iter(batch_size=_BATCH):
        for values in zip(*batch.values(), strict=True):
            example = dict(zip(batch, values, strict=True))
            prompt, row, of_row = row_of(example, shape)
            found = _flags_of(prompt, row, shape)
            found["bad_label"] = shape.kind == "unpaired" and example["label"] not in (True, False)
            for name in FLAGS:
                flags[name].append(bool(found.get(name)))
            for response in row:
                text = as_text(response)
                responses.append(_key(response))
                exact.append(hash(text) if shape.conversational is False else hash(repr(response)))
                owners.append(len(prompts))
                characters.append(len(text))
                empty.append(_is_empty(response))
                blank.append(bool(text) and text.isspace())
            ranks += of_row
            prompts.append(_key(prompt))
            ranked = responses[len(responses) - len(row) :]
            keys.append(hash((prompts[-1], *sorted(zip(of_row, ranked, strict=True)))))
            prompt_characters.append(len(as_text(prompt)))
    return Rows(
        shape=shape,
        prompts=np.array(prompts, dtype=np.int64),
        prompt_characters=np.array(prompt_characters, dtype=np.int64),
        keys=np.array(keys, dtype=np.int64),
        responses=np.array(responses, dtype=np.int64),
        exact=np.array(exact, dtype=np.int64),
        rows=np.array(owners, dtype=np.int64),
        ranks=np.array(ranks, dtype=np.int64),
        characters=np.array(characters, dtype=np.int64),
        empty=np.array(empty, dtype=bool),
        blank=np.array(blank, dtype=bool),
        flags={name: np.array(values, dtype=bool) for name, values in flags.items()},
    )
