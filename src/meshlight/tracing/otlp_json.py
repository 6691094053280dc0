"""OTLP JSON, both ways: ids in hexadecimal, 64-bit numbers as strings, camelCase names."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import orjson

from meshlight.tracing.decoding import MAX_ATTRIBUTE, MAX_TIME, Decoded, Malformed
from meshlight.tracing.model import (
    Attributes,
    Event,
    Link,
    LogRecord,
    Resource,
    Scope,
    Span,
    Value,
)  # fmt: skip
from meshlight.tracing.otlp import cut
from meshlight.tracing.rows import Row, log_row, row

Json = dict[str, Any]


def decode_traces(body: bytes) -> Decoded:
    """Spans of an ExportTraceServiceRequest in JSON. Raises Malformed."""
    decoded = Decoded()
    for resource, scope, item, where in _items(body, "resourceSpans", "scopeSpans", "spans"):
        span = _guard(where, lambda r=resource, s=scope, i=item: _read_span(i, r, s))  # type: ignore[misc]
        if (
            len(span.trace_id) != 16
            or not any(span.trace_id)
            or len(span.span_id) != 8
            or not any(span.span_id)
        ):
            decoded.reject(f"{where}: traceId must be 32 and spanId 16 hexadecimal digits, not all zero")
        elif (
            len(span.parent_id) not in (0, 8)
            or not 0 <= span.start <= MAX_TIME
            or not 0 <= span.end <= MAX_TIME
        ):
            decoded.reject(f"{where}: parentSpanId or a time is out of range")
        else:
            decoded.rows.append(_bounded(_guard(where, lambda s=span: row(s))))  # type: ignore[misc]
    return decoded


def decode_logs(body: bytes) -> Decoded:
    """Log records of an ExportLogsServiceRequest in JSON. Raises Malformed."""
    decoded = Decoded()
    for resource, scope, item, where in _items(body, "resourceLogs", "scopeLogs", "logRecords"):
        record = _guard(where, lambda r=resource, s=scope, i=item: _read_log(i, r, s))  # type: ignore[misc]
        sizes = len(record.trace_id), len(record.span_id)
        if sizes[0] not in (0, 16) or sizes[1] not in (0, 8) or not 0 <= record.time <= MAX_TIME:
            decoded.reject(f"{where}: traceId, spanId or timeUnixNano is out of range")
        else:
            decoded.rows.append(_bounded(_guard(where, lambda r=record: log_row(r))))  # type: ignore[misc]
    return decoded


def _bounded(of: Row) -> Row:
    if max(map(len, of.attributes), default=0) > MAX_ATTRIBUTE:
        return of._replace(attributes=cut(of.attributes))
    return of


def _guard(where: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Malformed:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise Malformed(f"{where}: {error}") from None


def _items(body: bytes, outer: str, middle: str, inner: str) -> Iterable[tuple[Resource, Scope, Json, str]]:
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"the body is no JSON: {error}") from None
    if not isinstance(request, dict):
        raise Malformed("the body must be a JSON object with resourceSpans or resourceLogs")
    for i, group in enumerate(_list(request, outer, "the body")):
        where = f"{outer}[{i}]"
        found = _guard(where, lambda g=group: _read_resource(g))  # type: ignore[misc]
        for j, part in enumerate(_list(group, middle, where)):
            place = f"{where}.{middle}[{j}]"
            scope = _guard(place, lambda p=part: _read_scope(p))  # type: ignore[misc]
            for k, item in enumerate(_list(part, inner, place)):
                if not isinstance(item, dict):
                    raise Malformed(f"{place}.{inner}[{k}] must be an object")
                yield found, scope, item, f"{place}.{inner}[{k}]"


def _list(holder: Any, name: str, where: str) -> list[Any]:
    if not isinstance(holder, dict):
        raise Malformed(f"{where} must be an object")
    found = holder.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise Malformed(f"{where}: {name} must be a list")
    return found


def read_value(value: Json | None) -> Value:
    """What an AnyValue in JSON holds. Raises ValueError."""
    if not value:
        return None
    ((kind, content),) = [(k, v) for k, v in value.items() if v is not None][:1] or [("none", None)]
    if kind == "stringValue":
        return str(content)
    if kind == "boolValue":
        return content if isinstance(content, bool) else str(content).lower() == "true"
    if kind == "intValue":
        return int(content)
    if kind == "doubleValue":
        return float(content)
    if kind == "bytesValue":
        return base64.b64decode(content)
    if kind == "arrayValue":
        return [read_value(item) for item in content.get("values") or []]
    if kind == "kvlistValue":
        return read_attributes(content.get("values"))
    raise ValueError(f"{kind} is no kind of AnyValue")


def read_attributes(found: Sequence[Json] | None) -> Attributes:
    """Attributes from a list of key and value. Raises ValueError, KeyError."""
    return {str(pair["key"]): read_value(pair.get("value")) for pair in found or []}


def _id(found: Json, name: str) -> bytes:
    written = found.get(name) or ""
    try:
        return binascii.unhexlify(written)
    except (binascii.Error, TypeError, ValueError):
        raise ValueError(f"{name} {str(written)[:64]!r} is not hexadecimal") from None


def _read_resource(group: Json) -> Resource:
    inner = group.get("resource") or {}
    attributes = read_attributes(inner.get("attributes"))
    return Resource(
        attributes, int(inner.get("droppedAttributesCount") or 0), str(group.get("schemaUrl") or "")
    )


def _read_scope(group: Json) -> Scope:
    inner = group.get("scope") or {}
    return Scope(
        str(inner.get("name") or ""),
        str(inner.get("version") or ""),
        read_attributes(inner.get("attributes")),
        int(inner.get("droppedAttributesCount") or 0),
        str(group.get("schemaUrl") or ""),
    )


_KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
_CODES = ("UNSET", "OK", "ERROR")


def _enum(value: Any, names: Sequence[str], prefix: str) -> int:
    """An enum as its number, or (as older writers have it) by its name."""
    if isinstance(value, str) and value.removeprefix(prefix) in names:
        return names.index(value.removeprefix(prefix))
    number = int(value or 0)
    if not 0 <= number < 1 << 31:
        raise ValueError(f"{number} is no value of {prefix}*")
    return number


def _read_span(found: Json, resource: Resource, scope: Scope) -> Span:
    status = found.get("status") or {}
    start = int(found.get("startTimeUnixNano") or 0)
    span = Span(
        _id(found, "traceId"),
        _id(found, "spanId"),
        _id(found, "parentSpanId"),
        str(found.get("name") or ""),
        start,
        int(found.get("endTimeUnixNano") or 0) or start,
        _enum(found.get("kind"), _KINDS, "SPAN_KIND_"),
        _enum(status.get("code"), _CODES, "STATUS_CODE_"),
        str(status.get("message") or ""),
        str(found.get("traceState") or ""),
        int(found.get("flags") or 0),
        read_attributes(found.get("attributes")),
        int(found.get("droppedAttributesCount") or 0),
        dropped_events=int(found.get("droppedEventsCount") or 0),
        dropped_links=int(found.get("droppedLinksCount") or 0),
        resource=resource,
        scope=scope,
    )
    if not any(span.parent_id):
        span.parent_id = b""
    for event in found.get("events") or []:
        dropped = int(event.get("droppedAttributesCount") or 0)
        time = int(event.get("timeUnixNano") or 0)
        span.events.append(
            Event(time, str(event.get("name") or ""), read_attributes(event.get("attributes")), dropped)
        )
    for link in found.get("links") or []:
        span.links.append(
            Link(
                _id(link, "traceId"),
                _id(link, "spanId"),
                str(link.get("traceState") or ""),
                read_attributes(link.get("attributes")),
                int(link.get("droppedAttributesCount") or 0),
                int(link.get("flags") or 0),
            )
        )
    return span


def _read_log(found: Json, resource: Resource, scope: Scope) -> LogRecord:
    observed = int(found.get("observedTimeUnixNano") or 0)
    time = int(found.get("timeUnixNano") or 0) or observed
    return LogRecord(
        time,
        observed or time,
        str(found.get("eventName") or ""),
        int(found.get("severityNumber") or 0),
        str(found.get("severityText") or ""),
        read_value(found.get("body")),
        read_attributes(found.get("attributes")),
        int(found.get("droppedAttributesCount") or 0),
        int(found.get("flags") or 0),
        _id(found, "traceId"),
        _id(found, "spanId"),
        resource,
        scope,
    )


def write_value(value: Value) -> Json:
    """An AnyValue in JSON."""
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {
            "doubleValue": value
            if value - value == 0
            else str(value).replace("inf", "Infinity").replace("nan", "NaN")
        }
    if isinstance(value, bytes):
        return {"bytesValue": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": write_attributes(value)}}
    if isinstance(value, (list, tuple)):
        return {"arrayValue": {"values": [write_value(item) for item in value]}}
    return {}


def write_attributes(attributes: Attributes) -> list[Json]:
    """Attributes as a list of key and value."""
    return [{"key": key, "value": write_value(value)} for key, value in attributes.items()]


def write_span(span: Span) -> Json:
    """A span as OTLP JSON; what has its default is left out."""
    written: Json = {"traceId": span.trace_id.hex(), "spanId": span.span_id.hex()}
    if span.trace_state:
        written["traceState"] = span.trace_state
    if span.parent_id:
        written["parentSpanId"] = span.parent_id.hex()
    if span.flags:
        written["flags"] = span.flags
    written |= {
        "name": span.name,
        "kind": span.kind,
        "startTimeUnixNano": str(span.start),
        "endTimeUnixNano": str(span.end),
    }
    optional: Json = {
        "attributes": write_attributes(span.attributes),
        "droppedAttributesCount": span.dropped_attributes,
        "events": [_write_event(event) for event in span.events],
        "droppedEventsCount": span.dropped_events,
        "links": [_write_link(link) for link in span.links],
        "droppedLinksCount": span.dropped_links,
    }
    written |= _without(optional)
    written["status"] = _without({"message": span.status_message, "code": span.status_code})
    return written


def _write_event(event: Event) -> Json:
    return _without(
        {
            "timeUnixNano": str(event.time),
            "name": event.name,
            "attributes": write_attributes(event.attributes),
            "droppedAttributesCount": event.dropped_attributes,
        }
    )


def _write_link(link: Link) -> Json:
    return _without(
        {
            "traceId": link.trace_id.hex(),
            "spanId": link.span_id.hex(),
            "traceState": link.trace_state,
            "attributes": write_attributes(link.attributes),
            "droppedAttributesCount": link.dropped_attributes,
            "flags": link.flags,
        }
    )


def _without(found: Json) -> Json:
    return {key: value for key, value in found.items() if value not in (None, "", 0, [], {})}


def _grouped(items: Sequence[Any], outer: str, middle: str, inner: str, write: Callable[[Any], Json]) -> Json:
    groups = []
    ordered = sorted(items, key=lambda i: (id(i.resource), id(i.scope)))
    for _, of_resource in groupby(ordered, key=lambda i: id(i.resource)):
        members = list(of_resource)
        resource: Resource = members[0].resource
        scopes = []
        for _, of_scope in groupby(members, key=lambda i: id(i.scope)):
            same = list(of_scope)
            scope: Scope = same[0].scope
            written = _without(
                {
                    "name": scope.name,
                    "version": scope.version,
                    "attributes": write_attributes(scope.attributes),
                    "droppedAttributesCount": scope.dropped_attributes,
                }
            )
            part: Json = {"scope": written, inner: [write(item) for item in same]}
            scopes.append(part | _without({"schemaUrl": scope.schema_url}))
        head = {"attributes": write_attributes(resource.attributes)}
        head |= _without({"droppedAttributesCount": resource.dropped_attributes})
        group: Json = {"resource": head, middle: scopes}
        groups.append(group | _without({"schemaUrl": resource.schema_url}))
    return {outer: groups}


def write_spans(spans: Sequence[Span]) -> Json:
    """A TracesData of spans."""
    return _grouped(spans, "resourceSpans", "scopeSpans", "spans", write_span)


def write_log(record: LogRecord) -> Json:
    """A log record as OTLP JSON."""
    written: Json = {"timeUnixNano": str(record.time), "observedTimeUnixNano": str(record.observed)}
    return written | _without(
        {
            "severityNumber": record.severity,
            "severityText": record.severity_text,
            "body": write_value(record.body),
            "attributes": write_attributes(record.attributes),
            "droppedAttributesCount": record.dropped_attributes,
            "flags": record.flags,
            "traceId": record.trace_id.hex(),
            "spanId": record.span_id.hex(),
            "eventName": record.name,
        }
    )


def write_logs(records: Sequence[LogRecord]) -> Json:
    """A LogsData of log records."""
    return _grouped(records, "resourceLogs", "scopeLogs", "logRecords", write_log)
