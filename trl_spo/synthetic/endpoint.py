# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible endpoint: many requests at once, what they cost, and a limit to that."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import openai

from .redaction import without_secrets
from .store import AnswerStore


T = TypeVar("T")


class SpendingLimitError(RuntimeError):
    """The spending limit is reached. All that was paid for has been kept."""


class EndpointError(RuntimeError):
    """An endpoint cannot be used, or left requests without an answer. All answers that came have been kept."""


class RequestFailedError(RuntimeError):
    """A request had no answer after all retries. Another time it may have one."""


class RequestRejectedError(RuntimeError):
    """The server will not answer a request, whenever it is asked: it is too long, for instance."""


_OWN_FIELDS = {"model", "messages", "n", "stream", "temperature", "max_completion_tokens"}
_TEMPLATE_TOKENS = 64
_POLL_S = 0.02
_SHOWN = 500  # characters of an answer, in an error
_CHECK_TOKENS = 16
_CHECK_RETRIES = 2  # so that what is down is found soon
_FAILURES_IN_A_ROW = 10  # besides those that are under way when a server goes away

# Of what no other request will do better
_REMEDIES = {
    401: "Is the key in the environment variable {self.api_key_env!r} (`api_key_env`) right?",
    403: "May the key in the environment variable {self.api_key_env!r} (`api_key_env`) use this model?",
    404: "Does the server have the model (`model`), and is the address (`base_url`) right? It often ends in /v1.",
}


def check_extra_body(extra_body: dict[str, Any] | None, *others: str) -> None:
    """Raises a `ValueError` if further fields of a request are those that are set otherwise: these ones, and some of all requests."""
    twice = _OWN_FIELDS.union(others).intersection(extra_body or {})
    if twice:
        raise ValueError(f"`extra_body` cannot have {sorted(twice)}, which are set elsewhere. Leave them out.")


@dataclass
class Budget:
    """
    What the requests of a run may cost together, and what they have cost. A request that timed out is not among them, though a server
    may charge for it.

    Args:
        limit (`float`, *optional*):
            In the currency of the prices. Without it, costs are counted only.
        spent (`float`, *optional*, defaults to `0.0`):
            What has been spent already.
    """

    limit: float | None = None
    spent: float = 0.0
    _stores: set[Path] = field(default_factory=set, init=False, repr=False)
    _reserved: float = field(default=0.0, init=False)
    _requests: int = field(default=0, init=False)

    def count(self, store: AnswerStore) -> None:
        """What the answers in a store have cost is spent, too: once, however often it is counted."""
        path = store.path.resolve()
        if path not in self._stores:
            self._stores.add(path)
            self.spent += store.cost()

    def reserve(self, most: float) -> bool:
        """Whether a request that costs `most` at most still fits, besides those that are under way. If so, it counts from now on."""
        if self.limit is not None and self.spent + self._reserved + most > self.limit:
            return False
        self._reserved += most
        self._requests += 1
        return True

    @property
    def under_way(self) -> bool:
        return self._requests > 0

    def settle(self, most: float, cost: float) -> None:
        """A request that was reserved has ended, and cost this much."""
        self._requests -= 1
        self._reserved = self._reserved - most if self._requests else 0.0  # exactly, again and again
        self.spent += cost


@dataclass(frozen=True)
class Completion:
    """An answer of an endpoint: its text, the log-probabilities of its tokens if asked for, and what it took (0 if it does not say)."""

    text: str
    finish_reason: str
    top_logprobs: list[tuple[str, dict[str, float]]] | None  # of each token: itself, and the likeliest in its place
    prompt_tokens: int
    completion_tokens: int
    cost: float


