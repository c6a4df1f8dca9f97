# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
From prompts to a preference dataset, stage by stage. Each leaves its files in the output folder, and what it was told in `stages.json`:

    prompts      prompts.jsonl, prompts_dropped.jsonl
    check        check_verdicts.jsonl, check.json: what the jury says of the human check set
    candidates   candidates.jsonl: the student's responses to each prompt
    judge        verdicts.jsonl: what it says of the candidates; all its answers are in answers.sqlite
    pairs        kept.jsonl, dropped.jsonl, each pair with the reason
    dataset      dataset/: the three forms and the card
    reward_model reward_model/model/: a reward model on them
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, load_dataset
from huggingface_hub import snapshot_download
from transformers.utils import logging

from .agreement import agreement_report
from .candidates import generate_candidates, temperature_spread
from .check_set import check_pairs, human_check, refuse_jury
from .critics import Critic, EndpointCritic, RuleCritic
from .endpoint import Budget, Endpoint
from .files import Rows, digest, digest_of_rows, read_json, replacing, write_json, write_row, write_rows
from .filters import FilterConfig, filter_pairs
from .identity import weights_of_folder
from .jury import Jury
from .output import build_dataset, check_repo, push
from .pairs import CandidatePairs, preference_pairs
from .prompts import prepare_prompts, refuse_overlap
from .ranking import PAIRINGS, compared_pairs
from .redaction import without_secrets
from .store import AnswerStore
from .synthesis_config import SynthesisConfig, import_function
from .training import TrainingConfig, train


logger = logging.get_logger(__name__)

STAGES = ("prompts", "check", "candidates", "judge", "pairs", "dataset", "reward_model")
_OUTPUTS = {
    "prompts": ("prompts.jsonl", "prompts_dropped.jsonl"),
    "candidates": ("candidates.jsonl",),
    "check": ("check_verdicts.jsonl", "check.json"),
    "judge": ("verdicts.jsonl",),
    "pairs": ("kept.jsonl", "dropped.jsonl"),
    "dataset": ("dataset/README.md",),
    "reward_model": ("reward_model/model/config.json",),
}


def make_critic(options: dict[str, Any]) -> Critic:
    """A critic of its `type` and options."""
    options = dict(options)
    kind = options.pop("type", None)
    if kind == "rule":
        function = options.pop("function", None)
        return _make(RuleCritic, {**options, "function": import_function(str(function))}, "a critic of type `rule`")
    if kind == "endpoint":
        return _make(EndpointCritic, _with_endpoint(options), "a critic of type `endpoint`")
    if kind in ("local", "reward"):
        from .model_critics import LocalCritic, RewardCritic

        return _make({"local": LocalCritic, "reward": RewardCritic}[kind], options, f"a critic of type `{kind}`")
    if isinstance(kind, str) and ":" in kind:
        cls = import_function(kind)
        if not (isinstance(cls, type) and issubclass(cls, Critic)):
            raise ValueError(f"The `type` {kind!r} of a critic must be a class made from `Critic`, and is {cls!r}.")
        return _make(cls, options, f"a critic of type `{kind}`")
    raise ValueError(
        "The `type` of a critic must be 'endpoint', 'local', 'reward', 'rule', or the name of a class of your own as in `file.py:MyCritic`, "
        f"got {kind!r}."
    )


def make_student(options: dict[str, Any]) -> Any:
    """A student of its `type` and options."""
    from .endpoint_student import EndpointStudent
    from .students import TransformersStudent
    from .vllm_student import VLLMStudent

    options = dict(options)
    kind = options.pop("type", None)
    kinds = {"transformers": TransformersStudent, "vllm": VLLMStudent, "endpoint": EndpointStudent}
    if kind not in kinds:
        raise ValueError(f"The `type` of the student must be one of {list(kinds)}, got {kind!r}.")
    return _make(
        kinds[kind], _with_endpoint(options) if kind == "endpoint" else options, f"a student of type `{kind}`"
    )


def _with_endpoint(options: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(Endpoint)}
    endpoint = _make(Endpoint, {name: value for name, value in options.items() if name in names}, "an endpoint")
    return {**{name: value for name, value in options.items() if name not in names}, "endpoint": endpoint}


