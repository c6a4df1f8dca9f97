# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
from datasets import Dataset
from tests.advisor.conftest import REAL, codes, make_pairs, make_unpaired, only, rows_of

from trl_spo.advisor.duplicates import duplicate_findings, leakage_findings, near_duplicate_findings
from trl_spo.advisor.quality import (
    balance_findings,
    list_findings,
    prompt_findings,
    quality_findings,
    size_findings,
    usable_rows,
)
from trl_spo.preference_checks import check_preferences, check_unpaired_preferences


def _pairs(n, prompt="Prompt {}"):
    return [(prompt.format(i), f" good {i}", f" bad {i}") for i in range(n)]


@pytest.mark.parametrize(
    ("usable", "expected"),
    [(0, "error"), (499, "error"), (500, "warning"), (4999, "warning"), (5000, None), (60000, None)],
)
def test_marks_of_size(usable, expected):
    rows = rows_of(make_pairs(*_pairs(3)))
    severities = [finding.severity for finding in size_findings(rows, usable, usable)]
    assert severities == ([] if expected is None else [expected])
    of_stream = [finding.code for finding in size_findings(rows, usable, None)]  # whose rows nobody has counted
    assert of_stream == ([] if expected is None else ["size_unknown"])


def test_what_teaches_nothing_is_not_counted():
    rows = rows_of(
        make_pairs(
            *_pairs(3),
            ("Prompt 0", " good 0", " BAD  0"),  # a copy but for case and white space
            ("Prompt 4", " same", " same"),
            ("Prompt 5", " Same", " same"),
            ("Prompt 6", "", " bad"),
            (None, " good", " bad"),
        )
    )
    assert usable_rows(rows).tolist() == [True] * 3 + [False] * 5
    assert codes(quality_findings(rows)) == {
        "missing_values": "error",
        "empty_responses": "error",
        "identical_responses": "warning",
    }
    identical = only(quality_findings(rows), "identical_responses")
    assert (identical.data["count"], identical.data["exact"]) == (2, 1)


def test_nothing_is_wrong_with_good_pairs():
    assert quality_findings(rows_of(make_pairs(*_pairs(20)))) == []
    assert duplicate_findings(rows_of(make_pairs(*_pairs(20)))) == []


@pytest.mark.parametrize(
    ("dataset", "check"),
    [
        (make_pairs(("p", " a", " b"), ("p", "", " b")), check_preferences),
        (make_pairs(("p", " a", " b"), ("p", " ", " b")), check_preferences),
        (make_pairs(("p", " a", " a"), ("p", " b", " b")), check_preferences),
        (make_pairs(("p", " a", " a"), ("p", " b", " c")), check_preferences),
        (make_pairs(("p", " a", " b"), ("q", None, " b")), check_preferences),
        (make_unpaired(("p", " a", True), ("p", "", False)), check_unpaired_preferences),
        (make_unpaired(("p", " a", True), ("p", " b", None)), check_unpaired_preferences),
        (make_unpaired(("p", " a", True), ("p", " b", False)), check_unpaired_preferences),
        *(
            (Dataset.from_dict({"prompt": ["p"], "completions": [completions], **order}), check_preferences)
            for completions, order in (
                ([" a", " b"], {"best": [1]}),
                ([" a", " b"], {"best": [2]}),
                ([" a"], {"best": [0]}),
                ([" a", ""], {"ranking": [[0, 1]]}),
                ([" a", " b"], {"ranking": [[0, 0]]}),
                ([" a", " b"], {"scores": [[1.0, 1.0]]}),
                ([" a", " b"], {"scores": [[1.0, 2.0]]}),
                ([" a", " b"], {"scores": [[1.0]]}),
            )
        ),
    ],
)
def test_errors_are_what_the_trainers_refuse(dataset, check):
    rows = rows_of(dataset)
    found = {finding.severity for finding in [*quality_findings(rows), *list_findings(dataset, rows)]}
    try:
        check(dataset, "train")
    except ValueError:
        assert "error" in found
    else:
        assert "error" not in found


def test_trl_takes_empty_responses():
    rows = rows_of(make_pairs(*_pairs(3), ("p", "", " b"), ("q", " \n", " b")))
    assert codes(quality_findings(rows)) == {"empty_responses": "error", "blank_responses": "warning"}
    assert codes(quality_findings(rows, "dpo"))["empty_responses"] == "warning"
    assert codes(quality_findings(rows, "soft_po"))["empty_responses"] == "error"


def test_trl_cannot_split_what_is_empty():
    from trl import extract_prompt

    row = {"chosen": "", "rejected": "a question? no"}
    with pytest.raises(UnboundLocalError):
        extract_prompt(row)
    rows = rows_of(Dataset.from_list([{"chosen": "a question? yes", "rejected": "a question? no"}, row]))
    finding = only(quality_findings(rows, "dpo"), "empty_responses")
    assert finding.severity == "error" and "without a column `prompt`" in finding.detail


