# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory, against what training steps of real small models really hold; time by hand."""

import contextlib
import dataclasses
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.advisor.conftest import codes, only
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from trl_spo._compat import add_fused_lm_head
from trl_spo.advisor.gpus import Gpu, find_gpu, known_gpus
from trl_spo.advisor.memory import GIB, estimate_memory, layer_bytes, measure_model, states
from trl_spo.advisor.models import ModelFacts, empty_model, fits_here, read_model
from trl_spo.advisor.plan import Launch, make_plan, read_launch
from trl_spo.advisor.resources import estimate_time, optimizer_steps, resource_findings, training_flops


def _facts(config):
    return ModelFacts("model", config, frozenset())


def _llama(layers=2, **kwargs):
    return LlamaConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **kwargs,
        }
    )


# Of 7.6 billion parameters: Qwen2.5-7B's
_LARGE = LlamaConfig(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)


@functools.cache
def _large(lora=False):
    return measure_model(_facts(_LARGE), make_plan("dpo", {"use_peft": lora}))


def _bytes_of_a_step(model):
    """What is in memory after a step of AdamW: weights, gradients, the two moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.arange(24).reshape(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    tensors = {"weights": model.parameters(), "gradients": (p.grad for p in trained), "optimizer": moments}
    return {name: sum(tensor.nbytes for tensor in values) for name, values in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_states_are_those_of_a_real_step(dtype, tied):
    config = _llama(tie_word_embeddings=tied)
    measured = _bytes_of_a_step(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)))
    plan = make_plan("dpo", {"dtype": dtype})
    size = measure_model(_facts(config), plan)
    found, cpu = states(size, plan, Launch(), {"float32": 4, "bfloat16": 2}[dtype])
    assert {name: found[name] for name in measured} == measured
    assert found["reference"] == measured["weights"] and cpu == 0.0


def test_states_of_lora_are_those_of_a_real_step():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_llama(), dtype=torch.bfloat16)
    measured = _bytes_of_a_step(get_peft_model(model, LoraConfig(r=16, task_type="CAUSAL_LM")))
    plan = make_plan("dpo", {"dtype": "bfloat16", "use_peft": True})
    size = measure_model(_facts(_llama()), plan)
    found, _ = states(size, plan, Launch(), 2)
    assert {name: found[name] for name in measured} == measured
    assert found["reference"] == 0.0  # the model without the adapter


def test_states_of_sharded_trainings():
    """By ZeRO's paper: 2 + 2 + 12 bytes a parameter, of which stage 1 shards the 12, stage 2 also the gradients, stage 3 all."""
    plan = make_plan("dpo")
    size = _large()
    p = size.parameters
    expected = {
        "zero1": (2 * p, 2 * p, 12 * p / 8, 2 * p),
        "zero2": (2 * p, 2 * p / 8, 12 * p / 8, 2 * p),
        "zero3": (2 * p / 8, 2 * p / 8, 12 * p / 8, 2 * p / 8),
        "fsdp2": (4 * p / 8, 4 * p / 8, 8 * p / 8, 4 * p / 8),
        "multi_gpu": (4 * p, 4 * p, 8 * p, 4 * p),
        "zero3_offload": (0, 0, 0, 0),
    }
    for name, values in expected.items():
        found, cpu = states(size, plan, read_launch(name, 8), 4)
        assert tuple(found.values()) == pytest.approx(values), name
        assert cpu == pytest.approx((2 + 2 + 12 + 6) * p / 8 if name == "zero3_offload" else 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single_gpu", lambda p, n: 24 * p),
        ("multi_gpu", lambda p, n: 28 * p),
        ("zero2", lambda p, n: max(4 * p + 14 * p / n + 1, 4 * p + 20 * p / n)),
        ("zero3", lambda p, n: 18 * p / n + 6 * min(p / n, 1) + 1 + 4 * min(p, 1)),
        ("zero3_offload", lambda p, n: 1 + 4 * min(p, 1)),
        ("fsdp2", lambda p, n: 20 * p / n + 4 * p),
    ],
)
@pytest.mark.parametrize("processes", [2, 16])
def test_what_was_counted_of_real_trainings(name, expected, processes):
    """docs/distributed.md has the bytes of DPO and Soft PO on a Llama of 94M parameters, tensor by tensor, in GB with parameters in billions."""
    processes = 1 if name == "single_gpu" else processes
    size = dataclasses.replace(_large(), vocabulary=0)  # without activations and the LM head's gradient
    memory = estimate_memory(size, make_plan("dpo"), read_launch(name, processes), tokens=0)
    found = memory.total - memory.working["CUDA"]
    assert found / 1e9 == pytest.approx(expected(size.parameters / 1e9, processes), rel=1e-3)


