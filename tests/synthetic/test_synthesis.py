# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""From prompts to a dataset, with a tiny student and scripted critics."""

import json
import math
from pathlib import Path

import pytest
import yaml
from datasets import load_from_disk
from scipy.optimize import brentq

from trl_spo.cli.main import main
from trl_spo.synthetic.check_set import HumanCheckError
from trl_spo.synthetic.endpoint import SpendingLimitError
from trl_spo.synthetic.files import Rows
from trl_spo.synthetic.prompts import split_of
from trl_spo.synthetic.synthesis import Synthesis
from trl_spo.synthetic.synthesis_config import SynthesisConfig, from_dict


FILES = ["prompts.jsonl", "candidates.jsonl", "verdicts.jsonl", "kept.jsonl", "dropped.jsonl"]


@pytest.fixture
def make(server, model_path, tmp_path):
    """`make(**options)`: a run with options such as `pairs={"pairing": "all"}`."""
    prompts = [{"prompt": f"Who is number {i}, and where?", "topic": "ab"[i % 2]} for i in range(24)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*prompts, prompts[3]]))

    def critic(name: str, **options) -> dict:
        return {
            "type": "endpoint",
            "name": name,
            "model": name,
            "base_url": server.url,
            "api_key_env": None,
            **options,
        }

    def make(critics=("longer",), **options) -> Synthesis:
        config = {
            "output_dir": str(tmp_path / "run"),
            "prompts": {
                "dataset": {"path": "json", "data_files": str(path), "split": "train"},
                "near_duplicates": None,
            },
            "candidates": {
                "student": {"type": "transformers", "model": model_path, "max_new_tokens": 12, "batch_size": 8},
                "num_responses": 3,
            },
            "judge": {"critics": [critic(c) if isinstance(c, str) else critic(**c) for c in critics]},
        }
        for stage, values in options.items():
            config[stage] = {**config.get(stage, {}), **values} if isinstance(values, dict) else values
        return Synthesis(from_dict(SynthesisConfig, config, ""))

    return make


@pytest.fixture
def human_set(tmp_path):
    """`human_set(better, worse)`: the options of a check set of as many pairs as texts."""

    def make(better: list[str], worse: list[str]) -> dict:
        rows = [
            {"prompt": f"Which one, {i}?", "chosen": b, "rejected": w}
            for i, (b, w) in enumerate(zip(better, worse, strict=True))
        ]
        path = tmp_path / "human.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"dataset": {"path": "json", "data_files": str(path), "split": "train"}}

    return make


def test_all_stages(make, tmp_path):
    folder = make(prompts={"topic_column": "topic"}).run()
    run = tmp_path / "run"
    reports = {stage: record["report"] for stage, record in json.loads((run / "stages.json").read_text()).items()}
    assert reports["prompts"]["kept"] == 24 and reports["prompts"]["dropped"] == {"duplicate": 1}
    candidates = list(Rows(run / "candidates.jsonl"))
    assert [len(row["responses"]) for row in candidates] == [3] * 24 and {row["topic"] for row in candidates} == {
        "a",
        "b",
    }
    assert len(Rows(run / "verdicts.jsonl")) == 24 * 3
    kept, dropped = list(Rows(run / "kept.jsonl")), list(Rows(run / "dropped.jsonl"))
    assert len(kept) + len(dropped) == 24 and reports["pairs"]["kept"] == len(kept) > 12
    for row in kept:
        texts = next(c["responses"] for c in candidates if c["prompt_id"] == row["prompt_id"])
        assert (len(row["chosen"]), len(row["rejected"])) == (
            max(len(t["text"]) for t in texts),
            min(len(t["text"]) for t in texts),
        )

    splits = load_from_disk(str(folder / "preference"))
    assert sum(split.num_rows for split in splits.values()) == len(kept)
    row = splits["train"][0]
    assert row["confidence"] == 1 and row["margin"] > 0 and len(row["chosen"]) > len(row["rejected"])
    assert row["votes"] == [{"critic": "longer", "status": "vote", "for_chosen": 1.0}] and len(row["rationales"]) == 2
    ranked = load_from_disk(str(folder / "ranked"))["train"]
    for row in ranked:
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert [len(text) for text in row["completions"]] == sorted(map(len, row["completions"]), reverse=True)
    unpaired = load_from_disk(str(folder / "unpaired"))["train"]
    assert sum(unpaired["label"]) == len(unpaired) / 2 == splits["train"].num_rows
    for form in (splits["train"], ranked, unpaired):
        assert all(split_of(row["provenance"]["prompt_id"], 0.05) == "train" for row in form)


