# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Agreement of critics with each other, with themselves and with people, and whether confidence is what it claims."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import krippendorff
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, cohen_kappa_score

from trl_spo.evaluation.statistics import bootstrap_intervals, wilson_rate
from trl_spo.synthetic.agreement import _alpha_of_sums, agreement_report, label_of_share
from trl_spo.synthetic.critics import Critic, RuleCritic
from trl_spo.synthetic.human_agreement import check_agreement, reliability
from trl_spo.synthetic.jury import Jury, Pair
from trl_spo.synthetic.store import AnswerStore, request_key
from trl_spo.synthetic.verdicts import tally, vote_of_orders


nan = np.nan


def compared(name, *verdicts, probabilities=(None, None), tokens=None, cost=0.0):
    """The vote of a critic with these verdicts in both orders, as `Jury.verdicts` has it; `None` is unparseable, "!" rejected."""
    answers = [
        {"verdict": None if verdict == "!" else verdict, "probability": probability}
        | ({"error": "no"} if verdict == "!" else {})
        for verdict, probability in zip(verdicts, probabilities, strict=True)
    ]
    vote = vote_of_orders(*answers)
    found = {"critic": name, "verdicts": [answer["verdict"] for answer in answers], "rationales": ["", ""]}
    found |= {"status": vote.status, "share": vote.share}
    return found if tokens is None else found | {"tokens": tokens, "cost": cost}


def says(name, label):
    """A vote for the first response (0), the second (1) or none ("tie"), or no vote (`None`)."""
    return compared(name, *{0: "AB", 1: "BA", "tie": ("tie", "tie"), None: "AA"}[label])


def row_of(*votes, prompt="p", lengths=(1, 1)):
    verdict = tally([(vote["share"], 1.0) for vote in votes])
    return {
        "prompt_id": prompt,
        "response_ids": ["x", "y"],
        "lengths": list(lengths),
        "votes": list(votes),
        "share": verdict.share,
        "winner": None if verdict.winner is None else "xy"[verdict.winner],
        "confidence": verdict.confidence,
        "truth": None,
    }


def rows_of(table):
    """Of critics' labels `(pairs, critics)`, each pair of a prompt of its own."""
    return [row_of(*(says(f"c{k}", label) for k, label in enumerate(line)), prompt=i) for i, line in enumerate(table)]


def random_table(pairs, critics, seed):
    """Labels of critics who are right more often than not, some of them missing."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(2, size=(pairs, 1))
    labels = np.where(rng.random((pairs, critics)) < 0.75, truth, 1 - truth).astype(object)
    labels[rng.random((pairs, critics)) < 0.1] = "tie"
    labels[rng.random((pairs, critics)) < 0.2] = None
    return labels.tolist()


def alpha_by_coincidences(table):
    """Krippendorff's definition: of the coincidences within units, each ordered pair of values by 1 / (m - 1)."""
    values = (0, 1, "tie")
    coincidences = np.zeros((3, 3))
    for line in table:
        given = [values.index(label) for label in line if label is not None]
        for i, a in enumerate(given):
            for j, b in enumerate(given):
                if i != j:
                    coincidences[a, b] += 1 / (len(given) - 1)
    margins = coincidences.sum(axis=1)
    n = margins.sum()
    expected = (np.outer(margins, margins) - np.diag(margins)) / (n - 1)
    off = ~np.eye(3, dtype=bool)
    return 1 - coincidences[off].sum() / expected[off].sum()


class TestLabels:
    def test_as_the_jury_counts(self):
        for share in (0.0, 0.3, 0.5 - 1e-8, 0.5 - 1e-12, 0.5, 0.5 + 1e-12, 0.5 + 1e-8, 0.9, 1.0):
            assert label_of_share(share) == tally([(share, 1.0)]).winner
        assert label_of_share(None) is None


