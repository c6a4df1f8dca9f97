# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What came out of a comparison, in one dict that JSON can hold: `comparison.json`, from which the report is made."""

import itertools
import os
import platform
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml

from ..evaluation.capability import compare_capability
from ..evaluation.evaluation import SHARES, Evaluation
from ..evaluation.frontier import upper_frontier
from ..evaluation.statistics import crossed_difference, crossed_estimate, holm
from ..synthetic.redaction import without_secrets
from ..synthetic.store import AnswerStore
from .comparison_config import COMPARED, ComparisonConfig
from .data import ComparisonData
from .recommendation import recommend, regressed


_PACKAGES = ("trl_spo", "trl", "transformers", "torch", "accelerate")
_COUNTS = ("wins", "ties", "losses", "undecided")


def summarize(
    config: ComparisonConfig,
    command: str | None,
    data: ComparisonData,
    evaluation: Evaluation,
    base: dict[str, Any],
    results: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """
    Brings the results of all trainings together.

    Args:
        config ([`ComparisonConfig`]):
            The run.
        command (`str`, *optional*):
            The command to repeat it.
        data ([`ComparisonData`]):
            Its data.
        evaluation ([`~trl_spo.evaluation.Evaluation`]):
            Its evaluation.
        base (`dict[str, Any]`):
            What was measured of the reference.
        results (`Sequence[dict[str, Any]]`):
            Of each training: its `run`, `status`, `error`, `stage`, `seconds`, `peak_memory`, and what was `found` at each of its `points`.

    Returns:
        `dict[str, Any]`: see docs/compare.md.
    """
    metric = "win_rate" if config.critics else "reward"
    quality = {
        "metric": metric,
        "label": "Win rate against the reference" if config.critics else "Reward",
        "by": [critic["name"] for critic in config.critics] if config.critics else config.reward,
        "baseline": 0.5 if config.critics else base["metrics"]["reward"]["value"],
    }
    notes = list(data.notes)
    settings = [_setting(of_setting, base, metric) for of_setting in _by_setting(results).values()]
    for result in results:
        result["cost"] = _cost(config, result, result["seconds"])
    for setting, of_setting in zip(settings, _by_setting(results).values(), strict=True):
        setting["cost"] = _mean([result["cost"] for result in of_setting])
    best = _best_of_methods(settings, metric)
    _add_tests(settings, results, metric)
    for setting, p_value in zip(settings, holm([setting["p_value"] for setting in settings]), strict=True):
        setting["adjusted_p_value"] = p_value
    versus = _versus(best, results, metric)
    if len(best) > 1:
        notes.append(
            "The best setting of each method was chosen on the same prompts that it is compared on, which favours the methods with more settings."
        )
    if any(result["run"].method in ("rloo", "grpo") for result in results):
        notes.append("The time of RLHF has that of its reward model in it.")
    if config.evaluation.checkpoints > 1 and any(result["run"].is_unrolled for result in results):
        notes.append(
            "Of Stable PO with `bilevel: unrolled`, the end is evaluated only: its checkpoints are θ, and what is deployed is θ', which is made of it then."
        )
    summary: dict[str, Any] = {
        "versions": {name: version(name) for name in _PACKAGES},
        "machine": _machine(config),
        "command": command,
        "config": yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True),
        "model": config.model,
        "dataset": {
            "name": config.dataset.path,
            "form": data.forms[0],
            "train": data.rows["train"],
            "test": data.rows["test"],
            "prompts": len(evaluation.prompts),
        },
        "quality": quality,
        "base": {"metrics": base["metrics"]},
        "runs": [_run(result) for result in results],
        "settings": settings,
        "frontiers": {name: _frontiers(results, base, quality, name) for name in ("kl", "entropy")},
        "versus": versus,
        "cost": _total_cost(config, results, evaluation),
        "notes": notes,
    }
    summary["recommendation"] = recommend(summary)
    return summary


