# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What the trainers make of the heads: the loss, the parent's part of it, the optimizer, files and metrics."""

import math
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from trl_spo import DegreeHeads
from trl_spo.sspo import predict_degrees
from trl_spo.sspo.degree_heads import _INPUT_NORM


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
NO_WEIGHTS = {"chosen_weight": 0.0, "rejected_weight": 0.0}


def log_of(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def close(left, right, **tolerances):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerances)


def policy_of(trainer, weights_of):
    return {name: value for name, value in weights_of(trainer.model).items() if "degree_heads" not in name}


def encoding(position, size):
    numbers = []
    for j in range(size):
        angle = position / 10_000 ** ((j - j % 2) / size)
        numbers.append(math.cos(angle) if j % 2 else math.sin(angle))
    return torch.tensor(numbers)


def degree_losses(model, heads, rows, columns, num_degrees, removal="hidden_states"):
    """The degree loss of each response, from one plain forward pass of it alone. None without key content."""
    found = []
    for row, column, chosen in ((row, column, chosen) for column, chosen in columns for row in rows):
        prompt, ids, degrees = row["prompt_ids"], row[f"{column}_ids"], row[f"{column}_degrees"]
        if not any(degrees):
            found.append(None)
            continue
        total = 0.0
        for level in range(num_degrees):
            left = [not 0 < degree <= level for degree in degrees]
            if removal == "text":
                kept = [token for token, stays in zip(ids, left, strict=True) if stays]
                states = model.base_model(torch.tensor([prompt + kept])).last_hidden_state[0, len(prompt) :]
            else:
                states = model.base_model(torch.tensor([prompt + ids])).last_hidden_state[0, len(prompt) :]
                states = states[torch.tensor(left)]
            pooled = torch.stack([state + encoding(i, len(state)) for i, state in enumerate(states)]).mean(0)
            pooled = _INPUT_NORM * pooled / pooled.square().sum().sqrt()
            head = heads.chosen if chosen or heads.rejected is None else heads.rejected
            logits = F.linear(F.gelu(F.linear(pooled, head[0].weight, head[0].bias)), head[2].weight, head[2].bias)
            total += F.cross_entropy(logits, torch.tensor(level)) / num_degrees
        found.append(total)
    return found


def batch_of(trainer, rows):
    return trainer._prepare_inputs(trainer.data_collator(rows))


