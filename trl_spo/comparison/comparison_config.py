# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run of `trl-spo compare` is told, as a YAML file has it."""

import difflib
import itertools
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..synthetic.synthesis_config import from_dict, import_function
from ..synthetic.training import METHODS, WITH_REWARD_MODEL, TrainingConfig, config_class


# Name of a method -> what the report calls it, and the grid that it has if none is given
COMPARED: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "dpo": ("DPO", {"beta": [0.05, 0.1, 0.3]}),
    "ipo": ("IPO", {"beta": [0.1, 0.3, 1.0]}),
    "kto": ("KTO", {"beta": [0.05, 0.1, 0.3]}),
    "soft_po": ("Soft PO", {"alpha": [0.05, 0.1], "beta": [0.03, 0.1]}),
    # Which hardly leaves its reference at the default weight of 10, where the responses are its own (docs/results.md)
    "stable_po": ("Stable PO", {"beta": [0.1], "penalty_weight": [0.3, 1.0, 10.0]}),
    "sspo": ("SSPO", {"beta": [0.05, 0.1, 0.3]}),
    "sspo_kto": ("SSPO-KTO", {"beta": [0.05, 0.1, 0.3]}),
    "rloo": ("RLHF (RLOO)", {"beta": [0.03, 0.1]}),
    "grpo": ("RLHF (GRPO)", {"beta": [0.03, 0.1]}),
}
_SYMBOLS = {"alpha": "α", "beta": "β", "gamma": "γ", "learning_rate": "lr", "penalty_weight": "w"}
_RESERVED = (
    "seed",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "save_only_model",
    "load_best_model_at_end",
)  # which the comparison sets


@dataclass(kw_only=True)
class DataConfig:
    """
    The preference data.

    Args:
        path (`str`):
            Name on the Hub, folder or file, as `--dataset_name` of the training subcommands takes it.
        name (`str`, *optional*):
            Configuration of the dataset.
        train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        test_split (`str`, *optional*):
            Split that is held out; by default `"test"`, and if there is none, `test_share` of the prompts.
        test_share (`float`, *optional*, defaults to `0.05`):
            Share of the prompts that is held out, if there is no test split.
        max_train_rows (`int`, *optional*):
            Rows to train on, drawn at random; all by default.
    """

    path: str
    name: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    test_share: float = 0.05
    max_train_rows: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ValueError(f"`dataset.test_share` must be between 0 and 1, got {self.test_share}.")
        if self.max_train_rows is not None and self.max_train_rows < 1:
            raise ValueError(f"`dataset.max_train_rows` must be at least 1, got {self.max_train_rows}.")


@dataclass(kw_only=True)
class EvaluationConfig:
    """
    What is measured. See [`~trl_spo.evaluation.Evaluation`].

    Args:
        num_prompts (`int`, *optional*, defaults to `256`):
            Prompts of the test split that each policy answers.
        num_pairs (`int`, *optional*, defaults to `512`):
            Pairs of the test split whose log-probabilities are looked at.
        checkpoints (`int`, *optional*, defaults to `3`):
            How often each training is evaluated, evenly spaced, the end included.
        judge_checkpoints (`bool`, *optional*, defaults to `False`):
            Whether the critics judge all of these, and not the last one only. A reward function is asked about all of them.
        num_responses, max_new_tokens, batch_size, model_kwargs:
            As in [`~trl_spo.evaluation.Evaluation`].
        capabilities (`list[dict[str, Any]]`, *optional*):
            What must not be lost: of each the options of [`~trl_spo.evaluation.Capability`], with `texts` and `questions` as arguments of
            [`~datasets.load_dataset`] with one `split` (columns `text`; `prompt` or `question`, and `answer`) and `function` by its name.
    """

    num_prompts: int = 256
    num_pairs: int = 512
    checkpoints: int = 3
    judge_checkpoints: bool = False
    num_responses: int = 1
    max_new_tokens: int = 256
    batch_size: int = 8
    model_kwargs: dict[str, Any] | None = None
    capabilities: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_pairs", "checkpoints", "num_responses", "max_new_tokens", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"`evaluation.{name}` must be a whole number of at least 1, got {getattr(self, name)!r}."
                )
        _check_kinds(self, "evaluation.", {"capabilities": list})


