# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
import yaml
from tests.advisor.conftest import codes

from trl_spo.advisor.plan import CONFIGS, Launch, config_class, make_plan, method_name, option_findings, read_launch
from trl_spo.synthetic.training import METHODS


def test_methods_are_those_that_are_trained_by_name():
    for method, (config, fixed) in CONFIGS.items():
        assert METHODS[method][1:3] == (config, fixed)


@pytest.mark.parametrize("method", CONFIGS)
def test_defaults_are_those_of_the_config(method, tmp_path):
    made = config_class(method)(output_dir=str(tmp_path), bf16=False, report_to="none", **CONFIGS[method][1])
    plan = make_plan(method)
    for name in (
        "max_length",
        "beta",
        "learning_rate",
        "per_device_train_batch_size",
        "num_train_epochs",
        "max_steps",
    ):
        assert plan.get(name) == getattr(made, name), name
    assert plan.given == frozenset() and plan.mixed_precision
    assert plan.checkpointing == made.gradient_checkpointing is True
    assert option_findings(plan) == []


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("dpo", {}, True),
        ("kto", {}, True),
        ("sspo", {}, True),
        ("soft_po", {}, True),
        ("soft_po", {"beta": 0.0}, True),  # calibrated
        ("soft_po", {"beta": 0.0, "calibration": "none"}, False),
        ("stable_po", {}, True),
        ("stable_po", {"upper_loss": "simpo"}, True),  # the penalty's anchor
        ("stable_po", {"upper_loss": ["simpo"], "bilevel": "alternating"}, False),
    ],
)
def test_reference(method, options, expected, tmp_path):
    from trl_spo.synthetic.training import TrainingConfig

    assert make_plan(method, options).reads_reference == expected
    off = {"bf16": False, "report_to": "none"}
    assert TrainingConfig(method=method, options=options | off).reads_reference() == expected


def test_unknown_names():
    assert method_name("soft-po") == method_name("soft_po") == "soft_po"
    with pytest.raises(ValueError, match=r"`method` must be one of dpo, ipo, .*got 'ppo'"):
        method_name("ppo")
    with pytest.raises(ValueError, match=r"`alpha` is no option of the method 'dpo'.*`method`"):
        make_plan("dpo", {"alpha": 0.1})
    with pytest.raises(ValueError, match=r"Did you mean `max_length`\?"):
        make_plan("dpo", {"max_lenght": 1})
    with pytest.raises(ValueError, match="method='dpo'"):
        make_plan("ipo", {"loss_type": ["hinge"]})
    assert make_plan("ipo", {"loss_type": "ipo"}).loss_types == ["ipo"]


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("soft_po", {"alpha": -1.0}, "SoftPOConfig: `alpha` must be finite and > 0"),
        ("stable_po", {"upper_loss": ["nothing"]}, "StablePOConfig: `upper_loss` has 'nothing'"),
        (
            "dpo",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
            "DPOConfig: `loss_weights` must have the same length",
        ),
        ("kto", {"per_device_train_batch_size": 1}, "KTO estimates the KL"),
    ],
)
def test_options_that_are_refused(method, options, text):
    (finding,) = option_findings(make_plan(method, options))
    assert finding.severity == "error" and text in finding.detail


def test_options_of_another_machine_are_not_refused():
    assert (
        option_findings(make_plan("dpo", {"bf16": True, "tf32": True, "deepspeed": "nowhere.json", "beta": 0.2})) == []
    )


def test_batch_of_kto():
    assert "batch_too_small" in codes(option_findings(make_plan("sspo_kto", {"per_device_train_batch_size": 1})))
    assert (
        option_findings(make_plan("kto", {"per_device_train_batch_size": 1, "loss_type": "apo_zero_unpaired"})) == []
    )


def test_sequences_of_a_batch():
    assert make_plan("dpo", {"per_device_train_batch_size": 3}).sequences(2) == 6
    assert make_plan("soft_po", {"per_device_train_batch_size": 3}).sequences(16) == 48
    assert make_plan("kto", {"per_device_train_batch_size": 3}).sequences(2) == 3


def test_dtype():
    assert make_plan("dpo").dtype == "float32"
    assert make_plan("dpo", {"dtype": "bfloat16"}).dtype == "bfloat16"
    for kwargs in ({"dtype": "float16"}, json.dumps({"dtype": "float16"})):
        assert make_plan("dpo", {"dtype": "bfloat16", "model_init_kwargs": kwargs}).dtype == "float16"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("multi_gpu", Launch("multi_gpu", 4)),
        ("zero1", Launch("zero1", 4, 1, deepspeed=True)),
        ("zero2", Launch("zero2", 4, 2, deepspeed=True)),
        ("zero3", Launch("zero3", 4, 3, deepspeed=True)),
        (
            "zero3_offload",
            Launch("zero3_offload", 4, 3, deepspeed=True, offload_optimizer=True, offload_parameters=True),
        ),
        ("fsdp2", Launch("fsdp2", 4, fsdp=True)),
        ("cpu", Launch("cpu", 4, cpu=True)),
    ],
)
def test_packaged_configs(name, expected):
    assert read_launch(name, 4) == expected


def test_own_config(tmp_path):
    path, zero = tmp_path / "mine.yaml", tmp_path / "zero.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    path.write_text(
        yaml.dump(
            {
                "distributed_type": "DEEPSPEED",
                "num_processes": 3,
                "deepspeed_config": {"deepspeed_config_file": str(zero)},
            }
        )
    )
    assert read_launch(str(path)) == Launch("mine", 3, 2, deepspeed=True, offload_optimizer=True)
    path.write_text(
        yaml.dump({"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_offload_params": True}})
    )
    assert read_launch(str(path)) == Launch("mine", 2, fsdp=True, offload_optimizer=True, offload_parameters=True)


def test_bad_launches(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor a packaged config"):
        read_launch("zero4")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        read_launch(None, 0)
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="must contain a YAML mapping"):
        read_launch(str(tmp_path / "list.yaml"))
    assert read_launch() == Launch(num_processes=1)