class TestLoss:
    @pytest.mark.parametrize("removal", ["hidden_states", "text"])
    @pytest.mark.parametrize("num_degrees", [2, 3, 4])
    def test_is_the_parents_and_the_two_degree_losses(self, make_trainer, model, removal, num_degrees, perturb):
        options = {"num_degrees": num_degrees, "removal": removal, "chosen_weight": 0.3, "rejected_weight": 0.7}
        trainer, plain = make_trainer(**options), make_trainer(**NO_WEIGHTS)
        perturb(trainer.degree_heads, scale=0.5)
        rows = list(trainer.train_dataset.select([0, 1, 2, 3, 5]))  # all of them have key content
        loss = trainer.compute_loss(trainer.model, batch_of(trainer, rows))
        parent = plain.compute_loss(plain.model, batch_of(plain, rows))
        columns = (("chosen", True), ("rejected", False))
        degree = degree_losses(model, trainer.degree_heads, rows, columns, num_degrees, removal)
        assert None not in degree
        added = sum(0.3 * x / 5 for x in degree[:5]) + sum(0.7 * x / 5 for x in degree[5:])
        torch.testing.assert_close(loss, parent + added, rtol=1e-5, atol=1e-5)
        # and its gradient in the policy and in the heads
        loss.backward()
        heads = dict(trainer.degree_heads.named_parameters())
        found = {name: parameter.grad for name, parameter in heads.items()}
        trainer.degree_heads.zero_grad()
        added.backward()
        close(found, {name: parameter.grad for name, parameter in heads.items()}, rtol=1e-3, atol=1e-5)
        parent.backward()
        plain_grads = {name: p.grad for name, p in plain.model.named_parameters()}
        for name, parameter in model.named_parameters():
            expected_grad = plain_grads[name] + (0 if parameter.grad is None else parameter.grad)
            found = trainer.model.get_parameter(name).grad
            torch.testing.assert_close(found, expected_grad, rtol=1e-3, atol=1e-5)

    def test_kto(self, make_kto_trainer, model, perturb):
        options = {"chosen_weight": 0.3, "rejected_weight": 0.7}
        trainer, plain = make_kto_trainer(**options), make_kto_trainer(**NO_WEIGHTS)
        perturb(trainer.degree_heads, scale=0.5)
        rows = list(trainer.train_dataset.select([0, 1, 3, 5, 7]))  # one desirable
        loss = trainer.compute_loss(trainer.model, batch_of(trainer, rows))
        parent = plain.compute_loss(plain.model, batch_of(plain, rows))
        expected = parent
        for row in rows:
            (degree,) = degree_losses(model, trainer.degree_heads, [row], [("completion", row["label"])], 3)
            if degree is not None:
                expected = expected + (0.3 if row["label"] else 0.7) * degree / 5
        assert expected != parent
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)

    def test_only_one_label_in_the_batch(self, make_kto_trainer):
        trainer = make_kto_trainer()
        for label in (True, False):
            rows = [row for row in trainer.train_dataset if row["label"] == label][:4]
            trainer.model.zero_grad()
            trainer.compute_loss(trainer.model, batch_of(trainer, rows)).backward()
            used, unused = (trainer.degree_heads.chosen, trainer.degree_heads.rejected)[:: 1 if label else -1]
            assert all(torch.all(p.grad == 0) for p in unused.parameters())
            assert all(p.grad.abs().max() > 0 for p in used.parameters())

    def test_responses_without_key_content(self, make_trainer, model, pairs):
        """They take part in the alignment loss only."""
        rows = pairs.to_list()
        rows[0]["chosen"], rows[2]["rejected"] = " was not with it", " . !"
        options = {"train_dataset": Dataset.from_list(rows)}
        trainer, plain = make_trainer(options), make_trainer(options, **NO_WEIGHTS)
        rows = list(trainer.train_dataset.select(range(4)))
        columns = (("chosen", True), ("rejected", False))
        degree = degree_losses(model, trainer.degree_heads, rows, columns, 3)
        assert [i for i, x in enumerate(degree) if x is None] == [0, 6]
        loss = trainer.compute_loss(trainer.model, batch_of(trainer, rows))
        parent = plain.compute_loss(plain.model, batch_of(plain, rows))
        torch.testing.assert_close(loss, parent + sum(0.2 * x / 4 for x in degree if x is not None))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch_of(trainer, rows))
        trainer.log({})
        entry = trainer.state.log_history[-1]
        assert entry["degree/empty"] == 2 / 8
        assert entry["loss/degree_chosen"] == pytest.approx(sum(degree[1:4]).item() / 3, rel=1e-5)

    def test_no_key_content_at_all(self, make_trainer, weights_of):
        data = make_trainer().train_dataset
        words = {w for name in ("chosen", "rejected") for row in data[name] for w in row.removesuffix("</s>").split()}
        trainer, plain = make_trainer(stop_words=sorted(words)), make_trainer(**NO_WEIGHTS)
        for one in (trainer, plain):
            one.train()
        assert equal(policy_of(trainer, weights_of), policy_of(plain, weights_of))
        assert log_of(trainer, "degree/empty") == [1.0, 1.0] and log_of(trainer, "degree/key_share") == [0.0, 0.0]
        assert not log_of(trainer, "degree/chosen_accuracy")

    @pytest.mark.parametrize("max_length", [6, 8])
    @pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
    def test_truncated(self, make_trainer, max_length, truncation_mode):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of keep_end
            trainer = make_trainer(max_length=max_length, truncation_mode=truncation_mode, max_steps=4)
        trainer.train()
        assert all(math.isfinite(x) for x in log_of(trainer, "loss"))
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert batch["token_degrees"].shape == batch["input_ids"].shape
        assert torch.all(batch["token_degrees"][batch["completion_mask"] == 0] == 0)


