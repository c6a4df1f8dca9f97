# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
How far the critics of a jury agree, with each other and with themselves in the other order, and what else they go by.

Results are dicts that JSON can hold: a value is `None` where there is nothing to take it from. Intervals have the level 0.95.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import krippendorff
import numpy as np

from ..evaluation.statistics import bootstrap_intervals, wilson_rate


def label_of_share(share: float | None) -> int | None:
    """The response that a share of votes is for: 0, the first, or 1, the second. `None` for a tie and where there are no votes."""
    return None if share is None or abs(share - 0.5) < 1e-9 else int(share < 0.5)


class _CriticCounts:
    """What is counted of a critic."""

    def __init__(self):
        self.statuses = dict.fromkeys(("vote", "tie", "flipped", "unparseable", "rejected", "abstained"), 0)
        self.verdicts = dict.fromkeys(("A", "B", "tie"), 0)  # "A" is the response shown first
        self.flips = {"A": 0, "B": 0}
        self.votes_of_orders = 0
        self.longer, self.with_jury = [0, 0], [0, 0]  # of how many
        self.tokens: list[int] | None = None
        self.cost = 0.0

    def add(self, vote: Mapping[str, Any], label: int | None, longer: int | None, winner: int | None) -> None:
        self.statuses[vote["status"]] += 1
        for verdict in vote.get("verdicts", ()):
            if verdict is not None:
                self.verdicts[verdict] += 1
        self.votes_of_orders += vote["status"] == "vote" and "verdicts" in vote  # one that scores has seen no order
        if vote["status"] == "flipped" and len(set(vote["verdicts"])) == 1:  # not by its probabilities
            self.flips[vote["verdicts"][0]] += 1
        for count, other in ((self.longer, longer), (self.with_jury, winner)):
            if label is not None and other is not None:
                count[0] += label == other
                count[1] += 1
        if "tokens" in vote:
            self.tokens = [a + b for a, b in zip(self.tokens or (0, 0), vote["tokens"], strict=True)]
            self.cost += vote["cost"]

    def report(self) -> dict[str, Any]:
        names = {"vote": "votes", "tie": "ties"}
        flipped = self.statuses["flipped"]
        return {
            "pairs": sum(self.statuses.values()),
            **{names.get(status, status): number for status, number in self.statuses.items()},
            "flip_rate": wilson_rate(flipped, flipped + self.votes_of_orders),
            "flips_to_first_shown": self.flips["A"],
            "flips_to_second_shown": self.flips["B"],
            "verdicts": dict(self.verdicts),
            "first_shown_rate": wilson_rate(self.verdicts["A"], self.verdicts["A"] + self.verdicts["B"]),
            "longer_rate": wilson_rate(*self.longer),
            "agreement_with_jury": wilson_rate(*self.with_jury),
            "prompt_tokens": self.tokens and self.tokens[0],
            "completion_tokens": self.tokens and self.tokens[1],
            "cost": self.cost,
        }


def _alpha_of_sums(sums: np.ndarray) -> np.ndarray:
    """Nominal alpha of sums over units of `[disagreement, number of each label]`, `(B, 4)`; nan without variation."""
    observed, numbers = sums[:, 0], sums[:, 1:]
    total = numbers.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - observed * (total - 1) / (total**2 - (numbers**2).sum(axis=1))


def _alpha(patterns: Counter, of_prompts: list[np.ndarray], names: list[str], seed: int) -> dict[str, Any]:
    """Krippendorff's alpha of labels, of which `patterns` has the pairs by the number of critics that gave each label."""
    table = np.array(list(patterns), dtype=np.int64).reshape(-1, 3)
    compared = table[table.sum(axis=1) > 1]
    result = {"alpha": None, "interval": None, "pairs": 0, "critics": names, "reason": None}
    result["pairs"] = sum(number for pattern, number in patterns.items() if sum(pattern) > 1)
    if len(names) < 2:
        result["reason"] = "Fewer than two critics have votes or ties."
    elif result["pairs"] == 0:
        result["reason"] = "No pair has votes or ties of two critics."
    elif (compared.sum(axis=0) > 0).sum() < 2:
        result["reason"] = "All critics say the same of all pairs, so that chance agreement is not defined."
    else:
        counts = np.repeat(table, list(patterns.values()), axis=0)
        result["alpha"] = float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))
        result["interval"] = bootstrap_intervals(np.array(of_prompts), lambda sums: _alpha_of_sums(sums)[None], seed)[
            0
        ]
    return result


