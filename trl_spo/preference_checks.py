# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a preference dataset, said before the training and not in its middle."""

import math
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset


logger = get_logger(__name__)

# The column that says how a list's completions compare
_ORDERS = ("best", "ranking", "scores")


def columns_of(dataset: Dataset | IterableDataset, name: str) -> set[str]:
    """Columns of the first row. Raises a `ValueError` if there is none."""
    for example in dataset:
        return set(example)
    raise ValueError(f"The {name} dataset is empty. Pass a dataset with at least one row.")


def _is_empty(completion: str | list[dict] | None) -> bool:
    if not completion or isinstance(completion, str):
        return not completion
    # The last message, since the first ones may be those of a prompt
    return not (completion[-1].get("content") or completion[-1].get("tool_calls"))


def _check_pair(example: dict[str, Any]) -> str | None:
    for column in ("chosen", "rejected"):
        if _is_empty(example[column]):
            return f"its `{column}` is empty. Remove the row, or fill in the response"
    return None


def _check_list(example: dict[str, Any]) -> str | None:
    completions = example["completions"] or []
    n = len(completions)
    if n < 2:
        return f"it has {n} completions. A list needs at least two to compare: remove the row"
    if any(_is_empty(completion) for completion in completions):
        return "one of its `completions` is empty. Remove the completion, or fill it in"
    for order in _ORDERS:
        if order in example and example[order] is None:
            return f"its `{order}` is missing. Remove the row, or fill it in"
    if "best" in example and example["best"] not in range(n):
        return f"`best={example['best']}` is not the index of one of its {n} completions. Use 0 to {n - 1}"
    if "ranking" in example and (len(example["ranking"]) != n or set(example["ranking"]) != set(range(n))):
        return f"`ranking={list(example['ranking'])}` is not a permutation of 0 to {n - 1}, best first"
    scores = example.get("scores")
    if scores is not None:
        if len(scores) != n:
            return f"it has {n} completions and {len(scores)} `scores`. Give one for each"
        if any(score is None or not math.isfinite(score) for score in scores):
            return f"`scores={list(scores)}` are not all finite. Remove the completions that have none"
        if len(set(scores)) == 1:
            return f"its `scores` are all {scores[0]}, so that nothing is preferred. Remove the row"
    return None


def check_preferences(
    dataset: Dataset | IterableDataset, name: str, allow_lists: bool = True
) -> Dataset | IterableDataset:
    """
    Checks the columns and the rows of a preference dataset.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs (`prompt`, `chosen`, `rejected`, the prompt possibly left inside of the two) or lists (`prompt`,
            `completions` and one of `best`, `ranking` and `scores`).
        name (`str`):
            What the messages call it, e.g. `"train"`.
        allow_lists (`bool`, *optional*, defaults to `True`):
            Whether lists are accepted.

    Returns:
        The dataset; one that streams is checked as its rows are read.

    Raises:
        `ValueError`: names the row, the value and the way out.
    """
    columns = columns_of(dataset, name)
    if "completions" in columns and not allow_lists:
        raise ValueError(
            f"The {name} dataset holds lists (`completions`), and this trainer takes pairs. Use `SoftPOTrainer`, or make pairs "
            "(`prompt`, `chosen`, `rejected`) of them."
        )
    if "completions" in columns:
        orders = [order for order in _ORDERS if order in columns]
        if "prompt" not in columns or len(orders) != 1:
            raise ValueError(
                f"The {name} dataset has `completions`, so it needs `prompt` and exactly one of {list(_ORDERS)}, but its "
                f"columns are {sorted(columns)}. Add or remove columns."
            )
        check, used = _check_list, ["prompt", "completions", *orders]
    else:
        missing = [column for column in ("chosen", "rejected") if column not in columns]
        if missing:
            raise ValueError(
                f"The {name} dataset lacks the columns {missing}: its columns are {sorted(columns)}. Pass pairs (`prompt`, "
                "`chosen`, `rejected`) or lists (`prompt`, `completions` and one of `best`, `ranking`, `scores`)."
            )
        check, used = _check_pair, ["chosen", "rejected"]

    if isinstance(dataset, IterableDataset):

        def check_row(example: dict[str, Any]) -> dict[str, Any]:
            problem = check(example)
            if problem is not None:
                raise ValueError(f"A row of the {name} dataset cannot be used: {problem}. The row: {example}.")
            return example

        return dataset.map(check_row)

    identical = 0
    for i, example in enumerate(dataset.select_columns(used)):
        problem = check(example)
        if problem is not None:
            raise ValueError(f"Row {i} of the {name} dataset cannot be used: {problem}.")
        identical += check is _check_pair and example["chosen"] == example["rejected"]
    if identical == len(dataset):
        raise ValueError(
            f"`chosen` and `rejected` are identical in every row of the {name} dataset, so that nothing is preferred. "
            "Check how the dataset was made."
        )
    if identical > 0:
        logger.warning(
            f"`chosen` and `rejected` are identical in {identical} of the {len(dataset)} rows of the {name} dataset "
            f"({identical / len(dataset):.1%}): they teach nothing. Consider removing them."
        )
    return dataset


def check_unpaired_preferences(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """
    Checks the columns and the rows of an unpaired preference dataset, or of one of pairs that is to be taken apart.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            `prompt`, `completion` and `label`, or pairs as in [`check_preferences`].
        name (`str`):
            What the messages call it, e.g. `"train"`.

    Returns:
        The dataset; one that streams is checked as its rows are read.

    Raises:
        `ValueError`: names the row, the value and the way out.
    """
    columns = columns_of(dataset, name)
    if {"chosen", "rejected"} <= columns:
        return check_preferences(dataset, name, allow_lists=False)
    missing = [column for column in ("prompt", "completion", "label") if column not in columns]
    if missing:
        raise ValueError(
            f"The {name} dataset lacks the columns {missing}: its columns are {sorted(columns)}. Pass responses (`prompt`, "
            "`completion`, `label`) or pairs (`prompt`, `chosen`, `rejected`)."
        )

    def problem_of(example: dict[str, Any]) -> str | None:
        if _is_empty(example["completion"]):
            return "its `completion` is empty. Remove the row, or fill in the response"
        if example["label"] not in (True, False):
            return (
                f"its `label` is {example['label']!r}. Use `true` for a desirable, `false` for an undesirable response"
            )
        return None

    if isinstance(dataset, IterableDataset):

        def check_row(example: dict[str, Any]) -> dict[str, Any]:
            problem = problem_of(example)
            if problem is not None:
                raise ValueError(f"A row of the {name} dataset cannot be used: {problem}. The row: {example}.")
            return example

        return dataset.map(check_row)

    for i, example in enumerate(dataset.select_columns(["completion", "label"])):
        problem = problem_of(example)
        if problem is not None:
            raise ValueError(f"Row {i} of the {name} dataset cannot be used: {problem}.")
    return dataset
