"""gRPC: receivers (OTLP 4317, Jaeger 14250), remote sampling, and Jaeger's query services (16685).

Messages cross this boundary as bytes: a receiver's body goes to the log as it came. RESOURCE_EXHAUSTED
with RetryInfo and UNAVAILABLE mean "send it again", as OTLP's exporters understand them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio

from meshlight.proto import jaeger_pb2 as jaeger
from meshlight.tracing import jaeger_proto, otlp, sampling
from meshlight.tracing.adjusters import adjust
from meshlight.tracing.decoding import Malformed
from meshlight.tracing.intake import MAX_BODY, Intake, Refused, TooLarge
from meshlight.tracing.model import KIND_NAMES, Trace
from meshlight.tracing.query import Traces, parse_trace_id
from meshlight.tracing.rows import varint
from meshlight.tracing.storage import StoreAway
from meshlight.tracing.store.search import KINDS, Query

CHUNK = 500
"""Spans a message of a streamed answer: a trace of any size stays below gRPC's 4 MiB."""
Unary = Callable[[bytes, Any], Awaitable[bytes]]
Streamed = Callable[[bytes, Any], AsyncIterator[bytes]]


def services(methods: dict[str, Unary], streams: dict[str, Streamed] | None = None) -> list[Any]:
    """Handlers by full method name (`package.Service/Method`)."""
    by_service: dict[str, dict[str, Any]] = {}
    for name, unary in methods.items():
        service, _, method = name.partition("/")
        by_service.setdefault(service, {})[method] = grpc.unary_unary_rpc_method_handler(_reachable(unary))
    for name, stream in (streams or {}).items():
        service, _, method = name.partition("/")
        by_service.setdefault(service, {})[method] = grpc.unary_stream_rpc_method_handler(_streamed(stream))
    return [grpc.method_handlers_generic_handler(service, found) for service, found in by_service.items()]


def _reachable(method: Unary) -> Unary:
    async def call(body: bytes, context: Any) -> bytes:
        try:
            return await method(body, context)
        except StoreAway as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            raise

    return call


