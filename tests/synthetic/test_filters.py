# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Filters of judged pairs: each reason by itself, their order, the ground truth, refusals, toxicity, and what does not fit together."""

import math
import time
from collections.abc import Sequence
from itertools import count, islice

import numpy as np
import pytest

from trl_spo.synthetic.filters import REASONS, REFUSAL_PATTERNS, FilterConfig, filter_pairs
from trl_spo.synthetic.verdicts import tally


GOOD = "The harbour lies in the north of the old town."
BAD = "I think that it may be near the new station."


def vote(share=1.0, status="vote", **fields):
    return {"critic": "critic", "status": status, "share": share, **fields}


def pair(**fields):
    """A pair that passes all filters, but for what is given."""
    row = {
        "prompt_id": "p",
        "prompt": "Where is the harbour?",
        "response_ids": ["x", "y"],
        "chosen_id": "x",
        "rejected_id": "y",
        "chosen": GOOD,
        "rejected": BAD,
        "confidence": 0.9,
        "margin": 1.0,
        "probability": 0.8,
        "winner": "x",
        "truth": None,
        "votes": [vote(0.95)],
    }
    assert fields.keys() <= row.keys()
    return {**row, **fields}


def reason(row=None, **options):
    row = pair() if row is None else row
    [(found, why)] = filter_pairs([row], FilterConfig(**options))
    assert found is row
    return why


# What drops a pair for each of the reasons
CASES = {
    "empty response": ({"rejected": " \n"}, {}),
    "no votes": ({"winner": None, "confidence": 0.0, "votes": [vote(None, "flipped"), vote(None, "rejected")]}, {}),
    "tie": ({"winner": None, "confidence": 0.0, "votes": [vote(1.0), vote(0.0), vote(None, "flipped")]}, {}),
    "label contradicts the ground truth": ({"truth": "y"}, {}),
    "rationale contradicts the ground truth": ({"truth": "x", "votes": [vote(correct=["B", "A"])]}, {}),
    "low confidence": ({"confidence": 0.4}, {}),
    "low probability": ({"probability": 0.7}, {"min_probability": 0.75}),
    "small margin": ({"margin": 0.1}, {"min_margin": 0.2}),
    "length ratio": ({"chosen": GOOD * 5}, {"max_length_ratio": 3}),
    "near-identical responses": ({"rejected": GOOD}, {}),
    "refusal": ({"chosen": "I'm sorry, but I can't help with that."}, {}),
    "toxicity": ({}, {"toxicity": lambda texts: [0.9 for _ in texts]}),
}


