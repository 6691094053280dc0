"""Jaeger's Thrift batches over HTTP: a reader of Thrift's binary protocol, bounded, and the fields of
`jaeger.thrift` by number.

Structs become dictionaries of field number to value; nothing is generated. The compact protocol, which
some clients send to the agent's UDP port, has no place here.
"""

from __future__ import annotations

import struct
from typing import Any

from meshlight.tracing import jaeger_tags
from meshlight.tracing.decoding import MAX_ATTRIBUTE, MAX_TIME, Decoded, Malformed
from meshlight.tracing.model import Attributes, Span, Value
from meshlight.tracing.otlp import cut
from meshlight.tracing.rows import row

STOP, BOOL, BYTE, DOUBLE, I16, I32, I64, STRING, STRUCT, MAP, SET, LIST = (
    0,
    2,
    3,
    4,
    6,
    8,
    10,
    11,
    12,
    13,
    14,
    15,
)
_FIXED = {
    kind: struct.Struct(form)
    for kind, form in ((BYTE, ">b"), (DOUBLE, ">d"), (I16, ">h"), (I32, ">i"), (I64, ">q"))
}
MAX_DEPTH = 16
Struct = dict[int, Any]


class _Reader:
    """Reads one value after another; every length is checked against what is left."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def _take(self, count: int) -> bytes:
        if count < 0 or count > len(self._content) - self._at:
            raise Malformed(f"the batch ends within a value at byte {self._at}")
        taken = self._content[self._at : self._at + count]
        self._at += count
        return taken

    def _number(self, kind: int) -> Any:
        form = _FIXED[kind]
        return form.unpack(self._take(form.size))[0]

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of a Thrift type. Raises Malformed."""
        if depth > MAX_DEPTH:
            raise Malformed("the batch is nested too deep")
        if kind == BOOL:
            return self._take(1) != b"\0"
        if kind in _FIXED:
            return self._number(kind)
        if kind == STRING:
            return self._take(self._number(I32))
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind in (LIST, SET):
            of, count = self._take(1)[0], self._number(I32)
            self._bound(count)
            return [self.value(of, depth + 1) for _ in range(count)]
        if kind == MAP:
            keys, values, count = self._take(1)[0], self._take(1)[0], self._number(I32)
            self._bound(count)
            return [(self.value(keys, depth + 1), self.value(values, depth + 1)) for _ in range(count)]
        raise Malformed(f"Thrift type {kind} at byte {self._at} is unknown")

    def _bound(self, count: int) -> None:
        # Every element takes a byte at least.
        if count < 0 or count > len(self._content) - self._at:
            raise Malformed(f"a list of {count} elements at byte {self._at} is longer than the batch")

    def struct(self, depth: int = 0) -> Struct:
        """A struct's fields by number. Raises Malformed."""
        fields: Struct = {}
        while (kind := self._take(1)[0]) != STOP:
            number = self._number(I16)
            fields[number] = self.value(kind, depth)
        return fields


def decode_batch(body: bytes) -> Decoded:
    """Spans of a `jaeger.thrift` Batch in the binary protocol. Raises Malformed."""
    batch = _Reader(body).struct()
    decoded = Decoded()
    try:
        process = _process(batch[1])
        spans = batch[2]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"the body is no jaeger.thrift Batch: {error!r}") from None
    if not isinstance(spans, list):
        raise Malformed("the body is no jaeger.thrift Batch: its spans are no list")
    for index, found in enumerate(spans):
        try:
            made = row(_span(found, process))
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            struct.error,
            IndexError,
        ) as error:
            decoded.reject(f"span {index}: {error!r}")
            continue
        if max(map(len, made.attributes), default=0) > MAX_ATTRIBUTE:
            made = made._replace(attributes=cut(made.attributes))
        decoded.rows.append(made)
    return decoded


def _process(found: Struct) -> Attributes:
    return {"service.name": found[1].decode("utf-8", "replace") or "unknown_service"} | _tags(found.get(2))


def _tags(found: list[Struct] | None) -> Attributes:
    return {tag[1].decode("utf-8", "replace"): _value(tag) for tag in found or []}


def _value(tag: Struct) -> Value:
    kind = tag[2]
    if kind == 0:
        return tag.get(3, b"").decode("utf-8", "replace")
    if kind == 1:
        return float(tag.get(4, 0.0))
    if kind == 2:
        return bool(tag.get(5, False))
    if kind == 3:
        return int(tag.get(6, 0))
    return bytes(tag.get(7, b""))


def _id(number: int) -> bytes:
    return struct.pack(">q", number)


def _span(found: Struct, process: Attributes) -> Span:
    trace, identity = _id(found[2]) + _id(found[1]), _id(found[3])
    start, end = found[8] * 1000, (found[8] + found[9]) * 1000
    if not any(trace) or not any(identity) or not 0 <= start <= end <= MAX_TIME:
        raise ValueError("an id is zero, or startTime or duration is out of range")
    name = found[5].decode("utf-8", "replace")
    span = Span(trace, identity, b"", name, start, end, flags=found[7] & 0xFFFFFFFF)
    jaeger_tags.from_tags(span, _tags(found.get(10)), process)
    references = []
    for reference in found.get(6) or []:
        kind = "CHILD_OF" if reference[1] == 0 else "FOLLOWS_FROM"
        references.append((kind, _id(reference[3]) + _id(reference[2]), _id(reference[4])))
    if found[4] and not any(r[0] == "CHILD_OF" and r[2] == _id(found[4]) for r in references):
        references.insert(0, ("CHILD_OF", trace, _id(found[4])))
    jaeger_tags.set_references(span, references)
    for log in found.get(11) or []:
        span.events.append(jaeger_tags.event_of(log[1] * 1000, _tags(log.get(2))))
    return span
