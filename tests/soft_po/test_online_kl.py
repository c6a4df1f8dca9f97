# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The KL divergence from hidden states and LM heads, against that from the plain logits of both models."""

import pytest
import torch
from peft import LoraConfig

from trl_spo import losses
from trl_spo.soft_po.online_kl import LMHead, logit_scale
from trl_spo.soft_po.online_samples import OnlineSample


ARCHITECTURES = [
    "llama",
    "llama-tied",
    "gemma2-softcapping",
    "cohere-logit-scale",
    "granite-logits-scaling",
    "phi-head-bias",
    "gptj-head-bias",
    "mixtral-experts",
]


def random_samples(n=5, seed=0):
    """Samples with prompts and completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(8, 90, (length,), generator=generator).tolist()

    return [OnlineSample(i, [1, *ids(0, 8)], ids(1, 9), terminated=i % 2 == 0) for i in range(n)]


def plain(policy, reference, sample):
    """KL terms, log-probabilities and entropies of one sample's tokens from plain forwards, unpadded."""
    ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
    logits = policy(input_ids=ids).logits[:, :-1].float()
    with torch.no_grad():
        reference_logits = reference(input_ids=ids).logits[:, :-1].float()
    mask = torch.zeros(1, ids.size(1) - 1, dtype=torch.bool)
    mask[:, len(sample.prompt_ids) - 1 :] = True
    kl = losses.token_kl(logits, reference_logits, mask)
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1) * mask
    return kl, logps.gather(2, ids[:, 1:, None]).squeeze(2) * mask, entropy


@pytest.fixture
def setting(make_trainer, perturb):
    """A trainer whose policy has left the reference, and annotated samples; arguments as in `make_trainer`."""

    def make(trainer_kwargs=None, scale=0.1, **kwargs):
        trainer = make_trainer(trainer_kwargs, beta=0.1, **{"online_samples_per_step": 5, **kwargs})
        perturb(trainer.model, scale=scale)
        samples = random_samples()
        trainer.online_kl.annotate(trainer.model, samples)
        return trainer, samples

    return make


