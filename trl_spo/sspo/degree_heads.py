# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The heads that learn the degree of a response from the policy's hidden states, and how they get into its forward pass."""

import functools
import json
import os
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .._compat import FusedCausalLMOutput, _tokenize, common_prefix_length, pad
from ..losses import removal_mask


WEIGHTS_FILE = "sspo_heads.safetensors"
CONFIG_FILE = "sspo_heads.json"
# Name of the heads in the model that they are attached to
ATTRIBUTE = "degree_heads"
# Length of what the MLPs read, whatever the size and the scale of the model's states. Of the states themselves, a step of Adam
# would move the heads of a model of 7B parameters a hundred times as far as those of a tiny one, and their gradient would fill
# the norm that the policy's is clipped together with
_INPUT_NORM = 8.0


def sinusoidal_encoding(length: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """
    The encoding of positions of Vaswani et al. (2017): `sin(p ω_j)` in the even and `cos(p ω_j)` in the odd places, with
    `ω_j = 10000^(-2j/size)`. In float32, of shape `(length, size)`; a size may be odd.
    """
    positions = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1)
    rates = 10_000.0 ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = positions * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :size]


def pool_states(hidden_states: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """
    The mean of what is left of a response: of each token's state and of the encoding of its position among those that are left.

    That is the mean of the states and the mean of the first n encodings, so that nothing of the size of the states has to be kept.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, H)`):
            States of the tokens.
        masks (`torch.Tensor` of shape `(B, K, L)`):
            Tokens that are left, at each of K levels.

    Returns:
        `torch.Tensor` of shape `(B, K, H)`, in float32: zero if none is left.
    """
    counts = masks.sum(dim=2)
    weights = masks.float() / counts.clamp(min=1).unsqueeze(2)
    encoding = sinusoidal_encoding(masks.size(2), hidden_states.size(2), hidden_states.device)
    running = F.pad(encoding.cumsum(dim=0), (0, 0, 1, 0))  # of the first 0, 1, ... positions
    with torch.autocast(hidden_states.device.type, enabled=False):
        return weights @ hidden_states.float() + running[counts] / counts.clamp(min=1).unsqueeze(2)


class DegreeHeads(nn.Module):
    """
    The classifiers of degrees of Self-supervised Preference Optimization (arXiv 2409.17791): one for chosen and one for rejected
    responses, each an MLP of two layers on the direction of the mean state of a response.

    Args:
        hidden_size (`int`):
            Size H of the policy's last hidden states.
        num_degrees (`int`, *optional*, defaults to `3`):
            N.
        head_hidden_size (`int`, *optional*, defaults to `256`):
            Size of the MLP's hidden layer.
        shared_head (`bool`, *optional*, defaults to `False`):
            Whether one head serves chosen and rejected responses.
    """

    def __init__(self, hidden_size: int, num_degrees: int = 3, head_hidden_size: int = 256, shared_head: bool = False):
        super().__init__()
        self.config = {
            "hidden_size": hidden_size,
            "num_degrees": num_degrees,
            "head_hidden_size": head_hidden_size,
            "shared_head": shared_head,
        }

        def head() -> nn.Module:
            return nn.Sequential(
                nn.Linear(hidden_size, head_hidden_size), nn.GELU(), nn.Linear(head_hidden_size, num_degrees)
            )

        self.chosen = head()
        self.rejected = None if shared_head else head()

    def forward(self, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            pooled (`torch.Tensor` of shape `(B, K, H)`):
                What [`pool_states`] gives.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(B, K, N)`: the logits of the chosen and of the rejected head.
        """
        # The heads are small: they run in their own precision
        with torch.autocast(pooled.device.type, enabled=False):
            pooled = (_INPUT_NORM * F.normalize(pooled, dim=-1)).to(self.chosen[0].weight.dtype)
            chosen = self.chosen(pooled)
            return chosen, chosen if self.rejected is None else self.rejected(pooled)

    def save_pretrained(
        self, save_directory: str | os.PathLike, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """
        Writes `sspo_heads.safetensors` and `sspo_heads.json`.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder, made if it does not exist.
            state_dict (`dict[str, torch.Tensor]`, *optional*):
                The weights, if they are sharded and had to be gathered.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state_dict = self.state_dict() if state_dict is None else state_dict
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}, folder / WEIGHTS_FILE
        )
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DegreeHeads":
        """
        Loads what [`~DegreeHeads.save_pretrained`] wrote.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder of a trained model or of a checkpoint, or a repository on the Hub.
            **kwargs:
                `revision`, `token`, `cache_dir` and so on, as in [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            `OSError`: there are no heads.
        """
        config = cached_file(pretrained_model_name_or_path, CONFIG_FILE, **kwargs)
        heads = cls(**json.loads(Path(config).read_text()))
        state_dict = load_file(cached_file(pretrained_model_name_or_path, WEIGHTS_FILE, **kwargs))
        heads.to(next(iter(state_dict.values())).dtype).load_state_dict(state_dict)
        return heads


@dataclass
class DegreeCausalLMOutput(FusedCausalLMOutput):
    """
    What the policy returns when it is asked for degrees as well.

    Args:
        degree_logits (`torch.Tensor` of shape `(B, K, N)`):
            Logits of each response's head at each level.
    """

    degree_logits: torch.Tensor | None = None


@contextmanager
def last_hidden_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects the last hidden states, of shape `(B, L, H)`, of each forward pass of a causal language model."""
    states: list[torch.Tensor] = []
    handle = model.base_model.register_forward_hook(
        lambda module, args, output: states.append(output.last_hidden_state)
    )
    try:
        yield states
    finally:
        handle.remove()


def add_degree_heads(model: PreTrainedModel, heads: DegreeHeads, removal: str = "hidden_states") -> None:
    """
    Attaches heads to a model that has TRL's fused LM head: `model(..., fused_lm_head=True, degree_inputs=...)` returns a
    [`DegreeCausalLMOutput`]. They run inside of the model's forward pass, where DDP, DeepSpeed and FSDP see them.

    The model's own files stay those of an ordinary model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model; of a PEFT model, its base model.
        heads ([`DegreeHeads`]):
            Heads.
        removal (`str`, *optional*, defaults to `"hidden_states"`):
            `"hidden_states"` or `"text"`.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, degree_inputs: dict[str, torch.Tensor] | None = None, **kwargs):
        if degree_inputs is None:
            return fused_forward(*args, **kwargs)
        with last_hidden_states(self) as states:
            outputs = fused_forward(*args, **kwargs)
        mask, levels = degree_inputs["completion_mask"], degree_inputs["levels"]
        masks = removal_mask(degree_inputs["token_degrees"], mask, levels)
        # Prompt-learning PEFT prepends virtual tokens; the model may be split across devices
        pooled = pool_states(states.pop()[:, -mask.size(1) :].to(mask.device), masks)
        if removal == "text":
            pooled = _pool_shortened(self, degree_inputs, masks, pooled)
        chosen, rejected = getattr(self, ATTRIBUTE)(pooled)
        logits = torch.where(degree_inputs["is_chosen"].view(-1, 1, 1), chosen, rejected).float()
        return DegreeCausalLMOutput(**outputs, degree_logits=logits)

    setattr(model, ATTRIBUTE, heads)
    model.forward = types.MethodType(forward, model)
    names = {f"{ATTRIBUTE}.{name}" for name in heads.state_dict()}
    model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | names


def _pool_shortened(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], masks: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """
    As [`pool_states`], of the states that the model has when it reads what is left, all levels in one batch. Where all levels are
    asked for, the first is level 0, whose states are those of the forward pass that there has been.
    """
    first = int(masks.size(1) > 1)
    batch, k = masks.size(0), masks.size(1) - first
    left = masks[:, first:].flatten(0, 1)
    attention = inputs["attention_mask"].bool().repeat_interleave(k, dim=0)
    completion = inputs["completion_mask"].bool().repeat_interleave(k, dim=0)
    reads = attention & (left | ~completion)
    order = torch.argsort(~reads, dim=1, stable=True)[:, : int(reads.sum(dim=1).max())]
    ids = inputs["input_ids"].repeat_interleave(k, dim=0).gather(1, order)
    reads, left = reads.gather(1, order), left.gather(1, order)
    states = model.base_model(input_ids=ids, attention_mask=reads.long(), use_cache=False).last_hidden_state
    shortened = pool_states(states.to(left.device), left.unsqueeze(1)).view(batch, k, -1)
    return torch.cat([pooled[:, :first], shortened], dim=1)


class DegreePrediction(NamedTuple):
    """Probabilities of the degrees 0 to N-1, of shape `(B, N)`, by the chosen and by the rejected head."""

    chosen: torch.Tensor
    rejected: torch.Tensor


@torch.no_grad()
def predict_degrees(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heads: DegreeHeads,
    prompts: Sequence[str | list[dict[str, str]]],
    responses: Sequence[str | list[dict[str, str]]],
    batch_size: int = 8,
    max_length: int | None = None,
    **apply_chat_template_kwargs: Any,
) -> DegreePrediction:
    """
    Scores responses: how much of their key content the heads find missing, from 0 (nothing) to N-1 (all of it).

    Example:

    ```python
    >>> from trl_spo import DegreeHeads
    >>> from trl_spo.sspo import predict_degrees

    >>> heads = DegreeHeads.from_pretrained("aligned")
    >>> found = predict_degrees(model, tokenizer, heads, ["The sky is"], [" blue in the morning."])
    >>> found.chosen.argmax(dim=1)  # the degree of each response
    ```

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The trained policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        heads ([`DegreeHeads`]):
            Heads that were trained with it.
        prompts (`Sequence[str]` or `Sequence[list[dict[str, str]]]`):
            Prompts, standard or conversational.
        responses (`Sequence[str]` or `Sequence[list[dict[str, str]]]`):
            A response to each of them, in the same format.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses per forward pass.
        max_length (`int`, *optional*):
            Tokens of prompt and response after which they are cut off.
        **apply_chat_template_kwargs:
            `tools`, `chat_template` and so on, for conversational prompts.

    Returns:
        [`DegreePrediction`]: on the CPU, in float32.
    """
    if len(prompts) != len(responses) or len(prompts) == 0:
        raise ValueError(f"There are {len(prompts)} `prompts` and {len(responses)} `responses`. Pass one for each.")
    base = model.get_base_model() if is_peft_model(model) else model
    size = heads.config["hidden_size"]
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        if isinstance(prompt, str) != isinstance(response, str):
            raise ValueError(
                f"The prompt {prompt!r} and the response {response!r} are in different formats. Pass two texts, or two lists of "
                "messages."
            )
        kwargs = {} if isinstance(prompt, str) else apply_chat_template_kwargs
        if isinstance(prompt, str):
            response = response if response.endswith(tokenizer.eos_token) else response + tokenizer.eos_token
            prompt_ids = _tokenize(tokenizer, prompt)["input_ids"]
        else:
            prompt_ids = _tokenize(tokenizer, prompt, add_generation_prompt=True, **kwargs)["input_ids"]
        ids = _tokenize(tokenizer, prompt + response, **kwargs)["input_ids"]
        start = common_prefix_length(prompt_ids, ids)
        if max_length is not None and start >= max_length:
            raise ValueError(
                f"The prompt {prompt!r} has {start} tokens, so that `max_length={max_length}` leaves nothing of its response. Set a "
                "larger `max_length`."
            )
        mask = torch.arange(len(ids)) >= start
        rows.append((torch.tensor(ids)[:max_length], mask[:max_length]))

    was_training, predictions = model.training, ([], [])
    model.eval()
    try:
        for i in range(0, len(rows), batch_size):
            ids, masks = zip(*rows[i : i + batch_size], strict=True)
            attention = pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="right")
            ids = pad(list(ids), padding_value=tokenizer.pad_token_id or 0, padding_side="right")
            masks = pad(list(masks), padding_value=False, padding_side="right").to(model.device)
            with last_hidden_states(base) as states:
                model(
                    input_ids=ids.to(model.device),
                    attention_mask=attention.to(model.device),
                    use_cache=False,
                    logits_to_keep=1,
                )
            hidden = states.pop()[:, -masks.size(1) :]
            if hidden.size(2) != size:
                raise ValueError(
                    f"The heads are for hidden states of size {size}, and those of the model have {hidden.size(2)}. Pass the model "
                    "that they were trained with."
                )
            device = next(heads.parameters()).device
            logits = heads(pool_states(hidden.to(device), masks.to(device).unsqueeze(1)))
            for found, values in zip(predictions, logits, strict=True):
                found.append(values[:, 0].float().softmax(dim=1).cpu())
    finally:
        model.train(was_training)
    return DegreePrediction(*(torch.cat(found) for found in predictions))
