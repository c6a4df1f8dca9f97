# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""From the text of a dataset to the degrees of its tokens: tokenizers of all kinds, chat templates, collator and levels."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.data_utils import _tokenize, common_prefix_length, is_conversational
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from trl_spo.losses import removal_mask
from trl_spo.sspo import degree_data
from trl_spo.sspo.degree_data import DegreeCollator, add_degrees, draw_levels, map_degrees, special_token_ids
from trl_spo.sspo.key_content import key_phrases


STORIES = Path(__file__).parents[2].parent / "shared/data/stories260K"
SENTENCES = [
    "the old sea captain found a red house near the harbour",
    "assistant user tool system: what the user said to the assistant",
    "it was a good film with a bad ending, and it is still a good film",
]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
STOPS = ["the", "a", "is"]
# The roles are words that a response may have too
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] CONTENT }}"
    "{% elif message['content'] %}{% for part in message['content'] %}{{ part['text'] CONTENT }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"as it is": CHAT_TEMPLATE.replace("CONTENT", ""), "trimmed": CHAT_TEMPLATE.replace("CONTENT", "| trim")}
KINDS = ("byte-level", "byte-level-trimmed", "metaspace", "prepended", "wordpiece", "stories260K")


@cache
def make_tokenizer(kind):
    if kind == "stories260K":
        if not STORIES.exists():
            pytest.skip(f"{STORIES} is missing: the real model for the tests is not part of the project")
        tokenizer = AutoTokenizer.from_pretrained(STORIES)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL[4:]], special_tokens=True)
        return tokenizer
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    options = {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False}
    if kind.startswith("byte-level"):
        # As GPT-2's, whose word for the unknown is its end of text
        names = {"pad_token": "<pad>", "unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>"}
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind == "byte-level-trimmed")
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(SENTENCES, BpeTrainer(initial_alphabet=alphabet, **options))
    elif kind == "wordpiece":
        tokenizer = Tokenizer(WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.train_from_iterator(SENTENCES, WordPieceTrainer(**options))
        # Also after the prompt alone, where the response is to go on
        tokens = [("<s>", 2), ("</s>", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=tokens)
    else:
        tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFKC()]
            )
        tokenizer.decoder = decoders.Metaspace()
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        options = {**options, "special_tokens": SPECIAL + byte_tokens, "vocab_size": 700}
        tokenizer.train_from_iterator(SENTENCES, BpeTrainer(**options))
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
        tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokenized(example, tokenizer, columns=("chosen", "rejected")):
    """The example as TRL leaves it for us."""
    example = dict(example)
    if is_conversational(example):
        prompt = _tokenize(tokenizer, example["prompt"], add_generation_prompt=True)["input_ids"]
    else:
        prompt = _tokenize(tokenizer, example["prompt"])["input_ids"]
        for column in columns:
            if not example[column].endswith(tokenizer.eos_token):
                example[column] += tokenizer.eos_token
    ids = {column: _tokenize(tokenizer, example["prompt"] + example[column])["input_ids"] for column in columns}
    start = min(common_prefix_length(prompt, ids[column]) for column in columns)
    return {
        **example,
        "prompt_ids": prompt[:start],
        **{f"{column}_ids": ids[column][start:] for column in columns},
    }


def with_degrees(example, tokenizer, num_degrees=4, extractor="rake", columns=("chosen", "rejected"), seed=0):
    """The tokenized example, and what is added to it."""
    row = tokenized(example, tokenizer, columns)
    special_ids = special_token_ids(tokenizer)
    added = add_degrees(row, tokenizer, columns, num_degrees, extractor, "en", STOPS, seed, special_ids)
    assert set(added) == {f"{column}_{name}" for column in columns for name in ("degrees", "key_tokens")}
    return row, added


