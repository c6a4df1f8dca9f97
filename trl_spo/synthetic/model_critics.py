# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Critics with a model in this process: one that compares, and one that scores."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .critics import VERDICTS, Critic, Request, batched
from .identity import weights_identity
from .rubrics import Rubric
from .store import request_key


T = TypeVar("T")

_LINE_FORMAT = """\
Give your reasons in a few sentences. Then write a last line, which is `Verdict: A` if the first response is better, `Verdict: B` if the second
one is, and `Verdict: tie` only if neither is."""


@dataclass(kw_only=True)
class _ModelCritic(Critic):
    """A critic with a model in this process. Its answers are kept by the weights, so that it is asked anew when they change."""

    model: str | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    revision: str = "main"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._given = self.model
        self._name = self.model if isinstance(self.model, str) else self.model.config._name_or_path

    @cached_property
    def _weights(self) -> dict[str, Any]:
        return weights_identity(self._given, self.revision)

    def unload(self) -> None:
        """Gives back the memory of a model that was loaded here. It is loaded again when it is asked."""
        self.model = self._given

    def _refuse_nan(self, values: list[float]) -> None:
        if not all(map(math.isfinite, values)):
            raise ValueError(
                f"The model of the critic {self.name!r} gives {values}. Load it in another dtype, or use another one."
            )

    def _load_with(self, auto_class: type) -> None:
        revision = self._weights.get("commit", self.revision)
        if isinstance(self.model, str):
            self.model = auto_class.from_pretrained(self._name, revision=revision, dtype="auto", device_map="auto")
        if self.tokenizer is None:
            self.tokenizer = AutoTokenizer.from_pretrained(self._name, revision=revision)


@dataclass(kw_only=True)
class LocalCritic(_ModelCritic):
    """
    A causal language model in this process, which compares. It writes its rationale, and its verdict is the likeliest of the three in
    the last line, so that there always is one, and it is graded.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model. Its answers are kept by its weights. They are looked at once: make another critic when they
            have changed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; by default that of the same name.
        revision (`str`, *optional*, defaults to `"main"`):
            Of the model on the Hub.
        rubric (`str` or [`Rubric`], *optional*, defaults to `"helpfulness"`):
            What it compares by.
        max_rationale_tokens (`int`, *optional*, defaults to `256`):
            Of a rationale. With 0 there is none.
        batch_size (`int`, *optional*, defaults to `8`):
            Requests per forward pass.
    """

    compares: ClassVar[bool] = True

    rubric: str | Rubric = "helpfulness"
    max_rationale_tokens: int = 256
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_rationale_tokens < 0 or self.batch_size < 1:
            raise ValueError(
                f"`max_rationale_tokens` ({self.max_rationale_tokens}) must be at least 0, and `batch_size` ({self.batch_size}) at "
                "least 1."
            )
        if not isinstance(self.rubric, Rubric):
            self.rubric = Rubric(self.rubric)

    def messages(self, request: Request) -> list[dict[str, str]]:
        text = self.rubric.render(request.prompt, *request.responses, request.columns)
        return [{"role": "user", "content": f"{text}\n\n{_LINE_FORMAT}"}]

    def key(self, request: Request) -> str:
        return request_key(
            local=self._weights, max_rationale_tokens=self.max_rationale_tokens, messages=self.messages(request)
        )

    def identity(self) -> str:
        who = {"local": self._weights, "max_rationale_tokens": self.max_rationale_tokens}
        return request_key(**who, rubric=self.rubric.sources)

    def check(self, columns: dict[str, Any]) -> None:
        self.rubric.check(columns)
        self._load()
        self._verdict_line()

    def _load(self) -> None:
        self._load_with(AutoModelForCausalLM)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def _verdict_line(self) -> tuple[list[int], list[int]]:
        """The tokens of the last line up to where the verdicts part, and the next token of each of them."""
        rows = [self.tokenizer(f"Verdict: {verdict}", add_special_tokens=False).input_ids for verdict in VERDICTS]
        length = next(i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)
        firsts = [row[length] for row in rows]
        if len(set(firsts)) < len(firsts):
            raise ValueError(
                f"The tokenizer of the critic {self.name!r} begins two of the verdicts {VERDICTS} with the same token, so that they "
                "cannot be told apart. Use another model."
            )
        return rows[0][:length], firsts

    @torch.no_grad()
    def answer(self, requests: Iterable[tuple[T, Request]]) -> Iterator[tuple[T, dict[str, Any]]]:
        """Answers requests with their tags, batch by batch."""
        self._load()
        tokenizer, model = self.tokenizer, self.model
        model.eval()
        line, firsts = self._verdict_line()
        for batch in batched(requests, self.batch_size):
            chats = [
                tokenizer.apply_chat_template(self.messages(request), add_generation_prompt=True, tokenize=False)
                for _, request in batch
            ]
            rationales = [""] * len(batch)
            if self.max_rationale_tokens > 0:
                inputs = tokenizer(
                    chats, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
                ).to(model.device)
                output = model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=self.max_rationale_tokens,
                    stop_strings=["Verdict:"],
                    tokenizer=tokenizer,
                    pad_token_id=tokenizer.pad_token_id,
                )
                texts = tokenizer.batch_decode(output[:, inputs.input_ids.size(1) :], skip_special_tokens=True)
                rationales = [text.split("Verdict:")[0].strip() for text in texts]
            rows = [
                tokenizer(chat + (f"{rationale}\n" if rationale else ""), add_special_tokens=False).input_ids + line
                for chat, rationale in zip(chats, rationales, strict=True)
            ]
            inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
            logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, firsts].float()
            for (tag, _), rationale, probabilities in zip(batch, rationales, logits.softmax(1).tolist(), strict=True):
                self._refuse_nan(probabilities)
                verdict = VERDICTS[max(range(3), key=probabilities.__getitem__)]
                probability = probabilities[0] + probabilities[2] / 2
                yield tag, {"verdict": verdict, "rationale": rationale, "probability": probability}