def test_again(make, server, tmp_path):
    make().run()
    run = tmp_path / "run"
    before = {name: ((run / name).stat().st_mtime_ns, (run / name).read_bytes()) for name in FILES}
    requests = server.log()["requests"]
    make().run()
    assert {name: ((run / name).stat().st_mtime_ns, (run / name).read_bytes()) for name in FILES} == before
    make().run(["judge", "pairs"])
    assert {name: (run / name).read_bytes() for name in FILES} == {
        name: content for name, (_, content) in before.items()
    }
    assert server.log()["requests"] == requests


def test_another_setting(make, server, tmp_path):
    make().run()
    requests = server.log()["requests"]
    honest = [{"name": "longer", "rubric": "honesty"}, "right"]
    before = (tmp_path / "run" / "verdicts.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"the stage `judge` of another run: .*`critics` changed. .*synthesize CONFIG judge"
    ):
        make(honest).run()
    assert server.log()["requests"] == requests and (tmp_path / "run" / "verdicts.jsonl").read_bytes() == before
    make(honest).run(["judge", "pairs", "dataset"])
    assert server.log()["requests"] > requests
    make(honest).run()


def test_other_rows_in_the_same_place(make, human_set, server, tmp_path):
    """What a path or a name does not tell: rows that were added, a rubric that was changed."""
    rubric = tmp_path / "mine.jinja"
    rubric.write_text("Which is longer?\n{% include '_responses.jinja' %}")
    critics = [{"name": "longer", "rubric": str(rubric)}]
    check = human_set([f"a longer one {i}" for i in range(12)], [f"short {i}" for i in range(12)])
    weak = {"min_agreement": 0.1}
    make(critics, check=check | weak).run()
    requests = server.log()["requests"]
    make(critics, check=check | weak).run()
    assert server.log()["requests"] == requests
    path = Path(check["dataset"]["data_files"])
    rows, more = path.read_text(), {"prompt": "Which one, at last?", "chosen": "the longest of all", "rejected": "no"}
    path.write_text(rows + json.dumps(more) + "\n")
    with pytest.raises(ValueError, match="the stage `check` of another run: check.dataset changed"):
        make(critics, check=check | weak).run()
    path.write_text(rows)
    rubric.write_text("Which has more characters?\n{% include '_responses.jinja' %}")
    with pytest.raises(ValueError, match="the stage `check` of another run: the critic 'longer' changed"):
        make(critics, check=check | weak).run()
    rubric.write_text("Which is longer?\n{% include '_responses.jinja' %}")
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "And who is the last one?", "topic": "a"}) + "\n")
    with pytest.raises(ValueError, match="the stage `prompts` of another run: prompts.dataset changed"):
        make(critics, check=check | weak).run()


def test_the_overlap_is_found_whenever_the_check_set_changes(make, human_set, tmp_path):
    check = human_set([f"a longer one {i}" for i in range(12)], [f"short {i}" for i in range(12)])
    make(check=check).run()
    path = Path(check["dataset"]["data_files"])
    path.write_text(path.read_text().replace("Which one, 0?", "who is number 3,  and where?"))
    with pytest.raises(ValueError, match="number 3"):
        make(check=check).run(["check"])


def test_a_rubric_with_a_column_of_the_prompts(make, tmp_path):
    rubric, base = tmp_path / "mine.jinja", tmp_path / "base.jinja"
    base.write_text("Which is longer, about {{ topic }}?")
    rubric.write_text("{% include 'base.jinja' %}\n{% include '_responses.jinja' %}")
    critics = [{"name": "longer", "rubric": str(rubric)}]
    make(critics).run()
    make(critics).run()
    base.write_text("Which has more characters, about {{ topic }}?")
    with pytest.raises(ValueError, match="the stage `judge` of another run: the critic 'longer' changed"):
        make(critics).run()
    rubric.write_text("About {{ colour }}\n{% include '_responses.jinja' %}")
    with pytest.raises(ValueError, match=r"a field that the prompts have no column for: 'colour' is undefined"):
        make(critics).run(["prompts"])


def test_a_jury_is_not_trained_on_unless_it_was_checked(make, human_set, tmp_path):
    check = human_set([f"a longer one {i}" for i in range(12)], [f"short {i}" for i in range(12)])
    make(check=check).run()
    with pytest.raises(
        ValueError, match="the critic 'right' changed since the human check. Name the stage `check`, too"
    ):
        make(["longer", "right"], check=check).run(["judge", "pairs"])
    wrong = human_set([f"short {i}" for i in range(12)], [f"a longer one {i}" for i in range(12)])
    with pytest.raises(HumanCheckError, match="agrees with people in 0.0%"):
        make(check=wrong).run(["check"])
    with pytest.raises(ValueError, match="check.dataset changed since the human check"):
        make(check=wrong).run(["judge", "pairs"])
    with pytest.raises(ValueError, match="check.dataset changed since the human check"):
        make(check=wrong).run(["pairs", "dataset"])


