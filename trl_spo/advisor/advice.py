# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads a dataset and, if they are given, a model, its reference and the options of a training, and says what fits and what will go wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, IterableDataset

from .duplicates import duplicate_findings, leakage_findings, near_duplicate_findings
from .findings import SEVERITIES, Finding, UsageError
from .glued import glued_findings
from .length import length_findings
from .noise import noise_findings
from .plan import CONFIGS, Launch, method_name, read_launch
from .quality import list_findings, prompt_findings, quality_findings, size_findings, usable_rows
from .recommendation import Recommendation, recommend
from .rows import Rows, read_rows
from .shape import TITLES, Shape, find_shape
from .training_checks import check_options, plan_of, training_findings


if TYPE_CHECKING:
    from .gpus import Gpu
    from .models import ModelFacts


SCHEMA = 1


@dataclass(frozen=True)
class Advice:
    """
    What there is to say.

    Args:
        dataset (`dict[str, Any]`):
            Rows of the splits that were looked at, how many of them a model can learn from, and all rows of the train
            split, if that is known.
        shape ([`Shape`]):
            What kind of preferences they are, and which methods are possible.
        recommendation ([`Recommendation`], *optional*):
            Which fits best.
        training (`dict[str, Any]`):
            Method, model, reference and processes that the findings are about.
        findings (`list[Finding]`):
            What was found, the worst first.
    """

    dataset: dict[str, Any]
    shape: Shape
    recommendation: Recommendation | None
    training: dict[str, Any]
    findings: list[Finding]

    def count(self, severity: str) -> int:
        """Number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def exit_code(self, strict: bool = False) -> int:
        """1 if there is an error, or with `strict` a warning; else 0."""
        return int(self.count("error") > 0 or (strict and self.count("warning") > 0))

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON. The names stay the same within a `schema`."""
        return {
            "schema": SCHEMA,
            "dataset": self.dataset,
            "shape": self.shape.to_dict(),
            "recommendation": None if self.recommendation is None else self.recommendation.to_dict(),
            "training": self.training,
            "findings": [finding.to_dict() for finding in self.findings],
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
        }


def take(dataset: Dataset | IterableDataset, number: int | None, seed: int) -> Dataset:
    """
    Rows of a dataset: all of them, or some, drawn at random; of one that streams, the first ones.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        number (`int`, *optional*):
            How many.
        seed (`int`):
            Of which.

    Raises:
        `ValueError`: it streams, and no number is given, or these are several splits.
    """
    if isinstance(dataset, dict):
        raise ValueError(
            f"These are the splits {', '.join(dataset)}. Pass one of them: `dataset[{next(iter(dataset))!r}]`."
        )
    if number is not None and number < 1:
        raise ValueError(f"`max_examples` must be at least 1, got {number}.")
    if isinstance(dataset, IterableDataset):
        if number is None:
            raise ValueError(
                "A dataset that streams has no end that could be waited for. Pass `max_examples` as well."
            )
        return Dataset.from_list(list(dataset.take(number)), features=dataset.features)
    if number is None or number >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).choice(len(dataset), size=number, replace=False)))


def _total(dataset: Dataset | IterableDataset, taken: Dataset, number: int | None) -> int | None:
    """Rows of a dataset of which some were taken. `None` if it streams and goes on."""
    if isinstance(dataset, IterableDataset):
        return len(taken) if len(taken) < number else None
    return len(dataset)


def advise(
    dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | IterableDataset | None = None,
    *,
    model: str | None = None,
    ref_model: str | None = None,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    accelerate_config: str | None = None,
    num_processes: int | None = None,
    gpu: str | None = None,
    large_budget: bool = False,
    max_examples: int | None = None,
    near_duplicates: float | None = None,
    reference_prompts: int = 64,
    batch_size: int = 8,
    seed: int = 0,
) -> Advice:
    """
    Says which method fits a preference dataset, and what will go wrong in a training on it.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preferences to train on.
        eval_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Those to evaluate on.
        model (`str`, *optional*):
            Path or name of the model that is to be trained. With it, tokens are counted, memory and time are
            estimated, and it is asked whether the responses are its own.
        ref_model (`str`, *optional*):
            Path or name of the reference, if that is another model.
        method (`str`, *optional*):
            `"dpo"`, `"ipo"`, `"kto"`, `"soft-po"`, `"stable-po"`, `"sspo"` or `"sspo-kto"`; by default the one that is
            recommended.
        options (`dict[str, Any]`, *optional*):
            Options of the method's config and of [`~trl.ModelConfig`], such as `{"beta": 0.1, "max_length": 512,
            "use_peft": True}`. The others are at their defaults.
        accelerate_config (`str`, *optional*):
            Path or name of an accelerate config, such as `"zero3"`.
        num_processes (`int`, *optional*):
            Number of processes.
        gpu (`str`, *optional*):
            GPU of each process, such as `"h100"`, or its memory, such as `"48GB"`. By default that of this machine, if
            it has one.
        large_budget (`bool`, *optional*, defaults to `False`):
            Whether there are a large budget and experience with reinforcement learning.
        max_examples (`int`, *optional*):
            Rows of each split that are looked at. What is told of all rows is then an estimate.
        near_duplicates (`float`, *optional*):
            Similarity from which on two prompts are nearly equal, from 0.1 to 1. By default 0.8, where that takes
            seconds.
        reference_prompts (`int`, *optional*, defaults to `64`):
            Prompts that the reference is asked with, at least 8. 0 for not loading it.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses that go through the reference at once.
        seed (`int`, *optional*, defaults to `0`):
            Of all draws.

    Returns:
        [`Advice`]

    Raises:
        [`UsageError`], a `ValueError`: an option is unknown or out of its range, or a model cannot be read.
    """
    options = options or {}
    if ref_model is not None and model is None:
        raise UsageError(
            f"`ref_model` is {ref_model!r}, but there is no `model`. Pass the model that is to be trained, too."
        )
    if near_duplicates is not None and not 0.1 <= near_duplicates <= 1:
        raise UsageError(f"`near_duplicates` must be from 0.1 to 1, got {near_duplicates}.")
    if reference_prompts < 0:
        raise UsageError(f"`reference_prompts` must be at least 0, which is none, got {reference_prompts}.")
    with _usage():
        asked = None if method is None else method_name(method)
        check_options(asked, options)  # before anything takes its time
        launch = read_launch(accelerate_config, num_processes)
        device = None if model is None and gpu is None else _find_gpu(gpu, launch)
        facts = None if model is None else _read_models(model, ref_model, options, reference_prompts)
        datasets = (
            take(dataset, max_examples, seed),
            None if eval_dataset is None else take(eval_dataset, max_examples, seed),
        )
    total = _total(dataset, datasets[0], max_examples)
    sampled = total != len(datasets[0]) or (
        eval_dataset is not None and _total(eval_dataset, datasets[1], max_examples) != len(datasets[1])
    )
    strategy = options.get("eval_strategy", "no")
    evaluates = getattr(strategy, "value", strategy) != "no"
    shape, findings = find_shape(datasets[0])
    told = {
        "rows": len(datasets[0]),
        "total": total,
        "eval_rows": None if datasets[1] is None else len(datasets[1]),
        "usable": 0,
    }
    training: dict[str, Any] = {
        "method": asked,
        "model": model,
        "ref_model": ref_model,
        "recommended": asked is None,
        "accelerate_config": launch.name,
        "num_processes": launch.num_processes,
        "gpu": device and device.name,
    }
    if shape.kind is None:
        return Advice(told, shape, None, training, findings)

    rows, of_test = _read_splits(datasets, shape, findings)
    told["usable"] = int(usable_rows(rows).sum())
    usable = told["usable"] if total is None else round(told["usable"] / len(rows) * total)
    # What the recommendation rests on
    seen = noise_findings(datasets[0], rows)
    if shape.kind == "pairs":
        seen += glued_findings(datasets[0], rows, seed)
    if facts is not None:
        seen += _check_reference(facts, datasets[0], rows, reference_prompts, batch_size, seed)
    recommendation = recommend(rows, seen, None if total is None else usable, large_budget, sampled)
    chosen = asked or (recommendation and recommendation.method)

    findings += [*size_findings(rows, usable, total), *quality_findings(rows, chosen)]
    findings += [*list_findings(datasets[0], rows), *prompt_findings(datasets[0], rows)]
    if not shape.images:
        findings += duplicate_findings(rows, sampled)
        findings += near_duplicate_findings(datasets, (rows, of_test), near_duplicates)
    if not shape.images or of_test is None:
        findings += leakage_findings(rows, of_test, evaluates, sampled)
    findings += [*seen, *length_findings(rows), *_not_looked_at(shape, chosen)]
    if asked in shape.impossible:
        findings.append(
            Finding(
                "method_not_possible",
                "error",
                f"{TITLES[asked]} cannot be trained on this dataset",
                f"It holds {shape.kind}: {shape.impossible[asked]}.",
                f"Methods that can be: {', '.join(TITLES[name] for name in shape.possible)}.",
                {"method": asked, "possible": shape.possible},
            )
        )
    elif chosen in CONFIGS:
        training["method"] = chosen
        gap = next((finding.data["gap"] for finding in seen if "gap" in finding.data), None)
        plan, left_out = plan_of(chosen, options)
        findings += left_out
        findings += training_findings(datasets[0], rows, plan, launch, device, facts and facts[0], total, seed, gap)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Advice(told, shape, recommendation, training, findings)


