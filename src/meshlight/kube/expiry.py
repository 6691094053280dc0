"""Events do not stay: they go an hour after they were last written, and the oldest when there are too many."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import orjson

from meshlight.kube.resources import Object
from meshlight.kube.store import Key, Name, Store

RESOURCE = "/events"
KEEP_SECONDS = 3600.0
KEEP_EVENTS = 20_000
SWEEP_SECONDS = 60.0
SWEEP_AT_ONCE = 200
"""Events that are removed before others get a turn."""


def written(event: Object) -> datetime:
    """When an Event was last written."""
    metadata = event["metadata"]
    times = [metadata.get("creationTimestamp"), event.get("lastTimestamp"), event.get("eventTime")]
    times.append((event.get("series") or {}).get("lastObservedTime"))
    times += [entry.get("time") for entry in metadata.get("managedFields") or ()]
    return max((datetime.fromisoformat(t) for t in times if t), default=datetime.min.replace(tzinfo=UTC))


def outdated(events: Iterable[tuple[Name, Object]], now: datetime) -> Iterator[tuple[Name, Object]]:
    """The Events that go now, oldest first."""
    aged = sorted(((written(event), name, event) for name, event in events), key=lambda found: found[:2])
    excess = len(aged) - KEEP_EVENTS
    for index, (time, name, event) in enumerate(aged):
        if index >= excess and (now - time).total_seconds() < KEEP_SECONDS:
            return
        yield name, event


async def sweep(store: Store) -> None:
    """Remove what goes now."""
    found = [(name, orjson.loads(body)) for name, body in store.bodies(RESOURCE)]
    for number, (name, event) in enumerate(outdated(found, datetime.now(UTC)), 1):
        key = Key(RESOURCE, *name)
        # Only what is still as it was looked at.
        if (now := store.get(key)) and now["metadata"]["resourceVersion"] == event["metadata"][
            "resourceVersion"
        ]:
            store.delete(key, event)
        if not number % SWEEP_AT_ONCE:
            await store.durable(store.revision)


async def run(store: Store) -> None:
    """Sweep for ever."""
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await sweep(store)
