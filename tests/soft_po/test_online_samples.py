# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Sampling from the model's own distribution, and the buffer of samples."""

import inspect
import math
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl.import_utils import is_vllm_available

from trl_spo._compat import VLLMGeneration
from trl_spo.soft_po import online_samples
from trl_spo.soft_po.online_kl import OnlineKL
from trl_spo.soft_po.online_samples import OnlineSample, SampleBuffer


# What would change the distribution if it leaked from a model's generation config
LEAKS = {
    "do_sample": False,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "typical_p": 0.5,
    "repetition_penalty": 1.5,
    "suppress_tokens": [20, 21, 22, 23],
    "begin_suppress_tokens": [24, 25],
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 3,
    "max_new_tokens": 2,
    "num_beams": 3,
    "forced_eos_token_id": 2,
    "num_return_sequences": 2,
    "bad_words_ids": [[30]],
    "sequence_bias": [[[31], 5.0]],
    "exponential_decay_length_penalty": [1, 2.0],
    "renormalize_logits": True,
}


def set_generation_config(model, **options):
    for name, value in options.items():
        setattr(model.generation_config, name, value)


def chi_square(counts, probabilities):
    """How many standard deviations the statistic lies above its mean, cells that expect few drawn together."""
    expected = probabilities * counts.sum()
    large = expected >= 8
    counts = torch.cat([counts[large], counts[~large].sum(0, keepdim=True)])
    expected = torch.cat([expected[large], expected[~large].sum(0, keepdim=True)])
    degrees = len(counts) - 1
    assert degrees >= 5
    return (((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


class TestDistribution:
    @pytest.mark.parametrize("leaks", [{}, LEAKS])
    @pytest.mark.parametrize("sharpness", [1, 3])
    def test_next_token(self, make_trainer, model_path, load_model, leaks, sharpness):
        # Likelier and less likely tokens, and prompts that hold some of them already
        model = load_model(model_path)
        with torch.no_grad():
            model.lm_head.weight *= sharpness
        set_generation_config(model, **leaks)
        trainer = make_trainer({"model": model}, max_completion_length=1)
        prompts = [[1, 20, 30, 31, 24], [1, 25]]
        n = 3000
        samples = trainer.sampler.sample(trainer.model, [(0, ids) for ids in prompts for _ in range(n)], 0)
        model.eval()
        for i, ids in enumerate(prompts):
            drawn = torch.tensor([sample.completion_ids for sample in samples[i * n : (i + 1) * n]])
            assert drawn.shape == (n, 1)
            counts = torch.bincount(drawn[:, 0], minlength=model.config.vocab_size).double()
            probabilities = model(torch.tensor([ids])).logits[0, -1].double().softmax(0)
            assert abs(chi_square(counts, probabilities)) < 4

    def test_later_tokens(self, make_trainer, model_path, load_model):
        # With the cache, and after what was drawn
        model = load_model(model_path)
        with torch.no_grad():
            model.lm_head.weight *= 6
        set_generation_config(model, **LEAKS)
        model.generation_config.eos_token_id = None
        trainer = make_trainer({"model": model}, max_completion_length=3)
        samples = trainer.sampler.sample(trainer.model, [(0, [1, 20])] * 4000, 0)
        model.eval()
        complete = torch.tensor([sample.completion_ids for sample in samples if len(sample.completion_ids) == 3])
        pairs, sizes = complete[:, :2].unique(dim=0, return_counts=True)
        largest = sizes.argmax()
        prefix = pairs[largest]
        assert sizes[largest] > 200
        drawn = complete[(complete[:, :2] == prefix).all(dim=1), 2]
        counts = torch.bincount(drawn, minlength=model.config.vocab_size).double()
        probabilities = model(torch.tensor([[1, 20, *prefix.tolist()]])).logits[0, -1].double().softmax(0)
        assert abs(chi_square(counts, probabilities)) < 4

    @pytest.mark.parametrize("peft", [False, True])
    def test_own_generation_config_is_unchanged(self, make_trainer, model_path, load_model, peft):
        model = load_model(model_path)
        set_generation_config(model, **LEAKS)
        trainer = make_trainer(
            {
                "model": model,
                "peft_config": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if peft else None,
            }
        )
        holders = [trainer.model, trainer.model.get_base_model()] if peft else [trainer.model]
        before = [(holder.generation_config, holder.generation_config.to_dict()) for holder in holders]
        trainer.train()
        for holder, (config, values) in zip(holders, before, strict=True):
            assert holder.generation_config is config and config.to_dict() == values
            assert config.temperature == 0.3 and config.suppress_tokens == [20, 21, 22, 23]

    def test_left_padding_does_not_matter(self, make_trainer, model_path, load_model):
        # A model that is sure of each token draws what it would draw greedily
        model = load_model(model_path)
        with torch.no_grad():
            model.lm_head.weight *= 1000
        trainer = make_trainer({"model": model}, max_completion_length=5)
        prompts = [[1], [1, 20, 30, 40, 50, 60, 70, 80, 11, 12], [1, 33, 44]]
        samples = trainer.sampler.sample(trainer.model, list(enumerate(prompts)), 0)
        model.eval()
        for i, (sample, ids) in enumerate(zip(samples, prompts, strict=True)):
            expected = []
            while len(expected) < 5 and 2 not in expected:
                expected.append(model(torch.tensor([ids + expected])).logits[0, -1].argmax().item())
            assert (sample.row_id, sample.prompt_ids, sample.completion_ids) == (i, ids, expected)

    def test_ends_with_eos(self, make_trainer, model_path, load_model):
        # Every EOS that the model declares ends a completion, and so does the tokenizer's
        model = load_model(model_path)
        declared = list(range(8, 40))
        model.generation_config.eos_token_id = declared
        trainer = make_trainer({"model": model}, max_completion_length=8)
        samples = trainer.sampler.sample(trainer.model, [(0, [1, 60])] * 200, 0)
        ends = {2, *declared}
        assert set(trainer.sampler.eos_token_ids) == ends
        for sample in samples:
            *body, last = sample.completion_ids
            assert not ends & set(body)
            assert sample.terminated == (last in ends)
            assert sample.terminated or len(sample.completion_ids) == 8
        assert 20 < sum(sample.terminated for sample in samples) < 200
        assert len({len(sample.completion_ids) for sample in samples}) > 5

    def test_cut_at_the_maximum_length(self, make_trainer, model_path, load_model):
        model = load_model(model_path)
        model.generation_config.eos_token_id = None
        trainer = make_trainer({"model": model}, max_completion_length=7)
        assert trainer.sampler.eos_token_ids == [2]
        lengths = {len(sample.completion_ids) for sample in trainer.sampler.sample(trainer.model, [(0, [1])] * 20, 0)}
        assert max(lengths) == 7


class TestRandomness:
    def test_depends_on_the_seed_alone(self, make_trainer):
        trainer = make_trainer()

        def draw(*seed):
            return [s.completion_ids for s in trainer.sampler.sample(trainer.model, [(0, [1, 20])] * 6, *seed)]

        first = draw(42, 0, 1)
        torch.manual_seed(123)
        assert draw(42, 0, 1) == first
        assert draw(42, 0, 2) != first and draw(42, 1, 1) != first and draw(43, 0, 1) != first
        assert len({tuple(ids) for ids in first}) == 6

    def test_leaves_the_global_state(self, make_trainer):
        trainer = make_trainer()
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        trainer.sampler.sample(trainer.model, [(0, [1, 20])] * 6, 0)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]

    @pytest.mark.parametrize("training", [False, True])
    def test_mode_is_restored(self, make_trainer, training):
        trainer = make_trainer()
        trainer.model.train(training)
        modes = []
        trainer.model.register_forward_hook(lambda module, *args: modes.append(module.training))
        trainer.sampler.sample(trainer.model, [(0, [1, 20])], 0)
        assert not any(modes) and modes
        assert trainer.model.training == training and trainer.model.model.layers[0].training == training

    def test_rounds_differ(self, make_trainer):
        trainer = make_trainer(resample_steps=1, max_steps=3, beta=0.1, learning_rate=0.0)
        drawn = []

        class Record(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                drawn.append([(tuple(s.prompt_ids), tuple(s.completion_ids)) for s in trainer.sample_buffer.samples])

        trainer.add_callback(Record())
        trainer.train()
        assert len({sample for step in drawn for sample in step}) == 12


class TestWhenSamplesAreDrawn:
    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize(
        ("resample_steps", "steps"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (8, [0])]
    )
    def test_every_resample_steps(self, make_trainer, monkeypatch, resample_steps, steps, accumulation):
        trainer = make_trainer(
            resample_steps=resample_steps,
            max_steps=5,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=2,
        )
        drawn, sample = [], trainer.sampler.sample

        def record(*args):
            drawn.append(trainer.state.global_step)
            return sample(*args)

        monkeypatch.setattr(trainer.sampler, "sample", record)
        trainer.train()
        assert drawn == steps

    def test_second_training(self, make_trainer, train_log):
        # Counts its steps from 0 again
        trainer = make_trainer(resample_steps=2, max_steps=3, online_samples_per_step=8, learning_rate=0.2)
        trainer.train()
        assert trainer.sample_buffer.step == 2
        assert train_log(trainer)[0]["staleness/ratio"] == pytest.approx(1, abs=1e-5)

    def test_next_prompts_in_each_round(self, make_trainer):
        trainer = make_trainer(resample_steps=1, max_steps=2, online_samples_per_step=4)
        rows = []

        class Record(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                rows.extend(sample.row_id for sample in trainer.sample_buffer.samples)

        trainer.add_callback(Record())
        trainer.train()
        assert sorted(rows) == list(range(8))

    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize(
        ("size", "steps"),
        [(4, ["0123", "0123", "0123"]), (8, ["0123", "4567", "0123"]), (12, ["0123", "4567", "89AB"])],
    )
    def test_dealt_in_turn(self, make_trainer, monkeypatch, size, steps, accumulation):
        trainer = make_trainer(
            online_samples_per_step=4,
            online_buffer_size=size,
            resample_steps=3,
            max_steps=3,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=2,
        )
        used, compute = {}, OnlineKL.__call__

        def record(self, model, samples):
            for sample in samples:
                position = next(i for i, other in enumerate(trainer.sample_buffer.samples) if other is sample)
                used.setdefault(trainer.state.global_step, []).append(f"{position:X}")
            return compute(self, model, samples)

        monkeypatch.setattr(OnlineKL, "__call__", record)
        trainer.train()
        assert ["".join(used[step]) for step in range(3)] == steps


class TestBuffer:
    def buffer(self, make_args, n=6, per_step=6):
        buffer = SampleBuffer(make_args(online_samples_per_step=per_step, online_buffer_size=n))
        buffer.replace([OnlineSample(i, [1], [i], True) for i in range(n)], step=10)
        return buffer

    @pytest.mark.parametrize("micro_steps", [1, 2, 3, 4, 5, 6, 7, 16])
    def test_shares_of_the_micro_batches(self, make_args, micro_steps):
        buffer = self.buffer(make_args)
        shares = [buffer.micro_batch(10, k, micro_steps) for k in range(micro_steps)]
        assert [sample.row_id for share in shares for sample in share] == list(range(6))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1

    def test_state(self, make_args):
        buffer = self.buffer(make_args)
        buffer.samples[2].old_logp = -3.5
        buffer.samples[2].reference_hidden = torch.zeros(2, 2)
        restored = SampleBuffer(buffer.args)
        restored.load_state_dict(buffer.state_dict())
        assert (restored.step, restored.round) == (10, 1)
        assert restored.samples[2].old_logp == -3.5 and restored.samples[2].reference_hidden is None
        assert [s.completion_ids for s in restored.samples] == [s.completion_ids for s in buffer.samples]

    def test_is_due(self, make_args):
        buffer = SampleBuffer(make_args(resample_steps=3))
        assert buffer.is_due(0)
        buffer.replace([], step=0)
        assert [buffer.is_due(step) for step in range(1, 5)] == [False, False, True, True]


class VLLMStandIn:
    """
    In the place of TRL's `VLLMGeneration`, since vLLM is not needed to run these tests: it keeps what it is given, and
    answers with the model as it was at the last synchronisation.
    """

    instances = []

    def __init__(self, **kwargs):
        self.kwargs = kwargs
        self.calls = []
        self.instances.append(self)

    def sync_weights(self):
        self.calls.append("sync")
        self.weight = self.kwargs["model"].lm_head.weight.detach().clone()

    def generate(self, prompts, images, num_generations):
        self.calls.append(len(prompts))
        assert images is None and num_generations == 1
        assert torch.equal(self.weight, self.kwargs["model"].lm_head.weight)
        completions = []
        for ids in prompts:
            output = self.kwargs["model"].generate(torch.tensor([ids]), do_sample=True, top_k=0, max_new_tokens=4)
            # vLLM gives what it drew, with EOS and without padding; here with a token too much after EOS
            completions.append([*output[0, len(ids) :].tolist(), 2, 50][:6])
        return prompts, completions, None, None


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setattr(VLLMStandIn, "instances", [])
    monkeypatch.setattr(online_samples, "VLLMGeneration", VLLMStandIn)
    return VLLMStandIn


class TestVLLM:
    def test_arguments(self, make_trainer, vllm):
        trainer = make_trainer(
            use_vllm=True,
            vllm_mode="server",
            vllm_model_impl="transformers",
            vllm_enable_sleep_mode=True,
            vllm_server_base_url="http://localhost:1234",
            vllm_server_host="host",
            vllm_server_port=4321,
            vllm_server_timeout=7.0,
            vllm_group_port=5555,
            vllm_gpu_memory_utilization=0.7,
            vllm_max_model_length=99,
            vllm_tensor_parallel_size=2,
            max_completion_length=6,
            online_samples_per_step=4,
            online_buffer_size=8,
            top_k=-1,
        )
        (instance,) = vllm.instances
        assert instance.kwargs == {
            "model": trainer.model,
            "accelerator": trainer.accelerator,
            "processing_class": trainer.processing_class,
            "mode": "server",
            "server_base_url": "http://localhost:1234",
            "server_host": "host",
            "server_port": 4321,
            "server_timeout": 7.0,
            "group_port": 5555,
            "tensor_parallel_size": 2,
            "gpu_memory_utilization": 0.7,
            "max_model_length": 99,
            "max_num_seqs": 16,
            "enable_sleep_mode": True,
            "model_impl": "transformers",
            "trust_remote_code": False,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_completion_length": 6,
            "logprobs": None,
            "generation_kwargs": None,
        }

    def test_arguments_are_those_of_trl(self, make_trainer, vllm):
        make_trainer(use_vllm=True)
        inspect.signature(VLLMGeneration.__init__).bind(None, **vllm.instances[0].kwargs)
        inspect.signature(VLLMGeneration.generate).bind(None, prompts=[[1]], images=None, num_generations=1)

    def test_training(self, make_trainer, train_log, vllm, pairs):
        trainer = make_trainer(
            {"eval_dataset": pairs},
            use_vllm=True,
            resample_steps=2,
            max_steps=4,
            online_samples_per_step=3,
            eval_online_samples=5,
        )
        log = train_log(trainer)
        (instance,) = vllm.instances
        # The weights are sent before each resampling
        assert instance.calls == ["sync", 3, "sync", 3]
        assert log[0]["staleness/ratio"] == pytest.approx(1, abs=1e-5) and log[-1]["kl/online"] > 0
        for sample in trainer.sample_buffer.samples:
            # Cut after the first EOS
            assert sample.terminated and sample.completion_ids.index(2) == len(sample.completion_ids) - 1
        trainer.evaluate()
        evaluation = instance.calls[4:]
        assert evaluation[0] == "sync" and sum(call for call in evaluation if call != "sync") == 5

    def test_not_without_the_regularizer(self, make_trainer, vllm):
        make_trainer(use_vllm=True, beta=0.0).train()
        assert vllm.instances == []

    @pytest.mark.skipif(is_vllm_available(), reason="vLLM is installed")
    def test_without_vllm(self, make_trainer):
        with pytest.raises(ImportError, match="vLLM is not available and `use_vllm` is set to True. Please install"):
            make_trainer(use_vllm=True)
