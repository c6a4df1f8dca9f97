# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Self-supervised Preference Optimization (arXiv 2409.17791): heads on the hidden states learn degrees of preference."""

from .degree_heads import DegreeHeads, predict_degrees
from .sspo_config import SSPOConfig, SSPOKTOConfig
from .sspo_kto_trainer import SSPOKTOTrainer
from .sspo_trainer import SSPOTrainer


__all__ = ["DegreeHeads", "SSPOConfig", "SSPOKTOConfig", "SSPOKTOTrainer", "SSPOTrainer", "predict_degrees"]
