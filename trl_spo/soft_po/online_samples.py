# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Sampling for the global regularizer: prompts, generation, and the buffer of the policy's own samples.

What is drawn at the r-th resampling on a rank depends on the seed, r and the rank only, and leaves the global random state
as it was: a resumed run draws what the uninterrupted one would have drawn, and evaluation does not disturb training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._compat import DistributedBackend, VLLMGeneration, pad, unwrap_model_for_generation
from ..generation import evaluation_mode, only_generation_config, own_random_state
from .soft_po_config import SoftPOConfig


@dataclass
class OnlineSample:
    """A completion that the policy drew, and what is kept with it."""

    row_id: int  # row of the prompt in its dataset
    prompt_ids: list[int]
    completion_ids: list[int]
    terminated: bool  # ended with EOS, not cut at `max_completion_length`
    old_logp: float | None = None  # log π(y|x) of the policy that drew it
    reference_hidden: torch.Tensor | None = None  # (completion length, H), the states that predict the completion


class PromptSource:
    """
    An endless, seeded sequence of prompts in which every position can be looked up again.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with a `prompt_ids` column. A map-style one is shuffled anew in each pass; one that streams is taken in
            its order.
        seed (`int`):
            Seed of the shuffling.
    """

    def __init__(self, dataset: Dataset | IterableDataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self._stream: Iterator[dict] | None = None
        self._position = 0

    def take(self, start: int, count: int) -> list[tuple[int, list[int]]]:
        """Row ids and prompt ids at the positions `start` to `start + count` of the sequence."""
        if isinstance(self.dataset, IterableDataset):
            rows = self._take_from_stream(start, count)
        else:
            n = len(self.dataset)
            orders = {
                epoch: np.random.default_rng([self.seed, epoch]).permutation(n)
                for epoch in {position // n for position in range(start, start + count)}
            }
            rows = [self.dataset[int(orders[position // n][position % n])] for position in range(start, start + count)]
        return [(int(row.get("row_id", -1)), list(row["prompt_ids"])) for row in rows]

    def _take_from_stream(self, start: int, count: int) -> list[dict]:
        def endless() -> Iterator[dict]:
            while True:
                yield from self.dataset

        if self._stream is None or start < self._position:
            self._stream, self._position = endless(), 0
        rows = list(islice(self._stream, start - self._position, start - self._position + count))
        self._position = start + count
        return rows


class CompletionSampler:
    """
    Draws completions from the policy's own distribution, with transformers or vLLM.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, not yet wrapped.
        args ([`SoftPOConfig`]):
            Configuration.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a padding token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SoftPOConfig,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.args = args
        self.accelerator = accelerator
        self.tokenizer = tokenizer
        self._dist = DistributedBackend(accelerator)
        # Every EOS id that the model declares (e.g. an end-of-turn token) ends a completion, not only the tokenizer's
        eos = model.generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos:
            eos = [tokenizer.eos_token_id, *eos]
        self.eos_token_ids = eos
        how_it_runs = {"use_cache": True, "disable_compile": True}
        if not args.use_vllm:
            how_it_runs |= args.generation_kwargs or {}
        self.generation_config = GenerationConfig(
            max_new_tokens=args.max_completion_length,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            # A model that has become NaN is to be found where its KL is, which names the step, and not by `torch.multinomial`
            remove_invalid_values=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=self.eos_token_ids,
            cache_implementation=args.cache_implementation,
            **how_it_runs,
        )
        self.vllm: VLLMGeneration | None = None
        if args.use_vllm:
            self.vllm = VLLMGeneration(
                model=model,
                accelerator=accelerator,
                processing_class=tokenizer,
                mode=args.vllm_mode,
                server_base_url=args.vllm_server_base_url,
                server_host=args.vllm_server_host,
                server_port=args.vllm_server_port,
                server_timeout=args.vllm_server_timeout,
                group_port=args.vllm_group_port,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                max_model_length=args.vllm_max_model_length,
                max_num_seqs=args.online_buffer_size * args.vllm_tensor_parallel_size,
                enable_sleep_mode=args.vllm_enable_sleep_mode,
                model_impl=args.vllm_model_impl,
                trust_remote_code=args.trust_remote_code,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                max_completion_length=args.max_completion_length,
                logprobs=None,
                generation_kwargs=args.generation_kwargs,
            )

    def sample(self, model: nn.Module, prompts: list[tuple[int, list[int]]], *seed: int) -> list[OnlineSample]:
        """
        Draws one completion for each prompt. Under ZeRO-3, FSDP and vLLM every rank must call it, with as many prompts.

        Args:
            model (`torch.nn.Module`):
                The policy as it is trained, wrapped.
            prompts (`list[tuple[int, list[int]]]`):
                Row ids and token ids.
            *seed (`int`):
                What the draws depend on. vLLM keeps a random state of its own instead.

        Returns:
            `list[OnlineSample]`: one for each prompt, its completion up to and with the first EOS.
        """
        prompt_ids = [ids for _, ids in prompts]
        if self.vllm is not None:
            self.vllm.sync_weights()
            _, completions, _, _ = self.vllm.generate(prompts=prompt_ids, images=None, num_generations=1)
        else:
            with own_random_state(self.accelerator.device, *seed):
                completions = self._generate(model, prompt_ids)
        samples = []
        for (row_id, ids), completion in zip(prompts, completions, strict=True):
            end = next((i + 1 for i, token in enumerate(completion) if token in self.eos_token_ids), None)
            samples.append(OnlineSample(row_id, ids, list(completion[:end]), terminated=end is not None))
        return samples

    @torch.no_grad()
    def _generate(self, model: nn.Module, prompt_ids: list[list[int]]) -> list[list[int]]:
        tensors = [torch.tensor(ids) for ids in prompt_ids]
        input_ids = pad(tensors, self.tokenizer.pad_token_id, padding_side="left").to(self.accelerator.device)
        attention_mask = pad([torch.ones_like(ids) for ids in tensors], 0, padding_side="left").to(input_ids.device)
        # FSDP's collectives need every process to decode as long as the longest; for ZeRO-3 transformers sees to it itself
        synced_gpus = True if self._dist.is_fsdp and self.accelerator.num_processes > 1 else None
        with (
            evaluation_mode(model, self.accelerator),
            # Outside of the decoding loop, so that weights are cast to the compute dtype once and not for every token
            self.accelerator.autocast(),
            unwrap_model_for_generation(
                model,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as unwrapped,
            self._dist.summon_full_params(model, recurse=False),
            only_generation_config(unwrapped, self.generation_config),
        ):
            output = unwrapped.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=self.generation_config,
                synced_gpus=synced_gpus,
            )
        return output[:, input_ids.size(1) :].tolist()


class SampleBuffer:
    """
    The online samples of one rank, drawn every `resample_steps` optimizer steps.

    Args:
        args ([`SoftPOConfig`]):
            Configuration.
    """

    def __init__(self, args: SoftPOConfig):
        self.args = args
        self.samples: list[OnlineSample] = []
        self.step: int | None = None  # optimizer step at which they were drawn
        self.round = 0  # how often samples have been drawn

    def is_due(self, step: int) -> bool:
        """Whether new samples are to be drawn before optimizer step `step`."""
        # A step before that of the buffer: a second call of `train`, which counts from 0 again
        return self.step is None or not 0 <= step - self.step < self.args.resample_steps

    def replace(self, samples: list[OnlineSample], step: int) -> None:
        """Takes newly drawn samples."""
        self.samples, self.step, self.round = samples, step, self.round + 1

    def micro_batch(self, step: int, micro_step: int, num_micro_steps: int) -> list[OnlineSample]:
        """
        The samples of one micro-batch: the step's share of the buffer, dealt out over its micro-batches.

        Args:
            step (`int`):
                Optimizer step.
            micro_step (`int`):
                Index of the micro-batch in the step.
            num_micro_steps (`int`):
                Micro-batches of the step.

        Returns:
            `list[OnlineSample]`: none if the step has more micro-batches than samples and this one goes without.
        """
        per_step = self.args.online_samples_per_step
        offset = (step - self.step) * per_step % len(self.samples)
        first, last = (per_step * k // num_micro_steps for k in (micro_step, micro_step + 1))
        return self.samples[offset + first : offset + last]

    def state_dict(self) -> dict:
        """What a checkpoint needs; the reference's hidden states are computed again from it."""
        return {
            "step": self.step,
            "round": self.round,
            "samples": [
                {
                    "row_id": sample.row_id,
                    "prompt_ids": sample.prompt_ids,
                    "completion_ids": sample.completion_ids,
                    "terminated": sample.terminated,
                    "old_logp": sample.old_logp,
                }
                for sample in self.samples
            ],
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes what [`~SampleBuffer.state_dict`] gave."""
        self.step, self.round = state["step"], state["round"]
        self.samples = [OnlineSample(**sample) for sample in state["samples"]]