def _by_setting(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    order = {name: i for i, name in enumerate(COMPARED)}
    for result in sorted(results, key=lambda result: order[result["run"].method]):
        groups.setdefault(result["run"].setting_id, []).append(result)
    return groups


def _run(result: dict[str, Any]) -> dict[str, Any]:
    run = result["run"]
    points = [
        {"step": point["step"], "final": point["final"], "metrics": point["found"]["metrics"]}
        for point in result["points"]
    ]
    names = ("status", "error", "stage", "seconds", "peak_memory", "memory_of", "cost")
    return {
        "id": run.id,
        **{name: getattr(run, name) for name in ("method", "label", "setting", "setting_label", "seed")},
        **{name: result[name] for name in names},
        "folder": f"runs/{run.id}",
        "points": points,
    }


def _final(result: dict[str, Any]) -> dict[str, Any] | None:
    return next((point["found"] for point in result["points"] if point["final"]), None)


def _units(results: Sequence[dict[str, Any]], name: str) -> np.ndarray | None:
    """Of the trainings that have a metric, its values by prompt or pair, `(S, N)`."""
    found = [_final(result) for result in results]
    rows = [final["units"][name] for final in found if final is not None and name in final["units"]]
    return np.array(rows) if rows else None


def _setting(results: Sequence[dict[str, Any]], base: dict[str, Any], quality: str) -> dict[str, Any]:
    run = results[0]["run"]
    found = [final for result in results if (final := _final(result)) is not None]
    metrics = {}
    for name in dict.fromkeys(name for final in found for name in final["metrics"]):
        values = _units(results, name)
        if values is not None:
            # Of one training, with the interval that suits the metric
            metrics[name] = (
                crossed_estimate(values, name in SHARES)
                if len(values) > 1
                else next(f["metrics"][name] for f in found if name in f["units"])
            )
        else:  # of all responses together
            of_seeds = [final["metrics"][name]["value"] for final in found]
            if len(found) == 1:
                metrics[name] = found[0]["metrics"][name]
            elif None not in of_seeds:
                metrics[name] = crossed_estimate(np.array(of_seeds)[:, None], name in SHARES)
                metrics[name]["number"] = len(of_seeds)  # what its interval is over
    judged = [final["metrics"]["win_rate"] for final in found if "win_rate" in final["metrics"]]
    capabilities = []
    for i, capability in enumerate(base["capabilities"]):
        after = [final["capabilities"][i]["units"] for final in found if final["capabilities"]]
        if after:
            compared = compare_capability(capability["metric"], np.array(capability["units"]), np.array(after))
            capabilities.append({"name": capability["name"], "metric": capability["metric"], **compared})
    values = _units(results, quality)
    p_value = None
    if values is not None:
        of_base = np.full((1, values.shape[1]), 0.5) if quality == "win_rate" else np.array([base["units"]["reward"]])
        p_value = crossed_difference(values, of_base)["p_value"]
    return {
        **{name: getattr(run, name) for name in ("method", "label", "setting", "setting_label")},
        "id": run.setting_id,
        "seeds": [result["run"].seed for result in results],
        "failed": [result["run"].seed for result in results if result["status"] != "done"],
        "metrics": metrics,
        "judged": {name: sum(of_run[name] for of_run in judged) for name in _COUNTS} if judged else None,
        "p_value": p_value,
        "capabilities": capabilities,
        "seconds": _mean([result["seconds"] for result in results]),
        "peak_memory": max((result["peak_memory"] for result in results if result["peak_memory"]), default=None),
        "memory_of": next((result["memory_of"] for result in results if result["memory_of"]), None),
    }


def _best_of_methods(settings: Sequence[dict[str, Any]], quality: str) -> list[dict[str, Any]]:
    """Of each method the setting with the highest quality."""
    best: dict[str, dict[str, Any]] = {}
    for setting in settings:
        if setting["metrics"].get(quality, {}).get("value") is not None:
            other = best.get(setting["method"])
            if other is None or setting["metrics"][quality]["value"] > other["metrics"][quality]["value"]:
                best[setting["method"]] = setting
    return list(best.values())


def _add_tests(settings: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], quality: str) -> None:
    """Of those that have lost no capability, the p-values against each other's quality, prompt by prompt."""
    groups = _by_setting(results)
    for setting in settings:
        setting["p_values"] = {}
    sound = [s for s in settings if s["metrics"].get(quality, {}).get("value") is not None and not regressed(s)]
    for first, second in itertools.combinations(sound, 2):
        values = [_units(groups[setting["id"]], quality) for setting in (first, second)]
        p_value = crossed_difference(*values)["p_value"]
        first["p_values"][second["id"]] = second["p_values"][first["id"]] = p_value


