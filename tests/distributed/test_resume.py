# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed in two processes ends, bit for bit, where the uninterrupted run ends."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT, WORLD = "resume_script", "world"
KINDS = {
    "ddp": ["unrolled_lora", "sspo"],
    "zero2": ["unrolled", "sspo"],
    "zero3": ["alternating", "penalty_sft", "sspo_lora"],
}
REFUSED = {"zero2": "sspo_four_degrees", "zero3": "sspo"}
RUNS = {"none": ["sspo@end"], "zero1": []}
for backend, kinds in KINDS.items():
    RUNS[backend] = [f"whole/{kind}@end" for kind in kinds]
    RUNS[backend] += [f"run/{kind}@{end}" for kind in kinds for end in ("5", "end")]
    RUNS[backend] += [f"refused/{REFUSED[backend]}@error"] if backend in REFUSED else []


def prepare(backend: str, folder: Path, results: Callable[[str], Path]) -> None:
    """What is refused are checkpoints of one process, with other heads or none."""
    if backend in REFUSED:
        other = folder / "refused" / REFUSED[backend]
        shutil.copytree(results("none") / SCRIPT / "sspo", other, ignore=shutil.ignore_patterns("optimizer.pt"))
        if backend == "zero3":
            (other / "checkpoint-10" / "sspo_heads.safetensors").unlink()


@pytest.mark.parametrize(("backend", "kind"), [(backend, kind) for backend in KINDS for kind in KINDS[backend]])
def test_kill_and_resume_in_two_processes(results, assert_same_weights, backend, kind):
    whole, out = (results(backend) / SCRIPT / name / kind for name in ("whole", "run"))
    assert_same_weights(whole / "final", out / "final")
    assert kind.startswith("sspo") == (out / "final" / "sspo_heads.safetensors").is_file()


@pytest.mark.parametrize(
    ("backend", "error"), [("zero2", "num_degrees=4"), ("zero3", "has no sspo_heads.safetensors")]
)
def test_other_degree_heads_are_refused(results, backend, error):
    assert error in (results(backend) / SCRIPT / "refused" / f"{REFUSED[backend]}.txt").read_text()
