# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which method a comparison speaks for, and why.

The rule: of the settings that are better than the reference beyond chance and have lost no capability, those that none of higher quality is better than
beyond chance, prompt by prompt; of these, the best among the quickest to train. What speaks against it is said, too.
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
            several = f", adjusted for {len(measured)} settings" if len(measured) > 1 else ""
            reasons.append(
                f"By the paired test{several}, none is better than the reference. More prompts or seeds may tell them apart, or more training."
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
    sound.sort(key=lambda setting: -_value(setting, metric))
    # Those that none above them is better than: the first is among them
    equals = [s for i, s in enumerate(sound) if all(_alike(s, higher) for higher in sound[:i])]
    quick = [setting for setting in equals if _seconds(setting) <= _QUICK * min(map(_seconds, equals))]
    top, chosen = sound[0], quick[0]
    label = "reward" if metric == "reward" else "win rate"
    reasons = [
        f"Its {label} is {_shown(chosen['metrics'][metric])}, beside {number(quality['baseline'])} of the reference."
    ]
    rest = [setting for setting in measured if setting is not chosen and not regressed(setting)]
    others = sorted((s for s in rest if _alike(s, chosen)), key=lambda setting: -_value(setting, metric))
    if others:
        reasons.append(f"It cannot be told from {_named(others, metric)}, prompt by prompt.")
    elif rest and all(_value(setting, metric) < _value(chosen, metric) for setting in rest):
        reasons.append("It is better than each of the others that lost no capability, prompt by prompt.")
    if chosen is not top:
        reasons.append(
            f"{_name(top)} is higher, but its training took {_seconds(top) / _seconds(chosen):.1f} times as long."
        )
    kl = chosen["metrics"].get("kl")
    if kl is not None:
        reasons.append(f"Its KL divergence to the reference is {_shown(kl)} nats a response.")
    known = [c for c in chosen["capabilities"] if c["verdict"] != "no interval"]
    if known:
        names = ", ".join(f"{c['name']} ({c['verdict']})" for c in known)
        reasons.append(f"It has lost no capability that was measured: {names}.")
    for setting in measured:
        if _value(setting, metric) > _value(chosen, metric) and setting not in sound:
            why = f"lost {_lost(setting)}" if regressed(setting) else "is not better than the reference beyond chance"
            reasons.append(f"{_name(setting)} has a higher {label}, {_shown(setting['metrics'][metric])}, but {why}.")
    return {
        **{name: chosen[name] for name in ("method", "label", "setting", "setting_label")},
        "headline": f"{_name(chosen)} is recommended.",
        "reasons": reasons,
        "warnings": _warnings(summary, chosen),
    }


def _warnings(summary: dict[str, Any], chosen: dict[str, Any] | None) -> list[str]:
    found = []
    for status, what in (("failed", "have no result"), ("unjudged", "were not judged")):
        runs = [run["id"] for run in summary["runs"] if run["status"] == status]
        if runs:
            found.append(f"{len(runs)} of the {len(summary['runs'])} trainings {what}: {', '.join(runs)}.")
    prompts = summary["dataset"]["prompts"]
    if prompts < _FEW_PROMPTS:
        found.append(
            f"There are {prompts} prompts only. With fewer than {_FEW_PROMPTS}, even large differences may be chance."
        )
    of_seeds = [(setting, len(setting["seeds"]) - len(setting["failed"])) for setting in summary["settings"]]
    single = [setting for setting, number in of_seeds if number == 1]
    if single:
        of_all = all(number < 2 for _, number in of_seeds)
        found.append(
            f"There is one seed of {'each setting' if of_all else _named(single)}: the intervals do not know how much another seed would change."
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


def _named(settings: Sequence[dict[str, Any]], metric: str | None = None) -> str:
    """The first of them, with what they have of a metric."""
    shown = [_name(s) if metric is None else f"{_name(s)} ({_shown(s['metrics'][metric])})" for s in settings[:_NAMED]]
    return ", ".join(shown) + (f" and {len(settings) - _NAMED} more" if len(settings) > _NAMED else "")


def _value(setting: dict[str, Any], name: str) -> float | None:
    return setting["metrics"].get(name, {}).get("value")


def _shown(estimate: dict[str, Any]) -> str:
    return str(written(estimate))


def _is_better(setting: dict[str, Any], quality: dict[str, Any]) -> bool:
    """Beyond chance, by the paired test, adjusted for the number of settings."""
    better = setting["metrics"][quality["metric"]]["value"] > quality["baseline"]
    p_value = setting["adjusted_p_value"]
    return better and p_value is not None and p_value < _LEVEL


def _alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two that have lost nothing cannot be told apart, prompt by prompt."""
    p_value = first["p_values"][second["id"]]
    return p_value is None or p_value >= _LEVEL


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
