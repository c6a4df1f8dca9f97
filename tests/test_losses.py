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


def _batch(n=7):
    """Log-probabilities of two responses under policy and reference, and their lengths."""
    logps = [-torch.rand(n) * 20 - 1 for _ in range(4)]
    lengths = [torch.randint(1, 30, (n,)).double() for _ in range(2)]
    return *logps, *lengths


def _bradley_terry(reward_w, reward_l):
    """-log P(y_w > y_l), from the probabilities."""
    return -(reward_w.exp() / (reward_w.exp() + reward_l.exp())).log()


class TestUpperLosses:
    """Each from its reward and the Bradley-Terry model, in probabilities rather than log-sigmoids."""

    def test_cpo(self):
        chosen, rejected, _, _, n_w, _ = _batch()
        expected = _bradley_terry(0.3 * chosen, 0.3 * rejected) + 0.7 * -(chosen / n_w)
        torch.testing.assert_close(losses.cpo_loss(chosen, rejected, n_w, 0.3, 0.7), expected)

    def test_dpop(self):
        chosen, rejected, ref_w, ref_l, _, _ = _batch()
        # The paper: the log-ratio of the chosen one loses λ max(0, log(π_ref(y_w) / π(y_w)))
        penalty = torch.maximum(torch.zeros(()), ref_w - chosen)
        expected = _bradley_terry(0.3 * (chosen - ref_w - 5 * penalty), 0.3 * (rejected - ref_l))
        torch.testing.assert_close(losses.dpop_loss(chosen - ref_w, rejected - ref_l, 0.3, 5.0), expected)

    def test_dpop_is_dpo_above_the_reference(self):
        chosen, rejected = torch.rand(5), torch.randn(5)
        torch.testing.assert_close(
            losses.dpop_loss(chosen, rejected, 0.3, 50.0), _bradley_terry(0.3 * chosen, 0.3 * rejected)
        )

    def test_rdpo_is_optimal_for_the_reward_less_the_length(self):
        # The policy π_ref exp((r - α|y|) / β) / Z: from its log-ratios and the lengths the loss must find r again
        n_w, n_l = torch.tensor([3.0, 20.0]), torch.tensor([10.0, 4.0])
        r_w, r_l, log_z = torch.randn(2), torch.randn(2), torch.randn(2)
        ratio_w, ratio_l = (r_w - 0.02 * n_w) / 0.5 - log_z, (r_l - 0.02 * n_l) / 0.5 - log_z
        loss = losses.rdpo_loss(ratio_w, ratio_l, n_w, n_l, 0.5, 0.02)
        torch.testing.assert_close(loss, _bradley_terry(r_w, r_l))

    def test_simpo(self):
        chosen, rejected, _, _, n_w, n_l = _batch()
        expected = _bradley_terry(2.5 * chosen / n_w - 0.8, 2.5 * rejected / n_l)
        torch.testing.assert_close(losses.simpo_loss(chosen, rejected, n_w, n_l, 2.5, 0.8), expected)

    def test_alphadpo(self):
        chosen, rejected, ref_w, ref_l, n_w, n_l = _batch()
        margin = (2.0 * ((chosen - ref_w) / n_w - (rejected - ref_l) / n_l)).tolist()
        mean = sum(margin) / len(margin)
        std = math.sqrt(sum((m - mean) ** 2 for m in margin) / (len(margin) - 1))
        threshold = torch.tensor([0.5 + 0.3 * (m - mean) / std for m in margin])
        expected = _bradley_terry(2.0 * chosen / n_w - threshold, 2.0 * rejected / n_l)
        found = losses.alphadpo_loss(chosen, rejected, ref_w, ref_l, n_w, n_l, 2.0, 0.5, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_alphadpo_margin_has_no_gradient(self):
        chosen, rejected, ref_w, ref_l, n_w, n_l = _batch()
        gradients = []
        for alpha in (0.0, 0.3):
            chosen.requires_grad_().grad = None
            loss = losses.alphadpo_loss(chosen, rejected, ref_w, ref_l, n_w, n_l, 2.0, 0.5, alpha)
            gradients.append(torch.autograd.grad(loss.sum(), chosen)[0] / (1 - torch.exp(-loss.detach())) / 2.0)
        # -β P(wrong) / |y_w| in both cases, of the P(wrong) of its own threshold
        torch.testing.assert_close(gradients[0], gradients[1])
        torch.testing.assert_close(gradients[0], -1 / n_w)

    def test_alphadpo_at_the_start_is_simpo(self):
        chosen, rejected, _, _, n_w, n_l = _batch()
        noise = 1e-9 * torch.randn(7)
        found = losses.alphadpo_loss(chosen, rejected, chosen + noise, rejected, n_w, n_l, 2.0, 0.5, 0.3)
        torch.testing.assert_close(
            found, losses.simpo_loss(chosen, rejected, n_w, n_l, 2.0, 0.5), rtol=1e-3, atol=1e-3
        )

    def test_alphadpo_of_a_part_of_the_batch(self):
        batch = _batch()
        chosen, rejected, ref_w, ref_l, n_w, n_l = batch
        margins = losses.alphadpo_margins(chosen - ref_w, rejected - ref_l, n_w, n_l, 2.0)
        part = losses.alphadpo_loss(*(x[:3] for x in batch), 2.0, 0.5, 0.3, batch_margins=margins)
        torch.testing.assert_close(part, losses.alphadpo_loss(*batch, 2.0, 0.5, 0.3)[:3])


class TestLowerLevel:
    def test_nll(self):
        # Of a response of 4 tokens with probability 1/2 each
        found = losses.nll_regularizer(torch.tensor([4 * math.log(0.5)]), torch.tensor([4.0]))
        torch.testing.assert_close(found, torch.tensor([math.log(2)]))

    def test_floor(self):
        chosen, reference = torch.tensor([-3.0, -8.0], requires_grad=True), torch.tensor([-5.0, -5.0])
        found = losses.floor_regularizer(chosen, reference, torch.tensor([2.0, 3.0]))
        torch.testing.assert_close(found, torch.tensor([0.0, 1.0]))
        found.sum().backward()
        torch.testing.assert_close(chosen.grad, torch.tensor([0.0, -1 / 3]))

    @pytest.mark.parametrize(("sft_loss", "value", "slope"), [(2.5, 0.25, 1.0), (2.25, 0.0, 0.0), (2.0, 0.0, 0.0)])
    def test_penalty(self, sft_loss, value, slope):
        sft_loss = torch.tensor(sft_loss, requires_grad=True)
        anchor = torch.tensor(2.0, requires_grad=True)
        penalty = losses.sft_penalty(sft_loss, anchor, 0.25)
        assert penalty == value
        penalty.backward()
        assert sft_loss.grad == slope
        assert anchor.grad is None


class TestDegrees:
    def test_removal_by_hand(self):
        #        prompt |  response          | padding
        degrees = torch.tensor([[0, 0, 1, 0, 2, 1, 3, 0, 0]])
        completion = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0]])
        found = losses.removal_mask(degrees, completion, torch.tensor([[0, 1, 2, 3]]))
        assert found.int().tolist() == [
            [
                [0, 0, 1, 1, 1, 1, 1, 1, 0],
                [0, 0, 0, 1, 1, 0, 1, 1, 0],
                [0, 0, 0, 1, 0, 0, 1, 1, 0],
                [0, 0, 0, 1, 0, 0, 0, 1, 0],
            ]
        ]

    def test_removal_is_nested(self):
        torch.manual_seed(0)
        degrees, completion = torch.randint(0, 5, (7, 30)), torch.randint(0, 2, (7, 30))
        masks = losses.removal_mask(degrees, completion, torch.arange(5).expand(7, -1))
        assert torch.equal(masks[:, 0], completion.bool())
        assert torch.all(masks[:, 1:] <= masks[:, :-1])
        assert torch.all(masks[:, -1] == (completion.bool() & (degrees == 0)))

    def test_loss(self):
        torch.manual_seed(0)
        logits = torch.randn(4, 3, 5, dtype=torch.float64)
        levels = torch.tensor([[0, 2, 4], [1, 1, 3], [4, 0, 2], [2, 3, 0]])
        expected = [
            -sum(math.log(math.exp(row[k][i]) / sum(map(math.exp, row[k]))) for k, i in enumerate(of_row)) / 3
            for row, of_row in zip(logits.tolist(), levels.tolist(), strict=True)
        ]
        torch.testing.assert_close(losses.degree_loss(logits, levels), torch.tensor(expected))

    def test_chance(self):
        found = losses.degree_loss(torch.zeros(2, 3, 7), torch.tensor([[0, 3, 6], [1, 1, 1]]))
        torch.testing.assert_close(found, torch.full((2,), math.log(7)))
