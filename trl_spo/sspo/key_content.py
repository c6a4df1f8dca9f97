# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which tokens of a response are its key content, and in which order they are taken away.

An extractor of keywords finds phrases with scores in the text. They are mapped to their places in the text, and from there to
tokens. Degree i of N drops the tokens of the best i/(N-1) of the phrases; degree 0 drops nothing.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np


EXTRACTORS = ("rake", "yake", "position_rank", "random")
# The packages of the extractors that the installation does not bring, all of them in the extra `keywords`
_PACKAGES = {"yake": ("yake",), "position_rank": ("networkx", "scipy")}

# A word; a character by itself in the scripts that write words without spaces between them; or a mark
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’\-][^\W_{_CJK}]+)*|[^\w\s]|_")


class KeyPhrase(NamedTuple):
    """A phrase of a text: itself, its score, and where it occurs, from a character up to another."""

    text: str
    score: float
    spans: list[tuple[int, int]]


class _Word(NamedTuple):
    text: str  # in lower case
    start: int
    end: int
    breaks: bool  # whether no phrase goes on from the word before, because a line ends between them


def check_extractor(extractor: str) -> None:
    """Raises an `ImportError` that names the extra if the packages of an extractor are missing."""
    missing = [name for name in _PACKAGES.get(extractor, ()) if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"`extractor={extractor!r}` needs {' and '.join(missing)}, which the extra `keywords` installs: run "
            "`pip install trl-spo[keywords]`, or use `extractor='rake'`."
        )


def languages() -> tuple[str, ...]:
    """Codes of the languages that there are stop words for."""
    from stop_words import LANGUAGE_MAPPING

    return tuple(sorted(LANGUAGE_MAPPING))


@lru_cache(maxsize=8)
def _stop_words(language: str) -> frozenset[str]:
    from stop_words import get_stop_words

    return frozenset(get_stop_words(language))


def _words(text: str) -> list[_Word]:
    words, end = [], 0
    for match in _WORD.finditer(text):
        words.append(_Word(match.group().lower(), match.start(), match.end(), "\n" in text[end : match.start()]))
        end = match.end()
    return words


def _is_mark(word: str) -> bool:
    return not any(character.isalnum() for character in word)


def key_phrases(
    text: str, extractor: str = "rake", language: str = "en", stop_words: Sequence[str] | None = None
) -> list[KeyPhrase]:
    """
    The key phrases of a text, the best first.

    Args:
        text (`str`):
            The text.
        extractor (`str`, *optional*, defaults to `"rake"`):
            `"rake"` (Rose et al., 2010), `"yake"` (Campos et al., 2020) or `"position_rank"` (Florescu and Caragea, 2017).
            `"random"` is not one of phrases: see [`shuffled_degrees`].
        language (`str`, *optional*, defaults to `"en"`):
            Code of the language, one of [`languages`], of the stop words.
        stop_words (`Sequence[str]`, *optional*):
            Words in the place of the language's stop words, in lower case.

    Returns:
        `list[KeyPhrase]`: each with all its places. Empty if the text has only stop words and marks.
    """
    stops = _stop_words(language) if stop_words is None else frozenset(stop_words)
    words = _words(text)
    match extractor:
        case "rake":
            scores = _rake(words, stops)
        case "yake":
            scores = _yake(text, language, stops)
        case "position_rank":
            scores = _position_rank(words, stops)
        case _:
            raise ValueError(f"Unknown extractor: {extractor!r}. Should be one of {list(EXTRACTORS[:-1])}.")
    starts: dict[str, list[int]] = {}
    for i, word in enumerate(words):
        starts.setdefault(word.text, []).append(i)
    phrases = []
    for phrase, score in scores.items():
        spans = [
            (words[i].start, words[i + len(phrase) - 1].end)
            for i in starts.get(phrase[0], ())
            if tuple(word.text for word in words[i : i + len(phrase)]) == phrase
        ]
        if spans:
            phrases.append(KeyPhrase(text[slice(*spans[0])], score, spans))
    return sorted(phrases, key=lambda phrase: (-phrase.score, phrase.spans[0]))


