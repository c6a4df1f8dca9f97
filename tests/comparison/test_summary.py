# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What is made of evaluations whose numbers are known, against scipy and figures worked out by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from scipy import stats

from trl_spo.comparison import ComparisonConfig
from trl_spo.comparison.data import ComparisonData
from trl_spo.comparison.summary import summarize
from trl_spo.evaluation.statistics import mean_estimate


N = 64  # prompts


def evaluated(
    reward: np.ndarray, kl: float = 0.0, entropy: float = 10.0, exact: np.ndarray | None = None, **shares: np.ndarray
) -> dict[str, Any]:
    """As [`Evaluation.evaluate`] returns it."""
    units = {"reward": reward, "kl": np.full(N, kl), "entropy": np.full(N, entropy), **shares}
    exact = np.ones(N) if exact is None else exact
    return {
        "metrics": {name: mean_estimate(values) for name, values in units.items()},
        "units": {name: values.tolist() for name, values in units.items()},
        "capabilities": [{"name": "sums", "metric": "exact match", "units": exact.tolist()}],
    }


@pytest.fixture
def summary_of(tmp_path):
    def make(
        methods: dict[str, dict], results: dict[str, list], base: dict[str, Any], **changes: Any
    ) -> dict[str, Any]:
        """`results`: of each training, by its id, what was found at its checkpoints, the last one at its end."""
        config = ComparisonConfig(
            output_dir=str(tmp_path),
            model="model",
            dataset="pairs",
            methods=methods,
            seeds=sorted({int(name[-1]) for name in results}),
            training={"use_cpu": True, "bf16": False},
            reward="statistics:mean",
            price_per_hour=3600.0,
            **changes,
        )
        done = []
        for run in config.planned_runs():
            found = results[run.id]
            points = [{"step": i, "final": i == len(found) - 1, "found": one} for i, one in enumerate(found)]
            result = {
                "run": run,
                "status": "done" if found else "failed",
                "error": None,
                "stage": None,
                "points": points,
            }
            measured = {"seconds": 10.0 if found else None, "reward_seconds": 4.0 * (run.method == "rloo")}
            done.append(result | measured | {"peak_memory": None, "memory_of": None, "processes": 2})
        data = ComparisonData(tmp_path, ["preference"], {"train": 4, "test": N}, [])
        evaluation = SimpleNamespace(prompts=Dataset.from_dict({"prompt": [str(i) for i in range(N)]}))
        return summarize(config, "trl-spo compare", data, evaluation, base, done)

    return make


def t_test(values: np.ndarray) -> float:
    """Which a permutation test is near to, of differences that are nearly normal."""
    return stats.ttest_1samp(values, 0.0).pvalue


def test_tests_against_the_reference_and_each_other(summary_of):
    rng = np.random.default_rng(0)
    base, same = rng.normal(size=N), rng.normal(size=N)
    rewards = {"dpo": base + 0.5 * rng.normal(size=N) + 0.18, "ipo": base + 0.5 * same + 0.3, "kto": base + 0.5 * same}
    methods = {method: {"beta": [0.1]} for method in rewards}
    results = {f"{method},beta=0.1,seed=0": [evaluated(values)] for method, values in rewards.items()}
    found = summary_of(methods, results, evaluated(base))

    raw = {method: t_test(values - base) for method, values in rewards.items()}
    settings = {setting["method"]: setting for setting in found["settings"]}
    for method, p_value in raw.items():
        assert settings[method]["p_value"] == pytest.approx(p_value, abs=0.02)
        assert settings[method]["metrics"]["reward"]["value"] == pytest.approx(rewards[method].mean())
    # Holm: the smallest times three, the next one times two
    low, middle, high = sorted(settings.values(), key=lambda setting: setting["p_value"])
    assert 0.01 < middle["p_value"] < 0.05 < 2 * middle["p_value"]  # it is better by itself, and not among three
    assert low["adjusted_p_value"] == pytest.approx(3 * low["p_value"])
    assert middle["adjusted_p_value"] == pytest.approx(2 * middle["p_value"])
    assert high["adjusted_p_value"] == pytest.approx(max(high["p_value"], middle["adjusted_p_value"]))
    # IPO is KTO and 0.3, for each prompt
    of_ipo = settings["ipo"]["p_values"]
    assert of_ipo.keys() == {"dpo,beta=0.1", "kto,beta=0.1"}
    assert of_ipo["kto,beta=0.1"] == settings["kto"]["p_values"]["ipo,beta=0.1"] < 0.001
    assert of_ipo["dpo,beta=0.1"] == pytest.approx(t_test(rewards["ipo"] - rewards["dpo"]), abs=0.02)
    versus = {(row["first"], row["second"]): row for row in found["versus"]}
    assert versus["ipo", "kto"]["difference"]["value"] == pytest.approx(0.3)
    assert versus["dpo", "ipo"]["p_value"] == of_ipo["dpo,beta=0.1"]
    assert found["recommendation"]["method"] == "ipo"


