# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Prompts to ask the student: no duplicates, none that are too long, and how they are spread over topics."""

import hashlib
import json
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Value
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .near_duplicates import Messages, NearDuplicates, check_installed, normalized, without_system
from .rubrics import as_text


DROP_REASONS = ("duplicate", "near-duplicate", "too long")
_EXAMPLES = 3  # of a topic, in the report


def prompt_id(prompt: str | list[dict[str, Any]]) -> str:
    """The id of a prompt: a hash of it, so that it is the same in every run."""
    if not isinstance(prompt, str):
        # A dataset fills in the fields that only other messages have
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def split_of(prompt_id: str, test_share: float) -> str:
    """`"train"` or `"test"`, by a hash: all rows of a prompt are in the same one, in every form and every run."""
    return "test" if int(hashlib.sha256(prompt_id.encode()).hexdigest()[:8], 16) < test_share * 2**32 else "train"


class PreparedPrompts(NamedTuple):
    """Prompts with their ids, those that were dropped with the reason, and a report of both."""

    prompts: Dataset
    dropped: Dataset
    report: dict[str, Any]


def prepare_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_prompt_length: int | None = None,
    near_duplicates: float | None = 0.8,
    topic_column: str | None = None,
    embed: Callable[[list[str]], np.ndarray] | None = None,
    num_topics: int = 10,
    seed: int = 42,
) -> PreparedPrompts:
    """
    Drops duplicates and prompts that are too long, gives each prompt an id, and reports how they are spread over topics.

    Args:
        dataset ([`~datasets.Dataset`]):
            With a column `prompt`, standard or conversational. Other columns are kept: rubrics and rules can use them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Of the student, to count tokens by.
        max_prompt_length (`int`, *optional*):
            Tokens that a prompt may have, with its chat template: the student's context without what a response needs.
        near_duplicates (`float`, *optional*, defaults to `0.8`):
            From 0.1 to 1, the [`similarity`] from which on the later one of two prompts is dropped. `None`: only prompts that are equal
            but for case and white space are. Set it higher, or to `None`, if all prompts repeat the same long text outside of a system
            message, or if some differ in a number only and are different problems. [`Synthesis`] looks for the prompts of the human check
            set by the same value: with `None`, one that was reworded a little would be trained on, so make sure that there is none.
        topic_column (`str`, *optional*):
            Column with the topic or the intent of a prompt.
        embed (`Callable`, *optional*):
            Instead of the column: vectors of shape `(n, d)` of n texts, which are then clustered by k-means.
        num_topics (`int`, *optional*, defaults to `10`):
            Number of clusters.
        seed (`int`, *optional*, defaults to `42`):
            Of the clustering.

    Returns:
        [`PreparedPrompts`]: the prompts with `prompt_id`, and with `topic` (the number of the cluster) if there is `embed`; those that
        were dropped, with `prompt_id`, `reason` (one of `DROP_REASONS`) and, of duplicates, `duplicate_of`, the id of the prompt that
        was kept; and a report with the counts and the balance of the topics.

    Raises:
        `ImportError`: a package of the extra `synthetic` is missing.
        `TypeError`: the dataset is not a [`~datasets.Dataset`].
        `ValueError`: there are no prompts, one of them is empty, a column is in the way, or the options do not go together.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"The prompts must be a `Dataset`, got a {type(dataset).__name__}. Pick one of its splits.")
    columns = dataset.column_names
    if "prompt" not in columns:
        raise ValueError(f"The dataset of prompts has no column `prompt`, but {columns}. Rename one of them.")
    if len(dataset) == 0:
        raise ValueError("The dataset of prompts is empty.")
    added = ["prompt_id", "reason", "duplicate_of"] + (["topic"] if embed is not None else [])
    taken = [name for name in added if name in columns]
    if taken:
        remedy = ", or use `topic_column='topic'` instead of `embed`" if taken == ["topic"] else ""
        raise ValueError(f"The dataset of prompts has a column `{taken[0]}`, which is to be added. Rename it{remedy}.")
    if topic_column is not None and (embed is not None or topic_column not in columns):
        why = "set together with `embed`" if embed is not None else f"not one of the columns {columns}"
        raise ValueError(f"`topic_column={topic_column!r}` is {why}. Use a column, or `embed`.")
    if max_prompt_length is not None and (tokenizer is None or max_prompt_length < 1):
        raise ValueError(
            f"`max_prompt_length={max_prompt_length}` must be positive, and needs the `tokenizer` of the student."
        )
    if embed is not None:
        if num_topics < 1:
            raise ValueError(f"`num_topics` must be at least 1, got {num_topics}.")
        check_installed("sklearn", "embed", "use `topic_column`")
    near = None if near_duplicates is None else NearDuplicates(near_duplicates, len(dataset))

    ids: dict[Messages, str] = {}
    kept, dropped, shortest = [], [], math.inf
    for row, prompt in enumerate(tqdm(dataset["prompt"], desc="Prompts", unit=" prompts")):
        _check_prompt(prompt, f"Row {row} of the dataset of prompts")
        messages, entry = normalized(prompt), {"row": row, "prompt_id": prompt_id(prompt), "duplicate_of": None}
        if messages in ids:
            dropped.append({**entry, "reason": "duplicate", "duplicate_of": ids[messages]})
        elif max_prompt_length is not None and (length := _length(prompt, tokenizer)) > max_prompt_length:
            shortest = min(shortest, length)
            dropped.append({**entry, "reason": "too long"})
        elif near is not None and (original := near.find(messages, add=True)) is not None:
            dropped.append({**entry, "reason": "near-duplicate", "duplicate_of": ids[original]})
        else:
            ids[messages] = entry["prompt_id"]
            kept.append(entry)
    if not kept:
        raise ValueError(
            f"The shortest one of the {len(dataset)} prompts has {shortest} tokens, which is more than `max_prompt_length="
            f"{max_prompt_length}`. Allow for more."
        )

    prompts = _with_columns(dataset, kept, ("prompt_id",))
    counts = Counter(entry["reason"] for entry in dropped)
    report: dict[str, Any] = {"prompts": len(dataset), "kept": len(prompts), "dropped": dict(counts)}
    if topic_column is not None or embed is not None:
        texts = [as_text(prompt) for prompt in prompts["prompt"]]
        if embed is not None:
            topics = _clusters(texts, embed, num_topics, seed)
            prompts = prompts.add_column("topic", topics, feature=Value("string"))
        else:
            topics = [str(topic) for topic in prompts[topic_column]]
        report["topics"] = balance(topics, texts)
    return PreparedPrompts(prompts, _with_columns(dataset, dropped, ("prompt_id", "reason", "duplicate_of")), report)


def refuse_overlap(
    prompts: Sequence[str | list[dict[str, Any]]],
    check_prompts: Sequence[str | list[dict[str, Any]]],
    threshold: float | None = 0.8,
) -> None:
    """
    Makes sure that no prompt of the human check set is trained on.

    Args:
        prompts (`Sequence`):
            Training prompts, standard or conversational.
        check_prompts (`Sequence`):
            Prompts of the human check set. What system messages say makes no difference.
        threshold (`float`, *optional*, defaults to `0.8`):
            As `near_duplicates` of [`prepare_prompts`]. With `None`, only prompts that are equal but for case and white space are found:
            that none is a variant of one of the check set is then for you to make sure.

    Raises:
        `ImportError`: datasketch is missing, and `threshold` is not `None`.
        `ValueError`: a training prompt is (nearly) one of the check set, or a prompt is empty.
    """
    checks: dict[Messages, Any] = {}
    for i, prompt in enumerate(check_prompts):
        _check_prompt(prompt, f"Prompt {i} of the human check set")
        checks.setdefault(without_system(normalized(prompt)), prompt)
    near = None if threshold is None else NearDuplicates(threshold, len(checks))
    if near is not None:
        for messages in checks:
            near.add(messages)
    count, example = 0, None
    for i, prompt in enumerate(tqdm(prompts, desc="Overlap with the human check set", unit=" prompts")):
        _check_prompt(prompt, f"Training prompt {i}")
        messages = without_system(normalized(prompt))
        found = messages if messages in checks else near.find(messages) if near is not None else None
        if found is not None:
            count += 1
            example = example or (prompt, checks[found])
    if example is not None:
        one, other = (textwrap.shorten(as_text(prompt), 200) for prompt in example)
        nearly = "" if threshold is None else f" (with a similarity of at least {threshold})"
        raise ValueError(
            f"{count} of the training prompts are in the human check set{nearly}, which must never be trained on. One of them is "
            f"{one!r}, and in the check set {other!r}. Remove them from the training prompts, or use other pairs for the check."
        )


def balance(topics: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """How many prompts each topic has, with examples, and how many topics of equal size would be as diverse: `exp` of the entropy."""
    counts = Counter(topics)
    shares = np.array([count / len(topics) for count in counts.values()])
    examples: dict[str, list[str]] = {topic: [] for topic in counts}
    for topic, text in zip(topics, texts, strict=True):
        if len(examples[topic]) < _EXAMPLES:
            examples[topic].append(text)
    return {
        "effective_number": float(np.exp(-(shares * np.log(shares)).sum())),
        "of": [
            {"topic": topic, "prompts": count, "share": count / len(topics), "examples": examples[topic]}
            for topic, count in counts.most_common()
        ],
    }


def _check_prompt(prompt: Any, where: str) -> None:
    """Raises a `ValueError` if a prompt is not text or messages of text, or if nothing is asked."""
    messages = prompt if isinstance(prompt, list) else [{"content": prompt}]
    if not all(isinstance(message, dict) and isinstance(message.get("content"), str | None) for message in messages):
        raise ValueError(f"{where} is not a text or a list of messages with texts: {prompt!r}. Remove or convert it.")
    if not messages or not (messages[-1]["content"] or "").strip():
        raise ValueError(f"{where} is empty ({prompt!r}). Remove it.")


def _with_columns(dataset: Dataset, entries: Sequence[dict[str, Any]], names: Iterable[str]) -> Dataset:
    """The rows of the entries, with these of their fields as columns."""
    rows = dataset.select([entry["row"] for entry in entries])
    for name in names:
        # With its type, which an empty column would not have
        rows = rows.add_column(name, [entry[name] for entry in entries], feature=Value("string"))
    return rows


def _length(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt).input_ids)
    goes_on = prompt[-1]["role"] == "assistant"  # as TRL has it, the response goes on from there
    return len(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=not goes_on, continue_final_message=goes_on)[
            "input_ids"
        ]
    )


def _clusters(texts: list[str], embed: Callable[[list[str]], np.ndarray], num_topics: int, seed: int) -> list[str]:
    from sklearn.cluster import KMeans

    vectors = np.asarray(embed(texts))
    if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
        raise ValueError(
            f"`embed` must return a vector of finite numbers for each of the {len(texts)} texts, and returned shape {vectors.shape}"
            f"{' with NaN or infinity' if vectors.ndim == 2 and len(vectors) == len(texts) else ''}."
        )
    return [str(topic) for topic in KMeans(min(num_topics, len(texts)), random_state=seed).fit_predict(vectors)]
