# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Whether pairs were glued together from binary feedback: a good response to one prompt and a bad response to another.

What is looked for. If the rejected response of a pair was taken from anywhere, it has no more to do with the prompt of
the pair than with any other prompt. So its words are compared with those of its own prompt and with those of other
prompts, drawn at random: let u be the probability that it has more in common with its own one. Of a response that has
nothing to do with its prompt, u is exactly 1/2, whatever the dataset; of one that answers it, more. If a share g of
the rejected responses were glued, u_rejected = g / 2 + (1 - g) u, where the other responses of the dataset say what u
is: g is estimated by 1 - (u_rejected - 1/2) / (u_chosen - 1/2), and likewise with chosen and rejected exchanged.

What cannot be known: responses that ignore the prompt of their own accord look the same, and where prompts and the
responses to them have no words in common (a constant prompt, another language), nothing can be told. Refusals ignore
their prompts, and are what is chosen in datasets about safety: responses that all make do with few words are called
canned and not glued, and of chosen responses there is a warning at most.
"""

import math
import re
from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset

from .findings import Finding, percent, wilson
from .rows import Rows, as_text, row_of


_ROWS = 2000  # that are looked at
_FEWEST = 50
_OTHERS = 5  # prompts that each is compared with
# u above 1/2 by so much: the words of prompts and responses have something to do with one another
_INFORMATIVE = 0.1
# Shares of glued pairs. Without any, up to 0.13 were seen, in pairs whose rejected responses miss the point on purpose
# (LLMBar)
_GLUED, _ALL_GLUED = 0.3, 0.8
# Responses are canned whose distinct words are fewer than this share of those of the other responses
_CANNED = 0.25
# Responses that are used again, of more than this number of characters, are no "yes" or "I don't know"
_LONG = 40
_REUSED = 0.3
_LONG_WORD = 4
_FIRST_WITHOUT_SPACES = "\u2e80"  # Chinese, Japanese: words are not set apart


def words(text: str) -> set[str]:
    """The longer words of a text, and of scripts without spaces all pairs of characters."""
    found = set()
    for word in re.findall(r"\w+", text.casefold()):
        if word[0] >= _FIRST_WITHOUT_SPACES:
            found.update(word[i : i + 2] for i in range(max(len(word) - 1, 1)))
        elif len(word) >= _LONG_WORD:
            found.add(word)
    return found


def relevance(
    prompts: list[set[str]], responses: list[set[str]], others: np.ndarray, rarity: dict[str, float]
) -> np.ndarray:
    """
    Of each response, how often it has more in common with its own prompt than with another one.

    Args:
        prompts, responses (`list[set[str]]`):
            Their words.
        others (`np.ndarray` of shape `(N, K)`):
            Indices of other prompts.
        rarity (`dict[str, float]`):
            What each word counts.

    Returns:
        `np.ndarray` of shape `(N,)`: shares, 1/2 for what is equal.
    """
    shares = np.empty(len(prompts))
    for i, response in enumerate(responses):
        own, *rest = (sum(rarity[word] for word in prompts[j] & response) for j in (i, *others[i]))
        shares[i] = sum(1.0 if own > other else 0.5 if own == other else 0.0 for other in rest) / len(rest)
    return shares


def glued_share(of_one: np.ndarray, of_other: np.ndarray, prompts: np.ndarray) -> dict[str, Any] | None:
    """
    Estimated share of pairs whose one response has nothing to do with the prompt, while the other one has.

    Args:
        of_one, of_other (`np.ndarray` of shape `(N,)`):
            Their [`relevance`].
        prompts (`np.ndarray` of shape `(N,)`):
            Which rows have the same prompt: these are not independent.

    Returns:
        `dict[str, Any]`, *optional*: `estimate` and `interval`. `None` if the relevance of the other one is too near
        1/2 to say.
    """
    _, group = np.unique(prompts, return_inverse=True)
    one, other = of_one - 0.5, of_other - 0.5
    estimate = 1 - one.mean() / other.mean() if other.mean() > 0 else 0.0

    def error(values: np.ndarray) -> float:
        return math.sqrt((np.bincount(group, values - values.mean()) ** 2).sum()) / len(values)

    if other.mean() < max(_INFORMATIVE, 3 * error(other)):
        return None
    half = 1.96 * error(one - (1 - estimate) * other) / other.mean()  # of a ratio, by the delta method
    return {"estimate": float(estimate), "interval": [float(estimate - half), float(estimate + half)]}


def _other_rows(prompts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of each row, some that have another prompt."""
    others = rng.integers(len(prompts), size=(len(prompts), _OTHERS))
    while True:
        same = prompts[others] == prompts[:, None]
        if not same.any():
            return others
        others[same] = rng.integers(len(prompts), size=int(same.sum()))


