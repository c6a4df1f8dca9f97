# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Intervals and tests. All intervals have the level 0.95.

An *estimate* is a dict that JSON can hold: `value`, `error` (its standard error), `interval` and `number`, of how many units (prompts,
pairs, questions); `None` where there is nothing to take it from.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats


_LEVEL = 0.95
_RESAMPLES = 2000
_PERMUTATIONS = 9999
_CHUNK = 10**6  # numbers of the bootstrap that are in memory at once


def wilson_rate(count: float, number: int) -> dict[str, Any]:
    """A share of independent cases: `rate`, `interval` (Wilson, 1927) and the `number` of cases. A tie may count half."""
    if number == 0:
        return {"rate": None, "interval": None, "number": 0}
    rate = count / number
    interval = _wilson(rate, number, float(stats.norm.ppf((1 + _LEVEL) / 2)))
    return {"rate": rate, "interval": interval, "number": number}


def _wilson(rate: float, number: float, quantile: float) -> list[float]:
    """The shares from which one of so many cases is no more than so many standard errors away. They are never outside of [0, 1]."""
    spread = quantile**2 / number
    center, half = rate + spread / 2, math.sqrt(spread * (rate * (1 - rate) + spread / 4))
    return [max(0.0, (center - half) / (1 + spread)), min(1.0, (center + half) / (1 + spread))]


