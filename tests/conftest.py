# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny models with a real tokenizer, made here: no download, nothing to find on disk."""

import functools
import gc
import importlib.metadata
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.auto import AutoModelForCausalLM


_SENTENCES = [
    "the film was a slow and sad story about a dog",
    "the dog finds the way home and the story ends well",
    "a good film with a bad ending is still a good film",
    "he said that the actors were great and the music was not",
    "I would watch it again with my friends on a long night",
]

_CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """
    With `--dist loadfile`, the tests that start several processes go one after another. Two of them at once are more processes than
    cores, all of which wait at each step for one that is not running. Those that take long each, and have nothing in common, go one by
    one: single tests come last, so that neither worker waits long for the other at the end.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            if nodeid.startswith("tests/distributed/"):
                return "tests/distributed"
            return nodeid if nodeid.startswith("tests/soft_po/test_enumerable.py") else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _quick():
    # The models are so small that more threads only get into each other's way, and that the training would take less than
    # Accelerate takes to read the metadata of DeepSpeed and PEFT from the disk, several times a step
    torch.set_num_threads(1)
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    # Or the garbage collection at the start of each training would look at all that has been imported
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    """A BPE of about 200 tokens with BOS, EOS, padding and a chat template that knows tools."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special_tokens = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = list(string.ascii_letters + string.digits + string.punctuation)
    trainer = BpeTrainer(vocab_size=200, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(path)
    return str(path)


@pytest.fixture
def tokenizer(tokenizer_path):
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_path)


def _llama(**kwargs):
    return LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **kwargs,
    )


_CONFIGS = {
    "llama": _llama,
    "llama-tied": lambda **kwargs: LlamaConfig(**{**_llama(**kwargs).to_dict(), "tie_word_embeddings": True}),
    # Soft-capping at 2 bends logits of this size, the default of 30 hardly would
    "gemma2-softcapping": lambda **kwargs: Gemma2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        final_logit_softcapping=2.0,
        **kwargs,
    ),
    "cohere-logit-scale": lambda **kwargs: CohereConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        logit_scale=0.25,
        **kwargs,
    ),
    "granite-logits-scaling": lambda **kwargs: GraniteConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        logits_scaling=4.0,
        **kwargs,
    ),
    "mixtral-experts": lambda **kwargs: MixtralConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **kwargs,
    ),
    "phi-head-bias": lambda **kwargs: PhiConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        **kwargs,
    ),
    "gptj-head-bias": lambda **kwargs: GPTJConfig(
        n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=128, tie_word_embeddings=False, **kwargs
    ),
}


@pytest.fixture(scope="session")
def model_paths(tokenizer_path, tmp_path_factory):
    """A function from the name of an architecture to the folder of a random model with the tokenizer, in float32."""
    paths = {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_path)

    def path_of(name):
        if name not in paths:
            # Far from uniform, so that what is tested is not hidden by log-probabilities that are all alike
            config = _CONFIGS[name](
                vocab_size=len(tokenizer),
                initializer_range=0.3,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            set_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            head = model.get_output_embeddings()
            if head.bias is not None:
                torch.nn.init.normal_(head.bias)
            paths[name] = str(tmp_path_factory.mktemp(name))
            model.save_pretrained(paths[name])
            tokenizer.save_pretrained(paths[name])
        return paths[name]

    return path_of


@pytest.fixture(scope="session")
def model_path(model_paths):
    """A 2-layer Llama."""
    return model_paths("llama")


@pytest.fixture
def load_model():
    """Loads a fresh instance of a model."""

    def load(path, **kwargs):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)

    return load


@pytest.fixture
def model(model_path, load_model):
    return load_model(model_path)


@pytest.fixture
def perturb():
    """A function that adds noise to the parameters of a model, in place, so that it is no longer its reference."""

    @torch.no_grad()
    def add_noise(model, seed=1, scale=0.1, only_trainable=False):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            if parameter.requires_grad or not only_trainable:
                parameter += noise
        return model

    return add_noise


