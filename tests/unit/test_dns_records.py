"""Cluster DNS, case by case as Kubernetes' DNS specification has it."""

from __future__ import annotations

import asyncio
from typing import Any

import dnslib
import pytest

from meshlight.controllers.dns import DnsServer, respond
from meshlight.controllers.dns_forwarding import Forwarder, nameservers
from meshlight.controllers.dns_records import Records
from meshlight.uplink.name_service import node_file


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "shop"}, "spec": spec}


def dns_endpoint() -> dict[str, Any]:
    entries = [
        {
            "dnsName": "jaeger.sulibot.com",
            "recordType": "A",
            "targets": ["172.20.1.1", "none"],
            "recordTTL": 60,
        },
        {"dnsName": "*.apps.sulibot.com.", "targets": ["172.20.1.2"]},
        {"dnsName": "kiali.sulibot.com", "recordType": "CNAME", "targets": ["jaeger.sulibot.com."]},
    ]
    return {"metadata": {"name": "routes", "namespace": "network"}, "spec": {"endpoints": entries}}


@pytest.fixture
def records() -> Records:
    made = Records()
    made.namespace("shop", True)
    ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
    made.service(service("web", clusterIP="10.96.0.7", ports=ports), True)
    made.service(service("db", clusterIP="None", ports=[{"name": "sql", "port": 5432}]), True)
    made.service(service("away", type="ExternalName", externalName="example.org"), True)
    made.service(service("near", type="ExternalName", externalName="web.shop.svc.cluster.local"), True)
    made.service(service("both", clusterIPs=["10.96.0.8", "fd6d:6c10:96::8"]), True)
    made.further(dns_endpoint(), True)
    made.slice(
        {
            "metadata": {
                "name": "db-1",
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "db"},
            },
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": ["10.244.1.2"], "hostname": "db-0", "conditions": {"ready": True}},
                {"addresses": ["10.244.2.2"], "conditions": {"ready": False}},
            ],
            "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}],
        },
        True,
    )
    return made


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("web.shop.svc.cluster.local", "A", ["10.96.0.7"]),
        ("web.shop.svc.cluster.local", "AAAA", []),
        ("db.shop.svc.cluster.local", "A", ["10.244.1.2"]),
        ("db-0.db.shop.svc.cluster.local", "A", ["10.244.1.2"]),
        ("_http._tcp.web.shop.svc.cluster.local", "SRV", ["web.shop.svc.cluster.local"]),
        ("_sql._tcp.db.shop.svc.cluster.local", "SRV", ["db-0.db.shop.svc.cluster.local"]),
        ("away.shop.svc.cluster.local", "A", ["example.org"]),
        ("near.shop.svc.cluster.local", "A", ["web.shop.svc.cluster.local", "10.96.0.7"]),
        ("near.shop.svc.cluster.local", "CNAME", ["web.shop.svc.cluster.local"]),
        ("both.shop.svc.cluster.local", "AAAA", ["fd6d:6c10:96::8"]),
        ("fd00--5.shop.pod.cluster.local", "AAAA", ["fd00::5"]),
        ("2.1.244.10.in-addr.arpa", "PTR", ["db-0.db.shop.svc.cluster.local"]),
        (
            "8.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.c.6.d.6.d.f.ip6.arpa",
            "PTR",
            ["both.shop.svc.cluster.local"],
        ),
        ("jaeger.sulibot.com", "A", ["172.20.1.1"]),
        ("a.apps.sulibot.com", "A", ["172.20.1.2"]),
        ("a.b.apps.sulibot.com", "A", ["172.20.1.2"]),
        ("jaeger.sulibot.com", "AAAA", []),
        ("kiali.sulibot.com", "A", ["jaeger.sulibot.com", "172.20.1.1"]),
        ("10-244-1-2.shop.pod.cluster.local", "A", ["10.244.1.2"]),
        ("7.0.96.10.in-addr.arpa", "PTR", ["web.shop.svc.cluster.local"]),
        ("shop.svc.cluster.local", "A", []),
        ("svc.cluster.local", "A", []),
    ],
)
def test_known_names(records: Records, name: str, kind: Any, values: list[str]) -> None:
    answer = records.resolve(name, kind)
    assert answer.known
    assert [r.value for r in answer.records] == values


@pytest.mark.parametrize(
    "name",
    [
        "nothing.shop.svc.cluster.local",
        "web.other.svc.cluster.local",
        "x.web.shop.svc.cluster.local",
        "_nope._tcp.web.shop.svc.cluster.local",
        "9.0.96.10.in-addr.arpa",
        "1-2-3.shop.pod.cluster.local",
        "example.org",
        "apps.sulibot.com",
        "x.jaeger.sulibot.com",
    ],
)
def test_unknown_names(records: Records, name: str) -> None:
    assert not records.resolve(name, "A").known


def test_a_deleted_service_is_forgotten(records: Records) -> None:
    records.service(service("web", clusterIP="10.96.0.7"), False)
    assert not records.resolve("web.shop.svc.cluster.local", "A").known
    assert not records.resolve("7.0.96.10.in-addr.arpa", "PTR").known


