# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path

import pytest
import yaml

import trl_spo.comparison
from trl_spo.cli.main import main
from trl_spo.comparison import ComparisonConfig
from trl_spo.comparison.comparison_config import COMPARED, EvaluationConfig
from trl_spo.synthetic.training import METHODS


ON_CPU = {"use_cpu": True, "bf16": False}


def make(training=None, **changes):
    told = {
        "training": {**ON_CPU, **(training or {})},
        "output_dir": "out",
        "model": "model",
        "dataset": {"path": "pairs"},
        "methods": {"dpo": {"beta": [0.1, 0.3]}},
        "reward": "statistics:mean",
    }
    return ComparisonConfig(**(told | changes))


def test_documented_grids():
    page = Path(__file__).parents[2] / "docs" / "compare.md"
    rows = page.read_text(encoding="utf-8").partition("| method | grid without options |")[2].partition("\n\n")[0]
    options = {"α": "alpha", "β": "beta", "w": "penalty_weight"}
    documented = {
        method: {options[symbol]: [float(value) for value in values.split(", ")] for symbol, values in grid}
        for methods, grid in (
            (re.findall("`(\\w+)`", row), re.findall(r"(\w) ([\d., ]*\d)", row.rpartition("` | ")[2]))
            for row in rows.splitlines()[2:]
        )
        for method in methods
    }
    assert documented == {method: grid for method, (_, grid) in COMPARED.items()}


def test_grids_are_multiplied_out():
    config = make(
        methods={"dpo": {"beta": [0.1, 0.3]}, "soft_po": {"alpha": [0.1], "beta": [0.1, 0.2], "gamma": 0.5}},
        seeds=[0, 1],
    )
    runs = config.planned_runs()
    assert [run.id for run in runs][:4] == [
        "dpo,beta=0.1,seed=0",
        "dpo,beta=0.3,seed=0",
        "soft_po,alpha=0.1,beta=0.1,seed=0",
        "soft_po,alpha=0.1,beta=0.2,seed=0",
    ]
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4  # so that one seed of everything is there first
    assert runs[3].setting == {"alpha": 0.1, "beta": 0.2} and runs[3].setting_label == "α = 0.1, β = 0.2"
    args = runs[7].training.make_args("unused")
    assert (args.alpha, args.beta, args.gamma, args.seed) == (0.1, 0.2, 0.5, 1)


def test_a_method_without_options_has_its_own_grid():
    for methods in (["ipo"], {"ipo": {}}, {"ipo": None}):
        assert [run.setting for run in make(methods=methods).planned_runs()] == [
            {"beta": beta} for beta in COMPARED["ipo"][1]["beta"]
        ]


def test_every_method_that_trains_a_policy_can_be_compared():
    assert set(COMPARED) == set(METHODS) - {"reward"}
    assert {run.method for run in make(methods=list(COMPARED)).planned_runs()} == set(COMPARED)


def test_shared_options_go_to_the_methods_that_have_them():
    config = make(
        methods=["dpo", "rloo"],
        training={"learning_rate": 1e-6, "max_length": 512, "num_generations": 4, "per_device_train_batch_size": 8},
    )
    options = {run.method: run.training.options for run in config.planned_runs()}
    assert options["dpo"]["max_length"] == 512 and "num_generations" not in options["dpo"]
    assert options["rloo"]["num_generations"] == 4 and "max_length" not in options["rloo"]
    assert config.make_training("reward", {}, 0).options["max_length"] == 512


