# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows and prompts that are there twice: in the train split, and in both splits."""

from importlib.util import find_spec

import numpy as np
from datasets import Dataset

from ..synthetic.near_duplicates import NearDuplicates, normalized
from .findings import Finding, percent, wilson
from .rows import Rows, row_of, text_of


# A share of the rows from which on it matters. Our rules of thumb
_MANY_COPIES = 0.01
_EVALUATION_IS_WORTHLESS = 0.1
# Prompts, and their characters, that are compared without being asked for it, in about five seconds; and characters in
# a minute. Of prompts made from one template, each is compared with all before it
_FEW_PROMPTS, _CHEAP, _PER_MINUTE = 3000, 2_000_000, 24_000_000
_SAMPLED = " Looked at was a sample of the rows, in which most of them are not found: it is at least as many."


def duplicate_findings(rows: Rows, sampled: bool = False) -> list[Finding]:
    """
    Copies of rows, and prompts that are there several times.

    Args:
        rows ([`Rows`]):
            Rows of the train split.
        sampled (`bool`, *optional*, defaults to `False`):
            Whether these are some of them only.

    Returns:
        `list[Finding]`
    """
    findings = []
    copies = len(rows) - len(np.unique(rows.keys))
    if copies:
        share = wilson(copies, len(rows))
        findings.append(
            Finding(
                "duplicate_rows",
                "warning" if share["rate"] >= _MANY_COPIES else "info",
                "Copies of rows",
                f"{copies} of {len(rows)} rows ({percent(share, exact=True)}) are copies of others, but for case and white space: they count twice."
                + _SAMPLED * sampled,
                "Remove them, unless they are votes of several annotators: then keep one row with the majority.",
                {"count": copies, "share": share},
            )
        )
    prompts = len(np.unique(rows.prompts))
    if prompts < 0.99 * len(rows):
        findings.append(
            Finding(
                "repeated_prompts",
                "info",
                "Prompts with several rows",
                f"{len(rows)} rows have {prompts} different prompts, {len(rows) / prompts:.1f} rows each.",
                "Split by prompt and not by row, or the evaluation sees prompts of the training.",
                {"rows": len(rows), "prompts": prompts},
            )
        )
    return findings


def leakage_findings(train: Rows, test: Rows | None, evaluates: bool = False, sampled: bool = False) -> list[Finding]:
    """
    What the two splits share, but for case and white space.

    Args:
        train ([`Rows`]):
            Rows of the train split.
        test ([`Rows`], *optional*):
            Rows of the split for evaluation.
        evaluates (`bool`, *optional*, defaults to `False`):
            Whether the training is to evaluate on it.
        sampled (`bool`, *optional*, defaults to `False`):
            Whether these are some of the rows only.

    Returns:
        `list[Finding]`
    """
    if test is None:
        return [
            Finding(
                "no_eval_split",
                "error" if evaluates else "info",
                "Nothing to evaluate on",
                "There is no split for evaluation, "
                + (
                    "and the training would stop at `eval_strategy`."
                    if evaluates
                    else "so that leakage was not looked for."
                ),
                "Keep some hundred prompts apart: `dataset.train_test_split(test_size=0.05)`, by prompt.",
            )
        ]
    findings = []
    whole, prompts = (
        int(np.isin(ours, theirs).sum()) for ours, theirs in ((test.keys, train.keys), (test.prompts, train.prompts))
    )
    if whole:
        share = wilson(whole, len(test))
        worthless = share["rate"] >= _EVALUATION_IS_WORTHLESS
        findings.append(
            Finding(
                "leaked_rows",
                "error" if worthless else "warning",
                "Rows of the evaluation are trained on",
                f"{whole} of {len(test)} rows of the split for evaluation ({percent(share, exact=True)}) are in the train split, too"
                + (": what is measured on them says nothing." if worthless else ".")
                + _SAMPLED * sampled,
                "Remove them from one of the two.",
                {"count": whole, "share": share},
            )
        )
    # A prompt that all rows have is no leak: there is nothing to remember
    constant = len(np.unique(train.prompts)) == 1
    if prompts > whole and not constant:
        share = wilson(prompts, len(test))
        findings.append(
            Finding(
                "leaked_prompts",
                "warning",
                "Prompts of the evaluation are trained on",
                f"{prompts} of {len(test)} rows of the split for evaluation ({percent(share, exact=True)}) have a prompt of the train split."
                + _SAMPLED * sampled,
                "Split by prompt.",
                {"count": prompts, "share": share},
            )
        )
    return findings


