"""A collection of records: table in memory, log in front of it, parts behind it.

`append` returns when the records are durable. One task writes: it gathers what came meanwhile, appends
it to the log with one sync, and puts it into the table; a full table is handed to a thread that makes
a part. While two tables wait for that, nothing is accepted (`Busy`). In memory (`folder` None) there is
no log, parts are bytes, and the oldest traces beyond `max_traces` are evicted.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meshlight.tracing.rows import Row
from meshlight.tracing.store import files, log
from meshlight.tracing.store.blocks import Damaged
from meshlight.tracing.store.columns import Columns, concatenate
from meshlight.tracing.store.log import Payload, Replay, Segment
from meshlight.tracing.store.part import BlockCache, Part
from meshlight.tracing.store.part_writer import encode
from meshlight.tracing.store.search import Recent, Source
from meshlight.tracing.store.table import Table

Decode = Callable[[Payload], Sequence[Row]]
Report = Callable[..., None]


class Busy(Exception):
    """Nothing can be accepted just now; the sender should try again in `retry_after` seconds."""

    retry_after = 1


class Unwritable(Exception):
    """The log cannot be written (disk full, read-only …); nothing was accepted."""

    retry_after = 10


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a collection; bytes and numbers of records."""

    table_records: int = 65_536
    table_bytes: int = 48 << 20
    part_records: int = 280_000
    pending_bytes: int = 32 << 20
    waiting_tables: int = 2
    max_traces: int = 0


@dataclass(slots=True)
class _Waiting:
    rows: Sequence[Row]
    payload: Payload
    done: asyncio.Future[None]


@dataclass(slots=True)
class _Sealed:
    table: Table
    segment: int
    recent: Recent | None = None


@dataclass(slots=True)
class Counters:
    """What happened since the start, for metrics."""

    accepted: int = 0
    flushes: int = 0
    merges: int = 0
    failed_flushes: int = 0
    damaged: int = 0
    expired: int = 0
    problems: list[str] = field(default_factory=list)


