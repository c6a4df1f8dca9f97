# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
The weight change of one step of gradient descent, against a derivation of its own: the equations on a float64 copy of the
model, called functionally with whatever weights, differentiated twice where they say so.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.func import functional_call
from trl import DPOConfig, DPOTrainer

from trl_spo import StablePOConfig, StablePOTrainer
from trl_spo.stable_po.stable_po_config import TRL_LOSSES


LR = 1e-2
SHARED = {
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
    "beta": 0.5,
}


@pytest.fixture
def pairs():
    return Dataset.from_list(
        [
            {"prompt": "the film", "chosen": " was a good story", "rejected": " was bad"},
            {"prompt": "a dog", "chosen": " finds home", "rejected": " and the night is a long story"},
            {"prompt": "he said", "chosen": " that the actors were great", "rejected": " nothing of the film"},
            {"prompt": "I would", "chosen": " watch it again", "rejected": " not watch it with my friends"},
        ]
    )


@pytest.fixture
def make_trainer(model_path, pairs, tmp_path):
    def make(**options):
        args = StablePOConfig(output_dir=str(tmp_path), **{**SHARED, **options})
        return StablePOTrainer(model=model_path, args=args, train_dataset=pairs)

    return make


class Derivation:
    """The equations of Stable PO on a float64 copy of the model."""

    def __init__(self, trainer, reference=None):
        self.args, self.rows = trainer.args, list(trainer.train_dataset)
        self.model = trainer.model.__class__(trainer.model.config).double()  # without TRL's fused head
        self.model.set_attn_implementation("eager")
        self.theta = {name: p.detach().double().clone() for name, p in trainer.model.named_parameters()}
        self.theta = {name: p.requires_grad_() for name, p in self.theta.items()}
        source = reference if reference is not None else trainer.ref_model
        self.reference = {name: p.detach().double() for name, p in source.named_parameters()}

    def logp(self, theta, row, which):
        ids = torch.tensor([row["prompt_ids"] + row[f"{which}_ids"]])
        logits = functional_call(self.model, theta, (ids,)).logits[0, len(row["prompt_ids"]) - 1 : -1]
        targets = ids[0, len(row["prompt_ids"]) :]
        return F.log_softmax(logits, dim=-1)[range(len(targets)), targets].sum()

    def sft(self, theta):
        total = sum(-self.logp(theta, row, "chosen") for row in self.rows)
        return total / sum(len(row["chosen_ids"]) for row in self.rows)

    def upper(self, theta):
        terms = []
        for row in self.rows:
            chosen, rejected = (self.logp(theta, row, which) for which in ("chosen", "rejected"))
            ref_chosen, ref_rejected = (
                self.logp(self.reference, row, which).detach() for which in ("chosen", "rejected")
            )
            loss = -F.logsigmoid(self.args.beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))
            if self.args.regularizer == "nll":
                loss = loss - self.args.regularizer_weight * chosen / len(row["chosen_ids"])
            elif self.args.regularizer == "floor":
                floor = (ref_chosen - chosen).clamp(min=0) / len(row["chosen_ids"])
                loss = loss + self.args.regularizer_weight * floor
            terms.append(loss)
        return torch.stack(terms).mean()

    def gradient(self, value, theta=None, **kwargs):
        theta = self.theta if theta is None else theta
        return dict(zip(theta, torch.autograd.grad(value, list(theta.values()), **kwargs), strict=True))

    def descend(self, steps, rate):
        theta = self.theta
        for _ in range(steps):
            gradient = self.gradient(self.sft(theta), theta)
            theta = {name: (p - rate * gradient[name]).detach().requires_grad_() for name, p in theta.items()}
        return theta

    def expected_step(self):
        """The change of the weights in one step of the optimizer."""
        args, rate = self.args, self.args.inner_learning_rate
        if args.bilevel == "penalty":
            anchor = self.sft(self.reference if args.penalty_anchor == "reference" else self.descend(1, rate)).detach()
            hinge = (self.sft(self.theta) - anchor - args.penalty_slack).clamp(min=0)
            outer = self.gradient(self.upper(self.theta) + args.penalty_weight * hinge)
            return {name: -LR * g for name, g in outer.items()}
        moved = self.descend(args.inner_steps, rate)
        outer = self.gradient(self.upper(moved), moved)
        if args.bilevel == "alternating":
            return {name: moved[name] - self.theta[name] - LR * outer[name] for name in outer}
        if args.hypergradient != "first_order":
            # d/dθ U(θ - η ∇L_SFT(θ)), by differentiating through the step itself
            inner = self.gradient(self.sft(self.theta), create_graph=True)
            outer = self.gradient(self.upper({name: p - rate * inner[name] for name, p in self.theta.items()}))
        return {name: -LR * g for name, g in outer.items()}


def train_and_compare(trainer, derivation):
    """Relative error of the weight change."""
    expected = derivation.expected_step()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    error = size = 0.0
    for name, parameter in trainer.model.named_parameters():
        change = (parameter.detach() - before[name]).double()
        error += (change - expected[name]).square().sum().item()
        size += expected[name].square().sum().item()
    assert size > 0
    return math.sqrt(error / size)


def away(trainer, perturb_seed=0, size=0.05):
    """Moves the policy from the reference, in the direction in which its SFT loss rises, or falls with `size < 0`."""
    derivation = Derivation(trainer)
    gradient = derivation.gradient(derivation.sft(derivation.theta))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.add_(size * gradient[name].float())


REGULARIZERS = [("none", 1.0), ("nll", 0.3), ("floor", 0.3)]


