"""Watches: changes of one collection, filtered and encoded for one reader.

A reader's queue is bounded; one that falls too far behind is ended, and its client lists anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import orjson

from meshlight.kube.resources import Object
from meshlight.kube.store import Change, Store

QUEUE_LIMIT = 10_000
BOOKMARK_INTERVAL = 30.0

Matches = Callable[[Object], bool]
Render = Callable[[Object], Object]


async def stream(
    store: Store,
    resource: str,
    since: int,
    matches: Matches,
    render: Render,
    *,
    bookmarks: bool,
    bookmark: Callable[[str], Object],
    initial: list[Object],
) -> AsyncIterator[bytes]:
    """Encoded watch events after revision `since`, preceded by ADDED for `initial`.

    An object that stops matching is DELETED for this reader and one that starts is ADDED, as
    Kubernetes does. Raises store.CompactedError.
    """
    queue: asyncio.Queue[Change | None] = asyncio.Queue()

    def receive(change: Change) -> None:
        if change.key.resource != resource:
            return
        if queue.qsize() >= QUEUE_LIMIT:
            unsubscribe()
            queue.put_nowait(None)
        else:
            queue.put_nowait(change)

    seen: set[tuple[str, str]] = set()
    unsubscribed = False
    end = store.subscribe(receive)

    def unsubscribe() -> None:
        nonlocal unsubscribed
        if not unsubscribed:
            unsubscribed = True
            end()

    try:
        for obj in initial:
            seen.add((obj["metadata"].get("namespace", ""), obj["metadata"]["name"]))
            yield _encode("ADDED", render(obj))
        for change in store.changes(resource, since):
            since = change.revision
            if event := _event(change, matches, render, seen):
                yield event
        while True:
            try:
                next_change = await asyncio.wait_for(queue.get(), BOOKMARK_INTERVAL)
            except TimeoutError:
                if bookmarks:
                    yield _encode("BOOKMARK", bookmark(str(store.revision)))
                continue
            if next_change is None:
                return
            if next_change.revision <= since:
                continue  # read from the log already
            if event := _event(next_change, matches, render, seen):
                yield event
    finally:
        unsubscribe()


def _event(change: Change, matches: Matches, render: Render, seen: set[tuple[str, str]]) -> bytes | None:
    obj = change.object
    key = (change.key.namespace, change.key.name)
    if change.type == "DELETED":
        seen.discard(key)
        return _encode("DELETED", render(obj)) if matches(obj) else None
    if not matches(obj):
        if key in seen:
            seen.discard(key)
            return _encode("DELETED", render(obj))
        return None
    kind = "ADDED" if change.type == "ADDED" else "MODIFIED"
    seen.add(key)
    return _encode(kind, render(obj))


def _encode(kind: str, obj: Object) -> bytes:
    return orjson.dumps({"type": kind, "object": obj}) + b"\n"