def _rake(words: list[_Word], stops: frozenset[str]) -> dict[tuple[str, ...], float]:
    from rake_nltk import Rake

    tokens = []
    for word in words:
        tokens += ["."] * word.breaks + ["." if _is_mark(word.text) else word.text]
    # With what it would otherwise download; an empty set of stop words would be none given
    rake = Rake(
        stopwords=set(stops) | {"."},
        punctuations={"."},
        sentence_tokenizer=lambda text: [text],
        word_tokenizer=lambda text: tokens,
    )
    rake.extract_keywords_from_text("")
    return {tuple(phrase.split(" ")): score for score, phrase in rake.get_ranked_phrases_with_scores()}


def _yake(text: str, language: str, stops: frozenset[str]) -> dict[tuple[str, ...], float]:
    from yake import KeywordExtractor

    extractor = KeywordExtractor(lan=language, n=3, top=10_000, stopwords=set(stops))
    scores = {}
    for phrase, score in extractor.extract_keywords(text):
        words = tuple(word.text for word in _words(phrase))
        if words:
            scores[words] = -score  # its best has the lowest score
    return scores


def _position_rank(words: list[_Word], stops: frozenset[str], window: int = 3) -> dict[tuple[str, ...], float]:
    """PageRank on the words that occur near each other, drawn to those that come early."""
    import networkx

    content = [None if _is_mark(word.text) or word.text in stops else word.text for word in words]
    graph, early = networkx.Graph(), {}
    for i, word in enumerate(content):
        if word is None:
            continue
        early[word] = early.get(word, 0.0) + 1 / (i + 1)
        graph.add_node(word)
        for other in content[i + 1 : i + window]:
            if other is not None and other != word:
                weight = graph.get_edge_data(word, other, {"weight": 0})["weight"]
                graph.add_edge(word, other, weight=weight + 1)
    if not early:
        return {}
    rank = networkx.pagerank(graph, personalization=early)
    phrases, phrase = {}, []
    # Without a tagger of parts of speech, the candidates are those of RAKE
    for word, breaks in [*zip(content, (word.breaks for word in words), strict=True), (None, True)]:
        if phrase and (word is None or breaks):
            phrases[tuple(phrase)] = sum(rank[w] for w in phrase)
            phrase = []
        if word is not None:
            phrase.append(word)
    return phrases


def token_degrees(offsets: Sequence[tuple[int, int]], phrases: Sequence[KeyPhrase], num_degrees: int) -> list[int]:
    """
    For each token the lowest degree that drops it, 0 if none does.

    Degree i drops the first `ceil(len(phrases) i / (N - 1))` phrases at every place where they occur. A token is dropped if it has a
    character of one of them, so that none is left half.

    Args:
        offsets (`Sequence[tuple[int, int]]`):
            Start and end of each token in the text that the phrases are of, in characters. A token of no characters of it, such as
            EOS, is never dropped.
        phrases (`Sequence[KeyPhrase]`):
            Phrases, the best first.
        num_degrees (`int`):
            N >= 2.

    Returns:
        `list[int]`: from 0 to N-1.
    """
    degree_at: dict[int, int] = {}
    for rank, phrase in reversed(list(enumerate(phrases))):  # the best last, which overwrites
        degree = rank * (num_degrees - 1) // len(phrases) + 1
        for start, end in phrase.spans:
            degree_at.update(dict.fromkeys(range(start, end), degree))
    return [
        min((degree_at[place] for place in range(start, end) if place in degree_at), default=0)
        for start, end in offsets
    ]


def shuffled_degrees(
    degrees: Sequence[int], offsets: Sequence[tuple[int, int]], seed: int | Sequence[int]
) -> list[int]:
    """The control of [`token_degrees`]: as many tokens of each degree, at random places among those that have characters."""
    places = [place for place, (start, end) in enumerate(offsets) if end > start]
    order = np.random.default_rng(seed).permutation(len(places))
    result = [0] * len(degrees)
    for place, other in zip(places, order, strict=True):
        result[place] = degrees[places[other]]
    return result
