# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import argparse
import re

import pytest

from trl_spo.cli import demo, demo_synthetic
from trl_spo.sandbox import arithmetic, stories


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The demo on models that take no time to pretrain and write nonsense."""
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
    sums_config = arithmetic.ArithmeticConfig(
        hidden_size=16, num_layers=1, num_heads=2, pretrain_steps=10, num_train_pairs=200, num_eval_sums=20
    )
    sums = arithmetic.ArithmeticWorld
    monkeypatch.setattr("trl_spo.sandbox.ArithmeticWorld", lambda progress: sums(sums_config, progress))
    monkeypatch.setattr(demo_synthetic, "NUM_PROMPTS", 24)
    monkeypatch.setattr(demo_synthetic, "NUM_CHECKED", 6)
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
    parts = re.split(r"^\d\. What came out$", output, flags=re.MULTILINE)[1:]
    for part, methods, numbers, percents in (
        (parts[0], demo._stories_methods(12), 4, 1),
        (parts[1], demo._sums_methods(), 1, 3),
        (parts[2], ["SoftPO on these pairs"], 4, 1),
    ):
        for name in methods:
            row = next(line for line in part.splitlines() if line.strip().startswith(name))
            assert len(re.findall(r"-?\d+\.\d+ ± \d+\.\d+", row)) == numbers, row
            assert len(re.findall(r"\d+ ± \d+ %", row)) == percents, row
            assert "nan" not in row
        assert any(line.strip().startswith("pretrained") for line in part.splitlines())
    assert "SSPO is DPO" in parts[0]
    for file in ("reward_kl.png", "reward_entropy.png"):
        assert (tmp_path / "out" / file).read_bytes().startswith(b"\x89PNG")


def test_too_few_steps(tiny_demo, capsys):
    assert tiny_demo("--steps", "2") == 2
    assert "at least" in capsys.readouterr().err
