# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Candidates of two processes are those of one, byte for byte: under DDP and with DeepSpeed's engine, on the CPU."""

import json
from collections import Counter
from pathlib import Path

import pytest


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT, WORLD = "candidates_script", "world"
SCENARIOS = ["whole", "resumed", "refused"]
ALONE = ["whole", "object"]
TYPES = {"ddp": "MULTI_CPU", "zero3": "DEEPSPEED"}
RUNS = {"none": ALONE, "ddp": SCENARIOS, "zero1": [], "zero2": [], "zero3": [*SCENARIOS, "not_gathered", "object"]}


@pytest.mark.parametrize(("backend", "scenario"), [(backend, name) for backend in TYPES for name in RUNS[backend]])
def test_two_processes_write_the_file_of_one(results, backend, scenario):
    expected = results("none") / SCRIPT / (scenario if scenario in ALONE else "whole")
    found: Path = results(backend) / SCRIPT / scenario
    report = json.loads((found / "report.json").read_text())
    assert TYPES[backend] in report["type"] and report["processes"] == 2
    assert report["sharded"] == (backend == "zero3")
    names = ["candidates.jsonl", "candidates.settings.json"]
    assert sorted(file.name for file in found.iterdir()) == [*names, "report.json"]
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    # Five batches, of which one process has two and the first one again
    times = Counter(report["generated"])
    assert set(times) == set(range(5)) and sum(times.values()) == 6
