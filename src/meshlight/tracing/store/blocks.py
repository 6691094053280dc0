"""Blocks of a part: integers and byte strings, packed small and checked by checksum.

Integers are divided by a common power of a thousand, optionally turned into differences, split into
byte planes and compressed: planes of zeros vanish, planes of noise cost what they must.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

Array = NDArray[Any]
LEVEL = 3
_HEADER = struct.Struct("<BBIQ")
_DELTA = 1
_RAW = 2
_local = threading.local()


class Damaged(Exception):
    """Bytes on disk are not what was written; the message says where."""


def compress(plain: bytes, level: int = LEVEL) -> bytes:
    """A zstd frame."""
    compressor = getattr(_local, f"c{level}", None)
    if compressor is None:
        compressor = zstandard.ZstdCompressor(level=level)
        setattr(_local, f"c{level}", compressor)
    compressed: bytes = compressor.compress(plain)
    return compressed


def decompress(frame: bytes, limit: int = 1 << 30) -> bytes:
    """The content of a zstd frame. Raises Damaged when it is none or larger than `limit` bytes."""
    try:
        size = zstandard.frame_content_size(frame)
        if size > limit:
            raise Damaged(f"a block of {size} bytes is larger than {limit}")
        if (decompressor := getattr(_local, "d", None)) is None:
            decompressor = _local.d = zstandard.ZstdDecompressor()
        plain: bytes = decompressor.decompress(frame)
    except zstandard.ZstdError as error:
        raise Damaged(f"a block cannot be decompressed: {error}") from error
    return plain


def _zigzag(values: Array) -> Array:
    signed = values.astype(np.int64)
    return ((signed << 1) ^ (signed >> 63)).view(np.uint64)


def _unzigzag(values: Array) -> Array:
    return (values >> np.uint64(1)).view(np.int64) ^ -(values & np.uint64(1)).view(np.int64)


def pack(values: Array, delta: bool = False) -> bytes:
    """Non-negative integers; with `delta` they are kept as differences (for codes that rise)."""
    numbers = values.astype(np.uint64)
    scale = 1
    if not delta and len(numbers):
        while scale < 10**9 and not (numbers % np.uint64(scale * 1000)).any() and numbers.any():
            scale *= 1000
        if scale > 1:
            numbers = numbers // np.uint64(scale)
    if delta and len(numbers):
        numbers = _zigzag(np.diff(numbers.view(np.int64), prepend=np.int64(0)))
    top = int(numbers.max()) if len(numbers) else 0
    width = (top.bit_length() + 7) // 8
    planes = numbers.view(np.uint8).reshape(-1, 8)[:, :width].T
    header = _HEADER.pack(_DELTA if delta else 0, width, len(numbers), scale)
    return header + (compress(planes.tobytes()) if width else b"")


def unpack(block: bytes) -> Array:
    """What `pack` packed, in the smallest unsigned type that holds it. Raises Damaged."""
    try:
        mode, width, count, scale = _HEADER.unpack_from(block)
    except struct.error as error:
        raise Damaged("a block is shorter than its header") from error
    wide = 1 if width <= 1 else 2 if width == 2 else 4 if width <= 4 else 8
    if not width:
        return np.zeros(count, np.uint8)
    planes = np.frombuffer(decompress(block[_HEADER.size :]), np.uint8)
    if len(planes) != width * count:
        raise Damaged(f"a block holds {len(planes)} bytes instead of {width * count}")
    if mode == _DELTA or scale > 1:
        wide = 8
    if wide == 1:
        return planes
    bytes_of = np.zeros((count, wide), np.uint8)
    bytes_of[:, :width] = planes.reshape(width, count).T
    numbers = bytes_of.reshape(-1).view(f"<u{wide}")
    if mode == _DELTA:
        total = np.cumsum(_unzigzag(numbers))
        return total.astype(np.uint32) if not len(total) or total.max() < 1 << 32 else total.view(np.uint64)
    return numbers * np.uint64(scale) if scale > 1 else numbers


def pack_signed(values: Array) -> bytes:
    """Integers of either sign; multiples of a thousand stay cheap."""
    scale = 1
    while scale < 10**9 and not (values % (scale * 1000)).any() and values.any():
        scale *= 1000
    return struct.pack("<Q", scale) + pack(_zigzag(values // scale))


def unpack_signed(block: bytes) -> Array:
    """What `pack_signed` packed, as int64."""
    (scale,) = struct.unpack_from("<Q", block)
    values = _unzigzag(unpack(block[8:]).astype(np.uint64))
    return values * scale if scale > 1 else values


def pack_strings(values: Sequence[bytes]) -> bytes:
    """Byte strings."""
    lengths = pack(np.fromiter(map(len, values), np.uint64, len(values)))
    return struct.pack("<I", len(lengths)) + lengths + compress(b"".join(values))


def unpack_strings(block: bytes) -> list[bytes]:
    """What `pack_strings` packed."""
    (size,) = struct.unpack_from("<I", block)
    ends = np.cumsum(unpack(block[4 : 4 + size]).astype(np.int64)).tolist()
    joined = decompress(block[4 + size :])
    if (ends[-1] if ends else 0) != len(joined):
        raise Damaged("a block of strings is not as long as its strings")
    start, found = 0, []
    for end in ends:
        found.append(joined[start:end])
        start = end
    return found


def checksum(block: bytes | memoryview) -> int:
    """CRC-32 of a block."""
    return zlib.crc32(block)


class Bloom:
    """A set that may say yes wrongly (about 1 in 100) and never no wrongly."""

    def __init__(self, bits: Array) -> None:
        self._bits = bits
        self._mask = np.uint64(len(bits) * 8 - 1)

    @staticmethod
    def of(hashes: Array) -> Bloom:
        """The set of some 32-bit hashes."""
        size = 64
        while size < 10 * len(hashes):
            size *= 2
        bloom = Bloom(np.zeros(size // 8, np.uint8))
        flags = np.zeros(size, bool)
        for probe in bloom._probes(hashes.astype(np.uint64)):
            flags[probe] = True
        bloom._bits[:] = np.packbits(flags, bitorder="little")
        return bloom

    def _probes(self, hashes: Array) -> list[Array]:
        second = (hashes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(23) | np.uint64(1)
        return [(hashes + np.uint64(i) * second) & self._mask for i in range(4)]

    def __contains__(self, hash_: int) -> bool:
        probes = self._probes(np.array([hash_], np.uint64))
        return all(int(self._bits[int(p[0]) >> 3]) >> (int(p[0]) & 7) & 1 for p in probes)

    def tobytes(self) -> bytes:
        """For the file."""
        return self._bits.tobytes()


def attribute_hash(key: bytes, text: bytes) -> int:
    """Hash of an attribute as filters see it."""
    return zlib.crc32(text, zlib.crc32(key) ^ 0x5BD1E995)
