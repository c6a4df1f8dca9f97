# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What the documentation names and a reader has: models and datasets of the Hub, and files of his own. All of it is tiny and made here."""

import json
import random
import shutil
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CAUSAL = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct")
REWARD = ("Skywork/Skywork-Reward-V2-Qwen3-0.6B",)
SUBJECTS = ("film", "story", "music", "actor", "ending", "night", "river", "garden", "letter", "answer")
GOOD = ("great", "moving", "clever", "warm", "funny")
BAD = ("dull", "slow", "loud", "empty", "sad")
TEMPLATE = "the {} was {} and the {} is {} but for the {}"


def sentence(rng: random.Random, adjectives: tuple[str, ...]) -> str:
    words = [
        rng.choice(SUBJECTS),
        rng.choice(adjectives),
        rng.choice(SUBJECTS),
        rng.choice(adjectives),
        rng.choice(SUBJECTS),
    ]
    return TEMPLATE.format(*words)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, so that what a model with random weights writes is read again as it was written."""
    words = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<unk>",
        "user",
        "assistant",
        "Review:",
        *SUBJECTS,
        *GOOD,
        *BAD,
    ]
    words += sorted(set(TEMPLATE.replace("{}", "").split()))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that ends its answers after some ten tokens: the first feature is always on, and speaks for the end."""
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048, "vocab_size": len(tokenizer)}
    # Not of the architecture in the name: that one has a tokenizer of its own
    if path.parent.name == "Qwen":
        model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, initializer_range=0.2, tie_word_embeddings=False))
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] = 4.0
            model.lm_head.weight[tokenizer.eos_token_id, 0] = 1.0
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**sizes, **ids, num_labels=1))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_datasets(hub: Path) -> None:
    rng = random.Random(1)

    def messages(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    rows = []
    for i in range(32):
        # Far enough from each other to be no near-duplicates
        prompt = messages("user", f"{sentence(rng, GOOD + BAD)} {i}")
        chosen, rejected = (prompt + messages("assistant", sentence(rng, words)) for words in (GOOD, BAD))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    pairs = [
        {"chosen": row["chosen"], "rejected": row["rejected"], "score_chosen": 8.0, "score_rejected": 3.0}
        for row in rows
    ]
    unpaired = [
        {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"][1:], "label": good}
        for row in rows
        for good in (True, False)
    ]
    for name, content in (
        ("ultrafeedback_binarized", pairs),
        ("kto-mix-14k", unpaired),
        ("ultrafeedback-prompt", [{"prompt": row["prompt"]} for row in rows[:18]]),
    ):
        folder = hub / "trl-lib" / name / "data"
        folder.mkdir(parents=True)
        for split, part in (("train", content[8:]), ("test", content[:8])):
            Dataset.from_list(part).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    folder = hub / "openai" / "gsm8k"
    (folder / "main").mkdir(parents=True)
    sums = [{"question": f"{i} + {i} =", "answer": f"#### {2 * i}"} for i in range(8)]
    Dataset.from_list(sums).to_parquet(folder / "main" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: test, path: main/test-*}\n---\n"
    )


def make_files(folder: Path) -> None:
    """What stands in capitals in the commands, and the files that the texts say are the reader's."""
    rng = random.Random(2)

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    write("REVIEWS.jsonl", [{"text": sentence(rng, (BAD, GOOD)[i % 2]), "label": str(i % 2)} for i in range(600)])
    write("given/held_out.jsonl", [{"text": sentence(rng, GOOD)} for _ in range(8)])
    pairs = [
        {"prompt": f"write of the {subject}", "chosen": sentence(rng, GOOD), "rejected": "the " + rng.choice(BAD)}
        for subject in SUBJECTS
    ]
    write("PAIRS.jsonl", pairs)
    write("given/labelled_by_us.jsonl", pairs)
    (folder / "given" / "my_evals.py").write_text("def gsm8k(model):\n    return 0.5\n")
    (folder / "given" / "rewards.py").write_text(
        "def helpful(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n"
    )


def make_world(folder: Path) -> None:
    hub = folder / "hub"
    tokenizer = make_tokenizer()
    for name in CAUSAL + REWARD:
        make_model(hub / name, tokenizer)
    make_model(folder / "Qwen" / "MODEL", tokenizer)
    make_datasets(hub)
    (folder / "given").mkdir()
    make_files(folder)
    shutil.copytree(folder / "Qwen" / "MODEL", folder / "given" / "Qwen2.5-0.5B-SoftPO")
