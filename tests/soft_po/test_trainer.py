# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The preference loss inside of the trainer: against plain forwards, one sequence at a time, of the same models."""

import math
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from trl_spo import SoftPOConfig, SoftPOTrainer
from trl_spo.soft_po import soft_po_trainer
from trl_spo.soft_po.online_kl import OnlineKL
from trl_spo.soft_po.online_samples import OnlineSample


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def as_ranked(lists, order):
    """The lists with another order than the best one."""
    orders = {
        "ranking": [[2, 0, 1, 3], [1, 0], [0, 2, 1], [1, 2, 0]],
        "scores": [[0.5, -1.0, 2.0, 0.25], [1.0, 3.0], [2.0, 1.0, 1.5], [0.0, 1.0, 0.0]],  # the last with a tie
    }
    return lists if order == "best" else lists.remove_columns("best").add_column(order, orders[order])


def responses_of(row):
    """Token ids of the responses of a tokenized row, and their ranks."""
    if "completion_ids" in row:
        return row["completion_ids"], row["ranks"]
    return [row["chosen_ids"], row["rejected_ids"]], [0, 1]


def denominators(ranks):
    """Of each response that is preferred to any: its index, and those that it is compared with and itself."""
    for k, rank in enumerate(ranks):
        worse = [j for j, other in enumerate(ranks) if other > rank]
        if worse:
            yield k, [k, *worse]


def loss_by_hand(rows, args, policy_logps, reference_logps=None):
    """
    The mean loss of the equations of Soft PO, in plain loops; `*_logps(row, j)` are the log-probabilities of the tokens
    of response `j`.
    """

    def reduced(logps):
        return logps.sum() if args.logp_reduction == "sum" else logps.mean()

    masses, terms = [], []
    for row in rows:
        responses, ranks = responses_of(row)
        log_pi = [reduced(policy_logps(row, j)) for j in range(len(responses))]
        scores = log_pi
        if args.calibration == "reference":
            scores = [s - reduced(reference_logps(row, j)).detach() for j, s in enumerate(log_pi)]
        for k, among in denominators(ranks):
            log_p = args.alpha * scores[k] - torch.stack([args.alpha * scores[j] for j in among]).logsumexp(0)
            terms.append(-log_p / args.alpha)
            masses.append(sum(log_pi[j].detach().exp() for j in among) ** args.gamma)
    masses = torch.stack(masses)
    weights = {
        "none": torch.ones_like(masses),
        "power": masses,
        "sigmoid": 2 / (1 + torch.exp(-args.weighting_scale * (masses - masses.mean()))),
    }[args.weighting]
    return (weights * torch.stack(terms)).sum() / len(rows)


