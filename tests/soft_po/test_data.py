# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""From the columns of a dataset to the tensors of a batch."""

import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from trl import DPOTrainer

from trl_spo.soft_po.online_samples import PromptSource
from trl_spo.soft_po.preference_data import DataCollatorForSoftPO


TOOLS = [{"name": "watch"}]


def stream(dataset):
    return IterableDataset.from_generator(lambda: iter(dataset.to_list()))


def as_lists(pairs):
    """The pairs as lists of two."""
    return Dataset.from_list(
        [{"prompt": p["prompt"], "completions": [p["rejected"], p["chosen"]], "best": 1} for p in pairs.to_list()]
    )


class TestPairs:
    def test_as_in_dpo(self, make_trainer, make_args, model_path, tokenizer, pairs, conversations):
        for dataset in (pairs, conversations):
            ours = make_trainer({"train_dataset": dataset}, beta=0, calibration="none").train_dataset
            args = make_args(beta=0, calibration="none")
            theirs = DPOTrainer(model_path, args=args, train_dataset=dataset, processing_class=tokenizer).train_dataset
            for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
                assert ours[column] == theirs[column]

    def test_tokens(self, make_trainer, tokenizer, pairs):
        row = make_trainer().train_dataset[3]
        assert row["prompt_ids"] == tokenizer(pairs[3]["prompt"]).input_ids
        assert row["prompt_ids"][0] == tokenizer.bos_token_id
        assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == "<s> I would watch it again</s>"
        assert row["rejected_ids"][-1] == tokenizer.eos_token_id
        assert row["row_id"] == 3

    def test_eos_is_not_added_twice(self, make_trainer, tokenizer, pairs):
        with_eos = pairs.map(lambda row: {"chosen": row["chosen"] + "</s>"})
        assert (
            make_trainer({"train_dataset": with_eos}).train_dataset["chosen_ids"]
            == (make_trainer().train_dataset["chosen_ids"])
        )

    def test_implicit_prompt(self, make_trainer, conversations):
        explicit = make_trainer({"train_dataset": conversations}).train_dataset
        implicit = Dataset.from_list(
            [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in conversations.to_list()]
        )
        implicit = make_trainer({"train_dataset": implicit}).train_dataset
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert implicit[column] == explicit[column]

    def test_implicit_prompt_in_strings(self, make_trainer, pairs):
        implicit = Dataset.from_dict(
            {"chosen": ["the film was good", "it is great"], "rejected": ["the film was bad", "it is not great"]}
        )
        trainer = make_trainer({"train_dataset": implicit})
        assert trainer.train_dataset["prompt"][:] == ["the film was", "it is"]

    def test_chat_template_with_tools(self, make_trainer, tokenizer, conversations):
        dataset = conversations.add_column("tools", [json.dumps(TOOLS)] * len(conversations))
        row = make_trainer({"train_dataset": dataset}, max_length=None).train_dataset[0]
        prompt = tokenizer.decode(row["prompt_ids"])
        assert prompt.startswith("<|system|>") and "name" in prompt and "watch" in prompt
        assert prompt.endswith("<|assistant|>")
        assert tokenizer.decode(row["chosen_ids"]).endswith("<|end|>")
        assert "watch" not in tokenizer.decode(
            make_trainer({"train_dataset": conversations}).train_dataset[0]["prompt_ids"]
        )

    def test_own_column_of_row_ids_is_replaced(self, make_trainer, pairs):
        dataset = pairs.add_column("row_id", [7] * len(pairs))
        assert make_trainer({"train_dataset": dataset}).train_dataset["row_id"][:] == list(range(8))

    def test_row_ids_are_those_before_dropping(self, make_trainer, pairs):
        kept = make_trainer(max_length=6, max_completion_length=1).train_dataset
        dropped = [i for i in range(8) if i not in kept["row_id"]]
        assert dropped and all(kept[j]["prompt"] == pairs[i]["prompt"] for j, i in enumerate(kept["row_id"]))


