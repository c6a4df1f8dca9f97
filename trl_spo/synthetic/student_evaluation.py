# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What has become of a student after a round: how diverse its responses are, whether it prefers what people prefer, and what it can
still do.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from sacrebleu.metrics import BLEU
from transformers import AutoModelForCausalLM, AutoTokenizer

from .._compat import _tokenize, add_fused_lm_head, common_prefix_length
from .agreement import wilson_rate
from .critics import batched


Prompt = str | list[dict[str, str]]


def distinct_n(texts: Sequence[str], n: int, num_words: int | None = None) -> float | None:
    """
    Share of different n-grams of words among all n-grams of all texts (Li et al., 2016).

    Args:
        texts (`Sequence[str]`):
            Texts.
        n (`int`):
            Words of an n-gram.
        num_words (`int`, *optional*):
            Words of each text that count. More words repeat more, so that two sets are compared by the same number.

    Returns:
        `float`, *optional*: `None` if there is no n-gram.
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()[:num_words]
        grams.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return len(grams) / grams.total() if grams else None


def self_bleu(groups: Iterable[Sequence[str]]) -> float | None:
    """
    How much alike the responses to a prompt are: mean BLEU of each of them against the others, from 0 to 1 (Zhu et al., 2018).

    Args:
        groups (`Iterable[Sequence[str]]`):
            Of each prompt its responses.

    Returns:
        `float`, *optional*: `None` if no prompt has two responses that are not empty.
    """
    bleu = BLEU(effective_order=True)  # or a short response would have none with itself
    scores = []
    for group in groups:
        group = [text for text in group if text.strip()]
        for i, text in enumerate(group if len(group) > 1 else ()):
            scores.append(bleu.sentence_score(text, [*group[:i], *group[i + 1 :]]).score / 100)
    return math.fsum(scores) / len(scores) if scores else None


@dataclass(frozen=True)
class ResponseScore:
    """
    What a model says of a response.

    Args:
        log_prob (`float`):
            Sum of the log-probabilities of its tokens, the end-of-sequence token included, in nats.
        entropy (`float`):
            Sum of the entropies of the distributions that they are drawn from, in nats.
        tokens (`int`):
            Their number.
    """

    log_prob: float
    entropy: float
    tokens: int


class StudentScorer:
    """
    A model that says how probable responses are.

    Args:
        model (`str`):
            Path or name.
        model_kwargs (`dict[str, Any]`, *optional*):
            Of `from_pretrained`.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses per forward pass.
    """

    def __init__(self, model: str, model_kwargs: dict[str, Any] | None = None, batch_size: int = 8):
        kwargs = {"dtype": "auto", **(model_kwargs or {})}
        self.model = AutoModelForCausalLM.from_pretrained(model, **kwargs).eval()
        if not hasattr(self.model, "hf_device_map"):
            self.model.to(PartialState().device)
        # In tiles, so that the logits of a large vocabulary never are in memory
        add_fused_lm_head(self.model, outputs=("log_probs", "entropy"))
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.batch_size = batch_size

    def _encode(self, prompt: Prompt, response: str) -> tuple[list[int], int]:
        """The tokens of both, as the trainers have them, and where the response begins."""
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token
            start = _tokenize(self.tokenizer, prompt)["input_ids"] if prompt else []
            ids = _tokenize(self.tokenizer, prompt + response.removesuffix(eos) + eos)["input_ids"]
        else:
            messages = [*prompt, {"role": "assistant", "content": response}]
            start = _tokenize(self.tokenizer, prompt, add_generation_prompt=True)["input_ids"]
            ids = _tokenize(self.tokenizer, messages)["input_ids"]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return ids[:limit], min(common_prefix_length(start, ids), len(ids[:limit]))

    @torch.no_grad()
    def score(self, rows: Iterable[tuple[Prompt, str]]) -> list[ResponseScore]:
        """What it says of responses to prompts. Beyond the model's context, a response is cut off."""
        scores = []
        device = self.model.device
        for batch in batched(rows, self.batch_size):
            encoded = [self._encode(prompt, response) for prompt, response in batch]
            length = max(len(ids) for ids, _ in encoded)
            input_ids = torch.zeros(len(batch), length, dtype=torch.long)
            mask = torch.zeros_like(input_ids)
            labels = torch.full_like(input_ids, -100)
            for row, (ids, start) in enumerate(encoded):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                mask[row, : len(ids)] = 1
                labels[row, start : len(ids)] = input_ids[row, start : len(ids)]
            labels[:, 0] = -100  # which nothing predicts
            outputs = self.model(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                labels=labels.to(device),
                use_cache=False,
                fused_lm_head=True,
            )
            counts = (labels[:, 1:] != -100).sum(dim=1).tolist()
            log_probs, entropies = (x.double().sum(dim=1).tolist() for x in (outputs.log_probs, outputs.entropy))
            scores += [ResponseScore(*of_row) for of_row in zip(log_probs, entropies, counts, strict=True)]
        return scores