def own_words(message):
    content = message["content"] or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def check(example, kind, template=None, num_degrees=4):
    """All that must hold of the degrees of an example, found out in another way than by our code."""
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = TEMPLATES.get(template)
    row, added = with_degrees(example, tokenizer, num_degrees)
    for column in ("chosen", "rejected"):
        ids, degrees = row[f"{column}_ids"], added[f"{column}_degrees"]
        assert len(degrees) == len(ids)
        assert added[f"{column}_key_tokens"] == sum(degree > 0 for degree in degrees)

        # The masks of all levels
        levels = torch.arange(num_degrees)[None]
        kept = removal_mask(torch.tensor([degrees]), torch.ones(1, len(ids)), levels)[0]
        assert kept[0].all()
        assert not (kept[1:] & ~kept[:-1]).any()

        # The text piece by piece, which tells of each character whose it is
        own = []  # (character, whether it is the response's own)
        if template is None:
            own = [(c, False) for c in row["prompt"]] + [(c, True) for c in row[column]]
        else:
            for message in row["prompt"] + row[column]:
                own += [(c, False) for c in f"<|im_start|>{message['role']}\n"]
                is_own = message["role"] == "assistant" and message not in row["prompt"]
                for part in own_words(message):
                    part = part.strip() if template == "trimmed" else part
                    own += [
                        (c, is_own and start <= i < len(part.rstrip()))
                        for start in [len(part) - len(part.lstrip())]
                        for i, c in enumerate(part)
                    ]
                own += [(c, False) for c in "<|im_end|>\n"]
        text = "".join(c for c, _ in own)
        encoding = tokenizer(text, add_special_tokens=template is None, return_offsets_mapping=True)
        start = len(row["prompt_ids"])
        assert row["prompt_ids"] == encoding["input_ids"][:start] and ids == encoding["input_ids"][start:]
        offsets = encoding["offset_mapping"][start:]
        for token in SPECIAL:
            place = text.find(token)
            while place >= 0:
                own[place : place + len(token)] = [(c, False) for c in token]
                place = text.find(token, place + len(token))

        # The response's own words, in which other words are ends of lines
        content = "".join(c if is_own else "\n" for c, is_own in own)
        phrases = key_phrases(content, "rake", "en", STOPS)
        place_degrees = {}
        for rank, phrase in enumerate(phrases):
            level = next(i for i in range(num_degrees) if rank < -(-len(phrases) * i // (num_degrees - 1)))
            for left, right in phrase.spans:
                for place in range(left, right):
                    place_degrees[place] = min(place_degrees.get(place, level), level)
        for degree, (left, right) in zip(degrees, offsets, strict=True):
            # Each character of a dropped phrase is dropped with all its tokens, and nothing else is
            of_characters = [place_degrees[place] for place in range(left, right) if place in place_degrees]
            assert degree == min(of_characters, default=0)
        special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
        for token, degree, (left, right) in zip(ids, degrees, offsets, strict=True):
            if degree > 0:
                assert any(is_own for _, is_own in own[left:right])
                assert token not in special or text[left:right] not in SPECIAL
    return row, added


LETTERS = st.text(st.sampled_from("abdehnorst AéİßZ\u0301ﬁ日本の😀\n.,'-1\u0939\u093f"), max_size=8)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "the",
                "old",
                "sea captain",
                "red house",
                "user",
                "assistant",
                "tool",
                " ",
                ", ",
                "\n- ",
                "日本語",
                "cafe\u0301",
            ]
            + ["</s>", "<|im_end|>", "<unk>", "<s>"]
        ),
        LETTERS,
    ),
    max_size=10,
).map(lambda parts: " ".join(parts))
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS)
class TestProperties:
    @SETTINGS
    @given(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS, space=st.sampled_from(["", " ", "\n"]))
    def test_standard(self, kind, prompt, chosen, rejected, space):
        check({"prompt": prompt, "chosen": space + chosen, "rejected": space + rejected}, kind)

    @pytest.mark.parametrize("template", TEMPLATES)
    @SETTINGS
    @given(data=st.data())
    def test_conversational(self, kind, template, data):
        contents = st.one_of(
            TEXTS,
            TEXTS,
            st.none(),
            st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3),
        )
        messages = st.lists(
            st.builds(dict, role=st.sampled_from(["assistant", "assistant", "tool", "user"]), content=contents),
            min_size=1,
            max_size=4,
        )
        prompt = [{"role": "user", "content": data.draw(TEXTS)}]
        check({"prompt": prompt, "chosen": data.draw(messages), "rejected": data.draw(messages)}, kind, template)


