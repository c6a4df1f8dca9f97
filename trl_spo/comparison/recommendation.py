# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which method a comparison speaks for, and why.

The rule: of the settings that are better than the reference beyond chance and have lost no capability, those that cannot be told from the one with the
highest quality, prompt by prompt; of these, the best among the quickest to train. What speaks against it is said, too.
"""

import math
from collections.abc import Sequence
from typing import Any

from .report_numbers import estimate as written
from .report_numbers import number


_LEVEL = 0.05
_QUICK = 1.1  # times the shortest training: two of the same differ by as much
_NAMED = 4
_FEW_PROMPTS = 100  # below which even a win rate of 0.6 may be chance
_NAT = 1.0  # by which a chosen response has to become less probable, to be worth a warning


def recommend(summary: dict[str, Any]) -> dict[str, Any]:
    """
    The recommendation.

    Args:
        summary (`dict[str, Any]`):
            What is in `comparison.json`, without the recommendation.

    Returns:
        `dict[str, Any]`: `method`, `label`, `setting` and `setting_label` (`None` if there is none to recommend), the `headline`, `reasons` and `warnings`.
    """
    quality, settings = summary["quality"], summary["settings"]
    metric = quality["metric"]
    measured = [setting for setting in settings if _value(setting, metric) is not None]
    nothing = {"method": None, "label": None, "setting": None, "setting_label": None}
    if not measured:
        return {
            **nothing,
            "headline": "Nothing can be recommended: no training was evaluated to its end.",
            "reasons": [],
            "warnings": _warnings(summary, None),
        }
    better = [setting for setting in measured if _is_better(setting, quality)]
    sound = [setting for setting in better if not regressed(setting)]
    if not sound:
        top = max(measured, key=lambda setting: _value(setting, metric))
        reasons = [
            f"The highest is {_name(top)}: {_shown(top['metrics'][metric])}, beside {number(quality['baseline'])} of the reference."
        ]
        for setting in better:
            reasons.append(f"{_name(setting)} is better than the reference, but lost {_lost(setting)}.")
        if not better:
            reasons.append(
                "The interval of none of them is above the reference's value. More prompts or seeds may tell them apart, or more training."
            )
        why = (
            "each that is better has lost a capability"
            if better
            else "none is better than the reference beyond chance"
        )
        return {
            **nothing,
            "headline": f"None can be recommended: {why}.",
            "reasons": reasons,
            "warnings": _warnings(summary, None),
        }
    top = max(sound, key=lambda setting: _value(setting, metric))
    equals = [setting for setting in sound if setting is top or _as_good(setting, top)]
    quick = [setting for setting in equals if _seconds(setting) <= _QUICK * min(map(_seconds, equals))]
    chosen = max(quick, key=lambda setting: _value(setting, metric))
    label = "reward" if metric == "reward" else "win rate"
    reasons = [
        f"Its {label} is {_shown(chosen['metrics'][metric])}, beside {number(quality['baseline'])} of the reference."
    ]
    alike = [setting for setting in measured if not regressed(setting) and _as_good(setting, top)]
    others = sorted((s for s in alike if s is not chosen), key=lambda setting: -_value(setting, metric))
    if others:
        shown = ", ".join(f"{_name(s)} ({_shown(s['metrics'][metric])})" for s in others[:_NAMED])
        shown += f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        reasons.append(f"It cannot be told from {shown}, prompt by prompt.")
        if chosen is not top:
            reasons.append(
                f"Of these, {_name(top)} is the highest, but its training took {_seconds(top) / _seconds(chosen):.1f} times as long."
            )
    elif len(measured) > 1:
        reasons.append("It is better than each of the others that lost no capability, prompt by prompt.")
    kl = chosen["metrics"].get("kl")
    if kl is not None:
        reasons.append(f"Its KL divergence to the reference is {_shown(kl)} nats a response.")
    known = [c for c in chosen["capabilities"] if c["verdict"] != "no interval"]
    if known:
        names = ", ".join(f"{c['name']} ({c['verdict']})" for c in known)
        reasons.append(f"It has lost no capability that was measured: {names}.")
    for setting in better:
        if regressed(setting) and _value(setting, metric) > _value(chosen, metric):
            reasons.append(
                f"{_name(setting)} has a higher {label}, {_shown(setting['metrics'][metric])}, but lost {_lost(setting)}."
            )
    return {
        **{name: chosen[name] for name in ("method", "label", "setting", "setting_label")},
        "headline": f"{_name(chosen)} is recommended.",
        "reasons": reasons,
        "warnings": _warnings(summary, chosen),
    }


def _warnings(summary: dict[str, Any], chosen: dict[str, Any] | None) -> list[str]:
    found = []
    failed = [run for run in summary["runs"] if run["status"] != "done"]
    if failed:
        found.append(
            f"{len(failed)} of the {len(summary['runs'])} trainings have no result: {', '.join(run['id'] for run in failed)}."
        )
    prompts = summary["dataset"]["prompts"]
    if prompts < _FEW_PROMPTS:
        found.append(
            f"There are {prompts} prompts only. With fewer than {_FEW_PROMPTS}, even large differences may be chance."
        )
    if any(len(setting["seeds"]) - len(setting["failed"]) < 2 for setting in summary["settings"]):
        found.append(
            "Each setting was trained with one seed: the intervals do not know how much another seed would change."
        )
    if chosen is None:
        return found
    metrics, base = chosen["metrics"], summary["base"]["metrics"]
    change = metrics.get("chosen_change")
    if change is not None and change["interval"] is not None and change["interval"][1] < -_NAT:
        found.append(
            f"The chosen responses of held-out pairs have become less probable, as their log-probability has changed by {_shown(change)} nats: it has moved away from what people chose."
        )
    for name, what in (
        ("entropy", "entropy of its responses"),
        ("distinct_2", "share of different word pairs in its responses"),
    ):
        before, after = base.get(name, {}).get("value"), metrics.get(name, {}).get("value")
        if before and after is not None and after < before / 2:
            found.append(f"The {what} is less than half of the reference's: {after:.3g} beside {before:.3g}.")
    before, after = base.get("length", {}).get("value"), metrics.get("length", {}).get("value")
    if before and after is not None and not 2 / 3 < after / before < 1.5:
        found.append(
            f"Its responses have {after:.3g} tokens on average, those of the reference {before:.3g}: the judge or the reward may go by length."
        )
    return found


def _name(setting: dict[str, Any]) -> str:
    return f"{setting['label']} with {setting['setting_label']}" if setting["setting_label"] else setting["label"]


def _value(setting: dict[str, Any], name: str) -> float | None:
    return setting["metrics"].get(name, {}).get("value")


def _shown(estimate: dict[str, Any]) -> str:
    return str(written(estimate))


def _is_better(setting: dict[str, Any], quality: dict[str, Any]) -> bool:
    """Beyond chance, by the paired test, adjusted for the number of settings."""
    better = setting["metrics"][quality["metric"]]["value"] > quality["baseline"]
    p_value = setting["adjusted_p_value"]
    return better and p_value is not None and p_value < _LEVEL


def _as_good(setting: dict[str, Any], top: dict[str, Any]) -> bool:
    """Whether it cannot be told from the best of those that have lost nothing, prompt by prompt."""
    behind = setting["behind_best"]
    return setting is top or behind["p_value"] is None or behind["p_value"] >= _LEVEL


def _seconds(setting: dict[str, Any]) -> float:
    return math.inf if setting["seconds"] is None else setting["seconds"]


def regressed(setting: dict[str, Any]) -> list[str]:
    """The capabilities that a setting has lost."""
    return [capability["name"] for capability in setting["capabilities"] if capability["verdict"] == "regressed"]


def _lost(setting: dict[str, Any]) -> str:
    shown: Sequence[str] = [
        f"{c['name']} ({c['metric']} {c['before']['value']:.3g} before, {c['after']['value']:.3g} after)"
        for c in setting["capabilities"]
        if c["verdict"] == "regressed"
    ]
    return ", ".join(shown)
