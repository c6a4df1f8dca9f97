# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Estimates of label noise, against simulated annotators whose flip rate is known."""

import itertools
import math

import numpy as np
import pytest
from datasets import Dataset
from tests.advisor.conftest import codes, make_pairs, make_unpaired, only, rows_of

from trl_spo.advisor.findings import wilson
from trl_spo.advisor.noise import (
    annotator_votes,
    flip_rate,
    intransitive_triples,
    majority_error,
    noise_findings,
    repeated_comparisons,
)


def _flipped(triples, rate, rng):
    """Labels of an annotator who errs with this probability."""
    return [(p, b, a) if rng.random() < rate else (p, a, b) for p, a, b in triples]


def _estimates(dataset):
    return only(noise_findings(dataset, rows_of(dataset)), "label_noise").data["estimates"]


def test_two_labels_differ_if_one_of_them_is_wrong():
    for rate in (0.0, 0.05, 0.2, 0.5):
        differ = sum(
            math.prod(rate if wrong else 1 - rate for wrong in labels)
            for labels in itertools.product((False, True), repeat=2)
            if labels[0] != labels[1]
        )
        assert flip_rate(differ) == pytest.approx(rate, abs=1e-9)
    assert flip_rate(0.6) == 0.5


def test_a_cycle_has_probability_e_1_minus_e():
    # a > b > c. All outcomes of the three comparisons: a cycle if each of them wins once
    for rate in (0.0, 0.1, 0.3, 0.5):
        cycles = 0.0
        for wrong in itertools.product((False, True), repeat=3):
            wins = [0, 0, 0]
            for (better, worse), flipped in zip(((0, 1), (1, 2), (0, 2)), wrong, strict=True):
                wins[worse if flipped else better] += 1
            if wins == [1, 1, 1]:
                cycles += math.prod(rate if flipped else 1 - rate for flipped in wrong)
        assert flip_rate(2 * cycles) == pytest.approx(rate, abs=1e-9)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.35])
def test_repeated_comparisons_find_the_flip_rate(rate):
    rng = np.random.default_rng(1)
    pairs = [(f"p {i}", f"good {i}", f"bad {i}") for i in range(1500)]
    dataset = make_pairs(*_flipped(pairs, rate, rng), *_flipped(pairs, rate, rng), ("other", "a", "b"))
    (estimate,) = _estimates(dataset)
    assert estimate["source"] == "repeated" and estimate["groups"] == 1500
    low, high = estimate["interval"]
    assert low < rate < high and high - low < 0.1
    assert estimate["flip_rate"] == pytest.approx(rate, abs=0.03)


def test_interval_covers_the_truth():
    # Three labels of some pairs, two of others: nineteen of twenty intervals, at least, have the truth in them
    rng, hits = np.random.default_rng(2), 0
    for _ in range(40):
        wrong = rng.random((60, 3)) < 0.15
        pairs = [
            ("p", f"b {i}", f"a {i}") if flipped else ("p", f"a {i}", f"b {i}")
            for i, row in enumerate(wrong)
            for flipped in row[: 2 + i % 2]
        ]
        found = repeated_comparisons(rows_of(make_pairs(*pairs)))
        low, high = (flip_rate(end) for end in found["disagreement"]["interval"])
        hits += low <= 0.15 <= high
    assert hits >= 37


def test_order_of_the_two_does_not_matter():
    dataset = make_pairs(("p", "a", "b"), ("P", "B ", "a"), ("q", "a", "b"), ("q", "a", "b"))
    found = repeated_comparisons(rows_of(dataset))
    assert (found["groups"], found["conflicting"], found["disagreement"]["rate"]) == (2, 1, 0.5)


def test_unpaired_responses_with_both_labels():
    dataset = make_unpaired(("p", "a", True), ("p", "a", False), ("p", "b", True), ("p", "b", True), ("q", "a", False))
    found = repeated_comparisons(rows_of(dataset))
    assert (found["groups"], found["conflicting"]) == (2, 1)
    assert codes(noise_findings(dataset, rows_of(dataset)))["label_noise"] == "info"  # by two of them
    many = make_unpaired(*((f"p {i}", "a", label) for i in range(40) for label in (True, False)))
    finding = only(noise_findings(many, rows_of(many)), "label_noise")
    assert finding.severity == "warning" and "IPO" not in finding.remedy  # which is for pairs


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_cycles_find_the_flip_rate(rate):
    rng = np.random.default_rng(3)
    pairs = [
        (f"p {i}", f"{i} is {a}", f"{i} is {b}") for i in range(800) for a, b in itertools.combinations("abcd", 2)
    ]
    (estimate,) = _estimates(make_pairs(*_flipped(pairs, rate, rng)))
    assert estimate["source"] == "cycles" and (estimate["triples"], estimate["prompts"]) == (3200, 800)
    low, high = estimate["interval"]
    assert low < rate < high
    assert estimate["flip_rate"] == pytest.approx(rate, abs=0.03)