def test_prompts_in_another_column():
    questions, answers = ["What is it?", "Who was that?", "Where to?"], ["Yes", "No", "Up"]
    texts = {"question": questions, "chosen": [f"{a} good" for a in answers], "rejected": [f"b {a}" for a in answers]}
    dataset = Dataset.from_dict(texts)
    (finding,) = prompt_findings(dataset, rows_of(dataset))
    assert (finding.code, finding.severity) == ("prompt_column", "error")
    assert 'rename_column("question", "prompt")' in finding.remedy
    renamed = dataset.rename_column("question", "prompt")
    assert prompt_findings(renamed, rows_of(renamed)) == []
    unknown = dataset.rename_column("question", "asked")
    assert codes(prompt_findings(unknown, rows_of(unknown))) == {"no_prompt": "warning"}
    users = dataset.remove_columns("question").add_column("user", ["ann", "ben", "cid"])
    assert codes(prompt_findings(users, rows_of(users))) == {"no_prompt": "warning"}

    def within(row, name):
        return f"{row['question']} {row[name]}"

    for make in (
        within,  # with the prompt in them, as in hh-rlhf
        lambda row, name: [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row[name]}],
    ):
        dataset = Dataset.from_list(
            [row | {name: make(row, name) for name in ("chosen", "rejected")} for row in Dataset.from_dict(texts)]
        )
        assert prompt_findings(dataset, rows_of(dataset)) == []


def test_formats():
    assert codes(quality_findings(rows_of(make_pairs(("A question?", "Yes.", "No."))))) == {"no_separator": "warning"}
    assert "1 of 1 rows" in quality_findings(rows_of(make_pairs(("A question?", "Yes.", "No."))))[0].detail
    assert quality_findings(rows_of(make_pairs(("A question?\n", "Yes.", "No.")))) == []
    long = "What is the capital of France?\n"
    assert codes(quality_findings(rows_of(make_pairs((long, long + "Paris", long + "Lyon"))))) == {
        "prompt_repeated": "warning"
    }
    implicit = Dataset.from_dict({"chosen": ["I like cats"], "rejected": ["I like cars"]})
    assert codes(quality_findings(rows_of(implicit))) == {"implicit_prompt_cuts_words": "warning"}
    user, other = ([{"role": "user", "content": text}] for text in "ab")
    rows = rows_of(make_pairs((user, other, [{"role": "assistant", "content": "c"}])))
    assert codes(quality_findings(rows)) == {"role_of_response": "warning"}


@pytest.mark.parametrize(
    ("desirable", "undesirable", "weights"),
    [
        (10, 10, (1.0, 1.0)),
        (12, 10, (1.0, 1.0)),
        (30, 10, (1.0, 3.0)),
        (30, 10, (1.0, 2.5)),
        (30, 10, (1.0, 1.0)),
        (10, 30, (1.0, 1.0)),
        (10, 30, (3.0, 1.0)),
    ],
)
def test_balance_is_that_of_trl(desirable, undesirable, weights, tokenizer, tmp_path, caplog):
    from types import SimpleNamespace

    from accelerate import PartialState
    from trl import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    PartialState()
    dataset = make_unpaired(*((f"p {i}", " a", i < desirable) for i in range(desirable + undesirable)))
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=False, desirable_weight=weights[0], undesirable_weight=weights[1]
    )
    args = KTOConfig(output_dir=str(tmp_path), bf16=False, report_to="none")
    with caplog.at_level("WARNING"):
        KTOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")
    findings = balance_findings(rows_of(dataset), *weights)
    assert bool(findings) == ("different amounts of desirable" in caplog.text)
    if findings:  # with what is recommended, all is well
        data = findings[0].data
        assert data["range"][0] > 1.0  # what is rare is raised, and not what is frequent lowered
        for value in data["range"]:
            changed = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True)) | {
                data["option"]: value
            }
            assert balance_findings(rows_of(dataset), **changed) == []


def test_one_label_says_nothing():
    dataset = make_unpaired(("p", " a", True), ("q", " b", True))
    assert codes(balance_findings(rows_of(dataset))) == {"one_label": "error"}


def test_copies_and_repeated_prompts():
    rows = rows_of(make_pairs(*_pairs(8), ("Prompt 0", " good 0", " bad 0"), ("Prompt 1", " other", " bad 1")))
    findings = duplicate_findings(rows)
    assert codes(findings) == {"duplicate_rows": "warning", "repeated_prompts": "info"}
    assert only(findings, "duplicate_rows").data["count"] == 1
    assert only(findings, "repeated_prompts").data == {"rows": 10, "prompts": 8}
    assert "at least as many" in duplicate_findings(rows, sampled=True)[0].detail
    few = rows_of(make_pairs(*_pairs(400), ("Prompt 0", " good 0", " bad 0")))
    assert codes(duplicate_findings(few)) == {"duplicate_rows": "info"}


