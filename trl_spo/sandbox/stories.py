# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
A world of little stories with a known reward.

A template grammar writes the stories, with moods, styles and lapses that differ from story to story. A tiny Llama is
pretrained on them, on the spot, in about a minute. The true reward reads the text alone and adds up separable qualities:
the kindness of what happens, vivid words, whether the characters keep their names, the length, and whether the story ends.
So everything that is only ever estimated for real models can be measured here: the true reward of what a policy writes.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .cache import cached


# Part of the cache's key: raise it when the grammar, the tokenizer, the model or its training changes.
VERSION = 1

NAMES = (
    "Tim Lily Max Anna Sam Rosa Ben Mia Leo Nora Finn Ella Hugo Ivy Oscar Ruby Paul Zoe Jack Clara Otto Emma Felix Luna "
    "Carl Vera Adam Lena Noah Iris Theo Jane"
).split()
ANIMALS = "fox bear rabbit mouse owl frog duck hedgehog squirrel badger otter goose lamb turtle cat dog".split()
SIZES = "small big young shy tall short".split()
PLACES = "river forest hill lake garden village meadow cave field bridge mill pond valley tower barn harbor".split()
OBJECTS = (
    "key stone apple drum lamp boat kite shell feather coin flute basket ribbon bell book hat rope cup map pearl ladder "
    "mirror candle blanket"
).split()
TIMES = "morning evening day night afternoon".split()
WORLD = "sky wind moon grass rain sun water road snow fog sea dust".split()
PLAIN = "near far wet dry cold warm soft dark pale thick".split()
# The words that the reward counts
VIVID = (
    "golden shimmering crimson velvet silver misty glowing sparkling emerald fragrant thundering frosty rosy whispering "
    "gleaming amber scarlet dazzling moonlit swirling"
).split()
KIND = "helped hugged thanked comforted forgave cheered happy grateful safe proud".split()
UNKIND = "pushed mocked tricked robbed scolded chased sad hurt lonely ashamed".split()
_NEUTRAL = "watched passed followed called noticed joined quiet tired busy calm".split()
_VERBS = {"kind": KIND[:6], "unkind": UNKIND[:6], "neutral": _NEUTRAL[:6]}
_FEELINGS = {"kind": KIND[6:], "unkind": UNKIND[6:], "neutral": _NEUTRAL[6:]}

# What the reward makes of the qualities of a story
WEIGHTS = {"kindness": 0.6, "vividness": 0.5, "consistency": 0.8, "length": 0.4, "ending": 1.0}
TARGET_SENTENCES = 6

EOS, PAD, UNK = "<end>", "<pad>", "<unk>"


# -- the grammar


def prompt_text(rng: random.Random) -> str:
    """The beginning of a story: its prompt."""
    return f"Once upon a time there was a {rng.choice(SIZES)} {rng.choice(ANIMALS)} named {rng.choice(NAMES)}."


def write_story(rng: random.Random, prompt: str | None = None) -> str:
    """
    A story of the grammar, the prompt included.

    Mood, style, length and carefulness are drawn for each story, so that stories differ in each quality.
    """
    prompt = prompt or prompt_text(rng)
    hero = _hero(prompt)
    friend = rng.choice([name for name in NAMES if name != hero])
    mood = rng.choices(("kind", "neutral", "unkind"), (0.3, 0.4, 0.3))[0]
    vivid = rng.choice((0.05, 0.3, 0.7))
    careless = rng.choices((0.0, 0.2, 0.5), (0.5, 0.3, 0.2))[0]
    thing, place = rng.choice(OBJECTS), rng.choice(PLACES)

    def name(who: str) -> str:
        return rng.choice(NAMES) if rng.random() < careless else who

    def a(noun: str) -> str:
        word = f"{rng.choice(VIVID)} {noun}" if rng.random() < vivid else noun
        return f"an {word}" if word[0] in "aeiou" else f"a {word}"

    def how() -> str:
        return rng.choice(VIVID) if rng.random() < vivid else rng.choice(PLAIN)

    def tone(words: dict[str, list[str]]) -> str:
        return rng.choice(words[mood] if rng.random() < 0.8 else words["neutral"])

    fillers = [
        lambda: f"The {rng.choice(WORLD)} was {how()}.",
        lambda: f"The {rng.choice(WORLD)} was {how()} and {how()}.",
        lambda: f"{name(hero)} walked to {a(rng.choice(PLACES))}.",
        lambda: f"{name(friend)} had {a(rng.choice(OBJECTS))}.",
        lambda: f"{name(hero)} {tone(_VERBS)} {name(friend)}.",
    ]
    sentences = [
        f"One {rng.choice(TIMES)} {name(hero)} found {a(thing)} in {a(place)}.",
        f"Then came a {rng.choice(SIZES)} {rng.choice(ANIMALS)} named {friend}.",
        f"{name(friend)} wanted the {thing}.",
        f"{name(hero)} {tone(_VERBS)} {name(friend)}.",
        f"In the end {name(rng.choice((hero, friend)))} was {tone(_FEELINGS)}.",
    ]
    # A short story leaves the wish out; a long one has more to tell before the end
    num_fillers = rng.choices((-1, 0, 1, 2, 3), (0.2, 0.25, 0.25, 0.15, 0.15))[0]
    if num_fillers < 0:
        sentences.pop(2)
    for _ in range(num_fillers):
        sentences.insert(rng.randint(2, len(sentences) - 1), rng.choice(fillers)())
    return " ".join([prompt, *sentences])


