# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What label noise and the number of pairs do to DPO, IPO, SoftPO and StablePO, with a known true reward.

Two open questions of the paper of Soft Preference Optimization. *Noise*: the labels of a random share of the training pairs are turned round, from 0 to
40 %; the labels are noisy before, too, as a Bradley-Terry annotator gave them. *Size*: a random part of the pairs, from 100 on; training takes three passes over them, but
at least 30 and at most 625 steps of 16 pairs. All is measured on the same held-out prompts, by the true reward. The settings of the methods are chosen
beforehand, by the table of `frontier.py` at the same learning rate, and are the same under all conditions.

    python examples/controlled_sentiment.py prepare --pairs_per_prompt 2 ...   # see there; writes the folder `sentiment`
    python examples/benchmarks/robustness.py noise --data sentiment --output_dir noise
    python examples/benchmarks/robustness.py size --data sentiment --output_dir size

Every run leaves one JSON file in the output folder and is not repeated when it is there. With `--report` nothing is trained.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from frontier import FAMILIES, print_table, run_and_save, sentiment, show


CONFIGS = [
    {"method": "dpo", "beta": 0.1},
    {"method": "ipo", "beta": 1.0},
    {"method": "soft", "alpha": 0.05, "beta": 0.05},
    {"method": "stable", "beta": 0.1, "penalty_weight": 0.3},
]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
NOISE = (0.0, 0.1, 0.2, 0.3, 0.4)
SIZES = (100, 300, 1000, 3000, 10_000)
BATCH_SIZE = 16


def steps_of(pairs: int) -> int:
    return min(max(round(3 * pairs / BATCH_SIZE), 30), 625)


def settings_of(experiment: str, level: float, learning_rate: float) -> dict:
    settings = {
        "steps": 250,
        "batch_size": BATCH_SIZE,
        "learning_rate": learning_rate,
        "warmup_steps": 10,
        "samples_per_prompt": 1,
    }
    if experiment == "noise":
        return settings | {"flipped": level}
    return settings | {"pairs": int(level), "steps": steps_of(int(level))}


def collect(output_dir: Path, base: dict) -> dict[tuple[str, float], list[dict]]:
    """The last point of each run, in the order of the seeds, by method and level."""
    found: dict[tuple[str, float], list[dict]] = {}
    runs = [json.loads(path.read_text()) for path in output_dir.glob("*.json")]
    for one in sorted(runs, key=lambda one: one["seed"]):
        key = (one["config"]["method"], one["settings"].get("flipped", one["settings"].get("pairs")))
        point = list(one["points"].values())[-1]
        per_nat = (point["reward"] - base["reward"]) / point["kl"]
        found.setdefault(key, []).append({**point, "seed": one["seed"], "per_nat": per_nat})
    return found


def kept_gain(points: list[dict], clean: list[dict], base: dict) -> list[float]:
    """Of each seed, the gain as a share of that of the same seed when no labels were turned round."""
    of_seed = {point["seed"]: point["reward"] - base["reward"] for point in clean}
    return [(p["reward"] - base["reward"]) / of_seed[p["seed"]] for p in points if p["seed"] in of_seed]


def report(experiment: str, levels: list[float], output_dir: Path, base: dict) -> None:
    found = collect(output_dir, base)
    label = "labels turned round" if experiment == "noise" else "pairs"
    columns = {
        "reward": "true reward",
        "kl": "KL",
        "per_nat": "gain per nat of KL",
        "accuracy": "preference accuracy",
        "chosen_change": "chosen log-prob",
    }
    print(
        f"\nInitial model: reward {base['reward']:.2f}, entropy {base['entropy']:.1f}. Mean ± half of the 95 % interval over seeds."
    )
    for column, name in columns.items():
        print(f"\n{name}\n")
        rows = []
        for method in [config["method"] for config in CONFIGS]:
            cells = [
                show([point[column] for point in found.get((method, level), ())] or [math.nan]) for level in levels
            ]
            rows.append([FAMILIES[method], *cells])
        print_table([label, *(f"{level:g}" for level in levels)], rows)
    if experiment == "noise":
        print("\nshare of the gain without noise that is left\n")
        rows = []
        for method in [config["method"] for config in CONFIGS]:
            clean = found.get((method, 0.0), [])
            cells = [show(kept_gain(found.get((method, level), []), clean, base) or [math.nan]) for level in levels]
            rows.append([FAMILIES[method], *cells])
        print_table([label, *(f"{level:g}" for level in levels)], rows)
    plot(experiment, levels, found, base, output_dir)


def plot(experiment: str, levels: list[float], found: dict, base: dict, output_dir: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for axes, column, label in zip(
        panels, ("reward", "kl"), ("true reward", "KL to the reference (nats)"), strict=True
    ):
        for config, color, marker in zip(CONFIGS, COLORS, "os^D", strict=False):
            points = [[point[column] for point in found.get((config["method"], level), ())] for level in levels]
            shown = [(level, values) for level, values in zip(levels, points, strict=True) if values]
            xs, means = [level for level, _ in shown], [statistics.mean(values) for _, values in shown]
            axes.plot(xs, means, color=color, marker=marker, label=FAMILIES[config["method"]])
            for level, values in shown:
                axes.scatter([level] * len(values), values, color=color, s=8, alpha=0.5)
        if column == "reward":
            axes.axhline(base["reward"], color="gray", linestyle=":", label="initial model")
        axes.set_ylabel(label)
        axes.set_xlabel("share of labels turned round" if experiment == "noise" else "pairs to train on")
        if experiment == "size":
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.tight_layout()
    path = output_dir / f"{experiment}.png"
    figure.savefig(path, dpi=150)
    print(f"saved {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["noise", "size"])
    parser.add_argument("--data", required=True, help="folder that controlled_sentiment.py prepare wrote")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--levels", type=float, nargs="+", help="default: 0 to 0.4, or 100 to 10,000 pairs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--report", action="store_true", help="train nothing, print the tables")
    args = parser.parse_args()

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    levels = args.levels or list(NOISE if args.experiment == "noise" else SIZES)
    if not args.report:
        reference_logps = output_dir / "reference_logps.pt"
        if not reference_logps.exists():
            content = sentiment.load(args.data)
            logps = sentiment.pair_logps(content["ref_model"], content["tokenizer"], content["pairs"]["train"])
            torch.save(logps, reference_logps)
        for seed in args.seeds:
            for level in levels:
                for config in CONFIGS:
                    job = {
                        "config": config,
                        "seed": seed,
                        "settings": settings_of(args.experiment, level, args.learning_rate),
                        "data": args.data,
                        "path": str(output_dir / f"{config['method']},{level:g},seed={seed}.json"),
                        "reference_logps": str(reference_logps),
                    }
                    print(run_and_save(job), flush=True)
    report(args.experiment, levels, output_dir, json.loads((Path(args.data) / "report.json").read_text())["base"])


if __name__ == "__main__":
    main()