def _prompts(dataset: Dataset, rows: Rows, indices: np.ndarray) -> list:
    prompts = []
    for example in dataset.select(indices).select_columns(rows.shape.columns):
        prompt = row_of(example, rows.shape)[0] or ""
        if not isinstance(prompt, str):
            prompt = [{"role": message.get("role"), "content": text_of(message)} for message in prompt]
        prompts.append(normalized(prompt))
    return prompts


def near_duplicate_findings(
    datasets: tuple[Dataset, Dataset | None], rows: tuple[Rows, Rows | None], threshold: float | None = None
) -> list[Finding]:
    """
    Prompts that are nearly equal to another one: pieces of five characters that both have, by [`NearDuplicates`].

    Args:
        datasets (`tuple`):
            The train split and, maybe, that for evaluation.
        rows (`tuple`):
            Their [`Rows`].
        threshold (`float`, *optional*):
            Similarity from which on they are. By default 0.8, if there are few enough prompts for that to take
            seconds, whatever they are.

    Returns:
        `list[Finding]`
    """
    train, test = rows
    _, first = np.unique(train.prompts, return_index=True)
    of_test = [] if test is None else np.flatnonzero(~np.isin(test.prompts, train.prompts))
    size = int(train.prompt_characters[first].sum())
    size += 0 if test is None else int(test.prompt_characters[of_test].sum())
    number, reason = len(first) + len(of_test), None
    if find_spec("datasketch") is None:
        reason = 'That needs the package `datasketch`: `pip install "trl-spo[synthetic]"`.'
    elif threshold is None and (size > _CHEAP or number > _FEW_PROMPTS):
        reason = (
            f"{number} prompts of {size / 1e6:.1f} million characters take about {max(size / _PER_MINUTE, 1):.0f} min, and longer if they are made from one "
            "template: pass `--near_duplicates 0.8`."
        )
    if reason is not None:
        return [
            Finding(
                "near_duplicates_not_checked",
                "info",
                "Near-duplicates were not looked for",
                reason,
                "",
                {"size": size},
            )
        ]
    threshold = 0.8 if threshold is None else threshold
    near = NearDuplicates(threshold, len(first))
    alike = sum(near.find(prompt, add=True) is not None for prompt in _prompts(datasets[0], train, np.sort(first)))
    findings = []
    if alike:
        share = wilson(alike, len(first))
        findings.append(
            Finding(
                "near_duplicate_prompts",
                "info",
                "Prompts that are nearly equal",
                f"{alike} of {len(first)} different prompts ({percent(share, exact=True)}) are nearly equal to an earlier one (similarity of at least "
                f"{threshold:g}).",
                "Prompts made from one template are alike by design; otherwise keep one of each (`trl_spo.synthetic.prepare_prompts`).",
                {"count": alike, "share": share, "threshold": threshold},
            )
        )
    if test is not None and len(of_test):
        leaked = sum(near.find(prompt) is not None for prompt in _prompts(datasets[1], test, of_test))
        if leaked:
            share = wilson(leaked, len(test))
            findings.append(
                Finding(
                    "near_leakage",
                    "warning",
                    "Prompts of the evaluation are nearly those of the training",
                    f"{leaked} of {len(test)} rows of the split for evaluation ({percent(share, exact=True)}) have a prompt that is nearly equal to "
                    f"one of the train split (similarity of at least {threshold:g}), besides those that are equal.",
                    "Remove them from one of the two.",
                    {"count": leaked, "share": share, "threshold": threshold},
                )
            )
    return findings
