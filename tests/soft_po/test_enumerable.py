# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Soft PO on worlds small enough to enumerate: the theorem, the two estimators, and what the regularizer holds."""

import json

import pytest
import torch
from transformers import TrainerCallback

from trl_spo import SoftPOConfig, SoftPOTrainer, losses
from trl_spo.sandbox.enumerable import EnumerableWorld, kl_divergence, optimal_policy, total_variation


class _AverageWeights(TrainerCallback):
    """Averages the weights of the last half of the steps, which takes the noise of the batches out of the minimiser."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps // 2:
            self.sum = [p.detach().clone() for p in model.parameters()]
            self.n = 1
        elif state.global_step > state.max_steps // 2:
            for total, p in zip(self.sum, model.parameters(), strict=True):
                total += p.detach()
            self.n += 1

    def on_train_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for total, p in zip(self.sum, model.parameters(), strict=True):
                p.copy_(total / self.n)


def _train(world, model, dataset, tmp_path, **options) -> SoftPOTrainer:
    options = {
        "per_device_train_batch_size": 128,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "linear",
        "max_steps": 300,
        "max_grad_norm": 0.0,
        "max_length": None,
        "max_completion_length": world.max_tokens,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 50,
        "disable_tqdm": True,
        **options,
    }
    args = SoftPOConfig(output_dir=str(tmp_path / "out"), **options)
    # Most rows are copies of others, and to tokenize them would take half of the time
    number: dict[str, int] = {}
    index = [number.setdefault(json.dumps(row), len(number)) for row in dataset]
    first = [index.index(i) for i in range(len(number))]
    trainer = SoftPOTrainer(
        model,
        args=args,
        train_dataset=dataset.select(first),
        processing_class=world.tokenizer,
        callbacks=[_AverageWeights()],
    )
    assert len(trainer.train_dataset) == len(number)
    trainer.train_dataset = trainer.train_dataset.select(index)
    trainer.train()
    model.eval()
    return trainer


class TestTheorem:
    """With β = 0 the trainer arrives at softmax(r/α), whatever the weights."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("alpha", "weighting", "gamma", "seed"),
        [
            (0.5, "none", 0.0, 0),
            (2.0, "none", 0.0, 0),
            (0.5, "none", 0.0, 1),
            (2.0, "none", 0.0, 2),
            (0.5, "power", 0.3, 1),
            (2.0, "power", 0.3, 2),
            (0.5, "sigmoid", 0.3, 2),
            (2.0, "sigmoid", 0.3, 1),
        ],
    )
    def test_pairs(self, alpha, weighting, gamma, seed, tmp_path):
        world = EnumerableWorld(num_words=4, max_tokens=3, num_prompts=1)
        rewards = world.rewards(seed=seed, scale=0.7)
        model = world.model(seed=seed)
        options = {"alpha": alpha, "beta": 0.0, "calibration": "none", "weighting": weighting, "gamma": gamma}
        options["max_steps"] = 300 if alpha < 1 else 150  # the flatter distribution is nearer to the model's first one
        _train(world, model, world.population_pairs(rewards, copies=60), tmp_path, **options)
        with torch.no_grad():
            logps = world.log_probs(model)[0].double()
        assert total_variation(logps, torch.log_softmax(rewards / alpha, 0)) < 0.02
        # α on the wrong side would not pass
        assert total_variation(logps, torch.log_softmax(rewards * alpha, 0)) > 0.1

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["ranked_lists", "best_of_n"])
    def test_lists(self, kind, tmp_path):
        world = EnumerableWorld(num_words=3, max_tokens=3, num_prompts=1)
        rewards = world.rewards(seed=3, scale=0.7)
        dataset = getattr(world, kind)(rewards, 20_000, 3, seed=0)
        model = world.model(seed=3)
        options = {"alpha": 0.5, "beta": 0.0, "calibration": "none", "max_steps": 200}
        _train(world, model, dataset, tmp_path, **options)
        with torch.no_grad():
            logps = world.log_probs(model)[0].double()
        assert total_variation(logps, torch.log_softmax(rewards / 0.5, 0)) < 0.02

    @pytest.mark.slow
    def test_calibrated_minimiser(self, tmp_path):
        # calibration="reference": π_ref exp(r/α), with the reference reloaded from where the model was saved
        world = EnumerableWorld(num_words=4, max_tokens=3, num_prompts=1)
        rewards = world.rewards(seed=1, scale=0.7)
        folder = world.save(world.model(seed=1), tmp_path / "model")
        model = world.load(folder)
        with torch.no_grad():
            reference = world.log_probs(model)[0].double()
        options = {"alpha": 1.0, "beta": 0.0, "max_steps": 200}
        _train(world, model, world.population_pairs(rewards, copies=60), tmp_path, **options)
        with torch.no_grad():
            logps = world.log_probs(model)[0].double()
        expected = optimal_policy(rewards, kl_weight=1.0, ref_logps=reference)
        assert total_variation(logps, expected) < 0.02
        assert total_variation(logps, torch.log_softmax(rewards, 0)) > 0.05