def _make(cls: type, options: dict[str, Any], what: str) -> Any:
    known = [f.name for f in fields(cls) if f.init]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no option of {what}. Use one of {known}.")
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"The options of {what} are incomplete: {error}.") from error


class Synthesis:
    """
    A run: from prompts to a preference dataset.

    Example:

    ```python
    >>> from trl_spo.synthetic import Synthesis, SynthesisConfig

    >>> Synthesis(SynthesisConfig.from_yaml("examples/synthetic.yaml")).run()
    ```

    Args:
        config ([`SynthesisConfig`]):
            What it is told. All of it is checked here, before anything is asked or paid for.
        budget ([`Budget`], *optional*):
            What several runs may cost together; by default `judge.max_cost` for this one.

    Raises:
        `ValueError`: an option is wrong, or the output folder holds another run.
    """

    def __init__(self, config: SynthesisConfig, budget: Budget | None = None):
        self.config = config
        self.folder = Path(config.output_dir)
        self.budget = Budget(config.judge.max_cost) if budget is None else budget
        self.reward_training = None
        if config.reward_model is not None:
            of_training = ("options", "peft", "accelerate_config", "num_processes")
            options = {name: getattr(config.reward_model, name) for name in of_training}
            self.reward_training = TrainingConfig(method="reward", **options)
            if config.reward_model.model is None and "model" not in config.candidates.student:
                raise ValueError("`reward_model.model` is missing. Name the model to start from.")
        self._make_models()
        filters = dict(config.pairs.filters)
        if isinstance(filters.get("toxicity"), str):
            filters["toxicity"] = import_function(filters["toxicity"])
        self.filters = _make(FilterConfig, filters, "`pairs.filters`")
        if self.filters.min_probability is not None and config.check is None:
            raise ValueError(
                f"`pairs.filters.min_probability={self.filters.min_probability}` needs probabilities, which are calibrated by a human check "
                "set. Give one (`check`), or use `min_confidence`."
            )
        self.embed = import_function(config.prompts.embed) if config.prompts.embed else None
        if config.candidates.num_responses < 2:
            raise ValueError(
                f"`candidates.num_responses` must be at least 2 to compare responses, got {config.candidates.num_responses}."
            )
        temperature_spread(config.candidates.num_responses, config.candidates.temperatures)
        compared_pairs(config.candidates.num_responses, config.judge.num_comparisons, seed_key="")
        if config.pairs.pairing not in PAIRINGS:
            raise ValueError(f"`pairs.pairing` must be one of {list(PAIRINGS)}, got {config.pairs.pairing!r}.")
        if not 0 <= config.dataset.test_share < 1:
            raise ValueError(f"`dataset.test_share` must be from 0 to below 1, got {config.dataset.test_share}.")
        if config.dataset.push_to_hub is not None:
            check_repo(config.dataset.push_to_hub)
        refuse_folder(self.folder, self._records_path)

    def _make_models(self) -> None:
        self.jury = Jury([make_critic(options) for options in self.config.judge.critics])
        self.student = make_student(self.config.candidates.student)

    def free_memory(self) -> None:
        """Gives back the memory of the models in this process. They are loaded again when they are needed."""
        self._make_models()
        clear_device_cache(garbage_collection=True)

    @property
    def _records_path(self) -> Path:
        return self.folder / "stages.json"

    @property
    def records(self) -> dict[str, Any]:
        """Of each stage that is done: its settings, the digests of the files that it read, and its report."""
        return json.loads(self._records_path.read_text()) if self._records_path.is_file() else {}

    def run(self, stages: Sequence[str] | None = None) -> Path:
        """
        Runs the stages that are not done yet, in their order.

        Args:
            stages (`Sequence[str]`, *optional*):
                Only these, and again if they are done. The answers of the jury are kept, so that to judge again costs nothing but for
                what has changed.

        Returns:
            `Path`: the folder of the dataset.

        Raises:
            `ValueError`: a stage was done with other settings or other files, and is not among those to do again.
        """
        unknown = [stage for stage in stages or () if stage not in STAGES]
        if unknown:
            raise ValueError(f"There is no stage {unknown[0]!r}. Use some of {list(STAGES)}.")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._records_path.is_file():
            write_json(self._records_path, {})
        absent = [stage for stage in stages or () if not self._has(stage)]
        if absent:
            raise ValueError(f"The config has no `{absent[0]}`, and the stage of this name was asked for. Add it.")
        for stage in STAGES:
            if (stages is None or stage in stages) and self._has(stage):
                self._run(stage, again=stages is not None)
        return self.folder / "dataset"

    def _has(self, stage: str) -> bool:
        return stage not in ("check", "reward_model") or getattr(self.config, stage) is not None

    def _run(self, stage: str, again: bool) -> None:
        settings, files, make = {
            "prompts": self._prompts,
            "candidates": self._candidates,
            "check": self._check,
            "judge": self._judge,
            "pairs": self._pairs,
            "dataset": self._dataset,
            "reward_model": self._reward_model,
        }[stage]()
        inputs = {**{name: digest(self._file(name)) for name in files}, **self._identities(stage)}
        told = without_secrets({"settings": settings, "inputs": inputs})
        before = self.records.get(stage)
        there = all((self.folder / name).is_file() for name in _OUTPUTS[stage])
        if before is not None and there and not again:
            if {name: before[name] for name in told} == told:
                logger.info("The stage `%s` is done.", stage)
                return
            changed = [
                name if of == "inputs" else f"`{name}`"
                for of in ("inputs", "settings")
                for name in {**before[of], **told[of]}
                if before[of].get(name) != told[of].get(name)
            ]
            raise ValueError(
                f"'{self.folder}' has the stage `{stage}` of another run: {', '.join(changed)} changed. To do it again, name the stage "
                f"(`trl-spo synthesize CONFIG {stage} ...`); to keep it, name another `output_dir`. "
                "Candidates are never overwritten: remove `candidates.jsonl`, too, to have others. In a run with `rounds`, remove the folders of this round and of those after it, and of `round-0` the evaluation."
            )
        report = make()
        write_json(self._records_path, {**self.records, stage: {**told, "report": report}})

    def _identities(self, stage: str) -> dict[str, Any]:
        """What a stage reads that is no file of the run and that a path or a name does not tell: rows, weights, rubrics."""
        identities: dict[str, Any] = {}
        if stage == "prompts":
            identities["prompts.dataset"] = digest_of_rows(load_split(self.config.prompts.dataset, "prompts.dataset"))
        if stage == "check":
            identities["check.dataset"] = digest_of_rows(load_split(self.config.check.dataset, "check.dataset"))
        student = self.config.candidates.student.get("model")
        if stage == "candidates" and isinstance(student, str) and Path(student).is_dir():
            identities["the weights of the student"] = weights_of_folder(student)
        if stage in ("check", "judge"):
            identities |= {f"the critic '{critic.name}'": critic.identity() for critic in self.jury.critics}
        start = self.config.reward_model and self.config.reward_model.model
        if stage == "reward_model" and start is not None and Path(start).is_dir():
            identities["the weights of `reward_model.model`"] = weights_of_folder(start)
        return identities

    def _file(self, name: str) -> Path:
        return Rows(self.folder / name).path

    def _prompts(self) -> tuple[dict[str, Any], Sequence[str], Callable[[], dict[str, Any]]]:
        def make() -> dict[str, Any]:
            config = self.config.prompts
            tokenizer = None
            if config.max_prompt_length is not None:
                from transformers import AutoTokenizer

                student = self.config.candidates.student
                tokenizer = AutoTokenizer.from_pretrained(student["model"], revision=student.get("revision") or "main")
            prepared = prepare_prompts(
                load_split(config.dataset, "prompts.dataset"),
                tokenizer=tokenizer,
                max_prompt_length=config.max_prompt_length,
                near_duplicates=config.near_duplicates,
                topic_column=config.topic_column,
                embed=self.embed,
                num_topics=config.num_topics,
                seed=self.config.seed,
            )
            if self.config.check is not None:
                self._refuse_overlap(prepared.prompts["prompt"])
            if hasattr(self.student, "endpoint"):  # before anything is paid for
                self.student.endpoint.check(**self.student.options(self.config.candidates.temperatures[0]))
            self.jury.check({name: value for name, value in prepared.prompts[0].items() if name != "prompt"})
            write_rows(self.folder / "prompts.jsonl", prepared.prompts)
            write_rows(self.folder / "prompts_dropped.jsonl", prepared.dropped)
            return prepared.report

        settings = {**asdict(self.config.prompts), "seed": self.config.seed}
        if self.config.prompts.max_prompt_length is not None:  # in tokens of the student
            settings |= {name: self.config.candidates.student.get(name) for name in ("model", "revision")}
        return settings, (), make

    def _candidates(self) -> tuple[dict[str, Any], Sequence[str], Callable[[], dict[str, Any]]]:
        def make() -> dict[str, Any]:
            config = self.config.candidates
            self.free_memory()  # of the critics
            with self._store() as store:
                if hasattr(self.student, "endpoint"):
                    self.student.store, self.student.budget = store, self.budget
                generate_candidates(
                    Dataset.from_list(list(Rows(self.folder / "prompts.jsonl"))),
                    self.student,
                    self.folder / "candidates.jsonl",
                    num_responses=config.num_responses,
                    temperatures=config.temperatures,
                    seed=self.config.seed,
                )
            self.free_memory()  # of the student
            return read_json(self.folder / "candidates.settings.json")

        return {**asdict(self.config.candidates), "seed": self.config.seed}, ("prompts.jsonl",), make

    def _store(self) -> AnswerStore:
        store = AnswerStore(self.config.judge.store or self.folder / "answers.sqlite")
        self.budget.count(store)
        return store

    def _check(self) -> tuple[dict[str, Any], Sequence[str], Callable[[], dict[str, Any]]]:
        config = self.config.check

        def make() -> dict[str, Any]:
            pairs, labels = check_pairs(load_split(config.dataset, "check.dataset"))
            self._refuse_overlap([row["prompt"] for row in Rows(self.folder / "prompts.jsonl")])
            with self._store() as store:
                self.jury.ask(pairs, store, self.budget)
                write_rows(self.folder / "check_verdicts.jsonl", self.jury.verdicts(pairs, store))
            report = human_check(Rows(self.folder / "check_verdicts.jsonl"), labels, self.config.seed)
            write_json(self.folder / "check.json", report)
            refuse_jury(report, config.min_agreement)
            return report

        return {**asdict(config), "critics": self.config.judge.critics}, ("prompts.jsonl",), make

    def _refuse_overlap(self, prompts: Sequence[Any]) -> None:
        pairs, _ = check_pairs(load_split(self.config.check.dataset, "check.dataset"))
        refuse_overlap(prompts, [pair.prompt for pair in pairs], threshold=self.config.prompts.near_duplicates)

    def _refuse_unchecked_jury(self) -> None:
        """Raises an error if this jury was not checked, or was and agrees too little with people."""
        if "check" not in self.records:
            raise ValueError(
                "This jury has not passed the human check (`check`). Name the stage `check`, too (`trl-spo synthesize CONFIG check ...`)."
            )
        before, now = self.records["check"]["inputs"], without_secrets(self._identities("check"))
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} changed since the human check. Name the stage `check`, too (`trl-spo synthesize CONFIG check ...`)."
            )
        refuse_jury(read_json(self.folder / "check.json"), self.config.check.min_agreement)

    def _judge(self) -> tuple[dict[str, Any], Sequence[str], Callable[[], dict[str, Any]]]:
        config = self.config.judge

        def make() -> dict[str, Any]:
            if self.config.check is not None:
                self._refuse_unchecked_jury()
            candidates = Rows(self.folder / "candidates.jsonl")
            pairs = CandidatePairs(candidates, config.num_comparisons)
            start = random.SystemRandom().randrange(len(candidates))
            with self._store() as store:
                self.jury.ask(CandidatePairs(candidates, config.num_comparisons, start), store, self.budget)
                write_rows(self.folder / "verdicts.jsonl", self.jury.verdicts(pairs, store))
            return agreement_report(Rows(self.folder / "verdicts.jsonl"), self.config.seed)

        settings = {"critics": config.critics, "num_comparisons": config.num_comparisons}
        return settings, ("candidates.jsonl", *(("check.json",) if self.config.check is not None else ())), make

    def _pairs(self) -> tuple[dict[str, Any], Sequence[str], Callable[[], dict[str, Any]]]:
        config = self.config.pairs
        inputs = ["candidates.jsonl", "verdicts.jsonl", *(["check.json"] if self.config.check is not None else [])]

        def make() -> dict[str, Any]:
            candidates, verdicts = Rows(self.folder / "candidates.jsonl"), Rows(self.folder / "verdicts.jsonl")
            calibration = None
            if self.config.check is not None:
                self._refuse_unchecked_jury()
                calibration = read_json(self.folder / "check.json")["calibration"]
            judged = preference_pairs(candidates, verdicts, config.pairing, self.config.seed, calibration)
            counts: Counter[str] = Counter()
            with replacing(self.folder / "kept.jsonl", self.folder / "dropped.jsonl") as (kept, dropped):

                def to_filter():
                    for row, reason in judged:
                        if reason is None:
                            yield row
                        else:
                            counts[reason] += 1
                            write_row(dropped, {**row, "reason": reason})

                for row, reason in filter_pairs(to_filter(), self.filters):
                    counts[reason or "kept"] += 1
                    write_row(
                        kept if reason is None else dropped, row if reason is None else {**row, "reason": reason}
                    )
            if not counts["kept"]:
                raise ValueError(f"No pair is left: {dict(counts)}. `dropped.jsonl` has them with the reasons.")
            return {"kept": counts.pop("kept"), "dropped": dict(counts)}

        return {**asdict(config), "seed": self.config.seed}, inputs, make

    def _dataset(self) -> tuple[dict[str, Any], Sequence[str], Callable[[], dict[str, Any]]]:
        config = self.config.dataset
        inputs = ("candidates.jsonl", "verdicts.jsonl", "kept.jsonl")

        def make() -> dict[str, Any]:
            files, told = (Rows(self.folder / name) for name in inputs), asdict(self.config)
            counts = build_dataset(self.folder / "dataset", *files, config.test_share, told, self.records)
            if config.push_to_hub is not None:
                push(self.folder / "dataset", config.push_to_hub, config.private)
            return {"rows": counts}

        return asdict(config), inputs, make

    def _reward_model(self) -> tuple[dict[str, Any], Sequence[str], Callable[[], dict[str, Any]]]:
        config, folder = self.config.reward_model, self.folder / "reward_model"

        def make() -> dict[str, Any]:
            if self.config.check is not None:
                self._refuse_unchecked_jury()
            student = self.config.candidates.student
            start = config.model or student["model"]
            if config.model is None and student.get("revision") is not None and not Path(start).is_dir():
                start = snapshot_download(start, revision=student["revision"])
            self.free_memory()
            train(self.reward_training, start, self.folder / "dataset", folder, replace=True)
            return {"trained_from": start}

        # It is trained on the part of the pairs that is in the train split
        return {**asdict(config), "test_share": self.config.dataset.test_share}, ("kept.jsonl",), make


def refuse_folder(folder: Path, mark: Path) -> None:
    """Raises a `ValueError` if a folder has something else than a run, which has the file `mark`."""
    # Hidden files are those that a kill has left half written
    if folder.exists() and not mark.is_file() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"The folder '{folder}' (`output_dir`) holds something else. Name another one.")


def load_split(arguments: dict[str, Any], name: str) -> Dataset:
    """One split of a dataset, by the arguments of [`~datasets.load_dataset`]."""
    dataset = load_dataset(**arguments)
    if not isinstance(dataset, Dataset):
        raise ValueError(f"`{name}` must name one `split`, and loads a {type(dataset).__name__} with {list(dataset)}.")
    return dataset
