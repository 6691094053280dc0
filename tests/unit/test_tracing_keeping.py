"""The storage over time: retention by age and size, clocks that jump, disks that fill, old schemas."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from tracing_spans import made, rows

from meshlight.tracing.otlp import encode_rows
from meshlight.tracing.storage import Retention, Storage
from meshlight.tracing.store import files
from meshlight.tracing.store.blocks import Damaged
from meshlight.tracing.store.collection import Busy, Limits, Unwritable
from meshlight.tracing.store.log import Payload
from meshlight.tracing.store.search import Query

reports: list[str] = []


@asynccontextmanager
async def storage(
    folder: Path | None, retention: Retention | None = None, **limits: Any
) -> AsyncIterator[Storage]:
    opened = Storage(
        folder,
        retention or Retention(),
        lambda m, **_: reports.append(m),
        limits=Limits(**limits) if limits else None,
    )
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()


async def add(to: Storage, *traces: int) -> None:
    of = rows(*(made(n, i, i - 1, service=f"s{n % 3}", attributes={"n": n}) for n in traces for i in (1, 2)))
    await to.add_spans(of, Payload("otlp", encode_rows(of)))


async def ids(of: Storage) -> set[int]:
    return {int.from_bytes(t[0].trace_id, "big") for t in await of.find(Query(limit=1000))}


async def test_age_counts_from_receipt_and_a_clock_that_jumps_ahead_drops_nothing(tmp_path: Path) -> None:
    async with storage(tmp_path, Retention(seconds=3600)) as of:
        await add(of, 1)
        await of.spans.flush()
        now, steady = time.time(), time.monotonic()
        await of.retain(now + 3000, steady + 3000)
        assert await ids(of) == {1}
        await of.retain(now + 10**8, steady + 3005)  # three years in five seconds
        assert await ids(of) == {1}
        await of.retain(now - 10**6, steady + 3010)
        await of.retain(now + 3700, steady + 3700 + 10**6)
        assert await ids(of) == set()
        assert not list((tmp_path / "spans").glob("*.part"))


async def test_size_drops_the_oldest_parts_and_the_tail_keeps_what_matters(tmp_path: Path) -> None:
    async with storage(tmp_path, Retention(bytes=1)) as of:
        await add(of, 1)
        await of.spans.flush()
        await of.retain(time.time(), time.monotonic())
        assert await ids(of) == set()
    async with storage(tmp_path / "tail") as of:
        bad = rows(*(made(n << 60 | n, 1, status_code=2 if n == 3 else 0) for n in range(1, 12)))
        await of.add_spans(bad, Payload("otlp", encode_rows(bad)))
        await of.spans.flush()
        of.retention = Retention(bytes=of.spans.bytes - 1, tail=0.01)
        await of.retain(time.time(), time.monotonic())
        found = await of.find(Query(limit=100))
        assert any(t[0].status_code == 2 for t in found) and len(found) < 11


async def test_a_full_disk_refuses_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with storage(tmp_path) as of:
        await add(of, 1)
        write = os.write

        def full(fd: int, content: Any) -> int:
            write(fd, bytes(content)[: len(content) // 2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(Unwritable, match="No space left"):
            await add(of, 2)
        monkeypatch.setattr(os, "write", write)
        await add(of, 3)
        assert await ids(of) == {1, 3}
    async with storage(tmp_path) as of:
        assert await ids(of) == {1, 3}


async def test_parts_that_cannot_be_written_push_back_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file = files.write_file

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with storage(tmp_path, table_records=10, pending_bytes=2000, waiting_tables=2) as of:
        monkeypatch.setattr(files, "write_file", full)
        waiting = []
        refused = 0
        for n in range(1, 60):
            waiting.append(asyncio.create_task(add(of, n)))
            await asyncio.sleep(0)
        await asyncio.wait(waiting, timeout=1)
        refused = sum(t.done() and isinstance(t.exception(), Busy) for t in waiting)
        assert refused > 0
        monkeypatch.setattr(files, "write_file", write_file)
        await asyncio.wait(waiting, timeout=60)
        accepted = {n for n, t in enumerate(waiting, 1) if t.exception() is None}
        assert len(accepted) + refused == 59
        assert await ids(of) == accepted


async def test_merging_keeps_every_span_while_queries_run(tmp_path: Path) -> None:
    async with storage(tmp_path, table_records=20, part_records=1000) as of:
        for n in range(1, 101):
            await add(of, n)
            if n % 10 == 0:
                assert await ids(of) == set(range(1, n + 1))
        await of.spans.flush()
        assert await ids(of) == set(range(1, 101))
    async with storage(tmp_path) as of:
        assert await ids(of) == set(range(1, 101))
        assert len(of.spans.parts) < 10


async def test_older_schemas_are_migrated_and_newer_ones_refused(tmp_path: Path) -> None:
    async with storage(tmp_path) as of:
        await add(of, 1)
    manifest = tmp_path / "spans" / "manifest.json"
    found = orjson.loads(manifest.read_bytes())
    old = found | {"schema": 1, "parts": [number for number, _ in found["parts"]]}
    manifest.write_bytes(orjson.dumps(old))
    async with storage(tmp_path) as of:
        assert await ids(of) == {1}
        await add(of, 2)
    assert orjson.loads(manifest.read_bytes())["schema"] == files.SCHEMA
    for broken in (orjson.dumps(found | {"schema": 99}), b"{"):
        manifest.write_bytes(broken)
        with pytest.raises(Damaged, match=r"manifest\.json"):
            async with storage(tmp_path):
                pass


async def test_a_leftover_of_a_crash_between_part_and_manifest_does_not_count(tmp_path: Path) -> None:
    async with storage(tmp_path) as of:
        await add(of, 1)
    (part,) = (tmp_path / "spans").glob("*.part")
    (tmp_path / "spans" / "000000000099.part").write_bytes(part.read_bytes())
    (tmp_path / "spans" / "000000000098.tmp").write_bytes(b"half")
    async with storage(tmp_path) as of:
        (trace,) = await of.find(Query())
        assert len(trace) == 2
        assert not list((tmp_path / "spans").glob("*9?.*"))
