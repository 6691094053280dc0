"""Jaeger's HTTP query API under `/api`, as its UI, Kiali and Grafana's data source call it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson
from aiohttp import web

from meshlight.tracing import analysis, jaeger_json, monitor
from meshlight.tracing.adjusters import adjust
from meshlight.tracing.decoding import Malformed, decoders
from meshlight.tracing.measures import Measures
from meshlight.tracing.model import KIND_NAMES, Trace, by_trace
from meshlight.tracing.query import BadQuery, Traces, number, parse_query, parse_trace_id
from meshlight.tracing.rows import span
from meshlight.tracing.storage import StoreAway
from meshlight.tracing.store.search import KINDS

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def json(content: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")


def refusal(status: int, message: str) -> web.Response:
    """Jaeger's envelope with an error."""
    return json(jaeger_json.answer(None, 0, [{"code": status, "msg": message}]), status)


def measured(measures: Measures, operation: str, handler: Handler) -> Handler:
    """A handler with its latency and outcome counted, and bad parameters answered with 400."""

    async def handle(request: web.Request) -> web.StreamResponse:
        began = time.perf_counter()
        result = "err"
        try:
            response = await handler(request)
            result = "ok" if response.status < 500 else "err"
            return response
        except BadQuery as error:
            result = "ok"
            return refusal(400, str(error))
        except StoreAway as error:
            return refusal(503, str(error))
        finally:
            measures.queries.labels(operation, result).inc()
            measures.latency.labels(operation, result).observe(time.perf_counter() - began)

    return handle


def add_query_api(app: web.Application, traces: Traces, measures: Measures) -> None:
    """Every path of the API."""
    api = _Api(traces)
    for path, operation, handler in (
        ("/api/services", "get_services", api.services),
        ("/api/services/{service}/operations", "get_operations", api.operations_of),
        ("/api/operations", "get_operations", api.operations),
        ("/api/traces", "find_traces", api.find),
        ("/api/traces/{id}", "get_trace", api.get),
        ("/api/dependencies", "get_dependencies", api.dependencies),
        ("/api/deep-dependencies", "get_deep_dependencies", api.deep_dependencies),
        ("/api/quality-metrics", "get_quality_metrics", api.quality),
        ("/api/metrics/minstep", "get_min_step", api.minstep),
        ("/api/metrics/{metric}", "get_metrics", api.metrics),
        ("/api/critical-path/{id}", "critical_path", api.critical_path),
        ("/api/compare", "compare", api.compare),
    ):
        app.router.add_get(path, measured(measures, operation, handler))
    app.router.add_post("/api/archive/{id}", measured(measures, "archive", api.archive))
    app.router.add_post("/api/transform", measured(measures, "transform", api.transform))


