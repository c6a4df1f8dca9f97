# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Candidates of each student, and runs that are killed: in forks of this process, which has imported all that they need."""

import json
import os
import random
import signal
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_spo.synthetic import candidates
from trl_spo.synthetic.candidates import generate_candidates
from trl_spo.synthetic.endpoint import Budget, Endpoint, EndpointError, SpendingLimitError
from trl_spo.synthetic.endpoint_student import EndpointStudent
from trl_spo.synthetic.store import AnswerStore
from trl_spo.synthetic.students import TransformersStudent
from trl_spo.synthetic.vllm_student import VLLMStudent

from .conftest import Forked


CHECK = [{"role": "user", "content": "Hello"}]  # what an endpoint is asked before all else
STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def settings_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".settings.json").read_text())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def make_prompts(world: Path, number: int) -> Dataset:
    prompts = load_from_disk(str(world / "dataset")).select(range(number)).select_columns(["prompt"])
    # Of unequal lengths, so that there is padding
    prompts = prompts.map(lambda row, i: {"prompt": row["prompt"] + " w7" * (i % 3)}, with_indices=True)
    return prompts.add_column("prompt_id", [f"p{i}" for i in range(number)])


@pytest.fixture
def prompts(world):
    return make_prompts(world, 6)


@pytest.fixture
def student(world):
    return TransformersStudent(model=str(world / "model"), batch_size=4, max_new_tokens=8)


def greedy(model, tokenizer, prompt_ids: list[int], eos: list[int], max_new_tokens: int) -> tuple[list[int], str]:
    """The likeliest tokens, one after another, of a sequence by itself."""
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if token in eos:
            return ids[len(prompt_ids) :], "stop"
        ids.append(token)
    return ids[len(prompt_ids) :], "length"


# What is drawn


def test_the_file_and_its_settings(prompts, student, tmp_path):
    prompts = prompts.add_column("answer", [None, "é\u2028", "3", "4", "5", "6"]).add_column("tags", [["a", "b"]] * 6)
    path = tmp_path / "new" / "candidates.jsonl"
    assert generate_candidates(prompts, student, path, num_responses=3, seed=7) == path
    rows = [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    assert [{name: row[name] for name in prompts.column_names} for row in rows] == prompts.to_list()
    for row in rows:
        assert list(row) == [*prompts.column_names, "responses"]
        assert [response["id"] for response in row["responses"]] == ["0", "1", "2"]
        assert [response["temperature"] for response in row["responses"]] == [0.7, 1.0, 0.7]
        assert all(response.keys() == {"id", "text", "temperature", "finish_reason"} for response in row["responses"])
    texts = [response["text"] for row in rows for response in row["responses"]]
    assert len(set(texts)) > 15 and not any("<" in text for text in texts)
    assert {response["finish_reason"] for row in rows for response in row["responses"]} == {"stop", "length"}
    assert sorted(file.name for file in path.parent.iterdir()) == ["candidates.jsonl", "candidates.settings.json"]
    settings = settings_of(path)
    assert (settings["num_responses"], settings["temperatures"], settings["seed"]) == (3, [0.7, 1.0], 7)
    of_student = settings["student"]
    assert of_student["model"] == student.model and of_student["dtype"] == "float32"
    assert of_student["max_new_tokens"] == 8 and len(of_student["weights"]) == 16


def test_greedy_responses_are_those_of_each_prompt_by_itself(prompts, student, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(student.model)
    model.generation_config.eos_token_id = [1, 9]  # w5 too
    student.model, student.tokenizer = model, AutoTokenizer.from_pretrained(student.model)
    path = generate_candidates(prompts, student, tmp_path / "c.jsonl", num_responses=2, temperatures=(1.0, 0.0))
    tokenizer, reasons = student.tokenizer, Counter()
    for row in rows_of(path):
        ids, reason = greedy(model, tokenizer, tokenizer(row["prompt"]).input_ids, [1, 9], 8)
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        found = row["responses"][1]
        assert (found["text"].strip(), found["finish_reason"]) == (expected, reason)
        assert not expected or found["text"].startswith(" ")
        reasons[reason] += 1
    assert len(reasons) == 2  # both ends are there to be told apart


def test_batches_are_drawn_apart(world, tmp_path):
    prompts = Dataset.from_dict({"prompt_id": ["a", "b"], "prompt": ["say w3"] * 2})
    student = TransformersStudent(model=str(world / "model"), batch_size=1, max_new_tokens=8)
    first, second = rows_of(generate_candidates(prompts, student, tmp_path / "c.jsonl", seed=1))
    other, _ = rows_of(generate_candidates(prompts, student, tmp_path / "d.jsonl", seed=2))
    assert first["responses"] != second["responses"] and first["responses"] != other["responses"]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.6}, {"generation_kwargs": {"min_p": 0.2}}])
