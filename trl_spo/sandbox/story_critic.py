# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Critics of the stories whose mistakes are known, for the synthetic preferences of the sandbox."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from ..synthetic.critics import Critic, Request
from ..synthetic.store import request_key
from .stories import reward


T = TypeVar("T")

CHARACTERS = ("reward", "longer", "first")


@dataclass(kw_only=True)
class StoryCritic(Critic):
    """
    A critic that compares stories by their true reward and is wrong about a known share of the pairs, or one that goes by something
    else. In a config of [`~trl_spo.synthetic.Synthesis`] its `type` is `trl_spo.sandbox.story_critic:StoryCritic`.

    Args:
        error_rate (`float`, *optional*, defaults to `0.0`):
            Share of the pairs, from 0 to 1, that it is wrong about, whichever response is shown first.
        character (`str`, *optional*, defaults to `"reward"`):
            What it goes by: `"reward"`, `"longer"` (the longer response wins) or `"first"` (the one that is shown first does).
    """

    compares: ClassVar[bool] = True

    error_rate: float = 0.0
    character: str = "reward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.error_rate <= 1:
            raise ValueError(f"`error_rate` must be from 0 to 1, got {self.error_rate}.")
        if self.character not in CHARACTERS:
            raise ValueError(f"`character` must be one of {list(CHARACTERS)}, got {self.character!r}.")

    def key(self, request: Request) -> str:
        who = {"story_critic": self.name, "error_rate": self.error_rate, "character": self.character}
        return request_key(**who, prompt=request.prompt, responses=request.responses)

    def answer(self, requests: Iterable[tuple[T, Request]]) -> Iterator[tuple[T, dict[str, str]]]:
        """Answers requests with their tags."""
        for tag, request in requests:
            if self.character == "reward":
                first, second = (reward(request.prompt + response) for response in request.responses)
            elif self.character == "longer":
                first, second = map(len, request.responses)
            else:
                first, second = 1, 0
            # The same mistake in either order
            pair = "\n".join([self.name, request.prompt, *sorted(request.responses)])
            is_wrong = int(hashlib.sha256(pair.encode()).hexdigest()[:8], 16) < self.error_rate * 2**32
            verdict = "tie" if first == second else "A" if (first > second) != is_wrong else "B"
            yield tag, {"verdict": verdict, "rationale": f"{first:.3g} against {second:.3g}"}
