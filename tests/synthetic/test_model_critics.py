# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Critics with a model in this process, against plain forward passes of single texts."""

import math
import shutil

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from trl_spo.synthetic import model_critics
from trl_spo.synthetic.critics import Request
from trl_spo.synthetic.identity import weights_identity
from trl_spo.synthetic.jury import Jury, Pair
from trl_spo.synthetic.model_critics import LocalCritic, RewardCritic
from trl_spo.synthetic.store import AnswerStore


PAIRS = [
    Pair("p0", ("0", "1"), "Who was it?", (" a cat", " the old dog and a long way home")),
    Pair("p1", ("0", "1"), "Where?", (" not here, and not there", " my")),
    Pair("p2", ("0", "1"), [{"role": "user", "content": "Why?"}], ("because", "it was with the cat")),
]
# In which A, B and tie begin with different tokens
RUBRIC = "{{ prompt }}|{{ response_a }}|{{ response_b }}"


@pytest.fixture
def rubric(tmp_path):
    path = tmp_path / "short.jinja"
    path.write_text(RUBRIC)
    return str(path)


@pytest.fixture
def critic(model_path, rubric):
    # Weights so large that the verdicts differ
    model = AutoModelForCausalLM.from_pretrained(model_path)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return LocalCritic(name="local", model=model, rubric=rubric, max_rationale_tokens=0, batch_size=4)


@pytest.fixture
def reward_model(model_path, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, pad_token_id=0)
    model.score.weight.data.normal_()
    model.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(model_path).save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


@pytest.mark.parametrize("rationale_tokens", [0, 6])
def test_local_critic(critic, tmp_path, rationale_tokens):
    critic.max_rationale_tokens = rationale_tokens
    jury = Jury([critic])
    jury.check({})
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        jury.ask(PAIRS, store)
        rows = list(jury.verdicts(PAIRS, store))
    tokenizer, model = critic.tokenizer, critic.model
    for pair, row in zip(PAIRS, rows, strict=True):
        (vote,) = row["votes"]
        found = []
        for k, (a, b) in enumerate((pair.responses, pair.responses[::-1])):
            chat = tokenizer.apply_chat_template(
                critic.messages(Request(pair.prompt, (a, b))), add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
            if rationale_tokens:
                greedy = ids
                for _ in range(rationale_tokens):
                    greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], dim=1)
                    if greedy[0, -1] == tokenizer.eos_token_id:
                        break
                rationale = tokenizer.decode(greedy[0, ids.size(1) :], skip_special_tokens=True).strip()
                assert vote["rationales"][k] == rationale
                chat += f"{rationale}\n" if rationale else ""
            logits = {}
            for verdict in ("A", "B", "tie"):
                line = tokenizer(f"Verdict: {verdict}", add_special_tokens=False).input_ids
                head = tokenizer("Verdict: A", add_special_tokens=False).input_ids[:-1]
                assert line[: len(head)] == head
                ids = tokenizer(chat, add_special_tokens=False).input_ids + head
                logits[verdict] = model(torch.tensor([ids])).logits[0, -1, line[len(head)]].item()
            assert vote["verdicts"][k] == max(logits, key=logits.get)
            total = sum(math.exp(value) for value in logits.values())
            found.append((math.exp(logits["A"]) + math.exp(logits["tie"]) / 2) / total)
        if vote["status"] == "vote":
            assert vote["share"] == pytest.approx((found[0] + 1 - found[1]) / 2, abs=1e-5)


def test_verdicts_that_begin_alike(critic, monkeypatch):
    monkeypatch.setattr("trl_spo.synthetic.model_critics.VERDICTS", ("A", "B", "A B"))
    with pytest.raises(ValueError, match="begins two of the verdicts .*with the same token.*Use another model"):
        critic.check({})


