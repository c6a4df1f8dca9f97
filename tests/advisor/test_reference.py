# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether the responses are the reference's own: with distributions that are known, and with a real small model."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tests.advisor.conftest import codes, make_pairs, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_spo.advisor.advice import advise
from trl_spo.advisor.findings import UsageError
from trl_spo.advisor.models import read_model
from trl_spo.advisor.reference import (
    _draw,
    _load,
    cut,
    difference,
    excess_of,
    own_samples,
    ratio_error,
    reference_findings,
)
from trl_spo.evaluation import ResponseScore


def _simulated(rng, number, model, writer):
    """Scores by `model` of texts that `writer` wrote, token by token, until it writes a 0: both have a distribution for each last token."""
    scores = []
    for _ in range(number):
        log_prob = entropy = tokens = 0
        last = 1
        while last != 0 and tokens < 50:
            p = model[last]
            entropy -= (p * np.log(p)).sum()
            last = rng.choice(len(p), p=writer[last])
            log_prob += np.log(p[last])
            tokens += 1
        scores.append(ResponseScore(log_prob, entropy, tokens))
    return scores


def _distributions(seed):
    p = np.random.default_rng(seed).dirichlet(np.full(5, 1.0), size=5)
    return 0.9 * p + 0.1 / 5


def test_own_texts_have_no_excess_wherever_they_end():
    rng, z = np.random.default_rng(0), []
    for seed in range(40):
        p = _distributions(seed)
        found = excess_of(_simulated(rng, 60, p, p), list(range(60)), 60)
        z.append(found.excess / ratio_error(found.per_prompt))
    # Standard normal, or nearly so
    assert abs(np.mean(z)) < 3 / np.sqrt(40) and 0.75 < np.std(z) < 1.25


def test_texts_of_others_have_that_of_the_divergence():
    # A writer who does not look at the last token: the excess is its cross-entropy without the model's entropy, at the tokens it writes
    model, writer = _distributions(1), np.tile(_distributions(2)[0], (5, 1))
    rng, q = np.random.default_rng(0), writer[0]
    scores = _simulated(rng, 1000, model, writer)
    found = excess_of(scores, list(range(1000)), 1000)
    # The first token comes after 1, the others after what was written and was no 0
    others = q.copy()
    others[0] = 0.0
    after = others / others.sum()

    def mean(weights):
        of_last = (-(q * np.log(p)).sum() + (p * np.log(p)).sum() for p in model)
        return sum(weight * value for weight, value in zip(weights, of_last, strict=True))

    tokens = np.mean([score.tokens for score in scores])
    expected = (mean(np.eye(5)[1]) + (tokens - 1) * mean(after)) / tokens
    assert found.excess == pytest.approx(expected, abs=4 * ratio_error(found.per_prompt))
    assert expected > 0.1


def test_difference_is_judged_by_its_error():
    rng, z = np.random.default_rng(3), []
    p = _distributions(4)
    for _ in range(40):
        data = excess_of(_simulated(rng, 60, p, p), list(range(30)) * 2, 30)
        samples = excess_of(_simulated(rng, 60, p, p), list(range(30)) * 2, 30)
        value, error = difference(data, samples)
        assert value == pytest.approx(data.excess - samples.excess)
        z.append(value / error)
    assert abs(np.mean(z)) < 3 / np.sqrt(40) and 0.75 < np.std(z) < 1.3


def test_texts_are_cut_to_words():
    assert [cut(" a  bb\nccc d", words) for words in (0, 1, 3, 9)] == [" a", " a", " a  bb\nccc", " a  bb\nccc d"]
    assert cut("  ", 2) == "  "


def test_one_prompt_has_no_error():
    assert ratio_error(np.array([[1.0, 2.0]])) == float("inf")


PROMPTS = [
    f"Once upon a time there was a {kind} {who}"
    for kind in ("little", "big", "red", "sad")
    for who in ("girl", "dog", "cat", "boy")
]


