# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import itertools

import pytest
from datasets import Dataset
from tests.advisor.conftest import codes, make_pairs, make_unpaired

from trl_spo.advisor import advise
from trl_spo.advisor.shape import METHODS


CLEAN = make_pairs(*((f"question{i} here ", f"answer{i} good", f"answer{i} bad") for i in range(30)))


def _recommended(dataset, **kwargs):
    advice = advise(dataset, **kwargs)
    return advice.recommendation, [other["method"] for other in advice.recommendation.alternatives]


def test_clean_pairs():
    found, others = _recommended(CLEAN)
    assert found.method == "dpo"
    assert set(others) == {"stable_po", "ipo", "soft_po", "sspo", "rlhf"}
    assert "nothing tells how noisy" in found.reasons[0]


def test_noisy_pairs():
    rows = CLEAN.to_list()
    again = [
        {"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} if i % 2 else r
        for i, r in enumerate(rows)
    ]
    found, others = _recommended(Dataset.from_list(rows + again))
    assert found.method == "ipo" and others[:2] == ["stable_po", "dpo"]
    # Half of the second labels differ: 2e(1-e) = 1/2, e = 1/2
    assert "About 50% of the labels" in found.reasons[0]
    assert "rule of thumb" in found.reasons[1]


def test_one_contradiction_is_no_noise():
    found, _ = _recommended(
        Dataset.from_list(
            [*CLEAN.to_list(), {"prompt": "question0 here ", "chosen": "answer0 bad", "rejected": "answer0 good"}]
        )
    )
    assert found.method == "dpo" and "too little tells how noisy" in found.reasons[0]


def test_clean_labels_by_votes():
    found, _ = _recommended(CLEAN.add_column("votes", [["a", "a", "b"]] + [["a", "a", "a"]] * 29))
    assert found.method == "dpo" and "clean labels" in found.reasons[0]


def test_binary_feedback():
    found, others = _recommended(make_unpaired(*((f"q {i}", "a", i % 2 == 0) for i in range(20))))
    assert (found.method, others) == ("kto", ["sspo_kto"])


def test_glued_pairs(monkeypatch):
    rows = [(f"what about{i} topic{i}", f"about{i} good", f"topic{(i + 7) % 200} bad") for i in range(200)]
    found, others = _recommended(make_pairs(*rows))
    assert found.method == "kto" and "dpo" in others
    monkeypatch.setattr("trl_spo.advisor.recommendation.FEW", 20)
    assert (
        _recommended(make_pairs(*rows), large_budget=True)[0].method == "kto"
    )  # of which no reward model learns more


@pytest.mark.parametrize("every", [1, 2])
def test_refusals_are_not_glued(every):
    refusals = ("I cannot help with that request.", "Sorry, this might cause harm to somebody.")
    rows = [
        (f"what about{i} topic{i}", refusals[i % 2] if i % every == 0 else f"about{i} good", f"topic{i} bad")
        for i in range(200)
    ]
    assert _recommended(make_pairs(*rows))[0].method == "dpo"


def test_pairs_without_a_prompt_are_not_glued():
    texts = {"chosen": [f"good answer{i}" for i in range(200)], "rejected": [f"Bad reply{i}" for i in range(200)]}
    assert _recommended(Dataset.from_dict(texts))[0].method == "dpo"


def test_lists():
    dataset = Dataset.from_dict({"prompt": ["p"] * 3, "completions": [["a", "b", "c"]] * 3, "best": [0, 1, 2]})
    found, others = _recommended(dataset)
    assert (found.method, others) == ("soft_po", [])
    assert "3.0 responses" in found.reasons[0]


def test_pairs_that_are_whole_lists():
    rows = [(f"p{i}", f"{a}{i}", f"{b}{i}") for i in range(20) for a, b in itertools.combinations("abcd", 2)]
    found, others = _recommended(make_pairs(*rows))
    assert (found.method, others[0]) == ("dpo", "soft_po")
    assert "20 of 20 prompts" in found.alternatives[0]["reason"]
    _, others = _recommended(make_pairs(*rows[::3]))  # a > b and b > c
    assert others[0] != "soft_po"


def test_large_budget(monkeypatch):
    assert _recommended(CLEAN, large_budget=True)[0].method == "dpo"  # 30 pairs make no reward model
    monkeypatch.setattr("trl_spo.advisor.recommendation.FEW", 20)
    advice = advise(CLEAN, large_budget=True)
    assert advice.recommendation.method == "rlhf" and advice.recommendation.alternatives[0]["method"] == "dpo"
    assert codes(advice.findings)["options_not_checked"] == "info"


def test_what_is_recommended_is_possible():
    pictures = make_pairs(
        *(
            ([{"role": "user", "content": f"q{i}"}], *([{"role": "assistant", "content": c}] for c in "ab"))
            for i in range(4)
        )
    )
    for dataset in (CLEAN, pictures.add_column("images", [["x"]] * 4), CLEAN.add_column("completions", [["x"]] * 30)):
        advice = advise(dataset)
        named = {advice.recommendation.method, *(other["method"] for other in advice.recommendation.alternatives)}
        assert named <= set(advice.shape.possible) <= set(METHODS)


def test_nothing_to_recommend():
    advice = advise(Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]}))
    assert advice.recommendation is None and advice.exit_code() == 1


@pytest.mark.parametrize("method", ["dpo", "ipo", "soft-po", "stable_po", "sspo"])
def test_method_that_is_not_possible(method):
    advice = advise(make_unpaired(("p", "a", True), ("p", "b", False)), method=method)
    assert codes(advice.findings)["method_not_possible"] == "error"