def glued_findings(dataset: Dataset, rows: Rows, seed: int = 0) -> list[Finding]:
    """
    Whether pairs look as if they were glued together from binary feedback.

    Args:
        dataset ([`~datasets.Dataset`]):
            The train split.
        rows ([`Rows`]):
            Its rows, which are pairs.
        seed (`int`, *optional*, defaults to `0`):
            Of the rows that are looked at, and of the other prompts.

    Returns:
        `list[Finding]`
    """
    findings = _other_prompts(rows) + _reused(rows)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(rows), size=min(_ROWS, len(rows)), replace=False))
    prompts = rows.prompts[chosen]
    _, counts = np.unique(prompts, return_counts=True)
    if len(chosen) < _FEWEST or counts.max() > len(chosen) / 2:
        return findings
    texts = []
    for example in dataset.select(chosen).select_columns(rows.shape.columns):
        prompt, responses, _ = row_of(example, rows.shape)
        texts.append([words(as_text(part)) for part in (prompt, *responses)])
    number = Counter(word for row in texts for word in set().union(*row))
    rarity = {word: math.log(len(texts) / count) for word, count in number.items()}
    of_prompt, of_chosen, of_rejected = (list(column) for column in zip(*texts, strict=True))
    others = _other_rows(prompts, rng)
    better, worse = (relevance(of_prompt, column, others, rarity) for column in (of_chosen, of_rejected))
    data = {
        "rows": len(chosen),
        "relevance_chosen": float(better.mean()),
        "relevance_rejected": float(worse.mean()),
        "rejected": glued_share(worse, better, prompts),
        "chosen": glued_share(better, worse, prompts),
    }
    vocabulary = {
        name: len(set().union(*column)) for name, column in (("chosen", of_chosen), ("rejected", of_rejected))
    }
    for which, other in (("rejected", "chosen"), ("chosen", "rejected")):
        share = data[which]
        if share is None or share["interval"][0] < _GLUED:
            continue
        low, high = share["interval"]
        if vocabulary[which] < _CANNED * vocabulary[other]:
            findings.append(_canned(which, other, vocabulary))
            continue
        findings.append(
            Finding(
                "glued_pairs",
                "error" if low >= _ALL_GLUED and which == "rejected" else "warning",
                "Pairs that look glued together from binary feedback",
                f"By the words that they share with it, about {share['estimate']:.0%} ({low:.0%} to {min(high, 1):.0%}) of the {which} responses have "
                f"nothing to do with the prompt of their pair: they have more in common with it than with another prompt in "
                f"{data[f'relevance_{which}']:.0%} of the cases (50% is chance), the {other} ones in {data[f'relevance_{other}']:.0%}. "
                f"{len(chosen)} rows were looked at. Such pairs teach what a prompt is about, and not which answer is better. Responses that ignore "
                "their prompt by themselves, as refusals do, look the same.",
                "Look at some. If they were glued, take each response with its own prompt and label (`prompt`, `completion`, `label`), and train with KTO.",
                data | {"which": which},
            )
        )
    return findings


def _canned(which: str, other: str, vocabulary: dict[str, int]) -> Finding:
    return Finding(
        "canned_responses",
        "info",
        f"Canned {which} responses",
        f"The {which} responses have little to do with their prompts, and make do with {vocabulary[which]} different words, where the {other} ones "
        f"have {vocabulary[other]}: refusals, for example. A model soon tells the two apart by them alone.",
        "",
        {"which": which, "words": vocabulary},
    )


def _other_prompts(rows: Rows) -> list[Finding]:
    count = int(rows.flags["other_prompt"].sum())
    if count == 0:
        return []
    share = wilson(count, len(rows))
    return [
        Finding(
            "different_prompts",
            "error" if share["rate"] >= _ALL_GLUED else "warning",
            "Chosen and rejected answer different prompts",
            f"In {count} of {len(rows)} rows ({percent(share, exact=True)}), chosen and rejected have different questions in them. They are not two "
            "answers to one question.",
            "Remove these rows. If the dataset was made from single ratings, keep it unpaired (`prompt`, `completion`, `label`), and train with KTO.",
            {"count": count, "share": share},
        )
    ]


def _reused(rows: Rows) -> list[Finding]:
    """Long responses that are given to several prompts."""
    for which, ours in zip(("chosen", "rejected"), (slice(0, None, 2), slice(1, None, 2)), strict=True):
        responses, long = rows.responses[ours], rows.characters[ours] > _LONG
        pairs = np.unique(np.stack([responses, rows.prompts], axis=1), axis=0)
        several, counts = np.unique(pairs[:, 0], return_counts=True)
        again = long & np.isin(responses, several[counts > 1])
        share = wilson(int(again.sum()), len(rows))
        if share["interval"][0] < _REUSED:
            continue
        return [
            Finding(
                "reused_responses",
                "warning",
                f"The same {which} responses to several prompts",
                f"In {share['rate']:.0%} of the rows, the {which} response, of more than {_LONG} characters, is that of other prompts, too. It may be "
                "a canned answer, or pairs glued together from binary feedback.",
                "Look at the rows. What was rated by itself belongs to KTO, unpaired.",
                {"which": which, "share": share},
            )
        ]
    return []
