# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Prompts: what is dropped and why, near-duplicates against brute force, lengths, topics, overlap with the human check set."""

import random

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_spo.synthetic import near_duplicates
from trl_spo.synthetic.near_duplicates import NearDuplicates, jaccard, normalized, similarity
from trl_spo.synthetic.prompts import DROP_REASONS, balance, prepare_prompts, prompt_id, refuse_overlap


WORDS = (
    "sea red old film dog house story night music river bread stone winter garden letter train window morning".split()
)
SYSTEM = "You are a careful assistant, who answers in a few short sentences and never makes anything up. " * 5


def sentence(rng, n=16):
    return " ".join(rng.choice(WORDS) + rng.choice(["", "s", "er", str(rng.randrange(100))]) for _ in range(n))


def user(text, system=None):
    return ([] if system is None else [{"role": "system", "content": system}]) + [{"role": "user", "content": text}]


def prepare(prompts, **kwargs):
    return prepare_prompts(Dataset.from_dict({"prompt": prompts}), **kwargs)


def reasons(prepared):
    return list(zip(prepared.dropped["prompt"], prepared.dropped["reason"], strict=True))


class TestIds:
    def test_is_the_same_in_every_run_and_form_of_the_dataset(self):
        assert prompt_id("Why?") == "499f097cf704535e"
        messages = user("Why?")
        assert prompt_id(messages) == prompt_id([{"content": "Why?", "role": "user", "name": None}])
        assert len({prompt_id("Why?"), prompt_id(messages), prompt_id("Why ?"), prompt_id(user("Why?", "Hi"))}) == 4

    def test_is_a_column(self):
        prepared = prepare(["Why is it red?", "WHY is it red?"])
        assert prepared.prompts["prompt_id"][:] == [prompt_id("Why is it red?")]
        assert prepared.dropped["prompt_id"][:] == [prompt_id("WHY is it red?")]
        assert prepared.dropped["duplicate_of"][:] == [prompt_id("Why is it red?")]


