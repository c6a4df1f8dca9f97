# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a model can still do after the training: each capability gives a number for each of its units (texts, questions, documents), so that before
and after are compared unit by unit.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..synthetic.candidates import generate_candidates
from ..synthetic.files import Rows, digest
from ..synthetic.prompts import prompt_id
from ..synthetic.students import TransformersStudent
from .judging import identity_of_function
from .scoring import ResponseScorer
from .statistics import crossed_estimate


_KINDS = ("texts", "questions", "lm_eval", "function")
_NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")


@dataclass(kw_only=True)
class Capability:
    """
    Something that a model can do, in one of four kinds.

    Args:
        name (`str`):
            What the report calls it.
        texts (`Sequence[str]`, *optional*):
            Texts that it can write: their perplexity.
        questions (`Sequence[tuple]`, *optional*):
            Prompts (standard or conversational), each with its answer: the share that the likeliest response answers exactly, but for case and
            white space, and for how a number is written: 1,234.0 is 1234.
        lm_eval (`str`, *optional*):
            A task of the [LM Evaluation Harness](https://github.com/EleutherAI/lm-evaluation-harness). Needs the extra `eval`.
        function (`Callable`, *optional*):
            `function(folder_or_name)`, which loads the model and returns a number, or a list of numbers, one of each of its units; the higher, the
            better. Of a single number there is no interval, and so no verdict.
        extract (`str`, *optional*):
            Of `questions`: a regular expression, whose last match is the answer (its first group, if it has one), in the response as in the given
            answer. By default the whole text.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Of a response to one of the `questions`.
        lm_eval_kwargs (`dict[str, Any]`, *optional*):
            Of `lm_eval`: `metric` and `filter` (by default the task's first ones), and arguments of `lm_eval.simple_evaluate` such as `num_fewshot` and
            `limit`; for tasks of one's own `include_path`, their folder, and `include_defaults`, which as `False` saves looking through all others.

    Raises:
        `ValueError`: none or several of the kinds are given, or an option is wrong.
        `ImportError`: the extra is missing.
    """

    name: str
    texts: Sequence[str] | None = None
    questions: Sequence[tuple[Any, str]] | None = None
    lm_eval: str | None = None
    function: Callable[[str], float | Sequence[float]] | None = None
    extract: str | None = None
    max_new_tokens: int = 64
    lm_eval_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"The capability {self.name!r} needs exactly one of {list(_KINDS)}, and has {given}.")
        for kind in ("texts", "questions"):
            if getattr(self, kind) is not None and not len(getattr(self, kind)):
                raise ValueError(f"The capability {self.name!r} has no `{kind}`. Give at least one.")
        if self.extract is not None:
            try:
                re.compile(self.extract)
            except re.error as error:
                raise ValueError(
                    f"`extract` of the capability {self.name!r} is no regular expression: {error}."
                ) from error
            without = [answer for _, answer in self.questions or () if not list(re.finditer(self.extract, answer))]
            if without:
                raise ValueError(
                    f"`extract={self.extract!r}` finds nothing in an answer of the capability {self.name!r}: {without[0]!r:.200}. Correct either."
                )
        if self.lm_eval is not None:
            _import_lm_eval(self.name)
        if self.function is not None:
            identity_of_function(self.function)  # which raises, if it cannot be told from others

    @property
    def metric(self) -> str:
        if self.texts is not None:
            return "perplexity"
        if self.questions is not None:
            return "exact match"
        return self.lm_eval_kwargs.get("metric") or self.lm_eval or "value"

    def identity(self, seed: int = 0) -> dict[str, Any]:
        """What its numbers depend on besides the model, in JSON."""
        told = {name: getattr(self, name) for name in ("texts", "questions", "lm_eval", "extract", "lm_eval_kwargs")}
        told = {name: value for name, value in told.items() if value}
        if self.questions is not None:
            told["max_new_tokens"] = self.max_new_tokens
        if self.function is not None:
            told["function"] = identity_of_function(self.function)
        if self.lm_eval is not None:
            told["seed"] = seed
            paths = self.lm_eval_kwargs.get("include_path") or []
            files = [
                file
                for path in ([paths] if isinstance(paths, str) else paths)
                for file in sorted(Path(path).rglob("*"))
                if file.is_file() and file.suffix != ".pyc"
            ]
            told["files"] = [[file.name, digest(file)] for file in files]
        return told

    def units(self, model: str, scorer: ResponseScorer, folder: Path, seed: int = 0) -> list[float]:
        """
        Its numbers, the higher the better, whose mean is the capability: of texts, their log-likelihood in nats, in such a scale that the mean is that of a token.

        Args:
            model (`str`):
                Path or name of the model.
            scorer ([`ResponseScorer`]):
                The same model, loaded.
            folder (`Path`):
                For what is generated.
            seed (`int`, *optional*, defaults to `0`):
                For few-shot examples of the harness.
        """
        if self.texts is not None:
            scores = scorer.score((("", text) for text in self.texts), desc=self.name)
            scale = len(scores) / sum(score.tokens for score in scores)
            return [score.log_prob * scale for score in scores]
        if self.questions is not None:
            return self._exact_matches(scorer, folder)
        if self.lm_eval is not None:
            return self._of_harness(scorer, seed)
        found = self.function(model)
        values = [found] if isinstance(found, int | float) else list(found)
        if not values or any(
            isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in values
        ):
            raise TypeError(
                f"The function of the capability {self.name!r} must return a finite number, or a list of them, and returned {found!r:.200}."
            )
        return [float(value) for value in values]

    def _exact_matches(self, scorer: ResponseScorer, folder: Path) -> list[float]:
        ids = [f"{i}-{prompt_id(prompt)}" for i, (prompt, _) in enumerate(self.questions)]
        prompts = Dataset.from_dict({"prompt_id": ids, "prompt": [prompt for prompt, _ in self.questions]})
        student = TransformersStudent(
            model=scorer.model,
            tokenizer=scorer.tokenizer,
            batch_size=scorer.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        path = generate_candidates(prompts, student, folder / "answers.jsonl", num_responses=1, temperatures=(0.0,))
        texts = [row["responses"][0]["text"] for row in Rows(path)]
        return [
            float(self._answer(text) == self._answer(answer))
            for text, (_, answer) in zip(texts, self.questions, strict=True)
        ]

    def _answer(self, text: str) -> str | Decimal | None:
        """What is compared. `None` if there is no answer in the text."""
        if self.extract is not None:
            matches = list(re.finditer(self.extract, text))
            if not matches:
                return None
            text = matches[-1][1 if matches[-1].re.groups else 0] or ""
        text = " ".join(text.casefold().split())
        return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else text

    def _of_harness(self, scorer: ResponseScorer, seed: int) -> list[float]:
        lm_eval = _import_lm_eval(self.name)
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        kwargs = dict(self.lm_eval_kwargs)
        metric, wanted = kwargs.pop("metric", None), kwargs.pop("filter", None)
        of_tasks = {name: kwargs.pop(name) for name in ("include_path", "include_defaults") if name in kwargs}
        lm = HFLM(pretrained=scorer.model, tokenizer=scorer.tokenizer, batch_size=scorer.batch_size)
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=[self.lm_eval],
            task_manager=TaskManager(**of_tasks),
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            **kwargs,
        )
        samples = [  # of one filter, as each of them has all documents
            sample
            for of_task in results["samples"].values()
            for sample in of_task
            if sample["filter"] == (wanted or of_task[0]["filter"])
        ]
        if not samples:
            filters = {sample["filter"] for of_task in results["samples"].values() for sample in of_task}
            raise ValueError(
                f"The task {self.lm_eval!r} has the filters {sorted(filters)}, and no {wanted!r} (`filter` of the capability {self.name!r})."
            )
        names = samples[0]["metrics"]
        metric = names[0] if metric is None else metric
        if metric not in names:
            raise ValueError(
                f"The task {self.lm_eval!r} has the metrics {names}, and no {metric!r} (`metric` of the capability {self.name!r})."
            )
        lower = {
            name for of_task in results["higher_is_better"].values() for name, higher in of_task.items() if not higher
        } - {"perplexity"}  # of which the harness gives the log-likelihood of each document
        values = [sample[metric] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        if any(isinstance(value, list | tuple) for value in values):
            raise ValueError(
                f"The metric {metric!r} of the task {self.lm_eval!r} is none of single documents, so that it has no interval here. Use another `metric` of {names}."
            )
        return [-float(value) if metric in lower else float(value) for value in values]


def _import_lm_eval(name: str) -> Any:
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ImportError(
            f'The capability {name!r} (`lm_eval`) needs the LM Evaluation Harness: run `pip install "trl-spo[eval]"`.'
        ) from error
    return lm_eval


def compare_capability(metric: str, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """
    A capability before and after the training.

    Args:
        metric (`str`):
            Of the [`Capability`].
        before (`np.ndarray` of shape `(N,)`):
            Its units of the reference.
        after (`np.ndarray` of shape `(S, N)`):
            Those of the policies of one or more trainings.

    Returns:
        `dict[str, Any]`: estimates `before`, `after` and `difference`, `higher_is_better`, and the `verdict`: `"regressed"` or `"improved"` only if the interval
        of the difference, unit by unit, has no 0 in it, else `"no difference seen"`; `"no interval"` if there is a single unit.
    """
    share = bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())  # of right answers
    found = {"before": crossed_estimate(before[None], share), "after": crossed_estimate(after, share)}
    # Unit by unit, so that hard questions, which are hard before and after, do not widen it
    difference = crossed_estimate(after - before[None])
    interval = difference["interval"]
    if interval is None or len(before) < 2:
        verdict = "no interval"
        difference["interval"] = None
    elif interval[1] < 0:
        verdict = "regressed"
    else:
        verdict = "improved" if interval[0] > 0 else "no difference seen"
    if metric == "perplexity":  # of what the units are the logarithm
        base = math.exp(-found["before"]["value"])
        found = {name: _exponential(estimate, 1.0, 0.0) for name, estimate in found.items()}
        difference = _exponential(difference, base, -base)
    return {**found, "difference": difference, "higher_is_better": metric != "perplexity", "verdict": verdict}


def _exponential(estimate: dict[str, Any], factor: float, offset: float) -> dict[str, Any]:
    """`factor * exp(-x) + offset` of an estimate of x."""

    def of(x: float) -> float:
        return factor * math.exp(-x) + offset

    interval = estimate["interval"]
    error = estimate["error"]
    return {
        "value": of(estimate["value"]),
        "error": None if error is None else factor * math.exp(-estimate["value"]) * error,
        "interval": None if interval is None else [of(interval[1]), of(interval[0])],
        "number": estimate["number"],
    }
