"""The write-ahead log: payloads as they came, appended to segments and synced before they are acknowledged.

A record is length, CRC-32, protocol's name and the zstd-compressed body. A torn record at the end of a
segment is what a kill leaves: never acknowledged, cut off. Anything else that does not check is damage:
what lies before it is kept, and the rest of that segment is reported.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshlight.tracing.store import blocks

_HEAD = struct.Struct("<IIB")
SUFFIX = ".wal"


@dataclass(frozen=True, slots=True)
class Payload:
    """A request's body, and the name of the decoder that reads it."""

    protocol: str
    body: bytes


class Segment:
    """One file of the log, open for appending. `number` orders segments."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"{number:012d}{SUFFIX}"
        self.number = number
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._end = os.fstat(self._fd).st_size
        sync_folder(folder)

    def append(self, payloads: Sequence[Payload]) -> None:
        """Write and sync. Raises OSError, and then nothing of this call is in the log."""
        written = bytearray()
        for payload in payloads:
            name = payload.protocol.encode()
            body = blocks.compress(payload.body, 1)
            content = name + body
            written += _HEAD.pack(len(content), zlib.crc32(content), len(name)) + content
        try:
            view = memoryview(written)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._end)
            raise
        self._end += len(written)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._end

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


@dataclass(slots=True)
class Replay:
    """What reading a segment found: `damage` says what could not be read, empty when all was."""

    path: Path
    damage: str = ""

    def payloads(self) -> Iterator[Payload]:
        """The payloads, in order; a torn tail is cut off the file."""
        content = self.path.read_bytes()
        at = 0
        while at < len(content):
            head = content[at : at + _HEAD.size]
            if len(head) < _HEAD.size:
                break
            length, crc, name = _HEAD.unpack(head)
            end = at + _HEAD.size + length
            if end > len(content):
                break
            record = content[at + _HEAD.size : end]
            if zlib.crc32(record) != crc:
                if end < len(content):
                    self.damage = f"{self.path.name}: the record at byte {at} has a wrong checksum"
                    return
                break
            yield Payload(record[:name].decode(), blocks.decompress(record[name:]))
            at = end
        if at < len(content):
            os.truncate(self.path, at)


def segments(folder: Path) -> list[Path]:
    """The log's files, oldest first."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
