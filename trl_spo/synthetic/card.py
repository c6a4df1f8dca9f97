# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The card of a dataset: all settings, counts, rates and costs that it was made with, for people to read."""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib.metadata import version
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from .critics import EndpointCritic, RuleCritic
from .endpoint import Endpoint
from .filters import FilterConfig
from .redaction import LEFT_OUT, without_secrets


_NONE = "–"
# Names of options whose values are secrets, but for the tokens of a tokenizer, and what a URL may have of them
_CELL = 100  # characters of a text in a table
# Of emphasis, code, links, headings, tables, formulas, HTML, and what is made a link without being marked as one
_SPECIAL = re.compile(r"[\\`*\[\]<>#|~$&]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.|@(?=\w)")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def cell(value: Any) -> str:
    """
    A value in one line that Markdown shows as it is, whatever is in it: it ends no cell and no table, and is no link, HTML or formula.
    """
    if value is None:
        return _NONE
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join("".join(c if c.isprintable() or c == "\u200d" else " " for c in text).split())
    text = text if len(text) <= _CELL else text[: _CELL - 1].rstrip() + "…"
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", text)


def count(number: int | None) -> str:
    return _NONE if number is None else f"{number:,}"


def percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f} %"


def decimal(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def cost(value: float | None) -> str:
    """In the currency of the prices, to the cent or to three digits."""
    return _NONE if value is None else f"{value:,.2f}" if value >= 1 or value == 0 else f"{value:.3g}"


def rate(found: dict[str, Any] | None) -> str:
    """A rate of an agreement report: with its interval, and of how many."""
    if not found or found["rate"] is None:
        return _NONE
    low, high = found["interval"]
    return f"{percent(found['rate'])} ({100 * low:.1f} to {100 * high:.1f}; {found['number']:,})"


def figure(found: dict[str, Any] | None, form: str = "percent") -> str:
    """A value of the human check with its interval."""
    if not found or found["value"] is None:
        return _NONE
    shown, factor, digits = (percent, 100, 1) if form == "percent" else (decimal, 1, 2)
    interval = found["interval"]
    if interval is None:
        return shown(found["value"])
    return f"{shown(found['value'])} ({factor * interval[0]:.{digits}f} to {factor * interval[1]:.{digits}f})"


def _with_defaults(options: dict[str, Any], *classes: type) -> dict[str, Any]:
    """Options with those that were left to their defaults."""
    given = {f.name: f.default for cls in classes for f in fields(cls) if f.init and f.default is not MISSING}
    return {**given, **options}


def _critic(options: dict[str, Any]) -> dict[str, Any]:
    """A critic for its row: what it is, and its other settings in one text."""
    kind = options.get("type")
    if kind == "endpoint":
        options = _with_defaults(options, EndpointCritic, Endpoint)
    elif kind == "rule":
        options = _with_defaults(options, RuleCritic)
    elif kind in ("local", "reward"):
        from .model_critics import LocalCritic, RewardCritic

        options = _with_defaults(options, {"local": LocalCritic, "reward": RewardCritic}[kind])
    shown = {name: options.get(name) for name in ("name", "type", "rubric", "weight")}
    shown["model"] = options.get("model", options.get("function"))
    shown["host"] = None
    if kind == "endpoint":  # by default, an environment variable can name another one than OpenAI's
        shown["host"] = urlsplit(options["base_url"]).netloc if options["base_url"] else "the client's default"
    others = {name: some for name, some in options.items() if name not in (*shown, "base_url", "function")}
    shown["others"] = [f"{name}: {cell(some)}" for name, some in others.items() if some is not None]
    return shown


def _changed(config: dict[str, Any], records: dict[str, Any]) -> list[str]:
    """The stages that were done with other settings than those of the config."""
    shared = {"seed": config["seed"], "critics": config["judge"]["critics"]}
    return [
        stage
        for stage, record in records.items()
        if any({**shared, **(config[stage] or {})}.get(name) != some for name, some in record["settings"].items())
    ]


def _scalars(values: dict[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested settings with their names, such as `student.model`."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _scalars(value, f"{name}{key}.")
        else:
            yield f"{name}{key}", value


def make_card(
    name: str, counts: dict[str, dict[str, int]], config: dict[str, Any], records: dict[str, Any]
) -> DatasetCard:
    """
    The card of a dataset.

    Args:
        name (`str`):
            Name of the run.
        counts (`dict[str, dict[str, int]]`):
            Number of rows by form and split.
        config (`dict[str, Any]`):
            All options of the run. Secrets are left out.
        records (`dict[str, Any]`):
            Settings and reports of its stages ([`Synthesis.records`]). What a stage has no report of, the card does not tell.

    Returns:
        [`~huggingface_hub.DatasetCard`]: the card.
    """
    config, records = (without_secrets(json.loads(json.dumps(some))) for some in (config, records))
    stages = ("prompts", "candidates", "judge", "pairs", *(["check"] if config["check"] is not None else []))
    records = {stage: records[stage] for stage in stages if stage in records}
    settings = {stage: record["settings"] for stage, record in records.items()}
    reports = {stage: record["report"] for stage, record in records.items()}
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    pairs = sum(counts["preference"].values())
    repo_id = config["dataset"]["push_to_hub"]
    judged = settings["judge"]["critics"] if "judge" in settings else []
    found = reports["judge"]["critics"].values() if "judge" in reports else ()
    filters = _with_defaults(settings["pairs"]["filters"], FilterConfig) if "pairs" in settings else {}
    return DatasetCard.from_template(
        DatasetCardData(
            pretty_name=name,
            task_categories=["text-generation"],
            tags=["trl", "trl_spo", "preference", "synthetic"],
            size_categories=[next((size for most, size in _SIZES if pairs < most), "n>10M")],
        ),
        template_path=str(files("trl_spo").joinpath("templates/dataset_card.md")),
        name=name,
        counts=counts,
        pairs=pairs,
        repo_id=repo_id if repo_id is None or "/" in repo_id else f"your-name/{repo_id}",
        settings=settings,
        reports=reports,
        changed=_changed(config, records),
        critics=[_critic(options) for options in judged],
        filters=filters,
        total=sum(critic["cost"] for critic in found),
        has_prices=any(options.get(price) for options in judged for price in ("prompt_price", "completion_price")),
        config_text=f"{fence}yaml\n{text}{fence}",
        left_out=LEFT_OUT,
        versions={package: version(package) for package in ("trl_spo", "trl", "transformers", "datasets")},
        scalars=_scalars,
        cell=cell,
        count=count,
        percent=percent,
        decimal=decimal,
        cost=cost,
        rate=rate,
        figure=figure,
    )
