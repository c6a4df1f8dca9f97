# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Rounds: the student answers, the jury judges, the student is trained on that, and is evaluated. Then the next round begins with it.

The output folder has a folder `round-1`, `round-2`, ... for each round, with the files of its [`Synthesis`], the student that it ends
with in `training/model` and what is measured of that in `evaluation.json`. Those of the first student are in `round-0`. `rounds.json`
tells what the rounds came to: why they have ended, and which student is the best.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers.utils import logging

from ..evaluation.diversity import response_diversity
from ..evaluation.scoring import ResponseScorer, preference_accuracy, text_log_likelihood
from ..evaluation.statistics import wilson_rate
from .agreement import label_of_share
from .candidates import generate_candidates
from .check_set import HumanCheckError, check_pairs
from .endpoint import Budget
from .files import Rows, digest, digest_of_rows, read_json, write_json, write_rows
from .identity import local_folder, weights_identity
from .jury import Jury, Pair
from .prompts import split_of
from .store import AnswerStore
from .synthesis import Synthesis, load_split, make_critic, make_student, refuse_folder
from .synthesis_config import SynthesisConfig, from_dict, import_function
from .training import WITH_REWARD_MODEL, TrainingConfig, train


logger = logging.get_logger(__name__)

_SEED_OF_EVALUATION = 10**6  # added to the run's, so that no response is one of the candidates


