# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
How far a jury agrees with people, and whether its confidence is what it claims.

Results are dicts that JSON can hold: a value is `None` where there is nothing to take it from. Intervals have the level 0.95.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import cohen_kappa_score

from ..evaluation.statistics import bootstrap_intervals, wilson_rate


_LEAST_OF_LENGTH = 10  # pairs of either kind, for a mean of both


def _balanced_of_sums(sums: np.ndarray) -> np.ndarray:
    """Mean of two agreements `(1, B)` from sums of twice the points and the numbers of pairs of both kinds, `(B, 4)`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[:, 0] / sums[:, 1] + sums[:, 2] / sums[:, 3])[None] / 4


def _length_balanced(human: np.ndarray, other: np.ndarray, longer: np.ndarray, seed: int) -> dict[str, Any]:
    points = np.where(other == 2, 1, 2 * (human == other))
    kinds = [longer == human, longer == 1 - human]  # people prefer the longer response, or the shorter one
    numbers = [int(kind.sum()) for kind in kinds]
    if min(numbers) < _LEAST_OF_LENGTH:
        reason = f"People prefer the longer response in {numbers[0]} pairs and the shorter one in {numbers[1]}: too few of a kind."
        return {"value": None, "interval": None, "reason": reason}
    units = np.stack([column for kind in kinds for column in (points * kind, kind)], axis=1).astype(np.int64)
    value = float(_balanced_of_sums(units.sum(axis=0)[None])[0, 0])
    return {"value": value, "interval": bootstrap_intervals(units, _balanced_of_sums, seed)[0], "reason": None}


def _agreement_of_sums(sums: np.ndarray) -> np.ndarray:
    """
    Coverage, agreement on the decided, agreement, and kappa, `(4, B)`, of tables by the label of people and the other, 0, 1 or
    undecided, `(B, 6)`.
    """
    tables = sums.reshape(-1, 2, 3).astype(np.float64)
    decided = tables[..., :2]
    n, number = tables.sum(axis=(1, 2)), decided.sum(axis=(1, 2))
    agree = decided[:, 0, 0] + decided[:, 1, 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        by_chance = (decided.sum(axis=1) * decided.sum(axis=2)).sum(axis=1) / number**2
        kappa = (agree / number - by_chance) / (1 - by_chance)
        return np.stack([number / n, agree / number, (agree + (n - number) / 2) / n, kappa])


def _check_labels(name: str, labels: Sequence[int | None], number: int, undecided: bool) -> np.ndarray:
    """The labels in an array, 2 for `None`."""
    if len(labels) != number:
        raise ValueError(
            f"There are {number} labels of people and {len(labels)} of {name}. Give one of each for each pair."
        )
    for i, label in enumerate(labels):
        if label not in ((0, 1, None) if undecided else (0, 1)):
            raise ValueError(
                f"The label {i} of {name} is {label!r}, and must be 0 (the first response is better) or 1 (the second is)"
                + (", or `None` (undecided)." if undecided else ". Leave out pairs with ties or without a label.")
            )
    return np.array([2 if label is None else label for label in labels], dtype=np.int64)


def _agreement(human: np.ndarray, other: np.ndarray, seed: int) -> dict[str, Any]:
    cells = np.eye(6, dtype=np.int64)[3 * human + other]
    values = _agreement_of_sums(cells.sum(axis=0)[None])[:, 0]
    intervals = bootstrap_intervals(cells, _agreement_of_sums, seed)
    decided = other < 2
    result: dict[str, Any] = {"pairs": len(human), "decided": int(decided.sum())}
    names = ("coverage", "agreement_on_decided", "agreement", "kappa")
    for name, value, interval in zip(names, values.tolist(), intervals, strict=True):
        result[name] = {"value": None if np.isnan(value) else value, "interval": interval}
    reason = None
    if not decided.any():
        reason = "No pair is decided."
    elif len(set(human[decided])) < 2:
        reason = (
            f"People prefer the {('first', 'second')[human[decided][0]]} response in all pairs that are decided, so that chance "
            "agreement says nothing. Put the responses of each pair in random order."
        )
    if reason is None:
        result["kappa"]["value"] = float(cohen_kappa_score(human[decided], other[decided]))
    else:
        result["kappa"] = {"value": None, "interval": None}
    result["kappa"]["reason"] = reason
    return result


def check_agreement(
    human: Sequence[int],
    jury: Sequence[int | None],
    critics: Mapping[str, Sequence[int | None]] | None = None,
    lengths: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """
    How far a jury agrees with people, beside what is simpler: each of its critics, and that the longer response wins.

    A label is 0 if the first response is better and 1 if the second is. The intervals are those of a bootstrap over pairs,
    which should be of different prompts. They have no width where all resamples agree, such as with 10 of 10 right.

    Args:
        human (`Sequence[int]`):
            Labels of people.
        jury (`Sequence[int | None]`):
            Labels of the jury, `None` where it is undecided.
        critics (`Mapping[str, Sequence[int | None]]`, *optional*):
            Labels of each critic by its name ([`label_of_share`]).
        lengths (`Sequence[tuple[int, int]]`, *optional*):
            Lengths of the two responses. Where they are equal, "longer wins" is undecided.
        seed (`int`, *optional*, defaults to `0`):
            Of the bootstrap.

    Returns:
        `dict[str, Any]`: `jury`, `longer` (`None` without lengths) and, by name, `critics`. Each has the numbers `pairs` and
        `decided`, and with `value` and `interval`: `coverage`, the share that is decided; `agreement_on_decided`; `agreement`,
        on all pairs, where undecided counts half; `kappa`, Cohen's on the decided pairs, with the `reason` if there is none; and,
        with lengths, `length_balanced`: the mean of the agreement where people prefer the longer response and where they prefer
        the shorter one, which is 1/2 for whoever goes by length only, with the `reason` if there are too few pairs of a kind.

    Raises:
        `ValueError`: there is no pair, their numbers differ, or a label is none, such as a tie among those of people.
    """
    if not len(human):
        raise ValueError("There are no labels of people (`human`) to agree with. Give pairs with labels.")
    number = len(human)
    labels = _check_labels("people (`human`)", human, number, undecided=False)

    of_length = None
    if lengths is not None:
        longest = [None if a == b else int(a < b) for a, b in lengths]
        of_length = _check_labels("`lengths`", longest, number, undecided=True)

    def compare(name: str, other: Sequence[int | None]) -> dict[str, Any]:
        others = _check_labels(name, other, number, undecided=True)
        found = _agreement(labels, others, seed)
        if of_length is not None:
            found["length_balanced"] = _length_balanced(labels, others, of_length, seed)
        return found

    longer = None if of_length is None else compare("`lengths`", longest)
    return {
        "jury": compare("the jury (`jury`)", jury),
        "longer": longer,
        "critics": {name: compare(f"the critic {name!r}", other) for name, other in (critics or {}).items()},
    }


def reliability(confidence: Sequence[float], is_right: Sequence[bool], bins: int = 10) -> dict[str, Any]:
    """
    Whether confidence is what it claims: a confidence c claims to be right with probability `(1 + c) / 2`.

    The expected calibration error is `Σ_b n_b |accuracy_b - claimed_b| / n` (Naeini et al., 2015), where claimed_b is the mean claim
    in bin b.

    Args:
        confidence (`Sequence[float]`):
            Confidence of the jury, from 0 to 1, of pairs that it decided.
        is_right (`Sequence[bool]`):
            Whether the verdict is right.
        bins (`int`, *optional*, defaults to `10`):
            Bins of equal width, each with its lower end; the last one with 1 too.

    Returns:
        `dict[str, Any]`: `number`, `expected_calibration_error` (`None` without pairs) and the table `bins`, with `lower`, `upper`,
        `number`, `mean_confidence`, `claimed`, `accuracy` and its `interval` (Wilson) of each, `None` where the number is 0.

    Raises:
        `ValueError`: a confidence is not from 0 to 1, `is_right` is not boolean, the numbers differ, or there is no bin.
    """
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins}.")
    values, right = np.asarray(confidence, dtype=np.float64), np.asarray(is_right)
    if values.shape != right.shape or values.ndim != 1:
        raise ValueError(
            f"`confidence` and `is_right` must be of one length, got the shapes {values.shape} and {right.shape}."
        )
    if not np.isin(right, (0, 1)).all():
        raise ValueError(
            "`is_right` must be true or false for each pair. Leave out pairs that the jury has not decided."
        )
    inside = (values >= 0) & (values <= 1)
    if not inside.all():
        i = int(np.flatnonzero(~inside)[0])
        raise ValueError(f"`confidence` must be from 0 to 1, got {values[i]} at {i}. Give |2 share - 1|.")
    # Rounded, because 2 * 0.8 - 1 is above 0.6, and 2 * 0.6 - 1 below 0.2
    places = np.minimum(np.floor(np.round(values * bins, 9)), bins - 1)
    table, error = [], 0.0
    for place in range(bins):
        members = places == place
        number = int(members.sum())
        accuracy = wilson_rate(int(right[members].sum()), number)
        mean = float(values[members].mean()) if number else None
        claimed = (1 + mean) / 2 if number else None
        if number:
            error += number / len(values) * abs(accuracy["rate"] - claimed)
        table.append(
            {
                "lower": place / bins,
                "upper": (place + 1) / bins,
                "number": number,
                "mean_confidence": mean,
                "claimed": claimed,
                "accuracy": accuracy["rate"],
                "interval": accuracy["interval"],
            }
        )
    return {"number": len(values), "expected_calibration_error": error if len(values) else None, "bins": table}
