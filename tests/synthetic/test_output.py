# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The datasets, their card, and that both arrive at a server which speaks the Hub's API."""

import copy
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from datasets import Features, List, Value, load_from_disk
from markdown_it import MarkdownIt

from trl_spo.synthetic.agreement import agreement_report
from trl_spo.synthetic.card import cell, make_card
from trl_spo.synthetic.check_set import human_check
from trl_spo.synthetic.files import write_json, write_rows
from trl_spo.synthetic.output import FORMS, build_dataset, unpaired_rows
from trl_spo.synthetic.pairs import preference_pairs
from trl_spo.synthetic.prompts import split_of
from trl_spo.synthetic.redaction import without_secrets
from trl_spo.synthetic.synthesis import Synthesis
from trl_spo.synthetic.synthesis_config import SynthesisConfig, from_dict


ODD = "é 👩‍👩‍👧 \u2028 \u0085 \r\n \t \\ | {{ x }} <b> \x00 ‮"


def make_vote(critic: str, share: float | None, status: str = "vote", **others) -> dict:
    return {"critic": critic, "share": share, "status": status, **others}


def make_rows(n: int, conversational: bool = False) -> tuple[list[dict], list[dict], list[dict]]:
    """Candidates of which each is better than the next, the verdicts of two critics on them, and all pairs."""
    candidates, verdicts = [], []
    for i in range(n):
        prompt = [{"role": "user", "content": f"Prompt {i} {ODD}"}] if conversational else f"Prompt {i} {ODD}"
        responses = [{"id": str(k), "text": f"Response {k} of {i} {ODD}"} for k in range(3)]
        candidates.append({"prompt_id": f"p{i}", "prompt": prompt, "responses": responses})
        for first, second in ((1, 0), (0, 2), (1, 2)):
            share = float(first < second)
            votes = [
                make_vote("a", share, verdicts=["B", "A"] if share == 0 else ["A", "B"], rationales=["One", "Two"]),
                make_vote("b", None, "flipped", verdicts=["A", "A"], rationales=["Three", "Four"]),
            ]
            winner = str(min(first, second))
            verdicts.append({"prompt_id": f"p{i}", "response_ids": [str(first), str(second)], "lengths": [9, 9]})
            verdicts[-1] |= {"votes": votes, "share": share, "winner": winner, "confidence": 1.0, "truth": None}
    kept = [row for row, reason in preference_pairs(candidates, verdicts, "all") if reason is None]
    assert len(kept) == 3 * n
    return candidates, verdicts, kept


def make_config(folder: Path, **options) -> dict:
    config = {
        "output_dir": str(folder),
        "prompts": {"dataset": {"path": "json", "data_files": "prompts.jsonl", "split": "train"}},
        "candidates": {"student": {"type": "transformers", "model": "student", "max_new_tokens": 12}},
        "judge": {"critics": [{"type": "rule", "name": "equal", "function": "operator:eq"}]},
    }
    for stage, values in options.items():
        config[stage] = {**config.get(stage, {}), **values}
    return config


def complete(config: dict) -> dict:
    return asdict(from_dict(SynthesisConfig, config, ""))


def build(folder: Path, rows, test_share: float = 0.5, records=None) -> dict:
    return build_dataset(folder / "dataset", *rows, test_share, complete(make_config(folder)), records or {})


def of_form(folder: Path, form: str) -> list[dict]:
    splits = load_from_disk(str(folder / "dataset" / form))
    for split, rows in splits.items():
        assert {split_of(row["provenance"]["prompt_id"], 0.5) for row in rows} == {split}
    return [row for split in splits.values() for row in split]


