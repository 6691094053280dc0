"""The machine's nameservers, for pods: a relay on the fabric's gateway address.

Pods cannot use the machine's /etc/resolv.conf as it is: it may name a resolver on loopback, or change while
they run. Nodes name this relay instead; it passes queries on, unread, by sockets of the machine's own network.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from pathlib import Path

from meshlight.controllers.workqueue import log
from meshlight.uplink import relay
from meshlight.uplink.handover import NAMESERVER
from meshlight.uplink.machine import Machine

NODE_FILE = Path("/run/meshlight/resolv.conf")
"""What nodes have as their resolver's configuration, for pods with dnsPolicy Default."""
PORT = 53
MOST_NAMESERVERS = 3
TIMEOUT = 2.0
"""Seconds for one of the machine's nameservers."""
MOST_PENDING = 512
_PACKET = 65536


def nameservers(text: str) -> list[str]:
    """Nameservers that a resolver's configuration names."""
    words = (line.split() for line in text.splitlines())
    return [w[1] for w in words if len(w) > 1 and w[0] == "nameserver"]


def node_file(machine: str, gateway: str, *, isolated: bool) -> str:
    """The nodes' configuration: the machine's, with the relay as nameserver; none if there is no way out."""
    if isolated or not nameservers(machine):
        return ""
    kept = [line for line in machine.splitlines() if line.split()[:1] in (["search"], ["options"])]
    return "\n".join([f"nameserver {gateway}", *kept]) + "\n"


class NameRelay:
    """Serves UDP and TCP on one address."""

    def __init__(self, machine: Machine, address: str) -> None:
        self._machine, self._address, self._port = machine, address, PORT
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as datagrams,
            socket.create_server((self._address, self._port)) as streams,
        ):
            datagrams.bind((self._address, self._port))
            streams.setblocking(False)
            loop.add_reader(datagrams, self._datagram, datagrams)
            try:
                while True:
                    stream, _ = await loop.sock_accept(streams)
                    self._start(self._stream(stream))
            finally:
                loop.remove_reader(datagrams)
                for task in self._tasks:
                    task.cancel()

    def _start(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _datagram(self, link: socket.socket) -> None:
        with suppress(OSError):
            query, client = link.recvfrom(_PACKET)
            if len(self._tasks) < MOST_PENDING:
                self._start(self._ask(link, query, client))

    async def _ask(self, link: socket.socket, query: bytes, client: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        for number in range(MOST_NAMESERVERS):
            try:
                with await self._machine.socket("connect", "udp", f"{NAMESERVER}{number}", PORT) as onward:
                    async with asyncio.timeout(TIMEOUT):
                        await loop.sock_sendall(onward, query)
                        answer = await loop.sock_recv(onward, _PACKET)
                link.sendto(answer, client)
                return
            except (OSError, TimeoutError) as error:
                if isinstance(error, FileNotFoundError):
                    return  # the machine has no further one
                log("info", "nameserver does not answer", number=number, error=str(error))

    async def _stream(self, stream: socket.socket) -> None:
        for number in range(MOST_NAMESERVERS):
            try:
                onward = await self._machine.socket("connect", "tcp", f"{NAMESERVER}{number}", PORT)
            except OSError:
                continue
            await relay.join(stream, onward)
            return
        relay.linger(stream)
        stream.close()
