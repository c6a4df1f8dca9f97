# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What critics that learned from one set of human labels are worth on another: the human check on real pairs.

Two critics that score learn from 60 % of the pairs of PandaLM, prompts apart: a reward model that TRL's RewardTrainer makes of a small
language model, and a logistic regression (Bradley and Terry) on differences of what stands for a response, its TF-IDF, its mean hidden
state in the same language model, and its similarity to the prompt. The second comes in three forms: as it is, with the length; without,
where TF-IDF and states have norm 1; and "balanced", where besides the pairs whose shorter response people preferred are repeated until
they are half. They are checked one by one and as a jury of two, as `trl-spo synthesize` does it, on the other pairs of PandaLM and on
LLMBar, which was made to mislead: there the longer response is the worse one in most pairs.

    python examples/benchmarks/human_labels.py --model STORIES260K --data DATA --markdown human_labels.md

DATA is a folder with `pandalm_human_pairs*` and `llmbar_human_pairs*` (`prompt`, `chosen`, `rejected`, and `subset` of LLMBar), as JSON
lines. Nothing is chosen by the pairs that are checked: the regression's strength of regularization is found on the training pairs, by
cross-validation over prompts.

PandaLM has about six pairs of each prompt, which are not independent, so an interval over prompts stands beside that over pairs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.preprocessing import StandardScaler
from step_cost import interval, machine
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging
from trl import RewardConfig, RewardTrainer

from trl_spo.evaluation.statistics import bootstrap_intervals
from trl_spo.synthetic import AnswerStore, HumanCheckError, Jury, Pair, RewardCritic, check_pairs, human_check
from trl_spo.synthetic.agreement import agreement_report, label_of_share
from trl_spo.synthetic.check_set import refuse_jury
from trl_spo.synthetic.critics import Critic, Request, batched
from trl_spo.synthetic.store import request_key
from trl_spo.synthetic.synthesis_config import CheckConfig


JUDGES = {
    "reward model": ("reward",),
    "embedding": ("embedding",),
    "embedding, norm 1": ("normed",),
    "embedding, norm 1, balanced": ("balanced",),
    "jury: reward model, embedding": ("reward", "embedding"),
    "jury: reward model, balanced": ("reward", "balanced"),
}
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # of which one is found by cross-validation
TRAINING_SHARE = 0.6


class HiddenStates:
    """The mean last hidden state of a text, each text read once."""

    def __init__(self, model: str, max_length: int):
        self.model, self.tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
        self.max_length = max_length
        self.known: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> np.ndarray:
        new = sorted({text for text in texts if text not in self.known}, key=len)
        for batch in batched(new, 16):
            rows = [self.tokenizer(text).input_ids[: self.max_length] for text in batch]
            inputs = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
            states = self.model(**inputs, use_cache=False).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            means = (states * mask).sum(1) / mask.sum(1)
            self.known.update(zip(batch, means.double().numpy(), strict=True))
        return np.stack([self.known[text] for text in texts])


class Embedding:
    """What stands for a response. Without its length, TF-IDF and state have norm 1."""

    def __init__(self, states: HiddenStates, with_length: bool):
        self.states, self.with_length = states, with_length
        self.counts = TfidfVectorizer(ngram_range=(1, 2), min_df=2, norm=None if with_length else "l2")
        self.words = TfidfVectorizer(min_df=2)
        self.scaler = StandardScaler()

    def fit(self, prompts: list[str], responses: list[str]) -> "Embedding":
        self.counts.fit(responses)
        self.words.fit(prompts + responses)
        self.scaler.fit(self._dense(prompts, responses))
        return self

    def _dense(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        states = self.states(responses)
        # Both of norm 1, so this is the cosine
        similar = self.words.transform(prompts).multiply(self.words.transform(responses)).sum(axis=1)
        if self.with_length:
            length = np.log1p([[len(response)] for response in responses])
        else:
            states, length = states / np.linalg.norm(states, axis=1, keepdims=True), np.empty((len(responses), 0))
        return np.hstack([states, np.asarray(similar).reshape(-1, 1), length])

    def __call__(self, prompts: list[str], responses: list[str]) -> csr_matrix:
        dense = self.scaler.transform(self._dense(prompts, responses))
        return hstack([self.counts.transform(responses), csr_matrix(dense)], format="csr")


@dataclass(kw_only=True)
class EmbeddingCritic(Critic):
    """Scores by a weighted sum of what stands for a response."""

    compares: ClassVar[bool] = False

    embedding: Embedding
    weights: np.ndarray
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._digest = hashlib.sha256(self.weights.tobytes()).hexdigest()

    def key(self, request: Request) -> str:
        return request_key(embedding=self._digest, prompt=request.prompt, response=request.responses[0])

    def answer(self, requests: Iterable[tuple[Any, Request]]) -> Iterator[tuple[Any, dict[str, Any]]]:
        for batch in batched(requests, self.batch_size):
            features = self.embedding([r.prompt for _, r in batch], [r.responses[0] for _, r in batch])
            for (tag, _), score in zip(batch, (features @ self.weights).tolist(), strict=True):
                yield tag, {"score": score}


def balanced(rows: Dataset, seed: int) -> Dataset:
    """With pairs whose shorter response is preferred repeated, so that they are as many as the others."""
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows]
    of = {which: [i for i, is_longer in enumerate(longer) if is_longer == which] for which in (True, False)}
    few, many = sorted(of.values(), key=len)
    return rows.select([*many, *few, *random.Random(seed).choices(few, k=len(many) - len(few))])


