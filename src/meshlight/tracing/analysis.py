"""What a trace, or many, say: the critical path, what changed between two, mesh hops, quality.

Pure, but for `compared`, which reads the traces that it compares.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshlight.tracing.adjusters import adjust, children
from meshlight.tracing.model import Span, SpanKind, Trace
from meshlight.tracing.query import BadQuery, number, parse_trace_id
from meshlight.tracing.storage import TraceStore
from meshlight.tracing.store.search import Query


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of time (ns) in which a trace waited for one span's own work."""

    span: Span
    start: int
    end: int


def critical_path(trace: Trace) -> list[Section]:
    """What a trace's duration is made of: walking back from the root's end, the child that finished
    last is what its parent waited for; between such children the parent's own work counts.

    Sections are in order of time and do not overlap. A child's work after its parent's end is not waited for.
    """
    below = children(trace)
    roots = below.get(b"", [])
    if not roots:
        return []
    root = max(roots, key=lambda span: span.duration)
    sections: list[Section] = []
    todo: list[tuple[Span, int, int]] = [(root, root.start, root.end)]
    # Spans that share an id share their children too: each is followed once.
    seen: set[int] = {id(root)}
    while todo:
        span, low, until = todo.pop()
        at = until
        for child in sorted(below.get(span.span_id, []), key=lambda s: min(s.end, until), reverse=True):
            end = min(child.end, at)
            start = max(child.start, low)
            if id(child) in seen or (child.end > at and child.start >= at) or end <= start:
                continue
            if child.end > at and child.start < at and at != until:
                continue  # ran beside the child that was waited for
            if at > end:
                sections.append(Section(span, end, at))
            seen.add(id(child))
            todo.append((child, start, end))
            at = start
        if at > low:
            sections.append(Section(span, low, at))
    return sorted(sections, key=lambda section: section.start)


# mesh hops


def is_mesh_hop(span: Span) -> bool:
    """Whether a span was made by a proxy of the mesh on behalf of a service: by Istio's tags."""
    attributes = span.attributes
    if attributes.get("component") == "proxy":
        return True
    return str(attributes.get("node_id", "")).split("~")[0] in ("waypoint", "ztunnel", "router", "sidecar")


def fold_mesh_hops(trace: Trace) -> Trace:
    """A trace without the mesh's spans: what was below one is below the nearest span above that is no hop.

    A hop that has no other span below it stays: it is all that is known of that call.
    """
    below = children(trace)
    by_id = {span.span_id: span for span in trace}
    hops = {span.span_id for span in trace if is_mesh_hop(span) and below.get(span.span_id)}

    def parent(span: Span) -> bytes:
        at, steps = span.parent_id, 0
        while at in hops and steps < len(trace):
            at, steps = by_id[at].parent_id, steps + 1
        return at

    return [replace(span, parent_id=parent(span)) for span in trace if span.span_id not in hops]


# comparison


@dataclass(slots=True)
class _Group:
    durations: list[float]
    errors: int = 0


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)] if ordered else 0.0


def _self_times(trace: Trace) -> dict[bytes, int]:
    below = children(trace)
    own: dict[bytes, int] = {}
    for span in trace:
        covered, reached = 0, span.start
        for child in below.get(span.span_id, []):
            begin, end = max(child.start, reached), min(child.end, span.end)
            if end > begin:
                covered += end - begin
                reached = end
        own[span.span_id] = span.duration - covered
    return own


def compare(before: Iterable[Trace], after: Iterable[Trace]) -> list[dict[str, Any]]:
    """What changed between two groups of traces, by service, operation and kind; the worst first.

    Durations in µs. `selfChange` compares the time that an operation spends itself, so that the one
    that became slow stands above those that wait for it. `verdict`: new, gone, failing, recovered,
    slower, faster or same.
    """
    groups = [_grouped(before), _grouped(after)]
    rows = []
    for key in sorted(groups[0].keys() | groups[1].keys()):
        a, b = (g.get(key) for g in groups)
        service, operation, kind = key
        row: dict[str, Any] = {"service": service, "operation": operation, "kind": kind}
        for name, group in (("before", a), ("after", b)):
            row[name] = _summary(group)
        row["verdict"], row["weight"] = _verdict(row["before"], row["after"])
        row["selfChange"] = row["after"]["selfMedian"] - row["before"]["selfMedian"] if a and b else 0.0
        rows.append(row)
    return sorted(rows, key=lambda r: r["weight"], reverse=True)


def _grouped(traces: Iterable[Trace]) -> dict[tuple[str, str, int], tuple[_Group, list[float]]]:
    groups: dict[tuple[str, str, int], tuple[_Group, list[float]]] = {}
    for trace in traces:
        own = _self_times(trace)
        for span in trace:
            group, self_times = groups.setdefault((span.service, span.name, span.kind), (_Group([]), []))
            group.durations.append(span.duration / 1000)
            group.errors += span.failed
            self_times.append(own[span.span_id] / 1000)
    return groups