PARENTS = {
    "sigmoid": (DPOTrainer, DPOConfig, {}),
    "ipo": (DPOTrainer, DPOConfig, {"loss_type": ["ipo"]}),
    "mix": (DPOTrainer, DPOConfig, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "apo_zero_unpaired": (KTOTrainer, KTOConfig, {"loss_type": "apo_zero_unpaired"}),
}


class TestParent:
    @pytest.fixture
    def trainers(self, make_trainer, make_kto_trainer, pairs, unpaired, model_path, tmp_path):
        def make(name, **kwargs):
            trainer_class, config_class, options = PARENTS[name]
            is_kto = trainer_class is KTOTrainer
            common = {**options, "max_steps": 6, "optim": "adamw_torch", "max_grad_norm": 1.0, "learning_rate": 1e-2}
            trainer = (make_kto_trainer if is_kto else make_trainer)(**common, **kwargs)
            own = {option.name for option in fields(config_class) if option.init}
            options = {name: getattr(trainer.args, name) for name in own}
            parent = trainer_class(
                model_path,
                args=config_class(**{**options, "output_dir": str(tmp_path / "parent")}),
                train_dataset=unpaired if is_kto else pairs,
            )
            return parent, trainer

        return make

    @pytest.mark.parametrize("name", PARENTS)
    def test_weights_0_reproduce_it_step_by_step(self, trainers, weights_of, name):
        parent, trainer = trainers(name, **NO_WEIGHTS)
        steps = {id(parent): [], id(trainer): []}
        for one in (parent, trainer):

            class Record(TrainerCallback):
                def on_step_end(self, args, state, control, model, **kwargs):
                    steps[id(self.of)].append(weights_of(model))

            record = Record()
            record.of = one
            one.add_callback(record)
            one.train()
        assert len(steps[id(parent)]) == 6
        assert all(equal(a, b) for a, b in zip(steps[id(parent)], steps[id(trainer)], strict=True))
        assert log_of(parent, "loss") == log_of(trainer, "loss")
        assert trainer.degree_heads is None

    @pytest.mark.parametrize("name", PARENTS)
    def test_its_loss_is_the_alignment_loss(self, trainers, weights_of, name):
        """On the same batches in the same order; then the heads' gradient moves the policy elsewhere."""
        parent, trainer = trainers(name)
        for one in (parent, trainer):
            one.train()
        assert log_of(trainer, "loss/alignment")[0] == pytest.approx(log_of(parent, "loss")[0], rel=1e-6)
        assert log_of(trainer, "num_tokens") == log_of(parent, "num_tokens")
        assert not equal(weights_of(parent.model), policy_of(trainer, weights_of))

    def test_one_weight_0_leaves_its_head_alone(self, make_trainer, heads_of):
        trainer = make_trainer(rejected_weight=0.0, optim="adamw_torch", head_weight_decay=0.1)
        before = heads_of(trainer)
        trainer.train()
        after = heads_of(trainer)
        assert all(torch.equal(before[n], after[n]) == n.startswith("rejected") for n in before)
        assert log_of(trainer, "degree/chosen_accuracy") and not log_of(trainer, "degree/rejected_accuracy")


class TestOptimizer:
    def test_groups(self, make_trainer):
        trainer = make_trainer(
            optim="adamw_torch", weight_decay=0.3, head_weight_decay=0.07, lr_scheduler_type="linear", max_steps=4
        )
        trainer.train()
        *policy, heads = trainer.optimizer.param_groups
        assert {id(p) for p in heads["params"]} == {id(p) for p in trainer.degree_heads.parameters()}
        in_policy = {id(p) for group in policy for p in group["params"]}
        assert in_policy == {id(p) for n, p in trainer.model.named_parameters() if "degree_heads" not in n}
        assert heads["weight_decay"] == 0.07 and [group["weight_decay"] for group in policy] == [0.3, 0.0]
        assert heads["initial_lr"] == 0.5 and heads["lr"] / 0.5 == pytest.approx(policy[0]["lr"] / 0.05)
        assert log_of(trainer, "learning_rate")[0] == 0.05

    def test_one_of_the_users(self, make_trainer, model, heads_of):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = make_trainer({"model": model, "optimizers": (optimizer, None)})
        before = heads_of(trainer)
        trainer.train()
        assert [group["initial_lr"] for group in optimizer.param_groups] == [0.01, 0.5]
        assert not equal(before, heads_of(trainer))

    def test_that_takes_all_parameters(self, make_trainer, monkeypatch):
        """As GaLore and APOLLO do, whether or not they want a gradient; also when the training goes on."""

        def get(args, model=None):
            names = [name for name, _ in model.named_parameters()]
            return torch.optim.SGD, {"params": [{"params": [model.get_parameter(name) for name in names]}], "lr": 0.05}

        monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(get))
        trainer = make_trainer()
        for _ in range(2):
            trainer.train()
            policy, heads = trainer.optimizer.param_groups
            assert {id(p) for p in heads["params"]} == {id(p) for p in trainer.degree_heads.parameters()}
            assert (policy["lr"], heads["lr"]) == (0.05, 0.5) and len(policy["params"]) == 21

    def test_the_draws_of_the_heads_are_their_own(self, make_trainer):
        torch.manual_seed(3)
        first = make_trainer(seed=1).degree_heads.state_dict()
        torch.manual_seed(4)
        again, other = make_trainer(seed=1).degree_heads.state_dict(), make_trainer(seed=2).degree_heads.state_dict()
        assert equal(first, again) and not equal(first, other)
        states = []
        for options in ({}, NO_WEIGHTS):
            make_trainer(**options)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)  # e.g. of dropout

    @pytest.mark.parametrize("removal", ["hidden_states", "text"])
    def test_accumulation_is_one_large_batch(self, make_trainer, weights_of, removal, pairs):
        rows = pairs.to_list()
        rows[1]["chosen"] = " was not with it"  # without key content
        options = {"train_dataset": Dataset.from_list(rows)}
        large = make_trainer(options, per_device_train_batch_size=8, removal=removal)
        small = make_trainer(options, per_device_train_batch_size=2, gradient_accumulation_steps=4, removal=removal)
        for trainer in (large, small):
            trainer.train()
        close(weights_of(large.model), weights_of(small.model), rtol=1e-4, atol=1e-5)
        for name in ("loss/alignment", "loss/degree_chosen", "degree/chosen_accuracy", "degree/empty"):
            assert log_of(small, name) == pytest.approx(log_of(large, name), rel=1e-4)

    @pytest.mark.parametrize("removal", ["hidden_states", "text"])
    def test_gradient_checkpointing(self, make_trainer, weights_of, removal):
        plain, checkpointed = (make_trainer(gradient_checkpointing=x, removal=removal) for x in (False, True))
        for trainer in (plain, checkpointed):
            trainer.train()
        close(weights_of(plain.model), weights_of(checkpointed.model), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_low_precision(self, make_trainer, heads_of, dtype):
        trainer = make_trainer(
            bf16=True,
            model_init_kwargs={"dtype": dtype},
            optim="adamw_torch_fused",
            head_learning_rate=1e-3,
            max_grad_norm=1.0,
        )
        before = heads_of(trainer)
        trainer.train()
        assert all(p.dtype == torch.float32 for p in trainer.degree_heads.parameters())
        assert not equal(before, heads_of(trainer)) and all(math.isfinite(x) for x in log_of(trainer, "loss"))

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("removal", ["hidden_states", "text"])
    def test_lora(self, make_trainer, weights_of, checkpointing, removal):
        trainer = make_trainer(
            {"peft_config": LoraConfig(**LORA)}, gradient_checkpointing=checkpointing, removal=removal
        )
        before = weights_of(trainer.model)
        trainer.train()
        after = weights_of(trainer.model)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if "lora" in name or "degree_heads" in name}

    def test_precomputed_reference(self, make_trainer, weights_of):
        plain, precomputed = (make_trainer(precompute_ref_log_probs=x) for x in (False, True))
        for trainer in (plain, precomputed):
            trainer.train()
        close(weights_of(plain.model), weights_of(precomputed.model))

    def test_precomputed_reference_of_a_dataset_that_comes_later(self, make_trainer):
        """Its batches have the degrees in them already, which no model is to see."""
        trainer = make_trainer({"peft_config": LoraConfig(**LORA)}, precompute_ref_log_probs=True)
        seen = set()
        trainer.model.get_base_model().base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        new = trainer.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"]).select(range(3))
        assert "eval_rewards/margins" in trainer.evaluate(new)
        assert "attention_mask" in seen and not {"token_degrees", "degree_inputs"} & seen


