# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_spo.evaluation.capability import Capability, compare_capability
from trl_spo.evaluation.scoring import ResponseScorer


@pytest.fixture(scope="module")
def scorer(model_path):
    return ResponseScorer(model_path, {"dtype": "float32"}, batch_size=2)


def test_perplexity(scorer, model_path, tmp_path):
    texts = ["the film was great", "a dog", "he finds the way home and the story ends well"]
    units = Capability(name="texts", texts=texts).units(model_path, scorer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text + tokenizer.eos_token).input_ids])
        loss = model(ids, labels=ids).loss.item()
        total, tokens = total + loss * (ids.size(1) - 1), tokens + ids.size(1) - 1
    found = compare_capability("perplexity", np.array(units), np.array([units]))
    assert found["before"]["value"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_exact_match(scorer, model_path, tmp_path):
    """What the model says at temperature 0 is the answer to its own question, whatever the case and the white space."""
    prompts = ["the film", "a good story", "he said"]
    said = [row.strip() for row in greedy(scorer, prompts, 4)]
    questions = [(prompts[0], f"  {said[0].upper()} "), (prompts[1], "no"), (prompts[2], said[2])]
    capability = Capability(name="own", questions=questions, max_new_tokens=4)
    assert capability.units(model_path, scorer, tmp_path) == [1.0, 0.0, 1.0]


def greedy(scorer, prompts, length):
    texts = []
    for prompt in prompts:
        ids = scorer.tokenizer(prompt, return_tensors="pt").input_ids
        out = scorer.model.generate(ids, do_sample=False, max_new_tokens=length, pad_token_id=0)
        whole = scorer.tokenizer.decode(out[0], skip_special_tokens=True)
        texts.append(whole[len(scorer.tokenizer.decode(ids[0], skip_special_tokens=True)) :])
    return texts


@pytest.mark.parametrize(
    ("response", "right"),
    [("so it is #### 12", True), ("#### 3 then #### 12", True), ("#### 12 then #### 3", False), ("12", False)],
)
def test_extract(response, right):
    capability = Capability(name="sums", questions=[("q", "as 3 * 4 = 12\n#### 12")], extract=r"#### (\d+)")
    assert (capability._answer(response) == capability._answer("as 3 * 4 = 12\n#### 12")) == right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        *(
            (text, True)
            for text in ("It is 1234", "1,234.", "so $1,234.00!", "3 times 2 and 1,234 apples.", "**1234.0**")
        ),
        *((text, False) for text in ("1,234 and 5", "-1,234", "1,23", "1234.5", "none", "12,34")),
    ],
)
def test_numbers_of_the_example(response, right):
    example = yaml.safe_load((Path(__file__).parents[2] / "examples/compare.yaml").read_text())
    capability = Capability(
        name="sums", questions=[("q", "a\n#### 1,234")], extract=example["evaluation"]["capabilities"][0]["extract"]
    )
    assert (capability._answer(response) == capability._answer("a\n#### 1,234")) == right


def test_a_list_is_no_number():
    plain = Capability(name="c", questions=[("q", "12")])
    assert plain._answer("1,2") != plain._answer("12") == plain._answer(" 12.0\n") and plain._answer("NaN") == "nan"


def test_function(scorer, model_path, tmp_path):
    assert Capability(name="f", function=lambda model: 0.5).units(model_path, scorer, tmp_path) == [0.5]
    seen = []
    several = Capability(name="f", function=lambda model: seen.append(model) or [1, 0])
    assert several.units(model_path, scorer, tmp_path) == [1.0, 0.0] and seen == [model_path]
    for wrong in (math.nan, True, [], ["a"]):
        with pytest.raises(TypeError, match="'f' must return a finite number, or a list of them"):
            Capability(name="f", function=lambda model, w=wrong: w).units(model_path, scorer, tmp_path)


