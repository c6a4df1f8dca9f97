# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
From prompts to a student that is trained on them, with a real server: `transformers serve` on loopback, with a critic that is trained
here (`served_critic.py`), asked through the OpenAI client.
"""

import asyncio
import gzip
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_spo import SoftPOConfig, SoftPOTrainer
from trl_spo.cli.main import main
from trl_spo.synthetic.critics import EndpointCritic, Request
from trl_spo.synthetic.endpoint import Budget, EndpointError
from trl_spo.synthetic.files import Rows
from trl_spo.synthetic.pairs import CandidatePairs
from trl_spo.synthetic.store import AnswerStore

from .served_critic import RUBRIC, is_happy, make_critic, train_critic


DATA = Path(__file__).parents[3] / "shared" / "data"
STUDENT = DATA / "stories260K"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")]
_START_S = 180  # a machine with much else to do


class Served:
    """`transformers serve` in a process of its own, with the critic."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.model, self.rubric = str(folder / "critic"), str(folder / "happier.jinja")
        self.log = folder / "server.log"
        # Not `transformers`, which need not be on the path where the tests' interpreter is not
        command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )

    def wait(self) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url.replace("/v1", "/health"), timeout=5).close()
                return
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.1)
        raise RuntimeError(f"`transformers serve` does not answer:\n{self.log.read_text()[-2000:]}")

    @property
    def answered(self) -> int:
        return self.log.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200')

    def critic(self, **options) -> EndpointCritic:
        return make_critic(options.pop("model", self.model), self.rubric, base_url=self.url, **options)


