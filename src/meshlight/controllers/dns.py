"""CoreDNS' role: serves the cluster's names on port 53, UDP and TCP, from watches of the API.

Wire format by dnslib; what to answer is `dns_records`. Names that are not the cluster's go to the
nameservers of /etc/resolv.conf, which in a pod with dnsPolicy Default are the machine's. Where it names
none they are refused at once with NXDOMAIN: a client must not wait for a way out that does not exist.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import dnslib
import uvloop
from aiohttp import web

from meshlight.controllers.dns_forwarding import Forwarder, Upstream, nameservers
from meshlight.controllers.dns_records import Answer, Record, Records
from meshlight.controllers.workqueue import log
from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import DNS_ENDPOINTS, ENDPOINT_SLICES, NAMESPACES, SERVICES, Object, Resource

TTL = 5
RESOLV_CONF = Path("/etc/resolv.conf")
OWN = frozenset({"10.96.0.10", "127.0.0.1", "::1"})
"""Nameservers that would be this server itself."""
FURTHER_RETRY = 5.0
UDP_LIMIT, UDP_MOST = 512, 1232
"""Bytes of an answer over UDP: without EDNS, and at most with it (what no path has to fragment)."""
MOST_PENDING = 1000
"""Queries that may wait for the machine's nameservers at a time; more are dropped, as a network would."""
TCP_IDLE = 10.0
_TYPES = {1: "A", 28: "AAAA", 33: "SRV", 12: "PTR", 5: "CNAME", 16: "TXT", 2: "NS", 6: "SOA", 255: "ANY"}


def _wire(record: Record) -> dnslib.RR:
    match record.type:
        case "A":
            rdata = dnslib.A(record.value)
        case "AAAA":
            rdata = dnslib.AAAA(record.value)
        case "SRV":
            rdata = dnslib.SRV(0, 100, record.port, record.value)
        case "PTR":
            rdata = dnslib.PTR(record.value)
        case "CNAME":
            rdata = dnslib.CNAME(record.value)
        case "TXT":
            rdata = dnslib.TXT(record.value)
    return dnslib.RR(record.name, getattr(dnslib.QTYPE, record.type), ttl=record.ttl or TTL, rdata=rdata)


def parse(packet: bytes) -> dnslib.DNSRecord | None:
    """A query; None if it is none, or asks more than one thing."""
    try:
        query = dnslib.DNSRecord.parse(packet)
    except (dnslib.DNSError, ValueError, UnicodeError):
        return None
    return None if query.header.qr or len(query.questions) != 1 else query


def local(records: Records, query: dnslib.DNSRecord) -> tuple[dnslib.DNSRecord, str]:
    """The reply from what is known here, and the foreign name whose records are lacking (or none)."""
    reply = query.reply(ra=1, aa=1)
    if query.header.opcode != dnslib.OPCODE.QUERY:
        reply.header.rcode = dnslib.RCODE.NOTIMP
        return reply, ""
    question = query.questions[0]
    name = str(question.qname).rstrip(".").lower()
    found: Answer = records.resolve(name, _TYPES.get(question.qtype, "OTHER"))  # type: ignore[arg-type]
    for record in found.records:
        reply.add_answer(_wire(record))
    for record in found.additional:
        reply.add_ar(_wire(record))
    if not found.known:
        reply.header.rcode = dnslib.RCODE.NXDOMAIN
    if not found.records:
        zone = records.zone
        times = (1, 7200, 1800, 86400, TTL)
        soa = dnslib.SOA(f"ns.dns.{zone}", f"hostmaster.{zone}", times)
        reply.add_auth(dnslib.RR(zone if found.ours else ".", dnslib.QTYPE.SOA, ttl=TTL, rdata=soa))
    return reply, found.alias if found.ours else name


def complete(reply: dnslib.DNSRecord, upstream: Upstream) -> None:
    """Add what the machine's nameservers said to a reply that lacks it."""
    if not reply.rr:
        reply.header.aa = 0
        reply.auth.clear()
        reply.header.rcode = upstream.rcode
    for record in upstream.answers:
        reply.add_answer(record)
    for record in upstream.authority:
        if record.rtype == dnslib.QTYPE.SOA:
            reply.add_auth(record)


def fit(query: dnslib.DNSRecord, reply: dnslib.DNSRecord, limit: int | None) -> bytes:
    """The reply's bytes; over UDP one above the limit is truncated. EDNS is answered with EDNS (RFC 6891)."""
    for extra in query.ar:
        if extra.rtype == dnslib.QTYPE.OPT:
            limit = max(limit, min(extra.edns_len, UDP_MOST)) if limit else limit
            reply.add_ar(dnslib.EDNS0(udp_len=UDP_MOST))
            if extra.edns_ver:
                reply.rr.clear()
                reply.ar[-1].ttl |= 1 << 24  # BADVERS, in the extended code
    packed = bytes(reply.pack())
    if limit and len(packed) > limit:
        packed = bytes(reply.truncate().pack())
    return packed


def respond(records: Records, packet: bytes, limit: int | None) -> bytes | None:
    """Answer one query from what is known here. None: not a query."""
    query = parse(packet)
    return None if query is None else fit(query, local(records, query)[0], limit)


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server
        self._pending: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is not a subclass

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """One query: answered at once, or when the machine's nameservers have answered."""
        found = self._server.answer(data, UDP_LIMIT)
        if isinstance(found, bytes):
            self._transport.sendto(found, addr)
        elif found is not None and len(self._pending) < MOST_PENDING:
            task = asyncio.create_task(self._later(found, addr))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)

    async def _later(self, answer: Awaitable[bytes], addr: tuple[str, int]) -> None:
        self._transport.sendto(await answer, addr)


