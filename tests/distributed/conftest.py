# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


CONFIGS = Path(__file__).parents[2] / "trl_spo" / "accelerate_configs"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, its tokenizer and 64 preference pairs."""
    return make_world(tmp_path_factory.mktemp("world"), 32, 4, 2)


@pytest.fixture(scope="session")
def odd_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `world`, with a hidden size that is odd, so that ZeRO-3 has to pad the layer norms' weights."""
    return make_world(tmp_path_factory.mktemp("odd_world"), 33, 3, 1)


def make_world(folder: Path, hidden_size: int, num_heads: int, num_key_value_heads: int) -> Path:
    words = ["<pad>", "<eos>", "<unk>", "say", *(f"w{i}" for i in range(20))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden_size,
        head_dim=8,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,  # far enough from uniform for the KL to have something to hold
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(20, size=n))

    Dataset.from_list(
        [
            {
                "prompt": "say " + text(2),
                "chosen": " " + text(3 + i % 3) + " ",
                "rejected": " " + text(2 + i % 4) + " ",
            }
            for i in range(64)
        ]
    ).save_to_disk(str(folder / "dataset"))
    return folder


@pytest.fixture(scope="session")
def launch():
    """`launch(backend, script, *arguments)` runs a script in two processes under one of the packaged configs."""

    def run(backend: str, script: Path, *arguments: str, processes: int = 2) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if processes == 1:
            command = [sys.executable, str(script), *arguments]
        else:
            if backend == "ddp":  # accelerate launches several CPU processes through MPI only
                command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
                command += ["--standalone"]
            else:
                env["DS_ACCELERATOR"] = "cpu"
                command = [sys.executable, "-m", "accelerate.commands.launch"]
                command += ["--config_file", str(CONFIGS / f"{backend}.yaml"), "--num_processes", str(processes)]
                command += ["--mixed_precision", "no", "--main_process_port", "0"]
            command += [str(script), *arguments]
        for _ in range(3):
            result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
            # The launcher looks for a free port, and another may take it before its processes do
            if result.returncode == 0 or "EADDRINUSE" not in result.stderr:
                break
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]

    return run
