# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""How diverse the responses of a model are."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from sacrebleu.metrics import BLEU

from .scoring import ResponseScorer


def distinct_n(texts: Sequence[str], n: int, num_words: int | None = None) -> float | None:
    """
    Share of different n-grams of words among all n-grams of all texts (Li et al., 2016).

    Args:
        texts (`Sequence[str]`):
            Texts.
        n (`int`):
            Words of an n-gram.
        num_words (`int`, *optional*):
            Words of each text that count. More words repeat more, so that two sets are compared by the same number.

    Returns:
        `float`, *optional*: `None` if there is no n-gram.
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()[:num_words]
        grams.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return len(grams) / grams.total() if grams else None


def self_bleu(groups: Iterable[Sequence[str]]) -> float | None:
    """
    How much alike the responses to a prompt are: mean BLEU of each of them against the others, from 0 to 1 (Zhu et al., 2018).

    Args:
        groups (`Iterable[Sequence[str]]`):
            Of each prompt its responses.

    Returns:
        `float`, *optional*: `None` if no prompt has two responses that are not empty.
    """
    bleu = BLEU(effective_order=True)  # or a short response would have none with itself
    scores = []
    for group in groups:
        group = [text for text in group if text.strip()]
        for i, text in enumerate(group if len(group) > 1 else ()):
            scores.append(bleu.sentence_score(text, [*group[:i], *group[i + 1 :]]).score / 100)
    return math.fsum(scores) / len(scores) if scores else None


def response_diversity(
    scorer: ResponseScorer, samples: Dataset | Sequence[dict[str, Any]], num_words: int = 64
) -> dict[str, Any]:
    """
    How diverse a student's responses are.

    Args:
        scorer ([`ResponseScorer`]):
            The student.
        samples (`Sequence[dict[str, Any]]`):
            Rows of candidates: `prompt`, and `responses` with `text`.
        num_words (`int`, *optional*, defaults to `64`):
            Words of a response that count for distinct-n.

    Returns:
        `dict[str, Any]`: `distinct_1`, `distinct_2`, `self_bleu`; `entropy`, the mean entropy in nats of the distributions that the
        tokens of the responses are drawn from, at temperature 1; and `mean_words` of a response.
    """
    groups = [[response["text"] for response in row["responses"]] for row in samples]
    texts = [text for group in groups for text in group]
    scores = scorer.score((row["prompt"], response["text"]) for row in samples for response in row["responses"])
    return {
        "distinct_1": distinct_n(texts, 1, num_words),
        "distinct_2": distinct_n(texts, 2, num_words),
        "self_bleu": self_bleu(groups),
        "entropy": math.fsum(score.entropy for score in scores) / max(sum(score.tokens for score in scores), 1),
        "mean_words": sum(len(text.split()) for text in texts) / max(len(texts), 1),
    }
