# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""A jury of critics: asks each of them about each pair, in both orders, and keeps every answer."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from .critics import Critic, EndpointCritic, Request, RuleCritic, batched
from .endpoint import Budget, Completion, EndpointError, RequestRejectedError, run_async
from .store import AnswerStore
from .verdicts import Verdict, tally, vote_of_orders, vote_of_scores


_LOOKUP = 1024  # requests that are looked up in the store together: many more than are under way at once


@dataclass(frozen=True)
class Pair:
    """
    Two responses to a prompt, by their ids.

    Args:
        prompt_id (`str`):
            Id of the prompt.
        response_ids (`tuple[str, str]`):
            Ids of the responses.
        prompt (`str` or `list[dict[str, str]]`):
            Prompt, standard or conversational.
        responses (`tuple[str, str]`):
            Texts of the responses.
        columns (`dict[str, Any]`):
            The other columns of the prompt.
    """

    prompt_id: str
    response_ids: tuple[str, str]
    prompt: str | list[dict[str, str]]
    responses: tuple[str, str]
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def differs(self) -> bool:
        """Whether there is something to judge: two texts, and not the same."""
        first, second = (response.strip() for response in self.responses)
        return bool(first and second and first != second)


class Jury:
    """
    Critics who judge together.

    Args:
        critics (`Sequence[Critic]`):
            Who they are.

    Raises:
        `ValueError`: there is none, or one of them is there twice.
    """

    def __init__(self, critics: Sequence[Critic]):
        if not critics:
            raise ValueError("A jury needs a critic, and `critics` is empty.")
        names = Counter(critic.name for critic in critics)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"There are several critics with the name {twice[0]!r}. Give each a name of its own.")
        seen: dict[str, str] = {}
        for critic in critics:
            key = critic.identity()
            if key is not None and seen.setdefault(key, critic.name) != critic.name:
                raise ValueError(
                    f"The critics {seen[key]!r} and {critic.name!r} are one and the same: model, rubric and settings are equal, and it "
                    "would vote twice. Leave one out, or give it more `weight`."
                )
        self.critics = list(critics)

    def check(self, columns: dict[str, Any]) -> None:
        """
        Before anything is asked: whether each critic can judge prompts with these columns.

        Raises:
            `ValueError` or [`EndpointError`]: one of them cannot.
        """
        for critic in self.critics:
            critic.check(columns)

    def ask(self, pairs: Iterable[Pair], store: AnswerStore, budget: Budget | None = None) -> None:
        """
        Asks each critic what is not in the store yet: of a pair, those that compare in both orders. The models in this process one after
        another, then all endpoints at once.

        Args:
            pairs (`Iterable[Pair]`):
                Pairs, those of a prompt together. They are gone through several times.
            store ([`AnswerStore`]):
                Where the answers are kept as they come.
            budget ([`Budget`], *optional*):
                Limit of what the endpoints may cost.

        Raises:
            [`EndpointError`]: an endpoint cannot be used, or requests are without an answer after all retries.
            [`SpendingLimitError`]: the next request might exceed the limit.
        """
        budget = Budget() if budget is None else budget
        endpoints = [critic for critic in self.critics if isinstance(critic, EndpointCritic)]
        numbers = _count_requests(pairs)
        for critic in self.critics:
            if isinstance(critic, EndpointCritic | RuleCritic):
                continue
            with tqdm(desc=critic.name, unit=" answers", total=numbers[critic.compares]) as bar:
                for key, answer in critic.answer(_unanswered(critic, pairs, store, bar)):
                    store.put(key, critic.name, answer)
                    bar.update()
        if not endpoints:
            return

        async def ask_all() -> list[list[str]]:
            number = numbers[EndpointCritic.compares]
            return await asyncio.gather(*(_ask_endpoint(critic, pairs, number, store, budget) for critic in endpoints))

        for critic, failures in zip(endpoints, run_async(ask_all), strict=True):
            if failures:
                raise EndpointError(
                    f"{len(failures)} requests to the critic {critic.name!r} had no answer after {critic.endpoint.max_retries} retries; "
                    f"the last one: {failures[-1]}. All others are kept: run this again to ask for these."
                )

    def verdicts(self, pairs: Iterable[Pair], store: AnswerStore) -> Iterator[dict[str, Any]]:
        """
        What the jury says of each pair, from the answers that are kept: rows of `prompt_id`, `response_ids`, `lengths` (characters of
        the responses), `votes` (of each critic; those of rules have `"rule": True`), `share`, `winner` (an id, or `None`),
        `confidence` and `truth` (the id that the rules say is right, or `None`). Of a pair in which a response is empty, or the other
        one again, nobody is asked, and it has no votes.

        Raises:
            `ValueError`: a critic has not answered about a pair.
        """
        for pair in pairs:
            votes = [self._vote(critic, pair, store) for critic in self.critics] if pair.differs else []
            verdict, truth = self._tally(votes, rules=False), self._tally(votes, rules=True)
            yield {
                "prompt_id": pair.prompt_id,
                "response_ids": list(pair.response_ids),
                "lengths": [len(response) for response in pair.responses],
                "votes": votes,
                "share": verdict.share,
                "winner": None if verdict.winner is None else pair.response_ids[verdict.winner],
                "confidence": verdict.confidence,
                "truth": None if truth.winner is None else pair.response_ids[truth.winner],
            }

    def _tally(self, votes: list[dict[str, Any]], rules: bool) -> Verdict:
        """Of the rules, or of all others: where a rule decides, nobody else counts."""
        return tally(
            [
                (vote["share"], critic.weight)
                for vote, critic in zip(votes, self.critics, strict=False)  # without votes if nobody was asked
                if isinstance(critic, RuleCritic) == rules
            ]
        )

    def _vote(self, critic: Critic, pair: Pair, store: AnswerStore) -> dict[str, Any]:
        requests = _requests(critic, pair)
        if isinstance(critic, RuleCritic):
            answers = [answer for _, answer in critic.answer(enumerate(requests))]
        else:
            keys = [critic.key(request) for request in requests]
            kept = store.get(keys)
            if len(kept) < len(set(keys)):
                raise ValueError(
                    f"The critic {critic.name!r} has not answered about the prompt {pair.prompt_id!r}. Run `Jury.ask` to its end first."
                )
            answers = [kept[key] for key in keys]
        found: dict[str, Any] = {"critic": critic.name}
        if isinstance(critic, RuleCritic):
            found["rule"] = True
        if critic.compares:
            vote = vote_of_orders(*answers)
            for name in ("verdict", "rationale", "correct"):
                if name in answers[0]:
                    found[f"{name}s" if name != "correct" else name] = [answer.get(name) for answer in answers]
        else:
            scores = [answer["score"] for answer in answers]
            vote = vote_of_scores(*scores, graded=not isinstance(critic, RuleCritic))
            found["scores"] = scores
        found |= {"status": vote.status, "share": vote.share}
        tokens = [answer["tokens"] for answer in answers if "tokens" in answer]
        if tokens:
            found["tokens"] = [sum(counts) for counts in zip(*tokens, strict=True)]
            found["cost"] = sum(answer.get("cost", 0.0) for answer in answers)
        return found