def dropped(row, added, tokenizer, column="chosen"):
    """Tokens that the last level drops, in text."""
    degrees = added[f"{column}_degrees"]
    return [
        tokenizer.decode([token]).strip()
        for token, degree in zip(row[f"{column}_ids"], degrees, strict=True)
        if degree
    ]


class TestByHand:
    def test_standard(self):
        row, added = check(
            {"prompt": "the film", "chosen": " is the old sea captain, the house", "rejected": " is a"}, "byte-level"
        )
        tokenizer = make_tokenizer("byte-level")
        assert "".join(dropped(row, added, tokenizer)) == "oldseacaptainhouse"
        # "old sea captain" is the first of two, ceil(2 / 3) = 1
        assert added["chosen_degrees"][-2] == 2 and set(added["chosen_degrees"]) == {0, 1, 2}
        assert set(added["rejected_degrees"]) == {0} and added["rejected_key_tokens"] == 0
        assert row["chosen_ids"][-1] == tokenizer.eos_token_id and added["chosen_degrees"][-1] == 0

    def test_prompt_and_response_share_a_token(self):
        # "sea" is a token, whose second half is the response
        row, added = check({"prompt": "the s", "chosen": "ea", "rejected": "ea is"}, "byte-level")
        tokenizer = make_tokenizer("byte-level")
        assert tokenizer.decode(row["chosen_ids"]) == " sea</s>"
        assert added["chosen_degrees"] == [1, 0]

    def test_response_begins_in_the_prompt(self):
        # The rejected response merges with the prompt, and the chosen one begins as early
        row, added = check({"prompt": "the old s", "chosen": "\nhouse", "rejected": "ea"}, "byte-level")
        tokenizer = make_tokenizer("byte-level")
        assert tokenizer.decode(row["chosen_ids"]) == " s\nhouse</s>"
        assert "".join(dropped(row, added, tokenizer)) == "house"

    def test_end_after_the_prompt_alone(self):
        row, _ = check({"prompt": "the old", "chosen": " sea", "rejected": " house"}, "wordpiece")
        tokenizer = make_tokenizer("wordpiece")
        assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["<s>", "the", "old"]

    def test_special_token_at_the_start_looks_like_the_end_of_the_prompt(self):
        row, added = check({"prompt": "the", "chosen": "</s> old", "rejected": "</s> sea"}, "wordpiece", num_degrees=3)
        assert make_tokenizer("wordpiece").convert_ids_to_tokens(row["prompt_ids"]) == ["<s>", "the", "</s>"]
        assert added["chosen_degrees"] == [1, 0, 0]

    def test_words_that_are_unknown(self):
        row, added = check({"prompt": "the", "chosen": " Ж and the <unk>", "rejected": " a"}, "wordpiece")
        tokenizer = make_tokenizer("wordpiece")
        tokens = tokenizer.convert_ids_to_tokens(row["chosen_ids"])
        assert tokens[0] == "<unk>" and added["chosen_degrees"][0] > 0
        assert tokens[tokens.index("the") + 1] == "<unk>" and added["chosen_degrees"][tokens.index("the") + 1] == 0

    def test_special_token_is_in_the_text(self):
        # No phrase of its letters, and none over it
        row, added = check(
            {"prompt": "the", "chosen": " red </s> house <|im_end|>", "rejected": " a"}, "byte-level", num_degrees=3
        )
        tokenizer = make_tokenizer("byte-level")
        assert "".join(dropped(row, added, tokenizer)) == "redhouse"
        assert set(added["chosen_degrees"]) == {0, 1, 2}  # two phrases

    @pytest.mark.parametrize("content", ["assistant", "user", "what", " sea\n"])
    def test_words_of_the_template_and_other_messages(self, content):
        """A search for the content would find it in a header, or in what the tool says."""
        tokenizer = make_tokenizer("byte-level")
        chosen = [
            {"role": "assistant", "content": None},
            {"role": "tool", "content": f"{content}, {content}"},
            {"role": "assistant", "content": content},
        ]
        prompt = [{"role": "user", "content": "what"}]
        row, added = check({"prompt": prompt, "chosen": chosen, "rejected": chosen[-1:]}, "byte-level", "as it is")
        for column in ("chosen", "rejected"):
            assert "".join(dropped(row, added, tokenizer, column)) == content.strip()
            end = len(row[f"{column}_ids"]) - 2  # <|im_end|> and the end of the line
            last = max(i for i, degree in enumerate(added[f"{column}_degrees"]) if degree)
            assert last == end - 1 - content.endswith("\n")

    def test_tools_and_template_arguments(self):
        tokenizer = make_tokenizer("byte-level")
        tokenizer.chat_template = TEMPLATES["as it is"].replace("assistant\n", "{{ name }}\n")
        tools = [{"type": "function", "function": {"name": "sea"}}]
        kwargs = {"name": "captain"}
        messages = [{"role": "user", "content": "what"}], [{"role": "assistant", "content": "the red house"}]
        ids = tokenizer.apply_chat_template(
            messages[0] + messages[1], tools=tools, return_dict=True, tokenize=True, **kwargs
        )["input_ids"]
        row = {"prompt": messages[0], "completion": messages[1], "tools": json.dumps(tools)}
        row |= {"prompt_ids": ids[:10], "completion_ids": ids[10:], "chat_template_kwargs": kwargs}
        options = ("rake", "en", STOPS, 0, special_token_ids(tokenizer))
        added = add_degrees(row, tokenizer, ["completion"], 2, *options)
        assert "".join(dropped(row, added, tokenizer, "completion")) == "redhouse"
        with pytest.raises(ValueError, match="are not those of the text in `prompt` and `completion`"):
            add_degrees({**row, "tools": None}, tokenizer, ["completion"], 2, *options)

    @pytest.mark.parametrize("change", ["| upper", "| replace('red', '')", "| reverse"])
    def test_template_that_changes_the_text(self, change):
        tokenizer = make_tokenizer("byte-level")
        tokenizer.chat_template = CHAT_TEMPLATE.replace("CONTENT", change)
        chosen = [{"role": "assistant", "content": "red house"}]
        with pytest.raises(ValueError, match="The chat template changes the text of `chosen`"):
            with_degrees({"prompt": chosen, "chosen": chosen, "rejected": chosen}, tokenizer)

    def test_template_that_depends_on_the_text(self):
        """The marker changes what it writes, so that the places would be one character off, at letters of the same kind."""
        tokenizer = make_tokenizer("byte-level")
        tokenizer.chat_template = CHAT_TEMPLATE.replace("CONTENT", "| length }}{{ message['content'] }}a{{ ''")
        chosen = [{"role": "assistant", "content": "a" * 9}]
        with pytest.raises(ValueError, match="The chat template changes the text of `chosen`"):
            with_degrees({"prompt": chosen, "chosen": chosen, "rejected": chosen}, tokenizer)

    def test_tokens_of_another_text(self):
        tokenizer = make_tokenizer("byte-level")
        row = tokenized({"prompt": "the", "chosen": " sea", "rejected": " house"}, tokenizer)
        row["chosen_ids"] = row["rejected_ids"]
        with pytest.raises(ValueError, match="`chosen_ids` are not those of the text in `prompt` and `chosen`"):
            add_degrees(row, tokenizer, ["chosen"], 2, "rake", "en", STOPS, 0, special_token_ids(tokenizer))

    def test_special_tokens_without_names(self):
        tokenizer = make_tokenizer("byte-level")
        ids = special_token_ids(tokenizer)
        assert {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL} == ids

    def test_random(self):
        tokenizer = make_tokenizer("byte-level")
        chosen = " ".join([" the old sea captain </s> is a red house", "what the user said"] * 5)
        example = {"prompt": "the film", "chosen": chosen, "rejected": " a film"}
        row, rake = with_degrees(example, tokenizer)
        runs = [with_degrees(example, tokenizer, extractor="random", seed=seed)[1] for seed in (0, 0, 1)]
        assert runs[0] == runs[1] != runs[2]
        assert runs[0]["chosen_degrees"] != rake["chosen_degrees"]
        for run in runs:
            assert sorted(run["chosen_degrees"]) == sorted(rake["chosen_degrees"])
            special = [d for d, token in zip(run["chosen_degrees"], row["chosen_ids"], strict=True) if token == 3]
            assert special == [0] * 6