def test_triples_by_hand():
    cycle = [("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a")]
    line = [("q", "a", "b"), ("q", "b", "c"), ("q", "a", "c")]
    open_end = [("r", "a", "b"), ("r", "b", "c")]
    contradicted = [("s", "a", "b"), ("s", "b", "c"), ("s", "c", "a"), ("s", "a", "c")]
    found = intransitive_triples(rows_of(make_pairs(*cycle, *line, *open_end, *contradicted)))
    assert (found["triples"], found["cycles"], found["prompts"], found["rate"]["rate"]) == (2, 1, 2, 0.5)


def test_no_estimate_without_any_disagreement():
    pairs = [(f"p {i}", a, b) for i in range(50) for a, b in itertools.combinations("abc", 2)]
    dataset = make_pairs(*pairs, *pairs[:20])
    finding = only(noise_findings(dataset, rows_of(dataset)), "label_noise")
    assert (finding.severity, finding.data["flip_rate"], finding.data["estimates"]) == ("info", None, [])
    assert "20 comparisons" in finding.detail and "none of 50 triples" in finding.detail


@pytest.mark.parametrize(
    ("votes", "annotators", "rate"),
    [
        ([["a", "b", "a"], ["a", "a", "a"]], 3, 1 / 3),
        ([[1, 0], [1, 1], [0, 0], [0, 1]], 2, 0.5),
        ([[True, None, False], [True, True, None]], 2, 0.5),
        ([["a", "tie", "a"], [1.0 * 0.5, "b", "a"]], 2, 0.5),
        (
            [
                [{"for_chosen": 1.0}, {"for_chosen": 0.0}, {"for_chosen": None}],
                [{"for_chosen": 0.9}, {"for_chosen": 0.8}],
            ],
            2,
            0.5,
        ),
        ([3, 2, 3, 3], 3, 1 / 6),
    ],
)
def test_votes_by_hand(votes, annotators, rate):
    found = annotator_votes(votes)
    assert (found["annotators"], found["disagreement"]["rate"]) == (annotators, pytest.approx(rate))


@pytest.mark.parametrize(
    "votes", [[1, 2, 3], [0, 5], [], [None], ["a", "b"], [[1, 2, 3], [3, 3, 1]], [True, False], [7, 1000]]
)
def test_what_is_no_vote(votes):
    assert annotator_votes(votes) is None


@pytest.mark.parametrize("annotators", [2, 3, 5])
def test_votes_find_the_flip_rate_of_the_majority(annotators):
    rng = np.random.default_rng(4)
    wrong = rng.random((2000, annotators)) < 0.2
    of_majority = np.where(wrong.sum(axis=1) * 2 == annotators, 0.5, wrong.sum(axis=1) * 2 > annotators).mean()
    assert majority_error(0.2, annotators) == pytest.approx(of_majority, abs=0.03)
    pairs = [(f"p {i}", "a", "b") for i in range(2000)]
    dataset = make_pairs(*pairs, votes=[["b" if vote else "a" for vote in row] for row in wrong])
    (estimate,) = _estimates(dataset)
    assert estimate["of_annotator"] == pytest.approx(0.2, abs=0.02)
    low, high = estimate["interval"]
    assert low < majority_error(0.2, annotators) < high


def test_noise_is_called_from_a_tenth_on():
    for share, severity in ((0.05, "info"), (0.4, "warning")):
        pairs = [(f"p {i}", "a", "b") for i in range(200)]
        again = [(p, b, a) if i < share * 200 else (p, a, b) for i, (p, a, b) in enumerate(pairs)]
        dataset = make_pairs(*pairs, *again)
        finding = only(noise_findings(dataset, rows_of(dataset)), "label_noise")
        assert finding.severity == severity
        assert ("IPO" in finding.remedy) == (severity == "warning")


def test_scores_against_labels():
    pairs = [(f"p {i}", "a", "b") for i in range(4)]
    by_scores = make_pairs(*pairs, score_chosen=[3.0, 1.0, 2.0, None], score_rejected=[1.0, 2.0, 2.0, 1.0])
    by_margin = make_pairs(*pairs, margin=[2.0, -1.0, 0.0, None])
    for dataset in (by_scores, by_margin):
        findings = noise_findings(dataset, rows_of(dataset))[1:]
        assert codes(findings) == {"score_contradictions": "warning", "score_ties": "info"}
        assert [finding.data["share"]["rate"] for finding in findings] == [1 / 3, 1 / 3]
    assert len(noise_findings(make_pairs(*pairs), rows_of(make_pairs(*pairs)))) == 1