@contextmanager
def _usage() -> Iterator[None]:
    """What is wrong with the arguments, as opposed to a mistake of ours."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _find_gpu(name: str | None, launch: Launch) -> "Gpu | None":
    from .gpus import find_gpu, local_gpu

    if name is not None:
        return find_gpu(name)
    return None if launch.cpu else local_gpu()


def _not_looked_at(shape: Shape, method: str | None) -> list[Finding]:
    """What nothing is said of."""
    findings = []
    if shape.images:
        findings.append(
            Finding(
                "images_not_read",
                "info",
                "Images were not looked at",
                "Rows with the same text may have different images, so that copies, leakage between the splits, near-duplicates, and label noise by "
                "repeated comparisons were not looked for, and memory and time are those of the text.",
            )
        )
    if method == "rlhf":
        findings.append(
            Finding(
                "options_not_checked",
                "info",
                "No training was checked",
                "RLHF is two trainings, of a reward model and with it, which have options of their own: nothing is said of these, nor of tokens, "
                "truncation, chat templates, memory and time.",
                "Pass `--method` to hear of another one.",
            )
        )
    return findings


def _read_models(
    model: str, ref_model: str | None, options: dict[str, Any], reference_prompts: int
) -> "tuple[ModelFacts, ModelFacts | None]":
    """The model, and the reference if that is another one. A revision is that of the model."""
    from .models import read_model
    from .reference import FEWEST

    if 0 < reference_prompts < FEWEST:
        raise UsageError(
            f"`reference_prompts` must be 0, which is none, or at least {FEWEST}, got {reference_prompts}."
        )
    trust = bool(options.get("trust_remote_code"))
    facts = read_model(model, options.get("model_revision"), trust)
    return facts, None if ref_model in (None, model) else read_model(ref_model, None, trust)


def _read_splits(
    datasets: tuple[Dataset, Dataset | None], shape: Shape, findings: list[Finding]
) -> tuple[Rows, Rows | None]:
    rows = read_rows(datasets[0], shape)
    if datasets[1] is None:
        return rows, None
    other, wrong = find_shape(datasets[1])
    if (
        other.kind != shape.kind
        or other.conversational != shape.conversational
        or other.implicit_prompt != shape.implicit_prompt
    ):
        detail = wrong[0].detail if wrong else f"It holds {other.to_dict()}, the train split {shape.to_dict()}."
        findings.append(
            Finding(
                "splits_differ",
                "error",
                "The split for evaluation is of another form",
                detail,
                "Make both of one form.",
            )
        )
        return rows, None
    return rows, read_rows(datasets[1], other)


def _check_reference(
    facts: "tuple[ModelFacts, ModelFacts | None]",
    dataset: Dataset,
    rows: Rows,
    number: int,
    batch_size: int,
    seed: int,
) -> list[Finding]:
    from .models import NoLanguageModel, empty_model, fits_here
    from .reference import not_checked, reference_findings
    from .token_checks import can_tokenize
    from .tokens import FOR_TEMPLATE

    if number == 0:
        return [not_checked("`reference_prompts=0`.")]
    if find_spec("scipy") is None:  # which `trl_spo.evaluation` needs
        return [not_checked('That needs the package `scipy`: `pip install "trl-spo[eval]"`.')]
    for name in ("image", "images", *FOR_TEMPLATE):
        if name in dataset.column_names:
            return [not_checked(f"It would be asked without what is in the column `{name}`.")]
    for one in filter(None, facts):
        if not can_tokenize(one.tokenizer, rows):
            lacks = "chat template" if rows.shape.conversational else "end-of-sequence token"
            return [not_checked(f"The tokenizer of '{one.name}' has no {lacks}.")]
        try:
            reason = fits_here(empty_model(one), one)
        except NoLanguageModel as error:
            return [not_checked(str(error))]
        if reason is not None:
            return [not_checked(f"{reason} Where there is room, `--reference_prompts 64` measures it.")]
    model, reference = facts
    if reference is None:
        return reference_findings(model, dataset, rows, number, None, batch_size, seed)
    return reference_findings(reference, dataset, rows, number, model, batch_size, seed)