class TestTrainers:
    """That the tokens are those of TRL's own preparation, for which the other tests have a stand-in."""

    @pytest.mark.parametrize("conversational", [False, True])
    @pytest.mark.parametrize("kto", [False, True])
    def test_prepared(self, kto, conversational, make_trainer, make_kto_trainer, tokenizer, pairs, conversations):
        dataset, columns = conversations if conversational else pairs, ("chosen", "rejected")
        if kto:
            columns = ("completion",)
            dataset = dataset.rename_column("chosen", "completion").remove_columns("rejected")
            dataset = dataset.add_column("label", [i % 2 == 0 for i in range(len(dataset))])
        make = make_kto_trainer if kto else make_trainer
        kwargs = {"train_dataset": dataset, "processing_class": tokenizer}
        prepared = make(kwargs, num_degrees=4, stop_words=STOPS, seed=0).train_dataset
        assert len(prepared) == len(dataset)
        for example, ours in zip(dataset, prepared, strict=True):
            row, added = with_degrees(example, tokenizer, columns=columns)
            names = ["prompt_ids", *(f"{column}_ids" for column in columns)]
            assert {name: ours[name] for name in names} == {name: row[name] for name in names}
            assert {name: ours[name] for name in added} == added
            assert any(added.values())


def pairs_of(count=8):
    return Dataset.from_list(
        [
            {"prompt": f"the film {i}", "chosen": f" old sea captain {i}, house", "rejected": f" a good ending {i}"}
            for i in range(count)
        ]
    )


