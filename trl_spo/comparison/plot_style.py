# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the pictures of a comparison have in common. A method has the same colour and marker in all of them, and of its settings, each
later one in the table has a larger marker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from .report_numbers import known


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that the colour-blind tell apart too, by light and by dark, and markers for print in black and white. Their numbers have no
# common divisor, so that 63 methods differ in one or the other.
COLORS = ("#0072b2", "#c44a00", "#00966c", "#c25a9b", "#c28800", "#3c2a78", "#55606b")
DARK_COLORS = ("#5ab0f0", "#f07a3c", "#35c9a0", "#e58fc0", "#f7dc6f", "#8468f0", "#d7dde6")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
INK, MUTED, GRID = "#1d2129", "#5d6675", "#e3e6eb"  # of text, axes and grid
TOOLTIP = "tooltip: "  # what the id of an element starts with that says what it shows

_WIDTH, _HEIGHT = 5.2, 3.6  # inches: two of them beside each other fill a page, and one is readable on a phone
ROW = 0.27  # inches of a row of text
DASHES = (0, (4, 3))  # of what the others are compared with
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11.5,
    "text.color": INK,
    "text.parse_math": False,  # a name may have a dollar sign
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "svg.fonttype": "none",  # text stays text
}


def check_plots() -> None:
    """Raises an `ImportError` that names the extra if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError(
            "The pictures of a comparison need matplotlib, which the extra `plots` installs: run "
            '`pip install "trl-spo[plots]"`.'
        )


class Mark(NamedTuple):
    """How a setting is drawn. `size` is in points."""

    number: int
    color: str
    marker: str
    size: float


def method_marks(summary: dict[str, Any]) -> dict[str, Mark]:
    """By method, in the order of the settings."""
    methods = dict.fromkeys(setting["method"] for setting in summary["settings"])
    return {
        method: Mark(i, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], 7.0) for i, method in enumerate(methods)
    }


def setting_marks(summary: dict[str, Any]) -> list[Mark]:
    """Of each setting: that of its method, and larger than that of the one before."""
    of_method, marks = method_marks(summary), []
    for i, setting in enumerate(summary["settings"]):
        methods = [some["method"] for some in summary["settings"]]
        number, before = methods.count(setting["method"]), methods[:i].count(setting["method"])
        size = 7.0 if number == 1 else 5.5 + 4.5 * before / (number - 1)
        marks.append(of_method[setting["method"]]._replace(size=size))
    return marks


def shortened(text: str, longest: int) -> str:
    """A text from outside that may be longer than there is place for."""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def setting_name(setting: dict[str, Any]) -> str:
    return f"{setting['label']}, {setting['setting_label']}" if setting["setting_label"] else setting["label"]


def best_settings(summary: dict[str, Any]) -> list[int]:
    """Of each method, the setting that was compared with the other methods' best ones, or else the one of the best quality."""
    settings = summary["settings"]
    compared = {(row[which], row[f"{which}_setting"]) for row in summary["versus"] for which in ("first", "second")}
    metric = summary["quality"]["metric"]

    def rank(i: int) -> tuple[bool, float]:
        found = value(settings[i]["metrics"].get(metric))
        return (settings[i]["method"], settings[i]["setting_label"]) in compared, float(
            "-inf"
        ) if found is None else found

    best = {}
    for i, setting in enumerate(settings):
        if setting["method"] not in best or rank(i) > rank(best[setting["method"]]):
            best[setting["method"]] = i
    return list(best.values())


def value(found: dict[str, Any] | None) -> float | None:
    """The value of an estimate, if it can be drawn."""
    return found["value"] if found and known(found["value"]) else None


def picture(draw: Callable[[dict[str, Any]], Figure | None]) -> Callable[[dict[str, Any]], Figure | None]:
    """Draws with our style, and settles what matplotlib would otherwise do with another one when the picture is saved."""

    @wraps(draw)
    def picture(summary: dict[str, Any]) -> Figure | None:
        check_plots()
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            figure = draw(summary)
            if figure is not None:
                figure.get_layout_engine().execute(figure)
                figure.set_layout_engine("none")
        return figure

    return picture


