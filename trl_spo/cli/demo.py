# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
`trl-spo demo`: what Soft PO, Stable PO and SSPO do, and how they compare with TRL's DPO, in a few minutes on a CPU and without
a download.

A tiny Llama is pretrained on stories of a template grammar whose true reward is known, it writes pairs of stories which that
reward labels, and it is aligned on them by several trainers, with the same data, seed, learning rate and number of steps. Since
the reward is known, what each policy is worth is measured and not judged. Another tiny Llama learns to add, and is then trained
on pairs of a right and a wrong worked sum: how many sums it still gets right is what a preference loss may cost. Last, a round of
synthetic preferences: the story writer's own stories, judged by critics whose mistakes are known. The numbers are whatever comes out.

    trl-spo demo --output_dir demo_output
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset
    from transformers import PreTrainedModel

    from trl_spo.sandbox import ArithmeticWorld, Estimate, StoriesWorld


STORIES_LEARNING_RATE = 4e-4  # of 2e-4, 4e-4, 8e-4 and 1e-3, the best for DPO
SUMS_LEARNING_RATE = 5e-4
POINTS = 5  # measurements along each training, besides the one before it
# Colours that the colour-blind tell apart too, and markers for print in black and white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each training (default: 100)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the trainings and of the measurements (default: 0)"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo_output"), help="folder of the pictures (default: ./demo_output)"
    )


def run(args: argparse.Namespace) -> int:
    if args.steps < POINTS:
        print(f"`--steps` must be at least {POINTS}, got {args.steps}.", file=sys.stderr)
        return 2
    start = time.perf_counter()
    _be_quiet()

    import torch

    torch.set_num_threads(1)  # with matrices this small, a second thread only gets in the way
    args.output_dir.mkdir(parents=True, exist_ok=True)
    _stories(args)
    _sums(args)
    _synthetic(args)
    print(f"   {time.perf_counter() - start:.0f} seconds in all")
    return 0


def _be_quiet() -> None:
    """One line a stage and the progress bars, instead of what the libraries have to say."""
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


# -- the three parts


def _stories(args: argparse.Namespace) -> None:
    from trl_spo.sandbox import StoriesWorld, cache_dir, reward, sample

    world = StoriesWorld(progress=True)
    print(f"1. Stories: a grammar with a known reward (kept in {cache_dir()})")
    reference = world.model()
    train_pairs, eval_pairs = world.pairs("train"), world.pairs("eval")
    print(
        f"   a Llama of {reference.num_parameters() / 1e6:.2f}M parameters; {len(train_pairs)} preference pairs of its own "
        f"stories to train on, {len(eval_pairs)} held out"
    )
    samples = sample(reference, world.tokenizer, world.eval_prompts, seed=args.seed + 1000)
    baseline = [reward(story) for story in samples.stories]
    print(f"   for example ({baseline[0]:+.1f}): {samples.stories[0]}")

    def measure(model: PreTrainedModel) -> dict[str, Estimate]:
        return _measure_stories(model, reference, world, eval_pairs, baseline, args.seed)

    methods = _stories_methods(world.config.max_tokens)
    print(
        f"   {len(methods)} trainings: {args.steps} steps of 16 pairs, learning rate {STORIES_LEARNING_RATE:g}, seed {args.seed}"
    )
    rows, curves = {"pretrained": measure(reference)}, {}
    for name, (method, options) in methods.items():
        options = options | {"learning_rate": STORIES_LEARNING_RATE}
        rows[name], curves[name] = _train(
            name, method, options, world, train_pairs, measure, "true reward", rows["pretrained"], args
        )
    print("2. What came out")
    _print_stories(rows, len(world.eval_prompts))
    _draw(curves, args.output_dir)


