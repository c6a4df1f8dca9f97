# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The enumerable world against brute force: an ordinary forward, `generate`, sums in plain Python, random perturbations."""

import itertools
import math
from collections import Counter

import pytest
import torch

from trl_spo.sandbox.enumerable import (
    EnumerableWorld,
    entropy,
    expectation,
    kl_divergence,
    optimal_policy,
    total_variation,
)


WORLDS = {
    "closed": {"num_words": 8, "max_tokens": 4},
    "closed, small": {"num_words": 4, "max_tokens": 3, "num_prompts": 3},
    "closed, two tokens": {"num_words": 8, "max_tokens": 2, "num_prompts": 1},
    "open": {"num_words": 4, "max_tokens": 4, "closed": False},
}


@pytest.fixture(params=WORLDS.values(), ids=WORLDS)
def world(request):
    return EnumerableWorld(**request.param)


@pytest.fixture
def small():
    return EnumerableWorld(num_words=4, max_tokens=3)


class TestEnumeration:
    def test_number_of_completions(self):
        assert len(EnumerableWorld()) == 1 + 7 + 49 + 343
        assert len(EnumerableWorld(closed=False)) == 1 + 7 + 49 + 343 + 7**4
        assert len(EnumerableWorld(num_words=4, max_tokens=3)) == 1 + 3 + 9

    def test_completions_are_different_and_end(self, world):
        assert len(set(world.completions)) == len(world)
        for completion, terminated in zip(world.completions, world.terminated, strict=True):
            assert completion.endswith(world.tokenizer.eos_token) == bool(terminated)
            assert world.closed <= bool(terminated)

    def test_text_and_ids_agree(self, world):
        for i, completion in enumerate(world.completions):
            ids = world.completion_ids[i][world.completion_mask[i].bool()].tolist()
            for prompt, prompt_id in zip(world.prompts, world.prompt_ids.tolist(), strict=True):
                assert world.tokenizer(prompt)["input_ids"] == [prompt_id]
                assert world.tokenizer(prompt + completion)["input_ids"] == [prompt_id, *ids]
            assert " " + world.tokenizer.decode(ids) == completion
            assert world.index(completion) == world.index(ids) == i

    def test_index_ignores_what_follows_the_end(self, small):
        i = small.index(" sun .")
        assert small.index([*small.tokenizer(" sun .")["input_ids"], small.pad_token_id]) == i
        with pytest.raises(KeyError):
            small.index(" sun sun sun sun")

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"num_words": 1}, "`num_words`"),
            ({"num_words": 9}, "`num_words`"),
            ({"max_tokens": 1}, "`max_tokens`"),
            ({"num_prompts": 4}, "`num_prompts`"),
        ],
    )
    def test_bad_sizes(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            EnumerableWorld(**kwargs)


class TestLogProbs:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_probabilities_sum_to_one(self, world, dtype):
        logps = world.log_probs(world.model(seed=3, scale=2.0).to(dtype))
        assert logps.dtype == dtype
        assert logps.shape == (len(world.prompts), len(world))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(
            logps.exp().sum(-1), torch.ones(len(world.prompts), dtype=dtype), atol=tolerance, rtol=0
        )

    def test_equal_to_an_ordinary_forward(self, world):
        """One unpadded sequence at a time, as tokenized from the text, by the model's own loss."""
        model = world.model(seed=1).double()
        logps = world.log_probs(model).detach()
        for i in range(0, len(world), max(1, len(world) // 40)):
            for p, prompt in enumerate(world.prompts):
                ids = torch.tensor([world.tokenizer(prompt + world.completions[i])["input_ids"]])
                labels = ids.clone()
                labels[:, 0] = -100
                loss = model(input_ids=ids, labels=labels).loss
                assert -loss.item() * (ids.size(1) - 1) == pytest.approx(logps[p, i].item(), abs=1e-5)  # in float32

    def test_token_log_probs(self, small):
        model = small.model().double()
        tokens = small.token_log_probs(model)
        assert tokens.shape == (2, 13, 3)
        assert (tokens[:, small.completion_mask == 0] == 0).all()
        torch.testing.assert_close(tokens.sum(-1), small.log_probs(model))

    def test_differentiable(self, small):
        """The gradient of one completion's log-probability equals that of the ordinary forward."""
        model = small.model().double()
        weight = model.lm_head.weight
        (fast,) = torch.autograd.grad(small.log_probs(model)[1, 5], weight)
        ids = torch.tensor([small.tokenizer(small.prompts[1] + small.completions[5])["input_ids"]])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
        (slow,) = torch.autograd.grad(logps, weight)
        torch.testing.assert_close(fast, slow)

    def test_only_words_and_the_end_where_it_must_be(self, world):
        """Padding and prompts have no probability anywhere; in a closed world the last position has the end alone."""
        model = world.model(seed=2, scale=3.0).double()
        others = [world.prompt_ids[0].item(), *[i for i in range(world.num_words) if i != world.eos_token_id]]
        for words in itertools.islice(itertools.product(others[1:], repeat=world.max_tokens - 1), 50):
            probabilities = model(input_ids=torch.tensor([[others[0], *words]])).logits[0].softmax(-1)
            assert probabilities[:, world.num_words :].max() < 1e-30
            if world.closed:
                assert probabilities[-1, world.eos_token_id] == 1
                assert probabilities[:-1, world.eos_token_id].max() < 0.999

    def test_left_padding_changes_nothing(self, world):
        """As in the batches that trainers generate from."""
        model = world.model(seed=2)
        ids = torch.tensor([[world.prompt_ids[0], *world.completion_ids[-1].tolist()]])
        padded = torch.cat([torch.full((1, 2), world.pad_token_id), ids], dim=1)
        mask = torch.tensor([[0, 0] + [1] * ids.size(1)])
        torch.testing.assert_close(
            model(input_ids=padded, attention_mask=mask).logits[:, 2:].softmax(-1),
            model(input_ids=ids).logits.softmax(-1),
        )


class TestGenerate:
    @pytest.mark.parametrize("closed", [True, False])
    def test_samples_follow_the_enumerated_distribution(self, closed):
        """Pearson's chi-square over the whole support, rare completions pooled."""
        world = EnumerableWorld(num_words=4, max_tokens=3, closed=closed)
        model = world.model(seed=4, scale=1.5)
        n = 20_000
        torch.manual_seed(0)
        prompts = world.prompt_ids[1].expand(n, 1)
        with torch.no_grad():
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=world.max_tokens,
            )
            expected = n * world.log_probs(model)[1].double().exp()
        counts = Counter(world.index(row) for row in output[:, 1:].tolist())  # KeyError outside of the support
        observed = torch.tensor([counts[i] for i in range(len(world))], dtype=torch.float64)
        rare = expected < 5
        observed = torch.cat([observed[~rare], observed[rare].sum(0, keepdim=True)])
        expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
        keep = expected > 0
        chi_square = ((observed - expected)[keep] ** 2 / expected[keep]).sum().item()
        # The mean of chi-square is its degrees of freedom k and its variance 2k: 4 standard deviations
        k = keep.sum().item() - 1
        assert k >= 10
        assert chi_square < k + 4 * math.sqrt(2 * k)


class TestModel:
    def test_same_seed_same_model_and_global_random_state_untouched(self, small):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first, second, other = small.model(seed=1), small.model(seed=1), small.model(seed=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert total_variation(small.log_probs(first), small.log_probs(other)).min() > 0.05

    def test_save_and_load(self, world, tmp_path):
        model = world.model(seed=5)
        loaded = world.load(world.save(model, tmp_path / "model"))
        torch.testing.assert_close(world.log_probs(loaded), world.log_probs(model))
        assert loaded.config._name_or_path == str(tmp_path / "model")
        names = {name for name, p in loaded.named_parameters() if not p.requires_grad}
        assert names == {name for name, p in model.named_parameters() if not p.requires_grad}
        assert any(name.startswith("model.layers.0.") for name in names) == world.closed
        assert type(world.tokenizer).from_pretrained(tmp_path / "model").get_vocab() == world.tokenizer.get_vocab()

    def test_fit_reaches_any_distribution_and_the_world_stays_closed(self, small):
        model = small.model()
        target = optimal_policy(small.rewards(seed=1, same=False), entropy_weight=0.5)
        assert small.fit(model, target, steps=300) < 0.01
        torch.testing.assert_close(small.log_probs(model).exp().sum(-1), torch.ones(2), atol=1e-5, rtol=0)

    def test_the_minimiser_of_soft_po_can_be_reached(self, small):
        """The theorem by gradient descent on the exact expected loss, without a trainer: softmax(r/α), and not softmax(αr)."""
        alpha, rewards = 2.0, small.rewards(seed=2, scale=2.0)
        model = small.model()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
        preferred = torch.sigmoid(rewards[:, None] - rewards[None])
        for _ in range(300):
            logps = small.log_probs(model).double()
            margins = logps[:, :, None] - logps[:, None]
            optimizer.zero_grad()
            (-preferred * torch.nn.functional.logsigmoid(alpha * margins)).mean().div(alpha).backward()
            optimizer.step()
            schedule.step()
        logps = small.log_probs(model).double()
        assert total_variation(logps, optimal_policy(rewards, entropy_weight=alpha)).max() < 0.02
        assert total_variation(logps, (alpha * rewards).log_softmax(-1)).min() > 0.2


class TestQuantities:
    def test_against_brute_force(self, world):
        logps, ref_logps = (world.log_probs(world.model(seed=seed).double()).detach() for seed in (0, 1))
        values = world.rewards(same=False)
        for i in range(len(world.prompts)):
            p, q, v = logps[i].exp().tolist(), ref_logps[i].exp().tolist(), values[i].tolist()
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert kl_divergence(logps, ref_logps)[i].item() == pytest.approx(kl, rel=1e-9)
            assert entropy(logps)[i].item() == pytest.approx(-sum(a * math.log(a) for a in p), rel=1e-9)
            assert expectation(logps, values)[i].item() == pytest.approx(
                sum(a * b for a, b in zip(p, v, strict=True)), abs=1e-9
            )
            tv = sum(max(0.0, a - b) for a, b in zip(p, q, strict=True))
            assert total_variation(logps, ref_logps)[i].item() == pytest.approx(tv, rel=1e-9)

    def test_chain_rule(self, small):
        """The sequence KL is the expected sum of the token-wise KLs: what trainers estimate from samples."""
        model, reference = small.model(seed=0).double(), small.model(seed=1).double()
        exact = kl_divergence(small.log_probs(model), small.log_probs(reference))
        logps = small.log_probs(model)
        for p in range(len(small.prompts)):
            ids = torch.cat([small.prompt_ids[p].expand(len(small), 1), small.completion_ids], dim=1)
            policy = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            ref = reference(input_ids=ids).logits[:, :-1].log_softmax(-1)
            tokens = ((policy.exp() * (policy - ref)).sum(-1) * small.completion_mask).sum(-1)
            torch.testing.assert_close((logps[p].exp() * tokens).sum(), exact[p])


class TestOptimalPolicy:
    @pytest.mark.parametrize(("a", "b"), [(0.5, 0.0), (2.0, 0.0), (0.0, 0.5), (0.0, 2.0), (0.3, 0.7)])
    def test_maximises_its_objective(self, small, a, b):
        ref_logps = small.log_probs(small.model().double()).detach()
        rewards = small.rewards(seed=3)

        def objective(logps):
            return expectation(logps, rewards) + a * entropy(logps) - b * kl_divergence(logps, ref_logps)

        best = optimal_policy(rewards, entropy_weight=a, kl_weight=b, ref_logps=ref_logps)
        torch.testing.assert_close(best.exp().sum(-1), torch.ones(best.shape[:-1], dtype=torch.float64))
        generator = torch.Generator().manual_seed(0)
        for scale in (1e-3, 0.1, 1.0, 3.0):
            for _ in range(50):
                noise = scale * torch.randn(len(small), generator=generator, dtype=torch.float64)
                assert (objective((best + noise).log_softmax(-1)) < objective(best)).all()

    def test_named_cases(self, small):
        ref_logps = small.log_probs(small.model().double()).detach()
        rewards = small.rewards(seed=3)
        soft = (rewards / 0.5).softmax(-1)
        torch.testing.assert_close(optimal_policy(rewards, entropy_weight=0.5).exp(), soft)
        dpo = ref_logps.exp() * (rewards / 0.5).exp()
        dpo = dpo / dpo.sum(-1, keepdim=True)
        torch.testing.assert_close(optimal_policy(rewards, kl_weight=0.5, ref_logps=ref_logps).exp(), dpo)

    def test_bad_weights(self, small):
        with pytest.raises(ValueError, match="not both zero"):
            optimal_policy(small.rewards())
        with pytest.raises(ValueError, match="needs `ref_logps`"):
            optimal_policy(small.rewards(), kl_weight=1.0)


class TestData:
    def test_bradley_terry_frequencies(self, small):
        rewards = small.rewards(seed=0, scale=1.5)
        members = [0, 4, 9]
        n = 6000
        dataset = small.preference_pairs(rewards, n, proposal=small.uniform(members))
        assert dataset.column_names == ["prompt", "chosen", "rejected"]
        assert Counter(dataset["prompt"]) == dict.fromkeys(small.prompts, n // 2)
        rows = zip(dataset["chosen"], dataset["rejected"], strict=True)
        counts = Counter((small.index(chosen), small.index(rejected)) for chosen, rejected in rows)
        for i, j in itertools.combinations(members, 2):
            total = counts[i, j] + counts[j, i]
            assert total / n == pytest.approx(1 / 3, abs=0.03)
            expected = torch.sigmoid(rewards[i] - rewards[j]).item()
            assert counts[i, j] / total == pytest.approx(
                expected, abs=4 * math.sqrt(expected * (1 - expected) / total)
            )
        assert sum(counts.values()) == sum(counts[pair] for pair in itertools.permutations(members, 2))

    def test_pairs_from_the_model_and_rewards_of_each_prompt(self, small):
        model = small.model(scale=2.0)
        # So far apart that the better one always wins
        ranks = torch.randperm(len(small), generator=torch.Generator().manual_seed(0))
        rewards = 50.0 * torch.stack([ranks, -ranks])
        dataset = small.preference_pairs(rewards, 1000, proposal=small.log_probs(model).exp())
        for row in dataset:
            p = small.prompts.index(row["prompt"])
            chosen, rejected = small.index(row["chosen"]), small.index(row["rejected"])
            assert rewards[p, chosen] > rewards[p, rejected]
        first = Counter(small.index(row["chosen"]) for row in dataset if row["prompt"] == small.prompts[0])
        assert max(first.values()) > 2 * 500 / len(small)

    def test_same_seed_same_data(self, small):
        rewards = small.rewards()
        first, second, other = (small.preference_pairs(rewards, 50, seed=seed)[:] for seed in (0, 0, 1))
        assert first == second != other

    def test_population(self, small):
        rewards = small.rewards(seed=1)
        dataset = small.population_pairs(rewards, copies=40)
        assert len(dataset) == 2 * 40 * 13 * 12 // 2
        rows = zip(dataset["prompt"], dataset["chosen"], dataset["rejected"], strict=True)
        counts = Counter((prompt, small.index(chosen), small.index(rejected)) for prompt, chosen, rejected in rows)
        for prompt in small.prompts:
            for i, j in itertools.permutations(range(13), 2):
                expected = torch.sigmoid(rewards[i] - rewards[j]).item()
                assert counts[prompt, i, j] / 40 == pytest.approx(expected, abs=0.5 / 40 + 1e-9)
        assert len(small.population_pairs(rewards, copies=3, subset=[0, 5, 7])) == 2 * 3 * 3

    def test_plackett_luce_frequencies(self, small):
        rewards = small.rewards(seed=0)
        members = [1, 5, 8]
        n = 6000
        dataset = small.ranked_lists(rewards, n, min_size=3, proposal=small.uniform(members))
        orders = Counter()
        for row in dataset:
            assert sorted(row["ranking"]) == [0, 1, 2]
            orders[tuple(small.index(row["completions"][i]) for i in row["ranking"])] += 1
        weights = rewards.exp()
        for order in itertools.permutations(members):
            expected, left = 1.0, list(order)
            while left:
                expected *= (weights[left[0]] / weights[left].sum()).item()
                left.pop(0)
            assert orders[order] / n == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))

    def test_best_of_n_is_the_head_of_the_ranking(self, small):
        rewards = small.rewards()
        ranked = small.ranked_lists(rewards, 60, min_size=2, max_size=5, seed=3)
        best = small.best_of_n(rewards, 60, min_size=2, max_size=5, seed=3)
        assert best.column_names == ["prompt", "completions", "best"]
        assert best["completions"] == ranked["completions"]
        assert best["best"] == [ranking[0] for ranking in ranked["ranking"]]
        assert {len(completions) for completions in best["completions"]} == {2, 3, 4, 5}
        assert all(len(set(completions)) == len(completions) for completions in best["completions"])

    def test_pairs_must_end(self):
        world = EnumerableWorld(num_words=4, max_tokens=3, closed=False)
        rewards = world.rewards()
        assert all(chosen.endswith(" .") for chosen in world.preference_pairs(rewards, 50)["chosen"])
        with pytest.raises(ValueError, match="closed world"):
            world.preference_pairs(rewards, 10, proposal=world.log_probs(world.model()).exp())
        with pytest.raises(ValueError, match="closed world"):
            world.population_pairs(rewards, subset=[0, len(world) - 1])

    def test_lists_longer_than_the_support(self, small):
        with pytest.raises(ValueError, match="cannot be drawn"):
            small.ranked_lists(small.rewards(), 5, min_size=4, proposal=small.uniform([0, 1, 2]))
