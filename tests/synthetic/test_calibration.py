# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What votes are worth: against Bayes' rule, enumerated, and against the conditions of the optimum."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.optimize import brentq

from trl_spo.synthetic.calibration import fit_calibration, vote_probability
from trl_spo.synthetic.check_set import human_check


def verdict(*shares, **others):
    """What a jury of as many critics says of a pair: `a`, `b`, ..., each with its share for the first response."""
    votes = [
        {"critic": name, "status": "flipped" if share is None else "vote", "share": share}
        for name, share in zip("abcdefghij", shares, strict=False)
    ]
    return {"votes": votes, **others}


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def population(accuracies, says=lambda right: right, voting=1.0, number=10_000):
    """
    Verdicts and labels in the very proportions of a jury that errs with these rates, and votes with the rate `voting`, independently. Each
    `says` what it would vote, `True` for what is right, of all that the critics know.
    """
    verdicts, labels = [], []
    for knows in itertools.product([True, False], repeat=len(accuracies)):
        for votes in itertools.product([True, False], repeat=len(says(knows))):
            share = math.prod(p if right else 1 - p for p, right in zip(accuracies, knows, strict=True))
            share *= math.prod(voting if vote else 1 - voting for vote in votes)
            for label in (0, 1):
                shares = [
                    float(right == (label == 0)) if vote else None
                    for right, vote in zip(says(knows), votes, strict=True)
                ]
                count = round(number / 2 * share)
                verdicts += [verdict(*shares)] * count
                labels += [label] * count
    return verdicts, labels


def simulated(rng, accuracies, number):
    labels = rng.integers(0, 2, number)
    right = rng.random((number, len(accuracies))) < accuracies
    return [verdict(*row) for row in (right == (labels[:, None] == 0)).astype(float).tolist()], labels.tolist()


class TestIndependentCritics:
    @pytest.mark.parametrize("voting", [1.0, 0.8])
    def test_is_the_posterior(self, voting):
        accuracies = (0.9, 0.7, 0.6)
        calibration = fit_calibration(*population(accuracies, voting=voting, number=20_000))
        for shares in itertools.product([1.0, 0.0, None], repeat=3):
            first, second = (
                math.prod(
                    1 if share is None else p if share == better else 1 - p
                    for p, share in zip(accuracies, shares, strict=True)
                )
                for better in (1.0, 0.0)
            )
            found = vote_probability(verdict(*shares)["votes"], calibration)
            assert found == pytest.approx(first / (first + second), abs=0.003)
        for name, p in zip("abc", accuracies, strict=True):
            assert calibration["coefficients"][name] == pytest.approx(math.log(p / (1 - p)), abs=0.01)
        assert calibration["pairs"] == 20_000 and calibration["worse_than_chance"] == []

    def test_three_that_agree(self):
        calibration = fit_calibration(*population((0.7, 0.7, 0.7)))
        assert vote_probability(verdict(1.0, 1.0, 1.0)["votes"], calibration) == pytest.approx(0.927, abs=0.002)

    def test_log_loss_is_the_entropy_that_is_left(self):
        verdicts, labels = population((0.9, 0.7, 0.6))
        left = 0.0
        for patterns in itertools.product([0.9, 0.1], [0.7, 0.3], [0.6, 0.4]):
            p, q = math.prod(patterns), math.prod(1 - x for x in patterns)
            left -= p * math.log(p / (p + q))
        assert fit_calibration(verdicts, labels)["log_loss"] == pytest.approx(left, abs=0.001)


class TestDependentCritics:
    def test_copies_count_once(self):
        calibration = fit_calibration(*population((0.7,), says=lambda knows: knows * 3))
        assert vote_probability(verdict(1.0, 1.0, 1.0)["votes"], calibration) == pytest.approx(0.7, abs=0.002)
        assert calibration["coefficients"]["a"] == pytest.approx(math.log(7 / 3) / 3, abs=0.005)

    def test_copies_beside_another(self):
        calibration = fit_calibration(*population((0.7, 0.8), says=lambda knows: (knows[0], knows[0], knows[1])))
        for shares, first, second in (((1, 1, 1), 0.7 * 0.8, 0.3 * 0.2), ((1, 1, 0), 0.7 * 0.2, 0.3 * 0.8)):
            found = vote_probability(verdict(*map(float, shares))["votes"], calibration)
            assert found == pytest.approx(first / (first + second), abs=0.003)


