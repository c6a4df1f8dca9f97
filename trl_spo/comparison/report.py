# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison: one HTML file that needs nothing else, the same as Markdown, and the pictures as PNG."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trl_spo.synthetic.files import replacing

from .inline_svg import color_styles, inline_svg, marker_svg
from .plot_style import GRID, INK, MUTED, save
from .plots import DIVERSITY, PICTURES, shown_quality
from .report_numbers import NONE, Shown, count, duration, estimate, memory, money
from .report_tables import (
    capability_spread,
    capability_table,
    diversity_table,
    metric_spread,
    quality_metrics,
    recommended_setting,
    runs_table,
    settings_table,
    verdicts_table,
    versus_spread,
    versus_table,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of emphasis, code, links, headings, tables, formulas, HTML, and what is made a link without being marked as one
_SPECIAL = re.compile(r"[\\`*\[\]<>#|~$&]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.|@(?=\w)")
_DPI = 200
_INTERVALS = "95\u00a0% intervals"  # no line ends within
_FORMS = {"preference": "pairs", "ranked": "ranked lists", "unpaired": "single responses"}


class Picture(NamedTuple):
    name: str
    title: str
    caption: str
    figure: Figure


def write_report(summary: dict[str, Any], folder: Path) -> Path:
    """
    Writes `report.html`, `report.md` and a PNG for each picture that there are data for: all of them, or none. Pictures of an earlier
    report that this one has not are removed.

    Args:
        summary (`dict[str, Any]`):
            What came out of the comparison.
        folder (`Path`):
            Where to.

    Returns:
        `Path`: of the HTML file.

    Raises:
        `ImportError`: matplotlib is missing.
    """
    pictures = _pictures(summary)
    texts = [_html(summary, pictures), _markdown(summary, pictures)]
    names = ["report.html", "report.md", *(f"{name}.png" for name in pictures)]
    with replacing(*(folder / name for name in names)) as files:
        for file, text in zip(files, texts, strict=False):
            file.write(text)
        for file, picture in zip(files[2:], pictures.values(), strict=True):
            save(picture.figure, file.buffer, "png", dpi=_DPI, facecolor="white")
    for name in PICTURES.keys() - pictures.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    return folder / "report.html"


def _pictures(summary: dict[str, Any]) -> dict[str, Picture]:
    pictures = {}
    for name, draw in PICTURES.items():
        figure = draw(summary)
        if figure is not None:
            pictures[name] = Picture(name, *_captions(summary, name), figure)
    return pictures


# -- words


def _sentence(intervals: str) -> str:
    return f"Bars: {_INTERVALS} {intervals}." if intervals else "There are no intervals."


def _captions(summary: dict[str, Any], name: str) -> tuple[str, str]:
    """Title and caption of a picture."""
    mean = ", mean over seeds" if _several_seeds(summary) else ""
    methods = [setting["method"] for setting in summary["settings"]]
    sizes = "The later a setting of a method is in the table, the larger is its marker."
    sizes = sizes if len(set(methods)) < len(methods) else ""
    match name:
        case "reward_kl" | "reward_entropy":
            axis = name.removeprefix("reward_")
            metric = summary["quality"]["metric"]
            intervals = _sentence(metric_spread(summary, (metric, axis), "prompts"))
            title = f"{quality_metrics(summary)[metric]} against {'KL' if axis == 'kl' else axis}"
            direction = {
                "kl": "Up and to the left is better: more for less divergence from the reference.",
                "entropy": "Up and to the right is better: more, and with more varied responses.",
            }[axis]
            return title, (
                f"{direction} Solid: the settings at the end of their training. {intervals} Faint: every checkpoint of every run. "
                f"Lines: the most that a method reaches, from the reference on. {sizes}"
            )
        case "win_rate":
            metric, label, baseline = shown_quality(summary)
            line = "" if baseline is None else " Dashed: as good as the reference."
            return f"{label}, by setting", f"{_sentence(metric_spread(summary, (metric,), 'prompts'))}{line}"
        case "displacement":
            intervals = metric_spread(summary, ("chosen_change", "rejected_change"), "held-out pairs")
            at_the_end = f"At the end: {_INTERVALS} {intervals}." if intervals else "There are no intervals."
            return "Log-probability of held-out responses", (
                f"How the log-probability of held-out responses changes against the reference{mean}. Where the line of chosen responses "
                "falls, the model writes what it was to prefer less often than before. Thick: each method's best setting. "
                f"Thin: the others. {at_the_end}"
            )
        case "capabilities":
            intervals = capability_spread(summary, "difference")
            bars = (
                f"Bars: {_INTERVALS} of the difference from it, case by case, {intervals}. Where one does not reach the "
                "line, the capability regressed or improved."
                if intervals
                else _sentence(intervals)
            )
            return "Capabilities after training", f"Dashed: the model before. {bars} {sizes}"
        case "diversity":
            kinds: dict[str, list[str]] = {}  # those of all responses together, and those of each prompt
            for metric, title in DIVERSITY.items():
                kinds.setdefault(metric_spread(summary, (metric,), "prompts"), []).append(title)
            kinds.pop("", None)
            parts = [over if len(kinds) == 1 else f"{over} ({', '.join(of)})" for over, of in kinds.items()]
            intervals = _sentence("; ".join(parts))
            return "Diversity of responses", (
                "Shares of different words, word pairs, and responses to the same prompt: higher is more diverse. Self-BLEU is how "
                f"alike those responses are: lower is more diverse. Dashed, with its interval in grey: the reference. {intervals} {sizes}"
            )
        case "cost":
            kinds = {setting["memory_of"] for setting in summary["settings"]} - {None}
            of = f" Memory: peak of each {' or '.join(sorted(kinds))}." if kinds else ""
            return "What training takes", f"Time: of one training{mean}, without the evaluations.{of}"
    raise ValueError(f"There is no picture {name!r}.")


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    dataset, quality = summary["dataset"], summary["quality"]
    rows = f"{count(dataset['train'])} to train on, {count(dataset['test'])} held out"
    by = quality["by"] if isinstance(quality["by"], str) else ", ".join(quality["by"])
    facts = [
        ("Data", f"{dataset['name']}: {_FORMS[dataset['form']]}, {rows}"),
        ("Judged by" if quality["metric"] == "win_rate" else "Reward", by),
        ("Evaluated on", f"{count(dataset['prompts'])} prompts"),
    ]
    statuses = [run["status"] for run in summary["runs"]]
    others = {"failed": "failed", "unjudged": "not judged"}
    counts = [f"{statuses.count('done')} of {len(statuses)} done"]
    counts += [f"{statuses.count(name)} {text}" for name, text in others.items() if name in statuses]
    facts.append(("Runs", ", ".join(counts)))
    return facts


def _tiles(summary: dict[str, Any]) -> list[tuple[str, Shown]]:
    """What is most worth knowing about the recommended setting."""
    setting = recommended_setting(summary)
    if setting is None:
        return []
    metrics = {**quality_metrics(summary), "kl": "KL, nats", "chosen_change": "Chosen change, nats"}
    tiles = [
        (title, estimate(setting["metrics"].get(name), "+" if name == "chosen_change" else ""))
        for name, title in metrics.items()
    ]
    tiles.append(("Training time", Shown(duration(setting["seconds"]))))
    return [(title, shown) for title, shown in tiles if shown.value != NONE]


def _totals(summary: dict[str, Any]) -> list[tuple[str, str]]:
    cost = summary["cost"]
    totals = [
        ("All trainings", money(cost["training"], cost["currency"])),
        ("Judging", money(cost["judging"], cost["currency"])),
    ]
    return [(title, text) for title, text in totals if text != NONE]


def _machine(summary: dict[str, Any]) -> str:
    machine = summary["machine"]
    parts = [
        machine["device"]
        and (f"{machine['devices']} × " if (machine["devices"] or 1) > 1 else "") + machine["device"],
        machine["cores"] and f"{machine['cores']} cores",
        machine["memory"] and f"{memory(machine['memory'])} of memory",
    ]
    return ", ".join(part for part in parts if part)


def _context(summary: dict[str, Any]) -> dict[str, Any]:
    """What both templates show."""
    settings = settings_table(summary)
    versus = versus_table(summary)
    notes = list(summary["notes"])
    if settings.left_out:
        notes.append(f"Not measured, so not in the table of settings: {', '.join(settings.left_out)}.")
    return {
        "summary": summary,
        "facts": _facts(summary),
        "tiles": _tiles(summary),
        "settings": settings,
        "p_values": any(setting["p_value"] is not None for setting in summary["settings"]),
        "several_seeds": _several_seeds(summary),
        "settings_spread": _settings_spread(summary),
        "verdicts": verdicts_table(summary),
        "versus": versus,
        "told_apart": sum(row[-1].best for row in versus.rows) if versus else 0,
        "versus_spread": versus_spread(summary),
        "capabilities": capability_table(summary),
        "capabilities_spread": capability_spread(summary, "difference"),
        "regressed": _regressed(summary),
        "diversity": diversity_table(summary),
        "runs": runs_table(summary),
        "totals": _totals(summary),
        "failed": [run for run in summary["runs"] if run["status"] != "done"],
        "notes": notes,
        "machine": _machine(summary),
        "missing": NONE,
    }


def _settings_spread(summary: dict[str, Any]) -> str:
    """What the intervals of the table of settings are over."""
    by_prompts = metric_spread(summary, (*quality_metrics(summary), "kl", "entropy", "length"), "prompts")
    by_pairs = metric_spread(summary, ("preference_accuracy", "chosen_change", "rejected_change"), "held-out pairs")
    if not by_prompts or not by_pairs or by_prompts == by_pairs:
        return by_prompts or by_pairs
    return f"{by_prompts} (of accuracy and log-probabilities: {by_pairs})"


def _several_seeds(summary: dict[str, Any]) -> bool:
    return any(len(setting["seeds"]) > 1 for setting in summary["settings"])


def _regressed(summary: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Of each capability: how many settings made it worse, of how many."""
    verdicts: dict[str, list[str]] = {}
    for setting in summary["settings"]:
        for row in setting["capabilities"]:
            if row["after"]["value"] is not None:
                verdicts.setdefault(f"{row['name']} ({row['metric']})", []).append(row["verdict"])
    return [(name, found.count("regressed"), len(found)) for name, found in verdicts.items()]


# -- files


def _html(summary: dict[str, Any], pictures: dict[str, Picture]) -> str:
    environment = Environment(
        loader=PackageLoader("trl_spo.comparison"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        **_context(summary),
        pictures={
            name: (picture, inline_svg(picture.figure, name, picture.title)) for name, picture in pictures.items()
        },
        marker=marker_svg,
        light=Markup(f"--ink: {INK}; --axis: {MUTED}; --grid: {GRID}; ") + color_styles(dark=False),
        dark_colors=color_styles(dark=True),
    )


def _escaped(text: Any) -> str:
    """One line that Markdown shows as it is."""
    if isinstance(text, Markup):
        return text
    text = " ".join("".join(c if c.isprintable() or c == "\u200d" else " " for c in str(text)).split())
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", text)


def _fenced(text: str, language: str = "") -> Markup:
    """A block of code, whatever is in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _markdown(summary: dict[str, Any], pictures: dict[str, Picture]) -> str:
    environment = Environment(
        loader=PackageLoader("trl_spo.comparison"),
        finalize=_escaped,  # all that comes from outside, as `autoescape` does for HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.md.jinja").render(**_context(summary), pictures=pictures, fenced=_fenced)