def test_samples_follow_the_tempered_distribution(world, tmp_path, options):
    n, temperatures = 3000, (0.5, 1.5)
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    # What the model's own file says is not mixed in
    model.generation_config.min_p = 0.9
    model.generation_config.top_k = 1
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    student = TransformersStudent(model=model, tokenizer=tokenizer, max_new_tokens=1, **options)
    prompts = Dataset.from_dict({"prompt_id": ["p"], "prompt": ["say w3 w4"]})
    path = generate_candidates(prompts, student, tmp_path / "c.jsonl", num_responses=n, temperatures=temperatures)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer("say w3 w4").input_ids])).logits[0, -1]
    for k, temperature in enumerate(temperatures):
        probabilities = (logits / temperature).softmax(0)
        likeliest, order = probabilities.sort(descending=True)
        keep = torch.ones(len(order), dtype=torch.bool)
        if "top_k" in options:
            keep[3:] = False
        if "top_p" in options:
            keep = likeliest.cumsum(0) - likeliest < 0.6
        if "generation_kwargs" in options:
            keep = likeliest >= 0.2 * likeliest[0]
        expected = torch.zeros_like(probabilities).scatter(0, order[keep], likeliest[keep] / likeliest[keep].sum())
        # Special tokens have no text
        shown = {f" {tokenizer.convert_ids_to_tokens(i)}": p for i, p in enumerate(expected.tolist()) if i > 2}
        shown[""] = expected[:3].sum().item()
        found = Counter(response["text"] for response in rows_of(path)[0]["responses"][k::2])
        distance = sum(abs(found[text] / (n / 2) - shown.get(text, 0.0)) for text in {*found, *shown}) / 2
        assert distance < 0.06, (temperature, distance)


def test_conversations_go_through_the_chat_template(model, tokenizer, tmp_path):
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    chats = [[{"role": "user", "content": "the film"}], [{"role": "user", "content": "a"}]]
    prompts = Dataset.from_dict({"prompt_id": ["a", "b"], "prompt": chats, "tools": [json.dumps([tool]), None]})
    student = TransformersStudent(model=model, tokenizer=tokenizer, max_new_tokens=5)
    path = generate_candidates(prompts, student, tmp_path / "c.jsonl", num_responses=2, temperatures=(0.0, 1.0))
    for row, tools in zip(rows_of(path), ([tool], None), strict=True):
        ids = tokenizer.apply_chat_template(row["prompt"], tools=tools, add_generation_prompt=True)["input_ids"]
        ids, _ = greedy(model, tokenizer, ids, [2], 5)
        assert ids and row["responses"][0]["text"] == tokenizer.decode(ids, skip_special_tokens=True)


@needs_stories
def test_a_story_goes_on_where_its_prompt_ends(tmp_path):
    texts = ["Once upon a time, there was a little", "Lily and her mom went to the", "The big dog"]
    prompts = Dataset.from_dict({"prompt_id": ["a", "b", "c"], "prompt": texts})
    student = TransformersStudent(model=str(STORIES), max_new_tokens=12)
    path = generate_candidates(prompts, student, tmp_path / "c.jsonl", temperatures=(0.0, 0.7, 0.8, 1.0))
    rows = rows_of(path)
    assert rows[0]["responses"][0]["text"].startswith(" girl named Lily")
    tokenizer, text = student.tokenizer, rows[1]["prompt"] + rows[1]["responses"][0]["text"]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert not any("<" in response["text"] for row in rows for response in row["responses"])


