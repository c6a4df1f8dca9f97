# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The trainers on a base model whose weights bitsandbytes has quantized to four bits."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_spo import SoftPOConfig, SoftPOTrainer, SSPOConfig, SSPOTrainer, StablePOConfig, StablePOTrainer


pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'trl-spo[quantization]'")

FORMS = {
    "soft_po": {"max_completion_length": 6},
    "penalty": {"upper_loss": "apo_down"},
    "lower_level": {"penalty_anchor": "lower_level", "inner_step_fraction": 0.02},
    "alternating": {"bilevel": "alternating", "inner_step_fraction": 0.02},
    "unrolled": {"bilevel": "unrolled", "inner_step_fraction": 0.02},
    "sspo": {},
    "sspo_text": {"removal": "text"},
}
CLASSES = {"soft": (SoftPOTrainer, SoftPOConfig), "sspo": (SSPOTrainer, SSPOConfig)}


@pytest.fixture
def make_trainer(model_path, pairs, tmp_path):
    def make(form, **kwargs):
        trainer, config = CLASSES.get(form.split("_")[0], (StablePOTrainer, StablePOConfig))
        options = {
            "output_dir": str(tmp_path / "output"),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "learning_rate": 0.05,
            "max_steps": 3,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
        }
        args = config(**{**options, **FORMS[form], **kwargs})
        return trainer(
            model_path,
            args=args,
            train_dataset=pairs,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
        )

    return make


def weights(model, trained):
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad == trained
    }


@pytest.mark.parametrize("form", FORMS)
def test_trains_the_adapter_only(make_trainer, form):
    trainer = make_trainer(form)
    assert trainer.model.is_loaded_in_4bit and trainer.ref_model is None
    base, adapter = weights(trainer.model, False), weights(trainer.model, True)
    assert any(weight.dtype == torch.uint8 for weight in base.values())
    trainer.train()
    assert all(torch.equal(weight, base[name]) for name, weight in weights(trainer.model, False).items())
    changed = [not torch.equal(weight, adapter[name]) for name, weight in weights(trainer.model, True).items()]
    assert all(changed)


@pytest.mark.parametrize("form", ["lower_level", "alternating", "unrolled"])
def test_inner_step_lowers_the_sft_loss(make_trainer, form):
    trainer = make_trainer(form)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "stable/sft_gain" in entry]
    assert len(log) == 3 and all(entry["stable/sft_gain"] > 0 for entry in log)


def test_unrolled_step_is_taken_back(make_trainer):
    """Only the inner step moves the weights at a learning rate of 0, and it does not stay."""
    trainer = make_trainer("unrolled", learning_rate=0.0, deploy_inner_steps=0)
    before = weights(trainer.model, True)
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer.model, True).items())


@pytest.mark.parametrize("hypergradient", ["exact", "finite_difference"])
def test_second_derivatives_are_refused(make_trainer, hypergradient):
    with pytest.raises(ValueError, match=f"`hypergradient='{hypergradient}'`.*(U|u)se `hypergradient='first_order'`"):
        make_trainer("unrolled", hypergradient=hypergradient)
