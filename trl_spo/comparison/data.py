# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The data of a comparison: one preference dataset in the forms that the methods take, and what is held out of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import ScriptArguments, extract_prompt, unpair_preference_dataset

from ..cli.training import load_dataset
from ..evaluation.scoring import PreferencePair
from ..preference_checks import check_preferences, check_unpaired_preferences
from ..synthetic.files import digest_of_rows, read_json, write_json
from ..synthetic.prompts import prompt_id, split_of
from ..synthetic.students import encode_prompt
from ..synthetic.training import METHODS
from .comparison_config import DataConfig


logger = logging.get_logger(__name__)

_ORDERS = ("best", "ranking", "scores")
_OF_TEMPLATE = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class ComparisonData:
    """
    Args:
        folder (`Path`):
            Folder with a dataset for each form that there is: `preference`, `ranked`, `unpaired`, `prompts`.
        forms (`list[str]`):
            Their names; the first one is that of the dataset as it was given.
        rows (`dict[str, int]`):
            Rows of the splits `train` and `test`, as they were given.
        notes (`list[str]`):
            What was done to the dataset.
    """

    folder: Path
    forms: list[str]
    rows: dict[str, int]
    notes: list[str]

    def form_of(self, method: str, wanted: str | None = None) -> str:
        """
        The form that a method is trained on.

        Raises:
            `ValueError`: the dataset has none that the method takes.
        """
        takes = METHODS[method][3] if wanted is None else (wanted,)
        if self.forms[0] in takes:
            return self.forms[0]
        for form in takes:
            if form in self.forms:
                return form
        raise ValueError(
            f"The method {method!r} takes {' or '.join(takes)} data, and the dataset is {self.forms[0]} (forms: {self.forms}). Leave the method out, or compare on "
            "pairs."
        )

    def prompts(
        self,
        number: int,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        context: int | None = None,
        max_new_tokens: int = 0,
    ) -> Dataset:
        """
        Different prompts of the test split, drawn at random. With a model's tokenizer and context, those that leave no room there for a response of
        `max_new_tokens` are left out, which becomes a note.

        Raises:
            `ValueError`: none leaves room.
        """
        test = load_from_disk(str(self.folder / "prompts"))["test"].shuffle(seed=seed)
        if context is None:
            return test.select(range(min(number, len(test))))
        room, kept, seen = context - max_new_tokens, [], 0
        while len(kept) < number and seen < len(test):
            if len(encode_prompt(tokenizer, test[seen])) <= room:
                kept.append(seen)
            seen += 1
        of_context = f"`evaluation.max_new_tokens={max_new_tokens}` leaves {max(room, 0)} tokens of the model's context of {context} to a prompt"
        if not kept:
            raise ValueError(
                f"{of_context}, and all of the {seen} held-out prompts have more. Lower it, or use shorter prompts."
            )
        if len(kept) < seen:
            self.notes.append(
                f"{of_context}: {seen - len(kept)} of the {seen} held-out prompts drawn have more, and are left out."
            )
        return test.select(kept)

    def pairs(self, number: int, seed: int) -> list[PreferencePair]:
        """
        Prompt, chosen and rejected response of pairs of the test split, drawn at random, and what the chat template takes besides them. None if
        the dataset is unpaired.
        """
        if "preference" not in self.forms:
            return []
        test = load_from_disk(str(self.folder / "preference"))["test"].shuffle(seed=seed)
        return [
            (row["prompt"], _text(row["chosen"]), _text(row["rejected"]), _of_template(row))
            for row in islice(filter(_is_single, test), number)
        ]


