"""SPDY/3.1 framing, as much as port forwarding needs: streams, data, pings, resets.

Pure: bytes in, frames out, and back. Rules: the public draft "SPDY Protocol - Draft 3.1".
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FIN = 0x01
_CONTROL = 0x8000
_VERSION = 3
_MAX_FRAME = 1 << 24

_NAMES = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language "
    "accept-ranges age allow authorization cache-control connection content-base content-encoding "
    "content-language content-length content-location content-md5 content-range content-type date etag "
    "expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since "
    "last-modified location max-forwards pragma proxy-authenticate proxy-authorization range referer "
    "retry-after server te trailer transfer-encoding upgrade user-agent vary via warning "
    "www-authenticate method get status|200 OK|version HTTP/1.1 url public set-cookie keep-alive origin"
)
_REST = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)


def _dictionary() -> bytes:
    """The compression dictionary of the draft, section 2.6.10.1 (1423 bytes, Adler-32 e3c6a7c2)."""
    before, status, after = _NAMES.split("|")
    words = [*before.split(), status, *after.split()]
    return b"".join(len(w).to_bytes(4, "big") + w.encode() for w in words) + _REST.encode()


DICTIONARY = _dictionary()


class SpdyError(Exception):
    """The peer sent what is not SPDY/3.1."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: `kind` is 0 for data. `headers` only for SYN_STREAM, SYN_REPLY and HEADERS."""

    kind: int
    stream: int
    flags: int = 0
    payload: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()

    def header(self, name: str) -> str:
        """A header's value; empty when absent."""
        return dict(self.headers).get(name, "")


class Session:
    """The framing state of one connection: what is incomplete, and the two header compressors."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._deflate = zlib.compressobj(zdict=DICTIONARY)

    def receive(self, content: bytes) -> Iterator[Frame]:
        """The frames completed by more bytes. Raises SpdyError."""
        self._buffer += content
        while len(self._buffer) >= 8:
            first, second = struct.unpack_from(">II", self._buffer)
            flags, size = second >> 24, second & 0xFFFFFF
            if len(self._buffer) < 8 + size:
                return
            body = bytes(self._buffer[8 : 8 + size])
            del self._buffer[: 8 + size]
            if first >> 31:
                yield self._control(first, flags, body)
            else:
                yield Frame(0, first, flags, body)

    def _control(self, first: int, flags: int, body: bytes) -> Frame:
        version, kind = (first >> 16) & 0x7FFF, first & 0xFFFF
        if version != _VERSION:
            raise SpdyError(f"version {version} of SPDY is not spoken here")
        if kind == PING:
            return Frame(kind, 0, flags, body)
        if len(body) < 4:
            return Frame(kind, 0, flags, body)
        stream = int.from_bytes(body[:4], "big") & 0x7FFFFFFF
        skip = {SYN_STREAM: 10, SYN_REPLY: 4, HEADERS: 4}.get(kind)
        if skip is None:
            return Frame(kind, stream, flags, body[4:])
        return Frame(kind, stream, flags, headers=self._headers(body[skip:]))

    def _headers(self, compressed: bytes) -> tuple[tuple[str, str], ...]:
        try:
            raw = self._inflate.decompress(compressed, _MAX_FRAME)
            count, at = int.from_bytes(raw[:4], "big"), 4
            words = []
            for _ in range(2 * count):
                size = int.from_bytes(raw[at : at + 4], "big")
                words.append(raw[at + 4 : at + 4 + size].decode())
                at += 4 + size
        except (zlib.error, UnicodeDecodeError) as error:
            raise SpdyError(f"headers cannot be read: {error}") from error
        return tuple(zip(words[::2], words[1::2], strict=True))

    def reply(self, stream: int) -> bytes:
        """SYN_REPLY without headers."""
        return control(SYN_REPLY, 0, stream.to_bytes(4, "big") + self._block({}))

    def open(self, stream: int, headers: Mapping[str, str], fin: bool = False) -> bytes:
        """SYN_STREAM; `fin` closes our side of it at once. A client's streams have odd numbers."""
        head = struct.pack(">IIH", stream, 0, 0)
        return control(SYN_STREAM, FIN if fin else 0, head + self._block(headers))

    def _block(self, headers: Mapping[str, str]) -> bytes:
        raw = len(headers).to_bytes(4, "big")
        for pair in headers.items():
            for word in pair:
                encoded = word.encode()
                raw += len(encoded).to_bytes(4, "big") + encoded
        return self._deflate.compress(raw) + self._deflate.flush(zlib.Z_SYNC_FLUSH)


def control(kind: int, flags: int, body: bytes) -> bytes:
    """A control frame."""
    return struct.pack(">HHI", _CONTROL | _VERSION, kind, flags << 24 | len(body)) + body


def ping(body: bytes) -> bytes:
    """The answer to a PING: the same id."""
    return control(PING, 0, body)


def reset(stream: int, status: int = 5) -> bytes:
    """RST_STREAM; 5 is CANCEL."""
    return control(RST_STREAM, 0, struct.pack(">II", stream, status))


def data(stream: int, content: bytes, fin: bool = False) -> bytes:
    """A data frame."""
    return struct.pack(">II", stream, (FIN if fin else 0) << 24 | len(content)) + content
