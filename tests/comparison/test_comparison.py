# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Whole comparisons of tiny models. Each training is in a process of its own, as `accelerate launch` would start it."""

import json
import os
import shutil
import sys
import traceback
from dataclasses import asdict

import pytest
import yaml
from datasets import Dataset, DatasetDict, concatenate_datasets
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trl_spo.cli.main import main
from trl_spo.comparison import Comparison, ComparisonConfig
from trl_spo.comparison.comparison import _end_of_log, _line_of_error
from trl_spo.synthetic import training
from trl_spo.synthetic.files import read_json
from trl_spo.synthetic.training import TrainingError


LAUNCHED: list[str] = []
REWARD = """
import os

def length(prompts, completions, **columns):
    if os.path.exists("{broken}"):
        raise RuntimeError("the judge is ill")
    return [float(len(completion)) for completion in completions]
"""


RULE = """
import os

def longer(prompt, response, **columns):
    if os.path.exists("{broken}"):
        raise RuntimeError("the critic is ill")
    return len(response)
"""


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """What `accelerate launch` would start, in a process that has imported all that this one has."""

    def launch(config, path, lock, log):
        LAUNCHED.append(path.parent.name)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if log is not None:
                    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
                    os.dup2(2, 1)
                    sys.stderr = sys.stdout = open(2, "w", buffering=1, closefd=False)
                training.main(str(path))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != 0:
            raise TrainingError(f"The training in '{path.parent}' has ended with status {status}.")

    monkeypatch.setattr(training, "_launch", launch)
    LAUNCHED.clear()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    def rows(start, stop):
        return Dataset.from_list(
            [
                {"prompt": f"the film {i}", "chosen": f" was great {i}", "rejected": " was bad"}
                for i in range(start, stop)
            ]
        )

    path = tmp_path_factory.mktemp("pairs")
    DatasetDict({"train": rows(0, 16), "test": rows(16, 24)}).save_to_disk(str(path))
    return str(path)


@pytest.fixture
def make(dataset, model_path, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD.format(broken=tmp_path / "broken"))

    def make(**changes):
        told = {
            "output_dir": str(tmp_path / "out"),
            "model": model_path,
            "dataset": {"path": dataset},
            "methods": {"dpo": {"beta": [0.1]}},
            "seeds": [0],
            "training": {
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "max_steps": 2,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
            },
            "reward": f"{tmp_path}/rewards.py:length",
            "evaluation": {
                "max_new_tokens": 6,
                "checkpoints": 2,
                "capabilities": [{"name": "words", "texts": ["the film", "a dog"]}],
            },
        }
        return Comparison(ComparisonConfig(**(told | changes)), command="trl-spo compare it.yaml")

    return make


def singles(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f" c{i}", "label": i % 2 == 0} for i in range(40)]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "singles"))
    return {"path": str(tmp_path / "singles"), "test_share": 0.3}


def status(summary):
    return {run["id"]: run["status"] for run in summary["runs"]}