class TestMap:
    def arguments(self):
        tokenizer = make_tokenizer("byte-level")
        kwargs = {"columns": ("chosen", "rejected"), "num_degrees": 3, "extractor": "rake", "language": "en"}
        return {**kwargs, "tokenizer": tokenizer, "stop_words": STOPS, "seed": 0}

    @pytest.fixture
    def dataset(self, tmp_path):
        """In files, as a dataset that is loaded."""
        tokenizer = make_tokenizer("byte-level")
        rows = Dataset.from_list([tokenized(pair, tokenizer) for pair in pairs_of()])
        rows.to_json(tmp_path / "rows.jsonl")
        return load_dataset(
            "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=tmp_path / "cache"
        )

    def test_cache(self, dataset, monkeypatch):
        first = map_degrees(dataset, "train", None, **self.arguments())
        assert first.column_names[-4:] == ["chosen_degrees", "chosen_key_tokens", "rejected_degrees"] + [
            "rejected_key_tokens"
        ]

        def fail(*args, **kwargs):
            raise AssertionError("not from the cache")

        monkeypatch.setattr(degree_data, "key_phrases", fail)
        second = map_degrees(dataset, "train", None, **self.arguments())
        assert second.cache_files == first.cache_files != []
        assert second.to_list() == first.to_list()
        for changed in ({"seed": 1}, {"num_degrees": 4}, {"language": "de"}, {"stop_words": None}):
            with pytest.raises(AssertionError, match="not from the cache"):
                map_degrees(dataset, "train", None, **{**self.arguments(), **changed})

    @pytest.mark.parametrize(("extractor", "package"), [("rake", "rake-nltk"), ("yake", "yake"), ("rake", "trl-spo")])
    def test_of_another_version_is_not_kept(self, dataset, monkeypatch, extractor, package):
        arguments = {**self.arguments(), "extractor": extractor}
        first = map_degrees(dataset, "train", None, **arguments)
        assert map_degrees(dataset, "train", None, **arguments).cache_files == first.cache_files
        version = degree_data.version
        monkeypatch.setattr(degree_data, "version", lambda name: "0.0" if name == package else version(name))
        assert map_degrees(dataset, "train", None, **arguments).cache_files != first.cache_files

    def test_several_processes(self, dataset):
        together = map_degrees(dataset, "train", 2, **self.arguments())
        assert len(together.cache_files) == 2
        special_ids = special_token_ids(make_tokenizer("byte-level"))
        alone = [{**row, **add_degrees(row, **self.arguments(), special_ids=special_ids)} for row in dataset]
        assert together.to_list() == alone

    def test_progress(self, dataset, monkeypatch):
        seen = {}
        monkeypatch.setattr(Dataset, "map", lambda self, function, **kwargs: seen.update(kwargs, function=function))
        map_degrees(dataset, "train", 3, **self.arguments())
        assert (seen["num_proc"], seen["desc"]) == (3, "Extracting key content from train dataset")
        assert seen["function"] is add_degrees

    def test_stream(self, dataset):
        stream = map_degrees(dataset.to_iterable_dataset(), "train", 2, **self.arguments())
        assert list(stream) == map_degrees(dataset, "train", None, **self.arguments()).to_list()


