# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Token counts, against what the trainers themselves make of the same rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tests.advisor.conftest import codes, make_pairs, make_unpaired, only, rows_of
from transformers import LlamaConfig, PreTrainedTokenizerFast
from trl import DPOConfig, KTOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

from trl_spo import SoftPOConfig
from trl_spo.advisor.models import ModelFacts
from trl_spo.advisor.plan import make_plan
from trl_spo.advisor.token_checks import check_tokens, tokenizer_findings
from trl_spo.advisor.tokens import count_tokens, draw_rows
from trl_spo.soft_po.preference_data import prepare_lists


_THINKING = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>think' }}{% endif %}"
)
STANDARD = [
    ("the film ", "was good", "was bad and sad"),
    ("a good story about a dog that finds the way home ", "ends", "it ends well</s>"),
    ("he said that the actors were great and the music was not and then some more of it ", "not", "well"),
    ("the d", "og finds the way home", " was sad"),  # of which one response merges with the prompt
    ("I would", " watch it again with my friends on a long night", " watch it again with my friends on a day"),
]


def _chat(rows):
    def message(role, text):
        return [{"role": role, "content": text}]

    return [(message("user", p), message("assistant", c), message("assistant", r)) for p, c, r in rows]


def _facts(**config):
    return ModelFacts("model", LlamaConfig(**{"vocab_size": 500, **config}), frozenset({2}))


def _args(config, tmp_path, **kwargs):
    return config(output_dir=str(tmp_path), bf16=False, report_to="none", **kwargs)


def _counts(dataset, tokenizer, **kwargs):
    return count_tokens(tokenizer, dataset, rows_of(dataset), {2}, **{"max_length": None, **kwargs})


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("form", ["standard", "implicit", "conversational", "thinking"])
def test_pairs_are_those_of_dpo(form, mode, tokenizer, tmp_path):
    dataset = make_pairs(*(STANDARD if form in ("standard", "implicit") else _chat(STANDARD)))
    if form == "implicit":
        dataset = dataset.map(
            lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
        ).remove_columns("prompt")
    if form == "thinking":
        tokenizer.chat_template = _THINKING
    limit = int(_counts(dataset, tokenizer).starts.max())  # which the longest prompt just fills
    args = _args(DPOConfig, tmp_path, max_length=limit, truncation_mode=mode)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    whole = DPOTrainer._prepare_dataset(
        trainer, dataset, tokenizer, _args(DPOConfig, tmp_path, max_length=None), "train"
    )
    expected = [
        (len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row[f"{which}_ids"]))
        for row in whole
        for which in ("chosen", "rejected")
    ]
    counts = _counts(dataset, tokenizer, max_length=limit, truncation_mode=mode)
    assert list(zip(counts.starts.tolist(), counts.lengths.tolist(), strict=True)) == expected
    assert counts.exact and counts.rows.tolist() == [0, 1, 2, 3, 4]

    kept = DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")
    dropped = counts.starts[::2] >= limit if mode == "keep_start" else np.zeros(5, dtype=bool)
    assert len(kept) == 5 - dropped.sum() and dropped.sum() == (mode == "keep_start")
    batch = DataCollatorForPreference(pad_token_id=0, max_length=limit, truncation_mode=mode)(kept.to_list())
    lengths = torch.stack(batch["attention_mask"].sum(dim=1).chunk(2), dim=1).tolist()
    assert counts.kept.reshape(-1, 2)[~dropped].tolist() == lengths
    answers = torch.stack(batch["completion_mask"].sum(dim=1).chunk(2), dim=1).tolist()
    assert counts.answers.reshape(-1, 2)[~dropped].tolist() == answers
    assert not counts.answers.reshape(-1, 2)[dropped].any()
    ids = torch.stack(batch["input_ids"].chunk(2), dim=1)
    same = [one == other for one, other in ids.tolist()]
    assert counts.alike[~dropped].tolist() == same
    cut = counts.starts < counts.prompts[counts.owners]
    assert cut.all() == (form == "thinking") and cut.any() == (form != "conversational")


@pytest.mark.parametrize("form", ["unpaired", "taken apart", "standard"])
def test_responses_are_those_of_kto(form, tokenizer, tmp_path):
    tokenizer.chat_template = _THINKING
    pairs = make_pairs(*(STANDARD if form == "standard" else _chat(STANDARD)))
    dataset = make_unpaired(*((p, c, True) for p, c, _ in _chat(STANDARD))) if form == "unpaired" else pairs
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    args = _args(KTOConfig, tmp_path, max_length=24)
    prepared = KTOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")
    counts = _counts(dataset, tokenizer, max_length=24, apart=True)
    kept = counts.starts < 24
    batch = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=24)(prepared.to_list())
    sums = (batch[name].sum(dim=1).tolist() for name in ("attention_mask", "completion_mask"))
    ours = zip(counts.kept[kept].tolist(), (counts.kept - counts.starts)[kept].tolist(), strict=True)
    assert sorted(ours) == sorted(zip(*sums, strict=True)) and 0 < kept.sum() < len(kept)
    assert counts.answers.tolist() == np.maximum(counts.kept - counts.starts, 0).tolist()
    if form == "standard":  # one response of the row merges with the prompt, the other one does not
        assert counts.starts[6] < counts.starts[7]


