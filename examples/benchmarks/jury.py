# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a jury is worth, where the truth is known: accuracy against its size and against the filters, beside what theory says of critics with
these error rates; whether the probability and the confidence are what they claim; and what the human check set says of a jury that
rewards length only.

The pairs are stories of the sandbox, whose reward is exact. A critic knows which story is better, and errs in a share of the pairs that is
given to it; in which ones is drawn by a hash of the critic and the pair, so that it errs in both orders alike. In another share of the
pairs it names whatever it is shown first: it flips with the order, and abstains. All the rest is what a run of `trl-spo synthesize` goes
through: jury, store, votes, human check, calibration, pairs and filters.

    python examples/benchmarks/jury.py
    python examples/benchmarks/jury.py --pairs 1000 --json jury.json
"""

import argparse
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset

from trl_spo.evaluation.statistics import wilson_rate
from trl_spo.sandbox.stories import prompt_text, reward, write_story
from trl_spo.synthetic import AnswerStore, FilterConfig, HumanCheckError, Jury, filter_pairs, human_check
from trl_spo.synthetic.calibration import fit_calibration, vote_probability
from trl_spo.synthetic.check_set import check_pairs, refuse_jury
from trl_spo.synthetic.critics import Critic, Request
from trl_spo.synthetic.human_agreement import reliability
from trl_spo.synthetic.pairs import CandidatePairs, preference_pairs
from trl_spo.synthetic.store import request_key


SIZES = (1, 3, 5, 7, 9)
ACCURACIES = (0.6, 0.7)
THRESHOLDS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
PROBABILITIES = (0.6, 0.8, 0.9, 0.95)
LABELS = (20, 50, 100, 200, 500)
MIN_AGREEMENTS = (0.6, 0.7)
# Of the jury whose probabilities are tested: accuracy, share of pairs in which it flips, and whose copy it is in 0.8 of the pairs
MIXED = {
    "a": (0.9, 0.1, None),
    "b": (0.75, 0.1, None),
    "c": (0.65, 0.1, None),
    "d": (0.65, 0.1, "c"),
    "e": (0.65, 0.1, "c"),
    "f": (0.6, 0.3, None),
    "g": (0.5, 0.1, None),
}


@cache
def true_reward(prompt: str, response: str) -> float:
    return reward(prompt + response)


@dataclass(kw_only=True)
class SimulatedCritic(Critic):
    """
    A critic with known error rates.

    Args:
        accuracy (`float`):
            Share of the pairs in which it is right, of those in which it does not flip.
        flips (`float`, *optional*, defaults to `0.0`):
            Share of the pairs in which it names the response that is shown first.
        copies (`str`, *optional*):
            Name of a critic that it errs with in 0.8 of the pairs.
        quality (`Callable`, *optional*, defaults to the true reward):
            What it rewards, of a prompt and a response.
    """

    compares: ClassVar[bool] = True

    accuracy: float
    flips: float = 0.0
    copies: str | None = None
    quality: Callable[[str, str], float] = true_reward

    def key(self, request: Request) -> str:
        settings = [self.name, self.accuracy, self.flips, self.copies]
        return request_key(critic=settings, prompt=request.prompt, responses=request.responses)

    def answer(self, requests: Iterable[tuple[Any, Request]]) -> Iterator[tuple[Any, dict[str, Any]]]:
        for tag, request in requests:
            # Of the pair in any order
            pair = [request.prompt, *sorted(request.responses)]
            first, second = (self.quality(request.prompt, response) for response in request.responses)
            if uniform("flips", self.name, *pair) < self.flips:
                verdict = "A"
            elif first == second:
                verdict = "tie"
            else:
                copied = self.copies is not None and uniform("copies", self.name, *pair) < 0.8
                right = uniform("errs", self.copies if copied else self.name, *pair) < self.accuracy
                verdict = "A" if (first > second) == right else "B"
            yield tag, {"verdict": verdict, "rationale": ""}


def uniform(*what: str) -> float:
    """Drawn by a hash, from 0 to 1."""
    return int.from_bytes(hashlib.sha256("\n".join(what).encode()).digest()[:8], "big") / 2**64


def make_stories(number: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Prompts with two stories each, of different reward, in random order."""
    rng = random.Random(seed)
    for _ in range(number):
        prompt = prompt_text(rng)
        while True:
            first, second = (write_story(rng, prompt)[len(prompt) :] for _ in range(2))
            if true_reward(prompt, first) != true_reward(prompt, second):
                break
        yield prompt, first, second


