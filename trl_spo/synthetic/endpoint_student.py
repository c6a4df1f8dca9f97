# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""A student behind an OpenAI-compatible endpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from datasets import Dataset
from tqdm.auto import tqdm

from .endpoint import Budget, Completion, Endpoint, EndpointError, RequestRejectedError, check_extra_body, run_async
from .redaction import without_secrets
from .store import AnswerStore, request_key
from .students import FINISHED, Batch, Response, Student, one_process, response_seed


_NAMED = 5  # prompts that an error names


@dataclass(kw_only=True, eq=False)
class EndpointStudent(Student):
    """
    A model behind an OpenAI-compatible endpoint, asked once for each response. What it says is kept in a store, and is
    never asked for again: a run that is killed, or that the budget or the server stops, goes on from there. Prompts
    must be conversational.

    A request that the server rejects, and a response that it ends for another reason than "stop" or "length", is an
    error, which names the prompts after all others have been asked: no prompt is left out without being seen.

    Args:
        endpoint ([`Endpoint`]):
            The server, and the model there.
        store ([`AnswerStore`]):
            Where the responses are kept. It and the budget may be set later, before candidates are generated.
        budget ([`Budget`], *optional*):
            Limit of what they may cost.
        revision (`str`, *optional*):
            Your name for the weights behind the model's name. Change it when they change: otherwise, responses of the
            old ones that are in the store count as theirs.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Tokens after which a response is cut: the request's `max_completion_tokens`.
        top_p (`float`, *optional*):
            Probability of the likeliest tokens among which is sampled. By default the server's.
        send_seed (`bool`, *optional*, defaults to `True`):
            Whether requests have a `seed`, which not all servers take.
        extra_body (`dict[str, Any]`, *optional*):
            Further fields of the requests.

    Raises:
        `ValueError`: an option is out of its range.
    """

    batch_size: ClassVar[int] = 64  # only of reading from the store

    endpoint: Endpoint
    store: AnswerStore | None = None
    budget: Budget | None = None
    revision: str | None = None
    top_p: float | None = None
    send_seed: bool = True
    extra_body: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")
        check_extra_body(self.extra_body, "top_p", "seed")

    def load(self) -> dict[str, Any]:
        one_process("EndpointStudent")
        if self.store is None:
            raise ValueError("`EndpointStudent` needs a `store` for the responses. Give it an `AnswerStore`.")
        told = {
            "kind": "endpoint",
            "model": self.endpoint.model,
            "base_url": self.endpoint.base_url,
            "revision": self.revision,
            "max_new_tokens": self.max_new_tokens,
            "top_p": self.top_p,
            "send_seed": self.send_seed,
            "extra_body": self.extra_body,
        }
        return without_secrets(told)  # they stand in a file

    def check(self, prompts: Dataset) -> None:
        for name in ("tools", "chat_template_kwargs"):
            if name in prompts.column_names and any(prompts[name]):
                raise ValueError(
                    f"The prompts have `{name}`, which `EndpointStudent` does not send. Remove the column, or use another student."
                )
        for row in prompts.select_columns(["prompt_id", "prompt"]):
            if isinstance(row["prompt"], str):
                raise ValueError(
                    f"The prompt {row['prompt_id']!r} is not conversational, and `EndpointStudent` can ask for chat "
                    "completions only. "
                    'Make prompts `[{"role": "user", "content": prompt}]`, or use another student.'
                )

    def options(self, temperature: float) -> dict[str, Any]:
        """Of each request at this temperature."""
        options: dict[str, Any] = {"max_completion_tokens": self.max_new_tokens, "temperature": temperature}
        if self.top_p is not None:
            options["top_p"] = self.top_p
        return options | (self.extra_body or {})

    def _requests(self, batch: Batch) -> Iterator[tuple[tuple[str, str], list[dict[str, Any]], dict[str, Any]]]:
        """The requests of a batch, each with the id of its prompt and its key."""
        for row in batch.rows:
            # Arrow gives all messages the fields of any of them
            messages = [{name: value for name, value in m.items() if value is not None} for m in row["prompt"]]
            for k, temperature in enumerate(batch.temperatures):
                options = self.options(temperature)
                seed = response_seed(batch.seed, row["prompt_id"], k)
                key = request_key(
                    student=self.endpoint.model,
                    revision=self.revision,
                    options=options,
                    messages=messages,
                    response=k,
                    seed=seed,
                )
                if self.send_seed:
                    options["seed"] = seed
                yield (row["prompt_id"], key), messages, options

    def _unanswered(self, batches: Sequence[Batch], bar: tqdm) -> Iterator[tuple[tuple[str, str], list, dict]]:
        for batch in batches:
            requests = list(self._requests(batch))
            kept = self.store.get(key for (_, key), _, _ in requests)
            bar.update(len(kept))
            yield from (request for request in requests if request[0][1] not in kept)

    def generate(self, batches: Sequence[Batch], bar: tqdm) -> Iterator[tuple[int, list[list[Response]]]]:
        budget = Budget() if self.budget is None else self.budget
        problems: dict[str, str] = {}  # of a prompt

        def keep(tag: tuple[str, str], answer: Completion | RequestRejectedError) -> None:
            prompt_id, key = tag
            if isinstance(answer, RequestRejectedError):  # and is not kept: it costs nothing to ask again
                problems[prompt_id] = str(answer)
                return
            tokens = [answer.prompt_tokens, answer.completion_tokens]
            kept = {"text": answer.text, "finish_reason": answer.finish_reason, "tokens": tokens, "cost": answer.cost}
            self.store.put(key, f"student {self.endpoint.model}", kept)
            bar.update()
            bar.set_postfix(cost=f"{budget.spent:.4g}", refresh=False)

        requests = self._unanswered(batches, bar)
        first = next(requests, None)
        if first is not None:
            self.endpoint.check(**first[2])
            requests = chain([first], requests)
            failures = run_async(lambda: self.endpoint.complete_all(requests, keep, budget))
            if failures:
                raise EndpointError(
                    f"{len(failures)} requests to {self.endpoint.where} had no answer after "
                    f"{self.endpoint.max_retries} retries; the last one: {failures[-1]}. All others are kept: run "
                    "this again to ask for these."
                )
        for batch in batches:
            for prompt_id, answer in self._answers(batch):
                if answer is not None and answer["finish_reason"] not in FINISHED:
                    problems[prompt_id] = f"a response ended for the reason {answer['finish_reason']!r}"
        if problems:
            named = ", ".join(f"{prompt_id!r} ({why})" for prompt_id, why in list(problems.items())[:_NAMED])
            more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            raise EndpointError(
                f"{len(problems)} prompts have no response to some request: {named}{more}. All other responses are "
                "kept: leave these prompts out, and run this again with the same store."
            )
        for batch in batches:
            texts = [Response(answer["text"], answer["finish_reason"]) for _, answer in self._answers(batch)]
            n = len(batch.temperatures)
            yield batch.index, [texts[i : i + n] for i in range(0, len(texts), n)]

    def _answers(self, batch: Batch) -> list[tuple[str, dict[str, Any] | None]]:
        """What is kept of the requests of a batch, with the ids of their prompts."""
        tags = [tag for tag, _, _ in self._requests(batch)]
        kept = self.store.get(key for _, key in tags)
        return [(prompt_id, kept.get(key)) for prompt_id, key in tags]