def test_one_that_another_is_better_than_is_not_recommended_for_the_noise_of_the_highest(summary_of):
    """The highest is so noisy that it cannot be told from anything; of the others, the quickest is worse beyond doubt."""
    rng = np.random.default_rng(1)
    common, noise = 0.3 * rng.normal(size=N), rng.normal(size=N)
    noise = 6 * (noise - noise.mean())
    rewards = {"dpo": 0.8 + noise, "ipo": 0.7 + common, "kto": 0.4 + common}
    found = summary_of(
        {method: {"beta": [0.1]} for method in rewards},
        {f"{method},beta=0.1,seed=0": [evaluated(values)] for method, values in rewards.items()},
        evaluated(np.zeros(N)),
    )
    assert found["recommendation"]["method"] == "ipo"
    (told,) = [reason for reason in found["recommendation"]["reasons"] if reason.startswith("It cannot be told from")]
    assert "DPO" in told and "KTO" not in told


def test_several_seeds_and_settings(summary_of):
    rng = np.random.default_rng(2)
    base = rng.normal(size=N)
    values = {
        (beta, seed): base + beta + 0.1 * seed + 0.2 * rng.normal(size=N) for beta in (0.1, 0.3) for seed in (0, 1)
    }
    ended = {(beta, seed): (rng.random(N) < 0.6 + 0.35 * seed).astype(float) for beta, seed in values}
    results = {
        f"dpo,beta={beta},seed={seed}": [evaluated(value, finished=ended[beta, seed])]
        for (beta, seed), value in values.items()
    }
    for beta in (0.1, 0.2):
        results[f"rloo,beta={beta},seed=0"] = [evaluated(base - 1, exact=np.arange(N) % 2 * 1.0)]
        results[f"rloo,beta={beta},seed=1"] = []
    found = summary_of({"dpo": {"beta": [0.1, 0.3]}, "rloo": {"beta": [0.1, 0.2]}}, results, evaluated(base))

    first, second, rloo, _ = found["settings"]
    assert (first["seeds"], first["failed"], rloo["seeds"], rloo["failed"]) == ([0, 1], [], [0, 1], [1])
    for setting, beta in ((first, 0.1), (second, 0.3)):
        both = np.array([values[beta, seed] for seed in (0, 1)])
        assert setting["metrics"]["reward"]["value"] == pytest.approx(both.mean())
        low, high = setting["metrics"]["finished"]["interval"]
        assert 0 <= low < np.mean([ended[beta, 0], ended[beta, 1]]) < high <= 1
        # Against the reference: the variance of the prompts' mean differences, and that of the seeds' means
        of_prompts = (both.mean(axis=0) - base).var(ddof=1) / N
        of_seeds = both.mean(axis=1).var(ddof=1) / 2
        freedom = (of_prompts + of_seeds) ** 2 / (of_prompts**2 / (N - 1) + of_seeds**2)
        t = (both.mean() - base.mean()) / np.sqrt(of_prompts + of_seeds)
        assert setting["p_value"] == pytest.approx(2 * stats.t.sf(abs(t), freedom))
    (row,) = found["versus"]  # of DPO, the better one
    assert (row["first_setting"], row["second_setting"]) == ("β = 0.3", "β = 0.1") and row["difference"]["value"] > 1
    # One that has lost a capability is compared with nobody
    assert rloo["capabilities"][0]["verdict"] == "regressed" and rloo["p_values"] == {}
    assert second["p_values"].keys() == {first["id"]}
    # Two processes at 3600 an hour. Each training has the 4 seconds of its reward model in its own, and all of a seed have one together
    assert first["cost"] == rloo["cost"] == 20.0 and found["cost"]["training"] == 6 * 20.0 - 2 * 4.0
    assert "The time of RLHF has that of its reward model in it." in found["notes"]


def test_frontiers(summary_of):
    """Of the means of both seeds, from the reference on, and against entropy to its left."""
    base = evaluated(np.zeros(N), entropy=10.0)
    points = {0: [(1.0, 9.0, 0.5), (4.0, 4.0, 2.0)], 1: [(1.0, 9.0, 1.5), (2.0, 6.0, 1.0)]}
    results = {
        f"dpo,beta=0.1,seed={seed}": [evaluated(np.full(N, reward), kl, entropy) for kl, entropy, reward in of_seed]
        for seed, of_seed in points.items()
    }
    found = summary_of({"dpo": {"beta": [0.1]}}, results, base)
    assert found["frontiers"] == {
        "kl": {"dpo": [(0.0, 0.0), (1.0, 1.0), (3.0, 1.5)]},
        "entropy": {"dpo": [(5.0, 1.5), (9.0, 1.0), (10.0, 0.0)]},
    }
    assert found["quality"]["baseline"] == 0.0 and found["dataset"]["prompts"] == N


def test_the_unrolled_form_is_noted(summary_of):
    options = {"bilevel": "unrolled", "inner_learning_rate": 0.1}
    for deployed in (0, 1):
        found = summary_of(
            {"stable_po": {**options, "deploy_inner_steps": deployed}},
            {"stable_po,seed=0": [evaluated(np.ones(N))]},
            evaluated(np.zeros(N)),
        )
        assert any("its checkpoints are θ" in note for note in found["notes"]) == deployed
