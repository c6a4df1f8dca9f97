# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from trl_spo.comparison import recommend


def estimate(value, half=0.1):
    return {"value": value, "interval": [value - half, value + half], "number": 200}


def setting(
    name, reward, seconds=100.0, p_value=0.001, behind=(0.0, 1.0), verdicts=(), seeds=(0, 1), **metrics
) -> dict[str, Any]:
    value, of_test = behind
    capabilities = [
        {"name": f"c{i}", "metric": "exact match", "verdict": verdict, "before": estimate(0.8), "after": estimate(0.5)}
        for i, verdict in enumerate(verdicts)
    ]
    return {
        "method": name,
        "label": name.upper(),
        "setting": {"beta": 0.1},
        "setting_label": "β = 0.1",
        "seeds": list(seeds),
        "metrics": {"reward": estimate(reward), "kl": estimate(3.0), **metrics} if reward is not None else {},
        "failed": [],
        "adjusted_p_value": p_value,
        "behind_best": {**estimate(value), "p_value": of_test} if reward is not None else None,
        "capabilities": capabilities,
        "seconds": seconds,
    }


def summary(*settings, runs=(), prompts=256, **base) -> dict[str, Any]:
    return {
        "quality": {"metric": "reward", "label": "Reward", "baseline": 0.0},
        "settings": list(settings),
        "runs": list(runs),
        "dataset": {"prompts": prompts},
        "base": {"metrics": base},
    }


def test_the_best_that_stands_alone():
    found = recommend(summary(setting("dpo", 1.0), setting("ipo", 0.5, behind=(0.5, 0.001), seconds=10.0)))
    assert found["method"] == "dpo" and found["headline"] == "DPO with β = 0.1 is recommended."
    assert "Its reward is 1.00 [0.90, 1.10], beside 0 of the reference." in found["reasons"]
    assert "It is better than each of the others that lost no capability, prompt by prompt." in found["reasons"]
    assert found["warnings"] == []


def test_of_those_that_cannot_be_told_apart_the_best_of_the_quickest():
    slow, quick = setting("dpo", 1.0, seconds=200.0), setting("ipo", 0.9, behind=(0.1, 0.3), seconds=100.0)
    quicker = setting("kto", 0.85, behind=(0.15, 0.2), seconds=95.0)
    found = recommend(summary(slow, quick, quicker))
    assert found["method"] == "ipo"
    assert (
        "It cannot be told from DPO with β = 0.1 (1.00 [0.90, 1.10]), KTO with β = 0.1 (0.85 [0.75, 0.95]), prompt by prompt."
        in found["reasons"]
    )
    assert "Of these, DPO with β = 0.1 is the highest, but its training took 2.0 times as long." in found["reasons"]
    # One that is behind beyond chance is no alternative, however quick
    assert recommend(summary(slow, setting("ipo", 0.9, behind=(0.1, 0.01), seconds=1.0)))["method"] == "dpo"


def test_one_that_lost_a_capability_is_passed_over():
    best = setting("dpo", 2.0, verdicts=("no difference seen", "regressed"))
    sound = setting("ipo", 1.0, behind=(1.0, 0.001), verdicts=("no difference seen", "improved"))
    worse = setting("kto", 0.3, behind=(1.7, 0.001), verdicts=("no difference seen", "improved"))
    found = recommend(summary(best, sound, worse))
    assert found["method"] == "ipo"
    assert (
        "DPO with β = 0.1 has a higher reward, 2.00 [1.90, 2.10], but lost c1 (exact match 0.8 before, 0.5 after)."
        in found["reasons"]
    )
    assert "It has lost no capability that was measured: c0 (no difference seen), c1 (improved)." in found["reasons"]
    nothing = recommend(summary(best))
    assert (
        nothing["method"] is None
        and nothing["headline"] == "None can be recommended: each that is better has lost a capability."
    )


def test_none_that_is_not_better_than_the_reference_beyond_chance():
    for one in (setting("dpo", 0.05, p_value=0.4), setting("dpo", -1.0), setting("dpo", 0.5, p_value=None)):
        found = recommend(summary(one))
        assert found["method"] is None and "none is better than the reference beyond chance" in found["headline"]
    assert "no training was evaluated to its end" in recommend(summary(setting("dpo", None)))["headline"]


def test_warnings():
    def warned(*args, **kwargs):
        return " ".join(recommend(summary(*args, **kwargs))["warnings"])

    failed = [{"id": "ipo,seed=0", "status": "failed"}, {"id": "dpo,seed=0", "status": "done"}]
    assert "1 of the 2 trainings have no result: ipo,seed=0." in warned(setting("dpo", 1.0), runs=failed)
    assert "There are 40 prompts only." in warned(setting("dpo", 1.0), prompts=40)
    assert "trained with one seed" in warned(setting("dpo", 1.0, seeds=(0,)))
    fallen = setting("dpo", 1.0, chosen_change=estimate(-3.0, 0.5))
    assert "their log-probability has changed by −3.0 [−3.5, −2.5] nats" in warned(fallen)
    assert warned(setting("dpo", 1.0, chosen_change=estimate(-3.0, 2.5))) == ""  # it may as well be half a nat
    assert "entropy of its responses is less than half of the reference's: 4 beside 10" in warned(
        setting("dpo", 1.0, entropy=estimate(4.0)), entropy=estimate(10.0)
    )
    assert "200 tokens on average, those of the reference 100" in warned(
        setting("dpo", 1.0, length=estimate(200.0)), length=estimate(100.0)
    )
    assert warned(setting("dpo", 1.0, length=estimate(120.0)), length=estimate(100.0)) == ""
