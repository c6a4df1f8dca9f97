# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import json
import shutil

import numpy as np
import pytest
from datasets import Dataset

from trl_spo.evaluation import Capability, Evaluation, ResponseScorer, export_alpaca_eval, self_bleu
from trl_spo.synthetic.critics import RuleCritic
from trl_spo.synthetic.files import Rows


PROMPTS = ["the film", "a good story", "he said that the dog", "I would", "the music"]
PAIRS = [("the film", " was great", " was bad"), ("a story", " ends well", " ends"), ("he", " said", " was not")]


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


@pytest.fixture(scope="module")
def policy_path(model_path, tmp_path_factory):
    """The tiny Llama after a few steps to somewhere, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("policy")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(path)
    return str(path)


@pytest.fixture
def make(model_path, tmp_path):
    def make(**kwargs):
        defaults = {
            "folder": tmp_path / "evaluation",
            "reference": model_path,
            "prompts": Dataset.from_dict({"prompt": PROMPTS, "level": [1, 2, 3, 4, 5]}),
            "reward": length,
            "pairs": PAIRS,
            "capabilities": [Capability(name="texts", texts=["the film was great", "a dog", "he finds the way"])],
            "num_responses": 3,
            "max_new_tokens": 6,
        }
        return Evaluation(**(defaults | kwargs))

    return make


def test_what_is_measured(make, policy_path, model_path, tmp_path):
    found = make().evaluate(policy_path, "policy")
    metrics, units = found["metrics"], found["units"]
    rows = {name: list(Rows(tmp_path / "evaluation" / name / "samples.jsonl")) for name in ("policy", "reference")}
    texts = [[response["text"] for response in row["responses"]] for row in rows["policy"]]
    others = [[response["text"] for response in row["responses"]] for row in rows["reference"]]
    assert [row["prompt"] for row in rows["policy"]] == PROMPTS and all(len(group) == 3 for group in texts)

    assert units["reward"] == pytest.approx([np.mean([len(text) for text in group]) for group in texts])
    assert metrics["reward"]["value"] == pytest.approx(np.mean(units["reward"])) and metrics["reward"]["number"] == 5
    points = [
        np.sign(len(a) - len(b)) / 2 + 0.5
        for group, other in zip(texts, others, strict=True)
        for a, b in zip(group, other, strict=True)
    ]
    win_rate = metrics["win_rate"]
    assert win_rate["value"] == pytest.approx(np.mean(points)) and win_rate["wins"] == points.count(1)
    assert win_rate["wins"] + win_rate["ties"] + win_rate["losses"] == 15

    responses = [response for row in rows["policy"] for response in row["responses"]]
    ended = [response["finish_reason"] == "stop" for response in responses]
    assert metrics["finished"]["value"] == pytest.approx(np.mean(ended))
    tokens = [len(response["token_ids"]) + end for response, end in zip(responses, ended, strict=True)]
    assert metrics["length"]["value"] == pytest.approx(np.mean(tokens))
    assert metrics["unique"]["value"] == pytest.approx(np.mean([len(set(group)) / 3 for group in texts]))
    bleus = [self_bleu([group]) for group in texts]
    assert metrics["self_bleu"]["value"] == pytest.approx(np.mean([bleu for bleu in bleus if bleu is not None]))
    assert 0 < metrics["distinct_1"]["value"] <= 1 and metrics["kl"]["value"] > 0 and metrics["entropy"]["value"] > 0

    policy, reference = (ResponseScorer(path, {"dtype": "float32"}) for path in (policy_path, model_path))
    changes = {
        side: np.mean(
            [
                a.log_prob - b.log_prob
                for a, b in zip(*(s.score([(p[0], p[i]) for p in PAIRS]) for s in (policy, reference)), strict=True)
            ]
        )
        for side, i in (("chosen", 1), ("rejected", 2))
    }
    assert metrics["chosen_change"]["value"] == pytest.approx(changes["chosen"], abs=1e-4)
    assert metrics["rejected_change"]["value"] == pytest.approx(changes["rejected"], abs=1e-4)
    assert metrics["margin"]["value"] == pytest.approx(changes["chosen"] - changes["rejected"], abs=1e-4)
    assert metrics["preference_accuracy"]["value"] == np.mean(np.array(units["margin"]) > 0)
    (capability,) = found["capabilities"]
    assert capability["before"]["value"] != capability["after"]["value"] and capability["metric"] == "perplexity"


def test_of_the_reference(make, model_path):
    found = make().evaluate(model_path, "reference")
    assert found["metrics"]["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert "win_rate" not in found["metrics"] and "margin" not in found["metrics"]


def test_a_policy_that_is_the_reference_is_as_good(make, model_path):
    """It draws other responses than the reference does, or each pair would be a tie."""
    found = make(num_responses=8).evaluate(model_path, "same")["metrics"]
    assert (
        found["win_rate"]["ties"] < 20
        and 0.2 < found["win_rate"]["value"] < 0.8
        and found["win_rate"]["p_value"] > 0.05
    )
    assert found["margin"]["value"] == 0 and found["preference_accuracy"]["value"] == 0.5


def test_nothing_is_done_twice(make, policy_path, monkeypatch):
    first = make().evaluate(policy_path, "policy")
    monkeypatch.setattr("trl_spo.evaluation.evaluation.ResponseScorer", None)  # no model is loaded
    assert make().evaluate(policy_path, "policy") == first


def test_goes_on_where_it_was_stopped(make, policy_path, tmp_path, monkeypatch):
    """After the responses and before the log-probabilities of the pairs."""
    whole = make(folder=tmp_path / "whole").evaluate(policy_path, "policy")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trl_spo.evaluation.evaluation.score_pairs", stop)
        with pytest.raises(KeyboardInterrupt):
            make().evaluate(policy_path, "policy")
    with monkeypatch.context() as patch:
        patch.setattr("trl_spo.evaluation.evaluation.on_policy_divergence", stop)  # of the reference, it is there
        with pytest.raises(KeyboardInterrupt):
            make().evaluate(policy_path, "policy")
    assert make().evaluate(policy_path, "policy") == whole


def test_what_is_added_later_is_measured_alone(make, policy_path, tmp_path, monkeypatch):
    first = make().evaluate(policy_path, "policy", quality=False, capabilities=False)
    assert "reward" not in first["metrics"] and first["capabilities"] == []
    monkeypatch.setattr("trl_spo.evaluation.evaluation.generate_candidates", None)
    second = make().evaluate(policy_path, "policy")
    assert {name: second["metrics"][name] for name in first["metrics"]} == first["metrics"]
    assert "reward" in second["metrics"] and len(second["capabilities"]) == 1


def test_another_model_is_measured_anew(make, policy_path, model_path, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(policy_path, folder)
    questions = [Capability(name="own", questions=[("the film", "no")], max_new_tokens=3)]
    first = make(capabilities=questions).evaluate(str(folder), "policy")
    shutil.rmtree(folder)
    shutil.copytree(model_path, folder)
    assert make(capabilities=questions).evaluate(str(folder), "policy")["metrics"] != first["metrics"]
    with pytest.raises(ValueError, match="`name` is 'reference', which is the folder of the reference"):
        make().evaluate(policy_path, "reference")


def test_other_options_measure_anew(make, policy_path, tmp_path, monkeypatch):
    """Also after a stop in the middle of the responses: those of other options are not gone on with."""
    with monkeypatch.context() as patch:
        patch.setattr("trl_spo.evaluation.evaluation.on_policy_divergence", None)
        with pytest.raises(TypeError):
            make(capabilities=()).evaluate(policy_path, "policy")
    longer = make(max_new_tokens=8, batch_size=4, capabilities=()).evaluate(policy_path, "policy")
    rows = list(Rows(tmp_path / "evaluation" / "policy" / "samples.jsonl"))
    assert max(len(response["token_ids"]) for row in rows for response in row["responses"]) > 6
    whole = make(folder=tmp_path / "whole", max_new_tokens=8, batch_size=4, capabilities=())
    assert longer == whole.evaluate(policy_path, "policy")


def test_a_reward_function_that_was_changed_is_asked_anew(make, policy_path, tmp_path):
    import importlib.util

    def load(body):
        (tmp_path / "rewards.py").write_text(f"def reward(prompts, completions, **columns):\n    return {body}\n")
        spec = importlib.util.spec_from_file_location("rewards", tmp_path / "rewards.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.reward

    first = make(reward=load("[1.0] * len(prompts)"), capabilities=()).evaluate(policy_path, "policy")
    second = make(reward=load("[2.0] * len(prompts)  # mended"), capabilities=()).evaluate(policy_path, "policy")
    assert (first["metrics"]["reward"]["value"], second["metrics"]["reward"]["value"]) == (1.0, 2.0)


class Constant:
    """Which the same class, in the same file, gives several of."""

    def __init__(self, value):
        self.value = value

    def __call__(self, prompts, completions, **columns):
        return [self.value] * len(completions)


def of_level(prompts, completions, level):
    return [float(value) for value in level]


def test_rewards_of_another_function_or_of_other_prompts(make, policy_path, model_path):
    def value(**options):
        found = make(capabilities=(), pairs=(), num_responses=1, **options).evaluate(model_path, "reference")
        return found["metrics"]["reward"]["value"]

    assert [value(reward=Constant(x), reward_identity=x) for x in (1.0, 2.0, 1.0)] == [1.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="is no plain function"):
        make(reward=Constant(1.0))
    with pytest.raises(ValueError, match="is no plain function"):
        make(critics=[RuleCritic(name="rule", function=Constant(1.0))])
    assert value(reward=of_level) == 3
    prompts = Dataset.from_dict({"prompt": PROMPTS, "level": [5] * 5})
    assert value(reward=of_level, prompts=prompts) == 5


def test_rewards_go_on_where_they_were_stopped(make, model_path):
    asked, stop = [], True

    def reward(prompts, completions, **columns):
        if stop and len(asked) == 2:
            raise ConnectionError
        asked.append(prompts[0])
        return [1.0] * len(completions)

    of = {"reward": reward, "capabilities": (), "pairs": (), "batch_size": 4}
    with pytest.raises(ConnectionError):
        make(**of).evaluate(model_path, "reference")
    stop = False
    make(**of).evaluate(model_path, "reference")
    assert asked == PROMPTS


def test_another_template_measures_anew(make, policy_path, tmp_path):
    chat = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    of = {
        "prompts": Dataset.from_dict({"prompt": chat}),
        "pairs": [(chat[0], "a dog", "a story")],
        "capabilities": (),
        "num_responses": 1,
        "reward": None,
    }
    folder = tmp_path / "policy"
    shutil.copytree(policy_path, folder)
    before = make(**of).evaluate(str(folder), "policy")["metrics"]
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    after = make(**of).evaluate(str(folder), "policy")["metrics"]
    assert all(after[name]["value"] != before[name]["value"] for name in ("kl", "chosen_change"))
    assert after == make(**of, folder=tmp_path / "anew").evaluate(str(folder), "policy")["metrics"]


def test_jury(make, policy_path, tmp_path):
    """A rule among the critics, which is asked about the responses of both."""
    rule = RuleCritic(name="longer", function=lambda prompt, response, level: len(response))
    by_jury = make(critics=[rule], folder=tmp_path / "jury").evaluate(policy_path, "policy")
    by_reward = make(folder=tmp_path / "reward").evaluate(policy_path, "policy")
    assert by_jury["metrics"]["win_rate"] == by_reward["metrics"]["win_rate"]
    verdicts = list(Rows(tmp_path / "jury" / "policy" / "verdicts.jsonl"))
    assert len(verdicts) == 15 and verdicts[0]["votes"][0]["critic"] == "longer"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_responses": 0}, "`num_responses` must be at least 1, got 0"),
        ({"prompts": Dataset.from_dict({"prompt": []})}, "`prompts` is empty"),
        ({"prompts": Dataset.from_dict({"text": ["a"]})}, "no column 'prompt', but \\['text'\\]"),
        ({"capabilities": [Capability(name="a", texts=["b"])] * 2}, "needs a name of its own, got \\['a', 'a'\\]"),
    ],
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_prompts_that_are_there_twice_are_left_out(make):
    prompts = Dataset.from_dict({"prompt": ["a", "b", "a", "c"], "level": [1, 2, 3, 4]})
    kept = make(prompts=prompts).prompts
    assert kept["prompt"][:] == ["a", "b", "c"] and kept["level"][:] == [1, 2, 4]


def test_alpaca_eval(tmp_path):
    rows = [
        {"prompt_id": "1", "prompt": "Who?", "responses": [{"text": "I."}, {"text": "You."}]},
        {"prompt_id": "2", "prompt": [{"role": "user", "content": "What?"}], "responses": [{"text": "That."}]},
    ]
    path = export_alpaca_eval(rows, tmp_path / "new" / "outputs.json", "mine", dataset="few")
    assert json.loads(path.read_text()) == [
        {"instruction": "Who?", "output": "I.", "generator": "mine", "dataset": "few"},
        {"instruction": "What?", "output": "That.", "generator": "mine", "dataset": "few"},
    ]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(ValueError, match="has the roles .* single instructions"):
        export_alpaca_eval(
            [{"prompt_id": "3", "prompt": turns, "responses": [{"text": "d"}]}], tmp_path / "x.json", "m"
        )
