# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
Makes a preference dataset with a jury of critics, stage by stage: a script to copy and change. `trl-spo synthesize` does the same without
one, and also knows which stages are done, and refuses to mix files of different runs.

```bash
export OPENAI_API_KEY=...
python examples/synthetic.py --config examples/synthetic.yaml
trl-spo soft-po --config examples/soft_po.yaml --dataset_name synthetic_run/dataset/preference
```

`examples/synthetic.yaml` says what each option means; `--output_dir` is another folder than there. Candidates that were drawn are
not drawn again, and what was answered is not asked again, so that an interrupted run goes on from where it was.
"""

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer

from trl_spo.synthetic import (
    AnswerStore,
    Budget,
    CandidatePairs,
    FilterConfig,
    Jury,
    SynthesisConfig,
    agreement_report,
    build_dataset,
    check_pairs,
    filter_pairs,
    generate_candidates,
    human_check,
    preference_pairs,
    prepare_prompts,
    refuse_jury,
    refuse_overlap,
)
from trl_spo.synthetic.files import Rows, write_rows
from trl_spo.synthetic.synthesis import make_critic, make_student


def main() -> None:
    parser = argparse.ArgumentParser(description="From prompts to a preference dataset.")
    parser.add_argument("--config", required=True, help="YAML file, such as examples/synthetic.yaml")
    parser.add_argument("--output_dir", help="folder to write to (default: that of the config)")
    args = parser.parse_args()
    config = SynthesisConfig.from_yaml(args.config)
    for option, value in {
        "reward_model": config.reward_model,
        "rounds": config.rounds,
        "prompts.embed": config.prompts.embed,
        "dataset.push_to_hub": config.dataset.push_to_hub,
    }.items():
        if value is not None:
            parser.error(
                f"this script does not know `{option}` of {args.config}: remove it, or use `trl-spo synthesize`"
            )
    filters = FilterConfig(**config.pairs.filters)
    folder = Path(args.output_dir or config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    # In place of the options, a script can have any critics and students: Jury([EndpointCritic(name=..., endpoint=Endpoint(...))])
    jury = Jury([make_critic(options) for options in config.judge.critics])
    student = make_student(config.candidates.student)
    budget = Budget(config.judge.max_cost)
    records = {}  # settings and reports, for the card

    # Prompts
    of_prompts = config.prompts
    tokenizer = None
    if of_prompts.max_prompt_length is not None:
        of_student = config.candidates.student
        tokenizer = AutoTokenizer.from_pretrained(of_student["model"], revision=of_student.get("revision") or "main")
    prepared = prepare_prompts(
        load_dataset(**of_prompts.dataset),
        tokenizer=tokenizer,
        max_prompt_length=of_prompts.max_prompt_length,
        near_duplicates=of_prompts.near_duplicates,
        topic_column=of_prompts.topic_column,
        seed=config.seed,
    )
    prompts = prepared.prompts
    records["prompts"] = {"settings": asdict(of_prompts), "report": prepared.report}
    print(f"Prompts: {prepared.report['kept']} of {prepared.report['prompts']}, without {prepared.report['dropped']}")

    with AnswerStore(config.judge.store or folder / "answers.sqlite") as store:
        budget.count(store)  # what earlier starts have spent, too
        # Everything that can be wrong with the critics is found before the student starts
        jury.check({name: value for name, value in prompts[0].items() if name != "prompt"})
        calibration = None
        if config.check is not None:
            human_pairs, labels = check_pairs(load_dataset(**config.check.dataset))
            refuse_overlap(prompts["prompt"], [pair.prompt for pair in human_pairs], of_prompts.near_duplicates)

            # The human check set: what the jury's word is worth
            jury.ask(human_pairs, store, budget)
            report = human_check(jury.verdicts(human_pairs, store), labels, config.seed)
            print(
                f"The jury agrees with people: {report['jury']['agreement']}; the longer one: {report['longer']['agreement']}"
            )
            refuse_jury(report, config.check.min_agreement)
            calibration = report["calibration"]
            records["check"] = {"settings": asdict(config.check), "report": report}

        # Candidates
        if hasattr(student, "endpoint"):
            student.store, student.budget = store, budget
        path = generate_candidates(
            prompts,
            student,
            folder / "candidates.jsonl",
            num_responses=config.candidates.num_responses,
            temperatures=config.candidates.temperatures,
            seed=config.seed,
        )
        candidates = Rows(path)

        # The jury
        pairs = CandidatePairs(candidates, config.judge.num_comparisons)
        jury.ask(pairs, store, budget)
        write_rows(folder / "verdicts.jsonl", jury.verdicts(pairs, store))
    verdicts = Rows(folder / "verdicts.jsonl")
    settings = {"critics": config.judge.critics, "num_comparisons": config.judge.num_comparisons}
    records["judge"] = {"settings": settings, "report": agreement_report(verdicts, config.seed)}
    print(f"Spent: {budget.spent:.4g}")

    # Pairs, and why the others are not trained on
    judged = preference_pairs(candidates, verdicts, config.pairs.pairing, config.seed, calibration)
    to_filter, rows = [], []
    for row, reason in judged:
        to_filter.append(row) if reason is None else rows.append((row, reason))
    rows += filter_pairs(to_filter, filters)
    write_rows(folder / "kept.jsonl", (row for row, reason in rows if reason is None))
    write_rows(folder / "dropped.jsonl", ({**row, "reason": reason} for row, reason in rows if reason is not None))
    counts = Counter(reason or "kept" for _, reason in rows)
    print(f"Pairs: {dict(counts)}")
    if not counts["kept"]:
        raise SystemExit("No pair is left. `dropped.jsonl` has them with the reasons.")
    report = {"kept": counts.pop("kept"), "dropped": dict(counts)}
    records["pairs"] = {"settings": asdict(config.pairs), "report": report}

    # Dataset
    kept = Rows(folder / "kept.jsonl")
    counts = build_dataset(
        folder / "dataset", candidates, verdicts, kept, config.dataset.test_share, asdict(config), records
    )
    print(f"{folder / 'dataset'}: {counts}")


if __name__ == "__main__":
    main()
