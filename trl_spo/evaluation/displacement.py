# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What training has done to the probabilities of held-out pairs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .scoring import PreferencePair, ResponseScore, ResponseScorer, both_sides
from .statistics import mean_estimate


def score_pairs(scorer: ResponseScorer, pairs: Sequence[PreferencePair]) -> list[tuple[ResponseScore, ResponseScore]]:
    """What a model says of the chosen and of the rejected response of pairs of prompt, chosen and rejected response."""
    scores = scorer.score(both_sides(pairs), desc="Held-out pairs")
    return list(zip(scores[::2], scores[1::2], strict=True))


def displacement_units(
    policy: Sequence[tuple[ResponseScore, ResponseScore]], reference: Sequence[tuple[ResponseScore, ResponseScore]]
) -> dict[str, np.ndarray]:
    """
    Of each pair, in nats, by how much training has changed the log-probability of the chosen response (`chosen_change`), that of the
    rejected one (`rejected_change`), and their difference (`margin`). A preference loss is content with a margin, also where both have
    become less probable.

    Args:
        policy, reference (`Sequence[tuple[ResponseScore, ResponseScore]]`):
            What [`score_pairs`] gives of the same pairs.

    Returns:
        `dict[str, np.ndarray]`: by name, and `preference_accuracy`: 1 where the margin is positive, 1/2 where it is 0, else 0.
    """
    chosen, rejected = (
        np.array([p[side].log_prob - r[side].log_prob for p, r in zip(policy, reference, strict=True)])
        for side in (0, 1)
    )
    margin = chosen - rejected
    accuracy = (np.sign(margin) + 1) / 2
    return {
        "chosen_change": chosen,
        "rejected_change": rejected,
        "margin": margin,
        "preference_accuracy": accuracy,
    }


def displacement_estimates(units: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Estimates of the means of [`displacement_units`], that of the accuracy as a share."""
    return {name: mean_estimate(values, share=name == "preference_accuracy") for name, values in units.items()}