def test_all_that_a_comparison_does(make, tmp_path, caplog):
    crash = {"model_init_kwargs": {"attn_implementation": "nonsense"}}
    methods = {"dpo": {"beta": [0.1]}, "ipo": crash, "rloo": {"beta": [0.1], "max_completion_length": 6}}
    summary = make(methods=methods, price_per_hour=3600.0).run()

    # Two good ones, with the reward model that one of them needs, and one that crashed and did not stop the others
    runs = {run["id"]: run for run in summary["runs"]}
    assert status(summary) == {
        "dpo,beta=0.1,seed=0": "done",
        "ipo,seed=0": "failed",
        "rloo,beta=0.1,seed=0": "done",
    }
    assert LAUNCHED == ["dpo,beta=0.1,seed=0", "ipo,seed=0", "reward,seed=0", "rloo,beta=0.1,seed=0"]
    failed = runs["ipo,seed=0"]
    assert failed["stage"] == "training" and "nonsense" in failed["error"] and failed["points"] == []
    assert any("ipo,seed=0: failed (" in message and "nonsense" in message for message in caplog.messages)
    assert "nonsense" in (tmp_path / "out" / "runs" / "ipo,seed=0" / "training.log").read_text()

    good = runs["dpo,beta=0.1,seed=0"]
    assert [(point["step"], point["final"]) for point in good["points"]] == [(1, False), (2, True)]
    assert all({"reward", "win_rate", "kl", "chosen_change"} <= set(point["metrics"]) for point in good["points"])
    assert good["points"][0]["metrics"]["kl"]["value"] != good["points"][1]["metrics"]["kl"]["value"]
    assert (
        0 < good["seconds"] < 600 and good["cost"] == pytest.approx(good["seconds"]) and good["memory_of"] == "process"
    )
    assert 2**26 < good["peak_memory"] < 2**36
    # With the time of its reward model
    folder = tmp_path / "out" / "runs"
    measured = [
        read_json(folder / name / "measured.json")["seconds"] for name in ("reward,seed=0", "rloo,beta=0.1,seed=0")
    ]
    assert runs["rloo,beta=0.1,seed=0"]["seconds"] == pytest.approx(sum(measured))

    (setting,) = [setting for setting in summary["settings"] if setting["method"] == "dpo"]
    assert setting["metrics"] == good["points"][1]["metrics"] and setting["capabilities"][0]["name"] == "words"
    assert [(one["first"], one["second"]) for one in summary["versus"]] == [("dpo", "rloo")]
    base = summary["base"]["metrics"]["reward"]["value"]
    assert summary["quality"]["baseline"] == base and summary["frontiers"]["kl"]["dpo"][0] == (0.0, base)
    assert "1 of the 3 trainings have no result: ipo,seed=0." in summary["recommendation"]["warnings"]
    assert read_json(tmp_path / "out" / "comparison.json")["versions"] == summary["versions"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "trl-spo compare it.yaml" in report and "nonsense" in report and (tmp_path / "out" / "report.md").is_file()
    # What is needed to resume a training is not kept after it, and nothing is there twice
    assert not list(folder.glob("*/checkpoints/*/optimizer*"))
    assert [path.name for path in folder.glob("dpo*/checkpoints/checkpoint-*")] == ["checkpoint-1"]
    shutil.rmtree(folder / "dpo,beta=0.1,seed=0" / "checkpoints")  # what was measured of it is kept

    # Nothing that is done is done again; what failed is tried again
    LAUNCHED.clear()
    again = make(methods=methods, price_per_hour=3600.0).run()
    assert LAUNCHED == ["ipo,seed=0"]
    assert again["settings"][0] == setting and again["runs"][0]["points"] == good["points"]

    # More seeds and settings are added
    LAUNCHED.clear()
    more = make(methods={"dpo": {"beta": [0.1, 0.5]}}, seeds=[0, 1], price_per_hour=3600.0).run()
    assert LAUNCHED == ["dpo,beta=0.5,seed=0", "dpo,beta=0.1,seed=1", "dpo,beta=0.5,seed=1"]
    assert [s["seeds"] for s in more["settings"]] == [[0, 1], [0, 1]]
    of_seeds = [r["points"][-1]["metrics"]["reward"]["value"] for r in more["runs"] if r["setting"] == {"beta": 0.1}]
    assert more["settings"][0]["metrics"]["reward"]["value"] == pytest.approx(sum(of_seeds) / 2)


def test_a_judge_that_fails_loses_no_training(make, tmp_path):
    comparison = make(methods={"dpo": {"beta": [0.1]}, "ipo": {"beta": [1.0]}})
    judged = []
    original = comparison.reward

    def judge(prompts, completions, **columns):
        judged.append(len(completions))
        if len(judged) == 3:  # after the reference and a checkpoint
            (tmp_path / "broken").touch()
        return original(prompts, completions, **columns)

    judge.__module__, judge.__qualname__ = original.__module__, original.__qualname__
    comparison.reward = judge
    summary = comparison.run()
    assert set(status(summary).values()) == {"unjudged"}
    assert all(run["stage"] == "judge" and "the judge is ill" in run["error"] for run in summary["runs"])
    metrics = summary["settings"][0]["metrics"]
    assert "reward" not in metrics and metrics["kl"]["value"] > 0  # what was measured is there
    assert summary["recommendation"]["method"] is None

    (tmp_path / "broken").unlink()
    LAUNCHED.clear()
    assert set(status(make(methods={"dpo": {"beta": [0.1]}, "ipo": {"beta": [1.0]}}).run()).values()) == {"done"}
    assert LAUNCHED == []


def test_what_is_wrong_is_said_before_anything_is_trained(make, tmp_path, model_path, dataset):
    (tmp_path / "broken").touch()
    with pytest.raises(RuntimeError, match="the judge is ill"):  # already on the reference's own responses
        make().run()
    assert LAUNCHED == []
    (tmp_path / "broken").unlink()
    with pytest.raises(ValueError, match="options of the capability 'c' cannot be used"):
        make(evaluation={"capabilities": [{"name": "c", "texts": ["a"], "limit": 3}]})
    with pytest.raises(ValueError, match="Each of `evaluation.capabilities` needs a `name`"):
        make(evaluation={"capabilities": [{"texts": ["a"]}]})
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    with pytest.raises(ValueError, match="holds another comparison: `dataset` was"):
        make(dataset={"path": str(other)})
    shutil.rmtree(tmp_path / "out")
    wrong = {"path": dataset, "train_split": "trian"}
    with pytest.raises(ValueError, match="`dataset.train_split` is 'trian'"):
        make(dataset=wrong).run()
    with pytest.raises(ValueError, match="The method 'dpo' takes preference data"):
        make(dataset=singles(tmp_path)).run()
    make().prepare()  # the folder takes the right one
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else than a comparison"):
        make(output_dir=str(tmp_path / "mine"))


def test_other_options_of_a_training_are_refused_before_anything_is_lost(make, tmp_path):
    make().run()
    report = (tmp_path / "out" / "report.html").read_bytes()
    training = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 3}
    with pytest.raises(ValueError, match="was done with other options: .*`max_steps`"):
        make(training=training)
    with pytest.raises(ValueError, match="was done with other options: `evaluation.checkpoints` changed"):
        make(evaluation={"checkpoints": 4})
    for name, value in (("num_processes", 8), ("accelerate_config", "zero2")):  # which make other batches
        with pytest.raises(ValueError, match=f"was done with other options: `{name}` changed"):
            make(**{name: value})
    # Those of a reward model, too; one that crashed before its first checkpoint has nothing to lose
    reward_model = tmp_path / "out" / "runs" / "reward,seed=0"
    reward_model.mkdir()
    done = tmp_path / "out" / "runs" / "dpo,beta=0.1,seed=0" / "training.json"
    (reward_model / "training.json").write_bytes(done.read_bytes())
    make(methods={"rloo": {}})
    (reward_model / "model").mkdir()
    with pytest.raises(ValueError, match="runs/reward,seed=0' was done with other options: `"):
        make(methods={"rloo": {}})
    assert (tmp_path / "out" / "report.html").read_bytes() == report
    # What only the evaluation depends on is measured anew, and nothing is trained
    LAUNCHED.clear()
    summary = make(evaluation={"checkpoints": 2, "max_new_tokens": 8, "num_responses": 2}).run()
    assert LAUNCHED == [] and set(status(summary).values()) == {"done"}
    assert "unique" in summary["settings"][0]["metrics"]


