"""Jaeger's api_v2 protobuf: batches to rows, and spans back for its query service."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.message import DecodeError

from meshlight.proto import jaeger_pb2 as jaeger
from meshlight.tracing import jaeger_tags
from meshlight.tracing.decoding import MAX_ATTRIBUTE, MAX_TIME, Decoded, Malformed
from meshlight.tracing.model import Attributes, Span, Value
from meshlight.tracing.otlp import cut
from meshlight.tracing.rows import row


def decode_batch(body: bytes) -> Decoded:
    """Spans of a PostSpansRequest. Raises Malformed."""
    try:
        request: Any = jaeger.PostSpansRequest.FromString(body)
    except DecodeError as error:
        raise Malformed(f"the body is no PostSpansRequest: {error}") from None
    decoded = Decoded()
    shared = process_attributes(request.batch.process)
    for index, found in enumerate(request.batch.spans):
        try:
            own = process_attributes(found.process) if found.HasField("process") else shared
            made = row(read_span(found, own))
        except (ValueError, OverflowError) as error:
            decoded.reject(f"span {index}: {error}")
            continue
        if max(map(len, made.attributes), default=0) > MAX_ATTRIBUTE:
            made = made._replace(attributes=cut(made.attributes))
        decoded.rows.append(made)
    return decoded


def process_attributes(process: Any) -> Attributes:
    """A process as a resource's attributes."""
    return {"service.name": process.service_name or "unknown_service"} | _tags(process.tags)


def _tags(found: Iterable[Any]) -> Attributes:
    return {tag.key: _value(tag) for tag in found}


def _value(tag: Any) -> Value:
    return (tag.v_str, tag.v_bool, tag.v_int64, tag.v_float64, tag.v_binary)[min(tag.v_type, 4)]


def _identity(found: bytes, size: int, name: str) -> bytes:
    if not found or len(found) > size or not any(found):
        raise ValueError(f"{name} must be {size} bytes, not all zero")
    return found.rjust(size, b"\0")


def _nanoseconds(moment: Any) -> int:
    return int(moment.seconds) * 10**9 + int(moment.nanos)


def read_span(found: Any, process: Attributes) -> Span:
    """A Jaeger span. Raises ValueError when an id or time is out of range."""
    start = _nanoseconds(found.start_time)
    end = start + _nanoseconds(found.duration)
    if not 0 <= start <= MAX_TIME or not start <= end <= MAX_TIME:
        raise ValueError("start_time or duration is out of range")
    trace = _identity(found.trace_id, 16, "trace_id")
    span = Span(
        trace, _identity(found.span_id, 8, "span_id"), b"", found.operation_name, start, end, flags=found.flags
    )
    jaeger_tags.from_tags(span, _tags(found.tags), process)
    references = []
    for reference in found.references:
        kind = "CHILD_OF" if reference.ref_type == 0 else "FOLLOWS_FROM"
        of = _identity(reference.trace_id, 16, "reference's trace_id") if reference.trace_id else trace
        references.append((kind, of, _identity(reference.span_id, 8, "reference's span_id")))
    jaeger_tags.set_references(span, references)
    for log in found.logs:
        span.events.append(jaeger_tags.event_of(_nanoseconds(log.timestamp), _tags(log.fields)))
    return span


def _write_tags(target: Any, attributes: Attributes) -> None:
    fields = {
        "string": "v_str",
        "bool": "v_bool",
        "int64": "v_int64",
        "float64": "v_float64",
        "binary": "v_binary",
    }
    for key, value in attributes.items():
        kind, plain = jaeger_tags.typed(value)
        target.add(key=key, v_type=list(fields).index(kind), **{fields[kind]: plain})


def write_span(span: Span) -> Any:
    """A span as `jaeger.Span`, with its process."""
    made: Any = jaeger.Span(
        trace_id=span.trace_id,
        span_id=span.span_id,
        operation_name=span.name,
        flags=span.flags,
        warnings=span.warnings,
    )
    _moment(made.start_time, span.start)
    _moment(made.duration, span.duration)
    for kind, trace, identity in jaeger_tags.references(span):
        made.references.add(trace_id=trace, span_id=identity, ref_type=0 if kind == "CHILD_OF" else 1)
    _write_tags(made.tags, jaeger_tags.to_tags(span))
    for event in span.events:
        log = made.logs.add()
        _moment(log.timestamp, event.time)
        _write_tags(log.fields, jaeger_tags.log_fields(event))
    made.process.service_name = span.service
    rest = {key: value for key, value in span.resource.attributes.items() if key != "service.name"}
    _write_tags(made.process.tags, rest)
    return made


def _moment(target: Any, nanoseconds: int) -> None:
    target.seconds, target.nanos = divmod(nanoseconds, 10**9)