def test_the_callers_state_is_left_alone(prompts, world, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    student = TransformersStudent(model=model, tokenizer=tokenizer, max_new_tokens=4, top_k=5)
    config, files = model.generation_config, []
    for training in (False, True):
        model.train(training)
        torch.manual_seed(training)
        before = torch.get_rng_state()
        files.append(generate_candidates(prompts, student, tmp_path / f"{training}.jsonl").read_bytes())
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training == training and model.generation_config is config
    assert files[0] == files[1]


def test_a_prompt_that_decodes_in_another_way_before_a_response_is_an_error(prompts, student, tmp_path, monkeypatch):
    student.load()
    decode = type(student.tokenizer).decode
    monkeypatch.setattr(
        type(student.tokenizer), "decode", lambda self, ids, **kw: f"{len(ids)}{decode(self, ids, **kw)}"
    )
    with pytest.raises(ValueError, match="decodes the prompt 'p0' in another way"):
        generate_candidates(prompts, student, tmp_path / "c.jsonl")


@pytest.mark.parametrize("given_as", ["folder", "model"])
def test_an_adapter(prompts, world, tmp_path, perturb, given_as):
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    perturb(model, scale=0.5, only_trainable=True)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    given = {"model": model, "tokenizer": tokenizer} if given_as == "model" else {"model": str(tmp_path / "adapter")}
    student = TransformersStudent(max_new_tokens=6, **given)
    path = generate_candidates(prompts, student, tmp_path / "c.jsonl", num_responses=2, temperatures=(0.0, 1.0))
    base, changed = AutoModelForCausalLM.from_pretrained(world / "model"), 0
    for row in rows_of(path):
        ids, _ = greedy(model.eval(), tokenizer, tokenizer(row["prompt"]).input_ids, [1], 6)
        assert row["responses"][0]["text"].strip() == tokenizer.decode(ids, skip_special_tokens=True)
        changed += ids != greedy(base, tokenizer, tokenizer(row["prompt"]).input_ids, [1], 6)[0]
    assert changed


# Who drew it


def test_the_commit_of_a_model_of_the_hub(world, prompts, tmp_path):
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "cache"
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(world / "model")
    student = TransformersStudent(
        model="someone/tiny",
        tokenizer=AutoTokenizer.from_pretrained(world / "model"),
        model_kwargs={"cache_dir": str(cache), "local_files_only": True, "token": "hf_secret"},
        max_new_tokens=2,
    )
    path = generate_candidates(prompts, student, tmp_path / "c.jsonl")
    of_student = settings_of(path)["student"]
    assert (of_student["model"], of_student["revision"]) == ("someone/tiny", commit)
    assert "hf_secret" not in str(snapshot(tmp_path))


def test_a_run_of_other_weights_or_settings_is_refused(world, prompts, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")

    def generate(rows=prompts, stop=None, name="c.jsonl", **kwargs):
        arguments = {"num_responses": 2, "seed": 1}
        of_call = {key: kwargs.pop(key) for key in ("num_responses", "temperatures", "seed") if key in kwargs}
        options = {"model": model, "tokenizer": tokenizer, "max_new_tokens": 4, "batch_size": 2, **kwargs}
        student = TransformersStudent(**options)
        if stop is not None:
            draw = student.generate
            student.generate = lambda batches, bar: (
                batch for batch, _ in zip(draw(batches, bar), range(stop), strict=False)
            )
        return generate_candidates(rows, student, tmp_path / name, **{**arguments, **of_call})

    with pytest.raises(RuntimeError, match="Another process wrote to"):
        generate(stop=1, name="begun.jsonl")
    generate()
    (tmp_path / "unknown.jsonl").write_text("not ours")
    before = snapshot(tmp_path)
    for kwargs, match in [
        ({"seed": 2}, "`seed` was 1 and is now 2"),
        ({"num_responses": 3}, "`num_responses` was 2 and is now 3"),
        ({"temperatures": (0.5, 1.0)}, r"`temperatures` was \[0.7, 1.0\] and is now \[0.5, 1.0\]"),
        (
            {"max_new_tokens": 5, "top_k": 2},
            "`student.max_new_tokens` was 4 and is now 5; `student.top_k` was 0 and is now 2",
        ),
        ({"generation_kwargs": {"min_p": 0.1}}, "`student.generation_kwargs.min_p` was None and is now 0.1"),
        ({"rows": prompts.select([1, 0, 2, 3, 4, 5])}, "`prompts.sha256` was"),
        ({"rows": prompts.add_column("more", range(6))}, "`prompts.sha256` was"),
    ]:
        for name in ("c.jsonl", "begun.jsonl"):
            with pytest.raises(ValueError, match=match):
                generate(name=name, **kwargs)
    with pytest.raises(ValueError, match=r"unknown.jsonl', or parts of it, exist without '.*unknown.settings.json'"):
        generate(name="unknown.jsonl")
    assert snapshot(tmp_path) == before
    student = TransformersStudent(model=model, tokenizer=tokenizer, max_new_tokens=4, batch_size=2)
    generate_candidates(prompts, student, tmp_path / "c.jsonl", num_responses=2, seed=1)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3  # a model that has been trained since
    for name in ("c.jsonl", "begun.jsonl"):
        with pytest.raises(ValueError, match="`student.weights` was"):
            generate_candidates(prompts, student, tmp_path / name, num_responses=2, seed=1)
    assert snapshot(tmp_path) == before


def test_settings_of_which_nothing_was_drawn_do_not_bind(prompts, student, tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    path = tmp_path / "c.jsonl"
    monkeypatch.setattr(TransformersStudent, "_sample", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        generate_candidates(prompts, student, path)
    monkeypatch.undo()
    student.batch_size = 1
    assert len(rows_of(generate_candidates(prompts, student, path))) == 6
    assert settings_of(path)["student"]["batch_size"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_equal_numbers_are_equal_settings(prompts, world, tmp_path):
    def student(min_p):
        kwargs = {"min_p": min_p}
        return TransformersStudent(model=str(world / "model"), max_new_tokens=2, generation_kwargs=kwargs)

    path = generate_candidates(prompts, student(0), tmp_path / "c.jsonl", temperatures=(1,))
    before = snapshot(tmp_path)
    generate_candidates(prompts, student(0.0), path, temperatures=[1.0])
    assert snapshot(tmp_path) == before


def test_of_two_runs_at_once_both_end_with_the_file(prompts, world, tmp_path):
    def student():
        return TransformersStudent(model=str(world / "model"), batch_size=2, max_new_tokens=4)

    def meanwhile(path, **kwargs):
        first = student()
        draw = first.generate

        def generate(batches, bar):
            for i, batch in enumerate(draw(batches, bar)):
                if i == kwargs["after"]:
                    generate_candidates(prompts, student(), path, seed=kwargs["seed"])
                yield batch

        first.generate = generate
        return generate_candidates(prompts, first, path)

    expected = generate_candidates(prompts, student(), tmp_path / "expected.jsonl").read_bytes()
    assert meanwhile(tmp_path / "same.jsonl", seed=42, after=1).read_bytes() == expected
    # Before a line is there, the other one cannot know of it
    with pytest.raises(RuntimeError, match="Another process wrote to"):
        meanwhile(tmp_path / "other.jsonl", seed=1, after=0)
    assert settings_of(tmp_path / "other.jsonl")["seed"] == 1
    with pytest.raises(ValueError, match="`seed` was 42 and is now 1"):
        meanwhile(tmp_path / "refused.jsonl", seed=1, after=1)


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_responses": 0}, "`num_responses` must be at least 1"),
        ({"temperatures": ()}, "`temperatures` is empty"),
        ({"temperatures": (0.7, -0.1)}, "`temperatures` must not be negative"),
        ({"temperatures": (float("nan"),)}, "`temperatures` must not be negative, and finite"),
        ({"temperatures": (0.0, 1.0)}, "2 responses to each prompt are drawn at temperature 0"),
        ({"temperatures": (0.1, 0.2, 0.3), "num_responses": 2}, "3 values for `num_responses=2`"),
        ({"seed": -1}, "`seed` must not be negative"),
    ],
)
def test_options_out_of_range(prompts, student, tmp_path, kwargs, match):
    with pytest.raises(ValueError, match=match):
        generate_candidates(prompts, student, tmp_path / "c.jsonl", **kwargs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"prompt": ["a"]}, "no column 'prompt_id'"),
        ({"prompt_id": ["a"]}, "no column 'prompt'"),
        ({"prompt_id": [], "prompt": []}, "`prompts` is empty"),
        ({"prompt_id": [1], "prompt": ["a"]}, "`prompt_id` of row 0 must be a string"),
        ({"prompt_id": ["a", "a"], "prompt": ["a", "b"]}, "`prompt_id` 'a' is there twice"),
        ({"prompt_id": ["a"], "prompt": [""]}, "The prompt 'a' must be"),
        ({"prompt_id": ["a"], "prompt": ["say"], "responses": [[]]}, "a column 'responses'"),
        ({"prompt_id": ["a"], "prompt": ["say"], "score": [float("nan")]}, "prompt 'a' cannot be written as JSON"),
        ({"prompt_id": ["a"], "prompt": ["say"], "raw": [b"x"]}, "prompt 'a' cannot be written as JSON"),
        (
            {"prompt_id": ["a", "b"], "prompt": ["say", "say" + " w1" * 56]},
            r"The prompt 'b' has 57 .*`max_new_tokens=8`",
        ),
    ],
)
def test_prompts_that_cannot_be_used(student, tmp_path, columns, match):
    with pytest.raises(ValueError, match=match):
        generate_candidates(Dataset.from_dict(columns), student, tmp_path / "c.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_just_fits(student, tmp_path):
    prompts = Dataset.from_dict({"prompt_id": ["a"], "prompt": ["say" + " w1" * 55]})
    generate_candidates(prompts, student, tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"top_p": 0.0}, "`top_p` must be above 0"),
        ({"top_k": -1}, "`top_k` must be at least 0"),
        ({"generation_kwargs": {"temperature": 1.0}}, "cannot have 'temperature'. Use `temperatures` instead"),
        ({"generation_kwargs": {"num_beams": 2}}, "cannot have 'num_beams'. Leave it out"),
        ({"generation_kwargs": {"min_pp": 2}}, "'min_pp', which is no field"),
    ],
)
def test_options_of_a_student_out_of_range(world, kwargs, match):
    with pytest.raises(ValueError, match=match):
        TransformersStudent(model=str(world / "model"), **kwargs)


