"""DNS of the pods: names of the mesh from the proxy, the rest from a name server, over UDP and TCP."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

from dataplane import Mesh
from dnslib import EDNS0, QTYPE, RCODE, RR, A, DNSRecord
from dnslib.dns import DNSError
from lab import Pod, load, wait_until

from meshlight.node import redirection

SERVER = "10.96.0.10"


@dataclass
class NameServer:
    """Answers every name with 192.0.2.1, `many.test` with more than a datagram holds."""

    pod: Pod

    def __post_init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.silent = False

        def bind(kind: int) -> socket.socket:
            made = socket.socket(socket.AF_INET, kind)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(("", 53))
            return made

        self.udp = self.pod.inside(lambda: bind(socket.SOCK_DGRAM))
        self.tcp = self.pod.inside(lambda: bind(socket.SOCK_STREAM))
        self.tcp.listen(16)
        threading.Thread(target=self._datagrams, daemon=True).start()
        threading.Thread(target=self._connections, daemon=True).start()

    def _answer(self, message: bytes, client: str, over: str) -> bytes:
        query = DNSRecord.parse(message)
        name = str(query.q.qname).rstrip(".")
        self.asked.append((name, client, over))
        reply = query.reply()
        if name == "absent.test":
            reply.header.rcode = RCODE.NXDOMAIN
        elif query.q.qtype == QTYPE.A:
            count = 60 if name == "many.test" else 1
            for number in range(count):
                reply.add_answer(RR(name, QTYPE.A, rdata=A(f"192.0.2.{number + 1}"), ttl=5))
        if over == "udp" and len(reply.pack()) > 512 and not query.ar:
            reply = reply.truncate()
        return bytes(reply.pack())

    def _datagrams(self) -> None:
        while True:
            message, client = self.udp.recvfrom(4096)
            if not self.silent:
                with contextlib.suppress(DNSError):
                    self.udp.sendto(self._answer(message, client[0], "udp"), client)

    def _connections(self) -> None:
        while True:
            stream, client = self.tcp.accept()
            with stream:
                length = int.from_bytes(stream.recv(2, socket.MSG_WAITALL), "big")
                answer = self._answer(stream.recv(length, socket.MSG_WAITALL), client[0], "tcp")
                stream.sendall(struct.pack("!H", len(answer)) + answer)


def ask(
    pod: Pod, name: str, kind: str = "A", *, tcp: bool = False, size: int = 0
) -> tuple[str, list[str], Any]:
    """Code, addresses and the whole answer of the configured server."""
    query = DNSRecord.question(name, kind)
    if size:
        query.add_ar(EDNS0(udp_len=size))
    message = bytes(query.pack())
    if tcp:
        with pod.connect(SERVER, 53) as stream:
            stream.sendall(struct.pack("!H", len(message)) + message)
            length = int.from_bytes(stream.recv(2, socket.MSG_WAITALL), "big")
            answer = DNSRecord.parse(stream.recv(length, socket.MSG_WAITALL))
    else:
        with pod.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as stream:
            stream.settimeout(8)
            stream.connect((SERVER, 53))
            stream.send(message)
            answer = DNSRecord.parse(stream.recv(65536))
    assert answer.header.id == query.header.id
    return RCODE[answer.header.rcode], sorted(str(r.rdata) for r in answer.rr), answer


def capture() -> None:
    """What the pods ask, and who answers."""
    mesh = Mesh({"DNS_UPSTREAM": SERVER})
    client, other = mesh.pod(0, "client", account="client"), mesh.pod(1, "other")
    # The cluster's DNS service: its address belongs to a pod here.
    upstream = NameServer(mesh.pod(1, "dns", mesh=False))
    for node in mesh.nodes:
        chain = f"type nat hook prerouting priority -100; ip daddr {SERVER} dnat to {upstream.pod.address};"
        rule = f"table ip dns {{ chain nat {{ {chain} }}; }}"
        node.inside(lambda rule=rule: redirection.netns.nft(rule))  # type: ignore[misc]
    domain = "shop.svc.cluster.local"
    entry = {"namespace": "shop", "ports": {"80": 80}}
    mesh.services = [
        {**entry, "name": "cart", "hostname": f"cart.{domain}", "addresses": ["10.96.7.7"]},
        {**entry, "name": "api", "hostname": "api.example.com", "addresses": ["240.240.0.1"]},
        {**entry, "name": "any", "hostname": "*.wild.example", "addresses": ["240.240.0.2"]},
        {**entry, "name": "set", "hostname": f"set.{domain}", "addresses": []},
    ]
    for pod in (client, other):
        mesh.workloads[pod.uid]["services"] = {f"shop/set.{domain}": {"80": 80}}
    mesh.settle()
    with load(lambda: str(ask(client, "www.example.net"))) as failures:
        redirection.apply(client.path, dns=True)
        for name, expected in {
            f"cart.{domain}": ["10.96.7.7"],
            "cart": ["10.96.7.7"],
            "CART.Shop.svc": ["10.96.7.7"],
            "api.example.com": ["240.240.0.1"],
            f"api.example.com.{domain}": ["240.240.0.1"],
            "a.b.wild.example": ["240.240.0.2"],
            f"set.{domain}": sorted([client.address, other.address]),
            "www.example.net": ["192.0.2.1"],
        }.items():
            for tcp in (False, True):
                assert ask(client, name, tcp=tcp)[:2] == ("NOERROR", expected), (name, tcp)
    assert not failures, failures
    mine = [(name, over) for name, address, over in upstream.asked if address == client.address]
    assert {name for name, _ in mine} == {"www.example.net"} and ("www.example.net", "tcp") in mine
    # A name of the mesh has no address of the other family; other kinds are the name server's business.
    assert ask(client, "cart", "AAAA")[:2] == ("NOERROR", [])
    assert ask(client, "absent.test")[0] == "NXDOMAIN"
    ask(client, f"cart.{domain}", "TXT")
    assert upstream.asked[-1][0] == f"cart.{domain}"
    # What does not fit says so, and is whole over TCP.
    cut = ask(client, "many.test")[2]
    assert cut.header.tc and len(ask(client, "many.test", tcp=True)[1]) == 60
    members = {f"m{n}": {"uid": f"m{n}", "name": f"m{n}", "namespace": "shop"} for n in range(60)}
    for number, member in enumerate(members.values()):
        member["addresses"] = [f"10.9.0.{number + 1}"]
        member["services"] = {f"shop/set.{domain}": {"80": 80}}
    mesh.workloads |= members
    mesh.settle()
    cut = ask(client, "set")[2]
    assert cut.header.tc and len(cut.pack()) <= 512
    assert len(ask(client, "set", size=1232)[1]) > len(cut.rr)
    assert len(ask(client, "set", tcp=True)[1]) == 62
    # Noise is no reason to stop; a name server that is away is said to be.
    for noise in (b"", b"\0" * 12, b"\xff" * 600, bytes(range(256))):
        with client.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as stream:
            stream.sendto(noise, (SERVER, 53))
    proxy = mesh.proxies[0]
    upstream.silent = True
    assert ask(client, "www.example.net")[0] == "SERVFAIL"
    assert proxy.metric("istio_dns_upstream_failures_total", source_workload="client") >= 1
    assert ask(client, "cart")[1] == ["10.96.7.7"], "names of the mesh need no name server"
    total = proxy.metric("istio_dns_requests_total", source_workload="client")
    assert total > proxy.metric("istio_dns_upstream_requests_total") > 0
    assert proxy.metric("istio_dns_upstream_request_duration_seconds_count") > 0
    # Leaving the mesh: queries go straight to the name server.
    upstream.silent = False
    redirection.flush(client.path)
    wait_until(lambda: ask(client, "cart")[1] == ["192.0.2.1"], "queries to go straight")
