# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Runs the commands of the documentation in this process, since to import everything takes longer than most of them.

What is not run as it stands:

- `accelerate launch`, and `trl-spo` of a trainer, which calls it: its own parser reads and checks the options and the config file. Then
  the script runs in this process and not in as many as were asked for, which `tests/distributed` does.
- What `NOT_RUN` and `MEASURED` have at the end of this file, with the reason of each and the function that says what is checked instead.
"""

import argparse
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from blocks import ROOT


class Parsed(BaseException):
    """A script has parsed its arguments, and is not to do more."""


def split_commands(text: str) -> list[list[str]]:
    """The words of each command of a block, assignments in front of it included."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        special = [word for word in words if re.fullmatch(r"[();<>|&]+", word)]
        if special or "$(" in line or "`" in line:
            raise ValueError(f"This test does not know the shell's {special or 'substitution'}: {line}")
        if words:
            commands.append(words)
    return commands


class Shell:
    """
    The commands of a page, with its working directory and variables.

    Args:
        placeholders (`dict[str, str]`):
            What the reader puts in the place of a word.
        not_run (`Checks`):
            First words of commands that are not run, the reason, and what is checked instead.
    """

    def __init__(self, placeholders: dict[str, str], not_run: "Checks"):
        self.placeholders, self.not_run = placeholders, not_run
        self.variables: dict[str, str] = {}

    def run(self, text: str) -> list[str]:
        """Runs a block, and says of each command that was not run as it stands what was checked instead."""
        notes = []
        for words in split_commands(text):
            environment = {}
            while words and (found := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0])):
                environment[found[1]] = found[2]
                words = words[1:]
            if not words:
                self.variables |= environment
                continue
            words = [re.sub(r"\$(\w+)", lambda found: self.variables[found[1]], word) for word in words]
            words = [self.placeholders.get(word, word) for word in words]
            before = dict(os.environ)
            os.environ.update(environment)
            try:
                note = self.command(words)
            finally:
                if words[0] != "export":
                    os.environ.clear()
                    os.environ.update(before)
            if note:
                notes.append(f"{shlex.join(words)}: {note}")
        return notes

    def command(self, words: list[str]) -> str | None:
        for known, (reason, check) in self.not_run.items():
            if words[: len(known)] == list(known):
                check(words)
                return f"not run, since {reason}"
        if words[0] not in RUN and words[0] != "export":
            raise ValueError(
                f"This test does not know the command {words[0]!r}. Add it to `RUN`, or with the reason to `NOT_RUN`."
            )
        if words[0] == "export":
            return run_export(words)
        return in_a_process(lambda: RUN[words[0]](words))


def fork() -> int:
    """As `os.fork`. In a child, PyTorch makes its threads anew at the first use, and must not be asked for that by two threads at once."""
    import torch

    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
    return child


