# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import json
import os
import signal
import subprocess
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trl_spo.synthetic.critics import EndpointCritic
from trl_spo.synthetic.endpoint import Endpoint
from trl_spo.synthetic.jury import Pair


class Forked:
    """A function in another process, which has imported all that this one has, maybe with its standard error in a file."""

    def __init__(self, function: Callable[[], None], stderr: Path | None = None):
        self.stderr = stderr
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if stderr is not None:
                    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                    sys.stderr = open(2, "w", buffering=1, closefd=False)
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class ScriptedServer:
    """The server of `scripted_server.py`, in a process of its own."""

    def __init__(self):
        script = Path(__file__).with_name("scripted_server.py")
        self.process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def log(self) -> dict:
        """`answered`: how often each request was, and `requests`: how many came."""
        with urllib.request.urlopen(f"{self.url}/log") as answer:
            return json.load(answer)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def make_critic(server) -> Callable[..., EndpointCritic]:
    """`make_critic(model, ...)` with options of the critic or of its endpoint."""

    def make(model: str, name: str | None = None, **options) -> EndpointCritic:
        of_critic = {key: options.pop(key) for key in list(options) if key in EndpointCritic.__dataclass_fields__}
        endpoint = Endpoint(model, **{"base_url": server.url, "api_key_env": None, "max_retries": 3, **options})
        return EndpointCritic(name=name or model, endpoint=endpoint, **of_critic)

    return make


def make_pairs(n: int) -> list[Pair]:
    """Whose better response has the higher quality in it: the first one in every second pair, and the longer one in one of three."""
    pairs = []
    for i in range(n):
        good, bad = f"quality {2 + i % 3} " + "x" * (4 * (i % 3)), f"quality {i % 2} xxxx"
        pairs.append(Pair(f"p{i}", ("0", "1"), f"Prompt {i}", (good, bad) if i % 2 == 0 else (bad, good)))
    return pairs
