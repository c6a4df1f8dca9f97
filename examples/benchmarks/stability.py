# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a preference loss does to the chosen responses and to what the model could do before: alone, and inside of Stable PO.

Three settings, each with a capability that has nothing to do with any judge:

- `arithmetic`: the sandbox's world of worked sums; share of held-out sums that the model gets right.
- `reviews`: a pretrained story teller, fine-tuned on film reviews; pairs of a positive and a negative review; the perplexity of
  held-out stories, as `exp(-loss)` relative to the start's.
- `gsm8k`: the same story teller, fine-tuned on worked problems; pairs of right and wrong solutions; likewise.

    python examples/benchmarks/stability.py --setting arithmetic --output_dir stability --seeds 0 1 2
    python examples/benchmarks/stability.py --setting reviews --model STORIES260K --data DATA --output_dir stability

`+ stories` has the lower level on the chosen responses and as many stories (`sft_dataset`), where the capability is one of
stories.

Every run leaves one JSON file and is not repeated when it is there. Each is measured along the way; methods are compared at
equal preference accuracy: a plain loss at its last point, Stable PO at the last of its points whose accuracy on held-out pairs is
within two points of that (or at the nearest, which the table then shows).
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
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.utils import logging

from trl_spo import StablePOConfig, StablePOTrainer


LOSSES = ("sigmoid", "cpo", "simpo")
FORMS = {
    "plain": {"penalty_weight": 0.0},
    "penalty w 1": {"penalty_weight": 1.0},
    "penalty w 10": {"penalty_weight": 10.0},
    "penalty w 10 + stories": {"penalty_weight": 10.0, "replay": True},
    "alternating 1e-4": {"bilevel": "alternating", "inner_step_fraction": 1e-4},
    "alternating 1e-3": {"bilevel": "alternating", "inner_step_fraction": 1e-3},
    "unrolled 1e-3": {"bilevel": "unrolled", "inner_step_fraction": 1e-3},
}
# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
WITHIN = 0.02  # of the preference accuracy


# -- the settings: a model's folder, pairs to train on and held out, and the capability of a model


def arithmetic(args: argparse.Namespace) -> dict:
    from trl_spo.sandbox import ArithmeticWorld

    world = ArithmeticWorld()
    return {
        "model": str(world.folder),
        "train": world.pairs("train"),
        "eval": world.pairs("eval"),
        "capability": world.accuracy,
        "max_length": 48,
    }


def reviews(args: argparse.Namespace) -> dict:
    rows = load_dataset("json", data_files=str(next(Path(args.data).glob("movie_review_polarity*"))), split="train")
    rng = random.Random(0)
    texts = {label: [row["text"] for row in rows if str(row["label"]) == label] for label in "01"}
    for of_label in texts.values():
        rng.shuffle(of_label)
    count = min(map(len, texts.values()))
    pairs = [
        {"prompt": "Review:", "chosen": f" {good}", "rejected": f" {bad}"}
        for good, bad in zip(texts["1"][:count], texts["0"][:count], strict=True)
    ]
    train, held_out = pairs[400:], pairs[:400]
    sft = [pair["prompt"] + pair[which] for pair in train for which in ("chosen", "rejected")]
    return story_teller(args, "reviews", train, held_out, sft, 96)


