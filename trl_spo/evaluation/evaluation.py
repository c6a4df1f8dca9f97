# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
The evaluation of policies against a reference, on the same prompts, held-out pairs and capabilities.

The output folder has a folder for the reference and for each policy, with the responses (`samples.jsonl`), what the jury said of them
(`verdicts.jsonl`) and `evaluation.json`. A part that is there is not made again.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers.utils import logging

from ..synthetic.candidates import generate_candidates
from ..synthetic.files import Rows, digest_of_rows, read_json, write_json, write_rows
from ..synthetic.identity import weights_identity
from ..synthetic.prompts import prompt_id
from ..synthetic.store import AnswerStore, request_key
from ..synthetic.students import TransformersStudent
from .capability import Capability, compare_capability
from .displacement import displacement_estimates, displacement_units, score_pairs
from .divergence import on_policy_divergence
from .diversity import distinct_n, self_bleu
from .judging import (
    RewardFunction,
    identity_of_function,
    paired_responses,
    points_by_jury,
    points_by_reward,
    rewards_of,
    win_rate,
)
from .scoring import PreferencePair, ResponseScore, ResponseScorer
from .statistics import mean_estimate


if TYPE_CHECKING:
    from ..synthetic.critics import Critic
    from ..synthetic.endpoint import Budget


logger = logging.get_logger(__name__)

REFERENCE = "reference"
# The metrics that are from 0 to 1, and so are their intervals
SHARES = ("win_rate", "finished", "unique", "self_bleu", "distinct_1", "distinct_2", "preference_accuracy")
# Of a model's folder: its weights, and what its tokens, its template and its generation are made of
_OF_MODEL = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
_NUM_WORDS = 64  # of a response that count for distinct-n, as longer ones repeat more


