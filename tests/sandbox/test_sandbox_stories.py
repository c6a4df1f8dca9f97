# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import math
import random
import statistics
from dataclasses import replace

import pytest
import torch

from trl_spo.sandbox import (
    Estimate,
    Samples,
    StoriesConfig,
    StoriesWorld,
    distinct_n,
    divergence,
    qualities,
    reward,
    sample,
    sequence_log_probs,
    win_rate,
    write_story,
)
from trl_spo.sandbox import stories as stories_module
from trl_spo.sandbox.stories import EOS, KIND, NAMES, UNKIND, VIVID, make_tokenizer, pretrain


TINY = StoriesConfig(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    pretrain_steps=20,
    pretrain_batch_size=8,
    learning_rate=1e-2,
    num_train_prompts=24,
    num_eval_prompts=12,
    max_tokens=12,
)

PROMPT = "Once upon a time there was a small fox named Tim."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_SPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield StoriesWorld(TINY)


class TestReward:
    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            # Six sentences, hero and friend keep their names, nothing kind and nothing vivid
            (
                " One day Tim found a key in a cave. Then came a big owl named Lily. Lily wanted the key. The wind was cold."
                " Tim watched Lily. In the end Tim was busy.",
                {"kindness": 0, "vividness": 0, "consistency": 0, "length": 0, "ending": 0},
            ),
            # The best there is: two kind words, four different vivid ones
            (
                " One day Tim found a golden key in a misty cave. Then came a big owl named Lily. Lily wanted the key. The"
                " wind was rosy and frosty. Tim helped Lily. In the end Tim was happy.",
                {"kindness": 2, "vividness": 4, "consistency": 0, "length": 0, "ending": 0},
            ),
            # A fifth vivid word and one said twice count nothing; nor does a third kind word
            (
                " One day Tim found a golden key in a golden cave. Then came a big owl named Lily. Tim cheered Lily. The wind"
                " was rosy and frosty and misty and amber. Tim helped Lily. In the end Tim was happy.",
                {"kindness": 2, "vividness": 4, "consistency": 0, "length": 0, "ending": 0},
            ),
            # One unkind and one kind word; Max and Anna were never introduced; one sentence too few
            (
                " One day Max found a key in a cave. Then came a big owl named Lily. Lily wanted the key. Tim pushed Lily. In"
                " the end Anna was happy.",
                {"kindness": 0, "vividness": 0, "consistency": -2, "length": -1, "ending": 0},
            ),
            # The hero never comes back (1) and Max is a stranger (1); four sentences too few; cut off
            (
                " One day Max found a key in a cave. The wind was",
                {"kindness": 0, "vividness": 0, "consistency": -2, "length": -4, "ending": -1},
            ),
            # All bounds: unkind four times, four strangers, thirteen sentences
            (
                " Max pushed Max. Max pushed Max. Tim was sad. Tim was sad." + " The wind was cold." * 9,
                {"kindness": -2, "vividness": 0, "consistency": -3, "length": -4, "ending": 0},
            ),
            # Nothing at all: the prompt's own full stop is the end
            ("", {"kindness": 0, "vividness": 0, "consistency": -1, "length": -4, "ending": 0}),
        ],
    )
    def test_by_hand(self, completion, expected):
        assert qualities(PROMPT + completion) == expected
        weights = {"kindness": 0.6, "vividness": 0.5, "consistency": 0.8, "length": 0.4, "ending": 1.0}
        assert reward(PROMPT + completion) == pytest.approx(
            sum(weights[name] * value for name, value in expected.items())
        )

    def test_spread_and_separability(self):
        """Over the grammar's stories the reward has a standard deviation of 1 to 2, and no quality decides it alone."""
        rng = random.Random(0)
        stories = [write_story(rng) for _ in range(2000)]
        rewards = [reward(story) for story in stories]
        assert 1 < statistics.stdev(rewards) < 2
        parts = {
            name: [qualities(story)[name] for story in stories] for name in ("kindness", "vividness", "consistency")
        }
        for name, part in parts.items():
            assert 0.2 < statistics.correlation(part, rewards) < 0.9, name
        assert abs(statistics.correlation(parts["kindness"], parts["vividness"])) < 0.1
        assert abs(statistics.correlation(parts["kindness"], parts["consistency"])) < 0.1

    def test_word_lists_do_not_overlap(self):
        lists = [set(VIVID), set(KIND), set(UNKIND), set(NAMES)]
        assert sum(map(len, lists)) == len(set().union(*lists))