def test_lists_are_those_of_soft_po(tokenizer, lists, tmp_path):
    args = _args(SoftPOConfig, tmp_path, max_length=None)
    expected = [
        len(row["prompt_ids"]) + len(ids)
        for row in prepare_lists(lists, tokenizer, args, "train")
        for ids in row["completion_ids"]
    ]
    assert _counts(lists, tokenizer).lengths.tolist() == expected


def test_tools_are_for_the_template(tokenizer):
    dataset = make_pairs(*_chat(STANDARD[:2]))
    plain = _counts(dataset, tokenizer).lengths
    with_tools = dataset.add_column("tools", ['[{"name": "a tool"}]'] * 2)
    assert (_counts(with_tools, tokenizer).lengths > plain).all()


def test_rows_are_drawn_within_a_budget():
    rows = rows_of(make_pairs(*((f"{i:050d}", "a" * 25, "b" * 25) for i in range(1000))))  # 100 characters each
    indices, exact = draw_rows(rows, seed=0, budget=20_000)
    assert not exact and len(indices) == len(set(indices.tolist())) and len(indices) in (199, 200)
    assert indices.min() < 100 and indices.max() > 900
    assert draw_rows(rows, seed=0, budget=20_000)[0].tolist() == indices.tolist()
    assert draw_rows(rows, seed=1, budget=20_000)[0].tolist() != indices.tolist()
    assert draw_rows(rows, seed=0, budget=100_000)[1]


def _check(dataset, tokenizer, method="dpo", facts=None, **options):
    rows = rows_of(dataset)
    facts = facts or _facts()
    _, findings = check_tokens(tokenizer, dataset, rows, make_plan(method, options), facts)
    return [*tokenizer_findings(tokenizer, rows, facts), *findings]


def test_nothing_is_wrong(tokenizer):
    assert codes(
        _check(make_pairs(*_chat(STANDARD)), tokenizer, facts=ModelFacts("m", LlamaConfig(), frozenset({2, 7})))
    ) == {"tokens": "info"}


def test_truncation_by_hand(tokenizer):
    # Prompts of 3, 3, 30 tokens (BOS among them), responses as long as they say, with their EOS
    words = "a " * 40
    dataset = make_pairs(
        (words[:4], words[:2], words[:20]), (words[:4], words[:60], words[:70]), (words[:58], "a", "b")
    )
    counts = _counts(dataset, tokenizer)
    long_prompt = int(counts.prompts[2])
    findings = _check(dataset, tokenizer, max_length=int(counts.lengths[1]))
    dropped, cut = only(findings, "prompts_dropped"), only(findings, "completions_cut")
    assert counts.lengths[1] < long_prompt
    assert (dropped.severity, dropped.data["share"]["rate"]) == ("warning", 1 / 3)
    assert (cut.severity, cut.data["rows"]["rate"], cut.data["responses"]["rate"]) == ("warning", 1 / 3, 2 / 6)
    limit, kept = counts.lengths[1], counts.lengths[:4] - counts.starts[:4]
    assert cut.data["tokens_lost"] == pytest.approx((counts.lengths[2:4] - limit).sum() / kept.sum())
    # Both responses of the second row are "a a a ..."
    assert only(findings, "identical_after_cut").data["share"]["rate"] == 1 / 3
    just_full = _check(dataset, tokenizer, max_length=int(counts.starts[4]))
    assert only(just_full, "prompts_dropped").data["share"]["rate"] == 1 / 3
    assert "prompts_dropped" not in codes(_check(dataset, tokenizer, max_length=int(counts.starts[4]) + 1))
    everything = _check(dataset, tokenizer, max_length=2)
    assert only(everything, "prompts_dropped").severity == "error"
    assert not {"prompts_dropped", "completions_cut"} & codes(_check(dataset, tokenizer, max_length=None)).keys()
    assert not {"prompts_dropped", "completions_cut"} & codes(_check(dataset, tokenizer)).keys()  # 1024
    at_the_end = _check(dataset, tokenizer, max_length=20, truncation_mode="keep_end")
    assert (
        "prompts_dropped" not in codes(at_the_end) and only(at_the_end, "completions_cut").title == "Prompts are cut"
    )


