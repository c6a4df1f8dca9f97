# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Which method fits a preference dataset, and what will go wrong in a training on it. See docs/choosing.md."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .advice import Advice, advise
    from .findings import Finding, UsageError
    from .recommendation import Recommendation
    from .report import print_advice
    from .shape import Shape

# Public name -> the module that defines it
_PUBLIC = {
    "Advice": "advice",
    "Finding": "findings",
    "Recommendation": "recommendation",
    "Shape": "shape",
    "UsageError": "findings",
    "advise": "advice",
    "print_advice": "report",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value  # next time, it is found without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
