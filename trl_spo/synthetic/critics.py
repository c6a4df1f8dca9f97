# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Who judges responses: two kinds of critics.

Those that compare read a prompt with two responses under a rubric, and answer with a rationale and a verdict: an
[`EndpointCritic`] and a [`LocalCritic`]. Those that score read a prompt with one response, and of two, the one with the higher score
is better: a [`RewardCritic`] and a [`RuleCritic`]. The two with a model in this process are in `model_critics.py`.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from .endpoint import Completion, Endpoint, RequestRejectedError, check_extra_body
from .rubrics import Rubric
from .store import request_key


T = TypeVar("T")

VERDICTS = ("A", "B", "tie")
_JSON_FORMAT = """\
Answer with one JSON object and nothing else: {"rationale": "your reasons, in a few sentences", "verdict": "A"}. The verdict is "A" if the first
response is better, "B" if the second one is, and "tie" only if neither is."""
_CORRECT_FORMAT = """\
Answer with one JSON object and nothing else: {"rationale": "your reasons, in a few sentences", "correct": "both", "verdict": "A"}. Of `correct`:
"A" if only the first response is right, "B" if only the second one is, "both" or "neither". The verdict is "A" if the first response is better,
"B" if the second one is, and "tie" only if neither is."""
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)
_VERDICT_FIELD = re.compile(r'"verdict"\s*:\s*"')


@dataclass(frozen=True)
class Request:
    """A prompt and the texts to judge: two of them to compare, in this order, or one to score."""

    prompt: str | list[dict[str, str]]
    responses: tuple[str, ...]
    columns: dict[str, Any] = field(default_factory=dict)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


class Judgement(BaseModel, extra="forbid", strict=True):
    """What an endpoint answers."""

    rationale: str
    verdict: Literal["A", "B", "tie"]


class JudgementWithCorrect(BaseModel, extra="forbid", strict=True):
    """What an endpoint answers that is asked which responses are right, too."""

    rationale: str
    correct: Literal["A", "B", "both", "neither"]
    verdict: Literal["A", "B", "tie"]


@cache  # or most of the time of a request would go into it
def _schema_of(form: type[BaseModel]) -> dict[str, Any]:
    return form.model_json_schema()


def parse_judgement(text: str, form: type[BaseModel] = Judgement) -> dict[str, str | None]:
    """
    The fields of an answer in JSON, which may stand in a Markdown fence. All are `None` if it is anything else: what is not in the
    format is never guessed.
    """
    fenced = _FENCE.match(text.strip())
    try:
        return form.model_validate_json(fenced[1] if fenced else text).model_dump()
    except ValidationError:
        return dict.fromkeys(form.model_fields)


def verdict_probability(text: str, top_logprobs: list[tuple[str, dict[str, float]]]) -> float | None:
    """
    The probability that the first response is better, a tie counting half, by the log-probabilities at the place of the verdict.
    `None` if the tokens are not those of the text, or none of the likeliest ones is a verdict.
    """
    if "".join(token for token, _ in top_logprobs) != text:
        return None
    places = [match.end() for match in _VERDICT_FIELD.finditer(text)]
    if not places:
        return None
    start, place = 0, 0
    while start + len(top_logprobs[place][0]) <= places[-1]:
        start += len(top_logprobs[place][0])
        place += 1
    token, alternatives = top_logprobs[place]
    before = token[: places[-1] - start]  # a token may begin ahead of the verdict
    mass = dict.fromkeys(VERDICTS, 0.0)
    for alternative, logprob in alternatives.items():
        rest = alternative[len(before) :]
        for verdict in VERDICTS:
            if alternative.startswith(before) and rest and (rest.startswith(verdict) or verdict.startswith(rest)):
                mass[verdict] += math.exp(logprob)
    total = sum(mass.values())
    return (mass["A"] + mass["tie"] / 2) / total if total > 0 else None


@dataclass(kw_only=True)
class Critic:
    """
    What all critics have.

    Args:
        name (`str`):
            Name of the critic in files and tables.
        weight (`float`, *optional*, defaults to `1.0`):
            Of its vote.
    """

    compares: ClassVar[bool]

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("A critic has an empty `name`. Give it one.")
        if not self.weight > 0 or math.isinf(self.weight):
            raise ValueError(
                f"`weight` of the critic {self.name!r} must be positive, got {self.weight}. Leave out one without a vote."
            )

    def check(self, columns: dict[str, Any]) -> None:
        """
        Before anything is asked: whether it can judge prompts with these columns.

        Raises:
            `ValueError` or [`EndpointError`]: it cannot.
        """

    def unload(self) -> None:
        """Gives back the memory of a model, if it has one."""

    def key(self, request: Request) -> str | None:
        """The key of an answer in the store. `None`: it is not kept."""
        return None

    def identity(self) -> str | None:
        """
        What tells it from other critics, whatever is asked. Two of the same would vote twice. `None`: nothing does, as of a function.

        By default the [`~Critic.key`] of a request without columns: a critic whose key needs them has its own.
        """
        return self.key(Request("prompt", ("one", "two")))


