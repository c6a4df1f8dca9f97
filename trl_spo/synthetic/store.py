# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What has been answered, by the hash of what was asked: in SQLite, so that nothing is asked twice."""

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


# Raise it when the tables change, or what a key is made of.
VERSION = 1
_BUSY_S = 60.0  # for which one process waits for the write of another


def request_key(**asked: Any) -> str:
    """The hash of what was asked: of everything that the answer depends on, in JSON."""
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerStore:
    """
    Answers by the key of the request, in one file that outlives the process.

    An answer is on disk when [`~AnswerStore.put`] returns, so that a process that is killed loses the requests that were under
    way, and no answer. Several processes can share the file, and several threads an object.

    Args:
        path (`str` or `os.PathLike`):
            The file, made with its folder if it does not exist.

    Raises:
        `ValueError`: the file is of another version, or not a store.
        `OSError`: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            # Without an isolation level each statement is a transaction of its own: an answer is kept as soon as it is there
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")  # of a crash of the machine, not of the process
            self._make_tables()
        except sqlite3.DatabaseError as error:
            if "unable to open" in str(error) or "readonly" in str(error) or "full" in str(error):
                raise OSError(f"The store '{self.path}' cannot be written: {error}.") from error
            raise ValueError(f"'{self.path}' is not a store of answers ({error}). Name another `store`.") from error

    def _make_tables(self) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")  # of several processes that come first, one makes them
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                connection.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID")
                connection.execute("INSERT INTO meta VALUES ('trl_spo_answers', ?)", (VERSION,))
                connection.execute(
                    "CREATE TABLE answers (key TEXT PRIMARY KEY, critic TEXT NOT NULL, answer TEXT NOT NULL, time REAL NOT NULL)"
                    " WITHOUT ROWID"
                )
            found = None
            if not tables or "meta" in tables:
                row = connection.execute("SELECT value FROM meta WHERE name = 'trl_spo_answers'").fetchone()
                found = row and row[0]
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        if found != VERSION:
            what = "not a store of answers" if found is None else f"a store of version {found}, and this is {VERSION}"
            raise ValueError(f"'{self.path}' is {what}. Name another `store`, or use the trl_spo that made it.")

    def put(self, key: str, critic: str, answer: dict[str, Any]) -> dict[str, Any]:
        """
        Keeps an answer, unless another process was first, and returns the one that is kept.

        Raises:
            `OSError`: the disk is full, or cannot be written. All that was kept before stays.
        """
        row = (key, critic, json.dumps(answer, ensure_ascii=False), time.time())
        with self._lock:
            try:
                written = self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row).rowcount
            except sqlite3.OperationalError as error:
                raise OSError(
                    f"An answer cannot be kept in '{self.path}': {error}. Those before it are. Make room, and run this again: it goes "
                    "on from there."
                ) from error
        return answer if written else self.get([key])[key]

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Those of the keys that have been answered, with their answers."""
        keys, found = list(keys), {}
        for i in range(0, len(keys), 500):  # SQLite takes only so many parameters
            some = keys[i : i + 500]
            marks = ",".join("?" * len(some))
            with self._lock:
                rows = self._connection.execute(
                    f"SELECT key, answer FROM answers WHERE key IN ({marks})", some
                ).fetchall()
            found.update((key, json.loads(answer)) for key, answer in rows)
        return found

    def cost(self) -> float:
        """What all answers together have cost."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT total(json_extract(answer, '$.cost')) FROM answers WHERE json_valid(answer)"
            )
            return rows.fetchone()[0]

    def __contains__(self, key: str) -> bool:
        return bool(self.get([key]))

    def __len__(self) -> int:
        with self._lock:
            return self._connection.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
