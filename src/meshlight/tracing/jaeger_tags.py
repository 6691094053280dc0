"""OpenTelemetry and Jaeger have one model with two spellings: this is the dictionary between them.

Read by the JSON, protobuf and Thrift codecs, so that all of Jaeger's protocols agree.
"""

from __future__ import annotations

from meshlight.tracing.model import KIND_NAMES, Attributes, Event, Link, Resource, Scope, Span, Value

KINDS = {name: number for number, name in enumerate(KIND_NAMES) if name}
SCOPE_NAME, SCOPE_VERSION = "otel.scope.name", "otel.scope.version"
STATUS_CODE, STATUS_TEXT = "otel.status_code", "otel.status_description"
TRACE_STATE = "w3c.tracestate"
REFERENCE = "opentracing.ref_type"
"""Attribute of a link that was a reference: OpenTelemetry's convention for OpenTracing's references."""


def to_tags(span: Span) -> Attributes:
    """A span's tags as Jaeger has them."""
    tags: Attributes = dict(span.attributes)
    if span.scope.name:
        tags[SCOPE_NAME] = span.scope.name
    if span.scope.version:
        tags[SCOPE_VERSION] = span.scope.version
    for key, value in span.scope.attributes.items():
        tags.setdefault(key, value)
    if name := KIND_NAMES[span.kind] if span.kind < len(KIND_NAMES) else "":
        tags["span.kind"] = name
    if span.status_code:
        tags[STATUS_CODE] = "OK" if span.status_code == 1 else "ERROR"
        if span.status_code == 2:
            tags["error"] = True
    if span.status_message:
        tags[STATUS_TEXT] = span.status_message
    if span.trace_state:
        tags[TRACE_STATE] = span.trace_state
    return tags


def from_tags(span: Span, tags: Attributes, process: Attributes) -> None:
    """Give a span what Jaeger's tags say, in OpenTelemetry's fields."""
    rest = dict(tags)
    kind = rest.get("span.kind")
    if isinstance(kind, str) and kind in KINDS:
        span.kind = KINDS[kind]
        del rest["span.kind"]
    code = rest.get(STATUS_CODE)
    if code in ("OK", "ERROR"):
        span.status_code = 1 if code == "OK" else 2
        del rest[STATUS_CODE]
        if code == "ERROR" and rest.get("error") is True:
            del rest["error"]
    elif rest.get("error") is True or rest.get("error") == "true":
        span.status_code = 2
        del rest["error"]
    if span.status_code and isinstance(rest.get(STATUS_TEXT), str):
        span.status_message = rest.pop(STATUS_TEXT)
    if isinstance(rest.get(TRACE_STATE), str):
        span.trace_state = rest.pop(TRACE_STATE)
    name, version = rest.pop(SCOPE_NAME, ""), rest.pop(SCOPE_VERSION, "")
    span.scope = Scope(str(name), str(version))
    span.attributes = rest
    span.resource = Resource(process)


def log_fields(event: Event) -> Attributes:
    """The fields of a Jaeger log for an event."""
    fields: Attributes = {"event": event.name} if event.name else {}
    return fields | event.attributes


def event_of(time: int, fields: Attributes) -> Event:
    """The event of a Jaeger log."""
    name = fields.get("event")
    if isinstance(name, str):
        return Event(time, name, {key: value for key, value in fields.items() if key != "event"})
    return Event(time, "", dict(fields))


def references(span: Span) -> list[tuple[str, bytes, bytes]]:
    """References of a span: type, trace id, span id; the parent first."""
    found = []
    child = bool(span.parent_id)
    for link in span.links:
        kind = link.attributes.get(REFERENCE)
        found.append(("CHILD_OF" if kind == "child_of" else "FOLLOWS_FROM", link.trace_id, link.span_id))
        # It was the only reference of its span, and so stands for the parent.
        child = child and not (kind == "follows_from" and link.span_id == span.parent_id)
    if child:
        found.insert(0, ("CHILD_OF", span.trace_id, span.parent_id))
    return found


def set_references(span: Span, found: list[tuple[str, bytes, bytes]]) -> None:
    """Parent and links of a span from Jaeger's references.

    The first CHILD_OF within the trace is the parent; where there is none, the first FOLLOWS_FROM within
    the trace is, and stays a link too.
    """
    own = [reference for reference in found if reference[1] == span.trace_id]
    parent = next((r for r in own if r[0] == "CHILD_OF"), None)
    if parent is not None:
        span.parent_id = parent[2]
    elif own:
        span.parent_id = own[0][2]
    for reference in found:
        if reference is not parent:
            kind, trace, identity = reference
            span.links.append(Link(trace, identity, attributes={REFERENCE: kind.lower()}))


def typed(value: Value) -> tuple[str, Value]:
    """Jaeger's type name of a value, and the value as Jaeger's JSON has it."""
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int):
        return "int64", value
    if isinstance(value, float):
        return "float64", value
    if isinstance(value, bytes):
        return "binary", value
    from meshlight.tracing.model import text

    return "string", text(value)
