# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Each mistake gives one clear error, at construction, that names the option, its value and the way out."""

import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import PreTrainedTokenizer
from trl import DPOConfig

from trl_spo import DegreeHeads, SSPOConfig, SSPOKTOConfig, SSPOKTOTrainer, SSPOTrainer
from trl_spo.sspo import key_content
from trl_spo.sspo.degree_mixin import DegreeMixin


BASE = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_steps": 1}

BAD_OPTIONS = [
    ({"num_degrees": 1}, r"`num_degrees` must be a whole number >= 2, got 1"),
    ({"num_degrees": 2.5}, r"`num_degrees` must be a whole number >= 2, got 2.5"),
    ({"chosen_weight": -0.1}, r"`chosen_weight` must be finite and >= 0, got -0.1.*use 0 to switch it off"),
    ({"rejected_weight": -1}, r"`rejected_weight` must be finite and >= 0, got -1"),
    ({"rejected_weight": float("nan")}, r"`rejected_weight` must be finite and >= 0, got nan"),
    ({"head_learning_rate": -1e-3}, r"`head_learning_rate` must be finite and >= 0, got -0.001"),
    ({"head_weight_decay": float("inf")}, r"`head_weight_decay` must be finite and >= 0, got inf"),
    ({"head_hidden_size": 0}, r"`head_hidden_size` must be a whole number >= 1, got 0"),
    ({"extractor": "textrank"}, r"`extractor` must be one of \['rake', 'yake', 'position_rank', 'random'\], got 'te"),
    ({"removal": "tokens"}, r"`removal` must be one of \['hidden_states', 'text'\], got 'tokens'"),
    ({"degree_sampling": "two"}, r"`degree_sampling` must be one of \['all', 'one'\], got 'two'"),
    ({"language": "xx"}, r"`language='xx'` has no stop words here. Use one of ar, .*pass its `stop_words`"),
    ({"stop_words": "was"}, r"`stop_words` must be a list of words, got 'was'. Use `\['was'\]`"),
    ({"sync_ref_model": True}, r"`sync_ref_model=True` is not supported with the degree heads.*Set `sync_ref_model=F"),
    (
        {"extractor": "yake", "language": "zh"},
        r"`extractor='yake'` finds no words in `language='zh'`.*Use `extractor='r",
    ),
    ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["q"]}, r"`optim='galore_adamw_layerwise'` is not s"),
]