def test_stages_without_what_they_need(make, human_set, tmp_path):
    for stage in ("check", "reward_model"):
        with pytest.raises(ValueError, match=f"The config has no `{stage}`, and the stage of this name was asked for"):
            make().run([stage])
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.jsonl"))
    wrong = human_set([f"short {i}" for i in range(12)], [f"a longer one {i}" for i in range(12)])
    make(check=wrong).run(["prompts", "candidates"])
    with pytest.raises(HumanCheckError):
        make(check=wrong).run(["check"])
    with pytest.raises(ValueError, match="has not passed the human check .* Name the stage `check`"):
        make(check=wrong).run(["judge"])


def test_candidates_again(make, tmp_path):
    make().run(["prompts", "candidates"])
    with pytest.raises(ValueError, match="`num_responses` changed.*remove `candidates.jsonl`, too"):
        make(candidates={"num_responses": 2}).run()
    (tmp_path / "run" / "candidates.jsonl").unlink()
    make(candidates={"num_responses": 2}).run(["candidates"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "candidates.jsonl").read_text().splitlines()]
    assert {len(row["responses"]) for row in rows} == {2}


def test_the_spending_limit_is_of_all_starts(make, tmp_path):
    prices = {"name": "longer", "prompt_price": 1.0, "completion_price": 10.0, "max_completion_tokens": 30}
    limit = {"max_cost": 0.02}
    for _ in range(2):
        run = make([prices], judge=limit)
        with pytest.raises(SpendingLimitError):
            run.run()
        assert 0.01 < run.budget.spent <= 0.02
    make([prices], judge={"max_cost": 1.0}).run()


def test_a_kill_at_the_very_beginning(make, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".stages.json.somewhere.123").write_text("{")
    make()


def test_a_replaced_file(make, tmp_path):
    make().run()
    path = tmp_path / "run" / "candidates.jsonl"
    rows = list(Rows(path))
    rows[0]["responses"][0]["text"] = (
        " replaced by hand, and the longest of all responses that there are in the whole file"
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="the stage `judge` of another run: candidates.jsonl changed"):
        make().run()
    make().run(["judge", "pairs", "dataset"])
    assert next(iter(Rows(tmp_path / "run" / "kept.jsonl")))["chosen"].startswith(" replaced by hand")


def test_all_pairs_and_their_reasons(make, tmp_path):
    make(
        ["longer", "first"],
        pairs={"pairing": "all", "filters": {"min_confidence": 0.1}},
        candidates={"num_responses": 4},
    ).run()
    run = tmp_path / "run"
    rows = [*Rows(run / "kept.jsonl"), *Rows(run / "dropped.jsonl")]
    assert len(rows) == 24 * 6
    reasons = {row["reason"] for row in Rows(run / "dropped.jsonl")}
    assert "tie" in reasons and reasons <= {"tie", "no votes", "empty response", "near-identical responses"}
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in Rows(run / "kept.jsonl"))


def test_human_check(make, human_set, server, tmp_path):
    good, bad = [f"quality {3 + i % 2}" for i in range(30)], [f"quality {i % 3} " + "x" * (i % 5) for i in range(30)]
    weak = {"filters": {"min_confidence": 0.2}}
    make([{"name": "right", "weight": 3}, "longer"], check=human_set(good, bad), pairs=weak).run()
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    assert report["critics"]["right"]["agreement"]["value"] == 1 and report["critics"]["right"]["kappa"]["value"] == 1
    assert report["longer"]["agreement"]["value"] == report["critics"]["longer"]["agreement"]["value"] < 0.2


def test_probabilities_are_those_of_the_human_check_set(make, human_set, tmp_path):
    def check(right: int, wrong: int) -> tuple[dict, float]:
        """A check set of which the longer response is right in so many pairs, and what a vote for it is worth."""
        long, short = [f"a longer one {i}" for i in range(right + wrong)], [f"short {i}" for i in range(right + wrong)]
        options = human_set(long[:right] + short[right:], short[:right] + long[right:])
        log_odds = brentq(lambda a: right - (right + wrong) / (1 + math.exp(-a)) - a, -10, 10)
        return options, 1 / (1 + math.exp(-log_odds))

    options, worth = check(25, 5)
    run, filters = tmp_path / "run", {"filters": {"min_probability": 0.7}}
    folder = make(check=options, pairs=filters).run()
    probabilities = [row["probability"] for row in Rows(run / "kept.jsonl")]
    assert len(probabilities) > 12 and probabilities == pytest.approx([worth] * len(probabilities))
    assert load_from_disk(str(folder / "preference"))["train"]["probability"][0] == pytest.approx(worth)
    options, worth = check(22, 8)
    make(check=options, pairs=filters).run(["check"])
    with pytest.raises(ValueError, match="the stage `judge` of another run: check.json changed"):
        make(check=options, pairs=filters).run()
    make(check=options, pairs=filters).run(["judge"])
    with pytest.raises(ValueError, match="the stage `pairs` of another run: check.json changed"):
        make(check=options, pairs=filters).run()
    with pytest.raises(ValueError, match=rf"No pair is left: .*'low probability': {len(probabilities)}\b"):
        make(check=options, pairs={"filters": {"min_probability": 0.8}}).run(["pairs"])
    make(check=options, pairs=filters).run(["pairs", "dataset"])
    assert next(iter(Rows(run / "kept.jsonl")))["probability"] == pytest.approx(worth)
    honest = [{"name": "right"}, {"name": "longer"}]
    with pytest.raises(ValueError, match="the critic 'right' changed since the human check"):
        make(honest, check=options, pairs=filters).run(["judge"])


