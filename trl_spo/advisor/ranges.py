# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Whether beta, alpha and the learning rate are where something can be expected of them, for responses of the length that
the dataset has.

The ranges are our rules of thumb; what they rest on:

- A logistic loss `-log σ(β Δ)` hardly pulls any more where β Δ is above 4 (σ(4) = 0.98), that is when the log-ratios
  of the two responses have moved apart by Δ = 4 / β nats. Divided among the tokens of both responses that is `4 / (β
  (L_w + L_l))` nats per token. Text has 1 to 2 nats per token at all: a change of more than 1 nat in every token is
  another language model (beta too low: forgetting), one of less than 0.01 is none to speak of (beta too high: no
  alignment).
- So the longer the responses, the smaller a beta that asks for the same: where the loss is of sums of
  log-probabilities (DPO, KTO, Soft PO with `logp_reduction="sum"`), beta (Soft PO: alpha) and length multiply. With
  means per token, length does not matter.
- IPO in TRL is a square loss of means per token, with its minimum at a difference of 1 / (2 β) nats per token: 5 at
  TRL's default beta of 0.1, which no language model gets to. Then its pull never ends, and what holds the model back
  is the length of the training.
- Soft PO's own beta weighs a KL in nats against a preference loss whose gradient is at most 1 per nat of Δ: above 1,
  the KL outweighs any preference.
- Learning rates: 5e-7 to 1e-5 are what full fine-tuning of models from about a billion parameters on is reported with,
  ten times that with LoRA, which has fewer parameters to move. Small models take more: they are not judged.