class TestGrammarAndTokenizer:
    def test_round_trip(self):
        tokenizer = make_tokenizer()
        rng = random.Random(1)
        for _ in range(300):
            story = write_story(rng)
            ids = tokenizer(story)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == story
            prompt, _, rest = story.partition(".")
            prompt_ids = tokenizer(prompt + ".")["input_ids"]
            assert tokenizer(prompt + "." + rest + EOS)["input_ids"] == [*ids, tokenizer.eos_token_id]
            assert ids[: len(prompt_ids)] == prompt_ids

    def test_deterministic(self):
        assert [write_story(random.Random(3)) for _ in range(2)] == [write_story(random.Random(3))] * 2
        assert write_story(random.Random(0), PROMPT).startswith(PROMPT + " One ")


class TestWorld:
    def test_pretraining_learns_and_is_deterministic(self):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        model, again = pretrain(TINY), pretrain(TINY)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        tokenizer = make_tokenizer()
        rng = random.Random(9)
        stories = [write_story(rng) for _ in range(16)]
        completions = [story[story.index(".") + 1 :] for story in stories]
        prompts = [story[: story.index(".") + 1] for story in stories]
        logps = sequence_log_probs(model, tokenizer, prompts, completions)
        untrained = sequence_log_probs(pretrain(replace(TINY, learning_rate=0.0)), tokenizer, prompts, completions)
        assert logps.mean() > 0.8 * untrained.mean()

    def test_prompts(self, world):
        assert len(set(world.train_prompts) | set(world.eval_prompts)) == 24 + 12
        with pytest.raises(ValueError, match="only"):
            StoriesWorld(replace(TINY, num_train_prompts=10**6))

    def test_cached(self, world, monkeypatch):
        folder, pairs = world.folder, world.pairs("train")[:]
        monkeypatch.setattr(stories_module, "pretrain", None)
        monkeypatch.setattr(stories_module, "sample", None)
        again = StoriesWorld(TINY)
        assert again.folder == folder
        assert again.pairs("train")[:] == pairs
        # The number of prompts does not change the model, the seed does
        assert StoriesWorld(replace(TINY, num_eval_prompts=5)).folder == folder
        with pytest.raises(TypeError):
            _ = StoriesWorld(replace(TINY, seed=1)).folder

    def test_pairs(self, world):
        train, held_out = world.pairs("train"), world.pairs("eval")
        assert train.column_names == ["prompt", "chosen", "rejected"]
        assert train["prompt"] == world.train_prompts and held_out["prompt"] == world.eval_prompts
        for row in train:
            assert row["chosen"] != row["rejected"]
            assert row["chosen"].startswith(" ") and not row["chosen"].endswith(EOS)

    def test_labels_are_bradley_terry(self, tmp_path, monkeypatch):
        """With samples of known rewards: the share of wins is σ of the difference."""
        monkeypatch.setenv("TRL_SPO_CACHE", str(tmp_path))
        config = replace(TINY, num_train_prompts=2000)
        good, bad = " Tim was happy.", " Tim was sad."

        def two_samples(model, tokenizer, prompts, **kwargs):
            half = len(prompts) // 2
            return Samples(prompts, [good] * half + [bad] * half, *[torch.zeros(len(prompts), 1)] * 3)

        monkeypatch.setattr(stories_module, "sample", two_samples)
        pairs = StoriesWorld(config).pairs("train")
        # Other heroes than Tim make him a stranger in both
        difference = reward(PROMPT + good) - reward(PROMPT + bad)
        expected = 1 / (1 + math.exp(-difference))
        share = sum(chosen == good for chosen in pairs["chosen"]) / len(pairs)
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(pairs)))

    def test_trains_with_dpo(self, world, tmp_path):
        """As it is, with a trainer of TRL: the reference is the pretrained model."""
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            world.model(), args=args, train_dataset=world.pairs("train"), processing_class=world.tokenizer
        )
        trainer.train()
        first = trainer.state.log_history[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


class TestMeasures:
    def test_samples(self, world):
        model = world.model().train()
        torch.manual_seed(5)
        state = torch.get_rng_state()
        samples = sample(model, world.tokenizer, world.eval_prompts, seed=1, max_tokens=60, batch_size=5)
        assert torch.equal(torch.get_rng_state(), state) and model.training
        again = sample(model, world.tokenizer, world.eval_prompts, seed=1, max_tokens=60, batch_size=5)
        other = sample(model, world.tokenizer, world.eval_prompts, seed=2, max_tokens=60, batch_size=5)
        assert samples.completions == again.completions != other.completions
        eos = world.tokenizer.eos_token_id
        for i, story in enumerate(samples.stories):
            assert story.startswith(world.eval_prompts[i] + " ")
            ids = samples.input_ids[i][samples.completion_mask[i].bool()].tolist()
            assert eos not in ids[:-1] and (ids[-1] == eos or len(ids) == 60)
            prompt = samples.input_ids[i][(samples.attention_mask - samples.completion_mask)[i].bool()]
            assert prompt.tolist() == world.tokenizer(world.eval_prompts[i])["input_ids"]
            assert world.tokenizer.decode(ids, skip_special_tokens=True) == samples.completions[i].removeprefix(" ")

    def test_divergence_and_log_probs(self, world):
        """Against a loop over single, unpadded sequences."""
        model, reference = world.model(), pretrain(replace(TINY, seed=1))
        samples = sample(model, world.tokenizer, world.eval_prompts[:4], max_tokens=60)
        kl, entropies = divergence(model, reference, samples, batch_size=3)
        assert (kl > 0).all()
        assert (divergence(model, model, samples)[0].abs() < 1e-5).all()
        for i in range(4):
            ids = samples.input_ids[i][samples.attention_mask[i].bool()][None]
            start = ids.size(1) - samples.completion_mask[i].sum()
            p = model(input_ids=ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            q = reference(input_ids=ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            assert kl[i].item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)
            assert entropies[i].item() == pytest.approx(-(p.exp() * p).sum().item(), rel=1e-4)

    def test_sequence_log_probs(self, world):
        """Against single, unpadded sequences that end with the end-of-sequence token."""
        model, tokenizer = world.model(), world.tokenizer
        rng = random.Random(4)
        stories = [write_story(rng) for _ in range(5)]
        prompts = [story[: story.index(".") + 1] for story in stories]
        completions = [story[story.index(".") + 1 :] for story in stories]
        logps = sequence_log_probs(model, tokenizer, prompts, completions, batch_size=2)
        for i, story in enumerate(stories):
            ids = torch.tensor([tokenizer(story + EOS)["input_ids"]])
            p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])
            start = len(tokenizer(prompts[i])["input_ids"])
            assert logps[i].item() == pytest.approx(p[start - 1 :].sum().item(), rel=1e-5)

    def test_estimate(self):
        estimate = Estimate.of([1.0, 2.0, 3.0, 6.0])
        assert estimate.mean == 3.0
        assert estimate.error == pytest.approx(statistics.stdev([1, 2, 3, 6]) / 2)

    def test_win_rate(self):
        assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]).mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)

    def test_distinct(self):
        ids = torch.tensor([[9, 1, 2, 1, 2], [9, 1, 2, 3, 0]])
        mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
        samples = Samples(["", ""], ["", ""], ids, mask, mask)
        assert distinct_n(samples, 1) == 3 / 7
        assert distinct_n(samples, 2) == 3 / 5  # 12 21 12 | 12 23
        assert distinct_n(samples, 4) == 1
