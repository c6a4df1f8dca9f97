# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Matplotlib's pictures as part of an HTML page: in its fonts, in its light or dark colours, and beside others of their kind."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

from markupsafe import Markup

from .plot_style import COLORS, DARK_COLORS, GRID, INK, MUTED, TOOLTIP, Mark, save


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What stands in the page's style for the colours of the pictures
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--axis)",
    GRID: "var(--grid)",
    **{color: f"var(--color-{i})" for i, color in enumerate(COLORS)},
}
_HEX = re.compile(r"#[0-9a-f]{6}")
_FONT = re.compile(r"\s*font-family:[^;]*;?")
_REFERENCE = re.compile(r"(?<=#)[\w.-]+(?=\)$|$)")


def color_styles(dark: bool) -> Markup:
    """Declarations of the methods' colours."""
    colors = DARK_COLORS if dark else COLORS
    return Markup("; ").join(Markup(f"--color-{i}: {color}") for i, color in enumerate(colors))


def inline_svg(figure: Figure, name: str, title: str) -> Markup:
    """
    A picture as an element of an HTML page.

    Args:
        figure (`~matplotlib.figure.Figure`):
            The picture, in the colours of `VARIABLES`.
        name (`str`):
            What its ids start with, since those of several pictures would be the same.
        title (`str`):
            What it is called for those who do not see it.

    Returns:
        `~markupsafe.Markup`: the `<svg>`.
    """
    file = io.StringIO()
    save(figure, file, "svg")
    root = ET.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # Who made it is of no use here, and the style would be that of the whole page
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: text for key, text in element.attrib.items()}
        attributes = element.attrib
        if "style" in attributes:
            style = _FONT.sub("", attributes["style"]).strip()
            attributes["style"] = _HEX.sub(lambda found: VARIABLES.get(found[0], found[0]), style)
        if attributes.get("id", "").startswith(TOOLTIP):
            tooltip = ET.Element("title")
            tooltip.text = attributes.pop("id").removeprefix(TOOLTIP)
            element.insert(0, tooltip)
        elif "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        for key in ("href", "clip-path"):
            if key in attributes:
                attributes[key] = _REFERENCE.sub(lambda found: f"{name}-{found[0]}", attributes[key])
    label = ET.Element("title", {"id": f"{name}-title"})
    label.text = title
    root.insert(0, label)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": f"{name}-title"}
    return Markup(ET.tostring(root, encoding="unicode"))


def marker_svg(mark: Mark) -> Markup:
    """The marker of a setting, for a line of text."""
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(mark.marker)
    (outline,) = style.get_path().transformed(style.get_transform()).to_polygons()
    points = " ".join(f"{x * mark.size:.1f},{-y * mark.size:.1f}" for x, y in outline)
    color = VARIABLES[mark.color]
    return Markup(
        f'<svg class="mark" viewBox="-6 -6 12 12" aria-hidden="true"><polygon points="{points}" fill="{color}"/></svg>'
    )