class Evaluation:
    """
    Evaluates policies against a reference.

    Args:
        folder (`str` or `os.PathLike`):
            Where the results are kept. Run again, it goes on where it was stopped.
        reference (`str`):
            Path or name of the reference.
        prompts ([`~datasets.Dataset`]):
            With `prompt`, standard or conversational; other columns go to the reward function and to the rubrics of critics.

        > Parameters that control what is measured

        reward (`Callable`, *optional*):
            Reward function, as those of TRL's GRPOTrainer ([`rewards_of`]). Where the file that it stands in has changed, it is asked anew.
        reward_identity (`Any`, *optional*):
            What else tells it from others, in JSON, such as the name of the model that it calls. Needed of an object, such as a
            `functools.partial`.
        critics (`Sequence[Critic]`, *optional*):
            Jury of [`~trl_spo.synthetic.Critic`]s. Without it, the win rate is by the reward function.
        pairs (`Sequence[tuple]`, *optional*):
            Held-out pairs: prompt, chosen and rejected response; for the chat template, a dict with `tools` and `chat_template_kwargs` may follow.
        capabilities (`Sequence[Capability]`, *optional*):
            What the policy must not lose.

        > Parameters that control how

        num_responses (`int`, *optional*, defaults to `1`):
            Responses to each prompt, all at temperature 1. With two or more, self-BLEU and the share of unique responses are measured, too.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Tokens after which a response is cut.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses per forward pass.
        model_kwargs (`dict[str, Any]`, *optional*):
            Of `from_pretrained`, of the reference and of the policies. `dtype` is `"float32"` unless it is here, as small updates are lost in
            bfloat16; large models need `"bfloat16"`.
        store (`str` or `os.PathLike`, *optional*):
            File of the critics' answers and the rewards, by default `answers.sqlite` in the folder.
        budget ([`~trl_spo.synthetic.Budget`], *optional*):
            What they may cost.
        seed (`int`, *optional*, defaults to `42`):
            Of the responses and of the bootstrap.

    Raises:
        `ValueError`: an option cannot be used.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        reference: str,
        prompts: Dataset,
        reward: RewardFunction | None = None,
        reward_identity: Any = None,
        critics: "Sequence[Critic] | None" = None,
        pairs: Sequence[PreferencePair] = (),
        capabilities: Sequence[Capability] = (),
        num_responses: int = 1,
        max_new_tokens: int = 256,
        batch_size: int = 8,
        model_kwargs: dict[str, Any] | None = None,
        store: str | os.PathLike | None = None,
        budget: "Budget | None" = None,
        seed: int = 42,
    ):
        for name, value in (("num_responses", num_responses), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if len(prompts) == 0:
            raise ValueError("`prompts` is empty. Give at least one.")
        names = [capability.name for capability in capabilities]
        if len(set(names)) < len(names):
            raise ValueError(f"Each of `capabilities` needs a name of its own, got {names}.")
        self.folder = Path(folder)
        self.reference = reference
        self.prompts = _with_ids(prompts)
        self.reward, self.pairs, self.capabilities = reward, list(pairs), list(capabilities)
        self.reward_identity = None if reward is None else identity_of_function(reward, reward_identity)
        self.jury = None
        if critics:
            from ..synthetic.jury import Jury

            self.jury = Jury(critics)
            self._jury_identity()  # which raises, if they cannot be told from others
        self.num_responses, self.max_new_tokens, self.batch_size = num_responses, max_new_tokens, batch_size
        self.model_kwargs = {"dtype": "float32", **(model_kwargs or {})}
        self.store_path = Path(store) if store is not None else self.folder / "answers.sqlite"
        self.budget, self.seed = budget, seed
        self._loaded: dict[str, ResponseScorer] = {}

    def check_critics(self) -> None:
        """
        Before anything is asked: whether the critics can judge these prompts.

        Raises:
            `ValueError` or [`EndpointError`]: one of them cannot.
        """
        if self.jury is not None:
            row = self.prompts[0]
            try:
                self.jury.check({name: value for name, value in row.items() if name not in ("prompt_id", "prompt")})
            finally:
                self.free_memory()

    def free_memory(self) -> None:
        """Gives back the memory of the models, those of the critics, too. They are loaded again when they are needed."""
        self._loaded.clear()
        for critic in self.jury.critics if self.jury is not None else ():
            critic.unload()
        clear_device_cache(garbage_collection=True)

    def evaluate(
        self, model: str, name: str, quality: bool = True, judge: bool = True, capabilities: bool = True
    ) -> dict[str, Any]:
        """
        Evaluates a policy, or takes what was measured of it before.

        Args:
            model (`str`):
                Path or name. An adapter is loaded with its base model.
            name (`str`):
                Of its folder. `"reference"` is that of the reference.
            quality (`bool`, *optional*, defaults to `True`):
                Whether the reward function and the jury are asked.
            judge (`bool`, *optional*, defaults to `True`):
                Whether the jury is, if there is one.
            capabilities (`bool`, *optional*, defaults to `True`):
                Whether the capabilities are measured.

        Returns:
            `dict[str, Any]`: `metrics`, estimates by name:

            - `reward`, and `win_rate` against the reference's responses ([`win_rate`]), also with `wins`, `ties`, `losses`, `undecided` and `p_value`;
            - `kl`, to the reference, and `entropy`, in nats a response ([`on_policy_divergence`]); `length` in tokens; `finished`, the share of
              responses that ended by themselves;
            - `distinct_1`, `distinct_2`, `self_bleu`, and `unique`, the share of different responses to a prompt;
            - `chosen_change`, `rejected_change`, `margin`, `preference_accuracy` on the held-out pairs ([`displacement_units`]);

            `units`, of these metrics the value of each prompt or pair; and `capabilities`, of each its `name`, `metric`, `units` and
            what [`compare_capability`] says.
        """
        if name == REFERENCE and model != self.reference:
            raise ValueError(
                f"`name` is {REFERENCE!r}, which is the folder of the reference, for another model. Name another one."
            )
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        stamp = _stamp(model)
        path = folder / "evaluation.json"
        found = read_json(path) if path.is_file() else {}
        if found.get("model") != stamp:
            found = {"model": stamp, "sampling": None, "told": {}, "parts": {}}
        base = None if name == REFERENCE else self.evaluate(self.reference, REFERENCE, quality, judge, capabilities)

        def part(of: str, told: Any, make: Callable[[], Any]) -> Any:
            """What is kept, if it depends on the same."""
            told = request_key(told=told)
            if found["told"].get(of) != told:
                found["parts"][of] = make()
                found["told"][of] = told
                write_json(path, found)
            return found["parts"][of]

        sampling = [digest_of_rows(self.prompts), self.num_responses, self.max_new_tokens, self.seed]
        loading = [self.batch_size, {option: str(value) for option, value in self.model_kwargs.items()}]
        how = [*sampling, *loading]
        reference_stamp = _stamp(self.reference)
        if found.get("sampling") != request_key(told=how):  # what was drawn in another way is not gone on with
            for path_of_samples in folder.glob("samples*"):
                path_of_samples.unlink()
            found["sampling"] = request_key(told=how)
            write_json(path, found)
        on_policy = part("on_policy", [how, reference_stamp], lambda: self._on_policy(model, folder, name))
        units: dict[str, Any] = dict(on_policy["units"])
        metrics = {of: mean_estimate(values, of in SHARES) for of, values in units.items()} | on_policy["of_all"]
        if self.pairs:
            log_probs = part("pairs", [loading, request_key(pairs=self.pairs)], lambda: self._log_probs(model))
            of_base = log_probs if base is None else base["log_probs"]
            changes = displacement_units(_as_scores(log_probs), _as_scores(of_base))
            if base is not None:
                units |= {of: values.tolist() for of, values in changes.items()}
                metrics |= displacement_estimates(changes)
        result: dict[str, Any] = {"metrics": metrics, "units": units, "capabilities": []}
        if self.pairs:
            result["log_probs"] = log_probs
        if capabilities:
            for capability in self.capabilities:
                told = [loading, capability.identity(self.seed)]
                values = part(
                    f"capability {capability.name}",
                    told,
                    lambda c=capability, t=told: self._capability(
                        c, model, folder, request_key(model=stamp, told=t)[:8]
                    ),
                )
                of_capability = {"name": capability.name, "metric": capability.metric, "units": values}
                if base is not None:
                    before = next(c["units"] for c in base["capabilities"] if c["name"] == capability.name)
                    of_capability |= compare_capability(capability.metric, np.array(before), np.array([values]))
                result["capabilities"].append(of_capability)
        if quality:
            self._quality(result, base, part, [how, stamp], folder, judge)
        return result

    # The parts

    def _scorer(self, model: str) -> ResponseScorer:
        """The model in memory: at most the reference and one policy are."""
        if model not in self._loaded:
            for other in [name for name in self._loaded if name != self.reference]:
                del self._loaded[other]
            clear_device_cache(garbage_collection=True)
            self._loaded[model] = ResponseScorer(model, self.model_kwargs, self.batch_size)
        return self._loaded[model]

    def _on_policy(self, model: str, folder: Path, name: str) -> dict[str, Any]:
        scorer = self._scorer(model)
        student = TransformersStudent(
            model=scorer.model,
            tokenizer=scorer.tokenizer,
            batch_size=max(1, self.batch_size // self.num_responses),
            max_new_tokens=self.max_new_tokens,
        )
        path = generate_candidates(
            self.prompts,
            student,
            folder / "samples.jsonl",
            num_responses=self.num_responses,
            temperatures=(1.0,),
            # The reference draws by itself: with the same random numbers, a policy that is near to it would say the same
            seed=self.seed + (name == REFERENCE),
            token_ids=True,
        )
        rows = list(Rows(path))
        reference = self._scorer(self.reference)
        divergences = on_policy_divergence(scorer.model, reference.model, scorer.tokenizer, rows, self.batch_size)
        units: dict[str, list[float]] = {
            name: [_mean(getattr(one, field) for one in of_prompt) for of_prompt in divergences]
            for name, field in (("kl", "kl"), ("entropy", "entropy"), ("length", "tokens"))
        }
        units["finished"] = [_mean(r["finish_reason"] == "stop" for r in row["responses"]) for row in rows]
        groups = [[response["text"] for response in row["responses"]] for row in rows]
        texts = [text for group in groups for text in group]
        of_all = {}
        for n in (1, 2):
            value = distinct_n(texts, n, _NUM_WORDS)
            of_all[f"distinct_{n}"] = {"value": value, "error": None, "interval": None, "number": len(texts)}
        if self.num_responses > 1:
            units["unique"] = [len(set(group)) / len(group) for group in groups]
            bleus = [bleu for group in groups if (bleu := self_bleu([group])) is not None]
            of_all["self_bleu"] = mean_estimate(bleus, share=True)
        return {"units": units, "of_all": of_all}

    def _log_probs(self, model: str) -> list[list[list[float]]]:
        scores = score_pairs(self._scorer(model), self.pairs)
        return [[[side.log_prob, side.entropy, side.tokens] for side in of_pair] for of_pair in scores]

    def _capability(self, capability: Capability, model: str, folder: Path, key: str) -> list[float]:
        # With other questions or of another model, its answers are in another folder
        of_answers = folder / f"capability-{capability.name}-{key}"
        return capability.units(model, self._scorer(model), of_answers, self.seed)

    def _quality(
        self, result: dict[str, Any], base: dict[str, Any] | None, part: Callable, told: Any, folder: Path, judge: bool
    ) -> None:
        """Fills in the reward and the win rate."""
        path, reference = folder / "samples.jsonl", self.folder / REFERENCE / "samples.jsonl"
        if self.reward is not None:
            rewards = part("reward", [told, self.reward_identity], lambda: self._rewards(path))
            result["rewards"] = rewards
            result["units"]["reward"] = np.mean(rewards, axis=1).tolist()
            result["metrics"]["reward"] = mean_estimate(result["units"]["reward"])
        if base is None:
            return
        points = None
        if self.jury is not None and judge:
            told = [told, _stamp(self.reference), self._jury_identity()]
            points = part("jury", told, lambda: self._judge(path, reference, folder))
            points = np.array([[math.nan if p is None else p for p in of_prompt] for of_prompt in points])
        elif self.jury is None and self.reward is not None:
            points = points_by_reward(np.array(rewards), np.array(base["rewards"]))
        if points is not None:
            result["metrics"]["win_rate"] = win_rate(points, self.seed)
            result["units"]["win_rate"] = np.nan_to_num(points, nan=0.5).mean(axis=1).tolist()

    def _jury_identity(self) -> list[Any]:
        return [
            [critic.name, critic.weight, critic.identity() or identity_of_function(critic.function)]
            for critic in self.jury.critics
        ]

    def _rewards(self, path: Path) -> list[list[float]]:
        size = max(1, self.batch_size // self.num_responses)
        with AnswerStore(self.store_path) as store:
            return rewards_of(self.reward, Rows(path), size, store, self.reward_identity).tolist()

    def _judge(self, path: Path, reference: Path, folder: Path) -> list[list[float | None]]:
        self.free_memory()  # critics may be models in this process
        pairs = paired_responses(Rows(path), Rows(reference))
        self.jury.check(pairs[0].columns)
        with AnswerStore(self.store_path) as store:
            if self.budget is not None:
                self.budget.count(store)
            try:
                points, rows = points_by_jury(pairs, self.jury, store, self.budget)
            finally:
                self.free_memory()
        write_rows(folder / "verdicts.jsonl", rows)
        values = [None if math.isnan(point) else point for point in points]
        return [values[i : i + self.num_responses] for i in range(0, len(values), self.num_responses)]


def _with_ids(prompts: Dataset) -> Dataset:
    """The prompts with their ids, each once."""
    if "prompt" not in prompts.column_names:
        raise ValueError(f"`prompts` has no column 'prompt', but {prompts.column_names}.")
    if "prompt_id" in prompts.column_names:
        prompts = prompts.remove_columns("prompt_id")
    ids = [prompt_id(prompt) for prompt in prompts["prompt"]]
    first = {of: i for i, of in reversed(list(enumerate(ids)))}
    if len(first) < len(ids):
        logger.warning("%d of the %d prompts are there before, and are left out.", len(ids) - len(first), len(ids))
        kept = sorted(first.values())
        prompts, ids = prompts.select(kept), [ids[i] for i in kept]
    return prompts.add_column("prompt_id", ids)


def _stamp(model: str) -> Any:
    """What tells that a model, its tokenizer or its template is another one than before, without reading the weights."""
    if not Path(model).is_dir():
        return weights_identity(model)
    files = [file for file in sorted(Path(model).iterdir()) if file.suffix in _OF_MODEL]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _as_scores(log_probs: list[list[list[float]]]) -> list[tuple[ResponseScore, ResponseScore]]:
    return [tuple(ResponseScore(*side) for side in of_pair) for of_pair in log_probs]


def _mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
