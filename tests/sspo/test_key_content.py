# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Phrases of a text, their scores and places, and the degrees of tokens."""

import socket
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_spo.sspo.key_content import KeyPhrase, key_phrases, languages, shuffled_degrees, token_degrees


EXTRACTORS = ("rake", "yake", "position_rank")
# Stop words are "the", "is", "a", "and", "of"
STOPS = ["the", "is", "a", "and", "of"]


def found(text, extractor="rake", **kwargs):
    """Phrases as they are in the text, each with the text at all its places."""
    phrases = key_phrases(text, extractor, **kwargs)
    for phrase in phrases:
        assert phrase.text == text[slice(*phrase.spans[0])]
    return [phrase.text for phrase in phrases]


class TestRake:
    def test_scores_by_hand(self):
        # Candidates: "old sea captain", "sea", "captain", "old sea"
        # frequency: old 2, sea 3, captain 2; degree (words in the same candidates, with itself): old 3+2, sea 3+1+2, captain 3+1
        # scores of words: old 5/2, sea 6/3, captain 4/2
        text = "the old sea captain, the sea and a captain of the old sea"
        phrases = key_phrases(text, "rake", stop_words=STOPS)
        assert [(phrase.text, phrase.score) for phrase in phrases] == [
            ("old sea captain", 6.5),
            ("old sea", 4.5),
            ("sea", 2.0),
            ("captain", 2.0),
        ]
        assert phrases[0].spans == [(4, 19)]
        assert phrases[1].spans == [(4, 11), (50, 57)]  # also within a longer phrase
        assert phrases[2].spans == [(8, 11), (25, 28), (54, 57)]
        assert phrases[3].spans == [(12, 19), (35, 42)]

    def test_a_word_twice_in_a_phrase(self):
        # degree of "ha": 2 x 2, frequency 2
        assert key_phrases("ha ha", "rake", stop_words=STOPS) == [KeyPhrase("ha ha", 4.0, [(0, 5)])]

    def test_overlapping_places(self):
        (phrase, _) = key_phrases("ha ha, ha ha ha", "rake", stop_words=STOPS)[::-1]
        assert (phrase.text, phrase.spans) == ("ha ha", [(0, 5), (7, 12), (10, 15)])

    def test_capitals_are_the_same(self):
        (phrase,) = key_phrases("Red Car, red car. RED CAR", "rake")
        assert (phrase.text, len(phrase.spans)) == ("Red Car", 3)

    def test_equal_scores_are_in_order_of_the_text(self):
        assert found("zebra, apple, mango") == ["zebra", "apple", "mango"]


class TestPositionRank:
    TEXT = "the ship and sea captain sail, sea of the ship captain"

    def power_iteration(self, content):
        """The paper's recursion, word by word."""
        words = sorted({word for word in content if word})
        start = {w: sum(1 / (i + 1) for i, word in enumerate(content) if word == w) for w in words}
        total = sum(start.values())
        start = {w: value / total for w, value in start.items()}
        weight = {
            (v, w): sum(
                content[i] == v and content[j] == w
                for i in range(len(content))
                for j in range(len(content))
                if 0 < abs(i - j) < 3
            )
            for v in words
            for w in words
            if v != w
        }
        rank = dict(start)
        for _ in range(500):
            rank = {
                w: 0.15 * start[w]
                + 0.85
                * sum(
                    rank[v]
                    * (
                        weight[v, w] / out
                        if (out := sum(weight[v, u] for u in words if u != v))
                        else start[w]  # of a word that has no other near it
                    )
                    for v in words
                    if v != w or not sum(weight[v, u] for u in words if u != v)
                )
                for w in words
            }
        return rank

    @pytest.mark.parametrize("text", [TEXT, TEXT + ", the a is lonely", "dog", "dog dog. the cat"])
    def test_scores(self, text):
        words = text.replace(",", " ,").replace(".", " .").split()
        rank = self.power_iteration([None if word in [*STOPS, ",", "."] else word for word in words])
        phrases = key_phrases(text, "position_rank", stop_words=STOPS)
        for phrase in phrases:
            assert phrase.score == pytest.approx(sum(rank[word] for word in phrase.text.split()), abs=1e-5)
        assert phrases == sorted(phrases, key=lambda phrase: -phrase.score)
        assert {p.text for p in phrases} == {p.text for p in key_phrases(text, "rake", stop_words=STOPS)}

    def test_the_ranks_are_a_distribution(self):
        phrases = key_phrases("ship and sea and captain", "position_rank", stop_words=STOPS)
        assert sum(phrase.score for phrase in phrases) == pytest.approx(1)
        assert [phrase.text for phrase in phrases][0] == "sea"  # in the middle, next to both

    def test_early_words_come_first(self):
        assert found("ship, the a is a the, sail", "position_rank", stop_words=STOPS) == ["ship", "sail"]


