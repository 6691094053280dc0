"""What is put right when a trace is read: duplicates, shared spans, missing parents, clocks that disagree.

Stored spans are never changed; each correction leaves a warning on the span it touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from meshlight.tracing.model import Event, Span, SpanKind, Trace
from meshlight.tracing.rows import row

MAX_SKEW = 60 * 10**9
"""Ns beyond which a child that lies outside its parent is left alone: no clock is that wrong by accident."""


def adjust(trace: Trace) -> Trace:
    """All corrections, and the spans in order of their start."""
    spans = split_shared(without_duplicates(trace))
    name_orphans(spans)
    correct_clocks(spans)
    return sorted(spans, key=lambda span: span.start)


def without_duplicates(trace: Trace) -> Trace:
    """Spans that are equal in everything, once: an exporter that heard no answer sends again."""
    if len({span.span_id for span in trace}) == len(trace):
        return list(trace)
    kept: dict[object, Span] = {}
    for span in trace:
        kept.setdefault(_identity(span), span)
    return list(kept.values())


def _identity(span: Span) -> object:
    of = row(span)
    return of._replace(attributes=tuple(sorted(of.attributes)))  # attributes are a set


def split_shared(trace: Trace) -> Trace:
    """The halves of a span that client and server share get ids of their own: the server's half becomes
    a child of the client's, and what the call led to becomes the server's."""
    clients = {span.span_id: span for span in trace if span.kind == SpanKind.CLIENT}
    renamed: dict[bytes, bytes] = {}
    result: Trace = []
    for span in trace:
        if span.kind == SpanKind.SERVER and span.span_id in clients:
            digest = hashlib.blake2b(span.span_id + b"server", digest_size=8).digest()
            renamed[span.span_id] = digest
            span = replace(span, span_id=digest, parent_id=span.span_id, warnings=list(span.warnings))
        result.append(span)
    if not renamed:
        return result
    moved = []
    for span in result:
        if span.parent_id in renamed and span.span_id != renamed[span.parent_id]:
            span = replace(span, parent_id=renamed[span.parent_id])
        moved.append(span)
    return moved


def name_orphans(trace: Trace) -> None:
    """A span whose parent is not here stays where it is, with a warning."""
    known = {span.span_id for span in trace}
    for span in trace:
        if span.parent_id and span.parent_id not in known:
            span.warnings = [*span.warnings, f"parent span {span.parent_id.hex()} is not in this trace"]


def children(trace: Iterable[Span]) -> dict[bytes, list[Span]]:
    """Spans under their parents' ids, in order of start; roots and orphans under the empty id."""
    spans = list(trace)
    known = {span.span_id for span in spans}
    found: dict[bytes, list[Span]] = {}
    for span in sorted(spans, key=lambda s: s.start):
        parent = span.parent_id if span.parent_id in known and span.parent_id != span.span_id else b""
        found.setdefault(parent, []).append(span)
    return found


def _host(span: Span) -> object:
    attributes = span.resource.attributes
    return (
        attributes.get("host.name") or attributes.get("k8s.node.name") or attributes.get("ip") or span.service
    )


def correct_clocks(trace: Trace) -> None:
    """Move the spans of a host whose clock disagrees with its caller's into the caller's span.

    A child that does not fit within its parent though it is no longer than it is centred in it, and
    what happened on the child's host moves with it. A child of the same host is left alone (work that
    outlives its caller is no clock's fault), as is a shift of more than a minute.
    """
    below = children(trace)
    todo: list[tuple[Span, int, Span | None]] = [(root, 0, None) for root in below.get(b"", [])]
    seen: set[int] = set()
    while todo:
        span, shift, parent = todo.pop()
        if id(span) in seen:
            continue
        seen.add(id(span))
        if parent is not None and _host(span) != _host(parent):
            shift = _shift(span, parent)
        if shift:
            span.start += shift
            span.end += shift
            span.events = [
                Event(e.time + shift, e.name, e.attributes, e.dropped_attributes) for e in span.events
            ]
            span.warnings = [*span.warnings, f"clock skew: shifted by {shift / 1e6:.3f} ms to fit its parent"]
        todo += [(child, shift, span) for child in below.get(span.span_id, [])]


def _shift(span: Span, parent: Span) -> int:
    """Ns by which a child is moved; `parent` is where it belongs already."""
    if span.start >= parent.start and span.end <= parent.end:
        return 0
    room = parent.duration - span.duration
    # Longer than its parent: asynchronous, or cut short by a timeout. Only the start can be wrong.
    shift = max(0, parent.start - span.start) if room < 0 else parent.start + room // 2 - span.start
    return shift if abs(shift) <= MAX_SKEW else 0
