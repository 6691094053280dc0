"""The table in memory that new records go to until there are enough for a part."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from meshlight.tracing.rows import Form, Origin, Row
from meshlight.tracing.store.columns import Columns


class _Numbering(dict[Any, int]):
    """Numbers values in order of first appearance."""

    def __missing__(self, value: Any) -> int:
        number = self[value] = len(self)
        return number


class Table:
    """Append-only; `columns()` is a consistent copy of what is in it.

    Not thread-safe: `extend` and `columns` are called from one thread.
    """

    def __init__(self) -> None:
        self.bytes = 0
        """Rough size of the distinct values held, for bounding."""
        self._trace = bytearray()
        self._span = bytearray()
        self._parent = bytearray()
        self._start = array("q")
        self._end = array("q")
        self._name = array("I")
        self._form = array("I")
        self._origin = array("I")
        self._counts = array("I")
        self._attributes = array("I")
        self._names: dict[bytes, int] = _Numbering()
        self._forms: dict[Form, int] = _Numbering()
        self._origins: dict[Origin, int] = _Numbering()
        self._pairs: dict[bytes, int] = _Numbering()
        self._extra_rows = array("q")
        self._extras: list[bytes] = []
        self._copy: Columns | None = None

    def __len__(self) -> int:
        return len(self._start)

    def extend(self, rows: Sequence[Row]) -> None:
        """Append rows; ids have their exact lengths already."""
        if not rows:
            return
        trace, span, parent, start, end, name, form, origin, attributes, extra = zip(*rows, strict=True)
        before, known = len(self._start), len(self._pairs)
        self._trace += b"".join(trace)
        self._span += b"".join(span)
        self._parent += b"".join(parent)
        self._start.extend(start)
        self._end.extend(end)
        self._name.extend(map(self._names.__getitem__, name))
        self._form.extend(map(self._forms.__getitem__, form))
        self._origin.extend(map(self._origins.__getitem__, origin))
        self._counts.extend(map(len, attributes))
        number = self._pairs.__getitem__
        extend = self._attributes.extend
        for pairs in attributes:
            extend(map(number, pairs))
        for position, encoded in enumerate(extra):
            if encoded:
                self._extra_rows.append(before + position)
                self._extras.append(encoded)
                self.bytes += len(encoded)
        if len(self._pairs) > known:
            new = list(self._pairs)[known:] if len(self._pairs) - known > 4096 else None
            self.bytes += sum(map(len, new)) if new is not None else 64 * (len(self._pairs) - known)
            if new is None:
                self.bytes += sum(len(p) for pairs in attributes for p in pairs if len(p) > 1024)

    def columns(self) -> Columns:
        """Everything so far; the same object until more is appended."""
        if self._copy is None or len(self._copy) != len(self):
            trace = np.frombuffer(bytes(self._trace), ">u8").reshape(-1, 2)
            start = np.array(self._start, np.int64)
            self._copy = Columns(
                trace[:, 0].astype(np.uint64), trace[:, 1].astype(np.uint64),
                np.frombuffer(bytes(self._span), ">u8").astype(np.uint64),
                np.frombuffer(bytes(self._parent), ">u8").astype(np.uint64),
                start, np.array(self._end, np.int64) - start,
                np.array(self._name, np.uint32), np.array(self._form, np.uint32),
                np.array(self._origin, np.uint32), np.array(self._counts, np.int64),
                np.array(self._attributes, np.uint32),
                list(self._names), list(self._forms), list(self._origins), list(self._pairs),
                np.array(self._extra_rows, np.int64), list(self._extras),
            )  # fmt: skip
        return self._copy
