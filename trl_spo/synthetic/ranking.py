# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
From the verdicts on the pairs of a prompt to an order of its responses, and from there to the pairs or the list to train on.

Nothing here draws random numbers: what is chosen at random is put in the order of a hash of the seed and the thing itself. So it is
the same in every process and with every version of Python and NumPy, and a larger number of comparisons contains a smaller one.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.special import expit


T = TypeVar("T")

PAIRINGS = ("best_worst", "best_random", "all")
_SAME = 1e-9  # strengths that differ by less, or shares, are equal: the rest is rounding


def _shuffled(items: Iterable[T], key: Callable[[T], Any]) -> list[T]:
    # JSON in ASCII, because what `repr` escapes depends on the version of Python
    return sorted(items, key=lambda item: hashlib.sha256(json.dumps(key(item)).encode()).digest())


def _check_shares(shares: np.ndarray) -> np.ndarray:
    """The shares in float64, without those of a response over itself."""
    shares = np.array(shares, dtype=np.float64)
    if shares.ndim != 2 or shares.shape[0] != shares.shape[1] or not shares.size:
        raise ValueError(f"`shares` must be of shape (n, n), for at least one response, got {shares.shape}.")
    np.fill_diagonal(shares, np.nan)
    wrong = ~(np.isnan(shares) | ((shares >= 0) & (shares <= 1)))
    wrong |= np.isnan(shares) != np.isnan(shares.T)
    wrong |= np.abs(shares + shares.T - 1) > _SAME
    if wrong.any():
        i, j = (int(index) for index in np.argwhere(wrong)[0])
        raise ValueError(
            f"`shares[{i}, {j}]` is {shares[i, j]} and `shares[{j}, {i}]` is {shares[j, i]}. They must be from 0 to 1 and add up to "
            "1, or both be nan where there are no votes."
        )
    return shares


def _check_strengths(strengths: np.ndarray, shares: np.ndarray) -> np.ndarray:
    strengths = np.asarray(strengths, dtype=np.float64)
    if strengths.shape != (len(shares),) or not np.isfinite(strengths).all():
        raise ValueError(
            f"`strengths` must be {len(shares)} finite numbers, one for each row of `shares`, got {strengths}."
        )
    return strengths