class _Api:
    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self._store = traces.store

    async def services(self, _: web.Request) -> web.Response:
        found = await self._traces.services()
        return json(jaeger_json.answer(found, len(found)))

    async def operations_of(self, request: web.Request) -> web.Response:
        found = sorted({name for name, _ in await self._traces.operations(request.match_info["service"])})
        return json(jaeger_json.answer(found, len(found)))

    async def operations(self, request: web.Request) -> web.Response:
        service = request.query.get("service", "")
        if not service:
            return refusal(400, "parameter 'service' is required")
        kind = request.query.get("spanKind", "")
        if kind and kind not in KINDS:
            raise BadQuery(f"spanKind {kind!r} is none of {', '.join(KINDS)}")
        found = await self._traces.operations(service, KINDS[kind] if kind else None)
        named = [{"name": n, "spanKind": KIND_NAMES[k] if k < len(KIND_NAMES) else ""} for n, k in found]
        return json(jaeger_json.answer(named, len(named)))

    async def find(self, request: web.Request) -> web.Response:
        if ids := request.query.getall("traceID", []):
            wanted = [self._identity(text) for text in ids]
            found = await self._store.get(wanted)
            missing = set(wanted) - {trace[0].trace_id for trace in found}
            errors = [
                {"code": 404, "msg": "trace not found", "traceID": i.hex()} for i in wanted if i in missing
            ]
        else:
            found = await self._store.find(parse_query(request.query, self._traces.now()))
            errors = []
        raw = request.query.get("raw") == "true"
        return await asyncio.to_thread(
            lambda: json(jaeger_json.answer(self._written(found, raw), len(found), errors))
        )

    @staticmethod
    def _written(found: Iterable[Trace], raw: bool) -> list[Any]:
        return [jaeger_json.write_trace(trace if raw else adjust(trace)) for trace in found]

    @staticmethod
    def _identity(text: str) -> bytes:
        identity = parse_trace_id(text)
        if identity is None:
            raise BadQuery(f"trace id {text[:64]!r} must be up to 32 hexadecimal digits")
        return identity

    async def _trace(self, text: str) -> Trace | None:
        found = await self._store.get([self._identity(text)])
        return found[0] if found else None

    async def get(self, request: web.Request) -> web.Response:
        trace = await self._trace(request.match_info["id"])
        if trace is None:
            return refusal(404, "trace not found")
        raw = request.query.get("raw") == "true"
        return await asyncio.to_thread(lambda: json(jaeger_json.answer(self._written([trace], raw), 1)))

    async def archive(self, request: web.Request) -> web.Response:
        identity = self._identity(request.match_info["id"])
        if not await self._store.archive(identity):
            return refusal(404, "trace not found")
        return json(jaeger_json.answer([], 0))

    async def transform(self, request: web.Request) -> web.Response:
        try:
            decoded = decoders()["otlp-json"](await request.read())
        except Malformed as error:
            return refusal(400, str(error))
        made = by_trace([span(row) for row in decoded.rows])
        return json(jaeger_json.answer(self._written(made.values(), False), len(made)))

    async def dependencies(self, request: web.Request) -> web.Response:
        end = number(request.query, "endTs", self._traces.now() // 10**6) * 10**6
        back = number(request.query, "lookback", 86_400_000) * 10**6
        found = await self._store.dependencies(end - back, end + 10**6)
        links = [
            {"parent": parent, "child": child, "callCount": count}
            for (parent, child), count in sorted(found.items())
        ]
        return json(jaeger_json.answer(links, len(links)))

    async def deep_dependencies(self, request: web.Request) -> web.Response:
        """Paths of services through the recent traces of one, as the UI's graph wants them."""
        service = request.query.get("service", "")
        if not service:
            return refusal(400, "parameter 'service' is required")
        query = parse_query(request.query, self._traces.now())
        found = await self._store.find(query)
        return json({"dependencies": analysis.service_paths([adjust(t) for t in found], service)})

    async def quality(self, request: web.Request) -> web.Response:
        """How complete the recent traces of a service are: spans without parents, skewed clocks."""
        service = request.query.get("service", "")
        if not service:
            return refusal(400, "parameter 'service' is required")
        found = await self._store.find(parse_query(request.query, self._traces.now()))
        return json(analysis.quality([adjust(t) for t in found], service))

    async def minstep(self, _: web.Request) -> web.Response:
        return json(jaeger_json.answer(1, 0))

    async def metrics(self, request: web.Request) -> web.Response:
        return json(
            await monitor.answer(self._store, request.match_info["metric"], request.query, self._traces.now())
        )

    async def critical_path(self, request: web.Request) -> web.Response:
        trace = await self._trace(request.match_info["id"])
        if trace is None:
            return refusal(404, "trace not found")
        sections = analysis.critical_path(adjust(trace))
        written = [
            {
                "spanID": s.span.span_id.hex(),
                "service": s.span.service,
                "operation": s.span.name,
                "start": s.start // 1000,
                "duration": (s.end - s.start) / 1000,
            }
            for s in sections
        ]
        return json(jaeger_json.answer(written, len(written)))

    async def compare(self, request: web.Request) -> web.Response:
        """Two traces (`a`, `b`) or a service's traces in two times (`a` and `b` as START..END in µs)."""
        return json(jaeger_json.answer(await analysis.compared(self._store, request.query)))