@pytest.mark.parametrize("conversational", [False, True])
def test_forms(tmp_path, conversational):
    n = 20
    candidates, verdicts, kept = make_rows(n + 1, conversational)
    counts = build(tmp_path, (candidates, verdicts, kept[:-3]))  # of the last prompt, no pair is kept
    assert {form: sum(of.values()) for form, of in counts.items()} == {"preference": 60, "ranked": 20, "unpaired": 40}
    assert 0 < counts["ranked"]["test"] < 20 and counts["preference"]["test"] == 3 * counts["ranked"]["test"]

    def says(i: int, k: int):
        text = f"Response {k} of {i} {ODD}"
        return [{"role": "assistant", "content": text}] if conversational else text

    def prompt(i: int):
        return [{"role": "user", "content": f"Prompt {i} {ODD}"}] if conversational else f"Prompt {i} {ODD}"

    found = of_form(tmp_path, "preference")
    seen = set()
    for row in found:
        i = int(row["provenance"]["prompt_id"][1:])
        chosen, rejected = int(row["provenance"]["chosen_id"]), int(row["provenance"]["rejected_id"])
        seen.add((i, chosen, rejected))
        assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt(i), says(i, chosen), says(i, rejected))
        assert row["votes"] == [
            {"critic": "a", "status": "vote", "for_chosen": 1.0},
            {"critic": "b", "status": "flipped", "for_chosen": None},
        ]
        assert row["rationales"] == ["One", "Two"] and row["confidence"] == 1 and row["margin"] > 0
        assert row["probability"] is None and row["provenance"]["by_rule"] is False
    assert seen == {(i, *pair) for i in range(n) for pair in ((0, 1), (0, 2), (1, 2))}
    for row in of_form(tmp_path, "ranked"):
        i = int(row["provenance"]["prompt_id"][1:])
        assert row["prompt"] == prompt(i) and row["completions"] == [says(i, k) for k in range(3)]
        assert row["scores"][0] > row["scores"][1] > row["scores"][2]
    # The second one is better than the third and worse than the first
    labels = {
        (int(row["provenance"]["prompt_id"][1:]), int(row["provenance"]["response_id"])): row["label"]
        for row in of_form(tmp_path, "unpaired")
        if row["prompt"] == prompt(int(row["provenance"]["prompt_id"][1:]))
    }
    assert labels == {(i, k): k == 0 for i in range(n) for k in (0, 2)}


def test_who_voted_for_the_chosen(tmp_path):
    candidates, verdicts, (row, *_) = make_rows(1)
    assert (row["response_ids"], row["chosen_id"]) == (["1", "0"], "0")  # so that shares are for the rejected one
    votes = [
        make_vote("for", 0.2, rationales=["For"]),
        make_vote("against", 0.9, rationales=["Against"]),
        make_vote("tie", 0.5, "tie", rationales=["Tie"]),
        make_vote("scores", 0.0),
        make_vote("none", None, "unparseable", rationales=[None, "No"]),
    ]
    by_rule = {**row, "votes": votes, "truth": "0", "confidence": 0.1, "probability": 0.2, "prompt_id": "p1"}
    judged = {**row, "votes": votes, "margin": None, "confidence": 0.3, "probability": 0.7}
    build(tmp_path, (candidates, verdicts, [judged, by_rule]), 0.0)
    first, second = load_from_disk(str(tmp_path / "dataset" / "preference"))["train"]
    for_chosen = {vote["critic"]: vote["for_chosen"] for vote in first["votes"]}
    assert for_chosen == pytest.approx({"for": 0.8, "against": 0.1, "tie": 0.5, "scores": 1.0, "none": None})
    assert first["rationales"] == ["For"] and first["votes"] == second["votes"]
    assert (first["margin"], first["confidence"], first["probability"]) == (None, 0.3, 0.7)
    assert (second["confidence"], second["probability"], second["provenance"]["by_rule"]) == (1.0, 1.0, True)


