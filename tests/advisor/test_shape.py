# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Shapes, against what the trainers' own checks and TRL's preparation of datasets accept."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from tests.advisor.conftest import codes, make_pairs, make_unpaired, only
from trl import DPOConfig, KTOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from trl_spo.advisor.shape import METHODS, find_shape
from trl_spo.preference_checks import check_preferences, check_unpaired_preferences


def _messages(role, content):
    return [{"role": role, "content": content}]


PAIRS = make_pairs(("the film", " was good", " was bad"), ("a dog", " ran", " sat"))
IMPLICIT = PAIRS.map(lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}).remove_columns(
    "prompt"
)
CONVERSATIONS = make_pairs(
    (_messages("user", "the film"), _messages("assistant", "good"), _messages("assistant", "bad"))
)
LISTS = Dataset.from_dict({"prompt": ["the film"], "completions": [[" was good", " was bad"]], "scores": [[1.0, 0.0]]})
UNPAIRED = make_unpaired(("the film", " was good", True), ("a dog", " sat", False))
SETS = {"pairs": PAIRS, "implicit": IMPLICIT, "conversations": CONVERSATIONS, "lists": LISTS, "unpaired": UNPAIRED}


def _accepts(method, dataset, tokenizer, tmp_path):
    """Whether the code of the trainer that reads a dataset takes it."""
    off = {"output_dir": str(tmp_path), "bf16": False, "report_to": "none"}
    trl = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    try:
        match method:
            case "dpo" | "ipo":
                DPOTrainer._prepare_dataset(trl, dataset, tokenizer, DPOConfig(**off), "train")
            case "kto":
                KTOTrainer._prepare_dataset(trl, dataset, tokenizer, KTOConfig(**off), "train")
            case "soft_po":
                check_preferences(dataset, "train")
            case "stable_po" | "sspo":
                check_preferences(dataset, "train", allow_lists=False)
            case "sspo_kto":
                check_unpaired_preferences(dataset, "train")
            case _:
                raise AssertionError(method)
    except (ValueError, KeyError):
        return False
    return True


@pytest.mark.parametrize("name", SETS)
def test_possible_methods_are_those_whose_trainers_take_it(name, tokenizer, tmp_path):
    shape, findings = find_shape(SETS[name])
    assert findings == []
    expected = [method for method in METHODS if method != "rlhf" and _accepts(method, SETS[name], tokenizer, tmp_path)]
    assert [method for method in shape.possible if method != "rlhf"] == expected
    assert ("rlhf" in shape.possible) == (shape.kind == "pairs")


def test_shapes():
    found = {name: find_shape(dataset)[0] for name, dataset in SETS.items()}
    assert {name: shape.kind for name, shape in found.items()} == {
        "pairs": "pairs",
        "implicit": "pairs",
        "conversations": "pairs",
        "lists": "lists",
        "unpaired": "unpaired",
    }
    assert [name for name, shape in found.items() if shape.implicit_prompt] == ["implicit"]
    assert [name for name, shape in found.items() if shape.conversational] == ["conversations"]


def test_prompt_of_text_beside_conversations_is_what_trl_fails_on(tokenizer, tmp_path):
    # As in HuggingFaceH4/ultrafeedback_binarized
    conversation = [_messages("user", "the film") + _messages("assistant", text) for text in ("good", "bad")]
    dataset = make_pairs(("the film", *conversation))
    with pytest.raises((TypeError, AttributeError)):
        DPOTrainer._prepare_dataset(
            SimpleNamespace(_tokenizer=tokenizer),
            dataset,
            tokenizer,
            DPOConfig(output_dir=str(tmp_path), bf16=False),
            "train",
        )
    shape, findings = find_shape(dataset)
    assert codes(findings) == {"mixed_formats": "error"}
    assert 'remove_columns("prompt")' in findings[0].remedy
    assert (shape.kind, shape.implicit_prompt) == ("pairs", True)  # so that all else can be looked at
    assert find_shape(dataset.remove_columns("prompt"))[1] == []


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": ["a"], "completion": [_messages("assistant", "b")], "label": [True]},
        {"prompt": ["a"], "completions": [[_messages("assistant", "b")] * 2], "best": [0]},
        {"prompt": [_messages("user", "a")], "chosen": ["b"], "rejected": ["c"]},
        {"chosen": ["b"], "rejected": [_messages("assistant", "c")]},
        {"prompt": ["a"], "chosen": ["b"], "rejected": [_messages("assistant", "c")]},
    ],
)
def test_texts_and_messages_are_not_mixed(columns):
    shape, findings = find_shape(Dataset.from_dict(columns))
    assert shape.kind is None and codes(findings) == {"mixed_formats": "error"}


def test_completions_beside_pairs():
    # Ratings in a form of their own, from which the pairs were made
    rated = PAIRS.add_column("completions", [[{"text": "a", "rating": 3}]] * 2).add_column("scores", [[1.0]] * 2)
    shape, findings = find_shape(rated)
    assert (shape.kind, findings) == ("pairs", [])
    assert "remove the column" in shape.impossible["soft_po"]
    with pytest.raises(ValueError):
        check_preferences(rated, "train")


@pytest.mark.parametrize(
    ("columns", "code", "remedy"),
    [
        ({"prompt": ["a"], "completion": ["b"]}, "unknown_shape", "SFTTrainer"),
        ({"messages": [_messages("user", "a")]}, "unknown_shape", "SFTTrainer"),
        ({"prompt": ["a"]}, "unknown_shape", "synthesize"),
        ({"question": ["a"], "answer": ["b"]}, "unknown_shape", "Rename"),
        ({"prompt": ["a"], "completions": [["b", "c"]]}, "unknown_shape", "synthesize"),
        ({"prompt": ["a"], "chosen": [1], "rejected": [2]}, "unknown_shape", "messages"),
        ({"prompt": [None], "chosen": [None], "rejected": [None]}, "unknown_shape", "messages"),
        ({"prompt": [], "chosen": [], "rejected": []}, "empty_dataset", "split"),
    ],
)
def test_what_is_no_preference(columns, code, remedy):
    shape, findings = find_shape(Dataset.from_dict(columns))
    assert shape.kind is None and shape.possible == []
    assert only(findings, code).severity == "error"
    assert remedy in findings[0].remedy


def test_images_are_for_trl_only():
    shape, _ = find_shape(CONVERSATIONS.add_column("images", [["picture"]]))
    assert shape.possible == ["dpo", "ipo", "kto", "rlhf"]