def test_leakage():
    train = rows_of(make_pairs(*_pairs(100)))
    apart = rows_of(make_pairs(*_pairs(40, "Other {}")))
    assert leakage_findings(train, apart) == []
    rows = rows_of(
        make_pairs(*_pairs(40, "Other {}"), ("prompt 3", " GOOD 3", " bad 3"), ("Prompt 4", " else", " bad"))
    )
    findings = leakage_findings(train, rows)
    assert codes(findings) == {"leaked_rows": "warning", "leaked_prompts": "warning"}
    assert (only(findings, "leaked_rows").data["count"], only(findings, "leaked_prompts").data["count"]) == (1, 2)
    assert codes(leakage_findings(train, train)) == {"leaked_rows": "error"}
    (finding,) = leakage_findings(train, train, sampled=True)
    assert "at least as many" in finding.detail and "sample" not in findings[0].detail
    assert codes(leakage_findings(train, None)) == {"no_eval_split": "info"}
    assert codes(leakage_findings(train, None, evaluates=True)) == {"no_eval_split": "error"}


def test_a_prompt_that_all_have_is_no_leak():
    train, test = (
        rows_of(make_pairs(*(("Review:", f" good {i}", f" bad {i}") for i in part)))
        for part in (range(20), range(20, 30))
    )
    assert leakage_findings(train, test) == []


def test_near_duplicates():
    text = "Tell me a story about a small dog that lives near the river number {}"
    datasets = make_pairs(
        (text.format(1), " a", " b"), (text.format(2), " a", " b"), ("Something else altogether", " a", " b")
    )
    test = make_pairs(
        (text.format(3), " a", " b"), ("Nothing that was there before", " a", " b"), (text.format(1), " c", " d")
    )
    rows = rows_of(datasets), rows_of(test)
    findings = near_duplicate_findings((datasets, test), rows)
    assert codes(findings) == {"near_duplicate_prompts": "info", "near_leakage": "warning"}
    # The one that is equal is a leaked prompt, and not counted again
    assert (findings[0].data["count"], findings[1].data["count"]) == (1, 1)
    assert near_duplicate_findings((datasets, test), rows, threshold=1.0) == []
    with pytest.raises(ValueError, match="from 0.1 to 1"):
        near_duplicate_findings((datasets, test), rows, threshold=2.0)


def test_near_duplicates_that_take_long_are_asked_for(monkeypatch):
    monkeypatch.setattr("trl_spo.advisor.duplicates._CHEAP", 100)
    dataset = make_pairs(*_pairs(20))
    (finding,) = near_duplicate_findings((dataset, None), (rows_of(dataset), None))
    assert finding.code == "near_duplicates_not_checked" and "--near_duplicates" in finding.detail
    assert near_duplicate_findings((dataset, None), (rows_of(dataset), None), threshold=0.99) == []


@pytest.mark.parametrize(("most", "expected"), [(24, []), (23, ["near_duplicates_not_checked"])])
def test_many_prompts_may_all_be_alike(most, expected, monkeypatch):
    # Each of a template is compared with all before it, however short they are
    monkeypatch.setattr("trl_spo.advisor.duplicates._FEW_PROMPTS", most)
    datasets = make_pairs(*_pairs(20, "{}")), make_pairs(*_pairs(24, "{}"))
    found = near_duplicate_findings(datasets, tuple(rows_of(dataset) for dataset in datasets))
    assert [finding.code for finding in found] == expected


def test_near_duplicates_without_the_package(monkeypatch):
    monkeypatch.setattr("trl_spo.advisor.duplicates.find_spec", lambda name: None)
    dataset = make_pairs(*_pairs(2))
    (finding,) = near_duplicate_findings((dataset, None), (rows_of(dataset), None), threshold=0.8)
    assert finding.code == "near_duplicates_not_checked" and 'pip install "trl-spo[synthetic]"' in finding.detail


@pytest.mark.parametrize(("name", "expected"), dict.fromkeys(REAL, {"no_separator": "warning"}).items())
def test_real_data(name, expected, real_data):
    found = codes(quality_findings(rows_of(real_data(name))))
    expected = dict(expected)
    match name:
        case "hh_helpful_pairs":  # "\n\nAssistant:", and a response that begins with a space
            expected = {}
        case "pandalm_human_pairs":
            expected["empty_responses"] = "error"
        case "llmbar_human_pairs":
            expected["identical_responses"] = "warning"
    assert found == expected
