# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import itertools

import numpy as np
import pytest
from scipy import stats

from trl_spo.evaluation.displacement import displacement_estimates
from trl_spo.evaluation.statistics import (
    crossed_difference,
    crossed_estimate,
    holm,
    mean_estimate,
    paired_p_value,
    wilson_rate,
)


@pytest.mark.parametrize(("count", "number"), [(0, 5), (3, 7), (90, 100), (5, 5), (1, 1)])
def test_wilson(count, number):
    expected = stats.binomtest(count, number).proportion_ci(0.95, method="wilson")
    assert wilson_rate(count, number)["interval"] == pytest.approx([expected.low, expected.high])
    assert wilson_rate(count, number)["rate"] == count / number
    assert wilson_rate(0, 0) == {"rate": None, "interval": None, "number": 0}


class TestMean:
    def test_is_that_of_student(self):
        values = [0.3, 1.2, -0.4, 2.0, 0.9]
        found = mean_estimate(values)
        expected = stats.ttest_1samp(values, 0).confidence_interval()
        assert found["value"] == pytest.approx(np.mean(values)) and found["number"] == 5
        assert found["interval"] == pytest.approx([expected.low, expected.high])
        assert found["error"] == pytest.approx(stats.sem(values))

    def test_without_an_interval(self):
        assert mean_estimate([2.0]) == {"value": 2.0, "error": None, "interval": None, "number": 1}
        assert mean_estimate([]) == {"value": None, "error": None, "interval": None, "number": 0}

    def test_without_variance(self):
        assert mean_estimate([1.0, 1.0])["interval"] == [1.0, 1.0]


