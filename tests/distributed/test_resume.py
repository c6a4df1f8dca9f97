# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed in two processes ends, bit for bit, where the uninterrupted run ends."""

import shutil
from pathlib import Path

import pytest


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = Path(__file__).parent / "resume_script.py"


@pytest.mark.parametrize(
    ("backend", "kinds"),
    [
        ("ddp", ["unrolled_lora", "sspo"]),
        ("zero2", ["unrolled", "sspo"]),
        ("zero3", ["alternating", "penalty_sft", "sspo_lora"]),
    ],
)
def test_kill_and_resume_in_two_processes(world, launch, tmp_path, assert_same_weights, backend, kinds):
    whole, out = tmp_path / "whole", tmp_path / "run"
    before = [f"{whole / kind}@-1" for kind in kinds]
    for kind in kinds:
        with pytest.raises(AssertionError, match="SIGKILL"):
            launch(backend, SCRIPT, str(world), *before, f"{out / kind}@5")
        assert (out / kind / "checkpoint-4").is_dir() and not (out / kind / "checkpoint-6").exists()
        before = [f"{out / kind}@-1"]  # which the next launch begins with, to have one less
    launch(backend, SCRIPT, str(world), *before)
    for kind in kinds:
        assert_same_weights(whole / kind / "final", out / kind / "final")
        assert kind.startswith("sspo") == (out / kind / "final" / "sspo_heads.safetensors").is_file()


@pytest.fixture(scope="module")
def of_one_process(world, launch, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("of_one_process")
    launch("none", SCRIPT, str(world), f"{out / 'sspo'}@-1", processes=1)
    return out / "sspo"


@pytest.mark.parametrize(
    ("backend", "kind", "missing", "error"),
    [
        ("zero2", "sspo_four_degrees", None, "num_degrees=4"),
        ("zero3", "sspo", "sspo_heads.safetensors", "has no sspo_heads.safetensors"),
    ],
)
def test_other_degree_heads_are_refused(world, of_one_process, launch, tmp_path, backend, kind, missing, error):
    out = shutil.copytree(of_one_process, tmp_path / kind, ignore=shutil.ignore_patterns("optimizer.pt"))
    if missing:
        (out / "checkpoint-10" / missing).unlink()
    with pytest.raises(AssertionError, match=error):
        launch(backend, SCRIPT, str(world), f"{out}@-1")
