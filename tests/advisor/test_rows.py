# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
from datasets import Dataset
from tests.advisor.conftest import make_pairs, make_unpaired, rows_of
from trl import extract_prompt

from trl_spo.advisor.rows import ranks_of, split_prompt
from trl_spo.soft_po.preference_data import _ranks


def test_prompt_is_split_as_trl_does():
    rng = np.random.default_rng(0)
    for _ in range(
        3000
    ):  # of three letters, so that all cases come up: no prefix, one in the other, equal, spaces at the end
        chosen, rejected = ("".join(rng.choice(list("ab "), size=rng.integers(1, 7))) for _ in range(2))
        expected = extract_prompt({"chosen": chosen, "rejected": rejected})
        assert split_prompt(chosen, rejected) == tuple(expected.values()), (chosen, rejected)


def test_prompt_of_conversations_is_split_as_trl_does():
    rng = np.random.default_rng(0)
    for _ in range(200):
        chosen, rejected = (
            [{"role": "user", "content": str(rng.integers(2))} for _ in range(rng.integers(1, 4))] for _ in range(2)
        )
        assert split_prompt(chosen, rejected) == tuple(
            extract_prompt({"chosen": chosen, "rejected": rejected}).values()
        )


def test_empty_response_has_no_implicit_prompt():
    with pytest.raises(ValueError, match="is empty"):
        split_prompt("", "a")


@pytest.mark.parametrize(
    "order",
    [
        {"best": 1},
        {"best": 0},
        {"ranking": [2, 0, 1]},
        {"scores": [1.0, 3.0, 1.0]},
        {"scores": [0.0, -1.0, 5.0]},
    ],
)
def test_ranks_are_those_of_soft_po(order):
    example = {"completions": ["a", "b", "c"], **order}
    assert ranks_of(example) == _ranks(example)


@pytest.mark.parametrize("order", [{"ranking": [0, 0, 1]}, {"scores": [1.0]}, {"scores": [1.0, None, 2.0]}])
def test_lists_that_are_refused_have_no_ranks(order):
    assert ranks_of({"completions": ["a", "b", "c"], **order}) == [0, 0, 0]


def test_normalized_hashes_do_without_case_and_white_space():
    rows = rows_of(make_pairs(("A  prompt", "Yes.", "no"), ("a prompt ", "yes.", "No")))
    assert rows.prompts[0] == rows.prompts[1] and rows.keys[0] == rows.keys[1]
    assert rows.responses.tolist()[:2] == rows.responses.tolist()[2:]
    assert len(set(rows.exact.tolist())) == 4
    other = rows_of(make_pairs(("a prompt", "yes.", "no"), ("a prompt", "no", "yes."), ("b prompt", "yes.", "no")))
    assert len(set(other.keys.tolist())) == 3  # the labels and the prompt are part of a row


def test_counts_of_lists():
    rows = rows_of(
        Dataset.from_dict(
            {
                "prompt": ["p", "pp"],
                "completions": [["a", "bb", "ccc"], ["dddd", "eeeee"]],
                "scores": [[1.0, 2.0, 0.0], [1.0, 1.0]],
            }
        )
    )
    assert rows.rows.tolist() == [0, 0, 0, 1, 1]
    assert rows.ranks.tolist() == [1, 0, 2, 0, 0]
    assert rows.characters.tolist() == [1, 2, 3, 4, 5]
    assert rows.prompt_characters.tolist() == [1, 2]


def _flag(rows, name):
    return rows.flags[name].tolist()


def test_flags_of_plain_text():
    rows = rows_of(
        make_pairs(
            ("A question?", "Yes", "No"),
            ("A question?\n", "Yes", "No"),
            ("A question?", " Yes", "\nNo"),
            ("", "Yes", "No"),
            ("a prompt of more than twenty", "a prompt of more than twenty: yes", "no"),
        )
    )
    assert _flag(rows, "together") == [True, False, False, False, True]
    assert _flag(rows, "repeats_prompt") == [False] * 4 + [True]
    implicit = Dataset.from_dict(
        {"chosen": ["I like cats", "I like dogs", "Yes"], "rejected": ["I like cars", "I like fish", "no"]}
    )
    rows = rows_of(implicit)
    assert _flag(rows, "cut_word") == [True, False, False]  # "I like ca", "I like" (and " dogs"), ""
    assert _flag(rows, "no_prompt") == [False, False, True] and not any(_flag(rows, "other_prompt"))


def test_flags_of_conversations():
    def turns(*texts):
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]

    implicit = Dataset.from_dict(
        {
            "chosen": [
                turns("q", "a"),
                turns("q", "a", "r", "b"),
                turns("q", "a"),
                turns("q", "a", "thanks"),
                turns("q", "a")[1:],
            ],
            "rejected": [
                turns("q", "b"),
                turns("q", "c", "s", "d"),
                turns("other", "b"),
                turns("q", "b"),
                turns("q", "b")[1:],
            ],
        }
    )
    rows = rows_of(implicit)
    assert _flag(rows, "other_prompt") == [False, False, True, False, False]
    assert _flag(rows, "no_prompt") == [False, False, False, False, True]  # of which nobody asked anything
    assert _flag(rows, "not_assistant") == [False, False, False, True, False]
    explicit = make_pairs(
        (turns("q", "a"), turns("q", "a")[1:], turns("q", "b")[1:]), (turns("q"), turns("q", "a"), turns("q", "b"))
    )
    rows = rows_of(explicit)
    assert _flag(rows, "prompt_of_assistant") == [True, False]
    assert _flag(rows, "repeats_prompt") == [False, True]


def test_missing_values_and_labels():
    rows = rows_of(make_pairs(("p", "a", "b"), (None, "a", "b"), ("p", None, "b")))
    assert _flag(rows, "missing") == [False, True, True]
    rows = rows_of(Dataset.from_dict({"chosen": ["a", "", "p a", None], "rejected": ["b", "b", "p b", "b"]}))
    assert _flag(rows, "no_split") == [False, True, False, False]
    assert _flag(rows, "no_prompt") == [True, False, False, False]
    assert _flag(rows, "missing") == [False, False, False, True]
    rows = rows_of(make_unpaired(("p", "a", True), ("p", "b", None), ("p", None, False)))
    assert _flag(rows, "missing") == [False, False, True] and _flag(rows, "bad_label") == [False, True, False]
    assert rows.ranks.tolist() == [0, 1, 1]
