# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
The `trl-spo` command. One file a subcommand, imported only when that subcommand is called, so that `trl-spo --help` is quick.

    trl-spo demo
    trl-spo soft-po --config examples/soft_po.yaml
"""

import argparse
import sys
from importlib import import_module

from trl_spo import __version__


# Subcommand -> the line that `trl-spo --help` shows. A tool `name` is the module `trl_spo.cli.name`, with
# `add_arguments(parser)` and `run(args)`; a trainer `a-name` is the module `trl_spo.cli.a_name`, with `make_parser(prog)`
# and `main(...)`, and is started by `accelerate launch`.
TOOLS = {
    "advise": "say which method fits a dataset, and what will go wrong in a training on it",
    "compare": "train with several methods on your data, and say which is best for it",
    "synthesize": "make a preference dataset: a student, a jury of critics, filters",
    "demo": "align small models with DPO, SoftPO, StablePO and SSPO, on the spot, and compare them",
}
TRAINERS = {
    "soft-po": "train with SoftPOTrainer",
    "sspo": "train with SSPOTrainer",
    "sspo-kto": "train with SSPOKTOTrainer",
    "stable-po": "train with StablePOTrainer",
}


def make_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:10} {text}" for name, text in (TOOLS | TRAINERS).items())
    parser = argparse.ArgumentParser(
        prog="trl-spo",
        usage="trl-spo [-h] [--version] command ...",
        description="The SPO family of preference-optimization methods for TRL.",
        epilog=f"commands:\n{commands}\n\ntrl-spo command --help lists the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl-spo {__version__}")
    parser.add_argument("command", choices=[*TOOLS, *TRAINERS], metavar="command", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name) and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    # What follows the command belongs to it, so only the first argument is parsed here.
    command, arguments = parser.parse_args(argv[:1]).command, argv[1:]

    if command in TRAINERS:
        from .launch import launch

        return launch(command, arguments)

    module = import_module(f".{command.replace('-', '_')}", __package__)
    parser = argparse.ArgumentParser(prog=f"trl-spo {command}", description=TOOLS[command], allow_abbrev=False)
    module.add_arguments(parser)
    # One that takes the options of a training as well has a way of its own to parse them
    args = (
        module.parse_arguments(parser, arguments)
        if hasattr(module, "parse_arguments")
        else parser.parse_args(arguments)
    )
    return module.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
