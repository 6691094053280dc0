"""UDP through the uplink: each client of a socket has a socket of its own onward, until it falls silent."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

IDLE = 60.0
"""Seconds of silence after which a client's way is closed."""
MOST_CLIENTS = 1024
_PACKET = 65536
Peer = tuple[str, int]


class Datagrams:
    """Serves one bound socket; clients beyond the bound are not heard."""

    def __init__(self, listener: socket.socket, target: Peer) -> None:
        self._listener, self._target = listener, target
        self._onward: dict[Peer, tuple[socket.socket, float]] = {}

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._listener, self._incoming)
        try:
            while True:
                await asyncio.sleep(IDLE / 4)
                horizon = loop.time() - IDLE
                for client in [c for c, (_, seen) in self._onward.items() if seen < horizon]:
                    self._close(client)
        finally:
            loop.remove_reader(self._listener)
            for client in list(self._onward):
                self._close(client)

    def _close(self, client: Peer) -> None:
        onward, _ = self._onward.pop(client)
        asyncio.get_running_loop().remove_reader(onward)
        onward.close()

    def _incoming(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            packet, client = self._listener.recvfrom(_PACKET)
        except OSError:
            return
        known = self._onward.get(client)
        if known is None:
            if len(self._onward) >= MOST_CLIENTS:
                return
            family = socket.AF_INET6 if ":" in self._target[0] else socket.AF_INET
            onward = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            try:
                onward.connect(self._target)
            except OSError:
                onward.close()
                return
            loop.add_reader(onward, self._outgoing, onward, client)
        else:
            onward = known[0]
        self._onward[client] = (onward, loop.time())
        with suppress(OSError):  # as a network would: lost
            onward.send(packet)

    def _outgoing(self, onward: socket.socket, client: Peer) -> None:
        with suppress(OSError):
            packet = onward.recv(_PACKET)
            self._listener.sendto(packet, client)
            self._onward[client] = (onward, asyncio.get_running_loop().time())
