# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""The part of `trl-spo demo` on synthetic preferences: one small round on the stories, by critics whose mistakes are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl_spo.sandbox import StoriesWorld


# Name -> options of StoryCritic
CRITICS: dict[str, dict[str, Any]] = {
    "wrong in 15 %": {"error_rate": 0.15},
    "wrong in 25 %": {"error_rate": 0.25},
    "wrong in 35 %": {"error_rate": 0.35},
    "always the first shown": {"character": "first"},
    "always the longer": {"character": "longer"},
}
NUM_PROMPTS, NUM_RESPONSES, NUM_CHECKED = 160, 4, 100


def make_dataset(world: StoriesWorld, folder: Path, seed: int) -> dict[str, Any]:
    """
    Runs all stages in a folder: the student writes, the critics judge.

    Returns:
        `dict[str, Any]`: the reports of the stages, and `right`, the share of the kept pairs whose chosen story has the higher true
        reward.
    """
    from trl_spo.sandbox import reward
    from trl_spo.synthetic import Synthesis, SynthesisConfig
    from trl_spo.synthetic.files import Rows
    from trl_spo.synthetic.synthesis_config import from_dict

    def write(name: str, rows: list[dict[str, Any]]) -> dict[str, str]:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {"path": "json", "data_files": str(folder / name), "split": "train"}

    def true_reward(row: dict[str, Any], name: str) -> float:
        return reward(row["prompt"] + row[name])

    people = []  # who know the true reward
    for row in world.pairs("eval").select(range(NUM_CHECKED)):
        names = sorted(("chosen", "rejected"), key=lambda name, row=row: -true_reward(row, name))
        people.append({"prompt": row["prompt"], "chosen": row[names[0]], "rejected": row[names[1]]})
    student = {"type": "transformers", "model": str(world.folder), "batch_size": 32}
    config = {
        "output_dir": str(folder / "run"),
        "prompts": {
            "dataset": write("prompts.jsonl", [{"prompt": prompt} for prompt in world.train_prompts[:NUM_PROMPTS]]),
            "near_duplicates": None,  # a grammar's prompts are all alike
        },
        "candidates": {
            "student": {**student, "max_new_tokens": world.config.max_tokens},
            "num_responses": NUM_RESPONSES,
            "temperatures": [1.0],
        },
        "judge": {
            "critics": [
                {"type": "trl_spo.sandbox.story_critic:StoryCritic", "name": name, **options}
                for name, options in CRITICS.items()
            ]
        },
        "check": {"dataset": write("people.jsonl", people)},
        "pairs": {"filters": {"min_confidence": 0.3}},
        "seed": seed,
    }
    synthesis = Synthesis(from_dict(SynthesisConfig, config, ""))
    synthesis.run()
    kept = list(Rows(synthesis.folder / "kept.jsonl"))
    right = sum(true_reward(row, "chosen") > true_reward(row, "rejected") for row in kept) / len(kept)
    return {**{stage: record["report"] for stage, record in synthesis.records.items()}, "right": right}


def print_jury(reports: dict[str, Any]) -> None:
    """What the human check set and the agreement report say of the critics, and of the pairs that came out."""
    check, judge, pairs = reports["check"], reports["judge"], reports["pairs"]
    print(f"   {'':26}{'right':>15}{'kappa':>15}{'flips':>15}{'votes':>15}")

    def line(name: str, found: dict[str, Any], flips: str = "", votes: str = "") -> None:
        agreement, kappa = found["agreement"]["value"], found["kappa"]["value"]
        shown = "-" if kappa is None else f"{kappa:.2f}"
        print(f"   {name:26}{100 * agreement:>13.0f} %{shown:>15}{flips:>15}{votes:>15}")

    for name, found in check["critics"].items():
        of_critic = judge["critics"][name]
        rate = of_critic["flip_rate"]["rate"]
        line(name, found, "-" if rate is None else f"{100 * rate:.0f} %", str(of_critic["votes"]))
    line("the jury", check["jury"])
    line("the longer story wins", check["longer"])
    dropped = ", ".join(f"{number} {reason}" for reason, number in pairs["dropped"].items())
    print(
        f"""
   right, kappa: on {NUM_CHECKED} pairs labelled by the true reward, which stand for the human check set; undecided pairs count half.
   flips: share of the pairs in which the critic names another winner when it sees them in the other order; then it has no vote.
   {pairs["kept"]} pairs are kept ({dropped} dropped); in {100 * reports["right"]:.0f} % of them the chosen story has the higher true reward."""
    )
