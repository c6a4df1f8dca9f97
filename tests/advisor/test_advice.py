# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole of the advice: what is looked at of which dataset, for which method, and what is told of a sample of it."""

import json
from io import StringIO

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from rich.console import Console
from tests.advisor.conftest import codes, make_pairs, make_unpaired, only

from trl_spo.advisor import UsageError, advise, print_advice
from trl_spo.advisor.gpus import Gpu


def _pairs(n):
    return [(f"question{i} of mine ", f"answer{i} good", f"answer{i} bad") for i in range(n)]


def _found(*args, **kwargs):
    advice = advise(*args, **kwargs)
    json.dumps(advice.to_dict(), allow_nan=False)
    return advice.findings


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(p, c, c) for p, c, _ in _pairs(60)], {"identical_responses": "error"}),
        ([("p ", "a", "a")], {"identical_responses": "error"}),
        ([(p, *both) for p, c, r in _pairs(60) for both in ((c, r), (r, c))], {"label_noise": "warning"}),
    ],
)
def test_pairs_that_say_nothing(pairs, expected):
    assert expected.items() <= codes(_found(make_pairs(*pairs))).items()


def test_splits_are_passed_one_by_one():
    splits = DatasetDict({"train": make_pairs(*_pairs(3)), "test": make_pairs(*_pairs(2))})
    for both in ((splits, None), (splits["train"], splits)):
        with pytest.raises(UsageError, match=r"the splits train, test. Pass one of them: `dataset\['train'\]`"):
            advise(*both)


def _table(advice):
    console = Console(file=StringIO(), width=100)
    print_advice(advice, console)
    return console.file.getvalue()


@pytest.fixture
def marks(monkeypatch):
    """Fewer than 50 are too few, 200 the floor."""
    for module in ("quality", "recommendation"):
        monkeypatch.setattr(f"trl_spo.advisor.{module}.FEW", 200)
    monkeypatch.setattr("trl_spo.advisor.quality.TOO_FEW", 50)


def test_a_sample_speaks_for_the_dataset(marks):
    dataset = make_pairs(*_pairs(240))
    advice = advise(dataset, max_examples=30, large_budget=True)
    assert advice.dataset == {"rows": 30, "total": 240, "eval_rows": None, "usable": 30}
    assert not {"too_few_examples", "few_examples"} & codes(advice.findings).keys()
    assert advice.recommendation.method == "rlhf" and "about 240 usable pairs" in advice.recommendation.reasons[0]
    assert "30 of 240 rows, 30 of them usable" in _table(advice)
    # Half of them teach nothing
    half = make_pairs(*((p, c, r if i % 2 else c) for i, (p, c, r) in enumerate(_pairs(240))))
    finding = only(_found(half, max_examples=120), "few_examples")
    assert 90 < finding.data["usable"] < 150 and finding.detail.startswith("About")
    found = only(_found(dataset, dataset.select(range(60)), max_examples=100), "leaked_rows")
    assert found.data["count"] < 60 and "at least as many" in found.detail
    assert "sample" not in only(_found(dataset, dataset.select(range(60))), "leaked_rows").detail


def test_nobody_knows_the_rows_of_a_stream(marks):
    def stream():
        return IterableDataset.from_generator(lambda: iter(make_pairs(*_pairs(100))))

    advice = advise(stream(), max_examples=40)
    assert advice.dataset["total"] is None and codes(advice.findings)["size_unknown"] == "info"
    assert "The reward model" not in advice.recommendation.alternatives[-1]["reason"]
    assert "the first 40 rows of a stream" in _table(advice)
    ended = advise(stream(), max_examples=101)
    assert ended.dataset["total"] == 100 and codes(ended.findings)["few_examples"] == "warning"


def _time(dataset, stories, **kwargs):
    options = {"num_train_epochs": 1.0, "per_device_train_batch_size": 8, **kwargs.pop("options", {})}
    return _found(dataset, method="dpo", model=stories, gpu="h100", reference_prompts=0, options=options, **kwargs)


@pytest.mark.filterwarnings("ignore:The `'keep_end'`:FutureWarning")
@pytest.mark.parametrize(
    ("pairs", "options", "steps"),
    [
        (_pairs(80), {}, 10),
        (_pairs(40) * 2, {}, 10),  # copies are trained on
        ([(p, c, "") for p, c, _ in _pairs(80)], {}, 10),  # and so are what teaches nothing
        (_pairs(40) + [("too long " * 200, " a", " b")] * 40, {"max_length": 256}, 5),  # but not what is dropped
        (_pairs(80), {"max_length": 4, "truncation_mode": "keep_end"}, 10),  # of which no prompt is left
    ],
)
def test_steps_are_those_of_the_trainer(pairs, options, steps, stories):
    found = _time(make_pairs(*pairs), stories, options=options)
    assert only(found, "few_steps").data["steps"] == only(found, "time").data["steps"] == steps


