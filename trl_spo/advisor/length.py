# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether the better responses are the longer ones."""

from typing import Any

import numpy as np

from .findings import Finding, percent, wilson
from .rows import Rows


# Accuracy of "the longer one is better" from which on, in either direction, length is easier to learn than what is
# meant. Our rule of thumb: of people's labels, 0.59 (hh_helpful) and 0.68 (PandaLM) were seen
_BIASED = 0.6


def longer_wins(rows: Rows) -> dict[str, Any]:
    """
    How often the better one of two responses is the longer one, in characters.

    Args:
        rows ([`Rows`]):
            Rows of any kind. All pairs of a list count that differ in rank; of unpaired rows, all pairs of a desirable
            and an undesirable response.

    Returns:
        `dict[str, Any]`: `longer` and `shorter`, shares of the compared pairs whose better response is that;
        `accuracy` of "the longer one is better", a tie counting half, with an `interval` whose cases are rows, and, of
        unpaired rows, responses of the rarer label; `number` of pairs; `mean_better` and `mean_worse` length. `None`
        if nothing is compared.
    """
    better = rows.ranks == 0
    if rows.shape.kind == "unpaired":
        ours, theirs = rows.characters[better], np.sort(rows.characters[~better])
        if min(len(ours), len(theirs)) == 0:
            return {"number": 0}
        below, up_to = (np.searchsorted(theirs, ours, side=side).sum() for side in ("left", "right"))
        number, cases = len(ours) * len(theirs), min(len(ours), len(theirs))
        longer, shorter, accuracy = (
            below / number,
            (number - up_to) / number,
            (below + (up_to - below) / 2) / number * cases,
        )
    elif rows.shape.kind == "pairs":
        ours, theirs = rows.pairs(rows.characters)
        number = cases = len(rows)
        longer, shorter = float((ours > theirs).mean()), float((ours < theirs).mean())
        accuracy = (longer + (1 - longer - shorter) / 2) * cases
    else:
        return _of_lists(rows)
    return {
        "longer": float(longer),
        "shorter": float(shorter),
        "accuracy": wilson(float(accuracy), cases),
        "number": int(number),
        "mean_better": float(rows.characters[better].mean()),
        "mean_worse": float(rows.characters[~better].mean()),
    }


def _of_lists(rows: Rows) -> dict[str, Any]:
    longer = shorter = number = cases = 0
    of_rows = 0.0
    better_length, worse_length = 0.0, 0.0
    starts = np.flatnonzero(np.diff(rows.rows, prepend=-1))
    for ranks, lengths in zip(np.split(rows.ranks, starts[1:]), np.split(rows.characters, starts[1:]), strict=True):
        first, second = np.nonzero(ranks[:, None] < ranks[None, :])  # all pairs of which the first is better
        if len(first) == 0:
            continue
        wins, losses = (lengths[first] > lengths[second]).sum(), (lengths[first] < lengths[second]).sum()
        longer, shorter, number, cases = longer + wins, shorter + losses, number + len(first), cases + 1
        of_rows += (wins + (len(first) - wins - losses) / 2) / len(first)
        better_length, worse_length = better_length + lengths[first].sum(), worse_length + lengths[second].sum()
    if number == 0:
        return {"number": 0}
    return {
        "longer": float(longer / number),
        "shorter": float(shorter / number),
        "accuracy": wilson(float(of_rows), cases),
        "number": int(number),
        "mean_better": float(better_length / number),
        "mean_worse": float(worse_length / number),
    }


def length_findings(rows: Rows) -> list[Finding]:
    """
    Whether the better responses are the longer, or the shorter ones.

    Args:
        rows ([`Rows`]):
            Rows of the train split.

    Returns:
        `list[Finding]`: a warning if the accuracy of "the longer one is better" is outside of 0.4 to 0.6 by more than
        chance; else what was measured.
    """
    found = longer_wins(rows)
    if found["number"] == 0:
        return []
    low, high = found["accuracy"]["interval"]
    detail = (
        f'The better response is the longer one in {found["longer"]:.1%} and the shorter one in {found["shorter"]:.1%} of the pairs; "the longer one '
        f'is better" is right in {percent(found["accuracy"])}, ties counting half. On average, better ones have {found["mean_better"]:.0f} and worse '
        f"ones {found['mean_worse']:.0f} characters."
    )
    if low > _BIASED or high < 1 - _BIASED:
        which = "longer" if low > _BIASED else "shorter"
        return [
            Finding(
                "length_bias",
                "warning",
                f"Better responses are {which}",
                detail + f" Whatever is meant by the preferences, a model learns first to write {which} responses.",
                "Compare win rates at equal length. Balance the lengths (drop pairs that differ most), or penalise length: `rdpo` in Stable PO, "
                "`ld_alpha` in DPO, log-probabilities per token (`sigmoid_norm`, IPO).",
                found,
            )
        ]
    return [Finding("length", "info", "Lengths", detail, "", found)]