class TestLists:
    def tokenized(self, make_trainer, dataset, **kwargs):
        return make_trainer({"train_dataset": dataset}, **kwargs).train_dataset

    def test_tokens_are_those_of_pairs(self, make_trainer, pairs):
        as_pairs = self.tokenized(make_trainer, pairs)
        lists = self.tokenized(make_trainer, as_lists(pairs))
        assert lists["prompt_ids"] == as_pairs["prompt_ids"]
        assert [ids for ids, _ in lists["completion_ids"]] == as_pairs["rejected_ids"][:]
        assert [ids for _, ids in lists["completion_ids"]] == as_pairs["chosen_ids"][:]

    def test_conversational_tokens_with_tools_are_those_of_pairs(self, make_trainer, conversations):
        conversations = conversations.add_column("tools", [json.dumps(TOOLS)] * len(conversations))
        as_pairs = self.tokenized(make_trainer, conversations, max_completion_length=1)
        lists = Dataset.from_list(
            [
                {
                    "prompt": row["prompt"],
                    "completions": [row["chosen"], row["rejected"]],
                    "best": 0,
                    "tools": row["tools"],
                }
                for row in conversations.to_list()
            ]
        )
        lists = self.tokenized(make_trainer, lists, max_completion_length=1)
        assert lists["prompt_ids"] == as_pairs["prompt_ids"]
        assert [ids for ids, _ in lists["completion_ids"]] == as_pairs["chosen_ids"][:]
        assert [ids for _, ids in lists["completion_ids"]] == as_pairs["rejected_ids"][:]

    @pytest.mark.parametrize(
        ("order", "ranks"),
        [
            ({"best": 2}, [1, 1, 0, 1]),
            ({"ranking": [2, 0, 3, 1]}, [1, 3, 0, 2]),
            ({"scores": [0.5, -1.0, 3.0, 0.25]}, [1, 3, 0, 2]),
            ({"scores": [1.0, 2.0, 2.0, 1.0]}, [1, 0, 0, 1]),
            ({"scores": [3, 1, 2, 1]}, [0, 2, 1, 2]),
        ],
    )
    def test_ranks(self, make_trainer, order, ranks):
        dataset = Dataset.from_list([{"prompt": "the film", "completions": [" a", " b", " c", " d"], **order}])
        assert self.tokenized(make_trainer, dataset)["ranks"][:] == [ranks]

    def test_completions_start_where_the_prompt_ends_for_all(self, make_trainer, tokenizer):
        # The second completion merges with the end of the prompt, so the first one starts earlier too
        dataset = Dataset.from_list([{"prompt": "the fil", "completions": [" was", "m was"], "best": 0}])
        row = self.tokenized(make_trainer, dataset)[0]
        texts = [tokenizer.decode(row["prompt_ids"] + ids) for ids in row["completion_ids"]]
        assert texts == ["<s> the fil was</s>", "<s> the film was</s>"]


@pytest.fixture
def examples():
    return [
        {
            "prompt_ids": [1, 10, 11],
            "completion_ids": [[20, 2], [21, 22, 2], [23, 2]],
            "ranks": [1, 0, 2],
            "row_id": 5,
        },
        {"prompt_ids": [1], "completion_ids": [[24, 2], [25, 26, 27, 28, 2]], "ranks": [0, 1], "row_id": 9},
    ]


class TestCollator:
    def test_lists(self, examples):
        batch = DataCollatorForSoftPO(pad_token_id=0)(examples)
        assert batch["input_ids"].tolist() == [
            [1, 10, 11, 20, 2, 0],
            [1, 10, 11, 21, 22, 2],
            [1, 10, 11, 23, 2, 0],
            [1, 24, 2, 0, 0, 0],
            [1, 25, 26, 27, 28, 2],
        ]
        assert batch["attention_mask"].tolist() == [
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 1],
        ]
        assert batch["completion_mask"].tolist() == [
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 1, 1, 1],
            [0, 0, 0, 1, 1, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 1, 1],
        ]
        assert batch["list_sizes"].tolist() == [3, 2]
        assert batch["ranks"].tolist() == [1, 0, 2, 0, 1]
        assert batch["row_ids"].tolist() == [5, 9]

    @pytest.mark.parametrize(
        ("mode", "first", "last"),
        [("keep_start", [1, 10, 11, 20], [1, 25, 26, 27]), ("keep_end", [10, 11, 20, 2], [26, 27, 28, 2])],
    )
    def test_truncation(self, examples, mode, first, last):
        batch = DataCollatorForSoftPO(pad_token_id=0, max_length=4, truncation_mode=mode)(examples)
        assert batch["input_ids"].size(1) == 4
        assert batch["input_ids"][0].tolist() == first and batch["input_ids"][4].tolist() == last
        # Padding, prompt and completion are still told apart
        assert (batch["completion_mask"] == (batch["input_ids"] >= 20) | (batch["input_ids"] == 2)).all()
        assert (batch["attention_mask"] == (batch["input_ids"] > 0)).all()

    def test_pad_to_multiple_of(self, examples):
        batch = DataCollatorForSoftPO(pad_token_id=0, pad_to_multiple_of=8)(examples)
        assert {batch[name].size(1) for name in ("input_ids", "attention_mask", "completion_mask")} == {8}

    def test_pairs(self):
        examples = [
            {"prompt_ids": [1, 10], "chosen_ids": [20, 2], "rejected_ids": [21, 22, 2], "row_id": 3},
            {"prompt_ids": [1], "chosen_ids": [23, 2], "rejected_ids": [24, 2], "row_id": 1},
        ]
        batch = DataCollatorForSoftPO(pad_token_id=0)(examples)
        assert batch["input_ids"].tolist() == [
            [1, 10, 20, 2, 0],
            [1, 23, 2, 0, 0],
            [1, 10, 21, 22, 2],
            [1, 24, 2, 0, 0],
        ]
        assert batch["row_ids"].tolist() == [3, 1]

    def test_precomputed_reference(self):
        example = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "row_id": 0}
        batch = DataCollatorForSoftPO(pad_token_id=0)(
            [{**example, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}]
        )
        assert batch["ref_chosen_logps"].tolist() == [-1.5] and batch["ref_rejected_logps"].tolist() == [-2.5]