def test_few_cases_decide_nothing():
    clean = [(f"p {i}", f"good {i}", f"bad {i}") for i in range(200)]
    again, cycle = ("p 0", "bad 0", "good 0"), [("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a")]
    for few in ([again], cycle):
        dataset = make_pairs(*clean, *few)
        finding = only(noise_findings(dataset, rows_of(dataset)), "label_noise")
        assert (finding.severity, finding.data["noisy"], finding.data["flip_rate"]) == ("info", None, 0.5)
        assert "cannot be told by so few cases" in finding.detail and finding.remedy == ""
    # Enough of them, but too few to say that it is more than a tenth: of 40 pairs, 11 have two labels that differ, e = 0.16
    pairs = clean[:40] + [(p, b, a) if i < 11 else (p, a, b) for i, (p, a, b) in enumerate(clean[:40])]
    for rows, noisy in ((pairs, None), (pairs * 5, None), (pairs + [(p, b, a) for p, a, b in clean[:40]], True)):
        dataset = make_pairs(*rows)
        assert only(noise_findings(dataset, rows_of(dataset)), "label_noise").data["noisy"] is noisy


def test_one_contradiction_does_not_speak_for_a_thousand_votes():
    votes = [["a", "a", "b"] if i < 20 else ["a", "a", "a"] for i in range(100)]
    triples = [("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a")]
    clean = [(f"p {i}", f"good {i}", f"bad {i}") for i in range(97)]
    # By the votes, of a panel of which one of 15 errs; one triple is a cycle
    (first, second) = _estimates(make_pairs(*triples, *clean, votes=votes))
    assert (first["source"], second["source"]) == ("votes", "cycles")
    # Votes of two rows come after 100 pairs that are there twice
    again = [(p, b, a) if i < 20 else (p, a, b) for i, (p, a, b) in enumerate(clean)]
    votes = [["a", "b"]] * 2 + [None] * (2 * len(clean) - 2)
    (first, second) = _estimates(make_pairs(*clean, *again, votes=votes))
    assert (first["source"], second["source"]) == ("repeated", "votes")


def test_votes_of_panels_of_several_sizes():
    rng = np.random.default_rng(5)
    sizes = [9] * 10 + [2] * 1500 + [1] * 500
    votes = [["b" if wrong else "a" for wrong in rng.random(n) < 0.2] for n in sizes]
    pairs = [(f"p {i}", "a", "b") for i in range(len(sizes))]
    (estimate,) = _estimates(make_pairs(*pairs, votes=votes))
    assert (estimate["annotators"], estimate["disagreement"]["number"]) == (9, 1510)
    # By hand: of nine, at least five are wrong; one of two that differ, or the only one, is wrong as often as not
    of_nine = sum(math.comb(9, k) * 0.2**k * 0.8 ** (9 - k) for k in range(5, 10))
    expected = (10 * of_nine + 1500 * (0.2**2 + 0.2 * 0.8) + 500 * 0.2) / 2010
    low, high = estimate["interval"]
    assert low < expected < high and estimate["flip_rate"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("votes", "text"),
    [([3] * 60, "all annotators agree"), ([["helpful", "honest"]] * 60, "differ more often than votes")],
)
def test_votes_that_say_nothing(votes, text):
    dataset = make_pairs(*((f"p {i}", "a", "b") for i in range(60)), annotations=votes)
    finding = only(noise_findings(dataset, rows_of(dataset)), "label_noise")
    assert finding.data["estimates"] == [] and text in finding.detail


def test_images_may_be_what_differs():
    pairs = [("Is it red?", *("yes", "no")[:: 1 - 2 * (i % 2)]) for i in range(60)]
    dataset = make_pairs(*pairs)
    assert only(noise_findings(dataset, rows_of(dataset)), "label_noise").data["estimates"] != []
    dataset = dataset.add_column("images", [[f"{i}.png"] for i in range(60)])
    finding = only(noise_findings(dataset, rows_of(dataset)), "label_noise")
    assert finding.data["estimates"] == [] and "different images" in finding.detail


@pytest.mark.parametrize("pairs", [[], [("p", "a", "a")], [("p", "a", "b"), ("p", "b", "a")] * 3])
def test_nothing_to_make_triples_of(pairs):
    rows = rows_of(make_pairs(("q", "c", "c"), *pairs))
    assert intransitive_triples(rows) == {"triples": 0, "cycles": 0, "prompts": 0, "rate": wilson(0, 0)}


def test_lists_have_no_labels_to_compare():
    dataset = Dataset.from_dict({"prompt": ["p", "p"], "completions": [["a", "b"]] * 2, "best": [0, 1]})
    assert codes(noise_findings(dataset, rows_of(dataset))) == {"label_noise": "info"}


def test_real_data(real_data):
    (by_votes, by_cycles) = _estimates(real_data("pandalm_human_pairs"))
    assert (by_votes["source"], by_votes["annotators"], by_cycles["source"]) == ("votes", 3, "cycles")
    # 81 of 732 rows have two of three votes: two annotators differ in 81 · 2/3 / 732 of them
    assert by_votes["disagreement"]["rate"] == pytest.approx(81 * 2 / 3 / 732)
    for name in ("hh_helpful_pairs", "qa_feedback_pairs", "llmbar_human_pairs", "gsm8k_correct_vs_wrong_pairs"):
        assert _estimates(real_data(name)) == []
