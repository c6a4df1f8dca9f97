# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The pictures of a comparison, from its summary: a figure each, or `None` if nothing of what it shows was measured."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any

from .plot_style import (
    DASHES,
    INK,
    MUTED,
    ROW,
    TOOLTIP,
    best_settings,
    draw_interval,
    draw_point,
    figure_with_legend,
    interval,
    method_marks,
    new_figure,
    picture,
    place_labels,
    setting_marks,
    setting_name,
    shortened,
    value,
)
from .plot_style import (
    check_plots as check_plots,  # its place for those who are going to draw
)
from .report_numbers import duration, estimate, known, memory, money


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _frontier(summary: dict[str, Any], axis: str, label: str) -> Figure | None:
    quality = summary["quality"]
    settings, marks = summary["settings"], setting_marks(summary)
    finals = [
        (setting, mark, setting["metrics"][axis], setting["metrics"][quality["metric"]])
        for setting, mark in zip(settings, marks, strict=True)
        if value(setting["metrics"].get(axis)) is not None
        and value(setting["metrics"].get(quality["metric"])) is not None
    ]
    if not finals:
        return None
    of_method = method_marks(summary)
    faint: dict[str, list[tuple[float, float]]] = {}
    for run in summary["runs"]:
        for point in run["points"]:
            x, y = value(point["metrics"].get(axis)), value(point["metrics"].get(quality["metric"]))
            if x is not None and y is not None:
                faint.setdefault(run["method"], []).append((x, y))

    base = summary["base"]["metrics"]
    x = 0.0 if axis == "kl" else value(base.get(axis))
    y = value(base.get(quality["metric"]))
    y = quality["baseline"] if y is None else y
    figure = figure_with_legend(
        summary, [setting["method"] for setting, *_ in finals], reference="" if x is None or y is None else "star"
    )
    axes = figure.subplots()
    if y is not None:
        axes.axhline(y, color=MUTED, linewidth=1, linestyle=DASHES, zorder=1)
        if x is not None:
            axes.plot(x, y, "*", color=INK, markersize=13, zorder=5, clip_on=False, gid=f"{TOOLTIP}Reference")
    for method, points in faint.items():
        if method in of_method:
            mark = of_method[method]
            axes.plot(
                *zip(*points, strict=True), mark.marker, color=mark.color, markersize=4, alpha=0.4, mew=0, zorder=3.5
            )
    for method, line in summary["frontiers"].get(axis, {}).items():
        if line and method in of_method:
            axes.plot(*zip(*line, strict=True), color=of_method[method].color, linewidth=1.8, zorder=3)
    for setting, mark, x_of, y_of in finals:
        draw_interval(axes, x_of, y_of["value"], mark.color, upright=False)
        draw_interval(axes, y_of, x_of["value"], mark.color, upright=True)
        name = f"{setting_name(setting)}: {quality['label']} {estimate(y_of)}, {label} {estimate(x_of)}"
        draw_point(axes, x_of["value"], y_of["value"], mark, name, zorder=4)
    axes.set(xlabel=f"{label} (nats per response)", ylabel=shortened(quality["label"], 36))
    axes.margins(0.07)
    place_labels(axes, [(x_of, y_of, mark, setting["setting_label"]) for setting, mark, x_of, y_of in finals])
    return figure


@picture
def reward_kl(summary: dict[str, Any]) -> Figure | None:
    """The quality of the policy's responses against its KL divergence from the reference."""
    return _frontier(summary, "kl", "KL from the reference")


@picture
def reward_entropy(summary: dict[str, Any]) -> Figure | None:
    """The quality of the policy's responses against its entropy."""
    return _frontier(summary, "entropy", "Entropy")


def _named_rows(axes: Axes, settings: list[dict[str, Any]], longest: int) -> None:
    names = [shortened(setting_name(setting), longest) for setting in settings]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")


def shown_quality(summary: dict[str, Any]) -> tuple[str, str, float | None] | None:
    """Of the picture of all settings beside each other: metric, label and baseline. Win rates, if there are any."""
    if any(value(setting["metrics"].get("win_rate")) is not None for setting in summary["settings"]):
        return "win_rate", "Win rate against the reference", 0.5
    quality = summary["quality"]
    if any(value(setting["metrics"].get(quality["metric"])) is not None for setting in summary["settings"]):
        base = value(summary["base"]["metrics"].get(quality["metric"]))
        return quality["metric"], quality["label"], quality["baseline"] if base is None else base
    return None