def gsm8k(args: argparse.Namespace) -> dict:
    rows = load_dataset(
        "json", data_files=str(next(Path(args.data).glob("gsm8k_correct_vs_wrong_pairs*"))), split="train"
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    short = 320  # tokens: of two fifths of the pairs, both answers are

    def fits(row: dict) -> bool:
        return all(
            len(tokenizer(f"{row['prompt']}\n{row[name]}").input_ids) < short for name in ("chosen", "rejected")
        )

    by_problem = {}  # a problem has several pairs: all of them are trained on or none
    for row in filter(fits, rows):
        pair = {"prompt": row["prompt"], "chosen": f"\n{row['chosen']}", "rejected": f"\n{row['rejected']}"}
        by_problem.setdefault(row["prompt"], []).append(pair)
    problems = list(by_problem.values())
    random.Random(0).shuffle(problems)
    train, held_out = (list(itertools.chain(*some)) for some in (problems[60:], problems[:60]))
    return story_teller(args, "gsm8k", train, held_out, [pair["prompt"] + pair["chosen"] for pair in train], short)


def story_teller(
    args: argparse.Namespace, name: str, train: list[dict], held_out: list[dict], sft: list[str], max_length: int
) -> dict:
    """The pretrained model after a little fine-tuning on the pairs' domain, with its own stories mixed in."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    stories = [
        row["text"]
        for row in load_dataset("json", data_files=str(next(Path(args.data).glob("tinystories_1000*"))), split="train")
    ]
    folder = Path(args.output_dir) / f"{name}-sft"
    if not folder.is_dir():
        from trl import SFTConfig, SFTTrainer

        set_seed(0)
        rows = Dataset.from_list([{"text": text} for text in sft + 4 * stories[:500]]).shuffle(seed=0)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = SFTTrainer(
                args.model,
                args=SFTConfig(
                    scratch,
                    max_steps=args.sft_steps,
                    per_device_train_batch_size=16,
                    learning_rate=5e-4,
                    max_length=256,
                    save_strategy="no",
                    report_to="none",
                    bf16=False,
                    use_cpu=True,
                    gradient_checkpointing=False,
                ),
                train_dataset=rows,
            )
            trainer.train()
        trainer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def capability(model) -> float:
        """Probability per token of held-out stories: the geometric mean."""
        nll = tokens = 0.0
        for text in stories[500:700]:
            ids = torch.tensor([tokenizer(text)["input_ids"][:256]])
            nll += model(ids, labels=ids).loss.item() * (ids.size(1) - 1)
            tokens += ids.size(1) - 1
        return math.exp(-nll / tokens)

    return {
        "model": str(folder),
        "train": Dataset.from_list(train),
        "eval": Dataset.from_list(held_out),
        "capability": capability,
        "max_length": max_length,
        # Of the stories, none that the capability is measured on
        "replay": Dataset.from_list(
            [{"text": pair["prompt"] + pair["chosen"]} for pair in train]
            + [{"text": text} for text in itertools.islice(itertools.cycle(stories[:500]), len(train))]
        ).shuffle(seed=0),
    }


SETTINGS = {"arithmetic": arithmetic, "reviews": reviews, "gsm8k": gsm8k}


# -- one run


def run(job: dict) -> dict:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    disable_progress_bars()
    warnings.filterwarnings("ignore")
    args = argparse.Namespace(**job["args"])
    setting = SETTINGS[args.setting](args)
    points = {}

    with tempfile.TemporaryDirectory() as scratch:
        form = dict(job["form"])
        replay = form.pop("replay", False)
        config = StablePOConfig(
            output_dir=scratch,
            upper_loss=job["loss"],
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=32,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
            max_length=setting["max_length"],
            save_strategy="no",
            logging_steps=max(1, args.steps // 5),
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            seed=job["seed"],
            **({"beta": args.beta} if job["loss"] != "simpo" else {}),  # which has one of its own
            # The change against the start, whatever the loss reads
            precompute_ref_log_probs=True,
            **form,
            **({"sft_batch_size": 2 * args.batch_size} if replay else {}),
        )

        class Measure(TrainerCallback):
            def on_step_end(self, _, state, control, **kwargs):
                if state.global_step in args.points:
                    points[state.global_step] = measure()

        def measure() -> dict:
            metrics = trainer.evaluate()
            with trainer._deployed():
                capability = setting["capability"](trainer.model)
            trainer.model.train()
            return {
                "accuracy": metrics["eval_rewards/accuracies"],
                "chosen": metrics["eval_logps/chosen_change"],
                "rejected": metrics["eval_logps/rejected_change"],
                "displaced": metrics["eval_displacement/share"],
                "sft_loss": metrics["eval_stable/sft_loss"],
                "capability": capability,
            }

        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
            policy, reference = (
                AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float32) for _ in range(2)
            )
            trainer = StablePOTrainer(
                policy,
                # That of the stories is not precomputed
                ref_model=reference if replay else None,
                args=config,
                train_dataset=setting["train"],
                eval_dataset=setting["eval"],
                processing_class=AutoTokenizer.from_pretrained(setting["model"]),
                callbacks=[Measure()],
                sft_dataset=setting["replay"] if replay else None,
            )
            points[0] = measure()
            start = time.perf_counter()
            trainer.train()
    return {**job, "points": points, "seconds": time.perf_counter() - start, "log": trainer.state.log_history}


def work(job: dict) -> None:
    path = Path(job["path"])
    result = run(job)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result))
    scratch.rename(path)
    last = result["points"][max(result["points"])]
    print(f"{path.stem}: " + " ".join(f"{name} {value:.3f}" for name, value in last.items()), flush=True)


def check_same_settings(path: Path, args: argparse.Namespace) -> None:
    """Exits if a result that is there was measured with other options than those of now."""
    before = json.loads(path.read_text())["args"]
    for name in ("model", "data", "steps", "points", "batch_size", "learning_rate", "beta", "sft_steps"):
        if before[name] != getattr(args, name):
            sys.exit(
                f"{path} was measured with `--{name} {before[name]}`, and now it is {getattr(args, name)}. Use another "
                "`--output_dir`."
            )


# -- the tables


def interval(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    quantile = T_QUANTILE[min(len(values) - 2, len(T_QUANTILE) - 1)]
    return f"{mean:.3f} ± {quantile * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def report(folder: Path, setting: str) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{setting},*.json"))]
    by_config = {}
    for result in runs:
        result["points"] = {int(step): point for step, point in result["points"].items()}
        by_config.setdefault((result["loss"], result["name"]), {})[result["seed"]] = result
    print(f"\n{setting}: at equal accuracy on held-out pairs; mean ± half of the 95 % interval over seeds\n")
    print("| loss | form | seeds | step | accuracy | chosen, nats | displaced | capability / start | fall / plain's |")
    print("|---|---|---|---|---|---|---|---|---|")
    for loss in LOSSES:
        plain = by_config.get((loss, "plain"), {})
        for name in FORMS:
            rows, unmatched = [], 0
            for seed, result in by_config.get((loss, name), {}).items():
                points = result["points"]
                if name != "plain" and seed in plain:
                    target = plain[seed]["points"][max(plain[seed]["points"])]
                    gaps = {s: abs(point["accuracy"] - target["accuracy"]) for s, point in points.items() if s > 0}
                    step = max((s for s, gap in gaps.items() if gap <= WITHIN), default=min(gaps, key=gaps.get))
                    unmatched += gaps[step] > WITHIN
                    ratio = points[step]["chosen"] / target["chosen"] if target["chosen"] else math.nan
                else:
                    step, ratio = max(points), 1.0
                # Of the plain loss: the unrolled form's first point is at θ' already
                start = plain.get(seed, result)["points"][0]["capability"]
                rows.append({**points[step], "step": step, "ratio": ratio, "start": start})
            if rows:
                steps = sorted({row["step"] for row in rows})
                cells = [interval([row[key] for row in rows]) for key in ("accuracy", "chosen", "displaced")]
                cells.append(interval([row["capability"] / row["start"] for row in rows]))
                cells.append(interval([row["ratio"] for row in rows]))
                mark = f" ({unmatched} not matched)" if unmatched else ""
                print(f"| {loss} | {name} | {len(rows)}{mark} | {'/'.join(map(str, steps))} | {' | '.join(cells)} |")
    draw(by_config, folder, setting)


def draw(by_config: dict, folder: Path, setting: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(
        zip(FORMS, ("#000000", "#56B4E9", "#0072B2", "#CC79A7", "#E69F00", "#D55E00", "#009E73"), strict=True)
    )
    quantities = {
        "chosen": "change of the chosen log-prob (nats)",
        "accuracy": "held-out accuracy",
        "capability": "capability",
    }
    figure, axes = plt.subplots(len(LOSSES), len(quantities), figsize=(12, 9), layout="constrained", sharex=True)
    for row, loss in enumerate(LOSSES):
        for column, (quantity, label) in enumerate(quantities.items()):
            ax = axes[row, column]
            for name in FORMS:
                results = list(by_config.get((loss, name), {}).values())
                if not results:
                    continue
                steps = sorted(set.intersection(*(set(result["points"]) for result in results)))
                steps = [
                    step for step in steps if step > 0 or quantity != "accuracy"
                ]  # at the start all pairs are ties
                curves = [[result["points"][step][quantity] for step in steps] for result in results]
                ax.plot(
                    steps,
                    [statistics.mean(values) for values in zip(*curves, strict=True)],
                    color=colors[name],
                    label=name,
                )
                if len(curves) > 1:
                    low, high = ([f(values) for values in zip(*curves, strict=True)] for f in (min, max))
                    ax.fill_between(steps, low, high, color=colors[name], alpha=0.15, linewidth=0)
            ax.set_title(f"{loss}: {label}", fontsize=10)
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    path = folder / f"{setting}.png"
    figure.savefig(path, dpi=120)
    print(f"\nsaved {path} (mean and range over seeds)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--model", help="folder of a small story teller, for `reviews` and `gsm8k`")
    parser.add_argument("--data", help="folder of the data files, likewise")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--points", type=int, nargs="+", help="steps to measure at (default: five along the way)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--sft_steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    args = parser.parse_args()
    args.points = args.points or [args.steps * i // 5 for i in range(1, 6)]

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not args.report:
        SETTINGS[args.setting](args)  # what all runs share is made once
        jobs = []
        for seed, loss, name in itertools.product(args.seeds, args.losses, args.forms):
            if FORMS[name].get("replay") and args.setting == "arithmetic":
                continue
            path = folder / f"{args.setting},{loss},{name.replace(' ', '')},seed={seed}.json"
            if path.exists():
                check_same_settings(path, args)
            else:
                job = {
                    "loss": loss,
                    "name": name,
                    "form": FORMS[name],
                    "seed": seed,
                    "path": str(path),
                    "args": vars(args),
                }
                jobs.append(job)
        with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
            for _ in pool.imap_unordered(work, jobs, chunksize=1):
                pass
    report(folder, args.setting)


if __name__ == "__main__":
    main()
