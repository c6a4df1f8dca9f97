# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether there are enough examples, and whether each of them says anything."""

import numpy as np
from datasets import Dataset

from ..preference_checks import check_preferences
from .findings import Finding, percent, wilson
from .rows import Rows, as_text


TOO_FEW, FEW = 500, 5000
# A share of rows from which on something is how the dataset was made, and no accident. Our rule of thumb
_HABIT = 0.5
# Methods of TRL that train on an empty response, of which the end-of-sequence token is left
_TAKES_EMPTY = ("dpo", "ipo", "kto", "rlhf")
# What else a column with prompts is called, and rows that are looked at
_PROMPTS = ("question", "instruction", "input", "query", "user")
_LOOKED_AT = 100


def _share(count: int, rows: Rows) -> tuple[dict, str]:
    share = wilson(count, len(rows))
    return share, f"{count} of {len(rows)} rows ({percent(share, exact=True)})"


def _count(flags: np.ndarray) -> int:
    return int(flags.sum())


def rows_with(rows: Rows, of_responses: np.ndarray) -> np.ndarray:
    """Which rows have a response of which something is true."""
    return np.bincount(rows.rows[of_responses], minlength=len(rows)) > 0


def identical_rows(rows: Rows, exact: bool) -> np.ndarray:
    """Which pairs, or lists, have nothing but one response; with `exact=False`, but for case and white space."""
    values = rows.exact if exact else rows.responses
    if rows.shape.kind == "unpaired":
        return np.zeros(len(rows), dtype=bool)
    sizes = np.bincount(rows.rows, minlength=len(rows))
    first = np.full(len(rows), 0, dtype=np.int64)
    first[rows.rows[::-1]] = values[::-1]
    return (sizes > 1) & ~rows_with(rows, values != first[rows.rows])


def usable_rows(rows: Rows) -> np.ndarray:
    """Which rows a model can learn from: nothing missing or empty, not all responses the same, and no copy of an earlier row."""
    _, first = np.unique(rows.keys, return_index=True)
    copies = np.full(len(rows), not rows.shape.images)  # which may be what differs
    copies[first] = False
    return ~(rows.flags["missing"] | rows_with(rows, rows.empty) | identical_rows(rows, exact=False) | copies)


def size_findings(rows: Rows, usable: int, total: int | None) -> list[Finding]:
    """
    Whether there are enough examples. The marks are those of the guide: fewer than 500 are too few, 5,000 the usual
    floor for reliable results.

    Args:
        rows ([`Rows`]):
            Rows of the train split that were looked at.
        usable (`int`):
            How many of the train split a model can learn from.
        total (`int`, *optional*):
            Rows of the train split. `None` if it streams: then nobody knows.

    Returns:
        `list[Finding]`
    """
    if usable >= FEW:
        return []
    data = {"usable": usable, "rows": total, "looked_at": len(rows)}
    if total is None:
        detail = (
            f"The dataset streams. {usable} of the first {len(rows)} rows are usable; how many there are is not known."
        )
        remedy = f"Fewer than {TOO_FEW} are too few, {FEW} the usual floor for reliable results: look at so many (`--max_examples {FEW}`)."
        return [Finding("size_unknown", "info", "The number of examples is not known", detail, remedy, data)]
    of_all = "" if usable == total else f" ({total} rows, without those that teach nothing and without copies)"
    about = "About " if len(rows) < total else ""
    detail = f"{about}{usable} usable examples{of_all}."
    if usable < TOO_FEW:
        remedy = "Collect more, or make some with `trl-spo synthesize`. Supervised fine-tuning can do with fewer."
        title = f"Fewer than {TOO_FEW} examples"
        detail += " That is too few to align a model with."
        return [Finding("too_few_examples", "error", title, detail, remedy, data)]
    remedy = (
        "Train with several seeds and look at how far they agree, and evaluate on several hundred held-out prompts."
    )
    detail += f" {FEW} are the usual floor for reliable results."
    return [Finding("few_examples", "warning", f"Fewer than {FEW} examples", detail, remedy, data)]


