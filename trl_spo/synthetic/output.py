# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What is trained on: datasets in TRL's formats, with a card of all that they are made of."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, DatasetInfo, Features, List, NamedSplit, Value, load_from_disk
from huggingface_hub import DatasetCard, get_token, whoami
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .card import make_card
from .critics import batched
from .pairs import ranked_lists
from .prompts import split_of


FORMS = ("preference", "ranked", "unpaired")
SPLITS = ("train", "test")
_BATCH = 1000  # rows that are in memory at once


def as_completion(prompt: str | list[dict[str, str]], response: str) -> str | list[dict[str, str]]:
    """A response in the format of its prompt."""
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]


def preference_row(row: dict[str, Any]) -> dict[str, Any]:
    """A kept pair in TRL's preference format, with what it is known by."""
    prompt = row["prompt"]
    for_winner = [
        vote
        for vote in row["votes"]
        if vote["status"] == "vote" and row["response_ids"][int(vote["share"] < 0.5)] == row["chosen_id"]
    ]
    return {
        "prompt": prompt,
        "chosen": as_completion(prompt, row["chosen"]),
        "rejected": as_completion(prompt, row["rejected"]),
        "margin": row["margin"],
        "confidence": 1.0 if row["truth"] is not None else row["confidence"],
        "probability": row.get("probability") if row["truth"] is None else 1.0,
        "votes": [
            {
                "critic": vote["critic"],
                "status": vote["status"],
                "for_chosen": None
                if vote["share"] is None
                else vote["share"]
                if row["chosen_id"] == row["response_ids"][0]
                else 1 - vote["share"],
            }
            for vote in row["votes"]
        ],
        "rationales": [rationale for vote in for_winner for rationale in vote.get("rationales", ())],
        "provenance": {
            "prompt_id": row["prompt_id"],
            "chosen_id": row["chosen_id"],
            "rejected_id": row["rejected_id"],
            "by_rule": row["truth"] is not None,
        },
    }


def unpaired_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """
    The responses of kept pairs, those of a prompt together, one by one, as KTO takes them: each once. One that is better than one
    response and worse than another says neither, and is left out.
    """
    for prompt_id, of_prompt in groupby(rows, key=lambda row: row["prompt_id"]):
        found: dict[str, dict[bool, dict[str, Any]]] = {}
        for row in of_prompt:
            for name, label in (("chosen", True), ("rejected", False)):
                completion = as_completion(row["prompt"], row[name])
                provenance = {"prompt_id": prompt_id, "response_id": row[f"{name}_id"]}
                found.setdefault(row[f"{name}_id"], {})[label] = {
                    "prompt": row["prompt"],
                    "completion": completion,
                    "label": label,
                    "provenance": provenance,
                }
        for by_label in found.values():
            if len(by_label) == 1:
                yield from by_label.values()


def ranked_row(row: dict[str, Any]) -> dict[str, Any]:
    """One of [`ranked_lists`] in the format of its prompt."""
    return {
        "prompt": row["prompt"],
        "completions": [as_completion(row["prompt"], text) for text in row["completions"]],
        "scores": row["scores"],
        "provenance": {"prompt_id": row["prompt_id"]},
    }


def _features(prompts: Iterable[str | list[dict[str, Any]]]) -> dict[str, Features]:
    """
    The columns of each form. They are the same in all splits and runs, which they would not be if a split were asked for them that has
    no rationale, or no margin.
    """
    schemas = {pa.table({"prompt": batch}).schema for batch in batched(prompts, _BATCH)}
    prompt = Features.from_arrow_schema(pa.unify_schemas(list(schemas), promote_options="permissive"))["prompt"]
    text, number = Value("string"), Value("float64")
    completion = text if prompt == text else List({"role": text, "content": text})
    return {
        "preference": Features(
            {
                "prompt": prompt,
                "chosen": completion,
                "rejected": completion,
                "margin": number,
                "confidence": number,
                "probability": number,
                "votes": List({"critic": text, "status": text, "for_chosen": number}),
                "rationales": List(text),
                "provenance": {"prompt_id": text, "chosen_id": text, "rejected_id": text, "by_rule": Value("bool")},
            }
        ),
        "ranked": Features(
            {
                "prompt": prompt,
                "completions": List(completion),
                "scores": List(number),
                "provenance": {"prompt_id": text},
            }
        ),
        "unpaired": Features(
            {
                "prompt": prompt,
                "completion": completion,
                "label": Value("bool"),
                "provenance": {"prompt_id": text, "response_id": text},
            }
        ),
    }


def _make_dataset(rows: Iterable[dict[str, Any]], features: Features, split: str, path: Path) -> Dataset:
    """Rows in a file, so that there may be more of them than fit into memory."""
    content, schema = hashlib.sha256(), features.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batched(rows, _BATCH):
            content.update(json.dumps(batch).encode())
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    # By the content, because what is computed from a dataset is cached by its fingerprint
    return Dataset(
        Dataset.from_file(str(path)).data,
        info=DatasetInfo(features=features),
        split=NamedSplit(split),
        fingerprint=content.hexdigest()[:16],
    )


