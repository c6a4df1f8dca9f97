# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trl_spo.synthetic.files import Rows, replacing, write_rows


SCRIPT = """
import sys
from pathlib import Path
from trl_spo.synthetic.files import replacing, write_row

with replacing(*map(Path, sys.argv[1:])) as files:
    for file in files:
        write_row(file, {"from": "script"})
        file.flush()
    print("written", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def start():
    """`start(paths)`: a process that has written rows, and waits for a line to go on."""
    processes = []

    def start(*paths: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, *map(str, paths)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_killed_process_left_is_removed(start, tmp_path):
    # Characters that `glob` would take for a pattern
    one, other = tmp_path / "rows[1].jsonl", tmp_path / "rows[1].jsonl.gz"
    killed, alive = start(one, other), start(one)
    for process in (killed, alive):
        assert process.stdout.readline() == "written\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    machine = socket.gethostname()
    left = {f".{path.name}.{machine}.{killed.pid}" for path in (one, other)}
    held = f".{one.name}.{machine}.{alive.pid}"
    elsewhere = f".{one.name}.another-machine.{killed.pid}"  # where a process of that number may be alive
    (tmp_path / elsewhere).touch()
    assert names(tmp_path) == {*left, held, elsewhere}

    write_rows(one, [{"from": "here"}])
    assert names(tmp_path) == {one.name, f".{other.name}.{machine}.{killed.pid}", held, elsewhere}
    write_rows(other, [])
    assert names(tmp_path) == {one.name, other.name, held, elsewhere}
    assert list(Rows(one)) == [{"from": "here"}]
    alive.communicate("go on\n")
    assert list(Rows(one)) == [{"from": "script"}]
    assert names(tmp_path) == {one.name, other.name, elsewhere}


def test_all_or_none(tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write_rows(one, [{"a": 1}])
    with pytest.raises(KeyError), replacing(one, other) as (first, second):
        first.write("{}\n")
        second.write("{}\n")
        raise KeyError
    assert list(Rows(one)) == [{"a": 1}] and names(tmp_path) == {one.name}