class Collection:
    """Open with `open`, end with `close`. Called from one event loop."""

    def __init__(
        self, name: str, folder: Path | None, decode: Decode, cache: BlockCache, limits: Limits, report: Report
    ) -> None:
        self.name = name
        self.folder = folder
        self.counters = Counters()
        self.parts: dict[int, Part] = {}
        self._decode = decode
        self._cache = cache
        self._limits = limits
        self._report = report
        self._manifest = files.Manifest()
        self._table = Table()
        self._sealed: list[_Sealed] = []
        self._recent: Recent | None = None
        self._segment: Segment | None = None
        self._waiting: list[_Waiting] = []
        self._pending = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._flush_wanted = asyncio.Event()
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-parts")
        self._traces: OrderedDict[bytes, None] = OrderedDict()
        self.evicted: set[bytes] = set()

    # opening and closing

    async def open(self) -> None:
        """Read the manifest, open parts, replay the log. Raises Damaged when the manifest cannot be read."""
        if self.folder is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        self._room.set()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._make_parts())]

    def _load(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manifest = files.read(self.folder)
        files.remove_leftovers(self.folder, self._manifest.parts)
        for number in sorted(self._manifest.parts):
            path = files.part_path(self.folder, number)
            try:
                self.parts[number] = Part(number, path, self._cache)
            except (Damaged, OSError, ValueError, KeyError) as error:
                self._damage(str(error), path)
                del self._manifest.parts[number]
        last = 0
        for path in log.segments(self.folder):
            number = int(path.stem)
            last = max(last, number)
            if number <= self._manifest.logged_through:
                path.unlink()
                continue
            replay = Replay(path)
            try:
                for payload in replay.payloads():
                    self._table.extend(self._decode(payload))
                    if self._full():
                        self._number_part(encode(self._table.columns().sorted()), None)
                        self._table = Table()
            except (ValueError, Damaged) as error:
                replay.damage = f"{path.name}: {error}"
            if replay.damage:
                self._damage(replay.damage, path)
        if len(self._table):
            self._number_part(encode(self._table.columns().sorted()), None)
            self._table = Table()
        self._manifest.logged_through = max(last, self._manifest.logged_through)
        files.write(self.folder, self._manifest)
        for path in log.segments(self.folder):
            path.unlink()
        self._segment = Segment(self.folder, self._manifest.logged_through + 1)

    def _damage(self, message: str, path: Path) -> None:
        self.counters.damaged += 1
        kept = files.set_aside(path) if path.exists() else path
        problem = f"{message}; set aside as {kept}: the rest goes on without it"
        self.counters.problems.append(problem)
        self._report("damaged file", collection=self.name, error=message, kept=str(kept))

    async def close(self) -> None:
        """Write what is in memory to a part and stop. Records not yet acknowledged are refused."""
        self._closing = True
        self._wake.set()
        if self._tasks:
            await self._tasks[0]
            self._seal()
            self._flush_wanted.set()
            await self._tasks[1]
        self._thread.shutdown()
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    # writing

    async def append(self, rows: Sequence[Row], payload: Payload) -> None:
        """Keep records; returns once they are durable. Raises Busy or Unwritable, and then nothing is kept."""
        if not rows:
            return
        if self._closing or self._pending > self._limits.pending_bytes:
            raise Busy("the store is behind: send this again a little later")
        waiting = _Waiting(rows, payload, asyncio.get_running_loop().create_future())
        self._pending += len(payload.body)
        self._waiting.append(waiting)
        self._wake.set()
        await waiting.done

    async def _write(self) -> None:
        while True:
            if not self._waiting:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._room.wait()
            batch, self._waiting = self._waiting, []
            try:
                if self._segment is not None:
                    payloads = [w.payload for w in batch]
                    await asyncio.get_running_loop().run_in_executor(None, self._segment.append, payloads)
            except OSError as error:
                self._report("the log cannot be written", collection=self.name, error=str(error))
                refused = Unwritable(
                    f"spans cannot be written to disk: {error.strerror}; free space and send again"
                )
                for waiting in batch:
                    if not waiting.done.done():
                        waiting.done.set_exception(refused)
            else:
                for waiting in batch:
                    self._table.extend(waiting.rows)
                    self.counters.accepted += len(waiting.rows)
                    if self._limits.max_traces:
                        self._evict(waiting.rows)
                    if not waiting.done.done():
                        waiting.done.set_result(None)
                if self._full():
                    self._seal()
            finally:
                self._pending -= sum(len(w.payload.body) for w in batch)

    def _full(self) -> bool:
        return len(self._table) >= self._limits.table_records or self._table.bytes >= self._limits.table_bytes

    def _seal(self) -> None:
        if not len(self._table):
            return
        number = 0
        if self._segment is not None and self.folder is not None:
            number = self._segment.number
            self._segment.close()
            self._segment = Segment(self.folder, number + 1)
        self._sealed.append(_Sealed(self._table, number))
        self._table = Table()
        if len(self._sealed) >= self._limits.waiting_tables:
            self._room.clear()
        self._flush_wanted.set()

    def _evict(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._traces[row.trace_id] = None
        while len(self._traces) > self._limits.max_traces:
            oldest, _ = self._traces.popitem(last=False)
            self.evicted.add(oldest)
        for row in rows:
            # Spans of a trace that was evicted bring it back as a new one.
            self.evicted.discard(row.trace_id)
        if len(self.evicted) > self._limits.max_traces:
            self._flush_wanted.set()

    async def _make_parts(self) -> None:
        pause = 0.2
        while True:
            await self._flush_wanted.wait()
            self._flush_wanted.clear()
            try:
                while self._sealed:
                    await self._flush_one()
                    pause = 0.2
                await self._merge()
                if self._limits.max_traces and len(self.evicted) > self._limits.max_traces:
                    await self._drop_evicted()
            except OSError as error:
                self.counters.failed_flushes += 1
                self._report("a part cannot be written", collection=self.name, error=str(error), retry_in=pause)
                if self._closing:
                    return  # the log has it
                await asyncio.sleep(pause)
                pause = min(10.0, pause * 2)
                self._flush_wanted.set()
                continue
            if self._closing and not self._sealed:
                return

    async def _flush_one(self) -> None:
        sealed = self._sealed[0]
        columns = sealed.table.columns()
        loop = asyncio.get_running_loop()
        content = await loop.run_in_executor(self._thread, lambda: encode(columns.sorted()))
        part = await loop.run_in_executor(self._thread, self._number_part, content, sealed.segment)
        self.parts[part.number] = part
        self._sealed.pop(0)
        self._room.set()
        self.counters.flushes += 1

    def _number_part(self, content: bytes, segment: int | None) -> Part:
        """Make a part live; `segment` is the log segment that it makes superfluous."""
        number = self._manifest.next_number
        self._manifest.next_number += 1
        if self.folder is None:
            part = Part(number, content, self._cache)
        else:
            path = files.part_path(self.folder, number)
            files.write_file(path, content)
            part = Part(number, path, self._cache)
        self._manifest.parts[number] = time.time()
        if segment is None:
            self.parts[number] = part
        elif self.folder is not None:
            self._manifest.logged_through = max(self._manifest.logged_through, segment)
            files.write(self.folder, self._manifest)
            for old in log.segments(self.folder):
                if int(old.stem) <= segment:
                    old.unlink()
        return part

    # merging and dropping

    async def _merge(self) -> None:
        while chosen := self._to_merge():
            await self.rewrite(chosen, concatenate)
            self.counters.merges += 1

    def _to_merge(self) -> list[Part]:
        """Neighbours in time that are small enough to become one part; four at least."""
        run: list[Part] = []
        total = 0
        for part in sorted(self.parts.values(), key=lambda p: p.latest):
            if part.records * 2 > self._limits.part_records or total + part.records > self._limits.part_records:
                if len(run) >= 3:
                    return run
                run, total = [], 0
                if part.records * 2 > self._limits.part_records:
                    continue
            run.append(part)
            total += part.records
        return run if len(run) >= 4 else []

    async def rewrite(self, chosen: Sequence[Part], change: Callable[[list[Columns]], Columns]) -> None:
        """Replace parts by one with their changed records (by none when nothing is left), atomically."""
        loop = asyncio.get_running_loop()

        def work() -> Part | None:
            columns = change([part.columns() for part in chosen])
            if not len(columns):
                return None
            return self._store(encode(columns.sorted()))

        try:
            made = await loop.run_in_executor(self._thread, work)
        except (Damaged, ValueError, IndexError) as error:
            await self._find_damage(chosen, str(error))
            return
        received = [self._manifest.parts[p.number] for p in chosen]
        if made is not None:
            self.parts[made.number] = made
            self._manifest.parts[made.number] = max(received)
        await self.drop(chosen)

    def _store(self, content: bytes) -> Part:
        number = self._manifest.next_number
        self._manifest.next_number += 1
        if self.folder is None:
            return Part(number, content, self._cache)
        path = files.part_path(self.folder, number)
        files.write_file(path, content)
        return Part(number, path, self._cache)

    async def _find_damage(self, chosen: Sequence[Part], error: str) -> None:
        for part in chosen:
            try:
                part.verify()
                part.columns()
            except (Damaged, ValueError, IndexError) as damage:
                self.discard_damaged(part, str(damage) or error)

    def discard_damaged(self, part: Part, error: str) -> None:
        """Take a part that cannot be read out of service, keeping its file aside."""
        if self.parts.pop(part.number, None) is None:
            return
        self._manifest.parts.pop(part.number, None)
        if part.path is not None and self.folder is not None:
            self._damage(error, part.path)
            files.write(self.folder, self._manifest)

    async def drop(self, chosen: Sequence[Part]) -> None:
        """Remove parts durably."""
        for part in chosen:
            self.parts.pop(part.number, None)
            self._manifest.parts.pop(part.number, None)
            part.close()
        if self.folder is not None:
            await asyncio.get_running_loop().run_in_executor(
                self._thread, files.write, self.folder, self._manifest
            )
            for part in chosen:
                if part.path is not None:
                    part.path.unlink(missing_ok=True)

    async def _drop_evicted(self) -> None:
        gone, parts = set(self.evicted), list(self.parts.values())

        def keep(all_columns: list[Columns]) -> Columns:
            columns = concatenate(all_columns)
            ids = Recent(columns).trace_ids(np.arange(len(columns)))
            return columns.take(np.array([i for i, t in enumerate(ids) if t not in gone], np.int64))

        if parts:
            await self.rewrite(parts, keep)
        in_tables = {t for s in self._tables() for t in s.trace_ids(np.arange(s.records))}
        self.evicted = {t for t in self.evicted if t not in gone or t in in_tables}

    def received(self, part: Part) -> float:
        """When the newest record of a part was received, unix seconds."""
        return self._manifest.parts.get(part.number, 0.0)

    async def adopt(self, contents: Sequence[bytes]) -> int:
        """Add parts made elsewhere (a backup's). Returns their records. Raises Damaged; then none is added."""
        for content in contents:
            Part(0, content, BlockCache(1 << 20)).verify()
        total = 0
        for content in contents:
            part = await asyncio.get_running_loop().run_in_executor(self._thread, self._number_part, content, 0)
            self.parts[part.number] = part
            total += part.records
        return total

    async def flush(self) -> None:
        """Put everything accepted so far into parts. Raises OSError when that cannot be written."""
        self._seal()
        while self._sealed:
            before = self.counters.failed_flushes
            self._flush_wanted.set()
            await asyncio.sleep(0.01)
            if self.counters.failed_flushes > before:
                raise OSError(f"parts of {self.name} cannot be written")

    # reading

    def _tables(self) -> list[Recent]:
        found = []
        if len(self._table):
            if (
                self._recent is None
                or self._recent.records != len(self._table)
                or self._recent_of is not self._table
            ):
                self._recent = Recent(self._table.columns())
                self._recent_of = self._table
            found.append(self._recent)
        for sealed in reversed(self._sealed):
            if sealed.recent is None:
                sealed.recent = Recent(sealed.table.columns())
            found.append(sealed.recent)
        return found

    _recent_of: Table | None = None

    def sources(self) -> list[Source]:
        """Everything that can be asked now; immutable, so a thread may read it while writing goes on."""
        return [*self._tables(), *sorted(self.parts.values(), key=lambda p: p.latest, reverse=True)]

    @property
    def bytes(self) -> int:
        """Size on disk (in memory: of the parts)."""
        return sum(part.size for part in self.parts.values())

    @property
    def records(self) -> int:
        """Number of records, in memory and in parts."""
        tables = len(self._table) + sum(len(s.table) for s in self._sealed)
        return tables + sum(part.records for part in self.parts.values())

    @property
    def pending(self) -> int:
        """Bytes received and not yet durable."""
        return self._pending
