"""Write a part: a file of records sorted by trace id that never changes.

Layout: magic, blocks, footer (zstd of JSON: counts, ranges, where each block lies and its checksum),
length and checksum of the footer, magic. Record columns are cut into chunks of 16,384 records, so that
a few records are read without the rest. Attributes of one key are a column with a dictionary of its
own; which keys a record has, in which order, is its *layout*. Pure: makes bytes.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np
import orjson
from numpy.typing import NDArray

from meshlight.tracing.model import text
from meshlight.tracing.rows import Form, join, resource_of, split, value_of
from meshlight.tracing.store import blocks
from meshlight.tracing.store.columns import Columns, relabel

Array = NDArray[Any]
MAGIC = b"MESHPRT1"
VERSION = 1
TRAILER = struct.Struct("<II8s")
CHUNK = 16_384
VALUES_CHUNK = 4_096
MAX_KEYS = 1_024
"""Keys with columns of their own; the pairs of rarer ones share the last column."""
NO_PARENT, EXPLICIT_PARENT, LOCAL_PARENT = 0, 1, 2


class _Layout:
    """Blocks appended to the file one after another."""

    def __init__(self) -> None:
        self.body = bytearray(MAGIC)
        self.places: dict[str, list[tuple[int, int, int]]] = {}

    def add(self, name: str, chunks: Sequence[bytes]) -> None:
        places = self.places[name] = []
        for chunk in chunks:
            places.append((len(self.body), len(chunk), blocks.checksum(chunk)))
            self.body += chunk


def encode(columns: Columns) -> bytes:
    """The file of a part. `columns` are sorted by trace id and start, and not empty."""
    layout = _Layout()
    count = len(columns)
    first = _trace_starts(columns)
    lengths = np.diff(first, append=count)
    ids = np.stack((columns.high[first], columns.low[first]), axis=1).astype(">u8")
    layout.add("trace", [ids.tobytes()])
    layout.add("trace_len", [blocks.pack(lengths)])
    layout.add("span", [columns.span.astype("<u8").tobytes()])
    trace_of = np.repeat(np.arange(len(first)), lengths)
    codes, explicit = _parents(columns, trace_of, first)
    layout.add("parent", _chunked(codes))
    layout.add("parent_id", [explicit.astype("<u8").tobytes()])
    base = int(columns.start.min())
    layout.add("start", _starts(columns.start - base, trace_of))
    layout.add("duration", [blocks.pack_signed(c) for c in _cut(columns.duration)])
    names = _dictionary(layout, "name", columns.name, columns.names)
    forms = _dictionary(layout, "form", columns.form, columns.forms)
    origins = _dictionary(layout, "origin", columns.origin, columns.origins)
    layout.add("names", [blocks.pack_strings(names)])
    layout.add("forms", [blocks.pack_strings([_form(f) for f in forms])])
    layout.add("origins", [blocks.pack_strings([b for o in origins for b in o])])
    hashes = _attributes(layout, columns)
    for encoded in {o.resource for o in origins}:
        for key, value in resource_of(encoded).attributes.items():
            hashes.append(blocks.attribute_hash(key.encode(), text(value).encode("utf-8", "replace")))
    layout.add("bloom", [blocks.Bloom.of(np.array(hashes or [0], np.uint64)).tobytes()])
    layout.add("extra_row", [blocks.pack(columns.extra_rows)])
    layout.add("extra", [blocks.pack_strings(columns.extras)])
    services = [resource_of(o.resource).service for o in origins]
    _operations(layout, columns, services, names, forms)
    edges, orphans = dependencies(columns, services, first, trace_of)
    layout.add("edges", [blocks.compress(orjson.dumps(edges))])
    layout.add("orphan", [blocks.pack(orphans)])
    footer = blocks.compress(
        orjson.dumps(
            {
                "version": VERSION,
                "records": count,
                "traces": len(first),
                "base": base,
                "latest": int(columns.start.max()),
                "longest": int(columns.duration.max()),
                "keys": len([n for n in layout.places if n.startswith("codes/")]),
                "blocks": layout.places,
            }
        )
    )
    return bytes(layout.body) + footer + TRAILER.pack(len(footer), blocks.checksum(footer), MAGIC)


def _cut(values: Array) -> list[Array]:
    return [values[i : i + CHUNK] for i in range(0, len(values), CHUNK)]


def _chunked(values: Array, delta: bool = False) -> list[bytes]:
    return [blocks.pack(chunk, delta) for chunk in _cut(values)]


def _trace_starts(columns: Columns) -> Array:
    new = np.ones(len(columns), bool)
    new[1:] = (columns.high[1:] != columns.high[:-1]) | (columns.low[1:] != columns.low[:-1])
    return np.flatnonzero(new)


def _mixed(span: Array, trace_of: Array) -> Array:
    scattered: Array = span ^ (trace_of.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return scattered


def parent_rows(columns: Columns, trace_of: Array) -> Array:
    """For each record the position of its parent span, -1 where it has none here.

    Two spans with one id are the halves of a call that share it (Zipkin's habit): the client's half
    is the parent of the server's, and the server's half is the parent of what the call led to.
    """
    found = np.full(len(columns), -1, np.int64)
    keys = _mixed(columns.span, trace_of)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    has = np.flatnonzero(columns.parent)
    if len(has):
        wanted = _mixed(columns.parent[has], trace_of[has])
        # The last of equal ones: the server's half starts after the client's.
        at = np.searchsorted(ordered, wanted, side="right") - 1
        candidate = order[np.maximum(at, 0)]
        right = (columns.span[candidate] == columns.parent[has]) & (trace_of[candidate] == trace_of[has])
        found[has[right]] = candidate[right]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    for i in same.tolist():
        one, other = int(order[i]), int(order[i + 1])
        if columns.span[one] != columns.span[other] or trace_of[one] != trace_of[other]:
            continue
        kinds = columns.forms[columns.form[one]].kind, columns.forms[columns.form[other]].kind
        if kinds == (3, 2):
            found[other] = one
        elif kinds == (2, 3):
            found[one] = other
    return found


def _parents(columns: Columns, trace_of: Array, first: Array) -> tuple[Array, Array]:
    rows = parent_rows(columns, trace_of)
    has = columns.parent != 0
    real = has & (rows >= 0)
    real[real] &= columns.span[rows[real]] == columns.parent[real]
    codes = np.zeros(len(columns), np.uint64)
    codes[has] = EXPLICIT_PARENT
    codes[real] = (rows[real] - first[trace_of[real]] + LOCAL_PARENT).astype(np.uint64)
    return codes, columns.parent[has & ~real]


def _starts(offsets: Array, trace_of: Array) -> list[bytes]:
    chunks = []
    for at in range(0, len(offsets), CHUNK):
        part = offsets[at : at + CHUNK]
        traces = trace_of[at : at + CHUNK]
        steps = np.diff(part, prepend=0)
        fresh = np.ones(len(part), bool)
        fresh[1:] = traces[1:] != traces[:-1]
        steps[fresh] = part[fresh]
        chunks.append(blocks.pack(steps))
    return chunks


def _dictionary(layout: _Layout, name: str, codes: Array, values: list[Any]) -> list[Any]:
    new, order = relabel(codes, len(values))
    layout.add(name, _chunked(new))
    return [values[i] for i in order.tolist()]


def _form(form: Form) -> bytes:
    head = struct.pack("<IIII", form.kind, form.flags, form.dropped_attributes, len(form.status))
    return head + form.status + form.trace_state


def _attributes(layout: _Layout, columns: Columns) -> list[int]:
    """Attribute columns; returns the hashes of what is in them."""
    used, order = relabel(columns.attributes, len(columns.pairs))
    numbers: dict[bytes, int] = {}
    halves = [split(columns.pairs[i]) for i in order.tolist()]
    if len({key for key, _ in halves}) > MAX_KEYS:
        common = Counter(key for key, _ in halves)
        kept = {key for key, _ in common.most_common(MAX_KEYS - 1)}
        halves = [(k, v) if k in kept and k else (b"", join(k, v)) for k, v in halves]
    else:
        halves = [(k, v) if k else (b"", join(k, v)) for k, v in halves]
    key_of = np.fromiter((numbers.setdefault(key, len(numbers)) for key, _ in halves), np.uint16, len(halves))
    keys = list(numbers)
    flat = key_of[used] if len(used) else np.zeros(0, np.uint16)
    shapes, shape_of = _shapes(flat, columns, len(keys))
    layout.add("layout", _chunked(shape_of))
    layout.add("shape_len", [blocks.pack(np.array([len(s) for s in shapes], np.uint64))])
    layout.add("shape", [blocks.pack(np.array([k for s in shapes for k in s], np.uint64))])
    layout.add("keys", [blocks.pack_strings(keys)])
    row_of = np.repeat(np.arange(len(columns)), columns.counts)
    by_key = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[by_key], np.arange(len(keys) + 1))
    edges = np.arange(0, len(columns) + CHUNK, CHUNK)
    hashes: list[int] = []
    for number, key in enumerate(keys):
        where = by_key[bounds[number] : bounds[number + 1]]
        codes, distinct = relabel(used[where], len(halves))
        values = [halves[i][1] for i in distinct.tolist()]
        rising = len(values) > 256 and bool((np.abs(np.diff(codes.astype(np.int64))) < 64).mean() > 0.7)
        cuts = np.searchsorted(row_of[where], edges)
        chunks = [codes[a:b] for a, b in pairwise(cuts.tolist())]
        layout.add(f"codes/{number}", [blocks.pack(c, rising) for c in chunks])
        cut = [values[i : i + VALUES_CHUNK] for i in range(0, len(values), VALUES_CHUNK)]
        layout.add(f"values/{number}", [pack_values(c) for c in cut])
        hashes += _hashes(key, values)
    return hashes


def _hashes(key: bytes, values: Sequence[bytes]) -> list[int]:
    if not key:
        return [attribute for pair in values for attribute in _hash(*split(pair))]
    seed = blocks.attribute_hash(key, b"")
    # A short string's text is the value after its two header bytes: nothing to decode.
    return [crc32(v[2:], seed) if v[:1] == b"\x0a" and len(v) < 130 else _hash(key, v)[0] for v in values]


def _hash(key: bytes, value: bytes) -> list[int]:
    return [blocks.attribute_hash(key, text(value_of(value)).encode("utf-8", "replace"))]


def _shapes(flat: Array, columns: Columns, keys: int) -> tuple[list[list[int]], Array]:
    """Distinct sequences of keys, and which one each record has."""
    random = np.random.default_rng(0x5EED)
    weight = random.integers(1, 1 << 63, max(1, keys), np.uint64) | np.uint64(1)
    longest = int(columns.counts.max()) if len(columns) else 0
    place = random.integers(1, 1 << 63, longest + 1, np.uint64) | np.uint64(1)
    offsets = columns.offsets
    within = np.arange(len(flat)) - np.repeat(offsets[:-1], columns.counts)
    mixed = weight[flat] * place[within]
    mixed ^= mixed >> np.uint64(29)
    total = np.zeros(len(flat) + 1, np.uint64)
    np.cumsum(mixed, out=total[1:])
    sums = total[offsets[1:]] - total[offsets[:-1]] + columns.counts.astype(np.uint64)
    _, first, inverse = np.unique(sums, return_index=True, return_inverse=True)
    shapes = [flat[offsets[i] : offsets[i + 1]].tolist() for i in first.tolist()]
    return shapes, inverse.reshape(-1)


def pack_values(values: Sequence[bytes]) -> bytes:
    """Distinct values of an attribute; hexadecimal ids of one shape take half a byte a digit."""
    length = len(values[0]) if values else 0
    if len(values) >= 32 and 10 <= length <= 80 and all(len(v) == length for v in values):
        table = np.frombuffer(b"".join(values), np.uint8).reshape(-1, length)
        fixed = (table == table[0]).all(axis=0)
        moving = table[:, ~fixed]
        digits = _NIBBLES[moving]
        if moving.shape[1] >= 8 and not (digits == 255).any():
            if digits.shape[1] % 2:
                digits = np.concatenate((digits, np.zeros((len(digits), 1), np.uint8)), axis=1)
            packed = (digits[:, ::2] << 4 | digits[:, 1::2]).astype(np.uint8)
            head = struct.pack("<BII", 1, len(values), length)
            packed_bytes: bytes = packed.tobytes()
            made: bytes = head + values[0] + fixed.astype(np.uint8).tobytes() + blocks.compress(packed_bytes)
            return made
    return b"\0" + blocks.pack_strings(values)


def unpack_values(block: bytes) -> list[bytes]:
    """What `pack_values` packed."""
    if block[0] == 0:
        return blocks.unpack_strings(block[1:])
    _, count, length = struct.unpack_from("<BII", block)
    at = struct.calcsize("<BII")
    model = np.frombuffer(block[at : at + length], np.uint8)
    fixed = np.frombuffer(block[at + length : at + 2 * length], np.uint8).astype(bool)
    packed = np.frombuffer(blocks.decompress(block[at + 2 * length :]), np.uint8).reshape(count, -1)
    digits = np.stack((packed >> 4, packed & 15), axis=2).reshape(count, -1)[:, : int((~fixed).sum())]
    table = np.tile(model, (count, 1))
    table[:, ~fixed] = _DIGITS[digits]
    joined = table.tobytes()
    return [joined[i : i + length] for i in range(0, len(joined), length)]


_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)
_NIBBLES = np.full(256, 255, np.uint8)
_NIBBLES[_DIGITS] = np.arange(16)


def _operations(
    layout: _Layout, columns: Columns, services: list[str], names: list[bytes], forms: list[Form]
) -> None:
    """Distinct (service, operation, kind) with their number of records."""
    origin, _ = relabel(columns.origin, len(columns.origins))
    name, _ = relabel(columns.name, len(columns.names))
    form, _ = relabel(columns.form, len(columns.forms))
    kinds = np.array([f.kind for f in forms], np.int64)
    distinct: dict[str, int] = {}
    service = np.array([distinct.setdefault(s, len(distinct)) for s in services], np.int64)
    key = (service[origin] * len(names) + name) * 64 + np.minimum(kinds[form], 63)
    found, counts = np.unique(key, return_counts=True)
    labels = list(distinct)
    table = [
        [labels[k // 64 // len(names)], names[k // 64 % len(names)].decode("utf-8", "replace"), k % 64, n]
        for k, n in zip(found.tolist(), counts.tolist(), strict=True)
    ]
    layout.add("operations", [blocks.compress(orjson.dumps(table))])


def dependencies(
    columns: Columns, services: list[str], first: Array, trace_of: Array
) -> tuple[list[tuple[str, str, int]], Array]:
    """Calls between services that lie within these records, and the records whose parent is elsewhere."""
    rows = parent_rows(columns, trace_of)
    origin, _ = relabel(columns.origin, len(columns.origins))
    has = np.flatnonzero(rows >= 0)
    key = origin[rows[has]].astype(np.int64) * len(services) + origin[has]
    found, counts = np.unique(key, return_counts=True)
    sums: Counter[tuple[str, str]] = Counter()
    for k, n in zip(found.tolist(), counts.tolist(), strict=True):
        parent, child = services[k // len(services)], services[k % len(services)]
        if parent != child:
            sums[parent, child] += n
    orphans = np.flatnonzero((columns.parent != 0) & (rows < 0))
    return [(parent, child, n) for (parent, child), n in sums.items()], orphans
