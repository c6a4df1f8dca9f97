# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which tokens of a response are its key content, and in which order they are taken away.

An extractor of keywords finds phrases with scores in the text. They are mapped to their places in the text, and from there to
tokens. Degree i of N drops the tokens of the best i/(N-1) of the phrases; degree 0 drops nothing.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np


EXTRACTORS = ("rake", "yake", "position_rank", "random")
# The packages of the extractors that the installation does not bring, all of them in the extra `keywords`
PACKAGES = {"yake": ("yake",), "position_rank": ("networkx", "scipy")}

# The scripts that write words without spaces between them
_CJK = r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
# What belongs to the letter before it: accents, vowel signs of the Indian scripts, (non-)joiners, the soft hyphen
_COMBINING = "\u00ad\u200c\u200d" + "".join(
    chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)).startswith("M")
)
_LETTERS = rf"(?:[^\W_{_CJK}]+[{_COMBINING}]*)+"
# A word; a character by itself in the scripts without spaces; or a mark
_WORD = rf"{_LETTERS}(?:['’\-\u2010\u2011]{_LETTERS})*|[{_CJK}][{_COMBINING}]*|[^\w\s]|_"


class KeyPhrase(NamedTuple):
    """A phrase of a text: itself, its score, and where it occurs, from a character up to another."""

    text: str
    score: float
    spans: list[tuple[int, int]]


class _Word(NamedTuple):
    text: str  # as `_plain` writes it
    start: int
    end: int
    breaks: bool  # whether no phrase goes on from the word before, because a line ends between them


def check_extractor(extractor: str) -> None:
    """Raises an `ImportError` that names the extra if the packages of an extractor are missing."""
    missing = [name for name in PACKAGES.get(extractor, ()) if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"`extractor={extractor!r}` needs {' and '.join(missing)}, which the extra `keywords` installs: run "
            "`pip install trl-spo[keywords]`, or use `extractor='rake'`."
        )


def languages() -> tuple[str, ...]:
    """Codes of the languages that there are stop words for."""
    from stop_words import LANGUAGE_MAPPING

    return tuple(sorted(LANGUAGE_MAPPING))


@lru_cache(maxsize=100_000)
def _plain(word: str) -> str:
    """What is the same for all ways to write a word: capitals, composed letters, apostrophes and hyphens."""
    return re.sub("['’\u2010\u2011]", "-", unicodedata.normalize("NFC", word.lower()))


@lru_cache(maxsize=8)
def _stop_words(language: str, given: tuple[str, ...] | None) -> tuple[frozenset[str], re.Pattern]:
    """The stop words, and the pattern of the words of a text."""
    from stop_words import get_stop_words

    # In the package's list of Hebrew, the words are in quotes, with commas after them
    words = [word.strip('",') for word in get_stop_words(language)] if given is None else given
    stops = frozenset(map(_plain, words))
    # Without spaces, a stop word of several characters is seen only if it is looked for
    several = sorted((word for word in stops if re.fullmatch(f"[{_CJK}]{{2,}}", word)), key=len, reverse=True)
    return stops, re.compile("|".join([*several, _WORD]))


