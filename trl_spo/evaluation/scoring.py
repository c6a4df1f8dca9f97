# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""How probable a model finds responses and texts."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .._compat import _tokenize, add_fused_lm_head, common_prefix_length
from .statistics import wilson_rate


Prompt = str | list[dict[str, str]]
# Prompt, better and worse response; and as in a dataset, `tools` and `chat_template_kwargs` of a conversation
PreferencePair = tuple[Prompt, str, str] | tuple[Prompt, str, str, dict[str, Any]]


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
            Path or name, or a model on its device. Of an adapter that is loaded here, what it does to the output layer is merged into it.
        model_kwargs (`dict[str, Any]`, *optional*):
            Of `from_pretrained`. `dtype` is `"auto"` unless it is here.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses per forward pass.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; by default that of the same name.

    Raises:
        `ValueError`: the model has an adapter on its output layer.
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
            _merge_head(model)
        check_head(model)
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        # In tiles, so that the logits of a large vocabulary never are in memory
        add_fused_lm_head(self.model, outputs=("log_probs", "entropy"))

    def _encode(self, prompt: Prompt, response: str, columns: dict[str, Any] | None = None) -> tuple[list[int], int]:
        """The tokens of both, as the trainers have them, and where the response begins."""
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token
            start = _tokenize(self.tokenizer, prompt)["input_ids"] if prompt else []
            ids = _tokenize(self.tokenizer, prompt + response.removesuffix(eos) + eos)["input_ids"]
        else:
            columns, messages = columns or {}, [*prompt, {"role": "assistant", "content": response}]
            tools = columns.get("tools")
            tools = json.loads(tools) if isinstance(tools, str) else tools
            template = {"tools": tools, **(columns.get("chat_template_kwargs") or {})}
            start = _tokenize(self.tokenizer, prompt, add_generation_prompt=True, **template)["input_ids"]
            ids = _tokenize(self.tokenizer, messages, **template)["input_ids"]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return ids[:limit], min(common_prefix_length(start, ids), len(ids[:limit]))

    @torch.no_grad()
    def score(self, rows: Iterable[tuple], desc: str = "Log-probabilities") -> list[ResponseScore]:
        """
        What it says of responses to prompts. Beyond the model's context, a response is cut off.

        Args:
            rows (`Iterable[tuple]`):
                Prompt and response; for the chat template, a dict with `tools` and `chat_template_kwargs` may follow.
            desc (`str`, *optional*):
                Of the progress bar.
        """
        encoded = [self._encode(*row) for row in rows]
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


def check_head(model: PreTrainedModel) -> None:
    """Raises a `ValueError` if an adapter adds to the output layer: only the layer's own weights are read."""
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "The model has an adapter on its output layer, which would not be measured. Merge it first: `model.merge_and_unload()`."
        )


def _merge_head(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        layer = head.get_base_layer()
        # Or it would be merged into the input embeddings as well, where both are the same
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        head.merge()
        model.set_output_embeddings(layer)


def preference_accuracy(scorer: ResponseScorer, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """
    How often a model finds the better response more probable, by the mean log-probability of its tokens, which it also has before
    any training and without a reference.

    Args:
        scorer ([`ResponseScorer`]):
            The model.
        pairs (`Sequence[tuple]`):
            Prompt, better and worse response.

    Returns:
        `dict[str, Any]`: `rate`, `interval` and `number`, those of the same value counting half.
    """
    rows = both_sides(pairs)
    means = [score.log_prob / max(score.tokens, 1) for score in scorer.score(rows)]
    better, worse = means[::2], means[1::2]
    wins = sum(b > w for b, w in zip(better, worse, strict=True))
    ties = sum(b == w for b, w in zip(better, worse, strict=True))
    return wilson_rate(wins + ties / 2, len(pairs))


def both_sides(pairs: Sequence[PreferencePair]) -> list[tuple]:
    """The rows of [`ResponseScorer.score`] of the better and the worse response, one after the other."""
    return [(prompt, response, *rest) for prompt, better, worse, *rest in pairs for response in (better, worse)]


def text_log_likelihood(scorer: ResponseScorer, texts: Sequence[str]) -> float:
    """Mean log-probability of a token of texts, in nats: what the model can still write besides what it was trained on."""
    scores = scorer.score(("", text) for text in texts)
    return math.fsum(score.log_prob for score in scores) / max(sum(score.tokens for score in scores), 1)
