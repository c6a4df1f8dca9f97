# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from trl_spo.evaluation.frontier import upper_frontier
from trl_spo.evaluation.judging import (
    identity_of_function,
    paired_responses,
    points_by_jury,
    points_by_reward,
    rewards_of,
    win_rate,
)
from trl_spo.synthetic.critics import Critic, RuleCritic
from trl_spo.synthetic.jury import Jury
from trl_spo.synthetic.store import AnswerStore, request_key


def row(prompt, *texts, **columns):
    responses = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    return {"prompt_id": str(prompt), "prompt": prompt, "responses": responses, **columns}


@dataclass(kw_only=True)
class Scripted(Critic):
    """Says what the function makes of the two texts in their order."""

    compares: ClassVar[bool] = True
    function: object = None
    asked: ClassVar[int] = 0

    def key(self, request):
        return request_key(name=self.name, prompt=request.prompt, responses=request.responses)

    def answer(self, requests):
        for tag, request in requests:
            Scripted.asked += 1
            yield tag, {"verdict": self.function(*request.responses), "rationale": ""}


class TestRewards:
    def test_function_is_called_as_by_trl(self):
        calls = []

        def reward(prompts, completions, **columns):
            calls.append((prompts, completions, columns))
            return range(len(completions))

        found = rewards_of(reward, [row("p", "a", "b", level=3), row("q", "c", "d", level=4)])
        assert found.tolist() == [[0, 1], [2, 3]]
        assert calls == [(["p", "p", "q", "q"], ["a", "b", "c", "d"], {"level": [3, 3, 4, 4]})]

    def test_goes_on_where_it_was_stopped(self, tmp_path, monkeypatch):
        """In batches of whole prompts: after an error, what was answered is not asked again."""
        asked, broken, bars = [], True, []

        class Bar:
            def __init__(self, total, **kwargs):
                bars.append([total])

            def update(self, number):
                bars[-1].append(number)

            __enter__, __exit__ = (lambda self: self), (lambda self, *_: None)

        def reward(prompts, completions):
            if broken and "f" in completions:
                raise ConnectionError
            asked.append(completions)
            return [ord(completion) for completion in completions]

        monkeypatch.setattr("trl_spo.evaluation.judging.tqdm", Bar)
        rows = [row(str(i), *texts) for i, texts in enumerate(("ab", "cd", "ef", "gh", "ij"))]
        with AnswerStore(tmp_path / "answers.sqlite") as store:
            with pytest.raises(ConnectionError):
                rewards_of(reward, rows, 2, store, "one")
            broken = False
            found = rewards_of(reward, rows, 2, store, "one")
            assert asked == [["a", "b", "c", "d"], ["e", "f", "g", "h"], ["i", "j"]]
            assert found.tolist() == [[97, 98], [99, 100], [101, 102], [103, 104], [105, 106]]
            rewards_of(reward, rows[:2], 2, store, "another")
            assert asked[3:] == [["a", "b", "c", "d"]]
        assert bars == [[10, 4], [10, 4, 4, 2], [4, 4]]

    def test_conversations(self):
        chat = [{"role": "user", "content": "Hi"}]

        def reward(prompts, completions, **columns):
            assert prompts == [chat]
            return [len(completion[0]["content"]) for completion in completions]

        assert rewards_of(reward, [row(chat, "four")]).tolist() == [[4]]

    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            ([1.0], ValueError, "returned 1 rewards for 2 completions"),
            ([1.0, math.nan], ValueError, "returned nan for the completion 'b'"),
            ([1.0, None], TypeError, "must return a list of numbers"),
            (3.0, TypeError, "`bad` must return a list of numbers"),
        ],
    )
    def test_what_it_must_return(self, values, error, message):
        def bad(prompts, completions):
            return values

        with pytest.raises(error, match=message):
            rewards_of(bad, [row("p", "a", "b")])

    def test_points(self):
        points = points_by_reward(np.array([[1.0, 2.0], [0.0, 5.0]]), np.array([[0.5, 2.0], [1.0, 4.0]]))
        assert points.tolist() == [[1, 0.5], [0, 1]]


