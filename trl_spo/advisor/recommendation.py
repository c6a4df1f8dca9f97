# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which method fits the data, by the guide (docs/choosing.md): clean pairs and a small budget: DPO; noisy labels or
annotators who disagree: IPO, or Stable PO; binary feedback: KTO, never glued into pairs; lists: Soft PO; a large
budget and experience with RL: RLHF.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .findings import Finding
from .quality import FEW
from .rows import Rows
from .shape import TITLES


@dataclass(frozen=True)
class Recommendation:
    """
    The method that fits best, and others.

    Args:
        method (`str`):
            Its name.
        reasons (`list[str]`):
            Why it fits, with the figures that say so.
        alternatives (`list[dict[str, str]]`):
            `method` and `reason` of others, the next best first.
    """

    method: str
    reasons: list[str]
    alternatives: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def whole_lists(rows: Rows) -> tuple[int, int]:
    """How many prompts have three or more responses that were all compared with one another, and how many prompts there are."""
    chosen, rejected = rows.pairs(rows.responses)
    pairs = np.unique(
        np.stack([rows.prompts, np.minimum(chosen, rejected), np.maximum(chosen, rejected)], axis=1), axis=0
    )
    pairs = pairs[pairs[:, 1] != pairs[:, 2]]
    prompts, compared = np.unique(pairs[:, 0], return_counts=True)
    responses = np.unique(
        np.concatenate([pairs[:, [0, 1]], pairs[:, [0, 2]]]) if len(pairs) else np.empty((0, 2), dtype=np.int64),
        axis=0,
    )
    _, number = np.unique(responses[:, 0], return_counts=True)
    return int(((number >= 3) & (compared == number * (number - 1) // 2)).sum()), len(prompts)


def recommend(
    rows: Rows, findings: list[Finding], usable: int | None, large_budget: bool = False, sampled: bool = False
) -> Recommendation | None:
    """
    Says which method fits best.

    Args:
        rows ([`Rows`]):
            Rows of the train split.
        findings (`list[Finding]`):
            What was found.
        usable (`int`, *optional*):
            Rows of the train split that a model can learn from, if that is known.
        large_budget (`bool`, *optional*, defaults to `False`):
            Whether there are a large budget and experience with reinforcement learning, which no dataset tells.
        sampled (`bool`, *optional*, defaults to `False`):
            Whether these are some of the rows only, so that `usable` is an estimate.

    Returns:
        [`Recommendation`], *optional*: `None` if no method can be trained on the dataset.
    """
    possible = rows.shape.possible
    if not possible:
        return None
    by_code = {finding.code: finding for finding in findings}
    others: list[tuple[str, str]] = []
    if rows.shape.kind == "unpaired":
        method = "kto"
        reasons = [
            "The responses stand alone, each good or bad. KTO is made for that; pairs must not be glued together of them."
        ]
        others.append(
            (
                "sspo_kto",
                "KTO with heads that learn how much key content is missing; no gain in alignment was measured so far.",
            )
        )
    elif rows.shape.kind == "lists":
        sizes = np.bincount(rows.rows, minlength=len(rows))
        reasons = [
            f"Lists of {sizes.mean():.1f} responses on average: Soft PO trains on whole lists, the other methods on pairs made of them."
        ]
        return Recommendation("soft_po", reasons, [])
    else:
        method, reasons = _for_pairs(rows, by_code, others)
    if "rlhf" in possible and method != "kto":  # of glued pairs, a reward model learns as little
        number = "" if usable is None else f"{'about ' if sampled else ''}{usable} "
        few = usable is not None and usable < FEW
        if large_budget and not few:
            others.insert(0, (method, " ".join(reasons)))
            method = "rlhf"
            reasons = [
                f"A large budget, experience with RL, and {number}usable pairs for a reward model, which goes on to judge responses that no dataset has."
            ]
        else:
            doubt = f" The reward model would have {number}usable pairs, fewer than {FEW}." if few else ""
            others.append(("rlhf", f"With a large budget and experience with RL (`--large_budget`).{doubt}"))
    if method not in possible:
        others = [(name, reason) for name, reason in others if name in possible]
        if not others:
            return None
        method, reason = others.pop(0)
        reasons = [reason]
    return Recommendation(
        method,
        reasons,
        [
            {"method": name, "title": TITLES[name], "reason": reason}
            for name, reason in others
            if name in possible and name != method
        ],
    )


def _for_pairs(rows: Rows, by_code: dict[str, Finding], others: list[tuple[str, str]]) -> tuple[str, list[str]]:
    glued, different = by_code.get("glued_pairs"), by_code.get("different_prompts")
    # Chosen responses may well be refusals
    if (glued and glued.data["which"] == "rejected") or (different and different.severity == "error"):
        others.append(("dpo", "If the pairs are two answers to one prompt after all."))
        return "kto", [
            "The pairs look glued together from binary feedback (see below). KTO takes them apart again; better still, give it the responses as they were rated."
        ]
    estimate = by_code["label_noise"].data
    rate, noisy = estimate["flip_rate"], estimate["noisy"]
    if noisy:
        method = "ipo"
        reasons = [
            f"About {rate:.0%} of the labels are wrong, by the estimate below. IPO's loss ends at a margin, while DPO's goes on rewarding larger ones, on wrong labels, too.",
            "That is a rule of thumb: in our own experiment with labels turned round at random, IPO and Stable PO were not seen to keep a larger share of their gain than DPO. `trl-spo compare` measures it on these data.",
        ]
        others.append(("stable_po", "Likewise: it does not leave the region that supervised fine-tuning allows."))
        others.append(("dpo", 'With `loss_type="robust"` and `label_smoothing` at the rate of wrong labels.'))
    else:
        method = "dpo"
        tells = "nothing tells" if rate is None else "too little tells"
        known = (
            f"Pairs, and {tells} how noisy the labels are: if people disagree on them, take IPO or Stable PO."
            if noisy is None
            else f"Pairs with clean labels (about {rate:.1%} wrong, by the estimate below)."
        )
        reasons = [known, "DPO is the simplest and the cheapest, and what others are compared with."]
        others.append(
            (
                "stable_po",
                "If DPO's chosen log-probabilities fall, or a capability is lost: DPO's loss within the region that supervised fine-tuning allows.",
            )
        )
        others.append(("ipo", "If labels turn out to be noisy."))
    lists, prompts = whole_lists(rows)
    if "on_policy" in by_code:
        others.insert(
            0,
            (
                "soft_po",
                "The responses may well be the model's own, where it is at its best: its regularizer holds outside of the data, too.",
            ),
        )
    elif lists and lists >= prompts / 2:
        others.insert(
            0,
            (
                "soft_po",
                f"{lists} of {prompts} prompts have three or more responses that were all compared: it can train on them as ranked lists.",
            ),
        )
    else:
        others.append(
            (
                "soft_po",
                "If the model must not drift outside of the data, or diversity matters: its KL is over the model's own samples.",
            )
        )
    others.append(
        (
            "sspo",
            "DPO with heads that learn how much key content is missing; no gain in alignment was measured so far.",
        )
    )
    return method, reasons