def make_candidates(number: int) -> list[dict[str, Any]]:
    return [
        {"prompt_id": f"p{i}", "prompt": prompt, "responses": [{"id": "0", "text": one}, {"id": "1", "text": two}]}
        for i, (prompt, one, two) in enumerate(make_stories(number, seed=0))
    ]


def make_check_set(number: int) -> Dataset:
    """Labelled by people who are always right."""
    rows = []
    for prompt, *stories in make_stories(number, seed=1):
        worse, better = sorted(stories, key=lambda story: true_reward(prompt, story))
        rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return Dataset.from_list(rows)


def judge(critics: Sequence[Critic], pairs: Iterable[Any], store: AnswerStore) -> list[dict[str, Any]]:
    jury = Jury(critics)
    jury.ask(pairs, store)
    return list(jury.verdicts(pairs, store))


def is_right(row: dict[str, Any]) -> bool:
    return true_reward(row["prompt"], row["chosen"]) > true_reward(row["prompt"], row["rejected"])


def patterns(critics: int, accuracy: float, flips: float) -> Iterator[tuple[int, int, float]]:
    """How many critics are right and wrong, and how often that happens, if they err independently of each other."""
    right, wrong = (1 - flips) * accuracy, (1 - flips) * (1 - accuracy)
    for r, w in itertools.product(range(critics + 1), repeat=2):
        if r + w <= critics:
            ways = math.comb(critics, r) * math.comb(critics - r, w)
            yield r, w, ways * right**r * wrong**w * flips ** (critics - r - w)


def in_theory(keeps: Callable[[int, int], bool], critics: int, accuracy: float, flips: float) -> tuple[float, float]:
    """Share of the pairs that are kept, and accuracy of those."""
    kept = [(r, w, share) for r, w, share in patterns(critics, accuracy, flips) if r != w and keeps(r, w)]
    total = math.fsum(share for _, _, share in kept)
    return total, math.fsum(share for r, w, share in kept if r > w) / total


def rate(right: Sequence[bool]) -> str:
    found = wilson_rate(sum(right), len(right))
    return f"{found['rate']:.3f} ({found['interval'][0]:.3f} to {found['interval'][1]:.3f})"


def by_chance(table: dict[str, Any]) -> float:
    """About the expected calibration error of claims that are true: the mean of `|accuracy - claimed|` of as many pairs in each bin."""
    claims = [(row["claimed"], row["number"]) for row in table["bins"] if row["number"]]
    return sum(math.sqrt(2 / math.pi * claim * (1 - claim) * number) for claim, number in claims) / table["number"]


class Report:
    """Prints tables in Markdown, and keeps them."""

    def __init__(self):
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def table(self, title: str, rows: list[dict[str, Any]]) -> None:
        print(f"\n**{title}**\n\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values())} |")
        self.tables[title] = rows


def sizes(candidates: list[dict[str, Any]], store: AnswerStore, report: Report) -> None:
    rows = [{"critics": size} for size in SIZES]
    for accuracy in ACCURACIES:
        critics = [SimulatedCritic(name=f"{accuracy}, {i}", accuracy=accuracy) for i in range(max(SIZES))]
        for row, size in zip(rows, SIZES, strict=True):
            verdicts = judge(critics[:size], CandidatePairs(candidates), store)
            pairs = [pair for pair, _ in preference_pairs(candidates, verdicts)]
            row[f"accuracy, each {accuracy}"] = rate([is_right(pair) for pair in pairs])
            row[f"theory, each {accuracy}"] = in_theory(lambda r, w: True, size, accuracy, 0.0)[1]
    report.table("Accuracy of the jury by its size", rows)


