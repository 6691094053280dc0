"""Records as parallel arrays: what tables in memory hold, what parts are made from and merge through.

A struct of numpy arrays with dictionaries: `name`, `form`, `origin` and each entry of `attributes`
are positions in a list of distinct values. Pure; nothing here knows files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshlight.tracing.rows import Form, Origin, Row

Array = NDArray[Any]


@dataclass(slots=True)
class Columns:
    """N records. `high`, `low`: trace id; `start`: ns; `duration`: end - start, ns, may be negative;
    `counts`: attributes a record; `attributes`: positions in `pairs`, record after record;
    `extra_rows` (ascending) and `extras`: the records that have an extra."""

    high: Array
    low: Array
    span: Array
    parent: Array
    start: Array
    duration: Array
    name: Array
    form: Array
    origin: Array
    counts: Array
    attributes: Array
    names: list[bytes]
    forms: list[Form]
    origins: list[Origin]
    pairs: list[bytes]
    extra_rows: Array
    extras: list[bytes]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def offsets(self) -> Array:
        """Where each record's attributes begin, and the end of the last."""
        offsets = np.zeros(len(self.counts) + 1, np.int64)
        np.cumsum(self.counts, out=offsets[1:])
        return offsets

    def take(self, rows: Array) -> Columns:
        """The records at some positions, in that order; the dictionaries are shared."""
        offsets = self.offsets
        counts = self.counts[rows]
        starts = offsets[:-1][rows]
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        within = np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)
        picked = self.attributes[np.repeat(starts, counts) + within]
        extra_rows, extras = self._extras(rows)
        return Columns(
            self.high[rows], self.low[rows], self.span[rows], self.parent[rows], self.start[rows],
            self.duration[rows], self.name[rows], self.form[rows], self.origin[rows], counts, picked,
            self.names, self.forms, self.origins, self.pairs, extra_rows, extras,
        )  # fmt: skip

    def _extras(self, rows: Array) -> tuple[Array, list[bytes]]:
        if not len(self.extra_rows):
            return self.extra_rows, []
        at = np.full(len(self), -1, np.int64)
        at[self.extra_rows] = np.arange(len(self.extras))
        chosen = at[rows]
        where = np.flatnonzero(chosen >= 0)
        return where, [self.extras[i] for i in chosen[where].tolist()]

    def sorted(self) -> Columns:
        """By trace id, then by start: the order of parts."""
        return self.take(np.lexsort((self.start, self.low, self.high)))

    def rows(self, positions: Array) -> list[Row]:
        """Some records as rows."""
        offsets = self.offsets
        extra = dict(zip(self.extra_rows.tolist(), self.extras, strict=True))
        found = []
        for i in positions.tolist():
            start = int(self.start[i])
            codes = self.attributes[offsets[i] : offsets[i + 1]].tolist()
            found.append(
                Row(
                    trace_id(self.high[i], self.low[i]),
                    int(self.span[i]).to_bytes(8, "big"),
                    int(self.parent[i]).to_bytes(8, "big"),
                    start,
                    start + int(self.duration[i]),
                    self.names[self.name[i]],
                    self.forms[self.form[i]],
                    self.origins[self.origin[i]],
                    [self.pairs[code] for code in codes],
                    extra.get(i, b""),
                )
            )
        return found


def trace_id(high: Any, low: Any) -> bytes:
    """A trace id from its halves."""
    return int(high).to_bytes(8, "big") + int(low).to_bytes(8, "big")


def halves(of: bytes) -> tuple[int, int]:
    """The halves of a trace id."""
    return int.from_bytes(of[:8], "big"), int.from_bytes(of[8:], "big")


def from_rows(rows: Sequence[Row]) -> Columns:
    """Rows as columns."""
    from meshlight.tracing.store.table import Table

    table = Table()
    table.extend(rows)
    return table.columns()


def concatenate(parts: Sequence[Columns]) -> Columns:
    """All records of some columns, with one dictionary each."""
    names: dict[bytes, int] = {}
    forms: dict[Form, int] = {}
    origins: dict[Origin, int] = {}
    pairs: dict[bytes, int] = {}

    def remapped(known: dict[Any, int], values: list[Any], codes: Array) -> Array:
        if not values:
            return codes
        mapping = np.fromiter((known.setdefault(v, len(known)) for v in values), np.uint32, len(values))
        return mapping[codes]

    name = [remapped(names, p.names, p.name) for p in parts]
    form = [remapped(forms, p.forms, p.form) for p in parts]
    origin = [remapped(origins, p.origins, p.origin) for p in parts]
    attributes = [remapped(pairs, p.pairs, p.attributes) for p in parts]
    before = np.cumsum([0] + [len(p) for p in parts])
    extra_rows = [p.extra_rows + at for p, at in zip(parts, before, strict=False)]

    def joined(arrays: list[Array], kind: Any) -> Array:
        return np.concatenate(arrays) if arrays else np.zeros(0, kind)

    return Columns(
        joined([p.high for p in parts], np.uint64), joined([p.low for p in parts], np.uint64),
        joined([p.span for p in parts], np.uint64), joined([p.parent for p in parts], np.uint64),
        joined([p.start for p in parts], np.int64), joined([p.duration for p in parts], np.int64),
        joined(name, np.uint32), joined(form, np.uint32), joined(origin, np.uint32),
        joined([p.counts for p in parts], np.int64), joined(attributes, np.uint32),
        list(names), list(forms), list(origins), list(pairs),
        joined(extra_rows, np.int64), list(chain.from_iterable(p.extras for p in parts)),
    )  # fmt: skip


def relabel(codes: Array, size: int) -> tuple[Array, Array]:
    """Codes renumbered 0, 1, … by first appearance, and the old code of each new one.

    `size` is one more than the greatest code. Linear: no sorting of the codes themselves.
    """
    if not len(codes):
        return codes.astype(np.uint32), np.zeros(0, np.int64)
    first = np.full(size, -1, np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    present = np.flatnonzero(first >= 0)
    order = present[np.argsort(first[present], kind="stable")]
    new = np.zeros(size, np.uint32)
    new[order] = np.arange(len(order), dtype=np.uint32)
    return new[codes], order
