"""OTLP protobuf: requests to rows, rows and spans back to OTLP.

The hot path: messages are read with attributes as opaque bytes (proto/otlp.proto), about 3 µs a span.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from google.protobuf.message import DecodeError

from meshlight.proto import otlp_pb2 as otlp
from meshlight.tracing.decoding import MAX_ATTRIBUTE, MAX_TIME, Decoded, Malformed
from meshlight.tracing.envoy_flows import EVENT, is_flow, normal
from meshlight.tracing.model import NO_SPAN, NO_TRACE, Span
from meshlight.tracing.rows import Form, Origin, Row, attributes_of, key_value, pairs, row, split, value_of

TRUNCATED = "meshlight.truncated"
"""Tag on a span whose attributes were cut."""


def decode_traces(body: bytes) -> Decoded:
    """Spans of an ExportTraceServiceRequest. Raises Malformed."""
    try:
        request: Any = otlp.TraceRequest.FromString(body)
    except DecodeError as error:
        raise Malformed(f"the body is no ExportTraceServiceRequest: {error}") from None
    decoded = Decoded()
    append = decoded.rows.append
    forms: dict[tuple[Any, ...], Form] = {}
    bounded = len(body) <= MAX_ATTRIBUTE
    for group in request.resource_spans:
        resource = _resource(group)
        for inner in group.scope_spans:
            origin = Origin(resource, _scope(inner))
            for span in list(inner.spans):
                trace_id, span_id = span.trace_id, span.span_id
                if len(trace_id) != 16 or len(span_id) != 8 or trace_id == NO_TRACE or span_id == NO_SPAN:
                    decoded.reject(_wrong_id(trace_id, span_id))
                    continue
                parent = span.parent_span_id or NO_SPAN
                start, end = span.start, span.end
                if len(parent) != 8 or start > MAX_TIME or end > MAX_TIME:
                    decoded.reject(f"span {span_id.hex()}: the parent's id or a time is out of range")
                    continue
                attributes = span.attributes[:]
                if not bounded and max(map(len, attributes), default=0) > MAX_ATTRIBUTE:
                    attributes = cut(attributes)
                key = span.kind, span.status, span.flags, span.trace_state, span.dropped_attributes
                form = forms.get(key)
                if form is None:
                    form = forms[key] = Form(*key)
                extra = b""
                if span.events or span.links or span.dropped_events or span.dropped_links:
                    extra = _extra(span)
                append(
                    Row(
                        trace_id,
                        span_id,
                        parent,
                        start,
                        end or start,
                        span.name,
                        form,
                        origin,
                        attributes,
                        extra,
                    )
                )
    _check(decoded.rows)
    return decoded


_KNOWN: set[bytes] = set()
"""Attributes found to be well-formed, so that what comes again is not looked at again; bounded."""


def _check(rows: Sequence[Row]) -> None:
    """What the opaque fields must hold, looked at once for each distinct value."""
    for origin in {of.origin for of in rows}:
        try:
            otlp.Resource.FromString(otlp.ResourceSpans.FromString(origin.resource).resource)
            otlp.Scope.FromString(otlp.ScopeSpans.FromString(origin.scope).scope)
        except DecodeError:
            raise Malformed("a resource or scope is not the message that OTLP says") from None
    for form in {of.form for of in rows}:
        try:
            otlp.Status.FromString(form.status)
        except DecodeError:
            raise Malformed("a status is not the message that OTLP says") from None
    new = set().union(*[of.attributes for of in rows]) - _KNOWN
    for pair in new:
        try:
            value_of(split(pair)[1])
        except (DecodeError, IndexError):
            raise Malformed("an attribute is not the KeyValue that OTLP says") from None
    if len(_KNOWN) > 50_000:
        _KNOWN.clear()
    _KNOWN.update(pair for pair in new if len(pair) < 256)


def _resource(group: Any) -> bytes:
    return otlp.ResourceSpans(resource=group.resource, schema_url=group.schema_url).SerializeToString()


def _scope(group: Any) -> bytes:
    return otlp.ScopeSpans(scope=group.scope, schema_url=group.schema_url).SerializeToString()


def _wrong_id(trace_id: bytes, span_id: bytes) -> str:
    if len(trace_id) != 16 or trace_id == NO_TRACE:
        return f"trace id {trace_id.hex() or 'missing'}: must be 16 bytes, not all zero"
    return f"span id {span_id.hex() or 'missing'}: must be 8 bytes, not all zero"


def _extra(span: Any) -> bytes:
    made = otlp.Span(
        events=span.events[:],
        dropped_events=span.dropped_events,
        links=span.links[:],
        dropped_links=span.dropped_links,
    ).SerializeToString()
    try:
        otlp.SpanExtra.FromString(made)
    except DecodeError:
        raise Malformed(
            f"span {span.span_id.hex()}: an event or link is not the message that OTLP says"
        ) from None
    return made


def cut(attributes: Sequence[bytes]) -> list[bytes]:
    """Attributes within their bound: longer texts are cut, and a tag names them."""
    kept, names = [], []
    for pair in attributes:
        if len(pair) <= MAX_ATTRIBUTE:
            kept.append(pair)
            continue
        key, encoded = split(pair)
        name = key.decode("utf-8", "replace")[:256]
        value = value_of(encoded)
        names.append(name)
        if isinstance(value, (str, bytes)):
            kept.append(key_value(name, value[: MAX_ATTRIBUTE // 4]))
        else:
            kept.append(key_value(name, f"(a value of {len(encoded)} bytes was left out)"))
    return [*kept, key_value(TRUNCATED, ", ".join(names)[:1024])]


def decode_logs(body: bytes) -> Decoded:
    """Log records of an ExportLogsServiceRequest. Raises Malformed."""
    try:
        request: Any = otlp.LogsRequest.FromString(body)
    except DecodeError as error:
        raise Malformed(f"the body is no ExportLogsServiceRequest: {error}") from None
    decoded = Decoded()
    for group in request.resource_logs:
        resource = _resource(group)
        for inner in group.scope_logs:
            origin = Origin(resource, _scope(inner))
            for record in inner.records:
                trace_id, span_id = record.trace_id or NO_TRACE, record.span_id or NO_SPAN
                time = record.time or record.observed
                if len(trace_id) != 16 or len(span_id) != 8 or time > MAX_TIME or record.observed > MAX_TIME:
                    decoded.reject("a log record's trace id, span id or time is out of range")
                    continue
                attributes = record.attributes[:]
                if max(map(len, attributes), default=0) > MAX_ATTRIBUTE:
                    attributes = cut(attributes)
                form = Form(
                    record.severity_number, record.severity_text, record.flags, b"", record.dropped_attributes
                )
                observed = record.observed or time
                name = record.event_name
                if not name and is_flow(known := attributes_of(attributes)):
                    name, attributes = EVENT.encode(), pairs(normal(known))
                extra = record.body[: MAX_ATTRIBUTE * 16]
                try:
                    value_of(extra)
                except DecodeError:
                    raise Malformed("a log record's body is no AnyValue") from None
                decoded.rows.append(
                    Row(trace_id, span_id, NO_SPAN, time, observed, name, form, origin, attributes, extra)
                )
    _check_logs(decoded.rows)
    return decoded


def _check_logs(rows: Sequence[Row]) -> None:
    _check([of._replace(form=of.form._replace(status=b"")) for of in rows])


def _span(of: Row) -> Any:
    message = otlp.Span.FromString(of.extra)
    message.trace_id, message.span_id, message.name = of.trace_id, of.span_id, of.name
    if of.parent != NO_SPAN:
        message.parent_span_id = of.parent
    message.start, message.end = max(0, of.start), max(0, of.end)
    message.kind, message.status, message.flags = of.form.kind, of.form.status, of.form.flags
    message.trace_state, message.dropped_attributes = of.form.trace_state, of.form.dropped_attributes
    message.attributes.extend(of.attributes)
    return message


def encode_rows(rows: Iterable[Row]) -> bytes:
    """A TracesData (or ExportTraceServiceRequest) of rows, grouped by origin."""
    request = otlp.TraceRequest()
    ordered = sorted(rows, key=lambda of: (of.origin.resource, of.origin.scope))
    for resource, group in groupby(ordered, key=lambda of: of.origin.resource):
        outer = request.resource_spans.add()
        outer.MergeFromString(resource)
        for scope, inner in groupby(group, key=lambda of: of.origin.scope):
            spans = outer.scope_spans.add()
            spans.MergeFromString(scope)
            spans.spans.extend(_span(of) for of in inner)
    return request.SerializeToString()


def encode_spans(spans: Iterable[Span]) -> bytes:
    """A TracesData of spans."""
    return encode_rows(row(span) for span in spans)


def encode_logs(rows: Iterable[Row]) -> bytes:
    """An ExportLogsServiceRequest of log rows, grouped by origin."""
    request = otlp.LogsRequest()
    ordered = sorted(rows, key=lambda of: (of.origin.resource, of.origin.scope))
    for resource, group in groupby(ordered, key=lambda of: of.origin.resource):
        outer = request.resource_logs.add()
        outer.MergeFromString(resource)
        for scope, inner in groupby(group, key=lambda of: of.origin.scope):
            logs = outer.scope_logs.add()
            logs.MergeFromString(scope)
            for of in inner:
                logs.records.add(
                    time=of.start,
                    observed=of.end,
                    severity_number=of.form.kind,
                    severity_text=of.form.status,
                    body=of.extra,
                    attributes=of.attributes,
                    dropped_attributes=of.form.dropped_attributes,
                    flags=of.form.flags,
                    trace_id=b"" if of.trace_id == NO_TRACE else of.trace_id,
                    span_id=b"" if of.span_id == NO_SPAN else of.span_id,
                    event_name=of.name,
                )
    return request.SerializeToString()


def response(decoded: Decoded) -> bytes:
    """An ExportTraceServiceResponse: empty, or with what was rejected."""
    if not decoded.rejected:
        return b""
    partial = otlp.PartialSuccess(rejected=decoded.rejected, message=decoded.message)
    return otlp.ExportResponse(partial_success=partial).SerializeToString()
