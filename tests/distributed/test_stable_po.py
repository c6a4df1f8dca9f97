# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Stable PO in two processes against one: DDP and a real DeepSpeed engine (ZeRO-1, 2 and 3), on the CPU."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT, WORLD = "stable_po_script", "odd_world"
_spec = importlib.util.spec_from_file_location(SCRIPT, Path(__file__).parent / f"{SCRIPT}.py")
_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_script)
SCENARIOS = list(_script.SCENARIOS)
TYPES = {"ddp": "MULTI_CPU", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
RUNS = {"none": SCENARIOS, **dict.fromkeys(TYPES, [*SCENARIOS, *_script.BF16])}
# Which is ZeRO-2 with whole gradients, and in bfloat16 an optimizer of its own
RUNS["zero1"] = [
    "penalty_lower_level",
    "alternating_accumulation",
    "unrolled_accumulation",
    "unrolled_lora",
    *_script.BF16,
]


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


def entries(folder: Path) -> list[dict]:
    """What the training and the evaluations in between have logged, without the summary at the end."""
    return [entry for entry in report(folder)["log"] if "loss" in entry or "eval_loss" in entry]


@pytest.mark.parametrize(
    ("backend", "scenario"), [(backend, name) for backend in TYPES for name in SCENARIOS if name in RUNS[backend]]
)
def test_two_processes_end_at_the_weights_of_one(single, two, backend, scenario):
    out = two(backend)
    result = report(out / scenario)
    assert TYPES[backend] in result["distributed_type"] and result["processes"] == 2
    expected, found = weights(single / scenario), weights(out / scenario)
    assert expected and expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    logs = [entries(folder / scenario) for folder in (out, single)]
    for ours, theirs in zip(*logs, strict=True):
        for name in theirs:
            if name == "stable/gradient_cosine" and "DEEPSPEED" in result["distributed_type"]:
                continue  # it keeps the outer gradient to itself
            if any(part in name for part in ("stable/", "logps/", "displacement/", "loss", "rewards/")):
                assert ours[name] == pytest.approx(theirs[name], rel=5e-3, abs=2e-3), name


@pytest.mark.parametrize("backend", TYPES)
def test_alternating_in_bf16_is_near_float32(single, two, odd_world, backend):
    """DeepSpeed computes with weights in bfloat16, which round an inner step off; its master weights have all of it."""
    start = weights(odd_world / "model")
    ends = weights(single / "alternating_inner"), weights(two(backend) / "alternating_bf16")
    expected, found = (torch.cat([(end[name].float() - start[name]).flatten() for name in start]) for end in ends)
    assert expected.norm() > 0.01 * torch.cat([weight.flatten() for weight in start.values()]).norm()
    assert (found - expected).norm() < 0.4 * expected.norm()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_scenario_tests_something(single, scenario):
    """The lower level moves the weights, or the penalty is open, in each of them."""
    log = [entry for entry in entries(single / scenario) if "loss" in entry]
    if scenario.startswith(("alternating", "unrolled")) or "lower_level" in scenario:
        assert min(entry["stable/inner_step_norm"] for entry in log) > 1e-4
        assert min(entry["stable/sft_gain"] for entry in log) > 0
    if "bilevel" not in _script.SCENARIOS[scenario]:
        assert max(entry["stable/penalty_active"] for entry in log) > 0