def _hero(text: str) -> str:
    match = re.search(r"named (\w+)", text)
    return match.group(1) if match else ""


# -- the true reward


def qualities(story: str) -> dict[str, float]:
    """
    The qualities of a story, given with its prompt. Exact and deterministic; each has a bound, so none can be exploited
    without end.

    - `kindness`: kind less unkind words, from -2 to 2;
    - `vividness`: number of different vivid words, at most 4;
    - `consistency`: 0, less 1 for each mention of a name that the story has not given to anyone ("named ..."), and less 1
      if the hero is never mentioned again; at least -3;
    - `length`: 0 for as many sentences as wanted after the prompt, less 1 for each too many or too few; at least -4;
    - `ending`: 0 if the text ends with a full stop, else -1.
    """
    words = re.findall(r"\w+", story)
    given = set(re.findall(r"named (\w+)", story))
    mentioned = [word for word in words if word in NAMES]
    hero = _hero(story)
    kindness = sum(word in KIND for word in words) - sum(word in UNKIND for word in words)
    strangers = sum(name not in given for name in mentioned) + (mentioned.count(hero) < 2)
    sentences = story.count(".") - 1
    return {
        "kindness": float(max(-2, min(2, kindness))),
        "vividness": float(min(4, len(set(words) & set(VIVID)))),
        "consistency": 0.0 - min(3, strangers),
        "length": 0.0 - min(4, abs(sentences - TARGET_SENTENCES)),
        "ending": 0.0 if story.rstrip().endswith(".") else -1.0,
    }


def reward(story: str) -> float:
    """The true reward of a story, given with its prompt: the weighted sum of its [`qualities`]."""
    return sum(WEIGHTS[name] * value for name, value in qualities(story).items())


# -- tokenizer and model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the grammar's words, some 200 of them."""
    words = "Once upon a an time there was named One found in Then came wanted the The walked to had In end and . "
    vocabulary = [EOS, PAD, UNK, *words.split()]
    vocabulary += [
        *NAMES,
        *ANIMALS,
        *SIZES,
        *PLACES,
        *OBJECTS,
        *TIMES,
        *WORLD,
        *PLAIN,
        *VIVID,
        *KIND,
        *UNKIND,
        *_NEUTRAL,
    ]
    vocabulary = list(dict.fromkeys(vocabulary))  # some words play two parts
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # no space before the full stop
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass(frozen=True)
class StoriesConfig:
    """
    What determines a [`StoriesWorld`]; the defaults are those of `trl-spo demo`.

    Args:
        hidden_size (`int`, *optional*, defaults to `128`):
            Width of the model.
        num_layers (`int`, *optional*, defaults to `2`):
            Number of layers.
        num_heads (`int`, *optional*, defaults to `4`):
            Number of attention heads.
        pretrain_steps (`int`, *optional*, defaults to `350`):
            Optimizer steps of the pretraining.
        pretrain_batch_size (`int`, *optional*, defaults to `32`):
            Stories per step; each story is read once.
        learning_rate (`float`, *optional*, defaults to `4e-3`):
            Highest learning rate of the pretraining.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights and of the stories.
        num_train_prompts (`int`, *optional*, defaults to `1600`):
            Number of prompts, and of preference pairs, to train on.
        num_eval_prompts (`int`, *optional*, defaults to `256`):
            Number of prompts, and of preference pairs, held out.
        max_tokens (`int`, *optional*, defaults to `80`):
            Largest number of tokens of a sampled completion.
    """

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    pretrain_steps: int = 350
    pretrain_batch_size: int = 32
    learning_rate: float = 4e-3
    seed: int = 0
    num_train_prompts: int = 1600
    num_eval_prompts: int = 256
    max_tokens: int = 80


def pretrain(config: StoriesConfig, progress: bool = False) -> LlamaForCausalLM:
    """Train a new model on fresh stories of the grammar. Leaves the global random state alone."""
    tokenizer = make_tokenizer()
    model_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=5 * config.hidden_size // 2,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(model_config)
    rng = random.Random(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    steps, warmup = config.pretrain_steps, max(1, config.pretrain_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))
        ),
    )
    model.train()
    bar = tqdm(range(steps), desc="Pretraining", unit="step", disable=not progress, dynamic_ncols=True)
    for _ in bar:
        stories = [write_story(rng) + EOS for _ in range(config.pretrain_batch_size)]
        batch = tokenizer(stories, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"{loss.item():.2f} nats/token", refresh=False)
    return model.eval()


