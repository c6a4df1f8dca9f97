# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Rounds with a tiny student and scripted critics. The trainings run in this process; that they are launched is in test_training.py."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from trl_spo.cli.main import main
from trl_spo.synthetic import training
from trl_spo.synthetic.check_set import HumanCheckError
from trl_spo.synthetic.files import Rows, read_json
from trl_spo.synthetic.output import split_of
from trl_spo.synthetic.rounds import Rounds
from trl_spo.synthetic.synthesis_config import SynthesisConfig, from_dict


TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


def capability_of(path: str) -> float:
    """A function that a config names: mean of a weight."""
    return AutoModelForCausalLM.from_pretrained(path).lm_head.weight.double().mean().item()


def not_a_number(path: str) -> float:
    return float("nan")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """What was launched, and runs here instead."""
    commands = []

    def run(command, **_):
        commands.append(command)
        training.main(command[-1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=run))
    return commands


@pytest.fixture
def values(server, model_path, tmp_path):
    """A config of two rounds, to change."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Who is number {i}, and where?"}) + "\n" for i in range(24)))
    human = tmp_path / "human.jsonl"
    pairs = [{"prompt": f"Which one, {i}?", "chosen": "the longer one", "rejected": f"not {i}"} for i in range(20)]
    human.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "Who is it? It is me, and nobody else."}) + "\n")
    return {
        "output_dir": str(tmp_path / "run"),
        "prompts": {
            "dataset": {"path": "json", "data_files": str(prompts), "split": "train"},
            "near_duplicates": None,
        },
        "candidates": {
            "student": {"type": "transformers", "model": model_path, "max_new_tokens": 12, "batch_size": 8},
            "num_responses": 2,
        },
        "judge": {
            "critics": [
                {"type": "endpoint", "name": "longer", "model": "longer", "base_url": server.url, "api_key_env": None}
            ]
        },
        "check": {"dataset": {"path": "json", "data_files": str(human), "split": "train"}},
        "dataset": {"test_share": 0.25},
        "rounds": {
            "num_rounds": 2,
            "reference": "initial",
            "training": {"method": "dpo", "options": TRAINING, "num_processes": 1},
            "capabilities": [
                {
                    "name": "texts",
                    "texts": {"path": "json", "data_files": str(texts), "split": "train"},
                    "max_drop": 10.0,
                },
                {"name": "weight", "function": f"{__file__}:capability_of", "max_drop": 1.0},
            ],
            "max_human_accuracy_drop": None,
            "max_drift": None,
            "min_distinct": 0.0,
            "min_entropy": 0.0,
            "max_self_bleu_rise": 1.0,
        },
    }


def make(values: dict, **of_rounds) -> Rounds:
    return Rounds(from_dict(SynthesisConfig, {**values, "rounds": {**values["rounds"], **of_rounds}}, ""))


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_two_rounds(values, reference, model_path, server, launched, tmp_path):
    report = make(values, reference=reference).run()
    run = tmp_path / "run"
    assert report == read_json(run / "rounds.json")
    assert report["stopped"] == "All rounds are done (`num_rounds=2`)." and len(report["rounds"]) == 3
    models = [model_path, *(str(run / f"round-{i}" / "training" / "model") for i in (1, 2))]
    assert [evaluation["model"] for evaluation in report["rounds"]] == models

    # Each round's responses are those of its own student, which are trained on, and those of the test split are not
    for i in (1, 2):
        settings = read_json(run / f"round-{i}" / "candidates.settings.json")
        assert settings["student"]["model"] == models[i - 1]
        told = read_json(run / f"round-{i}" / "training" / "training.json")
        assert told["model"] == models[i - 1]
        assert told["reference"] == (model_path if reference == "initial" and i == 2 else None)
        assert told["dataset"] == str(run / f"round-{i}" / "dataset")
    prompts = [row["prompt_id"] for row in Rows(run / "round-2" / "evaluation.jsonl")]
    assert prompts and {split_of(prompt_id, 0.25) for prompt_id in prompts} == {"test"}
    assert prompts == [row["prompt_id"] for row in Rows(run / "round-0" / "evaluation.jsonl")]
    first, second = weights(models[1]), weights(models[2])
    assert any(not torch.equal(first[name], second[name]) for name in first)

    # By hand, how often the jury prefers the second student: the longer response wins
    for i in (1, 2):
        ours, theirs = (
            [row["responses"][0]["text"] for row in Rows(run / f"round-{j}" / "evaluation.jsonl")] for j in (i, 0)
        )
        wins = [
            (len(a) > len(b)) + 0.5 * (len(a) == len(b) or not (a.strip() and b.strip()))
            for a, b in zip(ours, theirs, strict=True)
        ]
        wins = [0.5 if not (a.strip() and b.strip()) else win for a, b, win in zip(ours, theirs, wins, strict=True)]
        assert report["rounds"][i]["win_rate"]["rate"] == pytest.approx(sum(wins) / len(wins))
    rates = [evaluation["win_rate"]["rate"] for evaluation in report["rounds"]]
    assert report["best"] == {"round": rates.index(max(rates)), "model": models[rates.index(max(rates))]}
    assert report["rounds"][2]["capabilities"]["weight"] == pytest.approx(capability_of(models[2]))
    assert report["rounds"][0]["capabilities"]["texts"] < 0 and report["rounds"][0]["human"]["number"] == 20
    assert report["rounds"][1]["jury_and_people"]["value"] == 1

    # Again, it asks and trains nothing; with a larger number, it goes on
    requests, number = server.log()["requests"], len(launched)
    assert make(values, reference=reference).run() == report
    assert server.log()["requests"] == requests and len(launched) == number == 2
    if reference == "initial":
        # A training and a student that were replaced by others are not taken for the old ones
        stopped = tmp_path / "run" / "round-1" / "training"
        kept = stopped.rename(tmp_path / "kept")
        values["rounds"]["training"] = {
            "method": "dpo",
            "options": {**TRAINING, "learning_rate": 1e-2},
            "num_processes": 1,
        }
        with pytest.raises(
            ValueError, match="evaluation.json' has the evaluation of something else: the student changed"
        ):
            make(values, num_rounds=3).run()
        (run / "round-1" / "evaluation.json").rename(tmp_path / "evaluation.json")
        with pytest.raises(ValueError, match="evaluation.jsonl' was begun with other settings: `student.weights`"):
            make(values, num_rounds=3).run()
        values["rounds"]["training"] = {"method": "dpo", "options": TRAINING, "num_processes": 1}
        (tmp_path / "evaluation.json").rename(run / "round-1" / "evaluation.json")
        shutil.rmtree(stopped)
        kept.rename(stopped)
        launched[2:] = []
        longer = make(values, num_rounds=3).run()
        assert longer["rounds"][:3] == report["rounds"] and len(longer["rounds"]) == 4 and len(launched) == 3
        with pytest.raises(ValueError, match=r"has another training: `reference_weights` was .* and is now "):
            make(values, num_rounds=3, reference="previous").run()


def test_reward_model_joins_the_jury(values, tmp_path):
    values["reward_model"] = {"options": TRAINING, "num_processes": 1, "weight": 0.5}
    report = make(values).run()
    assert len(report["rounds"]) == 3
    run = tmp_path / "run"
    assert {vote["critic"] for row in Rows(run / "round-1" / "verdicts.jsonl") for vote in row["votes"]} == {"longer"}
    rows = list(Rows(run / "round-2" / "verdicts.jsonl"))
    assert {vote["critic"] for row in rows for vote in row["votes"]} == {"longer", "reward_model_1"}
    # Two votes, of weights 1 and 0.5
    row = next(row for row in rows if all(vote["status"] == "vote" for vote in row["votes"]))
    shares = {vote["critic"]: vote["share"] for vote in row["votes"]}
    assert row["share"] == pytest.approx((shares["longer"] + 0.5 * shares["reward_model_1"]) / 1.5)
    assert set(read_json(run / "round-2" / "check.json")["critics"]) == {"longer", "reward_model_1"}
    assert (run / "round-2" / "reward_model" / "model" / "config.json").is_file()


LATER = {"type": "rule", "name": "longer_1", "function": f"{__file__}:capability_of"}
GOOD = {
    "win_rate": {"rate": 0.6},
    "human": {"rate": 0.7},
    "jury": {"rate": 0.7},
    "jury_and_people": None,
    "capabilities": {"texts": -1.0, "weight": 1.0},
    "diversity": {"distinct_2": 0.5, "entropy": 2.0, "self_bleu": 0.3},
}
RULES = {
    "max_human_accuracy_drop": 0.05,
    "max_drift": 0.1,
    "min_distinct": 0.7,
    "min_entropy": 0.5,
    "max_self_bleu_rise": 0.2,
}


@pytest.mark.parametrize(
    ("found", "stops"),
    [
        ({}, []),
        ({"human": {"rate": 0.66}}, []),
        ({"human": {"rate": 0.64}}, ["human check set fell from 70.0% to 64.0%.*`max_human_accuracy_drop=0.05`"]),
        ({"human": {"rate": 0.72}, "jury": {"rate": 0.81}}, []),
        (
            {"human": {"rate": 0.68}, "jury": {"rate": 0.79}},
            [
                "jury and people drift apart: .* from 70.0% to 79.0% and on people's from 70.0% to 68.0%.*`max_drift=0.1`"
            ],
        ),
        ({"capabilities": {"texts": -10.9, "weight": 1.0}}, []),
        (
            {"capabilities": {"texts": -11.1, "weight": 1.0}},
            ["capability 'texts' fell from -1 to -11.1.*`max_drop=10.0`"],
        ),
        ({"diversity": {"distinct_2": 0.34, "entropy": 2.0, "self_bleu": 0.3}}, ["distinct_2 fell from 0.5 to 0.34"]),
        ({"capabilities": {"texts": math.nan, "weight": 1.0}}, ["capability 'texts' fell from -1 to nan"]),
        (
            {"diversity": {"distinct_2": 0.5, "entropy": math.nan, "self_bleu": 0.3}},
            ["entropy fell from 2 to nan"],
        ),
        ({"diversity": {"distinct_2": 0.5, "entropy": 0.9, "self_bleu": 0.3}}, ["entropy fell from 2 to 0.9"]),
        ({"diversity": {"distinct_2": 0.5, "entropy": 2.0, "self_bleu": 0.51}}, ["self-BLEU rose from 0.3 to 0.51"]),
        (
            {"human": {"rate": 0.5}, "diversity": {"distinct_2": None, "entropy": 2.0, "self_bleu": None}},
            ["human check set fell", "drift apart", "distinct_2 fell from 0.5 to 0"],
        ),
    ],
)
def test_rules_that_stop(values, found, stops, monkeypatch, tmp_path):
    """The second student is measured like the first one but for what is found."""
    measured = [GOOD | {"win_rate": {"rate": 0.5}}, GOOD, GOOD | {"win_rate": {"rate": 0.9}} | found]
    monkeypatch.setattr(
        Rounds, "_measure", lambda self, number, model: json.loads(json.dumps({"model": model, **measured[number]}))
    )
    monkeypatch.setattr(Rounds, "_told", lambda self, model: {})
    monkeypatch.setattr(
        "trl_spo.synthetic.rounds.train", lambda config, model, dataset, folder, reference: folder / "model"
    )
    values["candidates"]["num_responses"] = 2
    monkeypatch.setattr("trl_spo.synthetic.synthesis.Synthesis.run", lambda self: self.folder / "dataset")
    report = make(values, **RULES).run()
    reasons = report["rounds"][2]["stops"]
    assert len(reasons) == len(stops)
    for reason, pattern in zip(reasons, stops, strict=True):
        assert re.search(pattern, reason) and reason in report["stopped"]
    # The best one is never one that was stopped, however much the jury likes it
    assert report["best"]["round"] == (1 if stops else 2)


def test_the_jury_is_refused(values, monkeypatch):
    values["check"]["min_agreement"] = 1.0
    values["judge"]["critics"][0]["model"] = "errs0.5"
    with pytest.raises(HumanCheckError, match="agrees with people in"):
        make(values).run()

    # Once something was trained, that stays
    calls = []

    def run(self):
        calls.append(self)
        if len(calls) == 2:
            raise HumanCheckError("The jury agrees with people in 10% of pairs.")
        return self.folder / "dataset"

    monkeypatch.setattr("trl_spo.synthetic.synthesis.Synthesis.run", run)
    monkeypatch.setattr(Rounds, "_measure", lambda self, number, model: {"model": model, **GOOD})
    monkeypatch.setattr(Rounds, "_told", lambda self, model: {})
    monkeypatch.setattr(
        "trl_spo.synthetic.rounds.train", lambda config, model, dataset, folder, reference: folder / "model"
    )
    report = make(values).run()
    assert report["stopped"] == "In round 2, before its training: The jury agrees with people in 10% of pairs."
    assert len(report["rounds"]) == 2


def test_command(values, tmp_path, capsys):
    values["rounds"]["num_rounds"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["synthesize", str(tmp_path / "config.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "| round" in shown and "* the best student: " in shown and "All rounds are done" in shown
    with pytest.raises(ValueError, match=r"The config has `rounds`, which run all stages. Leave out \['judge'\]"):
        main(["synthesize", str(tmp_path / "config.yaml"), "judge"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": {"reference": "last"}}, "`rounds.reference` must be 'initial' or 'previous', got 'last'"),
        ({"rounds": {"reference": ...}}, "The option `rounds.reference` is missing"),
        ({"rounds": {"num_rounds": 0}}, "`rounds.num_rounds` must be at least 1, got 0"),
        ({"rounds": {"max_drift": 2}}, "`rounds.max_drift` must be from 0 to 1, or `None`, got 2"),
        ({"rounds": {"training": {"method": "ppo"}}}, "`method` must be one of .*got 'ppo'"),
        (
            {"rounds": {"training": {"method": "reward", "options": TRAINING}}},
            "`rounds.training.method` must train a student",
        ),
        ({"rounds": {"training": {"kind": "dpo"}}}, "There is no option `rounds.training.kind`"),
        ({"rounds": {"capabilities": [{"name": "a"}]}}, "Each of `rounds.capabilities` needs a `name`"),
        (
            {"rounds": {"capabilities": [{"name": "a", "function": "nowhere:f", "max_drop": 1}]}},
            "There is no function 'nowhere:f'",
        ),
        *(
            (
                {"rounds": {"capabilities": [{"name": "a", "function": "math:log", "max_drop": drop}]}},
                "a `max_drop` of at least 0",
            )
            for drop in (None, "0.1", math.nan, -1, True)
        ),
        ({"dataset": {"test_share": 0.0}}, "`dataset.test_share` is 0, and `rounds` evaluate"),
        ({"candidates": {"student": {"type": "endpoint", "model": "a"}}}, "`type` must be 'transformers' or 'vllm'"),
        ({"reward_model": {"options": {"alpha": 1}}}, "`alpha` is no option of `RewardConfig`"),
        ({"reward_model": {"weight": -1}}, "`reward_model.weight` must be positive, got -1"),
        (
            {"reward_model": {"name": "longer", "options": TRAINING}, "judge": {"critics": [LATER]}},
            "has the name 'longer_1'",
        ),
        ({"check": {"min_agreement": 60}}, "`check.min_agreement` must be from 0 to 1, got 60"),
        ({"judge": {"num_comparisons": 0}}, "`num_comparisons=0` cannot link 2 responses"),
        ({"candidates": {"num_responses": 1}}, "num_responses` must be at least 2"),
        ({"reward_model": {"kind": 1}}, "There is no option `reward_model.kind`"),
        ({"pairs": {"pairing": "worst"}}, "`pairs.pairing` must be one of"),
    ],
)
def test_bad_options(values, change, message, tmp_path):
    for name, options in change.items():
        values[name] = {**values.get(name, {}), **options}
        values[name] = {option: value for option, value in values[name].items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        Rounds(from_dict(SynthesisConfig, values, ""))
    assert not (tmp_path / "run").exists()


def test_texts_of_a_capability_that_are_none(values, tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text(json.dumps({"words": "Who is it?"}) + "\n")
    texts = {"path": "json", "data_files": str(path), "split": "train"}
    values["rounds"]["capabilities"] = [{"name": "a", "texts": texts, "max_drop": 1.0}]
    with pytest.raises(ValueError, match="The texts of 'a' .* need rows with a column `text`"):
        Rounds(from_dict(SynthesisConfig, values, ""))


def test_a_capability_that_is_no_number(values):
    values["rounds"]["capabilities"] = [{"name": "a", "function": f"{__file__}:not_a_number", "max_drop": 1.0}]
    with pytest.raises(
        TypeError, match=r"not_a_number' \(`rounds.capabilities`\) must return a number, and returned nan"
    ):
        make(values).run()


def test_another_folder(values, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"\(`output_dir`\) holds something else"):
        make(values)


def test_no_prompt_is_left_for_the_evaluation(values):
    values["dataset"]["test_share"] = 1e-9
    with pytest.raises(ValueError, match=r"No prompt is in the test split \(`dataset.test_share=1e-09`\)"):
        make(values).run()
