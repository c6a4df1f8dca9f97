# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
`trl-spo demo`: what Soft PO does, and how it compares with TRL's DPO, in a few minutes on a CPU and without a download.

A tiny Llama is pretrained on stories of a template grammar whose true reward is known, it writes pairs of stories which that
reward labels, and it is aligned on them by three trainers, with the same data, seed, learning rate and number of steps. Since
the reward is known, what each policy is worth is measured and not judged. The numbers are whatever comes out.

    trl-spo demo --output_dir demo_output
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from trl_spo.sandbox import Estimate, StoriesWorld


LEARNING_RATE = 4e-4  # of 2e-4, 4e-4, 8e-4 and 1e-3, the best for DPO
POINTS = 5  # measurements along each training, besides the one before it


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

    from trl_spo.sandbox import StoriesWorld, cache_dir, reward, sample

    torch.set_num_threads(1)  # with matrices this small, a second thread only gets in the way
    args.output_dir.mkdir(parents=True, exist_ok=True)

    world = StoriesWorld(progress=True)
    print(f"1. The world: a story grammar with a known reward (kept in {cache_dir()})")
    reference = world.model()
    train_pairs, eval_pairs = world.pairs("train"), world.pairs("eval")
    print(
        f"   a Llama of {reference.num_parameters() / 1e6:.2f}M parameters; {len(train_pairs)} preference pairs of its own "
        f"stories to train on, {len(eval_pairs)} held out"
    )

    samples = sample(reference, world.tokenizer, world.eval_prompts, seed=args.seed + 1000)
    baseline = [reward(story) for story in samples.stories]
    print(f"   for example ({baseline[0]:+.1f}): {samples.stories[0]}")

    print(
        f"2. {len(_methods())} trainings: {args.steps} steps of 16 pairs, learning rate {LEARNING_RATE:g}, seed {args.seed}"
    )
    before = _measure(reference, reference, world, eval_pairs, baseline, args.seed)
    rows, curves = {"pretrained": before}, {}
    for name, options in _methods().items():
        rows[name], curves[name] = _train(name, options, world, train_pairs, eval_pairs, baseline, before, args)

    print("3. What came out")
    _print_table(rows, len(world.eval_prompts))
    _draw(curves, args.output_dir)
    print(f"   {time.perf_counter() - start:.0f} seconds in all")
    return 0


def _methods() -> dict[str, dict[str, Any]]:
    """Name -> options of SoftPOConfig; of DPOConfig where it begins with "DPO"."""
    return {
        "DPO (β 0.1)": {"beta": 0.1},
        "SoftPO (the defaults)": {},
        "SoftPO (the paper's form)": {"calibration": "none"},
    }


def _be_quiet() -> None:
    """One line a stage and the progress bars, instead of what the libraries have to say."""
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


# -- training and measuring


def _train(
    name: str,
    options: dict[str, Any],
    world: StoriesWorld,
    train_pairs: Dataset,
    eval_pairs: Dataset,
    baseline: list[float],
    before: dict[str, Estimate],
    args: argparse.Namespace,
) -> tuple[dict[str, Any], list[dict[str, Estimate]]]:
    """Train one policy; returns what it is worth at the end, and along the way."""
    from tqdm.auto import tqdm
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from trl_spo import SoftPOConfig, SoftPOTrainer

    reference, seed = world.model(), args.seed
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
                curve.append(_measure(model, reference, world, eval_pairs, baseline, seed))
                self.bar.set_postfix_str(f"true reward {curve[-1]['reward'].mean:+.2f}")
            self.since = time.perf_counter()

    progress = Progress()
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "max_steps": args.steps,
            "learning_rate": LEARNING_RATE,
            "warmup_steps": args.steps // 10,
            "per_device_train_batch_size": 16,
            "seed": seed,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        if name.startswith("DPO"):
            trainer_class, config = DPOTrainer, DPOConfig(**common, **options)
        else:
            config = SoftPOConfig(**common, max_completion_length=world.config.max_tokens, **options)
            trainer_class = SoftPOTrainer
        trainer = trainer_class(
            world.model(),
            args=config,
            train_dataset=train_pairs,
            processing_class=world.tokenizer,
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    row = _measure(trainer.model, reference, world, eval_pairs, baseline, seed)
    progress.bar.set_postfix_str(f"true reward {row['reward'].mean:+.2f}")
    progress.bar.close()
    curve.append(row)
    return {**row, "seconds": progress.seconds}, curve


def _measure(
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
        "reward": Estimate.of(rewards),
        "win_rate": win_rate(rewards, baseline),
        "kl": Estimate.of(kl),
        "entropy": Estimate.of(entropy),
        "distinct": distinct_n(samples, 3),
        "chosen": Estimate.of(change),
    }


# -- showing


def _print_table(rows: dict[str, dict[str, Any]], num_prompts: int) -> None:
    header = ["true reward", "win rate", "KL", "entropy", "distinct-3", "chosen", "seconds"]
    print(f"   {'':26}" + "".join(f"{title:>15}" for title in header))
    for name, row in rows.items():
        cells = [
            f"{row['reward'].mean:.2f} ± {row['reward'].error:.2f}",
            f"{100 * row['win_rate'].mean:.0f} ± {100 * row['win_rate'].error:.0f} %",
            f"{row['kl'].mean:.2f} ± {row['kl'].error:.2f}",
            f"{row['entropy'].mean:.1f} ± {row['entropy'].error:.1f}",
            f"{row['distinct']:.3f}",
            f"{row['chosen'].mean:+.2f} ± {row['chosen'].error:.2f}",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        ]
        print(f"   {name:26}" + "".join(f"{cell:>15}" for cell in cells))
    print(
        f"""
   Measured on one sample for each of {num_prompts} held-out prompts (mean ± standard error over the prompts; one training each,
   so the seed's own noise comes on top). true reward: of the samples, by the grammar's reward. win rate: how often it is
   above that of a sample of the pretrained model, ties counted half. KL: to the pretrained model, entropy: of the policy;
   both in nats a story, summed over the tokens, at each the exact value over the vocabulary. distinct-3: share of different
   trigrams among all. chosen: change of the log-probability of the chosen stories of held-out pairs, in nats. seconds: of
   training, the measurements left out."""
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
        # Colours that the colour-blind tell apart too, and markers for print in black and white
        for (name, curve), color, marker in zip(
            curves.items(), ("#0072B2", "#D55E00", "#009E73"), ("o", "s", "^"), strict=True
        ):
            x, y = [point[quantity] for point in curve], [point["reward"] for point in curve]
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
            first["reward"].mean,
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
