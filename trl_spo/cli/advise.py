# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
`trl-spo advise`: which method fits a dataset, and what will go wrong. Takes the command line of a training as well:
put `advise --method soft-po` in the place of `soft-po`.

    trl-spo advise --dataset_name DATASET
    trl-spo advise --method soft-po --config recipe.yaml --accelerate_config zero3 --num_processes 8 --gpu h100
"""

import argparse
import json
import sys
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import TrlParser

    from trl_spo.advisor import Finding


# Options of the training that are read here whatever the method is, with the help that `--help` shows
_SHARED = {
    "dataset_name": "dataset on the Hub, folder or file, as of the training commands",
    "dataset_config": "its configuration",
    "dataset_train_split": "split to train on (default: train)",
    "dataset_test_split": "split to evaluate on (default: test, if there is one)",
    "model_name_or_path": "model to be trained: tokens are counted with its tokenizer, memory and time estimated",
}
# What scripts and mixtures of datasets have besides
_NOT_OF_THE_METHOD = {
    *_SHARED,
    "dataset_streaming",
    "ignore_bias_buffers",
    "datasets",
    "streaming",
    "test_split_size",
    "sft_dataset_name",
    "sft_dataset_train_split",
}
_DEFAULTS = {"dataset_train_split": "train", "dataset_test_split": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s --dataset_name NAME [options] [options of the training]"
    parser.epilog = (
        "All options of the training (--beta, --max_length, --use_peft, ...) are taken, too, of the method or, without one, of DPO. Exit status: 0, or 1 if there "
        "is an error among the findings (with --strict, a warning), or 2 if it was called wrongly."
    )
    for name, text in _SHARED.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--dataset_streaming", action="store_true", help="do not download it; needs --max_examples")
    parser.add_argument("--ref_model", help="the reference, if it is not the model itself")
    parser.add_argument(
        "--method", help="dpo, ipo, kto, soft-po, stable-po, sspo or sspo-kto (default: the one that fits best)"
    )
    parser.add_argument("--config", help="YAML file of the training; what the command line says comes first")
    parser.add_argument("--accelerate_config", help="packaged accelerate config, such as zero3, or a path")
    parser.add_argument("--num_processes", type=int, help="processes (default: those of the accelerate config, or 1)")
    parser.add_argument(
        "--gpu", help="GPU of each process, such as h100, or its memory, such as 48GB (default: this machine's)"
    )
    parser.add_argument("--large_budget", action="store_true", help="there are a large budget and experience with RL")
    parser.add_argument(
        "--max_examples",
        type=int,
        help="rows of each split that are looked at, from which all are estimated (default: all)",
    )
    parser.add_argument(
        "--near_duplicates",
        type=float,
        help="similarity of nearly equal prompts, 0.1 to 1 (default: 0.8, where it takes seconds)",
    )
    parser.add_argument(
        "--reference_prompts",
        type=int,
        default=64,
        help="prompts that the reference is asked with, at least 8, or 0 for none (default: 64)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--strict", action="store_true", help="warnings, too, make the exit status 1")


def training_parser(method: str) -> "TrlParser":
    """The parser of a method's training command."""
    if method in ("dpo", "ipo", "kto"):
        from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

        from trl_spo.advisor.plan import config_class

        return TrlParser(
            (ScriptArguments, config_class(method), ModelConfig, DatasetMixtureConfig), prog="trl-spo advise"
        )
    return import_module(f".{method}", __package__).make_parser(prog="trl-spo advise")


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """
    Parses the options above, and what is left by the parser of the training.

    Args:
        parser (`argparse.ArgumentParser`):
            That of [`add_arguments`].
        arguments (`list[str]`):
            The command line.

    Returns:
        `argparse.Namespace`: the options, and `options`: those of the training that differ from its defaults.
    """
    from trl_spo.advisor.plan import method_name

    args, rest = parser.parse_known_args(arguments)
    args.options = {}
    if args.method is not None:
        try:
            args.method = method_name(args.method)
        except ValueError as error:
            parser.error(str(error))
    if rest or args.config is not None:
        _parse_training(parser, args, rest)
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dataset_name is None and not args.options.get("datasets"):
        parser.error("the following arguments are required: --dataset_name")
    return args


