# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
How noisy the labels are, where the dataset allows to tell.

The model: each label is that of an annotator who names the better response with probability 1 - e and the other one
with e, independently of everything else. From what can be seen of repeated labels follows e:

- two labels of the same pair differ with probability 2 e (1 - e): one is right and the other is wrong, in one order or
  the other;
- three responses a > b > c, each two compared once, form a cycle with probability e (1 - e): a > b, b > c, c > a takes
  one wrong label, of the pair (a, c), e (1 - e)^2; b > a, c > b, a > c takes two, e^2 (1 - e); their sum is e (1 - e).
  No other outcome of the three is a cycle.

Both are solved for the e below 1/2. Annotators that copy each other, rows that are copies, or pairs that were made
from a ranking, agree without being right: with them the estimate is too low, and where nothing at all disagrees there
is none. Images are not read: where there are some, what looks like a repeated comparison may be one of other images,
and only votes are counted.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from .findings import Finding, percent, wilson
from .rows import Rows


# From this flip rate on, labels are called noisy. Our rule of thumb: DPO's loss weighs a wrong label of a confident
# model most of all
NOISY = 0.1
_FEWEST = 30  # cases, below which a single wrong label would decide
VOTES = ("votes", "annotations", "annotator_labels")
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
_LARGEST_GROUP = 200  # responses to one prompt that are searched for cycles
_REMEDIES = {
    "pairs": "IPO, or Stable PO, rather than DPO, whose loss rewards ever larger margins on wrong labels, too.",
    "unpaired": "Have the responses with both labels rated again, or keep the majority's label.",
}


def flip_rate(disagreement: float) -> float:
    """The e below 1/2 of which two labels of a pair differ with a probability 2 e (1 - e); 1/2 if they differ more often than that allows."""
    return (1 - math.sqrt(max(1 - 2 * disagreement, 0.0))) / 2


def _estimate(source: str, disagreement: dict[str, Any]) -> dict[str, Any]:
    """Flip rate by a disagreement rate, which grows with it, so that the ends of the interval are those of the flip rate, too."""
    low, high = disagreement["interval"]
    return {
        "source": source,
        "flip_rate": flip_rate(disagreement["rate"]),
        "interval": [flip_rate(low), flip_rate(high)],
        "disagreement": disagreement,
    }


def _pairs_table(rows: Rows) -> pd.DataFrame:
    """One row a comparison: the prompt, the two things that are compared, and whether the smaller one is better."""
    if rows.shape.kind == "unpaired":  # the response against what it is not
        return pd.DataFrame({"prompt": rows.prompts, "low": rows.responses, "high": 0, "label": rows.ranks == 0})
    chosen, rejected = rows.pairs(rows.responses)
    table = pd.DataFrame(
        {
            "prompt": rows.prompts,
            "low": np.minimum(chosen, rejected),
            "high": np.maximum(chosen, rejected),
            "label": chosen < rejected,
        }
    )
    return table[chosen != rejected]


def repeated_comparisons(rows: Rows) -> dict[str, Any]:
    """
    Of pairs that were compared several times (same prompt, same responses, in either order), how often two labels
    differ. Of unpaired rows, of the same response to the same prompt.

    Args:
        rows ([`Rows`]):
            Pairs or unpaired rows.

    Returns:
        `dict[str, Any]`: `groups` (pairs that were compared several times), `conflicting` ones among them, and
        `disagreement`: the probability that two of the labels of such a pair differ, each pair counting once.
    """
    groups = _pairs_table(rows).groupby(["prompt", "low", "high"], sort=False)["label"].agg(["size", "sum"])
    groups = groups[groups["size"] > 1]
    number, ones = groups["size"].to_numpy(), groups["sum"].to_numpy()
    shares = 2 * ones * (number - ones) / (number * (number - 1))
    return {
        "groups": len(groups),
        "conflicting": int((shares > 0).sum()),
        "disagreement": wilson(float(shares.sum()), len(groups)),
    }


def intransitive_triples(rows: Rows) -> dict[str, Any]:
    """
    Of three responses to a prompt that were all compared with one another, how often they form a cycle.

    Args:
        rows ([`Rows`]):
            Pairs.

    Returns:
        `dict[str, Any]`: `triples`, `cycles` among them, and `rate`: their share, each prompt counting once.
    """
    table = _pairs_table(rows).drop_duplicates()
    table = table[~table.duplicated(["prompt", "low", "high"], keep=False)]  # those that have both labels say nothing
    table = table.sort_values("prompt")
    prompt_of, low, high, label = (table[name].to_numpy() for name in ("prompt", "low", "high", "label"))
    winners, losers = np.where(label, low, high), np.where(label, high, low)
    _, starts, sizes = np.unique(prompt_of, return_index=True, return_counts=True)
    triples = cycles = prompts = 0
    shares = 0.0
    for start, stop in zip(starts[sizes >= 3], (starts + sizes)[sizes >= 3], strict=True):
        ends = np.concatenate([winners[start:stop], losers[start:stop]])
        responses, indices = np.unique(ends, return_inverse=True)
        n = len(responses)
        if n > _LARGEST_GROUP:
            continue
        better = np.zeros((n, n), dtype=np.int64)
        better[indices[: stop - start], indices[stop - start :]] = 1
        compared = better + better.T
        found = int(np.trace(compared @ compared @ compared)) // 6
        if found:
            of_prompt = int(np.trace(better @ better @ better)) // 3
            triples, cycles, prompts = triples + found, cycles + of_prompt, prompts + 1
            shares += of_prompt / found
    return {"triples": triples, "cycles": cycles, "prompts": prompts, "rate": wilson(shares, prompts)}


