"""Two byte streams joined: what one side does (bytes, end of bytes, reset), the other side sees."""

from __future__ import annotations

import asyncio
import socket
import struct
from functools import partial
from typing import cast

_RESET = struct.pack("ii", 1, 0)


class Side(asyncio.Protocol):
    """One side of a relay; `join` makes a pair of them."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.peer: Side | None = None
        self.ended = False
        self._early: list[bytes] | None = []
        """What came before the other side was there: loops differ in how soon they start to read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the other side before reading."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        """Bytes go across."""
        if self._early is not None:
            self._early.append(data)
        elif self.peer and self.peer.transport:
            self.peer.transport.write(data)

    def eof_received(self) -> bool:
        """The end of bytes goes across; the other way stays open."""
        self.ended = True
        if self._early is not None:
            return True
        if self.peer and self.peer.transport and not self.peer.transport.is_closing():
            self.peer.transport.write_eof()
            if self.peer.ended and self.peer._early is None:
                self.peer.transport.close()
                return False
        return True

    def start(self) -> None:
        """Both sides are there: pass on what came early, and read."""
        early, self._early = self._early or [], None
        for data in early:
            self.data_received(data)
        if self.ended:
            if not self.eof_received() and self.transport is not None:
                self.transport.close()
        elif self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        """The other side sends faster than this one takes."""
        if self.peer and self.peer.transport:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        """This side takes again."""
        if self.peer and self.peer.transport and not self.peer.transport.is_closing():
            self.peer.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """A reset is passed on as a reset, an orderly end as an end."""
        peer, self.peer = self.peer, None
        if peer and peer.transport and not peer.transport.is_closing():
            if error is not None:
                reset(peer.transport)
            else:
                peer.transport.close()


def reset(transport: asyncio.BaseTransport) -> None:
    """End a connection so that its other end sees a reset."""
    linger(transport.get_extra_info("socket"))
    cast(asyncio.Transport, transport).abort()


def linger(stream: socket.socket) -> None:
    """Make the next close of a socket a reset."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _same(side: Side) -> Side:
    return side


async def join(one: socket.socket, other: socket.socket) -> None:
    """Join two connected sockets, which are this relay's from now on; returns while it works."""
    loop = asyncio.get_running_loop()
    sides = (Side(), Side())
    sides[0].peer, sides[1].peer = sides[1], sides[0]
    for side, stream in zip(sides, (one, other), strict=True):
        stream.setblocking(False)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.connect_accepted_socket(partial(_same, side), stream)
    for side in sides:
        side.start()