def quality_findings(rows: Rows, method: str | None = None) -> list[Finding]:
    """
    What is wrong with single rows.

    Args:
        rows ([`Rows`]):
            Rows of the train split.
        method (`str`, *optional*):
            The method that is checked.

    Returns:
        `list[Finding]`
    """
    findings: list[Finding] = []

    def add(code: str, severity: str, title: str, count: int, detail: str, remedy: str, **data) -> None:
        share, text = _share(count, rows)
        findings.append(
            Finding(code, severity, title, f"{text}{detail}", remedy, {"count": count, "share": share, **data})
        )

    missing = _count(rows.flags["missing"])
    if missing:
        add(
            "missing_values",
            "error",
            "Missing values",
            missing,
            " have no prompt or lack a response.",
            "Remove them.",
        )
    empty = _count(rows_with(rows, rows.empty) & ~rows.flags["missing"])
    if empty:
        unsplit = bool(rows.flags["no_split"].any())
        lenient = method in _TAKES_EMPTY and not unsplit
        add(
            "empty_responses",
            "warning" if lenient else "error",
            "Empty responses",
            empty,
            " have a response without any text: "
            + (
                "it is trained on as an end-of-sequence token alone."
                if lenient
                else "without a column `prompt`, the trainers stop where they look for what chosen and rejected have in common."
                if unsplit
                else "SoftPOTrainer, StablePOTrainer and the SSPO trainers refuse them, TRL's trainers train on the end-of-sequence token alone."
            ),
            "Remove the rows.",
        )
    blank = _count(rows_with(rows, rows.blank))
    if blank:
        add(
            "blank_responses",
            "warning",
            "Responses of white space",
            blank,
            " have a response of white space only.",
            "Remove the rows.",
        )
    bad_labels = _count(rows.flags["bad_label"])
    if bad_labels:
        remedy = "Use `true` for a desirable, `false` for an undesirable response."
        add(
            "bad_labels",
            "error",
            "Labels that are no labels",
            bad_labels,
            " have a `label` that is neither true nor false.",
            remedy,
        )
    findings += _identical_findings(rows)
    findings += _format_findings(rows)
    return findings


def list_findings(dataset: Dataset, rows: Rows) -> list[Finding]:
    """
    What SoftPOTrainer refuses of lists, in its own words.

    Args:
        dataset ([`~datasets.Dataset`]):
            The train split.
        rows ([`Rows`]):
            Its rows.

    Returns:
        `list[Finding]`
    """
    if rows.shape.kind != "lists":
        return []
    try:
        check_preferences(dataset, "train")
    except ValueError as error:
        return [Finding("rows_refused", "error", "Lists that are refused", str(error), "")]
    return []


def prompt_findings(dataset: Dataset, rows: Rows) -> list[Finding]:
    """
    Whether pairs without a column `prompt` have prompts in them.

    Args:
        dataset ([`~datasets.Dataset`]):
            The train split, whose other columns may have them.
        rows ([`Rows`]):
            Its rows.

    Returns:
        `list[Finding]`
    """
    if not rows.shape.implicit_prompt:
        return []
    names = [name for name in _PROMPTS if name in dataset.column_names]
    first = dataset.select_columns([*names, "chosen"])[:_LOOKED_AT]
    for name in names:
        # Of several words: no names of users
        texts = [
            (value.strip(), as_text(chosen))
            for value, chosen in zip(first[name], first["chosen"], strict=True)
            if isinstance(value, str) and " " in value.strip()
        ]
        if sum(value not in chosen for value, chosen in texts) > _HABIT * len(first["chosen"]):
            return [
                Finding(
                    "prompt_column",
                    "error",
                    "The prompts are not trained on",
                    "There is no column `prompt`, and the trainers take what chosen and rejected have in common for it. The prompts seem to be "
                    f"in the column `{name}`, and are not in chosen: the model would be trained on answers without their questions.",
                    f'`dataset.rename_column("{name}", "prompt")`, both as text or both as messages.',
                    {"column": name},
                )
            ]
    count = _count(rows.flags["no_prompt"])
    if count == 0:
        return []
    share, text = _share(count, rows)
    return [
        Finding(
            "no_prompt",
            "warning",
            "Pairs without a prompt",
            f"There is no column `prompt`, and the trainers take what chosen and rejected have in common for it. In {text} that is nothing: the model "
            "is trained on answers without a question.",
            "Add a column `prompt`, or remove these rows.",
            {"count": count, "share": share},
        )
    ]


def _identical_findings(rows: Rows) -> list[Finding]:
    if rows.shape.kind == "unpaired":
        return []
    exact, alike = _count(identical_rows(rows, exact=True)), _count(identical_rows(rows, exact=False))
    findings = []
    if exact == len(rows):
        findings.append(
            Finding(
                "identical_responses",
                "error",
                "Nothing is preferred",
                f"In all {len(rows)} rows, the responses are identical.",
                "Check how the dataset was made.",
                {"count": exact, "share": wilson(exact, len(rows))},
            )
        )
    elif alike:
        share, text = _share(alike, rows)
        case = f", {alike - exact} of them but for case and white space" if alike > exact else ""
        findings.append(
            Finding(
                "identical_responses",
                "warning",
                "Identical responses",
                f"In {text}, the responses are the same{case}: they teach nothing.",
                "Remove the rows.",
                {"count": alike, "exact": exact, "share": share},
            )
        )
    return findings