def _sums(args: argparse.Namespace) -> None:
    from trl_spo.sandbox import ArithmeticWorld

    world = ArithmeticWorld(progress=True)
    print("3. Sums: what a preference loss may cost")
    reference = world.model()
    train_pairs, eval_pairs = world.pairs("train"), world.pairs("eval")
    print(
        f"   a Llama of {reference.num_parameters() / 1e6:.2f}M parameters that has learned to add; {len(train_pairs)} pairs of a "
        "right and a wrong worked sum to train on"
    )
    print("   for example: {prompt}{chosen} is preferred to {prompt}{rejected}".format(**eval_pairs[0]))

    def measure(model: PreTrainedModel) -> dict[str, Estimate]:
        return _measure_sums(model, reference, world, eval_pairs)

    methods = _sums_methods()
    print(
        f"   {len(methods)} trainings: {args.steps} steps of 16 pairs, learning rate {SUMS_LEARNING_RATE:g}, seed {args.seed}"
    )
    rows = {"pretrained": measure(reference)}
    for name, (method, options) in methods.items():
        options = options | {"learning_rate": SUMS_LEARNING_RATE}
        rows[name], _ = _train(
            name, method, options, world, train_pairs, measure, "sums right", rows["pretrained"], args
        )
    print("4. What came out")
    _print_sums(rows, len(world.eval_sums))


def _synthetic(args: argparse.Namespace) -> None:
    from datasets import load_from_disk

    from trl_spo.sandbox import StoriesWorld, reward, sample
    from trl_spo.synthetic import EXTRA

    from .demo_synthetic import CRITICS, NUM_PROMPTS, NUM_RESPONSES, make_dataset, print_jury

    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        print(
            f"5. Synthetic preferences are left out, because {', '.join(missing)} is not installed: pip install 'trl-spo[synthetic]'"
        )
        return
    world = StoriesWorld(progress=True)
    reference = world.model()
    print("5. Synthetic preferences: one round on the stories")
    print(
        f"   the pretrained model writes {NUM_RESPONSES} stories to each of {NUM_PROMPTS} prompts, {len(CRITICS)} critics compare them, in "
        "both orders"
    )
    samples = sample(reference, world.tokenizer, world.eval_prompts, seed=args.seed + 1000)
    baseline = [reward(story) for story in samples.stories]

    def measure(model: PreTrainedModel) -> dict[str, Estimate]:
        return _measure_stories(model, reference, world, world.pairs("eval"), baseline, args.seed)

    with tempfile.TemporaryDirectory() as folder:
        reports = make_dataset(world, Path(folder), args.seed)
        pairs = load_from_disk(f"{folder}/run/dataset/preference")["train"]
        pairs = pairs.select_columns(["prompt", "chosen", "rejected"])
        print_jury(reports)
        rows = {"pretrained": measure(reference)}
        options = {"max_completion_length": world.config.max_tokens, "learning_rate": STORIES_LEARNING_RATE}
        rows["SoftPO on these pairs"], _ = _train(
            "SoftPO on these pairs", "SoftPO", options, world, pairs, measure, "true reward", rows["pretrained"], args
        )
    print("6. What came out")
    _print_stories(rows, len(world.eval_prompts), "Columns as above.")