def save(figure: Figure, file: Any, format: str, **options: Any) -> None:
    """Writes a picture that is the same byte by byte each time: `format` is `"png"` or `"svg"`."""
    import matplotlib

    dates = {"png": {"Software": None}, "svg": {"Date": None}}[format]
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "trl_spo"}):
        figure.savefig(file, format=format, metadata=dates, **options)


def new_figure(height: float = _HEIGHT) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.04)
    return figure


def figure_with_legend(
    summary: dict[str, Any], methods: Iterable[str], height: float = _HEIGHT, *, line: bool = True, reference: str = ""
) -> Figure:
    """A figure with a legend below the space for its axes. `reference` is how the reference is drawn: a `"star"`, a `"line"` or not."""
    from matplotlib.lines import Line2D

    labels = {setting["method"]: shortened(setting["label"], 22) for setting in summary["settings"]}
    drawn = set(methods)
    handles = [
        Line2D(
            [],
            [],
            color=mark.color,
            marker=mark.marker,
            markersize=7,
            linestyle="-" if line else "",
            label=labels[method],
        )
        for method, mark in method_marks(summary).items()
        if method in drawn
    ]
    if reference == "star":
        handles.append(Line2D([], [], color=INK, marker="*", markersize=11, linestyle="", label="Reference"))
    elif reference == "line":
        handles.append(Line2D([], [], color=INK, linewidth=1, linestyle=DASHES, label="Reference"))
    columns = min(len(handles), 3 if max(len(handle.get_label()) for handle in handles) <= 11 else 2)
    handles = [handle for column in range(columns) for handle in handles[column::columns]]  # row by row
    figure = new_figure(height + ROW * (ceil(len(handles) / columns) - 1))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.4)
    return figure


def draw_point(axes: Axes, x: float, y: float, mark: Mark, tooltip: str, **options: Any) -> None:
    (point,) = axes.plot(
        x, y, marker=mark.marker, markersize=mark.size, color=mark.color, linestyle="", clip_on=False, **options
    )
    point.set_gid(TOOLTIP + tooltip)


def interval(found: dict[str, Any] | None) -> list[float] | None:
    """The interval of an estimate, if it can be drawn."""
    return found["interval"] if found and found["interval"] and all(map(known, found["interval"])) else None


def draw_interval(axes: Axes, found: dict[str, Any], at: float, color: str, upright: bool) -> None:
    ends, other = interval(found), [at, at]
    if ends is not None:
        axes.plot(*((other, ends) if upright else (ends, other)), color=color, linewidth=1.3, solid_capstyle="butt")


def place_labels(axes: Axes, points: list[tuple[dict[str, Any], dict[str, Any], Mark, str]]) -> None:
    """
    Names the settings beside their points, estimates of x and y, if all names find a place where they hide neither each other nor a
    point nor its intervals.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    if len(points) > 9 or any(len(name) > 22 for *_, name in points):
        return
    axes.figure.get_layout_engine().execute(axes.figure)
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    pixels = axes.figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    taken = []
    for x, y, mark, _ in points:
        center, half = axes.transData.transform((x["value"], y["value"])), mark.size / 2 * pixels
        taken.append(Bbox([center - half, center + half]))
        across = [(end, y["value"]) for end in interval(x) or ()]
        upright = [(x["value"], end) for end in interval(y) or ()]
        taken.extend(Bbox(axes.transData.transform(ends)).padded(1) for ends in (across, upright) if ends)
    placed = []
    for x, y, mark, name in points:
        gap = mark.size / 2 + 2
        for dx, dy, left, up in (
            (gap, -gap, "left", "top"),
            (-gap, gap, "right", "bottom"),
            (gap, gap, "left", "bottom"),
            (-gap, -gap, "right", "top"),
            (2 * gap, 0, "left", "center"),
            (-2 * gap, 0, "right", "center"),
            (0, 2 * gap, "center", "bottom"),
            (0, -2 * gap, "center", "top"),
        ):
            text = axes.annotate(
                name,
                (x["value"], y["value"]),
                (dx, dy),
                textcoords="offset points",
                ha=left,
                va=up,
                fontsize=10.5,
                in_layout=False,
            )
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                placed.append(text)
                break
            text.remove()
        else:
            for text in placed:
                text.remove()
            return