class TestReasons:
    def test_a_good_pair_is_kept(self):
        assert reason() is None
        assert reason(max_length_ratio=3, min_margin=0.5, toxicity=lambda texts: [0.1] * len(texts)) is None

    @pytest.mark.parametrize("expected", REASONS)
    def test_each(self, expected):
        fields, options = CASES[expected]
        assert reason(pair(**fields), **options) == expected

    def test_there_are_no_others(self):
        assert tuple(CASES) == REASONS

    def test_the_first_one_is_given(self):
        # All of these apply at once. One after another is mended
        refusal = "I'm sorry, but I can't help. "
        row = pair(chosen=refusal, rejected=refusal, confidence=0.1, margin=0.1)
        options = {
            "min_probability": 0.9,
            "min_margin": 0.2,
            "max_length_ratio": 2,
            "toxicity": lambda texts: [1.0] * len(texts),
        }
        found = []
        for fields in (
            {"rejected": "", "winner": None, "truth": "y"},
            {"winner": None, "votes": []},
            {"winner": None},
            {"truth": "y", "votes": [vote(correct=["B", "A"])]},
            {"truth": "x", "votes": [vote(correct=["B", "A"])]},
            {},
            {"confidence": 0.5},
            {"confidence": 0.5, "probability": 0.9},
            {"confidence": 0.5, "probability": 0.9, "margin": 0.2, "chosen": refusal * 3},
            {"confidence": 0.5, "probability": 0.9, "margin": 0.2},
            {"confidence": 0.5, "probability": 0.9, "margin": 0.2, "rejected": BAD},
            {"confidence": 0.5, "probability": 0.9, "margin": 0.2, "rejected": BAD, "chosen": GOOD},
        ):
            found.append(reason({**row, **fields}, **options))
        assert tuple(found) == REASONS

    @pytest.mark.parametrize("response", ["chosen", "rejected"])
    @pytest.mark.parametrize("text", ["", " \t\n"])
    def test_empty_responses(self, response, text):
        assert reason(pair(**{response: text})) == "empty response"

    def test_at_the_limits(self):
        assert reason(pair(confidence=0.5)) is None
        assert reason(pair(confidence=0.499)) == "low confidence"
        assert reason(pair(confidence=math.nan)) == "low confidence"
        for votes, of, least in ((3, 5, 0.2), (2, 3, 1 / 3), (4, 5, 0.6), (6, 7, 5 / 7), (5, 9, 1 / 9)):
            row = pair(confidence=tally([(float(i < votes), 1.0) for i in range(of)]).confidence)
            assert reason(row, min_confidence=least) is None
            assert reason(row, min_confidence=least + 1e-6) == "low confidence"
        assert reason(pair(confidence=0.0), min_confidence=0) is None
        assert reason(pair(probability=0.75), min_probability=0.75) is None
        assert reason(pair(probability=0.749), min_probability=0.75) == "low probability"
        assert reason(pair(probability=math.nan), min_probability=0.75) == "low probability"
        assert reason(pair(probability=None)) is None
        assert reason(pair(margin=0.2), min_margin=0.2) is None
        assert reason(pair(margin=0.199), min_margin=0.2) == "small margin"
        assert reason(pair(margin=None)) is None
        for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
            row = pair(**{one: "abcdefgh" * 3, other: "ijklmnop"})
            assert reason(row, max_length_ratio=3) is None
            assert reason(row, max_length_ratio=2.99) == "length ratio"
            assert reason(row) is None
        toxicity = {"toxicity": lambda texts: [0.5] * len(texts)}
        assert reason(**toxicity) is None
        assert reason(**toxicity, max_toxicity=0.49) == "toxicity"

    def test_similarity(self):
        # 16 pieces of 5 characters, of which 4 differ: 12 / 20
        row = pair(chosen="abcdefghijklmnopqrst", rejected="abcdefghijklmnop1234")
        assert reason(row, max_similarity=0.6) is None
        assert reason(row, max_similarity=0.599) == "near-identical responses"
        long = " ".join(f"word{i}" for i in range(100))
        assert reason(pair(chosen=long, rejected=long + "!")) == "near-identical responses"
        assert reason(pair(chosen=long, rejected=long + "!"), max_similarity=None) is None

    @pytest.mark.parametrize("most", [1, None])
    def test_equal_responses_are_always_dropped(self, most):
        assert reason(pair(rejected=GOOD), max_similarity=most) == "near-identical responses"


class TestGroundTruth:
    @pytest.mark.parametrize("votes", [[], [vote(0.5, "tie")], [vote(None, "flipped")]])
    def test_overrules_a_jury_without_a_winner(self, votes):
        row = pair(winner=None, truth="y", chosen_id="y", rejected_id="x", confidence=0.0, margin=0.0, votes=votes)
        assert reason(row, min_margin=0.5) is None

    def test_needs_no_confidence(self):
        row = pair(truth="x", confidence=0.1, probability=None, margin=None)
        assert reason(row, min_margin=0.5, min_probability=0.9) is None

    def test_a_pair_that_it_decides_has_the_other_filters(self):
        assert reason(pair(truth="x", winner=None, chosen="I can't help with that.")) == "refusal"

    @pytest.mark.parametrize("truth", ["x", "y"])
    @pytest.mark.parametrize(
        ("correct", "contradicts"),
        [
            # As claimed where the truth is the pair's first response
            (["A", "B"], False),
            (["A", None], False),
            ([None, None], False),
            (None, False),
            (["A", "A"], True),
            (["B", "B"], True),
            (["B", "A"], True),
            (["A", "both"], True),
            (["both", "B"], True),
            (["neither", "B"], True),
            ([None, "neither"], True),
        ],
    )
    def test_what_critics_of_the_truth_claim(self, truth, correct, contradicts):
        other = {"x": "y", "y": "x"}[truth]
        if truth == "y" and correct is not None:
            correct = [{"A": "B", "B": "A"}.get(claim, claim) for claim in correct]
        for_truth = 0.9 if truth == "x" else 0.1
        fields = {"winner": truth, "truth": truth, "chosen_id": truth, "rejected_id": other}
        expected = "rationale contradicts the ground truth" if contradicts else None
        votes = [vote(for_truth), vote(for_truth, correct=correct)]
        assert reason(pair(**fields, votes=votes)) == expected
        assert reason(pair(**{**fields, "winner": None}, votes=votes)) == expected
        # Only critics who voted for it
        others = [vote(1 - for_truth), vote(0.5), vote(0.5, "tie"), vote(None, "flipped")]
        votes = [vote(for_truth), *({**other, "correct": correct} for other in others)]
        assert reason(pair(**fields, votes=votes)) is None

    def test_of_a_rule_that_grades_the_better_one_may_be_wrong_too(self):
        fields = {"truth": "x", "votes": [vote(), {**vote(1.0), "rule": True, "scores": [0.4, 0.2]}]}
        for correct, contradicts in [
            (["A", "B"], False),
            (["neither"] * 2, False),
            (["both"] * 2, False),
            (["B", "A"], True),
        ]:
            fields["votes"][0]["correct"] = correct
            assert reason(pair(**fields)) == ("rationale contradicts the ground truth" if contradicts else None)
        fields["votes"][0]["correct"], fields["votes"][1]["scores"] = ["both"] * 2, [1.0, 0.0]
        assert reason(pair(**fields)) == "rationale contradicts the ground truth"

    def test_without_a_truth_no_claim_contradicts_it(self):
        assert reason(pair(votes=[vote(correct=["B", "both"])])) is None


