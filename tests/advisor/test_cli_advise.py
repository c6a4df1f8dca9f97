# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""`trl-spo advise` in this process: exit status, JSON, the table, bad calls."""

import json
import re
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, get_peft_model
from tests.advisor.conftest import make_pairs, make_unpaired
from transformers import AutoModelForCausalLM

from trl_spo.advisor import Advice, Finding, advise, print_advice
from trl_spo.advisor.advice import take
from trl_spo.cli.main import main


def _pairs(n, first=0):
    """Whose better responses are the longer ones in every second row."""
    more = (" indeed", "")
    numbers = range(first, first + n)
    return make_pairs(
        *((f"question{i}? ", f"answer{i} good{more[i % 2]}", f"answer{i} bad{more[1 - i % 2]}") for i in numbers)
    )


@pytest.fixture
def good(tmp_path, monkeypatch):
    """A dataset against which there is nothing to say, of 70 rows: what are few examples is set lower, so that this is quick."""
    monkeypatch.setattr("trl_spo.advisor.quality.TOO_FEW", 40)
    monkeypatch.setattr("trl_spo.advisor.quality.FEW", 70)
    DatasetDict({"train": _pairs(70), "test": _pairs(10, 1000)}).save_to_disk(str(tmp_path / "good"))
    return str(tmp_path / "good")


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A file of a few pairs, one of them empty."""
    path = tmp_path_factory.mktemp("bad") / "pairs.jsonl"
    rows = _pairs(30).to_list()
    rows[3]["rejected"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def call(capsys):
    """A function that runs the command, and gives its exit status, what it prints, and what goes to standard error."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main(["advise", *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_exit_status(call, good, bad, monkeypatch):
    assert call("--dataset_name", good)[0] == 0
    assert call("--dataset_name", good, "--strict")[0] == 0
    assert call("--dataset_name", bad)[0] == 1
    # Few examples are a warning
    monkeypatch.setattr("trl_spo.advisor.quality.FEW", 71)
    assert call("--dataset_name", good)[0] == 0
    assert call("--dataset_name", good, "--strict")[0] == 1
    monkeypatch.setattr("trl_spo.advisor.quality.TOO_FEW", 71)
    assert call("--dataset_name", good)[0] == 1
    assert call("--dataset_name", good, "--max_examples", "30")[0] == 1


def test_json(call, bad):
    status, out, _ = call("--dataset_name", bad, "--json")
    told = json.loads(out)
    assert list(told) == ["schema", "dataset", "shape", "recommendation", "training", "findings", "counts"]
    assert (status, told["schema"]) == (1, 1)
    assert told["dataset"] == {"rows": 30, "total": 30, "eval_rows": None, "usable": 29}
    assert told["shape"]["kind"] == "pairs" and "dpo" in told["shape"]["methods"]
    assert told["recommendation"]["method"] == "dpo" and told["recommendation"]["reasons"]
    severities = [finding["severity"] for finding in told["findings"]]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    assert told["counts"] == {severity: severities.count(severity) for severity in ("error", "warning", "info")}
    for finding in told["findings"]:
        assert list(finding) == ["code", "severity", "title", "detail", "remedy", "data"]
        assert re.fullmatch(r"[a-z0-9_]+", finding["code"]) and finding["title"] and finding["detail"]
    assert {"too_few_examples", "empty_responses", "label_noise"} <= {finding["code"] for finding in told["findings"]}


def test_table(call, bad, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call("--dataset_name", bad)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80 and not any(line.endswith(" ") for line in lines)
    assert "…" not in out and "\x1b" not in out
    text = " ".join(out.split())
    for finding in json.loads(call("--dataset_name", bad, "--json")[1])["findings"]:
        assert f"{finding['title']} [{finding['code']}]" in text
        for part in (finding["detail"], finding["remedy"]):
            assert part.replace(" ", "") in text.replace(" ", "")  # nothing is cut
    assert "1 error," in text


def test_table_has_colours_in_a_terminal(bad, capsys):
    from io import StringIO

    from rich.console import Console

    advice = advise(_pairs(30))
    for terminal in (True, False):
        kind = {"force_terminal": True, "color_system": "standard"} if terminal else {}
        console = Console(file=StringIO(), width=60, **kind)
        print_advice(advice, console)
        text = console.file.getvalue()
        assert ("\x1b" in text) == terminal
        assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in text.splitlines()) <= 60


