# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The files that the stages exchange: JSON lines, each row with the ids of its prompt and its responses."""

import glob
import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import psutil


class Rows:
    """
    The rows of a file of JSON lines, read anew each time that they are gone through, so that they may be many.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Raises:
        `FileNotFoundError`: there is none.
        `ValueError`, while they are read: a line is not a JSON object.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"'{self.path}' is missing. Run the stage that makes it first.")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"Line {number} of '{self.path}' is not JSON ({error}). Correct it, or run its stage again."
                    ) from error
                if not isinstance(row, dict):
                    raise ValueError(
                        f"Line {number} of '{self.path}' is not a JSON object. Correct it, or run its stage again."
                    )
                yield row

    def __len__(self) -> int:
        with self.path.open("rb") as file:
            return sum(1 for _ in file)


@contextmanager
def replacing(*paths: Path) -> Iterator[tuple[TextIO, ...]]:
    """
    Files to write that come into being only when all of them are complete: until then, and if anything fails, those that were there
    before stay. What processes that were killed on this machine have left of them is removed.
    """
    machine = socket.gethostname()  # another one, which shares the folder, has processes of its own
    for path in paths:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(machine)}.*"):
            pid = leftover.suffix.removeprefix(".")
            if pid.isdecimal() and not psutil.pid_exists(int(pid)):
                leftover.unlink(missing_ok=True)
    temporary = [path.with_name(f".{path.name}.{machine}.{os.getpid()}") for path in paths]
    try:
        files = tuple(path.open("w", encoding="utf-8") for path in temporary)
        try:
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        finally:
            for file in files:
                file.close()
        for source, path in zip(temporary, paths, strict=True):
            os.replace(source, path)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def write_row(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a file of rows, or leaves what was there before."""
    with replacing(path) as (file,):
        for row in rows:
            write_row(file, row)


def write_json(path: Path, content: Any) -> None:
    """Writes a file of one JSON value for people to read, or leaves what was there before."""
    with replacing(path) as (file,):
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_rows(dataset: Iterable[dict[str, Any]]) -> str:
    """SHA-256 of the texts and numbers that a dataset has in it, wherever it was loaded from."""
    found = hashlib.sha256()
    for row in dataset:
        found.update(json.dumps(row, ensure_ascii=False, default=lambda other: type(other).__name__).encode() + b"\n")
    return found.hexdigest()
