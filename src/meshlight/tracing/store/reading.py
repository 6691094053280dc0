"""Answers from many sources together: newest traces that match, whole traces, calls between services.

Pure over sources (`Collection.sources()`); run in a thread, since the work is arithmetic on arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshlight.tracing.rows import Row, resource_of
from meshlight.tracing.store.blocks import Damaged
from meshlight.tracing.store.columns import Columns, relabel
from meshlight.tracing.store.part import Part
from meshlight.tracing.store.part_writer import dependencies
from meshlight.tracing.store.search import Query, Source, match

Array = NDArray[Any]
Edge = tuple[str, str]
ORPHAN_REACH = 15 * 60 * 10**9
"""Ns around a part within which parents of its orphans are looked for in other parts."""


class Unreadable(Exception):
    """A part turned out to be damaged while it was read."""

    def __init__(self, part: Part, error: Exception) -> None:
        super().__init__(str(error))
        self.part = part


def guarded(source: Source, ask: Callable[[], Any]) -> Any:
    """What `ask` answers; raises Unreadable when the source is a damaged part."""
    try:
        return ask()
    except (Damaged, ValueError, IndexError, KeyError) as error:
        if isinstance(source, Part):
            raise Unreadable(source, error) from error
        raise


def find(sources: Sequence[Source], query: Query, hidden: set[bytes]) -> list[bytes]:
    """Ids of the newest traces with a record that answers the query, newest first."""
    found: dict[bytes, int] = {}
    for source in sorted(sources, key=lambda s: s.latest, reverse=True):
        if len(found) >= query.limit:
            newest = sorted(found.values(), reverse=True)
            if source.latest < newest[query.limit - 1]:
                break
        for trace, start in guarded(source, lambda s=source: _newest(s, query, hidden)):  # type: ignore[misc]
            found[trace] = max(start, found.get(trace, start))
    ordered = sorted(found.items(), key=lambda item: item[1], reverse=True)
    return [trace for trace, _ in ordered[: query.limit]]


def _newest(source: Source, query: Query, hidden: set[bytes]) -> list[tuple[bytes, int]]:
    positions = match(source, query)
    if not len(positions):
        return []
    starts = source.column("start")[positions]
    seen: dict[bytes, int] = {}
    take = min(len(positions), query.limit * 16)
    while True:
        newest = (
            np.argpartition(-starts, take - 1)[:take] if take < len(positions) else np.arange(len(positions))
        )
        newest = newest[np.argsort(-starts[newest], kind="stable")]
        seen = {}
        for trace, start in zip(source.trace_ids(positions[newest]), starts[newest].tolist(), strict=True):
            if trace not in hidden:
                seen.setdefault(trace, start)
        if len(seen) >= query.limit or take >= len(positions):
            return list(seen.items())[: query.limit]
        take = min(len(positions), take * 8)


def traces(sources: Sequence[Source], ids: Iterable[bytes], hidden: set[bytes]) -> dict[bytes, list[Row]]:
    """All records of some traces; a trace that is nowhere is left out."""
    wanted = [trace for trace in dict.fromkeys(ids) if trace not in hidden]
    found: dict[bytes, list[Row]] = {trace: [] for trace in wanted}

    def ask(source: Source) -> None:
        places = [source.positions(trace) for trace in wanted]
        positions = np.concatenate(places) if places else np.zeros(0, np.int64)
        for row in source.rows(positions) if len(positions) else ():
            found[row.trace_id].append(row)

    for source in reversed(sources):
        guarded(source, lambda s=source: ask(s))  # type: ignore[misc]
    return {trace: rows for trace, rows in found.items() if rows}


def records(sources: Sequence[Source], query: Query) -> list[Row]:
    """The newest records that answer a query, newest first (for flow records: no traces)."""
    found: list[Row] = []
    for source in sorted(sources, key=lambda s: s.latest, reverse=True):
        if len(found) >= query.limit and source.latest < found[query.limit - 1].start:
            break

        def ask(source: Source = source) -> list[Row]:
            positions = match(source, query)
            if not len(positions):
                return []
            starts = source.column("start")[positions]
            if len(positions) > query.limit:
                newest = np.argpartition(-starts, query.limit - 1)[: query.limit]
                positions = positions[newest]
            return source.rows(positions)

        found += guarded(source, ask)
        found = sorted(found, key=lambda row: row.start, reverse=True)[: query.limit]
    return found


def operations(sources: Sequence[Source]) -> dict[tuple[str, str, int], int]:
    """Records by (service, operation, kind)."""
    sums: Counter[tuple[str, str, int]] = Counter()
    for source in sources:
        if isinstance(source, Part):
            for service, name, kind, count in guarded(source, lambda s=source: s.operations):  # type: ignore[misc]
                sums[service, name, kind] += count
            continue
        services = [resource_of(o.resource).service for o in source.origins]
        key = (source.column("origin").astype(np.int64) << 40) | (source.column("name").astype(np.int64) << 16)
        key |= source.column("form").astype(np.int64)
        for k, count in zip(*(a.tolist() for a in np.unique(key, return_counts=True)), strict=True):
            name = source.names[k >> 16 & 0xFFFFFF].decode("utf-8", "replace")
            sums[services[k >> 40], name, source.forms[k & 0xFFFF].kind] += count
    return sums


class Dependencies:
    """Calls between services. Each part brings its own sums; only children whose parent lies in
    another part are looked up, once a pair of parts."""

    def __init__(self) -> None:
        self._across: dict[tuple[int, int], Counter[Edge]] = {}

    def between(self, sources: Sequence[Source], after: int, before: int) -> Counter[Edge]:
        """Number of calls by (caller, called) of spans that start in a time range (ns)."""
        inside = [s for s in sources if s.records and s.latest >= after and s.earliest < before]
        sums: Counter[Edge] = Counter()
        cut: dict[int, _Orphans] = {}
        for i, source in enumerate(inside):
            whole = source.earliest >= after and source.latest < before
            if whole and isinstance(source, Part):
                for parent, child, count in guarded(source, lambda s=source: s.edges):  # type: ignore[misc]
                    sums[parent, child] += count
                continue
            edges, orphans = guarded(source, lambda s=source: _within(s, after, before))  # type: ignore[misc]
            cut[i] = orphans
            for parent, child, count in edges:
                sums[parent, child] += count
        live = {s.number for s in sources if isinstance(s, Part)}
        self._across = {key: value for key, value in self._across.items() if live.issuperset(key)}
        for i, source in enumerate(inside):
            orphans = cut.get(i) or guarded(source, lambda s=source: _orphans_of(s))  # type: ignore[misc]
            if not len(orphans.high):
                continue
            for other in sources:
                if other is source or not _near(source, other):
                    continue
                known = i not in cut and isinstance(source, Part) and isinstance(other, Part)
                key = (source.number, other.number) if known else None  # type: ignore[attr-defined]
                if key is None or key not in self._across:
                    edges_across = guarded(other, lambda o=other, s=orphans: _resolve(s, o))  # type: ignore[misc]
                    if key is not None:
                        self._across[key] = edges_across
                else:
                    edges_across = self._across[key]
                sums.update(edges_across)
        return sums


class _Orphans:
    def __init__(self, high: Array, low: Array, parent: Array, service: list[str]) -> None:
        self.high, self.low, self.parent, self.service = high, low, parent, service


def _near(one: Source, other: Source) -> bool:
    return one.earliest - ORPHAN_REACH <= other.latest and other.earliest <= one.latest + ORPHAN_REACH


def _orphans_of(part: Source) -> _Orphans:
    assert isinstance(part, Part)
    rows = part.rows(part.orphans.astype(np.int64)) if len(part.orphans) else []
    return _orphans(rows)


def _orphans(rows: Sequence[Row]) -> _Orphans:
    ids = np.frombuffer(b"".join(row.trace_id for row in rows), ">u8").reshape(-1, 2).astype(np.uint64)
    parents = np.frombuffer(b"".join(row.parent for row in rows), ">u8").astype(np.uint64)
    return _Orphans(ids[:, 0], ids[:, 1], parents, [resource_of(r.origin.resource).service for r in rows])


def _within(source: Source, after: int, before: int) -> tuple[list[tuple[str, str, int]], _Orphans]:
    columns: Columns = source.columns()
    start = columns.start
    columns = columns.take(np.flatnonzero((start >= after) & (start < before))).sorted()
    if not len(columns):
        return [], _orphans([])
    new = np.ones(len(columns), bool)
    new[1:] = (columns.high[1:] != columns.high[:-1]) | (columns.low[1:] != columns.low[:-1])
    first = np.flatnonzero(new)
    trace_of = np.cumsum(new) - 1
    _, order = relabel(columns.origin, len(columns.origins))
    services = [resource_of(columns.origins[i].resource).service for i in order.tolist()]
    edges, orphans = dependencies(columns, services, first, trace_of)
    return edges, _orphans(columns.rows(orphans))


def _resolve(orphans: _Orphans, other: Source) -> Counter[Edge]:
    """Parents of orphans in another source."""
    sums: Counter[Edge] = Counter()
    if isinstance(other, Part):
        table = np.frombuffer(other.raw("trace"), ">u8").reshape(-1, 2)
        known = table[:, 0].astype(np.uint64)
        at = np.searchsorted(known, orphans.high)
        hits = np.flatnonzero(known[np.minimum(at, len(known) - 1)] == orphans.high)
    else:
        hits = np.flatnonzero(np.isin(orphans.low, other.column("low")))
    if not len(hits):
        return sums
    by_trace: dict[bytes, list[int]] = {}
    for i in hits.tolist():
        trace = int(orphans.high[i]).to_bytes(8, "big") + int(orphans.low[i]).to_bytes(8, "big")
        by_trace.setdefault(trace, []).append(i)
    origins = other.origins
    codes = other.column("origin")
    spans = other._view("span", "<u8") if isinstance(other, Part) else other.column("span")
    for trace, children in by_trace.items():
        positions = other.positions(trace)
        owner = {int(spans[p]): int(codes[p]) for p in positions.tolist()}
        for i in children:
            if (origin := owner.get(int(orphans.parent[i]))) is not None:
                parent = resource_of(origins[origin].resource).service
                if parent != orphans.service[i]:
                    sums[parent, orphans.service[i]] += 1
    return sums
