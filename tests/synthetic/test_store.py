# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import sqlite3
import threading

import pytest

from trl_spo.synthetic.store import VERSION, AnswerStore, request_key


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "answers.sqlite"


def test_answers_outlive_the_object(path):
    answer = {"verdict": "A", "rationale": "Größe, 長さ", "probability": 0.25, "tokens": [1, 2]}
    with AnswerStore(path) as store:
        assert store.put("one", "critic", answer) == answer
        assert len(store) == 1 and "one" in store and "two" not in store
    with AnswerStore(path) as store:
        assert store.get(["two", "one"]) == {"one": answer}


def test_is_on_disk_at_once(path):
    store = AnswerStore(path)
    store.put("one", "critic", {"verdict": "A"})
    other = sqlite3.connect(path)  # without the other connection's having been closed, or having said anything
    assert other.execute("SELECT key, critic FROM answers").fetchall() == [("one", "critic")]
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_first_answer_is_kept(path):
    with AnswerStore(path) as one, AnswerStore(path) as other:
        assert one.put("key", "critic", {"verdict": "A"}) == {"verdict": "A"}
        assert other.put("key", "critic", {"verdict": "B"}) == {"verdict": "A"}
        assert one.get(["key"]) == other.get(["key"]) == {"key": {"verdict": "A"}}


def test_many_keys(path):
    with AnswerStore(path) as store:
        for i in range(1300):
            store.put(str(i), "critic", {"i": i})
        assert store.get(str(i) for i in range(2000)) == {str(i): {"i": i} for i in range(1300)}


def test_several_threads_and_objects(path):
    stores = [AnswerStore(path) for _ in range(2)]
    errors = []

    def work(k: int) -> None:
        try:
            for i in range(100):
                stores[k % 2].put(f"{i}", "critic", {"thread": k})
                stores[k % 2].get([f"{i}"])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(stores[0]) == len(stores[1]) == 100


def test_full_disk(path):
    with AnswerStore(path) as store:
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(
            f"PRAGMA max_page_count = {pages + 2}"
        )  # after which SQLite has no room, as on a full disk
        with pytest.raises(
            OSError, match="cannot be kept in .*full. Those before it are. Make room, and run this again"
        ):
            for i in range(100):
                store.put(str(i), "critic", {"text": "x" * 1000})
        kept = len(store)
        assert 0 < kept < 100
    with AnswerStore(path) as store:
        assert len(store) == kept and store.put("another", "critic", {}) == {}


def test_another_version(path):
    AnswerStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE meta SET value = 99")
    connection.commit()
    with pytest.raises(ValueError, match=rf"a store of version 99, and this is {VERSION}. Name another `store`"):
        AnswerStore(path)


def test_another_file(tmp_path):
    (tmp_path / "text").write_text("No database, but long enough to be told from one." * 100)
    with pytest.raises(ValueError, match="is not a store of answers .*Name another `store`"):
        AnswerStore(tmp_path / "text")
    connection = sqlite3.connect(tmp_path / "other.sqlite")
    connection.execute("CREATE TABLE meta (name, value)")
    connection.commit()
    with pytest.raises(ValueError, match="is not a store of answers"):
        AnswerStore(tmp_path / "other.sqlite")
    connection.close()
    assert sqlite3.connect(tmp_path / "other.sqlite").execute("SELECT name FROM sqlite_master").fetchall() == [
        ("meta",)
    ]


def test_no_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        AnswerStore(tmp_path / "file" / "answers.sqlite")


def test_key():
    one = request_key(model="m", messages=[{"role": "user", "content": "ü"}], options={"a": 1, "b": 2})
    assert one == request_key(options={"b": 2, "a": 1}, messages=[{"role": "user", "content": "ü"}], model="m")
    others = [
        request_key(model="m", messages=[{"role": "user", "content": "u"}], options={"a": 1, "b": 2}),
        request_key(model="n", messages=[{"role": "user", "content": "ü"}], options={"a": 1, "b": 2}),
        request_key(model="m", messages=[{"role": "user", "content": "ü"}], options={"a": 1, "b": 3}),
    ]
    assert len({one, *others}) == 4 and len(one) == 64