class TestCollator:
    EXAMPLES = [
        {"prompt_ids": [5], "chosen_ids": [6, 7, 8], "rejected_ids": [9, 10]},
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12, 13]},
    ]
    DEGREES = [
        {"chosen_degrees": [1, 0, 2], "rejected_degrees": [0, 1]},
        {"chosen_degrees": [3, 0], "rejected_degrees": [1, 2, 3, 0]},
    ]

    def examples(self):
        return [{**example, **degrees} for example, degrees in zip(self.EXAMPLES, self.DEGREES, strict=True)]

    def make(self, mode="keep_start", **kwargs):
        collator = DataCollatorForPreference(pad_token_id=0, truncation_mode=mode, **kwargs)
        return DegreeCollator(collator, ("chosen", "rejected"), mode)

    def test_places(self):
        batch = self.make()(self.examples())
        assert batch["token_degrees"].tolist() == [
            [0, 1, 0, 2, 0, 0, 0],
            [0, 0, 0, 3, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 0],
            [0, 0, 0, 1, 2, 3, 0],
        ]
        assert batch["token_degrees"].dtype == torch.long
        plain = DataCollatorForPreference(pad_token_id=0)(self.EXAMPLES)
        assert set(batch) == {*plain, "token_degrees"}
        assert all((batch[name] == value).all() for name, value in plain.items())

    def test_boolean_mask(self):
        def collate(examples):
            batch = DataCollatorForPreference(pad_token_id=0)(examples)
            return {**batch, "completion_mask": batch["completion_mask"].bool()}

        found = DegreeCollator(collate, ("chosen", "rejected"), "keep_start")(self.examples())["token_degrees"]
        assert found.tolist() == self.make()(self.examples())["token_degrees"].tolist()

    def test_keep_start(self):
        batch = self.make(max_length=4)(self.examples())
        assert batch["token_degrees"].tolist() == [[0, 1, 0, 2], [0, 0, 0, 3], [0, 0, 1, 0], [0, 0, 0, 1]]

    def test_keep_end(self):
        batch = self.make("keep_end", max_length=3)(self.examples())
        assert batch["input_ids"].tolist() == [[6, 7, 8], [7, 8, 9], [5, 9, 10], [11, 12, 13]]
        assert batch["token_degrees"].tolist() == [[1, 0, 2], [0, 3, 0], [0, 0, 1], [2, 3, 0]]

    def test_nothing_is_left_of_a_response(self):
        batch = self.make(max_length=3)(self.examples())
        assert batch["token_degrees"][1].tolist() == batch["token_degrees"][3].tolist() == [0, 0, 0]

    def test_left_padding(self):
        inner = DataCollatorForPreference(pad_token_id=0)

        def left(examples):
            batch = inner(examples)
            for name, rows in batch.items():
                padding = (batch["attention_mask"] == 0).sum(dim=1).tolist()
                batch[name] = torch.stack([row.roll(shift) for row, shift in zip(rows, padding, strict=True)])
            return batch

        batch = DegreeCollator(left, ("chosen", "rejected"), "keep_start")(self.examples())
        assert batch["token_degrees"].tolist() == [
            [0, 0, 0, 0, 1, 0, 2],
            [0, 0, 0, 0, 0, 3, 0],
            [0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 1, 2, 3, 0],
        ]

    def test_unpaired(self):
        examples = [
            {"prompt_ids": e["prompt_ids"], "completion_ids": e["chosen_ids"], "label": True} for e in self.EXAMPLES
        ]
        examples = [
            {**example, "completion_degrees": degrees["chosen_degrees"]}
            for example, degrees in zip(examples, self.DEGREES, strict=True)
        ]
        collator = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=4)
        batch = DegreeCollator(collator, ("completion",), "keep_start")(examples)
        assert batch["token_degrees"].tolist() == [[0, 1, 0, 2], [0, 0, 0, 3]]

    @pytest.mark.parametrize("change", ["longer", "other tokens", "other order", "other end"])
    def test_changed_completions(self, change):
        inner = DataCollatorForPreference(pad_token_id=0)

        def collate(examples):
            batch = inner(examples)
            if change == "longer":
                batch["completion_mask"][:] = 1
            elif change == "other tokens":
                batch["input_ids"][2, 1] = 3
            elif change == "other order":
                batch = {name: rows.flip(0) for name, rows in batch.items()}
            else:
                batch["completion_mask"][0, 1] = 0  # without the first token
            return batch

        with pytest.raises(
            ValueError, match=r"made \d tokens of a completion that has \d, and they are not the first"
        ):
            DegreeCollator(collate, ("chosen", "rejected"), "keep_start")(self.examples())


