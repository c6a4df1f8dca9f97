# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Two trainings of your own beside their reference: win rate, KL, diversity, what became of held-out pairs, and what was lost.

`trl-spo compare` trains the policies, too, and writes a report (examples/compare.yaml). This script is for policies that are there already, from
whatever training. The reward here counts words, so that it runs as it is: put your own in its place, or critics of `trl_spo.synthetic`.

    python examples/compare.py --reference Qwen/Qwen2.5-0.5B-Instruct --policies Qwen2.5-0.5B-DPO Qwen2.5-0.5B-SoftPO \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir evaluation
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from trl import extract_prompt

from trl_spo.evaluation import Capability, Evaluation, crossed_difference, export_alpaca_eval
from trl_spo.synthetic.files import Rows


SHOWN = ("reward", "win_rate", "kl", "entropy", "length", "distinct_2", "chosen_change", "preference_accuracy")


def brevity(prompts, completions, **columns):
    """A reward function, as GRPOTrainer takes it: at most 50 words."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [-max(0, len(text.split()) - 50) / 50 for text in texts]


def text_of(response):
    return response if isinstance(response, str) else response[0]["content"]


def show(estimate):
    if estimate["interval"] is None:
        return f"{estimate['value']:.3g}"
    low, high = estimate["interval"]
    return f"{estimate['value']:.3g} [{low:.3g}, {high:.3g}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="the model that the policies were trained from")
    parser.add_argument("--policies", required=True, nargs="+", help="paths or names")
    parser.add_argument("--dataset_name", required=True, help="preference pairs")
    parser.add_argument("--split", default="test")
    parser.add_argument("--num_prompts", type=int, default=256)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--output_dir", default="evaluation")
    args = parser.parse_args()

    pairs = load_dataset(args.dataset_name, split=args.split)
    if "prompt" not in pairs.column_names:
        pairs = pairs.map(extract_prompt)
    pairs = pairs.shuffle(seed=0).select(range(min(args.num_prompts, len(pairs))))
    evaluation = Evaluation(
        folder=args.output_dir,
        reference=args.reference,
        prompts=pairs.select_columns("prompt"),
        reward=brevity,
        pairs=[(row["prompt"], text_of(row["chosen"]), text_of(row["rejected"])) for row in pairs],
        capabilities=[Capability(name="chosen responses", texts=[text_of(row["chosen"]) for row in pairs])],
        max_new_tokens=args.max_new_tokens,
    )

    found = {}
    for policy in args.policies:
        name = policy.strip("/").replace("/", "--")  # the last part alone may be "model" in all of them
        found[name] = evaluation.evaluate(policy, name)
        print(name)
        for metric in SHOWN:
            print(f"  {metric:20} {show(found[name]['metrics'][metric])}")
        for capability in found[name]["capabilities"]:
            before, after = show(capability["before"]), show(capability["after"])
            print(
                f"  {capability['name']}: {capability['metric']} {before} before, {after} after: {capability['verdict']}"
            )
        samples = Rows(Path(args.output_dir) / name / "samples.jsonl")
        export_alpaca_eval(samples, Path(args.output_dir) / f"{name}-alpaca_eval.json", generator=name)

    if len(found) == 2:  # prompt by prompt, which sees smaller differences than two intervals side by side
        import numpy as np

        first, second = (np.array([result["units"]["reward"]]) for result in found.values())
        difference = crossed_difference(first, second)
        print(f"{' over '.join(found)}: reward {show(difference)}, p = {difference['p_value']:.3g}")


if __name__ == "__main__":
    main()
