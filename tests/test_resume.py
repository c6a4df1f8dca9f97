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


def run(world: Path, out: Path, kill_at: int, *kinds: str) -> int:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(world), *(f"{out / kind}@{kill_at}" for kind in kinds)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr[-5000:]
    return result.returncode


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert run(world, out, -1, "full", "lora", "alternating", "unrolled_lora") == 0
    return out


@pytest.mark.parametrize(
    ("kind", "kill_at"),
    [
        ("full", 3),
        ("full", 7),
        ("full", 8),
        ("lora", 5),
        ("alternating", 5),
        ("unrolled_lora", 6),
    ],
)
def test_kill_and_resume(world, uninterrupted, tmp_path, assert_same_weights, kind, kill_at):
    assert run(world, tmp_path, kill_at, kind) == -signal.SIGKILL
    out, whole = tmp_path / kind, uninterrupted / kind
    last = kill_at // 2 * 2
    assert (out / f"checkpoint-{last}").is_dir() and not (out / "final").exists()
    assert run(world, tmp_path, -1, kind) == 0

    assert_same_weights(whole / "final", out / "final")
    if kind not in ("full", "lora"):
        return
    # The samples at the end are the same too, and as old
    states = [json.loads((folder / "checkpoint-10" / "online_samples_0.json").read_text()) for folder in (whole, out)]
    assert states[0] == states[1] and states[0]["step"] == 9 and states[0]["round"] == 4


def test_without_the_samples_it_says_so(world, tmp_path):
    out = tmp_path / "run"
    assert run(world, out, 5, "full") == -signal.SIGKILL
    (out / "full" / "checkpoint-4" / "online_samples_0.json").unlink()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(world), f"{out / 'full'}@-1"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-5000:]
    assert "new ones are drawn" in result.stderr