class TestYake:
    TEXT = "Google is buying Kaggle. Kaggle hosts data science competitions. Sources say Google buys Kaggle soon."

    def test_best_first(self):
        from yake import KeywordExtractor

        phrases = key_phrases(self.TEXT, "yake")
        texts = [phrase.text for phrase in phrases]
        best = KeywordExtractor(lan="en", n=3).extract_keywords(self.TEXT)[0][0]
        assert texts[0] == best
        assert [phrase.score for phrase in phrases] == sorted((phrase.score for phrase in phrases), reverse=True)
        (kaggle,) = [phrase for phrase in phrases if phrase.text == "Kaggle"]
        assert kaggle.spans == [(17, 23), (25, 31), (89, 95)]
        assert not {"is", "say"} & set(texts)

    def test_apostrophes(self):
        phrases = found("John's car isn't red. The neighbours like John’s fast car.", "yake")
        assert "John's" in phrases and "John's car" in phrases
        # A stop word is never at an end of a phrase
        assert not any(phrase.startswith("isn't") or phrase.endswith("isn't") for phrase in phrases)

    def test_lines_are_apart(self):
        """Not only in the places: words next to each other across lines do not count as such in the scores."""
        lines, marks = (key_phrases(f"red wine{end}white bread", "yake") for end in ("\n", " . "))
        assert [(phrase.text, phrase.score) for phrase in lines] == [(phrase.text, phrase.score) for phrase in marks]

    def test_three_words_at_most(self):
        assert {len(phrase.split()) for phrase in found("big red fast shiny expensive cars", "yake")} == {1, 2, 3}

    def test_decomposed_letters(self):
        assert "cafe\u0301" in found("the cafe\u0301 sells the bread. the cafe\u0301 burns.", "yake")