def filtered(candidates: list[dict[str, Any]], check: Dataset, store: AnswerStore, report: Report) -> None:
    number, accuracy, flips = 7, 0.7, 0.2
    critics = [SimulatedCritic(name=f"flips, {i}", accuracy=accuracy, flips=flips) for i in range(number)]
    biased = [SimulatedCritic(name=f"first, {i}", accuracy=accuracy, flips=1.0) for i in range(2)]
    labelled, labels = check_pairs(check)
    calibration = fit_calibration(judge(critics + biased, labelled, store), labels)
    verdicts = judge(critics + biased, CandidatePairs(candidates), store)
    without = judge(critics, CandidatePairs(candidates), store)
    names = ("share", "winner", "confidence")
    differ = sum(any(a[name] != b[name] for name in names) for a, b in zip(verdicts, without, strict=True))
    found = preference_pairs(candidates, verdicts, calibration=calibration)
    pairs = [pair for pair, reason in found if reason is None]

    def kept(**options: Any) -> list[bool]:
        config = FilterConfig(max_similarity=None, drop_refusals=False, **options)
        return [is_right(pair) for pair, reason in filter_pairs(pairs, config) if reason is None]

    rows = []
    for least in THRESHOLDS:
        right = kept(min_confidence=least)
        share, of_them = in_theory(
            lambda r, w, least=least: abs(r - w) >= (least - 1e-9) * (r + w), number, accuracy, flips
        )
        rows.append(
            {
                "`min_confidence`": least,
                "kept": len(right) / len(candidates),
                "theory of kept": share,
                "accuracy": rate(right),
                "theory of accuracy": of_them,
            }
        )
    report.table("Filter by confidence", rows)
    rows, weight = [], math.log(accuracy / (1 - accuracy))
    for least in PROBABILITIES:
        right = kept(min_confidence=0.0, min_probability=least)
        share, of_them = in_theory(
            lambda r, w, least=least: 1 / (1 + math.exp(-weight * abs(r - w))) >= least, number, accuracy, flips
        )
        rows.append(
            {
                "`min_probability`": least,
                "kept": len(right) / len(candidates),
                "theory of kept": share,
                "accuracy": rate(right),
                "theory of accuracy": of_them,
            }
        )
    report.table("Filter by probability", rows)
    print(f"\nThe two critics that always name the first change {differ} of {len(verdicts)} verdicts.")