def test_columns_do_not_depend_on_the_rows(tmp_path):
    """Those of a split in which nobody gave a rationale, a vote or a margin."""
    text, number = Value("string"), Value("float64")
    message = {"role": text, "content": text, "name": text}
    said = List({"role": text, "content": text})
    expected = {
        "preference": {
            "prompt": List(message),
            "chosen": said,
            "rejected": said,
            "margin": number,
            "confidence": number,
            "probability": number,
            "votes": List({"critic": text, "status": text, "for_chosen": number}),
            "rationales": List(text),
            "provenance": {"prompt_id": text, "chosen_id": text, "rejected_id": text, "by_rule": Value("bool")},
        },
        "ranked": {
            "prompt": List(message),
            "completions": List(said),
            "scores": List(number),
            "provenance": {"prompt_id": text},
        },
        "unpaired": {
            "prompt": List(message),
            "completion": said,
            "label": Value("bool"),
            "provenance": {"prompt_id": text, "response_id": text},
        },
    }
    candidates, verdicts, kept = make_rows(340, conversational=True)
    for row in [*kept, *candidates]:
        if row["prompt_id"] == "p339":  # in another batch
            row["prompt"] = [{**row["prompt"][0], "name": "Ann"}]
        elif "votes" in row and split_of(row["prompt_id"], 0.5) == "train":
            row |= {"votes": [], "margin": None}
    build(tmp_path, (candidates, verdicts, kept))
    for form in FORMS:
        splits = load_from_disk(str(tmp_path / "dataset" / form))
        assert set(splits) == {"train", "test"}
        for split in splits.values():
            assert split.features == Features(expected[form])
    assert {row["prompt"][0]["name"] for row in of_form(tmp_path, "ranked")} == {None, "Ann"}


def test_without_rows(tmp_path):
    candidates, verdicts, kept = make_rows(4)
    for verdict in verdicts:
        verdict |= {"share": None, "winner": None}
    counts = build(tmp_path, (candidates, verdicts, kept), 0.0)
    assert counts == {
        "preference": {"train": 12, "test": 0},
        "ranked": {"train": 0, "test": 0},
        "unpaired": {"train": 8, "test": 0},
    }
    assert sorted(path.name for path in (tmp_path / "dataset").iterdir()) == ["README.md", "preference", "unpaired"]
    assert {name: len(rows) for name, rows in load_from_disk(str(tmp_path / "dataset" / "preference")).items()} == {
        "train": 12
    }
    forms = tables_of((tmp_path / "dataset" / "README.md").read_text())["form"]
    assert [row[:3] for row in forms] == [["preference", "12", "0"], ["ranked", "0", "0"], ["unpaired", "8", "0"]]


def test_same_files_for_the_same_rows(tmp_path):
    """What is computed from a dataset is cached by its fingerprint."""

    def files(folder: str, rows) -> dict:
        build(tmp_path / folder, rows)
        paths = (tmp_path / folder / "dataset").rglob("*")
        return {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in paths if path.is_file()}

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    rows = make_rows(6)
    first, again, elsewhere = files("a", rows), files("a", rows), files("b", rows)
    assert first == again
    assert first.pop("dataset/README.md") != elsewhere.pop("dataset/README.md") and first == elsewhere
    rows[2][0]["margin"] += 1
    changed = {name for name, content in files("a", rows).items() if first.get(name, content) != content}
    split = split_of(rows[2][0]["prompt_id"], 0.5)
    assert changed == {f"dataset/preference/{split}/{name}" for name in ("data-00000-of-00001.arrow", "state.json")}