@pytest.fixture(scope="module")
def stories() -> list[str]:
    with gzip.open(DATA / "tinystories_1000.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture(scope="module")
def served(stories, tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    server = Served(folder)
    try:
        Path(server.rubric).write_text(RUBRIC)
        assert train_critic(stories[100:], server.rubric, Path(server.model)) >= 0.9  # while the server starts
        server.wait()
        yield server
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


@pytest.fixture(scope="module")
def answer_of(served):
    """`answer_of(critic, request)`: what the critic's model answers in this process, with the number of tokens of both."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(served.model), AutoTokenizer.from_pretrained(served.model)

    def answer(critic: EndpointCritic, request: Request) -> tuple[str, list[int]]:
        ids = tokenizer.apply_chat_template(critic.messages(request), return_tensors="pt", return_dict=False)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=critic.max_completion_tokens
        )
        found = found[0, ids.shape[1] :]
        return tokenizer.decode(found, skip_special_tokens=True), [ids.shape[1], len(found)]

    return answer


def test_client(served, answer_of):
    critic = served.critic()
    critic.check({})
    happy = "The dog was so happy. He saw a big tree and went to see it."
    others = [f"Tom had {i} cats. They ate the big fish with the old man." for i in range(12)]
    requests = [
        Request("Once upon a time", (happy, other) if i % 2 else (other, happy)) for i, other in enumerate(others)
    ]
    answers = {}
    failures = asyncio.run(
        critic.endpoint.complete_all(
            ((i, critic.messages(request), critic.options()) for i, request in enumerate(requests)),
            answers.__setitem__,
            Budget(),
        )
    )
    assert not failures
    for i, request in enumerate(requests):
        text, tokens = answer_of(critic, request)
        assert (answers[i].text, answers[i].finish_reason) == (text, "stop")
        assert critic.read(answers[i])["tokens"] == tokens
    right = [critic.read(answer)["verdict"] == ("A" if i % 2 else "B") for i, answer in answers.items()]
    assert sum(right) >= 9

    critic.max_completion_tokens = 3
    cut = {}
    asyncio.run(
        critic.endpoint.complete_all([(0, critic.messages(requests[0]), critic.options())], cut.__setitem__, Budget())
    )
    assert (cut[0].finish_reason, cut[0].completion_tokens) == ("length", 3)
    assert cut[0].text == answer_of(critic, requests[0])[0] and critic.read(cut[0])["verdict"] is None


def test_errors(served):
    with pytest.raises(EndpointError, match=r"model 'no/model' at http://127\.0\.0\.1:\d+/v1 answers with status 500"):
        served.critic(model="no/model", max_retries=0).check({})
    with pytest.raises(EndpointError, match=r"status 404.*is the address \(`base_url`\) right\? It often ends in /v1"):
        make_critic(served.model, served.rubric, base_url=served.url.removesuffix("/v1")).check({})
    critic = served.critic()
    critic.extra_body = {"top_k": 3}  # which the server does not know
    with pytest.raises(EndpointError, match="status 422.*Change the option"):
        critic.check({})
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=f"at {url} does not answer.*Is the server up"):
            make_critic(served.model, served.rubric, base_url=url, max_retries=0).check({})


def test_from_prompts_to_a_better_student(served, answer_of, stories, tmp_path):
    beginnings = [
        story.partition(". ")[0] + "." for story in stories[:100]
    ]  # of stories that the critic was not trained on
    beginnings = [text for text in dict.fromkeys(beginnings) if 20 < len(text) < 90][:32]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in beginnings))
    run = tmp_path / "run"
    config = {
        "output_dir": str(run),
        "prompts": {
            "dataset": {"path": "json", "data_files": str(prompts), "split": "train"},
            "near_duplicates": None,
        },
        "candidates": {
            "student": {"type": "transformers", "model": str(STUDENT), "max_new_tokens": 32, "batch_size": 32},
            "num_responses": 2,
            "temperatures": [1.0],
        },
        "judge": {
            "critics": [
                {
                    "type": "endpoint",
                    "name": "happier",
                    "model": served.model,
                    "base_url": served.url,
                    "api_key_env": None,
                    "rubric": served.rubric,
                    "structured_output": "none",
                    "max_completion_tokens": 24,
                }
            ]
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    before = served.answered
    assert main(["synthesize", str(tmp_path / "config.yaml")]) == 0

    # Each pair was asked about in both orders, and the votes follow from what the model says
    critic = served.critic()
    pairs = [pair for pair in CandidatePairs(Rows(run / "candidates.jsonl")) if pair.differs]
    requests = [Request(pair.prompt, texts) for pair in pairs for texts in (pair.responses, pair.responses[::-1])]
    assert served.answered - before == 1 + len(
        {critic.key(request) for request in requests}
    )  # and the check at the start
    verdicts = [row for row in Rows(run / "verdicts.jsonl") if row["votes"]]
    assert len(verdicts) == len(pairs)
    statuses = [row["votes"][0]["status"] for row in verdicts]
    for row, pair in list(zip(verdicts, pairs, strict=True))[:8]:
        for k, texts in enumerate((pair.responses, pair.responses[::-1])):
            text, _ = answer_of(critic, Request(pair.prompt, texts))
            try:
                expected = json.loads(text)
            except json.JSONDecodeError:
                expected = {"verdict": None, "rationale": None}
            assert row["votes"][0]["verdicts"][k] == expected["verdict"]
            assert row["votes"][0]["rationales"][k] == expected["rationale"]
    for row, status in zip(verdicts, statuses, strict=True):
        first, second = row["votes"][0]["verdicts"]
        if None in (first, second):
            expected = "unparseable"
        elif "tie" in (first, second):
            expected = "tie"
        else:
            expected = "vote" if first != second else "flipped"
        assert status == expected
        winner = row["response_ids"]["AB".index(first)] if status == "vote" else None
        assert row["winner"] == winner
    assert statuses.count("unparseable") <= len(statuses) / 4 and statuses.count("vote") >= 6

    # What is chosen is happier by a rule that the critic has never seen: chance would be about one in four
    train = load_from_disk(str(run / "dataset" / "preference"))["train"]
    happier = [is_happy(row["chosen"]) > is_happy(row["rejected"]) for row in train]
    assert len(train) >= 5 and sum(happier) >= 0.7 * len(train)

    # To judge again asks nothing again, but perhaps whether the server is up
    before, answers = served.answered, (run / "verdicts.jsonl").read_bytes()
    assert main(["synthesize", str(tmp_path / "config.yaml"), "judge", "pairs", "dataset"]) == 0
    assert served.answered - before <= 1 and (run / "verdicts.jsonl").read_bytes() == answers
    with AnswerStore(run / "answers.sqlite") as store:
        assert len(store.get({critic.key(request) for request in requests})) == len({critic.key(r) for r in requests})

    student = AutoModelForCausalLM.from_pretrained(STUDENT)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    margins = [margin(student, tokenizer, row) for row in train]
    trainer = SoftPOTrainer(
        model=str(STUDENT),
        args=SoftPOConfig(
            output_dir=str(tmp_path / "student"),
            max_steps=10,
            per_device_train_batch_size=8,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            max_completion_length=16,
            online_samples_per_step=8,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=train,
        processing_class=tokenizer,
    )
    assert math.isfinite(trainer.train().training_loss) and trainer.state.global_step == 10
    after = [margin(trainer.model, tokenizer, row) for row in train]
    better = [new > old for old, new in zip(margins, after, strict=True)]
    assert sum(better) >= 0.75 * len(better) and sum(after) > sum(margins)
    # And so what it writes anew is what the critic was after
    assert share_happy(trainer.model, tokenizer, beginnings) > share_happy(student, tokenizer, beginnings)


def share_happy(model, tokenizer, beginnings: list[str]) -> float:
    """How many of its stories are happy, of four to each beginning."""
    torch.manual_seed(0)
    inputs = tokenizer(beginnings, return_tensors="pt", padding=True)
    model.eval()
    ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=32, num_return_sequences=4)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(is_happy, texts)) / len(texts)


@torch.no_grad()
def margin(model, tokenizer, row: dict) -> float:
    """log pi(chosen) - log pi(rejected), token by token."""
    found = []
    prompt = tokenizer(row["prompt"])["input_ids"]
    for response in (row["chosen"], row["rejected"]):
        ids = torch.tensor([tokenizer(row["prompt"] + response)["input_ids"]])
        assert ids[0, : len(prompt)].tolist() == prompt
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
    return found[0] - found[1]
