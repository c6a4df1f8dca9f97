# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Summaries of comparisons as `trl-spo compare` writes them, from much to next to nothing."""

import copy
from typing import Any

import pytest


STEPS = (50, 100, 150, 200)
# Method, its settings, and at the end: reward, KL, entropy, accuracy, change of chosen and rejected, distinct words, seconds, GiB
RICH = (
    ("dpo", "DPO", {"beta": 0.1}, "β = 0.1", 3.08, 17.9, 80.1, 0.741, -11.2, -30.5, 0.112, 251.0, 9.84),
    ("dpo", "DPO", {"beta": 0.3}, "β = 0.3", 1.86, 8.74, 93.2, 0.752, -3.14, -14.8, 0.141, 250.0, 9.84),
    ("dpo", "DPO", {"beta": 1.0}, "β = 1", 1.32, 6.51, 100.2, 0.748, -2.05, -9.31, 0.149, 252.0, 9.84),
    ("ipo", "IPO", {"beta": 0.3}, "β = 0.3", 2.61, 13.6, 85.9, 0.738, -7.21, -21.9, 0.121, 249.0, 9.85),
    ("ipo", "IPO", {"beta": 1.0}, "β = 1", 2.43, 11.9, 87.3, 0.736, -6.02, -18.4, 0.127, 249.5, 9.85),
    ("soft_po", "Soft PO", {"alpha": 0.1, "beta": 0.02}, "α = 0.1, β = 0.02", 2.57, 12.7, 82.4, 0.744, -9.1, -27.2, 0.118, 405.0, 11.3),
    ("soft_po", "Soft PO", {"alpha": 0.1, "beta": 0.1}, "α = 0.1, β = 0.1", 1.78, 6.63, 86.1, 0.747, -2.21, -12.9, 0.138, 724.4, 11.3),
    ("soft_po", "Soft PO", {"alpha": 0.3, "beta": 0.1}, "α = 0.3, β = 0.1", 1.26, 3.21, 91.2, 0.749, 0.41, -6.72, 0.152, 726.0, 11.3),
    ("stable_po", "Stable PO", {"penalty_weight": 1.0}, "w = 1", 1.71, 7.92, 94.8, 0.735, -0.62, -11.1, 0.146, 301.0, 10.1),
)  # fmt: skip
NOISE = (0.0, 0.031, -0.027)  # of the seeds


def estimate(value: float | None, half: float | None = None, number: int = 3) -> dict[str, Any]:
    interval = None if value is None or half is None else [value - half, value + half]
    return {"value": value, "interval": interval, "number": number}


def make_metrics(row: tuple, share: float, noise: float, number: int = 256) -> dict[str, Any]:
    """After a share of the training, in one run: intervals over prompts or pairs."""
    reward, kl, entropy, accuracy, chosen, rejected, distinct = row[4:11]
    grow = share**0.7 * (1 + noise)
    chosen, rejected = chosen * share**1.5 * (1 + noise), rejected * share**1.2 * (1 + noise)
    return {
        "reward": estimate(-0.06 + (reward + 0.06) * grow, 0.21, number),
        "kl": estimate(kl * share**1.3 * (1 + noise), 0.06 * kl * share, number),
        "entropy": estimate(88.7 + (entropy - 88.7) * grow, 2.2, number),
        "length": estimate(38.2 + 9 * grow, 1.7, number),
        "finished": estimate(0.981 - 0.03 * share, 0.013, number),
        "distinct_1": estimate(0.156 + (distinct - 0.156) * grow, 0.0061, number),
        "distinct_2": estimate(0.512 + 3 * (distinct - 0.156) * grow, 0.014, number),
        "self_bleu": estimate(0.214 - 2.1 * (distinct - 0.156) * grow, 0.011, number),
        "unique": estimate(0.996 + (distinct - 0.156) * grow, 0.0042, number),
        "chosen_change": estimate(chosen, 0.7, 200),
        "rejected_change": estimate(rejected, 0.9, 200),
        "margin": estimate(chosen - rejected, 0.8, 200),
        "preference_accuracy": estimate(0.5 + (accuracy - 0.5) * grow, 0.06, 200),
    }


