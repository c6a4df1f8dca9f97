# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import PartialState
from datasets import Dataset, load_dataset

from trl_spo.advisor.findings import Finding
from trl_spo.advisor.rows import Rows, read_rows
from trl_spo.advisor.shape import find_shape


DATA = Path(__file__).parents[3] / "shared" / "data"
REAL = (
    "hh_helpful_pairs",
    "qa_feedback_pairs",
    "pandalm_human_pairs",
    "llmbar_human_pairs",
    "gsm8k_correct_vs_wrong_pairs",
)


@pytest.fixture(scope="session", autouse=True)
def _state():
    PartialState()  # which the loggers of the trainers' own checks ask for


@pytest.fixture(scope="session")
def real_data(tmp_path_factory) -> Callable[[str], Dataset]:
    """A function from the name of a file of real data to the dataset. Skips where there is none."""
    if not DATA.is_dir():
        pytest.skip(f"there is no real data: {DATA} is missing")
    cache = str(tmp_path_factory.mktemp("cache"))

    def load(name: str) -> Dataset:
        return load_dataset("json", data_files=str(DATA / f"{name}.jsonl.gz"), split="train", cache_dir=cache)

    return load


@pytest.fixture(scope="session")
def stories() -> str:
    """The folder of a real small model."""
    if not DATA.is_dir():
        pytest.skip(f"there is no real model: {DATA / 'stories260K'} is missing")
    return str(DATA / "stories260K")


def rows_of(dataset: Dataset) -> Rows:
    shape, findings = find_shape(dataset)
    assert findings == []
    return read_rows(dataset, shape)


def make_pairs(*triples: tuple, **columns: list) -> Dataset:
    """Pairs of prompt, chosen, rejected."""
    prompts, chosen, rejected = (list(column) for column in zip(*triples, strict=True))
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected, **columns})


def make_unpaired(*triples: tuple) -> Dataset:
    prompts, completions, labels = (list(column) for column in zip(*triples, strict=True))
    return Dataset.from_dict({"prompt": prompts, "completion": completions, "label": labels})


def codes(findings: list[Finding]) -> dict[str, str]:
    """Severity by code."""
    return {finding.code: finding.severity for finding in findings}


def only(findings: list[Finding], code: str) -> Finding:
    (finding,) = (finding for finding in findings if finding.code == code)
    return finding
