# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The tables of a comparison's report, from its summary. The same for HTML and for Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .plot_style import Mark, interval, setting_marks, value
from .plots import DIVERSITY
from .report_numbers import NONE, Shown, count, duration, estimate, known, memory, money, p_value


_LEVEL = 0.05


class Cell(NamedTuple):
    text: str
    note: str | None = None  # beside a name
    interval: str | None = None
    best: bool = False
    verdict: str | None = None  # "better" or "worse"
    mark: Mark | None = None
    tag: str | None = None


class Column(NamedTuple):
    title: str
    unit: str | None = None
    numeric: bool = True


@dataclass
class Table:
    """
    `columns[0]` names the rows. `left_out` has the titles of columns that nothing is known for.
    """

    columns: list[Column]
    rows: list[list[Cell]]
    left_out: list[str] = field(default_factory=list)


def _shown(found: Shown, **options: Any) -> Cell:
    return Cell(found.value, interval=found.interval, **options)


def _named(setting: dict[str, Any], mark: Mark | None = None, tag: str | None = None) -> Cell:
    label = setting["setting_label"]
    return Cell(setting["label"], label.replace(" = ", "\u00a0=\u00a0") if label else None, mark=mark, tag=tag)


def best_of(estimates: list[dict[str, Any] | None], higher: bool = True) -> int | None:
    """The one whose interval is better than those of all others, if its is: they do not overlap."""
    intervals = {i: interval(found) for i, found in enumerate(estimates) if value(found) is not None}
    if len(intervals) < 2 or None in intervals.values():
        return None
    sign = 1 if higher else -1
    best = max(intervals, key=lambda i: sign * estimates[i]["value"])
    worst_of_best = min(sign * end for end in intervals[best])
    others = (max(sign * end for end in ends) for i, ends in intervals.items() if i != best)
    return best if worst_of_best > max(others) else None


def _without_empty(table: Table) -> Table:
    """Leaves out columns that have nothing in any row, but for the first."""
    kept = [i for i in range(len(table.columns)) if i == 0 or any(row[i].text != NONE for row in table.rows)]
    return Table(
        [table.columns[i] for i in kept],
        [[row[i] for i in kept] for row in table.rows],
        [column.title for i, column in enumerate(table.columns) if i not in kept],
    )


def quality_metrics(summary: dict[str, Any]) -> dict[str, str]:
    """The metrics that say how good responses are, with their titles: that of the comparison first."""
    titles = {"reward": "Reward", "win_rate": "Win rate"}
    first = summary["quality"]["metric"]
    others = [
        name
        for name in titles
        if name != first and any(value(setting["metrics"].get(name)) is not None for setting in summary["settings"])
    ]
    return {name: titles[name] for name in [first, *others]}


def settings_table(summary: dict[str, Any]) -> Table:
    """What came out of each setting, below the reference."""
    settings, base = summary["settings"], summary["base"]["metrics"]
    # Name, title, unit, sign, and whether there is a best one
    metrics: list[tuple[str, Column, str, bool]] = [
        *((name, Column(title), "", True) for name, title in quality_metrics(summary).items()),
        ("kl", Column("KL", "nats"), "", False),
        ("entropy", Column("Entropy", "nats"), "", False),
        ("length", Column("Length", "tokens"), "", False),
        ("preference_accuracy", Column("Preference accuracy"), "", True),
        ("chosen_change", Column("Chosen change", "nats"), "+", True),
        ("rejected_change", Column("Rejected change", "nats"), "+", False),
    ]
    columns = [Column("Setting", numeric=False), Column("Seeds")]
    rows = [
        [Cell("Reference"), Cell(NONE)],
        *([_named(s, m, _tag(summary, s)), Cell(_seeds(s))] for s, m in _marked(summary)),
    ]
    for i, (name, column, sign, has_best) in enumerate(metrics):
        estimates = [base.get(name), *(setting["metrics"].get(name) for setting in settings)]
        best = best_of(estimates) if has_best else None
        columns.append(column)
        for j, (row, found) in enumerate(zip(rows, estimates, strict=True)):
            row.append(_shown(estimate(found, sign), best=j == best))
        if i == 0:  # it is about the first metric
            columns.append(Column("p-value"))
            rows[0].append(Cell(NONE))
            for row, setting in zip(rows[1:], settings, strict=True):
                row.append(Cell(p_value(setting["p_value"])))
    currency = summary["cost"]["currency"]
    for name, column, write in (
        ("seconds", Column("Time"), duration),
        ("peak_memory", Column("Memory"), memory),
        ("cost", Column("Cost", currency), money),
    ):
        columns.append(column)
        rows[0].append(Cell(NONE))
        for row, setting in zip(rows[1:], settings, strict=True):
            row.append(Cell(write(setting[name])))
    if all(cell.text == NONE for cell in rows[0][1:]):
        del rows[0]
    return _without_empty(Table(columns, rows))


