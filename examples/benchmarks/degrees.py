# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the heads of SSPO learn, and what they do for the alignment: extractors of key content, two heads or one, states or texts,
numbers of degrees. Beside DPO without heads, on the same pairs.

    python examples/benchmarks/degrees.py --setting reviews --model STORIES260K --data DATA --output_dir degrees
    python examples/benchmarks/degrees.py --setting qa --model STORIES260K --data DATA --output_dir degrees

DATA is a folder with `movie_review_polarity*` (`text` and `label` 0 or 1) and `qa_feedback_pairs*` (`prompt`, `chosen`, `rejected` and
`qid`, the question's number), as JSON lines.

Every run leaves one JSON file and is not repeated when it is there. Differences to DPO are taken seed by seed. The key content that
`random` is the control of is rake's: as many tokens of each degree, at other places.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import AutoTokenizer
from transformers.utils import logging

from trl_spo import SSPOConfig, SSPOTrainer


CONFIGS = {
    "DPO": {"chosen_weight": 0.0, "rejected_weight": 0.0},
    "rake": {},
    "yake": {"extractor": "yake"},
    "position_rank": {"extractor": "position_rank"},
    "random": {"extractor": "random"},
    "rake, shared head": {"shared_head": True},
    "rake, text": {"removal": "text"},
    "random, text": {"removal": "text", "extractor": "random"},
    "rake, N = 2": {"num_degrees": 2},
    "rake, N = 4": {"num_degrees": 4},
    "rake, N = 5": {"num_degrees": 5},
    "rake, weights 1": {"chosen_weight": 1.0, "rejected_weight": 1.0},
}
STEPS = {"reviews": 200, "qa": 60}
# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def rows_of(args: argparse.Namespace, name: str) -> Dataset:
    return load_dataset("json", data_files=str(next(Path(args.data).glob(f"{name}*"))), split="train")


def reviews(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Pairs of a positive and a negative sentence of film reviews."""
    texts = {"0": [], "1": []}
    for row in rows_of(args, "movie_review_polarity"):
        texts[str(row["label"])].append(row["text"])
    for of_label in texts.values():
        random.Random(0).shuffle(of_label)
    pairs = [
        {"prompt": "Review:", "chosen": f" {good}", "rejected": f" {bad}"}
        for good, bad in zip(texts["1"], texts["0"], strict=False)
    ]
    return pairs[400:], pairs[:400]


def qa(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Pairs of answers that people compared, of questions that are either trained on or held out."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    by_question: dict[int, list[dict]] = {}
    for row in rows_of(args, "qa_feedback_pairs"):
        pair = {"prompt": row["prompt"], "chosen": f"\n{row['chosen']}", "rejected": f"\n{row['rejected']}"}
        longest = max(len(tokenizer(pair["prompt"] + pair[name]).input_ids) for name in ("chosen", "rejected"))
        if longest < 320:
            by_question.setdefault(row["qid"], []).append(pair)
    questions = list(by_question.values())
    random.Random(0).shuffle(questions)
    return list(itertools.chain(*questions[60:])), list(itertools.chain(*questions[:60]))


SETTINGS = {"reviews": reviews, "qa": qa}


def run(job: dict) -> dict:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    disable_progress_bars()
    warnings.filterwarnings("ignore")
    args = argparse.Namespace(**job["args"])
    train, held_out = SETTINGS[args.setting](args)
    with tempfile.TemporaryDirectory() as scratch:
        config = SSPOConfig(
            output_dir=scratch,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=16,
            warmup_steps=10,
            max_length=None,
            save_strategy="no",
            logging_steps=max(1, args.steps // 10),
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            seed=job["seed"],
            **job["options"],
        )
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
            trainer = SSPOTrainer(
                args.model,
                args=config,
                train_dataset=Dataset.from_list(train[: args.steps * args.batch_size]),  # one pass
                eval_dataset=Dataset.from_list(held_out),
                processing_class=AutoTokenizer.from_pretrained(args.model),
            )
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            metrics = trainer.evaluate()
    metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {**job, "metrics": metrics, "seconds": seconds, "log": trainer.state.log_history}


def work(job: dict) -> None:
    path = Path(job["path"])
    result = run(job)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result))
    scratch.rename(path)
    shown = ("rewards/accuracies", "degree/chosen_accuracy", "degree/rejected_accuracy")
    print(f"{path.stem}: " + " ".join(f"{result['metrics'].get(name, math.nan):.3f}" for name in shown), flush=True)


def check_same_settings(path: Path, args: argparse.Namespace, options: dict) -> None:
    """Exits if a result that is there was measured with other options than those of now."""
    result = json.loads(path.read_text())
    if result["options"] != options:
        sys.exit(f"{path} was measured with {result['options']}, and now it is {options}. Use another `--output_dir`.")
    before = result["args"]
    for name in ("model", "data", "steps", "batch_size", "learning_rate"):
        if before[name] != getattr(args, name):
            sys.exit(
                f"{path} was measured with `--{name} {before[name]}`, and now it is {getattr(args, name)}. Use another "
                "`--output_dir`."
            )


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = T_QUANTILE[min(len(values) - 2, len(T_QUANTILE) - 1)]
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def report(folder: Path, setting: str) -> None:
    by_config: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob(f"{setting},*.json")):
        result = json.loads(path.read_text())
        by_config.setdefault(result["name"], {})[result["seed"]] = result
    table = {}
    for name in CONFIGS:
        found = by_config.get(name, {})
        if not found:
            continue
        metrics = [result["metrics"] for result in found.values()]
        both = sorted(found.keys() & by_config.get("DPO", {}).keys())
        change = [
            found[seed]["metrics"]["rewards/accuracies"] - by_config["DPO"][seed]["metrics"]["rewards/accuracies"]
            for seed in both
        ]
        table[name] = {
            "seeds": len(found),
            "accuracy": interval([m["rewards/accuracies"] for m in metrics]),
            "change": interval(change) if change and name != "DPO" else None,
            "margin": interval([m["rewards/margins"] for m in metrics]),
        }
        if name != "DPO":
            table[name] |= {
                head: interval([m[f"degree/{head}_accuracy"] for m in metrics]) for head in ("chosen", "rejected")
            }
            table[name]["share"] = interval([m["degree/key_share"] for m in metrics])

    def cell(value: tuple[float, float] | None, sign: str = "") -> str:
        return "" if value is None else f"{value[0]:{sign}.3f} ± {value[1]:.3f}"

    print(f"\n{setting}, held-out pairs; mean ± half of the 95 % interval over seeds\n")
    print(
        "| | seeds | preference accuracy | difference to DPO | margin | degree, chosen | degree, rejected | key share |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| {name} | {row['seeds']} | {cell(row['accuracy'])} | {cell(row['change'], '+')} | {cell(row['margin'])} | "
            f"{cell(row.get('chosen'))} | {cell(row.get('rejected'))} | {row['share'][0]:.2f} |"
            if "share" in row
            else f"| {name} | {row['seeds']} | {cell(row['accuracy'])} | | {cell(row['margin'])} | | | |"
        )
    draw(table, folder, setting)


def draw(table: dict[str, dict], folder: Path, setting: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print("No picture: matplotlib is not installed (`pip install trl-spo[plots]`).")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(table)[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.42 * len(names) + 1.2), sharey=True, layout="constrained")
    for y, name in enumerate(names):
        mean, half = table[name]["accuracy"]
        axes[0].errorbar(mean, y, xerr=half, fmt="o", color="#555555" if name == "DPO" else "#2a6f97", capsize=3)
        for head, color, shift in (("chosen", "#2a6f97", 0.12), ("rejected", "#c8553d", -0.12)):
            if head in table[name]:
                mean, half = table[name][head]
                axes[1].errorbar(
                    mean, y + shift, xerr=half, fmt="o", color=color, capsize=3, label=f"{head} responses"
                )
        if "chosen" in table[name]:
            chance = 1 / CONFIGS[name].get("num_degrees", 3)
            axes[1].plot([chance, chance], [y - 0.35, y + 0.35], color="#999999", linewidth=2, label="chance")
    if "DPO" in table:
        axes[0].axvline(table["DPO"]["accuracy"][0], color="#bbbbbb", linewidth=1, zorder=0)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_xlabel("preference accuracy, held out")
    axes[1].set_xlabel("degree accuracy, held out")
    handles, labels = axes[1].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        figure.legend(unique.values(), unique.keys(), loc="outside upper right", ncols=3, fontsize="small")
    for axis in axes:
        axis.grid(axis="x", color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    path = folder / f"degrees_{setting}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nPicture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--model", help="folder of a small story teller")
    parser.add_argument("--data", help="folder of the data files")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: 200 for the reviews, 60 for the answers")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--report", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    args.steps = args.steps or STEPS[args.setting]

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not args.report:
        if not (args.model and args.data):
            parser.error("--model and --data are needed")
        jobs = []
        for seed, name in itertools.product(args.seeds, args.configs):
            path = folder / f"{args.setting},{name.replace(' ', '')},seed={seed}.json"
            if path.exists():
                check_same_settings(path, args, CONFIGS[name])
            else:
                options = CONFIGS[name]
                jobs.append({"name": name, "options": options, "seed": seed, "path": str(path), "args": vars(args)})
        with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
            for _ in pool.imap_unordered(work, jobs, chunksize=1):
                pass
    report(folder, args.setting)


if __name__ == "__main__":
    main()