@dataclass(kw_only=True)
class EndpointCritic(Critic):
    """
    A model behind an OpenAI-compatible endpoint, which compares.

    Args:
        endpoint ([`Endpoint`]):
            The server, and the model there.
        rubric (`str` or [`Rubric`], *optional*, defaults to `"helpfulness"`):
            What it compares by: the name of a rubric of ours, or a Jinja file.
        structured_output (`str`, *optional*, defaults to `"json_schema"`):
            How the server is asked to keep to the format: `"json_schema"`, `"json_object"`, or `"none"` if it can do neither.
        asks_correct (`bool`, *optional*, defaults to `False`):
            Whether it is to say of each response if it is right, too. Where there is a [`RuleCritic`], a pair is dropped of which a critic
            that voted for the winner says something else than the rule.
        logprobs (`bool`, *optional*, defaults to `False`):
            Whether to ask for the log-probabilities of the verdict, for votes that are graded. Not all servers give them.
        temperature (`float`, *optional*, defaults to `0.0`):
            Of its sampling. `None`: the server's default.
        max_completion_tokens (`int`, *optional*, defaults to `1024`):
            Of an answer, with what a reasoning model thinks.
        revision (`str`, *optional*):
            Anything that names what the server runs, such as a commit or a date: answers are kept by it, and with another one, all is
            asked anew.
        extra_body (`dict[str, Any]`, *optional*):
            Further fields of the requests.

    Raises:
        `ValueError`: an option is out of its range, or `extra_body` has a field that is set elsewhere.
    """

    compares: ClassVar[bool] = True

    endpoint: Endpoint
    rubric: str | Rubric = "helpfulness"
    structured_output: str = "json_schema"
    asks_correct: bool = False
    logprobs: bool = False
    temperature: float | None = 0.0
    max_completion_tokens: int = 1024
    revision: str | None = None
    extra_body: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.structured_output not in ("json_schema", "json_object", "none"):
            raise ValueError(
                f"`structured_output` must be 'json_schema', 'json_object' or 'none', got {self.structured_output!r}."
            )
        if self.max_completion_tokens < 1:
            raise ValueError(f"`max_completion_tokens` must be positive, got {self.max_completion_tokens}.")
        check_extra_body(self.extra_body, "response_format", "logprobs", "top_logprobs")
        if not isinstance(self.rubric, Rubric):
            self.rubric = Rubric(self.rubric)

    @property
    def _form(self) -> type[BaseModel]:
        return JudgementWithCorrect if self.asks_correct else Judgement

    def options(self) -> dict[str, Any]:
        """Of each request."""
        options: dict[str, Any] = {"max_completion_tokens": self.max_completion_tokens}
        if self.structured_output == "json_schema":
            schema = {"name": "verdict", "strict": True, "schema": _schema_of(self._form)}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.structured_output == "json_object":
            options["response_format"] = {"type": "json_object"}
        if self.logprobs:
            options |= {"logprobs": True, "top_logprobs": 20}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        return options | (self.extra_body or {})

    def messages(self, request: Request) -> list[dict[str, str]]:
        text = self.rubric.render(request.prompt, *request.responses, request.columns)
        return [{"role": "user", "content": f"{text}\n\n{_CORRECT_FORMAT if self.asks_correct else _JSON_FORMAT}"}]

    @property
    def _who(self) -> dict[str, Any]:
        revision = {} if self.revision is None else {"revision": self.revision}
        return {"model": self.endpoint.model, **revision, "options": self.options()}

    def key(self, request: Request) -> str:
        return request_key(**self._who, messages=self.messages(request))

    def identity(self) -> str:
        return request_key(**self._who, asks_correct=self.asks_correct, rubric=self.rubric.sources)

    def check(self, columns: dict[str, Any]) -> None:
        self.rubric.check(columns)
        self.endpoint.check(**self.options())

    def read(self, answer: Completion | RequestRejectedError) -> dict[str, Any]:
        """An answer as it is kept in the store."""
        if isinstance(answer, RequestRejectedError):
            return {"verdict": None, "rationale": None, "error": str(answer)}
        found: dict[str, Any] = parse_judgement(answer.text, self._form)
        if found["verdict"] is None:
            found |= {"text": answer.text, "finish_reason": answer.finish_reason}
        elif answer.top_logprobs is not None:
            found["probability"] = verdict_probability(answer.text, answer.top_logprobs)
        return found | {"tokens": [answer.prompt_tokens, answer.completion_tokens], "cost": answer.cost}


@dataclass(kw_only=True)
class RuleCritic(Critic):
    """
    A function that knows what is right: whether a number is the answer, whether a program passes its tests. It scores, and where its
    scores of two responses differ, no other critic counts.

    Args:
        function (`Callable`):
            `function(prompt, response, **columns)`, with the other columns of the prompts' dataset: the score of a response, a number or
            a boolean; `None` if it cannot say.
    """

    compares: ClassVar[bool] = False

    function: Callable[..., float | bool | None]

    def answer(self, requests: Iterable[tuple[T, Request]]) -> Iterator[tuple[T, dict[str, Any]]]:
        """Answers requests with their tags."""
        for tag, request in requests:
            score = self.function(request.prompt, request.responses[0], **request.columns)
            if score is not None and not isinstance(score, bool | int | float):
                raise TypeError(
                    f"The function of the critic {self.name!r} must return a number, a boolean or `None`, and returned {score!r} for "
                    f"the response {request.responses[0]!r}."
                )
            if score is not None and math.isnan(score):
                raise ValueError(
                    f"The function of the critic {self.name!r} returned NaN for the response {request.responses[0]!r}. Return `None` where "
                    "it cannot say."
                )
            yield tag, {"score": None if score is None else float(score)}
