# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Rounds of synthetic preferences on the sandbox's stories, whose true reward is known: does it rise?

A tiny language model writes stories; a jury of three critics, each of which is wrong about a given share of pairs, compares them by
the true reward; the model is trained on what the jury says, and writes anew. Nobody but the last table sees the true reward. Run for
several seeds, and with a jury that rewards length only, which the human check set (here: pairs labelled by the true reward) stops.

    python examples/benchmarks/rounds.py --seeds 0 1 2
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from trl_spo.sandbox.stories import StoriesConfig, StoriesWorld, reward
from trl_spo.synthetic import SynthesisConfig
from trl_spo.synthetic.check_set import HumanCheckError
from trl_spo.synthetic.files import Rows
from trl_spo.synthetic.rounds import Rounds
from trl_spo.synthetic.synthesis_config import from_dict


def by_true_reward(row: dict[str, str]) -> dict[str, str] | None:
    """A pair with the label that it has by the true reward, if that tells its stories apart."""
    chosen, rejected = (reward(row["prompt"] + row[name]) for name in ("chosen", "rejected"))
    if chosen == rejected:
        return None
    return row if chosen > rejected else {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def make_config(
    world: StoriesWorld, folder: Path, args: argparse.Namespace, seed: int, by_length: bool
) -> SynthesisConfig:
    prompts, human = folder / "prompts.jsonl", folder / "human.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in world.train_prompts))
    pairs = filter(None, map(by_true_reward, world.pairs("eval")))
    human.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    kind = "trl_spo.sandbox.story_critic:StoryCritic"
    critics = [{"type": kind, "name": f"critic {i}", "error_rate": args.error_rate} for i in range(3)]
    if by_length:
        critics = [{"type": kind, "name": "longer", "character": "longer"}]
    return from_dict(
        SynthesisConfig,
        {
            "output_dir": str(folder / "run"),
            "prompts": {
                "dataset": {"path": "json", "data_files": str(prompts), "split": "train"},
                "near_duplicates": None,
            },
            "candidates": {
                "student": {
                    "type": "transformers",
                    "model": str(world.folder),
                    "max_new_tokens": args.max_tokens,
                    "batch_size": 64,
                },
                "num_responses": 4,
                "temperatures": [1.0],
            },
            "judge": {"critics": critics},
            "check": {"dataset": {"path": "json", "data_files": str(human), "split": "train"}},
            "dataset": {"test_share": 0.2},
            "rounds": {
                "num_rounds": args.num_rounds,
                "reference": args.reference,
                "training": {
                    "method": args.method,
                    "options": {
                        "use_cpu": True,
                        "bf16": False,
                        "learning_rate": args.learning_rate,
                        "per_device_train_batch_size": 16,
                        "num_train_epochs": args.epochs,
                        "report_to": "none",
                        "save_strategy": "no",
                        "seed": seed,
                        **json.loads(args.options),
                    },
                    "num_processes": 1,
                },
                "num_evaluation_prompts": 64,
                "batch_size": 64,
            },
            "seed": 42 + 1000 * seed,
        },
        "",
    )


def true_rewards(folder: Path, num_rounds: int) -> list[float]:
    """Mean true reward of the students' stories to the prompts of the evaluation."""
    means = []
    for i in range(num_rounds + 1):
        path = folder / "run" / f"round-{i}" / "evaluation.jsonl"
        if path.is_file():
            means.append(
                statistics.fmean(
                    reward(row["prompt"] + response["text"]) for row in Rows(path) for response in row["responses"]
                )
            )
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_rounds", type=int, default=3)
    parser.add_argument("--num_prompts", type=int, default=256)
    parser.add_argument("--max_tokens", type=int, default=80)
    parser.add_argument("--error_rate", type=float, default=0.2)
    parser.add_argument("--method", default="soft_po")
    parser.add_argument("--reference", default="initial", choices=["initial", "previous"])
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--options", default="{}", help="JSON, of the method's config")
    parser.add_argument("--output_dir", help="where the runs are kept, by default nowhere")
    args = parser.parse_args()

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as temporary:
        results = []
        for seed in args.seeds:
            world = StoriesWorld(
                StoriesConfig(num_train_prompts=args.num_prompts, num_eval_prompts=128, max_tokens=args.max_tokens)
            )
            folder = Path(args.output_dir or temporary) / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            report = Rounds(make_config(world, folder, args, seed, by_length=False)).run()
            results.append((report, true_rewards(folder, args.num_rounds), time.perf_counter() - start))
        print(
            f"\n{args.method}, reference: {args.reference}, three critics that are wrong in {args.error_rate:.0%} of pairs\n"
        )
        print(
            "| seed | "
            + " | ".join(f"reward, round {i}" for i in range(args.num_rounds + 1))
            + " | preferred to the first | right on the human set | distinct-2 | best | seconds |"
        )
        print("| --- |" + " ---: |" * (args.num_rounds + 6))
        for seed, (report, rewards, seconds) in zip(args.seeds, results, strict=True):
            rounds = report["rounds"]
            cells = [f"{r:+.2f}" for r in rewards] + ["-"] * (args.num_rounds + 1 - len(rewards))
            cells.append(" ".join(f"{e['win_rate']['rate']:.2f}" for e in rounds))
            cells.append(" ".join(f"{e['human']['rate']:.2f}" for e in rounds))
            cells.append(" ".join(f"{e['diversity']['distinct_2']:.2f}" for e in rounds))
            cells += [str(report["best"]["round"]), f"{seconds:.0f}"]
            print(f"| {seed} | " + " | ".join(cells) + " |")
            print(f"<!-- {report['stopped']} -->")
        folder = Path(args.output_dir or temporary) / "length"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            Rounds(make_config(world, folder, args, 0, by_length=True)).run()
            print("\nA jury that rewards length was not stopped.")
        except HumanCheckError as error:
            print(f"\nA jury that rewards length was stopped: {error}")


if __name__ == "__main__":
    main()