def calibrated(candidates: list[dict[str, Any]], check: Dataset, store: AnswerStore, report: Report) -> None:
    critics = [
        SimulatedCritic(name=name, accuracy=accuracy, flips=flips, copies=copies)
        for name, (accuracy, flips, copies) in MIXED.items()
    ]
    labelled, labels = check_pairs(check)
    known = judge(critics, labelled, store)
    verdicts = judge(critics, CandidatePairs(candidates), store)
    truth = [
        int(
            true_reward(row["prompt"], row["responses"][0]["text"])
            < true_reward(row["prompt"], row["responses"][1]["text"])
        )
        for row in candidates
    ]

    def on_new_pairs(calibration: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """The table, and the log loss."""
        first = [vote_probability(verdict["votes"], calibration) for verdict in verdicts]
        of_truth = [1 - p if label else p for p, label in zip(first, truth, strict=True)]
        decided = [p for p in of_truth if abs(p - 0.5) > 1e-9]
        table = reliability([abs(2 * p - 1) for p in decided], [p > 0.5 for p in decided])
        return table, -statistics.mean(map(math.log, of_truth))

    main = fit_calibration(known[: max(LABELS)], labels[: max(LABELS)])
    table, _ = on_new_pairs(main)
    decided = [
        (verdict, label) for verdict, label in zip(verdicts, truth, strict=True) if verdict["winner"] is not None
    ]
    raw = reliability(
        [verdict["confidence"] for verdict, _ in decided],
        [verdict["winner"] == str(label) for verdict, label in decided],
    )

    def columns(name: str, of: dict[str, Any]) -> dict[str, Any]:
        low, high = of["interval"] or (None, None)
        return {
            f"{name}: pairs": of["number"],
            f"{name}: claimed": "" if low is None else of["claimed"],
            f"{name}: observed": "" if low is None else f"{of['accuracy']:.3f} ({low:.3f} to {high:.3f})",
        }

    rows = [
        {"claim": f"{(1 + one['lower']) / 2:.2f} to {(1 + one['upper']) / 2:.2f}"}
        | columns("probability", one)
        | columns("confidence", two)
        for one, two in zip(table["bins"], raw["bins"], strict=True)
    ]
    report.table("Reliability", rows)
    tables = {
        f"probability, by {max(LABELS)} labels": table,
        "probability, on these labels, each pair by the others": main["reliability"],
        "confidence": raw,
    }
    rows = [
        {
            "": name,
            "pairs": of["number"],
            "expected calibration error": of["expected_calibration_error"],
            "by chance alone": by_chance(of),
        }
        for name, of in tables.items()
    ]
    report.table("Expected calibration error", rows)
    report.table(
        "What the votes are worth",
        [
            {
                "critic": name,
                "right": accuracy,
                "flips": flips,
                "copies": copies or "",
                "coefficient": main["coefficients"][name],
                "log-odds of its accuracy": math.log(accuracy / (1 - accuracy)),
            }
            for name, (accuracy, flips, copies) in MIXED.items()
        ],
    )
    rows = []
    for number in LABELS:
        starts = range(0, len(labels) - number + 1, number)[:20]
        found = [on_new_pairs(fit_calibration(known[i : i + number], labels[i : i + number])) for i in starts]
        error, loss = [of["expected_calibration_error"] for of, _ in found], [loss for _, loss in found]
        rows.append(
            {
                "labels": number,
                "check sets": len(starts),
                "expected calibration error": f"{statistics.mean(error):.3f} ± {statistics.stdev(error):.3f}",
                "log loss": f"{statistics.mean(loss):.3f} ± {statistics.stdev(loss):.3f}",
            }
        )
    report.table("Labels that it takes", rows)


def adversarial(check: Dataset, store: AnswerStore, report: Report) -> None:
    def length(prompt: str, response: str) -> float:
        return len(response)

    juries = {
        "rewards length only": [
            SimulatedCritic(name=f"length, {i}", accuracy=accuracy, quality=length)
            for i, accuracy in enumerate((1.0, 0.95, 0.9))
        ],
        "errs in 0.3 of the pairs": [SimulatedCritic(name=f"honest, {i}", accuracy=0.7) for i in range(3)],
    }
    by_length: dict[bool, list[int]] = {True: [], False: []}
    for i, row in enumerate(check):
        by_length[len(row["chosen"]) > len(row["rejected"])].append(i)
    # As people's labels often are: nothing but the length has 0.8 of these pairs
    long = check.select([*by_length[True], *by_length[False][: len(by_length[True]) // 4]])
    rows, refusals = [], []
    for check_set, dataset in {"as drawn": check, "the longer one better in 0.8": long}.items():
        pairs, labels = check_pairs(dataset)
        for name, critics in juries.items():
            found = human_check(judge(critics, pairs, store), labels)
            agreement, interval = found["jury"]["agreement"]["value"], found["jury"]["agreement"]["interval"]
            row = {
                "check set": f"{check_set}, {len(dataset)} pairs",
                "three critics, each": name,
                "agreement": f"{agreement:.3f} ({interval[0]:.3f} to {interval[1]:.3f})",
                "balanced by length": found["jury"]["length_balanced"]["value"],
                "kappa": found["jury"]["kappa"]["value"],
                '"longer wins"': found["longer"]["agreement"]["value"],
            }
            for least in MIN_AGREEMENTS:
                try:
                    refuse_jury(found, least)
                    row[f"stopped at {least}"] = "no"
                except HumanCheckError as error:
                    row[f"stopped at {least}"] = "yes"
                    refusals.append(str(error))
            rows.append(row)
    report.table("The human check set", rows)
    print(f"\n{refusals[-1]}")


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, scikit-learn {version('scikit-learn')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4000, help="judged, without a label")
    parser.add_argument("--check_pairs", type=int, default=1000, help="with a label, at least 1000")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    if args.pairs < 1 or args.check_pairs < 2 * max(LABELS):
        parser.error(f"--pairs must be positive, and --check_pairs at least {2 * max(LABELS)}")

    # Of so many small check sets, some find a critic worse than chance that is not
    logging.getLogger("trl_spo.synthetic.calibration").setLevel(logging.ERROR)
    report = Report()
    where = machine()
    print(f"{where}\n{args.pairs} pairs of stories; intervals are of 95 %")
    candidates, check = make_candidates(args.pairs), make_check_set(args.check_pairs)
    with tempfile.TemporaryDirectory() as folder, AnswerStore(os.path.join(folder, "answers.sqlite")) as store:
        sizes(candidates, store, report)
        filtered(candidates, check.select(range(max(LABELS))), store, report)
        calibrated(candidates, check, store, report)
        adversarial(check, store, report)
        print(f"\n{len(store)} answers, {time.process_time():.0f} s of CPU time")
    if args.json:
        content = {"machine": where, "options": vars(args), "tables": report.tables}
        Path(args.json).write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
