# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Strengths from shares of votes, which pairs are compared, and which become rows."""

import os
import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from datasets import Dataset
from scipy.optimize import approx_fprime, minimize
from scipy.special import expit, log_expit

from trl_spo.preference_checks import check_preferences
from trl_spo.soft_po.preference_data import _ranks
from trl_spo.synthetic.filters import FilterConfig, filter_pairs
from trl_spo.synthetic.pairs import preference_pairs
from trl_spo.synthetic.ranking import bradley_terry, compared_pairs, ranked_list, select_pairs


nan = np.nan
IDS = ["a", "b", "c", "d", "e", "f"]


def shares_of(n, votes):
    """The matrix of `{(i, j): share of i over j}`."""
    shares = np.full((n, n), nan)
    for (i, j), share in votes.items():
        shares[i, j], shares[j, i] = share, 1 - share
    return shares


def random_shares(n, seed, missing=0.3):
    rng = np.random.default_rng(seed)
    shares = {pair: rng.choice([0, 0.25, 0.5, 0.6, 1]) for pair in combinations(range(n), 2) if rng.random() > missing}
    return shares_of(n, shares)


def negative_log_posterior(theta, shares, variance):
    """As the docstring has it, pair by pair."""
    total = sum(strength**2 for strength in theta) / (2 * variance)
    for i, j in combinations(range(len(theta)), 2):
        if not np.isnan(shares[i, j]):
            total -= shares[i, j] * log_expit(theta[i] - theta[j]) + shares[j, i] * log_expit(theta[j] - theta[i])
    return total


