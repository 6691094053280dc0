"""The uplink's end of the handover: asks the outlet for sockets in the machine's network.

One outlet at a time; a newer one takes an older one's place. What is asked while there is none fails at
once, so that nobody waits for a machine that has no outlet.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from meshlight.controllers.workqueue import log
from meshlight.uplink import handover
from meshlight.uplink.handover import Answer, Ask, Operation, Protocol

_ANSWER_TIMEOUT = 15.0


class Machine:
    """Sockets of the machine's own network, while an outlet is there."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._listener: socket.socket | None = None
        self._link: socket.socket | None = None
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[socket.socket]] = {}
        self._arrived = asyncio.Event()
        self._arrivals: list[Callable[[], None]] = []

    def on_arrival(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever an outlet has come."""
        self._arrivals.append(callback)

    async def arrival(self) -> None:
        """Return when an outlet has come."""
        await self._arrived.wait()

    @property
    def reachable(self) -> bool:
        """Whether an outlet is there."""
        return self._link is not None

    def open(self) -> None:
        """Wait for outlets at the cluster's unix socket, which only the machine's side may use."""
        with suppress(FileNotFoundError):
            (self._state / handover.SOCKET).unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        handover.at(self._state, "bind", listener)
        (self._state / handover.SOCKET).chmod(0o600)
        listener.listen(4)
        listener.setblocking(False)
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def close(self) -> None:
        """Take no more outlets."""
        self._lost()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            link, _ = self._listener.accept()
        except OSError:
            return
        pid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        if pid != 0:  # a process of this pid namespace has a number here: it is no outlet
            link.close()
            return
        self._lost()
        link.setblocking(False)
        self._link = link
        asyncio.get_running_loop().add_reader(link, self._readable, link)
        log("info", "outlet connected")
        self._arrived.set()
        for callback in self._arrivals:
            callback()

    def _readable(self, link: socket.socket) -> None:
        try:
            packet, descriptor = handover.receive(link)
        except BlockingIOError:
            return
        except OSError:
            packet, descriptor = b"", None
        received = None if descriptor is None else socket.socket(fileno=descriptor)
        if not packet:
            if received is not None:
                received.close()
            if link is self._link:
                self._lost()
            return
        try:
            answer = Answer.decode(packet)
        except ValueError as error:
            log("error", "outlet's answer not understood", error=str(error))
            answer = Answer(0)
        waiting = self._waiting.pop(answer.number, None)
        if waiting is None or waiting.done():
            if received is not None:
                received.close()
        elif answer.error or received is None:
            waiting.set_exception(OSError(answer.error or errno.EPROTO, answer.text or "no socket came"))
        else:
            received.setblocking(False)
            waiting.set_result(received)

    def _lost(self) -> None:
        if self._link is not None:
            asyncio.get_running_loop().remove_reader(self._link)
            self._link.close()
            self._link = None
            self._arrived.clear()
            log("warning", "outlet gone")
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(OSError(errno.ENETUNREACH, "the outlet went away"))
        self._waiting.clear()

    async def socket(self, operation: Operation, protocol: Protocol, address: str, port: int) -> socket.socket:
        """A socket of the machine's network, bound or connected. Raises OSError with the machine's errno."""
        if self._link is None:
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        number = next(self._numbers)
        waiting: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            handover.send(self._link, Ask(number, operation, protocol, address, port).encode())
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                return await waiting
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
        finally:
            self._waiting.pop(number, None)