@pytest.mark.parametrize("config_class", [SSPOConfig, SSPOKTOConfig])
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda x: str(x)[:50])
def test_bad_options(tmp_path, config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(output_dir=str(tmp_path), **BASE, **options)


@pytest.mark.parametrize(("extractor", "package"), [("yake", "yake"), ("position_rank", "networkx")])
def test_package_is_missing(tmp_path, monkeypatch, extractor, package):
    find_spec = key_content.find_spec
    monkeypatch.setattr(key_content, "find_spec", lambda name: None if name == package else find_spec(name))
    message = (
        rf"`extractor='{extractor}'` needs {package}, .*pip install trl-spo\[keywords\]`, or use `extractor='rake'`"
    )
    with pytest.raises(ImportError, match=message):
        SSPOConfig(output_dir=str(tmp_path), extractor=extractor, **BASE)
    SSPOConfig(output_dir=str(tmp_path), extractor="rake", **BASE)


def test_installing_rake_needs_no_other_package(monkeypatch):
    """Neither do the names of the languages."""
    for name in ("yake", "networkx", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    assert key_content.key_phrases("a long night with friends")
    assert "en" in key_content.languages()


def test_config_of_another_trainer(model_path, pairs, unpaired, tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), **BASE)
    with pytest.raises(TypeError, match="`args` must be a `SSPOConfig`, got `DPOConfig`"):
        SSPOTrainer(model_path, args=args, train_dataset=pairs)
    with pytest.raises(TypeError, match="`args` must be a `SSPOKTOConfig`, got `DPOConfig`"):
        SSPOKTOTrainer(model_path, args=args, train_dataset=unpaired)


IDS_ONLY = {"prompt_ids": [[3, 4]], "chosen_ids": [[5, 6]], "rejected_ids": [[7]]}
BAD_DATA = [
    (IDS_ONLY, r"The train dataset has token ids only \(\['chosen_ids', .*extracted from the text. Pass the text"),
    ({"prompt": ["a"], "chosen": [" b"], "rejected": [" c"], "images": [[]]}, r"The train dataset has images"),
    ({"prompt": ["a"], "chosen": [""], "rejected": [" c"]}, r"Row 0 of the train dataset .* its `chosen` is empty"),
    ({"prompt": ["a"], "chosen": [" b"]}, r"The train dataset lacks the columns \['rejected'\]"),
]
BAD_UNPAIRED = [
    ({"prompt_ids": [[3]], "completion_ids": [[5]], "label": [True]}, r"The train dataset has token ids only"),
    ({"prompt": ["a"], "completion": [" b"]}, r"The train dataset lacks the columns \['label'\]"),
    (
        {"prompt": ["a"], "completion": [""], "label": [True]},
        r"Row 0 of the train dataset .* its `completion` is empty",
    ),
    ({"prompt": ["a"], "completion": [" b"], "label": [3]}, r"its `label` is 3. Use `true` for a desirable"),
]


@pytest.mark.parametrize(("data", "message"), BAD_DATA)
def test_bad_data(make_trainer, data, message):
    with pytest.raises(ValueError, match=message):
        make_trainer({"train_dataset": Dataset.from_dict(data)})


@pytest.mark.parametrize(("data", "message"), BAD_UNPAIRED)
def test_bad_unpaired_data(make_kto_trainer, data, message):
    with pytest.raises(ValueError, match=message):
        make_kto_trainer({"train_dataset": Dataset.from_dict(data)})


def test_bad_row_of_a_stream(make_kto_trainer):
    data = Dataset.from_dict({"prompt": ["a"], "completion": [" "], "label": [2]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"A row of the train dataset cannot be used: its `label` is 2"):
        make_kto_trainer({"train_dataset": data})


def test_all_prompts_are_too_long(make_trainer):
    with pytest.raises(ValueError, match="empty after dropping the prompts that fill `max_length=2`"):
        make_trainer(max_length=2)


class SlowTokenizer(PreTrainedTokenizer):
    """One token for each character."""

    vocab_size = 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return min(ord(token[0]), 127)

    def _convert_id_to_token(self, index):
        return chr(index)


def test_slow_tokenizer(make_trainer):
    tokenizer = SlowTokenizer(eos_token="~", pad_token="^")
    with pytest.raises(ValueError, match="`SlowTokenizer` is not a fast tokenizer"):
        make_trainer({"processing_class": tokenizer})
    make_trainer({"processing_class": tokenizer}, chosen_weight=0.0, rejected_weight=0.0)


def test_biases_of_the_whole_model(make_trainer):
    with pytest.raises(ValueError, match="`bias='all'` in the PEFT config is not supported.*Set `bias='none'`"):
        make_trainer({"peft_config": LoraConfig(bias="all")})
    make_trainer({"peft_config": LoraConfig(bias="lora_only")}).train()


def test_prompt_learning(make_trainer):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="`removal='text'` is not supported with prompt-learning PEFT"):
        make_trainer({"peft_config": config}, removal="text")
    trainer = make_trainer({"peft_config": config})
    trainer.train()


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"is_fsdp_enabled": True}, "`fsdp_version: 1` is not supported"),
        ({"cp_size": 2}, "`cp_size=2` is not supported: it splits the sequences"),
        ({"tp_size": 2}, "`tp_size=2` is not supported: it splits the model"),
        (
            {"num_processes": 2, "removal": "text", "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "`removal='text'` runs the model twice before each backward pass.*Set `use_reentrant` to `False`",
        ),
        (
            {"deepspeed": {"optimizer": {"type": "AdamW"}}},
            "config has a section `optimizer`.*`head_learning_rate=0.001`.*set `optim`",
        ),
        (
            {"deepspeed": {"scheduler": {"type": "WarmupLR"}}},
            "config has a section `scheduler`.*set `lr_scheduler_type`",
        ),
    ],
)
def test_setups(model, setup, message):
    """Those that this machine cannot have: what the trainer would find there."""
    plugin = SimpleNamespace(deepspeed_config=setup.get("deepspeed", {}))
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            removal=setup.get("removal", "hidden_states"),
            head_learning_rate=1e-3,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=setup.get("gradient_checkpointing_kwargs"),
        ),
        model=model,
        is_fsdp_enabled=setup.get("is_fsdp_enabled", False),
        is_deepspeed_enabled="deepspeed" in setup,
        lr_scheduler=None,
        accelerator=SimpleNamespace(
            is_fsdp2=False,
            num_processes=setup.get("num_processes", 1),
            parallelism_config=SimpleNamespace(
                cp_size=setup.get("cp_size", 1), sp_size=1, tp_size=setup.get("tp_size", 1)
            ),
            state=SimpleNamespace(deepspeed_plugin=plugin),
        ),
    )
    with pytest.raises(ValueError, match=message):
        DegreeMixin._check_setup(trainer)


