# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The fenced code blocks of the documentation."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")


@dataclass(frozen=True)
class Block:
    """A block, `line` being that of its first fence."""

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}:{self.language}"


def pages() -> dict[str, str]:
    """The text of each page, by its name."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def blocks_of(page: str, text: str) -> list[Block]:
    """The blocks of a page in their order, inside of lists and admonitions too. Raises a `ValueError` if one does not end."""
    found, start = [], None
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        fence = _FENCE.match(line)
        if fence is None:
            continue
        if start is None:
            start, mark, language = number, fence[2], fence[3].strip()
        elif fence[2].startswith(mark) and not fence[3].strip():
            content = textwrap.dedent("\n".join(lines[start : number - 1]))
            found.append(Block(page, start, language, content + "\n"))
            start = None
    if start is not None:
        raise ValueError(f"The block in line {start} of {page} does not end.")
    return found
