# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""How far a policy is from its reference, and how much it still varies, on its own responses."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat import ChunkedDivergenceFunction
from ..soft_po.online_kl import LMHead
from ..synthetic.students import encode_prompt
from .scoring import check_head


class Divergence(NamedTuple):
    """
    Of one response, in nats.

    Args:
        kl (`float`):
            Sum over its tokens of the KL divergence of the policy's distribution of the next token to the reference's, over the whole vocabulary.
        entropy (`float`):
            Sum over its tokens of the entropy of the policy's distribution.
        tokens (`int`):
            Their number, with the one that ended it.
    """

    kl: float
    entropy: float
    tokens: int


@torch.no_grad()
def on_policy_divergence(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[dict[str, Any]],
    batch_size: int = 8,
) -> list[list[Divergence]]:
    """
    KL divergence to the reference and entropy of the policy's own responses.

    With `y ~ π(.|x)` drawn at temperature 1, the sequence KL and entropy are the means of

        Σ_t D_KL(π(.|x, y_<t) || π_ref(.|x, y_<t))    and    Σ_t H(π(.|x, y_<t)).

    At each token the sum over the vocabulary is exact, and only the prefixes are sampled (Rao-Blackwell): the variance is less than that of
    the log-ratio of the tokens that were drawn, and no term is negative. Of responses that are cut, it is the divergence of the cut ones. The
    logits of the whole vocabulary are never in memory.

    Args:
        policy, reference ([`~transformers.PreTrainedModel`]):
            The models, on one device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Their tokenizer.
        samples (`Iterable[dict[str, Any]]`):
            Rows of [`~trl_spo.synthetic.generate_candidates`] with `token_ids`, drawn by the policy at temperature 1.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses per forward pass.

    Returns:
        `list[list[Divergence]]`: of each row, of each response.

    Raises:
        `ValueError`: the responses were drawn at another temperature, the models have another vocabulary, or one has an adapter on its output layer.
    """
    for model in (policy, reference):
        check_head(model)
    heads = [LMHead.of(model) for model in (policy, reference)]
    if heads[0].weight.size(0) != heads[1].weight.size(0):
        raise ValueError(
            f"The policy has a vocabulary of {heads[0].weight.size(0)} tokens, and the reference one of {heads[1].weight.size(0)}: there is no KL "
            "divergence between them."
        )
    sequences: list[tuple[list[int], list[int], int]] = []  # prompt, response, and how many distributions
    places: list[tuple[int, int]] = []
    found: list[list[Any]] = []
    for row, sample in enumerate(samples):
        prompt_ids = encode_prompt(tokenizer, sample)
        found.append([None] * len(sample["responses"]))
        for k, response in enumerate(sample["responses"]):
            if response["temperature"] != 1.0:
                raise ValueError(
                    f"A response was drawn at temperature {response['temperature']}, and not from the policy itself. Use `temperatures=(1.0,)`."
                )
            ids = response["token_ids"]
            sequences.append((prompt_ids, ids, len(ids) + (response["finish_reason"] == "stop")))
            places.append((row, k))
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]) - len(sequences[i][1]))
    with tqdm(desc="KL and entropy", total=len(sequences), unit=" responses") as bar:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            for i, terms in zip(batch, _terms((policy, reference), heads, [sequences[i] for i in batch]), strict=True):
                row, k = places[i]
                found[row][k] = terms
            bar.update(len(batch))
    return found


def _terms(
    models: Sequence[PreTrainedModel], heads: Sequence[LMHead], sequences: Sequence[tuple[list[int], list[int], int]]
) -> list[Divergence]:
    length = max(len(prompt) + len(response) for prompt, response, _ in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.long)
    attention_mask, mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (prompt, response, number) in enumerate(sequences):
        input_ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        attention_mask[row, : len(prompt) + len(response)] = 1
        mask[row, len(prompt) - 1 : len(prompt) - 1 + number] = True  # the positions that predict the response
    states = []
    for model in models:
        device = model.device
        output = model.base_model(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
        )
        states.append(output.last_hidden_state[mask.to(output.last_hidden_state.device)])
    (policy, head), (reference, other) = zip(states, heads, strict=True)
    kl, entropy = ChunkedDivergenceFunction.apply(
        policy.to(head.weight.device),
        *head.full(policy.dtype),
        reference.to(head.weight.device),
        *other.full(reference.dtype),
        1.0,  # the reverse KL, D(π||π_ref)
        1.0,
        head.logit_scale,
        head.final_logit_softcapping,
        other.logit_scale,
        other.final_logit_softcapping,
    )
    numbers = [number for _, _, number in sequences]
    parts = zip(kl.double().cpu().split(numbers), entropy.double().cpu().split(numbers), numbers, strict=True)
    return [Divergence(of_kl.sum().item(), of_entropy.sum().item(), number) for of_kl, of_entropy, number in parts]