def test_a_task_of_the_harness(scorer, model_path, tmp_path):
    """A task of one's own, of which the answers are counted by hand from plain forward passes."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    rows = [
        {"question": "the film was", "choices": ["great", "a dog"], "gold": 0},
        {"question": "he finds", "choices": ["slow", "the way home"], "gold": 1},
        {"question": "I would", "choices": ["watch it again", "night"], "gold": 1},
        {"question": "the music", "choices": ["was not", "ends"], "gold": 0},
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tasks / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tasks}/data.jsonl\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    capability = Capability(
        name="mine", lm_eval="mine", lm_eval_kwargs={"include_path": str(tasks), "include_defaults": False}
    )
    units = capability.units(model_path, scorer, tmp_path)
    tokenizer, expected = scorer.tokenizer, []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            # The harness reads the continuation with its space
            start = tokenizer(row["question"], add_special_tokens=False).input_ids
            ids = tokenizer(f"{row['question']} {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                logps = scorer.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logps[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
        expected.append(float(scores.index(max(scores)) == row["gold"]))
    assert units == expected and 0 < sum(units) < 4
    with pytest.raises(ValueError, match="has the metrics .* and no 'bleu'"):
        kwargs = {"include_path": str(tasks), "include_defaults": False, "metric": "bleu"}
        Capability(name="mine", lm_eval="mine", lm_eval_kwargs=kwargs).units(model_path, scorer, tmp_path)


def test_of_several_filters_one_counts(scorer, model_path, tmp_path, monkeypatch):
    """As of gsm8k: each of them has all documents, of which the harness gives a row for each filter."""
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    evaluate, results = lm_eval.simple_evaluate, []

    def once(**kwargs):
        if not results:
            results.append(evaluate(**kwargs))
        return results[0]

    monkeypatch.setattr(lm_eval, "simple_evaluate", once)
    prompts = ["the film", "a good story", "he said"]
    said = greedy(scorer, prompts, 4)
    assert len({text.strip()[:1] for text in said}) == 3
    rows = [{"question": prompt, "gold": said[0].strip()[:1]} for prompt in prompts]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for name, pattern in (("strict", "(#)"), ("flexible", r"^\s*(\S)"))
    ]
    task = {
        "task": "several",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/data.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "generation_kwargs": {"until": ["@@@"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": filters,
    }
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(task))
    kwargs = {"include_path": str(tmp_path), "include_defaults": False}

    def units(**options):
        capability = Capability(name="c", lm_eval="several", lm_eval_kwargs=kwargs | options)
        return capability.units(model_path, scorer, tmp_path)

    assert units() == [0.0, 0.0, 0.0] and units(filter="flexible") == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"has the filters \['flexible', 'strict'\], and no 'loose'"):
        units(filter="loose")


def test_perplexity_of_the_harness_is_no_loss(scorer, model_path, tmp_path, monkeypatch):
    """As lambada has it: of each document the log-likelihood, which is the higher the better, though the perplexity is not."""
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    samples = [
        {"doc_id": i, "filter": "none", "metrics": ["perplexity", "errors"], "perplexity": -1.0 - i, "errors": i}
        for i in (1, 0)
    ]
    results = {"samples": {"l": samples}, "higher_is_better": {"l": {"perplexity": False, "errors": False}}}
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **kwargs: results)

    def units(**kwargs):
        capability = Capability(name="c", lm_eval="l", lm_eval_kwargs={"include_defaults": False, **kwargs})
        return capability.units(model_path, scorer, tmp_path)

    assert units() == [-1.0, -2.0] and units(metric="errors") == [0.0, -1.0]


def test_a_task_that_was_changed_is_another_one(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    (tmp_path / "tasks").mkdir()
    capability = Capability(name="c", lm_eval="mine", lm_eval_kwargs={"include_path": str(tmp_path)})
    before = capability.identity()
    assert capability.identity() == before
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine")
    assert capability.identity() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": functools.partial(len)}, "is no plain function"),
        ({}, "needs exactly one of .* and has \\[\\]"),
        ({"texts": ["a"], "lm_eval": "x"}, "and has \\['texts', 'lm_eval'\\]"),
        ({"texts": []}, "has no `texts`"),
        ({"questions": [("a", "b")], "extract": "("}, "`extract` of the capability 'c' is no regular expression"),
        ({"questions": [("a", "b")], "extract": r"\d"}, r"`extract='\\\\d'` finds nothing in an answer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Capability(name="c", **options)


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "trl-spo\[eval\]"'):
        Capability(name="c", lm_eval="hellaswag")


class TestVerdict:
    def compare(self, before, after, metric="exact match"):
        return compare_capability(metric, np.array(before, dtype=float), np.array(after, dtype=float))

    def test_only_outside_of_the_interval(self):
        before = [1, 1, 1, 0, 1, 1, 0, 1, 1, 1] * 4
        some, many = list(before), list(before)
        some[0] = 0
        many[:12] = [0] * 12
        assert self.compare(before, [some])["verdict"] == "no difference seen"
        assert self.compare(before, [many])["verdict"] == "regressed"
        assert self.compare(many, [before])["verdict"] == "improved"
        assert self.compare(before, [before])["verdict"] == "no difference seen"

    def test_is_paired(self):
        """Where the same questions are hard before and after, a small loss of all of them is seen."""
        rng = np.random.default_rng(0)
        before = rng.normal(0, 5, size=50)
        after = before - 0.1 + rng.normal(0, 0.05, size=50)
        found = self.compare(before, [after])
        assert found["verdict"] == "regressed" and found["difference"]["interval"][1] < 0
        assert found["before"]["interval"][0] < found["after"]["value"] < found["before"]["interval"][1]

    def test_seeds_that_differ_widen_it(self):
        before = np.zeros(30)
        after = np.stack([np.full(30, -0.3), np.full(30, 0.2), np.full(30, -0.2)])
        interval = stats.ttest_1samp([-0.3, 0.2, -0.2], 0).confidence_interval()
        found = self.compare(before, after)
        assert found["difference"]["interval"] == pytest.approx([interval.low, interval.high])
        assert found["verdict"] == "no difference seen"

    def test_share_of_right_answers_stays_one(self):
        """Of seeds that differ, too, and where all is right."""
        before = [1] * 20
        found = self.compare(before, [[1] * 19 + [0], [1] * 12 + [0] * 8])
        low, high = found["after"]["interval"]
        assert 0 <= low < 0.775 < high <= 1
        assert found["before"]["interval"] == pytest.approx([20 / (20 + 1.959964**2), 1])
        several = self.compare([1, 2, 3, 2], [[5, 1, 9, 0]])["after"]["interval"]  # which are none
        assert several[0] < 0 and several[1] > 1

    def test_a_single_number_has_none(self):
        found = self.compare([0.7], [[0.1]])
        assert found["verdict"] == "no interval" and found["difference"]["value"] == pytest.approx(-0.6)
        assert found["difference"]["interval"] is None
        assert self.compare([0.7], [[0.1], [0.2]])["verdict"] == "no interval"

    def test_perplexity_rises_when_it_is_lost(self):
        before = np.array([-1.0, -1.5, -2.0, -1.2])
        found = self.compare(before, [before - 0.1 + np.array([0.01, -0.01, 0.0, 0.0])], "perplexity")
        assert found["verdict"] == "regressed" and found["higher_is_better"] is False
        mean = before.mean()
        assert found["before"]["value"] == pytest.approx(math.exp(-mean))
        assert found["after"]["value"] == pytest.approx(math.exp(0.1 - mean))
        assert found["difference"]["value"] == pytest.approx(math.exp(0.1 - mean) - math.exp(-mean))
        low, high = found["difference"]["interval"]
        assert 0 < low < found["difference"]["value"] < high