def _stories_methods(max_tokens: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> prefix of the trainer's and the configuration's class, options."""
    return {
        "DPO (β 0.1)": ("DPO", {"beta": 0.1}),
        "SoftPO (the defaults)": ("SoftPO", {"max_completion_length": max_tokens}),
        "SoftPO (the paper's form)": ("SoftPO", {"max_completion_length": max_tokens, "calibration": "none"}),
        "StablePO (the defaults)": ("StablePO", {}),
        "SSPO (the defaults)": ("SSPO", {}),
    }


def _sums_methods() -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "DPO (β 0.1)": ("DPO", {"beta": 0.1}),
        "StablePO of DPO": ("StablePO", {}),
        "SimPO (β 2, γ 1)": ("StablePO", {"upper_loss": "simpo", "penalty_weight": 0.0}),
        "StablePO of SimPO": ("StablePO", {"upper_loss": "simpo"}),
    }


# -- training and measuring


def _train(
    name: str,
    method: str,
    options: dict[str, Any],
    world: StoriesWorld | ArithmeticWorld,
    train_pairs: Dataset,
    measure: Callable[[PreTrainedModel], dict[str, Estimate]],
    shown: str,
    before: dict[str, Estimate],
    args: argparse.Namespace,
) -> tuple[dict[str, Any], list[dict[str, Estimate]]]:
    """Train one policy; returns what it is worth at the end, and along the way. `shown` is the measurement beside the bar."""
    import trl
    from tqdm.auto import tqdm
    from transformers import PrinterCallback, TrainerCallback

    import trl_spo

    curve = [before]

    class Progress(TrainerCallback):
        """A bar, and measurements along the way; `seconds` leaves the measurements out."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = tqdm(total=state.max_steps, desc=f"   {name:26}", unit="step", dynamic_ncols=True)
            self.seconds, self.since = 0.0, time.perf_counter()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.seconds += time.perf_counter() - self.since
            self.bar.update()
            if state.global_step in [i * state.max_steps // POINTS for i in range(1, POINTS)]:
                self.measure(model)
            self.since = time.perf_counter()

        def measure(self, model):
            curve.append(measure(model))
            self.bar.set_postfix_str(f"{shown} {curve[-1][shown].mean:.2f}")

    progress = Progress()
    package = trl if method == "DPO" else trl_spo
    with tempfile.TemporaryDirectory() as folder:
        config = getattr(package, f"{method}Config")(
            output_dir=folder,
            max_steps=args.steps,
            warmup_steps=args.steps // 10,
            per_device_train_batch_size=16,
            seed=args.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        trainer = getattr(package, f"{method}Trainer")(
            world.model(),
            args=config,
            train_dataset=train_pairs,
            processing_class=world.tokenizer,
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    progress.measure(trainer.model)
    progress.bar.close()
    return {**curve[-1], "seconds": progress.seconds}, curve


def _measure_stories(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    world: StoriesWorld,
    eval_pairs: Dataset,
    baseline: list[float],
    seed: int,
) -> dict[str, Any]:
    """Everything about a policy, from its own samples for held-out prompts and from the held-out pairs."""
    from trl_spo.sandbox import Estimate, distinct_n, divergence, reward, sample, sequence_log_probs, win_rate

    samples = sample(model, world.tokenizer, world.eval_prompts, seed=seed + 2000, max_tokens=world.config.max_tokens)
    rewards = [reward(story) for story in samples.stories]
    kl, entropy = divergence(model, reference, samples)
    texts = world.tokenizer, eval_pairs["prompt"], eval_pairs["chosen"]
    change = sequence_log_probs(model, *texts) - sequence_log_probs(reference, *texts)
    return {
        "true reward": Estimate.of(rewards),
        "win_rate": win_rate(rewards, baseline),
        "kl": Estimate.of(kl),
        "entropy": Estimate.of(entropy),
        "distinct": distinct_n(samples, 3),
        "chosen": Estimate.of(change),
    }


def _measure_sums(
    model: PreTrainedModel, reference: PreTrainedModel, world: ArithmeticWorld, eval_pairs: Dataset
) -> dict[str, Any]:
    from trl_spo.sandbox import Estimate, sequence_log_probs

    changes = {}
    for which in ("chosen", "rejected"):
        texts = world.tokenizer, eval_pairs["prompt"], eval_pairs[which]
        changes[which] = sequence_log_probs(model, *texts) - sequence_log_probs(reference, *texts)
    right = world.accuracy(model)
    return {
        "sums right": Estimate(right, (right * (1 - right) / len(world.eval_sums)) ** 0.5),
        "accuracy": Estimate.of((changes["chosen"] > changes["rejected"]).float()),
        "chosen": Estimate.of(changes["chosen"]),
        "displaced": Estimate.of((changes["chosen"] < 0).float()),
    }


# -- showing


def _print_table(rows: dict[str, dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> None:
    print(f"   {'':26}" + "".join(f"{title:>15}" for title in columns))
    for name, row in rows.items():
        print(f"   {name:26}" + "".join(f"{cell(row):>15}" for cell in columns.values()))


def _number(name: str, digits: int, sign: str = "") -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[name].mean:{sign}.{digits}f} ± {row[name].error:.{digits}f}"


def _percent(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{100 * row[name].mean:.0f} ± {100 * row[name].error:.0f} %"


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.0f}" if "seconds" in row else ""


def _print_stories(rows: dict[str, dict[str, Any]], num_prompts: int, note: str | None = None) -> None:
    _print_table(
        rows,
        {
            "true reward": _number("true reward", 2),
            "win rate": _percent("win_rate"),
            "KL": _number("kl", 2),
            "entropy": _number("entropy", 1),
            "distinct-3": lambda row: f"{row['distinct']:.3f}",
            "chosen": _number("chosen", 2, "+"),
            "seconds": _seconds,
        },
    )
    if note is not None:
        print(f"\n   {note}")
        return
    print(
        f"""
   Measured on one sample for each of {num_prompts} held-out prompts (mean ± standard error over the prompts; one training each,
   so the seed's own noise comes on top). true reward: of the samples, by the grammar's reward. win rate: how often it is
   above that of a sample of the pretrained model, ties counted half. KL: to the pretrained model, entropy: of the policy;
   both in nats a story, summed over the tokens, at each the exact value over the vocabulary. distinct-3: share of different
   trigrams among all. chosen: change of the log-probability of the chosen stories of held-out pairs, in nats. seconds: of
   training, the measurements left out. SSPO is DPO (β 0.1) that learns besides how much key content is missing in a story."""
    )


def _print_sums(rows: dict[str, dict[str, Any]], num_sums: int) -> None:
    _print_table(
        rows,
        {
            "sums right": _percent("sums right"),
            "accuracy": lambda row: _percent("accuracy")(row) if "seconds" in row else "",
            "chosen": _number("chosen", 2, "+"),
            "displaced": _percent("displaced"),
            "seconds": _seconds,
        },
    )
    print(
        f"""
   Measured on {num_sums} held-out sums (± standard error; one training each). sums right: that the model's greedy answer gets
   right. accuracy: share of the pairs whose right answer gained more log-probability than the wrong one. chosen: change of the
   log-probability of the right answers, in nats. displaced: share of them that became less probable."""
    )


def _draw(curves: dict[str, list[dict[str, Estimate]]], output_dir: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("   no pictures, because matplotlib is not installed: pip install 'trl-spo[plots]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pictures = {
        "kl": (
            "reward_kl.png",
            "KL to the pretrained model (nats per story)",
            "Reward against KL: up and left is better",
        ),
        "entropy": (
            "reward_entropy.png",
            "entropy (nats per story)",
            "Reward against entropy: up and right is better",
        ),
    }
    for quantity, (file, label, title) in pictures.items():
        figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
        for (name, curve), color, marker in zip(curves.items(), COLORS, MARKERS, strict=True):
            x, y = [point[quantity] for point in curve], [point["true reward"] for point in curve]
            axes.errorbar(
                [e.mean for e in x],
                [e.mean for e in y],
                xerr=[e.error for e in x],
                yerr=[e.error for e in y],
                color=color,
                marker=marker,
                markersize=6,
                linewidth=1.8,
                elinewidth=0.9,
                label=name,
            )
        first = next(iter(curves.values()))[0]
        axes.plot(
            first[quantity].mean,
            first["true reward"].mean,
            "*",
            color="black",
            markersize=14,
            zorder=5,
            label="pretrained: where all start",
        )
        axes.set(xlabel=label, ylabel="true reward of held-out samples", title=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title="points along the training, ± standard error")
        figure.savefig(output_dir / file, dpi=150)
        plt.close(figure)
        print(f"   {output_dir / file}")
