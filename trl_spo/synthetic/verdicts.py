# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
From answers to verdicts: each critic's vote, and what the jury says of a pair.

Each critic that compares sees both orders. One that flips with the order abstains; ties and answers that are not in the format are
recorded, and are never a vote for either: a tie counts half for each, the others not at all. Confidence is `|2 s - 1|`, where s is the
share of the votes for the winner.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Vote:
    """
    What a critic says of a pair.

    Args:
        status (`str`):
            `"vote"`, `"tie"`, `"flipped"` (another verdict in the other order, or probabilities that contradict both verdicts),
            `"unparseable"` (an answer is not in the format), `"rejected"` (the server would not answer) or `"abstained"` (a rule that
            cannot say).
        share (`float`, *optional*):
            Of this vote that is for the first response of the pair: 1 or 0, graded where the critic gives probabilities, and 1/2 for a
            tie. `None` for all but votes and ties.
    """

    status: str
    share: float | None = None


def vote_of_orders(answer: dict[str, Any], swapped: dict[str, Any]) -> Vote:
    """
    The vote of a critic that compares.

    It is a tie if either verdict is one, whatever the other. Two verdicts that name the same response are a vote for it: a whole one,
    or if both have probabilities, of their mean share. A verdict that was sampled need not be the likeliest one: if the mean is not on
    the side of the response that both name, the critic contradicts itself, and the vote is `"flipped"` as if the verdicts differed.

    Args:
        answer (`dict[str, Any]`):
            To the pair in its order, so that "A" is the first response.
        swapped (`dict[str, Any]`):
            To the pair in the other order, so that "A" is the second response.
    """
    for status in ("rejected", "unparseable"):
        if any(a["verdict"] is None and ("error" in a) == (status == "rejected") for a in (answer, swapped)):
            return Vote(status)
    first = {"A": 1.0, "B": 0.0, "tie": 0.5}[answer["verdict"]]
    second = {"A": 0.0, "B": 1.0, "tie": 0.5}[swapped["verdict"]]
    if 0.5 in (first, second):
        return Vote("tie", 0.5)
    if first != second:
        return Vote("flipped")
    if answer.get("probability") is None or swapped.get("probability") is None:
        return Vote("vote", first)
    share = (answer["probability"] + 1 - swapped["probability"]) / 2
    return Vote("vote", share) if tally([(share, 1.0)]).winner == int(first == 0) else Vote("flipped")


def vote_of_scores(first: float | None, second: float | None, graded: bool) -> Vote:
    """The vote of a critic that scores; if it is graded, by the probability of Bradley and Terry."""
    if first is None or second is None:
        return Vote("abstained")
    if first == second:
        return Vote("tie", 0.5)
    return Vote("vote", (1 + math.tanh((first - second) / 2)) / 2 if graded else float(first > second))


@dataclass(frozen=True)
class Verdict:
    """
    What the jury says of a pair.

    Args:
        share (`float`, *optional*):
            Of the votes that is for the first response. `None` if there are none.
        winner (`int`, *optional*):
            0 or 1: the first or the second response. `None` if there are no votes, or as many for either.
        confidence (`float`):
            `|2 share - 1|`, and 0 without votes.
    """

    share: float | None
    winner: int | None
    confidence: float


def tally(votes: Sequence[tuple[float | None, float]]) -> Verdict:
    """
    What the critics say together.

    Args:
        votes (`Sequence[tuple]`):
            Of each critic the share of its vote that is for the first response, a tie being half for each, and its weight. Without a
            share it does not count.
    """
    votes = [(share, weight) for share, weight in votes if share is not None]
    if not votes:
        return Verdict(None, None, 0.0)
    share = math.fsum(share * weight for share, weight in votes) / math.fsum(weight for _, weight in votes)
    if math.isclose(share, 0.5, abs_tol=1e-9):  # of weights such as 0.1, 0.2 and 0.3
        return Verdict(0.5, None, 0.0)
    return Verdict(share, int(share < 0.5), abs(2 * share - 1))
