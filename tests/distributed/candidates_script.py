# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The scenarios of candidates that the distributed tests run, see `run_scripts.py`."""

import json
import os
from pathlib import Path

import pytest
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_spo.synthetic.candidates import generate_candidates
from trl_spo.synthetic.endpoint import Endpoint
from trl_spo.synthetic.endpoint_student import EndpointStudent
from trl_spo.synthetic.students import TransformersStudent


# Whether a process gathers a model that is sharded, and batches after which the first try is stopped
SCENARIOS = {
    "whole": (True, None),
    "not_gathered": (False, None),
    "resumed": (True, 1),
    "refused": (True, None),
    "object": (True, None),
}


class Student(TransformersStudent):
    """One that notes its batches, and can be stopped after some of them."""

    stop_after: int | None = None

    def generate(self, batches, bar):
        self.batches = []
        for index, responses in super().generate(batches, bar):
            if len(self.batches) == self.stop_after:
                raise KeyboardInterrupt
            self.batches.append(index)
            yield index, responses


def run(world: Path, out: Path, scenario: str) -> None:
    gather, stop_after = SCENARIOS[scenario]
    AcceleratorState._reset_state(reset_partial_state=True)  # of the scripts before
    # Without Gloo by name, DeepSpeed looks for a backend that this machine lacks
    PartialState(cpu=True, **({"backend": "gloo"} if int(os.environ.get("WORLD_SIZE", 1)) > 1 else {}))
    dataset = load_from_disk(str(world / "dataset")).select(range(9)).select_columns(["prompt"])
    dataset = dataset.map(
        lambda row, i: {"prompt": row["prompt"] + " w3" * i}, with_indices=True
    )  # of unequal lengths
    dataset = dataset.add_column("prompt_id", [f"p{i}" for i in range(9)])
    model = str(world / "model")
    if scenario == "object":
        model = AutoModelForCausalLM.from_pretrained(model)
    student = Student(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(world / "model"),
        batch_size=2,
        max_new_tokens=12,
        ds3_gather_for_generation=gather,
        top_k=20,
    )
    path = out / scenario / "candidates.jsonl"
    generated = []
    if stop_after is not None:
        student.stop_after = stop_after
        with pytest.raises(KeyboardInterrupt):
            generate_candidates(dataset, student, path, num_responses=3)
        generated += gather_object(student.batches)
        student.stop_after = None
    generate_candidates(dataset, student, path, num_responses=3)
    generated += gather_object(student.batches)
    if scenario == "refused":  # on all processes, rather than that they wait for each other
        with pytest.raises(ValueError, match="`seed` was 42 and is now 43"):
            generate_candidates(dataset, student, path, num_responses=3, seed=43)
        endpoint = Endpoint(model="teller", base_url="http://127.0.0.1:9/v1", api_key_env=None)
        asking = EndpointStudent(endpoint=endpoint, store=None)
        with pytest.raises(ValueError, match="`EndpointStudent` runs in one process, .* there are 2"):
            generate_candidates(dataset, asking, path, num_responses=3)
    state = Accelerator().state
    if state.is_main_process:
        sharded = hasattr(next(student._loaded.parameters()), "ds_id")
        report = {"type": str(state.distributed_type), "processes": state.num_processes, "sharded": sharded}
        (out / scenario / "report.json").write_text(json.dumps({**report, "generated": generated}))
