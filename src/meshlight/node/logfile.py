"""Container logs as CRI runtimes keep them: parsing, what of them a reader wants, following.

A line is `RFC3339Nano stdout|stderr F|P text`; an attempt's log `N.log` has its older half in `N.log.1`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

_FOLLOW = 0.1
"""Seconds between looks at a followed log."""
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What of a log is wanted: `since` in seconds of the epoch, `tail` lines and `limit` bytes (-1: all)."""

    follow: bool = False
    timestamps: bool = False
    since: float = 0.0
    tail: int = -1
    limit: int = -1
    stream: str = "All"

    @classmethod
    def of(cls, query: Iterable[tuple[str, str]], now: float) -> LogOptions:
        """From a request's query. Raises ValueError naming the option."""
        given = dict(query)

        def number(key: str) -> int | None:
            if key not in given:
                return None
            if not given[key].isdigit():
                raise ValueError(f"{key} must be a number of at least 0, not {given[key]!r}")
            return int(given[key])

        since = 0.0
        if (seconds := number("sinceSeconds")) is not None:
            since = now - seconds
        elif "sinceTime" in given:
            since = datetime.fromisoformat(given["sinceTime"].replace("Z", "+00:00")).timestamp()
        tail, limit = number("tailLines"), number("limitBytes")
        stream = given.get("stream") or "All"
        if stream not in ("All", "Stdout", "Stderr"):
            raise ValueError(f"stream must be All, Stdout or Stderr, not {stream!r}")
        return cls(
            given.get("follow") in ("true", "1"),
            given.get("timestamps") in ("true", "1"),
            since,
            -1 if tail is None else tail,
            -1 if limit is None else limit,
            stream,
        )


def decode(line: bytes, options: LogOptions) -> bytes:
    """What a reader sees of a line; empty when it is too old or of another stream.

    A partial line (tag P) has no line end of its own.
    """
    stamp, _, rest = line.partition(b" ")
    stream, _, rest = rest.partition(b" ")
    tag, _, text = rest.partition(b" ")
    if options.stream != "All" and stream.decode() != options.stream.lower():
        return b""
    if options.since and _seconds(stamp) < options.since:
        return b""
    shown = stamp + b" " + text if options.timestamps else text
    return shown if tag == b"P" else shown + b"\n"


def _seconds(stamp: bytes) -> float:
    try:
        whole, _, fraction = stamp.decode().rstrip("Z").partition(".")
        return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")
    except ValueError:
        return 0.0


class Reader:
    """Reads an attempt's log forward, across its rotation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._older = path.with_name(path.name + ".1")
        self._file: BinaryIO | None = None
        self._rest = b""
        for candidate in (self._older, self._path):
            if candidate.exists():
                self._file = candidate.open("rb")
                break

    def seek_tail(self, lines: int) -> None:
        """Go to where the last `lines` complete lines begin."""
        parts = [p for p in (self._older, self._path) if p.exists()]
        wanted = lines
        for path in reversed(parts):
            start, found = _tail_offset(path, wanted)
            if self._file is not None:
                self._file.close()
            self._file = path.open("rb")
            self._file.seek(start)
            wanted -= found
            if wanted <= 0:
                return

    def read(self) -> list[bytes]:
        """The next complete lines; none when all that is there has been read."""
        while True:
            if self._file is None:
                if not self._path.exists():
                    return []
                self._file = self._path.open("rb")
            if chunk := self._file.read(_CHUNK):
                *complete, self._rest = (self._rest + chunk).split(b"\n")
                if complete:
                    return complete
            elif not self._next():
                return []

    def _next(self) -> bool:
        """Go on with the newer file if ours has been rotated away."""
        assert self._file is not None
        try:
            current = self._path.stat().st_ino
        except FileNotFoundError:
            return False
        if os.fstat(self._file.fileno()).st_ino == current:
            return False
        if self._file.read(1):  # written between our last read and the rotation
            self._file.seek(-1, 1)
            return True
        self._file.close()
        self._file = self._path.open("rb")
        return True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _tail_offset(path: Path, lines: int) -> tuple[int, int]:
    """Where the last `lines` lines of a file begin, and how many there are."""
    if lines <= 0:
        return path.stat().st_size, 0
    with path.open("rb") as file:
        position = file.seek(0, 2)
        found = 0
        end = position
        while position > 0:
            step = min(_CHUNK, position)
            position -= step
            file.seek(position)
            chunk = file.read(step)
            at = len(chunk)
            while (at := chunk.rfind(b"\n", 0, at)) >= 0:
                if position + at + 1 == end:
                    continue  # the newline that ends the file
                found += 1
                if found == lines:
                    return position + at + 1, found
        return 0, found + (1 if end else 0)


def last_lines(path: Path, lines: int, limit: int) -> str:
    """The end of a log as text, at most `limit` bytes."""
    if not path.exists():
        return ""
    reader = Reader(path)
    try:
        reader.seek_tail(lines)
        text = b""
        while block := reader.read():
            text = (text + b"".join(decode(line, LogOptions()) for line in block))[-limit:]
    finally:
        reader.close()
    return text.decode(errors="replace")


async def stream(path: Path, options: LogOptions, running: Callable[[], bool]) -> AsyncIterator[bytes]:
    """The log as a reader wants it, in blocks; when followed, until the container has ended."""
    left = options.limit
    reader = Reader(path)
    try:
        if options.tail >= 0:
            reader.seek_tail(options.tail)
        while True:
            alive = running()  # asked before reading, so that the last words are not missed
            lines = reader.read()
            block = b"".join(decode(line, options) for line in lines)
            if left >= 0:
                block = block[:left]
                left -= len(block)
            if block:
                yield block
            if left == 0:
                return
            if not lines:
                if not (options.follow and alive):
                    return
                await asyncio.sleep(_FOLLOW)
    finally:
        reader.close()