@pytest.fixture
def check_loss(token_logps):
    """Compares the loss of the trainer's first batch and its gradient with those by hand."""

    def check(trainer, reference=None, reference_logps=None):
        model = trainer.model
        batch = next(iter(trainer.get_train_dataloader()))
        by_id = {row["row_id"]: row for row in trainer.train_dataset}
        rows = [by_id[i] for i in batch["row_ids"].tolist()]
        model.train()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()

        def logps_of(model):
            return lambda row, j: token_logps(model, row["prompt_ids"], responses_of(row)[0][j])

        if reference_logps is None and reference is not None:
            reference_logps = logps_of(reference)
        expected = loss_by_hand(rows, trainer.args, logps_of(model), reference_logps)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        expected.backward()
        assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
        for name, gradient in gradients.items():
            expected_gradient = model.get_parameter(name).grad
            torch.testing.assert_close(
                gradient, expected_gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3

    return check


class TestLoss:
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("weighting", ["none", "power", "sigmoid"])
    @pytest.mark.parametrize("calibration", ["none", "reference"])
    @pytest.mark.parametrize("data", ["pairs", "best", "ranking", "scores"])
    def test_by_hand(
        self,
        make_trainer,
        check_loss,
        model_path,
        load_model,
        perturb,
        pairs,
        lists,
        data,
        calibration,
        weighting,
        reduction,
    ):
        reference = perturb(load_model(model_path)) if calibration == "reference" else None
        trainer = make_trainer(
            {"train_dataset": pairs if data == "pairs" else as_ranked(lists, data), "ref_model": reference},
            alpha=0.3,
            beta=0.0,
            gamma=0.1,
            weighting=weighting,
            weighting_scale=20.0,
            calibration=calibration,
            logp_reduction=reduction,
        )
        check_loss(trainer, reference)

    def test_pairs_are_lists_of_two(self, make_trainer, pairs):
        as_lists = Dataset.from_list(
            [
                {"prompt": p["prompt"], "completions": [p["rejected"], p["chosen"]], "ranking": [1, 0]}
                for p in pairs.to_list()
            ]
        )
        losses = []
        for dataset in (pairs, as_lists):
            trainer = make_trainer(
                {"train_dataset": dataset}, beta=0.0, calibration="none", weighting="power", gamma=0.1
            )
            losses.append(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))))
        torch.testing.assert_close(losses[0], losses[1])

    @pytest.mark.parametrize("data", ["pairs", "lists"])
    def test_conversational_with_tools(self, make_trainer, check_loss, conversations, data):
        conversations = conversations.add_column("tools", ['[{"name": "watch"}]'] * len(conversations))
        if data == "lists":
            rows = conversations.to_list()
            conversations = Dataset.from_list(
                [
                    {
                        "prompt": row["prompt"],
                        "completions": [row["rejected"], row["chosen"], rows[i - 1]["rejected"]],
                        "scores": [0.0, 2.0, 1.0],
                        "tools": row["tools"],
                    }
                    for i, row in enumerate(rows)
                ]
            )
        trainer = make_trainer({"train_dataset": conversations}, beta=0.0, calibration="none")
        assert "tools" in trainer.train_dataset.column_names
        check_loss(trainer)

    @pytest.mark.parametrize(
        "architecture", ["llama-tied", "gemma2-softcapping", "cohere-logit-scale", "phi-head-bias"]
    )
    def test_other_architectures(self, make_trainer, check_loss, model_paths, architecture):
        trainer = make_trainer({"model": model_paths(architecture)}, beta=0.0, calibration="none")
        check_loss(trainer)

    def test_truncated(self, make_trainer, pairs, token_logps):
        # At most eight tokens of prompt and response count
        trainer = make_trainer(beta=0.0, calibration="none", max_length=8, max_completion_length=1)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["input_ids"].shape == (8, 8)
        by_id = {row["row_id"]: row for row in trainer.train_dataset}
        rows = [by_id[i] for i in batch["row_ids"].tolist()]

        def logps(row, j):
            return token_logps(trainer.model, row["prompt_ids"], responses_of(row)[0][j][: 8 - len(row["prompt_ids"])])

        assert any(len(row["prompt_ids"] + row["rejected_ids"]) > 8 for row in rows)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        torch.testing.assert_close(loss, loss_by_hand(rows, trainer.args, logps), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("precompute", [False, True])
    def test_the_model_is_given_what_it_knows_only(self, make_trainer, request, precompute):
        # Others it would swallow without a word
        reference = make_trainer().ref_model
        names = set()

        def watch(model):
            model.base_model.register_forward_pre_hook(
                lambda module, args, kwargs: names.update(kwargs), with_kwargs=True
            )

        watch(reference)
        for data in ("pairs",) if precompute else ("pairs", "lists"):
            dataset = request.getfixturevalue(data)
            arguments = {"train_dataset": dataset, "eval_dataset": dataset, "ref_model": reference}
            trainer = make_trainer(arguments, precompute_ref_log_probs=precompute, calibration="reference")
            watch(trainer.model)
            trainer.train()
            trainer.evaluate()
        assert names >= {"input_ids", "attention_mask"}
        in_generation = {"inputs_embeds", "past_key_values", "position_ids", "cache_position"}
        assert names <= {"input_ids", "attention_mask", "use_cache"} | in_generation

    @pytest.mark.parametrize("weighting", ["none", "power", "sigmoid"])
    def test_default_reference_is_the_initial_policy(
        self, make_trainer, check_loss, model_path, load_model, weighting
    ):
        trainer = make_trainer(beta=0.0, calibration="reference", weighting=weighting, max_steps=2)
        trainer.train()
        check_loss(trainer, load_model(model_path))


class TestMixtureOfExperts:
    def test_auxiliary_loss(self, make_trainer, train_log, model_paths):
        # In each micro-batch the router's loss of its own tokens, and in the log its mean
        logs = [
            train_log(
                make_trainer(
                    {"model": model_paths("mixtral-experts")},
                    router_aux_loss_coef=coefficient,
                    max_steps=1,
                    per_device_train_batch_size=2,
                    gradient_accumulation_steps=2,
                )
            )[0]
            for coefficient in (0.0, 0.5)
        ]
        assert "aux_loss" not in logs[0] and logs[1]["aux_loss"] > 0.5
        assert logs[1]["loss"] == pytest.approx(logs[0]["loss"] + 0.5 * logs[1]["aux_loss"], rel=1e-5)

    def test_auxiliary_loss_by_hand(self, make_trainer, model_paths):
        trainer = make_trainer({"model": model_paths("mixtral-experts")}, router_aux_loss_coef=0.5, beta=0.0)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        auxiliary = trainer.model(**inputs, output_router_logits=True).aux_loss
        loss = trainer.compute_loss(trainer.model, batch)
        preference = trainer._totals["train"].pop()["loss/preference"]
        assert loss.item() == pytest.approx(preference + 0.5 * auxiliary.item(), rel=1e-5)


class TestPrecomputedReference:
    @pytest.mark.parametrize("beta", [0.0, 0.1])
    def test_by_hand(self, make_trainer, check_loss, model_path, load_model, perturb, beta):
        reference = perturb(load_model(model_path))
        kwargs = {
            "precompute_ref_log_probs": True,
            "calibration": "reference",
            "beta": beta,
            "precompute_ref_batch_size": 3,
        }
        trainer = make_trainer({"ref_model": reference}, **kwargs)
        assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.train_dataset.column_names)
        check_loss(trainer, reference)

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_same_as_on_the_fly(self, make_trainer, train_log, weights_of, reduction):
        finals, logs = [], []
        for precompute in (False, True):
            trainer = make_trainer(
                precompute_ref_log_probs=precompute,
                calibration="reference",
                beta=0.1,
                logp_reduction=reduction,
                max_steps=4,
            )
            logs.append(train_log(trainer))
            finals.append(weights_of(trainer.model))
        for name, weight in finals[0].items():
            torch.testing.assert_close(finals[1][name], weight, rtol=1e-4, atol=1e-5)
        for name, value in logs[0][-1].items():
            if name != "epoch":
                assert logs[1][-1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert abs(logs[0][-1]["rewards/margins"]) > 1e-2

    def test_no_reference_is_kept_without_the_regularizer(self, make_trainer, train_log):
        trainer = make_trainer(precompute_ref_log_probs=True, calibration="reference", beta=0.0)
        assert trainer.ref_model is None
        assert train_log(trainer)[-1]["rewards/margins"] != 0

    def test_no_forward_of_the_reference_on_the_pairs(self, make_trainer):
        trainer = make_trainer(precompute_ref_log_probs=True, calibration="reference", beta=0.1, resample_steps=8)
        count = count_forwards(trainer.ref_model)
        trainer.train()
        assert len(count) == 1  # the online samples'

    def test_peft(self, make_trainer, check_loss, model_path, load_model, perturb):
        trainer = make_trainer({"peft_config": LoraConfig(**LORA)}, precompute_ref_log_probs=True, beta=0.0)
        perturb(trainer.model, only_trainable=True)
        check_loss(trainer, load_model(model_path))


def count_forwards(model):
    """A list that grows by the number of sequences at each forward of the model's backbone."""
    calls = []
    model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(len(output.last_hidden_state)), with_kwargs=True
    )
    return calls


