# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed ends, bit for bit, where the uninterrupted run ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "distributed" / "resume_script.py"
KINDS = ["full", "lora", "alternating", "unrolled_lora", "sspo", "sspo_lora"]
KILLED = [
    ("full", 3),
    ("full", 7),
    ("full", 8),
    ("lora", 5),
    ("alternating", 5),
    ("unrolled_lora", 6),
    ("sspo", 5),
    ("sspo_lora", 6),
]


def run(world: Path, *runs: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(world), *runs]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def assert_killed(result: subprocess.CompletedProcess, folder: Path, kill_at: int) -> None:
    assert result.returncode == -signal.SIGKILL, result.stderr[-5000:]
    assert (folder / f"checkpoint-{kill_at // 2 * 2}").is_dir() and not (folder / "final").exists()


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A folder with what is uninterrupted, and what was killed at a step and resumed, each time in another process."""
    out = tmp_path_factory.mktemp("runs")
    before = [f"{out / 'whole' / kind}@-1" for kind in KINDS]
    for kind, kill_at in KILLED:
        folder = out / f"{kind}_{kill_at}" / kind
        assert_killed(run(world, *before, f"{folder}@{kill_at}"), folder, kill_at)
        before = [f"{folder}@-1"]  # which the next process begins with, to have one less
    last = run(world, *before)
    assert last.returncode == 0, last.stderr[-5000:]
    return out


@pytest.mark.parametrize(("kind", "kill_at"), KILLED)
def test_kill_and_resume(finished, assert_same_weights, kind, kill_at):
    whole, out = finished / "whole" / kind, finished / f"{kind}_{kill_at}" / kind
    assert_same_weights(whole / "final", out / "final")
    if kind not in ("full", "lora"):
        return
    # The samples at the end are the same too, and as old
    states = [json.loads((folder / "checkpoint-10" / "online_samples_0.json").read_text()) for folder in (whole, out)]
    assert states[0] == states[1] and states[0]["step"] == 9 and states[0]["round"] == 4


def test_without_the_samples_it_says_so(world, tmp_path):
    out = tmp_path / "full"
    assert_killed(run(world, f"{out}@5"), out, 5)
    (out / "checkpoint-4" / "online_samples_0.json").unlink()
    result = run(world, f"{out}@-1")
    assert result.returncode == 0, result.stderr[-5000:]
    assert "new ones are drawn" in result.stderr
