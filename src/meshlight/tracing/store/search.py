"""Which records of a table or part answer a query: exact tests on columns, cheapest and rarest first.

Pure. A query's conditions hold for one record together, as in Jaeger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from meshlight.proto import otlp_pb2 as otlp
from meshlight.tracing.model import StatusCode, text
from meshlight.tracing.rows import Form, Origin, Row, resource_of, split, value_of
from meshlight.tracing.store import columns as columns_
from meshlight.tracing.store.columns import Columns
from meshlight.tracing.store.part import holds

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Query:
    """Conditions on records; None or empty: no condition. Times and durations in ns, start inclusive,
    `before` exclusive. `tags` compare an attribute's text, of the record or of its resource; the tags
    `error=true` and `span.kind` mean status and kind as Jaeger shows them. `text` is looked for in names,
    keys, values, events and bodies, without regard to case."""

    service: str = ""
    operation: str = ""
    kind: int | None = None
    tags: tuple[tuple[str, str], ...] = ()
    after: int | None = None
    before: int | None = None
    shortest: int | None = None
    longest: int | None = None
    failed: bool | None = None
    text: str = ""
    limit: int = 20


class Source(Protocol):
    """A table's copy or a part, as queries see it."""

    @property
    def names(self) -> list[bytes]: ...
    @property
    def forms(self) -> list[Form]: ...
    @property
    def origins(self) -> list[Origin]: ...

    records: int
    earliest: int
    latest: int
    longest: int

    def column(self, name: str) -> Array: ...
    def may_have(self, key: bytes, value: bytes) -> bool: ...
    def attribute(self, key: bytes, value: str) -> Array: ...
    def containing(self, needle: bytes) -> Array: ...
    def trace_ids(self, positions: Array) -> list[bytes]: ...
    def positions(self, trace: bytes) -> Array: ...
    def rows(self, positions: Array) -> list[Row]: ...
    def columns(self) -> Columns: ...


class Recent:
    """The records of a table in memory as a source."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.records = len(columns)
        self.earliest = int(columns.start.min()) if self.records else 0
        self.latest = int(columns.start.max()) if self.records else 0
        self.longest = int(columns.duration.max()) if self.records else 0
        self.names, self.forms, self.origins = columns.names, columns.forms, columns.origins

    def column(self, name: str) -> Array:
        """A column of Columns by its name."""
        found: Array = getattr(self._columns, name)
        return found

    def may_have(self, key: bytes, value: bytes) -> bool:
        """A table has no filter: it is looked through."""
        return True

    def _having(self, codes: list[int]) -> Array:
        if not codes:
            return np.zeros(0, np.int64)
        wanted = np.zeros(len(self._columns.pairs), bool)
        wanted[codes] = True
        hits = np.flatnonzero(wanted[self._columns.attributes])
        return np.unique(np.searchsorted(self._columns.offsets, hits, side="right") - 1)

    def attribute(self, key: bytes, value: str) -> Array:
        """Positions of the records that have an attribute whose text is `value`."""
        codes = []
        for code, pair in enumerate(self._columns.pairs):
            if key in pair:
                name, encoded = split(pair)
                if name == key and text(value_of(encoded)) == value:
                    codes.append(code)
        return self._having(codes)

    def containing(self, needle: bytes) -> Array:
        """Positions of the records with a key, value, event or body that contains some bytes."""
        found = self._having([code for code, pair in enumerate(self._columns.pairs) if _within(needle, pair)])
        extras = zip(self._columns.extra_rows.tolist(), self._columns.extras, strict=True)
        more = np.array([row for row, extra in extras if holds(needle, extra)], np.int64)
        return np.unique(np.concatenate((found, more)))

    def trace_ids(self, positions: Array) -> list[bytes]:
        """Trace ids of records."""
        high, low = self._columns.high[positions].tolist(), self._columns.low[positions].tolist()
        return [columns_.trace_id(h, w) for h, w in zip(high, low, strict=True)]

    def positions(self, trace: bytes) -> Array:
        """Positions of a trace's records."""
        high, low = columns_.halves(trace)
        same = (self._columns.low == np.uint64(low)) & (self._columns.high == np.uint64(high))
        return np.flatnonzero(same)

    def rows(self, positions: Array) -> list[Row]:
        """Records at some positions."""
        return self._columns.take(positions).rows(np.arange(len(positions)))

    def columns(self) -> Columns:
        """Everything."""
        return self._columns


def _within(needle: bytes, pair: bytes) -> bool:
    if holds(needle, pair):
        return True
    encoded = split(pair)[1]
    return encoded[:1] not in (b"\x0a", b"") and holds(
        needle, text(value_of(encoded)).encode("utf-8", "replace")
    )


