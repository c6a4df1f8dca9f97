# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Which method fits a preference dataset, and what will go wrong in a training on it. See docs/choosing.md."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


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

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
