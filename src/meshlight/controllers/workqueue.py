"""Keyed work queue: why each controller may treat changes as hints and reconcile from its caches.

A key is queued at most once and never worked on twice at once; a failing key is tried again with
its own backoff. Nothing polls: keys come from watch callbacks.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

Key = tuple[str, str]


def log(level: str, msg: str, **fields: object) -> None:
    """Write one JSON log object on stderr."""
    line = {"ts": time.time(), "level": level, "msg": msg, **fields}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)


class WorkQueue:
    """Runs `reconcile(key)` for added keys, in order, one at a time."""

    def __init__(self, name: str, reconcile: Callable[[Key], Awaitable[None]]) -> None:
        self.name = name
        self._reconcile = reconcile
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()
        self._failures: dict[Key, int] = {}

    def add(self, key: Key) -> None:
        """Queue a key unless it waits already."""
        if key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    async def run(self) -> None:
        """Work until cancelled; a failed key returns after 0.1 s, doubling up to 30 s."""
        while True:
            key = await self._ready.get()
            self._queued.discard(key)
            try:
                await self._reconcile(key)
                self._failures.pop(key, None)
            except Exception as error:  # the key is retried; one bad object must not stop the rest
                count = self._failures.get(key, 0)
                self._failures[key] = count + 1
                log("warning", "reconcile failed", queue=self.name, key=key, error=str(error))
                asyncio.get_running_loop().call_later(min(0.1 * 2 ** min(count, 9), 30), self.add, key)