def build_dataset(
    folder: Path,
    candidates: Iterable[dict[str, Any]],
    verdicts: Iterable[dict[str, Any]],
    kept: Iterable[dict[str, Any]],
    test_share: float,
    config: dict[str, Any],
    records: dict[str, Any],
) -> dict[str, dict[str, int]]:
    """
    Writes the three forms, each a [`~datasets.DatasetDict`] with a train and a test split for [`~datasets.load_from_disk`], and the card.
    A split without rows is left out, and so is a form without any.

    They are no folder for `load_dataset`, whose cache takes a folder of the same name, with other files in it, for the same dataset.

    Args:
        folder (`Path`):
            Where to. What was there before is replaced when all of it is written.
        candidates, verdicts, kept (`Iterable[dict[str, Any]]`):
            Rows of the stages. Each is gone through several times.
        test_share (`float`):
            Share of the prompts in the test split.
        config (`dict[str, Any]`):
            All options of the run, for the card.
        records (`dict[str, Any]`):
            Settings and reports of its stages ([`Synthesis.records`]), for the card.

    Returns:
        `dict[str, dict[str, int]]`: number of rows by form and split.
    """
    paired = {row["prompt_id"] for row in kept}
    features = _features(row["prompt"] for row in kept)

    def of_split(rows: Iterable[dict[str, Any]], split: str) -> Iterator[dict[str, Any]]:
        return (row for row in rows if row["prompt_id"] in paired and split_of(row["prompt_id"], test_share) == split)

    forms: dict[str, Callable[[str], Iterable[dict[str, Any]]]] = {
        "preference": lambda split: map(preference_row, of_split(kept, split)),
        "ranked": lambda split: map(ranked_row, ranked_lists(of_split(candidates, split), of_split(verdicts, split))),
        "unpaired": lambda split: unpaired_rows(of_split(kept, split)),
    }
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    parts = new / "parts"  # of which `save_to_disk` makes files of its own
    parts.mkdir(parents=True)
    counts = {}
    for form, rows in forms.items():
        made = DatasetDict(
            {split: _make_dataset(rows(split), features[form], split, parts / f"{form}-{split}") for split in SPLITS}
        )
        counts[form] = {split: len(dataset) for split, dataset in made.items()}
        made = DatasetDict({split: dataset for split, dataset in made.items() if len(dataset)})
        if made:
            made.save_to_disk(str(new / form))
    shutil.rmtree(parts)
    make_card(folder.resolve().parent.name, counts, config, records).save(new / "README.md")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return counts


def check_repo(repo_id: str) -> None:
    """
    Before anything is asked or paid for: whether a dataset may be pushed to a repository of this name.

    Raises:
        `ValueError`: the name cannot be one, or there is no token.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"`dataset.push_to_hub={repo_id!r}` is no name of a repository, such as 'user/name': {error}"
        ) from error
    if get_token() is None:
        raise ValueError(
            f"`dataset.push_to_hub={repo_id!r}` needs a token of the Hub that may write. Run `hf auth login`, or set the environment "
            "variable `HF_TOKEN`."
        )


def push(folder: Path, repo_id: str, private: bool | None = None) -> None:
    """
    Pushes what [`build_dataset`] wrote to a dataset repository on the Hub: each form is a configuration of it, the first one by default.

    Args:
        folder (`Path`):
            The dataset.
        repo_id (`str`):
            Repository, which is made if it does not exist. Its files of these configurations and the text of its card are replaced.
        private (`bool`, *optional*):
            Whether it is private, if it does not exist; by default as the account has it.

    Raises:
        `RuntimeError`: it did not work. The dataset in the folder is as it was.
    """
    try:
        if "/" not in repo_id:
            repo_id = f"{whoami()['name']}/{repo_id}"
        configs = []
        for form in FORMS:
            if not (folder / form).is_dir():
                continue
            splits = load_from_disk(str(folder / form))
            # Without `embed_external_files`, of which there are none, as it would take all rows into memory
            splits.push_to_hub(repo_id, config_name=form, private=private, embed_external_files=False)
            files = [{"split": split, "path": f"{form}/{split}-*"} for split in splits]
            configs.append({"config_name": form, "data_files": files})
        ours, card = DatasetCard.load(folder / "README.md"), DatasetCard.load(repo_id)
        # Not by `set_default`, with which datasets 5.2 keeps the splits of the push before, and then has no default
        configs[0]["default"] = True
        for config in card.data.get("configs", []):
            if config["config_name"] not in FORMS:
                configs.append({name: value for name, value in config.items() if name != "default"})
        card.text = ours.text
        for name, value in {**ours.data.to_dict(), "configs": configs}.items():
            card.data[name] = value
        card.push_to_hub(repo_id)
    except Exception as error:
        reason = str(error).strip().rstrip(".")
        raise RuntimeError(
            f"The dataset was not pushed to {repo_id!r} (`dataset.push_to_hub`), or not all of it: {reason}. It is complete in '{folder}'; "
            "run the stage `dataset` again to push it."
        ) from error
