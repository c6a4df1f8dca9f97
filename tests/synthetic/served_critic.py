# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
A critic that is small enough to be trained within seconds, and writes verdicts in the format: a language model with two layers that
reads which of two stories is happier. A story is happy if a word such as "happy", "smiled" or "played" is in it.

Its tokenizer has one token for all that stands in every request or answer, so that a request is short. Besides its answers, it learns at
each token whether the story has been happy so far, without which it would need many times as long.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_spo.synthetic.critics import EndpointCritic, Request
from trl_spo.synthetic.endpoint import Endpoint


QUESTION = "Which story is happier?"
RUBRIC = f"""\
{QUESTION}
{{{{ prompt }}}}
<response_a>{{{{ response_a }}}}</response_a>
<response_b>{{{{ response_b }}}}</response_b>"""
# A server gives the template parts of a message, and `apply_chat_template` what it is given
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.content if message.content is string else message.content[0].text }}\n{% endfor %}"
)
_STEMS = ("happ", "smil", "play", "fun", "lov", "friend")
_TAGS = ("<response_a>", "</response_a>", "<response_b>", "</response_b>")
_ANSWER = ('{"rationale": "Happy: ', " yes", " no", '.", "verdict": "', '"}')
_BATCH, _EVALUATE, _SHORT_STEPS, _MAX_STEPS = 32, 25, 75, 500
_SIZES = (50, 80)  # characters of a story, first and then


def is_happy(story: str) -> bool:
    return any(stem in story for stem in _STEMS)


def make_critic(model: str, rubric: str, base_url: str = "http://127.0.0.1:1/v1", **options) -> EndpointCritic:
    """The critic behind a server that supports no structured output."""
    endpoint = Endpoint(model, base_url=base_url, api_key_env=None, **options)
    return EndpointCritic(
        name="happier", endpoint=endpoint, rubric=rubric, structured_output="none", max_completion_tokens=24
    )


def train_critic(stories: list[str], rubric: str, folder: Path, seed: int = 0) -> float:
    """Trains the critic, saves it, and returns the share of its answers that are right in all tokens, on pairs it has not seen."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    critic = make_critic("untrained", rubric)
    end_of_request = critic.messages(Request("", ("", "")))[0]["content"].rpartition("</response_b>")[2].strip()
    tokenizer = _make_tokenizer(stories, end_of_request)
    words = [story.split(" ") for story in stories]

    def beginning(of: list[str], size: int) -> str:
        start = rng.randrange(max(1, len(of) - size // 5))
        return " ".join(of[start : start + size // 2])[:size]

    def draw(happy: bool, size: int) -> str:
        while is_happy(text := beginning(rng.choice(words), size)) != happy:
            pass
        return text

    def draw_pairs(number: int, size: int) -> list[tuple[list[int], list[int]]]:
        messages, answers = [], []
        for _ in range(number):
            happy = rng.random() < 0.5, rng.random() < 0.5
            responses = tuple(draw(of_one, size) for of_one in happy)
            messages.append(critic.messages(Request(beginning(rng.choice(words), 40), responses)))
            first, second = ("yes" if of_one else "no" for of_one in happy)
            verdict = "tie" if first == second else "A" if first == "yes" else "B"
            answers.append(json.dumps({"rationale": f"Happy: {first} and {second}.", "verdict": verdict}))
        requests = tokenizer.apply_chat_template(messages, return_dict=False)
        answers = tokenizer(answers, add_special_tokens=False)["input_ids"]
        return [(x, [*y, tokenizer.eos_token_id]) for x, y in zip(requests, answers, strict=True)]

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
            initializer_range=0.05,
        )
    )
    flags_of = _Flags(tokenizer)

    def losses(pairs: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of the answers and of what it knows at each token, and the share of the answers that are right."""
        pad, n = tokenizer.pad_token_id, max(len(answer) for _, answer in pairs)
        longest = max(len(request) for request, _ in pairs)
        rows = [[pad] * (longest - len(x)) + x + y + [pad] * (n - len(y)) for x, y in pairs]
        flags = torch.tensor([[-100] * (longest - len(x)) + flags_of(x) + [-100] * n for x, _ in pairs])
        labels = torch.tensor([y + [-100] * (n - len(y)) for _, y in pairs])
        ids = torch.tensor(rows)
        hidden = model.model(input_ids=ids, attention_mask=(ids != pad).long(), use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, -n - 1 : -1])
        known = hidden[flags >= 0] @ model.lm_head.weight[flags_of.tokens].T
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.3 * cross_entropy(known, flags[flags >= 0])
        right = ((logits.argmax(-1) == labels) | (labels < 0)).all(1).float().mean()
        return loss, right

    unseen = draw_pairs(128, _SIZES[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.0)
    accuracy = 0.0
    for step in range(_MAX_STEPS):
        if step % _EVALUATE == 0:
            if step:
                with torch.no_grad():
                    accuracy = losses(unseen)[1].item()
            if accuracy >= 0.9:
                break
            size = _SIZES[step >= _SHORT_STEPS]  # what is short is learned sooner
            pairs = sorted(draw_pairs(_EVALUATE * _BATCH, size), key=lambda pair: len(pair[0]))
            batches = [pairs[i : i + _BATCH] for i in range(0, len(pairs), _BATCH)]
            rng.shuffle(batches)
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 15)
        optimizer.zero_grad()
        losses(batches[step % _EVALUATE])[0].backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return accuracy


def _make_tokenizer(stories: list[str], end_of_request: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=1000,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories[:400], trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (QUESTION, end_of_request, *_TAGS, *_ANSWER)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


class _Flags:
    """At each token of a request whether the response has been happy so far, 0 or 1; -100 outside of the responses."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        vocabulary = tokenizer.get_vocab()
        self.tokens = [vocabulary[" no"], vocabulary[" yes"]]
        self.starts = {vocabulary["<response_a>"], vocabulary["<response_b>"]}
        self.ends = {vocabulary["</response_a>"], vocabulary["</response_b>"]}
        self.happy = {i for token, i in vocabulary.items() if is_happy(token)}

    def __call__(self, ids: list[int]) -> list[int]:
        flags, flag = [], -100
        for token in ids:
            flag = 0 if token in self.starts else 1 if token in self.happy and flag >= 0 else flag
            flags.append(flag)
            flag = -100 if token in self.ends else flag
        return flags