class TestWilson:
    @pytest.mark.parametrize("count, number", [(0, 10), (10, 10), (7, 10), (613, 1000)])
    def test_formula(self, count, number):
        z = stats.norm.ppf(0.975)
        p = count / number
        middle = (p + z**2 / (2 * number)) / (1 + z**2 / number)
        half = z / (1 + z**2 / number) * np.sqrt(p * (1 - p) / number + z**2 / (4 * number**2))
        found = wilson_rate(count, number)
        assert found["rate"] == p and found["number"] == number
        np.testing.assert_allclose(found["interval"], [middle - half, middle + half], atol=1e-9)

    def test_of_nothing(self):
        assert wilson_rate(0, 0) == {"rate": None, "interval": None, "number": 0}


class TestBootstrap:
    def test_as_scipy(self):
        rng = np.random.default_rng(0)
        x = rng.choice([0.0, 1.0, 5.0], size=200)
        y = rng.normal(3, 1, size=200)  # no two alike
        units = np.stack([x, y], axis=1)
        (found,) = bootstrap_intervals(units, lambda sums: (sums[:, 0] / sums[:, 1])[None], seed=0)
        expected = stats.bootstrap(
            (x, y),
            lambda x, y, axis: x.sum(axis) / y.sum(axis),
            paired=True,
            method="percentile",
            n_resamples=9999,
            rng=np.random.default_rng(1),
        )
        low, high = expected.confidence_interval
        np.testing.assert_allclose(found, [low, high], atol=0.05 * (high - low))

    def test_seeds(self):
        units = np.random.default_rng(0).normal(size=(30, 1))
        intervals = [bootstrap_intervals(units, lambda sums: sums.T, seed)[0] for seed in (0, 0, 1)]
        assert intervals[0] == intervals[1] != intervals[2]

    def test_in_parts(self, monkeypatch):
        units = np.random.default_rng(0).normal(size=(30, 1))
        whole = bootstrap_intervals(units, lambda sums: sums.T, 0)
        sizes = []

        def statistic(sums):
            sizes.append(len(sums))
            return sums.T

        monkeypatch.setattr("trl_spo.evaluation.statistics._CHUNK", 30 * 7)
        np.testing.assert_allclose(bootstrap_intervals(units, statistic, 0), whole)
        assert sizes == [2000]

    def test_where_there_is_none(self):
        def inverse(sums):
            with np.errstate(divide="ignore"):
                return np.stack([np.where(sums[:, 0] == 0, nan, 1 / sums[:, 0]), np.full(len(sums), nan)])

        some, never = bootstrap_intervals(np.array([[0.0], [1.0], [1.0]]), inverse, 0)
        assert some == [1 / 3, 1.0]  # the resamples without a 1 are left out
        assert never is None
        assert bootstrap_intervals(np.array([[1.0]]), lambda sums: sums.T, 0) == [None]


