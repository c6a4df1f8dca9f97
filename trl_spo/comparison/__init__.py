# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Which method is best on one's own data: all of them trained and measured side by side. See docs/compare.md."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names
from ..evaluation import EXTRA


if TYPE_CHECKING:
    from .comparison import Comparison
    from .comparison_config import ComparisonConfig
    from .recommendation import recommend
    from .report import write_report

# Public name -> the module that defines it
_PUBLIC = {
    "Comparison": "comparison",
    "ComparisonConfig": "comparison_config",
    "recommend": "recommendation",
    "write_report": "report",
}

__all__ = list(_PUBLIC)

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC, "eval", EXTRA)
