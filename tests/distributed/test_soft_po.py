# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Two processes against one: DDP and a real DeepSpeed engine (ZeRO-1, 2 and 3), on the CPU."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT, WORLD = "soft_po_script", "world"
SAME = ["given_samples", "accumulation", "lora", "lora_checkpointing", "no_kl", "sigmoid_weights", "evaluation"]
TYPES = {"ddp": "MULTI_CPU", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
ALL_BUT_ZERO1 = [backend for backend in TYPES if backend != "zero1"]
RUNS = dict.fromkeys(["none", *ALL_BUT_ZERO1], [*SAME, "bf16", "sampling"])
# Which is ZeRO-2 with whole gradients, and in bfloat16 an optimizer of its own
RUNS["zero1"] = ["given_samples", "accumulation", "lora", "bf16"]


@pytest.fixture(scope="module")
def single(results) -> Path:
    return results("none") / SCRIPT


@pytest.fixture(scope="module")
def two(results) -> Callable[[str], Path]:
    """`two(backend)`: the folder of what two processes have made of the scenarios."""
    return lambda backend: results(backend) / SCRIPT


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = {}
    for file in folder.glob("*.safetensors"):
        state.update(load_file(file))
    return state


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("backend", "scenario"), [(backend, name) for backend in TYPES for name in SAME if name in RUNS[backend]]
)
def test_two_processes_end_at_the_weights_of_one(single, two, world, backend, scenario):
    out = two(backend)
    result = report(out / scenario)
    assert TYPES[backend] in result["distributed_type"] and result["processes"] == 2
    expected, found = weights(single / scenario), weights(out / scenario)
    assert expected and expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    start = weights(world / "model")
    if start.keys() == expected.keys():  # and they have moved
        assert max((expected[name] - start[name]).abs().max().item() for name in start) > 1e-3
    # So do the metrics, at every step
    for ours, theirs in zip(result["log"][:-1], report(single / scenario)["log"][:-1], strict=True):
        for name in ("loss", "loss/preference", "rewards/margins", "logps/chosen", "kl/online", "entropy/online"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=5e-3, abs=2e-3), name


@pytest.mark.parametrize("backend", ALL_BUT_ZERO1)
def test_evaluation_gives_the_same_metrics(single, two, backend):
    ours, theirs = (report(out / "evaluation")["evaluation"] for out in (two(backend), single))
    assert "eval_kl/online" in theirs and "eval_rewards/margins" in theirs
    speeds = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    # The processes' batches hold other numbers of rows, and the loss is a mean of means
    for name in theirs.keys() - {*speeds, "eval_loss"}:
        assert ours[name] == pytest.approx(theirs[name], rel=5e-3, abs=2e-3), name


@pytest.mark.parametrize("backend", TYPES)
def test_bf16_is_near_float32(single, two, backend):
    ours, theirs = report(two(backend) / "bf16")["log"][:-1], report(single / "given_samples")["log"][:-1]
    for name in ("loss", "kl/online", "entropy/online"):
        for entry, expected in zip(ours, theirs, strict=True):
            assert entry[name] == pytest.approx(expected[name], rel=0.05, abs=0.02), name


@pytest.mark.parametrize(
    ("backend", "scenario"),
    [(backend, name) for backend in TYPES for name in ("given_samples", "sampling") if name in RUNS[backend]],
)
def test_the_reference_never_moves(two, backend, scenario):
    before, after = report(two(backend) / scenario)["reference"]
    assert before is not None and before == after


@pytest.mark.parametrize("backend", ALL_BUT_ZERO1)
def test_every_process_draws_its_own_samples(two, backend):
    first, second = report(two(backend) / "sampling")["drawn"]
    assert len(first) == len(second) == 8 * 32
    assert first != second
    assert len({tuple(ids) for ids in first + second}) > 100


@pytest.mark.parametrize("backend", ALL_BUT_ZERO1)
def test_the_kl_is_that_of_one_process_to_within_noise(single, two, backend):
    def kl(folder: Path) -> tuple[float, float]:
        log = report(folder / "sampling")["log"][1:-1]  # at the first step it is 0
        # 64 samples a step
        variance = sum(entry["kl/estimator_std"] ** 2 / 64 for entry in log) / len(log) ** 2
        return statistics.mean(entry["kl/online"] for entry in log), variance

    (ours, our_variance), (theirs, their_variance) = kl(two(backend)), kl(single)
    assert theirs > 0
    assert abs(ours - theirs) < 4 * (our_variance + their_variance) ** 0.5
