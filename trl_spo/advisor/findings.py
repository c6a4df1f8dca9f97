# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What advice is made of: findings, and shares with their intervals."""

import math
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any


# The worst first
SEVERITIES = ("error", "warning", "info")
_Z = NormalDist().inv_cdf(0.975)


class UsageError(ValueError):
    """What is asked for cannot be done."""


@dataclass(frozen=True)
class Finding:
    """
    One thing that was found.

    Args:
        code (`str`):
            What it is, in a word that stays the same from version to version.
        severity (`str`):
            `"error"` if the training would fail, or it or its evaluation would be worthless; `"warning"` if it would
            suffer; or `"info"`.
        title (`str`):
            What it is, in a few words.
        detail (`str`):
            What was seen, with figures.
        remedy (`str`, *optional*, defaults to `""`):
            What to do about it.
        data (`dict[str, Any]`, *optional*):
            The figures, for programs: whatever JSON can hold.
    """

    code: str
    severity: str
    title: str
    detail: str
    remedy: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"`severity` must be one of {list(SEVERITIES)}, got {self.severity!r}.")

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def wilson(count: float, number: float) -> dict[str, Any]:
    """
    A share, with Wilson's interval (1927) of level 0.95.

    Args:
        count (`float`):
            How many cases have what is counted. The sum of shares in [0, 1], one a case, may stand here as well:
            nothing with this mean varies more than what is 0 or 1, so that the interval is rather too wide.
        number (`float`):
            Of how many independent cases.

    Returns:
        `dict[str, Any]`: `rate`, `interval` and `number`; the first two are `None` if there are no cases.
    """
    if number == 0:
        return {"rate": None, "interval": None, "number": 0}
    rate, weight = count / number, _Z**2 / number
    middle = (rate + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(rate * (1 - rate) / number + weight / number / 4) / (1 + weight)
    return {"rate": rate, "interval": [max(middle - half, 0.0), min(middle + half, 1.0)], "number": number}


def percent(share: dict[str, Any], exact: bool = False) -> str:
    """A share of [`wilson`] in words, with its interval unless all cases were looked at."""
    if share["rate"] is None:
        return "none"
    text = f"{share['rate']:.1%}"
    if exact:
        return text
    low, high = share["interval"]
    return f"{text} ({low:.1%} to {high:.1%})"
