# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Candidates: several responses of the student to each prompt, in a file.

The prompts are taken in batches, in their order, and each batch has a seed of its own. What is drawn is appended to
part files beside the result, a line for each batch, so that a run that is killed goes on from there, and ends with the
file of an uninterrupted one.
"""

import glob
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm.auto import tqdm

from .files import replacing
from .students import Batch, Student


T = TypeVar("T")


def generate_candidates(
    prompts: Dataset,
    student: Student,
    path: str | os.PathLike,
    num_responses: int = 4,
    temperatures: Sequence[float] = (0.7, 1.0),
    seed: int = 42,
    token_ids: bool = False,
) -> Path:
    """
    Draws responses of the student to each prompt, and goes on where an earlier run was stopped.

    Under `accelerate launch` all processes call it, with a file system that they share.

    Args:
        prompts ([`~datasets.Dataset`]):
            With `prompt_id` and `prompt`, standard or conversational. Other columns are kept.
        student ([`Student`]):
            Who responds: a [`TransformersStudent`], a [`VLLMStudent`] or an [`EndpointStudent`].
        path (`str` or `os.PathLike`):
            File for the candidates, such as `"candidates.jsonl"`. Its folder is made if it does not exist. Who the
            student is and how it draws goes into `candidates.settings.json` beside it.
        num_responses (`int`, *optional*, defaults to `4`):
            Responses to each prompt.
        temperatures (`Sequence[float]`, *optional*, defaults to `(0.7, 1.0)`):
            Response k is sampled at `temperatures[k % len(temperatures)]`. One of them may be 0, for the likeliest
            response, if only one response is drawn at it.
        seed (`int`, *optional*, defaults to `42`):
            Of all draws.
        token_ids (`bool`, *optional*, defaults to `False`):
            Whether to keep the tokens of each response, without the one that ended it: its text need not be read as
            the same ones again. Only a [`TransformersStudent`] gives them.

    Returns:
        `Path`: the file, with one JSON object a line for each prompt in their order: its columns, and `responses`, a
        list of `id` (`"0"`, `"1"`, ...), `text`, `temperature`, `finish_reason` (`"stop"`, or `"length"` if it was
        cut) and, if asked for, `token_ids`.

    Raises:
        `ValueError`: the options or the prompts cannot be used, or the file was begun with other ones. Nothing is
        overwritten.
        [`EndpointError`]: the endpoint is down, or left requests without an answer.
        [`SpendingLimitError`]: the next request might exceed the budget.
    """
    path = Path(path)
    spread = temperature_spread(num_responses, temperatures)
    if seed < 0:
        raise ValueError(f"`seed` must not be negative, got {seed}.")
    _check_prompts(prompts)
    prompts = prompts.with_format(None)
    of_student, size, state = student.load(), student.batch_size, PartialState()
    starts = range(0, len(prompts), size)
    batches = [
        Batch(i, prompts, start, min(start + size, len(prompts)), spread, seed) for i, start in enumerate(starts)
    ]

    def begin() -> tuple[str, list[int]]:
        """The settings as they are in their file, and the batches that are left."""
        settings = {
            "student": of_student,
            "num_responses": num_responses,
            "temperatures": [float(temperature) for temperature in temperatures],
            "seed": seed,
            "prompts": {"rows": len(prompts), "sha256": _hash_of(prompts)},
            **({"token_ids": True} if token_ids else {}),
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False, default=str) + "\n"
        found = _settings_path(path).read_text(encoding="utf-8") if _settings_path(path).is_file() else None
        if found is not None and json.loads(found) == json.loads(text):
            text = found
        kept, runs = _find_batches(path)
        if path.exists() or runs:
            _refuse_others(path, found, text, runs)
        left = [] if path.exists() else [batch.index for batch in batches if batch.index not in kept]
        if left:
            student.check(prompts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(_settings_path(path)) as (file,):
                file.write(text)
        return text, left

    def end() -> None:
        """Makes the result of the parts, unless another process with the same settings was first."""
        kept, runs = _find_batches(path)
        other = _settings_path(path).read_text(encoding="utf-8") != text or runs - {_run(text)}
        if other or not path.exists() and len(kept) < len(batches):
            raise RuntimeError(f"Another process wrote to '{path}' or its parts meanwhile. Run this again, by itself.")
        if not path.exists():
            with replacing(path) as (file,):
                file.writelines(_merged(batches, kept))
        left_by_kills = chain(_matching(path, ".{}.*"), _matching(_settings_path(path), ".{}.*"))
        for leftover in chain(_matching(path, "{}.part-*"), left_by_kills):
            leftover.unlink(missing_ok=True)

    text, left = _on_main_process(begin)
    if left:
        # As many for each process, or those that share a model would wait for each other: one may be drawn twice
        count, processes = math.ceil(len(left) / state.num_processes), state.num_processes
        mine = [batches[left[i % len(left)]] for i in range(state.process_index, count * processes, processes)]
        part = path.with_name(f"{path.name}.part-{uuid.uuid4().hex}")  # which nobody else writes to, nor did before
        bar = tqdm(
            total=sum(batch.stop - batch.start for batch in mine) * num_responses,
            desc="Candidates" if processes == 1 else f"Candidates of one of {processes} processes",
            unit=" responses",
            # Given `False`, tqdm would not heed TQDM_DISABLE
            **({} if state.is_main_process else {"disable": True}),
        )
        with bar, closing(student.generate(mine, bar)) as generated:
            for index, responses in generated:
                if token_ids and any(response.token_ids is None for some in responses for response in some):
                    raise ValueError(
                        f"`token_ids=True` needs a student whose tokens are seen, and {type(student).__name__} gives "
                        "none. Use `TransformersStudent`."
                    )
                if not token_ids:
                    responses = [[response._replace(token_ids=None) for response in some] for some in responses]
                _append(part, {"run": _run(text), "batch": index, "responses": responses})
        state.wait_for_everyone()
    _on_main_process(end)
    return path


def temperature_spread(num_responses: int, temperatures: Sequence[float]) -> tuple[float, ...]:
    """The temperature of each response."""
    if num_responses < 1:
        raise ValueError(f"`num_responses` must be at least 1, got {num_responses}.")
    if not temperatures:
        raise ValueError("`temperatures` is empty. Name one at least, such as (1.0,).")
    if len(temperatures) > num_responses:
        raise ValueError(
            f"`temperatures` has {len(temperatures)} values for `num_responses={num_responses}`, so that some are "
            "never used. Leave them out, or draw more responses."
        )
    if any(not 0 <= temperature < math.inf for temperature in temperatures):
        raise ValueError(f"`temperatures` must not be negative, and finite, got {tuple(temperatures)}.")
    spread = tuple(float(temperatures[k % len(temperatures)]) for k in range(num_responses))
    if spread.count(0) > 1:
        raise ValueError(
            f"With `num_responses={num_responses}` and `temperatures={tuple(temperatures)}`, {spread.count(0)} "
            "responses to each prompt are drawn at temperature 0, and are the same. Give all but one of them a "
            "temperature above 0."
        )
    return spread


def _check_prompts(prompts: Dataset) -> None:
    if not isinstance(prompts, Dataset):
        raise TypeError(f"`prompts` must be a `datasets.Dataset`, got {type(prompts).__name__}.")
    missing = [name for name in ("prompt_id", "prompt") if name not in prompts.column_names]
    if missing:
        raise ValueError(
            f"`prompts` has no column {missing[0]!r}, but {prompts.column_names}. `prepare_prompts` gives each prompt "
            "its id."
        )
    if "responses" in prompts.column_names:
        raise ValueError("`prompts` has a column 'responses', where the candidates are to be. Rename or remove it.")
    if len(prompts) == 0:
        raise ValueError("`prompts` is empty.")
    seen = set()
    for i, prompt_id in enumerate(prompts["prompt_id"]):
        if not isinstance(prompt_id, str) or not prompt_id:
            raise ValueError(f"`prompt_id` of row {i} must be a string that is not empty, got {prompt_id!r}.")
        if prompt_id in seen:
            raise ValueError(f"`prompt_id` {prompt_id!r} is there twice. Each prompt needs an id of its own.")
        seen.add(prompt_id)
    for prompt_id, prompt in zip(prompts["prompt_id"], prompts["prompt"], strict=True):
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(
                f"The prompt {prompt_id!r} must be a text or a list of messages that is not empty, got {prompt!r}."
            )


def _hash_of(prompts: Dataset) -> str:
    digest = hashlib.sha256()
    for row in prompts:
        try:
            digest.update(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The row of the prompt {row['prompt_id']!r} cannot be written as JSON ({error}). Convert the columns "
                "that are no texts, numbers or lists of them, or remove them."
            ) from error
    return digest.hexdigest()


def _run(settings: str) -> str:
    """What tells the parts of a run from those of one with other settings."""
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _on_main_process(function: Callable[[], T]) -> T:
    """What the function gives on the main process, or the error that it raises there, on all of them."""
    result: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            result[0] = function()
        except Exception as error:
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def _settings_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".jsonl") + ".settings.json")


def _matching(path: Path, pattern: str) -> list[Path]:
    """The files beside a path whose names are made of its name."""
    return sorted(path.parent.glob(pattern.format(glob.escape(path.name))))


def _find_batches(path: Path) -> tuple[dict[int, tuple[Path, int]], set[str]]:
    """Where the line of each batch that is complete begins, and the runs that they are of."""
    kept: dict[int, tuple[Path, int]] = {}
    runs = set()
    for part in _matching(path, "{}.part-*"):
        offset = 0
        with part.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):  # torn by a kill
                    break
                row = json.loads(line)
                runs.add(row["run"])
                kept.setdefault(row["batch"], (part, offset))
                offset += len(line)
    return kept, runs


def _refuse_others(path: Path, found: str | None, settings: str, runs: set[str]) -> None:
    """Raises an error if what there is was not made with these settings."""
    remedy = "Name another `path`, or remove what is there."
    if found is None:
        raise ValueError(f"'{path}', or parts of it, exist without '{_settings_path(path)}'. {remedy}")
    differences = _differences(json.loads(found), json.loads(settings))
    different = [f"`{name}` was {old!r} and is now {new!r}" for name, old, new in differences]
    if different:
        raise ValueError(
            f"'{path}' was begun with other settings: {'; '.join(different)}. Use those, or n{remedy[1:]}"
        )
    if runs - {_run(settings)}:
        raise ValueError(
            f"Parts of '{path}' were made with other settings than '{_settings_path(path)}' has. {remedy}"
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def _append(part: Path, row: dict[str, Any]) -> None:
    with part.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _merged(batches: Sequence[Batch], kept: dict[int, tuple[Path, int]]) -> Iterator[str]:
    """The lines of the result."""
    with ExitStack() as stack:
        files = {part: stack.enter_context(part.open("rb")) for part in {part for part, _ in kept.values()}}
        for batch in batches:
            part, offset = kept[batch.index]
            files[part].seek(offset)
            of_batch = json.loads(files[part].readline())["responses"]
            for row, of_prompt in zip(batch.rows, of_batch, strict=True):
                responses = [
                    {"id": str(k), "text": text, "temperature": temperature, "finish_reason": finish_reason}
                    | ({} if token_ids is None else {"token_ids": token_ids})
                    for k, ((text, finish_reason, token_ids), temperature) in enumerate(
                        zip(of_prompt, batch.temperatures, strict=True)
                    )
                ]
                yield json.dumps({**row, "responses": responses}, ensure_ascii=False) + "\n"