def bootstrap_intervals(
    units: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int
) -> list[list[float] | None]:
    """
    Percentile intervals of statistics of a sum over units.

    Units that are equal are drawn together: how many of each kind a resample has is multinomial.

    Args:
        units (`np.ndarray` of shape `(N, k)`):
            What is summed up.
        statistic (`Callable`):
            From sums `(B, k)` to `(statistics, B)`; nan where one does not exist. Such resamples are left out.
        seed (`int`):
            Of the resamples.

    Returns:
        `list[list[float] | None]`: of each statistic. `None` if a single unit says nothing of how others vary, or it never exists.
    """
    kinds, counts = np.unique(units, axis=0, return_counts=True)
    rng, step = np.random.default_rng(seed), max(1, _CHUNK // len(kinds))
    sums = [
        rng.multinomial(len(units), counts / len(units), size=min(step, _RESAMPLES - start)) @ kinds
        for start in range(0, _RESAMPLES, step)
    ]
    intervals = []
    for values in statistic(np.concatenate(sums)):
        values = values[~np.isnan(values)]
        tail = (1 - _LEVEL) / 2
        exists = len(units) > 1 and len(values) > 0
        intervals.append(np.quantile(values, [tail, 1 - tail]).tolist() if exists else None)
    return intervals


def mean_estimate(values: Sequence[float] | np.ndarray, share: bool = False) -> dict[str, Any]:
    """
    The mean of independent units, with the interval of Student's t.

    Args:
        values (`Sequence[float]`):
            One of each unit. Several responses to a prompt are not independent: their mean is one unit.
        share (`bool`, *optional*, defaults to `False`):
            As of [`crossed_estimate`].

    Returns:
        `dict[str, Any]`: an estimate; without an interval if there is one unit only.
    """
    return crossed_estimate(np.asarray(values, dtype=np.float64)[None], share)


def crossed_estimate(values: np.ndarray, share: bool = False) -> dict[str, Any]:
    """
    The mean over trainings and units that are the same in all of them, such as seeds and prompts. It is uncertain for both reasons:
    other seeds would give other models, and other prompts other values.

    The variance is the sum of the variance of the trainings' means and that of the units' means, each divided by their number. This counts
    their interaction twice, and so is a little too large rather than too small (Owen, 2007, "The pigeonhole bootstrap"). The degrees of
    freedom of Student's t are those of Welch and Satterthwaite. With one training, it is the usual interval of a mean.

    Args:
        values (`np.ndarray` of shape `(S, N)`):
            Of each training and unit.
        share (`bool`, *optional*, defaults to `False`):
            Whether the values are from 0 to 1 by what they are, and so is the interval: Wilson's, of as many independent cases as have this
            variance. Where nothing varies, of the units.

    Returns:
        `dict[str, Any]`: an estimate. Its `number` is that of the units.
    """
    if values.size == 0:
        return {"value": None, "error": None, "interval": None, "number": 0}
    mean, (variance, freedom) = float(values.mean()), _variance(values)
    found: dict[str, Any] = {"value": mean, "error": None, "interval": None, "number": values.shape[1]}
    if freedom is not None:
        found["error"] = math.sqrt(variance)
        quantile = float(stats.t.ppf((1 + _LEVEL) / 2, freedom))
        half = quantile * found["error"]
        if not share:
            found["interval"] = [mean - half, mean + half]
        elif variance > 0:
            found["interval"] = _wilson(mean, mean * (1 - mean) / variance, quantile)
        else:
            found["interval"] = wilson_rate(mean * max(values.shape), max(values.shape))["interval"]
    return found


def _variance(values: np.ndarray) -> tuple[float, float | None]:
    """Of the mean, with its degrees of freedom: `None` if nothing varies by design."""
    parts = [
        (float(means.var(ddof=1)) / len(means), len(means) - 1)
        for means in (values.mean(axis=1), values.mean(axis=0))
        if len(means) > 1
    ]
    variance = math.fsum(part for part, _ in parts)
    if not parts:
        return 0.0, None
    if variance == 0:
        return 0.0, float(min(freedom for _, freedom in parts))
    return variance, variance**2 / math.fsum(part**2 / freedom for part, freedom in parts)


def crossed_difference(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """
    How much larger the mean of one set of trainings is than that of another, on the same units, and whether it might be by chance.

    Args:
        first (`np.ndarray` of shape `(S, N)`):
            Of each training and unit.
        second (`np.ndarray` of shape `(T, N)`):
            Likewise, on the same units.

    Returns:
        `dict[str, Any]`: an estimate with the `p_value` of the hypothesis that there is no difference, two-sided. Of one training each, it is that of
        the permutation test that flips the signs of the units' differences ([`paired_p_value`]), which assumes no distribution. With more, that of
        Student's t with the variances of both sets of trainings.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"Both must have the same units, and have {first.shape[1]} and {second.shape[1]}.")
    difference = first.mean(axis=0) - second.mean(axis=0)
    found = mean_estimate(difference)
    if len(first) == len(second) == 1:
        return {**found, "p_value": paired_p_value(difference)}
    parts = [(float(difference.var(ddof=1)) / len(difference), len(difference) - 1)] if len(difference) > 1 else []
    parts += [(float(x.mean(axis=1).var(ddof=1)) / len(x), len(x) - 1) for x in (first, second) if len(x) > 1]
    variance = math.fsum(part for part, _ in parts)
    if variance == 0:
        return {**found, "p_value": paired_p_value(difference)}
    freedom = variance**2 / math.fsum(part**2 / degrees for part, degrees in parts)
    error = math.sqrt(variance)
    half = float(stats.t.ppf((1 + _LEVEL) / 2, freedom)) * error
    return {
        "value": found["value"],
        "error": error,
        "interval": [found["value"] - half, found["value"] + half],
        "number": len(difference),
        "p_value": float(2 * stats.t.sf(abs(found["value"]) / error, freedom)),
    }


def paired_p_value(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float | None:
    """
    Two-sided p-value of the hypothesis that differences of pairs are symmetric around 0, by flipping their signs: all ways to do so if they are few,
    random ones otherwise.

    Args:
        differences (`Sequence[float]`):
            One of each unit.
        seed (`int`, *optional*, defaults to `0`):
            Of the random ones.

    Returns:
        `float`, *optional*: `None` if there are fewer than two units.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if len(differences) < 2:
        return None
    if not differences.any():
        return 1.0
    test = stats.permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        n_resamples=_PERMUTATIONS,
        batch=max(1, _CHUNK // len(differences)),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """
    P-values of several tests, adjusted so that the chance of one false alarm among all of them stays what it is of one (Holm, 1979). `None` stays.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted
