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
from .plan import Launch, make_plan, method_name, option_findings, read_launch
from .quality import balance_findings, list_findings, quality_findings, size_findings, usable_rows
from .recommendation import Recommendation, recommend
from .rows import Rows, read_rows
from .shape import TITLES, Shape, find_shape


if TYPE_CHECKING:
    from .gpus import Gpu
    from .models import ModelFacts
    from .tokens import TokenCounts


SCHEMA = 1


@dataclass(frozen=True)
class Advice:
    """
    What there is to say.

    Args:
        dataset (`dict[str, Any]`):
            Rows of the splits, and how many of them a model can learn from.
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
        `ValueError`: it streams, and no number is given.
    """
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
            Rows of each split that are looked at.
        near_duplicates (`float`, *optional*):
            Similarity from which on two prompts are nearly equal, from 0.1 to 1. By default 0.8, where that takes
            seconds.
        reference_prompts (`int`, *optional*, defaults to `64`):
            Prompts that the reference is asked with. 0 for not loading it.
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
        if asked is not None and options:
            make_plan(asked, options)  # before anything takes its time
        launch = read_launch(accelerate_config, num_processes)
        device = None if model is None and gpu is None else _find_gpu(gpu, launch)
        facts = None if model is None else _read_model(model, options)
        reference = facts if ref_model is None else _read_model(ref_model, {})
        datasets = (
            take(dataset, max_examples, seed),
            None if eval_dataset is None else take(eval_dataset, max_examples, seed),
        )
    strategy = options.get("eval_strategy", "no")
    evaluates = getattr(strategy, "value", strategy) != "no"
    shape, findings = find_shape(datasets[0])
    told = {"rows": len(datasets[0]), "eval_rows": None if datasets[1] is None else len(datasets[1])}
    training: dict[str, Any] = {"method": asked, "model": model, "ref_model": ref_model, "recommended": asked is None}
    if shape.kind is None:
        return Advice(told | {"usable": 0}, shape, None, training, findings)

    rows, of_test = _read_splits(datasets, shape, findings)
    usable = int(usable_rows(rows).sum())
    told["usable"] = usable
    findings += [*size_findings(rows, usable), *quality_findings(rows, asked), *list_findings(datasets[0], rows)]
    findings += [*duplicate_findings(rows), *leakage_findings(rows, of_test, evaluates)]
    findings += near_duplicate_findings(datasets, (rows, of_test), near_duplicates)
    findings += [*noise_findings(datasets[0], rows), *length_findings(rows)]
    if shape.kind == "pairs":
        findings += glued_findings(datasets[0], rows, seed)
    if reference is not None:
        findings += _check_reference(reference, model, datasets[0], rows, reference_prompts, batch_size, seed)
    recommendation = recommend(rows, findings, usable, large_budget)

    if asked is not None and asked in shape.impossible:
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
    chosen = asked or (recommendation.method if recommendation is not None else None)
    if chosen == "rlhf":
        chosen = None
        findings.append(
            Finding(
                "options_not_checked",
                "info",
                "No options were checked",
                "RLHF is two trainings, of a reward model and with it, which have options of their own.",
                "Pass `--method` to hear of another one.",
            )
        )
    training["method"] = chosen
    gap = next((finding.data["gap"] for finding in findings if finding.code in ("off_policy", "on_policy")), None)
    if chosen is not None and chosen not in shape.impossible:
        findings += _training_findings(datasets[0], rows, chosen, options, launch, device, facts, usable, seed, gap)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    training |= {
        "accelerate_config": launch.name,
        "num_processes": launch.num_processes,
        "gpu": device and device.name,
    }
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


def _read_model(name: str, options: dict[str, Any]) -> "ModelFacts":
    from .models import read_model

    return read_model(name, options.get("model_revision"), bool(options.get("trust_remote_code")))


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
    reference: "ModelFacts",
    model: str,
    dataset: Dataset,
    rows: Rows,
    number: int,
    batch_size: int,
    seed: int,
) -> list[Finding]:
    from .models import NoLanguageModel, empty_model, fits_here
    from .reference import not_checked, reference_findings

    if number == 0:
        return [not_checked("`reference_prompts=0`.")]
    if find_spec("scipy") is None:  # which `trl_spo.evaluation` needs
        return [not_checked('That needs the package `scipy`: `pip install "trl-spo[eval]"`.')]
    tokenizer = reference.tokenizer
    if rows.shape.conversational and not tokenizer.chat_template:
        return [not_checked("Its tokenizer has no chat template.")]
    if tokenizer.eos_token is None:
        return [not_checked("Its tokenizer has no end-of-sequence token.")]
    try:
        reason = fits_here(empty_model(reference), reference)
    except NoLanguageModel as error:
        return [not_checked(str(error))]
    if reason is not None:
        return [not_checked(f"{reason} Where there is room, `--reference_prompts 64` measures it.")]
    return reference_findings(reference.name, dataset, rows, number, model, None, batch_size, seed)


def _training_findings(
    dataset: Dataset,
    rows: Rows,
    method: str,
    options: dict[str, Any],
    launch: Launch,
    gpu: "Gpu | None",
    facts: "ModelFacts | None",
    usable: int,
    seed: int,
    gap: float | None,
) -> list[Finding]:
    """What depends on the options, and on the tokenizer and the model if there is one."""
    findings = []
    if method in ("kto", "sspo_kto") and rows.shape.kind == "unpaired":
        findings += balance_findings(
            rows, *(options.get(name, 1.0) for name in ("desirable_weight", "undesirable_weight"))
        )
    if options:
        with _usage():  # without a method, they were not looked at before
            findings += option_findings(make_plan(method, options))
    if facts is None:
        return [
            *findings,
            Finding(
                "tokens_not_counted",
                "info",
                "Tokens were not counted",
                "Without a model, nothing can be said of truncation, chat templates, `beta`, memory and time. Responses have "
                f"{rows.characters.mean():.0f} characters on average.",
                "Pass `--model_name_or_path`.",
                {"mean_characters": float(rows.characters.mean())},
            ),
        ]
    plan = make_plan(method, options)
    from .memory import measure_model
    from .models import NoLanguageModel
    from .ranges import literal_findings, precision_findings, range_findings
    from .resources import resource_findings
    from .token_checks import can_tokenize, check_tokens, tokenizer_findings

    tokenizer = facts.tokenizer
    findings += tokenizer_findings(tokenizer, rows, facts)
    counts: TokenCounts | None = None
    if can_tokenize(tokenizer, rows):
        counts, found = check_tokens(tokenizer, dataset, rows, plan, facts, seed)
        findings += found
    try:
        size = measure_model(facts, plan)
    except ValueError as error:
        # What PEFT refuses, the trainer refuses too
        severity = "info" if isinstance(error, NoLanguageModel) else "error"
        title = "Memory and time were not estimated" if severity == "info" else "There is no adapter for this model"
        return [*findings, Finding("model_not_measured", severity, title, str(error))]
    findings += [*precision_findings(plan, launch.deepspeed), *literal_findings(plan, gap)]
    trained = None if counts is None else counts.kept > counts.starts
    if trained is None or not trained.any():
        return findings
    findings += range_findings(plan, float((counts.kept - counts.starts)[trained].mean()), size.parameters)
    of_row = 1 if plan.takes_apart else len(counts.kept) / len(counts.rows)
    used = usable * (2 if plan.takes_apart and rows.shape.kind == "pairs" else 1)
    findings += resource_findings(
        size,
        plan,
        launch,
        gpu,
        used,
        round(used * of_row),
        float(counts.kept[trained].mean()),
        int(counts.kept[trained].max()),
    )
    return findings
