# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Each mistake gives one clear error, at construction, that names the option, its value and the way out."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from datasets import Dataset
from peft import LoraConfig

from trl_spo import StablePOConfig, StablePOTrainer
from trl_spo.stable_po.checks import check_inner_steps


BASE = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_steps": 1}
UNROLLED = {"bilevel": "unrolled"}

BAD_OPTIONS = [
    ({"upper_loss": "simpo", "beta": 2.0}, r"`beta=2.0` is not read by.*whose β is `simpo_beta`. Set that one"),
    ({"bilevel": "alternating", "inner_learning_rate": 0.0}, r"`inner_learning_rate` must be finite and > 0, got 0.0"),
    (
        {"bilevel": "alternating", "inner_learning_rate": -1.0},
        r"`inner_learning_rate` must be finite and > 0, got -1.0",
    ),
    ({"bilevel": "alternating", "inner_learning_rate": "fast"}, r"must be a number or 'auto', got 'fast'"),
    ({"bilevel": "alternating", "inner_step_fraction": 0.0}, r"`inner_step_fraction` must be finite and > 0, got 0.0"),
    ({"bilevel": "alternating", "inner_steps": 0}, r"`inner_steps` must be a whole number and >= 1, got 0"),
    ({"bilevel": "alternating", "inner_steps": 1.5}, r"`inner_steps` must be a whole number and >= 1, got 1.5"),
    ({"regularizer": "nll", "regularizer_weight": -0.1}, r"`regularizer_weight` must be finite and >= 0, got -0.1"),
    ({"penalty_weight": -1.0}, r"`penalty_weight` must be finite and >= 0, got -1.0"),
    ({"penalty_weight": float("nan")}, r"`penalty_weight` must be finite and >= 0, got nan"),
    ({"penalty_slack": -1e-3}, r"`penalty_slack` must be finite and >= 0, got -0.001"),
    ({**UNROLLED, "deploy_inner_steps": -1}, r"`deploy_inner_steps` must be a whole number and >= 0, got -1"),
    ({"upper_loss": "dpo"}, r"`upper_loss` has 'dpo', which is unknown. Should be one of \['sigmoid'"),
    ({"upper_loss": []}, r"`upper_loss` is empty"),
    ({"upper_loss": ["simpo", "cpo"], "loss_weights": [1.0]}, r"Got 1 weights for 2 losses"),
    ({"upper_loss": "simpo", "simpo_beta": 0.0}, r"`simpo_beta` must be finite and > 0, got 0.0"),
    ({"upper_loss": "dpop", "dpop_lambda": -1.0}, r"`dpop_lambda` must be finite and >= 0, got -1.0"),
    ({"bilevel": "nested"}, r"`bilevel` must be one of \['penalty', 'alternating', 'unrolled'\], got 'nested'"),
    ({"regularizer": "l2"}, r"`regularizer` must be one of \['none', 'nll', 'floor'\], got 'l2'"),
    ({"penalty_anchor": "sft"}, r"`penalty_anchor` must be one of"),
    ({**UNROLLED, "hypergradient": "second"}, r"`hypergradient` must be one of"),
    ({**UNROLLED, "hypergradient": "exact", "inner_steps": 2}, r"supports `inner_steps=1` only, got 2.*'first_order'"),
    ({"loss_type": ["ipo"]}, r"`loss_type=\['ipo'\]` is not read.*Set `upper_loss=\['ipo'\]`"),
    # Options that the chosen combination does not read
    ({"simpo_gamma": 0.5}, r"`simpo_gamma=0.5` is not read by `upper_loss=\['sigmoid'\]`, only by"),
    ({"upper_loss": "simpo", "label_smoothing": 0.1}, r"`label_smoothing=0.1` is not read by"),
    ({"upper_loss": "cpo", "use_weighting": True}, r"`use_weighting=True` is not read by"),
    ({"inner_steps": 3}, r"`inner_steps=3` is not read with `bilevel='penalty'` and `penalty_anchor='reference'`"),
    ({"bilevel": "alternating", "hypergradient": "exact"}, r"`hypergradient='exact'` is not read with"),
    (
        {"bilevel": "alternating", "penalty_weight": 3.0},
        r"`penalty_weight=3.0` is not read with `bilevel='alternating'`",
    ),
    ({"bilevel": "alternating", "deploy_inner_steps": 2}, r"`deploy_inner_steps=2` is not read with"),
    (
        {"bilevel": "alternating", "inner_learning_rate": 0.1, "inner_step_fraction": 1e-3},
        r"`inner_step_fraction=0.001` is read with `inner_learning_rate='auto'` only",
    ),
    ({"regularizer_weight": 0.5}, r"`regularizer_weight=0.5` is not read with `regularizer='none'`"),
    ({"penalty_weight": 0.0, "penalty_slack": 0.1}, r"`penalty_slack=0.1` is not read with `penalty_weight=0`"),
    ({"penalty_weight": 0.0, "penalty_anchor": "lower_level"}, r"`penalty_anchor='lower_level'` is not read with"),
    # What would let θ out where θ' is meant
    ({**UNROLLED, "sync_ref_model": True}, r"the reference would become θ, and not the θ'"),
    ({**UNROLLED, "push_to_hub": True}, r"`hub_strategy='every_save'` pushes checkpoints.*Set `hub_strategy='end'`"),
    ({**UNROLLED, "save_only_model": True}, r"`save_only_model=True` leaves checkpoints that cannot be resumed"),
    ({"ld_alpha": 0.5}, r"`ld_alpha=0.5` is not supported with `penalty_anchor='reference'`"),
    ({"upper_loss": "dpop", "penalty_weight": 0.0, "ld_alpha": 0.5}, r"`ld_alpha=0.5` is supported with TRL's losses"),
    (
        {"upper_loss": "simpo", "bilevel": "alternating", "sync_ref_model": True},
        r"`sync_ref_model=True` but nothing reads the reference",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda x: str(x)[:60])
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        StablePOConfig(output_dir=str(tmp_path), **BASE, **options)


@pytest.fixture
def construct(tmp_path, model_path, pairs):
    def make(trainer_kwargs=None, **options):
        args = StablePOConfig(output_dir=str(tmp_path), **{**BASE, **options})
        return StablePOTrainer(**{"model": model_path, "args": args, "train_dataset": pairs, **(trainer_kwargs or {})})

    return make


def test_reference_that_nothing_reads(construct, model):
    with pytest.raises(ValueError, match=r"`ref_model` is given, but nothing reads it.*Leave it out"):
        construct({"ref_model": model}, upper_loss="simpo", bilevel="alternating")


def test_weighting_of_own_losses(construct):
    with pytest.raises(
        ValueError, match=r"`use_weighting=True` weighs TRL's losses only, and `upper_loss` has \['cpo'\]"
    ):
        construct(upper_loss=["sigmoid", "cpo"], use_weighting=True)


def test_alphadpo_of_one_pair(construct):
    with pytest.raises(ValueError, match=r"`per_device_train_batch_size=1`.*Use at least 2"):
        construct(upper_loss="alphadpo", per_device_train_batch_size=1)


def test_exact_with_attention_that_has_no_second_derivative(construct):
    kwargs = {"attn_implementation": "flex_attention"}
    with pytest.raises(ValueError, match=r"`hypergradient='exact'` needs.*'flex_attention'.*'finite_difference'"):
        construct(bilevel="unrolled", hypergradient="exact", model_init_kwargs=kwargs)


@pytest.mark.parametrize("option", ["torch_compile", "use_liger_kernel"])
def test_exact_with_fused_operations(construct, option, monkeypatch):
    trainer = construct(bilevel="unrolled", hypergradient="exact")
    setattr(trainer.args, option, True)
    from trl_spo.stable_po.checks import check_inner_steps

    with pytest.raises(ValueError, match=f"`{option}=True` do not have. Set `{option}=False`"):
        check_inner_steps(trainer.model, trainer.args, trainer.accelerator, is_vlm=False)


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise", "schedule_free_adamw"])
def test_optimizers_that_write_the_weights_themselves(construct, optim):
    trainer = construct(bilevel="alternating")
    trainer.args.optim = optim  # whose library may not be here
    from trl_spo.stable_po.checks import check_inner_steps

    with pytest.raises(ValueError, match=f"`bilevel='alternating'` is not supported with `optim='{optim}'`"):
        check_inner_steps(trainer.model, trainer.args, trainer.accelerator, is_vlm=False)


def test_finite_difference_in_low_precision(construct):
    options = {"bilevel": "unrolled", "hypergradient": "finite_difference"}
    with pytest.raises(ValueError, match="`bf16=True` leaves only rounding errors of it. Train in float32"):
        construct(**options, bf16=True)
    with pytest.raises(ValueError, match="weights in torch.bfloat16 leaves only rounding errors"):
        construct(**options, model_init_kwargs={"dtype": "bfloat16"})


def test_anchor_without_its_reference(construct, pairs):
    sft = Dataset.from_dict({"text": ["the film was good"]})
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True` keeps no reference, and with `sft_dataset`"):
        construct({"sft_dataset": sft}, precompute_ref_log_probs=True)
    construct({"sft_dataset": sft}, precompute_ref_log_probs=True, penalty_anchor="lower_level")


def test_divergence_of_own_losses(construct):
    with pytest.raises(ValueError, match=r"`f_divergence_type='js_divergence'` changes TRL's losses only.*\['cpo'\]"):
        construct(upper_loss=["sigmoid", "cpo"], f_divergence_type="js_divergence")


@pytest.mark.parametrize("streams", [False, True])
def test_too_few_rows_to_deploy(construct, pairs, streams):
    data = pairs.to_iterable_dataset() if streams else pairs
    with pytest.raises(ValueError, match=r"`deploy_inner_steps=3` takes 24 rows.*the train dataset has 8"):
        # Of a dataset that streams it is known when the rows have been read
        construct({"train_dataset": data}, bilevel="unrolled", deploy_inner_steps=3, logging_steps=1).train()


@pytest.mark.parametrize("hypergradient", ["exact", "finite_difference"])
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {"neftune_noise_alpha": 5.0}),
        ({}, {"model_init_kwargs": {"attention_dropout": 0.1}}),
        ({"peft_config": LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"])}, {"disable_dropout": False}),
    ],
)
def test_hypergradients_of_random_passes(construct, hypergradient, arguments, options):
    with pytest.raises(
        ValueError, match=rf"`hypergradient='{hypergradient}'` combines gradients of several forward passes"
    ):
        construct(arguments, **UNROLLED, hypergradient=hypergradient, **options)
    construct(arguments, **UNROLLED, **options)


def test_checkpoint_in_the_middle_of_a_step(construct):
    with pytest.raises(ValueError, match="`enable_jit_checkpoint=True` is not supported with `bilevel='alternating'`"):
        construct(bilevel="alternating", enable_jit_checkpoint=True)


def test_stream_that_may_end_within_a_step(construct, pairs):
    with pytest.raises(ValueError, match=r"`hypergradient='exact'` with `gradient_accumulation_steps=2`.*streams"):
        construct(
            {"train_dataset": pairs.to_iterable_dataset()},
            **UNROLLED,
            hypergradient="exact",
            gradient_accumulation_steps=2,
        )


def test_wrong_args(model_path, pairs, tmp_path):
    from trl import DPOConfig

    with pytest.raises(TypeError, match="`args` must be a `StablePOConfig`, got `DPOConfig`"):
        StablePOTrainer(model=model_path, args=DPOConfig(output_dir=str(tmp_path), **BASE), train_dataset=pairs)


def test_wrong_columns(construct):
    with pytest.raises((ValueError, KeyError), match="chosen"):
        construct({"train_dataset": Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})})


def test_lists(construct, lists):
    with pytest.raises(ValueError, match=r"The train dataset holds lists.*Use `SoftPOTrainer`"):
        construct({"train_dataset": lists})


def test_empty_dataset(construct, pairs):
    with pytest.raises(ValueError, match="The train dataset is empty"):
        construct({"train_dataset": pairs.select([])})
    with pytest.raises(ValueError, match=r"empty after dropping the prompts that fill `max_length=1`"):
        construct(max_length=1)


def test_identical_responses(construct, pairs):
    same = pairs.remove_columns("rejected").add_column("rejected", pairs["chosen"])
    with pytest.raises(ValueError, match="identical in every row of the train dataset"):
        construct({"train_dataset": same})


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"zero_hpz_partition_size": 4}, r"`zero_hpz_partition_size: 4` in the DeepSpeed config.*a second place"),
        ({"mics_shard_size": 4}, r"`mics_shard_size: 4` in the DeepSpeed config"),
        ({"zero_quantized_weights": True}, r"`zero_quantized_weights: True` in the DeepSpeed config"),
        ({"offload_param": {"device": "nvme"}}, r"the parameters offloaded to NVMe. Offload them to the CPU"),
        ({"stage3_gather_16bit_weights_on_model_save": False}, r"needs `zero3_save_16bit_model: true`"),
        ({"offload_param": {"device": "cpu"}}, None),
    ],
)
def test_deepspeed_configs_that_keep_weights_elsewhere(construct, zero, message):
    from accelerate import DeepSpeedPlugin

    trainer = construct(bilevel="unrolled")
    config = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, **zero}}
    state = SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    accelerator = SimpleNamespace(distributed_type="DEEPSPEED", state=state, parallelism_config=None)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_inner_steps(trainer.model, trainer.args, accelerator, is_vlm=False)
