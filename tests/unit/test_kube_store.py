"""The store: revisions, conflicts, resumption, durability."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshlight.kube import store as stores
from meshlight.kube.store import CompactedError, ConflictError, Key, Store

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
    # Not closed: what a killed process leaves.
    again = Store(tmp_path / "db")
    assert again.revision == 1 and again.get(KEY) is not None


def test_changes_older_than_the_log_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "KEEP_CHANGES", 10)
    store = Store(tmp_path / "db")
    store.write(KEY, obj(), None)
    for revision in range(1, 1000):
        store.write(KEY, obj(n=str(revision)), revision)
    with pytest.raises(CompactedError):
        list(store.changes("/configmaps", 5))
    assert len(list(store.changes("/configmaps", 995))) == 5


def test_listing_pages_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    for name in "cab":
        store.write(Key("/configmaps", "default", name), obj(name), None)
    assert [o["metadata"]["name"] for o in store.list("/configmaps")] == ["a", "b", "c"]
    assert [o["metadata"]["name"] for o in store.list("/configmaps", after="default/a")] == ["b", "c"]