@dataclass(kw_only=True)
class ComparisonConfig:
    """
    A run of `trl-spo compare`.

    > Parameters that control what is compared

    Args:
        output_dir (`str`):
            Folder of the run: its data, its trainings, its evaluations and its report.
        model (`str`):
            Path or name of the model to start from: the SFT model that the responses were sampled from, if it exists. It is the reference, too.
        dataset (`dict[str, Any]`):
            Options of [`DataConfig`].
        methods (`dict[str, dict[str, Any]]` or `list[str]`):
            Of each method the options of its config. A list of values is a grid, and all combinations of a method's grids are trained. A method without
            options has the grid of `COMPARED`. `"rloo"` and `"grpo"` first train a reward model on the same pairs.
        seeds (`list[int]`, *optional*, defaults to `[42]`):
            Seeds of the trainings, each of which is done with all of them.

        > Parameters that control the training

        training (`dict[str, Any]`, *optional*):
            Options of all methods, such as `learning_rate`; those that a method's config does not have are left out for it.
        reward_model (`dict[str, Any]`, *optional*):
            Options of [`~trl.RewardConfig`], for `"rloo"` and `"grpo"`.
        peft (`dict[str, Any]`, *optional*):
            Options of [`~peft.LoraConfig`], to train adapters.
        accelerate_config (`str`, *optional*):
            One of the packaged configs, such as `"zero3"`, or the path of another.
        num_processes (`int`, *optional*):
            Number of processes; by default as many as devices.

        > Parameters that control the evaluation

        reward (`str`, *optional*):
            Reward function, as those of TRL's GRPOTrainer, by its name: `package.module:function` or `file.py:function`.
        critics (`list[dict[str, Any]]`, *optional*):
            Critics, as in the stage `judge` of `trl-spo synthesize`. One of `reward` and `critics` at least.
        max_cost (`float`, *optional*):
            What the critics may cost together.
        evaluation (`dict[str, Any]`, *optional*):
            Options of [`EvaluationConfig`].
        price_per_hour (`float`, *optional*):
            Of one device, for the cost of each training.
        currency (`str`, *optional*, defaults to `"USD"`):
            Of that price and those of the critics.
        seed (`int`, *optional*, defaults to `42`):
            Of the data, the responses and the bootstrap.

    Raises:
        `ValueError`: an option is unknown, missing or out of its range.
    """

    output_dir: str
    model: str
    dataset: DataConfig
    methods: dict[str, dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [42])
    training: dict[str, Any] = field(default_factory=dict)
    reward_model: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = None
    accelerate_config: str | None = None
    num_processes: int | None = None
    reward: str | None = None
    critics: list[dict[str, Any]] = field(default_factory=list)
    max_cost: float | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    price_per_hour: float | None = None
    currency: str = "USD"
    seed: int = 42

    def __post_init__(self) -> None:
        if isinstance(self.dataset, str):
            self.dataset = {"path": self.dataset}
        if not isinstance(self.dataset, DataConfig):
            self.dataset = from_dict(DataConfig, self.dataset, "dataset.")
        if not isinstance(self.evaluation, EvaluationConfig):
            self.evaluation = from_dict(EvaluationConfig, self.evaluation, "evaluation.")
        _check_kinds(self, "", {"seeds": list, "training": dict, "reward_model": dict, "critics": list})
        if isinstance(self.methods, list):
            self.methods = {name: {} for name in self.methods}
        if not isinstance(self.methods, dict) or not self.methods:
            raise ValueError(f"`methods` must name one method at least, of {list(COMPARED)}, got {self.methods!r}.")
        for name in self.methods:
            if name not in COMPARED:
                close = difflib.get_close_matches(str(name), COMPARED, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else f"They are {list(COMPARED)}."
                raise ValueError(f"`methods` has {name!r}, which is no method that can be compared. {hint}")
            self.methods[name] = self.methods[name] or {}
        _check_kinds(self.methods, "methods.", dict.fromkeys(self.methods, dict))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or {type(seed) for seed in self.seeds} != {int}:
            raise ValueError(f"`seeds` must be one seed at least, whole numbers, each once, got {self.seeds}.")
        if self.reward is None and not self.critics:
            raise ValueError(
                "Neither `reward` nor `critics` is given, so that nobody could say which responses are better. Name a reward function "
                "(`reward: file.py:function`) or a jury (`critics`)."
            )
        if self.reward is not None:
            import_function(self.reward)
        if self.price_per_hour is not None and self.price_per_hour < 0:
            raise ValueError(f"`price_per_hour` must not be negative, got {self.price_per_hour}.")
        for name in ("training", "reward_model"):
            for option in getattr(self, name):
                if option in _RESERVED:
                    raise ValueError(f"`{name}` has `{option}`, which the comparison sets itself. Leave it out.")
        if self.reward_model or any(method in WITH_REWARD_MODEL for method in self.methods):
            self.make_training("reward", self.reward_model, self.seeds[0])
        self.planned_runs()

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "ComparisonConfig":
        """
        The config of a file.

        Args:
            path (`str` or `Path`):
                The YAML file.
            overrides:
                Options that win over those of the file. `methods` as a list of names are those of the file with their grids there, or others; of
                `dataset` as a text, the options in the file stay.

        Raises:
            `ValueError`: it is no YAML, or an option is unknown, missing or out of its range.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"'{path}' is no YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"'{path}' must contain a YAML mapping of options, got {values!r:.200}.")
        values = {name: value for name, value in values.items() if value is not None}  # `training:` with nothing below
        methods, dataset = (values.get(name) for name in ("methods", "dataset"))
        if isinstance(overrides.get("methods"), list) and isinstance(methods, dict):
            overrides["methods"] = {name: methods.get(name, {}) for name in overrides["methods"]}
        if isinstance(overrides.get("dataset"), str) and isinstance(dataset, dict):
            overrides["dataset"] = {**dataset, "path": overrides["dataset"]}
        return from_dict(cls, {**values, **overrides}, "")

    def planned_runs(self) -> "list[PlannedRun]":
        """All trainings, in the order in which they are done: the first seed of each setting before the second one of any."""
        settings = [(name, setting) for name in self.methods for setting in self._settings(name)]
        runs = [
            PlannedRun(method=name, setting=setting, seed=seed, training=self._training(name, setting, seed))
            for seed in self.seeds
            for name, setting in settings
        ]
        ids = [run.id for run in runs]
        twice = [name for name in ids if ids.count(name) > 1]
        if twice:
            raise ValueError(f"`methods` has the same setting twice: {twice[0]}. Leave one out.")
        return runs

    def _grid(self, method: str) -> dict[str, list[Any]]:
        given = self.methods[method]
        return (
            {name: value for name, value in given.items() if isinstance(value, list)} if given else COMPARED[method][1]
        )

    def _settings(self, method: str) -> list[dict[str, Any]]:
        grid = self._grid(method)
        empty = [name for name, values in grid.items() if not values]
        if empty:
            raise ValueError(f"`methods.{method}.{empty[0]}` is an empty list. Give it a value at least.")
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def _training(self, method: str, setting: dict[str, Any], seed: int) -> TrainingConfig:
        fixed = {name: value for name, value in self.methods[method].items() if not isinstance(value, list)}
        for name in (*fixed, *setting):
            if name in _RESERVED:
                raise ValueError(f"`methods.{method}` has `{name}`, which the comparison sets itself. Leave it out.")
        form = fixed.pop("form", None)
        return self.make_training(method, {**fixed, **setting}, seed, form)

    def make_training(
        self, method: str, options: dict[str, Any], seed: int, form: str | None = None
    ) -> TrainingConfig:
        """The training of a method, with the options that it shares with all others."""
        known = {f.name for f in fields(config_class(method))}
        all_known = {f.name for name in METHODS for f in fields(config_class(name))}
        unknown = [name for name in self.training if name not in all_known]
        if unknown:
            raise ValueError(f"`training` has `{unknown[0]}`, which no method's config has.")
        shared = {name: value for name, value in self.training.items() if name in known}
        saving = {"save_strategy": "no"}
        if method != "reward":
            # A share of the steps, whose number is not known yet
            share = 1 / self.evaluation.checkpoints
            saving = {"save_strategy": "steps", "save_steps": share if share < 1 else 0.5}
        return TrainingConfig(
            method=method,
            options={"report_to": "none", **shared, **options, **saving, "seed": seed},
            form=form,
            peft=self.peft,
            accelerate_config=self.accelerate_config,
            num_processes=self.num_processes,
        )


def _check_kinds(options: Any, where: str, kinds: dict[str, type]) -> None:
    """Raises a `ValueError` for an option that YAML has as something else than a list or a mapping."""
    for name, kind in kinds.items():
        found = options[name] if isinstance(options, dict) else getattr(options, name)
        if not isinstance(found, kind):
            what = "list, as in `[1, 2]`" if kind is list else "mapping of options"
            raise ValueError(f"`{where}{name}` must be a {what}, got {found!r:.200}.")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """
    One training.

    Args:
        method (`str`):
            Name of its method.
        setting (`dict[str, Any]`):
            Its values of the grid.
        seed (`int`):
            Its seed.
        training ([`~trl_spo.synthetic.TrainingConfig`]):
            How it is done.
    """

    method: str
    setting: dict[str, Any]
    seed: int
    training: TrainingConfig

    @property
    def is_unrolled(self) -> bool:
        """Whether its checkpoints are θ, and its model is θ', as in the unrolled form of Stable PO."""
        options = self.training.options
        return options.get("bilevel") == "unrolled" and options.get("deploy_inner_steps", 1) > 0

    @property
    def label(self) -> str:
        return COMPARED[self.method][0]

    @property
    def setting_label(self) -> str:
        return ", ".join(
            f"{_SYMBOLS.get(name, name)} = {value:g}"
            if isinstance(value, float)
            else f"{_SYMBOLS.get(name, name)} = {value}"
            for name, value in self.setting.items()
        )

    @property
    def setting_id(self) -> str:
        """Of the method and its setting, as the name of a folder."""
        parts = [self.method, *(f"{name}={value}" for name, value in self.setting.items())]
        return ",".join("".join(c if c.isalnum() or c in "=.-_" else "-" for c in part) for part in parts)

    @property
    def id(self) -> str:
        return f"{self.setting_id},seed={self.seed}"
