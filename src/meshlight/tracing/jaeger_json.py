"""Jaeger's JSON of traces, as its UI and its exports have it, both ways."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import orjson

from meshlight.tracing import jaeger_tags
from meshlight.tracing.decoding import MAX_TIME, Decoded, Malformed
from meshlight.tracing.model import Attributes, Span, Trace, Value
from meshlight.tracing.rows import row

Json = dict[str, Any]


def _tag(key: str, value: Value) -> Json:
    kind, plain = jaeger_tags.typed(value)
    if kind == "binary":
        plain = base64.b64encode(plain).decode()
    return {"key": key, "type": kind, "value": plain}


def tags(attributes: Attributes) -> list[Json]:
    """Attributes as typed tags."""
    return [_tag(key, value) for key, value in attributes.items()]


def write_trace(trace: Trace, warnings: Sequence[str] = ()) -> Json:
    """A trace, its spans in order of their start."""
    processes: dict[str, Json] = {}
    numbers: dict[bytes, str] = {}
    spans = []
    for span in sorted(trace, key=lambda s: s.start):
        process = _process(span)
        key = orjson.dumps(process)
        if (number := numbers.get(key)) is None:
            number = numbers[key] = f"p{len(numbers) + 1}"
            processes[number] = process
        spans.append(_write_span(span, number))
    identity = trace[0].trace_id.hex() if trace else ""
    return {"traceID": identity, "spans": spans, "processes": processes, "warnings": list(warnings) or None}


def _process(span: Span) -> Json:
    rest = {key: value for key, value in span.resource.attributes.items() if key != "service.name"}
    return {"serviceName": span.service, "tags": tags(rest)}


def _write_span(span: Span, process: str) -> Json:
    return {
        "traceID": span.trace_id.hex(),
        "spanID": span.span_id.hex(),
        "flags": 1 if span.flags & 1 or not span.flags else span.flags & 0xFF,
        "operationName": span.name,
        "references": [
            {"refType": kind, "traceID": trace.hex(), "spanID": identity.hex()}
            for kind, trace, identity in jaeger_tags.references(span)
        ],
        "startTime": span.start // 1000,
        "duration": span.duration // 1000,
        "tags": tags(jaeger_tags.to_tags(span)),
        "logs": [
            {"timestamp": event.time // 1000, "fields": tags(jaeger_tags.log_fields(event))}
            for event in span.events
        ],
        "processID": process,
        "warnings": span.warnings or None,
    }


def answer(data: Any, total: int = 0, errors: Sequence[Json] = ()) -> Json:
    """The envelope of every answer of Jaeger's query API."""
    return {"data": data, "total": total, "limit": 0, "offset": 0, "errors": list(errors) or None}


def decode(body: bytes) -> Decoded:
    """Spans of a file as the UI exports it: an answer, a list of traces, or one trace. Raises Malformed."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"the body is no JSON: {error}") from None
    if isinstance(found, dict) and "data" in found:
        found = found["data"]
    traces = found if isinstance(found, list) else [found]
    decoded = Decoded()
    for index, trace in enumerate(traces):
        try:
            for span in trace["spans"]:
                decoded.rows.append(row(_read_span(span, trace.get("processes") or {})))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise Malformed(f"trace {index} is not as Jaeger writes it: {error!r}") from None
    return decoded


def _read_id(text: str, size: int) -> bytes:
    made = bytes.fromhex(text.zfill(size * 2))
    if len(made) != size or not any(made):
        raise ValueError(f"id {text!r} must be {size * 2} hexadecimal digits, not all zero")
    return made


def _read_tags(found: Sequence[Json] | None) -> Attributes:
    made: Attributes = {}
    for tag in found or []:
        value = tag["value"]
        kind = tag.get("type")
        if kind == "binary":
            value = base64.b64decode(value)
        elif kind in ("int64", "long"):
            value = int(value)
        elif kind in ("float64", "double"):
            value = float(value)
        elif kind == "bool":
            value = value is True or value == "true"
        else:
            value = str(value)
        made[str(tag["key"])] = value
    return made


def _read_span(found: Json, processes: Json) -> Span:
    start = int(found["startTime"]) * 1000
    end = start + int(found["duration"]) * 1000
    if not 0 <= start <= end <= MAX_TIME:
        raise ValueError(f"startTime {found['startTime']} or duration is out of range")
    span = Span(
        _read_id(found["traceID"], 16),
        _read_id(found["spanID"], 8),
        b"",
        str(found.get("operationName") or ""),
        start,
        end,
        flags=int(found.get("flags") or 0),
    )
    process = found.get("process") or processes.get(found.get("processID") or "") or {}
    of = {"service.name": str(process.get("serviceName") or "unknown_service")} | _read_tags(
        process.get("tags")
    )
    jaeger_tags.from_tags(span, _read_tags(found.get("tags")), of)
    references = [
        (str(r["refType"]), _read_id(r["traceID"], 16), _read_id(r["spanID"], 8))
        for r in found.get("references") or []
    ]
    if found.get("parentSpanID"):
        references.append(("CHILD_OF", span.trace_id, _read_id(found["parentSpanID"], 8)))
    jaeger_tags.set_references(span, references)
    for log in found.get("logs") or []:
        span.events.append(jaeger_tags.event_of(int(log["timestamp"]) * 1000, _read_tags(log.get("fields"))))
    return span
