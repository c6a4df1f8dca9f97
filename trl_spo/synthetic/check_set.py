# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The human check set: pairs with labels of people, never trained on, that say what the jury's verdicts are worth."""

import hashlib
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from .agreement import label_of_share
from .calibration import fit_calibration
from .human_agreement import check_agreement, reliability
from .jury import Pair
from .prompts import prompt_id
from .rubrics import as_text


_LABELS = {"a": 0, "A": 0, 0: 0, "0": 0, "b": 1, "B": 1, 1: 1, "1": 1}


class HumanCheckError(RuntimeError):
    """The jury agrees too little with people to be trained on."""


def check_pairs(dataset: Dataset) -> tuple[list[Pair], list[int]]:
    """
    The pairs of a human check set, and the labels of people: 0 if the first response is better, 1 if the second is.

    Args:
        dataset ([`~datasets.Dataset`]):
            With `prompt`, `chosen` and `rejected`, whose order is then drawn by a hash of the pair; or with `prompt`, `response_a`,
            `response_b` and `label`, `"a"` or `"b"`. Other columns are for rubrics and rules.

    Returns:
        `tuple[list[Pair], list[int]]`: pairs and labels.

    Raises:
        `ValueError`: columns are missing, the dataset is empty, or a label is a tie or unknown.
    """
    columns = set(dataset.column_names)
    preference, labelled = ("prompt", "chosen", "rejected"), ("prompt", "response_a", "response_b", "label")
    names = next((names for names in (preference, labelled) if columns.issuperset(names)), None)
    if names is None or columns.issuperset({*preference, *labelled}):
        raise ValueError(
            f"The human check set has the columns {sorted(columns)}. It needs either {list(preference)} or {list(labelled)}."
        )
    if len(dataset) == 0:
        raise ValueError("The human check set is empty.")
    pairs, labels = [], []
    for i, row in enumerate(dataset):
        first, second = (_response(row[name]) for name in names[1:3])
        if names is labelled:
            label = _LABELS.get(row["label"])
            if label is None:
                raise ValueError(
                    f"The label of row {i} of the human check set is {row['label']!r}. Use 'a' or 'b', and leave out ties."
                )
        else:
            # Else the first response would be the better one in all pairs
            label = hashlib.sha256("\n".join((as_text(row["prompt"]), first, second)).encode()).digest()[0] % 2
            first, second = (second, first) if label else (first, second)
        others = {name: value for name, value in row.items() if name not in names}
        pairs.append(Pair(f"{prompt_id(row['prompt'])}-{i}", ("a", "b"), row["prompt"], (first, second), others))
        labels.append(label)
    return pairs, labels


def _response(response: str | list[dict[str, str]]) -> str:
    return response if isinstance(response, str) else response[-1]["content"]


def human_check(verdicts: Iterable[dict[str, Any]], labels: list[int], seed: int = 0) -> dict[str, Any]:
    """
    What the jury's verdicts on the human check set are worth.

    Args:
        verdicts (`Iterable[dict[str, Any]]`):
            What [`Jury.verdicts`] says of the pairs of [`check_pairs`].
        labels (`list[int]`):
            The labels of people.
        seed (`int`, *optional*, defaults to `0`):
            Of the bootstrap, and of the calibration's tenths.

    Returns:
        `dict[str, Any]`: what [`check_agreement`] gives, with the `reliability` of the jury's confidence, and the `calibration` of its votes
        ([`fit_calibration`]).
    """
    verdicts = list(verdicts)
    # Where a rule knows the truth, its word is what would be trained on
    shares = [verdict["share"] if verdict["truth"] is None else float(verdict["truth"] == "a") for verdict in verdicts]
    jury = [label_of_share(share) for share in shares]
    names = dict.fromkeys(vote["critic"] for verdict in verdicts for vote in verdict["votes"])
    critics = {
        name: [
            label_of_share(next((vote["share"] for vote in verdict["votes"] if vote["critic"] == name), None))
            for verdict in verdicts
        ]
        for name in names
    }
    report = check_agreement(labels, jury, critics, [verdict["lengths"] for verdict in verdicts], seed)
    decided = [
        (abs(2 * share - 1), label == human)
        for verdict, share, label, human in zip(verdicts, shares, jury, labels, strict=True)
        if label is not None and verdict["truth"] is None  # what a rule knows is not the jury's confidence
    ]
    report["reliability"] = reliability([c for c, _ in decided], [right for _, right in decided])
    report["calibration"] = fit_calibration(verdicts, labels, seed)
    return report


def refuse_jury(report: dict[str, Any], min_agreement: float) -> None:
    """
    Raises a [`HumanCheckError`] if the jury agrees too little with people.

    Args:
        report (`dict[str, Any]`):
            What [`human_check`] gives.
        min_agreement (`float`):
            Least agreement on all pairs, those that the jury does not decide counting half; and, where there are enough pairs of both
            kinds, on those where people prefer the longer response and those where they prefer the shorter one, in the mean. A jury
            that goes by length only has 1/2 there, whatever the check set is like.
    """
    jury, longer = report["jury"]["agreement"], report["longer"]["agreement"]
    balanced = report["jury"]["length_balanced"]
    if jury["value"] < min_agreement:
        found = f"agrees with people in {jury['value']:.1%} of {report['jury']['pairs']} pairs{_interval(jury)}"
    elif balanced["value"] is not None and balanced["value"] < min_agreement:
        found = (
            f"goes by length: it agrees with people in {jury['value']:.1%} of {report['jury']['pairs']} pairs, and in "
            f"{balanced['value']:.1%}{_interval(balanced)} if those where people prefer the longer response and those where they prefer the "
            "shorter one count the same"
        )
    else:
        return
    raise HumanCheckError(
        f"The jury {found}, and `min_agreement={min_agreement}`; that the longer response wins agrees in {longer['value']:.1%}. Nothing is "
        "trained on its labels. Use other critics or rubrics."
    )


def _interval(found: dict[str, Any]) -> str:
    interval = found["interval"]
    return "" if interval is None else f" (95 % interval {interval[0]:.1%} to {interval[1]:.1%})"