@dataclass(kw_only=True)
class RewardCritic(_ModelCritic):
    """
    A reward model in this process, such as TRL's RewardTrainer makes, which scores. Of two responses, the probability that the first
    is better is that of Bradley and Terry, `σ(score_1 - score_2)`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Sequence classification model with one label. Its answers are kept by its weights. They are looked at once: make another critic when they
            have changed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; by default that of the same name.
        revision (`str`, *optional*, defaults to `"main"`):
            Of the model on the Hub.
        max_length (`int`, *optional*):
            Tokens of prompt and response after which they are cut off.
        batch_size (`int`, *optional*, defaults to `16`):
            Texts per forward pass.
    """

    compares: ClassVar[bool] = False

    max_length: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, or `None`, got {self.max_length}.")

    def key(self, request: Request) -> str:
        return request_key(
            reward_model=self._weights,
            max_length=self.max_length,
            prompt=request.prompt,
            response=request.responses[0],
        )

    def check(self, columns: dict[str, Any]) -> None:
        self._load()

    def _load(self) -> None:
        self._load_with(AutoModelForSequenceClassification)
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"The model of the critic {self.name!r} has {self.model.config.num_labels} labels, and a reward model has one. Use "
                "the output of TRL's RewardTrainer."
            )

    @torch.no_grad()
    def answer(self, requests: Iterable[tuple[T, Request]]) -> Iterator[tuple[T, dict[str, Any]]]:
        """Answers requests with their tags, batch by batch."""
        self._load()
        self.model.eval()
        for batch in batched(requests, self.batch_size):
            rows = [self._tokenize(request.prompt, request.responses[0])[: self.max_length] for _, request in batch]
            inputs = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
            scores = self.model(**inputs.to(self.model.device), use_cache=False).logits[:, 0].float().tolist()
            for (tag, _), score in zip(batch, scores, strict=True):
                self._refuse_nan([score])
                yield tag, {"score": score}

    def _tokenize(self, prompt: str | list[dict[str, str]], response: str) -> list[int]:
        """As RewardTrainer does."""
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token
            text = prompt + response
            return self.tokenizer(text if eos is None or text.endswith(eos) else text + eos).input_ids
        messages = [*prompt, {"role": "assistant", "content": response}]
        return self.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