def _marked(summary: dict[str, Any]) -> Iterable[tuple[dict[str, Any], Mark]]:
    return zip(summary["settings"], setting_marks(summary), strict=True)


def _seeds(setting: dict[str, Any]) -> str:
    total = len(setting["seeds"])
    return f"{total - len(setting['failed'])} of {total}" if setting["failed"] else str(total)


def recommended_setting(summary: dict[str, Any]) -> dict[str, Any] | None:
    found = summary["recommendation"]
    return next(
        (s for s in summary["settings"] if (s["method"], s["setting"]) == (found["method"], found["setting"])), None
    )


def _tag(summary: dict[str, Any], setting: dict[str, Any]) -> str | None:
    return "recommended" if setting is recommended_setting(summary) else None


def verdicts_table(summary: dict[str, Any]) -> Table | None:
    """How often the judge was for the policy, and how often for the reference."""
    columns = [Column("Setting", numeric=False), *map(Column, ("Wins", "Ties", "Losses", "Undecided"))]
    rows = [
        [
            _named(setting, mark),
            *(Cell(count(setting["judged"][name])) for name in ("wins", "ties", "losses", "undecided")),
        ]
        for setting, mark in _marked(summary)
        if setting["judged"] is not None
    ]
    return Table(columns, rows) if rows else None


def versus_table(summary: dict[str, Any]) -> Table | None:
    """The methods' best settings against each other."""
    labels = {setting["method"]: setting["label"] for setting in summary["settings"]}
    rows = []
    for row in summary["versus"]:
        first, second = (
            _named({"label": labels.get(row[which], row[which]), "setting_label": row[f"{which}_setting"]})
            for which in ("first", "second")
        )
        adjusted, difference = row["adjusted_p_value"], value(row["difference"])
        told_apart = known(adjusted) and adjusted < _LEVEL and difference
        better = (labels.get(row["first"]) if difference > 0 else labels.get(row["second"])) if told_apart else None
        rows.append(
            [
                first,
                second,
                _shown(estimate(row["difference"], "+")),
                Cell(p_value(row["p_value"])),
                Cell(p_value(adjusted)),
                Cell(f"{better} is better" if told_apart else "no difference seen", best=bool(told_apart)),
            ]
        )
    columns = [
        Column("Setting", numeric=False),
        Column("Against", numeric=False),
        Column("Difference"),
        Column("p-value"),
        Column("Adjusted p"),
        Column("Verdict", numeric=False),
    ]
    return Table(columns, rows) if rows else None


_VERDICTS = {"regressed": "worse", "improved": "better"}


def capability_table(summary: dict[str, Any]) -> Table | None:
    """Each capability before and after, by capability."""
    tasks: dict[tuple[str, str], list[list[Cell]]] = {}
    for setting, mark in _marked(summary):
        for row in setting["capabilities"]:
            if value(row["after"]) is None:
                continue
            tasks.setdefault((row["name"], row["metric"]), []).append(
                [
                    _named(setting, mark),
                    Cell(f"{row['name']}, {row['metric']}"),
                    _shown(estimate(row["before"])),
                    _shown(estimate(row["after"])),
                    _shown(estimate(row["difference"], "+")),
                    Cell(row["verdict"], verdict=_VERDICTS.get(row["verdict"])),
                ]
            )
    columns = [
        Column("Setting", numeric=False),
        Column("Capability", numeric=False),
        Column("Before"),
        Column("After"),
        Column("Difference"),
        Column("Verdict", numeric=False),
    ]
    return Table(columns, [row for rows in tasks.values() for row in rows]) if tasks else None


