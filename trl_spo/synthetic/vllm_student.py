# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""A student with vLLM."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoConfig

from .identity import commit_of, weights_of_folder
from .students import FINISHED, Batch, LocalStudent, Response, one_process, response_seed


# What a model is loaded with that changes its texts; the rest is about the machine, or secret
_OF_THE_TEXTS = ("dtype", "quantization", "hf_overrides", "load_format")


@dataclass(kw_only=True, eq=False)
class VLLMStudent(LocalStudent):
    """
    A causal language model in this process, with vLLM. Each response has a seed of its own.

    Args:
        model (`str`):
            Name on the Hub, or folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; by default that of the same name.
        revision (`str`, *optional*):
            Of the model on the Hub; by default `"main"`.
        batch_size (`int`, *optional*, defaults to `256`):
            Prompts that vLLM is given at once, with all of their responses. A kill loses as many.
        max_new_tokens, top_p, top_k:
            As in [`TransformersStudent`].
        generation_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `vllm.SamplingParams`.
        llm_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        `ValueError`: an option is out of its range.
    """

    model: str
    batch_size: int = 256
    llm_kwargs: dict[str, Any] | None = None
    _llm: Any = field(default=None, init=False, repr=False)
    _identity: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        twice = {"n", "temperature", "top_p", "top_k", "max_tokens", "seed"}.intersection(self.generation_kwargs or {})
        if twice:
            raise ValueError(
                f"`generation_kwargs` cannot have {sorted(twice)}, which other options set. Leave them out."
            )

    def load(self) -> dict[str, Any]:
        one_process("VLLMStudent")
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise ImportError('`VLLMStudent` needs vLLM: run `pip install "trl-spo[vllm]"`.') from error
        kwargs = self.llm_kwargs or {}
        if self._llm is None:
            commit = commit_of(self.model, self.revision)
            revision = commit or self.revision
            config = AutoConfig.from_pretrained(self.model, revision=revision or "main")
            self._set_tokenizer_and_context(config, revision)
            if kwargs.get("max_model_len") is not None:
                self._context = kwargs["max_model_len"]
            self._identity = {
                "kind": "vllm",
                "model": self.model,
                "revision": commit,
                "weights": weights_of_folder(self.model) if Path(self.model).is_dir() else None,
                "llm_kwargs": {name: kwargs[name] for name in _OF_THE_TEXTS if name in kwargs},
            }
            self._llm = LLM(**{**kwargs, "model": self.model, "revision": revision})
        return {**self._identity, **self._sampling()}

    def generate(self, batches: Sequence[Batch], bar: tqdm) -> Iterator[tuple[int, list[list[Response]]]]:
        from vllm import SamplingParams

        for batch in batches:
            rows, n = batch.rows, len(batch.temperatures)
            prompt_ids = [self._encode(row) for row in rows]
            params = [
                SamplingParams(
                    **(self.generation_kwargs or {}),
                    n=1,
                    temperature=temperature,
                    top_p=self.top_p,
                    top_k=self.top_k,
                    max_tokens=self.max_new_tokens,
                    seed=response_seed(batch.seed, row["prompt_id"], k),
                )
                for row in rows
                for k, temperature in enumerate(batch.temperatures)
            ]
            prompts = [{"prompt_token_ids": ids} for ids in prompt_ids for _ in range(n)]
            outputs = [output.outputs[0] for output in self._llm.generate(prompts, params, use_tqdm=False)]
            responses = []
            for i, (row, ids) in enumerate(zip(rows, prompt_ids, strict=True)):
                some = outputs[i * n : (i + 1) * n]
                for output in some:
                    if output.finish_reason not in FINISHED:
                        raise RuntimeError(
                            f"vLLM gave up a response to the prompt {row['prompt_id']!r} "
                            f"(finish reason {output.finish_reason!r})."
                        )
                texts = self._decode(row, ids, [list(output.token_ids) for output in some])
                responses.append([Response(text, out.finish_reason) for text, out in zip(texts, some, strict=True)])
            bar.update(len(outputs))
            yield batch.index, responses
