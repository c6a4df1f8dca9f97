# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from trl_spo.sandbox import cache as cache_module
from trl_spo.sandbox import cache_dir, cached


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_SPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_number(folder):
    (folder / "number").write_text("42")


def test_folder(cache, monkeypatch):
    assert cache_dir() == cache
    monkeypatch.delenv("TRL_SPO_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "trl_spo"


def test_made_once(cache):
    calls = []

    def make(folder):
        calls.append(folder)
        write_number(folder)

    first = cached("thing", {"a": 1}, make)
    assert cached("thing", {"a": 1}, make) == first
    assert len(calls) == 1
    assert (first / "number").read_text() == "42"
    assert json.loads((first / "settings.json").read_text()) == {"a": 1}
    assert os.listdir(cache) == [first.name]


def test_other_settings_another_entry():
    assert cached("thing", {"a": 1}, write_number) != cached("thing", {"a": 2}, write_number)
    assert cached("thing", {"a": 1, "b": 2}, write_number) == cached("thing", {"b": 2, "a": 1}, write_number)


def test_error_leaves_nothing_behind(cache):
    def fail(folder):
        write_number(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached("thing", {}, fail)
    assert os.listdir(cache) == []
    assert (cached("thing", {}, write_number) / "number").exists()


def test_the_faster_process_wins(cache):
    """Both make the entry; the second finds that of the first in its place and goes on with it."""

    def make_slowly(folder):
        cached("thing", {}, write_number)
        (folder / "number").write_text("43")

    folder = cached("thing", {}, make_slowly)
    assert (folder / "number").read_text() == "42"
    assert os.listdir(cache) == [folder.name]


def test_killed_half_way(cache):
    """A process that is killed while it writes leaves no entry that another one would take for complete."""
    script = textwrap.dedent(
        """
        import runpy, sys, time

        def make(folder):
            (folder / "number").write_text("4")
            time.sleep(60)

        runpy.run_path(sys.argv[1])["cached"]("thing", {}, make)
        """
    )
    # By its path: importing the package would take longer than the test
    with subprocess.Popen([sys.executable, "-c", script, cache_module.__file__]) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(cache.glob(".*/number")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
    assert not list(cache.glob("thing-*"))
    folder = cached("thing", {}, write_number)
    assert (folder / "number").read_text() == "42"