class TestRefusals:
    @pytest.mark.parametrize(
        "text",
        [
            "I'm sorry, but I can't assist with that request.",
            "  I’m sorry, but I can’t help with that.",
            "I am so sorry, but I cannot help.",
            "Sorry, I can't answer that.",
            "I apologize, but I cannot and will not write this.",
            "My apologies, but as an AI, I am unable to browse the web.",
            "As an AI language model, I cannot provide medical advice.",
            "Unfortunately, I won't be able to help you with this.",
            "I'm afraid I can't do that.",
            "I'M NOT ABLE TO PROVIDE THAT.",
            "I cannot fulfill your request. I am just an AI.",
            "No, I will not do that.",
            "I must respectfully decline.",
            "I apologize, but I do not feel comfortable with this.",
        ],
    )
    def test_what_is_one(self, text):
        assert reason(pair(chosen=text)) == "refusal"
        assert reason(pair(chosen=text, rejected=text + " Ask me something else instead.")) == "refusal"
        assert reason(pair(rejected=text)) is None
        assert reason(pair(chosen=text), drop_refusals=False) is None

    @pytest.mark.parametrize(
        "text",
        [
            "I'm sorry to hear that you can't sleep. Here is what may help.",
            "Sorry for the confusion. The answer is 12.",
            "I can't help but admire the question.",
            "I can't recommend it enough!",
            "I cannot stress enough how good it is.",
            "I can help with that.",
            "Here is a story. \"I'm sorry, but I can't help with that,\" he said.",
            "As an AI language model, I have no body, but here is how to run.",
            "You can say: I'm sorry, but I can't come.",
            "Unfortunately, the shop is closed. I can't say when it opens.",
        ],
    )
    def test_what_is_none(self, text):
        assert reason(pair(chosen=text)) is None

    def test_own_patterns(self):
        text = "Das kann ich leider nicht beantworten."
        assert reason(pair(chosen=text)) is None
        patterns = (*REFUSAL_PATTERNS, "das kann ich leider nicht")
        assert reason(pair(chosen=text), refusal_patterns=patterns) == "refusal"

    def test_takes_no_time_on_texts_made_to_take_it(self):
        start = time.perf_counter()
        for text in ("as a b, ", "as a ", "sorry, but ", "unfortunately, that ", "no, ", "i'm so "):
            assert reason(pair(chosen=text * 2000)) is None
        assert time.perf_counter() - start < 2