class TestOneLevel:
    def test_is_right_in_the_mean(self, make_trainer):
        """Over the steps, the loss of a drawn level is that of all of them."""
        every, one = make_trainer(), make_trainer(degree_sampling="one")
        rows = list(one.train_dataset)
        one.model.train()  # an evaluation takes all of them
        expected = every.compute_loss(every.model, batch_of(every, rows)).item()
        found = []
        for step in range(300):
            one.state.global_step = step
            with torch.no_grad():
                found.append(one.compute_loss(one.model, batch_of(one, rows)).item())
        spread = torch.tensor(found).std().item()
        assert spread > 0 and abs(sum(found) / 300 - expected) < 4 * spread / math.sqrt(300)

    def test_an_evaluation_takes_all(self, make_trainer, pairs):
        metrics = [
            make_trainer({"eval_dataset": pairs}, degree_sampling=sampling).evaluate() for sampling in ("all", "one")
        ]
        for name in ("eval_loss", "eval_degree/chosen_accuracy", "eval_loss/degree_rejected"):
            assert metrics[0][name] == metrics[1][name]

    def test_logs_the_levels_it_has_seen(self, make_trainer):
        trainer = make_trainer(degree_sampling="one", per_device_train_batch_size=1, max_steps=8)
        trainer.train()
        for entry in trainer.state.log_history:
            if "degree/chosen_accuracy" in entry:
                (recall,) = (value for name, value in entry.items() if name.startswith("degree/chosen_recall"))
                assert recall == entry["degree/chosen_accuracy"]


