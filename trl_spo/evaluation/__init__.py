# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What a policy is worth beside its reference: quality, distance, diversity, and what it has lost. See docs/evaluation.md."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .alpaca_eval import export_alpaca_eval
    from .capability import Capability, compare_capability
    from .displacement import displacement_estimates, displacement_units, score_pairs
    from .divergence import Divergence, on_policy_divergence
    from .diversity import distinct_n, response_diversity, self_bleu
    from .evaluation import Evaluation
    from .frontier import upper_frontier
    from .judging import paired_responses, points_by_jury, points_by_reward, rewards_of, win_rate
    from .scoring import ResponseScore, ResponseScorer, preference_accuracy, text_log_likelihood
    from .statistics import (
        bootstrap_intervals,
        crossed_difference,
        crossed_estimate,
        holm,
        mean_estimate,
        paired_p_value,
        wilson_rate,
    )

# Public name -> the module that defines it
_PUBLIC = {
    "Capability": "capability",
    "Divergence": "divergence",
    "Evaluation": "evaluation",
    "ResponseScore": "scoring",
    "ResponseScorer": "scoring",
    "bootstrap_intervals": "statistics",
    "compare_capability": "capability",
    "crossed_difference": "statistics",
    "crossed_estimate": "statistics",
    "displacement_estimates": "displacement",
    "displacement_units": "displacement",
    "distinct_n": "diversity",
    "export_alpaca_eval": "alpaca_eval",
    "holm": "statistics",
    "mean_estimate": "statistics",
    "on_policy_divergence": "divergence",
    "paired_p_value": "statistics",
    "paired_responses": "judging",
    "points_by_jury": "judging",
    "points_by_reward": "judging",
    "preference_accuracy": "scoring",
    "response_diversity": "diversity",
    "rewards_of": "judging",
    "score_pairs": "displacement",
    "self_bleu": "diversity",
    "text_log_likelihood": "scoring",
    "upper_frontier": "frontier",
    "wilson_rate": "statistics",
    "win_rate": "judging",
}

# What the extra `eval` brings
EXTRA = ("lm_eval", "sacrebleu", "scipy")

__all__ = list(_PUBLIC)

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC, "eval", EXTRA)