@dataclass
class Endpoint:
    """
    An OpenAI-compatible server, and how to ask it.

    Args:
        model (`str`):
            Name of the model on the server.
        base_url (`str`, *optional*):
            Address of the API, such as `"http://localhost:8000/v1"`; by default that of OpenAI.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the key. `None` if the server wants none. The key itself is never an option, so that it is in
            no file and no log.
        concurrency (`int`, *optional*, defaults to `32`):
            Requests that may be under way at once.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which a request is tried again.
        max_retries (`int`, *optional*, defaults to `5`):
            Times that a request is tried again, ever later, after a time-out, a cut connection, or the status 408, 409, 429 or 5xx.
        prompt_price, completion_price (`float`, *optional*, defaults to `0.0`):
            Of a million tokens, in any currency. An answer that does not say how many it took counts as the most that it may have cost,
            so that the limit of a [`Budget`] holds.

    Raises:
        `ValueError`: an option is out of its range, or the key is missing.
    """

    model: str
    base_url: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    concurrency: int = 32
    timeout: float = 120.0
    max_retries: int = 5
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("`model` is empty. Name a model of the server.")
        for name, least in (("concurrency", 1), ("max_retries", 0), ("prompt_price", 0), ("completion_price", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.timeout <= 0:
            raise ValueError(f"`timeout` must be a positive number of seconds, got {self.timeout}.")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ValueError(
                f"The environment variable {self.api_key_env!r} (`api_key_env`), which has the key of model {self.model!r}, is not set. "
                f"Run `export {self.api_key_env}=...`, or set `api_key_env=None` if the server wants no key."
            )

    @property
    def where(self) -> str:
        url = self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        return f"model {self.model!r} at {without_secrets(url)}"

    def check(self, **options: Any) -> None:
        """
        Asks once for a few tokens with the options of the later requests, so that what cannot work fails before anything is
        paid for.

        Raises:
            [`EndpointError`]: nobody answers, the key is not accepted, the model is unknown, or an option is not supported.
        """

        async def ask() -> None:
            async with self._client(max_retries=min(_CHECK_RETRIES, self.max_retries)) as client:
                messages = [{"role": "user", "content": "Hello"}]
                # Some servers reject so few that a model which reasons could not begin to answer
                most = min(_CHECK_TOKENS, options.get("max_completion_tokens", _CHECK_TOKENS))
                answer = await self._complete(client, messages, **{**options, "max_completion_tokens": most})
                if options.get("logprobs") and answer.top_logprobs is None:
                    raise EndpointError(
                        f"{self.where} gives no log-probabilities, and ignores `logprobs`. Set it to `False`."
                    )

        try:
            run_async(ask)
        except RequestRejectedError as error:
            raise EndpointError(f"{error}. Change the option that it names, or leave it out.") from None
        except RequestFailedError as error:
            raise EndpointError(str(error)) from None

    @asynccontextmanager
    async def _client(self, max_retries: int) -> AsyncIterator[openai.AsyncOpenAI]:
        limits = openai.DEFAULT_CONNECTION_LIMITS
        limits = type(limits)(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        client = openai.AsyncOpenAI(
            api_key=os.environ[self.api_key_env] if self.api_key_env else "none",
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=max_retries,
            http_client=openai.DefaultAioHttpClient(limits=limits, timeout=self.timeout),
        )
        async with client:
            yield client

    async def _complete(
        self, client: openai.AsyncOpenAI, messages: list[dict[str, str]], **options: Any
    ) -> Completion:
        for retry in range(client.max_retries + 1):
            try:
                # As they are: to go through each option by its type takes the client longer than all the rest
                answer = await client.chat.completions.create(model=self.model, messages=messages, extra_body=options)
                choice = answer.choices[0]
                break
            except openai.APIStatusError as error:
                said = error.message
                if said.startswith(
                    "Error code"
                ):  # the client has found no message, and the reason is in what it has not read
                    said = f"{said}: {self._redacted(error.response.text)[:_SHOWN]}"
                message = self._redacted(f"{self.where} answers with status {error.status_code}: {said}")
                if error.status_code in _REMEDIES or error.code == "insufficient_quota":
                    remedy = _REMEDIES.get(error.status_code, "The account has no credit left.").format(self=self)
                    raise EndpointError(f"{message}. {remedy}") from None
                kind = RequestRejectedError if error.status_code in (400, 413, 422) else RequestFailedError
                raise kind(message) from None
            except openai.APIConnectionError as error:  # a time-out too
                cause = error.__cause__ or error
                remedy = "Is the server up, and `base_url` right?"
                if "Read" in type(cause).__name__:  # and not Connect
                    remedy = "If it has more to do than it can, raise `timeout`, or lower `concurrency`."
                message = f"{self.where} does not answer ({type(cause).__name__}: {cause}). {remedy}"
                raise RequestFailedError(self._redacted(message)) from None
            except (openai.APIError, json.JSONDecodeError, AttributeError, IndexError, TypeError) as error:
                # The page of a proxy, for instance, which the client takes for an answer and does not ask again
                if retry == client.max_retries:
                    message = f"{self.where} answers with something that is not a chat completion: {error!r}"
                    raise RequestFailedError(self._redacted(message)) from None
                await asyncio.sleep(min(0.5 * 2**retry, 8.0))
        logprobs = choice.logprobs.content if choice.logprobs is not None else None
        usage = answer.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        return Completion(
            # A server may cut a response within a character: JSON can hold half of a surrogate pair, UTF-8 and the store cannot
            text=(choice.message.content or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
            finish_reason=choice.finish_reason or "",
            top_logprobs=logprobs
            and [(token.token, {top.token: top.logprob for top in token.top_logprobs}) for token in logprobs],
            prompt_tokens=tokens[0] or 0,
            completion_tokens=tokens[1] or 0,
            cost=self._most(messages, options) if None in tokens else self.cost(*tokens),
        )

    def _redacted(self, message: str) -> str:
        """Servers repeat keys that they do not accept."""
        key = os.environ.get(self.api_key_env or "", "")
        return message.replace(key, "***") if key else message

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6

    def _most(self, messages: list[dict[str, str]], options: dict[str, Any]) -> float:
        """What a request costs at most."""
        # No token is shorter than a byte, besides those that a chat template puts around a message
        length = 0
        for message in messages:
            others = {name: value for name, value in message.items() if name not in ("role", "content")}
            content = message.get("content") or ""  # that of a tool call has none
            length += len(content.encode()) + (len(json.dumps(others)) if others else 0) + _TEMPLATE_TOKENS
        return self.cost(length, options["max_completion_tokens"])

    async def complete_all(
        self,
        requests: Iterable[tuple[T, list[dict[str, str]], dict[str, Any]]],
        keep: Callable[[T, Completion | RequestRejectedError], None],
        budget: Budget,
    ) -> list[str]:
        """
        Asks many requests, `concurrency` at once.

        Args:
            requests (`Iterable[tuple]`):
                Of each request a tag, the messages, and options of the call with `max_completion_tokens` among them. Taken only when
                there is room for one more, so that they may be many.
            keep (`Callable`):
                Called with the tag and the answer as soon as it is there.
            budget ([`Budget`]):
                Limit of costs.

        Returns:
            `list[str]`: of each request without an answer after all retries, why.

        Raises:
            [`EndpointError`]: nothing can be answered any more.
            [`SpendingLimitError`]: the next request might exceed the limit.
        """
        requests, failures, in_a_row = iter(requests), [], 0
        rejected: list[tuple[T, RequestRejectedError]] | None = []  # until one is answered

        async def work(client: openai.AsyncOpenAI) -> None:
            nonlocal in_a_row, rejected
            for tag, messages, options in requests:  # which the workers share
                most, cost = self._most(messages, options), 0.0
                while not budget.reserve(most):
                    if not budget.under_way:
                        raise SpendingLimitError(
                            f"{budget.spent:.4g} are spent, and the next request to {self.where} may cost up to {most:.2g}, which is "
                            f"over the limit `max_cost={budget.limit}`. What was answered is kept: with a higher limit, it goes on "
                            "from there."
                        )
                    await asyncio.sleep(_POLL_S)
                try:
                    answer = await self._complete(client, messages, **options)
                    cost = answer.cost
                except RequestRejectedError as error:
                    answer = error
                except RequestFailedError as error:
                    failures.append(str(error))
                    in_a_row += 1
                    if in_a_row >= self.concurrency + _FAILURES_IN_A_ROW:
                        raise EndpointError(
                            f"{in_a_row} requests in a row had no answer. The last one: {error}."
                        ) from None
                    continue
                finally:
                    budget.settle(most, cost)
                in_a_row = 0
                if rejected is not None and isinstance(answer, RequestRejectedError):
                    rejected.append((tag, answer))
                    if len(rejected) >= self.concurrency + _FAILURES_IN_A_ROW:
                        raise EndpointError(
                            f"{len(rejected)} requests were rejected, and none was answered. The last one: {answer}."
                        )
                    continue
                for earlier in rejected or ():
                    keep(*earlier)
                rejected = None
                keep(tag, answer)

        async with self._client(self.max_retries) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.concurrency):
                        group.create_task(work(client))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        for earlier in rejected or ():
            keep(*earlier)
        return failures


def run_async(function: Callable[[], Any]) -> Any:
    """Runs a coroutine function to its end, also where an event loop is running, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(function())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(function())).result()