class TestMetrics:
    def test_evaluation_does_not_depend_on_the_batches(self, make_trainer, pairs):
        rows = pairs.to_list()
        rows[1]["chosen"] = " was not with it"
        options = {"eval_dataset": Dataset.from_list(rows).select(range(7))}
        found = [make_trainer(options, per_device_eval_batch_size=n).evaluate() for n in (1, 3, 7)]
        names = [name for name in found[0] if "degree" in name or name == "eval_loss/alignment"]
        assert "eval_degree/rejected_recall_2" in names and "eval_loss/degree_chosen" in names
        for name in names:
            assert found[1][name] == pytest.approx(found[0][name], rel=1e-4), name
            assert found[2][name] == pytest.approx(found[0][name], rel=1e-4), name

    def test_accuracy_is_the_mean_recall(self, make_trainer, pairs):
        metrics = make_trainer({"eval_dataset": pairs}, num_degrees=4).evaluate()
        for head in ("chosen", "rejected"):
            recalls = [metrics[f"eval_degree/{head}_recall_{level}"] for level in range(4)]
            assert metrics[f"eval_degree/{head}_accuracy"] == pytest.approx(sum(recalls) / 4)

    def test_key_share(self, make_trainer, pairs):
        trainer = make_trainer({"eval_dataset": pairs})
        degrees = [
            degree for row in trainer.eval_dataset for c in ("chosen", "rejected") for degree in row[f"{c}_degrees"]
        ]
        found = trainer.evaluate()["eval_degree/key_share"]
        assert found == pytest.approx(sum(degree > 0 for degree in degrees) / len(degrees))

    def test_of_kto(self, make_kto_trainer, unpaired):
        metrics = make_kto_trainer({"eval_dataset": unpaired}, per_device_eval_batch_size=3).evaluate()
        assert {"eval_degree/chosen_accuracy", "eval_degree/rejected_recall_1", "eval_loss/alignment"} <= set(metrics)

    def test_several_evaluation_sets(self, make_trainer, pairs):
        trainer = make_trainer({"eval_dataset": {"a": pairs, "b": pairs.select(range(2))}})
        metrics = trainer.evaluate()
        assert "eval_a_degree/chosen_accuracy" in metrics and "eval_b_degree/chosen_accuracy" in metrics

    def test_compute_metrics(self, make_trainer, pairs):
        seen = []

        def compute(prediction):
            seen.append(prediction.predictions.shape[-1])
            return {"answer": 42.0}

        trainer = make_trainer({"eval_dataset": pairs, "compute_metrics": compute}, per_device_eval_batch_size=8)
        with pytest.warns(FutureWarning):
            metrics = trainer.evaluate()
        assert metrics["eval_answer"] == 42.0 and "eval_degree/chosen_accuracy" in metrics
        assert seen == [len(trainer.processing_class)]

    def test_streams(self, make_trainer, pairs, weights_of):
        whole, stream = make_trainer(), make_trainer({"train_dataset": pairs.to_iterable_dataset()})
        stream.train()
        assert all(math.isfinite(x) for x in log_of(stream, "loss/degree_chosen"))
        assert next(iter(stream.train_dataset))["chosen_degrees"] == whole.train_dataset[0]["chosen_degrees"]

    def test_conversations(self, make_trainer, conversations):
        trainer = make_trainer({"train_dataset": conversations})
        trainer.train()
        assert all(math.isfinite(x) for x in log_of(trainer, "loss/degree_chosen"))

    def test_learns(self, make_trainer, pairs):
        """The heads alone, the policy hardly moves: what they are asked can be answered."""
        trainer = make_trainer(
            {"eval_dataset": pairs},
            optim="adamw_torch",
            learning_rate=1e-6,
            head_learning_rate=2e-2,
            max_steps=150,
            per_device_train_batch_size=8,
            logging_steps=150,
        )
        before = trainer.evaluate()["eval_degree/chosen_accuracy"]
        trainer.train()
        assert trainer.evaluate()["eval_degree/chosen_accuracy"] > max(0.8, before + 0.3)