class StoriesWorld:
    """
    The grammar's prompts, a model pretrained on its stories, and preference pairs which that model wrote and the true
    reward labelled. What takes time is made once and cached in `$TRL_SPO_CACHE`, or `~/.cache/trl_spo`.

    Args:
        config ([`StoriesConfig`], *optional*):
            Sizes and seeds.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.

    Attributes:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            The tokenizer.
        train_prompts, eval_prompts (`list[str]`):
            Beginnings of stories, none of which is in both.

    Example:

    ```python
    >>> world = StoriesWorld(progress=True)
    >>> trainer = DPOTrainer(world.model(), train_dataset=world.pairs("train"), processing_class=world.tokenizer)
    >>> trainer.train()
    >>> samples = sample(trainer.model, world.tokenizer, world.eval_prompts)
    >>> mean([reward(story) for story in samples.stories])
    ```
    """

    def __init__(self, config: StoriesConfig | None = None, progress: bool = False):
        self.config = config or StoriesConfig()
        self.progress = progress
        self.tokenizer = make_tokenizer()
        num_train, num_eval = self.config.num_train_prompts, self.config.num_eval_prompts
        prompts = [
            f"Once upon a time there was a {size} {animal} named {name}."
            for size in SIZES
            for animal in ANIMALS
            for name in NAMES
        ]
        if num_train + num_eval > len(prompts):
            raise ValueError(
                f"`num_train_prompts` + `num_eval_prompts` is {num_train + num_eval}, but the grammar has only "
                f"{len(prompts)} prompts."
            )
        random.Random(self.config.seed).shuffle(prompts)
        self.train_prompts, self.eval_prompts = prompts[:num_train], prompts[num_train : num_train + num_eval]

    @property
    def folder(self) -> Path:
        """Folder of the pretrained model and its tokenizer, as `from_pretrained` takes it; made when first asked for."""

        def make(folder: Path) -> None:
            pretrain(self.config, self.progress).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        # Only what determines the model
        data = ("num_train_prompts", "num_eval_prompts", "max_tokens")
        settings = {name: value for name, value in asdict(self.config).items() if name not in data}
        return cached("stories-model", {"version": VERSION, **settings}, make)

    def model(self) -> LlamaForCausalLM:
        """A copy of the pretrained model. A trainer that gets no `ref_model` takes the pretrained model as the reference."""
        return LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def pairs(self, split: str) -> Dataset:
        """
        Preference pairs, one for each prompt of `split` ("train" or "eval"): two samples of the pretrained model, labelled
        by Bradley-Terry from their true rewards, P(i > j) = σ(r_i - r_j). Columns: `prompt`, `chosen`, `rejected`.
        """
        prompts = {"train": self.train_prompts, "eval": self.eval_prompts}[split]
        seed = 2 * self.config.seed + (split == "eval")

        def make(folder: Path) -> None:
            samples = sample(
                self.model(),
                self.tokenizer,
                prompts * 2,
                seed=seed,
                max_tokens=self.config.max_tokens,
                progress=f"Sampling {split} pairs" if self.progress else None,
            )
            rng = random.Random(seed)
            rows = []
            for i, prompt in enumerate(prompts):
                first, second = i, i + len(prompts)
                if samples.completions[first] == samples.completions[second]:
                    continue
                margin = reward(samples.stories[first]) - reward(samples.stories[second])
                if rng.random() > 1 / (1 + math.exp(-margin)):
                    first, second = second, first
                chosen, rejected = samples.completions[first], samples.completions[second]
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            (folder / "pairs.json").write_text(json.dumps(rows))

        settings = {"version": VERSION, "split": split, **asdict(self.config)}
        folder = cached("stories-pairs", settings, make)
        return Dataset.from_list(json.loads((folder / "pairs.json").read_text()))


# -- measuring a policy by its own samples


