"""The storage of a tracing server: spans, flow records, and the archive, with retention and backup.

`Storage` answers in spans and log records, asynchronously: the work is done in threads. What a query
API may ask is `TraceStore`; a cluster of stores (`meshlight.tracing.remote`) answers the same.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from meshlight.tracing.decoding import decode
from meshlight.tracing.model import LogRecord, Trace
from meshlight.tracing.rows import Row, log_record, span
from meshlight.tracing.store import files, reading
from meshlight.tracing.store.collection import Collection, Limits, Report
from meshlight.tracing.store.log import Payload
from meshlight.tracing.store.part import BlockCache, Part
from meshlight.tracing.store.reading import Unreadable
from meshlight.tracing.store.search import Query, Source
from meshlight.tracing.store.series import Bucket, series

Operation = tuple[str, str, int]
"""Service, operation, kind."""


class StoreAway(OSError):
    """A store that is asked elsewhere did not answer; the message names it."""


class TraceStore(Protocol):
    """What receivers give and query APIs ask."""

    async def add_spans(self, rows: Sequence[Row], payload: Payload) -> None: ...
    async def add_flows(self, rows: Sequence[Row], payload: Payload) -> None: ...
    async def find(self, query: Query) -> list[Trace]: ...
    async def get(self, ids: Iterable[bytes]) -> list[Trace]: ...
    async def operations(self) -> dict[Operation, int]: ...
    async def dependencies(self, after: int, before: int) -> Counter[tuple[str, str]]: ...
    async def series(
        self,
        services: Sequence[str],
        kinds: Sequence[int],
        by_operation: bool,
        points: Sequence[int],
        window: int,
    ) -> dict[tuple[str, str], list[Bucket]]: ...
    async def flows(self, query: Query) -> list[LogRecord]: ...
    async def flows_of(self, trace: bytes) -> list[LogRecord]: ...
    async def archive(self, trace: bytes) -> bool: ...


@dataclass(frozen=True, slots=True)
class Retention:
    """How much is kept. `seconds` and `bytes` 0: no bound. With `tail` set, a store over its bytes first
    thins its older half: errors and the slowest stay whole, of the rest this share stays."""

    seconds: float = 0
    bytes: int = 0
    tail: float = 0


class Storage:
    """Spans, flows and archive in one folder (None: in memory, `max_traces` of them)."""

    def __init__(
        self,
        folder: Path | None,
        retention: Retention,
        report: Report,
        max_traces: int = 0,
        cache_bytes: int = 96 << 20,
        limits: Limits | None = None,
    ) -> None:
        self.folder = folder
        self.retention = retention
        self.report = report
        self.cache = BlockCache(cache_bytes)
        limits = limits or Limits(max_traces=max_traces)
        small = Limits(table_records=16_384, table_bytes=16 << 20, pending_bytes=16 << 20)

        def made(name: str, limits: Limits) -> Collection:
            return Collection(name, folder / name if folder else None, decode, self.cache, limits, report)

        self.spans = made("spans", limits)
        self.flow_records = made("flows", small)
        self.archived = made("archive", small)
        self.thinned: set[int] = set()
        self._dependencies = reading.Dependencies()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="query")
        self._tasks: list[asyncio.Task[None]] = []
        self._clock = time.time(), time.monotonic()
        self._lock: Any = None

    @property
    def collections(self) -> tuple[Collection, ...]:
        """All of them."""
        return self.spans, self.flow_records, self.archived

    async def open(self) -> None:
        """Open every collection and begin retention. Raises Damaged, OSError, BlockingIOError when another
        process has the folder open."""
        if self.folder is not None:
            self._lock = _locked(self.folder)
        try:
            for collection in self.collections:
                await collection.open()
        except BaseException:
            await self.close()
            raise
        self._tasks.append(asyncio.create_task(self._retain()))

    async def close(self) -> None:
        """Write out what is in memory and stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for collection in self.collections:
            await collection.close()
        self._threads.shutdown()
        if self._lock is not None:
            self._lock.close()

    # giving

    async def add_spans(self, rows: Sequence[Row], payload: Payload) -> None:
        """Keep spans durably. Raises Busy, Unwritable."""
        await self.spans.append(rows, payload)

    async def add_flows(self, rows: Sequence[Row], payload: Payload) -> None:
        """Keep log records durably. Raises Busy, Unwritable."""
        await self.flow_records.append(rows, payload)

    # asking

    async def _ask(self, collection: Collection, question: Callable[[Sequence[Source]], Any]) -> Any:
        while True:
            sources = collection.sources()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, question, sources)
            except Unreadable as found:
                await asyncio.get_running_loop().run_in_executor(
                    None, collection.discard_damaged, found.part, str(found)
                )

    async def find(self, query: Query) -> list[Trace]:
        """The newest traces with a span that answers the query, whole, newest first."""
        hidden = self.spans.evicted

        def question(sources: Sequence[Source]) -> list[Trace]:
            ids = reading.find(sources, query, hidden)
            found = reading.traces(sources, ids, hidden)
            return [[span(row) for row in found[i]] for i in ids if i in found]

        return await self._ask(self.spans, question)  # type: ignore[no-any-return]

    async def get(self, ids: Iterable[bytes]) -> list[Trace]:
        """Traces by id, from the archive where they are no longer in the store."""
        wanted = list(ids)
        found: dict[bytes, Trace] = {}
        for collection in (self.spans, self.archived):
            missing = [i for i in wanted if i not in found]
            if missing and collection.records:
                hidden = collection.evicted
                rows = await self._ask(collection, partial(_traces, missing, hidden))
                found.update({i: [span(row) for row in records] for i, records in rows.items()})
        return [found[i] for i in wanted if i in found]

    async def operations(self) -> dict[Operation, int]:
        """Spans by service, operation and kind."""
        return await self._ask(self.spans, reading.operations)  # type: ignore[no-any-return]

    async def dependencies(self, after: int, before: int) -> Counter[tuple[str, str]]:
        """Calls by (caller, called) of spans that start in a time range (ns)."""
        return await self._ask(self.spans, lambda s: self._dependencies.between(s, after, before))  # type: ignore[no-any-return]

    async def series(
        self,
        services: Sequence[str],
        kinds: Sequence[int],
        by_operation: bool,
        points: Sequence[int],
        window: int,
    ) -> dict[tuple[str, str], list[Bucket]]:
        """Calls, failures and durations over time (`store/series.py`)."""
        return await self._ask(  # type: ignore[no-any-return]
            self.spans, lambda s: series(s, services, kinds, by_operation, points, window)
        )

    async def flows(self, query: Query) -> list[LogRecord]:
        """The newest flow records that answer a query, newest first."""
        rows = await self._ask(self.flow_records, lambda s: reading.records(s, query))
        return [log_record(row) for row in rows]

    async def flows_of(self, trace: bytes) -> list[LogRecord]:
        """The flow records of a trace."""
        found = await self._ask(self.flow_records, lambda s: reading.traces(s, [trace], set()))
        return [log_record(row) for row in found.get(trace, [])]

    async def archive(self, trace: bytes) -> bool:
        """Keep a trace for good; False when it is not here."""
        rows = await self._ask(self.spans, lambda s: reading.traces(s, [trace], self.spans.evicted))
        if not rows:
            already = await self._ask(self.archived, lambda s: reading.traces(s, [trace], set()))
            return bool(already)
        from meshlight.tracing.otlp import encode_rows

        await self.archived.append(rows[trace], Payload("otlp", encode_rows(rows[trace])))
        return True

    # keeping

    async def _retain(self) -> None:
        while True:
            await asyncio.sleep(5)
            try:
                await self.retain(time.time(), time.monotonic())
            except OSError as error:
                self.report("retention failed", error=str(error))

    async def retain(self, now: float, monotonic: float) -> None:
        """Drop what is too old or too much; `now` is the wall clock (s), `monotonic` the other one.

        A wall clock that jumped ahead by over an hour makes nothing old: age waits until it is back.
        """
        wall, steady = self._clock
        if now - wall > monotonic - steady + 3600:
            self.report("the clock jumped ahead; retention by age waits", seconds=int(now - wall))
        else:
            self._clock = now, monotonic
            if self.retention.seconds:
                for collection in (self.spans, self.flow_records):
                    oldest = now - self.retention.seconds
                    old = [p for p in collection.parts.values() if collection.received(p) < oldest]
                    if old:
                        collection.counters.expired += sum(p.records for p in old)
                        await collection.drop(old)
        if self.retention.bytes:
            await self._shrink()

    async def _shrink(self) -> None:
        from meshlight.tracing.tail_keeping import thin

        while sum(c.bytes for c in (self.spans, self.flow_records)) > self.retention.bytes:
            by_age = sorted(self.spans.parts.values(), key=lambda p: p.latest)
            if self.retention.tail:
                older = [p for p in by_age[: max(1, len(by_age) // 2)] if p.number not in self.thinned][:2]
                if older:
                    known = set(self.spans.parts)
                    before = self.spans.records
                    await self.spans.rewrite(older, lambda cs: thin(cs, self.retention.tail))
                    self.thinned |= set(self.spans.parts) - known
                    self.spans.counters.expired += max(0, before - self.spans.records)
                    continue
            candidates = [(p.latest, c, p) for c in (self.spans, self.flow_records) for p in c.parts.values()]
            if not candidates:
                return
            _, collection, part = min(candidates, key=lambda found: found[0])
            collection.counters.expired += part.records
            await collection.drop([part])

    async def backup(self, target: Path) -> int:
        """Copy everything into a new folder while running; returns the records in it.

        Parts are linked where the file system allows it. Raises OSError, FileExistsError.
        """
        if self.folder is None:
            raise OSError("a store in memory has nothing to back up: export its traces instead")
        await asyncio.to_thread(target.mkdir, parents=True, exist_ok=False)
        total = 0
        for collection in self.collections:
            await collection.flush()
            parts = [p for p in collection.parts.values() if p.path is not None]
            folder = target / collection.name
            await asyncio.to_thread(_copy, parts, folder)
            manifest = files.Manifest(
                {p.number: collection.received(p) for p in parts}, 0, max([0, *(p.number for p in parts)]) + 1
            )
            await asyncio.to_thread(files.write, folder, manifest)
            total += sum(p.records for p in parts)
        return total

    async def restore(self, source: Path) -> int:
        """Add the records of a backup while running; returns how many. Raises Damaged, OSError."""
        total = 0
        for collection in self.collections:
            folder = source / collection.name
            manifest = files.read(folder)
            contents = [files.part_path(folder, n).read_bytes() for n in sorted(manifest.parts)]
            total += await collection.adopt(contents)
        return total


def _traces(ids: list[bytes], hidden: set[bytes], sources: Sequence[Source]) -> dict[bytes, list[Row]]:
    return reading.traces(sources, ids, hidden)


def _copy(parts: Sequence[Part], folder: Path) -> None:
    folder.mkdir()
    for part in parts:
        assert part.path is not None
        target = files.part_path(folder, part.number)
        try:
            target.hardlink_to(part.path)
        except OSError:
            shutil.copyfile(part.path, target)


def _locked(folder: Path) -> Any:
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise BlockingIOError(f"{folder} is in use by another tracing server") from error
    return file
