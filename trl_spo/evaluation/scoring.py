# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""How probable a model finds responses and texts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .._compat import _tokenize, add_fused_lm_head, common_prefix_length
from .statistics import wilson_rate


Prompt = str | list[dict[str, str]]


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


class ResponseScorer:
    """
    A model that says how probable responses are.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Path or name, or a model on its device.
        model_kwargs (`dict[str, Any]`, *optional*):
            Of `from_pretrained`. `dtype` is `"auto"` unless it is here.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses per forward pass.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; by default that of the same name.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        model_kwargs: dict[str, Any] | None = None,
        batch_size: int = 8,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.config._name_or_path)
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "auto", **(model_kwargs or {})})
            if not hasattr(model, "hf_device_map"):
                model.to(PartialState().device)
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        # In tiles, so that the logits of a large vocabulary never are in memory
        add_fused_lm_head(self.model, outputs=("log_probs", "entropy"))

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
    def score(self, rows: Iterable[tuple[Prompt, str]], desc: str = "Log-probabilities") -> list[ResponseScore]:
        """What it says of responses to prompts. Beyond the model's context, a response is cut off."""
        encoded = [self._encode(prompt, response) for prompt, response in rows]
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))  # so that there is little padding
        scores: list[Any] = [None] * len(encoded)
        device = self.model.device
        with tqdm(desc=desc, total=len(encoded), unit=" texts") as bar:
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                length = len(encoded[batch[0]][0])
                input_ids = torch.zeros(len(batch), length, dtype=torch.long)
                mask = torch.zeros_like(input_ids)
                labels = torch.full_like(input_ids, -100)
                for row, i in enumerate(batch):
                    ids, start = encoded[i]
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
                for i, *of_row in zip(batch, log_probs, entropies, counts, strict=True):
                    scores[i] = ResponseScore(*of_row)
                bar.update(len(batch))
        return scores


def preference_accuracy(scorer: ResponseScorer, pairs: Sequence[tuple[Prompt, str, str]]) -> dict[str, Any]:
    """
    How often a model finds the better response more probable, by the mean log-probability of its tokens, which it also has before
    any training and without a reference.

    Args:
        scorer ([`ResponseScorer`]):
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


def text_log_likelihood(scorer: ResponseScorer, texts: Sequence[str]) -> float:
    """Mean log-probability of a token of texts, in nats: what the model can still write besides what it was trained on."""
    scores = scorer.score(("", text) for text in texts)
    return math.fsum(score.log_prob for score in scores) / max(sum(score.tokens for score in scores), 1)