class TestEstimators:
    """In float64, over the enumerated distribution of a real Llama."""

    @pytest.fixture(scope="class")
    def setting(self):
        world = EnumerableWorld(num_words=8, max_tokens=4, closed=False, num_prompts=1)
        policy, reference = world.model(seed=0).double(), world.model(seed=1).double()
        parameters = [p for p in policy.parameters() if p.requires_grad]
        with torch.no_grad():
            ref_logps = world.log_probs(reference)[0]
        logps = world.log_probs(policy)[0]
        exact = kl_divergence(logps, ref_logps)
        grads = torch.autograd.grad(exact, parameters, allow_unused=True)
        return world, policy, reference, parameters, logps.detach().exp(), exact.detach(), grads

    @staticmethod
    def _mean_over_samples(setting, estimator):
        """Σ_y π(y) K(x, y), every completion taken as a sample with its logits from an ordinary forward."""
        world, policy, reference, parameters, probabilities, _, _ = setting
        prompt = world.prompt_ids[:1].expand(len(world), 1)
        input_ids = torch.cat([prompt, world.completion_ids], dim=1)
        logits = policy(input_ids=input_ids).logits[:, :-1]
        with torch.no_grad():
            reference_logits = reference(input_ids=input_ids).logits[:, :-1]
        kl = losses.token_kl(logits, reference_logits, world.completion_mask)
        logps = logits.log_softmax(-1).gather(2, world.completion_ids.unsqueeze(2)).squeeze(2) * world.completion_mask
        per_sample = kl.sum(dim=1) if estimator == "token" else losses.score_kl(kl, logps)
        value = (probabilities * per_sample).sum()
        return value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)

    @staticmethod
    def _relative_error(grads, exact):
        error = sum((a - b).square().sum() for a, b in zip(grads, exact, strict=True) if b is not None)
        return (error / sum(g.square().sum() for g in exact if g is not None)).sqrt().item()

    @pytest.mark.parametrize("estimator", ["token", "score"])
    def test_values_are_the_exact_kl(self, setting, estimator):
        value, _ = self._mean_over_samples(setting, estimator)
        torch.testing.assert_close(value, setting[5], rtol=1e-9, atol=0)

    def test_only_the_score_gradient_is_exact(self, setting):
        assert self._relative_error(self._mean_over_samples(setting, "score")[1], setting[6]) < 1e-6
        assert self._relative_error(self._mean_over_samples(setting, "token")[1], setting[6]) > 0.01


class TestGlobalRegularizer:
    @pytest.mark.slow
    def test_holds_what_no_pair_speaks_of(self, tmp_path):
        # Pairs over half of the support: what happens to the other half?
        world = EnumerableWorld(num_words=4, max_tokens=3, num_prompts=1)
        rewards = world.rewards(seed=0, scale=1.0)
        half = list(range(0, len(world), 2))
        rest = torch.tensor([i for i in range(len(world)) if i not in half])
        folder = world.save(world.model(seed=0, scale=0.5), tmp_path / "model")
        with torch.no_grad():
            reference = world.log_probs(world.load(folder))[0].double().log_softmax(0)

        def drift(beta: float) -> tuple[float, float]:
            """Largest change of the log-odds of the rest within itself, and KL to the reference."""
            model = world.load(folder)
            dataset = world.population_pairs(rewards, copies=10, subset=half)
            options = {
                "alpha": 0.5,
                "beta": beta,
                "calibration": "none",
                "online_samples_per_step": 64,
                "resample_steps": 2,
            }
            _train(world, model, dataset, tmp_path, max_steps=200, **options)
            with torch.no_grad():
                logps = world.log_probs(model)[0].double()
            change = (logps[rest].logsumexp(0) - reference[rest].logsumexp(0)).abs().item()
            return change, kl_divergence(logps, reference).item()

        (held, held_kl), (free, free_kl) = drift(1.0), drift(0.0)
        assert free > 4 * held, (free, held)
        assert free_kl > 4 * held_kl, (free_kl, held_kl)
