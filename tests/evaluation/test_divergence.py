# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import itertools

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_spo.evaluation.divergence import on_policy_divergence
from trl_spo.synthetic.candidates import generate_candidates
from trl_spo.synthetic.files import Rows
from trl_spo.synthetic.students import TransformersStudent, encode_prompt


ARCHITECTURES = ["llama", "gemma2-softcapping", "cohere-logit-scale", "phi-head-bias"]


def sample(prompt, token_ids, finish_reason="stop", temperature=1.0):
    response = {"token_ids": token_ids, "finish_reason": finish_reason, "temperature": temperature}
    return {"prompt": prompt, "responses": [response]}


def log_distributions(model, ids):
    with torch.no_grad():
        return model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_terms_are_those_of_plain_forward_passes(architecture, model_paths, load_model, perturb):
    path = model_paths(architecture)
    tokenizer = AutoTokenizer.from_pretrained(path)
    policy, reference = perturb(load_model(path)), load_model(path)
    chat = [{"role": "user", "content": "the film"}]
    rows = [
        sample("the film", [30, 41, 52]),
        sample("a good story that ends", [33]),
        sample(chat, [20, 21, 22, 23, 24], "length"),
        sample("he", []),
    ]
    found = on_policy_divergence(policy, reference, tokenizer, rows, batch_size=3)
    for row, [terms] in zip(rows, found, strict=True):
        prompt_ids = encode_prompt(tokenizer, row)
        ids, reason = row["responses"][0]["token_ids"], row["responses"][0]["finish_reason"]
        places = range(len(prompt_ids) - 1, len(prompt_ids) + len(ids) - (reason == "length"))
        ours, theirs = (log_distributions(model, prompt_ids + ids)[list(places)] for model in (policy, reference))
        assert terms.tokens == len(ids) + (reason == "stop") == len(places)
        assert terms.kl == pytest.approx((ours.exp() * (ours - theirs)).sum().item(), rel=1e-4)
        assert terms.entropy == pytest.approx(-(ours.exp() * ours).sum().item(), rel=1e-4)
        policy.float(), reference.float()


def test_its_mean_is_the_kl_of_all_responses(world, perturb):
    """Over all responses of up to two tokens, which are cut then, with their probabilities: Σ p log(p / q)."""
    path = world / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    policy = perturb(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), scale=0.3)
    prompt, eos = "say w1 w2", tokenizer.eos_token_id
    prompt_ids = encode_prompt(tokenizer, {"prompt": prompt})
    others = [i for i in range(policy.config.vocab_size) if i != eos]
    rows = [sample(prompt, [])] + [sample(prompt, [a]) for a in others]
    rows += [sample(prompt, list(pair), "length") for pair in itertools.product(others, others)]
    log_probs = []
    for model in (policy, reference):
        first = log_distributions(model, prompt_ids)[-1]
        second = {a: log_distributions(model, prompt_ids + [a])[-1] for a in others}
        of_pairs = [first[a] + second[a][b] for a, b in itertools.product(others, others)]
        log_probs.append(torch.stack([first[eos], *(first[a] + second[a][eos] for a in others), *of_pairs]))
    log_p, log_q = log_probs
    assert log_p.exp().sum().item() == pytest.approx(1)
    found = on_policy_divergence(policy.float(), reference.float(), tokenizer, rows, batch_size=64)
    kl, entropy = (torch.tensor([getattr(terms, name) for [terms] in found]) for name in ("kl", "entropy"))
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    assert exact > 0.5
    assert (log_p.exp() * kl).sum().item() == pytest.approx(exact, rel=1e-4)
    assert (log_p.exp() * entropy).sum().item() == pytest.approx(-(log_p.exp() * log_p).sum().item(), rel=1e-4)
    # No term is negative, and the variance is less than that of the log-ratio
    assert (kl >= 0).all()
    variance = (log_p.exp() * (log_p - log_q - exact) ** 2).sum().item()
    assert (log_p.exp() * (kl - exact) ** 2).sum().item() < variance / 2


def test_of_what_a_student_has_drawn(world, tmp_path):
    """The tokens that were drawn, and not those of the text, which can be other ones."""
    path = str(world / "model")
    prompts = Dataset.from_dict({"prompt_id": ["a", "b"], "prompt": ["say w1 w2", "say w3"]})
    student = TransformersStudent(model=path, max_new_tokens=5, model_kwargs={"dtype": "float32"})
    file = generate_candidates(prompts, student, tmp_path / "c.jsonl", 3, (1.0,), token_ids=True)
    rows = list(Rows(file))
    tokenizer = AutoTokenizer.from_pretrained(path)
    for response in (r for row in rows for r in row["responses"]):
        assert len(response["token_ids"]) == 5 or response["finish_reason"] == "stop"
        assert tokenizer.eos_token_id not in response["token_ids"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = on_policy_divergence(model, model, tokenizer, rows)
    assert [len(of_row) for of_row in found] == [3, 3]
    assert all(terms.kl == pytest.approx(0, abs=1e-4) and terms.entropy > 0 for of_row in found for terms in of_row)
    # Others are not asked to keep them
    plain = Rows(generate_candidates(prompts, student, tmp_path / "d.jsonl", 3, (1.0,)))
    assert all("token_ids" not in response for row in plain for response in row["responses"])
    assert [[r["text"] for r in row["responses"]] for row in plain] == [
        [r["text"] for r in row["responses"]] for row in rows
    ]


def test_what_is_refused(model_paths, load_model):
    tokenizer = AutoTokenizer.from_pretrained(model_paths("llama"))
    model = load_model(model_paths("llama"))
    with pytest.raises(ValueError, match=r"drawn at temperature 0.7, .* Use `temperatures=\(1.0,\)`"):
        on_policy_divergence(model, model, tokenizer, [sample("he", [5], temperature=0.7)])
    other = load_model(model_paths("llama"))
    other.resize_token_embeddings(len(tokenizer) + 8)
    with pytest.raises(ValueError, match="vocabulary of 200 tokens, and the reference one of 208"):
        on_policy_divergence(model, other, tokenizer, [sample("he", [5])])
