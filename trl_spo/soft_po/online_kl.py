# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
The KL divergence to the reference over online samples, from hidden states and LM heads.

The `(tokens x vocabulary)` logits of neither model are ever built. The reference runs when samples are drawn; its hidden
states are kept with them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .. import losses
from .._compat import (
    ChunkedDivergenceFunction,
    ChunkedLogProbFunction,
    _ForwardRedirection,
    disable_gradient_checkpointing,
    maybe_gather_lm_head_ctx,
    pad,
    use_adapter,
)
from ..generation import evaluation_mode
from .online_samples import OnlineSample
from .soft_po_config import SoftPOConfig


# Width of the vocabulary tiles of the log-probabilities, as in TRL's fused LM head
_VOCAB_CHUNK_SIZE = 32768


@dataclass(frozen=True)
class LMHead:
    """The projection of a model's last hidden states to its logits, as the model's own forward does it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    final_logit_softcapping: float | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LMHead":
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        return cls(head.weight, head.bias, logit_scale(config), getattr(config, "final_logit_softcapping", None))

    def full(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias, gathered once if FSDP2 shards them (the gathered weight is the fp32 master copy)."""
        if not isinstance(self.weight, DTensor):
            return self.weight, self.bias
        return self.weight.full_tensor().to(dtype), None if self.bias is None else self.bias.full_tensor()


