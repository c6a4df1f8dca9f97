# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import math

import torch


class MetricTotals:
    """
    Means of what has been added since the last log, weighted by what each value stands for.

    TRL averages the means of batches; a last batch that is smaller then counts as much as a full one. Here numerators and
    denominators are summed, so that no metric depends on how the examples were batched.
    """

    def __init__(self):
        self._ratios: dict[str, list[float]] = {}
        self._moments: dict[str, list[float]] = {}
        self._masses: dict[str, list[float]] = {}

    def add(self, name: str, values: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """
        Adds to the mean `Σ values / Σ counts`.

        Args:
            name (`str`):
                Metric.
            values (`torch.Tensor`):
                Values, gathered from all processes.
            counts (`torch.Tensor`, *optional*):
                What each value is a sum over, e.g. tokens. One by default.
        """
        total = self._ratios.setdefault(name, [0.0, 0.0])
        total[0] += values.sum().item()
        total[1] += values.numel() if counts is None else counts.sum().item()

    def add_std(self, name: str, values: torch.Tensor) -> None:
        """Adds to the sample standard deviation of `values`, gathered from all processes."""
        total = self._moments.setdefault(name, [0.0, 0.0, 0.0])
        values = values.double()
        total[0] += values.numel()
        total[1] += values.sum().item()
        total[2] += values.square().sum().item()

    def add_effective_share(
        self, name: str, weights: torch.Tensor, squares: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Adds to the effective sample size `(Σ μ)² / Σ μ²`, as a share of the number of weights."""
        total = self._masses.setdefault(name, [0.0, 0.0, 0.0])
        total[0] += weights.sum().item()
        total[1] += squares.sum().item()
        total[2] += counts.sum().item()

    def pop(self) -> dict[str, float]:
        """The metrics since the last call. A mean over nothing is left out."""
        metrics = {name: total / count for name, (total, count) in self._ratios.items() if count > 0}
        for name, (n, total, squares) in self._moments.items():
            if n > 1:
                metrics[name] = math.sqrt(max(squares - total**2 / n, 0.0) / (n - 1))
        for name, (total, squares, n) in self._masses.items():
            if squares > 0:
                metrics[name] = total**2 / squares / n
        self._ratios, self._moments, self._masses = {}, {}, {}
        return metrics