class Rounds:
    """
    Several rounds of [`Synthesis`], training and evaluation.

    Run again, it goes on where it was stopped. With a larger `num_rounds`, it goes on from the last student.

    Args:
        config ([`SynthesisConfig`]):
            What it is told, with `rounds`. All of it is checked here, before anything is asked or paid for.

    Raises:
        `ValueError`: an option is wrong, or the output folder holds another run.
    """

    def __init__(self, config: SynthesisConfig):
        if config.rounds is None:
            raise ValueError("`rounds` is missing in the config. Add it, or use `Synthesis` for a dataset only.")
        self.config, self.rounds = config, config.rounds
        self.folder = Path(config.output_dir)
        self.budget = Budget(config.judge.max_cost)
        self.training = from_dict(TrainingConfig, self.rounds.training, "rounds.training.")
        student = config.candidates.student
        if student.get("type") not in ("transformers", "vllm") or not isinstance(student.get("model"), str):
            raise ValueError(
                f"The student of `rounds` is trained, so that its `type` must be 'transformers' or 'vllm' with the path or name of a "
                f"`model`, got {student}."
            )
        if self.training.method in ("reward", *WITH_REWARD_MODEL):
            raise ValueError(
                f"`rounds.training.method` must train a student on preferences, and {self.training.method!r} does not. Use another one."
            )
        if config.dataset.test_share == 0:
            raise ValueError(
                "`dataset.test_share` is 0, and `rounds` evaluate on the prompts of the test split. Raise it."
            )
        self.capabilities = {
            capability["name"]: import_function(capability["function"]) if "function" in capability else None
            for capability in self.rounds.capabilities
        }
        for capability in self.rounds.capabilities:
            if "texts" in capability:
                texts = load_split(capability["texts"], f"rounds.capabilities: {capability['name']}")
                if "text" not in texts.column_names or not len(texts):
                    raise ValueError(
                        f"The texts of {capability['name']!r} (`rounds.capabilities`) need rows with a column `text`, and have {len(texts)} with "
                        f"{texts.column_names}."
                    )
        if config.check is None:
            logger.warning(
                "There is no human check set (`check`): whether the student gets better by what people say is not measured, and does not "
                "stop the rounds."
            )
        if config.reward_model is not None:
            names = {f"{config.reward_model.name}_{number}" for number in range(1, self.rounds.num_rounds)}
            taken = sorted(names & {critic.get("name") for critic in config.judge.critics})
            if taken:
                raise ValueError(
                    f"A critic has the name {taken[0]!r}, which a reward model will have. Rename it, or `reward_model.name`."
                )
        refuse_folder(self.folder, self.folder / "rounds.json")
        self._synthesis(1, student["model"])  # checks all options

    def run(self) -> dict[str, Any]:
        """
        Runs the rounds that are not done yet.

        Returns:
            `dict[str, Any]`: what is in `rounds.json`: `rounds`, of each student from the first one on what [`Rounds.evaluate`] gives;
            `stopped`, why no further round was begun; and `best`, the `round` and the `model` of the best student, which is the one that
            the jury prefers most often to the first one, among those that no rule stopped.

        Raises:
            [`HumanCheckError`]: the jury agrees too little with people before anything is trained.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "rounds.json").is_file():
            write_json(self.folder / "rounds.json", {})
        first = self._initial_student()
        models: list[str] = [first]
        evaluations: list[dict[str, Any]] = []
        stopped: list[str] = []
        for number in range(1, self.rounds.num_rounds + 1):
            synthesis = self._synthesis(number, models[-1])
            try:
                dataset = synthesis.run()
            except HumanCheckError as error:
                if number == 1:
                    raise
                stopped = [f"In round {number}, before its training: {error}"]
                break
            del synthesis
            clear_device_cache(garbage_collection=True)  # or the training would not have it
            if number == 1:
                evaluations.append(self.evaluate(0, first, []))
            reference = first if self.rounds.reference == "initial" else models[-1]
            model = train(self.training, models[-1], dataset, self._folder(number) / "training", reference)
            models.append(str(model))
            evaluations.append(self.evaluate(number, models[-1], evaluations))
            stopped = evaluations[-1]["stops"]
            if stopped:
                break
            if (
                number == self.rounds.num_rounds or not self._folder(number + 1).is_dir()
            ):  # or a later one has written it
                self._report(models, evaluations, f"Round {number} is done.")
        done = f"All rounds are done (`num_rounds={self.rounds.num_rounds}`)."
        return self._report(models, evaluations, "; ".join(stopped) if stopped else done)

    def _report(self, models: list[str], evaluations: list[dict[str, Any]], why: str) -> dict[str, Any]:
        """Writes `rounds.json`."""
        eligible = [i for i, evaluation in enumerate(evaluations) if not evaluation["stops"]]
        best = max(eligible, key=lambda i: (evaluations[i]["win_rate"]["rate"], -i))
        report = {"rounds": evaluations, "stopped": why, "best": {"round": best, "model": models[best]}}
        write_json(self.folder / "rounds.json", report)
        return report

    def _folder(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def _initial_student(self) -> str:
        """The folder of the first student: that of its commit, if it is on the Hub, so that it stays the same in all rounds."""
        student = self.config.candidates.student
        return local_folder(student["model"], student.get("revision"))

    def _synthesis(self, number: int, model: str) -> Synthesis:
        """What makes the dataset of a round, with the reward models of all rounds before it in the jury."""
        config = self.config
        student = dict(config.candidates.student)
        if number > 1:  # no more that of the Hub
            student |= {"model": model, "revision": None}
        critics = list(config.judge.critics)
        if config.reward_model is not None:
            for earlier in range(1, number):
                critics.append(
                    {
                        "type": "reward",
                        "name": f"{config.reward_model.name}_{earlier}",
                        "model": str(self._folder(earlier) / "reward_model" / "model"),
                        "weight": config.reward_model.weight,
                    }
                )
        repo = config.dataset.push_to_hub
        of_round = replace(
            config,
            output_dir=str(self._folder(number)),
            candidates=replace(config.candidates, student=student),
            judge=replace(config.judge, critics=critics, store=config.judge.store or str(self._store_path)),
            dataset=replace(config.dataset, push_to_hub=repo and f"{repo}-round-{number}"),
            rounds=None,
            seed=config.seed + number - 1,
        )
        return Synthesis(of_round, self.budget)

    @property
    def _store_path(self) -> Path:
        return self.folder / "answers.sqlite"

    def evaluate(self, number: int, model: str, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """
        What is measured of the student that a round ends with.

        Args:
            number (`int`):
                The round, 0 for the first student.
            model (`str`):
                Path or name of the student.
            before (`Sequence[dict[str, Any]]`):
                What was measured of those before it.

        Returns:
            `dict[str, Any]`: `model`; `diversity` ([`response_diversity`]); `win_rate`, how often the jury (without reward models) prefers it
            to the first student; `human` and `jury`, its [`preference_accuracy`] on the human check set and on the pairs of the first
            student's responses that are in the test split; `capabilities`; `jury_and_people`, the jury's agreement with people in this
            round; and `stops`, for each rule that says to stop, why.
        """
        folder = self._folder(number)
        told = self._told(model)
        path = folder / "evaluation.json"
        if path.is_file():
            found = read_json(path)
            changed = [name for name in told if found["told"].get(name) != told[name]]
            if changed:
                raise ValueError(
                    f"'{path}' has the evaluation of something else: {', '.join(changed)} changed. Remove `evaluation.json`, "
                    f"`evaluation.jsonl` and `evaluation.settings.json` there to evaluate again."
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            found = {"told": told, **self._measure(number, model)}
            write_json(path, found)
        found["stops"] = self._stops(found, before)
        return found

    def _told(self, model: str) -> dict[str, Any]:
        """What an evaluation depends on: not the rules, which can be changed afterwards."""
        first = self._folder(1)
        told: dict[str, Any] = {
            "the student": weights_identity(model),
            "`num_evaluation_prompts`": self.rounds.num_evaluation_prompts,
            "`capabilities`": [
                {name: value for name, value in capability.items() if name != "max_drop"}
                for capability in self.rounds.capabilities
            ],
            "the critics": [critic.identity() for critic in self._jury().critics],
        }
        for name in ("prompts.jsonl", "kept.jsonl"):
            told[f"`{name}` of the first round"] = digest(first / name)
        for capability in self.rounds.capabilities:
            if "texts" in capability:
                texts = load_split(capability["texts"], f"rounds.capabilities: {capability['name']}")
                told[f"the texts of {capability['name']!r}"] = digest_of_rows(texts)
        if self.config.check is not None:
            told["the human check set"] = digest_of_rows(load_split(self.config.check.dataset, "check.dataset"))
        return told

    def _jury(self) -> Jury:
        """The critics of the config, without the reward models."""
        return Jury([make_critic(options) for options in self.config.judge.critics])

    def _measure(self, number: int, model: str) -> dict[str, Any]:
        samples = self._samples(number, model)
        measured: dict[str, Any] = {"model": model, "win_rate": self._win_rate(number)}
        clear_device_cache(garbage_collection=True)
        for capability in self.rounds.capabilities:
            function = self.capabilities[capability["name"]]
            if function is not None:
                value = function(model)
                if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                    raise TypeError(
                        f"The function {capability['function']!r} (`rounds.capabilities`) must return a number, and returned {value!r}."
                    )
                measured.setdefault("capabilities", {})[capability["name"]] = float(value)
        kwargs = self.config.candidates.student.get("model_kwargs")
        scorer = ResponseScorer(model, kwargs, self.rounds.batch_size)
        measured["diversity"] = response_diversity(scorer, samples)
        measured["jury"] = preference_accuracy(scorer, self._pairs_of_jury())
        measured["human"], measured["jury_and_people"] = None, None
        if self.config.check is not None:
            pairs, labels = check_pairs(load_split(self.config.check.dataset, "check.dataset"))
            ordered = [
                (pair.prompt, pair.responses[label], pair.responses[1 - label])
                for pair, label in zip(pairs, labels, strict=True)
            ]
            measured["human"] = preference_accuracy(scorer, ordered)
            report = read_json(self._folder(max(number, 1)) / "check.json")
            measured["jury_and_people"] = report["jury"]["agreement"]
        for capability in self.rounds.capabilities:
            if "texts" in capability:
                texts = load_split(capability["texts"], f"rounds.capabilities: {capability['name']}")["text"]
                value = text_log_likelihood(scorer, texts)
                measured.setdefault("capabilities", {})[capability["name"]] = value
        del scorer
        clear_device_cache(garbage_collection=True)
        return measured

    def _evaluation_prompts(self) -> Dataset:
        """Those of the test split, which are the same in all rounds."""
        rows = [
            row
            for row in Rows(self._folder(1) / "prompts.jsonl")
            if split_of(row["prompt_id"], self.config.dataset.test_share) == "test"
        ]
        if not rows:
            raise ValueError(
                f"No prompt is in the test split (`dataset.test_share={self.config.dataset.test_share}`), and `rounds` evaluate on them. "
                "Raise it, or use more prompts."
            )
        rows.sort(key=lambda row: row["prompt_id"])  # a hash, so that the first ones are any
        return Dataset.from_list(rows[: self.rounds.num_evaluation_prompts])

    def _samples(self, number: int, model: str) -> Rows:
        path, config = self._folder(number) / "evaluation.jsonl", self.config.candidates
        student = make_student({**config.student, "model": model, "revision": None})
        generate_candidates(
            self._evaluation_prompts(),
            student,
            path,
            num_responses=config.num_responses,
            temperatures=config.temperatures,
            seed=self.config.seed + _SEED_OF_EVALUATION,
        )
        return Rows(path)

    def _win_rate(self, number: int) -> dict[str, Any]:
        """How often the jury prefers the student to the first one, by the first response of each to each prompt."""
        if number == 0:
            return {"rate": 0.5, "interval": None, "number": 0}
        ours, theirs = (list(Rows(self._folder(i) / "evaluation.jsonl")) for i in (number, 0))
        pairs = [
            Pair(
                our["prompt_id"],
                (f"round-{number}", "round-0"),
                our["prompt"],
                (our["responses"][0]["text"], their["responses"][0]["text"]),
                {name: value for name, value in our.items() if name not in ("prompt_id", "prompt", "responses")},
            )
            for our, their in zip(ours, theirs, strict=True)
        ]
        jury = self._jury()
        with AnswerStore(self.config.judge.store or self._store_path) as store:
            self.budget.count(store)
            jury.ask(pairs, store, self.budget)
            path = self._folder(number) / "evaluation_verdicts.jsonl"
            write_rows(path, jury.verdicts(pairs, store))
        labels = [
            label_of_share(row["share"] if row["truth"] is None else float(row["truth"] == row["response_ids"][0]))
            for row in Rows(path)
        ]
        undecided = labels.count(None)
        return {**wilson_rate(labels.count(0) + undecided / 2, len(labels)), "decided": len(labels) - undecided}

    def _pairs_of_jury(self) -> list[tuple[Any, str, str]]:
        """What the jury said of the first student's responses, of prompts that are not trained on."""
        share = self.config.dataset.test_share
        return [
            (row["prompt"], row["chosen"], row["rejected"])
            for row in Rows(self._folder(1) / "kept.jsonl")
            if split_of(row["prompt_id"], share) == "test"
        ]

    def _stops(self, found: dict[str, Any], before: Sequence[dict[str, Any]]) -> list[str]:
        """Of each rule that says to stop, why."""
        if not before:
            return []
        rounds, first, stops = self.rounds, before[0], []
        human, jury = found["human"], found["jury"]
        if human is not None:
            best = max(evaluation["human"]["rate"] for evaluation in before)
            if rounds.max_human_accuracy_drop is not None and human["rate"] < best - rounds.max_human_accuracy_drop:
                stops.append(
                    f"the student's accuracy on the human check set fell from {best:.1%} to {human['rate']:.1%}, by more than "
                    f"`max_human_accuracy_drop={rounds.max_human_accuracy_drop}`"
                )
            if rounds.max_drift is not None and jury["rate"] is None:
                logger.warning(
                    "No pair of the test split was kept in round 1, so that `max_drift` cannot stop the rounds. Raise `dataset.test_share`."
                )
            elif rounds.max_drift is not None:
                drift = (jury["rate"] - first["jury"]["rate"]) - (human["rate"] - first["human"]["rate"])
                if drift > rounds.max_drift:
                    stops.append(
                        f"the jury and people drift apart: since the first student, its accuracy on the jury's pairs went from "
                        f"{first['jury']['rate']:.1%} to {jury['rate']:.1%} and on people's from {first['human']['rate']:.1%} to "
                        f"{human['rate']:.1%}, a difference of more than `max_drift={rounds.max_drift}`"
                    )
        for capability in rounds.capabilities:
            name = capability["name"]
            old, new = (evaluation["capabilities"][name] for evaluation in (first, found))
            if not new >= old - capability["max_drop"]:  # NaN is none either
                stops.append(
                    f"the capability {name!r} fell from {old:.4g} to {new:.4g}, by more than its `max_drop={capability['max_drop']}`"
                )
        old, new = first["diversity"], found["diversity"]
        for option, name in (("min_distinct", "distinct_2"), ("min_entropy", "entropy")):
            least = getattr(rounds, option)
            if least is not None and old[name] is not None and not (new[name] or 0.0) >= least * old[name]:
                was, now = (f"{one[name] or 0.0:.3g}" for one in (old, new))
                stops.append(f"diversity collapses: {name} fell from {was} to {now}, below `{option}={least}` of it")
        rise = rounds.max_self_bleu_rise
        if (
            rise is not None
            and new["self_bleu"] is not None
            and not new["self_bleu"] <= (old["self_bleu"] or 0.0) + rise
        ):
            stops.append(
                f"diversity collapses: self-BLEU rose from {old['self_bleu'] or 0.0:.3g} to {new['self_bleu']:.3g}, by more than "
                f"`max_self_bleu_rise={rise}`"
            )
        return stops
