# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from trl_spo.comparison import recommend


def estimate(value, half=0.1):
    return {"value": value, "interval": [value - half, value + half], "number": 200}


def setting(
    name, reward, seconds=100.0, p_value=0.001, verdicts=(), seeds=(0, 1), failed=(), **metrics
) -> dict[str, Any]:
    capabilities = [
        {"name": f"c{i}", "metric": "exact match", "verdict": verdict, "before": estimate(0.8), "after": estimate(0.5)}
        for i, verdict in enumerate(verdicts)
    ]
    return {
        "id": name,
        "method": name,
        "label": name.upper(),
        "setting": {"beta": 0.1},
        "setting_label": "β = 0.1",
        "seeds": list(seeds),
        "metrics": {"reward": estimate(reward), "kl": estimate(3.0), **metrics} if reward is not None else {},
        "failed": list(failed),
        "adjusted_p_value": p_value,
        "capabilities": capabilities,
        "seconds": seconds,
    }


def summary(*settings, apart="", runs=(), prompts=256, **base) -> dict[str, Any]:
    """`apart` names those that can be told apart: `"dpo-ipo dpo-kto"`."""
    told = {frozenset(pair.split("-")) for pair in apart.split()}
    for setting in settings:
        setting["p_values"] = {
            other["id"]: 0.01 if {setting["id"], other["id"]} in told else 0.3
            for other in settings
            if other is not setting
        }
    return {
        "quality": {"metric": "reward", "label": "Reward", "baseline": 0.0},
        "settings": list(settings),
        "runs": list(runs),
        "dataset": {"prompts": prompts},
        "base": {"metrics": base},
    }


def test_the_best_that_stands_alone():
    found = recommend(summary(setting("dpo", 1.0), setting("ipo", 0.5, seconds=10.0), apart="dpo-ipo"))
    assert found["method"] == "dpo" and found["headline"] == "DPO with β = 0.1 is recommended."
    assert "Its reward is 1.00 [0.90, 1.10], beside 0 of the reference." in found["reasons"]
    assert "It is better than each of the others that lost no capability, prompt by prompt." in found["reasons"]
    assert found["warnings"] == []


def test_of_those_that_cannot_be_told_apart_the_best_of_the_quickest():
    slow, quick = setting("dpo", 1.0, seconds=200.0), setting("ipo", 0.9, seconds=100.0)
    quicker = setting("kto", 0.85, seconds=95.0)
    found = recommend(summary(slow, quick, quicker))
    assert found["method"] == "ipo"
    assert (
        "It cannot be told from DPO with β = 0.1 (1.00 [0.90, 1.10]), KTO with β = 0.1 (0.85 [0.75, 0.95]), prompt by prompt."
        in found["reasons"]
    )
    assert "DPO with β = 0.1 is higher, but its training took 2.0 times as long." in found["reasons"]
    # One that is behind beyond chance is no alternative, however quick
    assert recommend(summary(slow, setting("ipo", 0.9, seconds=1.0), apart="dpo-ipo"))["method"] == "dpo"


def test_one_that_another_is_better_than_is_not_recommended():
    """However noisy the highest is, which cannot be told from it."""
    noisy, good, bad = setting("dpo", 0.75), setting("ipo", 0.68), setting("kto", 0.5, seconds=50.0)
    found = recommend(summary(noisy, good, bad, apart="ipo-kto"))
    assert found["method"] == "dpo"  # the highest of those that are as quick
    assert (
        "It cannot be told from IPO with β = 0.1 (0.68 [0.58, 0.78]), KTO with β = 0.1 (0.50 [0.40, 0.60]), prompt by prompt."
        in found["reasons"]
    )
    # And of one that is quicker, only those that were compared with it are said to be the same
    good["seconds"] = 50.0
    found = recommend(summary(noisy, good, bad, apart="ipo-kto"))
    assert found["method"] == "ipo"
    assert "It cannot be told from DPO with β = 0.1 (0.75 [0.65, 0.85]), prompt by prompt." in found["reasons"]
    # One that is not better than the reference beyond chance is no measure for the others
    noisy["adjusted_p_value"] = 0.057
    found = recommend(summary(noisy, good, bad, apart="ipo-kto"))
    assert found["method"] == "ipo"
    assert (
        "DPO with β = 0.1 has a higher reward, 0.75 [0.65, 0.85], but is not better than the reference beyond chance."
        in found["reasons"]
    )


def test_one_that_lost_a_capability_is_passed_over():
    best = setting("dpo", 2.0, verdicts=("no difference seen", "regressed"))
    sound = setting("ipo", 1.0, verdicts=("no difference seen", "improved"))
    worse = setting("kto", 0.3, verdicts=("no difference seen", "improved"))
    found = recommend(summary(best, sound, worse, apart="dpo-ipo ipo-kto"))
    assert found["method"] == "ipo"
    assert (
        "DPO with β = 0.1 has a higher reward, 2.00 [1.90, 2.10], but lost c1 (exact match 0.8 before, 0.5 after)."
        in found["reasons"]
    )
    assert "It is better than each of the others that lost no capability, prompt by prompt." in found["reasons"]
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
    found = recommend(summary(*(setting(f"m{i}", 0.16, p_value=0.13) for i in range(9))))
    assert found["reasons"][1].startswith("By the paired test, adjusted for 9 settings, none is better than the ref")
    assert "no training was evaluated to its end" in recommend(summary(setting("dpo", None)))["headline"]


def test_warnings():
    def warned(*args, **kwargs):
        return " ".join(recommend(summary(*args, **kwargs))["warnings"])

    runs = [{"id": name, "status": name} for name in ("failed", "done", "unjudged")]
    warnings = recommend(summary(setting("dpo", 1.0), runs=runs))["warnings"]
    assert warnings[0] == "1 of the 3 trainings have no result: failed."
    assert warnings[1] == "1 of the 3 trainings were not judged: unjudged."
    assert "There are 40 prompts only." in warned(setting("dpo", 1.0), prompts=40)
    one, none = setting("ipo", 0.9, failed=(1,)), setting("kto", None, failed=(0, 1))
    assert "There is one seed of each setting: the intervals" in warned(setting("dpo", 1.0, seeds=(0,)), one)
    assert "There is one seed of IPO with β = 0.1: the intervals" in warned(setting("dpo", 1.0), one, none)
    assert warned(setting("dpo", 1.0), none) == ""
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