@pytest.fixture(scope="module")
def own(stories):
    """Pairs of responses that the model sampled."""
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    texts, owners = own_samples(model, tokenizer, PROMPTS, 40, batch_size=16, seed=7)
    assert owners == [i for i in range(16) for _ in range(2)]
    return make_pairs(*((prompt, texts[2 * i], texts[2 * i + 1]) for i, prompt in enumerate(PROMPTS)))


@pytest.fixture(scope="module")
def human(real_data):
    """Pairs of people's, far from stories, with short prompts so that this is quick."""
    short = real_data("hh_helpful_pairs").filter(
        lambda row: len(row["prompt"]) < 120 and max(len(row["chosen"]), len(row["rejected"])) < 90
    )
    return short.select(range(16))


def _found(reference, dataset, model=None, **kwargs):
    models = {"model": None if model is None else read_model(model)}
    options = {"number": 16, "batch_size": 32, **models, **kwargs}
    return reference_findings(read_model(reference), dataset, rows_of(dataset), **options)


def test_own_responses_pass(stories, own):
    (finding,) = _found(stories, own)
    assert (finding.code, finding.severity) == ("on_policy", "info")
    data = finding.data
    assert abs(data["difference"]) < 3 * data["standard_error"] and data["prompts"] == 16
    # Both responses are its own: neither is the more probable one
    assert abs(data["better"]["excess"] - data["worse"]["excess"]) < 0.2
    assert data["gap"] > 0


def test_responses_of_people_are_flagged(stories, human):
    (finding,) = _found(stories, human)
    assert (finding.code, finding.severity) == ("off_policy", "warning")
    assert (
        finding.data["difference"] > 0.5 > 10 * 0.01
        and finding.data["difference"] > 3 * finding.data["standard_error"]
    )


def test_another_model_that_is_nearer(stories, own, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    wrong = codes(_found(str(tmp_path), own, number=8, model=stories))
    assert wrong == {"off_policy": "warning", "reference_is_not_the_nearer": "warning"}
    right = codes(_found(stories, own, number=8, model=str(tmp_path)))
    assert right == {"on_policy": "info", "reference_and_model": "info"}


def test_samples_of_a_model_that_is_surer_of_itself(stories):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    model.model.norm.weight.data *= 2.0  # twice the logits, as at half the temperature
    texts, _ = own_samples(model, tokenizer, PROMPTS[:8], 30, batch_size=16, seed=7)
    sharper = make_pairs(*((prompt, texts[2 * i], texts[2 * i + 1]) for i, prompt in enumerate(PROMPTS[:8])))
    (finding,) = _found(stories, sharper)
    assert (finding.code, finding.severity) == ("likelier_than_samples", "info")
    assert finding.data["difference"] < -3 * finding.data["standard_error"] and finding.data["gap"] > 0


def test_samples_without_any_text(stories, own, monkeypatch):
    monkeypatch.setattr("trl_spo.advisor.reference.own_samples", lambda *args: ([], []))
    (finding,) = _found(stories, own)
    assert finding.code == "reference_not_checked" and "samples are empty" in finding.detail


def _saved(stories, folder, template=None, tokens=()):
    """The model with another tokenizer."""
    shutil.copytree(stories, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return str(folder)


_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ message['content'] + eos_token }}{% endfor %}"
)


def test_prompts_that_the_model_cannot_read_are_not_asked(stories, own, tmp_path):
    """Since they have findings of their own."""

    def turns(role, text):
        return [{"role": role, "content": text}]

    chats = [
        (turns("user", row["prompt"]), *(turns("assistant", row[name]) for name in ("chosen", "rejected")))
        for row in own.to_list()
    ]
    strict = _saved(stories, tmp_path / "strict", _TEMPLATE)
    dataset = make_pairs(*chats)
    assert len(_draw([read_model(strict)], dataset, rows_of(dataset), 8, 0)[0]) == 8
    with_system = make_pairs(*((turns("system", "Be kind.") + prompt, *rest) for prompt, *rest in chats))
    found = codes(advise(with_system, model=strict).findings)
    assert found["chat_template_fails"] == "error" and found["reference_not_checked"] == "info"
    # The policy writes no chats, its reference does
    found = {finding.code: finding for finding in advise(make_pairs(*chats), model=stories, ref_model=strict).findings}
    assert f"'{stories}' has no chat template" in found["reference_not_checked"].detail
    beyond = _saved(stories, tmp_path / "beyond", tokens=["<|think|>"])
    thinking = own.map(lambda row: {"prompt": "<|think|>" + row["prompt"]})
    found = codes(advise(thinking, model=beyond).findings)
    assert found["vocabulary"] == "error" and found["reference_not_checked"] == "info"