"""

from typing import Any

from .findings import Finding
from .plan import Plan


# Nats per token by which log-ratios may have to move
_LEAST_CHANGE, _MOST_CHANGE = 0.01, 1.0
_SATURATION = 4.0
# Of IPO's target, in nats per token of difference
_LEAST_TARGET, _MOST_TARGET = 2 * _LEAST_CHANGE, 2 * _MOST_CHANGE
_MOST_KL_WEIGHT = 1.0
_FULL, _LORA = (5e-7, 1e-5), (5e-6, 1e-4)
_JUDGED = 3e8  # parameters
_MEANS = ("sigmoid_norm",)
# Losses of DPO that are logistic in β times a difference of sums, or near enough
_SUMS = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "cpo",
    "rdpo",
)


def sum_range(tokens: float) -> tuple[float, float]:
    """Range of β of a logistic loss of sums over `tokens` tokens, those of both responses of a pair."""
    return _SATURATION / (tokens * _MOST_CHANGE), _SATURATION / (tokens * _LEAST_CHANGE)


def mean_range() -> tuple[float, float]:
    """Range of β of a logistic loss of a difference of means per token."""
    return _SATURATION / (2 * _MOST_CHANGE), _SATURATION / (2 * _LEAST_CHANGE)


def ipo_range() -> tuple[float, float]:
    """Range of β of IPO: that of its targets, 1 / (2 β)."""
    return 1 / (2 * _MOST_TARGET), 1 / (2 * _LEAST_TARGET)


def _out_of_range(
    code: str, plan: Plan, name: str, bounds: tuple[float, float], what: str, data: dict[str, Any]
) -> list[Finding]:
    value, (low, high) = plan.get(name), bounds
    if low <= value <= high:
        return []
    too = "low: the model may forget what it was" if value < low else "high: hardly anything is learned"
    return [
        Finding(
            code,
            "warning",
            f"`{name}` is {'low' if value < low else 'high'} for these responses",
            f"{plan.told(name)}: {what} That is too {too}.",
            f"Try {low:.2g} to {high:.2g} (our rule of thumb), several values on a logarithmic scale.",
            {"option": name, "value": value, "range": [low, high], **data},
        )
    ]


def _check_beta(plan: Plan, tokens: float | None) -> list[Finding]:
    beta = plan.get("beta")
    if beta == 0:
        return [
            Finding(
                "beta_range",
                "error",
                "`beta` is 0",
                "The loss does not depend on the model: it learns nothing.",
                "Use 0.1 to begin with.",
                {"option": "beta", "value": 0},
            )
        ]
    losses = plan.loss_types
    data = {"tokens": tokens}
    if "ipo" in losses:
        target = 1 / (2 * beta)
        what = f"IPO's loss is smallest where the log-ratios differ by 1 / (2 beta) = {target:.3g} nats per token (TRL takes means)."
        return _out_of_range("beta_range", plan, "beta", ipo_range(), what, data | {"target": target})
    if any(loss in _MEANS for loss in losses):
        what = f"the loss pulls until the log-ratios differ by {_SATURATION / beta:.3g} nats per token."
        return _out_of_range("beta_range", plan, "beta", mean_range(), what, data)
    if tokens is None or (losses and not any(loss in _SUMS for loss in losses)):
        return []
    what = (
        f"the loss pulls until the log-ratios differ by {_SATURATION / beta:.3g} nats, {_SATURATION / beta / tokens:.2g} for each of the {tokens:.0f} "
        "tokens that it is a sum over."
    )
    return _out_of_range("beta_range", plan, "beta", sum_range(tokens), what, data)


def _check_soft_po(plan: Plan, tokens: float | None) -> list[Finding]:
    alpha, findings = plan.get("alpha"), []
    if plan.get("logp_reduction") == "mean":
        what = f"the loss pulls until the means per token differ by {_SATURATION / alpha:.3g} nats."
        findings += _out_of_range("alpha_range", plan, "alpha", mean_range(), what, {"tokens": tokens})
    elif tokens is not None:
        what = (
            f"the loss pulls until log-probabilities differ by {_SATURATION / alpha:.3g} nats, {_SATURATION / alpha / tokens:.2g} for each of the "
            f"{tokens:.0f} tokens that it is a sum over."
        )
        findings += _out_of_range("alpha_range", plan, "alpha", sum_range(tokens), what, {"tokens": tokens})
    if plan.get("beta") > _MOST_KL_WEIGHT:
        findings.append(
            Finding(
                "beta_range",
                "warning",
                "`beta` is high",
                f"{plan.told('beta')}: it weighs the KL divergence, in nats, against a loss that gains at most 1 for each nat between the responses.",
                "Try 0.01 to 1 (our rule of thumb). What is `beta` in DPO is `alpha` here.",
                {"option": "beta", "value": plan.get("beta"), "range": [0.0, _MOST_KL_WEIGHT]},
            )
        )
    return findings


def range_findings(plan: Plan, response_tokens: float | None, parameters: int | None = None) -> list[Finding]:
    """
    Which options are out of the range that can be expected to work.

    Args:
        plan ([`Plan`]):
            The training.
        response_tokens (`float`, *optional*):
            Mean number of tokens of a response, once it is cut. Without, nothing is said of what depends on it.
        parameters (`int`, *optional*):
            Of the model.

    Returns:
        `list[Finding]`
    """
    tokens = None if response_tokens is None else (1 if plan.takes_apart else 2) * response_tokens
    findings = _check_soft_po(plan, tokens) if plan.method == "soft_po" else _check_beta(plan, tokens)
    return findings + _check_learning_rate(plan, parameters)


def literal_findings(plan: Plan, gap: float | None) -> list[Finding]:
    """
    Whether Soft PO's literal loss sees preferences at all: SoftPOTrainer warns at its start where α times the
    difference of two responses' log-probabilities is above 4 on average, since the loss then pulls together what
    differs for other reasons than the preference.

    Args:
        plan ([`Plan`]):
            The training.
        gap (`float`, *optional*):
            Mean of `|log π(chosen) - log π(rejected)|` under the reference, in nats, if it was measured.

    Returns:
        `list[Finding]`
    """
    if plan.method != "soft_po" or plan.get("calibration") != "none" or gap is None:
        return []
    if plan.get("logp_reduction") == "mean" or plan.get("alpha") * gap <= _SATURATION:
        return []
    return [
        Finding(
            "uncalibrated_off_policy",
            "warning",
            "Differences in likelihood drown the preference",
            f"`calibration='none'`: |log π(chosen) - log π(rejected)| is {gap:.3g} nats on average under the reference, {plan.get('alpha') * gap:.1f} times 1 / alpha.",
            "Use `calibration='reference'`, or pairs that the model sampled.",
            {"gap": gap, "alpha": plan.get("alpha")},
        )
    ]


def _check_learning_rate(plan: Plan, parameters: int | None) -> list[Finding]:
    rate, findings = plan.get("learning_rate"), []
    lora = bool(plan.get("use_peft"))
    low, high = _LORA if lora else _FULL
    if parameters is not None and parameters >= _JUDGED and not low <= rate <= high:
        kind = "LoRA" if lora else "full fine-tuning"
        too = "hardly moves" if rate < low else "may leave the data for good"
        findings.append(
            Finding(
                "learning_rate",
                "warning",
                f"`learning_rate` is {'low' if rate < low else 'high'} for {kind}",
                f"{plan.told('learning_rate')}: a model of {parameters / 1e9:.2g} billion parameters {too}.",
                f"Try {low:g} to {high:g} (our rule of thumb).",
                {"option": "learning_rate", "value": rate, "range": [low, high]},
            )
        )
    return findings


def precision_findings(plan: Plan, deepspeed: bool) -> list[Finding]:
    """
    Whether updates get lost in 16-bit weights.

    AdamW moves a weight by up to the learning rate, and bfloat16 has 8 significant bits: a change below 1/512 of a
    weight is rounded away. Weights of language models are about 0.02, of which that is 4e-5. DeepSpeed keeps a copy in
    32 bits, and LoRA trains weights of its own, in 32 bits.

    Args:
        plan ([`Plan`]):
            The training.
        deepspeed (`bool`):
            Whether DeepSpeed runs it.

    Returns:
        `list[Finding]`
    """
    rate = plan.get("learning_rate")
    if plan.dtype not in ("bfloat16", "float16") or plan.get("use_peft") or deepspeed or rate >= 4e-5:
        return []
    return [
        Finding(
            "weights_in_16_bits",
            "warning",
            "Updates get lost in 16-bit weights",
            f"The weights are loaded in {plan.dtype}, and {plan.told('learning_rate')}: AdamW moves a weight by up to that much, of which a weight of "
            "0.02 in bfloat16 sees nothing below 4e-5.",
            "Load them in float32 (`--dtype float32`; `bf16` then still multiplies in 16 bits), or train with DeepSpeed or LoRA.",
            {"dtype": plan.dtype, "learning_rate": rate},
        )
    ]
