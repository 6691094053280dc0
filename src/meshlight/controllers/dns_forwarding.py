"""Questions about names that are not the cluster's, asked of the nameservers in /etc/resolv.conf.

Each question goes out from a socket and with a number of its own (RFC 5452); truncated answers are asked
again over TCP. Answers are kept for their time to live, at most `MOST_SECONDS`, the oldest forgotten first.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import OrderedDict
from dataclasses import dataclass

import dnslib

MOST_SECONDS, NEGATIVE_SECONDS = 30, 10
MOST_ANSWERS = 10_000
MOST_QUESTIONS = 500
TIMEOUT = 2.0
"""Seconds for one nameserver."""
_PACKET = 4096
PORT = 53


@dataclass(frozen=True, slots=True)
class Upstream:
    """An answer: its code, and the records of its answer and authority sections."""

    rcode: int
    answers: tuple[dnslib.RR, ...]
    authority: tuple[dnslib.RR, ...]


SERVER_FAILURE = Upstream(dnslib.RCODE.SERVFAIL, (), ())


def nameservers(resolv_conf: str, own: frozenset[str] = frozenset()) -> list[str]:
    """Nameservers that a resolver's configuration names, without those that would lead back here."""
    words = (line.split() for line in resolv_conf.splitlines())
    return [w[1] for w in words if len(w) > 1 and w[0] == "nameserver" and w[1] not in own]


class Forwarder:
    """Asks nameservers in their order."""

    def __init__(self, servers: list[str], port: int = PORT) -> None:
        self._servers, self._port = servers, port
        self._kept: OrderedDict[tuple[str, int], tuple[float, Upstream]] = OrderedDict()
        self._asked: dict[tuple[str, int], asyncio.Task[Upstream]] = {}
        self.hits = self.failures = 0

    @property
    def able(self) -> bool:
        """Whether there is anybody to ask."""
        return bool(self._servers)

    def kept(self, name: str, kind: int) -> Upstream | None:
        """An answer that is known already."""
        found = self._kept.get((name, kind))
        if found is None or found[0] < asyncio.get_running_loop().time():
            return None
        self.hits += 1
        return found[1]

    async def ask(self, name: str, kind: int) -> Upstream:
        """The answer to a question; the same question under way is asked once."""
        if (known := self.kept(name, kind)) is not None:
            return known
        key = (name, kind)
        task = self._asked.get(key)
        if task is None:
            if len(self._asked) >= MOST_QUESTIONS:
                return SERVER_FAILURE
            task = self._asked[key] = asyncio.create_task(self._ask_all(name, kind))
            task.add_done_callback(lambda _: self._asked.pop(key, None))
        return await asyncio.shield(task)

    async def _ask_all(self, name: str, kind: int) -> Upstream:
        for server in self._servers:
            query = dnslib.DNSRecord(
                dnslib.DNSHeader(id=random.SystemRandom().randrange(1 << 16), rd=1),
                q=dnslib.DNSQuestion(name, kind),
            )
            query.add_ar(dnslib.EDNS0(udp_len=1232))
            try:
                async with asyncio.timeout(TIMEOUT):
                    reply = await self._ask_one(server, query)
            except (OSError, TimeoutError, dnslib.DNSError, asyncio.IncompleteReadError):
                continue
            if reply.header.rcode not in (dnslib.RCODE.NOERROR, dnslib.RCODE.NXDOMAIN):
                continue
            found = Upstream(reply.header.rcode, tuple(reply.rr), tuple(reply.auth))
            self._keep(name, kind, found)
            return found
        self.failures += 1
        return SERVER_FAILURE

    async def _ask_one(self, server: str, query: dnslib.DNSRecord) -> dnslib.DNSRecord:
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as link:
            link.connect((server, self._port))
            await loop.sock_sendall(link, query.pack())
            while True:
                reply = dnslib.DNSRecord.parse(await loop.sock_recv(link, _PACKET))
                if _answers(reply, query):
                    break
        if not reply.header.tc:
            return reply
        reader, writer = await asyncio.open_connection(server, self._port)
        try:
            packet = query.pack()
            writer.write(struct.pack("!H", len(packet)) + packet)
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            reply = dnslib.DNSRecord.parse(await reader.readexactly(length))
        finally:
            writer.close()
        if not _answers(reply, query):
            raise dnslib.DNSError("an answer to another question")
        return reply

    def _keep(self, name: str, kind: int, found: Upstream) -> None:
        lives = [record.ttl for record in found.answers]
        seconds = min(MOST_SECONDS, *lives) if lives else NEGATIVE_SECONDS
        if seconds > 0:
            self._kept[name, kind] = (asyncio.get_running_loop().time() + seconds, found)
            self._kept.move_to_end((name, kind))
            while len(self._kept) > MOST_ANSWERS:
                self._kept.popitem(last=False)


def _answers(reply: dnslib.DNSRecord, query: dnslib.DNSRecord) -> bool:
    if not reply.header.qr or reply.header.id != query.header.id or len(reply.questions) != 1:
        return False
    asked, told = query.questions[0], reply.questions[0]
    return bool(asked.qtype == told.qtype and str(asked.qname).lower() == str(told.qname).lower())