def diversity_table(summary: dict[str, Any]) -> Table | None:
    metrics = {**DIVERSITY, "finished": "Finished"}
    sources = [(Cell("Reference"), summary["base"]["metrics"])]
    sources += [(_named(setting, mark), setting["metrics"]) for setting, mark in _marked(summary)]
    rows = [[name, *(_shown(estimate(found.get(metric))) for metric in metrics)] for name, found in sources]
    table = _without_empty(Table([Column("Setting", numeric=False), *map(Column, metrics.values())], rows))
    return table if len(table.columns) > 1 and any(c.text != NONE for row in table.rows[1:] for c in row[1:]) else None


def runs_table(summary: dict[str, Any]) -> Table:
    """What each training took, and where it is."""
    columns = [
        Column("Run", numeric=False),
        Column("Status", numeric=False),
        Column("Time"),
        Column("Memory"),
        Column("Cost", summary["cost"]["currency"]),
        Column("Folder", numeric=False),
    ]
    rows = [
        [
            Cell(run["id"]),
            Cell(
                {"unjudged": "not judged"}.get(run["status"], run["status"]),
                verdict=None if run["status"] == "done" else "worse",
            ),
            Cell(duration(run["seconds"])),
            Cell(memory(run["peak_memory"])),
            Cell(money(run["cost"])),
            Cell(run["folder"] or NONE),
        ]
        for run in summary["runs"]
    ]
    return _without_empty(Table(columns, rows))


def trainings(summary: dict[str, Any], setting: dict[str, Any], metric: str | None = None) -> int:
    """How many trainings of a setting have come to their end, and have a metric there."""
    return sum(
        point["final"] and (metric is None or value(point["metrics"].get(metric)) is not None)
        for run in summary["runs"]
        if (run["method"], run["setting"]) == (setting["method"], setting["setting"])
        for point in run["points"]
    )


def spread(found: Iterable[tuple[dict[str, Any] | None, int]], noun: str) -> str:
    """
    What 95 % intervals are over, for a caption.

    Args:
        found (`Iterable[tuple[dict, int]]`):
            Estimates, each with the number of trainings that it is the mean of. Of several, its own number is theirs, or that of the other
            units if it is over both.
        noun (`str`):
            What the other units are.

    Returns:
        `str`: such as `"over 3 seeds"`, or empty without any interval.
    """
    numbers: dict[str, set[int]] = {}
    for one, of in found:
        if value(one) is not None and interval(one) is not None:
            kind = "one" if of < 2 else "seeds" if one["number"] <= of else "both"
            numbers.setdefault(kind, set()).add(one["number"])
    parts = []
    if "both" in numbers:
        parts.append(f"over seeds and {_range(numbers['both'])} {noun}")
    if "seeds" in numbers:
        parts.append(f"over {_range(numbers['seeds'])} seeds")
    if "one" in numbers:
        parts.append(f"over {_range(numbers['one'])} {noun}" + (" where there is one seed" if parts else ""))
    return ", ".join(parts)


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def metric_spread(summary: dict[str, Any], metrics: Iterable[str], noun: str) -> str:
    """What the intervals of metrics are over."""
    settings = summary["settings"]
    return spread(
        (
            (setting["metrics"].get(name), trainings(summary, setting, name))
            for name in metrics
            for setting in settings
        ),
        noun,
    )


def versus_spread(summary: dict[str, Any]) -> str:
    """What the intervals of the differences between methods are over."""
    metric = summary["quality"]["metric"]
    of = {(s["method"], s["setting_label"]): trainings(summary, s, metric) for s in summary["settings"]}
    found = []
    for row in summary["versus"]:
        both = ((row[which], row[f"{which}_setting"]) for which in ("first", "second"))
        found.append((row["difference"], max(of.get(setting, 0) for setting in both)))
    return spread(found, "prompts")


def capability_spread(summary: dict[str, Any], which: str) -> str:
    """What the intervals of capabilities are over: `which` is `"before"`, `"after"` or `"difference"`."""
    found = ((row[which], trainings(summary, s)) for s in summary["settings"] for row in s["capabilities"])
    return spread(found, "cases")