class TestAlpha:
    def test_by_hand(self):
        # Units: (0, 0), (1, 1), (0, 1), (0, 0), and one of a single label. Disagreement 2 of n = 8; labels: 5 and 3
        # alpha = 1 - (8 - 1) 2 / (64 - 25 - 9)
        report = agreement_report(rows_of([(0, 0), (1, 1), (0, 1), (0, 0), (0, None)]))["alpha"]
        assert report["alpha"] == pytest.approx(1 - 14 / 30, abs=1e-12)
        assert report["pairs"] == 4
        assert report["critics"] == ["c0", "c1"]
        assert report["reason"] is None
        assert report["interval"][0] < report["alpha"] < report["interval"][1] == 1.0

    @pytest.mark.parametrize("critics", [2, 3, 5])
    def test_by_definition(self, critics):
        table = random_table(60, critics, seed=critics)
        found = agreement_report(rows_of(table))["alpha"]
        assert found["alpha"] == pytest.approx(alpha_by_coincidences(table), abs=1e-12)
        assert found["pairs"] == sum(sum(label is not None for label in line) > 1 for line in table)

    def test_interval_is_of_the_same_alpha(self):
        # Each resample of prompts, by the package
        table = random_table(90, 3, seed=1)
        prompts = np.repeat(np.arange(30), 3)
        rows = [row | {"prompt_id": f"p{prompt}"} for row, prompt in zip(rows_of(table), prompts, strict=True)]
        found = agreement_report(rows, seed=3)["alpha"]["interval"]
        counts = np.array([[line.count(0), line.count(1), line.count("tie")] for line in table]).reshape(30, 3, 3)
        rng = np.random.default_rng(0)
        alphas = [
            krippendorff.alpha(
                value_counts=counts[rng.integers(30, size=30)].reshape(90, 3), level_of_measurement="nominal"
            )
            for _ in range(1500)
        ]
        low, high = np.quantile(alphas, [0.025, 0.975])
        np.testing.assert_allclose(found, [low, high], atol=0.1 * (high - low))
        assert found == agreement_report(rows, seed=3)["alpha"]["interval"]
        assert found != agreement_report(rows, seed=4)["alpha"]["interval"]

    def test_pairs_of_a_prompt_belong_together(self):
        # Ten copies of each pair are no more evidence if they are of one prompt
        table = random_table(40, 3, seed=2)
        rows = rows_of(table)
        copies = [row for row in rows for _ in range(10)]
        alone = [row | {"prompt_id": f"q{i}"} for i, row in enumerate(copies)]

        def width(rows):
            low, high = agreement_report(rows)["alpha"]["interval"]
            return high - low

        assert width(copies) == pytest.approx(width(rows), rel=0.1)
        assert width(alone) == pytest.approx(width(rows) / np.sqrt(10), rel=0.15)

    def test_formula_of_sums(self):
        # Disagreement 2 of labels 5 and 3, as above; and no variation, which divides 0 by 0
        np.testing.assert_allclose(_alpha_of_sums(np.array([[2, 5, 3, 0], [0, 8, 0, 0]])), [1 - 14 / 30, nan])

    @pytest.mark.parametrize(
        "table, reason",
        [
            ([], "Fewer than two critics"),
            ([(0,), (1,)], "Fewer than two critics"),
            ([(0, None), (1, None)], "Fewer than two critics"),
            ([(0, None), (None, 1)], "No pair has votes or ties of two critics"),
            ([(0, 0), (0, 0), (1, None)], "say the same of all pairs"),
            ([("tie", "tie"), ("tie", "tie")], "say the same of all pairs"),
        ],
    )
    def test_none(self, table, reason):
        found = agreement_report(rows_of(table))["alpha"]
        assert found["alpha"] is None and found["interval"] is None
        assert reason in found["reason"]

    def test_one_prompt_has_no_interval(self):
        rows = [row | {"prompt_id": "p"} for row in rows_of([(0, 0), (1, 1), (0, 1)])]
        found = agreement_report(rows)["alpha"]
        assert found["alpha"] is not None and found["interval"] is None and found["reason"] is None

    def test_rules_are_left_out(self):
        rows = rows_of(random_table(50, 3, seed=5))
        with_other = [row | {"votes": [*row["votes"], says("rule", i % 2)]} for i, row in enumerate(rows)]
        with_rule = [row | {"votes": [*row["votes"][:-1], row["votes"][-1] | {"rule": True}]} for row in with_other]
        assert agreement_report(with_rule)["alpha"] == agreement_report(rows)["alpha"]
        assert agreement_report(with_other)["alpha"] != agreement_report(rows)["alpha"]
        assert agreement_report(with_rule)["critics"] == agreement_report(with_other)["critics"]


def lengths_of(rng):
    return tuple(int(length) for length in rng.integers(1, 6, size=2))


