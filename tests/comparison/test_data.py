# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import shutil

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from trl_spo.comparison.comparison_config import DataConfig
from trl_spo.comparison.data import prepare_data


def pairs(number, offset=0):
    return Dataset.from_list(
        [{"prompt": f"p{i + offset}", "chosen": f" c{i}", "rejected": f" r{i}", "level": i} for i in range(number)]
    )


@pytest.fixture
def prepare(tmp_path):
    def prepare(dataset, **options):
        path = tmp_path / "dataset"
        dataset.save_to_disk(str(path))
        return prepare_data(DataConfig(path=str(path), **options), tmp_path / "data", seed=0)

    return prepare


def rows(data, form, split="train"):
    return load_from_disk(str(data.folder / form))[split].to_list()


def test_pairs(prepare):
    data = prepare(DatasetDict({"train": pairs(5), "test": pairs(3, 5)}))
    assert data.forms == ["preference", "unpaired", "prompts"] and data.rows == {"train": 5, "test": 3}
    assert data.notes == []
    singles = rows(data, "unpaired")
    assert {"prompt": "p1", "completion": " c1", "label": True} in singles and len(singles) == 10
    assert {"prompt": "p1", "completion": " r1", "label": False} in singles
    assert rows(data, "prompts", "test")[0] == {"prompt": "p5", "level": 0}
    assert len(data.pairs(2, seed=0)) == 2 and ("p6", " c1", " r1", {}) in data.pairs(9, seed=0)
    assert sorted(data.prompts(9, seed=0)["prompt"]) == ["p5", "p6", "p7"]
    assert data.prompts(2, seed=0)["prompt"][:] == data.prompts(2, seed=0)["prompt"][:]
    assert (
        data.form_of("dpo") == "preference" and data.form_of("kto") == "unpaired" and data.form_of("rloo") == "prompts"
    )


def test_prompts_that_leave_no_room_for_a_response(prepare, tokenizer):
    conversation = [{"role": "user", "content": "the film"}]
    short, long = {"prompt": conversation}, {"prompt": [{"role": "user", "content": "the film " * 30}]}
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    test = [{"prompt": [{"role": "user", "content": f"the film {i}"}], **sides} for i in range(4)]
    data = prepare(
        DatasetDict(
            {
                "train": Dataset.from_list([short | sides]),
                "test": Dataset.from_list([*test[:2], long | sides, *test[2:]]),
            }
        )
    )
    length = len(tokenizer.apply_chat_template(test[0]["prompt"], add_generation_prompt=True)["input_ids"])
    context, few = length + 7, (tokenizer, length + 7, 7)
    assert long["prompt"] not in data.prompts(9, 0, *few)["prompt"][:] and len(data.notes) == 1
    leaves = f"`evaluation.max_new_tokens=7` leaves {length} tokens of the model's context of {context} to a prompt"
    assert data.notes[0] == f"{leaves}: 1 of the 5 held-out prompts drawn have more, and are left out."
    # With those that come after it in its place, and nothing said of what was not drawn
    assert len(data.prompts(4, 0, *few)) == 4
    del data.notes[:]
    assert data.prompts(4, 0, tokenizer, 10 * length).to_list() == data.prompts(4, 0).to_list() and not data.notes
    with pytest.raises(ValueError, match=f"=8` leaves {length - 1} tokens .*all of the 5 held-out prompts have more"):
        data.prompts(4, 0, tokenizer, context, 8)


def test_without_a_test_split_prompts_are_held_out(prepare):
    twice = Dataset.from_list([row for row in pairs(200) for _ in range(2)])
    data = prepare(DatasetDict({"train": twice}), test_share=0.2)
    train, test = ({row["prompt"] for row in rows(data, "preference", split)} for split in ("train", "test"))
    assert train.isdisjoint(test) and len(train | test) == 200 and 20 <= len(test) <= 60
    assert "all those of 20% of the prompts, are held out" in data.notes[0]


def test_prompts_of_the_training_are_not_evaluated_on(prepare):
    data = prepare(DatasetDict({"train": pairs(5), "test": pairs(4, 3)}))
    assert [row["prompt"] for row in rows(data, "preference", "test")] == ["p5", "p6"]
    assert data.notes == ["2 of the 4 rows of the split 'test' have a prompt of the training split, and are left out."]
    with pytest.raises(ValueError, match="5 rows to train on and 0 held out"):
        prepare_data(DataConfig(path=str(data.folder.parent / "dataset"), test_split="train"), data.folder / "x", 0)


def test_lists(prepare):
    lists = Dataset.from_list(
        [{"prompt": f"p{i}", "completions": ["a", "b", "c"], "scores": [0.1, 0.9, -1.0]} for i in range(4)]
    )
    data = prepare(DatasetDict({"train": lists.select(range(3)), "test": lists.select([3])}))
    assert data.forms[0] == "ranked" and data.form_of("soft_po") == "ranked" and data.form_of("dpo") == "preference"
    assert rows(data, "preference")[0] == {"prompt": "p0", "chosen": "b", "rejected": "c"}
    assert "each list is its best completion and its worst one" in data.notes[0]


