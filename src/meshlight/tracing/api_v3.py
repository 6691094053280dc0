"""Jaeger's `/api/v3` over HTTP (answers in OTLP JSON), and Zipkin's query API."""

from __future__ import annotations

import datetime
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson
from aiohttp import web

from meshlight.tracing import otlp_json, zipkin
from meshlight.tracing.adjusters import adjust, children
from meshlight.tracing.measures import Measures
from meshlight.tracing.model import KIND_NAMES, Trace
from meshlight.tracing.query import MAX_LIMIT, BadQuery, Traces, number, parse_duration, parse_trace_id
from meshlight.tracing.query_api import json, measured
from meshlight.tracing.store.search import KINDS, Query

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _failed(status: int, message: str) -> web.Response:
    code = {400: 3, 404: 5}.get(status, 2)
    return json({"error": {"grpcCode": code, "httpCode": status, "message": message, "httpStatus": ""}}, status)


def _checked(handler: Handler) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except BadQuery as error:
            return _failed(400, str(error))

    return handle


def parse_time(text: str, name: str) -> int:
    """Ns of an RFC 3339 time with up to nine decimals. Raises BadQuery."""
    matched = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(Z|[+-]\d\d:\d\d)", text)
    if not matched:
        raise BadQuery(f"{name} {text!r} is no RFC 3339 time: write it as 2026-01-02T03:04:05Z")
    try:
        base = datetime.datetime.fromisoformat(matched[1] + matched[3].replace("Z", "+00:00"))
    except ValueError as error:
        raise BadQuery(f"{name} {text!r}: {error}") from None
    return int(base.timestamp()) * 10**9 + int((matched[2] or "").ljust(9, "0"))


def _v3_query(found: dict[str, Any], raw_attributes: Any) -> Query:
    attributes = raw_attributes
    if isinstance(attributes, str):
        try:
            attributes = orjson.loads(attributes)
        except orjson.JSONDecodeError:
            raise BadQuery("query.attributes must be a JSON object") from None
    if not isinstance(attributes or {}, dict):
        raise BadQuery("query.attributes must be a JSON object")
    depth = found.get("search_depth") or found.get("num_traces") or 20
    durations = {}
    for name in ("duration_min", "duration_max"):
        durations[name] = parse_duration(str(found[name]), name) if found.get(name) else None
    for name in ("start_time_min", "start_time_max"):
        if not found.get(name):
            raise BadQuery(f"query.{name} is required")
    return Query(
        service=str(found.get("service_name") or ""),
        operation=str(found.get("operation_name") or ""),
        tags=tuple(
            sorted(
                (k, v if isinstance(v, str) else orjson.dumps(v).decode())
                for k, v in (attributes or {}).items()
            )
        ),
        after=parse_time(str(found["start_time_min"]), "query.start_time_min"),
        before=parse_time(str(found["start_time_max"]), "query.start_time_max"),
        shortest=durations["duration_min"],
        longest=durations["duration_max"],
        limit=min(max(1, int(depth)), MAX_LIMIT),
    )


_FIELDS = (
    "service_name", "operation_name", "start_time_min", "start_time_max", "duration_min", "duration_max",
    "search_depth", "num_traces", "raw_traces",
)  # fmt: skip


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


async def _query_of(request: web.Request) -> tuple[Query, bool]:
    if request.method == "POST":
        try:
            body = orjson.loads(await request.read())
            found = {_snake(key): value for key, value in body["query"].items()}
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise BadQuery('the body must be a JSON object with "query"') from None
        try:
            return _v3_query(found, found.get("attributes")), bool(found.get("raw_traces"))
        except (TypeError, ValueError) as error:
            raise BadQuery(str(error)) from None
    given = {name.removeprefix("query."): value for name, value in request.query.items()}
    given = {_snake(name): value for name, value in given.items()}
    number(given, "search_depth", 20)
    number(given, "num_traces", 20)
    return _v3_query({k: given[k] for k in _FIELDS if k in given}, given.get("attributes")), given.get(
        "raw_traces"
    ) == "true"


