# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from accelerate import DeepSpeedPlugin
from datasets import Dataset, DatasetDict, load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from trl import DPOConfig, DPOTrainer

from trl_spo.synthetic import training
from trl_spo.synthetic.critics import Request
from trl_spo.synthetic.model_critics import RewardCritic
from trl_spo.synthetic.training import METHODS, TrainingConfig, TrainingError, main, train


OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """The three forms, with columns that are not trained on."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = [(f"Who is number {i}", f" Number {i} is it.", f" Nobody {i * i}, and not {i}.") for i in range(8)]
    pairs = [{"prompt": p, "chosen": c, "rejected": r, "margin": 3.0, "confidence": 1.0} for p, c, r in rows]
    lists = [{"prompt": p, "completions": [c, r], "scores": [1.0, 0.0], "provenance": {"a": 1}} for p, c, r in rows]
    singles = [{"prompt": p, "completion": x, "label": i == 0} for p, *xs in rows for i, x in enumerate(xs)]
    for form, of_form in (("preference", pairs), ("ranked", lists), ("unpaired", singles)):
        splits = {"train": Dataset.from_list(of_form), "test": Dataset.from_list(of_form[:2])}
        DatasetDict(splits).save_to_disk(str(folder / form))
    return folder


class Ended(NamedTuple):
    """A process that was launched."""

    returncode: int


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def told(folder: Path, dataset: Path, model: str, config: TrainingConfig, reference: str | None = None) -> Path:
    """`training.json` as `train` writes it."""
    form = config.form or METHODS[config.method][3][0]
    values = {"method": config.method, "options": config.options, "form": form, "peft": config.peft}
    folder.mkdir()
    path = folder / "training.json"
    path.write_text(json.dumps({**values, "model": model, "dataset": str(dataset), "reference": reference}))
    return path


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpo", {}),
        ("ipo", {}),
        ("kto", {}),
        ("soft_po", {"max_completion_length": 8}),
        ("soft_po", {"beta": 0.0, "calibration": "none", "form": "ranked"}),
        ("stable_po", {}),
        ("sspo", {}),
        ("sspo_kto", {}),
    ],
)
def test_methods(method, options, dataset, model_path, tmp_path):
    options = dict(options)
    config = TrainingConfig(method=method, form=options.pop("form", None), options={**OPTIONS, **options})
    reference = model_path if config.reads_reference() else None
    assert (reference is None) == (options.get("beta") == 0)
    main(str(told(tmp_path / "run", dataset, model_path, config, reference)))
    before, after = weights(model_path), weights(tmp_path / "run" / "trained")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "trained").eos_token is not None
    card = (tmp_path / "run" / "trained" / "README.md").read_text()
    names = {
        "ipo": "DPO",
        "soft_po": "Soft Preference",
        "stable_po": "Stable Preference",
    }  # TRL's card calls IPO DPO, too
    assert names.get(method, method.split("_")[0].upper()) in card


def test_the_reference_is_the_one_that_was_named(dataset, model_path, load_model, perturb, tmp_path):
    other = load_model(model_path)
    perturb(other)
    other.save_pretrained(tmp_path / "other")
    config = TrainingConfig(method="dpo", options={**OPTIONS, "seed": 7})
    main(str(told(tmp_path / "run", dataset, model_path, config, reference=str(tmp_path / "other"))))
    main(str(told(tmp_path / "own", dataset, model_path, config)))

    trainer = DPOTrainer(
        model=model_path,
        ref_model=load_model(str(tmp_path / "other")),
        args=DPOConfig(output_dir=str(tmp_path / "by_hand"), seed=7, **OPTIONS),
        train_dataset=load_from_disk(str(dataset / "preference"))["train"],
    )
    trainer.train()
    expected, found, own = (
        trainer.model.state_dict(),
        weights(tmp_path / "run" / "trained"),
        weights(tmp_path / "own" / "trained"),
    )
    assert all(torch.equal(expected[name].float(), found[name]) for name in found)
    assert any(not torch.equal(own[name], found[name]) for name in found)


def test_ipo_is_the_loss_of_ipo():
    assert TrainingConfig(method="ipo", options=OPTIONS).make_args("x").loss_type == ["ipo"]


@pytest.mark.slow
def test_reward_model_joins_a_jury(dataset, model_path, tmp_path):
    """A real launch, of a reward model, and what a critic makes of it."""
    options = {**OPTIONS, "max_steps": 30, "per_device_train_batch_size": 8, "eval_strategy": "no"}
    config = TrainingConfig(method="reward", options=options, num_processes=1)
    model = train(config, model_path, dataset, tmp_path / "run")
    assert AutoModelForSequenceClassification.from_pretrained(model).config.num_labels == 1
    before = (model / "config.json").stat().st_mtime_ns
    assert train(config, model_path, dataset, tmp_path / "run") == model  # which is there already
    assert (model / "config.json").stat().st_mtime_ns == before
    critic = RewardCritic(name="reward", model=str(model))
    texts = [(f"Who is number {i}", (f" Number {i} is it.", f" Nobody {i * i}, and not {i}.")) for i in range(8)]
    requests = [(i, Request(p, (x,))) for p, xs in texts for i, x in enumerate(xs)]
    scores = [answer["score"] for _, answer in critic.answer(requests)]
    assert sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) == 8
    with pytest.raises(ValueError, match=r"has another training: `options` was .*Remove the folder"):
        train(
            TrainingConfig(method="reward", options={**options, "max_steps": 31}),
            model_path,
            dataset,
            tmp_path / "run",
        )


def test_a_reward_model_is_whole_under_zero3(model_path, tmp_path):
    """Though the policy's weights are sharded as they are loaded, before and after it."""
    AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, pad_token_id=0).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(model_path).save_pretrained(tmp_path)
    reward = training._reward_function(str(tmp_path), SimpleNamespace(device="cpu", deepspeed_plugin=None))
    expected = reward(["the film", "a dog"], [" was bad", " was good"])
    plugin = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=True)
    try:
        plugin.set_deepspeed_weakref()
        assert is_deepspeed_zero3_enabled()
        reward = training._reward_function(str(tmp_path), SimpleNamespace(device="cpu", deepspeed_plugin=plugin))
        assert is_deepspeed_zero3_enabled()
        assert reward(["the film", "a dog"], [" was bad", " was good"]) == expected
    finally:
        unset_hf_deepspeed_config()