def _parse_training(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    from .launch import split_arguments

    training = training_parser(args.method or "dpo")
    defaults = {action.dest: action.default for action in training._actions}
    of_file = [] if args.config is None else ["--config", args.config]
    try:
        launch_arguments, training_arguments = split_arguments(training, [*of_file, *rest])
    except (OSError, ValueError) as error:
        parser.error(f"argument --config: {error}")
    found = vars(training.parse_args(training_arguments[len(of_file) :]))
    launch = argparse.ArgumentParser(prog=parser.prog, usage=argparse.SUPPRESS, allow_abbrev=False)
    launch.add_argument("--accelerate_config")
    launch.add_argument("--num_processes", type=int)
    of_launch, unknown = launch.parse_known_args(launch_arguments)
    _refuse_unknown(parser, training, unknown, args.method)
    for name in ("accelerate_config", "num_processes"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(of_launch, name))
    for name in _SHARED:
        if getattr(args, name) is None and found[name] != defaults[name]:
            setattr(args, name, found[name])
    args.dataset_streaming |= bool(found["dataset_streaming"])
    args.options = {name: value for name, value in found.items() if value != defaults[name]}


def _refuse_unknown(
    parser: argparse.ArgumentParser, training: "TrlParser", unknown: list[str], method: str | None
) -> None:
    """Errors for what neither the training nor `accelerate launch` knows."""
    given = [argument.split("=", 1)[0] for argument in unknown if argument.startswith("--")]
    if not given and not unknown:
        return
    from accelerate.commands.launch import launch_command_parser

    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    for option in given:
        if option not in known:
            ours = {
                option for one in (parser, training) for action in one._actions for option in action.option_strings
            }
            close = get_close_matches(option, sorted(ours), n=1)
            hint = f"did you mean {close[0]}?" if close else "see `trl-spo advise --help`"
            of_method = (
                f"of {method.replace('_', '-')}" if method else "of DPO, whose options are taken without `--method`"
            )
            parser.error(
                f"{option} is an option neither of advise, nor {of_method}, nor of `accelerate launch`: {hint}"
            )
    if not given:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def _load(args: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    """The two splits, and the names of the others."""
    from types import SimpleNamespace

    from .training import load_dataset

    mixture = None
    if args.options.get("datasets"):
        from trl import DatasetMixtureConfig

        names = ("datasets", "streaming", "test_split_size")
        mixture = DatasetMixtureConfig(**{name: args.options[name] for name in names if name in args.options})
    names = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming")
    try:
        dataset = load_dataset(SimpleNamespace(**{name: getattr(args, name) for name in names}), mixture)
    except StopIteration as error:  # of `datasets`, for a file without a line
        raise ValueError(f"`dataset_name` is {args.dataset_name!r}, which is empty.") from error
    train, test = args.dataset_train_split, args.dataset_test_split
    if train not in dataset:
        raise ValueError(
            f"`dataset_train_split` is {train!r}, but the dataset has only: {', '.join(dataset)}. Pass `--dataset_train_split` with one of them."
        )
    if test not in dataset and test != _DEFAULTS["dataset_test_split"]:
        raise ValueError(
            f"`dataset_test_split` is {test!r}, but the dataset has only: {', '.join(dataset)}. Pass `--dataset_test_split` with one of them, or leave it out."
        )
    others = [name for name in dataset if name not in (train, test)]
    return dataset[train], dataset[test] if test in dataset and test != train else None, others


def run(args: argparse.Namespace) -> int:
    import logging

    from datasets.exceptions import DatasetsError
    from rich.console import Console

    from trl_spo.advisor import UsageError, advise, print_advice

    # Of a tokenizer that counts what is longer than the model's context, which is said in the findings
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        dataset, eval_dataset, others = _load(args)
    except (ValueError, FileNotFoundError, DatasetsError) as error:
        return _refuse(error)
    try:
        advice = advise(
            dataset,
            eval_dataset,
            model=args.model_name_or_path,
            ref_model=args.ref_model,
            method=args.method,
            options={name: value for name, value in args.options.items() if name not in _NOT_OF_THE_METHOD},
            accelerate_config=args.accelerate_config,
            num_processes=args.num_processes,
            gpu=args.gpu,
            large_budget=args.large_budget,
            max_examples=args.max_examples,
            near_duplicates=args.near_duplicates,
            reference_prompts=args.reference_prompts,
            seed=args.seed,
        )
    except UsageError as error:
        return _refuse(error)
    if eval_dataset is None and others:
        _name_splits(advice.findings, others)
    if args.json:
        print(json.dumps(advice.to_dict(), indent=2, ensure_ascii=False))
    else:
        print_advice(advice, Console(soft_wrap=False))
    return advice.exit_code(args.strict)


def _name_splits(findings: list["Finding"], splits: list[str]) -> None:
    """Says which splits could be evaluated on, where the one that was asked for is missing."""
    for i, finding in enumerate(findings):
        if finding.code == "no_eval_split":
            remedy = (
                f"The dataset has other splits: {', '.join(splits)}. Pass `--dataset_test_split` with one of them."
            )
            findings[i] = replace(finding, remedy=remedy, data={"splits": splits})


def _refuse(error: Exception) -> int:
    print(f"trl-spo advise: error: {error}", file=sys.stderr)
    return 2