class TestWords:
    @pytest.mark.parametrize("extractor", EXTRACTORS)
    @pytest.mark.parametrize(
        "text", ["", "   \n ", "the of and", "!!! ... —", "😀 👩\u200d💻 ❤\ufe0f", "The, of\nAND!", "\u0301"]
    )
    def test_nothing_to_find(self, extractor, text):
        assert key_phrases(text, extractor) == []

    @pytest.mark.parametrize("extractor", EXTRACTORS)
    def test_phrases_do_not_cross_lines_or_marks(self, extractor):
        text = "Bring:\n- red wine\n- goat cheese\n* olive oil\n\nKind regards\nAlbert"
        phrases = found(text, extractor)
        assert {"red wine", "goat cheese", "olive oil", "Albert"} <= set(phrases)
        places = [span for phrase in key_phrases(text, extractor) for span in phrase.spans]
        assert all(not {"\n", "-", "*", ":"} & set(text[slice(*span)]) for span in places)

    @pytest.mark.parametrize("extractor", EXTRACTORS)
    def test_places_do_not_cross_lines(self, extractor):
        text = "goat cheese, then the goat\ncheese"
        (phrase,) = [phrase for phrase in key_phrases(text, extractor) if phrase.text == "goat cheese"]
        assert phrase.spans == [(0, 11)]

    @pytest.mark.parametrize("extractor", EXTRACTORS)
    def test_lower_case_of_another_length(self, extractor):
        text = "İİİ İstanbul, the İstanbul"
        phrases = {phrase.text: phrase.spans for phrase in key_phrases(text, extractor)}
        name = next(phrase for phrase in phrases if phrase.endswith("İstanbul"))
        assert phrases[name][-1] == ((0, 12) if " " in name else (18, 26))

    def test_combining_characters(self):
        composed, decomposed = "café", unicodedata.normalize("NFD", "café")
        text = f"{decomposed} noir, the {composed} noir"
        (phrase,) = key_phrases(text, "rake")
        assert phrase.spans == [(0, 10), (16, 25)]
        assert found(f"{decomposed} noir", stop_words=[composed]) == ["noir"]
        assert found("हिन्दी भाषा", language="hi") == ["हिन्दी भाषा"]  # vowel signs are not marks
        assert found("می\u200cخواهم", stop_words=STOPS) == ["می\u200cخواهم"]

    def test_apostrophes_and_hyphens(self):
        assert found("I don’t know, don't") == found("I don't know, don't") == []
        assert found("well-known, well‑known birds") == ["well‑known birds", "well-known"]
        assert len(key_phrases("well-known, the well‑known")[0].spans) == 2

    def test_underscore_is_a_mark(self):
        assert found("snake_bird") == ["snake", "bird"]

    def test_stop_words_option(self):
        text = "the red car and the green car"
        assert found(text, stop_words=["the", "and"]) == ["red car", "green car"]
        assert found(text, stop_words=["The", "AND", "car"]) == ["red", "green"]
        assert found(text, stop_words=[]) == [text]

    def test_german(self):
        text = "Der schnelle Zug und die alte Brücke, über die er fährt"
        assert found(text, language="de") == ["schnelle Zug", "alte Brücke", "fährt"]
        assert found(text, language="en") != found(text, language="de")
        assert found(unicodedata.normalize("NFD", "über"), language="de") == []

    def test_chinese(self):
        assert found("我的猫在红色房子里", language="zh", stop_words=["我", "的", "在", "里"]) == ["红色房子", "猫"]
        phrases = key_phrases("猫的房子，房子的猫", language="zh")
        assert [(phrase.text, phrase.spans) for phrase in phrases] == [
            ("房子", [(2, 4), (5, 7)]),
            ("猫", [(0, 1), (8, 9)]),
        ]
        # Of several characters, which are words of their own otherwise
        assert found("我们喜欢红房子但是我没有", stop_words=["我们", "但是", "没有", "我"]) == ["喜欢红房子"]

    def test_cjk_beside_latin(self):
        assert found("GPT模型 works", stop_words=["模"]) == ["型 works", "GPT"]

    def test_languages(self):
        assert {"en", "de", "fr", "zh", "ja", "hi"} <= set(languages())
        for language in languages():
            assert key_phrases("qwertz zxcvbn", language=language)

    def test_hebrew(self):
        """Whose list of stop words has more in its words than the words."""
        assert found("אבל הבית הגדול", language="he") == ["הבית הגדול"]

    def test_unknown_extractor(self):
        with pytest.raises(ValueError, match=r"Unknown extractor: 'tfidf'.*\['rake', 'yake', 'position_rank'\]"):
            key_phrases("text", "tfidf")

    @pytest.mark.parametrize("extractor", EXTRACTORS)
    def test_nothing_is_downloaded(self, extractor, monkeypatch):
        def connect(*args):
            raise AssertionError("a connection")

        monkeypatch.setattr(socket.socket, "connect", connect)
        assert found("the red car", extractor, stop_words=[])

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.sampled_from("aB éİß\u0301ﬁ日本の😀\n.,'’-_3\u0939\u093fא"), max_size=40))
    def test_rake_covers_all_words(self, text):
        """Each letter that is of no stop word is in a phrase, and each phrase is of letters, without lines or marks in it."""
        phrases = key_phrases(text, "rake", stop_words=[])
        covered = {i for phrase in phrases for start, end in phrase.spans for i in range(start, end)}
        assert {i for i, character in enumerate(text) if character.isalnum()} <= covered
        for phrase in phrases:
            for start, end in phrase.spans:
                assert text[start].isalnum() and not {"\n", ".", ",", "_", "😀"} & set(text[start:end])
        assert key_phrases(text, "position_rank", stop_words=[]) == [] or len(
            key_phrases(text, "position_rank", stop_words=[])
        ) == len(phrases)


