# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Which judged pairs are good enough to train on, and why the others are not."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .critics import batched
from .near_duplicates import jaccard


# In the order in which they are looked for: of several, a pair is dropped for the first
REASONS = (
    "empty response",
    "no votes",
    "tie",
    "label contradicts the ground truth",
    "rationale contradicts the ground truth",
    "low confidence",
    "low probability",
    "small margin",
    "length ratio",
    "near-identical responses",
    "refusal",
    "toxicity",
)

_I_CANNOT = (
    r"i(?: can't| cannot| can not| won't| will not|(?:'m| am) (?:unable|not able) to)(?: be able to| and will not)?\b"
)
_SORRY = r"(?:(?:(?:i'm|i am) )?(?:so |very |really |truly )?sorry|i apologi[sz]e|my apologies),?(?: but)?"
_OPENINGS = rf"(?:{_SORRY} |(?:no|unfortunately|i'm afraid|i am afraid),?(?: that)? |as an? [^,.\n]*, )*"
_DO_IT = (
    r"(?:help(?! but\b)|assist|answer|provide|fulfill?|satisfy|comply|complete|continue|discuss|engage|create|generate|produce|write"
    r"|support|give|offer|share|do (?:that|this|so)|respond|participate|advise|encourage|condone)\b"
)
# Of refusals in English, matched at the start of a response, whatever its case, with ' for ’
REFUSAL_PATTERNS = (
    rf"{_SORRY} (?:as an? [^,.\n]*, )?{_I_CANNOT}",
    rf"{_OPENINGS}{_I_CANNOT} {_DO_IT}",
    rf"{_OPENINGS}i (?:must|have to|need to|will have to) (?:respectfully |politely )?(?:decline|refuse)\b",
    rf"{_OPENINGS}i(?:'m not| am not| don't feel| do not feel) comfortable\b",
)
_BATCH = 64  # responses whose toxicity is asked for together
_FIELDS = (
    "prompt_id",
    "response_ids",
    "chosen_id",
    "rejected_id",
    "chosen",
    "rejected",
    "confidence",
    "margin",
    "winner",
    "truth",
    "votes",
)
# What a critic may claim to be correct: of the first and the second response that it was shown
_CLAIMS = {"A": (True, False), "B": (False, True), "both": (True, True), "neither": (False, False)}