class TestFit:
    @pytest.mark.parametrize(("right", "wrong"), [(10, 0), (100, 0), (1, 0), (7, 3), (3, 7), (0, 10), (5, 5)])
    def test_one_critic(self, right, wrong):
        # The posterior's mode under a standard normal prior: right · (1 - σ(a)) - wrong · σ(a) = a
        a = brentq(lambda a: right * (1 - sigmoid(a)) - wrong * sigmoid(a) - a, -10, 10)
        verdicts = [verdict(1.0)] * right + [verdict(0.0)] * wrong
        calibration = fit_calibration(verdicts, [0] * (right + wrong))
        assert calibration["coefficients"]["a"] == pytest.approx(a, abs=1e-6)
        if (right, wrong) == (10, 0):
            assert sigmoid(a) == pytest.approx(0.84, abs=0.005)
        if (right, wrong) == (100, 0):
            assert sigmoid(a) == pytest.approx(0.97, abs=0.005)

    def test_graded_votes_are_at_the_optimum(self):
        # The objective is strictly convex, so that the gradient says it all
        rng = np.random.default_rng(0)
        shares, labels = rng.random((60, 3)), rng.integers(0, 2, 60)
        calibration = fit_calibration([verdict(*row) for row in shares.tolist()], labels.tolist())
        a = np.array(list(calibration["coefficients"].values()))
        x = 2 * shares - 1
        gradient = ((labels == 0) - 1 / (1 + np.exp(-x @ a))) @ x - a
        assert np.abs(gradient).max() < 1e-5 and np.abs(a).max() > 0.1

    def test_swapped_pairs(self):
        rng = np.random.default_rng(1)
        shares, labels, swap = rng.random((50, 4)), rng.integers(0, 2, 50), rng.random(50) < 0.5
        swapped = np.where(swap[:, None], 1 - shares, shares)
        one = fit_calibration([verdict(*row) for row in shares.tolist()], labels.tolist())
        other = fit_calibration(
            [verdict(*row) for row in swapped.tolist()], np.where(swap, 1 - labels, labels).tolist()
        )
        assert one["coefficients"] == pytest.approx(other["coefficients"], abs=1e-9)
        assert one["log_loss"] == pytest.approx(other["log_loss"], abs=1e-9)
        for row in shares.tolist():
            first = vote_probability(verdict(*row)["votes"], one)
            second = vote_probability(verdict(*(1 - share for share in row))["votes"], one)
            assert first + second == pytest.approx(1, abs=1e-12)

    def test_labels_of_one_class(self):
        verdicts, labels = population((0.8, 0.6), number=200)
        turned = [
            v if label == 0 else verdict(*(1 - vote["share"] for vote in v["votes"]))
            for v, label in zip(verdicts, labels, strict=True)
        ]
        expected = fit_calibration(verdicts, labels)["coefficients"]
        assert fit_calibration(turned, [0] * len(labels))["coefficients"] == pytest.approx(expected, abs=1e-9)

    def test_who_never_votes_and_who_knows_less_than_chance(self, caplog):
        verdicts, labels = population((0.8, 0.3), says=lambda knows: (*knows, None), number=1000)
        for i, row in enumerate(verdicts):
            row["votes"][2] |= {"share": (None, 0.5)[i % 2], "status": ("unparseable", "tie")[i % 2]}
        calibration = fit_calibration(verdicts, labels)
        assert calibration["coefficients"]["c"] == 0
        assert [(of["number"], of["rate"]) for of in calibration["agreement"].values()] == [
            (1000, 0.8),
            (1000, 0.3),
            (0, None),
        ]
        assert calibration["worse_than_chance"] == ["b"] and "The critics ['b'] are worse than chance" in caplog.text
        assert calibration["coefficients"]["b"] == pytest.approx(math.log(3 / 7), abs=0.01)
        assert vote_probability(verdict(None, 1.0, 1.0)["votes"], calibration) == pytest.approx(0.3, abs=0.003)
        assert vote_probability(verdict(None, 0.5, 1.0)["votes"], calibration) == 0.5

    def test_rules_are_left_out(self):
        verdicts, labels = population((0.8,), number=100)
        rule = {"critic": "rule", "rule": True, "status": "vote", "share": 1.0}
        with_rule = [{"votes": [rule, *row["votes"]]} for row in verdicts]
        calibration = fit_calibration(with_rule, labels)
        assert calibration == fit_calibration(verdicts, labels)
        assert vote_probability([rule], calibration) is None and vote_probability([], calibration) is None
        assert 0.7 < vote_probability([rule, *verdict(1.0)["votes"]], calibration) < 0.8

    def test_of_rules_only_and_of_nobody(self):
        rule = {"critic": "rule", "rule": True, "status": "vote", "share": 1.0}
        for votes in ([rule], []):
            calibration = fit_calibration([{"votes": votes}] * 3, [0, 1, 0])
            assert calibration["coefficients"] == {} and vote_probability([rule], calibration) is None
            assert calibration["log_loss"] == pytest.approx(math.log(2)) and calibration["reliability"]["number"] == 0

    def test_pairs_without_votes_say_nothing(self):
        verdicts, labels = population((0.8, 0.6), number=100)
        without = [{"votes": []}] * 20
        found = fit_calibration([*without, *verdicts], [0] * 20 + labels)
        assert found["pairs"] == 120 and found["reliability"]["number"] <= 100
        assert found["coefficients"] == pytest.approx(fit_calibration(verdicts, labels)["coefficients"], abs=1e-9)


