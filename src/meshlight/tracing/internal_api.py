"""What a store answers to a front of a cluster (`remote.Cluster`): bytes that need no translation.

`POST /internal/v1/…`, bodies JSON, answers OTLP protobuf or JSON. Between Meshlight's own servers only.
"""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

from meshlight.tracing import otlp
from meshlight.tracing.intake import Intake, Refused
from meshlight.tracing.model import Trace
from meshlight.tracing.rows import log_row
from meshlight.tracing.storage import TraceStore
from meshlight.tracing.store.search import Query


def query_json(query: Query) -> dict[str, Any]:
    """A query as JSON."""
    return {name: getattr(query, name) for name in Query.__slots__}


def query_of(found: dict[str, Any]) -> Query:
    """A query from JSON."""
    return Query(**{**found, "tags": tuple((k, v) for k, v in found["tags"])})


def _framed(traces: list[Trace]) -> bytes:
    """Traces one after another, each with its length in four bytes."""
    encoded = [otlp.encode_spans(trace) for trace in traces]
    return b"".join(len(e).to_bytes(4, "big") + e for e in encoded)


def frames(body: bytes) -> list[bytes]:
    """What `_framed` wrote."""
    found, at = [], 0
    while at < len(body):
        length = int.from_bytes(body[at : at + 4], "big")
        found.append(body[at + 4 : at + 4 + length])
        at += 4 + length
    return found


def add_internal(app: web.Application, intake: Intake, store: TraceStore) -> None:
    """The paths of a store."""

    async def answer(request: web.Request) -> web.Response:
        verb = request.match_info["verb"]
        if verb in ("spans", "logs"):
            try:
                await intake.take("otlp" if verb == "spans" else "otlp-logs", "internal", await request.read())
            except Refused as error:
                return web.Response(status=429, headers={"Retry-After": str(error.retry_after)})
            return web.Response()
        found: Any = orjson.loads(await request.read() or b"{}")
        if verb == "find":
            return web.Response(body=_framed(await store.find(query_of(found))))
        if verb == "get":
            return web.Response(body=_framed(await store.get([bytes.fromhex(i) for i in found])))
        if verb == "operations":
            return _json([[*key, n] for key, n in (await store.operations()).items()])
        if verb == "dependencies":
            sums = await store.dependencies(found["after"], found["before"])
            return _json([[p, c, n] for (p, c), n in sums.items()])
        if verb == "series":
            sums_ = await store.series(**found)
            return _json(
                [
                    [*key, [[b.calls, b.errors, _sparse(b.classes)] for b in buckets]]
                    for key, buckets in sums_.items()
                ]
            )
        if verb == "flows":
            records = await store.flows(query_of(found))
            return web.Response(body=otlp.encode_logs(log_row(r) for r in records))
        if verb == "flows-of":
            records = await store.flows_of(bytes.fromhex(found["trace"]))
            return web.Response(body=otlp.encode_logs(log_row(r) for r in records))
        if verb == "archive":
            return _json(await store.archive(bytes.fromhex(found["trace"])))
        return web.Response(status=404)

    app.router.add_post("/internal/v1/{verb}", answer)


def _sparse(classes: Any) -> list[list[int]]:
    at = classes.nonzero()[0].tolist()
    return [[i, int(classes[i])] for i in at]


def _json(content: Any) -> web.Response:
    return web.Response(body=orjson.dumps(content), content_type="application/json")