def _format_findings(rows: Rows) -> list[Finding]:
    findings = []
    flags = {name: _count(values) for name, values in rows.flags.items()}
    together, text = _share(flags["together"], rows)
    if together["rate"] >= _HABIT:
        findings.append(
            Finding(
                "no_separator",
                "warning",
                "Prompts run into responses",
                f"In {text}, the prompt does not end and a response does not begin with white space. Plain texts are put together as they are, "
                "so that the model reads `How are you?Fine.`",
                'Make them conversational (`[{"role": "user", "content": ...}]`), or end the prompts with what shall separate them.',
                {"count": flags["together"], "share": together},
            )
        )
    repeats, text = _share(flags["repeats_prompt"], rows)
    if repeats["rate"] >= _HABIT:
        findings.append(
            Finding(
                "prompt_repeated",
                "warning",
                "Responses repeat the prompt",
                f"In {text}, a response begins with the prompt. The trainers put prompt and response together, so that it would be there twice.",
                'Take it off, or leave the column out: `dataset.remove_columns("prompt")`.',
                {"count": flags["repeats_prompt"], "share": repeats},
            )
        )
    if flags["cut_word"]:
        share, text = _share(flags["cut_word"], rows)
        findings.append(
            Finding(
                "implicit_prompt_cuts_words",
                "warning" if share["rate"] >= _HABIT else "info",
                "Implicit prompts end within a word",
                f"There is no column `prompt`, and TRL takes what chosen and rejected have in common for it, character by character. In {text} that "
                "ends within a word: responses that begin alike lose their beginning to the prompt.",
                "Add a column `prompt`.",
                {"count": flags["cut_word"], "share": share},
            )
        )
    if flags["not_assistant"]:
        share, text = _share(flags["not_assistant"], rows)
        findings.append(
            Finding(
                "role_of_response",
                "warning",
                "Responses that are not the assistant's",
                f"In {text}, a response does not end with a message of the role `assistant`: the model is trained to write somebody else's part.",
                "Use the role `assistant`, and cut conversations after its last message.",
                {"count": flags["not_assistant"], "share": share},
            )
        )
    if flags["prompt_of_assistant"]:
        share, text = _share(flags["prompt_of_assistant"], rows)
        findings.append(
            Finding(
                "role_of_prompt",
                "warning",
                "Prompts that end with the assistant",
                f"In {text}, the last message of the prompt is of the role `assistant`, and a response follows as another message.",
                "End the prompts with what the user says.",
                {"count": flags["prompt_of_assistant"], "share": share},
            )
        )
    return findings


def balance_findings(rows: Rows, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> list[Finding]:
    """
    Whether desirable and undesirable responses weigh the same, for KTO. The range is that of Eq. (8) of [KTO's
    paper](https://huggingface.co/papers/2402.01306), which TRL warns by as well: `w_D n_D / (w_U n_U)` from 1 to 4/3.

    Args:
        rows ([`Rows`]):
            Unpaired rows.
        desirable_weight, undesirable_weight (`float`, *optional*, defaults to `1.0`):
            Options of KTO.

    Returns:
        `list[Finding]`
    """
    desirable = _count(rows.ranks == 0)
    undesirable = len(rows) - desirable
    data = {"desirable": desirable, "undesirable": undesirable}
    if min(desirable, undesirable) == 0:
        which = "desirable" if desirable else "undesirable"
        detail = f"All {len(rows)} responses are {which}: nothing says what is better than what."
        return [Finding("one_label", "error", "Only one label", detail, "Add responses of the other label.", data)]
    ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
    if 0.995 <= ratio <= 1.335:  # TRL rounds the weights to two digits
        return []
    data |= {"ratio": ratio}
    # One of the two stays as it is: whichever can be raised
    if ratio > 4 / 3:
        name, low, high = (
            "undesirable_weight",
            desirable_weight * desirable / undesirable * 3 / 4,
            desirable_weight * desirable / undesirable,
        )
    else:
        name, low, high = (
            "desirable_weight",
            undesirable_weight * undesirable / desirable,
            undesirable_weight * undesirable / desirable * 4 / 3,
        )
    data |= {"option": name, "range": [low, high]}
    return [
        Finding(
            "unbalanced_labels",
            "warning",
            "Labels are not balanced",
            f"{desirable} desirable and {undesirable} undesirable responses, with weights {desirable_weight:g} and {undesirable_weight:g}: all the "
            f"desirable ones weigh {ratio:.2f} times as much as the others. KTO's paper recommends 1 to 1.33.",
            f"Set `{name}` between {low:.2f} and {high:.2f}.",
            data,
        )
    ]