@pytest.mark.parametrize(("stage", "processes"), [(2, 8), (3, 8), (3, 2)])
def test_near_to_deepspeeds_own_estimate(stage, processes):
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    plan = make_plan("dpo", {"precompute_ref_log_probs": True})
    size = _large()
    found, _ = states(size, plan, Launch("zero", processes, stage, deepspeed=True), 4)
    if stage == 2:  # 20 bytes a parameter where we have 16, since it keeps gradients in 32 bits, too
        _, theirs = estimate_zero2_model_states_mem_needs(size.parameters, processes, 1, cpu_offload=False)
    else:
        _, theirs, layer = estimate_zero3_model_states_mem_needs(
            size.parameters, size.largest_layer, processes, 1, cpu_offload=False, cpu_offload_params=False
        )
        theirs -= layer
    assert 0.8 <= sum(found.values()) / theirs <= 1.0


def test_reference_is_kept_where_it_is_read():
    size = measure_model(_facts(_llama()), make_plan("dpo"))

    def reference(method, **options):
        return states(size, make_plan(method, options), Launch(), 4)[0]["reference"] / size.parameters

    assert reference("dpo") == reference("kto") == reference("soft_po") == 4
    assert reference("dpo", precompute_ref_log_probs=True) == 0
    assert reference("soft_po", precompute_ref_log_probs=True) == 4  # for the regularizer
    assert reference("soft_po", beta=0.0, calibration="none") == 0
    assert reference("stable_po", upper_loss=["simpo"], bilevel="alternating") == 0


def test_optimizers():
    size = measure_model(_facts(_llama()), make_plan("dpo"))
    for name, each in (("adamw_torch", 8), ("adamw_bnb_8bit", 2), ("sgd", 0), ("paged_adamw_32bit", 8)):
        found, _ = states(size, make_plan("dpo", {"optim": name}), Launch(), 4)
        assert found["optimizer"] == each * size.parameters, name