@pytest.mark.parametrize(("order", "pair"), [({"ranking": [2, 0, 1]}, ("c", "b")), ({"best": 1}, ("b", "a"))])
def test_other_orders(prepare, order, pair):
    lists = Dataset.from_list([{"prompt": f"p{i}", "completions": ["a", "b", "c"], **order} for i in range(4)])
    data = prepare(DatasetDict({"train": lists.select(range(3)), "test": lists.select([3])}))
    (row,) = rows(data, "preference", "test")
    assert (row["chosen"], row["rejected"]) == pair


def test_unpaired(prepare):
    singles = Dataset.from_list([{"prompt": f"p{i}", "completion": f" c{i}", "label": i % 2 == 0} for i in range(6)])
    data = prepare(DatasetDict({"train": singles.select(range(4)), "test": singles.select([4, 5])}))
    assert data.forms == ["unpaired", "prompts"] and data.pairs(5, 0) == []
    assert data.form_of("sspo_kto") == "unpaired"
    with pytest.raises(ValueError, match="'dpo' takes preference data, and the dataset is unpaired"):
        data.form_of("dpo")


def test_conversations_without_a_prompt_of_their_own(prepare):
    user = {"role": "user", "content": "Hi"}
    rows_of = [
        {
            "chosen": [user, {"role": "assistant", "content": f"a{i}"}],
            "rejected": [user, {"role": "assistant", "content": "b"}],
        }
        for i in range(2)
    ]
    other = [{side: [{"role": "user", "content": "Who"}, row[side][1]] for side in row} for row in rows_of]
    data = prepare(DatasetDict({"train": Dataset.from_list(rows_of), "test": Dataset.from_list(other)}))
    assert data.prompts(5, 0).to_list() == [{"prompt": [{"content": "Who", "role": "user"}]}]
    assert [pair[1:3] for pair in data.pairs(5, 0)] in ([("a0", "b"), ("a1", "b")], [("a1", "b"), ("a0", "b")])


def test_pairs_are_as_they_are_trained_on(prepare):
    """With the tools and the options of the template, also where a list is made a pair. Those that are not measured are told."""
    messages = [[{"role": "assistant", "content": text}] for text in ("good", "fair", "bad")]
    of_template = {"tools": '[{"type": "function"}]', "chat_template_kwargs": {"deep": True}}

    def row(i, *completions, **columns):
        prompt = [{"role": "user", "content": f"p{i}"}]
        return {"prompt": prompt, "completions": list(completions), "ranking": [1, 2, 0], **of_template}

    several = [messages[0][0], {"role": "user", "content": "And?"}, messages[1][0]]
    test = [row(1, *messages), row(2, several, *messages[:2]), row(3, *messages)]
    data = prepare(DatasetDict({"train": Dataset.from_list([row(0, *messages)]), "test": Dataset.from_list(test)}))
    pairs = [([{"content": f"p{i}", "role": "user"}], "fair", "good", of_template) for i in (1, 3)]
    assert data.pairs(2, 0) in (pairs, pairs[::-1])  # two of the two that can be measured, whatever comes first
    assert data.notes[-1].startswith(
        "1 of the 3 held-out pairs have a response of several messages or with tool calls"
    )
    assert rows(data, "unpaired")[0]["tools"] == of_template["tools"]


def test_a_message_with_a_tool_call_is_no_text(prepare):
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}

    def row(i, calls):
        chosen = [{"role": "assistant", "content": "I look", "tool_calls": calls}]
        rejected = [{"role": "assistant", "content": "no", "tool_calls": []}]
        return {"prompt": [{"role": "user", "content": f"p{i}"}], "chosen": chosen, "rejected": rejected}

    test = Dataset.from_list([row(1, [call]), row(2, [])])
    data = prepare(DatasetDict({"train": Dataset.from_list([row(0, [call])]), "test": test}))
    assert [pair[0][0]["content"] for pair in data.pairs(9, 0)] == ["p2"]
    assert data.notes[-1].startswith("1 of the 2 held-out pairs")


def test_a_dataset_that_has_changed_is_not_taken_for_the_old_one(prepare):
    first = prepare(DatasetDict({"train": pairs(5), "test": pairs(3, 5)}))
    again = prepare_data(DataConfig(path=str(first.folder.parent / "dataset")), first.folder, seed=0)
    assert again == first
    shutil.rmtree(first.folder.parent / "dataset")
    with pytest.raises(ValueError, match=r"\(`dataset.path`\) is no longer what .* was made of"):
        prepare(DatasetDict({"train": pairs(6), "test": pairs(3, 6)}))


def test_part_of_the_rows(prepare):
    data = prepare(DatasetDict({"train": pairs(50), "test": pairs(3, 50)}), max_train_rows=10)
    assert data.rows == {"train": 10, "test": 3} and len(rows(data, "unpaired")) == 20


def test_bad_rows_are_refused(prepare):
    bad = DatasetDict({"train": Dataset.from_list([{"prompt": "a", "chosen": "", "rejected": "b"}]), "test": pairs(2)})
    with pytest.raises(ValueError, match="Row 0 of the train dataset cannot be used: its `chosen` is empty"):
        prepare(bad)
    with pytest.raises(ValueError, match="`dataset.test_split` is 'tests', but the dataset has only: train"):
        prepare(DatasetDict({"train": pairs(2)}), test_split="tests")
    with pytest.raises(ValueError, match="`dataset.train_split` is 'training', but the dataset has only: train"):
        prepare(DatasetDict({"train": pairs(2)}), train_split="training")