def test_what_was_there_stays_until_all_is_written(tmp_path):
    rows = make_rows(4)
    build(tmp_path, rows)
    before = (tmp_path / "dataset" / "README.md").read_bytes()
    with pytest.raises(ValueError, match="more verdicts than candidates|Judge these candidates again"):
        build(tmp_path, (rows[0][:-1], rows[1], rows[2]))
    with pytest.raises(KeyError, match="settings"):
        build(tmp_path, rows, records={"judge": {}})
    assert (tmp_path / "dataset" / "README.md").read_bytes() == before and len(of_form(tmp_path, "ranked")) == 4
    build(tmp_path, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_one_prompt_at_a_time():
    read = []

    def kept():
        for row in make_rows(3)[2]:
            read.append(row["prompt_id"])
            yield row

    next(unpaired_rows(kept()))
    assert read == ["p0", "p0", "p0", "p1"]


# The card


def tables_of(text: str) -> dict[str, list[list[str]]]:
    """The rows of the tables of a Markdown text by the first cell of their head, as a reader sees them."""
    tables, rows = {}, []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for i, token in enumerate(tokens):
        assert token.type != "html_block"
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open"):
            children = tokens[i + 1].children
            assert {child.type for child in children} <= {"text", "text_special", "code_inline"}
            rows[-1].append("".join(child.content for child in children))
        elif token.type == "table_close":
            assert len({len(row) for row in rows}) == 1
            tables.setdefault(rows[0][0], []).extend(rows[1:])
    return tables


def shown(text: str) -> str:
    """What a cell shows of a text: all of it in one line."""
    return " ".join("".join(c if c.isprintable() or c == "\u200d" else " " for c in text).split())


def test_cells_show_what_is_in_them():
    rng = random.Random(0)
    pieces = ["|", "\\", "`", "``", "*", "**", "_", "__", "~~", "<b>", "</td>", "<!--", "&amp;", "&", "#", "-", "1. "]
    pieces += [
        "[a](http://b)",
        "![a](b)",
        "http://c.d",
        "<http://e>",
        "$x$",
        "{{ 7 * 7 }}",
        "{% x %}",
        "\n",
        "\n\n---\n",
    ]
    pieces += [
        "word",
        " ",
        "\t",
        "\r",
        "\u2028",
        "é",
        "👩‍👧",
        "|---|",
        ">",
        "=",
        "+",
        "!",
        "]",
        "(",
        ":",
        "a@b.c",
        "www.x.y",
    ]
    for _ in range(2000):
        text = "x" + "".join(rng.choices(pieces, k=rng.randint(0, 8)))
        assert len(shown(text)) <= 100
        rows = tables_of(f"| a | b |\n| --- | --- |\n| {cell(text)} | {cell(text)} |\n")["a"]
        assert rows == [[shown(text)] * 2]
    # Nor are what some readers make links of without being told
    assert not any(link in cell("http://a www.b c@d") for link in ("http://", "www.", "@"))
    assert len(shown(cell("x" * 500))) == 100 and cell("x" * 500).endswith("…")


@pytest.fixture
def told(tmp_path) -> tuple[dict, dict]:
    """The config of a run, and the records of its stages."""
    critics = [
        {"type": "endpoint", "name": "a|b", "model": "m/1", "base_url": "https://me:pass@host:8000/v1?api-key=sesame"},
        {"type": "endpoint", "name": "b", "model": "m/2", "rubric": "honesty", "weight": 2, "prompt_price": 1.5},
        {"type": "rule", "name": "sums", "function": "file.py:check"},
        {"type": "reward", "name": "rm", "model": "m/3", "max_length": 512},
    ]
    config = make_config(
        tmp_path / "run\n```\nx",
        prompts={
            "dataset": {"path": "some/prompts", "split": "train", "token": "sesame"},
            "topic_column": "topic",
        },
        judge={"critics": critics, "num_comparisons": 3},
        check={"dataset": {"path": "json", "data_files": "check ```\n```.jsonl", "split": "train"}},
        pairs={"filters": {"min_confidence": 0.25, "max_length_ratio": 3}},
        dataset={"push_to_hub": "me/set"},
    )
    config["candidates"]["student"]["model_kwargs"] = {"token": "sesame", "storage_options": {"secret": "sesame"}}
    config = complete(config)
    statuses = [("vote", 1.0)] * 6 + [("flipped", None)] * 3 + [("tie", 0.5)]
    rows = []
    for i, (status, share) in enumerate(statuses):
        orders = {"vote": ["A", "B"], "flipped": ["A", "A"], "tie": ["tie", "tie"]}[status]
        votes = [
            make_vote("a|b", share, status, verdicts=orders, tokens=[1000, 10], cost=0.0),
            make_vote("b", 0.0 if i < 2 else 1.0, verdicts=["B", "A"], tokens=[500, 20], cost=0.25),
        ]
        first = i >= 2
        rows.append({"prompt_id": f"p{i}", "response_ids": ["a", "b"], "lengths": [20, 10], "votes": votes})
        rows[-1] |= {"share": 0.9 if first else 0.4, "winner": "ab"[1 - first], "confidence": 0.8, "truth": None}
    topic = {
        "topic": "a | b\n",
        "prompts": 9,
        "share": 0.9,
        "examples": ["{{ 7 * 7 }} <script>x()</script> | `y`\n---"],
    }
    student = {"kind": "transformers", "model": "m/0", "revision": "abc123", "weights": "0123", "top_p": 0.9}
    judge, check = config["judge"], human_check(rows, [0] * 10)
    reports = {
        "prompts": {
            "prompts": 12345,
            "kept": 10,
            "dropped": {"duplicate": 1234},
            "topics": {"effective_number": 1.38, "of": [topic]},
        },
        "candidates": {"student": student, "num_responses": 4, "temperatures": [0.7, 1.0], "prompts": {"rows": 10}},
        "check": check,
        "judge": agreement_report(rows),
        "pairs": {"kept": 8, "dropped": {"tie": 1, "low confidence": 2}},
    }
    settings = {
        **{stage: {**config[stage], "seed": 42} for stage in ("prompts", "candidates", "pairs")},
        "check": {**config["check"], "critics": judge["critics"]},
        "judge": {"critics": judge["critics"], "num_comparisons": 3},
    }
    records = {stage: {"settings": settings[stage], "inputs": {}, "report": reports[stage]} for stage in reports}
    return config, copy.deepcopy(records)


COUNTS = {form: {"train": 1900, "test": 100} for form in FORMS}


def test_card(told):
    config, records = told
    card = make_card("my_run", COUNTS, config, records)
    assert card.data.tags == ["trl", "trl_spo", "preference", "synthetic"] and card.data.size_categories == [
        "1K<n<10K"
    ]
    assert card.data.task_categories == ["text-generation"]
    tables = tables_of(card.text)
    assert tables["form"][0][:3] == ["preference", "1,900", "100"]
    assert ["duplicate", "1,234"] in tables["dropped"] and ["low confidence", "2"] in tables["dropped"]
    assert tables["topic"] == [["a | b", "9", "90.0 %", "{{ 7 * 7 }} <script>x()</script> | `y` ---"]]
    settings = tables["setting"]
    for row in (
        ["student.revision", "abc123"],
        ["student.weights", "0123"],
        ["temperatures", "[0.7, 1.0]"],
        ["min_confidence", "0.25"],
        ["max_length_ratio", "3"],
        ["max_similarity", "0.95"],  # which was left to its default
        ["dataset.path", "some/prompts"],
        ["data_files", "check ``` ```.jsonl"],
    ):
        assert row in settings
    jury = tables["critic"][:4]
    assert [row[:6] for row in jury] == [
        ["a|b", "endpoint", "m/1", "host:8000", "helpfulness", "1.0"],
        ["b", "endpoint", "m/2", "the client's default", "honesty", "2"],
        ["sums", "rule", "file.py:check", "–", "–", "1.0"],
        ["rm", "reward", "m/3", "–", "–", "1.0"],
    ]
    assert "api_key_env: OPENAI_API_KEY" in jury[1][6] and "max_completion_tokens: 1024" in jury[1][6]
    assert "prompt_price: 1.5" in jury[1][6] and "max_length: 512" in jury[3][6]
    asked, rates, worth = tables["critic"][4:6], tables["critic"][6:9], tables["critic"][9:]
    assert asked == [
        ["a|b", "10", "6", "1", "3", "0", "0", "0", "10,000", "100", "0.00"],
        ["b", "10", "10", "0", "0", "0", "0", "0", "5,000", "200", "2.50"],
    ]
    # Wilson's intervals of 3 of 9, 12 of 18, 6 of 6 and 4 of 6
    assert rates[0] == [
        "a|b",
        "33.3 % (12.1 to 64.6; 9)",
        "66.7 % (43.7 to 83.7; 18)",
        "100.0 % (61.0 to 100.0; 6)",
        "66.7 % (30.0 to 90.3; 6)",
    ]
    assert rates[2][0] == "the jury" and rates[2][3] == "80.0 % (49.0 to 94.3; 10)"
    assert [row[0] for row in worth] == ["a|b", "b"]
    people = {row[0]: row[1:] for row in tables["who"]}
    assert set(people) == {"the jury", "the longer response wins", "a|b", "b"}
    assert people["the jury"][:2] == ["10", "100.0 % (100.0 to 100.0)"]
    assert people["the jury"][2].startswith("80.0 % (") and people["the longer response wins"][2].startswith("100.0 %")
    assert people["the jury"][4] == "–" and "There is no kappa of the jury. People prefer the first" in card.text
    assert "had to agree in 60.0 %" in card.text and "claimed to be right" in tables
    alpha = records["judge"]["report"]["alpha"]
    assert f"over 7 pairs with votes or ties of two critics: {alpha['alpha']:.2f} (" in card.text
    assert "2.50 for the critics' answers on the candidates" in card.text
    assert ": 0.00125 for each pair in the dataset" in card.text
    assert 'load_dataset("me/set", "preference")' in card.text and "done with other settings" not in card.text
    assert "The jury decided 10 of 10 pairs, with a mean confidence of 0.80" in card.text


def test_card_has_the_whole_config_and_no_secret(told, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    config, records = told
    records["candidates"]["report"]["student"]["base_url"] = "https://me:sesame@host/v1?key=sesame"
    text = str(make_card("run", COUNTS, config, records))
    assert "sesame" not in text and "me:pass" not in text
    (fence,) = (token for token in MarkdownIt().parse(text) if token.type == "fence" and token.info == "yaml")
    found = yaml.safe_load(fence.content)
    config["prompts"]["dataset"]["token"] = "(left out)"
    config["candidates"]["student"]["model_kwargs"] = {
        "token": "(left out)",
        "storage_options": {"secret": "(left out)"},
    }
    config["judge"]["critics"][0]["base_url"] = "https://host:8000/v1?(left out)"
    assert found == config and complete(found) == config
    assert "put in those that are `(left out)`" in text


def test_what_is_a_secret():
    kept = {
        "api_key_env": "NAME",
        "max_new_tokens": "12",
        "eos_token": "</s>",
        "token": True,
        "texts": ["see https://me:pw@host?x=y", "http://[", "a@b://c@d", "hf://datasets/a/b@main/data-????.jsonl"],
        "monkey": "1",
    }
    assert without_secrets(kept) == kept
    for name in (
        "token",
        "hf_token",
        "api_key",
        "apiKey",
        "X-Api-Key",
        "key",
        "secret",
        "aws_secret_access_key",
        "Authorization",
    ):
        assert without_secrets([{name: {"a": 1, name: ["x"]}}]) == [{name: {"a": 1, name: ["(left out)"]}}]
    assert without_secrets({"credentials": {"value": "x"}, "password": 12345, "n": 1}) == {
        "credentials": {"value": "(left out)"},
        "password": "(left out)",
        "n": 1,
    }
    assert without_secrets(["http://me:pw@host/a?b=c#d", "s3://me@bucket/?"]) == [
        "http://host/a?(left out)",
        "s3://bucket/?",
    ]


def test_card_tells_what_is_not_known(told):
    config, records = told
    config["judge"]["critics"][1]["weight"] = 3
    assert "The stages judge, check were done with other settings" in make_card("run", COUNTS, config, records).text
    config["check"] = None  # there is a report of an earlier run
    text = make_card("run", COUNTS, config, records).text
    assert "There was no human check set" in text and "Cohen" not in text
    records["judge"]["report"] = agreement_report([])
    text = make_card("run", COUNTS, config, records).text
    assert "There is no Krippendorff's alpha. Fewer than two critics" in text
    text = make_card("run", COUNTS, config, {}).text
    assert "They were not prepared by this run" in text and "It is not known" in text
    del config["judge"]["critics"][1]["prompt_price"]
    records["judge"]["settings"] = config["judge"]
    assert "only their tokens were counted" in make_card("run", COUNTS, config, records).text


# The Hub


def make_synthesis(folder: Path, **options) -> Synthesis:
    return Synthesis(from_dict(SynthesisConfig, make_config(folder, **options), ""))


@pytest.mark.parametrize("repo_id", ["a/b/c", "datasets/a/b", "a b", "-a", "a--b", "a/b.git", ""])
def test_no_name_of_a_repository(tmp_path, monkeypatch, repo_id):
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    with pytest.raises(ValueError, match=r"`dataset.push_to_hub='.*'` is no name of a repository, such as"):
        make_synthesis(tmp_path / "run", dataset={"push_to_hub": repo_id})
    assert not (tmp_path / "run").exists()


def test_no_token(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ValueError, match=r"`dataset.push_to_hub='a/b'` needs a token .* `hf auth login`"):
        make_synthesis(tmp_path / "run", dataset={"push_to_hub": "a/b"})
    make_synthesis(tmp_path / "run")
    (tmp_path / "token").write_text("hf_sesame")
    make_synthesis(tmp_path / "run", dataset={"push_to_hub": "a/b"})


TOKEN = "hf_of_the_test"

# Pushes to where that is forbidden, then to a repository, again after a person has changed its card, and when the server is gone
CLIENT = """
import json, logging, sys, traceback, urllib.request
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi
from trl_spo.synthetic.output import push

first, second, url = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def try_push(repo_id):
    try:
        push(first, repo_id)
    except RuntimeError as error:
        return {"error": str(error), "traceback": traceback.format_exc()}

def on_hub():
    card, files = DatasetCard.load("somebody/set"), HfApi().list_repo_files("somebody/set", repo_type="dataset")
    loaded = {
        form: {split: rows.to_list() for split, rows in load_dataset("somebody/set", *form).items()}
        for form in ((), ("preference",), ("ranked",), ("unpaired",))
    }
    return {
        "card": {"text": card.text, **card.data.to_dict()},
        "files": files,
        "loaded": {"".join(form): splits for form, splits in loaded.items()},
    }

def log():
    with urllib.request.urlopen(f"{url}/log") as answer:
        return json.load(answer)

found = {"forbidden": try_push("forbidden/set")}
push(first, "set", private=True)
found["on_hub"] = on_hub()
card = DatasetCard.load("somebody/set")
card.data["license"], card.text = "mit", "Mine."
card.data["configs"].append({"config_name": "mine", "data_files": "mine.csv"})
card.push_to_hub("somebody/set")
push(second, "somebody/set")
found["on_hub_again"] = on_hub()
found["log"] = log()
urllib.request.urlopen(f"{url}/stop", data=b"").close()
found["gone"] = try_push("somebody/set")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> dict:
    """What came of the pushes of the client."""
    folder = tmp_path_factory.mktemp("push")
    for name, share in (("first", 0.5), ("second", 0.0)):
        (folder / name).mkdir()
        build(folder / name, make_rows(12, conversational=True), share)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("hub_server.py"))], stdout=subprocess.PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "cache")}
        env |= {"HF_HUB_DISABLE_XET": "1"}  # whose storage is another server
        arguments = [str(folder / "first" / "dataset"), str(folder / "second" / "dataset"), url]
        client = subprocess.run([sys.executable, "-c", CLIENT, *arguments], env=env, capture_output=True, text=True)
    finally:
        server.kill()
        server.wait()
    assert client.returncode == 0, client.stderr[-5000:]
    return {**json.loads(client.stdout.splitlines()[-1]), "output": client.stdout + client.stderr, "folder": folder}


def local_rows(folder: Path, form: str) -> list[dict]:
    splits = load_from_disk(str(folder / "dataset" / form))
    return sorted((row for rows in splits.values() for row in rows), key=json.dumps)


def test_push(pushed):
    hub = pushed["on_hub"]
    parquet = [f"{form}/{split}-00000-of-00001.parquet" for form in FORMS for split in ("test", "train")]
    assert sorted(hub["files"]) == [".gitattributes", "README.md", *parquet]
    assert pushed["log"]["private"]["somebody/set"] is True
    for form in FORMS:
        assert set(hub["loaded"][form]) == {"train", "test"}
        found = sorted((row for rows in hub["loaded"][form].values() for row in rows), key=json.dumps)
        assert found == local_rows(pushed["folder"] / "first", form)
    assert hub["loaded"][""] == hub["loaded"]["preference"]
    card = hub["card"]
    assert [(config["config_name"], config.get("default")) for config in card["configs"]] == [
        ("preference", True),
        ("ranked", None),
        ("unpaired", None),
    ]
    assert {
        some["config_name"]: [split["num_examples"] for split in some["splits"]] for some in card["dataset_info"]
    } == {
        "preference": [len(hub["loaded"]["preference"][split]) for split in ("train", "test")],
        "ranked": [len(hub["loaded"]["ranked"][split]) for split in ("train", "test")],
        "unpaired": [len(hub["loaded"]["unpaired"][split]) for split in ("train", "test")],
    }
    assert card["tags"] == ["trl", "trl_spo", "preference", "synthetic"] and "## Limits" in card["text"]


def test_push_again(pushed):
    """The files of a split that is no more are gone, and what people have added to the card's metadata stays."""
    hub = pushed["on_hub_again"]
    parquet = [f"{form}/train-00000-of-00001.parquet" for form in FORMS]
    assert sorted(hub["files"]) == [".gitattributes", "README.md", *parquet]
    for form in FORMS:
        assert list(hub["loaded"][form]) == ["train"]
        assert sorted(hub["loaded"][form]["train"], key=json.dumps) == local_rows(pushed["folder"] / "second", form)
    assert hub["card"]["license"] == "mit"
    assert hub["card"]["configs"] == [
        {
            "config_name": form,
            "data_files": [{"split": "train", "path": f"{form}/train-*"}],
            **({"default": True} if form == "preference" else {}),
        }
        for form in FORMS
    ] + [{"config_name": "mine", "data_files": "mine.csv"}]
    text = hub["card"]["text"]
    assert text == (pushed["folder"] / "second" / "dataset" / "README.md").read_text().partition("\n---\n")[2]


@pytest.mark.parametrize(
    ("which", "repo", "why"),
    [("forbidden", "forbidden/set", "403 Forbidden"), ("gone", "somebody/set", "refused|disconnected|reset")],
)
def test_failed_push(pushed, which, repo, why):
    error, folder = pushed[which]["error"], pushed["folder"] / "first" / "dataset"
    assert re.fullmatch(
        rf"The dataset was not pushed to '{repo}' \(`dataset.push_to_hub`\), or not all of it: .*({why})(.*[^.])?\. It is complete in "
        rf"'{re.escape(str(folder))}'; run the stage `dataset` again to push it\.",
        error,
        re.DOTALL,
    )


def test_failed_push_of_a_run(tmp_path, monkeypatch):
    """The stage is not done, and its dataset is there."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    rows = make_rows(6)
    for name, some in zip(("candidates", "verdicts", "kept"), rows, strict=True):
        (tmp_path / "run").mkdir(exist_ok=True)
        write_rows(tmp_path / "run" / f"{name}.jsonl", some)
    write_json(tmp_path / "run" / "stages.json", {})
    synthesis = make_synthesis(tmp_path / "run", dataset={"push_to_hub": "a/b", "test_share": 0.5})
    with pytest.raises(RuntimeError, match="not pushed to 'a/b' .*offline.* run the stage `dataset` again"):
        synthesis.run(["dataset"])
    assert synthesis.records == {}
    build(tmp_path / "expected" / "run", rows)
    for form in FORMS:
        assert of_form(tmp_path / "run", form) == of_form(tmp_path / "expected" / "run", form)
    assert 'load_dataset("a/b", "preference")' in (tmp_path / "run" / "dataset" / "README.md").read_text()
    make_synthesis(tmp_path / "run", dataset={"test_share": 0.5}).run(["dataset"])
    assert list(synthesis.records) == ["dataset"]
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []


def test_the_token_is_nowhere(pushed):
    assert (
        "POST /api/repos/create" in pushed["log"]["log"] and len(pushed["output"]) > 10000
    )  # what was looked through
    texts = [pushed["output"], json.dumps([pushed[name] for name in pushed if name not in ("output", "folder")])]
    texts += [path.read_text(errors="replace") for path in pushed["folder"].rglob("*") if path.is_file()]
    assert not any(TOKEN in text for text in texts)