class TestDuplicates:
    def test_each_is_dropped_with_its_reason(self, tokenizer):
        film = "the film was a slow and sad story about a dog and a house by the sea"
        dataset = Dataset.from_dict(
            {
                "prompt": [film, "café", film.upper(), "  cafe\u0301\n", film + ".", "a night " * 20, "I would"],
                "other": list(range(7)),
            }
        )
        prepared = prepare_prompts(dataset, tokenizer, max_prompt_length=60)
        assert prepared.prompts["prompt"][:] == [film, "café", "I would"]
        assert prepared.prompts["other"][:] == [0, 1, 6]
        assert prepared.dropped["other"][:] == [2, 3, 4, 5]
        assert prepared.dropped["reason"][:] == ["duplicate", "duplicate", "near-duplicate", "too long"]
        assert prepared.dropped["duplicate_of"][:] == [prompt_id(film), prompt_id("café"), prompt_id(film), None]
        dropped = {"duplicate": 2, "near-duplicate": 1, "too long": 1}
        assert prepared.report == {"prompts": 7, "kept": 3, "dropped": dropped}
        assert set(dropped) == set(DROP_REASONS)

    def test_keeps_what_differs(self):
        prompts = ["What is 2²?", "What is 22?", "hi", "hi!", "ab", "ba"]
        assert prepare(prompts).prompts["prompt"][:] == prompts

    def test_without_near_duplicates_only_equal_ones_are_dropped(self):
        text = "the old sea captain found a red house near the harbour"
        assert reasons(prepare([text, text + ".", " " + text], near_duplicates=None)) == [(" " + text, "duplicate")]

    def test_at_the_threshold(self):
        # 16 pieces of 5 characters, of which 4 differ: 12 / 20
        one, other = "abcdefghijklmnopqrst", "abcdefghijklmnopqr12"[:16] + "1234"
        assert jaccard(one, other) == 12 / 20
        assert reasons(prepare([one, other], near_duplicates=0.6)) == [(other, "near-duplicate")]
        assert reasons(prepare([one, other], near_duplicates=0.601)) == []

    def test_only_what_is_kept_makes_a_duplicate(self):
        one = "abcdefghijklmnopqrstuvwxyz0123456789"
        two, three = one[:-2] + "##", "##" + one[2:-2] + "##"
        assert jaccard(one, two) > 0.85 and jaccard(two, three) > 0.85 and jaccard(one, three) < 0.85
        assert reasons(prepare([one, two, three], near_duplicates=0.85)) == [(two, "near-duplicate")]

    @settings(max_examples=20, deadline=None)
    @given(
        st.lists(st.text("abc é\t", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=12),
        st.sampled_from([0.3, 0.6, 0.9, 1.0]),
    )
    def test_nothing_is_lost_and_none_is_dropped_wrongly(self, prompts, threshold):
        prepared = prepare(prompts, near_duplicates=threshold)
        assert sorted([*prepared.prompts["prompt"], *prepared.dropped["prompt"]]) == sorted(prompts)
        texts = {prompt_id(prompt): normalized(prompt) for prompt in prepared.prompts["prompt"]}
        assert len(texts) == len(set(texts.values())) == len(prepared.prompts)
        for row in prepared.dropped:
            alike = similarity(normalized(row["prompt"]), texts[row["duplicate_of"]])
            assert alike == 1 if row["reason"] == "duplicate" else threshold <= alike

    @pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
    def test_near_duplicates_are_found(self, threshold):
        rng = random.Random(0)
        texts = [sentence(rng) for _ in range(150)]
        near = []
        while len(near) < 150:
            text = texts[len(near)]
            for _ in range(rng.randint(1, 12)):
                place = rng.randrange(len(text))
                text = text[:place] + rng.choice("xyz") + text[place + 1 :]
            if threshold <= jaccard(text, texts[len(near)]) < threshold + 0.07:
                near.append(text)
        dropped = set(prepare(texts + near, near_duplicates=threshold).dropped["prompt"])
        assert not dropped & set(texts)
        assert len(dropped & set(near)) / len(near) >= 0.97

    @pytest.mark.parametrize("in_system", [False, True])
    def test_of_a_template_few_are_compared_in_full(self, monkeypatch, in_system):
        calls = []
        monkeypatch.setattr(near_duplicates, "similarity", lambda *pair: calls.append(pair) or similarity(*pair))
        rng = random.Random(0)
        template, own = sentence(rng, 70 if in_system else 14), [sentence(rng, 9) for _ in range(150)]
        prompts = [user(text, template) if in_system else template + text for text in own]
        alike = jaccard(template + own[0], template + own[1])
        assert (0.75 if in_system else 0.45) < alike < (0.85 if in_system else 0.55)
        assert len(prepare(prompts).prompts) == 150
        assert len(calls) < 0.02 * 150 * 149 / 2  # of all texts, a quarter are candidates


class TestConversations:
    def test_a_system_message_makes_nothing_alike(self):
        rng = random.Random(0)
        one, two = sentence(rng), sentence(rng)
        assert reasons(prepare([user(one, SYSTEM), user(two, SYSTEM)])) == []
        found = reasons(prepare([user(one, SYSTEM), user(one + "!", SYSTEM)]))
        assert found == [(user(one + "!", SYSTEM), "near-duplicate")]

    def test_all_messages_and_their_roles_count(self):
        text = "the old sea captain found a red house"
        assert reasons(prepare([user(text, "Answer in French."), user(text, "Be brief and kind.")])) == []
        assert similarity(normalized(user(text, text)), normalized(user(text) + user(text))) == 0
        assert similarity(normalized(text), normalized(user(text))) == 1
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        assert reasons(prepare([turns + user("Why is that?"), turns + user("Where is it now?")])) == []

    def test_the_place_of_a_text_counts(self):
        # All pieces together are the same, but not message by message
        one, two = "the old sea captain found a house", "a dog came home late in the night"
        turns = [
            [{"role": role, "content": text} for role, text in zip("ab", order, strict=True)]
            for order in ((one, two), (two, one))
        ]
        assert reasons(prepare(turns, near_duplicates=0.1)) == []


class TestLengths:
    def test_of_text(self, tokenizer):
        text = "the film was a slow story"
        length = len(tokenizer(text).input_ids)
        assert reasons(prepare([text, text + " again"], tokenizer=tokenizer, max_prompt_length=length)) == [
            (text + " again", "too long")
        ]

    @pytest.mark.parametrize("last", ["user", "assistant"])
    def test_of_messages_with_the_chat_template(self, tokenizer, last):
        messages = [{"role": "user", "content": "a good film"}, {"role": last, "content": "it is"}]
        end = "<|end|><|assistant|>" if last == "user" else ""
        text = f"<|user|>a good film<|end|><|{last}|>it is{end}"
        length = len(tokenizer(text, add_special_tokens=False).input_ids)
        assert len(prepare([messages], tokenizer=tokenizer, max_prompt_length=length).prompts) == 1
        with pytest.raises(ValueError, match=f"shortest one of the 1 prompts has {length} tokens"):
            prepare([messages], tokenizer=tokenizer, max_prompt_length=length - 1)


class TestTopics:
    PROMPTS = ["the red sea", "old dogs", "winter bread", "my red house", "RED again"]

    def test_of_a_column(self):
        dataset = Dataset.from_dict({"prompt": self.PROMPTS, "topic": [2, 1, 1, 2, 1], "intent": list("aaaab")})
        prepared = prepare_prompts(dataset, topic_column="topic")
        assert prepared.prompts.column_names == ["prompt", "topic", "intent", "prompt_id"]
        assert prepared.prompts["topic"][:] == [2, 1, 1, 2, 1]
        topics = prepared.report["topics"]
        assert topics["of"] == [
            {"topic": "1", "prompts": 3, "share": 0.6, "examples": ["old dogs", "winter bread", "RED again"]},
            {"topic": "2", "prompts": 2, "share": 0.4, "examples": ["the red sea", "my red house"]},
        ]
        assert topics["effective_number"] == pytest.approx(np.exp(-0.6 * np.log(0.6) - 0.4 * np.log(0.4)))

    def test_of_an_embedding(self):
        prompts = self.PROMPTS + [self.PROMPTS[0]]  # dropped ahead of the clustering

        def embed(texts):
            assert texts == self.PROMPTS
            return [[float("red" in text.lower()), 0.0] for text in texts]

        prepared = prepare(prompts, embed=embed, num_topics=2)
        topics = prepared.prompts["topic"][:]
        assert set(topics) == {"0", "1"}
        assert [topic == topics[0] for topic in topics] == ["red" in prompt.lower() for prompt in self.PROMPTS]
        assert [row["prompts"] for row in prepared.report["topics"]["of"]] == [3, 2]

    def test_more_clusters_than_prompts(self):
        prepared = prepare(["the red sea", "old dogs"], embed=lambda texts: np.eye(2))
        assert sorted(prepared.prompts["topic"]) == ["0", "1"]

    def test_the_seed_decides(self):
        vectors = np.random.default_rng(0).normal(size=(40, 3))
        prompts = [f"{i}" for i in range(40)]
        first, again, other = (
            prepare(prompts, embed=lambda texts: vectors, num_topics=6, seed=seed).prompts["topic"][:]
            for seed in (0, 0, 1)
        )
        assert first == again != other

    def test_effective_number_of_even_topics(self):
        found = balance(list("abcd") * 5, ["text"] * 20)
        assert found["effective_number"] == pytest.approx(4)
        assert all(len(topic["examples"]) == 3 for topic in found["of"])


class TestErrors:
    @pytest.mark.parametrize(
        ("columns", "options", "message"),
        [
            ({"text": ["a"]}, {}, r"no column `prompt`, but \['text'\]"),
            ({"prompt": []}, {}, "is empty"),
            ({"prompt": ["a", " \n"]}, {}, r"Row 1 .* is empty \(' \\n'\)"),
            ({"prompt": ["a", None]}, {}, "Row 1 .* is empty"),
            ({"prompt": [user("a"), []]}, {}, "Row 1 .* is empty"),
            ({"prompt": [user("a"), user(" ", "Be kind.")]}, {}, "Row 1 .* is empty"),
            ({"prompt": [3]}, {}, "Row 0 .* is not a text"),
            ({"prompt": [["a"]]}, {}, "Row 0 .* is not a text"),
            ({"prompt": [[{"role": "user", "content": [{"type": "image"}]}]]}, {}, "Row 0 .* is not a text"),
            ({"prompt": ["a"], "prompt_id": ["x"]}, {}, "has a column `prompt_id`"),
            ({"prompt": ["a"], "reason": ["x"]}, {}, "has a column `reason`"),
            ({"prompt": ["a"], "duplicate_of": ["x"]}, {}, "has a column `duplicate_of`"),
            ({"prompt": ["a"], "topic": ["x"]}, {"embed": np.ones}, "has a column `topic`.*`topic_column='topic'`"),
            ({"prompt": ["a"]}, {"topic_column": "b"}, r"`topic_column='b'` is not one of the columns \['prompt'\]"),
            ({"prompt": ["a"]}, {"topic_column": "prompt", "embed": np.ones}, "set together with `embed`"),
            ({"prompt": ["a"]}, {"max_prompt_length": 5}, "`max_prompt_length=5` .* needs the `tokenizer`"),
            ({"prompt": ["a"]}, {"near_duplicates": 0.05}, "`near_duplicates`.* from 0.1 to 1, .* got 0.05"),
            ({"prompt": ["a"]}, {"near_duplicates": 1.01}, "got 1.01"),
            ({"prompt": ["a"]}, {"embed": np.ones, "num_topics": 0}, "`num_topics` must be at least 1, got 0"),
            ({"prompt": ["a"]}, {"embed": lambda texts: np.ones((2, 3))}, r"each of the 1 texts, .* shape \(2, 3\)\."),
            ({"prompt": ["a"]}, {"embed": lambda texts: np.ones(1)}, r"returned shape \(1,\)\."),
            ({"prompt": ["a"]}, {"embed": lambda texts: np.array([[np.nan]])}, r"shape \(1, 1\) with NaN"),
        ],
    )
    def test_message(self, columns, options, message):
        with pytest.raises(ValueError, match=message):
            prepare_prompts(Dataset.from_dict(columns), **options)

    def test_length_must_be_positive(self, tokenizer):
        with pytest.raises(ValueError, match="`max_prompt_length=0` must be positive"):
            prepare(["a"], tokenizer=tokenizer, max_prompt_length=0)

    def test_a_dict_of_splits(self):
        with pytest.raises(TypeError, match="got a DatasetDict. Pick one of its splits"):
            prepare_prompts(DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})))

    def test_missing_packages(self, monkeypatch):
        monkeypatch.setattr(near_duplicates, "find_spec", lambda name: None)
        install = r'`pip install "trl-spo\[synthetic\]"`'
        with pytest.raises(ImportError, match=f"`near_duplicates=0.8` needs .* `datasketch`.*{install}"):
            prepare(["a"])
        with pytest.raises(ImportError, match=f"`embed` needs .* `sklearn`.*{install}"):
            prepare(["a"], near_duplicates=None, embed=np.ones)
        assert len(prepare(["a"], near_duplicates=None).prompts) == 1
        with pytest.raises(ImportError, match="datasketch"):
            refuse_overlap(["a"], ["b"])
        refuse_overlap(["a"], ["b"], threshold=None)

    def test_columns_have_their_types_even_if_nothing_is_dropped(self):
        none, some = prepare(["a", "b"]).dropped, prepare(["a", "A", "the film"]).dropped
        assert len(none) == 0 and none.features == some.features
        assert len(concatenate_datasets([none, some])) == 1