class TestPenalty:
    @pytest.mark.parametrize(("regularizer", "weight"), REGULARIZERS)
    @pytest.mark.parametrize("size", [0.1, -0.1], ids=["open", "closed"])
    def test_reference_anchor(self, make_trainer, size, regularizer, weight):
        trainer = make_trainer(penalty_weight=2.0, regularizer=regularizer, regularizer_weight=weight)
        away(trainer, size=size)
        derivation = Derivation(trainer)
        gap = derivation.sft(derivation.theta) - derivation.sft(derivation.reference)
        assert gap > 1e-3 if size > 0 else gap < -1e-3
        assert train_and_compare(trainer, derivation) < 1e-3
        assert trainer.state.log_history[0]["stable/penalty_active"] == float(size > 0)

    def test_at_the_hinge_there_is_no_penalty(self, make_trainer, weights_of):
        # The policy is the reference, and the slack above the rounding error
        plain, ours = (make_trainer(penalty_weight=w, penalty_slack=1e-5 if w else 0.0) for w in (0.0, 5.0))
        plain.train()
        ours.train()
        plain, ours = weights_of(plain.model), weights_of(ours.model)
        assert all(torch.equal(plain[name], ours[name]) for name in plain)

    def test_slack(self, make_trainer):
        trainer = make_trainer(penalty_weight=2.0, penalty_slack=10.0)
        away(trainer)
        assert train_and_compare(trainer, Derivation(trainer)) < 1e-3
        assert trainer.state.log_history[0]["stable/penalty_active"] == 0

    def test_lower_level_anchor(self, make_trainer):
        trainer = make_trainer(penalty_anchor="lower_level", penalty_weight=2.0, inner_learning_rate=0.05)
        away(trainer)
        assert train_and_compare(trainer, Derivation(trainer)) < 1e-3
        assert trainer.state.log_history[0]["stable/penalty_active"] == 1


class TestAlternating:
    @pytest.mark.parametrize(("regularizer", "weight"), REGULARIZERS)
    @pytest.mark.parametrize("steps", [1, 3])
    def test_step(self, make_trainer, steps, regularizer, weight):
        trainer = make_trainer(
            bilevel="alternating",
            inner_learning_rate=0.05,
            inner_steps=steps,
            regularizer=regularizer,
            regularizer_weight=weight,
        )
        away(trainer)
        assert train_and_compare(trainer, Derivation(trainer)) < 1e-3


class TestUnrolled:
    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize(("regularizer", "weight"), REGULARIZERS)
    @pytest.mark.parametrize(
        ("hypergradient", "steps", "tolerance"),
        [("first_order", 1, 1e-3), ("first_order", 3, 1e-3), ("exact", 1, 1e-3), ("finite_difference", 1, 1e-2)],
    )
    def test_step(self, make_trainer, hypergradient, steps, tolerance, regularizer, weight, checkpointing):
        trainer = make_trainer(
            bilevel="unrolled",
            hypergradient=hypergradient,
            inner_learning_rate=0.1,
            inner_steps=steps,
            regularizer=regularizer,
            regularizer_weight=weight,
            deploy_inner_steps=0,
            gradient_checkpointing=checkpointing,
        )
        away(trainer)
        assert train_and_compare(trainer, Derivation(trainer)) < tolerance

    def test_the_hypergradients_differ(self, make_trainer):
        """Else the test above could not tell them apart."""
        options = {"bilevel": "unrolled", "inner_learning_rate": 0.1, "deploy_inner_steps": 0}
        trainer = make_trainer(**options)
        away(trainer)
        trainer.args.hypergradient = "exact"
        derivation = Derivation(trainer)
        expected = derivation.expected_step()
        trainer.args.hypergradient = "first_order"
        derivation.expected_step = lambda: expected
        assert train_and_compare(trainer, derivation) > 0.05


class TestPlain:
    """With the lower level switched off, TRL's DPOTrainer step by step."""

    def dpo_weights(self, model_path, pairs, tmp_path, weights_of, **options):
        trainer = DPOTrainer(
            model=model_path,
            args=DPOConfig(output_dir=str(tmp_path / "dpo"), **{**SHARED, "max_steps": 3, **options}),
            train_dataset=pairs,
        )
        trainer.train()
        return weights_of(trainer.model), trainer.state.log_history

    @pytest.mark.parametrize("form", ["penalty", "alternating"])
    @pytest.mark.parametrize("loss", [*TRL_LOSSES, ("sigmoid", "sft")])
    def test_equals_dpo(self, make_trainer, model_path, pairs, tmp_path, weights_of, loss, form):
        loss = [loss] if isinstance(loss, str) else list(loss)
        options = {"label_smoothing": 0.1} if loss == ["exo_pair"] else {}
        expected, log = self.dpo_weights(model_path, pairs, tmp_path, weights_of, loss_type=loss, **options)
        form = {"penalty_weight": 0.0} if form == "penalty" else {"bilevel": "alternating", "inner_learning_rate": 1.0}
        trainer = make_trainer(upper_loss=loss, max_steps=3, **options, **form)
        if trainer.args.bilevel == "alternating":
            trainer.args.inner_learning_rate = 0.0  # refused at construction
        trainer.train()
        found = weights_of(trainer.model)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        for ours, theirs in zip(trainer.state.log_history[:-1], log[:-1], strict=True):
            shared = {"loss", "grad_norm", "logps/chosen", "logps/rejected", "entropy"}
            if loss != ["sft"]:  # which needs no reference, so that there are no rewards
                shared |= {"rewards/chosen", "rewards/margins", "rewards/accuracies"}
            assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