def make_capabilities(reward: float, chosen: float) -> list[dict[str, Any]]:
    """The further a policy goes, the more it forgets."""
    rows = []
    for name, metric, higher, before, half, change in (
        ("arithmetic", "exact match", True, 0.832, 0.031, 0.011 * chosen),
        ("TinyStories", "perplexity", False, 3.704, 0.052, 0.061 * reward),
    ):
        gained, sure = (change if higher else -change), 0.8 * half
        rows.append(
            {
                "name": name,
                "metric": metric,
                "higher_is_better": higher,
                "before": estimate(before, half, 400),
                "after": estimate(before + change, half, 400),
                "difference": estimate(change, sure, 400),
                "verdict": "improved" if gained > sure else "regressed" if gained < -sure else "no difference seen",
            }
        )
    return rows


def upper_hull(points: list[list[float]]) -> list[list[float]]:
    """From left to right, the points above which there is none."""
    hull: list[list[float]] = []
    for x, y in sorted(points):
        while len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (y - hull[-2][1]) >= (hull[-1][1] - hull[-2][1]) * (
            x - hull[-2][0]
        ):
            hull.pop()
        hull.append([x, y])
    return hull


def make_summary(
    rows: tuple = RICH, seeds: tuple[int, ...] = (0, 1, 2), steps: tuple[int, ...] = STEPS
) -> dict[str, Any]:
    """A comparison in which everything was measured and nothing failed."""
    runs, settings = [], []
    for row in rows:
        method, label, setting, setting_label = row[:4]
        for seed in seeds:
            noise = NOISE[seed % 3]
            options = "-".join(f"{name}={some}" for name, some in setting.items())
            points = [
                {"step": step, "final": step == steps[-1], "metrics": make_metrics(row, step / steps[-1], noise)}
                for step in steps
            ]
            runs.append(
                {
                    "id": f"{method}-{options}-seed={seed}",
                    "method": method,
                    "label": label,
                    "setting": setting,
                    "setting_label": setting_label,
                    "seed": seed,
                    "status": "done",
                    "error": None,
                    "stage": None,
                    "seconds": row[11] * (1 + noise),
                    "peak_memory": row[12] * 2**30,
                    "memory_of": "device",
                    "cost": row[11] * 0.0006,
                    "folder": f"runs/{method}-{options}-seed={seed}",
                    "points": points,
                }
            )
        metrics = make_metrics(row, 1.0, 0.0)
        for found in metrics.values():
            found["number"] = len(seeds) if len(seeds) > 1 else found["number"]
        settings.append(
            {
                "method": method,
                "label": label,
                "setting": setting,
                "setting_label": setting_label,
                "seeds": list(seeds),
                "failed": [],
                "metrics": metrics,
                "judged": None,
                "p_value": 0.0004 if row[4] > 1.5 else 0.0132,
                "capabilities": make_capabilities(row[4], row[8]),
                "seconds": row[11],
                "peak_memory": row[12] * 2**30,
                "memory_of": "device",
                "cost": row[11] * 0.0006 * len(seeds),
            }
        )
    frontiers = {
        axis: {
            method: upper_hull(
                [
                    [start, -0.06],
                    *(
                        [found["metrics"][axis]["value"], found["metrics"]["reward"]["value"]]
                        for run in runs
                        if run["method"] == method
                        for found in run["points"]
                    ),
                ]
            )
            for method in dict.fromkeys(row[0] for row in rows)
        }
        for axis, start in (("kl", 0.0), ("entropy", 88.7))
    }
    best = {row[0]: row for row in sorted(rows, key=lambda row: row[4])}
    versus = []
    methods = list(dict.fromkeys(row[0] for row in rows))
    for i, first in enumerate(methods):
        for second in methods[i + 1 :]:
            a, b = best[first], best[second]
            gap = a[4] - b[4]
            versus.append(
                {
                    "first": first,
                    "first_setting": a[3],
                    "second": second,
                    "second_setting": b[3],
                    "difference": estimate(gap, 0.31, 256),
                    "p_value": 0.0007 if abs(gap) > 0.31 else 0.034,
                    "adjusted_p_value": 0.0042 if abs(gap) > 0.31 else 0.068,  # by itself, it would be a difference
                }
            )
    return {
        "versions": {"trl_spo": "0.1.0", "trl": "1.16.0", "transformers": "5.23.0", "torch": "2.13.0", "accelerate": "1.14.0"},
        "machine": {"device": "NVIDIA H100 80GB HBM3", "devices": 1, "cores": 26, "memory": 236 * 2**30},
        "command": "trl-spo compare --config compare.yaml",
        "config": "model: stories/reviews-sft\ndataset:\n  path: reviews_pairs\nmethods:\n  dpo: {beta: [0.1, 0.3, 1.0]}\n"
        "  ipo: {beta: [0.3, 1.0]}\n  soft_po: {alpha: [0.1, 0.3], beta: [0.02, 0.1]}\n  stable_po: {penalty_weight: [1.0]}\n"
        "seeds: [0, 1, 2]\nreward: reviews.py:sentiment\n",
        "model": "stories/reviews-sft",
        "dataset": {"name": "reviews_pairs", "form": "preference", "train": 4000, "test": 200, "prompts": 256},
        "quality": {"metric": "reward", "label": "Reward", "by": "reviews.py:sentiment", "baseline": -0.06},
        "base": {
            "metrics": {
                "reward": estimate(-0.06, 0.22, 256),
                "entropy": estimate(88.7, 2.4, 256),
                "length": estimate(38.2, 1.8, 256),
                "distinct_1": estimate(0.156, 0.0059, 256),
                "distinct_2": estimate(0.512, 0.015, 256),
                "self_bleu": estimate(0.214, 0.012, 256),
                "unique": estimate(0.996, 0.004, 256),
                "finished": estimate(0.981, 0.012, 256),
                "preference_accuracy": estimate(None, None, 0),
            }
        },
        "runs": runs,
        "settings": settings,
        "frontiers": frontiers,
        "versus": versus,
        "cost": {"training": sum(run["cost"] for run in runs), "judging": None, "currency": "USD"},
        "recommendation": {
            "method": "soft_po",
            "label": "Soft PO",
            "setting": {"alpha": 0.1, "beta": 0.1},
            "setting_label": "α = 0.1, β = 0.1",
            "headline": "Soft PO with α = 0.1, β = 0.1: as much reward as DPO with β = 0.3 for a quarter less KL.",
            "reasons": [
                "Its reward is 1.78, against −0.06 of the reference (p < 0.001).",
                "At a KL of 6.6 nats no other method reaches this reward; DPO has 1.32 there.",
                "The log-probability of chosen responses falls by 2.2 nats only, and no capability regressed.",
            ],
            "warnings": [
                "Its training takes 2.9 times as long as that of DPO.",
                "200 held-out pairs are few: preference accuracy is known to ± 0.06 only.",
            ],
        },
        "notes": [
            "No judge was given, so that there is no win rate.",
            "All checkpoints were evaluated on the same prompts; the last one stands for its run.",
        ],
    }  # fmt: skip


