# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run of `trl-spo synthesize` is told, as a YAML file has it."""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


def import_function(name: str) -> Callable[..., Any]:
    """
    A function by its name: `package.module:function` or `path/to/file.py:function`.

    Raises:
        `ValueError`: there is none.
    """
    where, _, function = name.partition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        found = getattr(module, function)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise ValueError(
            f"There is no function {name!r} ({error}). Write `package.module:function` or `file.py:function`."
        ) from error
    if not callable(found):
        raise ValueError(f"{name!r} is not a function, but {found!r}.")
    return found


@dataclass(kw_only=True)
class PromptsConfig:
    """
    The stage `prompts`. See [`prepare_prompts`].

    Args:
        dataset (`dict[str, Any]`):
            Arguments of [`~datasets.load_dataset`], with one `split`.
        embed (`str`, *optional*):
            Name of the function ([`import_function`]).
    """

    dataset: dict[str, Any]
    max_prompt_length: int | None = None
    near_duplicates: float | None = 0.8
    topic_column: str | None = None
    embed: str | None = None
    num_topics: int = 10


@dataclass(kw_only=True)
class CandidatesConfig:
    """
    The stage `candidates`. See [`generate_candidates`].

    Args:
        student (`dict[str, Any]`):
            `type`, which is `transformers`, `vllm` or `endpoint`, and the options of [`TransformersStudent`], [`VLLMStudent`] or
            [`EndpointStudent`] (those of its [`Endpoint`] among them).
    """

    student: dict[str, Any]
    num_responses: int = 4
    temperatures: list[float] = field(default_factory=lambda: [0.7, 1.0])


@dataclass(kw_only=True)
class JudgeConfig:
    """
    The stage `judge`.

    Args:
        critics (`list[dict[str, Any]]`):
            Of each critic the `type`, which is `endpoint`, `local`, `reward` or `rule`, its `name`, and the options of
            [`EndpointCritic`] (those of its [`Endpoint`] among them), [`LocalCritic`], [`RewardCritic`] or [`RuleCritic`] (with the name of
            the `function`).
        num_comparisons (`int`, *optional*):
            Pairs of a prompt that are compared, all by default.
        max_cost (`float`, *optional*):
            What the answers in the store may cost together, in the currency of the prices: those of earlier starts, too.
        store (`str`, *optional*):
            File of the answers, by default `answers.sqlite` in the output folder. Several runs can share one.
    """

    critics: list[dict[str, Any]]
    num_comparisons: int | None = None
    max_cost: float | None = None
    store: str | None = None


@dataclass(kw_only=True)
class CheckConfig:
    """
    The stage `check`.

    Args:
        dataset (`dict[str, Any]`):
            The human check set: arguments of [`~datasets.load_dataset`], with one `split`.
        min_agreement (`float`, *optional*, defaults to `0.6`):
            Least agreement of the jury with people ([`refuse_jury`]). Below it, the run stops.
    """

    dataset: dict[str, Any]
    min_agreement: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"`check.min_agreement` must be from 0 to 1, got {self.min_agreement}.")


@dataclass(kw_only=True)
class PairsConfig:
    """
    The stage `pairs`: `pairing` ([`preference_pairs`]), and the options of [`FilterConfig`], of `toxicity` the name of the function;
    `min_probability` needs the stage `check`.
    """

    pairing: str = "best_worst"
    filters: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DatasetConfig:
    """
    The stage `dataset`.

    Args:
        test_share (`float`, *optional*, defaults to `0.05`):
            Share of the prompts in the test split.
        push_to_hub (`str`, *optional*):
            Dataset repository to push to.
        private (`bool`, *optional*):
            Whether that is private, if it does not exist.
    """

    test_share: float = 0.05
    push_to_hub: str | None = None
    private: bool | None = None


@dataclass(kw_only=True)
class RewardModelConfig:
    """
    The stage `reward_model`: TRL's RewardTrainer on the preference form. In a run of several rounds, the reward model of a round is one
    of the jury in the next ones.

    Args:
        model (`str`, *optional*):
            Path or name of the model to start from, by default the student.
        name (`str`, *optional*, defaults to `"reward_model"`):
            Of the critic that it becomes.
        weight (`float`, *optional*, defaults to `1.0`):
            Of its vote.
        options, peft, accelerate_config, num_processes:
            As in [`TrainingConfig`], of [`~trl.RewardConfig`].
    """

    model: str | None = None
    name: str = "reward_model"
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = None
    accelerate_config: str | None = None
    num_processes: int | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("`reward_model.name` is empty. Give it one.")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"`reward_model.weight` must be positive, got {self.weight}.")


