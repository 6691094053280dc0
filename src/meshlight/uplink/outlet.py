"""The machine's side: opens sockets in the machine's own network for a cluster, and does nothing else.

Run by `meshlight up` beside the supervisor, with the user's own rights: `python -m meshlight.uplink.outlet`.
It ends with the supervisor. No traffic passes through it; what it opens it hands over and forgets.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import fcntl
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from meshlight.uplink import handover
from meshlight.uplink.handover import Answer, Ask

RESOLV_CONF = Path("/etc/resolv.conf")
LOCK = "outlet.lock"
"""Held while an outlet lives: a second one of the same cluster leaves at once."""
CONNECT_TIMEOUT = 10.0
BACKLOG = 128
_MOST_CONNECTS = 256
_HANDOVER = 2.0
_FIRST_RETRY, _LONGEST_RETRY = 0.02, 1.0


def log(level: str, message: str, **fields: object) -> None:
    """One JSON event a line on stderr."""
    print(
        json.dumps({"ts": time.time(), "level": level, "msg": message, **fields}), file=sys.stderr, flush=True
    )


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _address(asked: str) -> str:
    """The address that is meant; one of the machine's nameservers may be named by its number."""
    if not asked.startswith(handover.NAMESERVER):
        return asked
    words = (line.split() for line in RESOLV_CONF.read_text().splitlines())
    known = [w[1] for w in words if len(w) > 1 and w[0] == "nameserver"]
    number = int(asked.removeprefix(handover.NAMESERVER))
    if number >= len(known):
        raise FileNotFoundError(errno.ENOENT, "no such nameserver")
    return known[number]


async def open_socket(ask: Ask) -> socket.socket:
    """The socket that is asked for. Raises OSError, TimeoutError."""
    address = _address(ask.address)
    kind = socket.SOCK_STREAM if ask.protocol == "tcp" else socket.SOCK_DGRAM
    made = socket.socket(_family(address), kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if ask.operation == "listen":
            if ask.protocol == "tcp":
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address, ask.port))
            if ask.protocol == "tcp":
                made.listen(BACKLOG)
        elif ask.protocol == "tcp":
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await asyncio.get_running_loop().sock_connect(made, (address, ask.port))
        else:
            made.connect((address, ask.port))
    except BaseException:
        made.close()
        raise
    return made


class Outlet:
    """Answers one uplink after the other until the supervisor ends."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._room = asyncio.Semaphore(_MOST_CONNECTS)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled; an uplink that restarts is found again."""
        delay = _FIRST_RETRY
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
            try:
                handover.at(self._state, "connect", link)
                link.setblocking(False)
                delay = _FIRST_RETRY
                await self._serve(link)
            except OSError:
                pass
            finally:
                link.close()
            await asyncio.sleep(delay)
            delay = min(delay * 2, _LONGEST_RETRY)

    async def _serve(self, link: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def readable() -> None:
            try:
                packet, descriptor = handover.receive(link)
            except BlockingIOError:
                return
            except OSError:
                packet, descriptor = b"", None
            if descriptor is not None:
                os.close(descriptor)
            if packet:
                task = loop.create_task(self._answer(link, packet))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            elif not ended.done():
                ended.set_result(None)

        loop.add_reader(link, readable)
        try:
            await ended
        finally:
            loop.remove_reader(link)
            for task in self._tasks:
                task.cancel()

    async def _answer(self, link: socket.socket, packet: bytes) -> None:
        try:
            ask = Ask.decode(packet)
        except ValueError as error:
            log("error", "question not understood", error=str(error))
            return
        made: socket.socket | None = None
        try:
            async with self._room:
                made = await open_socket(ask)
            answer = Answer(ask.number)
        except TimeoutError:
            answer = Answer(ask.number, errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None) or errno.EINVAL
            answer = Answer(ask.number, number, os.strerror(number))
        try:
            await self._send(link, answer.encode(), made)
        except OSError as error:
            log("warning", "answer not delivered", error=str(error))
        finally:
            if made is not None:
                made.close()

    @staticmethod
    async def _send(link: socket.socket, packet: bytes, made: socket.socket | None) -> None:
        while True:
            try:
                handover.send(link, packet, None if made is None else made.fileno())
                return
            except BlockingIOError:
                await asyncio.sleep(0.001)  # the uplink reads; a unix socket has no useful "writable" here


async def serve(state: Path, supervisor: int) -> None:
    """Serve until the supervisor ends or we are told to."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    try:
        watched = os.pidfd_open(supervisor)
    except ProcessLookupError:
        return
    loop.add_reader(watched, ended.set)
    work = loop.create_task(Outlet(state).run())
    await ended.wait()
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work


def _sole(lock: int) -> bool:
    """Whether this is the cluster's only outlet; one that is about to end with its supervisor is waited for."""
    deadline = time.monotonic() + _HANDOVER
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m meshlight.uplink.outlet")
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--supervisor", required=True, type=int, help="pid with which to end")
    arguments = parser.parse_args()
    with (arguments.state / LOCK).open("w") as lock:
        if not _sole(lock.fileno()):
            return
        asyncio.run(serve(arguments.state, arguments.supervisor))


if __name__ == "__main__":
    main()
