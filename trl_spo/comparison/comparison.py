# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
The comparison of methods on one's own data: trains each, evaluates its checkpoints, and writes the report.

The output folder has the data in the forms that the methods take (`data/`), a folder for each training (`runs/`) and for what is measured of it
(`evaluation/`), `comparison.json` with all figures, and the report: `report.html`, `report.md` and pictures. Run again, it goes on where it was stopped; with more
methods, settings or seeds, it adds them.
"""

import json
import re
import shutil
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import load_dataset as load_hub_dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..advisor.models import ModelFacts, read_model
from ..evaluation.capability import Capability
from ..evaluation.evaluation import REFERENCE, Evaluation
from ..synthetic.files import digest, read_json, write_json
from ..synthetic.identity import local_folder, weights_identity
from ..synthetic.store import request_key
from ..synthetic.synthesis_config import import_function
from ..synthetic.training import WITH_REWARD_MODEL, TrainingConfig, TrainingError, has_begun, train
from .comparison_config import ComparisonConfig, PlannedRun
from .data import ComparisonData, prepare_data
from .plots import check_plots
from .report import write_report
from .summary import summarize


logger = logging.get_logger(__name__)

_LOG_LINES = 30  # of a training that failed, in the report
_ERROR = re.compile(
    r"\b\w+(Error|Exception|Interrupt)\b|\(exitcode: -\d+\)"
)  # such as ValueError, or killed by a signal


class Comparison:
    """
    Compares methods.

    Args:
        config ([`ComparisonConfig`]):
            What it is told. All of it is checked here, before anything is trained.
        command (`str`, *optional*):
            The command to repeat it, for the report.

    Raises:
        `ValueError`: an option is wrong, or the output folder holds another comparison.
        `ImportError`: an extra is missing.
    """

    def __init__(self, config: ComparisonConfig, command: str | None = None):
        check_plots()
        self.config, self.command = config, command
        self.folder = Path(config.output_dir)
        self.runs = config.planned_runs()
        self.reward = import_function(config.reward) if config.reward is not None else None
        self.critics = self._make_critics()
        self.capabilities = [_make_capability(options) for options in config.evaluation.capabilities]
        self._commit = self._refuse_another()
        self._refuse_other_trainings()
        self._reward_errors: dict[int, TrainingError] = {}
        self._prepared: tuple[ComparisonData, Evaluation] | None = None

    def prepare(self) -> tuple[ComparisonData, Evaluation]:
        """
        Makes the data, and checks them and the critics. [`run`] begins with it, if it was not done before.

        Raises:
            `ValueError`: the dataset has not what the methods take, the model cannot be read, or a critic cannot judge.
        """
        if self._prepared is None:
            config, path = self.config, self.folder / "config.json"
            is_new = not path.is_file()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, self._identity())
            try:
                data = prepare_data(config.dataset, self.folder / "data", config.seed)
                for run in self.runs:
                    data.form_of(run.method, run.training.form)
                    if run.method in WITH_REWARD_MODEL:
                        data.form_of("reward")
                self.model = local_folder(config.model, self._commit)
                kwargs = config.evaluation.model_kwargs or {}
                facts = read_model(self.model, trust_remote_code=kwargs.get("trust_remote_code", False))
            except Exception:  # raised again
                if is_new:  # so that the folder takes the dataset and the model that were meant
                    path.unlink()
                    shutil.rmtree(self.folder / "data", ignore_errors=True)
                raise
            self._prepared = data, self._evaluation(data, facts)
        return self._prepared

    def run(self) -> dict[str, Any]:
        """
        Trains and evaluates what is not there yet, and writes the report.

        A training that crashes, or a judge that fails, is in the report, and the others go on.

        Returns:
            `dict[str, Any]`: what is in `comparison.json`.
        """
        data, evaluation = self.prepare()
        # First of all, so that what is wrong with the reward function, the prompts or the capabilities shows before anything is trained
        base = evaluation.evaluate(self.model, REFERENCE)
        evaluation.free_memory()
        done = []
        with tqdm(self.runs, desc="Trainings", unit=" trainings") as bar:
            for run in bar:
                bar.set_postfix_str(run.id)
                done.append(self._run(run, data, evaluation))
                if done[-1]["status"] != "done":
                    logger.warning("%s: %s (%s)", run.id, done[-1]["status"], _line_of_error(done[-1]["error"]))
        summary = summarize(self.config, self.command, data, evaluation, base, done)
        write_json(self.folder / "comparison.json", summary)
        write_report(summary, self.folder)
        return summary

    def _make_critics(self) -> list[Any]:
        if not self.config.critics:
            return []
        try:
            from ..synthetic.synthesis import make_critic
        except ModuleNotFoundError as error:
            raise ImportError(
                f'`critics` need the package {error.name!r}. Run `pip install "trl-spo[synthetic]"`.'
            ) from error
        return [make_critic(options) for options in self.config.critics]

    def _identity(self) -> dict[str, Any]:
        """What all trainings and evaluations of an output folder have in common."""
        return {
            "model": self.config.model,
            "weights": weights_identity(self.config.model, self._commit),
            "dataset": asdict(self.config.dataset),
            "seed": self.config.seed,
        }

    def _refuse_another(self) -> str | None:
        """Raises a `ValueError` if the folder has something else. Returns the commit of a model on the Hub that it was begun with."""
        path = self.folder / "config.json"
        self._commit = None
        if path.is_file():
            before = read_json(path)
            if before["model"] == self.config.model:
                self._commit = before["weights"].get("commit")
            now = json.loads(json.dumps(self._identity()))
            changed = [
                f"`{name}` was {before.get(name)!r} and is now {now[name]!r}"
                for name in now
                if before.get(name) != now[name]
            ]
            if changed:
                raise ValueError(
                    f"'{self.folder}' holds another comparison: {'; '.join(changed)}. Name another `output_dir`, or remove the folder."
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"'{self.folder}' (`output_dir`) holds something else than a comparison. Name another folder."
            )
        return self._commit

    def _refuse_other_trainings(self) -> None:
        """Raises a `ValueError` if a training of the folder was done with other options, before anything is done again."""
        trainings = {run.id: run.training for run in self.runs}
        for run in self.runs:
            if run.method in WITH_REWARD_MODEL:
                trainings[self._reward_folder(run.seed).name] = self._reward_training(run.seed)
        for name, training in trainings.items():
            folder = self.folder / "runs" / name
            if (folder / "training.json").is_file() and has_begun(folder):
                before, now = read_json(folder / "training.json"), json.loads(json.dumps(asdict(training)))
                options = {**before["options"], **now["options"]}
                changed = [name for name in options if before["options"].get(name) != now["options"].get(name)]
                # With other processes the batches would be others, too
                shared = ("peft", "accelerate_config", "num_processes")
                changed += [name for name in shared if before.get(name, now[name]) != now[name]]
                changed += ["form"] if now["form"] not in (None, before["form"]) else []
                if changed:
                    names = ", ".join("`evaluation.checkpoints`" if n == "save_steps" else f"`{n}`" for n in changed)
                    raise ValueError(
                        f"The training '{folder}' was done with other options: {names} changed. Name another `output_dir`, or remove the "
                        "folders of these trainings to do them again."
                    )

    def _evaluation(self, data: ComparisonData, facts: ModelFacts) -> Evaluation:
        told, config = self.config.evaluation, self.config
        budget = None
        if self.critics:
            from ..synthetic.endpoint import Budget

            budget = Budget(config.max_cost)
        evaluation = Evaluation(
            self.folder / "evaluation",
            self.model,
            data.prompts(told.num_prompts, config.seed, facts.tokenizer, facts.context, told.max_new_tokens),
            reward=self.reward,
            reward_identity=self._reward_identity(),
            critics=self.critics,
            pairs=data.pairs(told.num_pairs, config.seed),
            capabilities=self.capabilities,
            num_responses=told.num_responses,
            max_new_tokens=told.max_new_tokens,
            batch_size=told.batch_size,
            model_kwargs=told.model_kwargs,
            budget=budget,
            seed=config.seed,
        )
        evaluation.check_critics()
        return evaluation

    def _reward_identity(self) -> Any:
        """What tells the reward function from others, if it is an object, too: the file that it was read from."""
        if self.config.reward is None:
            return None
        where = self.config.reward.partition(":")[0]
        file = where if where.endswith(".py") else getattr(sys.modules[where], "__file__", None)  # none of a built-in
        return [self.config.reward, file and digest(Path(file))]

    def _run(self, run: PlannedRun, data: ComparisonData, evaluation: Evaluation) -> dict[str, Any]:
        """Trains and evaluates once. What goes wrong is in the result, with the stage."""
        folder = self.folder / "runs" / run.id
        folder.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {"run": run, "status": "failed", "error": None, "stage": None, "points": []}
        result |= dict.fromkeys(("seconds", "reward_seconds", "peak_memory", "memory_of", "processes"))
        try:
            result["stage"] = "reward model"
            reward_model = self._reward_model(run.seed, data) if run.method in WITH_REWARD_MODEL else None
            result["stage"] = "training"
            form = data.form_of(run.method, run.training.form)
            run.training.form = form
            model = train(
                run.training,
                self.model,
                data.folder,
                folder,
                reward_model=reward_model and str(reward_model),
                log=folder / "training.log",
            )
            result |= _measured(folder, reward_model)
            result["stage"] = "evaluation"
            models = self._models(run, folder, model)
            for point in models:
                if point["path"] is not None:
                    point["found"] = evaluation.evaluate(
                        point["path"], point["name"], quality=False, capabilities=point["final"]
                    )
                result["points"].append(point)
            result |= {"stage": "judge", "status": "unjudged"}
            for judge in (False, True):  # so that a jury that fails does not take the rewards along
                for point in models:
                    asked = self.critics and (point["final"] or self.config.evaluation.judge_checkpoints)
                    if point["path"] is not None and (asked or not judge):
                        point["found"] = evaluation.evaluate(
                            point["path"], point["name"], judge=judge, capabilities=point["final"]
                        )
            self._keep(folder, models)
            result |= {"stage": None, "status": "done"}
        except TrainingError as error:
            log = folder if result["stage"] == "training" else self._reward_folder(run.seed)
            result["error"] = f"{error}\n{_end_of_log(log / 'training.log')}"
        except Exception:  # of one run: it is shown, and the others go on
            result["error"] = traceback.format_exc()
        finally:
            evaluation.free_memory()
        return result

    def _models(self, run: PlannedRun, folder: Path, model: Path) -> list[dict[str, Any]]:
        """
        What is evaluated of a training, in order of its steps. A checkpoint that was removed has what was `found` of it instead of a `path`, if
        it would be measured in the same way today.
        """
        kept = _checkpoints(folder)
        *along, end = kept["steps"]
        found = kept["metrics"] if kept["key"] == self._evaluation_key() else {}
        models = []
        for step in along if self.config.evaluation.checkpoints > 1 and not run.is_unrolled else ():
            path = folder / "checkpoints" / f"checkpoint-{step}"
            point = {"step": step, "final": False, "name": f"{run.id}/{step}", "path": str(path)}
            if not path.is_dir() and str(step) in found:
                point |= {"path": None, "found": {"metrics": found[str(step)]}}
            elif not path.is_dir():
                logger.warning("'%s' was removed, and cannot be evaluated in another way than before.", path)
                continue
            models.append(point)
        return [*models, {"step": end, "final": True, "name": f"{run.id}/end", "path": str(model)}]

    def _keep(self, folder: Path, models: list[dict[str, Any]]) -> None:
        """Keeps what was found of the checkpoints, so that they can be removed."""
        kept, key = _checkpoints(folder), self._evaluation_key()
        metrics = kept["metrics"] if kept["key"] == key else {}
        metrics |= {str(point["step"]): point["found"]["metrics"] for point in models if not point["final"]}
        write_json(folder / "checkpoints.json", kept | {"key": key, "metrics": metrics})

    def _evaluation_key(self) -> str:
        """What tells how checkpoints are measured."""
        _, evaluation = self.prepare()
        told = {**asdict(self.config.evaluation), "checkpoints": None, "capabilities": None}
        return request_key(told=repr([told, evaluation.reward_identity, self.config.critics, self.config.seed]))

    def _reward_training(self, seed: int) -> TrainingConfig:
        return self.config.make_training("reward", self.config.reward_model, seed)

    def _reward_folder(self, seed: int) -> Path:
        return self.folder / "runs" / f"reward,seed={seed}"

    def _reward_model(self, seed: int, data: ComparisonData) -> Path:
        """That of a seed. If its training has failed, it is not tried again for the next setting."""
        if seed in self._reward_errors:
            raise self._reward_errors[seed]
        folder = self._reward_folder(seed)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return train(self._reward_training(seed), self.model, data.folder, folder, log=folder / "training.log")
        except TrainingError as error:
            self._reward_errors[seed] = error
            raise


def _make_capability(options: dict[str, Any]) -> Capability:
    options = dict(options)
    name = options.get("name")
    if name is None:
        raise ValueError(f"Each of `evaluation.capabilities` needs a `name`, got {options}.")
    if isinstance(options.get("function"), str):
        options["function"] = import_function(options["function"])
    for kind in ("texts", "questions"):
        if isinstance(options.get(kind), dict):
            rows = load_hub_dataset(**options[kind])
            question = "prompt" if "prompt" in rows.column_names else "question"
            wanted = ["text"] if kind == "texts" else [question, "answer"]
            missing = [column for column in wanted if column not in rows.column_names]
            if missing:
                raise ValueError(
                    f"The {kind} of the capability {name!r} have no column {missing[0]!r}, but {rows.column_names}."
                )
            columns = [rows[column] for column in wanted]
            options[kind] = list(columns[0]) if kind == "texts" else list(zip(*columns, strict=True))
    try:
        return Capability(**options)
    except TypeError as error:
        raise ValueError(f"The options of the capability {name!r} cannot be used: {error}.") from error


def _checkpoints(folder: Path) -> dict[str, Any]:
    """
    What is kept of the checkpoints of a training that is done: their `steps`, and what was measured of them. The state of their optimizers,
    which is no longer needed, is removed, and the last one, which is the model.
    """
    path = folder / "checkpoints.json"
    found = {int(one.name.rpartition("-")[2]): one for one in (folder / "checkpoints").glob("checkpoint-*")}
    if not path.is_file():
        write_json(path, {"steps": sorted(found), "key": None, "metrics": {}})
    kept = read_json(path)
    for step, checkpoint in found.items():
        if step == kept["steps"][-1]:
            shutil.rmtree(checkpoint)
            continue
        for of_optimizer in (*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")):
            shutil.rmtree(of_optimizer) if of_optimizer.is_dir() else of_optimizer.unlink()
    return kept


def _measured(folder: Path, reward_model: Path | None) -> dict[str, Any]:
    measured = {**read_json(folder / "measured.json"), "reward_seconds": 0.0}
    if reward_model is not None:  # which has to be trained first
        of_reward = read_json(reward_model.with_name("measured.json"))
        measured["reward_seconds"] = of_reward["seconds"]
        measured["seconds"] += of_reward["seconds"]
        measured["peak_memory"] = max(measured["peak_memory"], of_reward["peak_memory"])
    return measured


def _end_of_log(path: Path) -> str:
    """The last lines of a log, without those that the launcher adds after the error of the training."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    last = max((i for i, line in enumerate(lines) if line.startswith("Traceback")), default=len(lines))
    own = lines[:last] if any("accelerate/commands/launch.py" in line for line in lines[last:]) else lines
    first = re.findall(r"\(exitcode: -?\d+\) local_rank: (\d+)", text)
    if first and any(
        line.startswith(f"[rank{first[-1]}]:") for line in own
    ):  # the others say that they have lost this one
        own = [line for line in own if line.startswith(f"[rank{first[-1]}]:") or not line.startswith("[rank")]
    said = own[-_LOG_LINES:]
    if not any(_ERROR.search(line) for line in said):  # it was killed, and only the launcher knows
        said = lines[-_LOG_LINES:]
    return "\n".join(said)


def _line_of_error(text: str) -> str:
    lines = text.splitlines()
    return next((line for line in reversed(lines) if _ERROR.search(line)), lines[-1])