@pytest.mark.parametrize("checkpoints", [1, 2, 3])
def test_checkpoints_are_evenly_spaced(checkpoints):
    (run,) = make(
        methods={
            "dpo": {},
        },
        evaluation={"checkpoints": checkpoints},
    ).planned_runs()[:1]
    args = run.training.make_args("unused")
    assert args.save_strategy == "steps"
    assert args.save_steps == pytest.approx(1 / checkpoints if checkpoints > 1 else 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": {"dop": {}}},
            "`methods` has 'dop', which is no method that can be compared. Did you mean 'dpo'?",
        ),
        ({"methods": ["something"]}, "They are \\['dpo'"),
        ({"methods": {}}, "`methods` must name one method at least"),
        ({"methods": {"dpo": {"betta": [0.1]}}}, "`betta` is no option of `DPOConfig`"),
        ({"methods": {"dpo": {"beta": []}}}, "`methods.dpo.beta` is an empty list"),
        ({"methods": {"dpo": {"beta": [0.1, 0.1]}}}, "has the same setting twice: dpo,beta=0.1"),
        ({"methods": {"dpo": {"seed": 3}}}, "`methods.dpo` has `seed`, which the comparison sets itself"),
        ({"training": {"save_steps": 3}}, "`training` has `save_steps`, which the comparison sets itself"),
        ({"training": {"learning_rat": 3}}, "`training` has `learning_rat`, which no method's config has"),
        (
            {"training": {"learning_rate": "1e-6"}},
            "`learning_rate` must be a number, got the text '1e-6' .* write 1.0e-6",
        ),
        ({"reward_model": {"beta": 3}}, "`beta` is no option of `RewardConfig`"),
        ({"seeds": []}, "`seeds` must be one seed at least, whole numbers, each once, got \\[\\]"),
        ({"seeds": [1, 1]}, "got \\[1, 1\\]"),
        ({"seeds": ["a"]}, "got \\['a'\\]"),
        ({"seeds": 3}, "`seeds` must be a list, as in `\\[1, 2\\]`, got 3"),
        ({"reward_model": [1]}, "`reward_model` must be a mapping of options, got \\[1\\]"),
        ({"methods": {"dpo": 0.1}}, "`methods.dpo` must be a mapping of options, got 0.1"),
        ({"evaluation": 3}, "`evaluation.` must have options, got 3"),
        (
            {"evaluation": {"num_prompts": "all"}},
            "`evaluation.num_prompts` must be a whole number of at least 1, got 'all'",
        ),
        ({"evaluation": {"capabilities": None}}, "`evaluation.capabilities` must be a list"),
        ({"reward": None}, "Neither `reward` nor `critics` is given"),
        ({"reward": "nothing.py:here"}, "There is no function 'nothing.py:here'"),
        ({"evaluation": {"checkpoints": 0}}, "`evaluation.checkpoints` must be a whole number of at least 1, got 0"),
        ({"evaluation": {"prompts": 3}}, "There is no option `evaluation.prompts`"),
        ({"dataset": {"path": "x", "test_share": 1.0}}, "`dataset.test_share` must be between 0 and 1"),
        ({"dataset": {}}, "The option `dataset.path` is missing"),
        ({"accelerate_config": "zero9"}, "neither a file nor a packaged config"),
        ({"price_per_hour": -1}, "`price_per_hour` must not be negative"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_the_command_line_wins_over_the_file(tmp_path, monkeypatch):
    path = tmp_path / "compare.yaml"
    path.write_text(
        yaml.safe_dump(
            {"model": "a", "methods": ["dpo"], "reward": "statistics:mean", "seeds": [0, 1], "training": ON_CPU}
        )
    )
    config = ComparisonConfig.from_yaml(path, dataset="pairs", output_dir="out", methods=["ipo"], seeds=[3])
    assert (list(config.methods), config.seeds, config.model, config.dataset.path) == (["ipo"], [3], "a", "pairs")
    for text, message in (("- a list", "must contain a YAML mapping of options"), ("seeds: [0", "is no YAML: while")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            ComparisonConfig.from_yaml(path)


def test_what_the_command_line_does_not_say_stays_as_in_the_file(tmp_path):
    told = {
        "output_dir": "out",
        "model": "m",
        "dataset": {"path": "pairs", "test_split": "held", "max_train_rows": 9},
        "methods": {"dpo": {"beta": [0.7], "learning_rate": 1e-4}, "ipo": {"beta": [0.3]}},
        "reward": "statistics:mean",
        "training": ON_CPU,
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(told) + "evaluation:\nreward_model:\npeft:\n")  # with nothing below
    config = ComparisonConfig.from_yaml(path, methods=["dpo", "kto"], dataset="others")
    assert config.methods == {"dpo": {"beta": [0.7], "learning_rate": 1e-4}, "kto": {}}
    assert (config.dataset.path, config.dataset.test_split, config.dataset.max_train_rows) == ("others", "held", 9)
    assert config.evaluation == EvaluationConfig() and config.reward_model == {}


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["compare", "--model", "m", "--dataset", "d", "--methods", "dop", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("trl-spo compare: `methods` has 'dop'")
    assert main(["compare", "--model", "m"]) == 2
    assert "The option `output_dir` is missing" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_without_scipy(monkeypatch, capsys):
    def missing(name, package):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.delitem(vars(trl_spo.comparison), "Comparison", raising=False)
    monkeypatch.setattr("trl_spo._lazy.import_module", missing)
    assert main(["compare", "--model", "m"]) == 2
    assert "needs the package 'scipy'. Run `pip install \"trl-spo[eval]\"`" in capsys.readouterr().err