@dataclass
class FilterConfig:
    r"""
    What a judged pair needs to be trained on. Each filter but those of ties, missing votes, empty responses and the ground truth can be
    switched off.

    > Parameters that control what the jury must say

    Args:
        min_confidence (`float`, *optional*, defaults to `0.5`):
            Least confidence of the jury, from 0 to 1. Where a rule knows the truth, the jury is not needed: this, `min_probability` and
            `min_margin` do not apply.
        min_probability (`float`, *optional*):
            Least probability that the chosen response is the better one, from 0 to 1, by the jury's votes and what they are worth on a
            human check set ([`fit_calibration`]). Pairs of which the jury was not asked have none, and are dropped.
        min_margin (`float`, *optional*):
            Least margin between the responses, at least 0.

        > Parameters that control what the responses must be

        max_length_ratio (`float`, *optional*):
            Most that the longer response may be of the shorter one, in characters, at least 1.
        max_similarity (`float`, *optional*, defaults to `0.95`):
            Most that the responses may be alike, from 0 to 1: the share of their pieces of five characters that both have. Equal responses
            are always dropped; with `None` only those.
        drop_refusals (`bool`, *optional*, defaults to `True`):
            Whether to drop pairs whose chosen response is a refusal, also if both are: they teach to refuse. A refusal that is rejected
            stays. Set it to `False` for prompts that should be refused.
        refusal_patterns (`tuple[str, ...]`, *optional*, defaults to `REFUSAL_PATTERNS`):
            Regular expressions of refusals, matched at the start of a response, whatever its case, after white space, and with `'` for
            `’`. Those by default are of English.
        toxicity (`Callable`, *optional*):
            Function from a list of texts to a list of as many scores. It is given up to 64 chosen responses at once, of pairs that no
            other filter drops.
        max_toxicity (`float`, *optional*, defaults to `0.5`):
            Most toxic that a chosen response may be.

    Raises:
        `ValueError`: an option is out of its range.
    """

    min_confidence: float = 0.5
    min_probability: float | None = None
    min_margin: float | None = None
    max_length_ratio: float | None = None
    max_similarity: float | None = 0.95
    drop_refusals: bool = True
    refusal_patterns: tuple[str, ...] = REFUSAL_PATTERNS
    toxicity: Callable[[list[str]], Sequence[float]] | None = None
    max_toxicity: float = 0.5

    def __post_init__(self) -> None:
        for name, least, most in (
            ("min_confidence", 0, 1),
            ("min_probability", 0, 1),
            ("min_margin", 0, math.inf),
            ("max_length_ratio", 1, math.inf),
            ("max_similarity", 0, 1),
            ("max_toxicity", -math.inf, math.inf),
        ):
            value = getattr(self, name)
            can_be_none = name not in ("min_confidence", "max_toxicity")
            if not (can_be_none if value is None else least <= value <= most):
                raise ValueError(
                    f"`{name}` must be from {least} to {most}{', or `None`' if can_be_none else ''}, got {value}."
                )
        if self.toxicity is not None and not callable(self.toxicity):
            raise ValueError(f"`toxicity` must be a function of a list of texts, or `None`, got {self.toxicity!r}.")
        if isinstance(self.refusal_patterns, str):
            raise ValueError(
                f"`refusal_patterns` must be a tuple of regular expressions, got the text {self.refusal_patterns!r}. Put it into one."
            )
        for pattern in self.refusal_patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{pattern!r} of `refusal_patterns` is not a regular expression: {error}. Correct it."
                ) from error


def filter_pairs(rows: Iterable[dict[str, Any]], config: FilterConfig) -> Iterator[tuple[dict[str, Any], str | None]]:
    """
    Which pairs to train on. Where a rule knows the truth, its response must be the chosen one, and otherwise the jury's winner.

    Args:
        rows (`Iterable[dict[str, Any]]`):
            Pairs as [`Jury.verdicts`] gives them (`prompt_id`, `response_ids`, `votes`, `winner`, `confidence`, `truth`), with
            `chosen_id`, `rejected_id`, their texts `chosen` and `rejected`, `margin` and, for `min_probability`, `probability`. A vote may have `correct`: what the critic
            claims to be correct in each order, `"A"`, `"B"`, `"both"`, `"neither"`, or `None` if nothing.
        config ([`FilterConfig`]):
            What they need.

    Yields:
        `tuple[dict[str, Any], str | None]`: each row, in order, with the first of `REASONS` that it is dropped for, or `None` if it is
        kept.

    Raises:
        `TypeError`: `toxicity` returns something else than numbers.
        `ValueError`: a row does not fit together, or `toxicity` returns too few or too many scores, or NaN.
    """
    refusals = (
        [re.compile(pattern, re.IGNORECASE) for pattern in config.refusal_patterns] if config.drop_refusals else []
    )
    for batch in batched(rows, _BATCH):
        reasons = [_reason(row, config, refusals) for row in batch]
        if config.toxicity is not None:
            kept = [i for i, reason in enumerate(reasons) if reason is None]
            for i, score in zip(kept, _scores(config.toxicity, [batch[i]["chosen"] for i in kept]), strict=True):
                if score > config.max_toxicity:
                    reasons[i] = "toxicity"
        yield from zip(batch, reasons, strict=True)