class TestReliability:
    def test_a_pair_does_not_tell_of_itself(self):
        # Of two pairs, one has the critic right and one wrong: each claims of the other what is false
        found = fit_calibration([verdict(1.0), verdict(0.0)], [0, 0])
        a = brentq(lambda a: 1 - sigmoid(a) - a, 0, 10)
        assert found["coefficients"]["a"] == pytest.approx(0, abs=1e-9)
        assert found["log_loss"] == pytest.approx(-math.log(1 - sigmoid(a)), abs=1e-6)
        table = found["reliability"]
        assert table["number"] == 2 and table["expected_calibration_error"] == pytest.approx(sigmoid(a), abs=1e-6)

    def test_probabilities_are_calibrated_and_confidence_is_not(self):
        accuracies = [0.9, 0.8, 0.8, 0.8, 0.6]
        verdicts, labels = simulated(np.random.default_rng(2), accuracies, 3000)
        for row in verdicts:
            row["share"] = np.mean([vote["share"] for vote in row["votes"]]).item()
            row |= {"truth": None, "lengths": (1, 2)}
        report = human_check(verdicts, labels)
        table = report["calibration"]["reliability"]
        assert table["expected_calibration_error"] < 0.02
        for row in table["bins"]:
            if row["number"] > 100:
                low, high = row["interval"]
                assert low - 0.02 < row["claimed"] < high + 0.02
        # Of the share of the votes, by how many are right: the share of pairs, and its difference to the claim
        of = np.zeros(6)
        for right in itertools.product([True, False], repeat=5):
            of[sum(right)] += math.prod(p if r else 1 - p for p, r in zip(accuracies, right, strict=True))
        expected = sum(abs(of[k] - k / 5 * (of[k] + of[5 - k])) for k in (3, 4, 5))
        assert expected > 0.06
        assert report["reliability"]["expected_calibration_error"] == pytest.approx(expected, abs=0.02)

    def test_what_a_rule_knows_is_not_the_confidence_of_the_jury(self):
        votes = [{"critic": "a", "share": 1.0}]
        row = {"votes": votes, "share": 1.0, "lengths": (1, 2)}
        verdicts = [{**row, "truth": "a"}] * 90 + [{**row, "truth": None}] * 10
        table = human_check(verdicts, [0] * 95 + [1] * 5)["reliability"]
        assert table["number"] == 10 and table["expected_calibration_error"] == pytest.approx(0.5)

    def test_tenths_are_drawn_by_the_seed(self):
        verdicts, labels = simulated(np.random.default_rng(3), [0.8, 0.6], 50)
        one, same, other = (fit_calibration(verdicts, labels, seed) for seed in (0, 0, 1))
        assert one == same != other and one["coefficients"] == other["coefficients"]

    def test_few_labels(self, caplog):
        rng = np.random.default_rng(4)
        for number in (1, 2, 3, 9, 10, 11):
            found = fit_calibration(*simulated(rng, [0.8] * 9, number))
            assert json.loads(json.dumps(found, allow_nan=False)) == found
            assert (found["log_loss"] is None) == (number == 1)
            # What votes of nine say that are for one as for the other is that the pair is undecided
            assert number - 2 <= found["reliability"]["number"] <= number if number > 1 else True
            assert found["worse_than_chance"] == [] and caplog.text == ""


class TestBadInput:
    @pytest.mark.parametrize(
        ("verdicts", "labels", "message"),
        [
            ([], [], "0 verdicts and 0 `labels`"),
            ([verdict(1.0)], [0, 1], "1 verdicts and 2 `labels`"),
            ([verdict(1.0)] * 2, [0, None], "label 1 of people is None"),
            ([verdict(1.0)], ["a"], "label 0 of people is 'a'"),
            ([verdict(1.0)], [0.5], "label 0 of people is 0.5"),
            ([{"votes": []}, verdict(1.0), verdict(1.0, 1.0)], [0, 1, 1], r"\['a'\] .* \['a', 'b'\] the pair 2"),
        ],
    )
    def test_fit(self, verdicts, labels, message):
        with pytest.raises(ValueError, match=message):
            fit_calibration(verdicts, labels)

    @pytest.mark.parametrize("shares", [(1.0,), (1.0, None, 1.0)])
    def test_another_jury(self, shares):
        calibration = fit_calibration([verdict(1.0, 0.0)], [0])
        names = list("abc"[: len(shares)])
        with pytest.raises(ValueError) as error:
            vote_probability(verdict(*shares)["votes"], calibration)
        assert f"The critics {names} voted, and the calibration is of ['a', 'b']" in str(error.value)
