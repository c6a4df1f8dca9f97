# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
The SPO family of preference-optimization methods as trainers for TRL.

The public names are imported when they are first used: `import trl_spo` itself loads neither PyTorch nor Transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


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


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value  # next time, it is found without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
