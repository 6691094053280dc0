"""One span model, OpenTelemetry's: what every receiver produces and every query API is made from.

Times are nanoseconds since the epoch, ids are bytes (16 for traces, 8 for spans). Attribute values
keep their type; a list or mapping value is one of OpenTelemetry's arrays or key-value lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

Value = Any
"""str, bool, int, float, bytes, list[Value], dict[str, Value] or None."""
Attributes = dict[str, Value]

NO_TRACE = b"\0" * 16
NO_SPAN = b"\0" * 8


class SpanKind(IntEnum):
    """What side of a call a span is."""

    UNSPECIFIED = 0
    INTERNAL = 1
    SERVER = 2
    CLIENT = 3
    PRODUCER = 4
    CONSUMER = 5


KIND_NAMES = ("", "internal", "server", "client", "producer", "consumer")
"""Jaeger's `span.kind` tag by SpanKind."""


class StatusCode(IntEnum):
    """How a span ended, as its maker said."""

    UNSET = 0
    OK = 1
    ERROR = 2


@dataclass(slots=True)
class Event:
    """Something that happened within a span."""

    time: int
    name: str
    attributes: Attributes = field(default_factory=dict)
    dropped_attributes: int = 0


@dataclass(slots=True)
class Link:
    """A reference to a span that is not the parent."""

    trace_id: bytes
    span_id: bytes
    trace_state: str = ""
    attributes: Attributes = field(default_factory=dict)
    dropped_attributes: int = 0
    flags: int = 0


@dataclass(slots=True)
class Resource:
    """Who made a span."""

    attributes: Attributes = field(default_factory=dict)
    dropped_attributes: int = 0
    schema_url: str = ""

    @property
    def service(self) -> str:
        """`service.name`, or OpenTelemetry's name for a service that has none."""
        return str(self.attributes.get("service.name") or "unknown_service")


@dataclass(slots=True)
class Scope:
    """Which instrumentation made a span."""

    name: str = ""
    version: str = ""
    attributes: Attributes = field(default_factory=dict)
    dropped_attributes: int = 0
    schema_url: str = ""


@dataclass(slots=True)
class Span:
    """One operation of one service. `parent_id` is empty for a root."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    name: str
    start: int
    end: int
    kind: int = 0
    status_code: int = 0
    status_message: str = ""
    trace_state: str = ""
    flags: int = 0
    attributes: Attributes = field(default_factory=dict)
    dropped_attributes: int = 0
    events: list[Event] = field(default_factory=list)
    dropped_events: int = 0
    links: list[Link] = field(default_factory=list)
    dropped_links: int = 0
    resource: Resource = field(default_factory=Resource)
    scope: Scope = field(default_factory=Scope)
    warnings: list[str] = field(default_factory=list)
    """Made on read (clock skew, missing parent); never stored."""

    @property
    def duration(self) -> int:
        """Nanoseconds; never negative."""
        return max(0, self.end - self.start)

    @property
    def service(self) -> str:
        """Name of the service that made it."""
        return self.resource.service

    @property
    def failed(self) -> bool:
        """Whether its maker says that it failed, by status or by Jaeger's and Zipkin's tag."""
        if self.status_code == StatusCode.ERROR:
            return True
        mark = self.attributes.get("error")
        return mark is not None and mark is not False and mark != "false"


@dataclass(slots=True)
class LogRecord:
    """An OpenTelemetry log record; flow records are these."""

    time: int
    observed: int
    name: str
    severity: int = 0
    severity_text: str = ""
    body: Value = None
    attributes: Attributes = field(default_factory=dict)
    dropped_attributes: int = 0
    flags: int = 0
    trace_id: bytes = b""
    span_id: bytes = b""
    resource: Resource = field(default_factory=Resource)
    scope: Scope = field(default_factory=Scope)


Trace = list[Span]
"""Spans of one trace id."""


def by_trace(spans: Sequence[Span]) -> dict[bytes, Trace]:
    """Spans under their trace ids, in order of appearance."""
    traces: dict[bytes, Trace] = {}
    for span in spans:
        traces.setdefault(span.trace_id, []).append(span)
    return traces


def text(value: Value) -> str:
    """A value as people and tag filters write it: `true`, `200`, `1.5`, JSON for what is composed."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (list, dict)):
        import orjson

        return orjson.dumps(value, default=lambda v: v.hex() if isinstance(v, bytes) else str(v)).decode()
    return "" if value is None else str(value)