def test_rlhf_needs_pairs(make, tmp_path):
    with pytest.raises(ValueError, match="'reward' takes preference data, and the dataset is unpaired"):
        make(dataset=singles(tmp_path), methods={"rloo": {"beta": [0.1]}}).run()
    assert LAUNCHED == []


def test_the_command_says_what_is_wrong_with_the_data(make, tmp_path, capsys):
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(asdict(make(dataset=singles(tmp_path)).config)))
    assert main(["compare", str(tmp_path / "compare.yaml")]) == 2
    assert "trl-spo compare: The method 'dpo' takes preference data" in capsys.readouterr().err


def test_an_adapter_is_no_model_to_begin_with(make, tmp_path, model_path):
    """Which is told before anything is sampled, and the folder takes another model then."""
    adapter = tmp_path / "adapter"
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path), LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(adapter)
    with pytest.raises(ValueError, match=f"{adapter}' is an adapter of '{model_path}'. Merge it"):
        make(model=str(adapter)).prepare()
    make().prepare()


def test_prompts_that_do_not_fit(make, dataset):
    """Beside the responses, into the model's context: those that do are drawn, and the report says how many do not."""
    context = AutoConfig.from_pretrained(make().config.model).max_position_embeddings
    with pytest.raises(ValueError, match=f"`evaluation.max_new_tokens={context + 1}` leaves 0 tokens .* Lower it"):
        make(evaluation={"max_new_tokens": context + 1}).prepare()
    splits = DatasetDict.load_from_disk(dataset)
    long = {**splits["test"][0], "prompt": "the film " * context}
    splits["test"] = concatenate_datasets([splits["test"], Dataset.from_list([long])])
    splits.save_to_disk(f"{dataset}-long")
    comparison = make(dataset={"path": f"{dataset}-long"}, output_dir=f"{dataset}-out")
    data, evaluation = comparison.prepare()
    assert long["prompt"] not in evaluation.prompts["prompt"][:] and len(evaluation.prompts) > 0
    assert "held-out prompts drawn have more, and are left out" in data.notes[-1]


