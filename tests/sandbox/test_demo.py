# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import argparse
import re

import pytest

from trl_spo.cli import demo
from trl_spo.sandbox import stories


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The demo on a model that takes no time to pretrain and writes nonsense."""
    monkeypatch.setenv("TRL_SPO_CACHE", str(tmp_path / "cache"))
    config = stories.StoriesConfig(
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        pretrain_steps=10,
        pretrain_batch_size=8,
        num_train_prompts=32,
        num_eval_prompts=8,
        max_tokens=12,
    )
    world = stories.StoriesWorld
    monkeypatch.setattr("trl_spo.sandbox.StoriesWorld", lambda progress: world(config, progress))
    monkeypatch.setattr(
        demo, "_be_quiet", lambda: None
    )  # what it silences would stay silent for the tests after this one

    def run(*arguments):
        parser = argparse.ArgumentParser()
        demo.add_arguments(parser)
        return demo.run(parser.parse_args(["--output_dir", str(tmp_path / "out"), *arguments]))

    return run


@pytest.mark.slow
def test_demo(tiny_demo, tmp_path, capsys):
    assert tiny_demo("--steps", "5") == 0
    output = capsys.readouterr().out
    for name in ("pretrained", *demo._methods()):
        row = next(line for line in output.splitlines() if line.strip().startswith(name))
        assert len(re.findall(r"-?\d+\.\d+ ± \d+\.\d+", row)) == 4, row
        assert "nan" not in row
    for file in ("reward_kl.png", "reward_entropy.png"):
        assert (tmp_path / "out" / file).read_bytes().startswith(b"\x89PNG")


def test_too_few_steps(tiny_demo, capsys):
    assert tiny_demo("--steps", "2") == 2
    assert "at least" in capsys.readouterr().err