class TestOverlap:
    CHECK = [
        "the old sea captain found a red house near the harbour",
        "What is the capital of France, and since when?",
    ]

    def test_none(self):
        refuse_overlap(["Why is the sky blue?", "What is the capital of Norway?"], self.CHECK)
        refuse_overlap(["Why is the sky blue?"], [])

    @pytest.mark.parametrize("threshold", [0.8, None])
    def test_equal(self, threshold):
        prompts = ["Why is the sky blue?", self.CHECK[1].upper(), self.CHECK[0], self.CHECK[0] + " "]
        with pytest.raises(
            ValueError, match="^3 of the training prompts .* 'WHAT IS THE CAPITAL.* 'What is the capital"
        ):
            refuse_overlap(prompts, self.CHECK, threshold)

    def test_near(self):
        prompts = ["Why is the sky blue?", self.CHECK[0] + ".", self.CHECK[1][:-1]]
        with pytest.raises(ValueError, match=r"^2 of .*a similarity of at least 0.8.*near the harbour\.'"):
            refuse_overlap(prompts, self.CHECK)
        refuse_overlap(prompts, self.CHECK, None)

    def test_a_system_message_hides_nothing(self):
        with pytest.raises(ValueError, match="^1 of"):
            refuse_overlap([user(self.CHECK[0] + "!", SYSTEM)], self.CHECK)
        with pytest.raises(ValueError, match="^1 of"):
            refuse_overlap([self.CHECK[0]], [user(self.CHECK[0], SYSTEM)], None)
        # Unless there is nothing else
        one, other = ([{"role": "system", "content": text}] for text in self.CHECK)
        refuse_overlap([one], [other])
        with pytest.raises(ValueError, match="^1 of"):
            refuse_overlap([one, other], [one])

    def test_each_check_prompt_counts_even_if_they_are_alike(self):
        one = "abcdefghijklmnopqrstuvwxyz0123456789"
        two, three = one[:-2] + "##", "##" + one[2:-2] + "##"
        with pytest.raises(ValueError, match="^1 of"):
            refuse_overlap([three], [one, two], 0.85)

    def test_errors(self):
        with pytest.raises(ValueError, match="Prompt 1 of the human check set is empty"):
            refuse_overlap(["a"], ["b", ""])
        with pytest.raises(ValueError, match="Training prompt 0 is empty"):
            refuse_overlap([""], ["b"])
        with pytest.raises(ValueError, match="`threshold`.* got 2"):
            refuse_overlap(["a"], ["b"], 2)


def test_near_duplicates_finds_the_first():
    near = NearDuplicates(0.5, 3)
    texts = ["abcdefghijklmnopqrst", "abcdefghijklmnopqrst1", "abcdefghijklmnopqrst2"]
    for text in texts:
        near.add(normalized(text))
    assert near.find(normalized(texts[2])) == normalized(texts[0])
