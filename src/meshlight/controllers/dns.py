"""CoreDNS' role: serves the cluster's names on port 53, UDP and TCP, from watches of the API.

Wire format by dnslib; what to answer is `dns_records`. A name outside the cluster's zone is refused at
once with NXDOMAIN: an embedded cluster has no way out, so a client must not wait for one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import struct
from collections.abc import Callable
from typing import cast

import dnslib
import uvloop
from aiohttp import web

from meshlight.controllers.dns_records import Answer, Record, Records
from meshlight.controllers.workqueue import log
from meshlight.kube.client import Client
from meshlight.kube.resources import ENDPOINT_SLICES, NAMESPACES, SERVICES, Object, Resource

TTL = 5
UDP_LIMIT = 512
TCP_IDLE = 10.0
_TYPES = {1: "A", 28: "AAAA", 33: "SRV", 12: "PTR", 5: "CNAME", 16: "TXT", 2: "NS", 6: "SOA", 255: "ANY"}


def _wire(record: Record) -> dnslib.RR:
    match record.type:
        case "A":
            rdata = dnslib.A(record.value)
        case "SRV":
            rdata = dnslib.SRV(0, 100, record.port, record.value)
        case "PTR":
            rdata = dnslib.PTR(record.value)
        case "CNAME":
            rdata = dnslib.CNAME(record.value)
        case "TXT":
            rdata = dnslib.TXT(record.value)
    return dnslib.RR(record.name, getattr(dnslib.QTYPE, record.type), ttl=TTL, rdata=rdata)


def respond(records: Records, packet: bytes, limit: int | None) -> bytes | None:
    """Answer one query; over UDP an answer above `limit` bytes is truncated. None: not a query."""
    try:
        query = dnslib.DNSRecord.parse(packet)
    except dnslib.DNSError:
        return None
    if query.header.qr or len(query.questions) != 1:
        return None
    reply = query.reply(ra=1, aa=1)
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
    for extra in query.ar:
        if extra.rtype == dnslib.QTYPE.OPT:
            limit = max(limit, extra.edns_len) if limit else limit
            reply.add_ar(dnslib.EDNS0(udp_len=1232))
    packed: bytes = reply.pack()
    if limit and len(packed) > limit:
        packed = reply.truncate().pack()
    return packed


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, answer: Callable[[bytes, int | None], bytes | None]) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is not a subclass

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """One query."""
        if reply := self._answer(data, UDP_LIMIT):
            self._transport.sendto(reply, addr)


class DnsServer:
    """The index, kept by watches, and the sockets."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.records = Records()
        self.synced = {"namespaces": False, "services": False, "endpointslices": False}
        self.requests: dict[str, int] = {"udp": 0, "tcp": 0}

    async def follow(self, resource: Resource, update: Callable[[Object, bool], None]) -> None:
        """Keep one kind in the index, for ever."""
        async for event in self.client.watch(resource):
            if event.type == "SYNCED":
                self.synced[resource.plural] = True
                log("info", "synced", resource=resource.plural)
            else:
                update(event.object, event.type != "DELETED")

    def answer(self, packet: bytes, limit: int | None) -> bytes | None:
        """Answer one packet and count it."""
        self.requests["udp" if limit else "tcp"] += 1
        return respond(self.records, packet, limit)

    async def tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Queries of one TCP connection, each with its length before it."""
        with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            while True:
                async with asyncio.timeout(TCP_IDLE):
                    (length,) = struct.unpack("!H", await reader.readexactly(2))
                    packet = await reader.readexactly(length)
                if reply := self.answer(packet, None):
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
        return web.Response(text="\n".join(lines) + "\n")

    async def _http(self, port: int, path: str, handler: Callable[..., object]) -> web.AppRunner:
        app = web.Application()
        app.router.add_get(path, handler)  # type: ignore[arg-type]
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "0.0.0.0", port).start()
        return runner

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: _Udp(self.answer), local_addr=("0.0.0.0", 53))
        await asyncio.start_server(self.tcp, "0.0.0.0", 53)
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
