# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The equations in float64, against enumeration, closed forms and finite differences."""

import itertools
import math

import pytest
import torch

from trl_spo import losses


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


ALPHAS = [0.05, 0.5, 1.0, 2.0]


class TestPreferenceLosses:
    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_pair_is_the_cross_entropy_of_the_soft_preference(self, alpha):
        # From the definition, in probabilities
        p_w, p_l = torch.rand(5) + 0.1, torch.rand(5) + 0.1
        preference = p_w**alpha / (p_w**alpha + p_l**alpha)
        loss = losses.soft_preference_loss(p_w.log(), p_l.log(), alpha)
        torch.testing.assert_close(loss, -preference.log() / alpha)

    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_gradient_of_a_pair(self, alpha):
        # d/d log π_w = -P(y_l > y_w): α cancels, so at equal scores it is -1/2 whatever α
        chosen, rejected = torch.randn(4, requires_grad=True), torch.randn(4)
        losses.soft_preference_loss(chosen, rejected, alpha).sum().backward()
        torch.testing.assert_close(chosen.grad, -torch.sigmoid(alpha * (rejected - chosen.detach())))

    def test_no_overflow_far_apart(self):
        loss = losses.soft_preference_loss(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), 2.0)
        torch.testing.assert_close(loss, torch.tensor([1e4, 0.0]))

    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_best_of_n_by_its_definition(self, alpha):
        p = torch.rand(6, 4) + 0.1
        best = torch.tensor([0, 1, 2, 3, 0, 2])
        by_hand = [
            -math.log(row[b] ** alpha / sum(q**alpha for q in row)) / alpha
            for row, b in zip(p.tolist(), best, strict=True)
        ]
        torch.testing.assert_close(losses.soft_best_of_n_loss(p.log(), best, alpha), torch.tensor(by_hand))

    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_ranking_is_the_likelihood_of_plackett_luce(self, alpha):
        # exp(-α loss) is the probability of the order when items with weights π^α are drawn without replacement; over
        # all orders these probabilities sum to 1
        p = torch.rand(4) + 0.1
        orders = torch.tensor(list(itertools.permutations(range(4))))
        loss = losses.soft_ranking_loss(p.log()[orders], alpha)
        torch.testing.assert_close(torch.exp(-alpha * loss).sum(), torch.tensor(1.0))
        w = (p**alpha).tolist()
        by_hand = w[2] / sum(w) * w[0] / (w[0] + w[1] + w[3]) * w[3] / (w[1] + w[3])
        loss = losses.soft_ranking_loss(p.log()[[2, 0, 3, 1]].unsqueeze(0), alpha)
        torch.testing.assert_close(torch.exp(-alpha * loss), torch.tensor([by_hand]))

    @pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)])
    def test_two_responses_are_a_pair(self, weights):
        logps = torch.randn(3, 2, requires_grad=True)
        pair = losses.soft_preference_loss(logps[:, 0], logps[:, 1], 0.3, weights)
        best = losses.soft_best_of_n_loss(logps, torch.zeros(3, dtype=torch.long), 0.3, weights=weights)
        ranking = losses.soft_ranking_loss(logps, 0.3, weights=weights)
        torch.testing.assert_close(best, pair)
        torch.testing.assert_close(ranking, pair)
        grads = [torch.autograd.grad(loss.sum(), logps, retain_graph=True)[0] for loss in (pair, best, ranking)]
        torch.testing.assert_close(grads[1], grads[0])
        torch.testing.assert_close(grads[2], grads[0])

    def test_ragged_lists_equal_their_short_forms(self):
        short, long = torch.randn(2, 3), torch.randn(1, 5)
        logps = torch.full((3, 5), 123.0)
        logps[:2, :3], logps[2:] = short, long
        logps.requires_grad_()
        mask = torch.ones(3, 5, dtype=torch.bool)
        mask[:2, 3:] = False
        ranking = losses.soft_ranking_loss(logps, 0.7, mask)
        torch.testing.assert_close(ranking[:2], losses.soft_ranking_loss(short, 0.7))
        torch.testing.assert_close(ranking[2:], losses.soft_ranking_loss(long, 0.7))
        best = torch.tensor([1, 0, 4])
        torch.testing.assert_close(
            losses.soft_best_of_n_loss(logps, best, 0.7, mask)[:2], losses.soft_best_of_n_loss(short, best[:2], 0.7)
        )
        ranking.sum().backward()
        assert logps.grad.isfinite().all()
        assert (logps.grad[~mask] == 0).all()

    def test_ranks_reorder_and_tie(self):
        logps = torch.randn(2, 4)
        order = torch.tensor([[3, 1, 0, 2], [0, 2, 1, 3]])
        torch.testing.assert_close(
            losses.soft_ranking_loss(logps, 0.4, ranks=order.argsort(dim=1)),
            losses.soft_ranking_loss(logps.gather(1, order), 0.4),
        )
        # One best response and tied others: best of n
        best = torch.tensor([2, 0])
        ranks = (torch.arange(4) != best.unsqueeze(1)).long()
        torch.testing.assert_close(
            losses.soft_ranking_loss(logps, 0.4, ranks=ranks), losses.soft_best_of_n_loss(logps, best, 0.4)
        )
        # y_0, y_1 tied above y_2: each is compared with y_2 only
        loss = losses.soft_ranking_loss(logps[:, :3], 0.4, ranks=torch.tensor([[0, 0, 1]]).expand(2, 3))
        pairs = [losses.soft_preference_loss(logps[:, k], logps[:, 2], 0.4) for k in (0, 1)]
        torch.testing.assert_close(loss, pairs[0] + pairs[1])

    def test_ranking_weights_of_each_stage(self):
        logps, weights = torch.randn(2, 3), torch.rand(2, 3)
        first = losses.soft_best_of_n_loss(logps, torch.zeros(2, dtype=torch.long), 0.3)
        second = losses.soft_preference_loss(logps[:, 1], logps[:, 2], 0.3)
        torch.testing.assert_close(
            losses.soft_ranking_loss(logps, 0.3, weights=weights), weights[:, 0] * first + weights[:, 1] * second
        )


