# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import itertools

import numpy as np
import pytest
from datasets import Dataset
from tests.advisor.conftest import codes, make_pairs, make_unpaired, rows_of

from trl_spo.advisor.length import length_findings, longer_wins


def test_pairs_by_hand():
    found = longer_wins(rows_of(make_pairs(("p", "aaa", "b"), ("p", "aa", "b"), ("p", "a", "bbb"), ("p", "aa", "bb"))))
    assert (found["longer"], found["shorter"], found["accuracy"]["rate"]) == (0.5, 0.25, 0.625)
    assert (found["mean_better"], found["mean_worse"]) == (2.0, 1.75)


def test_unpaired_is_over_all_pairs_of_a_good_and_a_bad_one():
    rng = np.random.default_rng(0)
    good, bad = rng.integers(1, 6, size=7), rng.integers(1, 6, size=11)
    dataset = make_unpaired(
        *(("p", "x" * n, label) for lengths, label in ((good, True), (bad, False)) for n in lengths)
    )
    found = longer_wins(rows_of(dataset))
    signs = [np.sign(int(a) - int(b)) for a, b in itertools.product(good, bad)]
    assert found["longer"] == pytest.approx(signs.count(1) / 77) and found["shorter"] == pytest.approx(
        signs.count(-1) / 77
    )
    assert found["accuracy"]["rate"] == pytest.approx((signs.count(1) + signs.count(0) / 2) / 77)
    assert (found["accuracy"]["number"], found["number"]) == (7, 77)


def test_lists_by_hand():
    dataset = Dataset.from_dict(
        {
            "prompt": ["p", "p"],
            # Best first: 3 > 1, 3 = 3, 1 < 3 of one list; of the other, whose first two are equally good, 2 > 1 twice
            "completions": [["aaa", "b", "ccc"], ["aa", "bb", "c"]],
            "scores": [[3.0, 2.0, 1.0], [1.0, 1.0, 0.0]],
        }
    )
    found = longer_wins(rows_of(dataset))
    assert (found["number"], found["longer"], found["shorter"]) == (5, 3 / 5, 1 / 5)
    assert found["accuracy"]["rate"] == pytest.approx((0.5 + 1.0) / 2)  # each list counts once
    assert found["accuracy"]["number"] == 2


def test_nothing_to_compare():
    assert length_findings(rows_of(make_unpaired(("p", "a", True)))) == []
    ties = Dataset.from_dict({"prompt": ["p"], "completions": [["a", "b"]], "scores": [[1.0, 1.0]]})
    assert length_findings(rows_of(ties)) == []


@pytest.mark.parametrize(
    ("longer", "number", "expected"),
    [
        (0.9, 200, "Better responses are longer"),
        (0.1, 200, "Better responses are shorter"),
        (0.5, 200, "Lengths"),
        (0.7, 10, "Lengths"),
    ],
)
def test_bias_is_called_beyond_chance_only(longer, number, expected):
    pairs = [("p", "aa", "b") if i < longer * number else ("p", "a", "bb") for i in range(number)]
    (finding,) = length_findings(rows_of(make_pairs(*pairs)))
    assert finding.title == expected and (finding.severity == "warning") == (expected != "Lengths")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pandalm_human_pairs", "length_bias"),  # 0.68: longer ones
        ("llmbar_human_pairs", "length_bias"),  # 0.26: made adversarial
        ("hh_helpful_pairs", "length"),
        ("qa_feedback_pairs", "length"),
        ("gsm8k_correct_vs_wrong_pairs", "length"),
    ],
)
def test_real_data(name, expected, real_data):
    assert list(codes(length_findings(rows_of(real_data(name))))) == [expected]