def _versus(best: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], quality: str) -> list[dict[str, Any]]:
    """The best settings of all methods, two by two, prompt by prompt."""
    groups, found = _by_setting(results), []
    for i, first in enumerate(best):
        for second in best[i + 1 :]:
            values = [_units(groups[setting["id"]], quality) for setting in (first, second)]
            difference = crossed_difference(*values)
            found.append(
                {
                    "first": first["method"],
                    "first_setting": first["setting_label"],
                    "second": second["method"],
                    "second_setting": second["setting_label"],
                    "p_value": difference.pop("p_value"),
                    "difference": difference,
                }
            )
    for one, p_value in zip(found, holm([one["p_value"] for one in found]), strict=True):
        one["adjusted_p_value"] = p_value
    return found


def _frontiers(
    results: Sequence[dict[str, Any]], base: dict[str, Any], quality: dict[str, Any], x: str
) -> dict[str, list[tuple[float, float]]]:
    """Of each method, of its points' means over the seeds. Against entropy, quality is bought by less of it, so that the frontier goes to the left."""
    start = (0.0 if x == "kl" else base["metrics"]["entropy"]["value"], quality["baseline"])
    groups: dict[str, dict[Any, list[tuple[float, float]]]] = {}
    for result in results:
        for i, point in enumerate(result["points"]):
            metrics = point["found"]["metrics"]
            y = metrics.get(quality["metric"], {}).get("value")
            if y is not None:
                key = (result["run"].setting_id, "end" if point["final"] else i)
                groups.setdefault(result["run"].method, {}).setdefault(key, []).append((metrics[x]["value"], y))
    sign = 1 if x == "kl" else -1
    frontiers = {}
    for method, points in groups.items():
        means = [tuple(np.mean(of_seeds, axis=0).tolist()) for of_seeds in points.values()]
        hull = upper_frontier([(sign * a, b) for a, b in [start, *means]])
        frontiers[method] = sorted((sign * a, b) for a, b in hull)
    return frontiers


def _mean(values: Sequence[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def _devices(config: ComparisonConfig) -> int:
    return config.num_processes or max(torch.cuda.device_count(), 1)


def _cost(config: ComparisonConfig, result: dict[str, Any], seconds: float | None) -> float | None:
    if config.price_per_hour is None or seconds is None:
        return None
    return config.price_per_hour * result["processes"] * seconds / 3600


def _total_cost(config: ComparisonConfig, results: Sequence[dict[str, Any]], evaluation: Evaluation) -> dict[str, Any]:
    training = [result["cost"] for result in results if result["cost"] is not None]
    shared: dict[int, list[float]] = {}  # a reward model that several trainings have is paid once
    for result in results:
        if result["cost"] is not None and result["reward_seconds"]:
            shared.setdefault(result["run"].seed, []).append(_cost(config, result, result["reward_seconds"]))
    training += [-sum(costs[1:]) for costs in shared.values()]
    judging = None
    if config.critics:
        with AnswerStore(evaluation.store_path) as store:
            judging = store.cost()
    return {
        "training": sum(training) if training else None,
        "judging": judging,
        "currency": config.currency if training or judging else None,
    }


def _machine(config: ComparisonConfig) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": device,
        "devices": _devices(config),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _plain(config: ComparisonConfig) -> dict[str, Any]:
    """What differs from the defaults, without what is secret in the critics."""
    values = asdict(config)
    plain = {}
    for f in fields(config):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        default = asdict(default) if hasattr(default, "__dataclass_fields__") else default
        if values[f.name] != default:
            plain[f.name] = values[f.name]
    return without_secrets(plain)