class TestToxicity:
    def test_is_asked_in_batches_only_of_chosen_responses_that_would_be_kept(self):
        asked = []

        def toxicity(texts):
            asked.append(texts)
            return np.array([text.startswith("toxic") for text in texts], dtype=np.float32)

        names = {0: "toxic", 1: "fine"}
        rows = [
            pair(
                prompt_id=str(i),
                chosen=f"{names[i % 2]} {i} {GOOD}",
                rejected=f"toxic {BAD}",
                confidence=0.9 if i % 3 else 0.1,
            )
            for i in range(129)
        ]
        found = list(filter_pairs(rows, FilterConfig(toxicity=toxicity)))
        assert [row for row, _ in found] == rows
        expected = ["low confidence" if i % 3 == 0 else "toxicity" if i % 2 == 0 else None for i in range(129)]
        assert [why for _, why in found] == expected
        assert [text for texts in asked for text in texts] == [row["chosen"] for i, row in enumerate(rows) if i % 3]
        assert len(asked) == 3 and max(map(len, asked)) <= 64

    def test_is_not_asked_of_nothing(self):
        assert reason(pair(confidence=0.0), toxicity=lambda texts: 1 / len(texts)) == "low confidence"

    @pytest.mark.parametrize(
        ("scores", "error", "message"),
        [
            ([], ValueError, "a score for each of 1 texts, and returned 0"),
            ([0.1, 0.2], ValueError, "a score for each of 1 texts, and returned 2"),
            ([math.nan], ValueError, "returned NaN for the text 'The harbour"),
            ([None], TypeError, r"a number for each text, and returned \[None\]"),
            (0.3, TypeError, "a number for each text, and returned 0.3"),
        ],
    )
    def test_bad_scores(self, scores, error, message):
        def my_scorer(texts: list[str]) -> Sequence[float]:
            return scores

        with pytest.raises(error, match=f"'my_scorer' .*{message}"):
            reason(toxicity=my_scorer)


def test_streams():
    rows = (pair(prompt_id=str(i)) for i in count())
    found = list(islice(filter_pairs(rows, FilterConfig()), 100))
    assert [row["prompt_id"] for row, _ in found] == [str(i) for i in range(100)]
    assert int(next(rows)["prompt_id"]) == 128  # two batches


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"min_confidence": -0.1}, "`min_confidence` must be from 0 to 1, got -0.1"),
            ({"min_confidence": 1.1}, "`min_confidence`"),
            ({"min_confidence": None}, "`min_confidence` must be from 0 to 1, got None"),
            ({"min_margin": -1}, "`min_margin` must be from 0 to inf, or `None`, got -1"),
            ({"min_margin": math.nan}, "`min_margin`"),
            ({"min_probability": 1.1}, "`min_probability` must be from 0 to 1, or `None`, got 1.1"),
            ({"max_length_ratio": 0.9}, "`max_length_ratio` must be from 1 "),
            ({"max_similarity": 1.5}, "`max_similarity` must be from 0 to 1, or `None`, got 1.5"),
            ({"max_similarity": -0.5}, "`max_similarity`"),
            ({"max_toxicity": math.nan}, "`max_toxicity`"),
            ({"max_toxicity": None}, "`max_toxicity`"),
            ({"toxicity": "a/model"}, "`toxicity` must be a function .* got 'a/model'"),
            ({"refusal_patterns": "I can't"}, '`refusal_patterns` must be a tuple .* got the text "I can\'t"'),
            ({"refusal_patterns": ("fine", "(")}, r"'\(' of `refusal_patterns` is not a regular expression: .*\)"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            FilterConfig(**options)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"chosen_id": "y", "rejected_id": "x"},
                "the prompt 'p', 'y' is chosen and 'x' rejected, but 'x' is better",
            ),
            ({"winner": None, "truth": "y"}, "but 'y' is better"),
            ({"chosen_id": "z"}, "'z' is chosen"),
            ({"rejected_id": "z"}, "'z' rejected"),
            ({"rejected_id": "x"}, "'x' rejected"),
            ({"truth": "z", "winner": "z", "chosen_id": "z"}, "'z' is chosen"),
            ({"truth": "x", "votes": [vote(correct=["first", "B"])]}, "'critic' claims that 'first' is correct"),
        ],
    )
    def test_rows(self, fields, message):
        with pytest.raises(ValueError, match=message):
            reason(pair(**fields))

    def test_no_margin(self):
        with pytest.raises(ValueError, match="the prompt 'p' has no margin, and `min_margin=0.5` needs one"):
            reason(pair(margin=None), min_margin=0.5)

    def test_no_probability(self):
        without = pair(probability=None)
        for row in (without, {name: value for name, value in without.items() if name != "probability"}):
            with pytest.raises(
                ValueError, match="'p' has votes and no probability, and `min_probability=0.7` needs one"
            ):
                reason(row, min_probability=0.7)
            assert reason({**row, "votes": []}, min_probability=0.7) == "low probability"

    @pytest.mark.parametrize("name", ["chosen", "truth", "votes", "response_ids"])
    def test_a_missing_field(self, name):
        row = pair()
        del row[name]
        with pytest.raises(ValueError, match=f"has no `{name}`"):
            reason(row)
