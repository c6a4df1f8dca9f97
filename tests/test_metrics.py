# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Metrics: the sums behind them, and those of a training step by hand."""

import pytest
import torch
from datasets import Dataset

from trl_spo.metrics import MetricTotals


class TestMetricTotals:
    def test_mean_does_not_depend_on_batches(self):
        values = torch.tensor([1.0, 5.0, -2.0, 4.0, 0.5])
        means = []
        for sizes in ([5], [1, 1, 1, 1, 1], [2, 3], [4, 1]):
            totals = MetricTotals()
            for part in values.split(sizes):
                totals.add("x", part)
            means.append(totals.pop()["x"])
        assert means == pytest.approx([values.mean().item()] * 4)

    def test_mean_per_token(self):
        totals = MetricTotals()
        totals.add("x", torch.tensor([6.0, 1.0]), torch.tensor([3, 1]))
        totals.add("x", torch.tensor([5.0]), torch.tensor([1]))
        assert totals.pop() == {"x": pytest.approx(12 / 5)}

    def test_standard_deviation_does_not_depend_on_batches(self):
        values = 1000 + torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for sizes in ([7], [3, 4], [1] * 7):
            totals = MetricTotals()
            for part in values.split(sizes):
                totals.add_std("x", part)
            assert totals.pop()["x"] == pytest.approx(values.std().item(), rel=1e-6)

    def test_no_standard_deviation_of_one_value(self):
        totals = MetricTotals()
        totals.add_std("x", torch.tensor([1.0]))
        assert totals.pop() == {}

    @pytest.mark.parametrize(
        ("weights", "share"), [([1.0, 1.0, 1.0, 1.0], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([2.0, 1.0], 9 / 10)]
    )
    def test_effective_share(self, weights, share):
        totals = MetricTotals()
        for weight in torch.tensor(weights):
            totals.add_effective_share("x", weight, weight**2, torch.ones(()))
        assert totals.pop() == {"x": pytest.approx(share)}

    def test_nothing_is_left_out_as_nothing(self):
        totals = MetricTotals()
        totals.add("x", torch.zeros(2), torch.zeros(2))
        totals.add_effective_share("y", torch.zeros(1), torch.zeros(1), torch.ones(1))
        assert totals.pop() == {}

    def test_pop_starts_anew(self):
        totals = MetricTotals()
        totals.add("x", torch.tensor([1.0]))
        totals.pop()
        totals.add("x", torch.tensor([3.0]))
        assert totals.pop() == {"x": 3.0}
        assert totals.pop() == {}


NAMES = {
    # those of DPO
    "loss",
    "entropy",
    "num_tokens",
    "mean_token_accuracy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    # and ours
    "loss/preference",
    "loss/kl",
    "kl/online",
    "kl/estimator_std",
    "entropy/online",
    "staleness/ratio",
    "weights/mean",
    "weights/ess",
    "samples/length",
    "samples/terminated",
}


class TestNames:
    def test_all_are_logged(self, make_trainer, train_log):
        for entry in train_log(make_trainer()):
            assert entry.keys() == NAMES | {"grad_norm", "learning_rate", "epoch", "step"}

    def test_without_the_regularizer(self, make_trainer, train_log):
        ours = {name for name in NAMES if "online" in name or "samples" in name or "kl" in name or "staleness" in name}
        for entry in train_log(make_trainer(beta=0.0, calibration="none")):
            assert entry.keys() == NAMES - ours | {"grad_norm", "learning_rate", "epoch", "step"}


ALPHA = 0.3


@pytest.fixture
def step(make_trainer, train_log, perturb):
    """Trains one step on all of a dataset from a policy that has left the reference; the log, and the trainer before it."""

    def run(dataset, **kwargs):
        arguments = dict(alpha=ALPHA, max_steps=1, per_device_train_batch_size=len(dataset), learning_rate=0.0)
        trainer = make_trainer({"train_dataset": dataset}, **{**arguments, **kwargs})
        perturb(trainer.model)
        (log,) = train_log(trainer)
        return log, trainer

    return run


@torch.no_grad()
def tokens_of(model, prompt_ids, completion_ids):
    """Of each token of a completion: log-probability, entropy, mean logit, and whether it is the likeliest."""
    ids = torch.tensor([prompt_ids + completion_ids])
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    logps = logits.log_softmax(-1)
    targets = torch.tensor(completion_ids)
    return (
        logps.gather(1, targets[:, None])[:, 0],
        -(logps.exp() * logps).sum(-1),
        logits.mean(-1),
        (logits.argmax(-1) == targets).float(),
    )


class TestByHand:
    @pytest.mark.parametrize("calibration", ["none", "reference"])
    @pytest.mark.parametrize("batch_size", [8, 2])
    def test_pairs(self, step, pairs, calibration, batch_size):
        log, trainer = step(
            pairs,
            calibration=calibration,
            beta=0.0,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            weighting="power",
            gamma=0.1,
        )
        logps, entropy, logits, top1, scores = {}, [], {}, [], {}
        for name in ("chosen", "rejected"):
            rows = [tokens_of(trainer.model, row["prompt_ids"], row[f"{name}_ids"]) for row in trainer.train_dataset]
            logps[name] = torch.stack([row[0].sum() for row in rows])
            entropy += [row[1] for row in rows]
            logits[name] = torch.cat([row[2] for row in rows]).mean().item()
            if name == "chosen":
                top1 = torch.cat([row[3] for row in rows])
            scores[name] = logps[name]
            if calibration == "reference":
                reference = [
                    tokens_of(trainer.ref_model, row["prompt_ids"], row[f"{name}_ids"])[0].sum()
                    for row in trainer.train_dataset
                ]
                scores[name] = logps[name] - torch.stack(reference)
        margin = scores["chosen"] - scores["rejected"]
        weights = torch.logaddexp(logps["chosen"], logps["rejected"]).mul(0.1).exp()
        lengths = [
            sum(len(row["prompt_ids"]) + len(row[f"{name}_ids"]) for row in trainer.train_dataset)
            for name in ("chosen", "rejected")
        ]
        expected = {
            "loss/preference": -(weights * torch.nn.functional.logsigmoid(ALPHA * margin) / ALPHA).mean(),
            "rewards/chosen": ALPHA * scores["chosen"].mean(),
            "rewards/rejected": ALPHA * scores["rejected"].mean(),
            "rewards/margins": ALPHA * margin.mean(),
            "rewards/accuracies": (margin > 0).float().mean(),
            "logps/chosen": logps["chosen"].mean(),
            "logps/rejected": logps["rejected"].mean(),
            "logits/chosen": logits["chosen"],
            "logits/rejected": logits["rejected"],
            "entropy": torch.cat(entropy).mean(),
            "mean_token_accuracy": top1.mean(),
            "weights/mean": weights.mean(),
            "weights/ess": weights.sum() ** 2 / weights.square().sum() / 8,
            "num_tokens": sum(lengths),
        }
        for name, value in expected.items():
            assert log[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
        assert 0 < log["rewards/accuracies"] < 1
        assert log["loss"] == pytest.approx(log["loss/preference"], rel=1e-5)

    def test_likeliest_tokens(self, make_trainer, train_log, model, tokenizer):
        # Completions that start with the model's own likeliest token
        prompts = ["the film", "a good story", "I would"]
        with torch.no_grad():
            first = [model(torch.tensor([tokenizer(p).input_ids])).logits[0, -1].argmax().item() for p in prompts]
        dataset = Dataset.from_list([{"prompt": p, "chosen": " was", "rejected": " was not good"} for p in prompts])
        trainer = make_trainer({"train_dataset": dataset}, beta=0.0, max_steps=1, learning_rate=0.0)
        rows = trainer.train_dataset.to_list()
        for row, token in zip(rows, first, strict=True):
            row["chosen_ids"] = [token, tokenizer.pad_token_id]
            row["rejected_ids"] = [token, token]  # which do not count
        trainer.train_dataset = Dataset.from_list(rows)
        with torch.no_grad():
            second = [
                model(torch.tensor([row["prompt_ids"] + row["chosen_ids"][:1]])).logits[0, -1].argmax().item()
                for row in rows
            ]
        right = len(first) + sum(token == tokenizer.pad_token_id for token in second)
        assert train_log(trainer)[0]["mean_token_accuracy"] == pytest.approx(right / 6)

    @pytest.mark.parametrize("order", ["best", "ranking"])
    def test_lists(self, step, lists, order):
        if order == "ranking":
            lists = lists.remove_columns("best").add_column("ranking", [[2, 0, 1, 3], [1, 0], [0, 2, 1], [1, 2, 0]])
        log, trainer = step(lists, beta=0.0, calibration="none", weighting="power", gamma=0.1)
        chosen, rejected, right, ordered, weights, entropy, top1, logits = [], [], 0, 0, [], [], [], []
        for row in trainer.train_dataset:
            tokens = [tokens_of(trainer.model, row["prompt_ids"], ids) for ids in row["completion_ids"]]
            logps = torch.stack([t[0].sum() for t in tokens])
            ranks = row["ranks"]
            best = ranks.index(0)
            chosen.append(logps[best])
            rejected.append(torch.cat([logps[:best], logps[best + 1 :]]).mean())
            entropy += [t[1] for t in tokens]
            top1.append(tokens[best][3])
            logits += [t[2] for j, t in enumerate(tokens) if j != best]
            for k, rank in enumerate(ranks):
                worse = [j for j, other in enumerate(ranks) if other > rank]
                ordered += len(worse)
                right += sum(bool(logps[k] > logps[j]) for j in worse)
                if worse:
                    weights.append(logps[[k, *worse]].logsumexp(0).mul(0.1).exp())
        chosen, rejected, weights = torch.stack(chosen), torch.stack(rejected), torch.stack(weights)
        expected = {
            "rewards/chosen": ALPHA * chosen.mean(),
            "rewards/rejected": ALPHA * rejected.mean(),
            "rewards/margins": ALPHA * (chosen - rejected).mean(),
            "rewards/accuracies": right / ordered,
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
            "logits/rejected": torch.cat(logits).mean(),
            "entropy": torch.cat(entropy).mean(),
            "mean_token_accuracy": torch.cat(top1).mean(),
            "weights/mean": weights.mean(),
            "weights/ess": weights.sum() ** 2 / weights.square().sum() / len(weights),
        }
        for name, value in expected.items():
            assert log[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name

    def test_rewards_with_mean_log_probabilities(self, step, pairs):
        log, trainer = step(pairs, beta=0.0, calibration="none", logp_reduction="mean")
        logps = [tokens_of(trainer.model, row["prompt_ids"], row["chosen_ids"])[0] for row in trainer.train_dataset]
        assert log["rewards/chosen"] == pytest.approx(ALPHA * sum(x.mean().item() for x in logps) / 8, rel=1e-4)
        assert log["logps/chosen"] == pytest.approx(sum(x.sum().item() for x in logps) / 8, rel=1e-4)  # as in DPO

    def test_online_samples(self, step, pairs):
        log, trainer = step(pairs, beta=0.5, online_samples_per_step=5, max_completion_length=8)
        kl, entropy = [], []
        samples = trainer.sample_buffer.samples
        samples[0].terminated = True
        for sample in samples:
            ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
            with torch.no_grad():
                policy, reference = (
                    m(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
                    for m in (trainer.model, trainer.ref_model)
                )
            kl.append((policy.exp() * (policy - reference)).sum())
            entropy.append(-(policy.exp() * policy).sum())
        kl = torch.stack(kl)
        expected = {
            "kl/online": kl.mean(),
            "kl/estimator_std": kl.std(),
            "loss/kl": 0.5 * kl.mean(),
            "entropy/online": torch.stack(entropy).mean(),
            "samples/length": sum(len(sample.completion_ids) for sample in samples) / 5,
            "staleness/ratio": 1.0,
            "loss": log["loss/preference"] + 0.5 * kl.mean(),
        }
        for name, value in expected.items():
            assert log[name] == pytest.approx(float(value), rel=1e-4), name

    def test_terminated(self, make_trainer, train_log, model):
        # About half of the tokens end a completion
        model.generation_config.eos_token_id = list(range(8, 110))
        trainer = make_trainer({"model": model}, online_samples_per_step=8, max_completion_length=2, max_steps=1)
        (log,) = train_log(trainer)
        samples = trainer.sample_buffer.samples
        assert log["samples/terminated"] == pytest.approx(sum(s.terminated for s in samples) / 8)
        assert 0 < log["samples/terminated"] < 1
        assert log["samples/length"] == pytest.approx(sum(len(s.completion_ids) for s in samples) / 8)


class TestPadding:
    @pytest.mark.parametrize("data", ["pairs", "lists"])
    def test_no_metric_counts_it(self, step, request, data):
        dataset = request.getfixturevalue(data)
        plain, padded = (step(dataset, pad_to_multiple_of=multiple)[0] for multiple in (None, 64))
        for name, value in plain.items():
            assert padded[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name

    def test_logged_over_several_steps(self, make_trainer, train_log):
        # The mean of what each step would have logged, weighted by its rows
        each = train_log(make_trainer(max_steps=4, per_device_train_batch_size=2))
        (together,) = train_log(make_trainer(max_steps=4, per_device_train_batch_size=2, logging_steps=4))
        for name in ("loss/preference", "logps/chosen", "kl/online", "rewards/margins", "samples/length"):
            assert together[name] == pytest.approx(sum(entry[name] for entry in each) / 4, rel=1e-5), name
