# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""How often the responses of one model are better than those of another, by a reward function or by a jury of critics."""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..synthetic.store import AnswerStore, request_key
from .statistics import bootstrap_intervals, paired_p_value, wilson_rate


if TYPE_CHECKING:
    from ..synthetic.jury import Jury, Pair


RewardFunction = Callable[..., list[float]]


def identity_of_function(function: Callable, told: Any = None) -> dict[str, Any]:
    """
    What tells a function from others in JSON: its name, a hash of the file that it stands in, and what was told of it.

    Raises:
        `ValueError`: it is an object or one of its methods, and nothing was told: what it holds is not seen.
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    holder = function.__self__ if inspect.ismethod(function) else function
    if told is None and not hasattr(holder, "__qualname__"):
        raise ValueError(
            f"{function!r:.200} is no plain function: what it holds is not seen, so that its results would be taken for those of another one. Write "
            "a function of a file that calls it; or of a reward, give `reward_identity`."
        )
    try:
        source = Path(inspect.getsourcefile(named)).read_bytes()
    except (TypeError, OSError):  # it has none, as of a function of C
        source = None
    return {
        "function": f"{named.__module__}:{named.__qualname__}",
        "source": source and hashlib.sha256(source).hexdigest(),
        **({} if told is None else {"told": told}),
    }


def rewards_of(
    function: RewardFunction,
    samples: Iterable[dict[str, Any]],
    batch_size: int = 8,
    store: AnswerStore | None = None,
    identity: Any = None,
) -> np.ndarray:
    """
    What a reward function gives the responses.

    Args:
        function (`Callable`):
            As those of TRL's GRPOTrainer: `function(prompts=..., completions=..., **columns)` returns a list of numbers. Completions are strings, or
            lists of one message if the prompts are conversations.
        samples (`Iterable[dict[str, Any]]`):
            Rows of [`~trl_spo.synthetic.generate_candidates`], all with as many responses.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows, with all their responses, that the function is called with at once.
        store ([`~trl_spo.synthetic.AnswerStore`], *optional*):
            Where the rewards are kept, so that those of a run that was stopped are not asked for again.
        identity (`Any`, *optional*):
            What tells the function from others in the store, in JSON.

    Returns:
        `np.ndarray` of shape `(N, K)`: of each row, of each response.

    Raises:
        `TypeError`, `ValueError`: the function returns something else than a finite number for each completion.
    """
    samples, rewards = list(samples), []
    with tqdm(desc="Rewards", total=sum(len(row["responses"]) for row in samples), unit=" responses") as bar:
        for first in range(0, len(samples), batch_size):
            rows = samples[first : first + batch_size]
            key = request_key(reward=identity, rows=rows)
            kept = store.get([key]) if store is not None else {}
            values = kept[key]["rewards"] if kept else _rewards(function, rows)
            if store is not None and not kept:
                store.put(key, "reward", {"rewards": values})
            rewards += values
            bar.update(len(values))
    return np.array(rewards).reshape(len(samples), -1)


def _rewards(function: RewardFunction, rows: Sequence[dict[str, Any]]) -> list[float]:
    prompts, completions, columns = [], [], {}
    for row in rows:
        for response in row["responses"]:
            text = response["text"]
            prompts.append(row["prompt"])
            completions.append(text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}])
            for name, value in row.items():
                if name not in ("prompt_id", "prompt", "responses"):
                    columns.setdefault(name, []).append(value)
    found = function(prompts=prompts, completions=completions, **columns)
    name = getattr(function, "__name__", repr(function))
    try:
        values = [float(value) for value in found]
    except TypeError as error:
        raise TypeError(
            f"The reward function `{name}` must return a list of numbers, one for each completion, and returned {found!r:.200}."
        ) from error
    if len(values) != len(completions):
        raise ValueError(
            f"The reward function `{name}` returned {len(values)} rewards for {len(completions)} completions. Return one for each."
        )
    for completion, value in zip(completions, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"The reward function `{name}` returned {value} for the completion {completion!r:.200}.")
    return values


def points_by_reward(policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """
    1 where the policy's response has the higher reward, 0 where the reference's has, and 1/2 where they are equal.

    Args:
        policy, reference (`np.ndarray` of shape `(N, K)`):
            What [`rewards_of`] gives. Response k of the one is compared with response k of the other.
    """
    return (np.sign(policy - reference) + 1) / 2


def paired_responses(policy: Iterable[dict[str, Any]], reference: Iterable[dict[str, Any]]) -> "list[Pair]":
    """Response k of the policy with response k of the reference, for each prompt, for a jury."""
    from ..synthetic.jury import Pair

    pairs = []
    for ours, theirs in zip(policy, reference, strict=True):
        if ours["prompt_id"] != theirs["prompt_id"]:
            raise ValueError("The responses must be to the same prompts, in the same order.")
        columns = {name: value for name, value in ours.items() if name not in ("prompt_id", "prompt", "responses")}
        for our, their in zip(ours["responses"], theirs["responses"], strict=True):
            ids = (f"policy-{our['id']}", f"reference-{their['id']}")
            pairs.append(Pair(ours["prompt_id"], ids, ours["prompt"], (our["text"], their["text"]), columns))
    return pairs


def points_by_jury(
    pairs: "Sequence[Pair]", jury: "Jury", store: "AnswerStore", budget: Any = None
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """
    What a jury says of pairs of responses. Each critic that compares sees both orders, and what it has said is in the store.

    Args:
        pairs (`Sequence[Pair]`):
            Those of [`paired_responses`].
        jury ([`~trl_spo.synthetic.Jury`]):
            Who judges.
        store ([`~trl_spo.synthetic.AnswerStore`]):
            Where the answers are kept.
        budget ([`~trl_spo.synthetic.Budget`], *optional*):
            Limit of what they may cost.

    Returns:
        `tuple[np.ndarray, list[dict[str, Any]]]`: of each pair 1 where the policy's response wins, 0 where the reference's does, 1/2 for a tie and for equal
        texts, and nan where the jury cannot say. An empty response loses against one that is not. And the rows of [`Jury.verdicts`].

    Raises:
        [`EndpointError`], [`SpendingLimitError`]: as [`Jury.ask`]. What was answered is kept.
    """
    jury.ask(pairs, store, budget)
    rows = list(jury.verdicts(pairs, store))
    return np.array([_points(pair, row) for pair, row in zip(pairs, rows, strict=True)]), rows


def _points(pair: "Pair", row: dict[str, Any]) -> float:
    first, second = (response.strip() for response in pair.responses)
    if not (first and second):  # nobody was asked: something is better than nothing
        return (bool(first) - bool(second) + 1) / 2
    better = row["truth"] if row["truth"] is not None else row["winner"]
    if better is not None:
        return float(better == pair.response_ids[0])
    ties = [vote for vote in row["votes"] if vote["status"] == "tie"]
    return 0.5 if first == second or row["share"] is not None or ties else math.nan


def win_rate(points: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """
    Share of wins. Ties count half, and so do pairs of which nobody can say which is better: a critic that follows the order says nothing for
    either.

    Args:
        points (`np.ndarray` of shape `(N, K)`):
            Of N prompts with K pairs each: 1, 1/2, 0, or nan where nobody can say.
        seed (`int`, *optional*, defaults to `0`):
            Of the bootstrap and of the test.

    Returns:
        `dict[str, Any]`: an estimate, whose interval is that of a bootstrap over prompts (or Wilson's, if all of them say the same, so that no resample
        differs); `wins`, `ties`, `losses`, `undecided`; and the `p_value` of the hypothesis that both are as good, by the permutation test
        that swaps the two models' responses to a prompt ([`paired_p_value`]).
    """
    counts = {
        "wins": int((points == 1).sum()),
        "ties": int((points == 0.5).sum()),
        "losses": int((points == 0).sum()),
        "undecided": int(np.isnan(points).sum()),
    }
    units = np.nan_to_num(points, nan=0.5).mean(axis=1)
    number = len(units)
    (interval,) = bootstrap_intervals(units[:, None], lambda sums: sums.T / number, seed)
    if number > 1 and (units == units[0]).all():
        interval = wilson_rate(float(units.sum()), number)["interval"]
    return {
        "value": float(units.mean()),
        "error": float(units.std(ddof=1)) / math.sqrt(number) if number > 1 else None,
        "interval": interval,
        "number": number,
        **counts,
        "p_value": paired_p_value(units - 0.5, seed),
    }
