# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What critics compare responses by: Jinja templates, ours or the user's."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import (
    ChoiceLoader,
    Environment,
    FileSystemLoader,
    PackageLoader,
    StrictUndefined,
    TemplateError,
    UndefinedError,
    meta,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment


RUBRICS = ("helpfulness", "honesty", "safety", "reasoning", "code")
# The tags that what is judged stands between, in whichever way a response may write them
_TAG = re.compile(r"<(?=\s*/?\s*(?:prompt|response_[ab])\b)", re.IGNORECASE)


def as_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt or a response as a critic reads it: of messages, each with its role."""
    if isinstance(prompt, str):
        return prompt
    texts = [message.get("content") or "" for message in prompt]  # that of a tool call has none
    if len(prompt) == 1:
        return texts[0]
    return "\n\n".join(f"[{message['role']}]\n{text}" for message, text in zip(prompt, texts, strict=True))


def _sources(environment: Environment, name: str) -> Iterator[str]:
    """The texts of a template and of those that it includes."""
    source = environment.loader.get_source(environment, name)[0]
    yield source
    for other in meta.find_referenced_templates(environment.parse(source)):
        if other is not None:  # `None`: one whose name is computed
            yield from _sources(environment, other)


class Rubric:
    """
    What two responses are compared by.

    The template is given `prompt`, `response_a`, `response_b`, and the other columns of the prompts' dataset. The responses are data:
    what looks like one of the tags that delimit them, as in `{% include "_responses.jinja" %}`, is escaped.

    Args:
        name_or_path (`str` or `os.PathLike`):
            `"helpfulness"`, `"honesty"`, `"safety"`, `"reasoning"`, `"code"`, or a Jinja file.

    Raises:
        `ValueError`: there is no such rubric, or it is not a template.
    """

    def __init__(self, name_or_path: str | os.PathLike):
        self.name = str(name_or_path)
        path = Path(name_or_path)
        loaders = [PackageLoader("trl_spo.synthetic", "rubrics")]
        if self.name in RUBRICS:
            file = f"{self.name}.jinja"
        elif path.is_file():
            file = path.name
            loaders.insert(0, FileSystemLoader(path.parent))
        else:
            raise ValueError(
                f"There is no rubric {self.name!r}. Use one of {', '.join(map(repr, RUBRICS))}, or the path of a Jinja file."
            )
        environment = ImmutableSandboxedEnvironment(loader=ChoiceLoader(loaders), undefined=StrictUndefined)
        try:
            self._template = environment.get_template(file)
            self.sources = tuple(_sources(environment, file))
        except TemplateError as error:
            raise ValueError(f"The rubric {self.name!r} is not a Jinja template: {error}.") from error

    def render(
        self,
        prompt: str | list[dict[str, str]],
        response_a: str,
        response_b: str,
        columns: dict[str, Any] | None = None,
    ) -> str:
        """
        What a critic reads, without the format that it is to answer in.

        Raises:
            `ValueError`: the template has a field that is not a column.
        """
        texts = {"prompt": as_text(prompt), "response_a": as_text(response_a), "response_b": as_text(response_b)}
        try:
            return self._template.render({**(columns or {}), **{k: _TAG.sub("&lt;", v) for k, v in texts.items()}})
        except UndefinedError as error:
            raise ValueError(
                f"The rubric {self.name!r} has a field that the prompts have no column for: {error}. The columns are "
                f"{sorted(columns or {})}."
            ) from error
        except TemplateError as error:
            raise ValueError(
                f"The rubric {self.name!r} cannot be rendered: {type(error).__name__}: {error}."
            ) from error

    def check(self, columns: dict[str, Any]) -> None:
        """
        Args:
            columns (`dict[str, Any]`):
                Of a row of the prompts' dataset.

        Raises:
            `ValueError`: the template does not show the prompt and both responses, or has a field that is not a column.
        """
        marks = {name: f"[the {name} of this check]" for name in ("prompt", "response_a", "response_b")}
        text = self.render(**marks, columns=columns)
        missing = [name for name, mark in marks.items() if mark not in text]
        if missing:
            raise ValueError(
                f"The rubric {self.name!r} does not show {', '.join(f'`{name}`' for name in missing)}. Put "
                '`{% include "_responses.jinja" %}` into it, or the fields themselves.'
            )
