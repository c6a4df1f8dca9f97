# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed in two processes ends, bit for bit, where the uninterrupted run ends."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = Path(__file__).parent / "resume_script.py"


KINDS = {
    "ddp": ["unrolled_lora", "sspo"],
    "zero2": ["unrolled", "sspo"],
    "zero3": ["alternating", "penalty_sft", "sspo_lora"],
}
REFUSED = {"zero2": "sspo_four_degrees", "zero3": "sspo"}


@pytest.fixture(scope="module")
def of_one_process(world, launch, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("of_one_process")
    launch("none", SCRIPT, str(world), f"{out / 'sspo'}@end", processes=1)
    return out / "sspo"


@pytest.fixture(scope="module")
def finished(world, of_one_process, launch, tmp_path_factory) -> Callable[[str], Path]:
    """`finished(backend)`: a folder with what is uninterrupted, what was killed and resumed, and what was refused."""

    @functools.cache
    def run(backend: str) -> Path:
        folder = tmp_path_factory.mktemp(backend)
        runs = [f"{folder / 'whole' / kind}@end" for kind in KINDS[backend]]
        for kind in KINDS[backend]:
            runs += [f"{folder / 'run' / kind}@5", f"{folder / 'run' / kind}@end"]
        if backend in REFUSED:
            other = folder / "refused" / REFUSED[backend]
            shutil.copytree(of_one_process, other, ignore=shutil.ignore_patterns("optimizer.pt"))
            if backend == "zero3":
                (other / "checkpoint-10" / "sspo_heads.safetensors").unlink()
            runs += [f"{other}@error"]
        launch(backend, SCRIPT, str(world), *runs)
        return folder

    return run


@pytest.mark.parametrize(("backend", "kind"), [(backend, kind) for backend in KINDS for kind in KINDS[backend]])
def test_kill_and_resume_in_two_processes(finished, assert_same_weights, backend, kind):
    whole, out = (finished(backend) / name / kind for name in ("whole", "run"))
    assert_same_weights(whole / "final", out / "final")
    assert kind.startswith("sspo") == (out / "final" / "sspo_heads.safetensors").is_file()


@pytest.mark.parametrize(
    ("backend", "error"), [("zero2", "num_degrees=4"), ("zero3", "has no sspo_heads.safetensors")]
)
def test_other_degree_heads_are_refused(finished, backend, error):
    assert error in (finished(backend) / "refused" / f"{REFUSED[backend]}.txt").read_text()