class TestReference:
    """No reference where none is needed, none that runs more often than needed, and none that moves."""

    def test_none_without_regularizer_and_calibration(self, make_trainer, train_log):
        trainer = make_trainer(beta=0.0, calibration="none")
        assert trainer.ref_model is None
        assert "kl/online" not in train_log(trainer)[-1]

    def test_model_that_was_never_saved(self, make_trainer, train_log, tokenizer):
        # `DPOTrainer` would look for its reference on the Hub, and fail
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer)
        )
        trainer = make_trainer({"model": LlamaForCausalLM(config)}, beta=0.0, calibration="none")
        assert trainer.ref_model is None
        assert len(train_log(trainer)) == 2

    def test_loading_is_as_before_afterwards(self, make_trainer):
        make_trainer(beta=0.0, calibration="none")
        assert make_trainer(beta=0.1, calibration="none").ref_model is not None

    @pytest.mark.parametrize("resample_steps", [1, 2, 4])
    def test_runs_once_per_resampling(self, make_trainer, resample_steps):
        trainer = make_trainer(
            beta=0.1,
            calibration="none",
            resample_steps=resample_steps,
            max_steps=4,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            online_samples_per_step=3,
        )
        count = count_forwards(trainer.ref_model)
        trainer.train()
        assert count == [3] * (4 // resample_steps)

    def test_runs_on_no_more_sequences_at_once_than_a_batch_has(self, make_trainer):
        trainer = make_trainer(
            calibration="none",
            resample_steps=8,
            online_samples_per_step=7,
            online_buffer_size=14,
            per_device_train_batch_size=2,
            max_completion_length=1,
            max_steps=1,
        )
        reference, policy = count_forwards(trainer.ref_model), count_forwards(trainer.model)
        trainer.train()
        assert reference == [4, 4, 4, 2]
        # Sampling, the log-probabilities of what was drawn, the pairs, and then the KL with its smaller graph
        assert policy == [14, 4, 4, 4, 2, 4, 4, 3]

    def test_runs_on_the_pairs_if_calibrated(self, make_trainer):
        trainer = make_trainer(beta=0.0, calibration="reference", max_steps=2, gradient_accumulation_steps=2)
        count = count_forwards(trainer.ref_model)
        trainer.train()
        assert count == [8] * 4

    @pytest.mark.parametrize("estimator", ["token", "score"])
    def test_does_not_move(self, make_trainer, weights_of, estimator):
        trainer = make_trainer(beta=0.5, calibration="reference", kl_estimator=estimator, max_steps=3)
        before = weights_of(trainer.ref_model)
        policy = weights_of(trainer.model)
        assert all(torch.equal(before[name], policy[name]) for name in before)
        trainer.train()
        after, policy = weights_of(trainer.ref_model), weights_of(trainer.model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any(torch.equal(before[name], policy[name]) for name in before)
        assert not any(parameter.grad is not None for parameter in trainer.ref_model.parameters())


@pytest.fixture
def make_adapted(load_model, perturb):
    """Makes a model with an adapter that was trained before."""

    def make(path, **kwargs):
        torch.manual_seed(0)
        model = get_peft_model(load_model(path), LoraConfig(**{**LORA, **kwargs}))
        return perturb(model, only_trainable=True)

    return make


def adapters_at_work(trainer):
    """A list that grows by the active adapters of the first layer at each forward of the backbone, `[]` if disabled."""
    states = []
    base = trainer.model.get_base_model()
    layer = base.base_model.layers[0].self_attn.q_proj
    base.base_model.register_forward_hook(
        lambda *args: states.append([] if layer.disable_adapters else list(layer.active_adapters))
    )
    return states


class TestPeft:
    def test_fresh_adapter(self, make_trainer, check_loss, train_log, model_path, load_model, weights_of):
        trainer = make_trainer(
            {"peft_config": LoraConfig(**LORA)},
            calibration="reference",
            max_steps=4,
            resample_steps=1,
            learning_rate=1.0,
        )
        assert trainer.ref_model is None and set(trainer.model.peft_config) == {"default"}
        before = weights_of(trainer.model)
        log = train_log(trainer)
        assert log[0]["kl/online"] == 0 and log[0]["rewards/chosen"] == 0
        assert log[-1]["kl/online"] > 1e-4 and log[-1]["rewards/chosen"] != 0
        after = weights_of(trainer.model)
        for name in before:
            assert torch.equal(before[name], after[name]) == ("lora_" not in name), name
        check_loss(trainer, load_model(model_path))

    def test_trained_adapter(self, make_trainer, make_adapted, check_loss, train_log, model_path, weights_of):
        # The reference is the adapter as it came, not the base model
        trainer = make_trainer(
            {"model": make_adapted(model_path)},
            calibration="reference",
            max_steps=4,
            resample_steps=1,
            learning_rate=0.2,
        )
        assert trainer.ref_model is None and set(trainer.model.peft_config) == {"default", "ref"}
        before = weights_of(trainer.model)
        log = train_log(trainer)
        assert log[0]["kl/online"] == 0 and log[0]["rewards/chosen"] == 0
        assert log[-1]["kl/online"] > 1e-4 and log[-1]["rewards/chosen"] != 0
        after = weights_of(trainer.model)
        for name in before:
            moved = "lora_" in name and ".default." in name
            assert torch.equal(before[name], after[name]) == (not moved), name
            if moved:
                assert torch.equal(before[name], before[name.replace(".default.", ".ref.")])
        assert trainer.model.active_adapter == "default"
        check_loss(trainer, make_adapted(model_path))

    @pytest.mark.parametrize("trained", [False, True])
    def test_head_in_modules_to_save(self, make_trainer, make_adapted, train_log, model_path, trained):
        if trained:
            peft = {"model": make_adapted(model_path, modules_to_save=["lm_head"])}
        else:
            peft = {"peft_config": LoraConfig(**LORA, modules_to_save=["lm_head"])}
        trainer = make_trainer(peft, max_steps=4, resample_steps=1)
        head = trainer.model.get_base_model().lm_head
        reference_head = head.modules_to_save["ref"].weight if trained else head.original_module.weight
        before = reference_head.clone()
        log = train_log(trainer)
        assert log[0]["kl/online"] == 0
        assert log[-1]["kl/online"] > 1e-4
        assert torch.equal(reference_head, before)
        assert not torch.equal(head.modules_to_save["default"].weight, before)
        torch.testing.assert_close(trainer.online_kl._reference_head.weight, before, rtol=0, atol=0)

    @pytest.mark.parametrize("trained", [False, True])
    def test_when_the_reference_runs(self, make_trainer, make_adapted, model_path, trained):
        peft = {"model": make_adapted(model_path)} if trained else {"peft_config": LoraConfig(**LORA)}
        trainer = make_trainer(peft, calibration="none", resample_steps=2, max_steps=4)
        states = adapters_at_work(trainer)
        trainer.train()
        reference = ["ref"] if trained else []
        assert states.count(reference) == 2
        assert states.count(["default"]) == len(states) - 2

    @pytest.mark.parametrize("trained", [False, True])
    def test_the_reference_does_not_run_without_need(self, make_trainer, make_adapted, model_path, trained):
        peft = {"model": make_adapted(model_path)} if trained else {"peft_config": LoraConfig(**LORA)}
        trainer = make_trainer(peft, calibration="none", beta=0.0)
        states = adapters_at_work(trainer)
        trainer.train()
        assert states == [["default"]] * 2

    def test_explicit_reference(self, make_trainer, check_loss, weights_of, model_path, load_model, perturb):
        reference = perturb(load_model(model_path))
        trainer = make_trainer(
            {"peft_config": LoraConfig(**LORA), "ref_model": reference}, calibration="reference", resample_steps=8
        )
        count = count_forwards(reference)
        before = weights_of(reference)
        trainer.train()
        assert len(count) == 3  # the pairs of two steps, the online samples of one
        assert all(torch.equal(before[name], weight) for name, weight in weights_of(reference).items())
        check_loss(trainer, reference)

    def test_model_that_was_never_saved(self, make_trainer, train_log, tokenizer):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer)
        )
        trainer = make_trainer({"model": LlamaForCausalLM(config), "peft_config": LoraConfig(**LORA)})
        assert train_log(trainer)[0]["kl/online"] == 0

    def test_saved_adapter(self, make_trainer, load_model, model_path, make_adapted, tmp_path):
        trainer = make_trainer({"model": make_adapted(model_path)})
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        loaded = PeftModel.from_pretrained(load_model(model_path), str(tmp_path / "adapter"))
        ids = torch.tensor([[1, 20, 30]])
        trainer.model.eval()
        torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)


