# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What depends on the options of a training, and on the tokenizer and the model if there is one."""

from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from .findings import Finding
from .plan import CONFIGS, Launch, Plan, fitting_options, make_plan, option_findings
from .quality import balance_findings
from .ranges import literal_findings, precision_findings, range_findings
from .rows import Rows
from .shape import TITLES


if TYPE_CHECKING:
    from .gpus import Gpu
    from .models import ModelFacts
    from .tokens import TokenCounts


def check_options(method: str | None, options: dict[str, Any]) -> None:
    """Raises a `ValueError` for options that the method does not have, or without one no method has."""
    if method is not None:
        make_plan(method, options)
        return
    for name, value in options.items():
        if not any(fitting_options(one, {name: value}) for one in CONFIGS):
            make_plan("dpo", {name: value})


def plan_of(method: str, options: dict[str, Any]) -> tuple[Plan, list[Finding]]:
    """The training, and which options another method than the recommended one would have."""
    fitting = fitting_options(method, options)
    others = ", ".join(f"`{name}={value}`" for name, value in options.items() if name not in fitting)
    findings = []
    if others:
        findings.append(
            Finding(
                "options_not_checked",
                "info",
                "Options of another method were not checked",
                f"{TITLES[method]} is recommended, which has no {others}.",
                "Pass `--method` with the one that they are for.",
                {"options": [name for name in options if name not in fitting]},
            )
        )
    return make_plan(method, fitting), findings


def training_findings(
    dataset: Dataset,
    rows: Rows,
    plan: Plan,
    launch: Launch,
    gpu: "Gpu | None",
    facts: "ModelFacts | None",
    total: int | None,
    seed: int,
    gap: float | None,
) -> list[Finding]:
    """What depends on the options, and on the tokenizer and the model if there is one."""
    findings = []
    if plan.takes_apart and rows.shape.kind == "unpaired":
        findings += balance_findings(rows, plan.get("desirable_weight"), plan.get("undesirable_weight"))
    if plan.given:
        findings += option_findings(plan)
    if facts is None:
        return [
            *findings,
            *range_findings(plan, None),
            Finding(
                "tokens_not_counted",
                "info",
                "Tokens were not counted",
                "Without a model, nothing can be said of truncation, chat templates, memory and time, nor of whether `beta` suits the length of the "
                f"responses. They have {rows.characters.mean():.0f} characters on average.",
                "Pass `--model_name_or_path`.",
                {"mean_characters": float(rows.characters.mean())},
            ),
        ]
    from .memory import measure_model
    from .models import NoLanguageModel
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
    if counts is None or not counts.answers.any():
        return findings + range_findings(plan, None, size.parameters)
    trained = counts.answers > 0
    findings += range_findings(plan, float(counts.answers[trained].mean()), size.parameters)
    of_row = 1.0 if plan.takes_apart else float(trained.sum() / len(np.unique(counts.owners[trained])))
    findings += resource_findings(
        size,
        plan,
        launch,
        gpu,
        None if total is None else max(round(total * trained.sum() / len(counts.rows) / of_row), 1),
        of_row,
        float(counts.kept[trained].mean()),
        int(counts.kept[trained].max()),
        int(np.bincount(rows.rows).max()),
    )
    return findings
