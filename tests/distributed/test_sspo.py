# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""SSPO in two processes against one: DDP and a real DeepSpeed engine (ZeRO-1, 2 and 3), on the CPU."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_spo.sspo.degree_heads import DegreeHeads


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT, WORLD = "sspo_script", "odd_world"
_spec = importlib.util.spec_from_file_location(SCRIPT, Path(__file__).parent / f"{SCRIPT}.py")
_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_script)
SCENARIOS = list(_script.SCENARIOS)
TYPES = {"ddp": "MULTI_CPU", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
HEADS = "sspo_heads.safetensors"
EXTRA = [*_script.UNEQUAL, *_script.BF16, *_script.REENTRANT]
# ZeRO-1 and 2 share their optimizer
SAME = {backend: SCENARIOS if backend != "zero1" else ["default", "decayed_heads"] for backend in TYPES}
ALL_BUT_ZERO1 = [backend for backend in TYPES if backend != "zero1"]
RUNS = {"none": SCENARIOS, **SAME, **{backend: [*SAME[backend], *EXTRA] for backend in ALL_BUT_ZERO1}}


def pairs(*names: str) -> pytest.MarkDecorator:
    runs = [(backend, name) for backend in SAME for name in names if name in SAME[backend]]
    return pytest.mark.parametrize(("backend", "scenario"), runs)


@pytest.fixture(scope="module")
def single(results) -> Path:
    return results("none") / SCRIPT


@pytest.fixture(scope="module")
def two(results) -> Callable[[str], Path]:
    """`two(backend)`: the folder of what two processes have made of the scenarios."""
    return lambda backend: results(backend) / SCRIPT


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the model's own files and of the heads'."""
    own = {name: value for file in folder.glob("*model*.safetensors") for name, value in load_file(file).items()}
    heads = {f"degree_heads.{name}": value for name, value in load_file(folder / HEADS).items()}
    assert own and heads and not own.keys() & heads.keys()
    return {**own, **heads}


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def entries(folder: Path) -> list[dict]:
    """What the training and the evaluations have logged, without the summary at the end."""
    return [entry for entry in report(folder)["log"] if "loss" in entry or "eval_loss" in entry]


def is_compared(name: str, scenario: str) -> bool:
    if name in ("eval_loss", "eval_loss/alignment"):  # means of a batch, with the examples that it is padded with
        return scenario in _script.UNPADDED  # where there are none
    return "degree" in name or name in ("loss", "loss/alignment")


def assert_same_run(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    for one, other in zip(entries(found), entries(expected), strict=True):
        assert one.keys() == other.keys()
        names = [name for name in other if is_compared(name, found.name)]
        assert len(names) >= 7
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=5e-3, abs=2e-3), name


@pairs(*SCENARIOS)
def test_two_processes_end_at_the_weights_of_one(single, two, backend, scenario):
    folder = two(backend) / scenario
    result = report(folder)
    assert TYPES[backend] in result["distributed_type"] and result["processes"] == 2
    assert_same_run(folder, single / scenario)


@pytest.mark.parametrize("backend", ["zero2", "zero3"])
def test_kto_of_deepspeed_is_that_of_ddp(two, backend):
    folder = two(backend) / "kto"
    assert_same_run(folder, two("ddp") / "kto")
    log = entries(folder)
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    assert max(entry["kl"] for entry in log if "kl" in entry) > 0.01


@pytest.mark.parametrize("backend", ALL_BUT_ZERO1)
@pytest.mark.parametrize(("scenario", "full"), [("bf16", "default"), ("bf16_lora_text", "lora_text")])
def test_bf16_is_near_float32(single, two, backend, scenario, full):
    """Autocast, or under DeepSpeed weights in bfloat16: the heads move as in full precision."""
    log = entries(two(backend) / scenario)
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    for ours, theirs in zip(log, entries(single / full), strict=True):
        for name in ("loss/degree_chosen", "loss/degree_rejected"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=0.03), name
    start = DegreeHeads.from_pretrained(single / full / "start").state_dict()
    ends = [DegreeHeads.from_pretrained(folder).state_dict() for folder in (two(backend) / scenario, single / full)]
    moves = [torch.cat([(end[name].float() - start[name]).flatten() for name in start]) for end in ends]
    assert moves[1].norm() > 0.1 and (moves[0] - moves[1]).norm() < 0.5 * moves[1].norm()


@pairs(*SCENARIOS)
def test_the_files_are_those_of_an_ordinary_model(two, backend, scenario):
    folder = two(backend) / scenario
    files = list(folder.glob("*model*.safetensors"))
    assert files and not [name for file in files for name in load_file(file) if "degree_heads" in name]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not [name for name in model.state_dict() if "degree_heads" in name]


@pairs(*SCENARIOS)
def test_which_heads_move(two, backend, scenario):
    folder = two(backend) / scenario
    start, end = (DegreeHeads.from_pretrained(place).state_dict() for place in (folder / "start", folder))
    assert end.keys() == start.keys() and all(value.dtype == torch.float32 for value in end.values())
    for name in start:
        if scenario == "fixed_heads" or scenario == "rejected_only" and name.startswith("chosen"):
            assert torch.equal(end[name], start[name]), name
        else:
            assert (end[name] - start[name]).abs().max() > 5e-3, name


@pairs("fixed_heads", "decayed_heads")
def test_the_model_keeps_its_own_learning_rate_and_decay(odd_world, two, backend, scenario):
    start, end = load_file(odd_world / "model" / "model.safetensors"), weights(two(backend) / scenario)
    for name in start:
        assert 1e-3 < (end[name] - start[name]).abs().max() < 5e-3, name


@pairs("decayed_heads")
def test_the_heads_have_their_own_decay(two, backend, scenario):
    folder = two(backend) / scenario
    start, end = (DegreeHeads.from_pretrained(place).state_dict() for place in (folder / "start", folder))
    for name in start:  # three times by a half, besides the steps
        assert (end[name] - start[name] / 8).abs().max() < 0.03, name


@pairs("best", "lora_best")
def test_the_best_model_is_loaded_with_its_heads(two, backend, scenario):
    folder = two(backend) / scenario
    best = folder / Path(report(folder)["best"]).name
    assert best.name != "checkpoint-3" and (folder / "checkpoint-3" / HEADS).is_file()
    expected, found, last = weights(best), weights(folder), weights(folder / "checkpoint-3")
    assert expected.keys() == found.keys() == last.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
        assert not torch.equal(found[name], last[name]), name


@pytest.mark.parametrize("backend", ALL_BUT_ZERO1)
def test_reentrant_checkpointing_with_shortened_texts_is_refused(two, backend):
    for process in range(2):
        error = (two(backend) / f"reentrant_{process}.txt").read_text()
        assert "removal='text'" in error and "use_reentrant" in error


def test_the_scenarios_test_something(two):
    """Batches without key content and batches of one label, on one of the processes; all levels are told apart."""
    empty = report(two("ddp") / "empty_accumulation")
    assert {batch["key"] for batch in empty["batches"]} >= {0, 1}
    assert 0.5 < max(entry.get("degree/empty", 0) for entry in empty["log"]) < 1
    labels = [batch["labels"] for batch in report(two("ddp") / "kto_apo")["batches"]]
    assert [True] in labels and [False, True] in labels
    default = [entry for entry in entries(two("ddp") / "default") if "loss" in entry]
    for level in range(3):
        assert max(entry[f"degree/chosen_recall_{level}"] for entry in default) > 0
    assert sum("eval_degree/key_share" in entry for entry in report(two("ddp") / "text")["log"]) == 3