def preference_accuracy(scorer: StudentScorer, pairs: Sequence[tuple[Prompt, str, str]]) -> dict[str, Any]:
    """
    How often a model finds the better response more probable, by the mean log-probability of its tokens, which it also has before
    any training and without a reference.

    Args:
        scorer ([`StudentScorer`]):
            The model.
        pairs (`Sequence[tuple]`):
            Prompt, better and worse response.

    Returns:
        `dict[str, Any]`: `rate`, `interval` and `number`, those of the same value counting half (and being left out of the interval).
    """
    rows = [(prompt, response) for prompt, *responses in pairs for response in responses]
    means = [score.log_prob / max(score.tokens, 1) for score in scorer.score(rows)]
    better, worse = means[::2], means[1::2]
    wins = sum(b > w for b, w in zip(better, worse, strict=True))
    ties = sum(b == w for b, w in zip(better, worse, strict=True))
    rate = wilson_rate(wins, len(pairs) - ties)
    return {**rate, "rate": (wins + ties / 2) / len(pairs) if pairs else None, "number": len(pairs)}


def text_log_likelihood(scorer: StudentScorer, texts: Sequence[str]) -> float:
    """Mean log-probability of a token of texts, in nats: what the model can still write besides what it was trained on."""
    scores = scorer.score(("", text) for text in texts)
    return math.fsum(score.log_prob for score in scores) / max(sum(score.tokens for score in scores), 1)


def diversity(
    scorer: StudentScorer, samples: Dataset | Sequence[dict[str, Any]], num_words: int = 64
) -> dict[str, Any]:
    """
    How diverse a student's responses are.

    Args:
        scorer ([`StudentScorer`]):
            The student.
        samples (`Sequence[dict[str, Any]]`):
            Rows of candidates: `prompt`, and `responses` with `text`.
        num_words (`int`, *optional*, defaults to `64`):
            Words of a response that count for distinct-n.

    Returns:
        `dict[str, Any]`: `distinct_1`, `distinct_2`, `self_bleu`; `entropy`, the mean entropy in nats of the distributions that the
        tokens of the responses are drawn from, at temperature 1; and `mean_words` of a response.
    """
    groups = [[response["text"] for response in row["responses"]] for row in samples]
    texts = [text for group in groups for text in group]
    scores = scorer.score((row["prompt"], response["text"]) for row in samples for response in row["responses"])
    return {
        "distinct_1": distinct_n(texts, 1, num_words),
        "distinct_2": distinct_n(texts, 2, num_words),
        "self_bleu": self_bleu(groups),
        "entropy": math.fsum(score.entropy for score in scores) / max(sum(score.tokens for score in scores), 1),
        "mean_words": sum(len(text.split()) for text in texts) / max(len(texts), 1),
    }