def _reason(row: dict[str, Any], config: FilterConfig, refusals: Sequence[re.Pattern]) -> str | None:
    missing = [name for name in _FIELDS if name not in row]
    if missing:
        raise ValueError(f"A judged pair has no `{missing[0]}`, but {sorted(row)}. Add it.")
    chosen, rejected, winner, truth = row["chosen"], row["rejected"], row["winner"], row["truth"]
    if not chosen.strip() or not rejected.strip():
        return "empty response"
    if winner is None and truth is None:
        return "no votes" if all(vote["share"] is None for vote in row["votes"]) else "tie"
    if winner is not None and truth is not None and winner != truth:
        return "label contradicts the ground truth"
    best = winner if truth is None else truth
    if row["chosen_id"] != best or {best, row["rejected_id"]} != set(row["response_ids"]):
        raise ValueError(
            f"Of the responses {row['response_ids']} to the prompt {row['prompt_id']!r}, {row['chosen_id']!r} is chosen and "
            f"{row['rejected_id']!r} rejected, but {best!r} is better. Choose that one."
        )
    if truth is not None:
        # What a rule grades need not be right, or wrong, because it has the higher, or the lower, score
        graded = any(set(vote.get("scores") or ()) - {0, 1, None} for vote in row["votes"] if vote.get("rule"))
        if any(_contradicts(vote, row["response_ids"], truth, graded) for vote in row["votes"]):
            return "rationale contradicts the ground truth"
    else:
        # Of 3 votes of 5, |2 · 0.6 - 1| is below 0.2. NaN is not enough either
        if not row["confidence"] >= config.min_confidence - 1e-9:
            return "low confidence"
        if config.min_probability is not None:
            if row.get("probability") is None and row["votes"]:
                raise ValueError(
                    f"A pair of the prompt {row['prompt_id']!r} has votes and no probability, and `min_probability={config.min_probability}` "
                    "needs one. Calibrate the jury by a human check set, or set it to `None`."
                )
            if row.get("probability") is None or not row["probability"] >= config.min_probability:
                return "low probability"
        if config.min_margin is not None:
            if row["margin"] is None:
                raise ValueError(
                    f"A pair of the prompt {row['prompt_id']!r} has no margin, and `min_margin={config.min_margin}` needs one. Set it to "
                    "`None`."
                )
            if not row["margin"] >= config.min_margin:
                return "small margin"
    shorter, longer = sorted((len(chosen), len(rejected)))
    if config.max_length_ratio is not None and longer > config.max_length_ratio * shorter:
        return "length ratio"
    if chosen == rejected or (config.max_similarity is not None and jaccard(chosen, rejected) > config.max_similarity):
        return "near-identical responses"
    start = chosen.lstrip().replace("’", "'")
    if any(refusal.match(start) for refusal in refusals):
        return "refusal"
    return None


def _contradicts(vote: dict[str, Any], response_ids: Sequence[str], truth: str, graded: bool) -> bool:
    """
    Whether a critic that votes for the truth claims, in one of the orders, that it is wrong, or that the other response is right; of
    graded truths, both.
    """
    if vote["status"] != "vote" or not (vote["share"] > 0.5 if truth == response_ids[0] else vote["share"] < 0.5):
        return False
    for claim, shown in zip(vote.get("correct") or (None, None), (response_ids, response_ids[::-1]), strict=True):
        if claim is None:
            continue
        if claim not in _CLAIMS:
            raise ValueError(
                f"The critic {vote['critic']!r} claims that {claim!r} is correct. It must be one of {list(_CLAIMS)}, or `None`."
            )
        right = (shown[0] == truth, shown[1] == truth)
        if _CLAIMS[claim] == right[::-1] or (_CLAIMS[claim] != right and not graded):
            return True
    return False


def _scores(toxicity: Callable[[list[str]], Sequence[float]], texts: list[str]) -> list[float]:
    if not texts:
        return []
    name = getattr(toxicity, "__name__", repr(toxicity))
    found = toxicity(texts)
    try:
        scores = [float(score) for score in found]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"The function {name!r} (`toxicity`) must return a number for each text, and returned {found!r}."
        ) from error
    if len(scores) != len(texts):
        raise ValueError(
            f"The function {name!r} (`toxicity`) must return a score for each of {len(texts)} texts, and returned {len(scores)}."
        )
    for text, score in zip(texts, scores, strict=True):
        if math.isnan(score):
            raise ValueError(f"The function {name!r} (`toxicity`) returned NaN for the text {text!r}.")
    return scores