def test_brackets_are_text(capsys):
    from rich.console import Console

    advice = advise(_pairs(3))
    shown = Advice(
        advice.dataset, advice.shape, None, advice.training, [Finding("a_code", "info", "[bold]title", "[red]x[/red]")]
    )
    print_advice(shown, Console())
    assert "[bold]title [a_code]" in capsys.readouterr().out


def test_command_line_of_a_training(call, good, tmp_path, model_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(
        f"dataset_name: {good}\nmodel_name_or_path: {model_path}\nalpha: 0.3\nbeta: 5.0\nmax_length: 24\nlearning_rate: 1e-6\n"
        "accelerate_config: zero3\nnum_processes: 4\noutput_dir: nowhere\nbf16: false\n"
    )
    arguments = [
        "--method",
        "soft-po",
        "--config",
        config,
        "--reference_prompts",
        "0",
        "--json",
    ]
    _, out, _ = call(*arguments, "--gpu", "h100")
    told = json.loads(out)
    assert told["training"] == {
        "method": "soft_po",
        "model": model_path,
        "ref_model": None,
        "recommended": False,
        "accelerate_config": "zero3",
        "num_processes": 4,
        "gpu": "h100",
    }
    found = {finding["code"]: finding for finding in told["findings"]}
    assert found["beta_range"]["data"]["value"] == 5.0
    assert found["completions_cut"]["data"]["max_length"] == 24
    # The command line comes first
    _, out, _ = call(*arguments, "--beta", "0.1", "--max_length", "64", "--num_processes", "2")
    told = json.loads(out)
    found = {finding["code"]: finding for finding in told["findings"]}
    assert "beta_range" not in found and "completions_cut" not in found
    assert told["training"]["num_processes"] == 2


def test_methods_have_options_of_their_own(call, good):
    some = ("--dataset_name", good, "--json")
    for method, option in (
        ("stable-po", ("--bilevel", "alternating")),
        ("sspo", ("--num_degrees", "4")),
        ("kto", ("--desirable_weight", "2")),
        ("dpo", ("--loss_type", "hinge")),
    ):
        status, out, err = call(*some, "--method", method, *option)
        assert status == 0, err
        assert json.loads(out)["training"]["method"] == method.replace("-", "_")
    found = json.loads(call(*some, "--method", "soft_po", "--alpha", "-1")[1])
    assert found["counts"]["error"] == 1 and found["findings"][0]["code"] == "options_refused"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: --dataset_name"),
        (["--dataset_name", "GOOD", "--method", "ppo"], "`method` must be one of dpo, ipo"),
        (["--dataset_name", "GOOD", "--betta", "1"], "--betta is an option neither of advise, nor of DPO"),
        (["--dataset_name", "GOOD", "--betta", "1"], "did you mean --beta?"),
        (["--dataset_name", "GOOD", "--alpha", "0.1"], "whose options are taken without `--method`"),
        (["--dataset_name", "GOOD", "--strict", "yes"], "unrecognized arguments: yes"),
        (["--dataset_name", "GOOD", "--beta", "low"], "invalid float value: 'low'"),
        (["--dataset_name", "GOOD", "--config", "nowhere.yaml"], "No such file"),
        (["--dataset_name", "GOOD", "--gpu", "h1000"], "`gpu` must be one of"),
        (["--dataset_name", "GOOD", "--accelerate_config", "zero4"], "neither a file nor a packaged config"),
        (["--dataset_name", "GOOD", "--num_processes", "0"], "`num_processes` must be at least 1"),
        (["--dataset_name", "GOOD", "--max_examples", "0"], "`max_examples` must be at least 1"),
        (["--dataset_name", "GOOD", "--near_duplicates", "2"], "from 0.1 to 1"),
        (["--dataset_name", "GOOD", "--reference_prompts", "-1"], "at least 0"),
        (["--dataset_name", "GOOD", "--ref_model", "model"], "there is no `model`"),
        (["--dataset_name", "GOOD", "--dataset_train_split", "training"], "Pass `--dataset_train_split`"),
        (["--dataset_name", "GOOD", "--dataset_test_split", "dev"], "Pass `--dataset_test_split`"),
        (["--dataset_name", "GOOD", "--dataset_streaming"], "needs no streaming"),
        (["--dataset_name", "GOOD", "--model_name_or_path", "/nowhere"], "cannot be read"),
        (["--dataset_name", "/nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_calls(call, good, arguments, text):
    status, out, err = call(*(good if argument == "GOOD" else argument for argument in arguments))
    assert (status, out) == (2, "") and text in err


def test_reference_that_is_not_there(call, good, model_path):
    status, _, err = call("--dataset_name", good, "--model_name_or_path", model_path, "--ref_model", "/nowhere")
    assert status == 2 and "'/nowhere' cannot be read" in err


def test_an_adapter_is_no_model(call, good, model_path, tmp_path):
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path), LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(tmp_path)
    status, _, err = call("--dataset_name", good, "--model_name_or_path", str(tmp_path))
    assert status == 2 and f"'{tmp_path}' is an adapter of '{model_path}'. Merge it" in err


def test_mixture_of_datasets(call, bad, tmp_path):
    config = tmp_path / "mixture.yaml"
    config.write_text(f"datasets:\n- path: json\n  data_files: {bad}\ntest_split_size: 0.2\n")
    told = json.loads(call("--config", config, "--json")[1])
    assert told["dataset"] == {"rows": 24, "total": 24, "eval_rows": 6, "usable": told["dataset"]["usable"]}


def test_mistakes_of_ours_are_not_the_users(good, monkeypatch):
    def fail(*args):
        raise ValueError("a mistake")

    monkeypatch.setattr("trl_spo.advisor.advice.length_findings", fail)
    with pytest.raises(ValueError, match="a mistake"):
        main(["advise", "--dataset_name", good])


def test_split_is_missing_but_asked_for(call, bad):
    status, out, _ = call("--dataset_name", bad, "--eval_strategy", "steps", "--json")
    found = {finding["code"]: finding["severity"] for finding in json.loads(out)["findings"]}
    assert found["no_eval_split"] == "error" and status == 1


def test_other_splits_are_named(call, tmp_path):
    DatasetDict({"train": _pairs(70), "validation": _pairs(10, 1000)}).save_to_disk(str(tmp_path / "data"))
    found = json.loads(call("--dataset_name", tmp_path / "data", "--json")[1])["findings"]
    (finding,) = (one for one in found if one["code"] == "no_eval_split")
    assert "validation. Pass `--dataset_test_split`" in finding["remedy"]
    found = json.loads(call("--dataset_name", tmp_path / "data", "--dataset_test_split", "validation", "--json")[1])
    assert found["dataset"]["eval_rows"] == 10


def test_empty_file(call, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    status, out, err = call("--dataset_name", tmp_path / "empty.jsonl")
    assert (status, out) == (2, "") and "empty.jsonl', which is empty" in err


def test_options_that_the_recommended_method_does_not_have(call, tmp_path):
    make_unpaired(*((f"q {i}", "a", i % 2 == 0) for i in range(20))).to_json(tmp_path / "unpaired.jsonl")
    status, out, _ = call("--dataset_name", tmp_path / "unpaired.jsonl", "--label_smoothing", "0.1", "--json")
    told = json.loads(out)
    assert status == 1 and told["training"]["method"] == "kto"
    assert "options_not_checked" in {finding["code"] for finding in told["findings"]}


def test_streams(call, bad):
    assert call("--dataset_name", bad, "--dataset_streaming")[0] == 2
    _, out, _ = call("--dataset_name", bad, "--dataset_streaming", "--max_examples", "10", "--json")
    assert json.loads(out)["dataset"]["rows"] == 10


def test_rows_are_taken_at_random():
    dataset = Dataset.from_dict({"a": range(1000)})
    assert take(dataset, None, 0) is take(dataset, 1000, 0) is dataset
    taken = take(dataset, 100, 0)["a"][:]
    assert taken == sorted(set(taken)) and len(taken) == 100 and max(taken) > 900
    assert take(dataset, 100, 1)["a"][:] != taken
    stream = IterableDataset.from_generator(lambda: ({"a": i} for i in range(5)))
    assert take(stream, 3, 0)["a"][:] == [0, 1, 2]


def test_splits_of_different_forms():
    advice = advise(_pairs(30), make_unpaired(("p", "a", True)))
    assert {finding.code: finding.severity for finding in advice.findings}["splits_differ"] == "error"


def test_help_is_quick_and_complete():
    # In a process of its own, which has imported nothing
    code = "import sys; from trl_spo.cli.main import main\ntry: main(['advise', '--help'])\nexcept SystemExit: print('datasets' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split()[-1] == "False"
    for option in (
        "--dataset_name",
        "--model_name_or_path",
        "--ref_model",
        "--method",
        "--config",
        "--gpu",
        "--json",
        "--strict",
    ):
        assert option in shown
    assert "Exit status: 0" in " ".join(shown.split())
