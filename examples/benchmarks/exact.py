# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Where everything can be counted: a model whose completions are few enough to list, so that rewards, KL, entropy and the best policies are exact.

`theorem`: Soft PO without its regularizer arrives at softmax(r / α), whether it is given pairs, the best of n, or ranked lists, as long as their labels are
those of Bradley-Terry and Plackett-Luce. Shown is the total variation between the trained policy and that, over α; beside it, the total variation of the
initial model, and of the policy for the neighbouring α.

`frontier`: every method is trained on the same pairs, which the reference wrote and a Bradley-Terry annotator labelled. The policies that no other one
beats at their distance are known: π_ref exp(r / β) for reward against KL, softmax(r / α) for reward against entropy. *Regret* is how much reward a trained policy lacks beside
the one at the same KL. RLHF is a reward model of the same pairs, then RLOO, with four times as many steps.

    python examples/benchmarks/exact.py theorem --output_dir theorem
    python examples/benchmarks/exact.py frontier --output_dir exact_frontier

Every run leaves one JSON file in the output folder and is not repeated when it is there. With `--report` nothing is trained.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from datasets import disable_progress_bars
from frontier import print_table, show
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainerCallback, set_seed
from transformers.utils import logging

from trl_spo.sandbox.enumerable import (
    EnumerableWorld,
    entropy,
    expectation,
    kl_divergence,
    optimal_policy,
    total_variation,
)


ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0)
FORMS = ("pairs", "best of 4", "ranked lists of 4")
GRID = [
    *({"method": "dpo", "beta": beta} for beta in (0.1, 0.3, 1.0, 3.0)),
    *({"method": "ipo", "beta": beta} for beta in (0.1, 0.3, 1.0, 3.0)),
    *({"method": "kto", "beta": beta} for beta in (0.1, 0.3, 1.0, 3.0)),
    *({"method": "soft_po", "alpha": alpha, "beta": beta} for alpha in (0.3, 1.0, 3.0) for beta in (0.03, 0.3)),
    *({"method": "stable_po", "beta": beta} for beta in (0.1, 0.3, 1.0, 3.0)),
    *({"method": "sspo", "beta": beta} for beta in (0.1, 0.3, 1.0, 3.0)),
    *({"method": "rloo", "beta": beta} for beta in (0.1, 0.3, 1.0)),
]
LABELS = {
    "dpo": "DPO",
    "ipo": "IPO",
    "kto": "KTO",
    "soft_po": "SoftPO",
    "stable_po": "StablePO",
    "sspo": "SSPO",
    "rloo": "RLHF",
}
COLORS = ("#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#000000")
NUM_PAIRS = 2000
RLOO_STEPS = 4  # times as many as the others
COMMON = {
    "per_device_train_batch_size": 64,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "linear",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


class AverageWeights(TrainerCallback):
    """Averages the weights of the last half of the steps, which takes the noise of the batches out of the minimiser."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps // 2:
            self.sum, self.number = [p.detach().clone() for p in model.parameters()], 1
        elif state.global_step > state.max_steps // 2:
            self.number += 1
            for total, p in zip(self.sum, model.parameters(), strict=True):
                total += p.detach()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for total, p in zip(self.sum, model.parameters(), strict=True):
                p.copy_(total / self.number)


def fit(trainer) -> None:
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # the trainer prints its log
        trainer.train()
    trainer.model.eval()


# ---------------------------------------------------------------------------------------------------------- theorem


def theorem(form: str, alpha: float, seed: int) -> dict:
    from trl_spo import SoftPOConfig, SoftPOTrainer

    world = EnumerableWorld(num_words=4, max_tokens=3, num_prompts=1)
    rewards = world.rewards(seed=seed, scale=0.7)
    if form == "pairs":
        dataset = world.population_pairs(rewards, copies=60)
    elif form == "best of 4":
        dataset = world.best_of_n(rewards, 40_000, 4, seed=seed)
    else:
        dataset = world.ranked_lists(rewards, 40_000, 4, seed=seed)
    model = world.model(seed=seed)
    with torch.no_grad():
        initial = world.log_probs(model)[0].double()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "max_steps": 400,
            "learning_rate": 5e-3,
            "max_completion_length": world.max_tokens,
            "max_length": None,
        }
        args = SoftPOConfig(
            output_dir=folder,
            **{**COMMON, **options, "per_device_train_batch_size": 128},
            alpha=alpha,
            beta=0.0,
            calibration="none",
            seed=seed,
        )
        fit(
            SoftPOTrainer(
                model, args=args, train_dataset=dataset, processing_class=world.tokenizer, callbacks=[AverageWeights()]
            )
        )
    with torch.no_grad():
        logps = world.log_probs(model)[0].double()
    distances = {a: total_variation(logps, optimal_policy(rewards, entropy_weight=a)).item() for a in ALPHAS}
    start = total_variation(initial, optimal_policy(rewards, entropy_weight=alpha)).item()
    return {"form": form, "alpha": alpha, "seed": seed, "distances": distances, "initial": start}


def report_theorem(output_dir: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(output_dir.glob("*.json"))]
    print(
        "\nTotal variation between the trained policy and softmax(r / α), mean ± half of the 95 % interval over seeds\n"
    )
    rows, nearest, initial = [], [], []
    for alpha in ALPHAS:
        mine = [run for run in runs if run["alpha"] == alpha]
        cells = [show([run["distances"][str(alpha)] for run in mine if run["form"] == form], 4) for form in FORMS]
        others = [a for a in (alpha / 2, alpha * 2) if a in ALPHAS]
        nearest.append(statistics.mean(min(run["distances"][str(a)] for a in others) for run in mine))
        initial.append(statistics.mean(run["initial"] for run in mine))
        rows.append([f"{alpha:g}", *cells, f"{nearest[-1]:.2f}", f"{initial[-1]:.2f}"])
    print_table(["α", *FORMS, "to the nearer of α / 2 and 2 α", "initial model"], rows)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for form, color, marker in zip(FORMS, COLORS, "os^", strict=False):
        for i, alpha in enumerate(ALPHAS):
            values = [run["distances"][str(alpha)] for run in runs if run["alpha"] == alpha and run["form"] == form]
            axes.scatter(
                [alpha] * len(values), values, color=color, marker=marker, s=24, label=form if i == 0 else None
            )
    for values, style, label in ((nearest, "--", "policies of α / 2 and 2 α"), (initial, ":", "initial model")):
        axes.plot(ALPHAS, values, style, color="gray", label=label)
    axes.set(xscale="log", yscale="log", xlabel="α", ylabel="total variation to softmax(r / α)")
    axes.set_xticks(ALPHAS, [f"{alpha:g}" for alpha in ALPHAS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", ncols=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(output_dir / "theorem.png", dpi=150)
    print(f"saved {output_dir / 'theorem.png'}")


# --------------------------------------------------------------------------------------------------------- frontier


def make_world(seed: int) -> tuple[EnumerableWorld, torch.Tensor]:
    world = EnumerableWorld(num_words=5, max_tokens=4, num_prompts=1)
    return world, world.rewards(seed=seed, scale=1.0)


def frontier(config: dict, seed: int, steps: int) -> dict:
    from trl import RewardTrainer
    from trl.data_utils import unpair_preference_dataset

    from trl_spo.synthetic.training import METHODS, _import, config_class

    config = dict(config)
    method = config.pop("method")
    world, rewards = make_world(seed)
    with tempfile.TemporaryDirectory() as folder:
        reference = world.save(world.model(seed=seed, scale=0.5), Path(folder) / "reference")
        model = world.load(reference)
        with torch.no_grad():
            ref_logps = world.log_probs(model)[0].double().log_softmax(0)
        pairs = world.preference_pairs(rewards, NUM_PAIRS, proposal=ref_logps.exp(), seed=seed)
        fixed = METHODS[method][2]
        options = {
            **COMMON,
            "max_steps": steps,
            "learning_rate": 3e-3,
            "seed": seed,
            "output_dir": folder,
            **fixed,
            **config,
        }
        kwargs = {"train_dataset": pairs, "processing_class": world.tokenizer, "callbacks": [AverageWeights()]}
        if method == "kto":
            kwargs["train_dataset"] = unpair_preference_dataset(pairs)
        if method == "soft_po":
            options |= {"max_completion_length": world.max_tokens, "online_samples_per_step": 32}
        if method == "sspo":
            options |= {"extractor": "random"}  # the words mean nothing
        if method == "rloo":
            # Its own weights: those of the reference end each text alike, and a reward model reads there
            set_seed(seed)
            size = AutoConfig.from_pretrained(reference, num_labels=1)
            reward_trainer = RewardTrainer(
                AutoModelForSequenceClassification.from_config(size),
                args=config_class("reward")(
                    **COMMON, max_steps=2 * steps, learning_rate=3e-3, seed=seed, output_dir=folder
                ),
                train_dataset=pairs,
                processing_class=world.tokenizer,
            )
            fit(reward_trainer)

            @torch.no_grad()
            def reward(prompts, completions, **_):
                eos = world.tokenizer.eos_token
                texts = [p + c.removesuffix(f" {eos}") + f" {eos}" for p, c in zip(prompts, completions, strict=True)]
                inputs = world.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
                inputs.pop("token_type_ids", None)
                return reward_trainer.model(**inputs).logits[:, 0].tolist()

            # The gradient is one of samples: in as many steps as the others it has hardly begun
            options |= {
                "max_completion_length": world.max_tokens,
                "num_generations": 8,
                "max_steps": RLOO_STEPS * steps,
            }
            kwargs |= {"reward_funcs": [reward], "train_dataset": pairs.select_columns("prompt")}
        trainer = _import(METHODS[method][0])(model, args=config_class(method)(**options), **kwargs)
        fit(trainer)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        with torch.no_grad():
            logps = world.log_probs(policy)[0].double()
    # What is outside are padding and prompts, which some losses push the probability to. What is measured is the policy without them
    inside, logps = logps.exp().sum().item(), logps.log_softmax(0)
    kl, reward_of = kl_divergence(logps, ref_logps).item(), expectation(logps, rewards).item()
    best = reward_at_kl(rewards, ref_logps, kl)
    return {
        "config": {"method": method, **config},
        "seed": seed,
        "reward": reward_of,
        "kl": kl,
        "entropy": entropy(logps).item(),
        "regret": best - reward_of,
        "best": best,
        "initial": expectation(ref_logps, rewards).item(),
        "inside": inside,
    }


def reward_at_kl(rewards: torch.Tensor, ref_logps: torch.Tensor, kl: float) -> float:
    """The highest expected reward of any policy with this KL to the reference: that of π_ref exp(r / β) for the β that has it."""
    low, high = 1e-4, 1e4  # KL falls with β
    for _ in range(200):
        middle = (low * high) ** 0.5
        policy = optimal_policy(rewards, kl_weight=middle, ref_logps=ref_logps)
        low, high = (middle, high) if kl_divergence(policy, ref_logps).item() > kl else (low, middle)
    return expectation(optimal_policy(rewards, kl_weight=high, ref_logps=ref_logps), rewards).item()


def report_frontier(output_dir: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(output_dir.glob("*.json"))]
    print(
        f"\n{NUM_PAIRS} pairs; mean ± half of the 95 % interval over seeds, each with its own rewards, reference and pairs\n"
    )
    rows, columns = [], ("reward", "kl", "entropy", "inside", "best", "regret")
    for config in GRID:
        group = [run for run in runs if run["config"] == config]
        if group:
            name = ", ".join(f"{key} {value:g}" for key, value in config.items() if key != "method")
            share = [run["regret"] / (run["best"] - run["initial"]) for run in group]
            cells = [show([run[column] for run in group], 3) for column in columns]
            rows.append([f"{LABELS[config['method']]} {name}", str(len(group)), *cells, show(share)])
    print_table(
        [
            "method",
            "seeds",
            "reward",
            "KL",
            "entropy",
            "probability of words",
            "best at this KL",
            "regret",
            "of the gain of the best",
        ],
        rows,
    )

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds = sorted({run["seed"] for run in runs})
    figure, panels = plt.subplots(2, len(seeds), figsize=(4.5 * len(seeds), 7.5), squeeze=False)
    temperatures = torch.logspace(-1.5, 2, 200).tolist()
    for column, seed in enumerate(seeds):
        world, rewards = make_world(seed)
        with torch.no_grad():
            ref_logps = world.log_probs(world.model(seed=seed, scale=0.5))[0].double().log_softmax(0)
        near = [optimal_policy(rewards, kl_weight=t, ref_logps=ref_logps) for t in temperatures]
        free = [optimal_policy(rewards, entropy_weight=t) for t in temperatures]
        curves = (
            (
                "kl",
                "KL to the reference (nats)",
                [(kl_divergence(p, ref_logps).item(), expectation(p, rewards).item()) for p in near],
            ),
            ("entropy", "entropy (nats)", [(entropy(p).item(), expectation(p, rewards).item()) for p in free]),
        )
        for axes, (x, label, curve) in zip(panels[:, column], curves, strict=True):
            axes.plot(*zip(*curve, strict=True), color="gray", label="the best possible", zorder=1)
            for (method, name), color, marker in zip(LABELS.items(), COLORS, "osv^DPX", strict=True):
                points = [run for run in runs if run["seed"] == seed and run["config"]["method"] == method]
                axes.scatter(
                    [p[x] for p in points],
                    [p["reward"] for p in points],
                    color=color,
                    marker=marker,
                    s=26,
                    label=name,
                    zorder=2,
                )
            start = 0.0 if x == "kl" else entropy(ref_logps).item()
            axes.scatter(
                [start],
                [expectation(ref_logps, rewards).item()],
                marker="*",
                s=90,
                color="black",
                label="reference",
                zorder=3,
            )
            axes.set(xlabel=label, ylabel="expected reward", title=f"seed {seed}")
            if x == "kl":
                axes.set_xlim(-0.1, 1.15 * max(run["kl"] for run in runs if run["seed"] == seed))
            axes.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower center", ncols=9, fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(output_dir / "exact_frontier.png", dpi=150)
    print(f"saved {output_dir / 'exact_frontier.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["theorem", "frontier"])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of each training of `frontier`")
    parser.add_argument("--methods", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--report", action="store_true", help="train nothing, print the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster for models of this size
    logging.set_verbosity_error()
    disable_progress_bars()
    warnings.filterwarnings("ignore")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    if args.experiment == "theorem":
        jobs = [
            (f"{form},{alpha:g},{seed}", lambda f=form, a=alpha, s=seed: theorem(f, a, s))
            for seed in args.seeds
            for form in FORMS
            for alpha in ALPHAS
        ]
    else:
        jobs = [
            (
                ",".join(str(value) for value in config.values()) + f",{seed}",
                lambda c=config, s=seed: frontier(c, s, args.steps),
            )
            for seed in args.seeds
            for config in GRID
            if config["method"] in args.methods
        ]
    for name, job in jobs if not args.report else ():
        path = output_dir / f"{name}.json"
        if not path.exists():
            result = job()
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(result))
            part.replace(path)
            print(
                name, {key: round(value, 4) for key, value in result.items() if isinstance(value, float)}, flush=True
            )
    (report_theorem if args.experiment == "theorem" else report_frontier)(output_dir)


if __name__ == "__main__":
    main()