def train_embedding(name: str, rows: Dataset, states: HiddenStates, with_length: bool, seed: int) -> EmbeddingCritic:
    prompts = rows["prompt"]
    embedding = Embedding(states, with_length).fit([*prompts, *prompts], [*rows["chosen"], *rows["rejected"]])
    differences = embedding(prompts, rows["chosen"]) - embedding(prompts, rows["rejected"])
    signs = np.where(np.random.default_rng(seed).random(len(rows)) < 0.5, 1, -1)  # so that there are two classes
    search = GridSearchCV(
        LogisticRegression(fit_intercept=False, max_iter=2000),
        {"C": STRENGTHS},
        scoring="neg_log_loss",
        cv=GroupKFold(5),
    )
    search.fit(differences.multiply(signs[:, None]).tocsr(), signs, groups=prompts)
    return EmbeddingCritic(name=name, embedding=embedding, weights=search.best_estimator_.coef_[0])


def train_reward(name: str, rows: Dataset, args: argparse.Namespace, folder: str, seed: int) -> RewardCritic:
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1)

    def ids(prompt: str, response: str) -> list[int]:
        """Cut off where the critic does it; RewardTrainer itself would leave out what is too long."""
        return tokenizer(prompt + response + tokenizer.eos_token).input_ids[: args.max_length]

    pairs = [{f"{name}_ids": ids(row["prompt"], row[name]) for name in ("chosen", "rejected")} for row in rows]
    config = RewardConfig(
        output_dir=folder,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=1,  # pairs, so that there is little to pad
        gradient_accumulation_steps=8,
        warmup_steps=0.1,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # the trainer prints its log
        trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
        trainer.train()
    return RewardCritic(name=name, model=trainer.model, tokenizer=tokenizer, max_length=args.max_length, batch_size=4)


def load(args: argparse.Namespace, name: str) -> Dataset:
    rows = load_dataset("json", data_files=str(next(Path(args.data).glob(f"{name}*"))), split="train")
    return rows.map(lambda row: {"prompt": row["prompt"] + "\n\n"})  # which a model that reads on needs


def split(rows: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """60 % of the prompts to train on, with all of their pairs, and the others."""
    prompts = sorted(set(rows["prompt"]))
    random.Random(seed).shuffle(prompts)
    training = set(prompts[: round(TRAINING_SHARE * len(prompts))])
    return (
        rows.filter(lambda row: row["prompt"] in training),
        rows.filter(lambda row: row["prompt"] not in training),
    )


def interval_over_prompts(pairs: list[Pair], labels: list[int], judged: list[int | None], seed: int) -> list[float]:
    """Of the agreement, what is undecided counting half."""
    of_prompts: dict[str, np.ndarray] = {}
    for pair, human, label in zip(pairs, labels, judged, strict=True):
        point = 0.5 if label is None else float(label == human)
        of_prompts.setdefault(pair.prompt, np.zeros(2))[:] += [point, 1]
    units = np.array(list(of_prompts.values()))
    return bootstrap_intervals(units, lambda sums: (sums[:, 0] / sums[:, 1])[None], seed)[0]


def check(jury: Jury, rows: Dataset, store: AnswerStore, seed: int) -> dict[str, dict[str, Any]]:
    """What the human check says of the jury, and of what is simpler: that the longer response wins."""
    pairs, labels = check_pairs(rows)
    jury.check(pairs[0].columns)
    jury.ask(pairs, store)
    verdicts = list(jury.verdicts(pairs, store))
    report = human_check(verdicts, labels, seed)
    longer = [None if a == b else int(a < b) for a, b in (verdict["lengths"] for verdict in verdicts)]
    judged = {"jury": [label_of_share(verdict["share"]) for verdict in verdicts], "longer": longer}
    found = {}
    for name, labels_of in judged.items():
        found[name] = dict(report[name], over_prompts=interval_over_prompts(pairs, labels, labels_of, seed))
        found[name]["stopped"] = False
        try:
            refuse_jury({"jury": report[name], "longer": report["longer"]}, CheckConfig.min_agreement)
        except HumanCheckError:
            found[name]["stopped"] = True
    found["jury"]["longer_rate"] = agreement_report(verdicts)["jury"]["longer_rate"]["rate"]
    found["longer"]["longer_rate"] = 1.0
    found["jury"]["calibration_error"] = report["reliability"]["expected_calibration_error"]
    return found


def run(args: argparse.Namespace, states: HiddenStates, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Of a seed: by the set and by the judge, what `check` finds."""
    training, held_out = split(load(args, "pandalm_human_pairs"), seed)
    llmbar = load(args, "llmbar_human_pairs")
    sets = {"PandaLM, trained on": training, "PandaLM, held out": held_out, "LLMBar": llmbar}
    for subset in sorted(set(llmbar["subset"])):
        sets[f"LLMBar, {subset}"] = llmbar.filter(lambda row, subset=subset: row["subset"] == subset)
    with tempfile.TemporaryDirectory() as folder:
        critics = {
            "reward": train_reward("reward", training, args, folder, seed),
            "embedding": train_embedding("embedding", training, states, True, seed),
            "normed": train_embedding("normed", training, states, False, seed),
            "balanced": train_embedding("balanced", balanced(training, seed), states, False, seed),
        }
        found: dict[str, dict[str, dict[str, Any]]] = {}
        # A store of its own, since the key of a reward model's answer does not depend on the weights of a model in memory
        with AnswerStore(Path(folder) / "answers.sqlite") as store:
            for name, rows in sets.items():
                found[name] = {}
                for judge, members in JUDGES.items():
                    both = check(Jury([critics[member] for member in members]), rows, store, seed)
                    found[name].update({"longer wins": both["longer"], judge: both["jury"]})
    return found


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean over the seeds, ± half of the 95 % interval; what is the same in each has none."""
    values = list(values)
    if None in values:
        return "-"
    if len(set(values)) == 1:
        return f"{values[0]:.{digits}f}"
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def ends(intervals: Iterable[list[float] | None]) -> str:
    """The ends of an interval, each the mean over the seeds."""
    intervals = list(intervals)
    if None in intervals:
        return "-"
    low, high = (statistics.mean(ends) for ends in zip(*intervals, strict=True))
    return f"{low:.3f} to {high:.3f}"


def tables(runs: list[dict], say: Callable[[str], None]) -> None:
    judges = ["longer wins", *JUDGES]
    for name in ("PandaLM, held out", "LLMBar"):
        counts = sorted({run[name]["longer wins"]["pairs"] for run in runs})
        say(f"\n**{name}** ({' / '.join(map(str, counts))} pairs)\n")
        say(
            "| judge | agreement | 95 % over pairs | 95 % over prompts | lengths balanced | Cohen's kappa | 95 % | coverage | for the longer | "
            "stopped | by length only |"
        )
        say("| --- " * 11 + "|")
        for judge in judges:
            of = [run[name][judge] for run in runs]
            say(
                f"| {judge} | {spread(x['agreement']['value'] for x in of)} | {ends(x['agreement']['interval'] for x in of)} | "
                f"{ends(x['over_prompts'] for x in of)} | {spread(x['length_balanced']['value'] for x in of)} | "
                f"{spread(x['kappa']['value'] for x in of)} | "
                f"{ends(x['kappa']['interval'] for x in of)} | {spread((x['coverage']['value'] for x in of), 2)} | "
                f"{spread((x['longer_rate'] for x in of), 2)} | {sum(x['stopped'] for x in of)} of {len(of)} | "
                f"{sum(x['stopped'] and x['agreement']['value'] >= CheckConfig.min_agreement for x in of)} |"
            )
    names = ["PandaLM, trained on", *(name for name in runs[0] if name.startswith("LLMBar, "))]
    heads = [f"{name.removeprefix('LLMBar, ')} ({runs[0][name]['longer wins']['pairs']})" for name in names[1:]]
    say("\n**Agreement by LLMBar's subsets (pairs), and on the pairs that were trained on**\n")
    say(f"| judge | {' | '.join(heads)} | PandaLM, trained on |")
    say("| --- " * (len(names) + 1) + "|")
    for judge in judges:
        cells = [spread(run[name][judge]["agreement"]["value"] for run in runs) for name in [*names[1:], names[0]]]
        say(f"| {judge} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a small language model")
    parser.add_argument("--data", required=True, help="folder of the data files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the split and the training")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the reward model, and so the next two")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max_length", type=int, default=512, help="tokens after which a text is cut off")
    parser.add_argument("--markdown", help="file to write the tables to, too")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    start = time.process_time()
    states = HiddenStates(args.model, args.max_length)
    runs = []
    for seed in args.seeds:
        runs.append(run(args, states, seed))
        print(f"seed {seed}: {time.process_time() - start:.0f} s of CPU time so far", flush=True)
    where = machine("cpu", 1)
    lines: list[str] = []
    lines.append(f"\n{where}; {time.process_time() - start:.0f} s of CPU time in all")
    lines.append(
        f"{len(runs)} seeds; ± half of the 95 % interval over them. Intervals: bootstrap, their ends the means over the seeds. Lengths "
        "balanced: the mean of the agreement where people prefer the longer response and where they prefer the shorter one. Stopped: "
        f"either agreement is below `min_agreement={CheckConfig.min_agreement}`; by length only: the balanced one alone"
    )
    tables(runs, lines.append)
    print("\n".join(lines))
    if args.markdown:
        Path(args.markdown).write_text("\n".join(lines).strip() + "\n")
    if args.json:
        content = {"machine": where, "options": vars(args), "runs": dict(zip(args.seeds, runs, strict=True))}
        Path(args.json).write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