def test_context_and_vocabulary(tokenizer):
    dataset = make_pairs(*STANDARD)
    longest = int(_counts(dataset, tokenizer).lengths.max())
    assert "beyond_context" not in codes(_check(dataset, tokenizer, facts=_facts(max_position_embeddings=longest)))
    small = _facts(max_position_embeddings=longest - 1)
    assert codes(_check(dataset, tokenizer, facts=small))["beyond_context"] == "error"
    assert "beyond_context" not in codes(_check(dataset, tokenizer, facts=small, max_length=longest - 1))
    assert codes(_check(dataset, tokenizer, facts=_facts(vocab_size=20)))["vocabulary"] == "error"


def test_room_for_online_samples(tokenizer):
    dataset = make_pairs(*STANDARD)
    longest = int(_counts(dataset, tokenizer).prompts.max())
    facts = _facts(max_position_embeddings=longest + 100)
    assert "no_room_for_samples" not in codes(_check(dataset, tokenizer, "soft_po", facts, max_completion_length=100))
    assert (
        codes(_check(dataset, tokenizer, "soft_po", facts, max_completion_length=101))["no_room_for_samples"]
        == "error"
    )
    for context, way_out in (
        (longest + 1, "Set `max_completion_length` to at most 1, or remove the longest prompts."),
        (longest, "Remove the longest prompts, and set a smaller `max_completion_length` if that is not enough."),
    ):
        found = _check(
            dataset, tokenizer, "soft_po", _facts(max_position_embeddings=context), max_completion_length=101
        )
        assert [one.remedy for one in found if one.code == "no_room_for_samples"] == [way_out]
    assert "no_room_for_samples" not in codes(
        _check(dataset, tokenizer, "soft_po", facts, max_completion_length=101, beta=0.0)
    )
    assert "no_room_for_samples" not in codes(_check(dataset, tokenizer, "dpo", facts))


def test_chat_templates(tokenizer):
    chats, plain = make_pairs(*_chat(STANDARD)), make_pairs(*STANDARD)
    assert codes(_check(plain, tokenizer))["chat_template_unused"] == "warning"
    template, tokenizer.chat_template = tokenizer.chat_template, None
    assert "chat_template_unused" not in codes(_check(plain, tokenizer))
    assert codes(tokenizer_findings(tokenizer, rows_of(chats), _facts())) == {"chat_template_missing": "error"}
    tokenizer.chat_template = _THINKING
    finding = only(_check(chats, tokenizer), "prompt_not_prefix")
    assert (finding.severity, finding.data["example"], finding.data["share"]["rate"]) == ("warning", "think", 1.0)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    finding = only(_check(chats, tokenizer), "chat_template_fails")
    assert finding.severity == "error" and "Row 0: TemplateError: roles must alternate" in finding.detail
    # "<|end|>" is not what generation stops at here (2), nor the tokenizer's EOS
    tokenizer.chat_template = template
    assert codes(_check(chats, tokenizer))["eos_missing"] == "warning"
    ends = ModelFacts("model", LlamaConfig(vocab_size=500), frozenset({7}))  # that is <|end|>
    found = codes(_check(chats, tokenizer, facts=ends))
    assert "eos_missing" not in found and found["eos_differs"] == "warning"


def test_double_bos_and_eos(tokenizer):
    dataset = make_pairs(("<s>the film ", "was good", "was bad"), ("a dog", " ran", " sat"))
    finding = only(_check(dataset, tokenizer), "double_bos")
    assert (finding.severity, finding.data["share"]["rate"]) == ("warning", 0.5)
    assert "double_bos" not in codes(_check(make_pairs(*STANDARD), tokenizer))
    assert "double_eos" not in codes(_check(make_pairs(*STANDARD), tokenizer))
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert codes(_check(make_pairs(*STANDARD), tokenizer))["double_eos"] == "warning"


def test_special_tokens(tokenizer):
    plain = rows_of(make_pairs(*STANDARD))
    assert (
        codes(tokenizer_findings(tokenizer, plain, ModelFacts("m", LlamaConfig(), frozenset({5}))))["eos_differs"]
        == "warning"
    )
    assert "eos_differs" not in codes(
        tokenizer_findings(tokenizer, plain, ModelFacts("m", LlamaConfig(), frozenset()))
    )
    tokenizer.pad_token = tokenizer.eos_token
    assert codes(tokenizer_findings(tokenizer, plain, _facts()))["pad_is_eos"] == "info"
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    found = codes(tokenizer_findings(without, plain, _facts()))
    assert found["eos_missing"] == "error"


def test_missing_values_are_left_out(tokenizer):
    dataset = make_pairs(*STANDARD, ("the film", None, " was bad"))
    assert _counts(dataset, tokenizer).rows.tolist() == [0, 1, 2, 3, 4]
    only_missing = Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["a", None], "rejected": [None, "b"]})
    assert check_tokens(tokenizer, only_missing, rows_of(only_missing), make_plan("dpo"), _facts()) == (None, [])