class TestJury:
    def judge(self, tmp_path, policy, reference, *critics):
        pairs = paired_responses(policy, reference)
        with AnswerStore(tmp_path / "store.sqlite") as store:
            return points_by_jury(pairs, Jury(critics), store)

    def test_both_orders_and_what_they_come_to(self, tmp_path):
        longer = Scripted(
            name="longer", function=lambda a, b: "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
        )
        policy = [row("p", "long text", "ab"), row("q", "no", "same")]
        reference = [row("p", "short", "cd"), row("q", "longer", "same")]
        points, rows = self.judge(tmp_path, policy, reference, longer)
        assert points.tolist() == [1, 0.5, 0, 0.5]  # the last one by equal texts
        assert [r["response_ids"] for r in rows[:2]] == [["policy-0", "reference-0"], ["policy-1", "reference-1"]]
        swapped, _ = self.judge(tmp_path, reference, policy, longer)
        assert swapped.tolist() == [0, 0.5, 1, 0.5]

    def test_one_that_goes_by_the_order_says_nothing(self, tmp_path):
        first = Scripted(name="first", function=lambda a, b: "A")
        points, rows = self.judge(tmp_path, [row("p", "x")], [row("p", "y")], first)
        assert math.isnan(points[0]) and rows[0]["votes"][0]["status"] == "flipped"

    def test_a_rule_counts_more_than_the_others(self, tmp_path):
        longer = Scripted(name="longer", function=lambda a, b: "A" if len(a) > len(b) else "B")
        rule = RuleCritic(name="right", function=lambda prompt, response, answer: response == answer)
        points, _ = self.judge(
            tmp_path, [row("p", "7", answer="7")], [row("p", "a long one", answer="7")], longer, rule
        )
        assert points.tolist() == [1]

    def test_where_nobody_can_say(self, tmp_path):
        """An empty response loses, two of them and a rule that finds both as good are ties, a rule that cannot say decides nothing."""
        scores = {"a": 1, "b": 1, "c": 2, "d": None}
        rule = RuleCritic(name="rule", function=lambda prompt, response: scores[response])
        texts = [("a", "b"), ("a", "c"), ("d", "c"), ("  ", "a"), ("a", ""), ("", " ")]
        policy, reference = ([row("p", *side)] for side in zip(*texts, strict=True))
        points, _ = self.judge(tmp_path, policy, reference, rule)
        np.testing.assert_equal(points, [0.5, 0, math.nan, 0, 1, 0.5])

    def test_answers_are_kept(self, tmp_path):
        longer = Scripted(name="longer", function=lambda a, b: "A" if len(a) > len(b) else "B")
        Scripted.asked = 0
        for _ in range(2):
            self.judge(tmp_path, [row("p", "abc")], [row("p", "d")], longer)
        assert Scripted.asked == 2  # both orders, once

    def test_other_prompts_are_refused(self):
        with pytest.raises(ValueError, match="must be to the same prompts"):
            paired_responses([row("p", "a")], [row("q", "b")])


class Holder:
    def reward(self, prompts, completions):
        return [0.0] * len(completions)

    __call__ = reward

    @classmethod
    def of_class(cls, prompts, completions):
        return [0.0] * len(completions)


def test_what_holds_something_must_say_what():
    for function in (Holder(), Holder().reward, functools.partial(len)):
        with pytest.raises(ValueError, match="is no plain function: what it holds is not seen.*`reward_identity`"):
            identity_of_function(function)
        assert identity_of_function(function, 1) != identity_of_function(function, 2)
    for function in (Holder.of_class, len, math.sqrt, lambda x: x, Holder):
        assert identity_of_function(function)["function"].endswith(function.__qualname__)


class TestWinRate:
    def test_counts_and_value(self):
        points = np.array([[1, 0.5], [0, math.nan], [math.nan, math.nan], [1, 1]])
        found = win_rate(points)
        assert [found[name] for name in ("wins", "ties", "losses", "undecided")] == [3, 1, 1, 3]
        assert found["value"] == pytest.approx((0.75 + 0.25 + 0.5 + 1) / 4) and found["number"] == 4

    def test_interval_is_over_prompts(self):
        """With four equal pairs of each prompt there is no more to know than with one."""
        rng = np.random.default_rng(0)
        of_prompt = (rng.random((200, 1)) < 0.6).astype(float)
        one, four = win_rate(of_prompt), win_rate(np.repeat(of_prompt, 4, axis=1))
        assert one["interval"] == pytest.approx(four["interval"]) and one["p_value"] == four["p_value"]
        low, high = one["interval"]
        error = math.sqrt(one["value"] * (1 - one["value"]) / 200)
        assert (low, high) == pytest.approx((one["value"] - 1.96 * error, one["value"] + 1.96 * error), abs=0.012)

    def test_p_value_is_that_of_the_sign_test(self):
        points = np.array([[1.0]] * 9 + [[0.0]] * 2 + [[0.5]] * 2)
        # Ties do not change under a swap; of the 2^11 swaps of the others, those with 9 or more on a side
        expected = 2 * sum(math.comb(11, k) for k in (9, 10, 11)) / 2**11
        assert win_rate(points)["p_value"] == pytest.approx(expected)

    def test_when_all_say_the_same(self):
        found = win_rate(np.ones((10, 1)))
        assert found["value"] == 1 and found["interval"][0] == pytest.approx(0.7225, abs=1e-3)
        nobody = win_rate(np.full((3, 1), math.nan))
        assert (nobody["value"], nobody["undecided"], nobody["p_value"]) == (0.5, 3, 1.0)
        assert sum(nobody["interval"]) == pytest.approx(1)


class TestFrontier:
    def test_corners(self):
        points = [(0, 0), (1, 3), (2, 4), (1.5, 3.1), (3, 3.9), (0.5, 0.2), (2, 1)]
        assert upper_frontier(points) == [(0, 0), (1, 3), (2, 4)]

    def test_is_above_all_points_and_concave(self):
        rng = np.random.default_rng(0)
        points = [(0.0, 0.0), *map(tuple, rng.random((200, 2)).tolist())]
        hull = upper_frontier(points)
        xs, ys = np.array(hull).T
        slopes = np.diff(ys) / np.diff(xs)
        assert (slopes > 0).all() and (np.diff(slopes) < 0).all()
        assert all(y <= np.interp(x, xs, ys) + 1e-12 for x, y in points) and ys[-1] == max(y for _, y in points)

    def test_of_one_that_only_gets_worse(self):
        assert upper_frontier([(0.0, 1.0), (1.0, 0.5), (2.0, -1.0)]) == [(0.0, 1.0)]