def bound(port: int, kind: socket.SocketKind) -> list[socket.socket]:
    """Sockets on a port of every address, in each family that there is."""
    made = []
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            sock = socket.socket(family, kind)
        except OSError:
            continue  # a kernel without IPv6
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        made.append(sock)
    return made


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class DnsServer:
    """The index, kept by watches, and the sockets."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.records = Records()
        self.synced = {"namespaces": False, "services": False, "endpointslices": False}
        self.requests: dict[str, int] = {"udp": 0, "tcp": 0}
        self.forwarder = Forwarder(nameservers(_read(RESOLV_CONF), OWN))

    async def follow(self, resource: Resource, update: Callable[[Object, bool], None]) -> None:
        """Keep one kind in the index, for ever."""
        async for event in self.client.watch(resource):
            if event.type == "SYNCED":
                if resource.plural in self.synced:
                    self.synced[resource.plural] = True
                log("info", "synced", resource=resource.plural)
            else:
                update(event.object, event.type != "DELETED")

    async def follow_further(self) -> None:
        """Keep DNSEndpoints in the index, where the API serves that kind and lets us read it."""
        while True:
            try:
                await self.follow(DNS_ENDPOINTS, self.records.further)
            except ApiError as error:
                if error.code not in (403, 404):
                    raise
                await asyncio.sleep(FURTHER_RETRY)

    def answer(self, packet: bytes, limit: int | None) -> bytes | Awaitable[bytes] | None:
        """Answer one packet and count it; a foreign name's answer comes later. None: not a query."""
        self.requests["udp" if limit else "tcp"] += 1
        query = parse(packet)
        if query is None:
            return None
        reply, lacking = local(self.records, query)
        if not lacking or not self.forwarder.able or not query.header.rd:
            return fit(query, reply, limit)
        known = self.forwarder.kept(lacking, query.questions[0].qtype)
        if known is not None:
            complete(reply, known)
            return fit(query, reply, limit)
        return self._forwarded(query, reply, lacking, limit)

    async def _forwarded(
        self, query: dnslib.DNSRecord, reply: dnslib.DNSRecord, name: str, limit: int | None
    ) -> bytes:
        complete(reply, await self.forwarder.ask(name, query.questions[0].qtype))
        return fit(query, reply, limit)

    async def tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Queries of one TCP connection, each with its length before it."""
        with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            while True:
                async with asyncio.timeout(TCP_IDLE):
                    (length,) = struct.unpack("!H", await reader.readexactly(2))
                    packet = await reader.readexactly(length)
                reply = self.answer(packet, None)
                if reply is not None and not isinstance(reply, bytes):
                    reply = await reply
                if reply:
                    writer.write(struct.pack("!H", len(reply)) + reply)
                    await writer.drain()
        writer.close()

    async def ready(self, _: web.Request) -> web.Response:
        """503 until every watch has listed what exists."""
        missing = [name for name, done in self.synced.items() if not done]
        return web.Response(
            text="OK" if not missing else f"waiting for {missing}", status=503 if missing else 200
        )

    async def healthy(self, _: web.Request) -> web.Response:
        """200 while the process serves."""
        return web.Response(text="OK")

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus text format."""
        lines = ["# TYPE coredns_dns_requests_total counter"]
        for proto, count in self.requests.items():
            lines.append(f'coredns_dns_requests_total{{proto="{proto}",server="dns://:53",zone="."}} {count}')
        lines += [
            "# TYPE coredns_cache_hits_total counter",
            f'coredns_cache_hits_total{{server="dns://:53",type="success"}} {self.forwarder.hits}',
            "# TYPE coredns_forward_healthcheck_broken_total counter",
            f"coredns_forward_healthcheck_broken_total {self.forwarder.failures}",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def _http(self, port: int, path: str, handler: Callable[..., object]) -> web.AppRunner:
        app = web.Application()
        app.router.add_get(path, handler)  # type: ignore[arg-type]
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, None, port).start()
        return runner

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        for sock in bound(53, socket.SOCK_DGRAM):
            await loop.create_datagram_endpoint(lambda: _Udp(self), sock=sock)
        for sock in bound(53, socket.SOCK_STREAM):
            await asyncio.start_server(self.tcp, sock=sock)
        for port, path, handler in (
            (8080, "/health", self.healthy),
            (8181, "/ready", self.ready),
            (9153, "/metrics", self.metrics),
        ):
            await self._http(port, path, handler)
        records = self.records
        async with asyncio.TaskGroup() as group:
            group.create_task(
                self.follow(NAMESPACES, lambda o, exists: records.namespace(o["metadata"]["name"], exists))
            )
            group.create_task(self.follow(SERVICES, records.service))
            group.create_task(self.follow(ENDPOINT_SLICES, records.slice))
            group.create_task(self.follow_further())


async def main(kubeconfig: str | None) -> None:
    """Serve until SIGTERM or SIGINT."""
    client = Client.from_kubeconfig(kubeconfig) if kubeconfig else Client.in_pod()
    async with client:
        task = asyncio.create_task(DnsServer(client).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m meshlight.controllers.dns")
    parser.add_argument("--kubeconfig", help="default: the pod's service account")
    uvloop.run(main(parser.parse_args().kubeconfig))
