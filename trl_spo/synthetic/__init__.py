# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Synthetic preferences: a student's responses, a jury of critics, filters, a human check set. See docs/synthetic.md."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .agreement import agreement_report
    from .calibration import fit_calibration
    from .candidates import generate_candidates
    from .check_set import HumanCheckError, check_pairs, human_check, refuse_jury
    from .critics import Critic, EndpointCritic, RuleCritic
    from .endpoint import Budget, Endpoint, EndpointError, SpendingLimitError
    from .endpoint_student import EndpointStudent
    from .filters import FilterConfig, filter_pairs
    from .jury import Jury, Pair
    from .model_critics import LocalCritic, RewardCritic
    from .output import build_dataset, push
    from .pairs import CandidatePairs, preference_pairs, ranked_lists
    from .prompts import prepare_prompts, refuse_overlap
    from .rounds import Rounds
    from .rubrics import Rubric
    from .store import AnswerStore
    from .students import TransformersStudent
    from .synthesis import Synthesis
    from .synthesis_config import SynthesisConfig
    from .training import TrainingConfig, TrainingError, train
    from .vllm_student import VLLMStudent

# Public name -> the module that defines it
_PUBLIC = {
    "AnswerStore": "store",
    "Budget": "endpoint",
    "CandidatePairs": "pairs",
    "Critic": "critics",
    "Endpoint": "endpoint",
    "EndpointCritic": "critics",
    "EndpointError": "endpoint",
    "EndpointStudent": "endpoint_student",
    "FilterConfig": "filters",
    "HumanCheckError": "check_set",
    "Jury": "jury",
    "LocalCritic": "model_critics",
    "Pair": "jury",
    "RewardCritic": "model_critics",
    "Rounds": "rounds",
    "Rubric": "rubrics",
    "RuleCritic": "critics",
    "SpendingLimitError": "endpoint",
    "Synthesis": "synthesis",
    "SynthesisConfig": "synthesis_config",
    "TrainingConfig": "training",
    "TrainingError": "training",
    "TransformersStudent": "students",
    "VLLMStudent": "vllm_student",
    "agreement_report": "agreement",
    "build_dataset": "output",
    "check_pairs": "check_set",
    "filter_pairs": "filters",
    "fit_calibration": "calibration",
    "generate_candidates": "candidates",
    "human_check": "check_set",
    "preference_pairs": "pairs",
    "prepare_prompts": "prompts",
    "push": "output",
    "ranked_lists": "pairs",
    "refuse_jury": "check_set",
    "refuse_overlap": "prompts",
    "train": "training",
}

# What the extra `synthetic` brings
EXTRA = ("datasketch", "krippendorff", "openai", "sacrebleu", "scipy", "sklearn", "tabulate")

__all__ = list(_PUBLIC)

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC, "synthetic", EXTRA)
