# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
The SPO family of preference-optimization methods as trainers for TRL.

The public names are imported when they are first used: `import trl_spo` itself loads neither PyTorch nor Transformers.
"""

from typing import TYPE_CHECKING

from ._lazy import lazy_names


if TYPE_CHECKING:
    from .soft_po import SoftPOConfig, SoftPOTrainer
    from .sspo import DegreeHeads, SSPOConfig, SSPOKTOConfig, SSPOKTOTrainer, SSPOTrainer
    from .stable_po import StablePOConfig, StablePOTrainer


__version__ = "0.1.0"  # equal to the version in pyproject.toml

# Public name -> the subpackage that defines it
_PUBLIC = {
    "DegreeHeads": "sspo",
    "SSPOConfig": "sspo",
    "SSPOKTOConfig": "sspo",
    "SSPOKTOTrainer": "sspo",
    "SSPOTrainer": "sspo",
    "SoftPOConfig": "soft_po",
    "SoftPOTrainer": "soft_po",
    "StablePOConfig": "stable_po",
    "StablePOTrainer": "stable_po",
}

__all__ = [
    "DegreeHeads",
    "SSPOConfig",
    "SSPOKTOConfig",
    "SSPOKTOTrainer",
    "SSPOTrainer",
    "SoftPOConfig",
    "SoftPOTrainer",
    "StablePOConfig",
    "StablePOTrainer",
    "__version__",
]

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