def test_fsdp_is_refused(prompts, student, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="`TransformersStudent` does not run under FSDP"):
        generate_candidates(prompts, student, tmp_path / "c.jsonl")


# A student behind an endpoint


class Server(ThreadingHTTPServer):
    """It tells a seed of a story, and keeps the bodies that it was sent."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def asked(self) -> list[dict]:
        """Without those that only check that it is there."""
        return [body for body in self.bodies if body["messages"] != CHECK]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        content = body["messages"][-1]["content"]
        misfortune = content if body["messages"] != CHECK else ""
        if "too long" in misfortune:
            return self.answer(400, {"error": {"message": "Too long.", "code": "context_length_exceeded"}})
        if body.get("strict") and "seed" in body:
            return self.answer(400, {"error": {"message": "No such field: seed."}})
        if "broken" in misfortune:
            return self.answer(500, {"error": {"message": "Out of order."}})
        message = {
            "role": "assistant",
            "content": f" Story {body.get('seed')} at {body['temperature']} of {content} \ud83d",
        }
        reason = "content_filter" if "filtered" in misfortune else "length" if body.get("seed", 0) % 2 else "stop"
        self.answer(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": reason}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
            },
        )

    def answer(self, status: int, answer: dict) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def module_server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(module_server):
    module_server.bodies.clear()
    return module_server


def chats(*contents: str) -> Dataset:
    messages = [[{"role": "user", "content": content}] for content in contents]
    return Dataset.from_dict({"prompt_id": [f"p{i}" for i in range(len(contents))], "prompt": messages})


def endpoint_student(url: str, store: AnswerStore, **kwargs) -> EndpointStudent:
    of_endpoint = {key: kwargs.pop(key) for key in ("concurrency", "max_retries", "completion_price") if key in kwargs}
    endpoint = Endpoint(
        model="teller", base_url=url, api_key_env=None, **{"concurrency": 4, "max_retries": 0, **of_endpoint}
    )
    return EndpointStudent(endpoint=endpoint, store=store, **kwargs)


def test_an_endpoint_is_asked_for_each_response_once(server, tmp_path):
    with AnswerStore(tmp_path / "store.sqlite") as store:
        student = endpoint_student(server.url, store, max_new_tokens=50, top_p=0.9, extra_body={"min_p": 0.1})
        path = generate_candidates(chats("one", "two", "three"), student, tmp_path / "c.jsonl", num_responses=3)
        bodies, rows = server.asked, rows_of(path)
        assert len(bodies) == 9 and len({body["seed"] for body in bodies}) == 9
        assert Counter(body["temperature"] for body in bodies) == {0.7: 6, 1.0: 3}
        of_all = {"model": "teller", "max_completion_tokens": 50, "top_p": 0.9, "min_p": 0.1}
        assert all(of_all.items() <= body.items() for body in bodies)
        by_text = {
            f"{body['seed']} at {body['temperature']} of {body['messages'][0]['content']}": body for body in bodies
        }
        for row, content in zip(rows, ("one", "two", "three"), strict=True):
            assert row["prompt"] == [{"role": "user", "content": content}]
            for response, temperature in zip(row["responses"], (0.7, 1.0, 0.7), strict=True):
                story = response["text"].removeprefix(" Story ").rsplit(" ", 1)[0]
                seed = by_text.pop(story)["seed"]
                assert story == f"{seed} at {temperature} of {content}"
                assert response["temperature"] == temperature
                assert response["finish_reason"] == ("length" if seed % 2 else "stop")
        assert not by_text
        # The same again, with one more prompt, in another file: only that one is asked for
        generate_candidates(chats("one", "two", "three", "four"), student, tmp_path / "d.jsonl", num_responses=3)
        assert [body["messages"][0]["content"] for body in server.asked[9:]] == ["four"] * 3
        assert rows_of(tmp_path / "d.jsonl")[:3] == rows
        # Other weights behind the same name, another seed or temperature: all are
        student.revision = "round-2"
        generate_candidates(chats("one"), student, tmp_path / "e.jsonl", num_responses=3)
        generate_candidates(chats("one"), student, tmp_path / "f.jsonl", num_responses=3, seed=1)
        generate_candidates(chats("one"), student, tmp_path / "g.jsonl", num_responses=2, temperatures=(0.1, 0.2))
        assert len(server.asked) == 12 + 3 + 3 + 2
    settings = settings_of(path)["student"]
    assert (settings["model"], settings["base_url"], settings["top_p"]) == ("teller", server.url, 0.9)


def test_without_seeds(server, tmp_path):
    with AnswerStore(tmp_path / "store.sqlite") as store:
        student = endpoint_student(server.url, store, send_seed=False)
        for seed in (0, 1):
            generate_candidates(chats("one"), student, tmp_path / f"{seed}.jsonl", num_responses=2, seed=seed)
    assert len(server.asked) == 4 and not any("seed" in body for body in server.bodies)


def test_a_server_that_takes_no_seeds(server, tmp_path):
    with AnswerStore(tmp_path / "store.sqlite") as store:
        student = endpoint_student(server.url, store, extra_body={"strict": True})
        with pytest.raises(EndpointError, match="No such field: seed"):
            generate_candidates(chats("one"), student, tmp_path / "c.jsonl")
    assert not server.asked


def test_prompts_that_are_rejected_are_named_after_all_others_were_asked(server, tmp_path):
    prompts = chats("one", "too long", "two", "filtered", "three")
    with AnswerStore(tmp_path / "store.sqlite") as store:
        student = endpoint_student(server.url, store)
        with pytest.raises(
            EndpointError, match=r"2 prompts have no response.*'p1' \(.*Too long.*'p3' \(.*'content_filter'"
        ):
            generate_candidates(prompts, student, tmp_path / "c.jsonl", num_responses=2)
        assert not (tmp_path / "c.jsonl").exists() and len(server.asked) == 10
        path = generate_candidates(prompts.select([0, 2, 4]), student, tmp_path / "c.jsonl", num_responses=2)
        assert len(server.asked) == 10 and [row["prompt_id"] for row in rows_of(path)] == ["p0", "p2", "p4"]


def test_requests_without_an_answer_are_asked_again(server, tmp_path, monkeypatch):
    with AnswerStore(tmp_path / "store.sqlite") as store:
        student = endpoint_student(server.url, store)
        with pytest.raises(
            EndpointError, match="2 requests to model 'teller' .* had no answer after 0 retries; .*500"
        ):
            generate_candidates(chats("one", "broken"), student, tmp_path / "c.jsonl", num_responses=2)
        assert len(store) == 2 and not (tmp_path / "c.jsonl").exists()
        monkeypatch.setattr(Handler, "answer", _mended(Handler.answer))
        path = generate_candidates(chats("one", "broken"), student, tmp_path / "c.jsonl", num_responses=2)
        assert len(server.asked) == 6 and len(rows_of(path)) == 2


def _mended(answer: Callable) -> Callable:
    def answer_after_all(self, status, body):
        message = {"role": "assistant", "content": "mended"}
        if status == 500:
            status, body = 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        answer(self, status, body)

    return answer_after_all


def test_a_budget_stops_and_goes_on(server, tmp_path):
    prompts = chats(*(f"prompt {i}" for i in range(5)))
    with AnswerStore(tmp_path / "store.sqlite") as store:
        # 5 tokens of 16 are written, so that of 10 responses for 5e-6 each some are paid for
        arguments = {"completion_price": 1.0, "max_new_tokens": 16, "concurrency": 1}
        student = endpoint_student(server.url, store, budget=Budget(limit=30e-6), **arguments)
        with pytest.raises(SpendingLimitError, match="max_cost"):
            generate_candidates(prompts, student, tmp_path / "c.jsonl", num_responses=2)
        assert 0 < len(store) == len(server.asked) < 10
        student.budget = Budget(limit=1.0)
        assert len(rows_of(generate_candidates(prompts, student, tmp_path / "c.jsonl", num_responses=2))) == 5
        assert len(server.asked) == 10


def test_an_endpoint_that_is_down(tmp_path):
    with AnswerStore(tmp_path / "store.sqlite") as store:
        student = endpoint_student("http://127.0.0.1:9/v1", store)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="model 'teller' at http://127.0.0.1:9/v1 does not answer"):
            generate_candidates(chats("one"), student, tmp_path / "c.jsonl")
        assert time.monotonic() - start < 20


def test_options_of_an_endpoint_student_out_of_range(tmp_path):
    with AnswerStore(tmp_path / "store.sqlite") as store:
        for kwargs, match in [
            ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
            ({"top_p": 2.0}, "`top_p` must be above 0"),
            ({"extra_body": {"temperature": 0.1, "seed": 1}}, r"`extra_body` cannot have \['seed', 'temperature'\]"),
        ]:
            with pytest.raises(ValueError, match=match):
                endpoint_student("http://127.0.0.1:9/v1", store, **kwargs)
    with pytest.raises(ValueError, match="needs a `store`"):
        generate_candidates(chats("one"), endpoint_student("http://127.0.0.1:9/v1", None), tmp_path / "c.jsonl")


def test_an_endpoint_wants_conversations(server, prompts, tmp_path):
    with AnswerStore(tmp_path / "store.sqlite") as store:
        with pytest.raises(ValueError, match="The prompt 'p0' is not conversational"):
            generate_candidates(prompts, endpoint_student(server.url, store), tmp_path / "c.jsonl")
    assert not server.bodies


def test_an_endpoint_is_not_sent_tools(tmp_path):
    with AnswerStore(tmp_path / "store.sqlite") as store:
        for name, value in (("tools", [{"type": "function"}]), ("chat_template_kwargs", {"enable_thinking": False})):
            with pytest.raises(ValueError, match=f"The prompts have `{name}`, which `EndpointStudent` does not send"):
                generate_candidates(
                    chats("one").add_column(name, [value]),
                    endpoint_student("http://127.0.0.1:9/v1", store),
                    tmp_path / "c.jsonl",
                )


def test_secrets_of_an_endpoint_student_are_in_no_file(tmp_path):
    with AnswerStore(tmp_path / "store.sqlite") as store:
        student = endpoint_student("https://me:pw@host/v1?key=abc", store, extra_body={"api_key": "sk-1"})
        assert not any(secret in json.dumps(student.load()) for secret in ("pw", "abc", "sk-1"))
        assert not any(secret in student.endpoint.where for secret in ("pw", "abc"))


def test_a_message_without_content_has_a_price():
    endpoint = Endpoint(model="a", base_url="http://127.0.0.1:9/v1", api_key_env=None, prompt_price=1e6)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    options = {"max_completion_tokens": 0}
    assert endpoint._most([call], options) > endpoint._most([{"role": "assistant", "content": ""}], options) + 40


def test_settings_of_paths_that_differ_in_a_dot(student, prompts, tmp_path):
    for seed in (1, 2):
        generate_candidates(prompts, student, tmp_path / f"cands.seed{seed}", seed=seed)
    generate_candidates(prompts, student, tmp_path / "cands.seed1", seed=1)
    assert len(list(tmp_path.glob("cands.seed?.settings.json"))) == 2


# vLLM, which cannot be installed everywhere


def test_without_vllm(world, prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'pip install "trl-spo\[vllm\]"'):
        generate_candidates(prompts, VLLMStudent(model=str(world / "model")), tmp_path / "c.jsonl")


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for `vllm` that says a token of its prompt, as often as its seed says."""
    module = types.ModuleType("vllm")
    module.engines, module.calls = [], []

    class LLM:
        def __init__(self, **kwargs):
            module.engines.append(kwargs)

        def generate(self, prompts, sampling_params, use_tqdm):
            module.calls.append((prompts, sampling_params))
            outputs = []
            for prompt, params in zip(prompts, sampling_params, strict=True):
                number = 1 + params.seed % 5
                ids = [prompt["prompt_token_ids"][-1]] * min(number, params.max_tokens)
                stopped = len(ids) < params.max_tokens
                output = types.SimpleNamespace(
                    token_ids=(*ids, 1) if stopped else tuple(ids), finish_reason="stop" if stopped else "length"
                )
                outputs.append(types.SimpleNamespace(outputs=[output]))
            return outputs

    module.LLM = LLM
    module.SamplingParams = lambda **kwargs: types.SimpleNamespace(**kwargs)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_vllm(world, prompts, tmp_path, vllm):
    student = VLLMStudent(
        model=str(world / "model"),
        batch_size=4,
        max_new_tokens=4,
        top_p=0.9,
        top_k=7,
        generation_kwargs={"min_p": 0.1},
        llm_kwargs={"dtype": "float32", "gpu_memory_utilization": 0.5},
    )
    path = generate_candidates(prompts, student, tmp_path / "c.jsonl", num_responses=3)
    engine = {"dtype": "float32", "gpu_memory_utilization": 0.5, "model": student.model, "revision": None}
    assert vllm.engines == [engine]
    asked = [pair for call in vllm.calls for pair in zip(*call, strict=True)]
    assert [len(call[0]) for call in vllm.calls] == [12, 6] and len({params.seed for _, params in asked}) == 18
    tokenizer, reasons = AutoTokenizer.from_pretrained(world / "model"), set()
    for i, (row, prompt) in enumerate(zip(rows_of(path), prompts["prompt"], strict=True)):
        for k, response in enumerate(row["responses"]):
            given, params = asked[3 * i + k]
            assert given == {"prompt_token_ids": tokenizer(prompt).input_ids}
            assert (params.temperature, params.top_p, params.top_k) == ((0.7, 1.0, 0.7)[k], 0.9, 7)
            assert (params.max_tokens, params.min_p, params.n) == (4, 0.1, 1)
            number = min(1 + params.seed % 5, 4)
            assert response["text"] == f" {prompt.split()[-1]}" * number
            assert response["finish_reason"] == ("stop" if number < 4 else "length")
            reasons.add(response["finish_reason"])
    assert reasons == {"stop", "length"}
    assert settings_of(path)["student"]["llm_kwargs"] == {"dtype": "float32"}
    with pytest.raises(ValueError, match=r"cannot have \['max_tokens'\]"):
        VLLMStudent(model="x", generation_kwargs={"max_tokens": 3})
    with pytest.raises(ValueError, match="context of 8"):
        small = VLLMStudent(model=student.model, llm_kwargs={"max_model_len": 8}, max_new_tokens=6)
        generate_candidates(prompts, small, tmp_path / "d.jsonl")


