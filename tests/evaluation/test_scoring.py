# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_spo.evaluation.displacement import score_pairs
from trl_spo.evaluation.divergence import on_policy_divergence
from trl_spo.evaluation.diversity import distinct_n, response_diversity, self_bleu
from trl_spo.evaluation.scoring import ResponseScorer, preference_accuracy, text_log_likelihood


def test_distinct_n():
    assert distinct_n(["a b a b", "a b"], 1) == 2 / 6
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert distinct_n(["a b c", "d"], 2) == 1
    assert distinct_n(["a b a b a b", "a b"], 2, num_words=2) == 1 / 2
    assert distinct_n(["a", ""], 2) is None


def test_self_bleu():
    assert self_bleu([["the cat sat on the mat", "the cat sat on the mat"]]) == pytest.approx(1)
    assert self_bleu([["one two three four", "five six seven eight"]]) < 0.1
    # Geometric mean of the precisions 4/5, 3/4, 2/3, 1/2 of n-grams, and no brevity penalty, for either against the other
    pair = ["a b c d e", "a b c d f"]
    assert self_bleu([pair]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    same = ["x y z w v"] * 2
    assert self_bleu([pair, same]) == pytest.approx((2 * self_bleu([pair]) + 2) / 4)
    assert self_bleu([["alone"], ["alone", "  "]]) is None


@pytest.fixture(scope="module")
def scorer(model_path):
    return ResponseScorer(model_path, {"dtype": "float32"}, batch_size=2)


ROWS = [
    ("Who is there", " It is me."),
    ("Who", " Nobody at all, I think, and nobody ever was."),
    ("", "A text by itself."),
    ([{"role": "user", "content": "Hello"}], "Good day."),
    ("Where is it", ""),
]


def test_scores_are_those_of_a_plain_forward_pass(scorer, model_path):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    for (prompt, response), score in zip(ROWS, scorer.score(ROWS), strict=True):
        if isinstance(prompt, str):
            before = tokenizer(prompt).input_ids if prompt else []
            ids = tokenizer(prompt + response + tokenizer.eos_token).input_ids
        else:
            chat = [*prompt, {"role": "assistant", "content": response}]
            before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True).input_ids
            ids = tokenizer.apply_chat_template(chat, return_dict=True).input_ids
        assert ids[: len(before)] == before
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = max(len(before), 1)
        assert score.tokens == len(ids) - first
        expected = sum(logps[i - 1, ids[i]].item() for i in range(first, len(ids)))
        assert score.log_prob == pytest.approx(expected, rel=1e-5, abs=1e-5)
        entropy = -(logps.exp() * logps).sum(-1)[first - 1 : -1].sum().item()
        assert score.entropy == pytest.approx(entropy, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_in_the_prompt(scorer, as_text):
    """As the trainers have them: the template writes them ahead of the conversation."""
    prompt, tools = [{"role": "user", "content": "Hello"}], [{"type": "function", "function": {"name": "look"}}]
    tokenizer, kwargs = scorer.tokenizer, {"tools": tools, "return_dict": True}
    columns = {"tools": json.dumps(tools) if as_text else tools, "chat_template_kwargs": None}
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **kwargs).input_ids
    chosen, rejected = score_pairs(scorer, [(prompt, "Good day.", "No", columns)])[0]
    for response, score in (("Good day.", chosen), ("No", rejected)):
        chat = [*prompt, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(chat, **kwargs).input_ids
        assert score.tokens == len(ids) - len(before)
        with torch.no_grad():
            logps = scorer.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(logps[i - 1, ids[i]].item() for i in range(len(before), len(ids)))
        assert score.log_prob == pytest.approx(expected, rel=1e-4)


def test_template_kwargs_are_used(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = "{% if deep %}deep {% endif %}" + tokenizer.chat_template
    scorer = ResponseScorer(model_path, {"dtype": "float32"}, tokenizer=tokenizer)
    row = ([{"role": "user", "content": "Hello"}], "Good day.")
    plain, deep = scorer.score([row, (*row, {"chat_template_kwargs": {"deep": True}})])
    assert plain.tokens == deep.tokens and plain.log_prob != deep.log_prob


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_adapter_of_the_output_layer(architecture, model_paths, tmp_path):
    """Which is merged, also where the layer has the weights of the input embeddings, that are left as they are."""
    path = model_paths(architecture)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # or they would be there twice, and not tied
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.save_pretrained(tmp_path)
    (score,) = ResponseScorer(str(tmp_path), {"dtype": "float32"}).score([("Who", " is it")])
    before, ids = tokenizer("Who").input_ids, tokenizer("Who is it" + tokenizer.eos_token).input_ids
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(logps[i - 1, ids[i]].item() for i in range(len(before), len(ids)))
    assert score.log_prob == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="has an adapter on its output layer"):
        ResponseScorer(base, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="has an adapter on its output layer"):
        on_policy_divergence(base, base, tokenizer, [])


def test_a_long_response_is_cut_off(scorer):
    limit = scorer.model.config.max_position_embeddings
    (score,) = scorer.score([("Who", " is it" * limit)])
    assert 0 < score.tokens < limit and math.isfinite(score.log_prob)


def test_preference_accuracy(scorer):
    (a, b) = scorer.score([("Who", " is it"), ("Who", " zebra zebra zebra")])
    better, worse = " is it", " zebra zebra zebra"
    if a.log_prob / a.tokens < b.log_prob / b.tokens:
        better, worse = worse, better
    assert preference_accuracy(scorer, [("Who", better, worse)] * 3 + [("Who", worse, better)])["rate"] == 0.75
    # One of the same value counts half
    found = preference_accuracy(scorer, [("Who", better, worse), ("Who", worse, worse)])
    assert found["rate"] == 0.75 and found["number"] == 2
    low, high = preference_accuracy(scorer, [("Who", better, worse), ("Who", worse, worse)] * 30)["interval"]
    assert low < 0.75 < high
    assert preference_accuracy(scorer, [])["rate"] is None


def test_text_log_likelihood(scorer):
    texts = ["A text by itself.", "And another one, which is longer."]
    scores = scorer.score([("", text) for text in texts])
    expected = sum(score.log_prob for score in scores) / sum(score.tokens for score in scores)
    assert text_log_likelihood(scorer, texts) == pytest.approx(expected)


def test_diversity(scorer):
    rows = [
        {"prompt": "Who", "responses": [{"text": " is it"}, {"text": " is she"}]},
        {"prompt": "What", "responses": [{"text": " is it"}, {"text": " is it"}]},
    ]
    found = response_diversity(scorer, rows)
    assert found["distinct_1"] == 3 / 8 and found["distinct_2"] == 2 / 4 and found["mean_words"] == 2
    scores = scorer.score((row["prompt"], response["text"]) for row in rows for response in row["responses"])
    entropy = sum(score.entropy for score in scores) / sum(score.tokens for score in scores)
    assert found["entropy"] == pytest.approx(entropy) and 0 < entropy < math.log(scorer.model.config.vocab_size)
    assert 0 < found["self_bleu"] < 1