def _words(text: str, pattern: re.Pattern) -> list[_Word]:
    words, end = [], 0
    for match in pattern.finditer(text):
        start = match.start()
        words.append(_Word(_plain(match.group()), start, match.end(), "\n" in text[end:start]))
        end = match.end()
    return words


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
            Words in the place of the language's stop words.

    Returns:
        `list[KeyPhrase]`: each with all its places. Empty if the text has only stop words and marks.
    """
    stops, pattern = _stop_words(language, None if stop_words is None else tuple(stop_words))
    words = _words(text, pattern)
    # A word starts with a letter or a digit, a mark does not
    content = [word.text if word.text[0].isalnum() and word.text not in stops else None for word in words]
    match extractor:
        case "rake":
            scores = _rake(_candidates(words, content))
        case "yake":
            scores = _yake(text, language, stops, pattern)
        case "position_rank":
            scores = _position_rank(_candidates(words, content), content) if any(content) else {}
        case _:
            raise ValueError(f"Unknown extractor: {extractor!r}. Should be one of {list(EXTRACTORS[:-1])}.")
    starts: dict[str, list[int]] = {}
    for i, word in enumerate(words):
        starts.setdefault(word.text, []).append(i)
    phrases = []
    for phrase, score in scores.items():
        places = (words[i : i + len(phrase)] for i in starts.get(phrase[0], ()))
        spans = [
            (place[0].start, place[-1].end)
            for place in places
            if tuple(word.text for word in place) == phrase and not any(word.breaks for word in place[1:])
        ]
        if spans:
            phrases.append(KeyPhrase(text[slice(*spans[0])], score, spans))
    return sorted(phrases, key=lambda phrase: (-phrase.score, phrase.spans[0]))


def _candidates(words: list[_Word], content: list[str | None]) -> list[list[str]]:
    """The longest rows of words within a line that are neither stop words nor marks."""
    phrases, last = [], None
    for word, text in zip(words, content, strict=True):
        if text is not None:
            if last is None or word.breaks:
                phrases.append([])
            phrases[-1].append(text)
        last = text
    return phrases


def _rake(candidates: list[list[str]]) -> dict[tuple[str, ...], float]:
    from rake_nltk import Rake

    # With what it would otherwise download. The candidates have no stop words any more, but none would be none given
    rake = Rake(stopwords={"."}, punctuations={"."}, word_tokenizer=list)
    rake.extract_keywords_from_sentences(candidates)
    return {tuple(phrase.split(" ")): score for score, phrase in rake.get_ranked_phrases_with_scores()}


def _yake(text: str, language: str, stops: frozenset[str], pattern: re.Pattern) -> dict[tuple[str, ...], float]:
    from yake import KeywordExtractor

    extractor = KeywordExtractor(lan=language, n=3, top=10_000, stopwords=stops)
    # It takes words apart at apostrophes and accents, and reads over the ends of lines, but not over marks
    text = unicodedata.normalize("NFC", text).replace("\n", " . ")
    text = re.sub(r"(?<=\w)['’\u2010\u2011](?=\w)", "-", text)
    scores = {}
    for phrase, score in extractor.extract_keywords(text):
        words = tuple(word.text for word in _words(phrase, pattern))
        if words:
            scores[words] = -float(score)  # its best has the lowest score
    return scores


def _position_rank(
    candidates: list[list[str]], content: list[str | None], window: int = 3
) -> dict[tuple[str, ...], float]:
    """PageRank on the words that occur near each other, drawn to those that come early."""
    import networkx

    graph, early = networkx.Graph(), {}
    for place, word in enumerate(content):
        if word is None:
            continue
        early[word] = early.get(word, 0.0) + 1 / (place + 1)
        graph.add_node(word)
        for other in content[place + 1 : place + window]:
            if other is not None and other != word:
                weight = graph.get_edge_data(word, other, {"weight": 0})["weight"]
                graph.add_edge(word, other, weight=weight + 1)
    rank = networkx.pagerank(graph, personalization=early)
    # Without a tagger of parts of speech, the candidates are those of RAKE
    return {tuple(phrase): sum(rank[word] for word in phrase) for phrase in candidates}


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
    degree_at = [num_degrees] * max((end for phrase in phrases for _, end in phrase.spans), default=0)
    for rank, phrase in reversed(list(enumerate(phrases))):  # the best last, which overwrites
        degree = rank * (num_degrees - 1) // len(phrases) + 1
        for start, end in phrase.spans:
            degree_at[start:end] = [degree] * (end - start)
    # N stands for none
    return [min(degree_at[start:end], default=num_degrees) % num_degrees for start, end in offsets]


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