def summary(trace: Trace) -> dict[str, Any]:
    """A trace in a line, as `/api/v3/trace-summaries` has it."""
    roots = children(trace).get(b"", [])
    root = min((s for s in roots if not s.parent_id), key=lambda s: s.start, default=roots[0])
    services: dict[str, list[int]] = {}
    for span in trace:
        counts = services.setdefault(span.service, [0, 0])
        counts[0] += 1
        counts[1] += span.failed
    return {
        "traceId": trace[0].trace_id.hex(),
        "rootServiceName": root.service,
        "rootOperationName": root.name,
        "minStartTimeUnixNano": str(min(s.start for s in trace)),
        "maxEndTimeUnixNano": str(max(s.end for s in trace)),
        "spanCount": len(trace),
        "errorSpanCount": sum(s.failed for s in trace),
        "orphanSpanCount": sum(bool(s.parent_id) for s in roots),
        "services": [
            {"name": name, "spanCount": n, "errorSpanCount": errors}
            for name, (n, errors) in sorted(services.items())
        ],
    }


def add_api_v3(app: web.Application, traces: Traces, measures: Measures) -> None:
    """Every path under /api/v3."""
    store = traces.store

    async def services(_: web.Request) -> web.Response:
        return json({"services": await traces.services()})

    async def operations(request: web.Request) -> web.Response:
        service = request.query.get("service", "")
        if not service:
            raise BadQuery("parameter service is required")
        kind = request.query.get("span_kind", request.query.get("spanKind", ""))
        found = await traces.operations(service, KINDS.get(kind) if kind else None)
        named = [{"name": n, "spanKind": KIND_NAMES[k] if k < len(KIND_NAMES) else ""} for n, k in found]
        return json({"operations": named})

    async def get(request: web.Request) -> web.Response:
        identity = parse_trace_id(request.match_info["id"])
        if identity is None:
            raise BadQuery("trace_id must be 16 or 32 hexadecimal digits")
        found = await store.get([identity])
        if not found:
            return _failed(404, "trace not found")
        raw = request.query.get("raw_traces", request.query.get("rawTraces")) == "true"
        return json({"result": otlp_json.write_spans(found[0] if raw else adjust(found[0]))})

    async def find(request: web.Request) -> web.Response:
        query, raw = await _query_of(request)
        found = await store.find(query)
        spans = [span for trace in found for span in (trace if raw else adjust(trace))]
        if not spans:
            return _failed(404, "No traces found")
        return json({"result": otlp_json.write_spans(spans)})

    async def summaries(request: web.Request) -> web.Response:
        query, _ = await _query_of(request)
        return json({"result": {"summaries": [summary(adjust(t)) for t in await store.find(query)]}})

    async def dependencies(request: web.Request) -> web.Response:
        start = request.query.get("start_time", request.query.get("startTime", ""))
        end = request.query.get("end_time", request.query.get("endTime", ""))
        found = await store.dependencies(parse_time(start, "start_time"), parse_time(end, "end_time"))
        links = [{"parent": p, "child": c, "callCount": str(n)} for (p, c), n in sorted(found.items())]
        return json({"dependencies": links})

    for path, name, handler in (
        ("/api/v3/services", "get_services", services),
        ("/api/v3/operations", "get_operations", operations),
        ("/api/v3/traces/{id}", "get_trace", get),
        ("/api/v3/traces", "find_traces", find),
        ("/api/v3/trace-summaries", "find_trace_summaries", summaries),
        ("/api/v3/dependencies", "get_dependencies", dependencies),
    ):
        app.router.add_get(path, measured(measures, name, _checked(handler)))
    app.router.add_post("/api/v3/traces", measured(measures, "find_traces", _checked(find)))
    app.router.add_post(
        "/api/v3/trace-summaries", measured(measures, "find_trace_summaries", _checked(summaries))
    )


def _text(status: int, message: str) -> web.Response:
    return web.Response(status=status, text=message + "\n")