@picture
def win_rate(summary: dict[str, Any]) -> Figure | None:
    """The win rate of each setting with its interval, or its reward if there are no win rates."""
    shown = shown_quality(summary)
    if shown is None:
        return None
    metric, label, baseline = shown
    pairs = list(zip(summary["settings"], setting_marks(summary), strict=True))
    pairs = [(setting, mark) for setting, mark in pairs if value(setting["metrics"].get(metric)) is not None]
    figure = new_figure(max(2.2, 0.9 + ROW * len(pairs)))
    axes = figure.subplots()
    if baseline is not None:
        axes.axvline(baseline, color=MUTED, linewidth=1, linestyle=DASHES, zorder=1)
    for row, (setting, mark) in enumerate(pairs):
        found = setting["metrics"][metric]
        draw_interval(axes, found, row, mark.color, upright=False)
        draw_point(
            axes, found["value"], row, mark._replace(size=7), f"{setting_name(setting)}: {label} {estimate(found)}"
        )
    _named_rows(axes, [setting for setting, _ in pairs], longest=30)
    axes.set_xlabel(shortened(label, 36), loc="right")
    return figure


@picture
def displacement(summary: dict[str, Any]) -> Figure | None:
    """How the log-probabilities of held-out responses change along the training, mean over seeds."""
    settings, marks, best = summary["settings"], setting_marks(summary), best_settings(summary)
    curves: dict[str, list[tuple[int, list[tuple[int, float]]]]] = {"chosen_change": [], "rejected_change": []}
    for metric, found in curves.items():
        for i, setting in enumerate(settings):
            values: dict[int, list[float]] = {}
            runs = [
                r for r in summary["runs"] if (r["method"], r["setting"]) == (setting["method"], setting["setting"])
            ]
            for run in runs:
                for point in run["points"]:
                    if value(point["metrics"].get(metric)) is not None:
                        values.setdefault(point["step"], []).append(point["metrics"][metric]["value"])
            most = max(map(len, values.values()), default=0)  # a mean over fewer runs would jump
            line = [(step, sum(some) / most) for step, some in sorted(values.items()) if len(some) == most]
            if line:
                found.append((i, [(0, 0.0), *line]))
    curves = {metric: found for metric, found in curves.items() if found}
    if not curves:
        return None
    figure = figure_with_legend(
        summary,
        {settings[i]["method"] for found in curves.values() for i, _ in found},
        height=1.0 + 1.7 * len(curves),
    )
    titles = {"chosen_change": "Chosen responses", "rejected_change": "Rejected responses"}
    all_axes = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (metric, found) in zip(all_axes, curves.items(), strict=True):
        axes.axhline(0, color=MUTED, linewidth=1, linestyle=DASHES, zorder=1)
        for i, line in found:
            mark, final = marks[i], settings[i]["metrics"].get(metric)
            steps, means = zip(*line, strict=True)
            if i not in best:
                axes.plot(steps, means, color=mark.color, linewidth=1, alpha=0.4)
                continue
            axes.plot(steps, means, color=mark.color, linewidth=1.8, marker=mark.marker, markersize=3.5, zorder=3)
            if value(final) is not None:
                draw_interval(axes, final, steps[-1], mark.color, upright=True)
                text = f"{setting_name(settings[i])}: {estimate(final, '+')} nats at step {steps[-1]}"
                draw_point(axes, steps[-1], final["value"], mark, text, zorder=4)
        axes.set_title(titles[metric])
        axes.margins(x=0.03)
    all_axes[-1].set_xlabel("Step")
    figure.supylabel("Change of log-probability (nats)", fontsize=11.5)
    return figure


def _strip(
    axes: Axes,
    summary: dict[str, Any],
    found: list[dict[str, Any] | None],
    before: dict[str, Any] | None,
    title: str,
    texts: list[str] | None = None,
) -> None:
    """All settings beside each other, with the reference as a line. `texts` are what they say when pointed at."""
    marks, methods = setting_marks(summary), [setting["method"] for setting in summary["settings"]]
    if value(before) is not None:
        axes.axhline(before["value"], color=INK, linewidth=1, linestyle=DASHES, zorder=1)
        if interval(before) is not None:
            axes.axhspan(*interval(before), color=MUTED, alpha=0.15, linewidth=0)
    at = 0.0
    for i, one in enumerate(found):
        at += 1 if i and methods[i] == methods[i - 1] else 1.8  # a gap between methods
        if value(one) is not None:
            draw_interval(axes, one, at, marks[i].color, upright=True)
            text = str(estimate(one)) if texts is None else texts[i]
            draw_point(axes, at, one["value"], marks[i], f"{setting_name(summary['settings'][i])}: {text}")
    axes.set_xlim(0.8, at + 1)
    axes.set_xticks([])
    axes.set_title(title)
    axes.grid(False, axis="x")