def _saved(config, checkpointing, dtype, autocast, tokens=48):
    """Bytes that a real forward pass keeps for its backward pass, without the weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    add_fused_lm_head(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(2 * tokens).reshape(2, tokens)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True)
    return sum(found.values()) / (2 * tokens)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize(
    ("dtype", "autocast", "number", "residual"),
    [(torch.float32, False, 4, 4), (torch.bfloat16, False, 2, 2), (torch.float32, True, 2, 4)],
)
def test_activations_of_a_layer(dtype, autocast, number, residual):
    for make, tolerance in ((_llama, 0.15), (lambda layers: _qwen(layers), 0.35)):
        size = measure_model(_facts(make(2)), make_plan("dpo"))
        for checkpointing in (False, True):
            few, many = (_saved(make(layers), checkpointing, dtype, autocast) for layers in (2, 4))
            expected = size.hidden * residual if checkpointing else layer_bytes(size, number, residual)
            # Autocast also keeps its copies of the weights, which are counted elsewhere
            copies = 0.0
            if autocast and not checkpointing:
                copies = 2 * (measure_model(_facts(make(4)), make_plan("dpo")).parameters - size.parameters) / 2 / 96
            assert (many - few) / 2 == pytest.approx(expected + copies, rel=0.01 if checkpointing else tolerance)


def _qwen(layers):
    return Qwen3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


def test_memory_grows_with_what_it_should():
    @functools.cache
    def size_of(lora):
        return measure_model(_facts(_llama(8)), make_plan("dpo", {"use_peft": lora}))

    def total(method="dpo", launch=None, tokens=512, **options):
        plan = make_plan(method, options)
        size = size_of(bool(options.get("use_peft")))
        return estimate_memory(size, plan, launch or Launch(), tokens).total

    assert total(gradient_checkpointing=False) > total()
    assert total(per_device_train_batch_size=16) > total()
    assert total(tokens=1024) > total()
    assert total(use_peft=True) < total()
    assert total("soft_po", beta=0.0) < total("soft_po")
    assert total("soft_po", online_samples_per_step=64) > total("soft_po")
    assert total(dtype="bfloat16") < total()
    # States and the rest are all of it
    plan = make_plan("dpo")
    memory = estimate_memory(size_of(False), plan, Launch(), 512)
    assert memory.to_dict()["total"] == pytest.approx(
        sum(memory.to_dict()["states"].values()) + sum(memory.to_dict()["working"].values())
    )


def test_activations_are_those_of_all_responses_of_a_row():
    from trl_spo.soft_po.preference_data import DataCollatorForSoftPO

    plan = make_plan("soft_po", {"beta": 0.0, "per_device_train_batch_size": 8})
    size = measure_model(_facts(_llama()), plan)
    activations = [estimate_memory(size, plan, Launch(), 32, n).working["activations"] for n in (2, 16)]
    rows = [{"prompt_ids": [1], "completion_ids": [[2]] * 16, "ranks": list(range(16))}] * 8
    assert len(DataCollatorForSoftPO(0)(rows)["input_ids"]) == plan.sequences(16) == 128
    assert activations[1] == 8 * activations[0]
    gpu = Gpu("g", 1.0)
    (few, many) = (resource_findings(size, plan, Launch(), gpu, 8, 2.0, 9.0, 32, n)[0].data["total"] for n in (2, 16))
    assert (many - few) * GIB == pytest.approx(
        sum(estimate_memory(size, plan, Launch(), 32, 16).working.values())
        - sum(estimate_memory(size, plan, Launch(), 32, 2).working.values())
    )


def test_autocast_keeps_16_bit_copies_of_what_is_trained():
    def copies(**options):
        plan = make_plan("dpo", options)
        found = estimate_memory(_large(bool(options.get("use_peft"))), plan, Launch(), 1024)
        return found.working["16-bit copies"]

    whole = _large().parameters
    assert copies() == 2 * 2 * whole  # the policy's and the reference's
    assert copies(use_peft=True, gradient_checkpointing=False) == 2 * _large(True).parameters
    # Frozen weights are not saved for the backward pass: a layer's copies go with the layer, measured as 4.6 bytes a parameter in all
    assert copies(use_peft=True) == copies(dtype="bfloat16") == copies(bf16=False) == 0


def test_sharding_saves_memory():
    def total(name):
        return estimate_memory(_large(), make_plan("dpo"), read_launch(name, 8), 512).total

    assert total("zero3_offload") < total("zero3") < total("zero2") < total("zero1") < total("multi_gpu")


def test_experts_count_as_far_as_a_token_meets_them():
    from transformers import MixtralConfig

    options = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    size = measure_model(
        _facts(MixtralConfig(**options, num_local_experts=8, num_experts_per_tok=2)), make_plan("dpo")
    )
    of_two = measure_model(
        _facts(MixtralConfig(**options, num_local_experts=2, num_experts_per_tok=2)), make_plan("dpo")
    )
    # But for the router, which has a row for each expert
    assert size.multiplied - of_two.multiplied == 2 * 64 * (8 - 2)
    assert size.parameters > 3 * of_two.parameters - 300 * 64 * 2 * 3


def test_parameters_without_loading(stories):
    facts = read_model(stories)
    size = measure_model(facts, make_plan("dpo"))
    assert size.parameters == size.multiplied == 260_032  # by the data's own description
    assert (facts.context, facts.vocabulary, facts.stop_ids) == (512, 512, {1, 2})
    assert all(parameter.is_meta for parameter in empty_model(facts).parameters())


def test_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_model(str(tmp_path / "nothing"))


def test_models_that_are_too_large_are_not_loaded(monkeypatch):
    from types import SimpleNamespace

    model, facts = empty_model(_facts(_llama())), _facts(_llama())
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for free, fits in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert (fits_here(model, facts) is None) == fits


def test_weights_are_as_large_as_their_file(monkeypatch):
    from types import SimpleNamespace

    facts = _facts(_llama(dtype="bfloat16"))
    model = empty_model(facts)  # in 32 bits, which is not what the file has
    needed = 2 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 * needed))
    assert facts.config.dtype == torch.bfloat16 and fits_here(model, facts) is None


def test_gpus():
    assert find_gpu("H100") == find_gpu("nvidia h100") == find_gpu("h100-80gb") == Gpu("h100", 80.0, 989e12, 3.35e12)
    assert find_gpu("4090") == find_gpu("RTX 4090") == find_gpu("GeForce RTX 4090") == find_gpu("rtx-4090")
    assert find_gpu("48GB") == Gpu("48GB", 48.0)
    for name in known_gpus():
        assert find_gpu(name).name == name
    for name in ("h1000", "0GB", "fast"):
        with pytest.raises(ValueError, match="`gpu` must be one of"):
            find_gpu(name)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="this machine has none"):
            find_gpu("local")


def test_time_by_hand():
    plan = make_plan(
        "dpo", {"gradient_checkpointing": False, "num_train_epochs": 1.0, "per_device_train_batch_size": 2}
    )
    size = _large()
    assert training_flops(size, plan, 1.0) == (6 + 2) * size.multiplied  # forward and backward, and the reference
    assert training_flops(size, make_plan("dpo"), 1.0) == (6 + 2 + 2) * size.multiplied
    assert (
        training_flops(size, make_plan("dpo", {"use_peft": True, "gradient_checkpointing": False}), 1.0)
        == 6 * size.multiplied
    )
    found = estimate_time(
        size, plan, Launch(num_processes=4), Gpu("g", 80, 1e15, 1e12), steps=1000, sequences=2.0, mean_tokens=500.0
    )
    assert (found["steps"], found["tokens"]) == (1000, 16000 * 500)  # 2 rows each, of 4 processes
    assert found["hours"] == pytest.approx(8 * size.multiplied * 16000 * 500 / (4 * 1e15 * 0.35) / 3600)
    assert estimate_time(size, plan, Launch(), Gpu("g", 80), 10, 2.0, 1.0) is None


def test_generation_takes_time():
    size = _large()
    gpu = Gpu("g", 80, 1e15, 1e12)
    found = estimate_time(size, make_plan("soft_po", {"max_steps": 80}), Launch(), gpu, 80, 2.0, 100.0)
    # Each 8 steps 256 tokens one after another, for each of which all weights are read, in 16 bits
    assert found["generation"] == pytest.approx(10 * 256 * 2 * size.parameters / (1e12 * 0.35) / 3600)
    off = estimate_time(size, make_plan("soft_po", {"max_steps": 80, "beta": 0.0}), Launch(), gpu, 80, 2.0, 100.0)
    assert off["generation"] == 0 and off["hours"] < found["hours"] - found["generation"]


def test_steps():
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2.0}
    assert optimizer_steps(make_plan("dpo", options), Launch(num_processes=4), 3200) == 200
    for rows in (3200, None):
        assert optimizer_steps(make_plan("dpo", options | {"max_steps": 7}), Launch(), rows) == 7
    assert optimizer_steps(make_plan("dpo", options), Launch(), None) is None


def _findings(gpu, launch=None, rows=10_000, **options):
    plan = make_plan("dpo", options)
    return resource_findings(
        _large(bool(options.get("use_peft"))), plan, launch or Launch(), gpu, rows, 2.0, 400.0, 1024
    )


def test_what_does_not_fit():
    finding = only(_findings(find_gpu("h100")), "memory")  # 7.6 billion times 20 bytes
    assert finding.severity == "error" and finding.data["states"]["weights"] == pytest.approx(
        7.6156e9 * 4 / GIB, rel=1e-3
    )
    assert finding.data["fits"] == ["`--accelerate_config zero3_offload`"]  # on one GPU, nothing is sharded
    eight = only(_findings(find_gpu("h100"), read_launch("multi_gpu", 8)), "memory")
    assert "`--accelerate_config zero3`" in eight.data["fits"] and "LoRA" in eight.remedy
    assert only(_findings(find_gpu("h100"), read_launch("zero3", 8)), "memory").severity == "info"
    lora = only(_findings(find_gpu("h100"), use_peft=True, dtype="bfloat16"), "memory")
    assert lora.severity == "info"


def test_what_may_not_fit():
    memory = only(_findings(None, read_launch("zero3", 8)), "memory")
    assert memory.severity == "info" and "--gpu" in memory.remedy
    states, total = sum(memory.data["states"].values()), memory.data["total"]
    for size, expected in (
        (states * 0.99, "error"),
        (states * 1.01, "warning"),
        (total / 0.89, "info"),
        (total / 0.91, "warning"),
    ):
        assert only(_findings(Gpu("g", size), read_launch("zero3", 8)), "memory").severity == expected


def test_few_steps():
    assert codes(_findings(None, rows=100))["few_steps"] == "warning"
    assert "few_steps" not in codes(_findings(None, rows=3000))
    assert codes(_findings(find_gpu("h200"), rows=None)) == {"memory": "error"}  # of a stream
    assert "time" not in codes(_findings(None)) and codes(_findings(find_gpu("h200")))["time"] == "info"