def test_reward_critic(reward_model, tmp_path):
    critic = RewardCritic(name="reward", model=reward_model, batch_size=2)
    jury = Jury([critic])
    jury.check({})
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        jury.ask(PAIRS, store)
        assert len(store) == 2 * len(PAIRS)
        rows = list(jury.verdicts(PAIRS, store))
    model, tokenizer = critic.model, critic.tokenizer
    for pair, row in zip(PAIRS, rows, strict=True):
        scores = []
        for response in pair.responses:
            if isinstance(pair.prompt, str):
                ids = tokenizer(pair.prompt + response + tokenizer.eos_token).input_ids
            else:
                messages = [*pair.prompt, {"role": "assistant", "content": response}]
                ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
            scores.append(model(torch.tensor([ids])).logits.item())
        assert row["votes"][0]["scores"] == pytest.approx(scores, abs=1e-4)
        assert row["share"] == pytest.approx(1 / (1 + math.exp(scores[1] - scores[0])), abs=1e-4)
        assert row["winner"] == str(int(scores[1] > scores[0]))


def test_a_model_that_gives_nan(critic, reward_model, tmp_path):
    for some, head in ((critic, "lm_head"), (RewardCritic(name="reward", model=reward_model), "score")):
        some.check({})
        getattr(some.model, head).weight.data.fill_(math.nan)
        with AnswerStore(tmp_path / f"{head}.sqlite") as store:
            with pytest.raises(ValueError, match=f"The model of the critic '{some.name}' gives .*nan"):
                Jury([some]).ask(PAIRS, store)
            assert len(store) == 0


@pytest.mark.parametrize("max_length", [0, -5])
def test_max_length_out_of_range(reward_model, max_length):
    with pytest.raises(ValueError, match=f"`max_length` must be at least 1, or `None`, got {max_length}"):
        RewardCritic(name="reward", model=reward_model, max_length=max_length)


def test_reads_texts_as_the_reward_trainer(reward_model, tmp_path):
    critic = RewardCritic(name="reward", model=reward_model)
    critic.check({})
    for pairs in (PAIRS[:2], PAIRS[2:]):
        rows = [
            {"prompt": pair.prompt}
            | {
                name: text if isinstance(pair.prompt, str) else [{"role": "assistant", "content": text}]
                for name, text in zip(("chosen", "rejected"), pair.responses, strict=True)
            }
            for pair in pairs
        ]
        args = RewardConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
        trainer = RewardTrainer(
            critic.model, args, train_dataset=Dataset.from_list(rows), processing_class=critic.tokenizer
        )
        for pair, row in zip(pairs, trainer.train_dataset, strict=True):
            assert critic._tokenize(pair.prompt, pair.responses[0]) == row["chosen_ids"]
            assert critic._tokenize(pair.prompt, pair.responses[1]) == row["rejected_ids"]


def test_not_a_reward_model(model_path, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=3).save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(model_path).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="has 3 labels, and a reward model has one"):
        RewardCritic(name="reward", model=str(tmp_path / "three")).check({})


def test_scores_are_asked_for_once(reward_model, tmp_path):
    pairs = [
        Pair("p", ids, "Who?", texts)
        for ids, texts in (
            (("0", "1"), (" a", " b")),
            (("0", "2"), (" a", " c")),
            (("1", "2"), (" b", " c")),
        )
    ]
    critic = RewardCritic(name="reward", model=reward_model)
    asked, answer = [], critic.answer
    critic.answer = lambda requests: answer(asked.append(request) or request for request in requests)
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        Jury([critic]).ask(pairs, store)
        Jury([critic]).ask(pairs, store)
    assert sorted(request.responses for _, request in asked) == [(" a",), (" b",), (" c",)]