def phrases_at(*spans):
    """Phrases at the places, the best first."""
    return [KeyPhrase("", 0.0, list(places)) for places in spans]


class TestTokenDegrees:
    TOKENS = [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]

    @pytest.mark.parametrize(
        ("num_degrees", "degrees"),
        [
            # Degree i drops the first ceil(5 i / (N - 1)): with N = 3 that is 3 and 5, with N = 4 it is 2, 4 and 5
            (2, [1, 1, 1, 1, 1]),
            (3, [1, 1, 1, 2, 2]),
            (4, [1, 1, 2, 2, 3]),
            (6, [1, 2, 3, 4, 5]),
            (7, [1, 2, 3, 4, 5]),  # ceil(5/6), ceil(10/6), ceil(15/6), ceil(20/6), ceil(25/6), 5
            (11, [1, 3, 5, 7, 9]),
        ],
    )
    def test_ceil(self, num_degrees, degrees):
        assert token_degrees(self.TOKENS, phrases_at(*([token] for token in self.TOKENS)), num_degrees) == degrees

    @given(st.integers(1, 30), st.integers(2, 12))
    def test_ceil_is_that_of_the_formula(self, count, num_degrees):
        tokens = [(i, i + 1) for i in range(count)]
        degrees = token_degrees(tokens, phrases_at(*([token] for token in tokens)), num_degrees)
        for level in range(num_degrees):
            dropped = [0 < degree <= level for degree in degrees]
            count_dropped = -(-count * level // (num_degrees - 1))
            assert dropped == [True] * count_dropped + [False] * (count - count_dropped)

    def test_a_phrase_of_several_places_and_parts_of_tokens(self):
        # The first from the middle of a token up to the middle of the next, and once more
        phrases = phrases_at([(1, 3), (9, 10)], [(5, 6)])
        assert token_degrees(self.TOKENS, phrases, 3) == [1, 1, 2, 0, 1]

    def test_the_better_of_overlapping_phrases(self):
        assert token_degrees(self.TOKENS, phrases_at([(2, 4)], [(0, 6)]), 3) == [2, 1, 2, 0, 0]
        assert token_degrees(self.TOKENS, phrases_at([(0, 6)], [(2, 4)]), 3) == [1, 1, 1, 0, 0]
        assert token_degrees([(0, 10)], phrases_at([(8, 9)], [(0, 1)]), 3) == [1]

    def test_tokens_without_characters(self):
        assert token_degrees([(0, 0), (0, 4), (2, 2)], phrases_at([(0, 4)]), 2) == [0, 1, 0]
        assert token_degrees([(0, 1), (9, 12)], [], 2) == [0, 0]
        assert token_degrees([], phrases_at([(0, 4)]), 2) == []


class TestShuffledDegrees:
    def test_by_hand(self):
        offsets = [(0, 0)] + [(i, i + 1) for i in range(60)] + [(0, 0)]
        degrees = [0] + [1] * 10 + [2] * 20 + [0] * 30 + [0]
        shuffled = shuffled_degrees(degrees, offsets, 3)
        assert sorted(shuffled) == sorted(degrees)
        assert shuffled[0] == shuffled[-1] == 0
        assert shuffled == shuffled_degrees(degrees, offsets, 3)
        assert shuffled != shuffled_degrees(degrees, offsets, 4)
        assert shuffled != degrees

    def test_all_places_alike(self):
        offsets = [(0, 0), (0, 1), (1, 2), (2, 2), (2, 3), (3, 4)]
        counts = np.sum([shuffled_degrees([0, 1, 0, 0, 0, 0], offsets, seed) for seed in range(2000)], axis=0)
        assert counts[0] == counts[3] == 0
        assert np.abs(counts[[1, 2, 4, 5]] - 500).max() < 100  # 5 standard deviations
