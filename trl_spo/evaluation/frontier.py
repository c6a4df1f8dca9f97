# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What is the best that a family of policies reaches at a given distance from the reference."""

from collections.abc import Sequence


def upper_frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """
    The part of the upper concave hull of points that rises, from left to right.

    Each point of it can be had: by one of the policies, or by drawing at random, for each response, which of two policies answers. What is below
    another at the same distance, or no better farther away, is no part of it.

    Args:
        points (`Sequence[tuple[float, float]]`):
            Distance, such as the KL divergence, and quality. The reference is one of them.

    Returns:
        `list[tuple[float, float]]`: its corners.
    """
    hull: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if hull and y <= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) <= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull
