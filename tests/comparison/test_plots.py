# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The pictures show what the summary says, where it says it."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from trl_spo.comparison import plots
from trl_spo.comparison.plot_style import (
    COLORS,
    DARK_COLORS,
    MARKERS,
    TOOLTIP,
    best_settings,
    method_marks,
    setting_marks,
)

from .conftest import SUMMARIES


pytestmark = pytest.mark.filterwarnings("error:constrained_layout")  # matplotlib found no place for all


def points(figure: Figure) -> dict[str, tuple[float, float, Line2D]]:
    """What is drawn for one setting each, by what it is called."""
    found = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            if (line.get_gid() or "").startswith(TOOLTIP):
                title = f"{axes.get_title(loc='left')}|" if len(figure.axes) > 1 else ""
                name = title + line.get_gid().removeprefix(TOOLTIP).split(":")[0]
                assert name not in found
                found[name] = (float(line.get_xdata()[0]), float(line.get_ydata()[0]), line)
    return found


def segments(axes, color: str) -> set[tuple[float, ...]]:
    """Both ends of the straight bars of a colour: x, x, y, y."""
    return {
        tuple(round(float(end), 6) for end in (*line.get_xdata(), *line.get_ydata()))
        for line in axes.get_lines()
        if to_hex(line.get_color()) == color and line.get_marker() in ("None", "") and len(line.get_xdata()) == 2
    }


def names(summary: dict[str, Any]) -> list[str]:
    return [f"{setting['label']}, {setting['setting_label']}" for setting in summary["settings"]]


@pytest.mark.parametrize(("axis", "draw"), [("kl", plots.reward_kl), ("entropy", plots.reward_entropy)])
def test_frontiers(summary, axis, draw):
    figure = draw(summary)
    (axes,) = figure.axes
    found, marks = points(figure), setting_marks(summary)
    assert list(found)[0] == "Reference" and list(found)[1:] == names(summary)
    assert found["Reference"][:2] == (0.0 if axis == "kl" else 88.7, -0.06)
    for name, setting, mark in zip(names(summary), summary["settings"], marks, strict=True):
        x, y = setting["metrics"][axis], setting["metrics"]["reward"]
        line = found[name][2]
        assert found[name][:2] == (x["value"], y["value"])
        assert (to_hex(line.get_color()), line.get_marker(), line.get_markersize()) == mark[1:]
        bars = segments(axes, mark.color)
        assert tuple(round(end, 6) for end in (*x["interval"], y["value"], y["value"])) in bars
        assert tuple(round(end, 6) for end in (x["value"], x["value"], *y["interval"])) in bars
    # All checkpoints, but not those of the run that failed, nor of that without a reward
    faint = [line for line in axes.get_lines() if line.get_alpha() == 0.4]
    drawn = Counter((x, y) for line in faint for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True))
    meant = Counter(
        (point["metrics"][axis]["value"], point["metrics"]["reward"]["value"])
        for run in summary["runs"]
        for point in run["points"]
        if "reward" in point["metrics"]
    )
    assert drawn == meant and meant.total() == 25 * 4
    for method, hull in summary["frontiers"][axis].items():
        color = method_marks(summary)[method].color
        lines = [np.array(line.get_xydata()) for line in axes.get_lines() if to_hex(line.get_color()) == color]
        assert any(line.shape == (len(hull), 2) and np.allclose(line, hull) for line in lines)


def test_settings_differ():
    summary = SUMMARIES["many"]()
    marks = setting_marks(summary)
    assert len(set(marks)) == len(marks) == 21
    for method in method_marks(summary):
        of_method = [m for m, s in zip(marks, summary["settings"], strict=True) if s["method"] == method]
        assert len({(m.color, m.marker) for m in of_method}) == 1
        assert [m.size for m in of_method] == sorted(m.size for m in of_method)
    assert len({(m.color, m.marker) for m in marks}) == 7
    for draw in (plots.reward_kl, plots.displacement, plots.diversity):
        figure = draw(summary)
        for legend in figure.legends:  # in the order of the table, row by row
            columns = legend._ncols
            texts = [text.get_text() for text in legend.get_texts()]
            rows = -(-len(texts) // columns)
            longer = len(texts) - columns * (rows - 1)
            starts = [0, *itertools.accumulate(rows if i < longer else rows - 1 for i in range(columns - 1))]
            by_row = [
                texts[start + row]
                for row in range(rows)
                for i, start in enumerate(starts)
                if row < (rows if i < longer else rows - 1)
            ]
            assert by_row[:7] == ["DPO", "IPO", "KTO", "RLHF (RLOO)", "Soft PO", "Stable PO", "SSPO"]


@pytest.mark.parametrize(
    ("name", "metric", "baseline"), [("rich", "reward", -0.06), ("judged", "win_rate", 0.5), ("both", "win_rate", 0.5)]
)
def test_win_rates(name, metric, baseline):
    summary = SUMMARIES["rich" if name == "both" else name]()
    if name == "both":
        for i, setting in enumerate(summary["settings"]):
            setting["metrics"]["win_rate"] = {"value": 0.5 + i / 100, "interval": [0.4, 0.7], "number": 256}
    figure = plots.win_rate(summary)
    (axes,) = figure.axes
    found = points(figure)
    for row, (name, setting, mark) in enumerate(
        zip(names(summary), summary["settings"], setting_marks(summary), strict=True)
    ):
        estimate = setting["metrics"][metric]
        assert found[name][:2] == (estimate["value"], row)
        assert (*(round(end, 6) for end in estimate["interval"]), row, row) in segments(axes, mark.color)
    assert [label.get_text() for label in axes.get_yticklabels()] == names(summary)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is on top
    (line,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert set(line.get_xdata()) == {baseline}


def test_displacement_is_the_mean_over_seeds(summary):
    figure = plots.displacement(summary)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Chosen responses", "Rejected responses"]
    found = points(figure)
    for axes, metric in zip(figure.axes, ("chosen_change", "rejected_change"), strict=True):
        curves = [line for line in axes.get_lines() if len(line.get_xdata()) == 5]
        assert len(curves) == len(summary["settings"])
        for setting in summary["settings"]:
            runs = [run for run in summary["runs"] if run["setting_label"] == setting["setting_label"]]
            runs = [run for run in runs if run["method"] == setting["method"] and run["points"]]
            assert len(runs) == (2 if setting is summary["settings"][0] else 3)
            values = [[point["metrics"][metric]["value"] for point in run["points"]] for run in runs]
            meant = [0.0, *np.mean(values, axis=0)]
            assert any(np.allclose(line.get_ydata(), meant) for line in curves)
        assert all(list(line.get_xdata()) == [0, 50, 100, 150, 200] for line in curves)
    best = {"DPO, β = 0.1", "IPO, β = 0.3", "Soft PO, α = 0.1, β = 0.02", "Stable PO, w = 1"}  # those of `versus`
    assert {name.partition("|")[2] for name in found} == best
    for name, setting in zip(names(summary), summary["settings"], strict=True):
        if name in best:
            x, y, _ = found[f"Chosen responses|{name}"]
            assert (x, y) == (200, setting["metrics"]["chosen_change"]["value"])


def test_without_pairs_there_is_no_displacement():
    assert plots.displacement(SUMMARIES["unpaired"]()) is None


def test_best_settings(summary):
    assert best_settings(summary) == [0, 3, 5, 8]
    summary["versus"] = [row | {"first_setting": "β = 1"} for row in summary["versus"] if row["first"] == "dpo"]
    assert best_settings(summary)[0] == 2  # that which was compared, though another one has more reward
    summary["versus"] = []
    summary["settings"][1]["metrics"]["reward"]["value"] = 9.0
    assert best_settings(summary) == [1, 3, 5, 8]


def test_capabilities_and_diversity(summary):
    figure = plots.capabilities(summary)
    titles = ["arithmetic: exact match (higher is better)", "TinyStories: perplexity (lower is better)"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles
    found = points(figure)
    for i, (axes, title) in enumerate(zip(figure.axes, titles, strict=True)):
        before = summary["settings"][0]["capabilities"][i]["before"]
        (line,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
        assert set(line.get_ydata()) == {before["value"]}
        crossed = []  # intervals of the difference that have no change in them
        xs = []
        for name, setting in zip(names(summary), summary["settings"], strict=True):
            x, y, _ = found[f"{title}|{name}"]
            assert y == setting["capabilities"][i]["after"]["value"]
            xs.append(x)
            low, high = setting["capabilities"][i]["difference"]["interval"]
            ends = [round(before["value"] + end, 6) for end in (low, high)]
            bars = {bar for color in COLORS for bar in segments(axes, color)}
            assert (round(x, 6), round(x, 6), *ends) in bars
            crossed.append(low <= 0 <= high)
        assert crossed == [s["capabilities"][i]["verdict"] == "no difference seen" for s in summary["settings"]]
        assert xs == sorted(xs) and axes.get_xlim()[0] < xs[0] and xs[-1] < axes.get_xlim()[1]

    figure = plots.diversity(summary)
    found = points(figure)
    for axes, metric in zip(figure.axes, plots.DIVERSITY, strict=True):
        base = summary["base"]["metrics"][metric]
        (line,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
        assert set(line.get_ydata()) == {base["value"]}
        (band,) = axes.patches
        assert np.allclose([band.get_y(), band.get_y() + band.get_height()], base["interval"])
    for metric, title in plots.DIVERSITY.items():
        for name, setting in zip(names(summary), summary["settings"], strict=True):
            assert found[f"{title}|{name}"][1] == setting["metrics"][metric]["value"]


def test_cost_and_units(summary):
    figure = plots.cost(summary)
    titles = ["Time, min", "Memory, GiB", "Cost, USD"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles
    for axes, (name, unit) in zip(figure.axes, (("seconds", 60), ("peak_memory", 2**30), ("cost", 1)), strict=True):
        bars = [patch.get_width() for patch in axes.patches]
        assert np.allclose(bars, [setting[name] / unit for setting in summary["settings"]])
        assert axes.get_xlim()[0] == 0
    for seconds, shown in ((119, "Time, s"), (121, "Time, min"), (7300, "Time, h")):
        for setting in summary["settings"]:
            setting |= {"seconds": seconds, "cost": None, "peak_memory": 2**30}
        titles = [axes.get_title(loc="left") for axes in plots.cost(summary).axes]
        assert titles == [shown, "Memory, MiB"]


def test_nothing_is_drawn_of_nothing(summary):
    for name in ("all_failed", "nothing"):
        assert {picture: draw(SUMMARIES[name]()) for picture, draw in plots.PICTURES.items()} == dict.fromkeys(
            plots.PICTURES
        )
    unjudged = SUMMARIES["unjudged"]()
    assert [draw(unjudged) for draw in (plots.reward_kl, plots.reward_entropy, plots.win_rate)] == [None] * 3
    # A part of it: what is there is drawn
    summary["settings"] = summary["settings"][:3]
    summary["settings"][0]["metrics"]["kl"]["value"] = float("inf")
    summary["settings"][1]["metrics"]["kl"]["interval"] = None
    del summary["settings"][2]["metrics"]["reward"]
    assert list(points(plots.reward_kl(summary))) == ["Reference", "DPO, β = 0.3"]


def test_names_stay_text():
    summary = SUMMARIES["one_run"]()
    summary["settings"][0] |= {"label": "$x^2$ <b>", "setting_label": "a$b_c$"}
    figure = plots.reward_kl(summary)
    assert figure.legends[0].get_texts()[0].get_text() == "$x^2$ <b>"
    assert not figure.legends[0].get_texts()[0].get_parse_math()
    assert "$x^2$ <b>, a$b_c$" in points(figure)


def test_labels_hide_nothing():
    summary = SUMMARIES["judged"]()
    for setting in summary["settings"][3:]:
        setting["metrics"]["win_rate"]["value"] -= 0.3
    for setting in summary["settings"]:
        for metric in ("win_rate", "kl"):
            setting["metrics"][metric]["interval"] = None
    figure = plots.reward_kl(summary)
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert [text.get_text() for text in figure.axes[0].texts] == [s["setting_label"] for s in summary["settings"]]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for setting in summary["settings"]:  # all at one place: no label, rather than one that is in the way
        setting["metrics"] |= {"kl": {"value": 5.0, "interval": None, "number": 1}}
        setting["metrics"] |= {"win_rate": {"value": 0.6, "interval": None, "number": 1}}
    assert list(plots.reward_kl(summary).axes[0].texts) == []


# -- colours

# What the colour-blind see of linear RGB: Machado, Oliveira and Fernandes (2009), severity 1
BLIND = {
    "nobody": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color: str) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB."""
    xyz = TO_XYZ @ rgb.clip(0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("colors", [COLORS, DARK_COLORS])
@pytest.mark.parametrize("kind", BLIND)
def test_the_colour_blind_tell_methods_apart(colors, kind):
    seen = [lab(np.array(BLIND[kind]) @ linear(color)) for color in colors]
    distances = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)]
    assert len(colors) == 7 and min(distances) > 12  # about 2.3 is just noticeable


@pytest.mark.parametrize(("colors", "background"), [(COLORS, "#ffffff"), (DARK_COLORS, "#161a20")])
def test_colours_stand_out(colors, background):
    light = [float(TO_XYZ[1] @ linear(color)) for color in (*colors, background)]
    ratios = [(max(one, light[-1]) + 0.05) / (min(one, light[-1]) + 0.05) for one in light[:-1]]
    assert min(ratios) > 3  # WCAG 2 of what is not text


def test_63_methods_differ():
    settings = [{"method": f"m{i}", "label": "", "setting_label": ""} for i in range(64)]
    looks = [(mark.color, mark.marker) for mark in method_marks({"settings": settings}).values()]
    assert len(set(looks[:63])) == 63 == len(COLORS) * len(MARKERS) and looks[63] == looks[0]
