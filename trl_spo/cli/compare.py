# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
`trl-spo compare`: which method is best on one's own data. Trains each, evaluates its checkpoints, and writes a report.

    trl-spo compare compare.yaml
    trl-spo compare --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized --methods dpo ipo soft_po \\
        --seeds 0 1 2 --reward rewards.py:helpful --output_dir comparison
"""

from __future__ import annotations

import argparse
import shlex
import sys


_OPTIONS = ("model", "dataset", "methods", "seeds", "reward", "output_dir", "accelerate_config", "num_processes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="YAML file of options, see docs/compare.md; those below win")
    parser.add_argument(
        "--model", help="model to start from, which is the reference, too: a path or a name on the Hub"
    )
    parser.add_argument("--dataset", help="preference dataset: a name on the Hub, a folder or a file")
    parser.add_argument(
        "--methods",
        nargs="+",
        help="only these of the file's methods, or others with the grids that they have by themselves: dpo ipo kto soft_po stable_po sspo "
        "sspo_kto rloo grpo",
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds of the trainings")
    parser.add_argument("--reward", help="reward function: package.module:function or file.py:function")
    parser.add_argument("--output_dir", help="folder of the trainings and of the report")
    parser.add_argument("--accelerate_config", help="a packaged config, such as zero3, or a path")
    parser.add_argument("--num_processes", type=int, help="processes of each training; by default all devices")


def run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    errors: tuple[type[Exception], ...] = ()
    try:
        from ..comparison import Comparison, ComparisonConfig
        from ..synthetic.synthesis_config import from_dict

        if args.config is not None:
            config = ComparisonConfig.from_yaml(args.config, **given)
        else:
            config = from_dict(ComparisonConfig, given, "")
        comparison = Comparison(config, command=_command())
        if comparison.critics:
            from ..synthetic.endpoint import EndpointError, SpendingLimitError

            errors = (EndpointError, SpendingLimitError)
        comparison.prepare()
    except (ValueError, ImportError, OSError, *errors) as error:
        print(f"trl-spo compare: {error}", file=sys.stderr)
        return 2
    try:
        summary = comparison.run()
    except errors as error:  # before anything is trained: later, they are in the report
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from there.", file=sys.stderr)
        return 130
    print(f"\n{summary['recommendation']['headline']}")
    for reason in summary["recommendation"]["reasons"]:
        print(f"- {reason}")
    for warning in summary["recommendation"]["warnings"]:
        print(f"! {warning}")
    print(f"The report: {comparison.folder / 'report.html'}")
    return int(any(run["status"] != "done" for run in summary["runs"]))


def _command() -> str:
    return shlex.join(["trl-spo", "compare", *sys.argv[2:]])
