# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
A world of worked sums, whose capability can be verified.

A tiny Llama is pretrained, on the spot, on sums with their working, written in one of several ways; it then answers held-out
sums well. Preference pairs set a right worked answer against a wrong one. What a preference loss does to the probability of
the right answers, and to the share of sums that the model still gets right, is measured exactly: no judge, no classifier.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .cache import cached


# Part of the cache's key: raise it when the sums, the tokenizer, the model or its training changes.
VERSION = 1

EOS, PAD = "<end>", "<pad>"
STYLES = ("units first", "tens first", "carry last")


# -- the sums


def prompt_text(a: int, b: int) -> str:
    """The prompt of a sum."""
    return f"{a:02}+{b:02}:"


def worked_answer(a: int, b: int, style: str, rng: random.Random | None = None) -> str:
    """
    A worked answer, which ends with `=` and the sum.

    Args:
        a (`int`):
            First number, from 0 to 99.
        b (`int`):
            Second number, from 0 to 99.
        style (`str`):
            One of `STYLES`: which column is added up first, and whether the carry is added at the end.
        rng (`random.Random`, *optional*):
            If given, one step of the working goes wrong, and what follows goes on from there.
    """
    wrong = rng.choice(("units", "tens")) if rng is not None else None
    units = a % 10 + b % 10
    tens = a // 10 + b // 10
    if wrong == "units":
        units = rng.choice([value for value in range(max(0, units - 3), min(18, units + 3) + 1) if value != units])
    if wrong == "tens":
        tens = rng.choice([value for value in range(max(0, tens - 3), min(18, tens + 3) + 1) if value != tens])
    steps = {
        "u": f"{a % 10}+{b % 10}={units:02}",
        "t": f"{a // 10}+{b // 10}={tens:02}",
        "c": f"{tens:02}+{units // 10}={tens + units // 10:02}",
    }
    order = {"units first": "utc", "tens first": "tuc", "carry last": "tu"}[style]
    return ",".join(steps[step] for step in order) + f"={10 * tens + units:03}"


def is_right(prompt: str, answer: str) -> bool:
    """Whether an answer ends with the sum that its prompt asks for."""
    a, b = prompt.rstrip(":").split("+")
    return answer.rpartition("=")[2] == f"{int(a) + int(b):03}"


# -- tokenizer and model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters."""
    vocabulary = [EOS, PAD, *"0123456789+=,:"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=PAD))
    tokenizer.pre_tokenizer = Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass(frozen=True)
class ArithmeticConfig:
    """
    What determines an [`ArithmeticWorld`].

    Args:
        hidden_size (`int`, *optional*, defaults to `64`):
            Width of the model.
        num_layers (`int`, *optional*, defaults to `2`):
            Number of layers.
        num_heads (`int`, *optional*, defaults to `4`):
            Number of attention heads.
        pretrain_steps (`int`, *optional*, defaults to `1500`):
            Optimizer steps of the pretraining.
        pretrain_batch_size (`int`, *optional*, defaults to `64`):
            Sums per step.
        learning_rate (`float`, *optional*, defaults to `4e-3`):
            Highest learning rate of the pretraining.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights, of the split and of the pairs.
        num_train_pairs (`int`, *optional*, defaults to `2000`):
            Number of preference pairs to train on.
        num_eval_sums (`int`, *optional*, defaults to `500`):
            Number of sums held out, from pretraining and from the pairs.
    """

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    pretrain_steps: int = 1500
    pretrain_batch_size: int = 64
    learning_rate: float = 4e-3
    seed: int = 0
    num_train_pairs: int = 2000
    num_eval_sums: int = 500