class TestCritics:
    def test_by_hand(self):
        rows = [
            row_of(compared("c", "A", "B", tokens=[100, 10], cost=0.5), says("d", 0), lengths=(5, 3)),
            row_of(compared("c", "B", "A", tokens=[100, 20], cost=0.25), says("d", 1), lengths=(5, 3)),
            row_of(compared("c", "A", "A", tokens=[1, 1], cost=0.0), says("d", 0), lengths=(3, 5)),
            row_of(compared("c", "B", "B", tokens=[1, 1], cost=0.0), says("d", 1), lengths=(3, 5)),
            row_of(compared("c", "B", "B"), says("d", 1), lengths=(4, 4)),
            row_of(compared("c", "tie", "A"), says("d", None), lengths=(1, 2)),
            row_of(compared("c", "A", None), says("d", None), lengths=(1, 2)),
            row_of(compared("c", "!", "B"), says("d", None), lengths=(1, 2)),
            row_of(compared("c", "A", "B"), says("d", 1), lengths=(1, 2)),
        ]
        report = agreement_report(rows)
        assert report["jury"] == {
            "pairs": 9,
            "decided": 5,  # the first five
            "ties": 2,
            "without_votes": 2,
            "mean_confidence": 1.0,
            "longer_rate": wilson_rate(2, 4),  # 0 of (5, 3), not 1; 1 of (3, 5), not 0
        }
        assert report["critics"]["c"] == {
            "pairs": 9,
            "votes": 3,
            "ties": 1,
            "flipped": 3,
            "unparseable": 1,
            "rejected": 1,
            "abstained": 0,
            "flip_rate": wilson_rate(3, 6),
            "flips_to_first_shown": 1,
            "flips_to_second_shown": 2,
            "verdicts": {"A": 7, "B": 8, "tie": 1},
            "first_shown_rate": wilson_rate(7, 15),
            "longer_rate": wilson_rate(1, 3),
            "agreement_with_jury": wilson_rate(2, 2),
            "prompt_tokens": 202,
            "completion_tokens": 32,
            "cost": 0.75,
        }
        assert report["critics"]["d"]["agreement_with_jury"] == wilson_rate(5, 5)
        assert report["critics"]["d"]["prompt_tokens"] is None and report["critics"]["d"]["cost"] == 0

    def test_winner_is_found_by_its_id(self):
        row = row_of(says("c", 1), says("d", 1), says("e", 0), lengths=(1, 2))
        report = agreement_report([row])
        assert report["jury"]["longer_rate"]["rate"] == 1
        assert report["jury"]["mean_confidence"] == pytest.approx(1 / 3)
        assert [critic["agreement_with_jury"]["rate"] for critic in report["critics"].values()] == [1, 1, 0]

    def test_of_critics_that_score(self):
        scored = {"critic": "s", "scores": [0.1, 0.9], "status": "vote", "share": 0.31}
        silent = {"critic": "r", "scores": [None, 1.0], "status": "abstained", "share": None}
        report = agreement_report([row_of(scored, silent, lengths=(1, 2))])["critics"]
        assert report["s"]["votes"] == 1 and report["s"]["longer_rate"] == wilson_rate(1, 1)
        assert report["s"]["verdicts"] == {"A": 0, "B": 0, "tie": 0}
        assert report["s"]["first_shown_rate"]["rate"] is None and report["s"]["flip_rate"]["rate"] is None
        assert report["r"]["abstained"] == 1 and report["r"]["longer_rate"]["number"] == 0

    def test_position_biased(self):
        rng = np.random.default_rng(0)
        rows = [row_of(compared("first", "A", "A"), says("d", 0), lengths=lengths_of(rng)) for _ in range(50)]
        found = agreement_report(rows)["critics"]["first"]
        assert found["votes"] == 0 and found["flip_rate"]["rate"] == 1
        assert found["flips_to_first_shown"] == 50 and found["flips_to_second_shown"] == 0
        assert found["first_shown_rate"]["rate"] == 1 and found["longer_rate"]["number"] == 0
        assert agreement_report([row_of(compared("last", "B", "B"))])["critics"]["last"]["flips_to_second_shown"] == 1

    def test_flips_by_probabilities_name_no_position(self):
        row = row_of(compared("c", "A", "B", probabilities=(0.3, 0.6)), says("d", 0))
        found = agreement_report([row])["critics"]["c"]
        assert found["flipped"] == 1 and found["votes"] == 0 and found["flip_rate"]["rate"] == 1
        assert found["flips_to_first_shown"] == found["flips_to_second_shown"] == 0

    def test_length_biased(self):
        rng = np.random.default_rng(0)
        lengths = [lengths_of(rng) for _ in range(80)]
        rows = [
            row_of(
                says("long", "tie" if a == b else int(a < b)),
                says("short", "tie" if a == b else int(a > b)),
                lengths=(a, b),
            )
            for a, b in lengths
        ]
        different = sum(a != b for a, b in lengths)
        assert 0 < different < 80
        found = agreement_report(rows)["critics"]
        assert found["long"]["longer_rate"] == wilson_rate(different, different)
        assert found["short"]["longer_rate"] == wilson_rate(0, different)
        assert found["long"]["flip_rate"]["rate"] == 0 and found["long"]["first_shown_rate"]["rate"] == 0.5
        assert found["long"]["ties"] == 80 - different

    def test_random(self):
        rng = np.random.default_rng(0)
        rows = [
            row_of(
                compared("coin", *rng.choice(["A", "B"], 2)),
                says("d", int(rng.integers(2))),
                prompt=i,
                lengths=lengths_of(rng),
            )
            for i in range(2000)
        ]
        report = agreement_report(rows)
        found = report["critics"]["coin"]
        for name in ("flip_rate", "first_shown_rate", "longer_rate"):
            low, high = found[name]["interval"]
            assert low < 0.5 < high and high - low < 0.1
        assert 0.4 < found["flips_to_first_shown"] / found["flipped"] < 0.6
        low, high = report["alpha"]["interval"]
        assert low < 0 < high and high - low < 0.2

    def test_unknown_status(self):
        row = row_of(says("c", 0))
        row["votes"][0]["status"] = "voted"
        with pytest.raises(KeyError, match="voted"):
            agreement_report([row])

    def test_rows_are_not_kept(self):
        def rows(number):
            labels = (0, 1, "tie", None)
            for i in range(number):
                yield row_of(*(says(f"c{k}", labels[(i + i // 4 * k) % 4]) for k in range(3)), prompt=i // 6)

        agreement_report(rows(60))
        peaks = []
        for number in (500, 2000):
            tracemalloc.start()
            agreement_report(rows(number))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        # Bytes a row, which itself has some 2,000: most of them in the package that computes alpha
        assert (peaks[1] - peaks[0]) / 1500 < 400

    def test_json_and_no_rows(self):
        report = agreement_report(iter(rows_of(random_table(30, 3, seed=0))))
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        empty = agreement_report([])
        assert empty["jury"]["pairs"] == 0 and empty["jury"]["mean_confidence"] is None and empty["critics"] == {}
        assert json.loads(json.dumps(empty, allow_nan=False)) == empty


@dataclass(kw_only=True)
class ScriptedCritic(Critic):
    """Gives the verdict of a function of the two responses in the order that it is shown."""

    compares: ClassVar[bool] = True

    verdict: Callable

    def key(self, request):
        return request_key(critic=self.name, responses=request.responses)

    def answer(self, requests):
        for tag, request in requests:
            yield tag, {"verdict": self.verdict(*request.responses), "rationale": ""}


class TestOfAJury:
    def test_report(self, tmp_path):
        critics = [
            ScriptedCritic(name="first", verdict=lambda one, other: "A"),
            ScriptedCritic(name="long", verdict=lambda one, other: "A" if len(one) > len(other) else "B"),
            ScriptedCritic(name="prose", verdict=lambda one, other: None),
            RuleCritic(name="rule", function=lambda prompt, response: response.startswith("y")),
        ]
        texts = [("x" * (i + 1), "y" * (9 - i)) for i in range(9)] + [("same", "same")]
        pairs = [Pair(f"p{i}", ("0", "1"), "prompt", pair, {}) for i, pair in enumerate(texts)]
        jury = Jury(critics)
        with AnswerStore(tmp_path / "answers.sqlite") as store:
            jury.ask(pairs, store)
            report = agreement_report(jury.verdicts(pairs, store))
        # Nobody is asked about responses that are the same, and of equal length, "long" says B in both orders
        assert report["jury"] | {"longer_rate": None} == {
            "pairs": 10,
            "decided": 8,
            "ties": 0,
            "without_votes": 2,
            "mean_confidence": 1.0,
            "longer_rate": None,
        }
        assert report["jury"]["longer_rate"] == report["critics"]["long"]["longer_rate"] == wilson_rate(8, 8)
        assert report["critics"]["first"]["flips_to_first_shown"] == 9
        assert report["critics"]["long"]["flips_to_second_shown"] == 1
        assert report["critics"]["prose"]["unparseable"] == 9
        assert report["critics"]["rule"]["votes"] == 9
        assert (
            report["critics"]["rule"]["longer_rate"]
            == report["critics"]["rule"]["agreement_with_jury"]
            == wilson_rate(4, 8)
        )
        assert report["alpha"]["critics"] == ["long"]


class TestCheckAgreement:
    def test_by_hand(self):
        human = [0, 0, 0, 0, 1, 1, 1, 1, 0, 1]
        jury = [0, 0, 0, 1, 1, 1, 0, 0, None, None]
        critics = {"c": [0, None, None, None, None, None, None, None, None, 0], "d": human}
        lengths = [(2, 1), (1, 2), (3, 3), (2, 1), (1, 2), (2, 1), (3, 3), (1, 2), (2, 1), (2, 1)]
        found = check_agreement(human, jury, critics, lengths)
        # Of the 8 decided, table [[3, 1], [2, 2]]: 5/8 agree, by chance (4 5 + 4 3) / 64 = 1/2
        assert found["jury"]["pairs"] == 10 and found["jury"]["decided"] == 8
        assert found["jury"]["coverage"]["value"] == 0.8
        assert found["jury"]["agreement_on_decided"]["value"] == 5 / 8
        assert found["jury"]["agreement"]["value"] == 6 / 10
        assert found["jury"]["kappa"]["value"] == pytest.approx((5 / 8 - 1 / 2) / (1 - 1 / 2))
        assert found["jury"]["kappa"]["reason"] is None
        # Longer: right, wrong, equal, right, right, wrong, equal, right, right, wrong
        assert found["longer"]["coverage"]["value"] == 0.8
        assert found["longer"]["agreement_on_decided"]["value"] == 5 / 8
        assert found["longer"]["agreement"]["value"] == 0.6
        assert found["critics"]["c"]["agreement"]["value"] == 0.5
        assert found["critics"]["c"]["coverage"]["value"] == 0.2
        assert found["critics"]["d"]["kappa"] == {"value": 1.0, "interval": [1.0, 1.0], "reason": None}
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert check_agreement(human, jury)["longer"] is None and check_agreement(human, jury)["critics"] == {}

    def test_against_sklearn(self):
        rng = np.random.default_rng(0)
        human = rng.integers(2, size=300)
        jury = np.where(rng.random(300) < 0.8, human, 1 - human)
        decided = rng.random(300) < 0.7
        found = check_agreement(human, [int(j) if d else None for j, d in zip(jury, decided, strict=True)])["jury"]
        assert found["coverage"]["value"] == decided.mean()
        assert found["agreement_on_decided"]["value"] == accuracy_score(human[decided], jury[decided])
        assert found["kappa"]["value"] == cohen_kappa_score(human[decided], jury[decided])
        # The intervals, each resample by sklearn
        draws = {"coverage": [], "agreement_on_decided": [], "agreement": [], "kappa": []}
        for _ in range(400):
            some = rng.integers(300, size=300)
            known = some[decided[some]]
            draws["coverage"].append(decided[some].mean())
            draws["agreement_on_decided"].append((human[known] == jury[known]).mean())
            draws["agreement"].append(np.where(decided[some], human[some] == jury[some], 0.5).mean())
            draws["kappa"].append(cohen_kappa_score(human[known], jury[known]))
        for name, values in draws.items():
            low, high = np.quantile(values, [0.025, 0.975])
            np.testing.assert_allclose(found[name]["interval"], [low, high], atol=0.2 * (high - low), err_msg=name)

    def test_coverage_of_the_intervals(self, monkeypatch):
        monkeypatch.setattr("trl_spo.evaluation.statistics._RESAMPLES", 500)
        # A jury that decides 80 %, of which it gets 70 % right: agreement 0.66, and kappa 0.4, as both labels are as frequent
        rng = np.random.default_rng(0)
        expected = {"coverage": 0.8, "agreement_on_decided": 0.7, "agreement": 0.66, "kappa": 0.4}
        inside = dict.fromkeys(expected, 0)
        for seed in range(200):
            human = rng.integers(2, size=200)
            jury = np.where(rng.random(200) < 0.7, human, 1 - human).astype(object)
            jury[rng.random(200) < 0.2] = None
            found = check_agreement(human, jury, seed=seed)["jury"]
            for name, value in expected.items():
                low, high = found[name]["interval"]
                inside[name] += low <= value <= high
        for name, number in inside.items():
            assert 0.9 < number / 200 < 0.99, name

    def test_order_of_the_responses(self):
        rng = np.random.default_rng(1)
        human, jury = rng.integers(2, size=(2, 50))
        lengths = rng.integers(1, 4, size=(50, 2))
        found = check_agreement(human, jury, lengths=lengths)
        other = check_agreement(1 - human, 1 - jury, lengths=lengths[:, ::-1])
        for who in ("jury", "longer"):
            for name in ("coverage", "agreement_on_decided", "agreement", "kappa"):
                assert found[who][name]["value"] == pytest.approx(other[who][name]["value"])

    def test_without_kappa(self):
        found = check_agreement([0, 1], [None, None])["jury"]
        assert found["agreement_on_decided"] == {"value": None, "interval": None}
        assert found["agreement"]["value"] == 0.5 and found["coverage"]["value"] == 0
        assert found["kappa"] == {"value": None, "interval": None, "reason": "No pair is decided."}
        # All right but one, and kappa would be 0
        found = check_agreement([1] * 20 + [0], [1] * 19 + [0, None])["jury"]
        assert found["agreement_on_decided"]["value"] == 0.95
        assert found["kappa"]["value"] is None and found["kappa"]["interval"] is None
        assert "People prefer the second response in all pairs" in found["kappa"]["reason"]
        # A jury that says always the same has one
        assert check_agreement([0, 1] * 10, [0] * 20)["jury"]["kappa"]["value"] == 0

    def test_seeds(self):
        rng = np.random.default_rng(0)
        human, jury = rng.integers(2, size=(2, 100))
        first, again, other = (check_agreement(human, jury, seed=seed) for seed in (0, 0, 1))
        assert first == again != other

    @pytest.mark.parametrize(
        "arguments, match",
        [
            (([], []), r"no labels of people \(`human`\)"),
            (([0, "tie"], [0, 1]), r"label 1 of people \(`human`\) is 'tie'.*Leave out pairs with ties"),
            (([0, None], [0, 1]), r"label 1 of people \(`human`\) is None.*Leave out pairs with ties"),
            (([0, 0.5], [0, 1]), r"label 1 of people \(`human`\) is 0.5"),
            (([0, 1], [0, 2]), r"label 1 of the jury \(`jury`\) is 2.*or `None` \(undecided\)"),
            (([0, 1], [0, nan]), r"label 1 of the jury \(`jury`\) is nan"),
            (([0, 1], [0]), r"2 labels of people and 1 of the jury"),
            (([0, 1], [0, 1], {"c": [0]}), r"2 labels of people and 1 of the critic 'c'"),
            (([0, 1], [0, 1], None, [(1, 2)]), r"2 labels of people and 1 of `lengths`"),
        ],
    )
    def test_bad_input(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            check_agreement(*arguments)


class TestReliability:
    def test_by_hand(self):
        found = reliability([0.1, 0.3, 0.6, 0.6, 1.0], [False, True, True, False, True], bins=2)
        assert found["number"] == 5
        low, high = found["bins"]
        assert (low["lower"], low["upper"], high["lower"], high["upper"]) == (0, 0.5, 0.5, 1)
        assert (low["number"], high["number"]) == (2, 3)
        assert low["mean_confidence"] == pytest.approx(0.2) and low["claimed"] == pytest.approx(0.6)
        assert low["accuracy"] == 0.5 and low["interval"] == wilson_rate(1, 2)["interval"]
        assert high["mean_confidence"] == pytest.approx(2.2 / 3) and high["claimed"] == pytest.approx(
            (1 + 2.2 / 3) / 2
        )
        assert high["accuracy"] == 2 / 3
        expected = 2 / 5 * 0.1 + 3 / 5 * ((1 + 2.2 / 3) / 2 - 2 / 3)
        assert found["expected_calibration_error"] == pytest.approx(expected)
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_bins(self):
        # What juries of five and ten have, which rounding puts on either side of the ends of bins
        shares = [k / 10 for k in range(5, 11)]
        found = reliability([abs(2 * share - 1) for share in shares], [True] * 6, bins=10)
        assert [place["number"] for place in found["bins"]] == [1, 0, 1, 0, 1, 0, 1, 0, 1, 1]
        assert found["bins"][1] == {
            "lower": 0.1,
            "upper": 0.2,
            "number": 0,
            "mean_confidence": None,
            "claimed": None,
            "accuracy": None,
            "interval": None,
        }

    def test_calibrated(self):
        rng = np.random.default_rng(0)
        confidence = rng.random(20000)
        right = rng.random(20000) < (1 + confidence) / 2
        found = reliability(confidence, right)
        assert found["expected_calibration_error"] < 0.02
        for place in found["bins"]:
            assert abs(place["accuracy"] - place["claimed"]) < 0.05
            assert place["interval"][0] < place["accuracy"] < place["interval"][1]
        # One that always claims to be right, and is in 3 of 4
        assert reliability([1.0] * 4, [1, 1, 1, 0])["expected_calibration_error"] == 0.25

    def test_of_nothing(self):
        found = reliability([], [], bins=3)
        assert found["expected_calibration_error"] is None and [place["number"] for place in found["bins"]] == [
            0,
            0,
            0,
        ]

    @pytest.mark.parametrize(
        "arguments, match",
        [
            (([0.5], [True], 0), "`bins` must be at least 1, got 0"),
            (([0.5, 0.5], [True]), r"of one length, got the shapes \(2,\) and \(1,\)"),
            (([0.5, 1.5], [True, True]), "`confidence` must be from 0 to 1, got 1.5 at 1"),
            (([nan], [True]), "`confidence` must be from 0 to 1, got nan at 0"),
            (([0.5], [0.5]), "`is_right` must be true or false"),
            (([0.5], [None]), "`is_right` must be true or false.*not decided"),
        ],
    )
    def test_bad_input(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            reliability(*arguments)


def test_length_balanced():
    """By hand: 12 pairs where people prefer the longer response, of which the jury has 9 and one undecided; 10 of the shorter one, 4."""
    human = [i % 2 for i in range(22)]
    lengths = [(1, 2) if (label == 1) == (i < 12) else (2, 1) for i, label in enumerate(human)]
    is_right = [True] * 9 + [None] + [False] * 2 + [True] * 4 + [False] * 6
    jury = [
        None if right is None else label if right else 1 - label for label, right in zip(human, is_right, strict=True)
    ]
    found = check_agreement(human, jury, {"critic": jury}, lengths)
    balanced = found["jury"]["length_balanced"]
    assert balanced["value"] == pytest.approx((9.5 / 12 + 4 / 10) / 2)
    low, high = balanced["interval"]
    assert low < balanced["value"] < high and found["critics"]["critic"]["length_balanced"] == balanced
    # Whoever goes by length only
    longer = [int(a < b) for a, b in lengths]
    only = check_agreement(human, longer, lengths=lengths)["jury"]
    assert only["length_balanced"]["value"] == 0.5 and only["length_balanced"]["interval"] == [0.5, 0.5]
    assert only["agreement"]["value"] == pytest.approx(12 / 22)
    few = check_agreement(human[:21], jury[:21], lengths=lengths[:21])["jury"]["length_balanced"]
    assert few["value"] is None and "12 pairs and the shorter one in 9" in few["reason"]
    assert "length_balanced" not in check_agreement(human, jury)["jury"]
