# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the quantities of training on held-out data, without disturbing training."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback
from trl import LogCompletionsCallback

from trl_spo import losses


# Of a logged training step, what has no counterpart in evaluation
TRAINING_ONLY = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens"}


@pytest.fixture
def held_out():
    return Dataset.from_dict(
        {
            "prompt": [
                "the dog",
                "a bad story with",
                "my friends said that",
                "he was",
                "I was",
                "a film",
                "the night is",
            ],
            "chosen": [" is good", " a great ending", " it ends", " not home", " sad", " was great and well", " long"],
            "rejected": [
                " is bad",
                " was",
                " the story was slow and sad",
                " home",
                " there",
                " not",
                " not so long and sad",
            ],
        }
    )


@pytest.fixture
def held_out_lists(held_out):
    rows = held_out.to_list()
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completions": [row["rejected"], row["chosen"], *[rows[i - k - 1]["chosen"] for k in range(i % 3)]],
                "ranking": [1, 0, *range(2, 2 + i % 3)],
            }
            for i, row in enumerate(rows)
        ]
    )


def figures(metrics):
    """The metrics that a second evaluation must give again: not those of time."""
    return {
        name: value
        for name, value in metrics.items()
        if not any(unit in name for unit in ("runtime", "per_second", "epoch", "preparation_time"))
    }


