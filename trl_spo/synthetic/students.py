# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Who responds to prompts: here, what all students have and the one with transformers. Those with vLLM and behind an
OpenAI-compatible endpoint are in `vllm_student.py` and `endpoint_student.py`.

What a student draws for a batch depends on the batch and its seed only: not on what it drew before, nor on how many
processes share the batches.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .._compat import DistributedBackend, _tokenize, pad, unwrap_model_for_generation
from ..generation import evaluation_mode, only_generation_config, own_random_state
from .identity import commit_of, weights_of_folder, weights_of_parameters


FINISHED = ("stop", "length")  # by itself, or cut at `max_new_tokens`
# Options of `generate` that are set here, or that the texts and finish reasons are not made for
_NOT_FOR_GENERATION = {
    "do_sample": "`temperatures`",
    "temperature": "`temperatures`",
    "num_return_sequences": "`num_responses`",
    "max_new_tokens": "`max_new_tokens`",
    "max_length": "`max_new_tokens`",
    "top_p": "`top_p`",
    "top_k": "`top_k`",
    "num_beams": None,
    "max_time": None,
    "stop_strings": None,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "return_dict_in_generate": None,
}


class Response(NamedTuple):
    """
    What a student says, whether it came to an end (`"stop"`) or was cut (`"length"`), and its tokens, without the one that ended it, if
    they are seen.
    """

    text: str
    finish_reason: str
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class Batch:
    """
    Prompts whose responses are drawn together.

    Args:
        index (`int`):
            Number of the batch.
        prompts ([`~datasets.Dataset`]):
            All prompts.
        start, stop (`int`):
            Rows of `prompts` that are in the batch.
        temperatures (`tuple[float, ...]`):
            Of each response to a prompt.
        seed (`int`):
            Seed of the run.
    """

    index: int
    prompts: Dataset
    start: int
    stop: int
    temperatures: tuple[float, ...]
    seed: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        columns = self.prompts[self.start : self.stop]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def response_seed(seed: int, prompt_id: str, response: int) -> int:
    """The seed of one response, for those who draw each by itself: of 31 bits, which every server takes."""
    digest = hashlib.sha256(json.dumps([seed, prompt_id, response]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def encode_prompt(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """The tokens of a prompt, as in training: those of a conversation end where the response begins."""
    if isinstance(row["prompt"], str):
        return _tokenize(tokenizer, row["prompt"])["input_ids"]
    tools = row.get("tools")
    return _tokenize(
        tokenizer,
        row["prompt"],
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        add_generation_prompt=True,
        **(row.get("chat_template_kwargs") or {}),
    )["input_ids"]


def one_process(student: str) -> None:
    """Raises a `ValueError` if there are several."""
    if PartialState().num_processes > 1:
        raise ValueError(
            f"`{student}` runs in one process, and asks for many responses at once by itself; there are "
            f"{PartialState().num_processes}. Start it without `accelerate launch`."
        )


@dataclass(kw_only=True, eq=False)
class Student:
    """
    What all students have, besides `batch_size`.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Tokens after which a response is cut.
    """

    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")

    def load(self) -> dict[str, Any]:
        """Makes ready, on all processes. Returns who it is and how it draws: whatever its texts depend on, in JSON."""
        raise NotImplementedError

    def check(self, prompts: Dataset) -> None:
        """
        Before anything is drawn: whether it can respond to these prompts. On the main process only.

        Raises:
            `ValueError`: it cannot.
        """
        raise NotImplementedError

    def generate(self, batches: Sequence[Batch], bar: tqdm) -> Iterator[tuple[int, list[list[Response]]]]:
        """Responses to each prompt of each batch, with its index. All processes call it with as many batches."""
        raise NotImplementedError


@dataclass(kw_only=True, eq=False)
class LocalStudent(Student):
    """A student whose tokens we see."""

    model: Any
    batch_size: int
    tokenizer: PreTrainedTokenizerBase | None = None
    revision: str | None = None
    top_p: float = 1.0
    top_k: int = 0
    generation_kwargs: dict[str, Any] | None = None
    _context: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be at least 0, which keeps all tokens, got {self.top_k}.")

    def _sampling(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "top_p": float(self.top_p),
            "top_k": self.top_k,
            "generation_kwargs": self.generation_kwargs or {},
        }

    def _set_tokenizer_and_context(self, config: Any, revision: str | None) -> None:
        if self.tokenizer is None:
            name = self.model if isinstance(self.model, str) else config._name_or_path
            self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main")
        self._context = getattr(config.get_text_config(), "max_position_embeddings", None)

    def check(self, prompts: Dataset) -> None:
        columns = {"prompt_id", "prompt", "tools", "chat_template_kwargs"}.intersection(prompts.column_names)
        for row in prompts.select_columns(sorted(columns)):
            length = len(self._encode(row))
            if length == 0:
                raise ValueError(f"The prompt {row['prompt_id']!r} has no tokens. Remove it.")
            if self._context is not None and length + self.max_new_tokens > self._context:
                raise ValueError(
                    f"The prompt {row['prompt_id']!r} has {length} tokens, and with "
                    f"`max_new_tokens={self.max_new_tokens}` is longer than the student's context of {self._context}. "
                    "Lower `max_new_tokens`, or leave out prompts of more than "
                    f"{self._context - self.max_new_tokens} tokens."
                )

    def _encode(self, row: dict[str, Any]) -> list[int]:
        return encode_prompt(self.tokenizer, row)

    def _decode(self, row: dict[str, Any], prompt_ids: list[int], completions: list[list[int]]) -> list[str]:
        """
        The texts of responses, so that prompt and response together are read as they were written: decoded by itself,
        the first word of a response to a standard prompt would lose its space, with tokenizers that put it there.
        """

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        if not isinstance(row["prompt"], str):
            return [decode(ids) for ids in completions]
        prompt, texts = decode(prompt_ids), [decode(prompt_ids + ids) for ids in completions]
        if not all(text.startswith(prompt) for text in texts):
            raise ValueError(
                f"The tokenizer of the student ({type(self.tokenizer).__name__}) decodes the prompt "
                f"{row['prompt_id']!r} in another way when a response follows, so that the response cannot be told "
                "from it. Use conversational prompts."
            )
        return [text[len(prompt) :] for text in texts]


class _RowTemperatures(LogitsProcessor):
    """Of each row its own temperature; at 0, the likeliest token is the only one."""

    def __init__(self, temperatures: torch.Tensor):
        self.greedy = (temperatures == 0)[:, None]
        self.temperatures = torch.where(self.greedy, 1.0, temperatures[:, None])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        likeliest = torch.full_like(scores, -torch.inf).scatter(1, scores.argmax(dim=1, keepdim=True), 0.0)
        return torch.where(self.greedy, likeliest, scores / self.temperatures)


@dataclass(kw_only=True, eq=False)
class TransformersStudent(LocalStudent):
    """
    A causal language model in this process, with transformers.

    It samples from `softmax(logits / temperature)`, within `top_k` and `top_p`: the model's own generation config is
    not used, but for the tokens that end a response. Under `accelerate launch`, each process has the whole model and
    does its share of the batches; under ZeRO-3 the model is sharded, and takes the launch config's precision.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Name on the Hub, folder, or a model on its device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; by default that of the same name.
        revision (`str`, *optional*):
            Of the model on the Hub; by default `"main"`.
        model_kwargs (`dict[str, Any]`, *optional*):
            Of `from_pretrained`. `dtype` is `"auto"` unless it is here.
        batch_size (`int`, *optional*, defaults to `8`):
            Prompts per batch, with all of their responses: `batch_size * num_responses` sequences at once.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Tokens after which a response is cut.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability of the likeliest tokens among which is sampled.
        top_k (`int`, *optional*, defaults to `0`):
            Number of the likeliest tokens among which is sampled; 0 for all.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Further fields of [`~transformers.GenerationConfig`], such as `min_p` or `repetition_penalty`.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Under ZeRO-3, whether each process gathers the whole model to generate, which is faster. `False` if it does
            not fit.

    Raises:
        `ValueError`: an option is out of its range, unknown, or set elsewhere.
    """

    model: str | PreTrainedModel | PeftModel
    batch_size: int = 8
    model_kwargs: dict[str, Any] | None = None
    ds3_gather_for_generation: bool = True
    _loaded: Any = field(default=None, init=False, repr=False)  # the model, or its DeepSpeed engine
    _identity: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _accelerator: Accelerator | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.generation_kwargs or {}:
            if name in _NOT_FOR_GENERATION:
                instead = _NOT_FOR_GENERATION[name]
                remedy = f"Use {instead} instead." if instead else "Leave it out."
                raise ValueError(f"`generation_kwargs` cannot have {name!r}. {remedy}")
            if name not in vars(GenerationConfig()):
                raise ValueError(f"`generation_kwargs` has {name!r}, which is no field of `GenerationConfig`.")

    def load(self) -> dict[str, Any]:
        self._accelerator = accelerator = Accelerator()
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "`TransformersStudent` does not run under FSDP. Launch it with `ddp` or `zero3`, or use `VLLMStudent`."
            )
        if self._loaded is None:
            self._loaded = self._load_model()
        if not isinstance(self.model, str):  # which may have been trained since the last time
            self._identity["weights"] = self._weights_of_parameters(self._loaded)
        return {**self._identity, **self._sampling()}

    def _load_model(self) -> Any:
        model, accelerator, commit = self.model, self._accelerator, None
        zero3 = DistributedBackend(accelerator).is_zero3
        if isinstance(model, str):
            kwargs = {"dtype": "auto", **(self.model_kwargs or {})}
            commit = commit_of(model, self.revision, **{n: kwargs[n] for n in ("cache_dir", "token") if n in kwargs})
            model = AutoModelForCausalLM.from_pretrained(model, revision=commit or self.revision or "main", **kwargs)
            if not zero3 and not hasattr(model, "hf_device_map"):
                model.to(accelerator.device)
        config = model.config
        self._set_tokenizer_and_context(config, commit or self.revision)
        quantization = getattr(config, "quantization_config", None)
        self._identity = {
            "kind": "transformers",
            "model": self.model if isinstance(self.model, str) else config._name_or_path,
            "revision": commit,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
        }
        if zero3:
            import deepspeed

            zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero = {name: value for name, value in zero.items() if value != "auto" and name != "offload_optimizer"}
            ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
            for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
                ds_config[name] = {"enabled": model.dtype == dtype}
            model, *_ = deepspeed.initialize(model=model, config=ds_config)
        if isinstance(self.model, str) and Path(self.model).is_dir():
            self._identity["weights"] = weights_of_folder(self.model) if accelerator.is_main_process else None
        elif isinstance(self.model, str) and commit is None:  # an adapter of the Hub
            self._identity["weights"] = self._weights_of_parameters(model)
        return model

    def _weights_of_parameters(self, model: Any) -> str:
        backend = DistributedBackend(self._accelerator)
        return weights_of_parameters(self._accelerator.unwrap_model(model), backend.gather_params)

    def generate(self, batches: Sequence[Batch], bar: tqdm) -> Iterator[tuple[int, list[list[Response]]]]:
        config = self._generation_config(len(batches[0].temperatures))
        with (
            evaluation_mode(self._loaded, self._accelerator),
            unwrap_model_for_generation(
                self._loaded, self._accelerator, gather_deepspeed3_params=self.ds3_gather_for_generation
            ) as model,
            only_generation_config(model, config),
        ):
            for batch in batches:
                responses = self._sample(model, config, batch)
                bar.update(sum(map(len, responses)))
                yield batch.index, responses

    def _generation_config(self, num_responses: int) -> GenerationConfig:
        tokenizer = self.tokenizer
        # Every EOS id that the model declares (e.g. an end-of-turn token) ends a response, not only the tokenizer's
        eos = self._accelerator.unwrap_model(self._loaded).generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos:
            eos = [tokenizer.eos_token_id, *eos]
        # It is masked wherever it is, so that any token will do
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0] if eos else 0
        defaults = {"repetition_penalty": 1.0, "use_cache": True, "disable_compile": True}
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,  # that of each row comes from `_RowTemperatures`
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=num_responses,
            pad_token_id=padding,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=eos or None,
            **{**defaults, **(self.generation_kwargs or {})},
        )

    @torch.no_grad()
    def _sample(self, model: PreTrainedModel, config: GenerationConfig, batch: Batch) -> list[list[Response]]:
        rows, n, device = batch.rows, len(batch.temperatures), self._accelerator.device
        if not DistributedBackend(self._accelerator).is_zero3:
            device = model.device
        prompt_ids = [self._encode(row) for row in rows]
        tensors = [torch.tensor(ids) for ids in prompt_ids]
        input_ids = pad(tensors, config.pad_token_id, padding_side="left").to(device)
        attention_mask = pad([torch.ones_like(ids) for ids in tensors], 0, padding_side="left").to(device)
        temperatures = torch.tensor(batch.temperatures, device=device).repeat(len(rows))
        with own_random_state(device, batch.seed, batch.index):
            # Under ZeRO-3 transformers itself sees to it that all processes decode as long as the longest
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([_RowTemperatures(temperatures)]),
            )
        completions = output[:, input_ids.size(1) :].tolist()
        ends = [next((i for i, t in enumerate(ids) if t in (config.eos_token_id or [])), None) for ids in completions]
        completions = [ids[:end] for ids, end in zip(completions, ends, strict=True)]
        reasons = ["length" if end is None else "stop" for end in ends]
        responses = []
        for i, (row, ids) in enumerate(zip(rows, prompt_ids, strict=True)):
            some = slice(i * n, (i + 1) * n)
            texts = self._decode(row, ids, completions[some])
            responses.append([Response(*of) for of in zip(texts, reasons[some], completions[some], strict=True)])
        return responses