class TestStreams:
    @pytest.mark.parametrize("kind", ["pairs", "lists", "conversations"])
    def test_train(self, make_trainer, train_log, request, kind):
        dataset = request.getfixturevalue(kind)
        streamed = train_log(make_trainer({"train_dataset": stream(dataset)}, max_steps=3))
        assert len(streamed) == 3 and all(entry["kl/online"] >= 0 for entry in streamed)

    def test_same_as_a_map_style_dataset(self, make_trainer, train_log, pairs, weights_of):
        # One batch of all rows, so that the order does not count; the KL's prompts come in another order
        finals = []
        for dataset in (pairs, stream(pairs)):
            trainer = make_trainer(
                {"train_dataset": dataset},
                beta=0.0,
                per_device_train_batch_size=8,
                max_steps=2,
                dataloader_drop_last=True,
            )
            trainer.train()
            finals.append(weights_of(trainer.model))
        for name, weight in finals[0].items():
            torch.testing.assert_close(finals[1][name], weight)

    def test_evaluate(self, make_trainer, pairs):
        trainer = make_trainer({"eval_dataset": stream(pairs)}, eval_online_samples=4)
        reference = make_trainer({"eval_dataset": pairs}, eval_online_samples=4).evaluate()
        metrics = trainer.evaluate()
        for name in ("eval_loss/preference", "eval_logps/chosen", "eval_entropy"):
            assert metrics[name] == pytest.approx(reference[name], rel=1e-5)
        assert metrics["eval_kl/online"] == pytest.approx(0, abs=1e-5)

    def test_regularization_prompts(self, make_trainer, train_log):
        dataset = IterableDataset.from_generator(lambda: iter([{"prompt": "a dog"}, {"prompt": "a night"}]))
        trainer = make_trainer({"regularization_dataset": dataset}, online_samples_per_step=5)
        train_log(trainer)
        # Goes round in its own order
        assert [sample.row_id for sample in trainer.sample_buffer.samples] == [0, 1, 0, 1, 0]


class TestPrompts:
    def prompts(self, n):
        return Dataset.from_dict({"prompt_ids": [[i, i] for i in range(n)], "row_id": list(range(n))})

    def test_every_prompt_once_in_each_pass(self):
        source = PromptSource(self.prompts(7), seed=3)
        rows = [row for row, ids in source.take(0, 21)]
        assert [sorted(rows[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
        assert len({tuple(rows[i : i + 7]) for i in (0, 7, 14)}) == 3
        assert source.take(2, 1)[0] == (rows[2], [rows[2]] * 2)

    def test_any_position_again(self):
        source = PromptSource(self.prompts(5), seed=3)
        everything = source.take(0, 23)
        assert source.take(11, 7) == everything[11:18]
        assert PromptSource(self.prompts(5), seed=3).take(4, 3) == everything[4:7]
        assert PromptSource(self.prompts(5), seed=4).take(0, 23) != everything

    def test_stream(self):
        source = PromptSource(stream(self.prompts(5)), seed=3)
        everything = source.take(0, 12)
        assert [row for row, _ in everything] == [i % 5 for i in range(12)]
        assert source.take(12, 2) == [(2, [2, 2]), (3, [3, 3])]  # onwards
        assert source.take(3, 4) == everything[3:7]  # backwards
        assert source.take(20, 1) == [(0, [0, 0])]  # with a gap

    def test_regularization_dataset(self, make_trainer, tokenizer):
        dataset = Dataset.from_dict({"prompt": ["a dog", "a long night"]})
        trainer = make_trainer({"regularization_dataset": dataset})
        trainer.train()
        prompts = {tuple(sample.prompt_ids) for sample in trainer.sample_buffer.samples}
        assert prompts == {tuple(tokenizer(prompt).input_ids) for prompt in dataset["prompt"]}

    def test_conversational_regularization_dataset(self, make_trainer, tokenizer):
        dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a dog"}]], "tools": [json.dumps(TOOLS)]})
        trainer = make_trainer({"regularization_dataset": dataset})
        prompt = tokenizer.decode(trainer._prompts.take(0, 1)[0][1])
        assert prompt.startswith("<|system|>") and prompt.endswith("<|assistant|>") and "a dog" in prompt

    def test_training_prompts_by_default(self, make_trainer, tokenizer, pairs):
        trainer = make_trainer(online_samples_per_step=8)
        trainer.train()
        prompts = sorted(sample.prompt_ids for sample in trainer.sample_buffer.samples)
        assert prompts == sorted(tokenizer(prompt).input_ids for prompt in pairs["prompt"])
