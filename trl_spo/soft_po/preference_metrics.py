# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The metrics of the preference loss: first one row an example, which the processes gather, then their means."""

import torch

from ..losses import competitors
from ..metrics import MetricTotals
from .preference_data import ListLayout


def per_example_table(layout: ListLayout, alpha: float, **values: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    What the metrics need of each example.

    Args:
        layout ([`ListLayout`]):
            Layout of the batch.
        alpha (`float`):
            Softness α: rewards are α times the scores.
        **values (`torch.Tensor`):
            `loss` of shape `(B,)`, and of shape `(B, n)` the `scores`, `logps`, `weights` and, summed over the tokens of each
            response, `tokens`, `entropy`, `logits` and `top1`.

    Returns:
        `dict[str, torch.Tensor]`: columns of shape `(B,)`.
    """
    mask, ranks = layout.mask, layout.ranks
    best, others = mask & (ranks == 0), mask & (ranks > 0)
    scores, weights = values["scores"], values["weights"]
    ordered = competitors(mask, ranks) & ~torch.eye(mask.size(1), dtype=torch.bool, device=mask.device)
    right = ordered & (scores.unsqueeze(2) > scores.unsqueeze(1))

    def mean(x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        return (x * which).sum(dim=1) / which.sum(dim=1).clamp(min=1)

    table = {"loss": values["loss"], "right": right.sum(dim=(1, 2)), "ordered": ordered.sum(dim=(1, 2))}
    for name, which in (("chosen", best), ("rejected", others)):
        table[f"rewards/{name}"] = alpha * mean(scores, which)
        table[f"logps/{name}"] = mean(values["logps"], which)
        table[f"logits/{name}"] = (values["logits"] * which).sum(dim=1)
        table[f"tokens/{name}"] = (values["tokens"] * which).sum(dim=1)
    table["top1"] = (values["top1"] * best).sum(dim=1)
    table["entropy"] = values["entropy"].sum(dim=1)
    table["weights"], table["squares"] = weights.sum(dim=1), weights.square().sum(dim=1)
    table["terms"] = (ordered.sum(dim=2) > 0).sum(dim=1)
    return table


def add_preference_metrics(totals: MetricTotals, table: dict[str, torch.Tensor]) -> None:
    """Adds what [`per_example_table`] gave, gathered from all processes, to the metrics."""
    totals.add("loss/preference", table["loss"])
    for name in ("chosen", "rejected"):
        totals.add(f"rewards/{name}", table[f"rewards/{name}"])
        totals.add(f"logps/{name}", table[f"logps/{name}"])
        totals.add(f"logits/{name}", table[f"logits/{name}"], table[f"tokens/{name}"])
    totals.add("rewards/accuracies", table["right"], table["ordered"])
    totals.add("rewards/margins", table["rewards/chosen"] - table["rewards/rejected"])
    totals.add("entropy", table["entropy"], table["tokens/chosen"] + table["tokens/rejected"])
    totals.add("mean_token_accuracy", table["top1"], table["tokens/chosen"])
    totals.add("weights/mean", table["weights"], table["terms"])
    totals.add_effective_share("weights/ess", table["weights"], table["squares"], table["terms"])