def fail(summary: dict[str, Any], run: int, error: str, status: str = "failed", stage: str = "training") -> None:
    found = summary["runs"][run]
    found |= {"status": status, "error": error, "stage": stage}
    if status == "failed":
        found |= {"points": [], "seconds": None, "peak_memory": None, "cost": None}
        for setting in summary["settings"]:
            if (setting["method"], setting["setting"]) == (found["method"], found["setting"]):
                setting["failed"] = [*setting["failed"], found["seed"]]
                for some in setting["metrics"].values():
                    some["number"] -= 1
    else:
        for point in found["points"]:
            point["metrics"].pop(summary["quality"]["metric"], None)
        for setting in summary["settings"]:
            if (setting["method"], setting["setting"]) == (found["method"], found["setting"]):
                setting["failed"] = [*setting["failed"], found["seed"]]
                setting["metrics"][summary["quality"]["metric"]]["number"] -= 1
    summary["notes"].append(f"{found['id']}: {status} in {stage}.")


def make_rich() -> dict[str, Any]:
    """All of it: most is measured, a run has failed, another one was not judged."""
    summary = make_summary()
    fail(
        summary,
        2,
        'Traceback (most recent call last):\n  File "train.py", line 12, in <module>\n    trainer.train()\n'
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.44 GiB. GPU 0 has a total capacity of 79.10 GiB",
    )
    fail(summary, 12, "openai.RateLimitError: 429, after 6 tries", status="unjudged", stage="judge")
    return summary


