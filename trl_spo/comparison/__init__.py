# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Which method is best on one's own data: all of them trained and measured side by side. See docs/compare.md."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


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


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value  # next time, it is found without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