def prepare_data(config: DataConfig, folder: Path, seed: int) -> ComparisonData:
    """
    Makes the forms of a dataset, once.

    Args:
        config ([`DataConfig`]):
            Which dataset.
        folder (`Path`):
            Where to.
        seed (`int`):
            Of the rows that are drawn, if not all are trained on.

    Raises:
        `ValueError`: the dataset has neither pairs, lists nor responses with labels, a row that cannot be used, or nothing to hold out.
    """
    script_args = ScriptArguments(
        dataset_name=config.path, dataset_config=config.name, dataset_train_split=config.train_split
    )
    splits = load_dataset(script_args)
    if config.train_split not in splits:
        raise ValueError(
            f"`dataset.train_split` is {config.train_split!r}, but the dataset has only: {', '.join(splits)}."
        )
    if config.test_split is not None and config.test_split not in splits:
        raise ValueError(
            f"`dataset.test_split` is {config.test_split!r}, but the dataset has only: {', '.join(splits)}."
        )
    test_split, mark = config.test_split or "test", folder / "data.json"
    used = [splits[name] for name in (config.train_split, test_split) if name in splits]
    digests = [digest_of_rows(split) for split in used]
    if mark.is_file():
        found = read_json(mark)
        if found["digests"] != digests:
            raise ValueError(
                f"The dataset {config.path!r} (`dataset.path`) is no longer what '{folder}' was made of. Name another `output_dir`, or remove "
                "the folder of the comparison."
            )
        return ComparisonData(folder, found["forms"], found["rows"], found["notes"])
    train, test, notes = splits[config.train_split], splits.get(test_split), []
    columns = set(train.column_names)
    form = "ranked" if "completions" in columns else "preference" if "chosen" in columns else "unpaired"
    check = check_unpaired_preferences if form == "unpaired" else check_preferences
    train = check(_with_prompt(train, form), "train")
    if test is None:
        ids = [prompt_id(prompt) for prompt in train["prompt"]]
        held_out = [split_of(of, config.test_share) == "test" for of in ids]
        test = train.select([i for i, out in enumerate(held_out) if out])
        train = train.select([i for i, out in enumerate(held_out) if not out])
        notes.append(
            f"The dataset has no split {test_split!r}: {len(test)} rows, all those of {config.test_share:.0%} of the prompts, are held out."
        )
    else:
        test = check(_with_prompt(test, form), "test")
        trained = {prompt_id(prompt) for prompt in train["prompt"]}
        kept = [i for i, prompt in enumerate(test["prompt"]) if prompt_id(prompt) not in trained]
        if len(kept) < len(test):
            notes.append(
                f"{len(test) - len(kept)} of the {len(test)} rows of the split {test_split!r} have a prompt of the training split, and are left out."
            )
            test = test.select(kept)
    if not len(test) or not len(train):
        raise ValueError(
            f"There are {len(train)} rows to train on and {len(test)} held out. Name another `dataset.test_split`, raise `dataset.test_share`, or use more data."
        )
    if config.max_train_rows is not None and len(train) > config.max_train_rows:
        train = train.shuffle(seed=seed).select(range(config.max_train_rows))
    made = {form: DatasetDict({"train": train, "test": test})}
    if form == "ranked":
        made["preference"] = DatasetDict(
            {name: Dataset.from_list(list(_best_and_worst(split))) for name, split in made["ranked"].items()}
        )
        worst = "the first of the others" if "best" in columns else "its worst one"
        notes.append(f"For the methods that take pairs, each list is its best completion and {worst}.")
    if "preference" in made:
        test_pairs = made["preference"]["test"]
        several = len(test_pairs) - sum(map(_is_single, test_pairs))
        if several:
            notes.append(
                f"{several} of the {len(test_pairs)} held-out pairs have a response of several messages or with tool calls: what the training does to their "
                "probabilities is not measured."
            )
        made["unpaired"] = DatasetDict({name: _unpaired(split) for name, split in made["preference"].items()})
    made["prompts"] = DatasetDict({name: _different_prompts(split) for name, split in made[form].items()})
    for name, dataset in made.items():
        dataset.save_to_disk(str(folder / name))
    rows = {"train": len(train), "test": len(test)}
    write_json(mark, {"digests": digests, "forms": list(made), "rows": rows, "notes": notes})
    return ComparisonData(folder, list(made), rows, notes)


def _with_prompt(dataset: Dataset, form: str) -> Dataset:
    """Pairs whose prompt is the common beginning of both get one of its own, as in TRL's trainers."""
    if form == "preference" and "prompt" not in dataset.column_names:
        return dataset.map(extract_prompt, desc="Extracting prompts")
    return dataset


def _best_and_worst(dataset: Dataset) -> Iterable[dict[str, Any]]:
    for row in dataset:
        completions = row["completions"]
        if row.get("scores") is not None:
            scores = row["scores"]
            best, worst = (max(range(len(scores)), key=lambda i, s=sign: s * scores[i]) for sign in (1, -1))
        elif row.get("ranking") is not None:
            best, worst = row["ranking"][0], row["ranking"][-1]
        else:
            best = row["best"]
            worst = next(i for i in range(len(completions)) if i != best)
        yield {
            "prompt": row["prompt"],
            "chosen": completions[best],
            "rejected": completions[worst],
            **_of_template(row),
        }


def _of_template(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _OF_TEMPLATE if name in row}


def _unpaired(pairs: Dataset) -> Dataset:
    kept = ("prompt", "chosen", "rejected", *_OF_TEMPLATE)
    return unpair_preference_dataset(pairs.select_columns([name for name in kept if name in pairs.column_names]))


def _different_prompts(dataset: Dataset) -> Dataset:
    """Each prompt once, with the columns that are no responses."""
    others = ("chosen", "rejected", "completions", "completion", "label", *_ORDERS)
    dataset = dataset.select_columns([name for name in dataset.column_names if name not in others])
    first: dict[str, int] = {}
    for i, prompt in enumerate(dataset["prompt"]):
        first.setdefault(prompt_id(prompt), i)
    return dataset.select(first.values())


def _is_single(row: dict[str, Any]) -> bool:
    """Whether both responses are one text or message each, and nothing else."""
    return all(
        isinstance(response, str) or (len(response) == 1 and not response[0].get("tool_calls"))
        for response in (row["chosen"], row["rejected"])
    )


def _text(response: str | list[dict[str, str]]) -> str:
    return response if isinstance(response, str) else response[0]["content"]