def given_samples(trainer, monkeypatch):
    """Lets the trainer take the same completions whatever the model."""

    def sample(model, prompts, *seed):
        generator = torch.Generator().manual_seed(sum(seed))
        samples = []
        for row_id, ids in prompts:
            length = int(torch.randint(1, 6, (), generator=generator))
            samples.append(
                OnlineSample(
                    row_id, ids, torch.randint(8, 90, (length,), generator=generator).tolist(), terminated=False
                )
            )
        return samples

    monkeypatch.setattr(trainer.sampler, "sample", sample)


def assert_same_logs(logs, others, rel=1e-4, ignored=("epoch",)):
    assert len(logs) == len(others)
    for entry, other in zip(logs, others, strict=True):
        assert entry.keys() == other.keys()
        for name, value in entry.items():
            if name not in ignored:
                assert other[name] == pytest.approx(value, rel=rel, abs=1e-5), name


class TestGradientAccumulation:
    def run(self, make_trainer, train_log, weights_of, monkeypatch=None, dataset=None, **kwargs):
        # Batches are made of other rows, so where one run has more than one batch, the order must be the dataset's
        trainer = make_trainer(
            {} if dataset is None else {"train_dataset": dataset},
            **{"max_steps": 3, "train_sampling_strategy": "sequential", "resample_steps": 2, **kwargs},
        )
        if monkeypatch is not None:
            given_samples(trainer, monkeypatch)
        steps = []

        class Record(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                steps.append(weights_of(trainer.model))

        trainer.add_callback(Record())
        return train_log(trainer), steps

    def check(self, whole, parts, ignored=("epoch",)):
        assert_same_logs(whole[0], parts[0], ignored=ignored)
        for step, other in zip(whole[1], parts[1], strict=True):
            for name, weight in step.items():
                torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("samples", ["given", "drawn"])
    @pytest.mark.parametrize("weighting", ["none", "power", "sigmoid"])
    def test_pairs(self, make_trainer, train_log, weights_of, monkeypatch, weighting, samples):
        kwargs = {"weighting": weighting, "gamma": 0.1, "weighting_scale": 20.0, "learning_rate": 0.01}
        monkeypatch = monkeypatch if samples == "given" else None
        whole, parts = (
            self.run(
                make_trainer,
                train_log,
                weights_of,
                monkeypatch,
                per_device_train_batch_size=8 // n,
                gradient_accumulation_steps=n,
                **kwargs,
            )
            for n in (1, 8)
        )
        self.check(whole, parts)
        assert whole[0][-1]["kl/online"] > 1e-4
        if weighting != "none":
            assert whole[0][0]["weights/ess"] < 0.999

    @pytest.mark.parametrize("order", ["best", "ranking", "scores"])
    @pytest.mark.parametrize("weighting", ["none", "power", "sigmoid"])
    def test_lists(self, make_trainer, train_log, weights_of, lists, weighting, order):
        whole, parts = (
            self.run(
                make_trainer,
                train_log,
                weights_of,
                dataset=as_ranked(lists, order),
                per_device_train_batch_size=4 // n,
                gradient_accumulation_steps=n,
                weighting=weighting,
                gamma=0.1,
                weighting_scale=20.0,
                learning_rate=0.01,
            )
            for n in (1, 4)
        )
        self.check(whole, parts)

    @pytest.mark.slow
    @pytest.mark.parametrize("samples", [1, 3, 11])
    @pytest.mark.parametrize("estimator", ["token", "score"])
    def test_samples_do_not_divide_by_the_micro_batches(self, make_trainer, train_log, weights_of, samples, estimator):
        whole, parts = (
            self.run(
                make_trainer,
                train_log,
                weights_of,
                per_device_train_batch_size=8 // n,
                gradient_accumulation_steps=n,
                online_samples_per_step=samples,
                kl_estimator=estimator,
                learning_rate=0.01,
            )
            for n in (1, 8)
        )
        self.check(whole, parts)
        assert ("kl/estimator_std" in whole[0][0]) == (samples > 1)

    @pytest.mark.parametrize("weighting", ["none", "sigmoid"])
    def test_last_incomplete_step(self, make_trainer, train_log, weights_of, weighting):
        # Eight rows in batches of two, three to a step: the second step of each pass has one
        whole, parts = (
            self.run(
                make_trainer,
                train_log,
                weights_of,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=6 // batch_size,
                weighting=weighting,
                gamma=0.1,
                weighting_scale=20.0,
                learning_rate=0.01,
            )
            for batch_size in (6, 2)
        )
        self.check(whole, parts)

    def test_metrics_of_a_last_batch_that_is_smaller(self, make_trainer, train_log, weights_of):
        # 3 + 3 + 2 rows: the loss is the mean of the batches' means, as everywhere in TRL, but no metric loses a row
        whole, parts = (
            self.run(
                make_trainer,
                train_log,
                weights_of,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=n,
                max_steps=1,
            )
            for batch_size, n in ((8, 1), (3, 3))
        )
        assert_same_logs(whole[0], parts[0], ignored=("epoch", "loss", "grad_norm"))

    def test_logged_loss_is_that_of_both_terms(self, make_trainer, train_log):
        for entry in train_log(
            make_trainer(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        ):
            assert entry["loss"] == pytest.approx(entry["loss/preference"] + entry["loss/kl"], rel=1e-5)


class TestPrecisionAndMemory:
    @pytest.mark.parametrize("estimator", ["token", "score"])
    @pytest.mark.parametrize("peft", [False, True])
    def test_gradient_checkpointing_is_exact(self, make_trainer, train_log, weights_of, estimator, peft):
        finals, logs = [], []
        for checkpointing in (False, True):
            trainer = make_trainer(
                {"peft_config": LoraConfig(**LORA)} if peft else {},
                gradient_checkpointing=checkpointing,
                kl_estimator=estimator,
                max_steps=3,
            )
            logs.append(train_log(trainer))
            finals.append(weights_of(trainer.model))
            assert trainer.model.is_gradient_checkpointing == checkpointing  # sampling has put it back
        assert_same_logs(*logs)
        for name, weight in finals[0].items():
            torch.testing.assert_close(finals[1][name], weight, rtol=1e-4, atol=1e-5)

    def test_checkpointing_is_the_default(self):
        assert SoftPOConfig(output_dir="unused", use_cpu=True, bf16=False).gradient_checkpointing

    def test_checkpointing_is_at_work_in_both_passes(self, make_trainer):
        calls = {False: 0, True: 0}
        for checkpointing in (False, True):

            def count(*args, checkpointing=checkpointing):
                calls[checkpointing] += torch.is_grad_enabled()

            trainer = make_trainer(gradient_checkpointing=checkpointing, max_steps=1)
            trainer.model.model.layers[0].self_attn.register_forward_hook(count)
            trainer.train()
        # Each of the two backward passes, of the pairs and of the online samples, ran the layer again
        assert calls == {False: 2, True: 4}

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_bf16(self, make_trainer, train_log, checkpointing):
        exact = train_log(make_trainer(max_steps=2))
        for entry, expected in zip(
            train_log(make_trainer(bf16=True, gradient_checkpointing=checkpointing, max_steps=2)), exact, strict=True
        ):
            assert entry["logps/chosen"] == pytest.approx(expected["logps/chosen"], rel=0.05)
            assert math.isfinite(entry["loss"]) and entry["kl/online"] >= 0

    def test_bf16_weights(self, make_trainer, train_log):
        log = train_log(make_trainer(bf16=True, model_init_kwargs={"dtype": "bfloat16"}, max_steps=2))
        assert log[0]["kl/online"] == pytest.approx(0, abs=1e-3) and math.isfinite(log[1]["loss"])

    @pytest.mark.skipif(
        not torch.accelerator.is_available(), reason="TRL's activation offloading wants an accelerator"
    )
    @pytest.mark.parametrize("peft", [False, True])
    def test_activation_offloading(self, make_trainer, train_log, weights_of, peft):
        finals = []
        for offloading in (False, True):
            trainer = make_trainer(
                {"peft_config": LoraConfig(**LORA)} if peft else {},
                activation_offloading=offloading,
                max_steps=2,
                use_cpu=False,
            )
            trainer.train()
            finals.append(weights_of(trainer.model))
        for name, weight in finals[0].items():
            torch.testing.assert_close(finals[1][name], weight)

    def test_both_passes_offload_their_activations(self, make_trainer):
        # One after the other: TRL's context manager cannot be nested
        trainer = make_trainer(max_steps=2)
        entered = []

        @contextmanager
        def context():
            entered.append("in")
            yield
            entered.append("out")

        class Reentered:
            def __enter__(self):
                self.context = context()
                return self.context.__enter__()

            def __exit__(self, *exception):
                return self.context.__exit__(*exception)

        trainer.maybe_activation_offload_context = Reentered()
        trainer.train()
        assert entered == ["in", "out"] * 4


class TestWarnings:
    def test_pairs_that_look_off_policy(self, make_trainer, caplog):
        make_trainer(calibration="none", alpha=1.0, max_steps=2).train()
        assert caplog.text.count("The pairs look off-policy") == 1
        assert "Use `calibration='reference'`" in caplog.text

    def test_weights_that_vanish(self, make_trainer, caplog):
        make_trainer(weighting="power", gamma=1.0, max_steps=2).train()
        assert caplog.text.count("The weights of the pairs are") == 1
        assert "Use a smaller `gamma`" in caplog.text

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"calibration": "none", "alpha": 0.01},
            {"calibration": "reference", "alpha": 1.0},
            {"weighting": "power", "gamma": 0.01},
            {"weighting": "sigmoid", "gamma": 1.0},
        ],
    )
    def test_no_warning(self, make_trainer, caplog, kwargs):
        make_trainer(**kwargs).train()
        assert "off-policy" not in caplog.text and "weights of the pairs" not in caplog.text