def make_judged() -> dict[str, Any]:
    """By two critics instead of a reward: win rates, verdicts and what they cost."""
    summary = make_summary(RICH[:3] + RICH[5:8], seeds=(0,))
    for some in [*summary["settings"], *(point for run in summary["runs"] for point in run["points"])]:
        reward = some["metrics"].pop("reward")["value"]
        some["metrics"]["win_rate"] = estimate(0.5 + 0.11 * reward - 0.018 * reward**2, 0.051, 256)
    for i, setting in enumerate(summary["settings"]):
        setting["judged"] = {"wins": 150 + 5 * i, "ties": 31, "losses": 61 - 5 * i, "undecided": 14}
    for lines in summary["frontiers"].values():
        for line in lines.values():
            for point in line:
                point[1] = 0.5 + 0.11 * max(point[1], 0) - 0.018 * max(point[1], 0) ** 2
    del summary["base"]["metrics"]["reward"]
    summary["quality"] = {
        "metric": "win_rate",
        "label": "Win rate against the reference",
        "by": ["qwen-72b", "llama-70b"],
        "baseline": 0.5,
    }
    summary["cost"] = {"training": 1.31, "judging": 0.0871, "currency": "USD"}
    summary["recommendation"] |= {
        "headline": "Soft PO with α = 0.1, β = 0.1 wins as often as DPO, and stays nearer to the reference.",
        "reasons": ["It wins against the reference in 64 % of the prompts."],
        "warnings": [],
    }
    return summary


def make_many() -> dict[str, Any]:
    """7 methods x 3 settings x 3 seeds."""
    methods = (
        ("dpo", "DPO", 1.0),
        ("ipo", "IPO", 0.92),
        ("kto", "KTO", 0.8),
        ("rloo", "RLHF (RLOO)", 1.25),
        ("soft_po", "Soft PO", 1.1),
        ("stable_po", "Stable PO", 0.87),
        ("sspo", "SSPO", 0.97),
    )
    rows = tuple(
        (
            method,
            label,
            {"beta": beta},
            f"β = {beta:g}",
            factor * RICH[i][4],
            factor**-1.5 * RICH[i][5],
            RICH[i][6] * factor**0.1,
            RICH[i][7] * factor**0.1,
            *(factor**3 * some for some in RICH[i][8:10]),
            RICH[i][10] * factor**-0.3,
            RICH[i][11] * factor**4,
            RICH[i][12] * factor,
        )
        for method, label, factor in methods
        for i, beta in enumerate((0.1, 0.3, 1.0))
    )
    summary = make_summary(rows)
    for setting in summary["settings"]:
        for found in setting["metrics"].values():
            found["number"] = 256  # over seeds and prompts
    chosen = {"method": "rloo", "label": "RLHF (RLOO)", "setting": {"beta": 0.3}, "setting_label": "β = 0.3"}
    summary["recommendation"] |= chosen | {
        "headline": "RLHF (RLOO) with β = 0.3: the most reward below a KL of 10 nats."
    }
    return summary


