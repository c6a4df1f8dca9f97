# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which tokens of a response are its key content, and in which order they are taken away.

Phrases with scores are found in the text by an extractor of keywords, mapped to places in the text, and from there to tokens. A
degree i from 0 to N-1 drops the tokens of the best i/(N-1) of the phrases; degree 0 drops nothing.
"""

import random
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


EXTRACTORS = ("rake", "yake", "position_rank", "random")

# A word; a character by itself in the scripts that write words without spaces between; or a mark
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’\-][^\W_{_CJK}]+)*|[^\w\s]|_")


class KeyPhrase(NamedTuple):
    """A phrase of a text."""

    text: str
    score: float
    spans: list[tuple[int, int]]
    """Where it occurs: start and end in characters."""


def languages() -> tuple[str, ...]:
    """Codes of the languages that there are stop words for."""
    from stop_words import LANGUAGE_MAPPING

    return tuple(sorted(LANGUAGE_MAPPING))


@lru_cache(maxsize=8)
def stop_words(language: str) -> frozenset[str]:
    from stop_words import get_stop_words

    return frozenset(get_stop_words(language))


def _words(text: str) -> list[tuple[str, int, int]]:
    return [(match.group().lower(), match.start(), match.end()) for match in _WORD.finditer(text)]


def _is_mark(word: str) -> bool:
    return not any(character.isalnum() for character in word)


def key_phrases(text: str, extractor: str = "rake", language: str = "en") -> list[KeyPhrase]:
    """
    The key phrases of a text, the best first.

    Args:
        text (`str`):
            The text.
        extractor (`str`, *optional*, defaults to `"rake"`):
            `"rake"`, `"yake"` or `"position_rank"`. `"random"` is not one of phrases: see [`shuffled_degrees`].
        language (`str`, *optional*, defaults to `"en"`):
            Code of the language, of the stop words.

    Returns:
        `list[KeyPhrase]`: those that occur in the text, each with all its places. Empty if there are only stop words and marks.
    """
    words = _words(text)
    match extractor:
        case "rake":
            scores = _rake(words, language)
        case "yake":
            scores = _yake(text, language)
        case "position_rank":
            scores = _position_rank(words, language)
        case _:
            raise ValueError(f"Unknown extractor: {extractor!r}. Should be one of {list(EXTRACTORS[:-1])}.")
    phrases = []
    for phrase, score in scores.items():
        spans = _places(phrase, words)
        if spans:
            phrases.append(KeyPhrase(text[slice(*spans[0])], score, spans))
    return sorted(phrases, key=lambda phrase: (-phrase.score, phrase.spans[0]))


def _places(phrase: tuple[str, ...], words: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    n = len(phrase)
    return [
        (words[i][1], words[i + n - 1][2])
        for i in range(len(words) - n + 1)
        if all(words[i + j][0] == phrase[j] for j in range(n))
    ]


def _rake(words: list[tuple[str, int, int]], language: str) -> dict[tuple[str, ...], float]:
    from rake_nltk import Rake

    rake = Rake(  # with what it would otherwise download
        stopwords=set(stop_words(language)),
        punctuations={"."},
        sentence_tokenizer=lambda text: [text],
        word_tokenizer=lambda _: ["." if _is_mark(word) else word for word, _, _ in words],
    )
    rake.extract_keywords_from_text("")
    return {tuple(phrase.split(" ")): score for score, phrase in rake.get_ranked_phrases_with_scores()}


def _yake(text: str, language: str) -> dict[tuple[str, ...], float]:
    from yake import KeywordExtractor

    extractor = KeywordExtractor(lan=language, n=3, top=10_000, stopwords=set(stop_words(language)))
    # It gives the best the lowest score
    return {tuple(word for word, _, _ in _words(phrase)): -score for phrase, score in extractor.extract_keywords(text)}


def _position_rank(words: list[tuple[str, int, int]], language: str, window: int = 3) -> dict[tuple[str, ...], float]:
    """PageRank on the words that occur near each other, drawn to those that come early (Florescu and Caragea, 2017)."""
    import networkx

    stops = stop_words(language)
    content = [None if _is_mark(word) or word in stops else word for word, _, _ in words]
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
    for word in [*content, None]:  # without a tagger of parts of speech, the candidates are those of RAKE
        if word is not None:
            phrase.append(word)
        elif phrase:
            phrases[tuple(phrase)] = sum(rank[w] for w in phrase)
            phrase = []
    return phrases


def token_degrees(offsets: Sequence[tuple[int, int]], phrases: Sequence[KeyPhrase], num_degrees: int) -> list[int]:
    """
    For each token the lowest degree that drops it, 0 if none does.

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
    degree_at = {}
    for rank, phrase in reversed(list(enumerate(phrases))):  # the best last, which overwrites
        degree = rank * (num_degrees - 1) // len(phrases) + 1
        for start, end in phrase.spans:
            degree_at.update(dict.fromkeys(range(start, end), degree))
    return [
        min((degree_at[place] for place in range(start, end) if place in degree_at), default=0)
        for start, end in offsets
    ]


def shuffled_degrees(degrees: Sequence[int], offsets: Sequence[tuple[int, int]], seed: int) -> list[int]:
    """The control of [`token_degrees`]: as many tokens of each degree, at random places among those that have characters."""
    places = [place for place, (start, end) in enumerate(offsets) if end > start]
    drawn = [degrees[place] for place in places]
    random.Random(seed).shuffle(drawn)
    result = [0] * len(degrees)
    for place, degree in zip(places, drawn, strict=True):
        result[place] = degree
    return result