def _labels_of(votes: Any) -> list[Any]:
    """The labels that a row's votes name a response by; ties and abstentions are none."""
    labels = []
    for vote in votes or []:
        if isinstance(vote, dict):  # of `trl_spo.synthetic`: share of the vote that is for the chosen one
            vote = vote.get("for_chosen")
            vote = None if vote is None or abs(vote - 0.5) < 1e-9 else vote > 0.5
        if vote is None or vote == 0.5 or str(vote).casefold() in ("tie", "both", "neither", "none", ""):
            continue
        labels.append(vote)
    return labels


def annotator_votes(column: Iterable[Any]) -> dict[str, Any] | None:
    """
    How far annotators agree, by a column with their votes.

    Args:
        column (`Iterable`):
            Of each row, a list of labels (such as `["a", "b", "a"]` or `[1, 0, 1]`; `None`, `0.5` and `"tie"` are left
            out), a list of votes of `trl_spo.synthetic`, or the number of votes for the chosen response, where its
            largest value is taken for the number of annotators.

    Returns:
        `dict[str, Any]`, *optional*: `annotators` (most of a row), `sizes`: how many rows have how many votes,
        `disagreement`: the probability that two votes for the same pair differ, each row counting once; and
        `of_number`, whether the votes were such numbers. `None` if the values are none of these.
    """
    values = [value for value in column if value is not None]
    if values and all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        annotators = max(values)
        if annotators < 2 or 2 * min(values) <= annotators:  # no majority: these count something else
            return None
        patterns = [(value, annotators - value) for value in values]
        of_number = True
    elif values and all(isinstance(value, list) for value in values):
        labels = [_labels_of(value) for value in values]
        if len({str(label) for of_row in labels for label in of_row}) > 2:  # ratings, or several kinds of labels
            return None
        patterns = [tuple(Counter(map(str, of_row)).values()) for of_row in labels if of_row]
        annotators, of_number = max(map(sum, patterns), default=0), False
    else:
        return None
    sizes = Counter(map(sum, patterns))
    shares = 0.0
    for pattern in patterns:
        n = sum(pattern)
        if n > 1:
            shares += 1 - sum(k * (k - 1) for k in pattern) / (n * (n - 1))
    return {
        "annotators": annotators,
        "sizes": dict(sizes),
        "disagreement": wilson(shares, sizes.total() - sizes[1]),
        "of_number": of_number,
    }


def majority_error(rate: float, annotators: int) -> float:
    """Probability that the majority of annotators, each wrong with the same probability, is wrong; of a tie, half."""
    total = 0.0
    for wrong in range(annotators + 1):
        weight = 1.0 if 2 * wrong > annotators else 0.5 if 2 * wrong == annotators else 0.0
        total += weight * math.comb(annotators, wrong) * rate**wrong * (1 - rate) ** (annotators - wrong)
    return total


def _label_error(rate: float, sizes: dict[int, int]) -> float:
    """Share of wrong labels, if rows have so many votes each."""
    return sum(rows * majority_error(rate, number) for number, rows in sizes.items()) / sum(sizes.values())


def _by_votes(dataset: Dataset, unknown: list[str]) -> dict[str, Any] | None:
    for name in VOTES:
        found = annotator_votes(dataset[name]) if name in dataset.column_names else None
        if found is None or found["disagreement"]["number"] == 0:
            continue
        if found["disagreement"]["rate"] == 0:
            unknown.append(f"by `{name}`, all annotators agree")
            continue
        if found["disagreement"]["interval"][0] > 0.5:  # than which the model has no more
            unknown.append(f"the labels of `{name}` differ more often than votes for one of two responses can")
            continue
        one = _estimate("votes", found["disagreement"])
        sizes = found["sizes"]
        one |= {"column": name, **found, "of_annotator": one["flip_rate"]}
        # The label is that of the majority
        one["interval"] = [_label_error(end, sizes) for end in one["interval"]]
        one["flip_rate"] = _label_error(one["of_annotator"], sizes)
        return one
    return None