class ArithmeticWorld:
    """
    Sums, a model pretrained on them, and preference pairs of right and wrong worked answers. What takes time is made once and
    cached in `$TRL_SPO_CACHE`, or `~/.cache/trl_spo`.

    Args:
        config ([`ArithmeticConfig`], *optional*):
            Sizes and seeds.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.

    Attributes:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            The tokenizer.
        train_sums, eval_sums (`list[tuple[int, int]]`):
            Sums, none of which is in both.

    Example:

    ```python
    >>> world = ArithmeticWorld(progress=True)
    >>> world.accuracy(world.model())
    >>> trainer = StablePOTrainer(world.model(), train_dataset=world.pairs("train"), processing_class=world.tokenizer)
    >>> trainer.train()
    >>> world.accuracy(trainer.model)
    ```
    """

    def __init__(self, config: ArithmeticConfig | None = None, progress: bool = False):
        self.config = config or ArithmeticConfig()
        self.progress = progress
        self.tokenizer = make_tokenizer()
        sums = [(a, b) for a in range(100) for b in range(100)]
        random.Random(self.config.seed).shuffle(sums)
        held_out, wanted = self.config.num_eval_sums, self.config.num_train_pairs
        if held_out + wanted > len(sums):
            raise ValueError(
                f"`num_eval_sums` + `num_train_pairs` is {held_out + wanted}, but there are only {len(sums)} sums."
            )
        self.eval_sums, self.train_sums = sums[:held_out], sums[held_out:]

    @property
    def folder(self) -> Path:
        """Folder of the pretrained model and its tokenizer, as `from_pretrained` takes it; made when first asked for."""

        def make(folder: Path) -> None:
            self._pretrain().save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        settings = {name: value for name, value in asdict(self.config).items() if name != "num_train_pairs"}
        return cached("arithmetic-model", {"version": VERSION, **settings}, make)

    def model(self) -> LlamaForCausalLM:
        """A copy of the pretrained model. A trainer that gets no `ref_model` takes the pretrained model as the reference."""
        return LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def pairs(self, split: str) -> Dataset:
        """
        Preference pairs of `split` ("train" or "eval"): for each sum a right and a wrong worked answer, each in a style of its
        own. Columns: `prompt`, `chosen`, `rejected`.
        """
        sums = self.train_sums[: self.config.num_train_pairs] if split == "train" else self.eval_sums
        rng = random.Random(f"{split} {self.config.seed}")
        return Dataset.from_list(
            [
                {
                    "prompt": prompt_text(a, b),
                    "chosen": worked_answer(a, b, rng.choice(STYLES)),
                    "rejected": worked_answer(a, b, rng.choice(STYLES), rng),
                }
                for a, b in sums
            ]
        )

    @torch.no_grad()
    def accuracy(self, model: PreTrainedModel, sums: Sequence[tuple[int, int]] | None = None) -> float:
        """Share of the held-out sums that the model's greedy answer gets right: the capability."""
        prompts = [prompt_text(a, b) for a, b in (self.eval_sums if sums is None else sums)]
        batch = self.tokenizer(prompts, return_tensors="pt").to(model.device)
        training = model.training
        model.eval()
        ids = model.generate(
            **batch, do_sample=False, max_new_tokens=32, use_cache=True, pad_token_id=self.tokenizer.pad_token_id
        )
        model.train(training)
        answers = self.tokenizer.batch_decode(ids[:, batch["input_ids"].size(1) :], skip_special_tokens=True)
        return sum(is_right(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)) / len(prompts)

    def _pretrain(self) -> LlamaForCausalLM:
        """Trains a new model on worked sums. Leaves the global random state alone."""
        config, tokenizer = self.config, self.tokenizer
        model_config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = LlamaForCausalLM(model_config)
        rng = random.Random(config.seed)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        steps, warmup = config.pretrain_steps, max(1, config.pretrain_steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(
                (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))
            ),
        )
        model.train()
        bar = tqdm(range(steps), desc="Pretraining", unit="step", disable=not self.progress, dynamic_ncols=True)
        for _ in bar:
            sums = [rng.choice(self.train_sums) for _ in range(config.pretrain_batch_size)]
            texts = [prompt_text(a, b) + worked_answer(a, b, rng.choice(STYLES)) + EOS for a, b in sums]
            batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            labels[:, : len(prompt_text(0, 0))] = -100  # the prompt is noise
            loss = model(**batch, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"{loss.item():.2f} nats/token", refresh=False)
        return model.eval()
