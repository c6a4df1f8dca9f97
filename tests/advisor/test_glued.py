# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Pairs that were glued together: of the real data, which are none, and of the same data glued at random."""

import numpy as np
import pytest
from datasets import Dataset
from tests.advisor.conftest import REAL, codes, make_pairs, only, rows_of

from trl_spo.advisor.glued import _other_rows, glued_findings, glued_share, words


def _glue(dataset: Dataset, share: float, seed: int, which: str = "rejected") -> Dataset:
    """What becomes of single ratings: the other response is that of any other row."""
    rng = np.random.default_rng(seed)
    rows = dataset.to_list()
    others = rng.permutation(len(rows))
    glued = rng.random(len(rows)) < share
    return Dataset.from_list(
        [
            {**row, which: rows[other][which]} if take else row
            for row, other, take in zip(rows, others, glued, strict=True)
        ]
    )


def _some(dataset: Dataset, number: int = 400) -> Dataset:
    return dataset.shuffle(seed=0).select(range(min(number, len(dataset))))


def _found(dataset: Dataset, seed: int = 0) -> list:
    return glued_findings(dataset, rows_of(dataset), seed)


@pytest.mark.parametrize("name", REAL)
def test_no_false_alarms_on_real_data(name, real_data):
    assert _found(_some(real_data(name))) == []


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("which", ["chosen", "rejected"])
def test_glued_real_data_is_found(name, which, real_data):
    finding = only(_found(_glue(_some(real_data(name)), 1.0, 1, which)), "glued_pairs")
    # Of chosen responses, it may be that they are refusals
    assert finding.severity == ("error" if which == "rejected" else "warning") and finding.data["which"] == which
    low, high = finding.data[which]["interval"]
    assert low < 1.0 < high + 0.03
    assert finding.data[f"relevance_{which}"] == pytest.approx(0.5, abs=0.05)  # chance


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_share_is_estimated(share, real_data):
    found = _found(_glue(_some(real_data("gsm8k_correct_vs_wrong_pairs"), 800), share, 2))
    if share < 0.3:  # too few to tell from responses that ignore their prompt
        assert "glued_pairs" not in codes(found)
    else:
        finding = only(found, "glued_pairs")
        assert finding.severity == "warning"
        low, high = finding.data["rejected"]["interval"]
        assert low < share < high and high - low < 0.1


def _answers(n: int) -> list[tuple[str, str, str]]:
    """Answers in the words of their questions, and one word that all have."""
    return [(f"what about{i} topic{i}", f"about{i} well fine", f"topic{i} well bad") for i in range(n)]


def test_others_have_another_prompt():
    prompts = np.array([7] * 40 + list(range(100, 120)))
    others = _other_rows(prompts, np.random.default_rng(0))
    assert (prompts[others] != prompts[:, None]).all() and len(np.unique(others)) > 50


def test_estimate_by_hand():
    # u of the others is 1; two of eight of these are at chance
    one, other = np.array([1.0] * 6 + [0.0, 1.0] * 1), np.ones(8)
    found = glued_share(one, other, np.arange(8))
    assert found["estimate"] == pytest.approx(1 - (7 / 8 - 0.5) / 0.5)
    assert glued_share(one, np.full(8, 0.55), np.arange(8)) is None  # says nothing


def test_interval_covers_the_truth():
    # Of the others, nine in ten have to do with their prompt; of these, a share of 0.4 is glued
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        relevant = rng.random((2, 400)) < 0.9
        relevant[0] &= rng.random(400) >= 0.4
        one, other = np.where(relevant, 1.0, rng.integers(0, 2, size=(2, 400)))
        low, high = glued_share(one, other, np.arange(400))["interval"]
        hits += low <= 0.4 <= high
    assert 270 <= hits <= 297


def test_too_few_rows_say_nothing():
    dataset = make_pairs(*_answers(40))
    assert _found(_glue(dataset, 1.0, 0)) == []
    assert "glued_pairs" in codes(_found(_glue(make_pairs(*_answers(100)), 1.0, 0)))
    assert _found(make_pairs(*_answers(100))) == []


def test_one_prompt_cannot_be_glued():
    dataset = make_pairs(*(("Review:", f" good film number {i}", f" bad film number {i}") for i in range(100)))
    assert _found(_glue(dataset, 1.0, 0)) == []


def test_words_in_common_are_none_in_another_language():
    dataset = make_pairs(*((f"frage{i} nach etwas", f"answer{i} good", f"reply{i} bad") for i in range(200)))
    assert _found(_glue(dataset, 1.0, 0)) == []


def test_scripts_without_spaces():
    assert words("日本語 and a Word") == {"日本", "本語", "word"}
    signs = [chr(0x4E00 + i) for i in range(400)]
    rows = [
        (
            "".join(signs[2 * i : 2 * i + 2]) + "吗",
            "".join(signs[2 * i : 2 * i + 2]),
            "不" + "".join(signs[2 * i : 2 * i + 2]),
        )
        for i in range(200)
    ]
    assert _found(make_pairs(*rows)) == []
    assert "glued_pairs" in codes(_found(_glue(make_pairs(*rows), 1.0, 0)))


def test_few_words_are_canned():
    refusals = ("I cannot help with that request.", "Sorry, this might cause harm to somebody.")
    rows = [(f"what about{i} topic{i}", refusals[i % 2], f"topic{i} bad") for i in range(200)]
    finding = only(_found(make_pairs(*rows)), "canned_responses")
    assert finding.severity == "info" and finding.data["which"] == "chosen"
    # "cannot", "help", "with", "that", "request", "sorry", "this", "might", "cause", "harm", "somebody"
    assert finding.data["words"] == {"chosen": 11, "rejected": 200}
    half = [(p, c if i % 2 else f"about{i} good", r) for i, (p, c, r) in enumerate(rows)]
    finding = only(_found(make_pairs(*half)), "glued_pairs")
    assert (finding.severity, finding.data["which"]) == ("warning", "chosen") and "as refusals do" in finding.detail


def test_reused_responses():
    long = "a response of more than forty characters, number {}"
    again = make_pairs(*((f"p {i}", f" {i}", long.format(i % 5)) for i in range(100)))
    finding = only(_found(again), "reused_responses")
    assert finding.data["which"] == "rejected" and finding.data["share"]["rate"] == 1.0
    # "yes" and "no" may well be answers to many questions; and several pairs of one prompt share theirs
    assert _found(make_pairs(*((f"p {i}", "yes", "no") for i in range(100)))) == []
    assert _found(make_pairs(*((f"p {i // 5}", f" {i}", long.format(i // 5)) for i in range(100)))) == []


def test_different_prompts():
    def turns(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    same = [(turns(f"q {i}", "a"), turns(f"q {i}", "b")) for i in range(20)]
    other = [(turns(f"q {i}", "a"), turns(f"r {i}", "b")) for i in range(20)]
    for rows, expected in (
        (same, {}),
        (same + other[:2], {"different_prompts": "warning"}),
        (other, {"different_prompts": "error"}),
    ):
        chosen, rejected = (list(column) for column in zip(*rows, strict=True))
        assert codes(_found(Dataset.from_dict({"chosen": chosen, "rejected": rejected}))) == expected
