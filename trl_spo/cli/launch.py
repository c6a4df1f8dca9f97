# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
Starts a training subcommand under `accelerate launch`, as `trl dpo` does.

The options of the trainer's parser go to the training; all others must be options of `accelerate launch`, or
`--accelerate_config`, which takes the name of one of the files in `trl_spo/accelerate_configs` or a path. Both kinds may
come from the command line and from the YAML file of `--config`.
"""

import argparse
import difflib
import os
import subprocess
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import yaml


def accelerate_config_path(name: str) -> str:
    """
    Return the path of an accelerate config: `name` is that path, or the name of a packaged one without `.yaml`.
    """
    if Path(name).is_file():
        return name
    folder = files("trl_spo").joinpath("accelerate_configs")
    path = folder.joinpath(f"{name}.yaml")
    if not path.is_file():
        packaged = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
        raise ValueError(
            f"`--accelerate_config {name}` is neither a file nor a packaged config. Pass a path, or one of: "
            f"{', '.join(packaged)}."
        )
    return str(path)


def split_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[list[str], list[str]]:
    """
    Split a command line into what goes to `accelerate launch` and what goes to the training.

    Args:
        parser (`trl.TrlParser`):
            Parser of the training. The values of the YAML file become its defaults.
        arguments (`list[str]`):
            The command line.

    Returns:
        `tuple[list[str], list[str]]`:
            The arguments of `accelerate launch`, those of the file first so that the command line overrides them, and
            the arguments of the training, `--config` included.
    """
    known, from_file = list(arguments), []
    if "--config" in known:
        index = known.index("--config")
        if index + 1 == len(known):
            parser.error("argument --config: expected one argument")
        with open(known[index + 1], encoding="utf-8") as file:
            config = yaml.safe_load(file)
        if not isinstance(config, dict):
            parser.error(f"argument --config: {known[index + 1]} must contain a YAML mapping")
        del known[index : index + 2]
        # Set here too, since some variables are read before the training parses the file.
        os.environ.update({key: str(value) for key, value in (config.pop("env", None) or {}).items()})
        # `multi_gpu: true` is the bare flag `--multi_gpu`
        from_file = [argument for argument in parser.set_defaults_with_config(**config) if argument != "True"]

    # argparse only, and no dataclasses: a config object sets up devices, which is the business of the processes to come.
    _, rest = parser.parse_known_args(known)
    remaining = list(rest)  # an ordered subsequence of the command line
    training_arguments = []
    for argument in arguments:
        if remaining and argument == remaining[0]:
            remaining.pop(0)
        else:
            training_arguments.append(argument)
    return from_file + rest, training_arguments


def launch(command: str, arguments: list[str]) -> int:
    """
    Run a training subcommand through `accelerate launch`.

    Args:
        command (`str`):
            Subcommand, e.g. `"soft-po"`.
        arguments (`list[str]`):
            Its command line.

    Returns:
        `int`:
            Exit status.
    """
    module = f"{__package__}.{command.replace('-', '_')}"
    parser = import_module(module).make_parser(prog=f"trl-spo {command}")
    launch_arguments, training_arguments = split_arguments(parser, arguments)

    import torch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser

    config_parser = argparse.ArgumentParser(prog=parser.prog, usage=argparse.SUPPRESS, allow_abbrev=False)
    config_parser.add_argument("--accelerate_config")
    config, launch_arguments = config_parser.parse_known_args(launch_arguments)

    launch_parser = launch_command_parser()
    options = {option for action in launch_parser._actions for option in action.option_strings}
    for argument in launch_arguments:
        option = argument.split("=", 1)[0]
        if option.startswith("--") and option not in options:
            options |= {option for action in parser._actions for option in action.option_strings}
            close = difflib.get_close_matches(option, [*options, "--accelerate_config"], n=1)
            hint = f"did you mean {close[0]}?" if close else f"see `trl-spo {command} --help`"
            config_parser.error(f"{option} is an option neither of the training nor of `accelerate launch`: {hint}")

    if config.accelerate_config is not None:
        try:
            path = accelerate_config_path(config.accelerate_config)
        except ValueError as error:
            config_parser.error(str(error))
        launch_arguments = ["--config_file", path, *launch_arguments]
        # The packaged configs leave the number of processes open: all devices, unless the command line says otherwise.
        if load_config_from_file(path).num_processes == -1:
            launch_arguments = ["--num_processes", str(max(torch.cuda.device_count(), 1)), *launch_arguments]

    try:
        launch_command(launch_parser.parse_args([*launch_arguments, "--module", module, *training_arguments]))
    except subprocess.CalledProcessError as error:  # the process has shown its own traceback
        return error.returncode
    return 0