@dataclass(kw_only=True)
class RoundsConfig:
    """
    Rounds: a dataset, a training on it, the next student. See [`Rounds`].

    > Parameters that control the training

    Args:
        num_rounds (`int`):
            Number of rounds, if none of the rules below stops them.
        reference (`str`):
            Reference model of each training: `"initial"`, the first student, so that all rounds together stay near to it; or
            `"previous"`, the student that the round began with, so that each round may go as far again. There is no default,
            because results depend on it.
        training (`dict[str, Any]`):
            Options of [`TrainingConfig`].

        > Parameters that control the evaluation

        num_evaluation_prompts (`int`, *optional*, defaults to `128`):
            Prompts of the test split, which are never trained on, that each student answers.
        capabilities (`list[dict[str, Any]]`, *optional*):
            What the student must not lose. Each has a `name`, and either a `function` ([`import_function`]) from the path of a model
            to a number, the higher the better, or `texts`: arguments of [`~datasets.load_dataset`], with one `split` and a column `text`,
            of which the mean log-probability of a token is taken, in nats. And `max_drop`, by which it may be below the first student's.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses per forward pass of the evaluation.

        > Parameters that stop the rounds, each `None` to switch it off

        max_human_accuracy_drop (`float`, *optional*, defaults to `0.05`):
            By which the student's preference accuracy on the human check set may be below the best one so far.
        max_drift (`float`, *optional*, defaults to `0.1`):
            By which the student's accuracy on the jury's preferences may have risen more, since the first student, than on people's.
        min_distinct (`float`, *optional*, defaults to `0.7`):
            Share of the first student's distinct-2 that must be left.
        min_entropy (`float`, *optional*, defaults to `0.5`):
            Share of the first student's entropy that must be left.
        max_self_bleu_rise (`float`, *optional*, defaults to `0.2`):
            By which self-BLEU, from 0 to 1, may be above the first student's.
    """

    num_rounds: int
    reference: str
    training: dict[str, Any]
    num_evaluation_prompts: int = 128
    capabilities: list[dict[str, Any]] = field(default_factory=list)
    batch_size: int = 8
    max_human_accuracy_drop: float | None = 0.05
    max_drift: float | None = 0.1
    min_distinct: float | None = 0.7
    min_entropy: float | None = 0.5
    max_self_bleu_rise: float | None = 0.2

    def __post_init__(self) -> None:
        for name in ("num_rounds", "num_evaluation_prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`rounds.{name}` must be at least 1, got {getattr(self, name)}.")
        if self.reference not in ("initial", "previous"):
            raise ValueError(f"`rounds.reference` must be 'initial' or 'previous', got {self.reference!r}.")
        for name in ("max_human_accuracy_drop", "max_drift", "min_distinct", "min_entropy", "max_self_bleu_rise"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`rounds.{name}` must be from 0 to 1, or `None`, got {value}.")
        names = [capability.get("name") for capability in self.capabilities]
        for capability in self.capabilities:
            known, name = {"name", "function", "texts", "max_drop"}, capability.get("name")
            if (
                set(capability) - known
                or not {"name", "max_drop"} <= set(capability)
                or ("function" in capability) == ("texts" in capability)
                or names.count(name) > 1
                or isinstance(capability["max_drop"], bool)
                or not isinstance(capability["max_drop"], int | float)
                or not 0 <= capability["max_drop"] < math.inf
            ):
                raise ValueError(
                    f"Each of `rounds.capabilities` needs a `name` of its own, a `max_drop` of at least 0, and either `function` or `texts`, got {capability}."
                )


@dataclass(kw_only=True)
class SynthesisConfig:
    """
    A run of `trl-spo synthesize`.

    Args:
        output_dir (`str`):
            Folder of the run: the files of its stages, the store of answers and the dataset.
        prompts, candidates, judge, check, pairs, dataset:
            The stages. Without `check` there is no human check set, and the card says so.
        reward_model ([`RewardModelConfig`], *optional*):
            A reward model on the dataset.
        rounds ([`RoundsConfig`], *optional*):
            Rounds of all this with trainings between them.
        seed (`int`, *optional*, defaults to `42`):
            Of all that is drawn.

    Raises:
        `ValueError`: an option is unknown, missing or out of its range.
    """

    output_dir: str
    prompts: PromptsConfig
    candidates: CandidatesConfig
    judge: JudgeConfig
    check: CheckConfig | None = None
    pairs: PairsConfig = field(default_factory=PairsConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    reward_model: RewardModelConfig | None = None
    rounds: RoundsConfig | None = None
    seed: int = 42

    @classmethod
    def from_yaml(cls, path: str | Path) -> "SynthesisConfig":
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return from_dict(cls, values, "")


_STAGES = {
    "prompts": PromptsConfig,
    "candidates": CandidatesConfig,
    "judge": JudgeConfig,
    "check": CheckConfig,
    "pairs": PairsConfig,
    "dataset": DatasetConfig,
    "reward_model": RewardModelConfig,
    "rounds": RoundsConfig,
}


def from_dict(cls: type, values: Any, where: str) -> Any:
    """
    A config of nested options.

    Raises:
        `ValueError`: an option is unknown or missing.
    """
    known = {f.name: f for f in fields(cls)}
    if not isinstance(values, dict):
        raise ValueError(f"`{where or 'the config'}` must have options, got {values!r}. They are {sorted(known)}.")
    for name in values:
        if name not in known:
            raise ValueError(f"There is no option `{where}{name}`. Use one of {sorted(known)}.")
    for name, option in known.items():
        if name not in values and option.default is MISSING and option.default_factory is MISSING:
            raise ValueError(f"The option `{where}{name}` is missing.")
    if cls is SynthesisConfig:
        values = {
            name: value if value is None or name not in _STAGES else from_dict(_STAGES[name], value, f"{name}.")
            for name, value in values.items()
        }
    return cls(**values)
