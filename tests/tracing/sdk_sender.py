"""Send a small trace with OpenTelemetry's SDK and print its id: `sdk_sender.py grpc|http ENDPOINT SERVICE`."""

from __future__ import annotations

import sys
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import Link, SpanKind, Status, StatusCode


def exporter(protocol: str, endpoint: str) -> Any:
    """An exporter that compresses with gzip."""
    if protocol == "grpc":
        import grpc
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint, insecure=True, compression=grpc.Compression.Gzip)
    from opentelemetry.exporter.otlp.proto.http import Compression
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint, compression=Compression.Gzip)


def main(protocol: str, endpoint: str, service: str) -> None:
    """Two spans, with everything that a span can have."""
    provider = TracerProvider(resource=Resource.create({"service.name": service, "host.name": "h1"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter(protocol, endpoint)))
    tracer = provider.get_tracer("shop", "1.2", attributes={"scope.tag": "s"})
    with tracer.start_as_current_span("GET /cart", kind=SpanKind.SERVER) as root:
        root.set_attributes({"http.response.status_code": 500, "ratio": 0.5, "ok": False, "list": ["a", "b"]})
        root.add_event("retry", {"attempt": 2})
        root.set_status(Status(StatusCode.ERROR, "out of stock"))
        links = [Link(root.get_span_context(), {"why": "test"})]
        with tracer.start_as_current_span("SELECT", kind=SpanKind.CLIENT, links=links):
            pass
    provider.shutdown()
    print(f"{root.get_span_context().trace_id:032x}")


main(*sys.argv[1:])