class TestAgainstPlainLogits:
    @pytest.mark.parametrize("estimator", ["token", "score"])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_value_and_gradient(self, setting, model_paths, architecture, estimator):
        trainer, samples = setting({"model": model_paths(architecture)}, kl_estimator=estimator)
        model = trainer.model
        output = trainer.online_kl(model, samples)
        output.loss.sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()

        terms = [plain(model, trainer.ref_model, sample) for sample in samples]
        kl = torch.cat([kl.sum(dim=1) for kl, _, _ in terms])
        expected = kl if estimator == "token" else torch.cat([losses.score_kl(kl, logps) for kl, logps, _ in terms])
        expected.sum().backward()

        assert kl.min() > 0.01
        torch.testing.assert_close(output.kl, kl.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            output.entropy, torch.cat([entropy.sum(dim=1) for _, _, entropy in terms]).detach(), rtol=1e-5, atol=1e-5
        )
        by_hand = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, by_hand[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        difference = torch.stack([(gradients[name] - by_hand[name]).norm() for name in gradients]).norm()
        assert difference < 1e-5 * torch.stack([gradient.norm() for gradient in by_hand.values()]).norm()

    def test_score_weighs_each_token_with_the_kl_still_to_come(self):
        kl = torch.tensor([[3.0, 1.0, 5.0, 0.0], [2.0, 0.0, 0.0, 0.0]], requires_grad=True)
        logps = torch.tensor([[-1.0, -2.0, -0.5, 0.0], [-3.0, 0.0, 0.0, 0.0]], requires_grad=True)
        value = losses.score_kl(kl, logps)
        assert value.tolist() == [9.0, 2.0]
        value.sum().backward()
        # Without the token's own term, whose expectation is 0
        assert logps.grad.tolist() == [[6.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
        assert kl.grad.tolist() == [[1.0] * 4] * 2

    def test_estimators_differ_in_their_gradients_only(self, setting):
        values, gradients = [], []
        for estimator in ("token", "score"):
            trainer, samples = setting(kl_estimator=estimator)
            loss = trainer.online_kl(trainer.model, samples).loss.sum()
            loss.backward()
            values.append(loss.item())
            gradients.append(trainer.model.lm_head.weight.grad)
        assert values[0] == pytest.approx(values[1])
        assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()

    def test_reference_of_another_size(self, setting, tokenizer, load_model, model_paths):
        # Another hidden size, a bias and another scale: only the vocabulary must be the same
        reference = load_model(model_paths("phi-head-bias"))
        trainer, samples = setting({"ref_model": reference})
        output = trainer.online_kl(trainer.model, samples)
        expected = [plain(trainer.model, reference, sample)[0].sum() for sample in samples]
        torch.testing.assert_close(output.kl, torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
    def test_peft(self, make_trainer, perturb, load_model, model_path, modules_to_save):
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules_to_save, task_type="CAUSAL_LM")
        trainer = make_trainer({"peft_config": config})
        perturb(trainer.model, only_trainable=True, scale=0.5)
        samples = random_samples()
        trainer.online_kl.annotate(trainer.model, samples)
        output = trainer.online_kl(trainer.model, samples)
        reference = load_model(model_path)
        expected = [plain(trainer.model, reference, sample)[0].sum() for sample in samples]
        torch.testing.assert_close(output.kl, torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
        assert output.kl.min() > 1e-3

    def test_never_builds_the_logits(self, setting):
        trainer, samples = setting()
        shapes = []
        trainer.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
        trainer.online_kl(trainer.model, samples)
        assert shapes == []


class TestBatches:
    def test_neighbours_and_padding_do_not_matter(self, setting):
        trainer, samples = setting(kl_estimator="score")
        together = trainer.online_kl(trainer.model, samples)
        for i, sample in enumerate(samples):
            alone = trainer.online_kl(trainer.model, [sample])
            for name in ("loss", "kl", "entropy", "ratio"):
                value = getattr(together, name)[i : i + 1]
                torch.testing.assert_close(getattr(alone, name), value, rtol=1e-5, atol=1e-5)

    def test_annotated_in_other_batches(self, setting):
        trainer, samples = setting()
        kept = [sample.reference_hidden for sample in samples]
        trainer.args.online_samples_per_step = 2
        trainer.online_kl.annotate(trainer.model, samples)
        for before, sample in zip(kept, samples, strict=True):
            assert sample.reference_hidden.shape == (len(sample.completion_ids), 16)
            torch.testing.assert_close(sample.reference_hidden, before, rtol=1e-5, atol=1e-5)
            # Nothing but the sample's own states is kept alive
            assert sample.reference_hidden.untyped_storage().nbytes() == sample.reference_hidden.nbytes

    def test_lengths_and_ends(self, setting):
        trainer, samples = setting()
        output = trainer.online_kl(trainer.model, samples)
        assert output.length.tolist() == [len(sample.completion_ids) for sample in samples]
        assert output.terminated.tolist() == [True, False, True, False, True]


class TestAnnotation:
    def test_old_logps(self, setting, token_logps):
        trainer, samples = setting()
        for sample in samples:
            expected = token_logps(trainer.model, sample.prompt_ids, sample.completion_ids).sum().item()
            assert sample.old_logp == pytest.approx(expected, rel=1e-5)

    def test_restored_samples_keep_their_old_logps(self, setting, perturb):
        trainer, samples = setting()
        old = [sample.old_logp for sample in samples]
        states = [sample.reference_hidden for sample in samples]
        perturb(trainer.model, seed=2)
        for sample in samples:
            sample.reference_hidden = None
        trainer.online_kl.annotate(trainer.model, samples)
        assert [sample.old_logp for sample in samples] == old
        for before, sample in zip(states, samples, strict=True):
            assert torch.equal(before, sample.reference_hidden)

    @pytest.mark.parametrize("training", [False, True])
    def test_mode_is_restored(self, setting, training):
        trainer, samples = setting()
        trainer.model.train(training)
        modes = []
        hook = trainer.model.model.register_forward_hook(lambda module, *args: modes.append(module.training))
        for sample in samples:
            sample.old_logp = None
        trainer.online_kl.annotate(trainer.model, samples)
        assert modes == [False] and trainer.model.training == training
        hook.remove()

    def test_no_graph_is_kept(self, setting):
        trainer, samples = setting()
        assert not any(sample.reference_hidden.requires_grad for sample in samples)
        trainer.online_kl(trainer.model, samples).loss.sum().backward()
        assert all(parameter.grad is None for parameter in trainer.ref_model.parameters())


class TestStaleness:
    def test_ratio_is_one_right_after_sampling(self, make_trainer, train_log):
        log = train_log(make_trainer(resample_steps=2, max_steps=4, learning_rate=0.2, online_samples_per_step=8))
        ratios = [entry["staleness/ratio"] for entry in log]
        assert ratios[0] == pytest.approx(1, abs=1e-5) and ratios[2] == pytest.approx(1, abs=1e-5)
        assert abs(ratios[1] - 1) > 1e-3 and abs(ratios[3] - 1) > 1e-3

    def test_ratio(self, setting, perturb, token_logps):
        trainer, samples = setting()
        perturb(trainer.model, seed=2, scale=0.05)
        output = trainer.online_kl(trainer.model, samples)
        logps = [
            token_logps(trainer.model, sample.prompt_ids, sample.completion_ids).sum().item() for sample in samples
        ]
        expected = torch.exp(torch.tensor(logps) - torch.tensor([sample.old_logp for sample in samples]))
        torch.testing.assert_close(output.ratio, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("estimator", ["token", "score"])
    def test_truncated_importance_weights(self, setting, perturb, estimator):
        trainer, samples = setting(kl_estimator=estimator)
        perturb(trainer.model, seed=2, scale=0.05)
        plain_output = trainer.online_kl(trainer.model, samples)
        cap = plain_output.ratio.sort().values[2].item()  # some are truncated and some are not
        weights = plain_output.ratio.clamp(max=cap)
        assert len(weights.unique()) == 3
        (weights * plain_output.loss).sum().backward()
        expected = trainer.model.lm_head.weight.grad.clone()
        trainer.model.zero_grad()

        trainer.args.importance_sampling_cap = cap
        output = trainer.online_kl(trainer.model, samples)
        torch.testing.assert_close(output.loss, weights * plain_output.loss)
        torch.testing.assert_close(output.kl, plain_output.kl)  # is reported as it is
        torch.testing.assert_close(output.ratio, plain_output.ratio)
        output.loss.sum().backward()
        torch.testing.assert_close(trainer.model.lm_head.weight.grad, expected)

    def test_cap_in_training(self, make_trainer, train_log):
        # Of no consequence in the step that samples, only afterwards
        logs = [
            train_log(make_trainer(importance_sampling_cap=cap, resample_steps=8, learning_rate=0.2, alpha=1.0))
            for cap in (None, 1e-3)
        ]
        assert logs[0][0]["loss/kl"] == pytest.approx(logs[1][0]["loss/kl"], abs=1e-6)
        assert logs[1][1]["loss/kl"] <= 1.001e-3 * logs[0][1]["loss/kl"]
        assert logs[1][1]["kl/online"] == pytest.approx(logs[0][1]["kl/online"], rel=1e-4)


class TestLMHead:
    @pytest.mark.parametrize(
        ("architecture", "scale", "softcapping", "bias"),
        [
            ("llama", 1.0, None, False),
            ("gemma2-softcapping", 1.0, 2.0, False),
            ("cohere-logit-scale", 0.25, None, False),
            ("granite-logits-scaling", 0.25, None, False),
            ("phi-head-bias", 1.0, None, True),
        ],
    )
    def test_of(self, load_model, model_paths, architecture, scale, softcapping, bias):
        model = load_model(model_paths(architecture))
        head = LMHead.of(model)
        assert (head.logit_scale, head.final_logit_softcapping, head.bias is not None) == (scale, softcapping, bias)
        hidden = model.base_model(input_ids=torch.tensor([[1, 20, 30]])).last_hidden_state
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
        if softcapping is not None:
            logits = softcapping * torch.tanh(logits / softcapping)
        torch.testing.assert_close(logits, model(input_ids=torch.tensor([[1, 20, 30]])).logits)

    def test_tied(self, load_model, model_paths):
        model = load_model(model_paths("llama-tied"))
        assert LMHead.of(model).weight is model.get_input_embeddings().weight

    @pytest.mark.parametrize(
        ("options", "scale"),
        [
            ({}, 1.0),
            ({"logit_scale": None, "logits_scaling": None}, 1.0),
            ({"logit_scale": 0.5}, 0.5),
            ({"logit_scale": 0.0}, 0.0),
            ({"output_multiplier": 3.0}, 3.0),
            ({"lm_head_multiplier": 2.0}, 2.0),
            ({"logits_scaling": 8.0}, 0.125),
            ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
        ],
    )
    def test_logit_scale(self, options, scale):
        class Config:
            model_type = "any"

        config = Config()
        for name, value in options.items():
            setattr(config, name, value)
        assert logit_scale(config) == scale


class TestTraining:
    def test_weight_and_mean(self, make_trainer, train_log):
        # loss/kl = β times the mean over the samples of kl/online, and only its gradient moves the model
        log = train_log(make_trainer(beta=0.7, max_steps=3, online_samples_per_step=5, learning_rate=0.02))
        for entry in log:
            assert entry["loss/kl"] == pytest.approx(0.7 * entry["kl/online"], rel=1e-5)
        assert log[-1]["loss/kl"] > 1e-4

    @pytest.mark.parametrize("estimator", ["token", "score"])
    def test_gradient_of_a_step(self, make_trainer, perturb, estimator):
        # By hand: the step of SGD is the learning rate times ∇(preference loss + β mean KL)
        trainer = make_trainer(
            beta=3.0, kl_estimator=estimator, max_steps=1, learning_rate=1e-3, online_samples_per_step=4
        )
        perturb(trainer.model)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        batches = []
        collate = trainer.data_collator

        def keep(examples):
            batches.append(collate(examples))
            return collate(examples)

        trainer.data_collator = keep
        trainer.train()
        after = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(before[name])
        trainer.model.train()
        trainer.model.zero_grad()
        samples = trainer.sample_buffer.samples
        assert len(samples) == 4
        terms = [plain(trainer.model, trainer.ref_model, sample) for sample in samples]
        kl = [kl.sum() if estimator == "token" else losses.score_kl(kl, logps).sum() for kl, logps, _ in terms]
        (trainer.compute_loss(trainer.model, batches[0]) + 3.0 * torch.stack(kl).mean()).backward()
        for name, parameter in trainer.model.named_parameters():
            step = (before[name] - after[name]) / 1e-3
            assert (step - parameter.grad).norm() < 0.01 * parameter.grad.norm(), name
