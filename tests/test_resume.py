# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed ends, bit for bit, where the uninterrupted run ends."""

import json
import os
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


def run(world: Path, *runs: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(world), *runs]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stderr


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> tuple[Path, str]:
    """A folder with what is uninterrupted, and what was killed at a step and resumed, and what the resumed ones have said."""
    out = tmp_path_factory.mktemp("runs")
    whole, killed = [out / "whole" / kind for kind in KINDS], {}
    for kind, kill_at in KILLED:
        killed[out / f"{kind}_{kill_at}" / kind] = kill_at
    killed[out / "without_samples" / "full"] = 5
    run(world, *[f"{folder}@end" for folder in whole], *[f"{folder}@{step}" for folder, step in killed.items()])
    (out / "without_samples" / "full" / "checkpoint-4" / "online_samples_0.json").unlink()
    return out, run(world, *[f"{folder}@end" for folder in killed])


@pytest.mark.parametrize(("kind", "kill_at"), KILLED)
def test_kill_and_resume(finished, assert_same_weights, kind, kill_at):
    whole, out = finished[0] / "whole" / kind, finished[0] / f"{kind}_{kill_at}" / kind
    assert_same_weights(whole / "final", out / "final")
    if kind not in ("full", "lora"):
        return
    # The samples at the end are the same too, and as old
    states = [json.loads((folder / "checkpoint-10" / "online_samples_0.json").read_text()) for folder in (whole, out)]
    assert states[0] == states[1] and states[0]["step"] == 9 and states[0]["round"] == 4


def test_without_the_samples_it_says_so(finished):
    out, stderr = finished
    assert (out / "without_samples" / "full" / "final").is_dir()
    assert stderr.count("new ones are drawn") == 1  # the others have theirs