def bradley_terry(shares: np.ndarray, prior_variance: float = 1.0) -> np.ndarray:
    r"""
    Strengths of responses by the model of Bradley and Terry (1952), `P(i over j) = σ(θ_i - θ_j)`, with a Gaussian prior.

    `θ = argmax Σ_{i<j} [s_ij log σ(θ_i - θ_j) + (1 - s_ij) log σ(θ_j - θ_i)] - Σ_i θ_i² / (2 v)`, where the first sum is over
    the pairs with votes, s is the share and v the variance. The prior makes the maximum unique and finite, also for responses
    that won or lost all votes. There `θ_i = v Σ_j (s_ij - σ(θ_i - θ_j))`, so that the strengths of responses that votes link
    sum to zero.

    Newton's method, with the step length `log(1 + r) / r`, where r is the largest change of a difference of strengths: every
    step gains, because `|σ''| <= σ'` (Sun and Tran-Dinh, 2019, Generalized self-concordant functions).

    Args:
        shares (`np.ndarray` of shape `(n, n)`):
            Share of the jury's votes for `i` over `j`, and `shares[j, i] = 1 - shares[i, j]`; nan if there are no votes. The diagonal
            is not read.
        prior_variance (`float`, *optional*, defaults to `1.0`):
            v > 0. The smaller, the closer together the strengths.

    Returns:
        `np.ndarray` of shape `(n,)`: strengths in float64. Those that are equal but for rounding are exactly equal. 0 for a response
        without votes.

    Raises:
        `ValueError`: the shares are not shares, or the variance is not positive and finite.
    """
    shares = _check_shares(shares)
    if not 0 < prior_variance < np.inf:
        raise ValueError(f"`prior_variance` must be positive and finite, got {prior_variance}.")
    voted = ~np.isnan(shares)
    theta, decrement = np.zeros(len(shares)), np.inf
    while decrement > 1e-18:  # twice what is left to gain; the last step squares the error
        p = expit(theta[:, None] - theta)
        gradient = np.where(voted, shares - p, 0.0).sum(axis=1) - theta / prior_variance
        information = -np.where(voted, p * (1 - p), 0.0)
        np.fill_diagonal(information, 1 / prior_variance - information.sum(axis=1))
        step = np.linalg.solve(information, gradient)
        decrement = gradient @ step
        change = np.ptp(step)
        theta += step * (np.log1p(change) / change if change > 0 else 1.0)
    order = np.argsort(theta)
    starts = np.diff(theta[order], prepend=-np.inf) > _SAME * min(1.0, prior_variance)  # of those that are equal
    theta[order] = theta[order][np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return theta


def compared_pairs(n: int, num_comparisons: int | None = None, *, seed_key: str) -> list[tuple[int, int]]:
    """
    Which pairs of n responses the jury is asked about.

    Args:
        n (`int`):
            Number of responses, at least 2.
        num_comparisons (`int`, *optional*):
            How many of the `n (n - 1) / 2` pairs, at least `n - 1`. They link all responses: a path through all of them in random
            order, its ends, then pairs at random. With more, those of fewer are among them, so that no answer is asked for again.
            By default, and if there are no more, all pairs.
        seed_key (`str`):
            What the random order depends on, such as the id of the prompt.

    Returns:
        `list[tuple[int, int]]`: pairs `(i, j)` with `i < j`, sorted.

    Raises:
        `ValueError`: there are fewer than two responses, or too few comparisons to link them.
    """
    if n < 2:
        raise ValueError(f"There must be at least 2 responses to compare, got `n={n}`. Sample more of each prompt.")
    pairs = list(combinations(range(n), 2))
    if num_comparisons is None:
        return pairs
    if num_comparisons < n - 1:
        raise ValueError(
            f"`num_comparisons={num_comparisons}` cannot link {n} responses, which takes {n - 1}. Set it to {n - 1} or more, or "
            "to `None` for all pairs."
        )
    path = _shuffled(range(n), lambda i: [seed_key, i])
    links = [(min(link), max(link)) for link in zip(path, path[1:] + path[:1], strict=True)]
    ordered = dict.fromkeys(links + _shuffled(pairs, lambda pair: [seed_key, *pair]))
    return sorted(list(ordered)[:num_comparisons])


def _linked(shares: np.ndarray) -> np.ndarray:
    """Which responses are in the largest group that votes link, `(n,)`; the first of those that are as large."""
    _, groups = connected_components(~np.isnan(shares), directed=False)
    return groups == np.bincount(groups).argmax()


def select_pairs(
    mode: str, strengths: np.ndarray, ids: Sequence[str], shares: np.ndarray, seed_key: str
) -> list[tuple[int, int]]:
    """
    The pairs of a prompt to train on.

    A pair is one only if the first is stronger, and the jury's own verdict on the two, if there is one, is for it: a pair that
    the jury tied, or decided against the order of strengths (its verdicts go in a circle), is never returned. Of responses that
    votes do not link, nothing says which is stronger; the best and the worst are those of the largest group that votes link.

    Args:
        mode (`str`):
            `"best_worst"`: the strongest against the weakest. `"best_random"`: the strongest against another at random. Where
            there is a choice, because strengths are equal, it is at random. `"all"`: every pair that the jury decided.
        strengths (`np.ndarray` of shape `(n,)`):
            Of [`bradley_terry`].
        ids (`Sequence[str]`):
            Ids of the responses, which random choices depend on, and not on the indices.
        shares (`np.ndarray` of shape `(n, n)`):
            As in [`bradley_terry`].
        seed_key (`str`):
            What random choices depend on too, such as the id of the prompt.

    Returns:
        `list[tuple[int, int]]`: indices of winner and loser. One pair or none, but for `"all"`, which has them sorted.

    Raises:
        `ValueError`: the mode is unknown, ids occur twice, or the numbers of strengths, ids and shares differ.
    """
    shares, strengths = _check_shares(shares), _check_strengths(strengths, shares)
    n = len(strengths)
    if len(ids) != n or len(set(ids)) < n:
        raise ValueError(f"`ids` must be {n} different ids, one for each of the `strengths`, got {list(ids)}.")
    linked = _linked(shares)
    # Not "more than half", so that nan is let through
    right = (strengths[:, None] > strengths) & ~(shares <= 0.5 + _SAME)
    best = linked & (strengths == strengths[linked].max())
    worst = linked & (strengths == strengths[linked].min())
    match mode:
        case "best_worst":
            right &= best[:, None] & worst
        case "best_random":
            right &= best[:, None] & linked
        case "all":
            right &= ~np.isnan(shares)
        case _:
            raise ValueError(f"Unknown way to choose pairs: {mode!r}. Should be one of {list(PAIRINGS)}.")
    pairs = [(int(winner), int(loser)) for winner, loser in np.argwhere(right)]
    if mode == "all":
        return pairs
    return _shuffled(pairs, lambda pair: [seed_key, ids[pair[0]], ids[pair[1]]])[:1]


def ranked_list(strengths: np.ndarray, shares: np.ndarray) -> tuple[list[int], list[float]]:
    """
    The responses of a prompt as a list for Soft PO's ranked loss: their columns `completions` and `scores`.

    Left out is a response without votes, and any that no votes link to the largest group of others: nothing says where it
    stands. Responses of equal strength have equal scores, and so share their rank.

    Args:
        strengths (`np.ndarray` of shape `(n,)`):
            Of [`bradley_terry`].
        shares (`np.ndarray` of shape `(n, n)`):
            As in [`bradley_terry`].

    Returns:
        `tuple[list[int], list[float]]`: indices of the responses, best first, and their scores. Both are empty if no response is
        stronger than another.
    """
    shares = _check_shares(shares)
    strengths = _check_strengths(strengths, shares)
    left = np.flatnonzero(_linked(shares))
    order = left[np.argsort(-strengths[left], kind="stable")]
    scores = strengths[order].tolist()
    if len(set(scores)) < 2:
        return [], []
    return order.tolist(), scores
