# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Reward against KL, and reward against entropy: SoftPO's frontier beside DPO's and IPO's, with a known true reward.

All methods start from the same base model and see the same batches of the same pairs, in the same order, with the same
optimizer, learning rate (tuned for DPO) and number of steps. What differs is the loss. Batches hold pairs of similar
length, which halves the padding, and the frozen reference's log-probs of the pairs are computed once for all runs: both
only save time.

    python examples/controlled_sentiment.py prepare ...          # see there; writes the folder `sentiment`
    python examples/benchmarks/frontier.py --data sentiment --output_dir frontier --seeds 0 1 2

Every run leaves one JSON file in the output folder and is not repeated when it is there, so that the command can be
interrupted and extended (`--methods`, `--grid more.json`). With `--report` nothing is trained.

How the comparison is made. Each configuration and seed gives a point (KL, reward gain over the base model). A family's
frontier is the upper concave hull of its points and the base model (0, 0): every point of it can be had by choosing
between two trained models at random for each response. It is computed for every seed by itself; intervals are 95 %
t-intervals over seeds. The hull takes the best of several noisy points, which favours the family with more of them: the
table of single SoftPO configurations against DPO's hull at the same KL has no such choice on SoftPO's side.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from transformers.utils import logging


def _load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parents[1] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sentiment = _load_example("controlled_sentiment")

DPO = [{"method": "dpo", "beta": beta} for beta in (0.05, 0.1, 0.3, 0.5, 1.0, 2.0)]
IPO = [{"method": "ipo", "beta": beta} for beta in (1.0, 3.0, 10.0, 30.0)]
SOFT = [{"method": "soft", "alpha": alpha, "beta": beta} for alpha in (0.05, 0.1, 0.3) for beta in (0.03, 0.1, 0.3)]
# What holds it is the weight of its penalty: at the default of 10 it hardly leaves the base model
STABLE = [
    *({"method": "stable", "beta": 0.1, "penalty_weight": weight} for weight in (0.1, 0.3, 1.0, 3.0, 10.0)),
    *({"method": "stable", "beta": beta, "penalty_weight": 0.3} for beta in (0.05, 0.5)),
]
SSPO = [{"method": "sspo", "beta": beta} for beta in (0.05, 0.1, 0.5, 1.0)]
FAMILIES = {"dpo": "DPO", "ipo": "IPO", "soft": "SoftPO", "stable": "StablePO", "sspo": "SSPO"}
# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def name_of(config: dict) -> str:
    fields = [f"{key}={value}" for key, value in config.items() if key != "method"]
    return ",".join([config["method"], *fields])