def test_a_jury_that_rewards_length_is_stopped(make, human_set, server, tmp_path):
    check = human_set([f"good {i}" for i in range(30)], [f"bad, but much longer {i}" for i in range(30)])
    with pytest.raises(HumanCheckError, match=r"agrees with people in 0.0% of 30 pairs .*`min_agreement=0.6`"):
        make(check=check).run()
    run = tmp_path / "run"
    assert not (run / "candidates.jsonl").exists() and not (run / "dataset").exists()
    assert sum(server.log()["answered"].values()) == 1 + 60


def test_a_jury_that_rewards_length_is_stopped_though_people_like_it_too(make, human_set, tmp_path):
    better, worse = [f"good {i} and long" for i in range(30)], [f"bad {i}" for i in range(30)]
    short, long = [f"good {i}" for i in range(12)], [f"bad, but much longer {i}" for i in range(12)]
    check = human_set([*better, *short], [*worse, *long])
    with pytest.raises(
        HumanCheckError, match=r"goes by length: it agrees with people in 71.4% of 42 pairs, and in 50.0%"
    ):
        make(check=check).run()
    assert not (tmp_path / "run" / "dataset").exists()


def test_check_set_of_training_prompts(make, human_set, tmp_path):
    check = human_set(["a"], ["b"])
    path = Path(check["dataset"]["data_files"])
    path.write_text(path.read_text().replace("Which one, 0?", "who is number 3,  and where?"))
    with pytest.raises(ValueError, match="number 3"):
        make(check=check).run()
    assert not (tmp_path / "run" / "check_verdicts.jsonl").exists()


def test_spending_limit(make, tmp_path):
    with pytest.raises(SpendingLimitError):
        make([{"name": "longer", "prompt_price": 1.0}], judge={"max_cost": 1e-5}).run()
    assert not (tmp_path / "run" / "verdicts.jsonl").exists()


def test_another_folder(make, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "verdicts.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"\(`output_dir`\) holds something else. Name another one"):
        make()
    assert (tmp_path / "run" / "verdicts.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": {"pairing": "worst"}}, "`pairs.pairing` must be one of .*got 'worst'"),
        ({"pairs": {"filters": {"min_trust": 1}}}, "`min_trust` is no option of `pairs.filters`"),
        ({"pairs": {"filters": {"min_confidence": 2}}}, "`min_confidence` must be from 0 to 1, got 2"),
        (
            {"pairs": {"filters": {"min_probability": 0.7}}},
            "`pairs.filters.min_probability=0.7` needs .* human check set",
        ),
        ({"dataset": {"test_share": 1.0}}, "`dataset.test_share` must be from 0 to below 1"),
        ({"prompts": {"limit": 1}}, "There is no option `prompts.limit`"),
        ({"check": {}}, "The option `check.dataset` is missing"),
        ({"output": {}}, "There is no option `output`"),
        ({"candidates": {"student": {"type": "oracle"}}}, "`type` of the student must be one of .*got 'oracle'"),
        (
            {"candidates": {"student": {"type": "transformers"}}},
            "options of a student of type `transformers` are incomplete: .*'model'",
        ),
        ({"critics": []}, "A jury needs a critic"),
        ({"critics": [{"name": "a", "type": "person"}]}, "`type` of a critic must be .*got 'person'"),
        ({"critics": [{"name": "a", "mood": 1}]}, "`mood` is no option of a critic of type `endpoint`"),
        (
            {"critics": [{"name": "a", "type": "rule", "function": "nowhere:rule"}]},
            "`base_url` is no option of a critic of type `rule`|There is no function 'nowhere:rule'",
        ),
    ],
)
def test_bad_options(make, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(**options)
    assert not (tmp_path / "run").exists()


def test_command(make, tmp_path, capsys):
    synthesis = make()
    from dataclasses import asdict

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(synthesis.config)))
    assert main(["synthesize", str(tmp_path / "config.yaml")]) == 0
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "run" / "dataset"))
    with pytest.raises(ValueError, match="There is no stage 'train'"):
        main(["synthesize", str(tmp_path / "config.yaml"), "train"])
