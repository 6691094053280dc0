"""Events go after their time, and the oldest when there are too many."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from meshlight.kube import expiry
from meshlight.kube.resources import Object
from meshlight.kube.store import Key, Store

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def event(name: str, age: float, **more: object) -> tuple[tuple[str, str], Object]:
    made = (NOW - timedelta(seconds=age)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return ("x", name), {"metadata": {"name": name, "namespace": "x", "creationTimestamp": made}, **more}


def names(*events: tuple[tuple[str, str], Object]) -> list[str]:
    return [name for (_, name), _ in expiry.outdated(events, NOW)]


def test_events_go_an_hour_after_they_were_last_written() -> None:
    recent = NOW.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    repeated = event("repeated", 9000, series={"count": 2, "lastObservedTime": recent})
    counted = event("counted", 9000, lastTimestamp=recent)
    assert names(event("old", 3601), event("young", 3599), repeated, counted) == ["old"]


def test_the_oldest_go_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiry, "KEEP_EVENTS", 2)
    assert names(event("c", 1), event("a", 3), event("b", 2), event("d", 0)) == ["a", "b"]


async def test_a_sweep_removes_them_for_watchers_to_see() -> None:
    store = Store(":memory:")
    for name, created in (("old", "2020-01-01T00:00:00Z"), ("new", datetime.now(UTC).isoformat())):
        obj = {"metadata": {"name": name, "namespace": "x", "creationTimestamp": created}}
        store.write(Key("/events", "x", name), obj, None)
    await expiry.sweep(store)
    assert [o["metadata"]["name"] for o in store.objects("/events")] == ["new"]
    assert [(c.type, c.key.name) for c in store.changes("/events", 2)] == [("DELETED", "old")]