def add_zipkin_query(app: web.Application, traces: Traces, measures: Measures) -> None:
    """Zipkin's query API, /api/v2."""
    store = traces.store

    def checked(handler: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except BadQuery as error:
                return _text(400, str(error))

        return handle

    async def services(_: web.Request) -> web.Response:
        return json(await traces.services())

    def service_name(request: web.Request) -> str:
        name = request.query.get("serviceName", "")
        if not name:
            raise BadQuery("serviceName is required")
        return name

    async def span_names(request: web.Request) -> web.Response:
        # The path is the collector's too: without a service this is the reachability check of a sender.
        if request.method == "HEAD" or "serviceName" not in request.query:
            raise web.HTTPMethodNotAllowed(request.method, ["POST"])
        found = await traces.operations(service_name(request))
        return json(sorted({name for name, _ in found}))

    async def remote_services(request: web.Request) -> web.Response:
        found = await store.find(Query(service=service_name(request), limit=200))
        named = {
            str(s.attributes["peer.service"])
            for t in found
            for s in t
            if "peer.service" in s.attributes and s.service == service_name(request)
        }
        return json(sorted(named))

    def written(trace: Trace) -> list[Any]:
        return [zipkin.write_span(span) for span in sorted(trace, key=lambda s: s.start)]

    async def find(request: web.Request) -> web.Response:
        query = zipkin_query(request.query, traces.now())
        return json([written(trace) for trace in await store.find(query)])

    async def get(request: web.Request) -> web.Response:
        identity = parse_trace_id(request.match_info["id"])
        if identity is None:
            raise BadQuery(f"{request.match_info['id'][:64]} is no trace id")
        found = await store.get([identity])
        if not found:
            return _text(404, f"trace {identity.hex()} not found")
        return json(written(found[0]))

    async def many(request: web.Request) -> web.Response:
        texts = [t for t in request.query.get("traceIds", "").split(",") if t]
        ids = [parse_trace_id(text) for text in texts]
        if not ids or None in ids:
            raise BadQuery("traceIds must be trace ids with commas between them")
        return json([written(trace) for trace in await store.get([i for i in ids if i])])

    async def dependencies(request: web.Request) -> web.Response:
        end = number(request.query, "endTs", 0) * 10**6
        if not end:
            raise BadQuery("endTs is required")
        back = number(request.query, "lookback", 86_400_000) * 10**6
        found = await store.dependencies(end - back, end + 10**6)
        return json([{"parent": p, "child": c, "callCount": n} for (p, c), n in sorted(found.items())])

    for path, name, handler in (
        ("/api/v2/services", "zipkin_services", services),
        ("/api/v2/spans", "zipkin_span_names", span_names),
        ("/api/v2/remoteServices", "zipkin_remote_services", remote_services),
        ("/api/v2/traces", "zipkin_traces", find),
        ("/api/v2/trace/{id}", "zipkin_trace", get),
        ("/api/v2/traceMany", "zipkin_trace_many", many),
        ("/api/v2/dependencies", "zipkin_dependencies", dependencies),
    ):
        app.router.add_get(path, measured(measures, name, checked(handler)))


def zipkin_query(parameters: Any, now: int) -> Query:
    """A search as Zipkin's UI writes it: times in ms, durations in µs, tags in `annotationQuery`."""
    end = number(parameters, "endTs", now // 10**6) * 10**6
    back = number(parameters, "lookback", 900_000) * 10**6
    tags: list[tuple[str, str]] = []
    text = ""
    for condition in parameters.get("annotationQuery", "").split(" and "):
        key, equals, value = condition.strip().partition("=")
        if equals:
            tags.append((key, value))
        elif key:
            text = key
    if remote := parameters.get("remoteServiceName", ""):
        tags.append(("peer.service", remote))
    name = parameters.get("spanName", "")
    query = Query(
        service=parameters.get("serviceName", ""),
        operation="" if name == "all" else name,
        tags=tuple(sorted(tags)),
        after=end - back,
        before=end + 10**6,
        text=text,
        limit=min(max(1, number(parameters, "limit", 10)), MAX_LIMIT),
    )
    shortest, longest = number(parameters, "minDuration", 0), number(parameters, "maxDuration", 0)
    return replace(query, shortest=shortest * 1000 or None, longest=longest * 1000 or None)
