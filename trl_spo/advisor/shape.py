# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What kind of preferences a dataset holds, and which methods can be trained on it."""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from .findings import Finding


# Method -> what trains it
METHODS = {
    "dpo": "trl.DPOTrainer",
    "ipo": 'trl.DPOTrainer, loss_type="ipo"',
    "kto": "trl.KTOTrainer",
    "soft_po": "trl_spo.SoftPOTrainer",
    "stable_po": "trl_spo.StablePOTrainer",
    "sspo": "trl_spo.SSPOTrainer",
    "sspo_kto": "trl_spo.SSPOKTOTrainer",
    "rlhf": "trl.RewardTrainer, then trl.RLOOTrainer or trl.GRPOTrainer",
}
TITLES = {
    "dpo": "DPO",
    "ipo": "IPO",
    "kto": "KTO",
    "soft_po": "Soft PO",
    "stable_po": "Stable PO",
    "sspo": "SSPO",
    "sspo_kto": "SSPO with KTO",
    "rlhf": "RLHF",
}
ORDERS = ("best", "ranking", "scores")

# Why a method cannot be trained on a kind of preferences
_NEEDS_PAIRS = "it compares two responses to a prompt, and here each stands alone"
_NEEDS_PAIRS_NOT_LISTS = "it takes pairs: make some of each list, or train with Soft PO"
_IMPOSSIBLE = {
    "pairs": {},
    "lists": dict.fromkeys((m for m in METHODS if m != "soft_po"), _NEEDS_PAIRS_NOT_LISTS),
    "unpaired": dict.fromkeys(("dpo", "ipo", "soft_po", "stable_po", "sspo"), _NEEDS_PAIRS)
    | {"rlhf": "a reward model is trained on pairs"},
}
_VISION = "it trains text models, and the dataset has images"
# Rows that are looked at for one with values
_LOOKED_AT = 100


@dataclass(frozen=True)
class Shape:
    """
    What kind of preferences a dataset holds.

    Args:
        kind (`str`, *optional*):
            `"pairs"` (`chosen`, `rejected`), `"lists"` (`completions`, with `best`, `ranking` or `scores`) or
            `"unpaired"` (`completion`, `label`). `None` if it is none of them.
        conversational (`bool`):
            Whether they are messages, and no plain text.
        implicit_prompt (`bool`):
            Whether the prompt is left inside of chosen and rejected.
        columns (`list[str]`):
            The columns that are trained on.
        impossible (`dict[str, str]`):
            The methods that cannot be trained on it, and why.
        images (`bool`):
            Whether there are images, which are not read here.
    """

    kind: str | None
    conversational: bool = False
    implicit_prompt: bool = False
    columns: list[str] = field(default_factory=list)
    impossible: dict[str, str] = field(default_factory=dict)
    images: bool = False

    @property
    def possible(self) -> list[str]:
        """The methods that can be trained on it."""
        return [method for method in METHODS if self.kind is not None and method not in self.impossible]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "format": "conversational" if self.conversational else "standard",
            "prompt": "implicit" if self.implicit_prompt else "explicit",
            "methods": self.possible,
            "impossible": self.impossible,
        }


