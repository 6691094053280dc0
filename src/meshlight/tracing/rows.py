"""Rows: the form in which decoders hand records to the store, and the encoding of their attributes.

A row keeps each attribute as the bytes of an OTLP `KeyValue`, so that the store interns it with one
dictionary lookup and OTLP's own requests are never taken apart. Every other protocol's decoder makes
the same bytes (`key_value`, deterministic), so what goes in by any protocol is equal inside.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from meshlight.proto import otlp_pb2 as otlp
from meshlight.tracing.model import Attributes, Event, Link, LogRecord, Resource, Scope, Span, Value


class Form(NamedTuple):
    """What few distinct values describe: of a span its kind, status, flags; of a log its severity."""

    kind: int = 0
    status: bytes = b""
    """OTLP Status, encoded; of a log record its severity text."""
    flags: int = 0
    trace_state: bytes = b""
    dropped_attributes: int = 0


class Origin(NamedTuple):
    """Who made a record: OTLP's resource and scope with their schema URLs, each encoded as the
    `ResourceSpans`/`ScopeSpans` that holds nothing else."""

    resource: bytes = b""
    scope: bytes = b""


class Row(NamedTuple):
    """One record. `parent` is 8 bytes, zero for none; `start` and `end` are ns; `extra` is an encoded
    SpanExtra or the encoded body of a log record; `attributes` are encoded KeyValues."""

    trace_id: bytes
    span_id: bytes
    parent: bytes
    start: int
    end: int
    name: bytes
    form: Form
    origin: Origin
    attributes: Sequence[bytes]
    extra: bytes = b""


def varint(number: int) -> bytes:
    """A protobuf varint of a number of at most 64 bits; negative ones take ten bytes."""
    number &= 0xFFFFFFFFFFFFFFFF
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def read_varint(encoded: bytes, position: int) -> tuple[int, int]:
    """The varint at a position and where it ends. Raises IndexError when cut off."""
    shift = result = 0
    while True:
        byte = encoded[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7


def any_value(value: Value) -> bytes:
    """An OTLP AnyValue. Raises TypeError for what OTLP cannot hold."""
    if isinstance(value, str):
        encoded = value.encode("utf-8", "replace")
        return b"\x0a" + varint(len(encoded)) + encoded
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            return any_value(str(value))
        return b"\x18" + varint(value)
    if isinstance(value, float):
        return b"\x21" + struct.pack("<d", value)
    if value is None:
        return b""
    if isinstance(value, bytes):
        return b"\x3a" + varint(len(value)) + value
    if isinstance(value, Mapping):
        body = b"".join(_field(1, key_value(str(k), v)) for k, v in value.items())
        return _field(6, body)
    if isinstance(value, Sequence):
        return _field(5, b"".join(_field(1, any_value(item)) for item in value))
    raise TypeError(f"an attribute's value cannot be a {type(value).__name__}")


def _field(number: int, encoded: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(encoded)) + encoded


def key_value(key: str, value: Value) -> bytes:
    """An OTLP KeyValue, always the same bytes for the same attribute."""
    if isinstance(value, str):
        return _text_pair(key, value)
    name = key.encode("utf-8", "replace")
    return b"\x0a" + varint(len(name)) + name + _field(2, any_value(value))


@lru_cache(maxsize=16384)
def _text_pair(key: str, value: str) -> bytes:
    name = key.encode("utf-8", "replace")
    return b"\x0a" + varint(len(name)) + name + _field(2, any_value(value))


def split(pair: bytes) -> tuple[bytes, bytes]:
    """Key and AnyValue bytes of an encoded KeyValue, whatever order its maker wrote them in."""
    try:
        if pair[0] == 0x0A:
            # Nearly all are short: lengths of one byte.
            end, size = 2 + pair[1], len(pair)
            if end + 1 < size and pair[1] < 0x80 and pair[end] == 0x12:
                value = end + 2
                if pair[end + 1] < 0x80 and value + pair[end + 1] == size:
                    return pair[2:end], pair[value:]
            length, start = read_varint(pair, 1)
            key = pair[start : start + length]
            rest = start + length
            if rest == len(pair):
                return key, b""
            if pair[rest] == 0x12:
                length, start = read_varint(pair, rest + 1)
                if start + length == len(pair):
                    return key, pair[start:]
    except IndexError:
        pass
    message: Any = otlp.KeyValue.FromString(pair)
    return message.key.encode(), message.value.SerializeToString(deterministic=True)


def join(key: bytes, encoded: bytes) -> bytes:
    """The KeyValue of a key and AnyValue bytes."""
    return b"\x0a" + varint(len(key)) + key + _field(2, encoded)


def value_of(encoded: bytes) -> Value:
    """What an encoded AnyValue holds."""
    if not encoded:
        return None
    if encoded[0] == 0x0A:
        length, start = read_varint(encoded, 1)
        if start + length == len(encoded):
            return encoded[start:].decode("utf-8", "replace")
    return from_any(otlp.AnyValue.FromString(encoded))


def from_any(message: Any) -> Value:
    """What an AnyValue message holds."""
    which = message.WhichOneof("value")
    if which is None:
        return None
    if which == "array_value":
        return [from_any(item) for item in message.array_value.values]
    if which == "list_value":
        return {pair.key: from_any(pair.value) for pair in message.list_value.values}
    return getattr(message, which)


def pairs(attributes: Attributes) -> list[bytes]:
    """Encoded attributes."""
    return [key_value(key, value) for key, value in attributes.items()]


def attributes_of(encoded: Sequence[bytes]) -> Attributes:
    """Decoded attributes; of a key that comes twice the last one counts."""
    found: Attributes = {}
    for pair in encoded:
        key, value = split(pair)
        found[key.decode("utf-8", "replace")] = value_of(value)
    return found


def origin(resource: Resource, scope: Scope) -> Origin:
    """The origin of a resource and scope."""
    made = b"".join(_field(1, pair) for pair in pairs(resource.attributes))
    if resource.dropped_attributes:
        made += b"\x10" + varint(resource.dropped_attributes)
    encoded = otlp.ResourceSpans(resource=made, schema_url=resource.schema_url).SerializeToString()
    name = otlp.Scope(name=scope.name, version=scope.version, dropped_attributes=scope.dropped_attributes)
    inner = name.SerializeToString() + b"".join(_field(3, pair) for pair in pairs(scope.attributes))
    return Origin(encoded, otlp.ScopeSpans(scope=inner, schema_url=scope.schema_url).SerializeToString())


@lru_cache(maxsize=4096)
def resource_of(encoded: bytes) -> Resource:
    """The resource of an origin; shared, so never changed in place."""
    outer: Any = otlp.ResourceSpans.FromString(encoded)
    inner: Any = otlp.Resource.FromString(outer.resource)
    return Resource(
        {pair.key: from_any(pair.value) for pair in inner.attributes},
        inner.dropped_attributes,
        outer.schema_url,
    )


@lru_cache(maxsize=4096)
def scope_of(encoded: bytes) -> Scope:
    """The scope of an origin; shared, so never changed in place."""
    outer: Any = otlp.ScopeSpans.FromString(encoded)
    inner: Any = otlp.Scope.FromString(outer.scope)
    found = {pair.key: from_any(pair.value) for pair in inner.attributes}
    return Scope(inner.name, inner.version, found, inner.dropped_attributes, outer.schema_url)


def _message(attributes: Attributes) -> list[Any]:
    return [otlp.KeyValue.FromString(pair) for pair in pairs(attributes)]


def extra_of(span: Span) -> bytes:
    """Events and links, encoded; empty when there are none."""
    if not (span.events or span.links or span.dropped_events or span.dropped_links):
        return b""
    message = otlp.SpanExtra(dropped_events=span.dropped_events, dropped_links=span.dropped_links)
    for event in span.events:
        message.events.append(
            otlp.Event(
                time=event.time,
                name=event.name,
                attributes=_message(event.attributes),
                dropped_attributes=event.dropped_attributes,
            )
        )
    for link in span.links:
        message.links.append(
            otlp.Link(
                trace_id=link.trace_id,
                span_id=link.span_id,
                trace_state=link.trace_state,
                attributes=_message(link.attributes),
                dropped_attributes=link.dropped_attributes,
                flags=link.flags,
            )
        )
    return message.SerializeToString(deterministic=True)


def status_of(code: int, message: str) -> bytes:
    """An encoded OTLP Status; empty when unset."""
    return otlp.Status(code=code, message=message).SerializeToString() if code or message else b""


def row(span: Span) -> Row:
    """A span as a row."""
    status = status_of(span.status_code, span.status_message)
    form = Form(span.kind, status, span.flags, span.trace_state.encode(), span.dropped_attributes)
    return Row(
        span.trace_id,
        span.span_id,
        span.parent_id or b"\0" * 8,
        span.start,
        span.end,
        span.name.encode("utf-8", "replace"),
        form,
        origin(span.resource, span.scope),
        pairs(span.attributes),
        extra_of(span),
    )


def span(of: Row) -> Span:
    """A row as a span."""
    status: Any = otlp.Status.FromString(of.form.status)
    made = Span(
        of.trace_id,
        of.span_id,
        b"" if of.parent == b"\0" * 8 else of.parent,
        of.name.decode("utf-8", "replace"),
        of.start,
        of.end,
        of.form.kind,
        status.code,
        status.message,
        of.form.trace_state.decode("utf-8", "replace"),
        of.form.flags,
        attributes_of(of.attributes),
        of.form.dropped_attributes,
        resource=resource_of(of.origin.resource),
        scope=scope_of(of.origin.scope),
    )
    if of.extra:
        extra: Any = otlp.SpanExtra.FromString(of.extra)
        made.dropped_events = extra.dropped_events
        made.dropped_links = extra.dropped_links
        for e in extra.events:
            found = {pair.key: from_any(pair.value) for pair in e.attributes}
            made.events.append(Event(e.time, e.name, found, e.dropped_attributes))
        for k in extra.links:
            found = {pair.key: from_any(pair.value) for pair in k.attributes}
            made.links.append(Link(k.trace_id, k.span_id, k.trace_state, found, k.dropped_attributes, k.flags))
    return made


def log_row(record: LogRecord) -> Row:
    """A log record as a row: `start` its time, `end` when it was observed, `name` its event."""
    form = Form(record.severity, record.severity_text.encode(), record.flags, b"", record.dropped_attributes)
    return Row(
        record.trace_id or b"\0" * 16,
        record.span_id or b"\0" * 8,
        b"\0" * 8,
        record.time,
        record.observed,
        record.name.encode("utf-8", "replace"),
        form,
        origin(record.resource, record.scope),
        pairs(record.attributes),
        any_value(record.body),
    )


def log_record(of: Row) -> LogRecord:
    """A row as a log record."""
    return LogRecord(
        of.start,
        of.end,
        of.name.decode("utf-8", "replace"),
        of.form.kind,
        of.form.status.decode("utf-8", "replace"),
        value_of(of.extra),
        attributes_of(of.attributes),
        of.form.dropped_attributes,
        of.form.flags,
        b"" if of.trace_id == b"\0" * 16 else of.trace_id,
        b"" if of.span_id == b"\0" * 8 else of.span_id,
        resource_of(of.origin.resource),
        scope_of(of.origin.scope),
    )
