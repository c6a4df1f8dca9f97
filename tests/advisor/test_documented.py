# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""That docs/choosing.md knows every finding and every option of the command."""

import argparse
import ast
import re
from pathlib import Path

import trl_spo.advisor
from trl_spo.advisor.gpus import known_gpus
from trl_spo.cli.advise import add_arguments


PAGE = Path(__file__).parents[2] / "docs" / "choosing.md"


def _strings(node):
    if isinstance(node, ast.IfExp):
        return _strings(node.body) + _strings(node.orelse)
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def _codes():
    """The first argument of each `Finding(...)`, and what a loop over codes goes through."""
    found = set()
    for path in Path(trl_spo.advisor.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Finding", "add", "_out_of_range"):
                found.update(_strings(node.args[0]))
            if isinstance(node, ast.For) and ast.unparse(node.target).startswith("(code, "):
                found.update(code for row in node.iter.elts for code in _strings(row.elts[0]))
    return found


def test_codes():
    found = _codes()
    assert len(found) > 50 and {"double_bos", "score_ties", "off_policy", "empty_responses", "alpha_range"} <= found
    table = PAGE.read_text(encoding="utf-8").split("## What is looked for")[1].split("###")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == found


def test_options():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    table = PAGE.read_text(encoding="utf-8").split("| option | default | |")[1].split("**Exit status**")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    ours = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    assert set(re.findall(r"`(--\w+)`", " ".join(rows))) == ours


def test_gpus_of_the_page_are_known():
    names = re.search(r"name of each process's GPU, such as (.*), or its memory", PAGE.read_text(encoding="utf-8"))[1]
    assert set(re.findall(r"`([\w-]+)`", names)) <= set(known_gpus())