def make_one_run() -> dict[str, Any]:
    """One setting, one seed, one checkpoint; its name does not fit anywhere."""
    row = (
        "stable_po",
        "Stable PO (SimPO)",
        {"penalty_weight": 1.0},
        "penalty_weight = 1, penalty_anchor = lower_level",
    )
    summary = make_summary((row + RICH[-1][4:],), seeds=(0,), steps=(200,))
    summary["settings"][0]["capabilities"] = summary["settings"][0]["capabilities"][:1]
    return summary | {"versus": [], "notes": []}


def make_all_failed() -> dict[str, Any]:
    summary = make_summary(RICH[:3])
    for i in range(len(summary["runs"])):
        fail(summary, i, f"RuntimeError: {i}\n" + "a very long line without any space " * 2 + "x" * 300)
    for setting in summary["settings"]:
        setting |= {
            "metrics": {},
            "p_value": None,
            "capabilities": [],
            "seconds": None,
            "peak_memory": None,
            "cost": None,
        }
    summary["recommendation"] = {
        "method": None,
        "label": None,
        "setting": None,
        "setting_label": None,
        "headline": "Nothing can be recommended: no training has come to its end.",
        "reasons": [],
        "warnings": ["All 9 runs failed."],
    }
    return summary | {"frontiers": {"kl": {"dpo": []}, "entropy": {}}, "versus": []}


def make_unjudged() -> dict[str, Any]:
    """The judge failed in all runs: what needs no judge is there."""
    summary = make_judged()
    for i in range(len(summary["runs"])):
        fail(summary, i, "openai.APIConnectionError: Connection error.", status="unjudged", stage="judge")
    for some in [*summary["settings"], *(point for run in summary["runs"] for point in run["points"])]:
        some["metrics"]["win_rate"] = estimate(None, None, 0)
    for setting in summary["settings"]:
        setting |= {"judged": None, "p_value": None}
    summary["recommendation"] = make_all_failed()["recommendation"] | {
        "headline": "Nothing can be recommended, since nothing was judged.",
        "warnings": ["The judge could not be reached. Run the same command again: what was trained is kept."],
    }
    return summary | {"frontiers": {}, "versus": []}


def make_nothing() -> dict[str, Any]:
    """All that may be `None` is."""
    summary = make_summary(RICH[:2], seeds=(0,))
    for some in [
        summary["base"],
        *summary["settings"],
        *(point for run in summary["runs"] for point in run["points"]),
    ]:
        some["metrics"] = {name: estimate(None, None, 0) for name in some["metrics"]}
    for row in (*summary["settings"], *summary["runs"]):
        row |= {"seconds": None, "peak_memory": None, "memory_of": None, "cost": None}
    for setting in summary["settings"]:
        setting |= {"p_value": None, "judged": None}
        for row in setting["capabilities"]:
            row |= {"before": estimate(None), "after": estimate(None), "difference": estimate(None)}
            row["verdict"] = "no difference seen"
    summary["machine"] = dict.fromkeys(summary["machine"])
    summary["cost"] = dict.fromkeys(summary["cost"])
    summary["command"] = None
    summary["recommendation"] = make_all_failed()["recommendation"] | {"headline": "Nothing was measured."}
    return summary | {"frontiers": {}, "versus": [], "notes": []}


def make_unpaired() -> dict[str, Any]:
    """Without pairs there is no displacement."""
    summary = make_summary((("kto", "KTO", *RICH[0][2:]), ("kto", "KTO", *RICH[1][2:])))
    summary["dataset"]["form"] = "unpaired"
    for some in [*summary["settings"], *(point for run in summary["runs"] for point in run["points"])]:
        for name in ("preference_accuracy", "margin", "chosen_change", "rejected_change"):
            del some["metrics"][name]
    return summary | {"versus": []}


SUMMARIES = {
    "rich": make_rich,
    "judged": make_judged,
    "many": make_many,
    "one_run": make_one_run,
    "all_failed": make_all_failed,
    "unjudged": make_unjudged,
    "nothing": make_nothing,
    "unpaired": make_unpaired,
}


@pytest.fixture
def summary() -> dict[str, Any]:
    """A rich one, to change at will."""
    return copy.deepcopy(make_rich())
