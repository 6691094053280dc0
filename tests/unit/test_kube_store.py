"""The store: revisions, conflicts, resumption, durability."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlight.kube import store as stores
from meshlight.kube.store import CompactedError, ConflictError, FutureError, Key, Store

KEY = Key("/configmaps", "default", "a")


def obj(name: str = "a", **data: str) -> dict[str, object]:
    return {"metadata": {"name": name, "namespace": "default"}, "data": data}


def test_every_change_takes_the_next_revision(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    first = store.write(KEY, obj(x="1"), None)
    second = store.write(KEY, obj(x="2"), 1)
    assert (first["metadata"]["resourceVersion"], second["metadata"]["resourceVersion"]) == ("1", "2")
    store.delete(KEY, second)
    assert store.get(KEY) is None
    assert [(c.revision, c.type) for c in store.changes("/configmaps", 0)] == [
        (1, "ADDED"),
        (2, "MODIFIED"),
        (3, "DELETED"),
    ]


@pytest.mark.parametrize("expected", [None, 7])
def test_a_stale_or_repeated_write_is_refused_and_changes_nothing(tmp_path: Path, expected: int | None) -> None:
    store = Store(tmp_path / "db")
    store.write(KEY, obj(x="1"), None)
    with pytest.raises(ConflictError):
        store.write(KEY, obj(x="2"), expected)
    found = store.get(KEY)
    assert found is not None and found["data"] == {"x": "1"}
    assert store.revision == 1


def test_a_reopened_store_goes_on_where_it_was(tmp_path: Path) -> None:
    first = Store(tmp_path / "db")
    first.write(KEY, obj(), None)
    first.write(KEY, obj(x="2"), 1)
    gone = Key("/configmaps", "default", "gone")
    first.write(gone, obj("gone"), None)
    first.delete(gone, obj("gone"))
    # Not closed: what a killed process leaves.
    again = Store(tmp_path / "db")
    assert again.revision == 4
    assert [o["metadata"]["name"] for o in again.objects("/configmaps")] == ["a"]
    assert [c.revision for c in again.changes("/configmaps", 1)] == [2, 3, 4]


def churn(store: Store, writes: int) -> None:
    """One object, written so often."""
    store.write(KEY, obj(), None)
    for revision in range(1, writes):
        store.write(KEY, obj(n=str(revision)), revision)


def test_changes_older_than_the_log_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "KEEP_CHANGES", 10)
    store = Store(tmp_path / "db")
    churn(store, 100)
    with pytest.raises(CompactedError):
        store.changes("/configmaps", 89)
    assert len(store.changes("/configmaps", 90)) == 10
    with pytest.raises(FutureError):
        store.changes("/configmaps", 101)


def test_compaction_leaves_on_disk_what_is_there_and_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "KEEP_CHANGES", 10)
    store = Store(tmp_path / "db")
    old = Key("/configmaps", "default", "old")
    store.write(old, obj("old"), None)
    store.write(Key("/configmaps", "default", "dead"), obj("dead"), None)
    store.delete(Key("/configmaps", "default", "dead"), obj("dead"))
    store.write(KEY, obj(), None)
    for revision in range(4, 60):
        store.write(KEY, obj(n=str(revision)), revision)
    rows = (
        sqlite3.connect(tmp_path / "db").execute("SELECT revision, name FROM revisions ORDER BY 1").fetchall()
    )
    assert rows == [(1, "old"), *((r, "a") for r in range(51, 61))]
    again = Store(tmp_path / "db")
    assert again.get(old) is not None and again.revision == 60
    with pytest.raises(CompactedError):
        again.changes("/configmaps", 30)
    again.write(old, obj("old", x="1"), 1)
    assert sqlite3.connect(tmp_path / "db").execute(
        "SELECT count(*) FROM revisions WHERE revision=1"
    ).fetchone() == (0,)


def test_the_log_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "KEEP_BYTES", 5_000)
    store = Store(tmp_path / "db")
    store.write(KEY, obj(x="y" * 1000), None)
    for revision in range(1, 20):
        store.write(KEY, obj(x="y" * 1000), revision)
    assert len(store.changes("/configmaps", 16)) == 4
    with pytest.raises(CompactedError):
        store.changes("/configmaps", 10)


def test_listing_is_in_order_and_goes_on_after_a_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    for namespace in ("x", "default"):
        for name in "cab":
            store.write(Key("/configmaps", namespace, name), obj(name), None)
    assert [n for n, _ in store.bodies("/configmaps", "default")] == [("default", n) for n in "abc"]
    assert [n for n, _ in store.bodies("/configmaps", after=("default", "b"))] == [
        ("default", "c"), ("x", "a"), ("x", "b"), ("x", "c")
    ]  # fmt: skip


Step = tuple[str, str]


@given(st.lists(st.tuples(st.sampled_from(["write", "delete"]), st.sampled_from("abcd")), max_size=30))
def test_a_list_of_an_earlier_revision_is_what_was_there_then(steps: list[Step]) -> None:
    store = Store(":memory:")
    states: dict[int, list[tuple[str, str]]] = {0: []}
    for verb, name in steps:
        key = Key("/configmaps", "default", name)
        found = store.get(key)
        if verb == "write":
            version = int(found["metadata"]["resourceVersion"]) if found else None
            store.write(key, obj(name), version)
        elif found is not None:
            store.delete(key, found)
        states[store.revision] = [
            (o["metadata"]["name"], o["metadata"]["resourceVersion"]) for o in store.objects("/configmaps")
        ]
    for revision, expected in states.items():
        bodies = [orjson.loads(b) for _, b in store.bodies("/configmaps", at=revision)]
        assert [(o["metadata"]["name"], o["metadata"]["resourceVersion"]) for o in bodies] == expected


def test_lists_of_revisions_before_the_start_are_refused_once_something_changed(tmp_path: Path) -> None:
    churn(Store(tmp_path / "db"), 3)
    again = Store(tmp_path / "db")
    assert len(again.bodies("/configmaps", at=3)) == 1
    again.write(KEY, obj(), 3)
    assert len(again.bodies("/configmaps", at=3)) == 1
    with pytest.raises(CompactedError):
        again.bodies("/configmaps", at=2)


async def test_writes_of_one_turn_are_one_commit_and_heard_of_when_durable(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    store.attach(lambda error: pytest.fail(str(error)))
    heard: list[int] = []
    store.subscribe("/configmaps", lambda change: heard.append(change.revision))
    for name in "abc":
        store.write(Key("/configmaps", "default", name), obj(name), None)
    assert store.revision == 3 and not heard and store.changes("/configmaps", 0) == []
    disk = sqlite3.connect(tmp_path / "db")
    assert disk.execute("SELECT count(*) FROM revisions").fetchone() == (0,)
    await store.durable(3)
    assert heard == [1, 2, 3]
    assert disk.execute("SELECT count(*) FROM revisions").fetchone() == (3,)
    store.close()


async def test_a_write_that_cannot_be_stored_is_never_acknowledged(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    store.attach(failed.set_result)
    blocker = sqlite3.connect(tmp_path / "db", isolation_level=None)
    blocker.execute("DROP TABLE revisions")
    store.write(KEY, obj(), None)
    waiting = asyncio.ensure_future(store.durable(1))
    assert "revisions" in str(await failed)
    assert not waiting.done()
    waiting.cancel()


def test_the_tables_of_the_first_builds_are_taken_over(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "db")
    old.executescript("""
        CREATE TABLE objects (resource TEXT, namespace TEXT, name TEXT, revision INTEGER, body BLOB);
        CREATE TABLE changes (revision INTEGER PRIMARY KEY, resource TEXT, type TEXT, body BLOB);
        INSERT INTO objects VALUES ('/configmaps', 'default', 'a', 7, '{"metadata":{"resourceVersion":"7"}}');
    """)
    store = Store(tmp_path / "db")
    assert store.get(KEY) == {"metadata": {"resourceVersion": "7"}}
    assert store.write(KEY, obj(), 7)["metadata"]["resourceVersion"] == "8"
