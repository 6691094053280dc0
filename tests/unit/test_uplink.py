"""Between the cluster and the machine: what is exposed where, who answers for what, and the relay."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

import pytest

from meshlight.uplink import relay
from meshlight.uplink.announcement import choose, commands, node_addresses, ranges
from meshlight.uplink.egress import allowed, routes
from meshlight.uplink.exposure import Exposed, ExposureError, Wish, candidates, remembered, wishes
from meshlight.uplink.handover import Answer, Ask, receive, send


def service(annotation: str = "", address: str = "172.20.1.1", **spec: Any) -> dict[str, Any]:
    annotations = {"meshlight.io/expose": annotation} if annotation else {}
    ports = [
        {"name": "http", "port": 80},
        {"name": "tls", "port": 443},
        {"name": "s", "port": 9, "protocol": "SCTP"},
    ]
    ingress = [{"ip": address}] if address else []
    return {
        "metadata": {"name": "web", "namespace": "shop", "annotations": annotations},
        "spec": {"clusterIP": "10.96.0.7", "ports": ports, **spec},
        "status": {"loadBalancer": {"ingress": ingress}},
    }


def shown(found: dict[Exposed, Wish]) -> dict[int, tuple[str, int]]:
    return {key.port: (wish.target, wish.preferred) for key, wish in found.items()}


def test_what_is_exposed() -> None:
    balanced = {80: ("172.20.1.1", 8080), 443: ("172.20.1.1", 8443)}
    assert shown(wishes(service())) == balanced
    assert wishes(service("false")) == {} and wishes(service(address="")) == {}
    assert shown(wishes(service("true", address=""))) == {
        80: ("10.96.0.7", 8080),
        443: ("10.96.0.7", 8443),
    }
    assert shown(wishes(service("9443:443"))) == {443: ("172.20.1.1", 9443)}
    assert shown(wishes(service("true", "", ports=[{"port": 9090}, {"port": 53}]))) == {
        9090: ("10.96.0.7", 9090),
        53: ("10.96.0.7", 8053),
    }


@pytest.mark.parametrize(
    ("annotation", "spec", "reason"),
    [
        ("yes", {}, "'yes' is no HOSTPORT:PORT"),
        ("8081:81", {}, "no port 81"),
        ("true", {"clusterIP": "None"}, "no address"),
    ],
)
def test_what_cannot_be_exposed(annotation: str, spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExposureError, match=reason):
        wishes(service(annotation, address="" if spec else "172.20.1.1", **spec))


def test_numbers_are_kept_and_never_fought_over() -> None:
    wish = Wish("172.20.1.1", 8443)
    assert candidates(wish, 0, []) == [8443, 0]
    assert candidates(wish, 40123, []) == [40123, 8443, 0]
    assert candidates(wish, 0, [8443]) == [0]
    entry = {"namespace": "a", "service": "b", "port": 80, "protocol": "TCP", "hostPort": 8080}
    assert remembered([entry, {"service": "broken"}]) == {Exposed("a", "b", 80, "TCP"): 8080}


def node(name: str, *addresses: str, ready: str = "True") -> dict[str, Any]:
    listed = [{"type": "InternalIP", "address": a} for a in addresses]
    conditions = [{"type": "Ready", "status": ready}]
    return {"metadata": {"name": name}, "status": {"addresses": listed, "conditions": conditions}}


def test_addresses_are_announced_by_nodes_that_can_answer() -> None:
    nodes = node_addresses(
        [node("n1", "172.20.0.11"), node("n2", "172.20.0.12", "fd00::12"), node("n3", ready="")]
    )
    assert set(nodes) == {"n1", "n2"}
    anywhere = choose(service(), [], nodes)
    assert set(anywhere) == {"172.20.1.1"} and anywhere["172.20.1.1"] in ("172.20.0.11", "172.20.0.12")
    local = service(externalTrafficPolicy="Local")
    assert choose(local, [], nodes) == {}
    slices = [{"endpoints": [{"addresses": ["10.244.2.2"], "nodeName": "n2", "conditions": {"ready": True}}]}]
    assert choose(local, slices, nodes) == {"172.20.1.1": "172.20.0.12"}
    assert choose(service(address="fd6d::1"), [], nodes) == {"fd6d::1": "fd00::12"}
    assert ranges(nodes) == {
        "10.96.0.0/16": ["172.20.0.11", "172.20.0.12"],
        "fd6d:6c10:96::/112": ["fd00::12"],
    }


def test_a_node_that_goes_moves_only_its_own() -> None:
    three = {f"n{i}": [f"172.20.0.1{i}"] for i in range(1, 4)}
    many = [service(address=f"172.20.1.{i}") for i in range(1, 60)]
    before = {a: v for s in many for a, v in choose(s, [], three).items()}
    assert len(set(before.values())) == 3
    gone = three.pop("n2")[0]
    after = {a: v for s in many for a, v in choose(s, [], three).items()}
    assert all(after[a] == via for a, via in before.items() if via != gone)


def test_routes_change_by_difference() -> None:
    before = {"172.20.1.1": ["172.20.0.11"], "172.20.1.2": ["172.20.0.11"]}
    after = {"172.20.1.1": ["172.20.0.11"], "10.96.0.0/16": ["172.20.0.11", "172.20.0.12"]}
    assert commands(before, after, "fabric0") == [
        "route del 172.20.1.2",
        "route replace 10.96.0.0/16 nexthop via 172.20.0.11 dev fabric0 nexthop via 172.20.0.12 dev fabric0",
    ]


def test_handover() -> None:
    ask = Ask(7, "connect", "udp", "192.0.2.1", 53)
    assert Ask.decode(ask.encode()) == ask
    answer = Answer(7, 111, "Connection refused")
    assert Answer.decode(answer.encode()) == answer
    for wrong in (b"x", b"[]", b'{"id":1,"op":"exec","protocol":"tcp","address":"a","port":1}'):
        with pytest.raises(ValueError):
            Ask.decode(wrong)
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other, socket.socket() as carried:
        send(one, answer.encode(), carried.fileno())
        packet, descriptor = receive(other)
        assert packet == answer.encode() and descriptor is not None
        with socket.socket(fileno=descriptor) as received:
            assert received.type == socket.SOCK_STREAM
        one.close()
        assert receive(other) == (b"", None)


async def _pair() -> tuple[socket.socket, asyncio.StreamReader, asyncio.StreamWriter]:
    """A socket for the relay, and streams at its other end."""
    ready: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()
    server = await asyncio.start_server(lambda r, w: ready.set_result((r, w)), "127.0.0.1", 0)
    ours = socket.socket()
    ours.setblocking(False)
    await asyncio.get_running_loop().sock_connect(ours, server.sockets[0].getsockname())
    reader, writer = await ready
    server.close()
    return ours, reader, writer


async def test_a_relay_carries_bytes_ends_and_resets() -> None:
    (a, a_reader, a_writer), (b, b_reader, b_writer) = await _pair(), await _pair()
    a_writer.write(b"early")
    await a_writer.drain()
    await relay.join(a, b)
    a_writer.write_eof()
    async with asyncio.timeout(10):
        assert await b_reader.read() == b"early", "the end of bytes came across"
        b_writer.write(b"x" * 3_000_000)
        b_writer.write_eof()
        assert len(await a_reader.read()) == 3_000_000, "the other way stayed open"
    (a, a_reader, a_writer), (b, b_reader, b_writer) = await _pair(), await _pair()
    await relay.join(a, b)
    relay.linger(a_writer.get_extra_info("socket"))
    a_writer.transport.abort()
    async with asyncio.timeout(10):
        with pytest.raises(ConnectionResetError):
            await b_reader.readexactly(1)


@pytest.mark.parametrize(
    ("address", "outside"),
    [
        ("192.0.2.7", True),
        ("10.200.0.1", True),
        ("2001:db8::7", True),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("10.244.3.4", False),
        ("172.20.1.7", False),
        ("239.1.1.1", False),
        ("fe80::1", False),
        ("fd6d:6c10:96::1", False),
        ("::1", False),
    ],
)
def test_what_is_outside(address: str, outside: bool) -> None:
    assert allowed(address) is outside
    network = ipaddress.ip_network(address)
    covered = any(
        network.subnet_of(ipaddress.ip_network(r.split()[3]))  # type: ignore[arg-type]
        for r in routes(network.version)
        if r.startswith("route replace unreachable")
    )
    assert covered is not outside, "the routes say the same"
