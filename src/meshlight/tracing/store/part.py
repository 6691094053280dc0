"""Read a part: by trace id, by positions, by attribute. Decoded blocks are kept in a bounded cache."""

from __future__ import annotations

import mmap
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from meshlight.tracing.model import text
from meshlight.tracing.rows import Form, Origin, Row, split, value_of
from meshlight.tracing.store import blocks
from meshlight.tracing.store.blocks import Damaged
from meshlight.tracing.store.columns import Columns
from meshlight.tracing.store.part_writer import CHUNK, MAGIC, TRAILER, VERSION, unpack_values

Array = NDArray[Any]


class BlockCache:
    """Decoded blocks, least recently used ones dropped; bounded in bytes. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._blocks: OrderedDict[tuple[int, str, int], tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, str, int], make: Callable[[], tuple[Any, int]]) -> Any:
        """The block of a key, made when it is not here; `make` returns it with its size in bytes."""
        with self._lock:
            if (known := self._blocks.get(key)) is not None:
                self._blocks.move_to_end(key)
                return known[0]
        block, size = make()
        with self._lock:
            if key not in self._blocks:
                self._blocks[key] = block, size
                self.bytes += size
                while self.bytes > self.limit and len(self._blocks) > 1:
                    _, (_, dropped) = self._blocks.popitem(last=False)
                    self.bytes -= dropped
        return block

    def forget(self, part: int) -> None:
        """Drop the blocks of a part that is gone."""
        with self._lock:
            for key in [k for k in self._blocks if k[0] == part]:
                self.bytes -= self._blocks.pop(key)[1]


class Part:
    """An open part. Raises Damaged when its bytes are not those written."""

    def __init__(self, number: int, content: bytes | Path, cache: BlockCache) -> None:
        self.number = number
        self.path = content if isinstance(content, Path) else None
        self._cache = cache
        self._checked: set[str] = set()
        if isinstance(content, Path):
            with content.open("rb") as file:
                try:
                    self._bytes: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except ValueError as error:
                    raise Damaged(f"{content.name} is empty") from error
        else:
            self._bytes = content
        self.size = len(self._bytes)
        footer = self._footer()
        self._places: dict[str, list[tuple[int, int, int]]] = footer["blocks"]
        self.records: int = footer["records"]
        self.traces: int = footer["traces"]
        self._base: int = footer["base"]
        self.earliest: int = footer["base"]
        self.latest: int = footer["latest"]
        self.longest: int = footer["longest"]
        self._keys_count: int = footer["keys"]

    def _footer(self) -> Any:
        if self.size < TRAILER.size + len(MAGIC) or self._bytes[: len(MAGIC)] != MAGIC:
            raise Damaged(f"{self.name} is no part")
        length, crc, magic = TRAILER.unpack(self._bytes[self.size - TRAILER.size :])
        at = self.size - TRAILER.size - length
        if magic != MAGIC or at < 0:
            raise Damaged(f"{self.name} is cut off")
        encoded = self._bytes[at : at + length]
        if blocks.checksum(encoded) != crc:
            raise Damaged(f"{self.name}: the footer's checksum is wrong")
        footer = orjson.loads(blocks.decompress(encoded))
        if footer["version"] > VERSION:
            raise Damaged(f"{self.name} is of format {footer['version']}, newer than this program's {VERSION}")
        return footer

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name if self.path else f"part {self.number}"

    def raw(self, block: str, chunk: int = 0) -> bytes:
        """The bytes of a block. Raises Damaged when its checksum is wrong."""
        offset, length, crc = self._places[block][chunk]
        encoded: bytes = self._bytes[offset : offset + length]
        if blocks.checksum(encoded) != crc:
            raise Damaged(f"{self.name}: the checksum of block {block}[{chunk}] is wrong")
        return encoded

    def verify(self) -> None:
        """Read every block. Raises Damaged."""
        for block, places in self._places.items():
            for chunk in range(len(places)):
                self.raw(block, chunk)

    def _cached(self, block: str, chunk: int, decode: Callable[[bytes], Any]) -> Any:
        def make() -> tuple[Any, int]:
            made = decode(self.raw(block, chunk))
            if isinstance(made, np.ndarray):
                return made, made.nbytes
            return made, sum(len(v) + 40 if isinstance(v, bytes) else 200 for v in made) + 64

        return self._cache.get((self.number, block, chunk), make)

    def _view(self, block: str, kind: str) -> Array:
        """An uncompressed block, seen in place; checked once."""
        self._check(block)
        offset, length, _ = self._places[block][0]
        return np.frombuffer(self._bytes, kind, length // np.dtype(kind).itemsize, offset)

    @property
    def names(self) -> list[bytes]:
        """Distinct record names."""
        return self._cached("names", 0, blocks.unpack_strings)  # type: ignore[no-any-return]

    @property
    def forms(self) -> list[Form]:
        """Distinct forms."""
        return self._cached("forms", 0, lambda b: [_form(f) for f in blocks.unpack_strings(b)])  # type: ignore[no-any-return]

    @property
    def origins(self) -> list[Origin]:
        """Distinct origins."""

        def decode(block: bytes) -> list[Origin]:
            flat = blocks.unpack_strings(block)
            return [Origin(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)]

        return self._cached("origins", 0, decode)  # type: ignore[no-any-return]

    @property
    def operations(self) -> list[list[Any]]:
        """Rows of service, operation, kind, number of records."""
        return orjson.loads(blocks.decompress(self.raw("operations")))  # type: ignore[no-any-return]

    @property
    def edges(self) -> list[tuple[str, str, int]]:
        """Calls between services within this part."""
        return [tuple(e) for e in orjson.loads(blocks.decompress(self.raw("edges")))]

    @property
    def orphans(self) -> Array:
        """Positions of records whose parent is in no record of this part."""
        return self._cached("orphan", 0, blocks.unpack)  # type: ignore[no-any-return]

    @property
    def keys(self) -> list[bytes]:
        """Distinct attribute keys; the empty one holds whole pairs of rare keys."""
        return self._cached("keys", 0, blocks.unpack_strings)  # type: ignore[no-any-return]

    @property
    def first(self) -> Array:
        """Position of the first record of each trace, and the end."""

        def decode(block: bytes) -> Array:
            ends = np.zeros(self.traces + 1, np.int64)
            np.cumsum(blocks.unpack(block), out=ends[1:])
            return ends

        return self._cached("trace_len", 0, decode)  # type: ignore[no-any-return]

    def column(self, name: str) -> Array:
        """A whole column: `start` (ns), `duration` (ns), `name`, `form`, `origin`, `layout`."""
        chunks = [self._chunk(name, c) for c in range(len(self._places[name]))]
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def _chunk(self, name: str, chunk: int) -> Array:
        if name == "start":
            return self._cached(name, chunk, lambda b: self._starts(b, chunk))  # type: ignore[no-any-return]
        decode = blocks.unpack_signed if name == "duration" else blocks.unpack
        return self._cached(name, chunk, decode)  # type: ignore[no-any-return]

    def _starts(self, block: bytes, chunk: int) -> Array:
        steps = blocks.unpack(block).astype(np.int64)
        first = self.first
        low = chunk * CHUNK
        begin = np.searchsorted(first, low, side="right")
        end = np.searchsorted(first, low + len(steps), side="left")
        resets = np.concatenate(([0], first[begin:end] - low))
        total = np.cumsum(steps)
        base = total[resets] - steps[resets]
        return total - np.repeat(base, np.diff(resets, append=len(steps))) + self._base

    def _check(self, block: str) -> None:
        """Compare the checksum of a block that is read in place, once."""
        if block not in self._checked:
            self.raw(block)
            self._checked.add(block)

    def find(self, wanted: bytes) -> tuple[int, int] | None:
        """First and end position of a trace's records."""
        self._check("trace")
        place, length, _ = self._places["trace"][0]
        low, high = 0, length // 16
        content = self._bytes
        while low < high:
            middle = (low + high) // 2
            if content[place + middle * 16 : place + middle * 16 + 16] < wanted:
                low = middle + 1
            else:
                high = middle
        if low < length // 16 and content[place + low * 16 : place + low * 16 + 16] == wanted:
            first = self.first
            return int(first[low]), int(first[low + 1])
        return None

    def positions(self, trace: bytes) -> Array:
        """Positions of a trace's records."""
        found = self.find(trace)
        return np.arange(*found) if found else np.zeros(0, np.int64)

    def trace_ids(self, positions: Array) -> list[bytes]:
        """Trace ids of records."""
        self._check("trace")
        place, _, _ = self._places["trace"][0]
        traces = (np.searchsorted(self.first, positions, side="right") - 1).tolist()
        return [self._bytes[place + t * 16 : place + t * 16 + 16] for t in traces]

    def may_have(self, key: bytes, value: bytes) -> bool:
        """False when no record and no resource has the attribute with that text."""
        bloom = self._cached("bloom", 0, lambda b: np.frombuffer(b, np.uint8))
        return blocks.attribute_hash(key, value) in blocks.Bloom(bloom)

    def values(self, key: int, chunk: int) -> list[bytes]:
        """A chunk of the distinct values of a key."""
        return self._cached(f"values/{key}", chunk, unpack_values)  # type: ignore[no-any-return]

    def value_chunks(self, key: int) -> Iterator[tuple[int, list[bytes]]]:
        """All distinct values of a key, chunk by chunk, with the code of each chunk's first."""
        code = 0
        for chunk in range(len(self._places[f"values/{key}"])):
            values = unpack_values(self.raw(f"values/{key}", chunk))
            yield code, values
            code += len(values)

    def _shapes(self) -> list[list[int]]:
        lengths = blocks.unpack(self.raw("shape_len")).tolist()
        flat = blocks.unpack(self.raw("shape")).tolist()
        shapes, at = [], 0
        for length in lengths:
            shapes.append(flat[at : at + length])
            at += length
        return shapes

    def _counts(self, key: int, chunk: int) -> Array:
        """How many attributes of a key each record of a chunk has."""
        table: Array = self._cache.get((self.number, f"has/{key}", 0), lambda: self._has(key))
        found: Array = table[self._chunk("layout", chunk)]
        return found

    def _has(self, key: int) -> tuple[Array, int]:
        counts = np.array([shape.count(key) for shape in self.shapes], np.uint32)
        return counts, counts.nbytes

    @property
    def shapes(self) -> list[list[int]]:
        """Distinct sequences of key numbers."""

        def make() -> tuple[Any, int]:
            shapes = self._shapes()
            return shapes, sum(8 * len(s) + 64 for s in shapes)

        return self._cache.get((self.number, "shapes", 0), make)  # type: ignore[no-any-return]

    def positions_of(self, key: int, codes: Array) -> Array:
        """Positions of the records that have a key with one of some value codes."""
        found = []
        for chunk in range(len(self._places["layout"])):
            have = self._chunk(f"codes/{key}", chunk)
            hits = np.flatnonzero(have == codes[0] if len(codes) == 1 else np.isin(have, codes))
            if len(hits):
                counts = self._counts(key, chunk)
                rows = np.repeat(np.arange(len(counts)), counts)
                found.append(rows[hits] + chunk * CHUNK)
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def attribute(self, key: bytes, value: str) -> Array:
        """Positions of the records that have an attribute whose text is `value`."""
        found = []
        for number, name in enumerate(self.keys):
            if name not in (key, b""):
                continue
            codes = [
                code + i
                for code, values in self.value_chunks(number)
                for i, encoded in enumerate(values)
                if _matches(name, encoded, key, value)
            ]
            if codes:
                found.append(self.positions_of(number, np.array(codes)))
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def containing(self, needle: bytes) -> Array:
        """Positions of the records with a key, value, event or body that contains some bytes."""
        found = []
        for number, key in enumerate(self.keys):
            everything = holds(needle, key)
            codes = [
                code + i
                for code, values in self.value_chunks(number)
                if everything or holds(needle, b"\0".join(values))
                for i, encoded in enumerate(values)
                if everything or holds(needle, encoded if encoded[:1] == b"\x0a" else _text(encoded))
            ]
            if codes:
                found.append(self.positions_of(number, np.array(codes)))
        rows, extras = self.extras
        found.append(np.array([r for r, e in zip(rows, extras, strict=True) if holds(needle, e)], np.int64))
        return np.unique(np.concatenate(found))

    @property
    def extras(self) -> tuple[list[int], list[bytes]]:
        """Positions of the records that have an extra, and those."""

        def make() -> tuple[Any, int]:
            rows = blocks.unpack(self.raw("extra_row")).tolist()
            extras = blocks.unpack_strings(self.raw("extra"))
            return (rows, extras), sum(len(e) + 80 for e in extras) + 64

        return self._cache.get((self.number, "extras", 0), make)  # type: ignore[no-any-return]

    def rows(self, positions: Array) -> list[Row]:
        """Records at some positions, in that order."""
        from meshlight.tracing.store.part_rows import rows

        return rows(self, positions)

    def columns(self) -> Columns:
        """Everything, for merging."""
        from meshlight.tracing.store.part_rows import columns

        return columns(self)

    def close(self) -> None:
        """Give the file back; nothing may read this part any more."""
        self._cache.forget(self.number)


def holds(needle: bytes, content: bytes) -> bool:
    """Whether some bytes are within others, without regard to case; `needle` is lower-case UTF-8."""
    if needle.isascii():
        return needle in content.lower()
    return needle in content.decode("utf-8", "replace").lower().encode()


def _form(encoded: bytes) -> Form:
    kind, flags, dropped, length = struct.unpack_from("<IIII", encoded)
    return Form(kind, encoded[16 : 16 + length], flags, encoded[16 + length :], dropped)


def _text(encoded: bytes) -> bytes:
    return text(value_of(encoded)).encode("utf-8", "replace")


def _matches(column: bytes, encoded: bytes, key: bytes, value: str) -> bool:
    if column == b"":
        inner, encoded = split(encoded)
        if inner != key:
            return False
    return text(value_of(encoded)) == value