def test_weights_are_those_that_were_asked_for(stories, own, monkeypatch):
    loaded, asked, fits = [], [], []
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **kwargs: loaded.append((name, kwargs)) or original(name)
    )
    _load(replace(read_model(stories), kwargs={"revision": "v2", "trust_remote_code": True}))
    assert loaded == [(stories, {"dtype": "auto", "revision": "v2", "trust_remote_code": True})]
    monkeypatch.setattr("trl_spo.advisor.reference.reference_findings", lambda *args: asked.append(args) or [])
    monkeypatch.setattr("trl_spo.advisor.models.fits_here", lambda model, facts: fits.append(facts.name))
    other = stories + "/"
    advise(own, model=stories, ref_model=other, options={"model_revision": "v2", "trust_remote_code": True})
    # The revision is that of the model; both are loaded
    (reference, _, _, _, model, *_) = asked[0]
    assert (reference.name, reference.kwargs) == (other, {"revision": "main", "trust_remote_code": True})
    assert (model.name, model.kwargs) == (stories, {"revision": "v2", "trust_remote_code": True})
    assert sorted(fits) == sorted([stories, other])


def test_what_it_would_be_asked_without(stories, own):
    for name in ("tools", "images"):
        findings = advise(own.add_column(name, ["[]"] * len(own)), model=stories).findings
        finding = next(finding for finding in findings if finding.code == "reference_not_checked")
        assert f"column `{name}`" in finding.detail


@pytest.mark.parametrize("number", [1, 7])
def test_few_prompts_say_nothing(stories, own, number):
    with pytest.raises(UsageError, match=f"at least 8, got {number}"):
        advise(own, model=stories, reference_prompts=number)


def test_too_few_prompts(stories, own):
    (finding,) = _found(stories, own.select(range(5)))
    assert finding.code == "reference_not_checked" and "Only 5 rows" in finding.detail


def test_prompts_that_leave_no_room_are_not_asked(stories, own):
    long = own.map(lambda row: {"prompt": row["prompt"] + " and a dog" * 100})
    assert _found(stories, long)[0].code == "reference_not_checked"


def test_it_is_part_of_the_advice(stories, own, monkeypatch):
    (finding,) = (one for one in advise(own, model=stories, reference_prompts=0).findings if "reference" in one.code)
    assert (finding.code, finding.detail) == ("reference_not_checked", "`reference_prompts=0`.")
    asked = []
    monkeypatch.setattr("trl_spo.advisor.reference.reference_findings", lambda *args: asked.append(args) or [])
    advise(own, model=stories)
    advise(own, model=stories, ref_model=stories)
    # The model is its own reference: nothing is to be compared
    assert [args[0].name for args in asked] == [stories, stories]
    assert [args[3:5] for args in asked] == [(64, None), (64, None)]
    monkeypatch.setattr("trl_spo.advisor.models.fits_here", lambda *args: "It is too large.")
    finding = next(
        finding for finding in advise(own, model=stories).findings if finding.code == "reference_not_checked"
    )
    assert finding.detail.startswith("It is too large.")
    chats = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "a"}],
                "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": "c"}],
            }
        ]
    )
    found = {finding.code: finding for finding in advise(chats, model=stories).findings}
    assert (
        "no chat template" in found["reference_not_checked"].detail
        and found["chat_template_missing"].severity == "error"
    )
    monkeypatch.setattr("trl_spo.advisor.advice.find_spec", lambda name: None)
    found = {finding.code: finding for finding in advise(own, model=stories).findings}
    assert 'pip install "trl-spo[eval]"' in found["reference_not_checked"].detail
    with pytest.raises(ValueError, match="there is no `model`"):
        advise(own, ref_model=stories)