def test_a_model_with_code_of_its_own(make, model_path, tmp_path):
    """Is read as it is evaluated: with the `trust_remote_code` of `evaluation.model_kwargs`."""
    own = shutil.copytree(model_path, tmp_path / "own")
    (own / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="(?s)cannot be read: .*trust_remote_code"):
        make(model=str(own)).prepare()
    evaluation = {"max_new_tokens": 6, "model_kwargs": {"trust_remote_code": True}}
    make(model=str(own), evaluation=evaluation).prepare()


def test_without_matplotlib(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "trl-spo\['):
        make()


def test_lists_and_adapters(make, tmp_path, model_path):
    """Soft PO takes the lists, DPO their best and worst, and what is evaluated is the adapter on its model."""
    lists = Dataset.from_list(
        [
            {"prompt": f"the film {i}", "completions": [" was bad", f" was great {i}", " was"], "best": 1}
            for i in range(12)
        ]
    )
    DatasetDict({"train": lists.select(range(8)), "test": lists.select(range(8, 12))}).save_to_disk(
        str(tmp_path / "lists")
    )
    summary = make(
        dataset={"path": str(tmp_path / "lists")},
        methods={"soft_po": {"alpha": [0.1], "max_completion_length": 6}, "dpo": {"beta": [0.1]}},
        peft={"r": 2, "lora_alpha": 64, "target_modules": "all-linear"},
        evaluation={"max_new_tokens": 6, "checkpoints": 2},
    ).run()
    assert set(status(summary).values()) == {"done"}, [run["error"] for run in summary["runs"]]
    runs = tmp_path / "out" / "runs"
    assert read_json(runs / "soft_po,alpha=0.1,seed=0" / "training.json")["form"] == "ranked"
    assert read_json(runs / "dpo,beta=0.1,seed=0" / "training.json")["form"] == "preference"
    checkpoint = runs / "dpo,beta=0.1,seed=0" / "checkpoints" / "checkpoint-1"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").is_file()
    for run in summary["runs"]:
        first, last = (point["metrics"] for point in run["points"])
        assert 1e-5 < first["kl"]["value"] < last["kl"]["value"]  # of the adapter, as the model itself has none
        assert last["chosen_change"]["value"] != 0


@pytest.mark.parametrize("all_checkpoints", [False, True])
def test_critics(make, tmp_path, all_checkpoints):
    """Without a reward function, quality is the win rate; with one, it is shown beside."""
    (tmp_path / "rules.py").write_text(RULE.format(broken=tmp_path / "ill"))
    critic = {"type": "rule", "name": "longer", "function": f"{tmp_path}/rules.py:longer"}
    evaluation = {"max_new_tokens": 6, "checkpoints": 2, "judge_checkpoints": all_checkpoints}
    changes = {"critics": [critic], "evaluation": evaluation} | ({} if all_checkpoints else {"reward": None})
    if all_checkpoints:  # a jury that fails does not take the rewards along
        (tmp_path / "ill").touch()
        summary = make(**changes).run()
        metrics = summary["settings"][0]["metrics"]
        assert metrics["reward"]["value"] > 0 and "win_rate" not in metrics
        assert "1 of the 1 trainings were not judged: dpo,beta=0.1,seed=0." in summary["recommendation"]["warnings"]
        (tmp_path / "ill").unlink()
    summary = make(**changes).run()
    assert set(status(summary).values()) == {"done"}, [run["error"] for run in summary["runs"]]
    assert summary["quality"] == {
        "metric": "win_rate",
        "label": "Win rate against the reference",
        "by": ["longer"],
        "baseline": 0.5,
    }
    first, last = (point["metrics"] for point in summary["runs"][0]["points"])
    assert "win_rate" in last and ("win_rate" in first) == all_checkpoints
    assert ("reward" in first) == ("reward" in last) == all_checkpoints
    judged = summary["settings"][0]["judged"]
    assert sum(judged.values()) == 8 and judged["undecided"] == 0
    assert summary["frontiers"]["kl"]["dpo"][0] == (0.0, 0.5)
    assert summary["cost"]["judging"] == 0.0 and summary["cost"]["currency"] is None


def test_which_models_are_evaluated(make, tmp_path, caplog):
    unrolled = {"bilevel": "unrolled", "inner_learning_rate": 0.05}
    comparison = make(methods={"dpo": {"beta": [0.1]}, "stable_po": unrolled})
    comparison.prepare()
    dpo, unrolled = comparison.runs

    def steps(run):
        for step in (1, 5, 10):
            (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
        return [(model["step"], model["path"]) for model in comparison._models(run, tmp_path, tmp_path / "model")]

    paths = [str(tmp_path / name) for name in ("checkpoints/checkpoint-1", "checkpoints/checkpoint-5", "model")]
    assert steps(dpo) == list(zip((1, 5, 10), paths, strict=True))
    assert steps(unrolled) == [(10, paths[2])]  # its checkpoints are θ, and what is deployed is θ'
    # One that was removed, if it would be measured in the same way
    models = comparison._models(dpo, tmp_path, tmp_path / "model")
    comparison._keep(tmp_path, [model | {"found": {"metrics": {"kl": model["step"]}}} for model in models])
    shutil.rmtree(paths[0])
    first = comparison._models(dpo, tmp_path, tmp_path / "model")[0]
    assert first["path"] is None and first["found"] == {"metrics": {"kl": 1}}
    comparison.config.evaluation.max_new_tokens = 7
    assert [model["step"] for model in comparison._models(dpo, tmp_path, tmp_path / "model")] == [5, 10]
    assert "checkpoint-1' was removed, and cannot be evaluated in another way" in caplog.text


LAUNCHER = """E1122 08:57:11 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: {code}) local_rank: 0
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/site-packages/accelerate/commands/launch.py", line 1204, in launch_command
    deepspeed_launcher(args)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
trl_spo.synthetic.training FAILED
============================================================
"""


def test_the_error_of_a_launched_training_is_that_of_the_training(tmp_path):
    path = tmp_path / "training.log"
    said = "".join(f"[rank0]:   line {i}\n" for i in range(40)) + "[rank0]: ValueError: bf16 is True and False\n"
    lost = "[rank1]: Traceback (most recent call last):\n" + 40 * "[rank1]: RuntimeError: Connection closed by peer\n"
    path.write_text("step 1\n\n[rank0]: Traceback (most recent call last):\n" + said + lost + LAUNCHER.format(code=1))
    found = _end_of_log(path).splitlines()
    assert len(found) == 30 and found[0] == "[rank0]:   line 12" and "failed (exitcode: 1)" in found[-1]
    assert _line_of_error("\n".join(found)) == "[rank0]: ValueError: bf16 is True and False"
    # One that was killed has said nothing, and the launcher knows how it ended
    path.write_text("step 1\n" + LAUNCHER.format(code=-9))
    assert _line_of_error(_end_of_log(path)).endswith("failed (exitcode: -9) local_rank: 0")
    launcher = (
        'Traceback (most recent call last):\n  File "accelerate/commands/launch.py", line 1210, in simple_launcher\n'
    )
    path.write_text(f"step 1\n{launcher}subprocess.CalledProcessError: Command died with <Signals.SIGKILL: 9>.\n")
    assert _line_of_error(_end_of_log(path)).endswith("died with <Signals.SIGKILL: 9>.")
    assert _line_of_error("one\ntwo") == "two" and _end_of_log(tmp_path / "none") == ""
