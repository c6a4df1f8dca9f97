# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

from .stable_po_config import StablePOConfig
from .stable_po_trainer import StablePOTrainer


__all__ = ["StablePOConfig", "StablePOTrainer"]
