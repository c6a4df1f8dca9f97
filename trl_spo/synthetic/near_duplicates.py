# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""How similar texts and prompts are, and which of many prompts one is nearly equal to."""

import math
import unicodedata
import zlib
from importlib.util import find_spec
from typing import Any

import numpy as np


# Role and text of each message
Messages = tuple[tuple[str, str], ...]

_SHINGLE = 5  # characters, so that no language needs a tokenizer of its words
_PERMUTATIONS = 128
_RECALL = 0.98  # of the pairs that are just similar enough


def check_installed(package: str, option: str, otherwise: str) -> None:
    """Raises an `ImportError` if an option needs a package that is missing."""
    if find_spec(package) is None:
        raise ImportError(
            f"`{option}` needs the package `{package}`, which the extra `synthetic` installs: run `pip install "
            f'"trl-spo[synthetic]"`, or {otherwise}.'
        )


def normalized(prompt: str | list[dict[str, Any]]) -> Messages:
    """The messages of a prompt without what makes no difference: case, white space, and how a character is composed."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    # Not NFKC, which makes 22 of 2²
    return tuple(
        (message["role"], " ".join(unicodedata.normalize("NFC", (message["content"] or "").casefold()).split()))
        for message in messages
    )


def shingles(text: str) -> set[str]:
    """All the pieces of five characters of a text; of a shorter one, itself."""
    return {text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1))}


def jaccard(text: str, other: str) -> float:
    """How similar two texts are: the share of their pieces of five characters that both have."""
    if text == other:
        return 1.0
    pieces, others = shingles(text), shingles(other)
    common = len(pieces & others)
    return common / (len(pieces) + len(others) - common)


def similarity(prompt: Messages, other: Messages) -> float:
    """That of the messages that are the least similar, and 0 if the roles differ."""
    if [role for role, _ in prompt] != [role for role, _ in other]:
        return 0.0
    # So that a long system message, which all prompts share, does not make them alike
    return min(jaccard(text, another) for (_, text), (_, another) in zip(prompt, other, strict=True))


def without_system(prompt: Messages) -> Messages:
    return tuple(message for message in prompt if message[0] not in ("system", "developer")) or prompt


class NearDuplicates:
    """
    Prompts, and which of them another one is nearly equal to: with a [`similarity`] of at least `threshold`.

    Candidates are found by MinHash with locality-sensitive hashing (Leskovec et al., Mining of Massive Datasets, chapter 3) and are then
    compared in full: what is found is right, and of those whose similarity is just the threshold, about one in fifty is missed.

    Args:
        threshold (`float`):
            From 0.1 to 1.
        size (`int`):
            Number of prompts there may be.

    Raises:
        `ImportError`: datasketch is missing.
        `ValueError`: the threshold is out of its range.
    """

    def __init__(self, threshold: float, size: int):
        if not 0.1 <= threshold <= 1:
            raise ValueError(
                f"The similarity of near-duplicates (`near_duplicates`, `threshold`) must be from 0.1 to 1, or `None`, got {threshold}."
            )
        check_installed("datasketch", f"near_duplicates={threshold}", "set `near_duplicates=None`")
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        # A candidate agrees in all rows of a band. The longer the bands, the fewer are the candidates
        rows = max(
            rows
            for rows in range(1, _PERMUTATIONS // 2 + 1)
            if 1 - (1 - threshold**rows) ** (_PERMUTATIONS // rows) >= _RECALL
        )
        self._index = MinHashLSH(num_perm=_PERMUTATIONS, params=(_PERMUTATIONS // rows, rows))
        self._empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
        # Of prompts made from one template, most are candidates: three standard errors below, they are no longer looked at
        self._least = threshold - 3 * math.sqrt(threshold * (1 - threshold) / _PERMUTATIONS)
        self._sketches = np.empty((size, _PERMUTATIONS), dtype=np.uint32)
        self._prompts: list[Messages] = []

    def add(self, prompt: Messages) -> None:
        self._insert(prompt, self._sketch(prompt))

    def find(self, prompt: Messages, add: bool = False) -> Messages | None:
        """
        Args:
            prompt (`Messages`):
                Prompt, as [`normalized`] writes it.
            add (`bool`, *optional*, defaults to `False`):
                Whether to add it if there is none that it is nearly equal to.

        Returns:
            The first prompt that this one is nearly equal to, if there is one.
        """
        sketch = self._sketch(prompt)
        found = np.array(sorted(self._index.query(sketch)), dtype=int)
        estimates = (self._sketches[found] == sketch.hashvalues).mean(axis=1)
        for i in found[estimates >= self._least]:
            if similarity(prompt, self._prompts[i]) >= self.threshold:
                return self._prompts[i]
        if add:
            self._insert(prompt, sketch)
        return None

    def _insert(self, prompt: Messages, sketch: Any) -> None:
        self._index.insert(len(self._prompts), sketch)
        self._sketches[len(self._prompts)] = sketch.hashvalues
        self._prompts.append(prompt)

    def _sketch(self, prompt: Messages) -> Any:
        # Of the pieces with the place of their message: if each message is similar enough, all of them together are
        sketch = self._empty.copy()
        sketch.update_batch(
            zlib.crc32(piece.encode(), place)
            for place, (_, text) in enumerate(without_system(prompt))
            for piece in shingles(text)
        )
        return sketch
