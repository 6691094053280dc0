"""Keyed work queue: why each controller may treat changes as hints and reconcile from its caches.

A key is queued at most once and never worked on twice at once; a failing key is tried again with
its own backoff. Nothing polls: keys come from watch callbacks and from times that a reconciliation named.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

from meshlight.kube.client import ApiError

Key = tuple[str, str]


def log(level: str, msg: str, **fields: object) -> None:
    """Write one JSON log object on stderr."""
    line = {"ts": time.time(), "level": level, "msg": msg, **fields}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)


class WorkQueue:
    """Runs `reconcile(key)` for added keys, in order, by `workers` at once."""

    def __init__(self, name: str, reconcile: Callable[[Key], Awaitable[None]], workers: int = 1) -> None:
        self.name = name
        self._reconcile, self._workers = reconcile, workers
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}

    def add(self, key: Key) -> None:
        """Queue a key unless it waits already; one that is worked on comes again afterwards."""
        if key in self._working:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Queue a key at a later time; of several times the earliest counts."""
        loop = asyncio.get_running_loop()
        when = loop.time() + max(seconds, 0)
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= when:
                return
            timer.cancel()
        self._timers[key] = loop.call_at(when, self._due, key)

    def _due(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def run(self) -> None:
        """Work until cancelled; a failed key returns after 0.1 s, doubling up to 30 s."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._workers):
                    group.create_task(self._work())
        finally:
            for timer in self._timers.values():
                timer.cancel()

    async def _work(self) -> None:
        while True:
            key = await self._ready.get()
            self._queued.discard(key)
            self._working.add(key)
            try:
                await self._reconcile(key)
                self._failures.pop(key, None)
            except Exception as error:  # the key is retried; one bad object must not stop the rest
                count = self._failures.get(key, 0)
                self._failures[key] = count + 1
                if count or not (isinstance(error, ApiError) and error.code == 409):
                    log("warning", "reconcile failed", queue=self.name, key=key, error=repr(error))
                self.add_after(key, min(0.1 * 2 ** min(count, 9), 30))
            finally:
                self._working.discard(key)
                if key in self._again:
                    self._again.discard(key)
                    self.add(key)