def _requests(critic: Critic, pair: Pair) -> tuple[Request, Request]:
    """The pair in both orders, or each of its responses."""
    first, second = pair.responses
    texts = ((first, second), (second, first)) if critic.compares else ((first,), (second,))
    return tuple(Request(pair.prompt, responses, pair.columns) for responses in texts)


def _count_requests(pairs: Iterable[Pair]) -> dict[bool, int]:
    """Of critics that compare and of those that score, how many requests there are about pairs: for the time that is left."""
    compared, scored, prompt_id, responses = 0, 0, None, set()
    for pair in filter(lambda pair: pair.differs, pairs):
        if pair.prompt_id != prompt_id:
            prompt_id, scored, responses = pair.prompt_id, scored + len(responses), set()
        compared += 2
        responses.update(pair.responses)
    return {True: compared, False: scored + len(responses)}


def _unanswered(critic: Critic, pairs: Iterable[Pair], store: AnswerStore, bar: tqdm) -> Iterator[tuple[str, Request]]:
    """
    The requests to a critic that have no answer yet, with their keys, each once.

    Another process may share the store. One that began elsewhere, and has caught up with it, would go on to ask the same at the same
    time: so those that are looked up together come in random order, and each is looked up again when its turn comes.
    """

    def requests() -> Iterator[tuple[str, Request]]:
        prompt_id, seen = None, set()
        for pair in filter(lambda pair: pair.differs, pairs):
            if pair.prompt_id != prompt_id:  # so that what is remembered does not grow
                prompt_id, seen = pair.prompt_id, set()
            for request in _requests(critic, pair):
                key = critic.key(request)
                if key not in seen:
                    seen.add(key)
                    yield key, request

    rng = random.SystemRandom()  # not that of the seed, which the processes share
    for some in batched(requests(), _LOOKUP):
        kept = store.get(key for key, _ in some)
        left = [(key, request) for key, request in some if key not in kept]
        bar.update(len(kept))
        rng.shuffle(left)
        for key, request in left:
            if key in store:
                bar.update()
            else:
                yield key, request


async def _ask_endpoint(
    critic: EndpointCritic, pairs: Iterable[Pair], number: int, store: AnswerStore, budget: Budget
) -> list[str]:
    with tqdm(desc=critic.name, unit=" answers", total=number) as bar:

        def requests() -> Iterator[tuple[str, list[dict[str, str]], dict[str, Any]]]:
            options = critic.options()
            for key, request in _unanswered(critic, pairs, store, bar):
                yield key, critic.messages(request), options

        def keep(key: str, answer: Completion | RequestRejectedError) -> None:
            store.put(key, critic.name, critic.read(answer))
            bar.update()
            bar.set_postfix(cost=f"{budget.spent:.4g}", refresh=False)

        return await critic.endpoint.complete_all(requests(), keep, budget)