def test_groups_of_responses_fit_into_the_batches_of_all_processes(tmp_path):
    options = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 2, "num_generations": 8}
    for method in ("rloo", "grpo"):
        with pytest.raises(ValueError, match=r"\(2\) must be divisible by num_generations \(8\)"):
            TrainingConfig(method=method, options=options, num_processes=1)
        config = TrainingConfig(method=method, options=options, num_processes=4)
        assert config.options == options and not config.reads_reference()
        with pytest.raises(ValueError, match=r"\(6\) must be divisible by num_generations \(8\)"):
            TrainingConfig(method=method, options=options, num_processes=3)
        with pytest.raises(ValueError, match=r"\(8\) must be divisible by the global batch size \(16\)"):
            TrainingConfig(method=method, options={**options, "generation_batch_size": 8}, num_processes=8)
    # As many as the config for accelerate says
    (tmp_path / "four.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 4\n")
    assert (
        TrainingConfig(method="rloo", options=options, accelerate_config=str(tmp_path / "four.yaml")).processes() == 4
    )
    assert TrainingConfig(method="dpo", options=OPTIONS, accelerate_config="zero2").processes() >= 1


def test_a_small_update_of_a_student_in_bfloat16_is_not_rounded_away(dataset, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(
        training, "subprocess", SimpleNamespace(run=lambda command, **_: main(command[-1]) or Ended(0))
    )
    AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(model_path).save_pretrained(tmp_path / "half")
    before, name = weights(tmp_path / "half"), "model.layers.0.mlp.up_proj.weight"
    for peft in (None, {"r": 4, "target_modules": "all-linear"}):
        config = TrainingConfig(method="dpo", options={**OPTIONS, "learning_rate": 1e-5}, peft=peft)
        after = weights(train(config, str(tmp_path / "half"), dataset, tmp_path / f"run{peft is None}"))
        assert 0 < (after[name] - before[name]).abs().max() < 1e-4
        # And not only those near zero, where bfloat16 is fine
        assert (after[name] != before[name]).double().mean() > 0.9


def test_an_adapter_is_merged(dataset, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(
        training, "subprocess", SimpleNamespace(run=lambda command, **_: main(command[-1]) or Ended(0))
    )
    config = TrainingConfig(method="dpo", options=OPTIONS, peft={"r": 4, "target_modules": "all-linear"})
    before, after = weights(model_path), weights(train(config, model_path, dataset, tmp_path / "run"))
    assert after.keys() == before.keys()
    adapter = load_file(tmp_path / "run" / "trained" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    scale = 8 / 4  # LoraConfig's alpha is 8
    assert torch.allclose(
        after[f"{name}.weight"].double(), before[f"{name}.weight"].double() + scale * b @ a, atol=1e-6
    )
    assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.slow
def test_a_killed_training_goes_on(dataset, model_path, tmp_path):
    options = {**OPTIONS, "max_steps": 30, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    config = TrainingConfig(method="dpo", options=options)
    path = told(tmp_path / "killed", dataset, model_path, config)
    process = subprocess.Popen([sys.executable, "-m", "trl_spo.synthetic.training", str(path)])
    checkpoints = tmp_path / "killed" / "checkpoints"
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "trained").exists() and not (checkpoints / "checkpoint-30").exists()
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    torn = checkpoints / "checkpoint-28"  # as it is when the process is killed while it writes
    shutil.copytree(newest, torn)
    (torn / "trainer_state.json").write_text('{"global_step": 2')
    main(str(path))
    main(str(told(tmp_path / "whole", dataset, model_path, config)))
    killed, whole = (weights(tmp_path / name / "trained") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


def test_a_training_that_fails(dataset, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=lambda command, **_: Ended(3)))
    with pytest.raises(TrainingError, match="has ended with status 3"):
        train(TrainingConfig(method="dpo", options=OPTIONS), model_path, dataset, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_another_training_in_the_same_folder(dataset, model_path, tmp_path, monkeypatch):
    """Such as one that was left behind when the process that launched it was killed."""
    config, others = TrainingConfig(method="dpo", options=OPTIONS), []

    def launch(command, pass_fds):
        # It holds the lock for as long as it lives, though nobody else does
        others.append(subprocess.Popen(["sleep", "60"], pass_fds=pass_fds))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=launch))
    with pytest.raises(KeyboardInterrupt):
        train(config, model_path, dataset, tmp_path / "run")
    monkeypatch.setattr(
        training, "subprocess", SimpleNamespace(run=lambda command, **_: main(command[-1]) or Ended(0))
    )
    with pytest.raises(TrainingError, match="Another process trains in .*/run'"):
        train(config, model_path, dataset, tmp_path / "run")
    others[0].kill()
    others[0].wait()
    assert (train(config, model_path, dataset, tmp_path / "run") / "config.json").is_file()


def test_what_is_there_already(dataset, model_path, load_model, perturb, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(
        training,
        "subprocess",
        SimpleNamespace(run=lambda command, **_: launched.append(1) or main(command[-1]) or Ended(0)),
    )
    config = TrainingConfig(method="dpo", options=OPTIONS)
    start = tmp_path / "start"
    shutil.copytree(model_path, start)
    model = train(config, str(start), dataset, tmp_path / "run")
    # Killed before the last step of it
    model.rename(model.with_name("trained"))
    assert train(config, str(start), dataset, tmp_path / "run") == model and len(launched) == 1
    # The same weights and data elsewhere
    moved = shutil.move(start, tmp_path / "moved")
    assert train(config, str(moved), shutil.copytree(dataset, tmp_path / "data"), tmp_path / "run") == model
    assert len(launched) == 1
    # Other weights in the same place
    other = load_model(model_path)
    perturb(other)
    other.save_pretrained(moved)
    with pytest.raises(ValueError, match="has another training: `weights` was .*Remove the folder"):
        train(config, str(moved), dataset, tmp_path / "run")
    train(config, str(moved), dataset, tmp_path / "run", replace=True)
    assert len(launched) == 2 and not list(tmp_path.glob(".run*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ppo"}, "`method` must be one of .*got 'ppo'"),
        (
            {"method": "dpo", "form": "ranked"},
            r"`form` of the method 'dpo' must be one of \['preference'\], got 'ranked'",
        ),
        ({"method": "dpo", "options": {"alpha": 1}}, r"`alpha` is no option of `DPOConfig` \(`method='dpo'`\)"),
        (
            {"method": "ipo", "options": {"loss_type": "sigmoid"}},
            "`loss_type` cannot be among the `options` of the method 'ipo'",
        ),
        ({"method": "dpo", "options": {"output_dir": "x"}}, "`output_dir` cannot be among the `options`"),
        ({"method": "soft_po", "options": {**OPTIONS, "alpha": -1}}, "`alpha`"),
        ({"method": "dpo", "accelerate_config": "zero9"}, "`--accelerate_config zero9` is neither"),
        ({"method": "dpo", "options": {"hub_token": "secret"}}, "`hub_token` cannot be among the `options`"),
        ({"method": "dpo", "num_processes": 0}, "`num_processes` must be at least 1, got 0"),
        (
            {"method": "dpo", "options": OPTIONS, "peft": {"rank": 4}},
            "`peft` must have options of `LoraConfig`: .*'rank'",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)