def _summary(found: tuple[_Group, list[float]] | None) -> dict[str, float]:
    if found is None:
        return {"calls": 0, "errors": 0, "errorRate": 0.0, "median": 0.0, "p95": 0.0, "selfMedian": 0.0}
    group, own = found
    calls = len(group.durations)
    return {
        "calls": calls,
        "errors": group.errors,
        "errorRate": group.errors / calls,
        "median": _quantile(group.durations, 0.5),
        "p95": _quantile(group.durations, 0.95),
        "selfMedian": _quantile(own, 0.5),
    }


def _verdict(a: dict[str, float], b: dict[str, float]) -> tuple[str, float]:
    """A word, and how much it should stand out."""
    if not a["calls"]:
        return "new", b["selfMedian"] * 0.5
    if not b["calls"]:
        return "gone", a["selfMedian"] * 0.5
    rise = b["errorRate"] - a["errorRate"]
    # Two standard deviations of a share: a few errors among few calls are no change.
    noise = 2 * math.sqrt(
        max(a["errorRate"], 1 / a["calls"]) / a["calls"] + max(b["errorRate"], 1 / b["calls"]) / b["calls"]
    )
    single = a["calls"] == b["calls"] == 1
    if rise > (0 if single else min(noise, 0.5)):
        return "failing", 1e9 * rise
    if -rise > (0 if single else min(noise, 0.5)):
        return "recovered", 1.0
    change = b["selfMedian"] - a["selfMedian"]
    if abs(change) > max(0.25 * a["median"], 0.25 * a["selfMedian"], 500.0):
        return ("slower", change) if change > 0 else ("faster", 0.5)
    total = b["median"] - a["median"]
    if abs(total) > max(0.25 * a["median"], 500.0):
        # Not by its own work: it waits for something below.
        return ("slower", total * 1e-3) if total > 0 else ("faster", 0.1)
    return "same", 0.0


async def compared(store: TraceStore, parameters: Mapping[str, str]) -> dict[str, Any]:
    """The comparison that a request asks for: traces `a` and `b`, or times of a `service`. Raises BadQuery."""
    a, b = parameters.get("a", ""), parameters.get("b", "")
    if ".." in a or ".." in b:
        groups = [await _between(store, parameters, text) for text in (a, b)]
    else:
        ids = [parse_trace_id(text) for text in (a, b)]
        if None in ids:
            raise BadQuery("a and b must be trace ids, or times as START..END in microseconds")
        groups = []
        for identity, text in zip(ids, (a, b), strict=True):
            found = await store.get([identity] if identity else [])
            if not found:
                raise BadQuery(f"trace {text} is not here")
            groups.append(found)
    adjusted = [[adjust(trace) for trace in group] for group in groups]
    return {"traces": [len(g) for g in adjusted], "operations": compare(*adjusted)}


async def _between(store: TraceStore, parameters: Mapping[str, str], text: str) -> list[Trace]:
    start, _, end = text.partition("..")
    if not start.isdigit() or not end.isdigit():
        raise BadQuery(f"{text!r} is no time: write START..END in microseconds since 1970")
    query = Query(
        service=parameters.get("service", ""),
        operation=parameters.get("operation", ""),
        after=int(start) * 1000,
        before=int(end) * 1000,
        limit=min(1500, number(parameters, "limit", 500)),
    )
    return await store.find(query)


# of many traces


def service_paths(traces: Iterable[Trace], focal: str) -> list[dict[str, Any]]:
    """Distinct paths of (service, operation) from roots to leaves that pass a service, with trace ids."""
    found: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for trace in traces:
        below = children(trace)
        todo: list[tuple[Span, tuple[tuple[str, str], ...]]] = [(root, ()) for root in below.get(b"", [])]
        seen: set[int] = set()
        while todo:
            span, path = todo.pop()
            if id(span) in seen:
                continue
            seen.add(id(span))
            path = (*path, (span.service, span.name)) if span.kind != SpanKind.INTERNAL else path
            under = below.get(span.span_id, [])
            todo += [(child, path) for child in under]
            if not under and any(service == focal for service, _ in path) and len(path) < 64:
                found[path].append(span.trace_id.hex())
    return [
        {
            "path": [{"service": service, "operation": operation} for service, operation in path],
            "attributes": [{"key": "exemplar_trace_id", "value": i} for i in list(dict.fromkeys(ids))[:5]],
        }
        for path, ids in found.items()
    ]


def quality(traces: Sequence[Trace], service: str) -> dict[str, Any]:
    """How complete traces of a service are, in the shape of the UI's quality page."""
    counts: Counter[str] = Counter()
    for trace in traces:
        warned = [w for span in trace if span.service == service for w in span.warnings]
        counts["orphans"] += any("is not in this trace" in w for w in warned)
        counts["skew"] += any("clock skew" in w for w in warned)
    total = len(traces)
    kinds = (
        ("Complete traces", "orphans", "No span's parent is missing."),
        ("Clocks agree", "skew", "No span had to be moved."),
    )
    return {
        "traceQualityDocumentationLink": "",
        "bannerText": None,
        "scores": [
            {"key": key, "label": label, "max": total, "value": total - counts[key]} for label, key, _ in kinds
        ],
        "metrics": [
            {
                "name": label,
                "category": "trace",
                "description": text,
                "weight": 1 / len(kinds),
                "passCount": total - counts[key],
                "failureCount": counts[key],
            }
            for label, key, text in kinds
        ],
    }
