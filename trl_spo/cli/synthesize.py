# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
`trl-spo synthesize`: from prompts to a preference dataset, by a jury of critics; with `rounds` in the config, to the next students, too.

    trl-spo synthesize examples/synthetic.yaml
    trl-spo synthesize examples/synthetic.yaml judge pairs dataset
"""

import argparse
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, see docs/synthetic.md")
    parser.add_argument(
        "stages",
        nargs="*",
        help="prompts, check, candidates, judge, pairs, dataset, reward_model: only these, and again if they are done (default: all that "
        "are not)",
    )


def run(args: argparse.Namespace) -> int:
    from trl_spo.synthetic import (
        EndpointError,
        HumanCheckError,
        Rounds,
        SpendingLimitError,
        Synthesis,
        SynthesisConfig,
        TrainingError,
    )

    config = SynthesisConfig.from_yaml(args.config)
    if config.rounds is not None and args.stages:
        raise ValueError(f"The config has `rounds`, which run all stages. Leave out {args.stages}.")
    made = (Synthesis if config.rounds is None else Rounds)(config)
    try:
        result = made.run(args.stages or None) if config.rounds is None else made.run()
    except KeyboardInterrupt:
        print(
            f"\nStopped. {made.budget.spent:.4g} are spent. All answers that came are kept in '{config.output_dir}': the same command "
            "goes on from there.",
            file=sys.stderr,
        )
        return 130
    except (EndpointError, HumanCheckError, SpendingLimitError, TrainingError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if config.rounds is None:
        print(result)
    else:
        _print_rounds(result)
    return 0


def _print_rounds(report: dict[str, Any]) -> None:
    from tabulate import tabulate

    def percent(found: dict[str, Any] | None) -> str:
        return "-" if found is None or found["rate"] is None else f"{found['rate']:.1%}"

    rows = []
    for number, evaluation in enumerate(report["rounds"]):
        diversity = evaluation["diversity"]
        rows.append(
            {
                "round": f"{number}{' *' if number == report['best']['round'] else ''}",
                "preferred to the first": percent(evaluation["win_rate"]),
                "right on the human set": percent(evaluation["human"]),
                "right on the jury's pairs": percent(evaluation["jury"]),
                **{name: f"{value:.4g}" for name, value in evaluation.get("capabilities", {}).items()},
                **{name: f"{diversity[name]:.3g}" if diversity[name] is not None else "-" for name in diversity},
            }
        )
    print(tabulate(rows, headers="keys", tablefmt="github"))
    print(f"* the best student: {report['best']['model']}\n{report['stopped']}")
