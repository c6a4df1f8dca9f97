# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The world of worked sums."""

import random

import pytest
import torch

from trl_spo.sandbox import ArithmeticConfig, ArithmeticWorld
from trl_spo.sandbox.arithmetic import STYLES, is_right, prompt_text, worked_answer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("TRL_SPO_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield ArithmeticWorld(ArithmeticConfig(hidden_size=32, pretrain_steps=5, num_train_pairs=40, num_eval_sums=30))
    patch.undo()


@pytest.mark.parametrize("style", STYLES)
def test_every_right_answer_is_right(style):
    for a in range(0, 100, 7):
        for b in range(0, 100, 3):
            answer = worked_answer(a, b, style)
            assert is_right(prompt_text(a, b), answer)
            steps = answer.split(",")
            assert steps[0] in (
                f"{a % 10}+{b % 10}={a % 10 + b % 10:02}",
                f"{a // 10}+{b // 10}={a // 10 + b // 10:02}",
            )


@pytest.mark.parametrize("style", STYLES)
def test_every_wrong_answer_is_wrong(style):
    rng = random.Random(0)
    for a in range(0, 100, 7):
        for b in range(0, 100, 3):
            assert not is_right(prompt_text(a, b), worked_answer(a, b, style, rng))


@pytest.mark.parametrize("answer", ["", "=", "no sum", "7+5=12", "=1320", "=132 "])
def test_what_is_no_answer_is_wrong(answer):
    assert not is_right("47+85:", answer)


def test_tokenizer_round_trip(world):
    text = prompt_text(4, 95) + worked_answer(4, 95, STYLES[0]) + "<end>"
    ids = world.tokenizer(text)["input_ids"]
    assert len(ids) == len(text) - len("<end>") + 1 and ids[-1] == world.tokenizer.eos_token_id
    assert world.tokenizer.decode(ids) == text


def test_held_out_sums_are_held_out(world):
    train, held_out = world.pairs("train"), world.pairs("eval")
    assert len(train) == 40 and len(held_out) == 30
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert not set(world.train_sums) & set(world.eval_sums)
    for row in [*train, *held_out]:
        assert is_right(row["prompt"], row["chosen"]) and not is_right(row["prompt"], row["rejected"])


def test_made_once_and_the_same_again(world):
    first, second = world.model(), world.model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert world.pairs("train").to_list() == world.pairs("train").to_list()


def test_accuracy_counts_right_sums(world, monkeypatch):
    """Of a stand-in that answers the first sums rightly and the others not."""

    class Answers:
        device, training = "cpu", True

        def eval(self):
            self.training = False

        def train(self, mode):
            self.training = mode

        def generate(self, input_ids, **kwargs):
            texts = world.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            sums = [tuple(map(int, text.rstrip(":").split("+"))) for text in texts]
            wrong = random.Random(0)
            answers = [worked_answer(a, b, STYLES[0], wrong if i >= 12 else None) for i, (a, b) in enumerate(sums)]
            batch = world.tokenizer(answers, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
            return torch.cat([input_ids, batch], dim=1)

    assert world.accuracy(Answers()) == 12 / 30
    assert world.accuracy(Answers(), world.eval_sums[:24]) == 0.5


def test_too_many(world):
    with pytest.raises(
        ValueError, match="`num_eval_sums` \\+ `num_train_pairs` is 11000, but there are only 10000 sums"
    ):
        ArithmeticWorld(ArithmeticConfig(num_train_pairs=10500))
