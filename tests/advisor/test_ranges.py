# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from tests.advisor.conftest import codes, only

from trl_spo.advisor.plan import make_plan
from trl_spo.advisor.ranges import literal_findings, precision_findings, range_findings
from trl_spo.losses import soft_preference_loss


def _severities(method, tokens=100.0, parameters=None, **options):
    return codes(range_findings(make_plan(method, options), tokens, parameters))


def test_the_loss_no_longer_pulls_at_the_saturation():
    # What the ranges rest on: the pull of -log σ(β Δ) per nat of Δ, at 4 / β, is a fiftieth of β
    for beta in (0.05, 1.0):
        delta = torch.tensor(4 / beta, requires_grad=True)
        (-torch.nn.functional.logsigmoid(beta * delta)).backward()
        assert -delta.grad.item() == pytest.approx(0.018 * beta, rel=0.01)


def test_alpha_of_soft_po_multiplies_sums():
    # The same α Δ with twice the nats is that of half the α: so the range falls with the length
    def pull(alpha, nats):
        delta = torch.tensor([float(nats)], requires_grad=True)
        soft_preference_loss(delta, torch.zeros(1), alpha).sum().backward()
        return delta.grad.item()

    assert pull(0.1, 40) == pytest.approx(pull(0.05, 80))


def test_range_of_ipo_is_that_of_trls_target():
    # TRL's (ipo_delta - 1 / (2 β))², ipo_delta of means per token
    finding = only(range_findings(make_plan("ipo"), 100.0), "beta_range")
    assert finding.data["target"] == 5.0
    low, high = finding.data["range"]
    assert (1 / (2 * low), 1 / (2 * high)) == (2.0, pytest.approx(0.02))


@pytest.mark.parametrize(
    ("method", "options", "tokens", "expected"),
    [
        ("dpo", {}, 100, None),  # β 0.1: 40 nats, 0.2 for each of 200 tokens
        ("dpo", {}, 15, "low"),  # 1.3 for each of 30
        ("dpo", {}, 25, None),
        ("dpo", {}, 3000, "high"),  # 0.007 for each of 6000
        ("dpo", {"beta": 0.01}, 100, "low"),
        ("dpo", {"beta": 3.0}, 100, "high"),
        ("sspo", {"beta": 3.0}, 100, "high"),
        ("stable_po", {"beta": 3.0}, 100, "high"),
        ("stable_po", {"beta": 3.0, "upper_loss": ["simpo"]}, 100, None),  # which reads another beta
        ("kto", {}, 30, "low"),  # one response: 1.3 for each of 30
        ("kto", {}, 50, None),
        ("ipo", {}, 100, "low"),
        ("ipo", {"beta": 1.0}, 100, None),
        ("ipo", {"beta": 50.0}, 100, "high"),
        ("dpo", {"loss_type": ["ipo"]}, 100, "low"),
        ("dpo", {"loss_type": ["sigmoid_norm"]}, 100, "low"),
        ("dpo", {"loss_type": ["sigmoid_norm"], "beta": 5.0}, 3000, None),  # whatever the length
        ("dpo", {"loss_type": ["sppo_hard"], "beta": 50.0}, 100, None),  # of which we have no rule
    ],
)
def test_beta(method, options, tokens, expected):
    findings = range_findings(make_plan(method, options), float(tokens))
    assert [finding.code for finding in findings] == ([] if expected is None else ["beta_range"])
    if expected is not None:
        assert findings[0].severity == "warning" and f"is {expected}" in findings[0].title
        value, (low, high) = findings[0].data["value"], findings[0].data["range"]
        assert value < low if expected == "low" else value > high


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        ({}, 100, set()),
        ({}, 3000, {"alpha_range"}),
        ({"alpha": 0.01}, 100, {"alpha_range"}),
        ({"logp_reduction": "mean"}, 100, {"alpha_range"}),
        ({"logp_reduction": "mean", "alpha": 2.0}, 3000, set()),
        ({"beta": 5.0}, 100, {"beta_range"}),
        ({"beta": 0.0}, 100, set()),
    ],
)
def test_soft_po(options, tokens, expected):
    assert set(_severities("soft_po", float(tokens), **options)) == expected


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("dpo", {"beta": 0.0}, {"beta_range": "error"}),
        ("dpo", {"beta": 50.0}, {}),  # of sums, which depend on the length
        ("kto", {"beta": 50.0}, {}),
        ("ipo", {"beta": 0.001}, {"beta_range": "warning"}),
        ("ipo", {"beta": 1.0}, {}),
        ("dpo", {"loss_type": ["sigmoid_norm"]}, {"beta_range": "warning"}),
        ("soft_po", {"alpha": 50.0}, {}),
        ("soft_po", {"logp_reduction": "mean"}, {"alpha_range": "warning"}),
        ("soft_po", {"beta": 5.0}, {"beta_range": "warning"}),
    ],
)
def test_what_needs_no_tokens(method, options, expected):
    assert _severities(method, None, **options) == expected


def test_beta_of_nothing():
    assert _severities("dpo", beta=0.0) == {"beta_range": "error"}


@pytest.mark.parametrize(
    ("parameters", "options", "expected"),
    [
        (7e9, {}, None),
        (7e9, {"learning_rate": 1e-7}, "low"),
        (7e9, {"learning_rate": 5e-5}, "high"),
        (7e9, {"use_peft": True}, "low"),  # TRL's default is that of full fine-tuning
        (7e9, {"use_peft": True, "learning_rate": 2e-5}, None),
        (7e9, {"use_peft": True, "learning_rate": 1e-3}, "high"),
        (3e5, {"learning_rate": 3e-4}, None),
        (None, {"learning_rate": 3e-4}, None),
    ],
)
def test_learning_rate(parameters, options, expected):
    findings = range_findings(make_plan("dpo", options), 100.0, parameters)
    assert [finding.code for finding in findings] == ([] if expected is None else ["learning_rate"])
    assert expected is None or f"is {expected}" in findings[0].title


def test_updates_that_get_lost():
    # Of weights of a language model's size, AdamW's first step at TRL's learning rate
    weights = 0.02 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))

    def moved(dtype, rate):
        parameter = torch.nn.Parameter(weights.to(dtype, copy=True))
        parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0).step()
        return (parameter.detach() != weights.to(dtype)).float().mean().item()

    assert moved(torch.bfloat16, 1e-6) < 0.1 and moved(torch.float32, 1e-6) > 0.99
    for options, deepspeed, expected in (
        ({"dtype": "bfloat16"}, False, True),
        ({"dtype": "bfloat16"}, True, False),
        ({"dtype": "bfloat16", "use_peft": True}, False, False),
        ({"dtype": "bfloat16", "learning_rate": 1e-3}, False, False),
        ({}, False, False),
    ):
        assert bool(precision_findings(make_plan("dpo", options), deepspeed)) == expected


def test_literal_soft_po_on_pairs_from_elsewhere():
    def found(gap, **options):
        return codes(literal_findings(make_plan("soft_po", options), gap))

    assert found(50.0, calibration="none") == {"uncalibrated_off_policy": "warning"}  # 0.1 · 50 > 4
    assert found(30.0, calibration="none") == {}
    assert found(50.0) == found(None, calibration="none") == {}
    assert found(50.0, calibration="none", alpha=0.05) == {}
    assert literal_findings(make_plan("dpo"), 50.0) == []