class TestBradleyTerry:
    @pytest.mark.parametrize("variance", [0.1, 1.0, 100.0])
    @pytest.mark.parametrize("seed", range(4))
    def test_is_the_maximum(self, seed, variance):
        shares = random_shares(6, seed)
        theta = bradley_terry(shares, variance)
        found = minimize(
            negative_log_posterior, np.zeros(6), (shares, variance), method="BFGS", options={"gtol": 1e-7}
        )
        np.testing.assert_allclose(theta, found.x, atol=1e-4)
        slope = approx_fprime(theta, negative_log_posterior, 1e-7, shares, variance)
        np.testing.assert_allclose(slope, 0, atol=1e-5)
        # To rounding: without the last Newton steps this fails
        votes = np.nan_to_num(shares - expit(theta[:, None] - theta))
        np.testing.assert_allclose(votes.sum(axis=1), theta / variance, atol=1e-9)

    @pytest.mark.parametrize("difference", [-1.2, -0.2, 0.7, 1.3])
    def test_two_in_closed_form(self, difference):
        # The maximum has share - σ(d) = d / (2 v), so that the share of a difference is known
        variance = 4.0
        shares = shares_of(2, {(0, 1): expit(difference) + difference / (2 * variance)})
        np.testing.assert_allclose(bradley_terry(shares, variance), [difference / 2, -difference / 2], atol=1e-12)

    def test_unanimous(self):
        shares = shares_of(3, {(0, 1): 1.0, (1, 2): 1.0, (0, 2): 1.0})
        theta = bradley_terry(shares)
        np.testing.assert_allclose(theta, [theta[0], 0, -theta[0]], atol=1e-12)
        for variance in (1e-12, 1e-3, 1.0, 1e3, 1e8):  # the steps come to an end
            theta = bradley_terry(shares, variance)
            assert theta[0] > theta[1] > theta[2]
        # θ = v Σ (s - σ(0)) where the prior leaves no room
        np.testing.assert_allclose(bradley_terry(shares, 1e-6), [1e-6, 0, -1e-6], atol=1e-11)

    @pytest.mark.timeout(30)
    def test_full_newton_steps_would_go_to_and_fro(self):
        votes = {(i, i + 1): 1.0 for i in range(10)} | {(1, 2): 1e-6, (2, 3): 0.0, (0, 8): 1e-6, (2, 4): 0.0}
        shares = shares_of(11, votes)
        theta = bradley_terry(shares, 1e9)
        votes = np.nan_to_num(shares - expit(theta[:, None] - theta))
        np.testing.assert_allclose(votes.sum(axis=1), theta / 1e9, atol=1e-12)

    def test_known_strengths_come_back(self):
        known = np.array([1.5, -2.0, 0.25, 0.25, 3.0, -3.0])
        all_shares = expit(known[:, None] - known)
        some = shares_of(6, {pair: all_shares[pair] for pair in compared_pairs(6, 7, seed_key="x")})
        for shares in (all_shares, some):
            theta = bradley_terry(shares, prior_variance=1e7)
            np.testing.assert_allclose(theta, known, atol=1e-4)

    def test_from_drawn_votes(self):
        known = np.array([1.0, 0.0, -1.0, 0.5, -0.5])
        rng = np.random.default_rng(0)
        drawn = {(i, j): rng.binomial(4000, expit(known[i] - known[j])) / 4000 for i, j in combinations(range(5), 2)}
        assert np.abs(bradley_terry(shares_of(5, drawn), 1e4) - known).max() < 0.1

    def test_permutation(self):
        shares, order = random_shares(6, 9), np.array([3, 1, 5, 0, 4, 2])
        theta = bradley_terry(shares)
        assert len(set(theta)) == 6
        np.testing.assert_allclose(bradley_terry(shares[np.ix_(order, order)]), theta[order], atol=1e-12)

    def test_groups_that_no_votes_link(self):
        # Each as if it were alone, and with a sum of zero
        first, second = random_shares(3, 1, missing=0), random_shares(4, 2, missing=0)
        both = np.full((7, 7), nan)
        both[:3, :3], both[3:, 3:] = first, second
        expected = np.concatenate([bradley_terry(first), bradley_terry(second)])
        np.testing.assert_allclose(bradley_terry(both), expected, atol=1e-12)
        assert abs(expected[:3].sum()) < 1e-12 and abs(expected[3:].sum()) < 1e-12
        assert np.abs(expected).min() < np.abs(expected).max()

    def test_without_votes(self):
        assert bradley_terry(np.full((4, 4), nan)).tolist() == [0, 0, 0, 0]
        assert bradley_terry([[nan]]).tolist() == [0]
        assert bradley_terry(shares_of(3, {(0, 2): 1.0}))[1] == 0

    def test_equal_strengths_are_exactly_equal(self):
        # 1 and 2 in the same position, whose shares are the same but for rounding
        shares = shares_of(5, {(0, 1): 0.7, (0, 2): 1 - 0.3, (1, 3): 0.1 + 0.2, (2, 3): 0.3, (0, 4): 0.9, (3, 4): 0.2})
        theta = bradley_terry(shares)
        assert theta[1] == theta[2]
        assert len(set(theta)) == 4
        # A circle
        assert len(set(bradley_terry(shares_of(3, {(0, 1): 1.0, (1, 2): 1.0, (2, 0): 1.0})))) == 1

    def test_diagonal_is_not_read(self):
        shares = shares_of(3, {(0, 1): 1.0, (1, 2): 0.6})
        expected = bradley_terry(shares)
        for value in (0.5, 0.0, 17.0):
            np.fill_diagonal(shares, value)
            assert bradley_terry(shares).tolist() == expected.tolist()
        assert shares[0, 0] == 17.0  # nor written

    @pytest.mark.parametrize(
        "shares, match",
        [
            (np.zeros((2, 3)), r"shape \(n, n\).*\(2, 3\)"),
            (np.zeros((0, 0)), "at least one response"),
            ([[nan, 1.5], [-0.5, nan]], r"shares\[0, 1\]` is 1.5.*from 0 to 1"),
            ([[nan, 0.6], [0.6, nan]], r"shares\[0, 1\]` is 0.6 and `shares\[1, 0\]` is 0.6.*add up to 1"),
            ([[nan, 0.6], [nan, nan]], "both be nan"),
        ],
    )
    def test_bad_shares(self, shares, match):
        with pytest.raises(ValueError, match=match):
            bradley_terry(shares)

    @pytest.mark.parametrize("variance", [0, -1.0, np.inf, nan])
    def test_bad_variance(self, variance):
        with pytest.raises(ValueError, match="`prior_variance` must be positive and finite"):
            bradley_terry(np.full((2, 2), nan), variance)


