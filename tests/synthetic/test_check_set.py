# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The human check set as people give it."""

import pytest
from datasets import Dataset

from trl_spo.synthetic.check_set import HumanCheckError, check_pairs, refuse_jury


def test_preference_format():
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "topic": "t"} for i in range(64)]
    pairs, labels = check_pairs(Dataset.from_list(rows))
    for row, pair, label in zip(rows, pairs, labels, strict=True):
        assert (pair.responses[label], pair.responses[1 - label]) == (row["chosen"], row["rejected"])
        assert pair.prompt == row["prompt"] and pair.columns == {"topic": "t"}
    # In random order, which is the same in every run
    assert 16 < sum(labels) < 48
    assert check_pairs(Dataset.from_list(rows[5:6]))[1] == labels[5:6]
    assert len({pair.prompt_id for pair in pairs}) == 64


def test_labels():
    rows = [
        {"prompt": "p", "response_a": "x", "response_b": "y", "label": label}
        for label in ("a", "b", "A", "B", "0", "1")
    ]
    pairs, labels = check_pairs(Dataset.from_list(rows))
    assert labels == [0, 1] * 3 and {pair.responses for pair in pairs} == {("x", "y")}
    numbers = Dataset.from_list([{**row, "label": i % 2} for i, row in enumerate(rows)])
    assert check_pairs(numbers)[1] == labels


def test_conversations():
    rows = {
        "prompt": [[{"role": "user", "content": "Hello"}]],
        "chosen": [[{"role": "assistant", "content": "Good day"}]],
        "rejected": [[{"role": "assistant", "content": "Go away"}]],
    }
    (pair,), (label,) = check_pairs(Dataset.from_dict(rows))
    assert pair.responses[label] == "Good day" and pair.prompt == rows["prompt"][0]


@pytest.mark.parametrize("label", ["tie", "c", None, "", 2, 0.5])
def test_ties_and_unknown_labels(label):
    row = {"prompt": "p", "response_a": "x", "response_b": "y", "label": label}
    with pytest.raises(
        ValueError, match="label of row 0 of the human check set is .* Use 'a' or 'b', and leave out ties"
    ):
        check_pairs(Dataset.from_list([row]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"prompt": ["p"], "chosen": ["x"]}, r"has the columns \['chosen', 'prompt'\]. It needs either"),
        ({"prompt": [], "chosen": [], "rejected": []}, "The human check set is empty"),
        (
            {name: ["x"] for name in ("prompt", "chosen", "rejected", "response_a", "response_b", "label")},
            "It needs either",
        ),
    ],
)
def test_bad_sets(rows, message):
    with pytest.raises(ValueError, match=message):
        check_pairs(Dataset.from_dict(rows))


@pytest.mark.parametrize(
    ("agreement", "balanced", "message"),
    [
        (0.6, 0.6, None),
        (0.7, None, None),
        (
            0.59,
            0.8,
            r"agrees with people in 59.0% of 40 pairs \(95 % interval 40.0% to 80.0%\), and `min_agreement=0.6`",
        ),
        (0.8, 0.59, r"goes by length: it agrees with people in 80.0% of 40 pairs, and in 59.0%"),
    ],
)
def test_refuse_jury(agreement, balanced, message):
    interval = [0.4, 0.8]
    jury = {
        "pairs": 40,
        "agreement": {"value": agreement, "interval": interval},
        "length_balanced": {"value": balanced, "interval": interval},
    }
    report = {"jury": jury, "longer": {"agreement": {"value": 0.7, "interval": interval}}}
    if message is None:
        refuse_jury(report, 0.6)
    else:
        with pytest.raises(HumanCheckError, match=message):
            refuse_jury(report, 0.6)