def test_wire_answers_and_truncation(records: Records) -> None:
    query = dnslib.DNSRecord.question("WEB.shop.svc.cluster.local", "A")
    reply = dnslib.DNSRecord.parse(respond(records, query.pack(), 512) or b"")
    assert (reply.header.id, reply.header.aa, str(reply.rr[0].rdata)) == (query.header.id, 1, "10.96.0.7")
    addresses = [f"10.244.3.{n}" for n in range(1, 60)]
    records.slice(
        {
            "metadata": {
                "name": "many",
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "db"},
            },
            "endpoints": [{"addresses": [a]} for a in addresses],
        },
        True,
    )
    query = dnslib.DNSRecord.question("db.shop.svc.cluster.local", "A")
    assert dnslib.DNSRecord.parse(respond(records, query.pack(), 512) or b"").header.tc == 1
    assert len(dnslib.DNSRecord.parse(respond(records, query.pack(), None) or b"").rr) == 60
    missing = dnslib.DNSRecord.question("no.shop.svc.cluster.local", "A")
    reply = dnslib.DNSRecord.parse(respond(records, missing.pack(), 512) or b"")
    assert reply.header.rcode == dnslib.RCODE.NXDOMAIN and reply.auth[0].rtype == dnslib.QTYPE.SOA


def test_what_is_no_query_gets_no_answer(records: Records) -> None:
    assert respond(records, b"\x00", 512) is None


def test_further_records_come_and_go(records: Records) -> None:
    assert records.resolve("jaeger.sulibot.com", "A").records[0].ttl == 60
    assert records.resolve("jaeger.sulibot.com", "TXT").ours
    records.further(dns_endpoint(), False)
    assert not records.resolve("jaeger.sulibot.com", "A").ours


def test_an_alias_that_leaves_the_cluster_is_told(records: Records) -> None:
    assert records.resolve("away.shop.svc.cluster.local", "A").alias == "example.org"
    assert records.resolve("near.shop.svc.cluster.local", "A").alias == ""


def test_edns(records: Records) -> None:
    query = dnslib.DNSRecord.question("web.shop.svc.cluster.local", "A")
    query.add_ar(dnslib.EDNS0(udp_len=4096, version=1))
    reply = dnslib.DNSRecord.parse(respond(records, query.pack(), 512) or b"")
    assert reply.ar[-1].rtype == dnslib.QTYPE.OPT and reply.ar[-1].ttl >> 24 == 1, "BADVERS"
    assert not reply.rr


def test_nameservers() -> None:
    text = "search a\nnameserver 10.96.0.10\nnameserver 172.20.0.1 # relay\n"
    assert nameservers(text, frozenset({"10.96.0.10"})) == ["172.20.0.1"]
    assert node_file(text, "172.20.0.1", isolated=False) == "nameserver 172.20.0.1\nsearch a\n"
    assert node_file(text, "172.20.0.1", isolated=True) == node_file("search a", "x", isolated=False) == ""


class Upstream(asyncio.DatagramProtocol):
    """A nameserver that knows one name, and answers it twice as wrongly before it is right."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        query = dnslib.DNSRecord.parse(data)
        self.asked.append(str(query.q.qname))
        reply = query.reply()
        if str(query.q.qname) == "example.org.":
            reply.add_answer(dnslib.RR("example.org", dnslib.QTYPE.A, ttl=60, rdata=dnslib.A("192.0.2.7")))
        else:
            reply.header.rcode = dnslib.RCODE.NXDOMAIN
        forged = query.reply()
        forged.header.id ^= 1
        self.transport.sendto(forged.pack(), addr)
        other = dnslib.DNSRecord.question("other.org").reply()
        other.header.id = query.header.id
        self.transport.sendto(other.pack(), addr)
        self.transport.sendto(reply.pack(), addr)


async def test_forwarding(records: Records) -> None:
    upstream = Upstream()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: upstream, local_addr=("127.0.0.1", 0))
    server = DnsServer(None)  # type: ignore[arg-type]
    server.records = records
    server.forwarder = Forwarder(["127.0.0.1"], transport.get_extra_info("sockname")[1])

    async def ask(name: str) -> dnslib.DNSRecord:
        found = server.answer(dnslib.DNSRecord.question(name).pack(), 512)
        return dnslib.DNSRecord.parse(found if isinstance(found, bytes) else await found)  # type: ignore[misc]

    reply = await ask("example.org")
    assert [str(r.rdata) for r in reply.rr] == ["192.0.2.7"] and not reply.header.aa
    alias = await ask("away.shop.svc.cluster.local")
    assert [str(r.rdata) for r in alias.rr] == ["example.org.", "192.0.2.7"]
    assert upstream.asked == ["example.org."], "the second time it was known"
    assert (await ask("nothing.org")).header.rcode == dnslib.RCODE.NXDOMAIN
    transport.close()
    await asyncio.sleep(0)
    assert (await ask("refused.org")).header.rcode == dnslib.RCODE.SERVFAIL
    assert (await ask("nope.shop.svc.cluster.local")).header.rcode == dnslib.RCODE.NXDOMAIN