class TestCrossed:
    def test_of_units_that_are_all_alike_is_that_of_the_trainings(self):
        seeds = np.array([0.1, 0.5, 0.4])
        found = crossed_estimate(np.repeat(seeds[:, None], 7, axis=1))
        expected = stats.ttest_1samp(seeds, 0).confidence_interval()
        assert found["interval"] == pytest.approx([expected.low, expected.high]) and found["number"] == 7

    @pytest.mark.parametrize(("of_seed", "of_unit", "of_both"), [(1.0, 1.0, 0.5), (0.1, 1.0, 1.0), (1.0, 0.2, 0.2)])
    def test_covers_the_truth(self, of_seed, of_unit, of_both):
        """In 1000 draws of 4 seeds and 30 units with effects of both and of each pair of them."""
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(1000):
            values = 3.0 + of_seed * rng.normal(size=(4, 1)) + of_unit * rng.normal(size=(1, 30))
            low, high = crossed_estimate(values + of_both * rng.normal(size=(4, 30)))["interval"]
            hits += low <= 3.0 <= high
        # 0.95, up to Welch's approximation and the noise of the draws below; somewhat more, as the interaction counts twice
        assert 0.92 <= hits / 1000 <= 0.99

    def test_share_of_seeds_that_differ(self):
        """The interval ends where the value is Student's quantile away, in the errors that the share there would have."""
        values = np.repeat([[1.0] * 6 + [0.0] * 4, [1.0] * 8 + [0.0] * 2], 20, axis=1)
        found = crossed_estimate(values, share=True)
        assert found["value"] == pytest.approx(0.7) and found["error"] == crossed_estimate(values)["error"]
        low, high = found["interval"]
        assert 0 < low < 0.5 and 0.9 < high < 1
        plain = crossed_estimate(values)["interval"]
        assert plain[0] < 0 and plain[1] > 1
        quantile = (plain[1] - 0.7) / found["error"]
        for end in found["interval"]:
            error = found["error"] * np.sqrt(end * (1 - end) / (0.7 * 0.3))
            assert abs(end - 0.7) / error == pytest.approx(quantile)

    def test_share_where_all_say_the_same(self):
        expected = stats.binomtest(40, 40).proportion_ci(0.95, method="wilson")
        assert crossed_estimate(np.ones((3, 40)), share=True)["interval"] == pytest.approx([expected.low, 1])

    def test_share_covers_the_truth(self):
        rng = np.random.default_rng(3)
        hits = 0
        for _ in range(600):
            of_seeds = np.clip(0.9 + 0.05 * rng.normal(size=(4, 1)), 0, 1)
            low, high = crossed_estimate((rng.random((4, 30)) < of_seeds).astype(float), share=True)["interval"]
            assert 0 <= low <= high <= 1
            hits += low <= 0.898 <= high  # the mean of what is clipped
        assert 0.93 <= hits / 600 <= 1

    def test_ties_are_in_the_value_and_in_the_interval(self):
        accuracy = np.array([1.0] * 50 + [0.5] * 50)
        estimate = displacement_estimates({"preference_accuracy": accuracy, "margin": accuracy})["preference_accuracy"]
        low, high = estimate["interval"]
        usual = stats.ttest_1samp(accuracy, 0).confidence_interval()
        assert estimate["value"] == 0.75 and (low, high) == pytest.approx((usual.low, usual.high), abs=0.005)
        few = displacement_estimates({"preference_accuracy": np.array([1.0] * 9 + [0.5])})["preference_accuracy"]
        assert few["interval"][0] < few["value"] == 0.95 < few["interval"][1] <= 1

    def test_difference_is_covered_and_its_p_value_is_uniform(self):
        rng = np.random.default_rng(1)
        hits, p_values = 0, []
        for _ in range(600):
            units = rng.normal(size=(1, 25))  # hard prompts are hard for both, and so do not matter
            first = 0.5 + units + 0.3 * rng.normal(size=(3, 1)) + 0.2 * rng.normal(size=(3, 25))
            second = units + 0.3 * rng.normal(size=(4, 1)) + 0.2 * rng.normal(size=(4, 25))
            low, high = crossed_difference(first, second)["interval"]
            hits += low <= 0.5 <= high
            p_values.append(crossed_difference(first - 0.5, second)["p_value"])
        assert 0.92 <= hits / 600 <= 0.985
        assert 0.015 <= np.mean(np.array(p_values) < 0.05) <= 0.07
        assert 0.35 <= np.mean(np.array(p_values) < 0.5) <= 0.55

    def test_difference_of_single_trainings_is_paired(self):
        rng = np.random.default_rng(2)
        units = 10 * rng.normal(size=(1, 20))
        first, second = units + 0.3 + 0.1 * rng.normal(size=(1, 20)), units
        found = crossed_difference(first, second)
        expected = stats.ttest_rel(first[0], second[0]).confidence_interval()
        assert found["interval"] == pytest.approx([expected.low, expected.high])
        assert found["p_value"] == paired_p_value(first[0] - second[0]) < 0.01

    def test_other_units_are_refused(self):
        with pytest.raises(ValueError, match="must have the same units, and have 3 and 4"):
            crossed_difference(np.zeros((1, 3)), np.zeros((1, 4)))

    def test_without_variance(self):
        same = np.ones((2, 3))
        assert crossed_difference(same, same)["p_value"] == 1.0
        # All of 2^3 flips: the two without a change of sign are as large
        assert crossed_difference(same, same - 1)["p_value"] == 2 / 8


class TestPairedPValue:
    def test_is_that_of_all_flips(self):
        values = np.array([1.0, 2.0, -0.5, 0.7, 3.0, -0.2])
        means = [np.mean(values * signs) for signs in itertools.product((1, -1), repeat=6)]
        expected = np.mean([abs(mean) >= abs(values.mean()) - 1e-12 for mean in means])
        assert paired_p_value(values) == pytest.approx(expected)

    def test_of_random_flips(self):
        rng = np.random.default_rng(0)
        values = rng.normal(0.25, 1, size=60)
        expected = stats.ttest_1samp(values, 0).pvalue
        assert paired_p_value(values) == pytest.approx(expected, abs=0.02)
        assert paired_p_value(values) == paired_p_value(values) != paired_p_value(values, seed=1)

    def test_of_nothing(self):
        assert paired_p_value([]) is None and paired_p_value([1.0]) is None
        assert paired_p_value([0.0, 0.0, 0.0]) == 1.0


def test_holm():
    # By hand: 3 * 0.01, then max(0.03, 2 * 0.02), then max(0.04, 0.03)
    assert holm([0.02, None, 0.03, 0.01]) == pytest.approx([0.04, None, 0.04, 0.03])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
