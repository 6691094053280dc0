"""A queue of keys, each there once, worked off one at a time and again when its work fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from meshlight.controlplane.logs import Scope
from meshlight.kube.client import ApiError, ApiUnreachable

Key = TypeVar("Key")
_RETRY_SECONDS = 2.0

log = Scope("gateways")


class Work(Generic[Key]):
    """Keys that are due."""

    def __init__(self, perform: Callable[[Key], Awaitable[None]]) -> None:
        self._perform = perform
        self._due: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()

    def add(self, key: Key) -> None:
        """Have a key worked on."""
        if key not in self._queued:
            self._queued.add(key)
            self._due.put_nowait(key)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            key = await self._due.get()
            self._queued.discard(key)
            try:
                await self._perform(key)
            except (ApiError, ApiUnreachable) as error:
                if isinstance(error, ApiError) and error.code == 404:
                    continue  # deleted meanwhile
                log.warn("not done", key=str(key), error=str(error), retry_after=_RETRY_SECONDS)
                asyncio.get_running_loop().call_later(_RETRY_SECONDS, self.add, key)