class TestFiles:
    def test_at_the_end(self, make_trainer, load_model, model_path, tmp_path, tokenizer, heads_of):
        trainer = make_trainer()
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        assert load_file(tmp_path / "final/model.safetensors").keys() == load_model(model_path).state_dict().keys()
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        heads = DegreeHeads.from_pretrained(tmp_path / "final")
        assert equal(heads.state_dict(), heads_of(trainer))
        # What they say of whole responses is what the trainer has seen
        rows = list(trainer.train_dataset)
        texts = [(row["prompt"], row["chosen"]) for row in rows]
        found = predict_degrees(model, tokenizer, heads, *zip(*texts, strict=True))
        with torch.no_grad():
            trainer.model.eval()
            batch = batch_of(trainer, rows)
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            inputs = {**batch, "levels": torch.zeros(16, 1, dtype=torch.long), "is_chosen": trainer._is_chosen(batch)}
            logits = trainer.model(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                fused_lm_head=True,
                degree_inputs=inputs,
            ).degree_logits
        torch.testing.assert_close(found.chosen, logits[:8, 0].softmax(1), rtol=1e-4, atol=1e-5)

    def test_of_an_adapter(self, make_trainer, tmp_path):
        trainer = make_trainer({"peft_config": LoraConfig(**LORA)})
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        assert not any("degree" in name for name in load_file(tmp_path / "final/adapter_model.safetensors"))
        assert DegreeHeads.from_pretrained(tmp_path / "final").config["num_degrees"] == 3
        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]

    @pytest.mark.parametrize("kind", ["full", "lora", "kto"])
    def test_resume_is_exact(self, make_trainer, make_kto_trainer, weights_of, tmp_path, kind):
        def make(name):
            make_one = make_kto_trainer if kind == "kto" else make_trainer
            return make_one(
                {"peft_config": LoraConfig(**LORA)} if kind == "lora" else None,
                output_dir=str(tmp_path / name),
                degree_sampling="one",
                optim="adamw_torch",
                max_steps=6,
                save_strategy="steps",
                save_steps=3,
            )

        whole = make("whole")
        whole.train()
        resumed = make("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
        assert equal(weights_of(whole.model), weights_of(resumed.model))
        assert log_of(whole, "loss/degree_chosen")[3:] == log_of(resumed, "loss/degree_chosen")[3:]
        again = make("whole")
        again.args.max_steps = 8
        again.train(resume_from_checkpoint=True)  # the last one in its folder
        assert again.state.global_step == 8

    def test_the_best_model_has_its_heads(self, make_trainer, pairs, weights_of, tmp_path):
        trainer = make_trainer(
            {"eval_dataset": pairs},
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            learning_rate=5.0,
            head_learning_rate=20.0,
            max_steps=4,
        )
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert best.name != "checkpoint-4"
        assert equal(DegreeHeads.from_pretrained(best).state_dict(), dict(trainer.degree_heads.named_parameters()))
        assert not equal(
            DegreeHeads.from_pretrained(best.parent / "checkpoint-4").state_dict(),
            dict(trainer.degree_heads.named_parameters()),
        )

    def test_pushed_in_between(self, make_trainer, monkeypatch, tmp_path):
        """The parent copies the files that it knows into the folder that it pushes; the Hub itself is not here."""
        trainer = make_trainer(save_strategy="steps", save_steps=1)
        trainer.train()
        seen = []
        monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: seen.append(folder))
        checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
        trainer._push_from_checkpoint(str(checkpoint))
        assert seen == [str(checkpoint)]
        for name in ("sspo_heads.json", "sspo_heads.safetensors"):
            assert (checkpoint / name).read_bytes() == (Path(trainer.args.output_dir) / name).read_bytes()

    def test_without_heads_there_are_no_files(self, make_trainer, tmp_path):
        trainer = make_trainer(**NO_WEIGHTS)
        trainer.save_model(str(tmp_path / "final"))
        assert not list((tmp_path / "final").glob("sspo_heads*"))
