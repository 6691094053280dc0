"""Cluster DNS, case by case as Kubernetes' DNS specification has it."""

from __future__ import annotations

from typing import Any

import dnslib
import pytest

from meshlight.controllers.dns import respond
from meshlight.controllers.dns_records import Records


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "shop"}, "spec": spec}


@pytest.fixture
def records() -> Records:
    made = Records()
    made.namespace("shop", True)
    ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
    made.service(service("web", clusterIP="10.96.0.7", ports=ports), True)
    made.service(service("db", clusterIP="None", ports=[{"name": "sql", "port": 5432}]), True)
    made.service(service("away", type="ExternalName", externalName="example.org"), True)
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