@dataclass
class Samples:
    """
    Samples of a policy.

    Attributes:
        prompts, completions (`list[str]`):
            The texts; a completion starts with a space, so that `prompt + completion` is the story.
        input_ids, attention_mask (`torch.Tensor` of shape `(N, L)`):
            Prompt and completion, the end-of-sequence token included.
        completion_mask (`torch.Tensor` of shape `(N, L)`):
            1 on the completion's tokens, the end-of-sequence token included.
    """

    prompts: list[str]
    completions: list[str]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor

    @property
    def stories(self) -> list[str]:
        return [prompt + completion for prompt, completion in zip(self.prompts, self.completions, strict=True)]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seed: int = 0,
    max_tokens: int = 80,
    batch_size: int = 256,
    progress: str | None = None,
) -> Samples:
    """
    One completion for each prompt, sampled from the policy itself (temperature 1, nothing cut off).

    The global random state is left as it was, so that measuring in the middle of training does not change the training.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence[str]`):
            The prompts; repeat one to get several samples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        max_tokens (`int`, *optional*, defaults to `80`):
            Largest number of tokens of a completion.
        batch_size (`int`, *optional*, defaults to `256`):
            Number of samples that are drawn at a time.
        progress (`str`, *optional*):
            What to call the progress bar; none by default.
    """
    was_training = model.training
    model.eval()
    prompts = list(prompts)
    rows = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        bar = tqdm(total=len(prompts), desc=progress, unit="story", disable=progress is None, dynamic_ncols=True)
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer(
                prompts[start : start + batch_size], padding=True, padding_side="left", return_tensors="pt"
            )
            batch = batch.to(model.device)
            output = model.generate(
                **batch,
                max_new_tokens=max_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ).cpu()
            prompt_length = batch["input_ids"].size(1)
            for ids, mask in zip(output, batch["attention_mask"].cpu(), strict=True):
                completion = ids[prompt_length:].tolist()
                if tokenizer.eos_token_id in completion:
                    completion = completion[: completion.index(tokenizer.eos_token_id) + 1]
                rows.append((ids[:prompt_length][mask.bool()].tolist(), completion))
            bar.update(len(output))
        bar.close()
    model.train(was_training)
    texts = tokenizer.batch_decode([completion for _, completion in rows], skip_special_tokens=True)
    return Samples(prompts, [" " + text for text in texts], *_collate(rows, tokenizer.pad_token_id))


def _collate(
    rows: list[tuple[list[int], list[int]]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[i, :end] = torch.tensor(prompt + completion)
        attention_mask[i, :end] = 1
        completion_mask[i, len(prompt) : end] = 1
    return input_ids, attention_mask, completion_mask


@torch.no_grad()
def divergence(
    model: PreTrainedModel, reference: PreTrainedModel, samples: Samples, batch_size: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    KL to the reference and entropy of each sample of `model`, in nats a sequence: at each position the exact value over the
    whole vocabulary, summed over the positions. Their means over the policy's own samples are unbiased estimates of the
    sequence KL and the sequence entropy.
    """
    kls, entropies = [], []
    modes = model.training, reference.training
    model.eval(), reference.eval()
    for start in range(0, len(samples.prompts), batch_size):
        rows = slice(start, start + batch_size)
        inputs = {"input_ids": samples.input_ids[rows], "attention_mask": samples.attention_mask[rows]}
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        logps = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        ref_logps = reference(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        mask = samples.completion_mask[rows, 1:].to(model.device)
        kls.append(((logps.exp() * (logps - ref_logps)).sum(-1) * mask).sum(-1).cpu())
        entropies.append((-(logps.exp() * logps).sum(-1) * mask).sum(-1).cpu())
    model.train(modes[0]), reference.train(modes[1])
    return torch.cat(kls), torch.cat(entropies)


@torch.no_grad()
def sequence_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    batch_size: int = 128,
) -> torch.Tensor:
    """log π(completion | prompt) of each row, with the end-of-sequence token that the trainers append too."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        rows.append((ids, tokenizer(prompt + completion)["input_ids"][len(ids) :] + [tokenizer.eos_token_id]))
    input_ids, attention_mask, completion_mask = _collate(rows, tokenizer.pad_token_id)
    was_training = model.training
    model.eval()
    sums = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        ids = input_ids[part].to(model.device)
        logits = model(input_ids=ids, attention_mask=attention_mask[part].to(model.device), use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).cpu()
        sums.append((logps * completion_mask[part, 1:]).sum(-1))
    model.train(was_training)
    return torch.cat(sums)


class Estimate(NamedTuple):
    """A mean and its standard error (`nan` where none is known)."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float] | torch.Tensor) -> Estimate:
        values = torch.as_tensor(values, dtype=torch.float64)
        return cls(values.mean().item(), values.std().item() / len(values) ** 0.5)


def distinct_n(samples: Samples, n: int) -> float:
    """Share of different n-grams among all n-grams of the completions' tokens, over all samples together."""
    total, different = 0, set()
    for ids, mask in zip(samples.input_ids, samples.completion_mask, strict=True):
        tokens = ids[mask.bool()].tolist()
        grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
        total += len(grams)
        different.update(grams)
    return len(different) / max(1, total)


def win_rate(rewards: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """How often the first has the higher reward of the two, ties counted half."""
    return Estimate.of([(a > b) + 0.5 * (a == b) for a, b in zip(rewards, baseline, strict=True)])