class TestConstruction:
    def test_default_arguments(self, make_args, model_path, pairs, tmp_path, monkeypatch):
        # The config's own defaults want a GPU
        monkeypatch.setattr(soft_po_trainer, "SoftPOConfig", lambda output_dir: make_args(output_dir=output_dir))
        monkeypatch.chdir(tmp_path)
        trainer = SoftPOTrainer(model=model_path, train_dataset=pairs)
        assert trainer.args.output_dir == model_path.split("/")[-1] + "-SoftPO"
        assert trainer.processing_class.eos_token == "</s>"

    def test_sample_buffer_only_with_the_regularizer(self, make_trainer):
        assert isinstance(make_trainer().online_kl, OnlineKL)
        assert not hasattr(make_trainer(beta=0.0), "online_kl")

    def test_compute_metrics_gets_logits(self, make_trainer, pairs, tokenizer):
        seen = {}

        def compute_metrics(prediction):
            seen["shape"] = prediction.predictions.shape
            return {"mine": 1.5}

        trainer = make_trainer({"eval_dataset": pairs, "compute_metrics": compute_metrics}, eval_online_samples=4)
        assert trainer.evaluate()["eval_mine"] == 1.5
        assert seen["shape"][0] == 16 and seen["shape"][2] == len(tokenizer)

    def test_own_data_collator(self, make_trainer, train_log):
        trainer = make_trainer()
        calls = []

        def collate(examples):
            calls.append(len(examples))
            return {k: v for k, v in trainer.data_collator(examples).items() if k != "row_ids"}

        # Without row ids too
        log = train_log(make_trainer({"data_collator": collate}))
        assert calls[:2] == [4, 4] and log == train_log(make_trainer())
