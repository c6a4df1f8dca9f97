# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Whether the responses were sampled from the reference, as DPO's derivation takes it.

What is measured. Of a response that a model drew token by token at temperature 1, the surprise of each token, -log
π(y_t | y_<t), is the entropy of the distribution that it was drawn from, on average: the sum over the response of
their difference has mean 0, wherever the response ends. Of a response that somebody else wrote, it is above 0. So its
mean per token, the *excess surprise*, says how unlike the model's own the responses are, in nats per token, without
another model to compare with. What would bias it (the end-of-sequence token that trainers append to responses which
were cut; texts that are tokenized anew) is in the model's own samples, too: some are drawn for the same prompts and
cut to as many words, and the difference of the two is judged by its standard error.

Responses that were drawn at a lower temperature have an excess below 0, and so have those of a model that is surer of
itself: which of the two it is cannot be told. That a reference explains the responses is no proof that they are its
own: a near relative does as well.
"""

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .findings import Finding
from .models import ModelFacts
from .rows import Rows, as_text, row_of


# Excess surprise in nats per token from which on it matters, if it is also beyond chance. Our rule of thumb: text has
# 1 to 2 nats per token
EXCESS = 0.1
_STANDARD_ERRORS = 3.0
_LONGEST_SAMPLE = 256
FEWEST = 8  # prompts, below which a standard error says nothing


@dataclass(frozen=True)
class Excess:
    """
    Excess surprise of responses under a model.

    Args:
        surprise, entropy (`float`):
            Means per token, in nats.
        excess (`float`):
            Their difference.
        per_prompt (`np.ndarray` of shape `(P, 2)`):
            Of each prompt, the sum of the difference and the number of tokens.
    """

    surprise: float
    entropy: float
    excess: float
    per_prompt: np.ndarray

    def to_dict(self) -> dict[str, float]:
        return {
            "surprise": self.surprise,
            "entropy": self.entropy,
            "excess": self.excess,
            "standard_error": ratio_error(self.per_prompt),
        }


def ratio_error(sums: np.ndarray) -> float:
    """Standard error of the ratio of two sums over independent prompts, by the delta method."""
    if len(sums) < 2:
        return math.inf
    ratio = sums[:, 0].sum() / sums[:, 1].sum()
    residuals = sums[:, 0] - ratio * sums[:, 1]
    return float(math.sqrt(len(sums) / (len(sums) - 1) * (residuals**2).sum()) / sums[:, 1].sum())


def excess_of(scores: Sequence[Any], prompts: Sequence[int], number: int) -> Excess:
    """
    Excess surprise of responses.

    Args:
        scores (`Sequence`):
            Scores of a `StudentScorer`.
        prompts (`Sequence[int]`):
            The prompt of each response.
        number (`int`):
            Number of prompts.
    """
    sums = np.zeros((number, 2))
    surprise = entropy = 0.0
    for score, prompt in zip(scores, prompts, strict=True):
        sums[prompt] += (-score.log_prob - score.entropy, score.tokens)
        surprise, entropy = surprise - score.log_prob, entropy + score.entropy
    tokens = max(sums[:, 1].sum(), 1)
    return Excess(float(surprise / tokens), float(entropy / tokens), float(sums[:, 0].sum() / tokens), sums)


def _tokens(facts: ModelFacts, prompt: Any, texts: list[str]) -> tuple[int, int] | None:
    """
    Tokens of a prompt, and of the longest response to it. `None` if the chat template cannot write one of them, or the
    model has not all of their tokens: what is wrong with these is said elsewhere.
    """
    from .._compat import _tokenize

    try:
        if isinstance(prompt, str):
            start = _tokenize(facts.tokenizer, prompt)["input_ids"]
            whole = [_tokenize(facts.tokenizer, prompt + text)["input_ids"] for text in texts]
        else:
            start = _tokenize(facts.tokenizer, prompt, add_generation_prompt=True)["input_ids"]
            chats = ([*prompt, {"role": "assistant", "content": text}] for text in texts)
            whole = [_tokenize(facts.tokenizer, chat)["input_ids"] for chat in chats]
    except (TemplateError, TypeError, ValueError, KeyError):
        return None
    largest = max((max(ids, default=0) for ids in (start, *whole)), default=0)
    if not start or (facts.vocabulary is not None and largest >= facts.vocabulary):
        return None
    return len(start), max(len(facts.tokenizer(text, verbose=False)["input_ids"]) for text in texts)


def _draw(
    models: list[ModelFacts], dataset: Dataset, rows: Rows, number: int, seed: int
) -> tuple[list[tuple[Any, list[str], list[int]]], int]:
    """Different prompts that all models can read and that leave room for a response, each with the responses of one row and their ranks; and how long samples may be."""
    _, first = np.unique(rows.prompts, return_index=True)
    found, lengths = [], []
    for index in np.random.default_rng(seed).permutation(np.sort(first)):  # hashes differ from process to process
        if len(found) == number:
            break
        prompt, responses, ranks = row_of(dataset[int(index)], rows.shape)
        texts = [as_text(response) for response in responses]
        # Scored are messages of the assistant that follow the prompt
        if not prompt or not all(texts) or any(not isinstance(one, str) and len(one) != 1 for one in responses):
            continue
        counts = [_tokens(facts, prompt, texts) for facts in models]
        if any(
            count is None or (facts.context is not None and count[0] + max(count[1], _LONGEST_SAMPLE) >= facts.context)
            for facts, count in zip(models, counts, strict=True)
        ):
            continue
        found.append((prompt, texts, ranks))
        lengths.append(counts[0][1])
    return found, min(max(lengths, default=1), _LONGEST_SAMPLE)


def _load(facts: ModelFacts) -> PreTrainedModel:
    from accelerate import PartialState

    model = AutoModelForCausalLM.from_pretrained(facts.name, dtype="auto", **facts.kwargs)
    return model if hasattr(model, "hf_device_map") else model.to(PartialState().device)


def own_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    max_new_tokens: int,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[list[str], list[int]]:
    """Two responses of the model's own to each prompt, at temperature 1, and the prompt of each. Those without any text are left out."""
    from ..synthetic.candidates import generate_candidates
    from ..synthetic.files import Rows as Lines
    from ..synthetic.students import TransformersStudent

    student = TransformersStudent(
        model=model, tokenizer=tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    dataset = Dataset.from_list([{"prompt_id": str(i), "prompt": prompt} for i, prompt in enumerate(prompts)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        generate_candidates(dataset, student, path, num_responses=2, temperatures=[1.0], seed=seed)
        found = [
            (one["text"], int(row["prompt_id"])) for row in Lines(path) for one in row["responses"] if one["text"]
        ]
    return [text for text, _ in found], [prompt for _, prompt in found]


def cut(text: str, words: int) -> str:
    """
    The first words of a text, with the space between them.

    Samples are cut to as many words as the responses have. The end-of-sequence token, which is appended to both, may well be what
    surprises the model most, and weighs the less the longer a text is.
    """
    ends = [match.end() for match in islice(re.finditer(r"\S+", text), max(words, 1))]
    return text[: ends[-1]] if ends else text


def difference(of_data: Excess, of_samples: Excess) -> tuple[float, float]:
    """Difference of two excesses on the same prompts, and its standard error."""
    both = (of_data.per_prompt[:, 1] > 0) & (of_samples.per_prompt[:, 1] > 0)
    residuals, value = np.zeros(int(both.sum())), 0.0
    for sign, sums in ((1, of_data.per_prompt[both]), (-1, of_samples.per_prompt[both])):
        ratio = sums[:, 0].sum() / sums[:, 1].sum()
        value += sign * ratio
        residuals += sign * (sums[:, 0] - ratio * sums[:, 1]) / sums[:, 1].sum()
    n = len(residuals)
    return float(value), math.sqrt(n / (n - 1) * (residuals**2).sum()) if n > 1 else math.inf


def reference_findings(
    reference: ModelFacts,
    dataset: Dataset,
    rows: Rows,
    number: int,
    model: ModelFacts | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Finding]:
    """
    Whether the responses look sampled from the reference.

    Args:
        reference ([`ModelFacts`]):
            The reference.
        dataset ([`~datasets.Dataset`]):
            The train split.
        rows ([`Rows`]):
            Its rows.
        number (`int`):
            Prompts that are looked at.
        model ([`ModelFacts`], *optional*):
            The policy, if that is another model.
        batch_size (`int`, *optional*, defaults to `8`):
            Of both forward passes and generation.
        seed (`int`, *optional*, defaults to `0`):
            Of the prompts and the samples.

    Returns:
        `list[Finding]`
    """
    from ..evaluation import ResponseScorer

    drawn, longest = _draw([reference, *([] if model is None else [model])], dataset, rows, number, seed)
    if len(drawn) < FEWEST:
        return [
            not_checked(
                f"Only {len(drawn)} rows have a prompt that the model can read and that is short enough for it, and single messages as responses."
            )
        ]
    loaded, tokenizer = _load(reference), reference.tokenizer
    prompts = [prompt for prompt, _, _ in drawn]
    data = [
        (i, text, rank) for i, (_, texts, ranks) in enumerate(drawn) for text, rank in zip(texts, ranks, strict=True)
    ]
    texts, owners = own_samples(loaded, tokenizer, prompts, longest, batch_size, seed)
    lengths = [[len(text.split()) for text in responses] for _, responses, _ in drawn]
    texts = [cut(text, lengths[i][k % len(lengths[i])]) for k, (text, i) in enumerate(zip(texts, owners, strict=True))]
    scorer = ResponseScorer(loaded, None, batch_size, tokenizer)
    scores = scorer.score((prompts[i], text) for i, text, _ in data)
    samples = excess_of(
        scorer.score((prompts[i], text) for i, text in zip(owners, texts, strict=True)), owners, len(prompts)
    )
    del scorer, loaded  # before the next one is loaded
    found = excess_of(scores, [i for i, _, _ in data], len(prompts))
    if ((found.per_prompt[:, 1] > 0) & (samples.per_prompt[:, 1] > 0)).sum() < FEWEST:
        return [not_checked("Nearly all of its own samples are empty, so that there is nothing to compare with.")]
    value, error = difference(found, samples)
    of_ranks = {
        name: excess_of(
            *zip(
                *((score, i) for score, (i, _, rank) in zip(scores, data, strict=True) if (rank == 0) == best),
                strict=True,
            ),
            len(prompts),
        )
        for name, best in (("better", True), ("worse", False))
        if any((rank == 0) == best for _, _, rank in data)
    }
    gap = _gap(scores, data) if rows.shape.kind == "pairs" else None
    figures = {
        "reference": reference.name,
        "gap": gap,
        "prompts": len(prompts),
        "responses": found.to_dict(),
        "samples": samples.to_dict(),
        "difference": value,
        "standard_error": error,
        **{name: excess.to_dict() for name, excess in of_ranks.items()},
    }
    beyond = abs(value) > max(EXCESS, _STANDARD_ERRORS * error)
    measured = (
        f"Of {len(data)} responses to {len(prompts)} prompts, '{reference.name}' is surprised by {found.surprise:.2f} nats per token, where it expects "
        f"{found.entropy:.2f}; by its own samples {samples.surprise:.2f}, where it expects {samples.entropy:.2f}. The excess differs by {value:.3f} "
        f"(standard error {error:.3f}; flagged beyond {EXCESS} and {_STANDARD_ERRORS:g} standard errors)."
    )
    if not beyond:
        title = "The responses may well be the reference's own"
        findings = [Finding("on_policy", "info", title, measured, "", figures)]
    elif value > 0:
        findings = [
            Finding(
                "off_policy",
                "warning",
                "The reference has not sampled the responses",
                measured,
                "Fine-tune it on the chosen responses first and take the result as model and reference, or sample responses of its own (`trl-spo synthesize`). With "
                'Soft PO keep `calibration="reference"`.',
                figures,
            )
        ]
    else:
        findings = [
            Finding(
                "likelier_than_samples",
                "info",
                "The responses are likelier than the reference's own samples",
                f"{measured} They were drawn at a lower temperature, or by another model that is surer of itself.",
                "",
                figures,
            )
        ]
    if model is not None:
        findings += _compare(reference, model, prompts, data, scores, batch_size)
    return findings


def _gap(scores: list[Any], data: list[tuple[int, str, int]]) -> float:
    """Mean difference of the log-probabilities of the two responses of a pair, without its sign."""
    of_pairs = zip(scores[::2], scores[1::2], strict=True)
    return sum(abs(one.log_prob - other.log_prob) for one, other in of_pairs) / (len(data) / 2)


def _compare(
    reference: ModelFacts, model: ModelFacts, prompts: list, data: list, scores: list, batch_size: int
) -> list[Finding]:
    """Which of two models finds the responses more probable."""
    from ..evaluation import ResponseScorer

    scorer = ResponseScorer(_load(model), None, batch_size, model.tokenizer)
    others = scorer.score((prompts[i], text) for i, text, _ in data)
    sums = np.zeros((len(prompts), 2))
    for (i, _, _), ours, theirs in zip(data, scores, others, strict=True):
        sums[i] += (theirs.log_prob - ours.log_prob, ours.tokens)
    value, error = float(sums[:, 0].sum() / sums[:, 1].sum()), ratio_error(sums)
    nearer = value > max(EXCESS, _STANDARD_ERRORS * error)
    figures = {
        "reference": reference.name,
        "model": model.name,
        "difference": value,
        "standard_error": error,
        "prompts": len(prompts),
    }
    detail = f"'{model.name}' gives the responses {abs(value):.3f} nats per token {'more' if value > 0 else 'less'} than '{reference.name}' (standard error {error:.3f})."
    return [
        Finding(
            "reference_is_not_the_nearer" if nearer else "reference_and_model",
            "warning" if nearer else "info",
            "The model is nearer to the responses than the reference" if nearer else "Reference and model",
            detail,
            "If the model has sampled them, it is the reference: leave `--ref_model` out." if nearer else "",
            figures,
        )
    ]


def not_checked(reason: str) -> Finding:
    """That the reference was not looked at, and why."""
    return Finding("reference_not_checked", "info", "The reference was not checked", reason)
