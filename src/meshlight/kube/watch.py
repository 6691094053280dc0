"""Watches: changes of one collection, as a stream of encoded events for one reader.

A reader that is slow keeps references to changes, not copies, and few of them: one that falls behind the
bounds is ended, and resumes from the change log or lists anew.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from meshlight.kube.store import Change, Store

QUEUE_LIMIT = 5_000
QUEUE_BYTES = 16 * 1024 * 1024
"""What one reader may have waiting; beyond it its stream ends."""
BOOKMARK_INTERVAL = 30.0
CHUNK = 256 * 1024
"""Bytes of events that are written at once."""

Encode = Callable[[Change], bytes | None]
Bookmark = Callable[[int], bytes]


class _Queue:
    """Changes that wait for one reader, and the time to tell it that nothing came."""

    def __init__(self) -> None:
        self.changes: deque[Change] = deque()
        self.bytes = 0
        self.overrun = False
        self._loop = asyncio.get_running_loop()
        self._wakes: asyncio.Future[None] | None = None
        self._timer = self._loop.call_later(BOOKMARK_INTERVAL, self._idle)

    def close(self) -> None:
        """No more of it."""
        self._timer.cancel()

    def _idle(self) -> None:
        self._timer = self._loop.call_later(BOOKMARK_INTERVAL, self._idle)
        self._wake()

    def _wake(self) -> None:
        if self._wakes is not None and not self._wakes.done():
            self._wakes.set_result(None)

    def put(self, change: Change) -> None:
        if self.overrun:
            return
        if len(self.changes) >= QUEUE_LIMIT or self.bytes >= QUEUE_BYTES:
            self.overrun = True
            self.changes.clear()
        else:
            self.changes.append(change)
            self.bytes += len(change.body)
        self._wake()

    async def take(self) -> Iterable[Change]:
        """Everything that waits, once there is something; nothing after a time without changes."""
        if not self.changes and not self.overrun:
            self._wakes = self._loop.create_future()
            await self._wakes
        taken, self.changes, self.bytes = self.changes, deque(), 0
        return taken


async def stream(
    store: Store,
    resource: str,
    since: int,
    encode: Encode,
    *,
    bookmark: Bookmark | None,
    initial: Iterable[bytes],
) -> AsyncIterator[bytes]:
    """Encoded events: `initial`, then every change after revision `since` that `encode` does not leave out.

    Ends by itself when the reader falls too far behind. Raises store.CompactedError and FutureError.
    """
    queue = _Queue()
    end = store.subscribe(resource, queue.put)
    try:
        for events in _chunks(initial):
            yield events
        missed = store.changes(resource, since)
        if missed:
            since = missed[-1].revision  # what was in the log may be in the queue as well
        for events in _chunks(filter(None, map(encode, missed))):
            yield events
        while not queue.overrun:
            taken = await queue.take()
            fresh = [change for change in taken if change.revision > since]
            if fresh:
                since = fresh[-1].revision
            elif not taken and bookmark is not None:
                yield bookmark(store.durable_revision)
            for events in _chunks(filter(None, map(encode, fresh))):
                yield events
    finally:
        end()
        queue.close()


def _chunks(events: Iterable[bytes]) -> Iterable[bytes]:
    waiting, size = [], 0
    for event in events:
        waiting.append(event)
        size += len(event)
        if size >= CHUNK:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)
