"""Records of a part put together again from its columns: a few as rows, or all as columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshlight.tracing.rows import Row, join
from meshlight.tracing.store import blocks
from meshlight.tracing.store.columns import Columns
from meshlight.tracing.store.part import Part
from meshlight.tracing.store.part_writer import CHUNK, EXPLICIT_PARENT, LOCAL_PARENT, VALUES_CHUNK

Array = NDArray[Any]


def rows(part: Part, positions: Array) -> list[Row]:
    """Records at some positions, in that order; reads only the chunks they lie in."""
    made: dict[int, Row] = {}
    wanted = np.unique(positions)
    extras = dict(zip(*part.extras, strict=True)) if len(part.extras[0]) else {}
    for chunk in np.unique(wanted // CHUNK).tolist():
        inside = wanted[wanted // CHUNK == chunk] - chunk * CHUNK
        attributes = _attributes(part, chunk, inside)
        starts = part._chunk("start", chunk)[inside].tolist()
        durations = part._chunk("duration", chunk)[inside].tolist()
        names = part._chunk("name", chunk)[inside].tolist()
        forms = part._chunk("form", chunk)[inside].tolist()
        origins = part._chunk("origin", chunk)[inside].tolist()
        absolute = inside + chunk * CHUNK
        spans = part._view("span", "<u8")
        parents = _parents(part, chunk, inside)
        traces = part.trace_ids(absolute)
        for i, position in enumerate(absolute.tolist()):
            made[position] = Row(
                traces[i],
                int(spans[position]).to_bytes(8, "big"),
                int(parents[i]).to_bytes(8, "big"),
                starts[i],
                starts[i] + durations[i],
                part.names[names[i]],
                part.forms[forms[i]],
                part.origins[origins[i]],
                attributes[i],
                extras.get(position, b""),
            )
    return [made[p] for p in positions.tolist()]


def _parents(part: Part, chunk: int, inside: Array) -> Array:
    codes = part._chunk("parent", chunk).astype(np.int64)
    spans = part._view("span", "<u8")
    chosen = codes[inside]
    result = np.zeros(len(inside), np.uint64)
    local = chosen >= LOCAL_PARENT
    if local.any():
        first = part.first
        trace = np.searchsorted(first, inside[local] + chunk * CHUNK, side="right") - 1
        result[local] = spans[first[trace] + chosen[local] - LOCAL_PARENT]
    explicit = chosen == EXPLICIT_PARENT
    if explicit.any():
        before = sum(int((part._chunk("parent", c) == EXPLICIT_PARENT).sum()) for c in range(chunk))
        order = np.cumsum(codes == EXPLICIT_PARENT) - 1 + before
        result[explicit] = part._view("parent_id", "<u8")[order[inside[explicit]]]
    return result


def _attributes(part: Part, chunk: int, inside: Array) -> list[list[bytes]]:
    layouts = part._chunk("layout", chunk)[inside].tolist()
    shapes = part.shapes
    keys = part.keys
    needed = sorted({key for layout in set(layouts) for key in shapes[layout]})
    cursor: dict[int, tuple[list[int], Array]] = {}
    for key in needed:
        counts = part._counts(key, chunk)
        before = (np.cumsum(counts) - counts)[inside].tolist()
        cursor[key] = before, part._chunk(f"codes/{key}", chunk)
    made: list[list[bytes]] = []
    for i, layout in enumerate(layouts):
        seen: dict[int, int] = {}
        pairs = []
        for key in shapes[layout]:
            before, codes = cursor[key]
            again = seen.get(key, 0)
            seen[key] = again + 1
            code = int(codes[before[i] + again])
            value = part.values(key, code // VALUES_CHUNK)[code % VALUES_CHUNK]
            pairs.append(value if keys[key] == b"" else join(keys[key], value))
        made.append(pairs)
    return made


def columns(part: Part) -> Columns:
    """A whole part. Its blocks bypass the cache where they are large."""
    count = part.records
    first = part.first
    lengths = np.diff(first)
    trace_of = np.repeat(np.arange(part.traces), lengths)
    ids = np.frombuffer(part.raw("trace"), ">u8").reshape(-1, 2).astype(np.uint64)
    spans = np.frombuffer(part.raw("span"), "<u8").copy()
    codes = part.column("parent").astype(np.int64)
    parents = np.zeros(count, np.uint64)
    local = codes >= LOCAL_PARENT
    parents[local] = spans[first[trace_of[local]] + codes[local] - LOCAL_PARENT]
    parents[codes == EXPLICIT_PARENT] = np.frombuffer(part.raw("parent_id"), "<u8")
    counts, attributes, pairs = _flat(part)
    extra_rows, extras = part.extras
    return Columns(
        ids[:, 0][trace_of], ids[:, 1][trace_of], spans, parents,
        part.column("start"), part.column("duration"),
        part.column("name").astype(np.uint32), part.column("form").astype(np.uint32),
        part.column("origin").astype(np.uint32), counts, attributes,
        part.names, part.forms, part.origins, pairs,
        np.array(extra_rows, np.int64), list(extras),
    )  # fmt: skip


def _flat(part: Part) -> tuple[Array, Array, list[bytes]]:
    """Counts, codes and distinct pairs of all attributes, record after record."""
    shapes, keys = part.shapes, part.keys
    layout = part.column("layout").astype(np.int64)
    lengths = np.array([len(s) for s in shapes], np.int64)
    counts = lengths[layout]
    offsets = np.cumsum(counts) - counts
    flat = np.zeros(int(counts.sum()), np.uint32)
    pairs: list[bytes] = []
    chunks = range(len(part._places["layout"]))
    for key, name in enumerate(keys):
        codes = np.concatenate([blocks.unpack(part.raw(f"codes/{key}", c)) for c in chunks]).astype(np.uint32)
        codes += np.uint32(len(pairs))
        for _, values in part.value_chunks(key):
            pairs += values if name == b"" else [join(name, value) for value in values]
        places = [[i for i, k in enumerate(shape) if k == key] for shape in shapes]
        width = max(map(len, places))
        have = np.array([len(p) for p in places], np.int64)[layout]
        at = np.array([p + [0] * (width - len(p)) for p in places], np.int64)
        records = np.repeat(np.arange(len(layout)), have)
        within = np.arange(len(records)) - np.repeat(np.cumsum(have) - have, have)
        flat[offsets[records] + at[layout[records], within]] = codes
    return counts, flat, pairs
