# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed in two processes ends, bit for bit, where the uninterrupted run ends."""

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