class TestWeights:
    def test_a_folder_with_other_weights_is_asked_again(self, reward_model, tmp_path):
        with AnswerStore(tmp_path / "answers.sqlite") as store:

            def judge(folder):
                jury = Jury([RewardCritic(name="reward", model=str(folder))])
                assert jury.critics[0].model == str(folder)  # which is not loaded to tell it from others
                jury.ask(PAIRS, store)
                return [row["share"] for row in jury.verdicts(PAIRS, store)]

            before = judge(reward_model)
            assert len(store) == 2 * len(PAIRS)
            # The same weights elsewhere, with what else a trainer leaves in a folder
            shutil.copytree(reward_model, tmp_path / "moved")
            for name in ("README.md", "training_args.bin"):
                (tmp_path / "moved" / name).write_text("other")
            assert judge(tmp_path / "moved") == before and len(store) == 2 * len(PAIRS)
            model = AutoModelForSequenceClassification.from_pretrained(reward_model)
            model.score.weight.data += 1
            model.save_pretrained(reward_model)
            assert judge(reward_model) != before and len(store) == 4 * len(PAIRS)
            assert judge(tmp_path / "moved") == before and len(store) == 4 * len(PAIRS)

    def test_a_model_with_other_weights_is_another(self, critic, rubric):
        def key(model=critic.model, **options):
            options = {"rubric": rubric, "max_rationale_tokens": 0, **options}
            return LocalCritic(name="another", model=model, **options).key(Request("p", ("a", "b")))

        before = critic.key(Request("p", ("a", "b")))
        assert key() == before != key(max_rationale_tokens=1)
        with pytest.raises(ValueError, match="'local' and 'another' are one and the same"):
            Jury([critic, LocalCritic(name="another", model=critic.model, rubric=rubric, max_rationale_tokens=0)])
        weight = critic.model.get_output_embeddings().weight.data
        weight[-1, -1] += 1e-3
        after = key()
        assert after != before
        critic.model.bfloat16()
        assert key() not in (before, after)

    def test_weights_are_read_once(self, reward_model, monkeypatch):
        read = []
        monkeypatch.setattr(model_critics, "weights_identity", lambda *of: read.append(of) or weights_identity(*of))
        critic = RewardCritic(name="reward", model=reward_model)
        assert not read
        Jury([critic])
        before = critic.key(Request("p", ("a",)))
        critic.check({})
        assert critic.key(Request("p", ("a",))) == before != critic.key(Request("p", ("b",)))
        assert read == [(reward_model, "main")]

    def test_an_adapter_is_what_it_adapts_too(self, model_path, tmp_path):
        base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
        shutil.copytree(model_path, base)
        model = AutoModelForCausalLM.from_pretrained(base)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
        before = weights_identity(adapter)
        assert before == weights_identity(adapter) != weights_identity(base)
        model = AutoModelForCausalLM.from_pretrained(base)
        next(model.parameters()).data += 1
        model.save_pretrained(base)
        assert weights_identity(adapter) != before

    def test_a_model_of_the_hub_is_its_commit(self, reward_model, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        repository, commits = tmp_path / "cache" / "models--someone--tiny", [40 * "a", 40 * "b"]
        for commit in commits:
            shutil.copytree(reward_model, repository / "snapshots" / commit)
        branch = repository / "refs" / "main"
        branch.parent.mkdir()

        def critic(commit, **options):
            branch.write_text(commit)
            critic = RewardCritic(name="reward", model="someone/tiny", **options)
            return critic, critic.key(Request("p", ("a",)))

        first, key = critic(commits[0])
        assert first._weights == {"model": "someone/tiny", "commit": commits[0]}
        assert critic(commits[0])[1] == key != critic(commits[1])[1]
        assert critic(commits[1], revision=commits[0])[1] == key
        model = AutoModelForSequenceClassification.from_pretrained(reward_model)
        model.score.weight.data += 1
        model.save_pretrained(repository / "snapshots" / commits[1])
        first.check({})  # loads the commit of its key, although the branch has moved
        torch.testing.assert_close(first.model.score.weight, model.score.weight - 1)
        # An adapter, whose base has commits of its own
        for commit in commits:
            (repository / "snapshots" / commit / "config.json").rename(
                repository / "snapshots" / commit / "adapter_config.json"
            )
        assert critic(commits[1])[0]._weights == {"model": "someone/tiny", "adapter": commits[1]}
