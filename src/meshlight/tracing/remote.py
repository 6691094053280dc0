"""A cluster of stores by URL: traces are spread over them by id, questions are put to all.

A trace lies whole on the store that its id chooses (rendezvous hashing, so that adding a store moves
only what becomes the new one's); traces written before a change are found all the same, since
questions go to every store. A store that is away fails what is sent to it with a retryable code and
makes questions fail, rather than answer with less than there is.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import aiohttp
import numpy as np
import orjson

from meshlight.tracing import otlp
from meshlight.tracing.internal_api import frames, query_json
from meshlight.tracing.model import NO_TRACE, LogRecord, Trace
from meshlight.tracing.rows import Row, log_record, span
from meshlight.tracing.storage import Operation, StoreAway
from meshlight.tracing.store.collection import Busy
from meshlight.tracing.store.log import Payload
from meshlight.tracing.store.search import Query
from meshlight.tracing.store.series import CLASSES, Bucket


class Cluster:
    """Stores at some URLs (of their query port), as one TraceStore."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = tuple(urls)
        self._session: Any = None

    async def __aenter__(self) -> Cluster:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30, connect=3))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def owner(self, trace: bytes) -> str:
        """The store of a trace."""
        return max(self._urls, key=lambda url: hashlib.blake2b(trace + url.encode(), digest_size=8).digest())

    async def _ask(self, url: str, verb: str, body: bytes) -> bytes:
        try:
            async with self._session.post(f"{url}/internal/v1/{verb}", data=body) as response:
                content: bytes = await response.read()
                if response.status in (429, 503):
                    raise Busy(f"store {url} is behind")
                if response.status != 200:
                    raise StoreAway(f"store {url} answers {response.status}")
                return content
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StoreAway(f"store {url} is away: {error}") from None

    async def _all(self, verb: str, question: Any) -> list[bytes]:
        body = orjson.dumps(question)
        return list(await asyncio.gather(*(self._ask(url, verb, body) for url in self._urls)))

    async def _spread(self, verb: str, rows: Sequence[Row], encode: Any) -> None:
        shares: dict[str, list[Row]] = {}
        owners: dict[bytes, str] = {}
        for row in rows:
            key = row.trace_id if row.trace_id != NO_TRACE else row.start.to_bytes(8, "big")
            if (url := owners.get(key)) is None:
                url = owners[key] = self.owner(key)
            shares.setdefault(url, []).append(row)
        try:
            await asyncio.gather(*(self._ask(url, verb, encode(share)) for url, share in shares.items()))
        except StoreAway as error:
            raise Busy(str(error)) from None

    async def add_spans(self, rows: Sequence[Row], payload: Payload) -> None:
        """Give spans to their stores; durable when this returns. Raises Busy.

        When one of several stores fails the sender sends all again: what arrived twice is shown once.
        """
        await self._spread("spans", rows, otlp.encode_rows)

    async def add_flows(self, rows: Sequence[Row], payload: Payload) -> None:
        """Give log records to their stores. Raises Busy."""
        await self._spread("logs", rows, otlp.encode_logs)

    async def find(self, query: Query) -> list[Trace]:
        """The newest traces of all stores that answer a query."""
        found = [_trace(frame) for body in await self._all("find", query_json(query)) for frame in frames(body)]
        ids = {trace[0].trace_id: max(s.start for s in trace) for trace in found}
        newest = sorted(ids, key=lambda i: ids[i], reverse=True)[: query.limit]
        return await self.get(newest) if len(found) > len(ids) else _ordered(found, newest)

    async def get(self, ids: Iterable[bytes]) -> list[Trace]:
        """Traces by id, put together where they lie on several stores."""
        wanted = list(ids)
        merged: dict[bytes, Trace] = {}
        for body in await self._all("get", [i.hex() for i in wanted]):
            for frame in frames(body):
                trace = _trace(frame)
                merged.setdefault(trace[0].trace_id, []).extend(trace)
        return [merged[i] for i in wanted if i in merged]

    async def operations(self) -> dict[Operation, int]:
        """Spans by service, operation and kind."""
        sums: Counter[Operation] = Counter()
        for body in await self._all("operations", {}):
            for service, name, kind, count in orjson.loads(body):
                sums[service, name, kind] += count
        return sums

    async def dependencies(self, after: int, before: int) -> Counter[tuple[str, str]]:
        """Calls by (caller, called)."""
        sums: Counter[tuple[str, str]] = Counter()
        for body in await self._all("dependencies", {"after": after, "before": before}):
            for parent, child, count in orjson.loads(body):
                sums[parent, child] += count
        return sums

    async def series(
        self,
        services: Sequence[str],
        kinds: Sequence[int],
        by_operation: bool,
        points: Sequence[int],
        window: int,
    ) -> dict[tuple[str, str], list[Bucket]]:
        """Calls, failures and durations over time."""
        question = {
            "services": services, "kinds": kinds, "by_operation": by_operation,
            "points": list(points), "window": window,
        }  # fmt: skip
        sums: dict[tuple[str, str], list[Bucket]] = {}
        for body in await self._all("series", question):
            for service, operation, buckets in orjson.loads(body):
                total = sums.setdefault(
                    (service, operation), [Bucket(0, 0, np.zeros(CLASSES, np.int64)) for _ in points]
                )
                for bucket, (calls, errors, classes) in zip(total, buckets, strict=True):
                    bucket.calls += calls
                    bucket.errors += errors
                    for at, count in classes:
                        bucket.classes[at] += count
        return sums

    async def flows(self, query: Query) -> list[LogRecord]:
        """The newest flow records of all stores that answer a query."""
        found = [r for body in await self._all("flows", query_json(query)) for r in _logs(body)]
        return sorted(found, key=lambda r: r.time, reverse=True)[: query.limit]

    async def flows_of(self, trace: bytes) -> list[LogRecord]:
        """The flow records of a trace."""
        return [r for body in await self._all("flows-of", {"trace": trace.hex()}) for r in _logs(body)]

    async def archive(self, trace: bytes) -> bool:
        """Keep a trace for good where it lies."""
        return any(orjson.loads(body) for body in await self._all("archive", {"trace": trace.hex()}))


def _trace(body: bytes) -> Trace:
    return [span(row) for row in otlp.decode_traces(body).rows]


def _logs(body: bytes) -> list[LogRecord]:
    return [log_record(row) for row in otlp.decode_logs(body).rows]


def _ordered(found: list[Trace], ids: Sequence[bytes]) -> list[Trace]:
    by_id = {trace[0].trace_id: trace for trace in found}
    return [by_id[i] for i in ids]
