# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""From candidates to the pairs that the jury is asked about, and from its verdicts to the pairs to train on."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from typing import Any

import numpy as np

from .calibration import vote_probability
from .jury import Pair
from .ranking import bradley_terry, compared_pairs, ranked_list, select_pairs


# Why a pair is not even filtered
NO_PAIR = "no response is better than another"
AGAINST_OTHERS = "contradicts the other verdicts"


class CandidatePairs:
    """
    The pairs of candidates to compare, made anew each time that they are gone through.

    Args:
        candidates (`Iterable[dict[str, Any]]`):
            Rows of `prompt_id`, `prompt`, `responses` (each with `id` and `text`) and other columns.
        num_comparisons (`int`, *optional*):
            Pairs of a prompt, all by default. See [`compared_pairs`].
        start (`int`, *optional*, defaults to `0`):
            Prompt to begin with; those before it come last. Processes that share a store begin at different ones.
    """

    def __init__(self, candidates: Iterable[dict[str, Any]], num_comparisons: int | None = None, start: int = 0):
        self.candidates = candidates
        self.num_comparisons = num_comparisons
        self.start = start

    def __iter__(self) -> Iterator[Pair]:
        for row in chain(islice(self.candidates, self.start, None), islice(self.candidates, self.start)):
            columns = {name: value for name, value in row.items() if name not in ("prompt_id", "prompt", "responses")}
            responses = row["responses"]
            for i, j in compared_pairs(len(responses), self.num_comparisons, seed_key=row["prompt_id"]):
                yield Pair(
                    prompt_id=row["prompt_id"],
                    response_ids=(responses[i]["id"], responses[j]["id"]),
                    prompt=row["prompt"],
                    responses=(responses[i]["text"], responses[j]["text"]),
                    columns=columns,
                )


def judged_candidates(
    candidates: Iterable[dict[str, Any]], verdicts: Iterable[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], np.ndarray]]:
    """
    Each row of candidates with its verdicts and the shares of the votes, `(n, n)`, where a rule's truth counts for all.

    Raises:
        `ValueError`: the verdicts are not those of the candidates.
    """
    groups = groupby(verdicts, key=lambda verdict: verdict["prompt_id"])
    for row in candidates:
        prompt_id, group = next(groups, (None, ()))
        if prompt_id != row["prompt_id"]:
            raise ValueError(
                f"The candidates have the prompt {row['prompt_id']!r} where the verdicts have {prompt_id!r}. Judge these candidates again."
            )
        group = list(group)
        index = {response["id"]: i for i, response in enumerate(row["responses"])}
        shares = np.full((len(index), len(index)), np.nan)
        for verdict in group:
            i, j = (index[response_id] for response_id in verdict["response_ids"])
            share = (
                verdict["share"] if verdict["truth"] is None else float(verdict["truth"] == verdict["response_ids"][0])
            )
            if share is not None:
                shares[i, j], shares[j, i] = share, 1 - share
        yield row, group, shares
    if next(groups, None) is not None:
        raise ValueError("There are more verdicts than candidates. Judge these candidates again.")


def preference_pairs(
    candidates: Iterable[dict[str, Any]],
    verdicts: Iterable[dict[str, Any]],
    pairing: str = "best_worst",
    seed: int = 42,
    calibration: dict[str, Any] | None = None,
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """
    The pairs that may become training pairs, for [`filter_pairs`].

    Args:
        candidates (`Iterable[dict[str, Any]]`):
            Rows of candidates.
        verdicts (`Iterable[dict[str, Any]]`):
            What [`Jury.verdicts`] says of their pairs, in the same order.
        pairing (`str`, *optional*, defaults to `"best_worst"`):
            Which pairs of a prompt: `"best_worst"`, `"best_random"` or `"all"`. See [`select_pairs`].
        seed (`int`, *optional*, defaults to `42`):
            Of random choices.
        calibration (`dict[str, Any]`, *optional*):
            What the votes are worth ([`fit_calibration`]).

    Yields:
        `tuple[dict[str, Any], str | None]`: rows with the verdict and with `prompt`, `chosen`, `rejected`, their ids, `margin`, the
        difference of their strengths, and `probability`, that the chosen one is better by the votes (`None` without a calibration and
        where the jury was not asked); and why it is none already: `NO_PAIR`, for a prompt without any, or `AGAINST_OTHERS`.
    """
    for row, group, shares in judged_candidates(candidates, verdicts):
        ids = [response["id"] for response in row["responses"]]
        texts = {response["id"]: response["text"] for response in row["responses"]}
        strengths = bradley_terry(shares)
        selected = select_pairs(pairing, strengths, ids, shares, f"{seed} {row['prompt_id']}")
        of_pair = {frozenset(verdict["response_ids"]): verdict for verdict in group}
        shown = [(ids[i], ids[j]) for i, j in selected]
        reasons = dict.fromkeys(shown)
        if pairing == "all":  # also those that cannot be trained on, so that it is known why
            for verdict in group:
                better = verdict["truth"] or verdict["winner"]
                first, second = verdict["response_ids"]
                pair = (second, first) if better == second else (first, second)
                reasons.setdefault(pair, AGAINST_OTHERS if better is not None else None)
        elif not shown:
            yield {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "verdicts": group}, NO_PAIR
        for (chosen, rejected), reason in reasons.items():
            margin = float(strengths[ids.index(chosen)] - strengths[ids.index(rejected)])
            verdict = of_pair.get(frozenset((chosen, rejected)))
            if verdict is None:
                # Of two that were not compared, the others' comparisons say which is better
                verdict = {"prompt_id": row["prompt_id"], "response_ids": [chosen, rejected], "votes": []}
                verdict |= {"share": None, "winner": chosen, "confidence": math.tanh(margin / 2), "truth": None}
            probability = None if calibration is None else vote_probability(verdict["votes"], calibration)
            if probability is not None and chosen != verdict["response_ids"][0]:
                probability = 1 - probability
            yield (
                {
                    "prompt": row["prompt"],
                    "chosen": texts[chosen],
                    "rejected": texts[rejected],
                    **verdict,
                    "chosen_id": chosen,
                    "rejected_id": rejected,
                    "margin": margin,
                    "probability": probability,
                },
                reason,
            )


def ranked_lists(candidates: Iterable[dict[str, Any]], verdicts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """
    The responses of each prompt, best first, with their strengths as `scores`: lists as [`SoftPOTrainer`] takes them. A prompt of which
    no response is better than another has none.
    """
    for row, _, shares in judged_candidates(candidates, verdicts):
        order, scores = ranked_list(bradley_terry(shares), shares)
        if order:
            completions = [row["responses"][i]["text"] for i in order]
            yield {
                "prompt_id": row["prompt_id"],
                "prompt": row["prompt"],
                "completions": completions,
                "scores": scores,
            }