def agreement_report(rows: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """
    What the verdicts of a jury say of the jury itself. The rows are gone through once; of each prompt four numbers are kept.

    Args:
        rows (`Iterable[Mapping[str, Any]]`):
            Those of [`Jury.verdicts`], the pairs of a prompt together. Critics that are rules are reported, but are no part of alpha, as
            they have no vote in the jury.
        seed (`int`, *optional*, defaults to `0`):
            Of the bootstrap.

    Returns:
        `dict[str, Any]`:

        - `jury`: `pairs`, of which `decided`, `ties` and `without_votes` (also where nobody was asked); `mean_confidence` of
          the decided; `longer_rate`, the share of winners that are the longer response.
        - `critics`: by name, `pairs` (asked about) and how many `votes`, `ties`, `flipped`, `unparseable`, `rejected`,
          `abstained`. `flip_rate`: of the pairs with a response named in both orders; 1/2 if it throws a coin.
          `flips_to_first_shown`, `flips_to_second_shown`: flips that named this position twice (a critic whose probabilities
          contradict its verdicts named neither). `verdicts`: how often each was given, "A" being the response shown first;
          `first_shown_rate`: "A" of "A" and "B", 1/2 without position bias. `longer_rate`: votes for the longer response (which may
          well be better: compare critics). `agreement_with_jury`: its votes for the jury's winner, to which it has contributed.
          `prompt_tokens`, `completion_tokens` (`None` if the critic counts none) and `cost`.
        - `alpha`: Krippendorff's nominal `alpha` of first, second and tie (abstentions missing), with the `interval` of a
          bootstrap over prompts, because the pairs of a prompt are not independent; the number of `pairs` with votes or ties of
          two critics, the `critics` that have any, and the `reason` if there is no alpha.

        A rate is a dict of `rate`, `interval` (Wilson's, which takes cases as independent) and `number`, of what it is a share:
        pairs of different length, for instance.
    """
    critics: dict[str, _CriticCounts] = {}
    patterns: Counter = Counter()
    of_prompts: list[np.ndarray] = []
    prompt_id, have_labels = None, {}
    pairs, decided, without_votes, confidence, longer_wins = 0, 0, 0, 0.0, [0, 0]
    for row in rows:
        first, second = row["lengths"]
        longer = None if first == second else int(first < second)
        winner = None if row["winner"] is None else list(row["response_ids"]).index(row["winner"])
        pairs += 1
        without_votes += row["share"] is None
        if winner is not None:
            decided += 1
            confidence += row["confidence"]
            if longer is not None:
                longer_wins[0] += winner == longer
                longer_wins[1] += 1
        pattern = [0, 0, 0]
        for vote in row["votes"]:
            name, label = vote["critic"], label_of_share(vote["share"])
            critics.setdefault(name, _CriticCounts()).add(vote, label, longer, winner)
            if not vote.get("rule") and vote["share"] is not None:
                pattern[2 if label is None else label] += 1
                have_labels[name] = True
        patterns[tuple(pattern)] += 1
        if not of_prompts or row["prompt_id"] != prompt_id:
            prompt_id = row["prompt_id"]
            of_prompts.append(np.zeros(4))
        total = sum(pattern)
        if total > 1:
            of_prompts[-1] += [(total**2 - sum(number**2 for number in pattern)) / (total - 1), *pattern]
    return {
        "jury": {
            "pairs": pairs,
            "decided": decided,
            "ties": pairs - decided - without_votes,
            "without_votes": without_votes,
            "mean_confidence": confidence / decided if decided else None,
            "longer_rate": wilson_rate(*longer_wins),
        },
        "critics": {name: counts.report() for name, counts in critics.items()},
        "alpha": _alpha(patterns, of_prompts, list(have_labels), seed),
    }
