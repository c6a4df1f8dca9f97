# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Advice in the terminal."""

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .advice import Advice
from .findings import SEVERITIES
from .shape import METHODS, TITLES


_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def _facts(advice: Advice) -> list[tuple[str, str]]:
    dataset, shape, training = advice.dataset, advice.shape, advice.training
    rows = f"{dataset['rows']} rows"
    if dataset["total"] is None:
        rows = f"the first {rows} of a stream"
    elif dataset["total"] != dataset["rows"]:
        rows = f"{dataset['rows']} of {dataset['total']} rows"
    rows += f", {dataset['usable']} of them usable"
    if dataset["eval_rows"] is not None:
        rows += f"; {dataset['eval_rows']} to evaluate on"
    facts = [("dataset", rows)]
    if shape.kind is not None:
        kind = f"{shape.kind}, {'conversational' if shape.conversational else 'plain text'}"
        if shape.kind == "pairs":
            kind += ", the prompt within chosen and rejected" if shape.implicit_prompt else ", with a column `prompt`"
        facts.append(("shape", kind))
        facts.append(("possible", ", ".join(TITLES[name] for name in shape.possible)))
    if training["model"] is not None:
        reference = f", reference {training['ref_model']}" if training["ref_model"] else ""
        facts.append(("model", f"{training['model']}{reference}"))
    if training["method"] is not None:
        how = "as recommended" if training["recommended"] else "as asked"
        facts.append(("checked for", f"{TITLES[training['method']]}, {how}"))
    return facts


def print_advice(advice: Advice, console: Console) -> None:
    """
    Prints advice.

    Args:
        advice ([`Advice`]):
            What there is to say.
        console ([`~rich.console.Console`]):
            Where to. Without a terminal, there are no colours.
    """
    with console.capture() as capture:
        _print(advice, console)
    for line in capture.get().splitlines():  # tables fill their lines with spaces
        console.file.write(line.rstrip() + "\n")


def _grid(rows: list[tuple[Text | str, str]], width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=width, overflow="fold")
    table.add_column(overflow="fold")
    for left, right in rows:
        table.add_row(left, Text(right))
    return table


def _print(advice: Advice, console: Console) -> None:
    console.print(_grid([(Text(name, style="bold"), value) for name, value in _facts(advice)], 11))
    console.print()
    recommendation = advice.recommendation
    if recommendation is not None:
        title = Text("Recommended: ", style="bold").append(TITLES[recommendation.method], style="bold green")
        console.print(title.append(f" ({METHODS[recommendation.method]})", style="not bold"))
        console.print(Padding(Text(" ".join(recommendation.reasons)), (0, 0, 0, 2)))
        if recommendation.alternatives:
            others = [(TITLES[other["method"]], other["reason"]) for other in recommendation.alternatives]
            console.print(Text("Others:", style="bold"))
            console.print(Padding(_grid(others, 13), (0, 0, 0, 2)))
        console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("Found", width=7)
    table.add_column("", overflow="fold")
    for finding in advice.findings:
        text = Text(finding.title, style="bold").append(f" [{finding.code}]", style="not bold dim")
        text.append(f"\n{finding.detail}", style="not bold")
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", style="not bold green")
        table.add_row(Text(finding.severity, style=_STYLES[finding.severity]), text, end_section=True)
    console.print(table)
    console.print()
    counts = []
    for severity in SEVERITIES:
        number = advice.count(severity)
        counts.append(f"{number} {severity}{'s' if severity != 'info' and number != 1 else ''}")
    console.print(Text(", ".join(counts), style="bold"))
