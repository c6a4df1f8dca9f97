# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
The equations of the SPO methods: pure functions on tensors, no model, no reduction over the batch.

Notation: `π` the policy, `π_ref` the reference, `log π(y|x)` the sum of the completion's token log-probabilities. A
*score* is what enters a loss in the place of `log π(y|x)`: the log-probability itself (the papers' form), its mean per
token, or its difference to the reference's.
"""

import torch
import torch.nn.functional as F


def soft_preference_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    alpha: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Soft Preference Optimization's loss of a pair ([arXiv 2405.00747](https://huggingface.co/papers/2405.00747)).

    `-(μ/α) log σ(α (log π(y_w|x) - log π(y_l|x)))`: the cross-entropy of the model's own softened preference `P(y_w > y_l)
    = π(y_w)^α / (π(y_w)^α + π(y_l)^α)`. The reference does not appear.

    Args:
        chosen_logps (`torch.Tensor` of shape `(B,)`):
            Scores of the preferred responses, in nats.
        rejected_logps (`torch.Tensor` of shape `(B,)`):
            Scores of the other responses, in nats.
        alpha (`float`):
            Softness α > 0.
        weights (`torch.Tensor` of shape `(B,)`, *optional*):
            Weights μ, see [`pair_weights`].

    Returns:
        `torch.Tensor` of shape `(B,)`: loss of each pair.
    """
    losses = -F.logsigmoid(alpha * (chosen_logps - rejected_logps)) / alpha
    return losses if weights is None else weights * losses


def soft_best_of_n_loss(
    logps: torch.Tensor,
    best_index: torch.Tensor,
    alpha: float,
    mask: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Soft Preference Optimization's loss of the best among `n` responses (arXiv 2405.00747).

    `-(μ/α) log(π(y_b)^α / Σ_j π(y_j)^α)`. With `n = 2` it is [`soft_preference_loss`].

    Args:
        logps (`torch.Tensor` of shape `(B, n)`):
            Scores of the responses, in nats.
        best_index (`torch.Tensor` of shape `(B,)`):
            Index of the best response.
        alpha (`float`):
            Softness α > 0.
        mask (`torch.Tensor` of shape `(B, n)`, *optional*):
            Which responses exist, for lists of unequal length. All of them by default.
        weights (`torch.Tensor` of shape `(B,)`, *optional*):
            Weights μ, see [`pair_weights`].

    Returns:
        `torch.Tensor` of shape `(B,)`: loss of each list.
    """
    scores = alpha * logps
    if mask is not None:
        scores = scores.masked_fill(~mask.bool(), -torch.inf)
    losses = -F.log_softmax(scores, dim=1).gather(1, best_index.unsqueeze(1)).squeeze(1) / alpha
    return losses if weights is None else weights * losses


def competitors(mask: torch.Tensor, ranks: torch.Tensor | None = None) -> torch.Tensor:
    """
    The denominators of [`soft_ranking_loss`]: the responses that response `k` is preferred to, and `k` itself.

    Args:
        mask (`torch.Tensor` of shape `(B, n)`):
            Which responses exist.
        ranks (`torch.Tensor` of shape `(B, n)`, *optional*):
            Rank of each response, 0 the best; equal ranks are ties. By default the responses stand best first.

    Returns:
        `torch.Tensor` of shape `(B, n, n)`, boolean: entry `[b, k, j]` says whether `j` is in the denominator of `k`.
    """
    mask = mask.bool()
    if ranks is None:
        ranks = torch.arange(mask.size(1), device=mask.device).expand_as(mask)
    worse = ranks.unsqueeze(1) > ranks.unsqueeze(2)
    itself = torch.eye(mask.size(1), dtype=torch.bool, device=mask.device)
    return (worse | itself) & mask.unsqueeze(1) & mask.unsqueeze(2)


def soft_ranking_loss(
    logps: torch.Tensor,
    alpha: float,
    mask: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    ranks: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Soft Preference Optimization's loss of a ranked list `y_1 > y_2 > ... > y_n` (arXiv 2405.00747).

    `-(1/α) Σ_{k<n} μ_k log(π(y_k)^α / Σ_{j>=k} π(y_j)^α)`. With `n = 2` it is [`soft_preference_loss`]. Ties (our choice; the
    paper has none): responses of equal rank do not enter each other's denominators, so that a list of one best response
    and `n - 1` tied others is [`soft_best_of_n_loss`].

    Args:
        logps (`torch.Tensor` of shape `(B, n)`):
            Scores of the responses, in nats, best first unless `ranks` is given.
        alpha (`float`):
            Softness α > 0.
        mask (`torch.Tensor` of shape `(B, n)`, *optional*):
            Which responses exist, for lists of unequal length. All of them by default.
        weights (`torch.Tensor` of shape `(B,)` or `(B, n)`, *optional*):
            Weights μ, one for the list or one for each `k`.
        ranks (`torch.Tensor` of shape `(B, n)`, *optional*):
            Rank of each response, 0 the best; equal ranks are ties.

    Returns:
        `torch.Tensor` of shape `(B,)`: loss of each list.
    """
    if mask is None:
        mask = torch.ones_like(logps, dtype=torch.bool)
    mask = mask.bool()
    # A response that does not exist is alone in its own denominator, so its term is log 1 = 0
    scores = (alpha * logps).masked_fill(~mask, 0.0)
    denominators = competitors(mask, ranks) | torch.eye(mask.size(1), dtype=torch.bool, device=mask.device)
    log_z = scores.unsqueeze(1).masked_fill(~denominators, -torch.inf).logsumexp(dim=2)
    losses = (log_z - scores) / alpha  # (B, n)
    if weights is not None:
        losses = losses * (weights if weights.dim() == 2 else weights.unsqueeze(1))
    return losses.sum(dim=1)


def probability_mass(logps: torch.Tensor, gamma: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    `v = (Σ_j π(y_j))^γ`, in log space so that it does not underflow: `exp(γ logsumexp_j log π(y_j))`. Detached.

    Args:
        logps (`torch.Tensor` of shape `(B, n)`):
            Log-probabilities of the responses, in nats.
        gamma (`float`):
            Exponent γ >= 0.
        mask (`torch.Tensor` of shape `(B, n)`, *optional*):
            Which responses are in the sum. All of them by default.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    logps = logps.detach()
    if mask is not None:
        logps = logps.masked_fill(~mask.bool(), -torch.inf)
    return torch.exp(gamma * logps.logsumexp(dim=1))


def pair_weights(
    logps: torch.Tensor,
    weighting: str,
    gamma: float,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    batch_mean: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Weights μ of Soft Preference Optimization, which turn down samples that the model itself finds improbable.

    That μ is symmetric in the responses, has an exponent γ and is centred on the batch mean is the paper's; its form is our
    choice. With `v = (Σ_j π(y_j))^γ`:

    - `"none"`: `μ = 1`
    - `"power"`: `μ = v`
    - `"sigmoid"`: `μ = 2 σ(c (v - mean_batch v))`

    Args:
        logps (`torch.Tensor` of shape `(B, n)`):
            Log-probabilities of the responses, in nats.
        weighting (`str`):
            `"none"`, `"power"` or `"sigmoid"`.
        gamma (`float`):
            Exponent γ >= 0; 0 gives `μ = 1` with each of them.
        mask (`torch.Tensor` of shape `(B, n)`, *optional*):
            Which responses are in the sum. All of them by default.
        scale (`float`, *optional*, defaults to `1.0`):
            Slope c of `"sigmoid"`.
        batch_mean (`torch.Tensor`, *optional*):
            Mean of `v` over the global batch. By default over this one.

    Returns:
        `torch.Tensor` of shape `(B,)`: weights, without gradient.
    """
    mass = probability_mass(logps, gamma, mask)
    if weighting == "none":
        return torch.ones_like(mass)
    if weighting == "power":
        return mass
    if weighting == "sigmoid":
        return 2 * torch.sigmoid(scale * (mass - (mass.mean() if batch_mean is None else batch_mean)))
    raise ValueError(f"Unknown weighting: {weighting!r}. Should be one of ['none', 'power', 'sigmoid'].")


def token_kl(policy_logits: torch.Tensor, reference_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    The `token` estimator's terms: the KL divergence of the next-token distributions at each position of a sample.

    `k_t = Σ_v π(v|x,y_<t) (log π(v|x,y_<t) - log π_ref(v|x,y_<t))`. Summed over a sample `y ~ π` it is an unbiased estimate of
    `D_KL(π||π_ref)`; its gradient leaves out how the parameters move the prefixes (biased, low variance; arXiv 2405.00747).
    This is the plain form, for tests and small vocabularies: the trainer never builds the logits.

    Args:
        policy_logits (`torch.Tensor` of shape `(B, L, V)`):
            Logits of the policy.
        reference_logits (`torch.Tensor` of shape `(B, L, V)`):
            Logits of the reference.
        mask (`torch.Tensor` of shape `(B, L)`):
            Which positions predict a completion token.

    Returns:
        `torch.Tensor` of shape `(B, L)`: nats, 0 where the mask is 0.
    """
    policy = F.log_softmax(policy_logits, dim=-1)
    reference = F.log_softmax(reference_logits, dim=-1)
    return (policy.exp() * (policy - reference)).sum(dim=-1).masked_fill(~mask.bool(), 0.0)


def score_kl(per_token_kl: torch.Tensor, per_token_logps: torch.Tensor) -> torch.Tensor:
    r"""
    The `score` estimator of the KL divergence of a sample: the value of `token`, with the exact gradient.

    `Σ_t k_t + sg(Σ_{s>t} k_s) (log π(y_t|x,y_<t) - sg(log π(y_t|x,y_<t)))`: the second term is 0 in value, and its gradient is
    that of the prefixes, with the KL still to come as the reward-to-go. `k` as in [`token_kl`]. Our addition to the paper.

    Args:
        per_token_kl (`torch.Tensor` of shape `(B, L)`):
            The terms `k_t`, 0 at positions that do not count.
        per_token_logps (`torch.Tensor` of shape `(B, L)`):
            Log-probabilities of the sampled tokens under the policy, 0 at positions that do not count.

    Returns:
        `torch.Tensor` of shape `(B,)`: nats.
    """
    kl = per_token_kl.detach()
    to_go = kl.flip(1).cumsum(1).flip(1) - kl  # Σ_{s>t} k_s
    return (per_token_kl + to_go * (per_token_logps - per_token_logps.detach())).sum(dim=1)


def importance_weights(logps: torch.Tensor, old_logps: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    r"""
    Ratios `π(y|x) / π_old(y|x)` of samples that an older policy drew, truncated at `cap`. Detached.

    Args:
        logps (`torch.Tensor` of shape `(B,)`):
            Log-probabilities of the samples under the policy.
        old_logps (`torch.Tensor` of shape `(B,)`):
            Log-probabilities under the policy that drew them.
        cap (`float`, *optional*):
            Largest ratio. Not truncated by default.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    ratios = torch.exp(logps.detach() - old_logps)
    return ratios if cap is None else ratios.clamp(max=cap)


def cpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    beta: float,
    nll_weight: float = 1.0,
) -> torch.Tensor:
    r"""
    Contrastive Preference Optimization's loss ([arXiv 2401.08417](https://huggingface.co/papers/2401.08417)), reference-free.

    `-log σ(β (log π(y_w|x) - log π(y_l|x))) - λ log π(y_w|x) / |y_w|`: DPO's loss with a uniform reference, and behaviour
    cloning of the chosen response (per token, as in TRL's CPOTrainer).

    Args:
        chosen_logps (`torch.Tensor` of shape `(B,)`):
            Log-probabilities of the preferred responses, in nats.
        rejected_logps (`torch.Tensor` of shape `(B,)`):
            Log-probabilities of the other responses, in nats.
        chosen_lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of the preferred responses.
        beta (`float`):
            Inverse temperature β.
        nll_weight (`float`, *optional*, defaults to `1.0`):
            Weight λ of the behaviour cloning.

    Returns:
        `torch.Tensor` of shape `(B,)`: loss of each pair.
    """
    nll = -chosen_logps / chosen_lengths
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps)) + nll_weight * nll


def dpop_loss(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float, penalty: float = 50.0
) -> torch.Tensor:
    r"""
    DPO-Positive's loss (Smaug, [arXiv 2402.13228](https://huggingface.co/papers/2402.13228)).

    `-log σ(β (ρ_w - ρ_l - λ [-ρ_w]_+))` with `ρ = log π(y|x) - log π_ref(y|x)`: DPO's, with a penalty on a chosen response that
    becomes less probable than under the reference.

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B,)`):
            `ρ_w`, in nats.
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            `ρ_l`, in nats.
        beta (`float`):
            Inverse temperature β.
        penalty (`float`, *optional*, defaults to `50.0`):
            λ.

    Returns:
        `torch.Tensor` of shape `(B,)`: loss of each pair.
    """
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - penalty * F.relu(-chosen_logratios)))


def rdpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: float,
    length_penalty: float = 0.01,
) -> torch.Tensor:
    r"""
    R-DPO's loss, regularized in length ([arXiv 2403.19159](https://huggingface.co/papers/2403.19159)).

    `-log σ(β (ρ_w - ρ_l) + α (|y_w| - |y_l|))` with `ρ = log π(y|x) - log π_ref(y|x)`: the policy is optimal for the reward minus
    `α |y|`, so a preference for the longer response is in part explained by its length.

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B,)`):
            `ρ_w`, in nats.
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            `ρ_l`, in nats.
        chosen_lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of the preferred responses.
        rejected_lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of the other responses.
        beta (`float`):
            Inverse temperature β.
        length_penalty (`float`, *optional*, defaults to `0.01`):
            α, in units of reward per token.

    Returns:
        `torch.Tensor` of shape `(B,)`: loss of each pair.
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    return -F.logsigmoid(logits + length_penalty * (chosen_lengths - rejected_lengths))


def simpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> torch.Tensor:
    r"""
    SimPO's loss ([arXiv 2405.14734](https://huggingface.co/papers/2405.14734)), reference-free.

    `-log σ(β log π(y_w|x) / |y_w| - β log π(y_l|x) / |y_l| - γ)`.

    Args:
        chosen_logps (`torch.Tensor` of shape `(B,)`):
            Log-probabilities of the preferred responses, in nats.
        rejected_logps (`torch.Tensor` of shape `(B,)`):
            Log-probabilities of the other responses, in nats.
        chosen_lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of the preferred responses.
        rejected_lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of the other responses.
        beta (`float`, *optional*, defaults to `2.0`):
            Inverse temperature β.
        gamma (`float`, *optional*, defaults to `1.0`):
            Target margin γ of the reward.

    Returns:
        `torch.Tensor` of shape `(B,)`: loss of each pair.
    """
    return -F.logsigmoid(beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - gamma)


def alphadpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.1,
    batch_margins: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    AlphaDPO's loss, SimPO's with a margin of its own for each pair ([arXiv 2410.10148](https://huggingface.co/papers/2410.10148)).

    `-log σ(u - sg(γ + α M*))` with `u = β (log π(y_w|x) / |y_w| - log π(y_l|x) / |y_l|)`, `M` the same of `log π - log π_ref`, and `M*` its
    z-score over the batch.

    Args:
        chosen_logps (`torch.Tensor` of shape `(B,)`):
            Log-probabilities of the preferred responses, in nats.
        rejected_logps (`torch.Tensor` of shape `(B,)`):
            Log-probabilities of the other responses, in nats.
        ref_chosen_logps (`torch.Tensor` of shape `(B,)`):
            The reference's, of the preferred responses.
        ref_rejected_logps (`torch.Tensor` of shape `(B,)`):
            The reference's, of the other responses.
        chosen_lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of the preferred responses.
        rejected_lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of the other responses.
        beta (`float`, *optional*, defaults to `2.0`):
            Inverse temperature β.
        gamma (`float`, *optional*, defaults to `1.0`):
            Margin γ.
        alpha (`float`, *optional*, defaults to `0.1`):
            Weight α of the pair's own margin; with 0 it is [`simpo_loss`].
        batch_margins (`torch.Tensor` of shape `(N,)`, *optional*):
            `M` of the global batch, which it is standardised with, see [`alphadpo_margins`]. By default this batch's. Of a
            single pair the z-score is 0.

    Returns:
        `torch.Tensor` of shape `(B,)`: loss of each pair.
    """
    utility = beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths)
    margins = alphadpo_margins(
        chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps, chosen_lengths, rejected_lengths, beta
    )
    if batch_margins is None:
        batch_margins = margins
    # At the start policy and reference are equal: the margins are then rounding errors, which must not become z-scores.
    # A single margin has no deviation.
    std = batch_margins.std() if len(batch_margins) > 1 else 0.0
    standardised = (margins - batch_margins.mean()) / (std + 1e-6)
    return -F.logsigmoid(utility - (gamma + alpha * standardised))


def alphadpo_margins(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """`M = β (ρ_w / |y_w| - ρ_l / |y_l|)` of [`alphadpo_loss`], with `ρ = log π(y|x) - log π_ref(y|x)`. Detached, of shape `(B,)`."""
    return (beta * (chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths)).detach()


def nll_regularizer(chosen_logps: torch.Tensor, chosen_lengths: torch.Tensor) -> torch.Tensor:
    r"""
    Stable PO's absolute-probability regularizer `-log π(y_w|x) / |y_w|` (arXiv 2507.07723; its form is our choice).

    Args:
        chosen_logps (`torch.Tensor` of shape `(B,)`):
            Log-probabilities of the preferred responses, in nats.
        chosen_lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of the preferred responses.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return -chosen_logps / chosen_lengths


def floor_regularizer(
    chosen_logps: torch.Tensor, ref_chosen_logps: torch.Tensor, chosen_lengths: torch.Tensor
) -> torch.Tensor:
    r"""
    Stable PO's regularizer with a floor, `[log π_ref(y_w|x) - log π(y_w|x)]_+ / |y_w|` (arXiv 2507.07723; our choice).

    Args:
        chosen_logps (`torch.Tensor` of shape `(B,)`):
            Log-probabilities of the preferred responses, in nats.
        ref_chosen_logps (`torch.Tensor` of shape `(B,)`):
            The reference's.
        chosen_lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of the preferred responses.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return F.relu(ref_chosen_logps - chosen_logps) / chosen_lengths


def sft_penalty(sft_loss: torch.Tensor, anchor_loss: torch.Tensor | float, slack: float = 0.0) -> torch.Tensor:
    r"""
    Stable PO's penalty `[L_SFT(θ) - L_SFT(sg anchor) - ε]_+`: the optimal-value constraint of the lower level moved into the
    upper one (arXiv 2507.07723 v2; anchor and slack are our choice).

    Args:
        sft_loss (`torch.Tensor`, scalar):
            `L_SFT(θ)`, the mean negative log-probability of the chosen tokens, in nats.
        anchor_loss (`torch.Tensor`, scalar):
            That of the anchor.
        slack (`float`, *optional*, defaults to `0.0`):
            ε, in nats per token.

    Returns:
        `torch.Tensor`, scalar.
    """
    anchor_loss = anchor_loss.detach() if torch.is_tensor(anchor_loss) else anchor_loss
    return F.relu(sft_loss - anchor_loss - slack)


def removal_mask(token_degrees: torch.Tensor, completion_mask: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    r"""
    Which tokens of a response are left of it at each degree (Self-supervised Preference Optimization, arXiv 2409.17791).

    At level i the tokens of degree `0 < d <= i` are gone. Level 0 leaves all, and each level leaves no more than the one before.

    Args:
        token_degrees (`torch.Tensor` of shape `(B, L)`):
            For each token the lowest degree that drops it, 0 if none does.
        completion_mask (`torch.Tensor` of shape `(B, L)`):
            Tokens of the response.
        levels (`torch.Tensor` of shape `(B, K)`):
            Levels, from 0 to N-1.

    Returns:
        `torch.Tensor` of shape `(B, K, L)`: `True` where a token is left.
    """
    dropped = (token_degrees > 0).unsqueeze(1) & (token_degrees.unsqueeze(1) <= levels.unsqueeze(2))
    return completion_mask.bool().unsqueeze(1) & ~dropped


def degree_loss(logits: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    r"""
    Self-supervised Preference Optimization's loss of a response (arXiv 2409.17791).

    `(1/K) Σ_k CE(head(ỹ^(i_k)), i_k)`: the head is to tell how much key content has been taken from the response.

    Args:
        logits (`torch.Tensor` of shape `(B, K, N)`):
            What the head says about the response at each of the levels.
        levels (`torch.Tensor` of shape `(B, K)`):
            The levels, from 0 to N-1.

    Returns:
        `torch.Tensor` of shape `(B,)`: in nats; `log N` is chance.
    """
    return F.cross_entropy(logits.transpose(1, 2), levels, reduction="none").mean(dim=1)