def is_linked(n, pairs):
    groups = [{i} for i in range(n)]
    for i, j in pairs:
        joined = next(g for g in groups if i in g) | next(g for g in groups if j in g)
        groups = [g for g in groups if not g & joined] + [joined]
    return len(groups) == 1


class TestComparedPairs:
    def test_all(self):
        assert compared_pairs(3, seed_key="x") == [(0, 1), (0, 2), (1, 2)]
        assert (
            compared_pairs(4, 6, seed_key="x")
            == compared_pairs(4, 99, seed_key="x")
            == compared_pairs(4, seed_key="y")
        )
        assert compared_pairs(2, 1, seed_key="x") == [(0, 1)]

    @pytest.mark.parametrize("n", [2, 3, 4, 7])
    def test_some(self, n):
        for seed in range(10):
            before = set()
            for number in range(n - 1, n * (n - 1) // 2 + 1):
                pairs = compared_pairs(n, number, seed_key=f"prompt {seed}")
                assert pairs == sorted(pairs) and len(set(pairs)) == len(pairs) == number
                assert all(0 <= i < j < n for i, j in pairs)
                assert is_linked(n, pairs)
                degrees = Counter(i for pair in pairs for i in pair)
                if number == n and n > 2:
                    assert set(degrees.values()) == {2}  # the ends of the path too
                assert before <= set(pairs)
                before = set(pairs)

    def test_all_pairs_alike(self):
        for number, expected in ((4, 2000 * 4 / 10), (6, 2000 * 6 / 10)):
            counts = Counter(pair for seed in range(2000) for pair in compared_pairs(5, number, seed_key=str(seed)))
            assert len(counts) == 10
            assert max(abs(count - expected) for count in counts.values()) < 5 * np.sqrt(2000 / 4)

    def test_the_same_everywhere(self):
        # Written down, so that another version of anything is seen to change them
        assert compared_pairs(5, 5, seed_key="prompt 7") == [(0, 2), (0, 4), (1, 2), (1, 3), (3, 4)]
        code = "from trl_spo.synthetic.ranking import compared_pairs as c; print(c(9, 12, seed_key='ü\\ud800\\u0378'))"
        outputs = {
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        }
        assert outputs == {f"{compared_pairs(9, 12, seed_key='ü' + chr(0xD800) + chr(0x378))}\n"}
        assert compared_pairs(9, 12, seed_key="a") != compared_pairs(9, 12, seed_key="b")

    def test_bad_numbers(self):
        with pytest.raises(ValueError, match="at least 2 responses.*`n=1`"):
            compared_pairs(1, seed_key="x")
        with pytest.raises(ValueError, match="`num_comparisons=3` cannot link 5 responses, which takes 4"):
            compared_pairs(5, 3, seed_key="x")


def select(mode, shares, seed_key="prompt", strengths=None):
    strengths = bradley_terry(shares) if strengths is None else strengths
    return select_pairs(mode, strengths, IDS[: len(shares)], shares, seed_key)


class TestSelectPairs:
    ORDERED = shares_of(4, dict.fromkeys(combinations((2, 0, 3, 1), 2), 1.0))

    def test_in_order(self):
        assert select("best_worst", self.ORDERED) == [(2, 1)]
        assert select("all", self.ORDERED) == [(0, 1), (0, 3), (2, 0), (2, 1), (2, 3), (3, 1)]
        found = Counter(pair for seed in range(300) for pair in select("best_random", self.ORDERED, str(seed)))
        assert found.keys() == {(2, 0), (2, 1), (2, 3)}
        assert min(found.values()) > 70
        assert select("best_random", self.ORDERED, "x") == select("best_random", self.ORDERED, "x")

    def test_choices_go_by_ids(self):
        order = np.array([3, 1, 0, 2])
        shares = self.ORDERED[np.ix_(order, order)]
        for seed in map(str, range(20)):
            ((winner, loser),) = select("best_random", self.ORDERED, seed)
            ids = [IDS[i] for i in order]
            ((other_winner, other_loser),) = select_pairs("best_random", bradley_terry(shares), ids, shares, seed)
            assert (ids[other_winner], ids[other_loser]) == (IDS[winner], IDS[loser])

    def test_two(self):
        for mode in ("best_worst", "best_random", "all"):
            assert select(mode, shares_of(2, {(0, 1): 0.8})) == [(0, 1)]
            assert select(mode, shares_of(2, {(0, 1): 0.2})) == [(1, 0)]
            assert select(mode, shares_of(2, {(0, 1): 0.5})) == []
            assert select(mode, shares_of(2, {})) == []
            # A tie is a tie, whatever strengths say
            assert select(mode, shares_of(2, {(0, 1): 0.5}), strengths=[1.0, -1.0]) == []
            assert select(mode, shares_of(2, {(0, 1): 0.5 + 1e-12}), strengths=[1.0, -1.0]) == []

    def test_best_and_worst_need_no_verdict_of_their_own(self):
        shares = shares_of(3, {(0, 1): 1.0, (1, 2): 1.0})
        assert select("best_worst", shares) == [(0, 2)]
        assert select("all", shares) == [(0, 1), (1, 2)]
        assert {select("best_random", shares, str(seed))[0] for seed in range(20)} == {(0, 1), (0, 2)}

    def test_verdict_against_the_order(self):
        # 0 beats 1 and 2, who beat 3, who beats 0: by strength 0 is best and 3 is worst, and the jury says otherwise
        votes = {(0, 1): 1.0, (0, 2): 1.0, (0, 4): 1.0, (1, 3): 1.0, (2, 3): 1.0, (4, 3): 1.0, (3, 0): 0.6}
        shares = shares_of(5, votes)
        strengths = bradley_terry(shares)
        assert strengths[0] == strengths.max() and strengths[3] == strengths.min()
        assert select("best_worst", shares) == []
        assert select("all", shares) == [(0, 1), (0, 2), (0, 4), (1, 3), (2, 3), (4, 3)]
        assert {select("best_random", shares, str(seed))[0] for seed in range(40)} == {(0, 1), (0, 2), (0, 4)}
        assert select("best_worst", shares_of(5, votes | {(3, 0): 0.5})) == []  # nor if it says that they are equal
        assert select("best_worst", shares_of(5, votes | {(3, 0): 0.4})) == [(0, 3)]

    def test_equal_strengths(self):
        circle = shares_of(3, {(0, 1): 1.0, (1, 2): 1.0, (2, 0): 1.0})
        for mode in ("best_worst", "best_random", "all"):
            assert select(mode, circle) == []
        # Two that are best: one of them at random, never one against the other
        shares = shares_of(4, {(0, 1): 0.5, (0, 2): 1.0, (1, 2): 1.0, (0, 3): 1.0, (1, 3): 1.0, (2, 3): 0.8})
        assert {select("best_worst", shares, str(seed))[0] for seed in range(20)} == {(0, 3), (1, 3)}
        assert {select("best_random", shares, str(seed))[0] for seed in range(60)} == {(0, 2), (0, 3), (1, 2), (1, 3)}
        # If one of two that are worst has beaten the best, it is the other
        shares = shares_of(3, {(0, 1): 0.9, (0, 2): 0.4})
        assert {select("best_worst", shares, str(s), strengths=[1.0, -0.5, -0.5])[0] for s in range(9)} == {(0, 1)}

    def test_without_votes(self):
        # 1 has none: its strength of 0 is neither the best nor the worst of anything
        shares = shares_of(3, {(0, 2): 1.0})
        assert select("best_worst", shares) == [(0, 2)]
        for strengths in ([0.1, 1.0, -0.1], [0.1, -1.0, -0.1]):
            assert select("best_worst", shares, strengths=strengths) == [(0, 2)]
            assert {select("best_random", shares, str(s), strengths=strengths)[0] for s in range(9)} == {(0, 2)}
            assert select("all", shares, strengths=strengths) == [(0, 2)]

    def test_groups_that_no_votes_link(self):
        shares = shares_of(5, {(3, 4): 1.0, (0, 1): 0.6, (1, 2): 0.6})
        strengths = bradley_terry(shares)
        assert strengths[3] == strengths.max() and strengths[4] == strengths.min()
        assert select("best_worst", shares) == [(0, 2)]
        assert {select("best_random", shares, str(seed))[0] for seed in range(20)} == {(0, 1), (0, 2)}
        assert select("all", shares) == [(0, 1), (1, 2), (3, 4)]

    def test_bad_input(self):
        shares = shares_of(2, {(0, 1): 1.0})
        with pytest.raises(ValueError, match="'worst_best'.*best_worst.*best_random.*all"):
            select("worst_best", shares)
        with pytest.raises(ValueError, match="`ids` must be 2 different ids"):
            select_pairs("all", [1.0, 0.0], ["a", "a"], shares, "x")
        with pytest.raises(ValueError, match="`ids` must be 2 different ids"):
            select_pairs("all", [1.0, 0.0], ["a", "b", "c"], shares, "x")
        with pytest.raises(ValueError, match="`strengths` must be 2 finite numbers"):
            select("all", shares, strengths=[1.0, 0.0, 2.0])
        with pytest.raises(ValueError, match="`strengths` must be 2 finite numbers"):
            select("all", shares, strengths=[1.0, nan])
        with pytest.raises(ValueError, match="add up to 1"):
            select("all", np.ones((2, 2)), strengths=[1.0, 0.0])


class TestRankedList:
    def test_scores(self):
        shares = shares_of(5, {(0, 1): 0.5, (0, 2): 1.0, (1, 2): 1.0, (3, 0): 1.0, (3, 1): 1.0})  # 4 has no votes
        strengths = bradley_terry(shares)
        places, scores = ranked_list(strengths, shares)
        assert places == [3, 0, 1, 2]
        assert scores == strengths[places].tolist()
        assert scores[0] > scores[1] == scores[2] > scores[3]

    def test_soft_po_takes_it(self):
        shares = shares_of(5, {(0, 1): 0.5, (0, 2): 1.0, (1, 2): 1.0, (3, 0): 1.0, (3, 1): 1.0})
        places, scores = ranked_list(bradley_terry(shares), shares)
        row = {"prompt": "p", "completions": [IDS[i] for i in places], "scores": scores}
        (row,) = check_preferences(Dataset.from_list([row]), "train")
        assert _ranks(row) == [0, 1, 1, 2]

    def test_groups_that_no_votes_link(self):
        shares = shares_of(5, {(3, 4): 1.0, (0, 1): 0.6, (1, 2): 0.6})
        assert ranked_list(bradley_terry(shares), shares)[0] == [0, 1, 2]
        # The first of two that are as large
        shares = shares_of(4, {(2, 3): 1.0, (1, 0): 1.0})
        assert ranked_list(bradley_terry(shares), shares)[0] == [1, 0]

    def test_nothing_to_rank(self):
        for shares in (shares_of(3, {}), shares_of(3, {(0, 1): 0.5, (1, 2): 0.5}), shares_of(1, {})):
            assert ranked_list(bradley_terry(shares), shares) == ([], [])


@pytest.mark.parametrize(("compared", "expected"), [(True, "no votes"), (False, None)])
def test_the_best_and_the_worst_that_nobody_could_tell_apart_are_no_pair(compared, expected):
    responses = [{"id": str(k), "text": f"{'abc'[k]} response that is number {k}"} for k in range(3)]
    row = {"prompt_id": "p", "prompt": "Who?", "responses": responses}
    said = [{"critic": "a", "status": "vote", "share": 1.0}]
    flipped = [{"critic": "a", "status": "flipped", "share": None}]
    common = {"prompt_id": "p", "prompt": "Who?", "truth": None}
    verdicts = [
        {**common, "response_ids": [i, j], "votes": said, "share": 1.0, "winner": i, "confidence": 1.0}
        for i, j in (("0", "1"), ("1", "2"))
    ]
    if compared:
        undecided = {"votes": flipped, "share": None, "winner": None, "confidence": 0.0}
        verdicts.insert(1, {**common, "response_ids": ["0", "2"], **undecided})
    [(pair, reason)] = preference_pairs([row], verdicts)
    assert reason is None and (pair["chosen_id"], pair["rejected_id"]) == ("0", "2")
    [(pair, reason)] = filter_pairs([pair], FilterConfig(min_confidence=0.1, max_similarity=None))
    assert reason == expected
    assert pair["votes"] == (flipped if compared else [])