def length_grouped(dataset: Dataset, batch_size: int, seed: int) -> Dataset:
    """In random order, but in batches of similar length: sorted within groups of 8 batches."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [max(len(c), len(r)) for c, r in zip(dataset["chosen"], dataset["rejected"], strict=True)]
    order = torch.randperm(len(dataset), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), 8 * batch_size):
        group = sorted(order[start : start + 8 * batch_size], key=lambda row: lengths[row])
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    batches = [batch for batch in batches if len(batch) == batch_size]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return dataset.select([row for i in shuffled for row in batches[i]])


def flip(dataset: Dataset, share: float, seed: int) -> Dataset:
    """With the labels of a random share of the pairs turned round."""
    generator = torch.Generator().manual_seed(seed)
    flipped = (torch.rand(len(dataset), generator=generator) < share).tolist()

    def turn(row: dict, i: int) -> dict:
        if not flipped[i]:
            return row
        other = {"chosen": "rejected", "rejected": "chosen"}
        names = {name: name.replace(side, o) for side, o in other.items() for name in row if side in name}
        return {name: row[names.get(name, name)] for name in row}

    return dataset.map(turn, with_indices=True)


class EvaluateAt(TrainerCallback):
    """Calls `function(step)` after the given steps."""

    def __init__(self, steps: set[int], function):
        self.steps = steps
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.function(state.global_step)


def run(job: dict) -> dict:
    """Trains and evaluates one configuration with one seed."""
    torch.set_num_threads(1)  # faster for models of this size
    logging.set_verbosity_error()
    disable_progress_bars()
    warnings.filterwarnings("ignore")
    from trl import DPOConfig, DPOTrainer

    config, seed, settings = dict(job["config"]), job["seed"], job["settings"]
    method = config.pop("method")
    content = sentiment.load(job["data"])
    pairs = content.pop("pairs")
    model = AutoModelForCausalLM.from_pretrained(Path(job["data"]) / "sft")
    scratch = tempfile.mkdtemp()
    common = {
        "output_dir": scratch,
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["batch_size"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings["warmup_steps"],
        "train_sampling_strategy": "sequential",
        "max_length": len(content["tokenizer"](content["prompts"][0])["input_ids"]) + sentiment.MAX_NEW_TOKENS,
        "logging_steps": max(1, settings["steps"] // 5),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": seed,
    }
    if method == "soft":
        from trl_spo import SoftPOConfig, SoftPOTrainer

        args = SoftPOConfig(**common, **{"max_completion_length": sentiment.MAX_NEW_TOKENS} | config)
        trainer_class = SoftPOTrainer
    elif method == "stable":
        from trl_spo import StablePOConfig, StablePOTrainer

        args = StablePOConfig(**common, **config)
        trainer_class = StablePOTrainer
    elif method == "sspo":
        from trl_spo import SSPOConfig, SSPOTrainer

        args = SSPOConfig(**common, **config)
        trainer_class = SSPOTrainer
    else:
        loss_type = {"dpo": "sigmoid", "ipo": "ipo"}[method]
        args = DPOConfig(**common, loss_type=loss_type, **config)
        trainer_class = DPOTrainer

    points, evaluation_seconds = {}, 0.0

    def evaluate(step: int) -> None:
        nonlocal evaluation_seconds
        start = time.perf_counter()
        points[step] = sentiment.evaluate(
            model, **content, pairs=pairs["test"], samples_per_prompt=settings["samples_per_prompt"]
        )
        evaluation_seconds += time.perf_counter() - start

    dataset = pairs["train"]
    for side, logps in torch.load(job["reference_logps"]).items():
        dataset = dataset.add_column(f"ref_{side}_logps", logps.tolist())
    if settings.get("pairs"):
        dataset = dataset.shuffle(seed=seed).select(range(settings["pairs"]))
    if settings.get("flipped"):
        dataset = flip(dataset, settings["flipped"], seed)
    dataset = length_grouped(dataset, settings["batch_size"], seed)
    dataset = dataset.select(range(min(len(dataset), settings["batch_size"] * settings["steps"])))
    if (
        method == "sspo"
    ):  # it computes the reference's log-probabilities itself, as its heads are no part of the reference
        dataset = dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # the trainer prints its log
        set_seed(seed)
        trainer = trainer_class(
            model,
            args=args,
            train_dataset=dataset,
            processing_class=content["tokenizer"],
            callbacks=[EvaluateAt({settings["steps"] // 2, settings["steps"]}, evaluate)],
        )
        trainer.precompute_ref_logps = method != "sspo"  # the dataset has them
        start = time.perf_counter()
        trainer.train()
    seconds = time.perf_counter() - start - evaluation_seconds
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    shutil.rmtree(scratch, ignore_errors=True)
    return job | {"points": points, "seconds": seconds, "log": logs}


def run_and_save(job: dict) -> str:
    path = Path(job["path"])
    if not path.exists():
        try:
            result = run(job)
        except Exception as error:  # noqa: BLE001 - one bad configuration must not stop the others
            return f"FAILED {job['config']} seed {job['seed']}: {type(error).__name__}: {error}"
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(result))
        part.replace(path)
    point = list(json.loads(path.read_text())["points"].values())[-1]
    return f"{path.stem}: reward {point['reward']:.2f} KL {point['kl']:.2f} entropy {point['entropy']:.1f}"


# ----------------------------------------------------------------------------------------------------------- report


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval (infinite for one value)."""
    if len(values) < 2:
        return values[0], math.inf
    half = T_QUANTILE[min(len(values) - 2, len(T_QUANTILE) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def show(values: list[float], digits: int = 2) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" if math.isinf(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def upper_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper concave hull, from the leftmost point to the highest one."""
    hull: list[tuple[float, float]] = []
    for point in sorted(points):
        while len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (point[1] - hull[-2][1]) >= (
            hull[-1][1] - hull[-2][1]
        ) * (point[0] - hull[-2][0]):
            hull.pop()
        hull.append(point)
    top = max(range(len(hull)), key=lambda i: hull[i][1])
    return hull[: top + 1]


def at(hull: list[tuple[float, float]], x: float) -> float | None:
    """Height of the hull at x; beyond its highest point the hull is flat."""
    if x < hull[0][0]:
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(hull):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return hull[-1][1]


def collect(output_dir: Path) -> list[dict]:
    runs = [json.loads(path.read_text()) for path in sorted(output_dir.glob("*.json"))]
    for one in runs:
        one["half"], one["final"] = one["points"].values()  # in the order in which they were measured
    return runs


def family_points(runs: list[dict], methods: tuple[str, ...], seed: int, base: dict, x: str, along: bool) -> list:
    """(x, reward gain) of all runs of a family with one seed; x is "kl" or "entropy" (as its loss)."""
    points = [(0.0, 0.0)]
    for one in runs:
        if one["config"]["method"] in methods and one["seed"] == seed:
            for point in [one["final"], one["half"]][: 2 if along else 1]:
                distance = point["kl"] if x == "kl" else base["entropy"] - point["entropy"]
                points.append((distance, point["reward"] - base["reward"]))
    return points


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_runs(groups: dict[str, list[dict]]) -> None:
    columns = ("reward", "kl", "entropy", "length", "chosen_change", "accuracy")
    rows = []
    for name, group in groups.items():
        cells = [show([one["final"][c] for one in group], 1 if c in ("entropy", "length") else 2) for c in columns]
        seconds = statistics.mean(one["seconds"] for one in group)
        rows.append([name, str(len(group)), *cells, f"{seconds:.0f}"])
    print_table(["configuration", "seeds", *columns, "s/run"], rows)


def print_equal_kl(runs: list[dict], seeds: list[int], base: dict, along: bool) -> None:
    present = {one["config"]["method"] for one in runs}
    families = {name: (method,) for method, name in FAMILIES.items() if method in present}
    ratios = []
    if {"dpo", "soft"} <= present:
        ratios.append(("SoftPO", "DPO"))
    if {"dpo", "ipo", "soft"} <= present:
        families["best of DPO and IPO"] = ("dpo", "ipo")
        ratios.append(("SoftPO", "best of DPO and IPO"))
    rows = []
    for kl in (3, 4, 5, 6, 7, 8):
        gains = {
            name: [at(upper_hull(family_points(runs, methods, seed, base, "kl", along)), kl) for seed in seeds]
            for name, methods in families.items()
        }
        compared = [show([a / b for a, b in zip(gains[one], gains[other], strict=True)]) for one, other in ratios]
        rows.append([str(kl), *(show(values) for values in gains.values()), *compared])
    print_table(["KL", *families, *(f"{one} / {other}" for one, other in ratios)], rows)


def print_against_hull(groups: dict[str, list[dict]], runs: list[dict], seeds: list[int], base: dict, x: str) -> None:
    """Single configurations of SoftPO against the hull of DPO and IPO at the same KL or entropy."""
    rows = []
    for name, group in groups.items():
        values = []
        for one in group:
            if one["config"]["method"] == "soft" and one["seed"] in seeds:
                hull = upper_hull(family_points(runs, ("dpo", "ipo"), one["seed"], base, x, True))
                distance = one["final"]["kl"] if x == "kl" else base["entropy"] - one["final"]["entropy"]
                height = at(hull, distance)
                if height:
                    gain = one["final"]["reward"] - base["reward"]
                    values.append((one["final"][x], gain, height, gain / height))
        if values:
            rows.append([name, str(len(values)), *(show(list(column)) for column in zip(*values, strict=True))])
    print_table(["configuration", "seeds", x, "gain", "gain of the hull", "ratio"], rows)


def report(runs: list[dict], base: dict, output_dir: Path) -> None:
    order = list(FAMILIES)
    runs = sorted(runs, key=lambda one: (order.index(one["config"]["method"]), name_of(one["config"]), one["seed"]))
    groups = {name: list(group) for name, group in itertools.groupby(runs, key=lambda one: name_of(one["config"]))}

    print(f"\nBase model: reward {base['reward']:.2f} (sd {base['reward_std']:.2f}), entropy {base['entropy']:.1f}")
    print("Mean ± half width of the 95 % interval over seeds, on held-out prompts, after the last step.\n")
    print_runs(groups)

    present = {one["config"]["method"] for one in runs}
    found = [{one["seed"] for one in runs if one["config"]["method"] == method} for method in present]
    seeds = sorted(set.intersection(*found))
    if seeds:
        for along, what in ((False, "after the last step"), (True, "half-way and after the last step")):
            print(f"\nReward gain at equal KL: hulls of the points {what}, per seed, then averaged\n")
            print_equal_kl(runs, seeds, base, along)
    if seeds and {"dpo", "ipo", "soft"} <= present:
        for x, what in (("kl", "KL"), ("entropy", "entropy")):
            print(
                f"\nEach SoftPO configuration against the hull of DPO and IPO at its own {what}, half-way included\n"
            )
            print_against_hull(groups, runs, seeds, base, x)
    plot(runs, base, output_dir)


def plot(runs: list[dict], base: dict, output_dir: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(FAMILIES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"), strict=True))
    for x, label in (("kl", "KL to the reference (nats per sequence)"), ("entropy", "entropy (nats per sequence)")):
        figure, axes = plt.subplots(figsize=(7, 5))
        for method, color in colors.items():
            points = [one["final"] for one in runs if one["config"]["method"] == method]
            if not points:
                continue
            axes.scatter([p[x] for p in points], [p["reward"] for p in points], s=14, color=color, alpha=0.6)
            hull = upper_hull(
                [
                    (distance, gain)
                    for seed in {one["seed"] for one in runs}
                    for distance, gain in family_points(runs, (method,), seed, base, x, False)
                ]
            )
            xs = [h[0] if x == "kl" else base["entropy"] - h[0] for h in hull]
            axes.plot(xs, [h[1] + base["reward"] for h in hull], color=color, label=FAMILIES[method])
        axes.scatter([base[x]], [base["reward"]], marker="*", s=90, color="black", label="base model", zorder=3)
        axes.set_xlabel(label)
        axes.set_ylabel("true reward")
        axes.set_title("Controlled sentiment: held-out prompts, each point one run")
        axes.legend()
        axes.grid(alpha=0.3)
        path = output_dir / f"reward_{x}.png"
        figure.tight_layout()
        figure.savefig(path, dpi=150)
        print(f"saved {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that controlled_sentiment.py prepare wrote")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--grid", help="JSON file with a list of configurations to run instead of the built-in ones")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=10)
    parser.add_argument("--samples_per_prompt", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="train nothing, print the tables")
    args = parser.parse_args()

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        key: getattr(args, key)
        for key in ("steps", "batch_size", "learning_rate", "warmup_steps", "samples_per_prompt")
    }
    configs = json.loads(Path(args.grid).read_text()) if args.grid else DPO + IPO + SOFT + STABLE + SSPO
    jobs = [
        {
            "config": config,
            "seed": seed,
            "settings": settings,
            "data": args.data,
            "path": str(output_dir / f"{name_of(config)},seed={seed}.json"),
            "reference_logps": str(output_dir / "reference_logps.pt"),
        }
        for seed in args.seeds
        for config in configs
        if config["method"] in args.methods
    ]
    if not args.report:
        if not (output_dir / "reference_logps.pt").exists():
            content = sentiment.load(args.data)
            logps = sentiment.pair_logps(content["ref_model"], content["tokenizer"], content["pairs"]["train"])
            torch.save(logps, output_dir / "reference_logps.pt")
        if args.jobs > 1:
            with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
                for line in pool.imap_unordered(run_and_save, jobs):
                    print(line, flush=True)
        else:
            for job in jobs:
                print(run_and_save(job), flush=True)
    runs = [one for one in collect(output_dir) if one["config"]["method"] in args.methods]
    report(runs, json.loads((Path(args.data) / "report.json").read_text())["base"], output_dir)


if __name__ == "__main__":
    main()