def _streamed(method: Streamed) -> Streamed:
    async def call(body: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            async for message in method(body, context):
                yield message
        except StoreAway as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    return call


async def listen(address: str, handlers: Sequence[Any]) -> grpc.aio.Server:
    """Serve on HOST:PORT. Raises OSError when the port is taken."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_BODY + 1024),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ],
        compression=None,
    )
    server.add_generic_rpc_handlers([*handlers, *services({"grpc.health.v1.Health/Check": _healthy})])
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from None
    await server.start()
    return server


async def _healthy(_: bytes, __: Any) -> bytes:
    return b"\x08\x01"  # HealthCheckResponse.SERVING


def _retry_info(seconds: int) -> bytes:
    """google.rpc.Status with a RetryInfo, for the binary status trailer."""
    delay = b"\x08" + varint(seconds)
    info = b"\x0a" + varint(len(delay)) + delay
    kind = b"type.googleapis.com/google.rpc.RetryInfo"
    packed = b"\x0a" + varint(len(kind)) + kind + b"\x12" + varint(len(info)) + info
    return b"\x08\x08" + b"\x1a" + varint(len(packed)) + packed


async def _take(intake: Intake, protocol: str, body: bytes, context: Any) -> Any:
    try:
        return await intake.take(protocol, "grpc", body)
    except (Malformed, TooLarge) as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except Refused as error:
        if error.full:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        trailer = (("grpc-status-details-bin", _retry_info(error.retry_after)),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), trailer)


def otlp_receivers(intake: Intake) -> list[Any]:
    """TraceService and LogsService."""

    def export(protocol: str) -> Unary:
        async def handle(body: bytes, context: Any) -> bytes:
            return otlp.response(await _take(intake, protocol, body, context))

        return handle

    return services(
        {
            "opentelemetry.proto.collector.trace.v1.TraceService/Export": export("otlp"),
            "opentelemetry.proto.collector.logs.v1.LogsService/Export": export("otlp-logs"),
        }
    )


def jaeger_receivers(intake: Intake, strategies: sampling.Strategies) -> list[Any]:
    """CollectorService and SamplingManager."""

    async def post(body: bytes, context: Any) -> bytes:
        decoded = await _take(intake, "jaeger-proto", body, context)
        if decoded.rejected and not decoded.rows:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, decoded.message)
        return b""

    async def strategy(body: bytes, context: Any) -> bytes:
        try:
            request: Any = jaeger.SamplingStrategyParameters.FromString(body)
        except Exception:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not SamplingStrategyParameters")
        return sampling.message(strategies.of(request.service_name)).SerializeToString()  # type: ignore[no-any-return]

    return services(
        {
            "jaeger.api_v2.CollectorService/PostSpans": post,
            "jaeger.api_v2.SamplingManager/GetSamplingStrategy": strategy,
        }
    )


def _moment(found: Any) -> int:
    return int(found.seconds) * 10**9 + int(found.nanos)


def read_query(found: Any) -> Query:
    """TraceQueryParameters of either version."""
    kind = None
    return Query(
        service=found.service_name,
        operation=found.operation_name,
        kind=kind,
        tags=tuple(sorted(found.tags.items())),
        after=_moment(found.start_time_min) or None,
        before=_moment(found.start_time_max) or None,
        shortest=_moment(found.duration_min) or None,
        longest=_moment(found.duration_max) or None,
        limit=min(max(1, found.search_depth or 20), 1500),
    )


def _pieces(trace: Trace) -> Iterable[Trace]:
    for at in range(0, len(trace), CHUNK):
        yield trace[at : at + CHUNK]


class _Query:
    """The methods that both versions share."""

    def __init__(self, traces: Traces) -> None:
        self.traces = traces

    async def parse(self, kind: Any, body: bytes, context: Any) -> Any:
        try:
            return kind.FromString(body)
        except Exception:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a {kind.DESCRIPTOR.name}")

    async def one(self, identity: bytes, raw: bool, context: Any) -> Trace:
        found = await self.traces.store.get([identity])
        if not found:
            await context.abort(grpc.StatusCode.NOT_FOUND, "trace not found")
        return found[0] if raw else adjust(found[0])

    async def find(self, body: bytes, context: Any) -> list[Trace]:
        request = await self.parse(jaeger.FindTracesRequest, body, context)
        if not request.HasField("query"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "missing query")
        found = await self.traces.store.find(read_query(request.query))
        return found if request.query.raw_traces else [adjust(trace) for trace in found]

    async def services(self, _: bytes, __: Any) -> bytes:
        return jaeger.GetServicesResponse(services=await self.traces.services()).SerializeToString()

    async def operations(self, body: bytes, context: Any) -> list[tuple[str, str]]:
        request = await self.parse(jaeger.GetOperationsRequest, body, context)
        wanted = KINDS.get(request.span_kind) if request.span_kind else None
        found = await self.traces.operations(request.service, wanted)
        return [(name, KIND_NAMES[kind] if kind < len(KIND_NAMES) else "") for name, kind in found]

    async def dependencies(self, body: bytes, context: Any) -> bytes:
        request = await self.parse(jaeger.GetDependenciesRequest, body, context)
        after, before = _moment(request.start_time), _moment(request.end_time) or 1 << 62
        made = jaeger.GetDependenciesResponse()
        for (parent, child), count in sorted((await self.traces.store.dependencies(after, before)).items()):
            made.dependencies.add(parent=parent, child=child, call_count=count)
        return made.SerializeToString()


def query_services(traces: Traces) -> list[Any]:
    """jaeger.api_v2.QueryService and jaeger.api_v3.QueryService."""
    query = _Query(traces)

    async def get_v2(body: bytes, context: Any) -> AsyncIterator[bytes]:
        request = await query.parse(jaeger.GetTraceRequest, body, context)
        if not request.trace_id or len(request.trace_id) > 16:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "trace_id must be 16 bytes")
        trace = await query.one(request.trace_id.rjust(16, b"\0"), request.raw_traces, context)
        for piece in _pieces(trace):
            spans = [jaeger_proto.write_span(span) for span in piece]
            yield jaeger.SpansResponseChunk(spans=spans).SerializeToString()

    async def find_v2(body: bytes, context: Any) -> AsyncIterator[bytes]:
        for trace in await query.find(body, context):
            for piece in _pieces(trace):
                spans = [jaeger_proto.write_span(span) for span in piece]
                yield jaeger.SpansResponseChunk(spans=spans).SerializeToString()

    async def archive(body: bytes, context: Any) -> bytes:
        request = await query.parse(jaeger.ArchiveTraceRequest, body, context)
        if not await traces.store.archive(request.trace_id.rjust(16, b"\0")):
            await context.abort(grpc.StatusCode.NOT_FOUND, "trace not found")
        return b""

    async def operations_v2(body: bytes, context: Any) -> bytes:
        made = jaeger.GetOperationsResponse()
        for name, kind in await query.operations(body, context):
            made.operations.add(name=name, span_kind=kind)
        made.operation_names.extend(dict.fromkeys(operation.name for operation in made.operations))
        return made.SerializeToString()

    async def get_v3(body: bytes, context: Any) -> AsyncIterator[bytes]:
        request = await query.parse(jaeger.GetTraceRequestV3, body, context)
        identity = parse_trace_id(request.trace_id)
        if identity is None:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "trace_id must be 16 or 32 hexadecimal digits"
            )
            return
        for piece in _pieces(await query.one(identity, request.raw_traces, context)):
            yield otlp.encode_spans(piece)

    async def find_v3(body: bytes, context: Any) -> AsyncIterator[bytes]:
        for trace in await query.find(body, context):
            for piece in _pieces(trace):
                yield otlp.encode_spans(piece)

    async def operations_v3(body: bytes, context: Any) -> bytes:
        made = jaeger.GetOperationsResponseV3()
        for name, kind in await query.operations(body, context):
            made.operations.add(name=name, span_kind=kind)
        return made.SerializeToString()

    v2, v3 = "jaeger.api_v2.QueryService/", "jaeger.api_v3.QueryService/"
    return services(
        {
            v2 + "ArchiveTrace": archive,
            v2 + "GetServices": query.services,
            v2 + "GetOperations": operations_v2,
            v2 + "GetDependencies": query.dependencies,
            v3 + "GetServices": query.services,
            v3 + "GetOperations": operations_v3,
            v3 + "GetDependencies": query.dependencies,
        },
        {
            v2 + "GetTrace": get_v2,
            v2 + "FindTraces": find_v2,
            v3 + "GetTrace": get_v3,
            v3 + "FindTraces": find_v3,
        },
    )