@pytest.fixture
def make_args(tmp_path):
    """Makes a `SoftPOConfig` for a few steps on the CPU: plain SGD in float32, so that runs can be compared number by number."""
    from trl_spo import SoftPOConfig

    def make(**kwargs):
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "optim": "sgd",
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 6,
            "online_samples_per_step": 4,
        }
        return SoftPOConfig(**{**defaults, **kwargs})

    return make


@pytest.fixture
def pairs():
    """Eight pairs of different lengths."""
    return Dataset.from_dict(
        {
            "prompt": [
                "the film",
                "a good story",
                "he said that the dog",
                "I would",
                "the music",
                "a long night with my friends",
                "the actors were",
                "it is",
            ],
            "chosen": [
                " was great and well",
                " ends well",
                " finds the way home",
                " watch it again",
                " was a good story",
                " is still good",
                " great",
                " a good film with a good ending",
            ],
            "rejected": [
                " was bad",
                " ends with a slow and sad night",
                " was sad",
                " not watch it again with my friends",
                " was not",
                " was long and slow and sad",
                " not about the story",
                " not",
            ],
        }
    )


@pytest.fixture
def lists():
    """Four lists of two to four completions, with a best one; other orders are made from it."""
    return Dataset.from_dict(
        {
            "prompt": ["the film", "a good story", "he said that the dog", "I would"],
            "completions": [
                [" was great", " was bad and slow", " was", " finds the way"],
                [" ends well", " ends with a sad night"],
                [" was sad", " finds the way home", " ends"],
                [" watch it again", " not", " watch it with my friends"],
            ],
            "best": [0, 1, 2, 1],
        }
    )


@pytest.fixture
def conversations():
    """Four conversational pairs."""
    turns = [
        ("the film", "was great", "was bad and slow"),
        ("a good story", "ends well", "ends with a sad night"),
        ("the dog", "finds the way home", "was sad"),
        ("I would", "watch it again", "not watch it"),
    ]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": prompt}] for prompt, _, _ in turns],
            "chosen": [[{"role": "assistant", "content": chosen}] for _, chosen, _ in turns],
            "rejected": [[{"role": "assistant", "content": rejected}] for _, _, rejected in turns],
        }
    )


@pytest.fixture
def make_trainer(model_path, tokenizer, make_args, pairs):
    """Makes a trainer of the tiny Llama on the eight pairs; keyword arguments go to the config, those of the trainer in `trainer_kwargs`."""
    from trl_spo import SoftPOTrainer

    def make(trainer_kwargs=None, **kwargs):
        arguments = {"model": model_path, "train_dataset": pairs, "processing_class": tokenizer}
        return SoftPOTrainer(args=make_args(**kwargs), **{**arguments, **(trainer_kwargs or {})})

    return make


@pytest.fixture
def token_logps():
    """A function that gives the log-probability of each token of a completion from a plain forward of one sequence, unpadded."""

    def compute(model, prompt_ids, completion_ids):
        ids = torch.tensor([list(prompt_ids) + list(completion_ids)], device=model.device)
        logps = model(input_ids=ids).logits[0].float().log_softmax(dim=-1)
        start = len(prompt_ids)
        return torch.stack([logps[start + t - 1, token] for t, token in enumerate(completion_ids)])

    return compute


@pytest.fixture
def train_log():
    """A function that trains and gives the logged metrics of each step."""

    def train(trainer):
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss/preference" in entry]

    return train


@pytest.fixture
def weights_of():
    """A function that copies a model's parameters."""

    def copy(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    return copy


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
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
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
def assert_same_weights():
    """A function that asserts that two folders hold the same safetensors files, bit for bit."""

    def check(one: Path, other: Path) -> None:
        names = sorted(file.name for file in one.glob("*.safetensors"))
        assert names and names == sorted(file.name for file in other.glob("*.safetensors"))
        for name in names:  # the model or adapter, and the degree heads
            expected, found = load_file(one / name), load_file(other / name)
            assert expected and expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected), name

    return check