def test_a_scheduler_of_the_users(make_trainer, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match=r"`optimizers` has a scheduler.*Pass `optimizers=\(optimizer, None\)`"):
        make_trainer({"model": model, "optimizers": (optimizer, scheduler)})


def test_custom_collator_that_changes_the_responses(make_trainer):
    def collate(examples):
        mask = torch.ones(2 * len(examples), 40, dtype=torch.long)
        return {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}

    trainer = make_trainer({"data_collator": collate})
    with pytest.raises(ValueError, match="The data collator made 40 tokens of a completion that has"):
        trainer.train()


class TestResume:
    @pytest.fixture
    def checkpoint(self, make_trainer, tmp_path):
        trainer = make_trainer(output_dir=str(tmp_path / "run"), save_strategy="steps", save_steps=1, max_steps=1)
        trainer.train()
        return tmp_path / "run" / "checkpoint-1"

    @pytest.mark.parametrize("name", ["sspo_heads.json", "sspo_heads.safetensors"])
    def test_without_heads(self, make_trainer, checkpoint, name):
        (checkpoint / name).unlink()
        with pytest.raises(ValueError, match=rf"has no {name}, so that the degree heads cannot be resumed"):
            make_trainer().train(resume_from_checkpoint=str(checkpoint))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_degrees": 4}, r"were made with `num_degrees=3`, and now `num_degrees=4`. Resume with"),
            ({"shared_head": True}, r"were made with `shared_head=False`, and now `shared_head=True`"),
            ({"head_hidden_size": 4}, r"were made with `head_hidden_size=8`, and now `head_hidden_size=4`"),
        ],
    )
    def test_with_others(self, make_trainer, checkpoint, options, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(**options).train(resume_from_checkpoint=str(checkpoint))

    def test_of_another_hidden_size(self, make_trainer, checkpoint):
        DegreeHeads(32, 3, 8).save_pretrained(checkpoint)
        with pytest.raises(ValueError, match=r"were made with `hidden_size=32`, and now `hidden_size=16`"):
            make_trainer().train(resume_from_checkpoint=str(checkpoint))

    def test_mistyped(self, make_trainer, tmp_path):
        """It is not looked for on the Hub."""
        with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):
            make_trainer().train(resume_from_checkpoint=str(tmp_path / "checkpiont-1"))

    def test_none_there(self, make_trainer):
        with pytest.raises(ValueError, match="No valid checkpoint found"):
            make_trainer().train(resume_from_checkpoint=True)
