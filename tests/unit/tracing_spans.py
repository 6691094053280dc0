"""Spans for tests: strategies that make any, and small ones by hand."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from meshlight.tracing.model import Event, Link, Resource, Scope, Span
from meshlight.tracing.rows import Row, row

START = 1_760_000_000_000_000_000
texts = st.text(max_size=12)
keys = st.sampled_from(["http.method", "db", "error", "", "k\0", "ключ"]) | st.text(min_size=1, max_size=8)
plain = (
    texts
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=8)
)
values = plain | st.lists(plain, max_size=3) | st.dictionaries(texts, plain, max_size=2)
attributes = st.dictionaries(keys, values, max_size=5)
trace_ids = st.sampled_from([bytes([n]) * 16 for n in range(1, 5)]) | st.binary(
    min_size=16, max_size=16
).filter(any)
span_ids = st.sampled_from([bytes([n]) * 8 for n in range(1, 6)]) | st.binary(min_size=8, max_size=8).filter(
    any
)
times = st.integers(START, START + 10**10) | st.integers(0, (1 << 63) - 1)
resources = st.builds(Resource, attributes, st.integers(0, 3), texts)
scopes = st.builds(Scope, texts, texts, attributes, st.integers(0, 3), texts)
events = st.builds(Event, times, texts, attributes, st.integers(0, 3))
links = st.builds(Link, trace_ids, span_ids, texts, attributes, st.integers(0, 3), st.integers(0, 511))


@st.composite
def spans(draw: Any) -> Span:
    """Any span that OTLP can say."""
    start = draw(times)
    return Span(
        draw(trace_ids),
        draw(span_ids),
        draw(span_ids | st.just(b"")),
        draw(texts),
        start,
        draw(st.integers(start, min(start + 10**12, (1 << 63) - 1)) | times),
        draw(st.integers(0, 5)),
        draw(st.integers(0, 2)),
        draw(texts),
        draw(texts),
        draw(st.integers(0, 1023)),
        draw(attributes),
        draw(st.integers(0, 3)),
        draw(st.lists(events, max_size=2)),
        draw(st.integers(0, 3)),
        draw(st.lists(links, max_size=2)),
        draw(st.integers(0, 3)),
        draw(resources),
        draw(scopes),
    )


def made(
    trace: int, identity: int, parent: int = 0, service: str = "a", at: int = 0, ms: float = 1, **more: Any
) -> Span:
    """A span with small numbers: `at` and `ms` are milliseconds after START."""
    start = START + int(at * 1e6)
    return Span(
        trace.to_bytes(16, "big"),
        identity.to_bytes(8, "big"),
        parent.to_bytes(8, "big") if parent else b"",
        more.pop("name", "op"),
        start,
        start + int(ms * 1e6),
        resource=Resource({"service.name": service}),
        **more,
    )


def rows(*of: Span) -> list[Row]:
    """Spans as rows."""
    return [row(span) for span in of]