def test_steps_of_a_sample_and_of_a_stream(stories):
    dataset = make_pairs(*_pairs(80))
    assert only(_time(dataset, stories, max_examples=20), "few_steps").data["steps"] == 10
    stream = dataset.to_iterable_dataset()
    assert not {"few_steps", "time"} & codes(_time(stream, stories, max_examples=20)).keys()
    found = _time(stream, stories, max_examples=20, options={"max_steps": 7})
    assert only(found, "time").data["steps"] == 7


def test_memory_is_that_of_the_longest_list(stories):
    def activations(*sizes):
        dataset = Dataset.from_list(
            [{"prompt": f"p{i}", "completions": [" a b", " c d"] * (n // 2), "best": 0} for i, n in enumerate(sizes)]
        )
        found = _found(dataset, model=stories, reference_prompts=0, options={"beta": 0.0})
        return only(found, "memory").data["working"]["activations"]

    assert activations(2, 16) == pytest.approx(8 * activations(2, 2))


@pytest.mark.parametrize(("asked", "severity"), [(None, "warning"), ("dpo", "warning"), ("soft_po", "error")])
def test_rows_are_checked_for_the_method(asked, severity):
    pairs = [*_pairs(60), ("p ", "", "a")]  # for which DPO is recommended
    assert codes(_found(make_pairs(*pairs), method=asked))["empty_responses"] == severity


def test_options_of_another_method_are_left_out():
    unpaired = make_unpaired(*((f"q {i}", "a", i % 2 == 0) for i in range(20)))
    found = _found(unpaired, options={"label_smoothing": 0.1, "beta": 0.0})
    finding = only(found, "options_not_checked")
    assert "KTO is recommended, which has no `label_smoothing=0.1`." in finding.detail
    assert codes(found)["beta_range"] == "error"  # which KTO has
    noisy = [(p, *both) for p, c, r in _pairs(60) for both in ((c, r), (r, c))]
    advice = advise(make_pairs(*noisy), options={"loss_type": ["robust"], "beta": 1.0})
    assert advice.training["method"] == "ipo"
    assert only(advice.findings, "options_not_checked").data["options"] == ["loss_type"]
    with pytest.raises(UsageError, match="Did you mean `max_length`"):
        advise(unpaired, options={"max_lenght": 1})
    with pytest.raises(UsageError, match="`label_smoothing` is no option of the method 'kto'"):
        advise(unpaired, method="kto", options={"label_smoothing": 0.1})


def test_what_is_not_said_of_rlhf(marks, stories):
    found = _found(make_pairs(*_pairs(200)), model=stories, reference_prompts=0, large_budget=True)
    assert "tokens" not in codes(found) and "nor of tokens" in only(found, "options_not_checked").detail


def test_images_are_not_read():
    pairs = [("Is it red? ", *(("yes", "no") if i % 2 else ("no", "yes"))) for i in range(60)]
    dataset = make_pairs(*pairs, images=[[f"{i}.png"] for i in range(60)])
    advice = advise(dataset, make_pairs(*pairs[:10], images=[[f"new{i}.png"] for i in range(10)]))
    found = codes(advice.findings)
    assert found["images_not_read"] == "info" and advice.dataset["usable"] == 60
    assert not {"duplicate_rows", "leaked_rows", "leaked_prompts", "near_duplicate_prompts"} & found.keys()
    assert advice.recommendation.method == "dpo" and found["label_noise"] == "info"
    assert codes(_found(dataset))["no_eval_split"] == "info"


def test_training_is_told_whatever_the_shape(monkeypatch):
    monkeypatch.setattr("trl_spo.advisor.gpus.local_gpu", lambda: Gpu("here", 8.0))
    nothing = advise(Dataset.from_dict({"a": [1]}), accelerate_config="zero2", num_processes=2, gpu="h100").training
    something = advise(make_pairs(*_pairs(3)), accelerate_config="zero2", num_processes=2, gpu="h100").training
    assert nothing.keys() == something.keys()
    assert (nothing["accelerate_config"], nothing["num_processes"], nothing["gpu"]) == ("zero2", 2, "h100")
