# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What stands around the step: the reference, the batches, the way back, checkpoints, evaluation and metrics."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
UNROLLED = {"bilevel": "unrolled", "inner_learning_rate": 0.1}
ALTERNATING = {"bilevel": "alternating", "inner_learning_rate": 0.1}
LOWER_LEVEL = {"penalty_anchor": "lower_level", "inner_learning_rate": 0.1}
FORMS = {"penalty": {}, "lower_level": LOWER_LEVEL, "alternating": ALTERNATING, "unrolled": UNROLLED}


def equal(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def log_of(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class TestReference:
    @pytest.mark.parametrize("upper_loss", ["cpo", "simpo", "sft"])
    def test_none_if_nothing_reads_it(self, make_trainer, upper_loss):
        trainer = make_trainer(upper_loss=upper_loss, **ALTERNATING)
        assert trainer.ref_model is None
        trainer.train()
        assert not log_of(trainer, "logps/chosen_change")

    def test_the_anchor_needs_it(self, make_trainer):
        trainer = make_trainer(upper_loss="simpo")
        sizes = []
        trainer.ref_model.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        trainer.train()
        assert sizes == [4, 4]  # of the chosen responses only

    def test_one_forward_for_loss_and_anchor(self, make_trainer):
        trainer = make_trainer()
        sizes = []
        trainer.ref_model.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        trainer.train()
        assert sizes == [8, 8]

    @pytest.mark.parametrize("form", FORMS)
    def test_precomputed(self, make_trainer, weights_of, form):
        plain, precomputed = (make_trainer(precompute_ref_log_probs=x, **FORMS[form]) for x in (False, True))
        plain.train()
        precomputed.train()
        plain, precomputed = weights_of(plain.model), weights_of(precomputed.model)
        for name in plain:
            torch.testing.assert_close(plain[name], precomputed[name])

    def test_change_against_the_start_without_a_reference_in_the_loss(self, make_trainer):
        trainer = make_trainer(upper_loss="simpo", precompute_ref_log_probs=True, **ALTERNATING)
        assert trainer.ref_model is None
        trainer.train()
        first, second = log_of(trainer, "logps/chosen_change")
        assert first != 0 and second != first  # the alternating form moves before the first outer step

    def test_frozen_under_peft(self, make_trainer, weights_of):
        trainer = make_trainer({"peft_config": LoraConfig(**LORA)}, **ALTERNATING)
        before = weights_of(trainer.model)
        trainer.train()
        after = weights_of(trainer.model)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and all("lora" in name for name in moved)


class TestBatches:
    @pytest.mark.parametrize("form", ["alternating", "unrolled"])
    def test_accumulation_is_one_large_batch(self, make_trainer, weights_of, form):
        """One inner step for each step of the optimizer, on all of its pairs."""
        large = make_trainer(per_device_train_batch_size=8, **FORMS[form])
        small = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, **FORMS[form])
        for trainer in (large, small):
            trainer.train()
        expected, found = weights_of(large.model), weights_of(small.model)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
        assert log_of(small, "stable/sft_gain") == pytest.approx(log_of(large, "stable/sft_gain"), rel=1e-3)

    def test_an_inner_step_for_each_micro_batch_would_differ(self, make_trainer, weights_of):
        large = make_trainer(per_device_train_batch_size=8, max_steps=1, **ALTERNATING)
        small = make_trainer(per_device_train_batch_size=2, max_steps=4, **ALTERNATING)
        for trainer in (large, small):
            trainer.train()
        expected, found = weights_of(large.model), weights_of(small.model)
        assert any((found[name] - expected[name]).abs().max() > 1e-3 for name in expected)


class Interrupt(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_substep_end(self, args, state, control, **kwargs):
        raise self.error


class TestWayBack:
    @pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
    @pytest.mark.parametrize("where", ["forward", "between"])
    def test_weights_are_restored_bit_for_bit(self, make_trainer, weights_of, monkeypatch, error, where):
        trainer = make_trainer(gradient_accumulation_steps=2, **UNROLLED)
        before = weights_of(trainer.model)
        if where == "between":
            trainer.add_callback(Interrupt(error))
        else:

            def fail(*args):
                assert not equal(before, weights_of(trainer.model))  # in the middle of it
                raise error

            monkeypatch.setattr(trainer, "_trl_loss", fail)
        with pytest.raises(type(error)):
            trainer.train()
        assert equal(before, weights_of(trainer.model))
        assert not trainer.inner.is_away

    @pytest.mark.parametrize("steps", [0, 1])
    def test_a_file_written_half_way_is_not_half_way(self, make_trainer, weights_of, tmp_path, steps):
        """`save_model` from a callback between two micro-batches."""
        trainer = make_trainer(gradient_accumulation_steps=2, max_steps=1, **UNROLLED, deploy_inner_steps=steps)
        before = weights_of(trainer.model)
        trainer.save_model(str(tmp_path / "start"))

        class Save(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                assert not equal(before, weights_of(trainer.model))
                trainer.save_model(str(tmp_path / "half"))
                assert not equal(before, weights_of(trainer.model))

        trainer.add_callback(Save())
        trainer.train()
        start, half = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "half"))
        assert equal(half, start) and equal(half, before) == (steps == 0)


class TestDeployment:
    def test_deploying_theta_is_worse(self, make_trainer):
        """So that nobody "simplifies" it: the solution of the unrolled problem is θ', and θ drifts away from it."""
        options = {"max_steps": 60, "learning_rate": 0.3, **UNROLLED, "logging_steps": 60, "deploy_inner_steps": 0}
        trainer = make_trainer(**options)

        def sft_loss(steps):
            trainer.args.deploy_inner_steps = steps  # two are all eight pairs
            return trainer.evaluate(trainer.train_dataset)["eval_stable/sft_loss"]

        untrained = sft_loss(0) - sft_loss(2)
        trainer.train()
        assert sft_loss(0) - sft_loss(2) > 1.5 * untrained > 0.1

    def test_callbacks_at_the_end_see_what_is_deployed(self, make_trainer, weights_of):
        seen = {}

        class Upload(TrainerCallback):
            def on_train_end(self, args, state, control, model, **kwargs):
                seen.update(weights_of(model))

        trainer = make_trainer({"callbacks": [Upload()]}, **UNROLLED)
        theta = make_trainer(**UNROLLED, deploy_inner_steps=0)
        for one in (trainer, theta):
            one.train()
        assert equal(seen, weights_of(trainer.model)) and not equal(seen, weights_of(theta.model))

    def test_interrupted_on_the_way(self, make_trainer, weights_of, monkeypatch):
        """Ctrl-C between the last steps leaves θ, from which the deployment can be taken again."""
        options = {**UNROLLED, "deploy_inner_steps": 2}
        whole, theta = make_trainer(**options), make_trainer(**UNROLLED, deploy_inner_steps=0)
        for one in (whole, theta):
            one.train()
        trainer = make_trainer(**options)
        batches = trainer._deployment_batches

        def interrupted():
            yield next(batches())
            raise KeyboardInterrupt

        monkeypatch.setattr(trainer, "_deployment_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert equal(weights_of(theta.model), weights_of(trainer.model)) and not trainer.inner.is_away
        monkeypatch.setattr(trainer, "_deployment_batches", batches)
        trainer._deploy_for_good()
        assert equal(weights_of(whole.model), weights_of(trainer.model))

    @pytest.mark.parametrize("hypergradient", ["first_order", "exact"])
    def test_evaluation_in_the_middle_of_a_step(self, make_trainer, pairs, weights_of, hypergradient):
        class Evaluate(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                trainer.evaluate()
                trainer.model.train()

        options = {**UNROLLED, "gradient_accumulation_steps": 2, "hypergradient": hypergradient}
        options.pop("inner_learning_rate")  # so that what "auto" came to is not overwritten
        plain, trainer = (make_trainer({"eval_dataset": pairs}, inner_step_fraction=0.05, **options) for _ in range(2))
        trainer.add_callback(Evaluate())
        for one in (plain, trainer):
            one.train()
        assert equal(weights_of(plain.model), weights_of(trainer.model))

    def test_evaluation_leaves_the_weights(self, make_trainer, pairs, weights_of):
        trainer = make_trainer({"eval_dataset": pairs}, **UNROLLED)
        before = weights_of(trainer.model)
        trainer.evaluate()
        assert equal(before, weights_of(trainer.model))

    def test_checkpoints_are_theta_and_what_is_saved_is_not(self, make_trainer, weights_of, tmp_path):
        trainer = make_trainer(save_strategy="steps", save_steps=2, **UNROLLED)
        trainer.train()
        theta = load_file(tmp_path / "output" / "checkpoint-2" / "model.safetensors")
        trainer.save_model(str(tmp_path / "final"))
        final = load_file(tmp_path / "final" / "model.safetensors")
        assert not equal(theta, final)
        assert equal(final, weights_of(trainer.model))  # and what is in memory after training

        # θ' by hand: one step along the SFT gradient of the first batch
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "output" / "checkpoint-2")
        ((batch,),) = trainer._deployment_batches()
        ids, mask = batch["input_ids"], batch["completion_mask"]
        logits = model(ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        (-(logps * mask[:, 1:]).sum() / mask[:, 1:].sum()).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(final[name], parameter.detach() - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("form", FORMS)
    def test_resumed_run_is_the_same(self, make_trainer, weights_of, tmp_path, form):
        options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3, **FORMS[form]}
        whole = make_trainer(save_strategy="steps", save_steps=2, **options)
        whole.train()
        resumed = make_trainer(**options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
        assert equal(weights_of(whole.model), weights_of(resumed.model))


class TestInnerLearningRate:
    def test_auto_is_a_fraction_of_the_norm(self, make_trainer):
        trainer = make_trainer(bilevel="alternating", inner_step_fraction=3e-3)
        trainer.train()
        assert log_of(trainer, "stable/inner_step_norm") == pytest.approx([3e-3] * 2, rel=1e-4)

    @pytest.mark.parametrize("form", ["alternating", "unrolled", "lower_level"])
    def test_steps_that_are_rounded_away_are_warned_about(self, make_trainer, caplog, form):
        options = {**FORMS[form], "model_init_kwargs": {"dtype": "bfloat16"}, "max_steps": 1}
        options.pop("inner_learning_rate")
        make_trainer(inner_step_fraction=1e-6, **options).train()
        assert "The inner step changes only" in caplog.text

    def test_no_warning_in_float32(self, make_trainer, caplog):
        make_trainer(bilevel="alternating", inner_step_fraction=1e-6, max_steps=1).train()
        assert "The inner step changes only" not in caplog.text


class TestMetrics:
    def test_of_each_form(self, make_trainer):
        common = {"stable/sft_loss", "logps/chosen_change", "logps/rejected_change", "displacement/share"}
        inner = {"stable/sft_gain", "stable/inner_step_norm"}
        expected = {
            "penalty": {"stable/penalty_active", "stable/penalty"},
            "lower_level": {"stable/penalty_active", "stable/penalty", *inner},
            "alternating": {*inner, "stable/gradient_cosine"},
            "unrolled": {*inner, "stable/gradient_cosine"},
        }
        for form, options in FORMS.items():
            trainer = make_trainer(**options)
            trainer.train()
            ours = {n for n in trainer.state.log_history[0] if n.startswith(("stable/", "displacement/"))}
            ours |= {n for n in trainer.state.log_history[0] if n.endswith("_change")}
            assert ours == common | expected[form], form

    def test_rewards_without_a_reference_in_the_loss(self, make_trainer, pairs):
        """The penalty's reference, of the chosen responses only, is none for the rewards."""
        ours, plain = (
            make_trainer({"eval_dataset": pairs}, upper_loss="simpo", penalty_weight=weight).evaluate()
            for weight in (10.0, 0.0)
        )
        for name in ("chosen", "rejected", "accuracies", "margins"):
            assert ours[f"eval_rewards/{name}"] == plain[f"eval_rewards/{name}"]
        assert "eval_logps/chosen_change" in ours and "eval_logps/chosen_change" not in plain

    def test_displacement(self, make_trainer, pairs, token_logps, load_model, model_path):
        trainer = make_trainer({"eval_dataset": pairs}, upper_loss="apo_down", penalty_weight=0.0, learning_rate=0.5)
        trainer.train()
        metrics = trainer.evaluate()
        reference, changes = load_model(model_path), {"chosen": [], "rejected": []}
        for row in trainer.eval_dataset:
            for which, values in changes.items():
                now, then = (
                    token_logps(m, row["prompt_ids"], row[f"{which}_ids"]).sum() for m in (trainer.model, reference)
                )
                values.append((now - then).item())
        for which, values in changes.items():
            assert metrics[f"eval_logps/{which}_change"] == pytest.approx(sum(values) / 8, rel=1e-3)
        share = sum(value < 0 for value in changes["chosen"]) / 8
        assert share > 0
        assert metrics["eval_displacement/share"] == pytest.approx(share)

    def test_gain_is_that_of_the_step(self, make_trainer):
        """Against the loss before and after, from two trainers with and without the inner step."""
        moved = make_trainer(max_steps=1, per_device_train_batch_size=8, **ALTERNATING)
        still = make_trainer(max_steps=1, per_device_train_batch_size=8, penalty_weight=0.0)
        for trainer in (moved, still):
            trainer.train()
        before, after = (log_of(trainer, "stable/sft_loss")[0] for trainer in (still, moved))
        assert before > after
        assert log_of(moved, "stable/sft_gain")[0] == pytest.approx(before - after, rel=1e-3)

    def test_evaluation_is_the_plain_upper_loss(self, make_trainer, pairs):
        plain = make_trainer({"eval_dataset": pairs}, penalty_weight=0.0).evaluate()
        for form, options in FORMS.items():
            if form == "unrolled":  # at θ'
                options = {**options, "deploy_inner_steps": 0}
            metrics = make_trainer({"eval_dataset": pairs}, regularizer="nll", **options).evaluate()
            assert metrics["eval_loss"] == plain["eval_loss"], form


def test_model_card(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    card = Path(tmp_path / "output" / "checkpoint-2" / "README.md")
    card = card if card.exists() else tmp_path / "output" / "README.md"
    text = card.read_text()
    for what in ("Stable Preference Optimization", "StablePOTrainer", "penalty_weight", "stable-po", "2507.07723"):
        assert what in text


def test_conversations(make_trainer, conversations):
    trainer = make_trainer({"train_dataset": conversations}, **ALTERNATING)
    trainer.train()
    assert len(log_of(trainer, "stable/sft_gain")) == 2


def test_iterable_dataset(make_trainer, pairs):
    trainer = make_trainer({"train_dataset": pairs.to_iterable_dataset()}, **UNROLLED)
    trainer.train()
    assert trainer._is_deployed
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_autocast_is_near_float32(make_trainer, form):
    logs = []
    for bf16 in (False, True):
        trainer = make_trainer(bf16=bf16, **FORMS[form])
        trainer.train()
        logs.append(trainer.state.log_history[1])
    for name in logs[0]:
        if name.startswith(("stable/", "logps/")):
            assert logs[1][name] == pytest.approx(logs[0][name], rel=0.1, abs=0.1), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["alternating", "unrolled"])
def test_checkpointing_changes_nothing(make_trainer, weights_of, form, reentrant):
    plain = make_trainer(**FORMS[form])
    checkpointed = make_trainer(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}, **FORMS[form]
    )
    for trainer in (plain, checkpointed):
        trainer.train()
    expected, found = weights_of(plain.model), weights_of(checkpointed.model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


class TestEndOfEpoch:
    def test_fewer_micro_batches(self, make_trainer, pairs):
        """Eight pairs in micro-batches of 3: two steps an epoch, of 2 and 1 of them."""
        for form in ("alternating", "unrolled"):
            trainer = make_trainer(
                per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=4, **FORMS[form]
            )
            trainer.train()
            assert trainer.state.global_step == 4 and not trainer.inner.is_away

    def test_stream_that_ends_within_a_step(self, make_trainer, pairs, weights_of):
        """Its length is not known, so the last group of micro-batches of an epoch is cut short unseen."""
        trainer = make_trainer(
            {"train_dataset": pairs.select(range(6)).to_iterable_dataset(), "eval_dataset": pairs},
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=1,
            **UNROLLED,
        )
        trainer.train()
        assert not trainer.inner.is_away

    def test_resuming_a_run_that_is_over(self, make_trainer, tmp_path, weights_of):
        options = {"save_strategy": "steps", "save_steps": 2, **UNROLLED}
        first = make_trainer(**options)
        first.train()
        again = make_trainer(**options)
        again.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
        assert equal(weights_of(first.model), weights_of(again.model))


def test_last_batch_of_a_single_pair(make_trainer, pairs, weights_of):
    trainer = make_trainer(
        {"train_dataset": pairs.select(range(5)), "eval_dataset": pairs.select(range(5))},
        upper_loss="alphadpo",
        max_steps=4,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    assert all(weight.isfinite().all() for weight in weights_of(trainer.model).values())
    assert trainer.evaluate()["eval_loss"] < 100


def test_best_model_at_the_end(make_trainer, pairs, tmp_path, weights_of):
    trainer = make_trainer(
        {"eval_dataset": pairs},
        max_steps=4,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        **UNROLLED,
    )
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    # θ' of the best checkpoint
    assert trainer._is_deployed and not equal(best, weights_of(trainer.model))


def test_sft_gradient_that_is_not_finite(make_trainer):
    trainer = make_trainer(max_steps=3, **ALTERNATING)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight.data.fill_(float("nan"))

    trainer.add_callback(Spoil())
    with pytest.raises(FloatingPointError, match="The SFT gradient of the lower level is not finite at step 1"):
        trainer.train()


def test_trained_adapter_against_its_copy(make_trainer, model_path, load_model, perturb, weights_of):
    from peft import get_peft_model

    torch.manual_seed(0)
    model = perturb(get_peft_model(load_model(model_path), LoraConfig(**LORA)), only_trainable=True)
    trainer = make_trainer({"model": model}, **ALTERNATING)
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".default." in name for name in moved)  # not the copy, which is the reference
    assert abs(log_of(trainer, "logps/chosen_change")[0]) < 5


SFT = {
    "text": {"text": ["the film was a good story", "a dog finds the way home", "I would watch it again"]},
    "messages": {
        "messages": [
            [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was a good story"}],
            [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "finds the way home"}],
        ]
    },
    "prompt-completion": {"prompt": ["the film", "a dog"], "completion": [" was a good story", " finds the way home"]},
    "conversational prompt-completion": {
        "prompt": [[{"role": "user", "content": "the film"}]],
        "completion": [[{"role": "assistant", "content": "was a good story"}]],
    },
}


class TestSFTDataset:
    @pytest.mark.parametrize("name", SFT)
    @pytest.mark.parametrize("form", FORMS)
    def test_formats(self, make_trainer, name, form):
        options = {**FORMS[form], **({"inner_learning_rate": 0.01} if FORMS[form] else {})}
        trainer = make_trainer({"sft_dataset": Dataset.from_dict(SFT[name])}, sft_batch_size=3, **options)
        trainer.train()
        if form != "penalty":
            assert all(gain > 0 for gain in log_of(trainer, "stable/sft_gain"))

    @pytest.mark.parametrize(("name", "learned"), [("text", None), ("prompt-completion", " was a good story</s>")])
    def test_what_is_learned(self, make_trainer, tokenizer, name, learned):
        trainer = make_trainer({"sft_dataset": Dataset.from_dict(SFT[name])})
        row = trainer._sft_batches.dataset[0]
        ids = [token for token, one in zip(row["input_ids"], row["completion_mask"], strict=True) if one]
        text = "the film was a good story</s>"
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=False).replace("<s>", "").strip() == text
        assert tokenizer.decode(ids).replace("<s>", "").strip() == (learned or text).strip()

    def test_of_the_chosen_responses_it_is_the_default(self, make_trainer, pairs, weights_of, perturb):
        """The same rows in the same batches, given as data of its own."""
        one_batch = {"per_device_train_batch_size": 8, "max_steps": 3}
        rows = Dataset.from_dict({"prompt": pairs["prompt"], "completion": pairs["chosen"]})
        for form, options in FORMS.items():
            options = {**options, **one_batch}
            default, given = make_trainer(**options), make_trainer({"sft_dataset": rows}, **options)
            for trainer in (default, given):
                perturb(trainer.model)  # which opens the penalty
                trainer.train()
            if "bilevel" not in options:
                assert max(log_of(default, "stable/penalty_active")) == 1
            expected, found = weights_of(default.model), weights_of(given.model)
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=f"{form} {name}")

    def test_batches_cover_each_epoch(self, make_trainer):
        rows = Dataset.from_dict({"text": [f"film {i}" for i in range(5)]})
        batches = make_trainer({"sft_dataset": rows}, sft_batch_size=2)._sft_batches
        drawn = [tuple(row[row != 0].tolist()) for number in range(5) for row in batches[number]["input_ids"]]
        assert len(set(drawn[:5])) == len(set(drawn[5:])) == 5
        assert drawn[:5] != drawn[5:]

    @pytest.mark.parametrize("form", FORMS)
    def test_resumed_run_is_the_same(self, make_trainer, weights_of, tmp_path, form):
        data = {"sft_dataset": Dataset.from_dict(SFT["text"])}
        options = {"max_steps": 4, "sft_batch_size": 2, "upper_loss": "apo_down", **FORMS[form]}
        whole = make_trainer(data, save_strategy="steps", save_steps=2, **options)
        whole.train()
        resumed = make_trainer(data, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
        assert equal(weights_of(whole.model), weights_of(resumed.model))

    @pytest.mark.parametrize("form", ["alternating", "unrolled"])
    def test_accumulation_is_one_large_batch(self, make_trainer, weights_of, form):
        """Also of several inner steps, each on rows of its own."""
        data = {
            "sft_dataset": Dataset.from_dict(
                {"text": [text * (i + 1) for i in range(4) for text in SFT["text"]["text"]]}
            )
        }
        options = {"inner_steps": 2, **FORMS[form]}
        large = make_trainer(data, per_device_train_batch_size=8, sft_batch_size=4, **options)
        small = make_trainer(
            data, per_device_train_batch_size=2, sft_batch_size=1, gradient_accumulation_steps=4, **options
        )
        for trainer in (large, small):
            trainer.train()
        expected, found = weights_of(large.model), weights_of(small.model)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("rows", "error", "message"),
        [
            ({"chosen": ["a"]}, ValueError, r"has the columns \['chosen'\]. It must be language modelling"),
            ({"text": []}, ValueError, r"`sft_dataset` is empty. Pass one with rows, or leave it out"),
            (
                {"prompt": ["the film"] * 2, "completion": [" a dog"] * 2},
                ValueError,
                r"empty after dropping.*max_length=2",
            ),
        ],
    )
    def test_bad_data(self, make_trainer, rows, error, message):
        kwargs = {
            "max_length": 2,
            "train_dataset": Dataset.from_dict({"prompt": [""], "chosen": ["a"], "rejected": ["b"]}),
        }
        train = {"train_dataset": kwargs.pop("train_dataset")} if "max_length" in message else {}
        kwargs = kwargs if train else {}
        with pytest.raises(error, match=message):
            make_trainer({"sft_dataset": Dataset.from_dict(rows), **train}, **kwargs)

    def test_streamed(self, make_trainer):
        with pytest.raises(TypeError, match="`sft_dataset` must be a `Dataset`, got `IterableDataset`"):
            make_trainer({"sft_dataset": Dataset.from_dict(SFT["text"]).to_iterable_dataset()})

    def test_batch_size_without_data(self, make_trainer):
        with pytest.raises(ValueError, match="`sft_batch_size=3` is read with `sft_dataset` only"):
            make_trainer(sft_batch_size=3)

    def test_nothing_reads_it(self, make_trainer):
        with pytest.raises(ValueError, match="`sft_dataset` is given, but with `penalty_weight=0` nothing reads it"):
            make_trainer({"sft_dataset": Dataset.from_dict(SFT["text"])}, penalty_weight=0.0)