class TestTheorem:
    """1.6: with β = 0 and Bradley-Terry preferences the minimiser is softmax(r/α), whatever the positive symmetric μ."""

    @staticmethod
    def _minimise(loss_of) -> torch.Tensor:
        logits = torch.zeros(5, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = loss_of(logits.log_softmax(0))
            loss.backward()
            return loss

        optimizer.step(closure)
        return logits.detach().softmax(0)

    @pytest.mark.parametrize("alpha", [0.5, 2.0])
    @pytest.mark.parametrize("weighting", ["none", "power", "sigmoid"])
    def test_pairs(self, alpha, weighting):
        rewards = torch.tensor([0.0, 1.0, -0.5, 0.3, 2.0])
        i, j = torch.tensor(list(itertools.permutations(range(5), 2))).T
        preference = torch.sigmoid(rewards[i] - rewards[j])

        def loss_of(logps):
            pairs = torch.stack([logps[i], logps[j]], dim=1)
            weights = losses.pair_weights(pairs.new_tensor(0) + pairs, weighting, 0.5)
            return (preference * losses.soft_preference_loss(logps[i], logps[j], alpha, weights)).sum()

        if weighting == "none":
            policy = self._minimise(loss_of)
        else:  # μ moves with the policy without a gradient: find the fixed point by gradient steps
            logits = torch.zeros(5, requires_grad=True)
            optimizer = torch.optim.Adam([logits], lr=0.02)
            for _ in range(3000):
                optimizer.zero_grad()
                loss_of(logits.log_softmax(0)).backward()
                optimizer.step()
            policy = logits.detach().softmax(0)
        expected = torch.softmax(rewards / alpha, 0)
        assert (policy - expected).abs().sum() / 2 < 1e-3
        assert (policy - torch.softmax(alpha * rewards, 0)).abs().sum() / 2 > 0.1  # what a misplaced α would give

    @pytest.mark.parametrize("alpha", [0.5, 2.0])
    def test_rankings_and_best_of_n(self, alpha):
        rewards = torch.tensor([0.0, 1.0, -0.5, 0.3, 2.0])
        lists = torch.tensor(list(itertools.permutations(range(5), 3)))
        w = rewards.exp()[lists]
        plackett_luce = w[:, 0] / w.sum(1) * w[:, 1] / (w[:, 1] + w[:, 2])
        expected = torch.softmax(rewards / alpha, 0)
        ranked = self._minimise(lambda logps: (plackett_luce * losses.soft_ranking_loss(logps[lists], alpha)).sum())
        assert (ranked - expected).abs().sum() / 2 < 1e-4
        best = torch.zeros(len(lists), dtype=torch.long)
        first = w[:, 0] / w.sum(1)
        best_of_3 = self._minimise(lambda logps: (first * losses.soft_best_of_n_loss(logps[lists], best, alpha)).sum())
        assert (best_of_3 - expected).abs().sum() / 2 < 1e-4


class TestWeights:
    def test_power_and_sigmoid_by_hand(self):
        p = torch.tensor([[0.2, 0.3], [0.01, 0.04]])
        v = torch.tensor([0.5**0.7, 0.05**0.7])
        torch.testing.assert_close(losses.pair_weights(p.log(), "power", 0.7), v)
        expected = torch.tensor([2 / (1 + math.exp(-3 * (x - v.mean()))) for x in v])
        torch.testing.assert_close(losses.pair_weights(p.log(), "sigmoid", 0.7, scale=3.0), expected)
        shifted = losses.pair_weights(p.log(), "sigmoid", 0.7, batch_mean=torch.tensor(0.1))
        torch.testing.assert_close(shifted, 2 * torch.sigmoid(v - 0.1))
        torch.testing.assert_close(losses.pair_weights(p.log(), "none", 0.7), torch.ones(2))

    @pytest.mark.parametrize("weighting", ["none", "power", "sigmoid"])
    def test_gamma_0_is_1_and_there_is_no_gradient(self, weighting):
        logps = (torch.randn(3, 2) - 200).requires_grad_()
        weights = losses.pair_weights(logps, weighting, 0.0)
        torch.testing.assert_close(weights, torch.ones(3))
        assert not losses.pair_weights(logps, weighting, 0.3).requires_grad

    def test_long_responses_do_not_underflow(self):
        logps = torch.tensor([[-2000.0, -2001.0]])  # exp of either is 0
        expected = math.exp(0.01 * (-2000 + math.log(1 + math.exp(-1))))
        torch.testing.assert_close(losses.pair_weights(logps, "power", 0.01), torch.tensor([expected]))

    def test_symmetric_and_masked(self):
        logps = torch.randn(4, 3)
        mask = torch.tensor([[True, True, False]]).expand(4, 3)
        torch.testing.assert_close(
            losses.pair_weights(logps, "power", 0.3, mask), losses.pair_weights(logps[:, [1, 0]], "power", 0.3)
        )

    def test_unknown_weighting(self):
        with pytest.raises(ValueError, match="Unknown weighting: 'linear'"):
            losses.pair_weights(torch.zeros(1, 2), "linear", 1.0)


class _TinyPolicy:
    """All sequences of 3 tokens over 3 words; next-token logits depend on the whole prefix through free parameters."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.tables = [torch.randn(3**t, 3, generator=generator, dtype=torch.float64) for t in range(3)]
        for table in self.tables:
            table.requires_grad_()
        self.sequences = torch.tensor(list(itertools.product(range(3), repeat=3)))

    def logits(self) -> torch.Tensor:  # (27, 3, V)
        y = self.sequences
        prefixes = [torch.zeros(27, dtype=torch.long), y[:, 0], 3 * y[:, 0] + y[:, 1]]
        return torch.stack([table[prefix] for table, prefix in zip(self.tables, prefixes, strict=True)], dim=1)

    def token_logps(self) -> torch.Tensor:
        return self.logits().log_softmax(-1).gather(2, self.sequences.unsqueeze(2)).squeeze(2)


class TestKL:
    def setup_method(self):
        self.policy, self.reference = _TinyPolicy(1), _TinyPolicy(2)
        logp, ref = self.policy.token_logps().sum(1), self.reference.token_logps().sum(1).detach()
        self.probabilities = logp.exp().detach()
        exact = (logp.exp() * (logp - ref)).sum()
        self.exact = exact.detach()
        self.exact_grad = torch.autograd.grad(exact, self.policy.tables)

    def _terms(self) -> torch.Tensor:
        return losses.token_kl(self.policy.logits(), self.reference.logits().detach(), torch.ones(27, 3))

    def _gradient_error(self, per_sample: torch.Tensor) -> float:
        mean = (self.probabilities * per_sample).sum()
        grads = torch.autograd.grad(mean, self.policy.tables)
        error = sum((a - b).square().sum() for a, b in zip(grads, self.exact_grad, strict=True))
        return (error / sum(g.square().sum() for g in self.exact_grad)).sqrt().item()

    def test_both_values_are_exact_in_expectation(self):
        terms = self._terms()
        score = losses.score_kl(terms, self.policy.token_logps())
        for per_sample in (terms.sum(1), score):
            torch.testing.assert_close(
                (self.probabilities * per_sample).sum().detach(), self.exact, rtol=1e-12, atol=0
            )

    def test_the_score_gradient_is_exact_and_the_token_gradient_is_not(self):
        assert self._gradient_error(losses.score_kl(self._terms(), self.policy.token_logps())) < 1e-10
        assert self._gradient_error(self._terms().sum(1)) > 0.01

    def test_padding_counts_for_nothing(self):
        logits, reference = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 5)
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        kl = losses.token_kl(logits, reference, mask)
        torch.testing.assert_close(kl[1, :2], losses.token_kl(logits[1:, :2], reference[1:, :2], mask[1:, :2])[0])
        assert (kl[1, 2:] == 0).all()
        kl.sum().backward()
        assert (logits.grad[1, 2:] == 0).all()

    def test_direction(self):
        # KL(π||π_ref), not KL(π_ref||π)
        p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
        kl = losses.token_kl(p.log().view(1, 1, 2), q.log().view(1, 1, 2), torch.ones(1, 1))
        assert kl.item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-12)

    def test_importance_weights(self):
        old, now = torch.tensor([0.2, 0.5, 0.1]).log(), torch.tensor([0.4, 0.25, 0.9]).log().requires_grad_()
        torch.testing.assert_close(losses.importance_weights(now, old), torch.tensor([2.0, 0.5, 9.0]))
        truncated = losses.importance_weights(now, old, cap=3.0)
        torch.testing.assert_close(truncated, torch.tensor([2.0, 0.5, 3.0]))
        assert not truncated.requires_grad