class TestLevels:
    def rows(self, count=3, length=6):
        return torch.randint(100, (count, length), generator=torch.Generator().manual_seed(0))

    def draw(self, ids, mask=None, num_degrees=1000, seed=0, step=0):
        return draw_levels(ids, torch.ones_like(ids) if mask is None else mask, num_degrees, seed, step)

    def test_same_again(self):
        ids = self.rows()
        assert self.draw(ids).shape == (3, 1)
        assert torch.equal(self.draw(ids), self.draw(ids))
        assert len(set(self.draw(ids).flatten().tolist())) == 3
        for changed in ({"seed": 1}, {"step": 1}):
            assert not torch.equal(self.draw(ids), self.draw(ids, **changed))

    @settings(deadline=None)
    @given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 99))
    def test_padding(self, left, right, filling):
        ids = self.rows()
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        padded = torch.nn.functional.pad(ids, (left, right), value=filling)
        assert torch.equal(self.draw(padded, mask), self.draw(ids))

    @settings(deadline=None)
    @given(st.permutations(range(6)), st.integers(1, 6))
    def test_other_rows(self, order, count):
        ids = self.rows(6)
        assert torch.equal(self.draw(ids[list(order[:count])]), self.draw(ids)[list(order[:count])])

    @pytest.mark.parametrize("by", ["rows", "steps"])
    def test_uniform(self, by):
        if by == "rows":
            levels = self.draw(self.rows(3000), num_degrees=5)
        else:
            levels = torch.cat([self.draw(self.rows(3), num_degrees=5, step=step) for step in range(1000)])
        counts = levels.flatten().bincount(minlength=5)
        assert len(counts) == 5
        assert (((counts - 600) ** 2) / 600).sum() < 25  # of chi-square with 4 degrees of freedom, 1 in 20,000
