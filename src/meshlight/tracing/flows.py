"""Flow records over HTTP: search, and following as they come.

`GET /api/flows` answers newest first; with `follow=true` it streams JSON lines as records arrive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from aiohttp import web

from meshlight.tracing.measures import Measures
from meshlight.tracing.model import LogRecord, text
from meshlight.tracing.query import BadQuery, Traces, lookback, number
from meshlight.tracing.query_api import json, measured
from meshlight.tracing.store.search import Query

MAX_FLOWS = 5000
_TAGS = {
    "verdict": "policy.verdict",
    "policy": "policy.name",
    "code": "http.response.status_code",
    "method": "http.request.method",
    "reporter": "reporter",
    "kind": "flow.kind",
    "service": "destination.service",
}


def written(record: LogRecord) -> dict[str, Any]:
    """A flow record as JSON: its attributes as they are, and where and when it was made."""
    made: dict[str, Any] = {"time": record.time, "traceID": record.trace_id.hex() or None}
    made["attributes"] = {
        k: v if isinstance(v, (str, int, float, bool)) else text(v) for k, v in record.attributes.items()
    }
    made["resource"] = {
        k: v if isinstance(v, (str, int, float, bool)) else text(v)
        for k, v in record.resource.attributes.items()
    }
    made["body"] = text(record.body)
    return made


def queries(parameters: Mapping[str, str], now: int) -> list[Query]:
    """The searches of a request; a namespace or workload may be either end, so there may be several.

    Raises BadQuery.
    """
    unknown = set(parameters) - {
        *_TAGS,
        "namespace",
        "workload",
        "from",
        "to",
        "start",
        "end",
        "lookback",
        "limit",
        "text",
        "follow",
        "trace",
    }
    if unknown:
        raise BadQuery(
            f"unknown parameter {sorted(unknown)[0]!r}: known: namespace, workload, {', '.join(sorted(_TAGS))}"
        )
    tags = [(attribute, parameters[name]) for name, attribute in _TAGS.items() if parameters.get(name)]
    before = number(parameters, "end", 0) * 1000 or None
    after = number(parameters, "start", 0) * 1000 or None
    if parameters.get("lookback"):
        after = (before or now) - lookback(parameters["lookback"])
    limit = min(max(1, number(parameters, "limit", 100)), MAX_FLOWS)
    ends: list[list[tuple[str, str]]] = [[]]
    for name in ("namespace", "workload"):
        if value := parameters.get(name):
            ends = [[*e, (f"{side}.{name}", value)] for e in ends for side in ("source", "destination")]
    for name, side in (("from", "source"), ("to", "destination")):
        if value := parameters.get(name):
            workload, _, namespace = value.partition(".")
            ends = [[*e, (f"{side}.workload", workload)] for e in ends]
            if namespace:
                ends = [[*e, (f"{side}.namespace", namespace)] for e in ends]
    return [
        Query(
            tags=tuple(sorted({*tags, *end})),
            after=after,
            before=before,
            text=parameters.get("text", ""),
            limit=limit,
        )
        for end in ends
    ]


async def search(traces: Traces, parameters: Mapping[str, str]) -> list[LogRecord]:
    """Flow records that a request asks for, newest first. Raises BadQuery."""
    found: dict[bytes, LogRecord] = {}
    asked = queries(parameters, traces.now())
    for query in asked:
        for record in await traces.store.flows(query):
            found[orjson.dumps(written(record))] = record
    return sorted(found.values(), key=lambda r: r.time, reverse=True)[: asked[0].limit]


def add_flows(
    app: web.Application, traces: Traces, measures: Measures, arrived: Callable[[], Awaitable[None]]
) -> None:
    """`/api/flows`; `arrived` returns when new flow records may have come."""

    async def find(request: web.Request) -> web.StreamResponse:
        if request.query.get("follow") == "true":
            return await _follow(request, traces, arrived)
        found = await search(traces, request.query)
        return json({"data": [written(record) for record in found], "total": len(found)})

    app.router.add_get("/api/flows", measured(measures, "find_flows", find))


async def _follow(
    request: web.Request, traces: Traces, arrived: Callable[[], Awaitable[None]]
) -> web.StreamResponse:
    queries(request.query, traces.now())
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    # What a record says of its time may lie behind what was sent already: exporters batch.
    parameters = {key: value for key, value in request.query.items() if key not in ("start", "end", "lookback")}
    parameters["limit"] = str(MAX_FLOWS)
    sent: dict[bytes, int] = {}
    first = True
    while True:
        horizon = traces.now() - 30 * 10**9
        parameters["start"] = str(horizon // 1000)
        found = await search(traces, parameters)
        lines = []
        for record in reversed(found):
            line = orjson.dumps(written(record))
            if line not in sent:
                sent[line] = record.time
                if not first:
                    lines.append(line)
        first = False
        sent = {line: time for line, time in sent.items() if time >= horizon}
        if lines:
            await response.write(b"\n".join(lines) + b"\n")
        await arrived()
        await asyncio.sleep(0.1)  # what comes within a tenth of a second is sent together
        if request.transport is None or request.transport.is_closing():
            return response