@picture
def capabilities(summary: dict[str, Any]) -> Figure | None:
    """
    The model's capabilities after each training, beside those before. The intervals are those of the difference, case by case: they are
    what the verdicts go by, and narrower than those of both.
    """
    settings = summary["settings"]
    tasks: dict[tuple[str, str], list[dict[str, Any] | None]] = {}
    for i, setting in enumerate(settings):
        for row in setting["capabilities"]:
            if value(row["after"]) is not None:
                tasks.setdefault((row["name"], row["metric"]), [None] * len(settings))[i] = row
    if not tasks:
        return None
    methods = {setting["method"] for i, setting in enumerate(settings) if any(rows[i] for rows in tasks.values())}
    figure = figure_with_legend(summary, methods, 0.7 + 1.75 * len(tasks), line=False, reference="line")
    all_axes = figure.subplots(len(tasks), squeeze=False)[:, 0]
    for axes, ((name, metric), rows) in zip(all_axes, tasks.items(), strict=True):
        measured = [row for row in rows if row is not None]
        better = "higher is better" if measured[0]["higher_is_better"] else "lower is better"
        before = next((row["before"]["value"] for row in measured if value(row["before"]) is not None), None)
        found = [row and {"value": row["after"]["value"], "interval": _beside(row)} for row in rows]
        texts = ["" if row is None else f"{estimate(row['after'])}, {row['verdict']}" for row in rows]
        title = f"{shortened(f'{name}: {metric}', 28)} ({better})"
        _strip(axes, summary, found, {"value": before, "interval": None}, title, texts)
    return figure


def _beside(row: dict[str, Any]) -> list[float] | None:
    """The interval of the difference, from where the model was before."""
    ends, before = interval(row["difference"]), value(row["before"])
    return None if ends is None or before is None else [before + end for end in ends]


@picture
def diversity(summary: dict[str, Any]) -> Figure | None:
    """How diverse the responses of each setting are."""
    settings = summary["settings"]
    found = {name: [setting["metrics"].get(name) for setting in settings] for name in DIVERSITY}
    found = {name: some for name, some in found.items() if any(value(one) is not None for one in some)}
    if not found:
        return None
    methods = {
        setting["method"]
        for i, setting in enumerate(settings)
        if any(value(some[i]) is not None for some in found.values())
    }
    rows = ceil(len(found) / 2)
    figure = figure_with_legend(summary, methods, 0.7 + 1.75 * rows, line=False, reference="line")
    for i, (name, some) in enumerate(found.items()):
        axes = figure.add_subplot(rows, 1 if len(found) == 1 else 2, i + 1)
        _strip(axes, summary, some, summary["base"]["metrics"].get(name), DIVERSITY[name])
    return figure


DIVERSITY = {
    "distinct_1": "Distinct words",
    "distinct_2": "Distinct word pairs",
    "self_bleu": "Self-BLEU",
    "unique": "Unique responses",
}


def _unit(largest: float, units: dict[str, float]) -> tuple[str, float]:
    """The largest unit of which the largest value has at least two."""
    return next(((name, size) for name, size in units.items() if largest >= 2 * size), list(units.items())[-1])


@picture
def cost(summary: dict[str, Any]) -> Figure | None:
    """Time, memory and money that the training of each setting took."""
    settings, marks = summary["settings"], setting_marks(summary)
    currency = summary["cost"]["currency"]
    columns = (
        ("seconds", "Time", {"h": 3600, "min": 60, "s": 1}, duration),
        ("peak_memory", "Memory", {"GiB": 2**30, "MiB": 2**20}, memory),
        ("cost", "Cost", {shortened(currency or "", 4): 1}, lambda some: money(some, currency)),
    )
    columns = [column for column in columns if any(known(setting[column[0]]) for setting in settings)]
    rows = [i for i, setting in enumerate(settings) if any(known(setting[name]) for name, *_ in columns)]
    if not columns:
        return None
    figure = new_figure(max(2.2, 0.9 + ROW * len(rows)))
    all_axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (name, title, units, write) in zip(all_axes, columns, strict=True):
        unit, size = _unit(max(settings[i][name] for i in rows if known(settings[i][name])), units)
        for row, i in enumerate(rows):
            if known(settings[i][name]):
                (bar,) = axes.barh(row, settings[i][name] / size, height=0.62, color=marks[i].color)
                bar.set_gid(f"{TOOLTIP}{setting_name(settings[i])}: {write(settings[i][name])}")
        axes.set_title(f"{title}, {unit}" if unit else title, fontsize=10.5)
        axes.locator_params(axis="x", nbins=3)
        _named_rows(axes, [settings[i] for i in rows], longest=26 if len(columns) > 2 else 30)
    return figure


PICTURES: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
    "reward_kl": reward_kl,
    "reward_entropy": reward_entropy,
    "win_rate": win_rate,
    "displacement": displacement,
    "capabilities": capabilities,
    "diversity": diversity,
    "cost": cost,
}
