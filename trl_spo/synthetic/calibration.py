# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a jury's votes are worth: the probability that the chosen response is the better one.

The confidence `|2 s - 1|` is a share of votes and no such probability: three independent critics, each right in 0.7 of the pairs, that
agree are right in 0.7³ / (0.7³ + 0.3³) = 0.93 of them, and three copies of one critic in 0.7. Here it is learned from the human check
set, by a logistic regression on the votes, `σ(Σ_c a_c x_c)`, where x_c is 1 if critic c votes for the first response, -1 for the second
one, between them if its vote is graded, and 0 for a tie and where it abstains. For critics that err independently of each other that is
the exact posterior, with `a_c = log(p_c / (1 - p_c))` for one that is right in a share p_c of its votes; those that say the same share
its coefficient. There is no intercept: with the two responses swapped, the probability is that of the other one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from transformers.utils import logging

from ..evaluation.statistics import wilson_rate
from .human_agreement import reliability


logger = logging.get_logger(__name__)

# Of the coefficients, normal around 0: a critic is as likely to be worse than chance, so that labels have to say what it is worth. One
# that is right on 10 of 10 labels then claims 0.84, on 100 of 100, 0.97. Of 0.03, 0.1, 0.3, 1, 2, 4, 10 and 100, with simulated juries of
# one to nine critics that are right in 0.6 to 0.9 of the pairs, 1 is the one that is never far from the least log loss on new pairs, with
# 10 labels as with 300. Larger ones are overconfident with few labels.
_PRIOR_VARIANCE = 1.0
_FOLDS = 10


def _evidence(votes: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of each critic, x_c. Rules are no critics here: where they know the truth, nobody else is asked."""
    return {
        vote["critic"]: 0.0 if vote["share"] is None else 2 * vote["share"] - 1
        for vote in votes
        if not vote.get("rule")
    }


def _fit(evidence: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The coefficients, `(critics,)`, from `(pairs, critics)` and the labels of people."""
    if not evidence.size:
        return np.zeros(evidence.shape[1])
    model = LogisticRegression(C=_PRIOR_VARIANCE, fit_intercept=False, solver="newton-cholesky", tol=1e-8)
    # Each pair in both orders, which count half: the same likelihood, and both labels are there, as the library wants
    model.fit(
        np.concatenate([evidence, -evidence]),
        np.concatenate([labels == 0, labels == 1]),
        sample_weight=np.full(2 * len(labels), 0.5),
    )
    return model.coef_[0]


def fit_calibration(verdicts: Iterable[dict[str, Any]], labels: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """
    Learns from the labels of people what the votes of each critic are worth.

    How good the probabilities are is told of each pair by the others: by coefficients that were fitted without its tenth of the pairs.

    Args:
        verdicts (`Iterable[dict[str, Any]]`):
            What [`Jury.verdicts`] says of the pairs. Those that nobody was asked about say nothing.
        labels (`Sequence[int]`):
            Labels of people: 0 if the first response is better, 1 if the second is.
        seed (`int`, *optional*, defaults to `0`):
            Of the tenths.

    Returns:
        `dict[str, Any]`: what JSON can hold: `pairs`, their number; by critic, `coefficients`, the log-odds of a whole vote, which are
        negative if it counts for the other response, and `agreement` of its votes with people ([`wilson_rate`]); `worse_than_chance`, the
        critics whose interval of that is below one half; `log_loss` in nats, on all pairs, where not to know is 0.693 (`None` for a
        single pair); and the `reliability` of the probabilities other than 1/2, as [`reliability`] gives it of the confidence
        `|2 p - 1|`.

    Raises:
        `ValueError`: there are no labels, they are not 0 or 1 or not as many as the verdicts, or the verdicts are of several juries.
    """
    evidence = [_evidence(verdict["votes"]) for verdict in verdicts]
    if not evidence or len(evidence) != len(labels):
        raise ValueError(
            f"There are {len(evidence)} verdicts and {len(labels)} `labels` of people to calibrate by. Give one of each for each pair."
        )
    for i, label in enumerate(labels):
        if label not in (0, 1):
            raise ValueError(
                f"The label {i} of people is {label!r}, and must be 0 (the first response is better) or 1 (the second is)."
            )
    names = next((list(row) for row in evidence if row), [])
    for i, row in enumerate(evidence):
        if row and row.keys() != set(names):
            raise ValueError(
                f"Of the pairs to calibrate by, the critics {sorted(names)} judged the first ones and {sorted(row)} the pair {i}. Let one "
                "jury judge them all."
            )
    x = np.array([[row.get(name, 0.0) for name in names] for row in evidence]).reshape(len(evidence), len(names))
    y = np.asarray(labels, dtype=np.int64)

    probabilities = np.full(len(y), 0.5)
    if len(y) > 1:
        for rest, held_out in KFold(min(_FOLDS, len(y)), shuffle=True, random_state=seed).split(x):
            probabilities[held_out] = expit(x[held_out] @ _fit(x[rest], y[rest]))
    decided = np.abs(probabilities - 0.5) > 1e-9
    of_label = np.where(y == 0, probabilities, 1 - probabilities)

    coefficients = dict(zip(names, _fit(x, y).tolist(), strict=True))
    right = np.count_nonzero(x * (1 - 2 * y[:, None]) > 0, axis=0)
    number = np.count_nonzero(x, axis=0)
    agreement = {name: wilson_rate(int(r), int(n)) for name, r, n in zip(names, right, number, strict=True)}
    worse = [name for name, rate in agreement.items() if rate["number"] and rate["interval"][1] < 0.5]
    if worse:
        logger.warning(
            "The critics %s are worse than chance on the human check set: people prefer the response that they vote against. Leave them "
            "out, or change their rubrics.",
            worse,
        )
    return {
        "pairs": len(y),
        "coefficients": coefficients,
        "agreement": agreement,
        "worse_than_chance": worse,
        "log_loss": float(-np.log(of_label).mean()) if len(y) > 1 else None,
        "reliability": reliability(np.abs(2 * probabilities - 1)[decided], of_label[decided] > 0.5),
    }


def vote_probability(votes: Iterable[Mapping[str, Any]], calibration: Mapping[str, Any]) -> float | None:
    """
    The probability that the first response is better, by the votes, for pairs such as those of the human check set.

    Args:
        votes (`Iterable[Mapping[str, Any]]`):
            Of each critic, as [`Jury.verdicts`] gives them.
        calibration (`Mapping[str, Any]`):
            What [`fit_calibration`] gives.

    Returns:
        `float`, *optional*: `None` if nobody was asked but rules.

    Raises:
        `ValueError`: the critics are not those of the calibration.
    """
    evidence, coefficients = _evidence(votes), calibration["coefficients"]
    if not evidence:
        return None
    if evidence.keys() != coefficients.keys():
        raise ValueError(
            f"The critics {sorted(evidence)} voted, and the calibration is of {sorted(coefficients)}. Calibrate the jury that voted: let it "
            "judge the human check set too (the stage `check`)."
        )
    return float(expit(math.fsum(coefficients[name] * value for name, value in evidence.items())))