def noise_findings(dataset: Dataset, rows: Rows) -> list[Finding]:
    """
    How noisy the labels are.

    Args:
        dataset ([`~datasets.Dataset`]):
            The train split, whose columns with votes and scores are read.
        rows ([`Rows`]):
            Its rows.

    Returns:
        `list[Finding]`: the first has the code `label_noise`, and in its data the `estimates`, of those that have
        enough cases the most direct one first, its `flip_rate`, and whether labels are `noisy`: `None` if there are too
        few cases to say, or none.
    """
    estimates, unknown = [], []
    if rows.shape.kind == "pairs":
        votes = _by_votes(dataset, unknown)
        if votes is not None:
            estimates.append(votes)
    if rows.shape.images:
        unknown.append("comparisons of the same texts may be of different images, and were not counted")
    if rows.shape.kind != "lists" and not rows.shape.images:
        repeated = repeated_comparisons(rows)
        if repeated["conflicting"]:
            estimates.append({**_estimate("repeated", repeated["disagreement"]), **repeated})
        elif repeated["groups"]:
            unknown.append(
                f"{repeated['groups']} comparisons are there several times, always with the same label, as copies would be"
            )
    if rows.shape.kind == "pairs" and not rows.shape.images:
        triples = intransitive_triples(rows)
        if triples["cycles"]:
            # A cycle has probability e (1 - e), half of that with which two labels differ
            doubled = {key: value for key, value in triples["rate"].items() if key == "number"}
            doubled |= {
                "rate": 2 * triples["rate"]["rate"],
                "interval": [min(2 * end, 1.0) for end in triples["rate"]["interval"]],
            }
            estimates.append({**_estimate("cycles", doubled), **triples})
        elif triples["triples"]:
            unknown.append(
                f"none of {triples['triples']} triples of responses is a cycle, as pairs made from a ranking would be"
            )
    estimates.sort(key=lambda one: one["disagreement"]["number"] < _FEWEST)
    return [_noise_finding(estimates, unknown, rows.shape.kind), *_score_findings(dataset)]


def _in_words(estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"]
    text = f"{estimate['flip_rate']:.1%} ({low:.1%} to {high:.1%})"
    differ = percent(estimate["disagreement"])
    if estimate["source"] == "votes":
        n = estimate["annotators"]
        counted = (
            f", taking the largest value of `{estimate['column']}`, {n}, for their number"
            if estimate["of_number"]
            else ""
        )
        return f"{text} by the votes of up to {n} annotators, two of whom differ in {differ} of the rows{counted}"
    if estimate["source"] == "repeated":
        return f"{text} by {estimate['groups']} comparisons that are there several times, of which two labels differ in {differ}"
    return f"{text} by {estimate['triples']} triples of responses to {estimate['prompts']} prompts, of which {estimate['cycles']} are cycles"


def _is_noisy(estimate: dict[str, Any]) -> bool | None:
    low, high = estimate["interval"]
    if estimate["disagreement"]["number"] < _FEWEST or low < NOISY <= high:
        return None
    return low >= NOISY


def _noise_finding(estimates: list[dict[str, Any]], unknown: list[str], kind: str) -> Finding:
    because = f" ({'; '.join(unknown)})" if unknown else ""
    if not estimates:
        return Finding(
            "label_noise",
            "info",
            "Label noise: no estimate",
            "Nothing in the dataset says how often its labels are wrong: no votes of several annotators, no comparison with different labels, no "
            f"cycle{because}.",
            "Let two people label a hundred of the pairs again: of two labels, a share of 2e(1-e) differs if each is wrong with probability e.",
            {"estimates": [], "flip_rate": None, "noisy": None},
        )
    noisy = _is_noisy(estimates[0])
    doubt = "" if noisy is not None else f" Whether that is above {NOISY:.0%} cannot be told by so few cases."
    return Finding(
        "label_noise",
        "warning" if noisy else "info",
        "Labels are noisy" if noisy else "Label noise",
        f"Estimated share of wrong labels: {'; '.join(_in_words(estimate) for estimate in estimates)}{because}. This takes labels as independent; "
        f"annotators who make the same mistakes, and copies, make it too low.{doubt}",
        _REMEDIES[kind] if noisy else "",
        {"estimates": estimates, "flip_rate": estimates[0]["flip_rate"], "noisy": noisy},
    )


def _score_findings(dataset: Dataset) -> list[Finding]:
    names = next((pair for pair in SCORES if set(pair) <= set(dataset.column_names)), None)
    if names is not None:
        chosen, rejected = (pd.to_numeric(pd.Series(dataset[name][:]), errors="coerce").to_numpy() for name in names)
        margins, source = chosen - rejected, f"`{names[0]}` and `{names[1]}`"
    elif "margin" in dataset.column_names:
        margins, source = pd.to_numeric(pd.Series(dataset["margin"][:]), errors="coerce").to_numpy(), "`margin`"
    else:
        return []
    number = int((~np.isnan(margins)).sum())
    findings = []
    for code, count, title, what, severity in (
        (
            "score_contradictions",
            int((margins < 0).sum()),
            "Scores against labels",
            "the rejected response has the higher score",
            "warning",
        ),
        (
            "score_ties",
            int((margins == 0).sum()),
            "Pairs without a difference",
            "both responses have the same score",
            "info",
        ),
    ):
        if count:
            share = wilson(count, number)
            findings.append(
                Finding(
                    code,
                    severity,
                    title,
                    f"By {source}, in {count} of {number} rows ({percent(share, exact=True)}) {what}: which one was chosen is "
                    + ("against the scores." if severity == "warning" else "arbitrary."),
                    "Remove these pairs.",
                    {"count": count, "share": share, "columns": source},
                )
            )
    return findings