def logit_scale(config) -> float:
    """
    The factor between a model's LM head and its logits.

    `logit_scale` (Cohere), `output_multiplier` (Muse Glimmer) and `lm_head_multiplier` (Falcon-H1) multiply; `logits_scaling`
    divides (Granite, MiniCPM3) but in HyperCLOVA X, where it multiplies. A model that declares none, or `None`, is unscaled.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


@dataclass
class _Batch:
    input_ids: torch.Tensor  # (B, L), right-padded
    attention_mask: torch.Tensor  # (B, L)
    mask: torch.Tensor  # (B, L - 1), the positions that predict a completion token

    @property
    def labels(self) -> torch.Tensor:
        return self.input_ids[:, 1:][self.mask]


@dataclass
class OnlineKLOutput:
    """Of each sample, shape `(B,)`: what is minimised, and what is reported."""

    loss: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    ratio: torch.Tensor
    length: torch.Tensor
    terminated: torch.Tensor


class OnlineKL:
    """
    Computes the KL divergence of a policy to its reference over the policy's own samples.

    Args:
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            The reference, wrapped. `None` under PEFT: the reference is then the policy with its "ref" adapter, or with its
            adapter disabled.
        args ([`SoftPOConfig`]):
            Configuration.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer.
        pad_token_id (`int`):
            Padding token.
    """

    def __init__(self, ref_model: nn.Module | None, args: SoftPOConfig, accelerator: Accelerator, pad_token_id: int):
        self.ref_model = ref_model
        self.args = args
        self.accelerator = accelerator
        self.pad_token_id = pad_token_id
        self._forward_redirection = _ForwardRedirection()
        self._reference_head: LMHead | None = None

    def annotate(self, model: nn.Module, samples: list[OnlineSample]) -> None:
        """
        Fills in what is kept with newly drawn or restored samples: the reference's hidden states, and, where it is
        missing, the log-probability under the policy that drew them (which must be `model`).

        Args:
            model (`torch.nn.Module`):
                The policy as it is trained, wrapped.
            samples (`list[OnlineSample]`):
                Samples to fill in, in place.
        """
        policy = self.accelerator.unwrap_model(model)
        for chunk in self.chunks(samples):
            batch = self._collate(chunk)
            with (
                torch.no_grad(),
                evaluation_mode(model, self.accelerator),
                self.accelerator.autocast(),
                disable_gradient_checkpointing(policy, self.args.gradient_checkpointing_kwargs),
            ):
                if any(sample.old_logp is None for sample in chunk):
                    logps = self._forward_redirection(model, policy, self._policy_logps, policy, batch)
                    for sample, logp in zip(chunk, logps.tolist(), strict=True):
                        sample.old_logp = logp
                with self._reference(model, policy) as (wrapped, reference):
                    hidden = self._forward_redirection(wrapped, reference, self._reference_states, reference, batch)
                    self._reference_head = LMHead.of(_causal_lm(reference))
            for sample, states in zip(chunk, hidden.split(batch.mask.sum(dim=1).tolist()), strict=True):
                sample.reference_hidden = states.clone()  # a view would keep the whole chunk alive

    def chunks(self, samples: list[OnlineSample]) -> Iterator[list[OnlineSample]]:
        """The samples in parts of as many sequences as a batch of pairs has, which bounds the memory."""
        size = 2 * self.args.per_device_train_batch_size
        for first in range(0, len(samples), size):
            yield samples[first : first + size]

    def __call__(self, model: nn.Module, samples: list[OnlineSample]) -> OnlineKLOutput:
        """
        The KL of each sample, with the gradient of the chosen estimator.

        Args:
            model (`torch.nn.Module`):
                The policy as it is trained, wrapped.
            samples (`list[OnlineSample]`):
                Samples that [`~OnlineKL.annotate`] has seen.

        Returns:
            [`OnlineKLOutput`]
        """
        batch = self._collate(samples)
        reference_hidden = torch.cat([sample.reference_hidden for sample in samples])
        policy = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            kl, logps, entropy = self._forward_redirection(
                model, policy, self._token_terms, policy, batch, reference_hidden
            )
        per_sample = kl.sum(dim=1) if self.args.kl_estimator == "token" else losses.score_kl(kl, logps)
        old_logps = torch.tensor([sample.old_logp for sample in samples], device=kl.device, dtype=logps.dtype)
        ratio = losses.importance_weights(logps.sum(dim=1), old_logps)
        loss = per_sample
        if self.args.importance_sampling_cap is not None:
            loss = ratio.clamp(max=self.args.importance_sampling_cap) * per_sample
        return OnlineKLOutput(
            loss=loss,
            kl=kl.detach().sum(dim=1),
            entropy=entropy.detach().sum(dim=1),
            ratio=ratio,
            length=batch.mask.sum(dim=1),
            terminated=torch.tensor([sample.terminated for sample in samples], device=kl.device),
        )

    def _collate(self, samples: list[OnlineSample]) -> _Batch:
        sequences = [torch.tensor(sample.prompt_ids + sample.completion_ids) for sample in samples]
        masks = [
            torch.tensor([False] * len(sample.prompt_ids) + [True] * len(sample.completion_ids)) for sample in samples
        ]
        device = self.accelerator.device
        return _Batch(
            input_ids=pad(sequences, self.pad_token_id, padding_side="right").to(device),
            attention_mask=pad([torch.ones_like(ids) for ids in sequences], 0, padding_side="right").to(device),
            mask=pad(masks, False, padding_side="right")[:, 1:].to(device),
        )

    @contextmanager
    def _reference(self, model: nn.Module, policy: PreTrainedModel) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
        """The reference, wrapped and unwrapped, chosen as `DPOTrainer` chooses it."""
        if self.ref_model is not None:
            yield self.ref_model, self.accelerator.unwrap_model(self.ref_model)
        else:
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                yield model, policy

    # The methods below run inside of the wrapper's forward, where DDP, DeepSpeed and FSDP have their parameters at hand

    def _token_terms(
        self, policy: PreTrainedModel, batch: _Batch, reference_hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = _completion_states(policy, batch)
        head, reference = LMHead.of(_causal_lm(policy)), self._reference_head
        device = head.weight.device  # with the model split across devices (`device_map`), maybe not that of the batch
        hidden, reference_hidden, labels = hidden.to(device), reference_hidden.to(device), batch.labels.to(device)
        weight, bias = head.full(hidden.dtype)
        reference_weight, reference_bias = reference.full(reference_hidden.dtype)
        kl, entropy = ChunkedDivergenceFunction.apply(
            hidden,
            weight,
            bias,
            reference_hidden,
            reference_weight,
            reference_bias,
            1.0,  # the reverse KL, D(π||π_ref)
            1.0,
            head.logit_scale,
            head.final_logit_softcapping,
            reference.logit_scale,
            reference.final_logit_softcapping,
        )
        # The log-probabilities carry a gradient for the score estimator only; the other one just reports their ratio
        with nullcontext() if self.args.kl_estimator == "score" else torch.no_grad():
            logps = _token_logps(hidden, weight, bias, head, labels)
        return tuple(_scatter(x.to(batch.mask.device), batch.mask) for x in (kl, logps, entropy))

    def _reference_states(self, reference: PreTrainedModel, batch: _Batch) -> torch.Tensor:
        hidden = _completion_states(reference, batch)
        # ZeRO-3 notes which parameters a forward reads outside of their own modules, and wants it to be the same in each:
        # the reference's forward on pairs reads those of the LM head
        LMHead.of(_causal_lm(reference))
        return hidden

    def _policy_logps(self, policy: PreTrainedModel, batch: _Batch) -> torch.Tensor:
        hidden = _completion_states(policy, batch)
        head = LMHead.of(_causal_lm(policy))
        device = head.weight.device
        logps = _token_logps(hidden.to(device), *head.full(hidden.dtype), head, batch.labels.to(device))
        return _scatter(logps.to(batch.mask.device), batch.mask).sum(dim=1)


def _causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    # Of an unwrapped model: `is_peft_model` unwraps it again, and reads the metadata of packages from the disk each time
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _completion_states(model: PreTrainedModel, batch: _Batch) -> torch.Tensor:
    """The last hidden states `(tokens, H)` that predict the completions' tokens, one sequence after the other."""
    # `base_model` is the backbone, without the LM head
    model = _causal_lm(model)
    output = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    # With the model split across devices (`device_map`), the backbone can end on another device than the batch
    return output.last_hidden_state.to(batch.mask.device)[:, :-1][batch.mask]


def _scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of the tokens of a mask, at their places."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _token_logps(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head: LMHead, labels: torch.Tensor
) -> torch.Tensor:
    # In float32: the kernel keeps a tile of logits in the compute dtype, and bf16 would put several tenths of a nat of noise
    # into a ratio of sequence probabilities
    with torch.autocast(hidden.device.type, enabled=False), maybe_gather_lm_head_ctx(weight, bias):
        return ChunkedLogProbFunction.apply(
            hidden.float(),
            weight,
            bias,
            labels,
            1.0,
            _VOCAB_CHUNK_SIZE,
            head.final_logit_softcapping,
            head.logit_scale,
            ("log_probs",),
        )[0]