class TestQuantities:
    def test_those_of_training(self, make_trainer, train_log, held_out):
        trainer = make_trainer({"eval_dataset": held_out}, eval_strategy="steps", eval_steps=1, max_steps=1)
        (train,) = train_log(trainer)
        (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        for name in train.keys() - TRAINING_ONLY:
            assert f"eval_{name}" in evaluation, name
        assert evaluation["eval_loss"] == pytest.approx(
            evaluation["eval_loss/preference"] + evaluation["eval_loss/kl"], rel=1e-5
        )
        assert evaluation["eval_loss/kl"] > 0

    def test_no_kl_without_the_regularizer(self, make_trainer, held_out):
        metrics = make_trainer({"eval_dataset": held_out}, beta=0.0).evaluate()
        assert "eval_kl/online" not in metrics
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss/preference"])

    def test_by_hand(self, make_trainer, perturb, token_logps, held_out):
        trainer = make_trainer({"eval_dataset": held_out}, alpha=0.3, beta=0.0, calibration="reference")
        perturb(trainer.model)
        metrics = trainer.evaluate()
        scores = {"chosen": [], "rejected": []}
        for row in trainer.eval_dataset:
            for name, values in scores.items():
                policy, reference = (
                    token_logps(model, row["prompt_ids"], row[f"{name}_ids"]).sum()
                    for model in (trainer.model, trainer.ref_model)
                )
                values.append(policy - reference)
        chosen, rejected = (torch.stack(values).detach() for values in scores.values())
        loss = losses.soft_preference_loss(chosen, rejected, 0.3).mean().item()
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics["eval_rewards/chosen"] == pytest.approx(0.3 * chosen.mean().item(), rel=1e-4)
        assert metrics["eval_rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())

    def test_kl_by_hand(self, make_trainer, perturb, monkeypatch, held_out):
        trainer = make_trainer({"eval_dataset": held_out}, beta=0.5, online_samples_per_step=3, eval_online_samples=7)
        perturb(trainer.model)
        drawn, sample = [], trainer.sampler.sample

        def record(*args):
            samples = sample(*args)
            drawn.extend(samples)
            return samples

        monkeypatch.setattr(trainer.sampler, "sample", record)
        metrics = trainer.evaluate()
        # Each held-out prompt once
        assert sorted(s.prompt_ids for s in drawn) == sorted(trainer.eval_dataset["prompt_ids"])
        kl, lengths = [], []
        with torch.no_grad():
            for s in drawn:
                ids = torch.tensor([s.prompt_ids + s.completion_ids])
                logits = [m(input_ids=ids).logits[:, :-1] for m in (trainer.model, trainer.ref_model)]
                mask = torch.arange(ids.size(1) - 1)[None] >= len(s.prompt_ids) - 1
                kl.append(losses.token_kl(*logits, mask).sum())
                lengths.append(len(s.completion_ids))
        kl = torch.stack(kl)
        assert metrics["eval_kl/online"] == pytest.approx(kl.mean().item(), rel=1e-4)
        assert metrics["eval_loss/kl"] == pytest.approx(0.5 * kl.mean().item(), rel=1e-4)
        assert metrics["eval_kl/estimator_std"] == pytest.approx(kl.std().item(), rel=1e-4)
        assert metrics["eval_samples/length"] == pytest.approx(sum(lengths) / 7)
        assert metrics["eval_staleness/ratio"] == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("samples", [3, 100])
    def test_number_of_samples(self, make_trainer, monkeypatch, held_out, samples):
        # Not more than there are held-out prompts
        trainer = make_trainer({"eval_dataset": held_out}, eval_online_samples=samples)
        asked, sample = [], trainer.sampler.sample

        def record(model, prompts, *seed):
            asked.append(len(prompts))
            return sample(model, prompts, *seed)

        monkeypatch.setattr(trainer.sampler, "sample", record)
        trainer.evaluate()
        assert sum(asked) == min(samples, 7) and max(asked) <= trainer.args.online_buffer_size


class TestBatches:
    @pytest.mark.parametrize("weighting", ["none", "power", "sigmoid"])
    @pytest.mark.parametrize("data", ["held_out", "held_out_lists"])
    def test_same_numbers_in_batches_of_any_size(self, make_trainer, perturb, request, data, weighting):
        dataset = request.getfixturevalue(data)
        results = []
        for kwargs in (
            {"per_device_eval_batch_size": 1},
            {"per_device_eval_batch_size": 3},
            {"per_device_eval_batch_size": 8},
            {"per_device_eval_batch_size": 3, "pad_to_multiple_of": 16, "per_device_train_batch_size": 1},
        ):
            trainer = make_trainer(
                {"train_dataset": dataset, "eval_dataset": dataset},
                weighting=weighting,
                gamma=0.1,
                weighting_scale=20.0,
                **kwargs,
            )
            perturb(trainer.model)
            results.append(figures(trainer.evaluate()))
        for result in results[1:]:
            assert result == pytest.approx(results[0], rel=1e-4, abs=1e-5)
        if weighting != "none":
            assert results[0]["eval_weights/ess"] < 0.999

    @pytest.mark.parametrize("data", ["held_out", "held_out_lists"])
    def test_same_numbers_from_a_stream(self, make_trainer, perturb, request, data):
        dataset = request.getfixturevalue(data)
        results = []
        for eval_dataset in (dataset, IterableDataset.from_generator(lambda: iter(dataset.to_list()))):
            trainer = make_trainer(
                {"train_dataset": dataset, "eval_dataset": eval_dataset},
                weighting="sigmoid",
                gamma=0.1,
                weighting_scale=20.0,
                beta=0.0,
                per_device_eval_batch_size=7,
            )
            perturb(trainer.model)
            results.append(figures(trainer.evaluate()))
        assert results[1] == pytest.approx(results[0], rel=1e-5)


class _Evaluate(TrainerCallback):
    """Evaluates within training, on the trainer's own and on another dataset."""

    def __init__(self, trainer, dataset):
        self.trainer, self.dataset = trainer, dataset

    def on_step_begin(self, *args, **kwargs):
        self.trainer.evaluate()
        self.trainer.evaluate(self.dataset)


class TestTrainingIsNotDisturbed:
    @pytest.mark.parametrize("how", ["strategy", "callback"])
    def test_same_weights_and_metrics(
        self, make_trainer, load_model, model_path, train_log, weights_of, held_out, how
    ):
        finals, logs = [], []
        for evaluates in (False, True):
            # With dropout, so that random numbers that evaluation took would show
            model = load_model(model_path, attention_dropout=0.3)
            trainer = make_trainer(
                {"model": model, "eval_dataset": held_out},
                disable_dropout=False,
                max_steps=3,
                resample_steps=2,
                online_buffer_size=8,
                importance_sampling_cap=2.0,
                eval_strategy="steps" if evaluates and how == "strategy" else "no",
                eval_steps=1,
                eval_online_samples=4,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                weighting="sigmoid",
            )
            if evaluates and how == "callback":
                trainer.add_callback(_Evaluate(trainer, held_out.select(range(3))))
            logs.append(train_log(trainer))
            finals.append(weights_of(trainer.model))
            assert len([e for e in trainer.state.log_history if "eval_loss" in e]) == evaluates * 3 * (
                2 if how == "callback" else 1
            )
        for name, weight in finals[0].items():
            assert torch.equal(weight, finals[1][name]), name
        assert logs[0] == logs[1]

    def test_buffer_stays(self, make_trainer, held_out):
        trainer = make_trainer({"eval_dataset": held_out})
        trainer.train()
        before = (trainer.sample_buffer.samples, trainer.sample_buffer.round, trainer.sample_buffer.step)
        trainer.evaluate()
        assert (trainer.sample_buffer.samples, trainer.sample_buffer.round, trainer.sample_buffer.step) == before


class TestRepeated:
    def test_same_model_same_numbers(self, make_trainer, held_out):
        trainer = make_trainer({"eval_dataset": held_out})
        trainer.train()
        first = figures(trainer.evaluate())
        torch.manual_seed(1234)
        assert figures(trainer.evaluate()) == first
        assert first["eval_kl/online"] > 1e-3

    def test_after_predict(self, make_trainer, held_out):
        # `predict` leaves no metrics behind
        trainer = make_trainer({"eval_dataset": held_out}, eval_online_samples=4)
        first = figures(trainer.evaluate())
        trainer.predict(trainer.train_dataset)
        assert figures(trainer.evaluate()) == first

    def test_samples_are_not_those_of_training(self, make_trainer, monkeypatch, pairs):
        trainer = make_trainer({"eval_dataset": pairs}, resample_steps=1, max_steps=2)
        seeds, sample = [], trainer.sampler.sample

        def record(model, prompts, *seed):
            seeds.append(seed)
            return sample(model, prompts, *seed)

        monkeypatch.setattr(trainer.sampler, "sample", record)
        trainer.train()
        trainer.evaluate()
        assert len(set(seeds)) == len(seeds) >= 3
        drawn = [{tuple(s.completion_ids) for s in sample(trainer.model, [(0, [1, 20])] * 8, *seed)} for seed in seeds]
        assert len(set.union(*drawn)) == sum(map(len, drawn)) == 8 * len(seeds)


class TestDatasets:
    def test_fresh_dataset(self, make_trainer, held_out, pairs):
        trainer = make_trainer({"eval_dataset": held_out})
        expected = figures(trainer.evaluate())
        other = make_trainer({"eval_dataset": pairs})
        assert figures(other.evaluate(held_out)) == pytest.approx(expected)
        assert figures(other.evaluate()) != pytest.approx(expected)

    def test_fresh_lists(self, make_trainer, held_out_lists):
        assert make_trainer().evaluate(held_out_lists)["eval_loss/preference"] > 0

    def test_fresh_dataset_with_precomputed_reference(self, make_trainer, held_out):
        expected = figures(make_trainer({"eval_dataset": held_out}).evaluate())
        trainer = make_trainer({"eval_dataset": held_out}, precompute_ref_log_probs=True)
        assert figures(trainer.evaluate()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert figures(trainer.evaluate(held_out)) == pytest.approx(expected, rel=1e-4, abs=1e-5)

    @pytest.mark.parametrize("fresh", [False, True])
    def test_several(self, make_trainer, held_out, pairs, fresh):
        datasets = {"films": held_out, "dogs": pairs}
        alone = {
            name: figures(make_trainer({"eval_dataset": dataset}).evaluate()) for name, dataset in datasets.items()
        }
        if fresh:
            metrics = make_trainer().evaluate(datasets)
        else:
            metrics = make_trainer({"eval_dataset": datasets}).evaluate()
        for name, expected in alone.items():
            for metric, value in expected.items():
                if metric != "eval_num_tokens":
                    assert metrics[metric.replace("eval_", f"eval_{name}_", 1)] == pytest.approx(value), metric

    def test_best_checkpoint_by_a_metric_of_ours(self, make_trainer, held_out):
        trainer = make_trainer(
            {"eval_dataset": held_out},
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="best",
            metric_for_best_model="rewards/accuracies",
            greater_is_better=True,
        )
        trainer.train()
        accuracies = [e["eval_rewards/accuracies"] for e in trainer.state.log_history if "eval_loss" in e]
        assert trainer.state.best_metric == max(accuracies)

    def test_conversational(self, make_trainer, conversations):
        metrics = make_trainer({"train_dataset": conversations, "eval_dataset": conversations}).evaluate()
        assert metrics["eval_kl/online"] == pytest.approx(0, abs=1e-5)


class TestSampleTables:
    @pytest.mark.parametrize("data", ["pairs", "conversations", "lists"])
    def test_log_completions_callback(self, make_trainer, train_log, request, data):
        dataset = request.getfixturevalue(data)
        trainer = make_trainer({"train_dataset": dataset, "eval_dataset": dataset}, max_steps=3)
        callback = LogCompletionsCallback(trainer, num_prompts=2, freq=2)
        trainer.add_callback(callback)
        assert len(train_log(trainer)) == 3
        assert [row[0] for row in callback.table] == ["2", "2"]
        for (_, prompt, completion), expected in zip(callback.table, dataset["prompt"][:2], strict=True):
            assert (expected if isinstance(expected, str) else expected[0]["content"]) in prompt
            assert completion