# Runs that are killed

NUM_PROMPTS, BATCH_SIZE, BATCHES = 11, 2, 6
# Where, and the batches that the next run draws
KILLS = {
    "before the settings": range(6),
    "after line 1": range(1, 6),
    "after line 4": range(4, 6),
    "in line 1": range(6),
    "in line 3": range(2, 6),
    "in the result": [],
    "before the result is there": [],
    "after the result is there": [],
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Makes this process kill itself at a moment."""
    append, merged, replace = candidates._append, candidates._merged, os.replace
    where, number = moment.rsplit(" ", 1)
    lines = 0

    def append_and_die(part, row):
        nonlocal lines
        lines += 1
        if where == "in line" and lines == int(number):
            text = json.dumps(row)
            with part.open("a") as file:
                file.write(text[: len(text) // 2])
            die()
        append(part, row)
        if where == "after line" and lines == int(number):
            die()

    def die_in_result(*arguments):
        yield next(merged(*arguments))
        die()

    def die_at_replace(source, target):
        is_result = Path(target).suffix == ".jsonl"
        if moment == ("before the result is there" if is_result else "before the settings"):
            die()
        replace(source, target)
        if is_result and moment == "after the result is there":
            die()

    candidates._append, os.replace = append_and_die, die_at_replace
    if moment == "in the result":
        candidates._merged = die_in_result


def killed_runs(world: Path, out: Path, url: str) -> None:
    """Makes all the runs that the tests below look at."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    prompts = make_prompts(world, NUM_PROMPTS)
    # Which all runs have in memory from the first one on
    student = TransformersStudent(model=str(world / "model"), batch_size=BATCH_SIZE, max_new_tokens=8)

    def run(path: Path, moment: str | None = None) -> None:
        if moment is not None:
            arm(moment)

        def sample(model, config, batch):
            with path.with_suffix(".drawn").open("a") as file:
                file.write(f"{batch.index}\n")
            return TransformersStudent._sample(student, model, config, batch)

        student._sample = sample
        generate_candidates(prompts, student, path, num_responses=3)

    def ask(path: Path, kill_after: int | None = None) -> None:
        put, number = AnswerStore.put, 0

        def put_and_die(self, *arguments):
            nonlocal number
            put(self, *arguments)
            number += 1
            if number == kill_after:
                die()

        if kill_after is not None:
            AnswerStore.put = put_and_die
        with AnswerStore(path.with_suffix(".sqlite")) as store:
            generate_candidates(chats(*(f"prompt {i}" for i in range(20))), endpoint_student(url, store), path)

    run(out / "whole.jsonl")
    ask(out / "endpoint_whole.jsonl")
    for moment in KILLS:
        path = out / f"{moment}.jsonl"
        assert Forked(lambda path=path, moment=moment: run(path, moment)).wait() == -signal.SIGKILL, moment
        path.with_suffix(".drawn").unlink(missing_ok=True)
        assert Forked(lambda path=path: run(path)).wait() == 0
    # One run that is killed again and again, at any time
    rng, path = random.Random(0), out / "any.jsonl"
    for _ in range(6):
        process = Forked(lambda: run(path))
        time.sleep(rng.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Forked(lambda: run(path)).wait() == 0
    assert Forked(lambda: ask(out / "endpoint.jsonl", kill_after=30)).wait() == -signal.SIGKILL
    assert Forked(lambda: ask(out / "endpoint.jsonl", kill_after=20)).wait() == -signal.SIGKILL
    assert Forked(lambda: ask(out / "endpoint.jsonl")).wait() == 0


@pytest.fixture(scope="module")
def killed(world, module_server, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    module_server.bodies.clear()
    assert Forked(lambda: killed_runs(world, out, module_server.url)).wait() == 0
    (out / "bodies.json").write_text(json.dumps(module_server.asked))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_goes_on_where_it_was(killed, moment):
    path = killed / f"{moment}.jsonl"
    assert path.read_bytes() == (killed / "whole.jsonl").read_bytes()
    drawn = path.with_suffix(".drawn")
    assert [int(i) for i in drawn.read_text().split()] == list(KILLS[moment]) if drawn.exists() else not KILLS[moment]
    assert not [file.name for file in killed.iterdir() if ".part-" in file.name or file.name.startswith(".")]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(killed):
    path = killed / "any.jsonl"
    assert path.read_bytes() == (killed / "whole.jsonl").read_bytes()
    assert path.with_suffix(".settings.json").read_bytes() == (killed / "whole.settings.json").read_bytes()


@pytest.mark.slow
def test_an_endpoint_is_asked_nothing_again_that_it_answered(killed):
    path = killed / "endpoint.jsonl"
    assert path.read_bytes() == (killed / "endpoint_whole.jsonl").read_bytes()
    bodies = Counter(json.dumps(body, sort_keys=True) for body in json.loads((killed / "bodies.json").read_text()))
    # Each twice, for the two runs, and those that were under way when it was killed
    assert len(bodies) == 80 and min(bodies.values()) == 2
    assert 160 <= bodies.total() <= 160 + 2 * 4