def match(source: Source, query: Query) -> Array:
    """Positions of the records that answer a query, in no order."""
    empty = np.zeros(0, np.int64)
    if query.after is not None and source.latest < query.after:
        return empty
    if query.before is not None and source.earliest >= query.before:
        return empty
    if query.shortest is not None and source.longest < query.shortest:
        return empty
    mask = _dictionaries(source, query)
    if mask is not None and not mask.any():
        return empty
    chosen: Array | None = None
    for key, value in query.tags:
        rows = _tag(source, key, value)
        chosen = rows if chosen is None else np.intersect1d(chosen, rows, assume_unique=True)
        if not len(chosen):
            return empty
    if query.text:
        rows = _text(source, query.text)
        chosen = rows if chosen is None else np.intersect1d(chosen, rows, assume_unique=True)
    if chosen is None:
        chosen = np.flatnonzero(mask) if mask is not None else np.arange(source.records)
    elif mask is not None:
        chosen = chosen[mask[chosen]]
    if len(chosen) and (query.after is not None or query.before is not None):
        start = source.column("start")[chosen]
        keep = np.ones(len(chosen), bool)
        if query.after is not None:
            keep &= start >= query.after
        if query.before is not None:
            keep &= start < query.before
        chosen = chosen[keep]
    if len(chosen) and (query.shortest is not None or query.longest is not None):
        duration = source.column("duration")[chosen]
        keep = np.ones(len(chosen), bool)
        if query.shortest is not None:
            keep &= duration >= query.shortest
        if query.longest is not None:
            keep &= duration <= query.longest
        chosen = chosen[keep]
    if query.failed is not None and len(chosen):
        failed = failures(source)
        chosen = chosen[failed[chosen] == query.failed]
    return chosen


def _chosen(flags: Sequence[bool], codes: Array) -> Array:
    picked: Array = np.array(flags, bool)[codes]
    return picked


def _dictionaries(source: Source, query: Query) -> Array | None:
    mask: Array | None = None
    conditions: list[tuple[str, list[bool]]] = []
    if query.service:
        services = [resource_of(o.resource).service == query.service for o in source.origins]
        conditions.append(("origin", services))
    if query.operation:
        wanted = query.operation.encode()
        conditions.append(("name", [name == wanted for name in source.names]))
    if query.kind is not None:
        conditions.append(("form", [form.kind == query.kind for form in source.forms]))
    for _, flags in conditions:
        if not any(flags):
            return np.zeros(source.records, bool)
    for column, flags in conditions:
        if all(flags):
            continue
        part = _chosen(flags, source.column(column))
        mask = part if mask is None else mask & part
    return mask


def failures(source: Source) -> Array:
    """Which records failed: by status, or by the tag `error`."""
    flags = [_status(form) == StatusCode.ERROR for form in source.forms]
    mask = _chosen(flags, source.column("form")) if flags else np.zeros(source.records, bool)
    if source.may_have(b"error", b"true"):
        mask = mask.copy()
        mask[source.attribute(b"error", "true")] = True
    return mask


def _status(form: Form) -> int:
    if not form.status:
        return 0
    message: Any = otlp.Status.FromString(form.status)
    return int(message.code)


def _tag(source: Source, key: str, value: str) -> Array:
    found: list[Array] = []
    name, encoded = key.encode("utf-8", "replace"), value.encode("utf-8", "replace")
    if source.may_have(name, encoded):
        found.append(source.attribute(name, value))
        flags = [
            key in (a := resource_of(o.resource).attributes) and text(a[key]) == value for o in source.origins
        ]
        if any(flags):
            found.append(np.flatnonzero(_chosen(flags, source.column("origin"))))
    if key == "error" and value in ("true", "false"):
        found.append(np.flatnonzero(failures(source) == (value == "true")))
    elif key == "span.kind" and value in KINDS:
        flags = [form.kind == KINDS[value] for form in source.forms]
        found.append(np.flatnonzero(_chosen(flags, source.column("form"))))
    elif key in ("otel.status_code", "otel.status_description"):
        found.append(
            np.flatnonzero(_chosen([_status_tag(f, key) == value for f in source.forms], source.column("form")))
        )
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _status_tag(form: Form, key: str) -> str:
    message: Any = otlp.Status.FromString(form.status)
    if key == "otel.status_description":
        return str(message.message)
    return ("", "OK", "ERROR")[message.code] if message.code < 3 else ""


KINDS = {"internal": 1, "server": 2, "client": 3, "producer": 4, "consumer": 5}


def _text(source: Source, wanted: str) -> Array:
    needle = wanted.lower().encode("utf-8", "replace")
    found = [source.containing(needle)]
    flags = [holds(needle, name) for name in source.names]
    if any(flags):
        found.append(np.flatnonzero(_chosen(flags, source.column("name"))))
    flags = [
        any(needle in f"{k}={text(v)}".lower().encode() for k, v in resource_of(o.resource).attributes.items())
        for o in source.origins
    ]
    if any(flags):
        found.append(np.flatnonzero(_chosen(flags, source.column("origin"))))
    return np.unique(np.concatenate(found))
