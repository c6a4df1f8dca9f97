# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""How the report of a comparison writes numbers: as exactly as they are known, with a real minus sign, and a dash for what is missing."""

from math import floor, isfinite, isnan, log10
from typing import Any, NamedTuple


NONE = "–"
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class Shown(NamedTuple):
    """An estimate as it is written."""

    value: str
    interval: str | None = None

    def __str__(self) -> str:
        return self.value if self.interval is None else f"{self.value} {self.interval}"


def known(value: float | None) -> bool:
    return value is not None and isfinite(value)


def _places(value: float, digits: int) -> int:
    """Decimal places that show so many significant digits."""
    return max(0, digits - 1 - floor(log10(abs(value)))) if value else 0


def _fixed(value: float, places: int, sign: str = "") -> str:
    text = f"{value:{sign},.{places}f}"
    if not any(digit in text for digit in "123456789"):  # no sign for what is rounded to 0
        text = text.lstrip("+-")
    return text.replace("-", "\u2212")


def number(value: float | None, sign: str = "") -> str:
    """A number with three significant digits, and all those before the decimal point."""
    if value is None or isnan(value):
        return NONE
    if not isfinite(value):
        return "∞" if value > 0 else "\u2212∞"
    return _fixed(value, _places(value, 3), sign)


def _interval_places(value: float, low: float, high: float) -> int:
    """
    At most three significant digits of the value, and none that the interval does not support: of half its width, two digits up to
    3.5 and one above, as the Particle Data Group rounds. As many more as tell the ends of a narrow interval apart.
    """
    half = (high - low) / 2
    if half <= 0:
        return _places(value, 3)
    leading = half / 10 ** floor(log10(half))
    places = _places(half, 2 if leading < 3.55 else 1)
    if value:
        places = min(places, _places(value, 3))
    while round(low, places) == round(high, places):
        places += 1
    return places


def estimate(found: dict[str, Any] | None, sign: str = "") -> Shown:
    """A value and its interval, with the same number of decimal places."""
    if not found or not known(found["value"]):
        return Shown(number(found["value"]) if found else NONE)
    value, interval = found["value"], found["interval"]
    if interval is None or not all(map(known, interval)):
        return Shown(number(value, sign))
    places = _interval_places(value, *interval)
    low, high = (_fixed(end, places) for end in interval)
    return Shown(_fixed(value, places, sign), f"[{low}, {high}]")


def p_value(value: float | None) -> str:
    if not known(value):
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """The two largest units: 3 h 5 min, 12 min 4 s, 42.1 s."""
    if not known(seconds):
        return NONE
    if seconds < 59.95:
        return f"{number(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def memory(size: float | None) -> str:
    if not known(size):
        return NONE
    unit = 0
    while size >= 999.5 and unit + 1 < len(_UNITS):  # four digits before the point are hard to read
        size, unit = size / 1024, unit + 1
    return f"{number(size)} {_UNITS[unit]}"


def money(value: float | None, currency: str | None = None) -> str:
    """To the cent, or to three digits."""
    if not known(value):
        return NONE
    text = f"{value:,.2f}" if value >= 1 or value == 0 else number(value)
    return text if currency is None else f"{text} {currency}"