def in_a_process(function: Callable[[], str | None]) -> str | None:
    """Calls a function in a process that forks from this one, as a command has one of its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = fork()
    if child == 0:
        try:
            sender.send((function(), None))
        except BaseException:  # `SystemExit` of a parser too
            sender.send((None, traceback.format_exc()))
        finally:
            sys.stdout.flush()
            os._exit(0)
    sender.close()
    try:
        note, error = receiver.recv()
    except EOFError:
        error = "the process died"
    os.waitpid(child, 0)
    if error is not None:
        raise RuntimeError(error)
    return note


# -- commands that are run


def run_export(words: list[str]) -> None:
    for word in words[1:]:
        name, _, value = word.partition("=")
        os.environ[name] = value


def run_trl_spo(words: list[str]) -> str | None:
    from trl_spo.cli.main import main

    with launched_here() as notes:
        code = main(words[1:])
    # Of advice, 1 says that there is something to be said of the dataset; that those here have few rows is
    assert code == 0 or (code == 1 and words[1] == "advise"), f"exit status {code}"
    return "; ".join(notes)


def run_accelerate(words: list[str]) -> str:
    from accelerate.commands.launch import launch_command_parser

    assert words[1] == "launch", f"This test does not know `accelerate {words[1]}`."
    return launch_here(launch_command_parser().parse_args(words[2:]))


def run_python(words: list[str]) -> None:
    run_script(Path(words[1]), words[2:])


def run_script(path: Path, arguments: list[str]) -> None:
    with command_line(str(path), arguments, folder=path.parent):
        runpy.run_path(str(path), run_name="__main__")


RUN: dict[str, Callable[[list[str]], str | None]] = {
    "trl-spo": run_trl_spo,
    "accelerate": run_accelerate,
    "python": run_python,
}


@contextmanager
def command_line(name: str, arguments: list[str], folder: Path | None = None):
    before = sys.argv, list(sys.path)
    sys.argv = [name, *arguments]
    if folder is not None:
        sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    except SystemExit as stop:
        assert not stop.code, f"exit status {stop.code}"
    finally:
        sys.argv, sys.path[:] = before


def launch_here(args: argparse.Namespace) -> str:
    """What `accelerate launch` does up to the point where it starts processes, and then the script in this one."""
    from accelerate.commands.launch import _validate_launch_command

    # Reads the config file, and raises on what is wrong in it or contradicts it
    args, _, _ = _validate_launch_command(args)
    if args.module:
        with command_line(args.training_script, args.training_script_args):
            runpy.run_module(args.training_script, run_name="__main__", alter_sys=True)
    else:
        run_script(Path(args.training_script), args.training_script_args)
    return f"in this process instead of {args.num_processes} under {args.config_file or 'no config'}"


@contextmanager
def launched_here():
    """What would start processes does not."""
    from accelerate.commands import launch

    notes: list[str] = []
    original = launch.launch_command
    launch.launch_command = lambda args: notes.append(launch_here(args))
    try:
        yield notes
    finally:
        launch.launch_command = original


# -- commands that are not run, and what is checked of them


def forked(check: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """A check in a process of its own, for what it changes there."""
    return lambda words: in_a_process(lambda: check(words))


def is_installable(words: list[str]) -> None:
    """The requirements are this package's, and its extras are there."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in map(Requirement, words[2:]):
        assert requirement.name == project["name"], (
            f"`{requirement.name}` is not the name of this package, {project['name']}"
        )
        unknown = requirement.extras - set(project["optional-dependencies"])
        assert not unknown, f"pyproject.toml has no extra {sorted(unknown)}"


def is_target(words: list[str]) -> None:
    """The Makefile has the target, and make knows what to do for it."""
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    assert set(words[1:]) <= set(phony), f"the Makefile has only {phony}"
    shown = subprocess.run(["make", "-C", str(ROOT), "--dry-run", *words[1:]], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


@forked
def parses(words: list[str]) -> None:
    """The script is there, and its own parser takes the arguments."""
    path = Path(words[1])
    assert path.resolve().is_file(), f"there is no {path}"
    stop_after(argparse.ArgumentParser, "parse_args")
    with suppress(Parsed):
        run_script(path, words[2:])
        raise AssertionError(f"{path} has parsed no arguments")


@forked
def parses_training(words: list[str]) -> None:
    """The launcher's parser and the training's take the arguments and the files that they name."""
    from trl import TrlParser

    stop_after(TrlParser, "parse_args_and_config")
    with suppress(Parsed):
        run_trl_spo(words)
        raise AssertionError("the training has parsed no arguments")


def stop_after(cls: type, name: str) -> None:
    """From now on in this process, a method does what it does, and then raises `Parsed`."""
    original = getattr(cls, name)

    def method(*args, **kwargs):
        original(*args, **kwargs)
        raise Parsed

    setattr(cls, name, method)


@forked
def begins(words: list[str]) -> None:
    """The command takes its arguments, and all that it checks before it begins."""
    from trl_spo.cli import demo
    from trl_spo.cli.main import main
    from trl_spo.comparison import Comparison

    def begin(*args) -> None:
        raise Parsed

    demo.run = Comparison.run = begin
    with suppress(Parsed):
        code = main(words[1:])
        raise AssertionError(f"exit status {code}")


Checks = dict[tuple[str, ...], tuple[str, Callable[[list[str]], None]]]
_LONG = "it takes minutes to hours"
NOT_RUN: Checks = {
    ("pip", "install"): ("it takes the network, and what is tested is installed", is_installable),
    ("make",): ("it is what runs the tests, or the demo (tests/sandbox/test_demo.py)", is_target),
    ("trl-spo", "compare"): ("it trains dozens of models; tests/comparison has it on small ones", begins),
    ("trl-spo", "demo"): ("it takes minutes; tests/sandbox/test_demo.py has it on small models", begins),
    **{
        ("python", f"examples/benchmarks/{path.name}"): (_LONG, parses)
        for path in sorted((ROOT / "examples" / "benchmarks").glob("*.py"))
    },
}
_THERE = "quickstart.md has the same, and there it is run"
# Of results.md, besides
MEASURED: Checks = {
    ("python", "examples/controlled_sentiment.py"): (_THERE, parses),
    ("trl-spo", "soft-po"): (_THERE, parses_training),
}
