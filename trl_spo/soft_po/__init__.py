# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

from .soft_po_config import SoftPOConfig
from .soft_po_trainer import SoftPOTrainer


__all__ = ["SoftPOConfig", "SoftPOTrainer"]