def _form(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(isinstance(one, dict) and "role" in one for one in value):
        return "messages"
    return f"`{type(value).__name__}`"


def _example(dataset: Dataset, column: str, nested: bool) -> Any:
    """The first value of a column that is not missing; of one with lists of responses, the first response."""
    for value in dataset.select_columns([column])[:_LOOKED_AT][column]:
        if nested and isinstance(value, list):
            value = next((one for one in value if one), None)
        if value:
            return value
    return None


def _unknown(columns: list[str]) -> Finding:
    if {"prompt", "completion"} <= set(columns) or "messages" in columns:
        remedy = (
            "These are examples to imitate (`trl.SFTTrainer`). Add a `label` to `prompt` and `completion`, or make preferences of prompts "
            "with `trl-spo synthesize`."
        )
    elif "prompt" in columns:
        remedy = "Prompts alone prefer nothing: make preferences of them with `trl-spo synthesize`."
    else:
        remedy = "Rename the columns, or choose another `--dataset_config`."
    return Finding(
        "unknown_shape",
        "error",
        "No preferences that a trainer could read",
        f"The columns are {sorted(columns)}. A dataset has pairs (`prompt`, `chosen`, `rejected`), lists (`prompt`, `completions` and one of "
        f"{', '.join(f'`{order}`' for order in ORDERS)}) or unpaired responses (`prompt`, `completion`, `label`).",
        remedy,
        {"columns": sorted(columns)},
    )


def find_shape(dataset: Dataset) -> tuple[Shape, list[Finding]]:
    """
    What kind of preferences a dataset holds, by its columns and its first rows.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.

    Returns:
        `tuple[Shape, list[Finding]]`: the shape, without a kind if nothing else can be looked at, and what is wrong
        with it.
    """
    names = set(dataset.column_names)
    if len(dataset) == 0:
        empty = Finding(
            "empty_dataset", "error", "The dataset is empty", "It has no rows.", "Check the split and the filters."
        )
        return Shape(None), [empty]
    orders = [order for order in ORDERS if order in names]
    impossible: dict[str, str] = {}
    is_list = {"prompt", "completions"} <= names and len(orders) == 1
    if is_list:
        kind, columns, responses = "lists", ["prompt", "completions", *orders], ["completions"]
        if {"chosen", "rejected"} <= names and _form(_example(dataset, "completions", True)).startswith("`"):
            is_list = False  # completions in a form of their own, beside the pairs that were made of them
    if not is_list and {"chosen", "rejected"} <= names:
        kind, responses = "pairs", ["chosen", "rejected"]
        columns = [*(["prompt"] if "prompt" in names else []), *responses]
        if "completions" in names:
            impossible["soft_po"] = "it takes the column `completions` for lists: remove the column"
    elif not is_list and {"prompt", "completion", "label"} <= names:
        kind, columns, responses = "unpaired", ["prompt", "completion", "label"], ["completion"]
    elif not is_list:
        return Shape(None), [_unknown(dataset.column_names)]
    impossible |= _IMPOSSIBLE[kind]
    images = bool({"image", "images"} & names)
    if images:
        impossible |= dict.fromkeys(("soft_po", "stable_po", "sspo", "sspo_kto"), _VISION)

    forms = {}
    for column in ["prompt", *responses] if "prompt" in columns else responses:
        value = _example(dataset, column, nested=column == "completions")
        if value is not None:
            forms[column] = _form(value)
    implicit = "prompt" not in columns
    wrong = {column: form for column, form in forms.items() if form.startswith("`")}
    if wrong or not set(forms) & set(responses):
        seen = ", ".join(f"`{column}` holds {form}" for column, form in wrong.items()) or "all responses are missing"
        return Shape(None), [
            Finding(
                "unknown_shape",
                "error",
                "Prompts and responses are neither texts nor messages",
                f"Of the first {_LOOKED_AT} rows, {seen}.",
                'Use texts, or lists of messages: `[{"role": "user", "content": "..."}]`.',
                {"forms": forms},
            )
        ]
    findings = []
    if len(set(forms.values())) > 1:
        # A prompt of text beside conversations that have it, too, is how several datasets of the Hub come
        remedy = "Make all of them texts, or all of them lists of messages."
        if forms.get("prompt") == "text" and kind == "pairs":
            remedy += ' If the conversations begin with the prompt, `dataset.remove_columns("prompt")` is enough.'
            implicit, columns = True, responses
        findings.append(
            Finding(
                "mixed_formats",
                "error",
                "Texts and messages are mixed",
                f"{', '.join(f'`{column}` holds {form}' for column, form in forms.items())}: the trainers cannot put a text and a list "
                "together.",
                remedy,
                {"forms": forms},
            )
        )
        if not implicit or len({forms[column] for column in responses if column in forms}) > 1:
            return Shape(None), findings
    return Shape(kind, forms[responses[0]] == "messages", implicit, columns, impossible, images), findings
