"""What the tests of this folder do, each in namespaces of its own; see `lab`."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import pytest
from lab import Node, Pod, Proxy, alive, echo, load, read, wait_until

from meshlight.node import netns, network, redirection
from meshlight.node.netns import NetworkError
from meshlight.node.service_proxy import KernelTable, Place, ServiceTable
from meshlight.node.service_rules import IPV4


def refused(connect: Any) -> bool:
    """Whether a connection is refused at once."""
    started = time.monotonic()
    try:
        connect()
    except ConnectionRefusedError:
        return time.monotonic() - started < 1
    return False


def links() -> None:
    """Pods reach pods of their own and of other nodes, the fabric and themselves, by their own address."""
    one, two = Node(1), Node(2)
    a, b, c = one.pod("a"), one.pod("b"), two.pod("c")
    assert (a.address, b.address, c.address) == ("10.244.1.2", "10.244.1.3", "10.244.2.2")
    for pod in (a, b, c):
        pod.serve(80)
    before = one.sent()
    assert a.ask(c.address, 80) == f"c {a.address}"
    assert one.sent() > before, "traffic to another node passes the node's eth0"
    assert a.ask(b.address, 80) == f"b {a.address}"
    assert a.ask(a.address, 80) == f"a {a.address}"
    with socket.create_connection((a.address, 80), 3) as stream:
        assert read(stream) == "a 172.20.0.1", "the fabric, where the API server is, reaches pods"
    with pytest.raises(OSError, match=r"unreachable|No route"):
        a.connect("10.244.1.77", 80)
    # After a restart of the agent: nothing is lost, nothing is made twice.
    again = Node(1)
    assert again.inside(again.network.existing) == {"a": a.address, "b": b.address}
    assert again.pod("a").address == a.address and a.ask(c.address, 80) == f"c {a.address}"
    with pytest.raises(NetworkError, match="belongs to another pod"):
        again.pod("d", b.address)
    again.remove("b")
    again.remove("b")
    assert not netns.exists("b") and again.pod("d").address == b.address
    for number in range(20):
        again.pod(f"many-{number}")
    assert {f"many-{number}" for number in range(20)} <= set(again.inside(again.network.existing))


def many_at_once() -> None:
    """Pods made at the same time get addresses of their own; one that was cut short is completed."""
    node = Node(1)

    async def make() -> list[str]:
        return await asyncio.gather(*(node.network.add(f"p{n}", None) for n in range(12)))

    assert len(set(node.inside(lambda: asyncio.run(make())))) == 12
    (netns.NETNS / "half").touch()
    half = node.pod("half")
    half.serve(80)
    assert node.pod("other").ask(half.address, 80).startswith("half ")


def service(name: str, port: int, protocol: str = "TCP", **spec: Any) -> dict[str, Any]:
    """A Service of one port; endpoints serve it on 8080."""
    ports = [{"name": "p", "port": port, "protocol": protocol, **spec.pop("port_fields", {})}]
    return {"metadata": {"namespace": "shop", "name": name}, "spec": {"ports": ports, **spec}}


def endpoints(name: str, pods: dict[Pod, str], protocol: str = "TCP", port: int = 8080) -> dict[str, Any]:
    """The EndpointSlice of a Service."""
    return {
        "metadata": {"namespace": "shop", "name": name, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "p", "port": port, "protocol": protocol}],
        "endpoints": [
            {"addresses": [p.address], "nodeName": node, "conditions": {"ready": True}}
            for p, node in pods.items()
        ],
    }


def services() -> None:
    """Service addresses lead to endpoints, refuse without any, and leave established flows alone."""
    one, two = Node(1), Node(2)
    a, b, c = one.pod("a"), one.pod("b"), two.pod("c")
    for pod in (a, b, c):
        pod.serve(8080)
        pod.serve(5353, kind=socket.SOCK_DGRAM)
    tables = {node: (ServiceTable(Place(node.name)), KernelTable(IPV4)) for node in (one, two)}

    def settle() -> None:
        for node, (table, kernel) in tables.items():
            node.inside(lambda table=table, kernel=kernel: asyncio.run(kernel.reach(table.claims)))

    def put(kind: str, obj: dict[str, Any], deleted: bool = False) -> None:
        for table, _ in tables.values():
            getattr(table, kind)(obj, deleted)

    vip = "10.96.0.50"
    web = service("web", 80, clusterIP=vip, port_fields={"nodePort": 30080}, externalIPs=["192.0.2.7"])
    put("service", web)
    settle()
    assert refused(lambda: a.connect(vip, 80)), "no endpoints"
    assert refused(lambda: one.inside(lambda: socket.create_connection((vip, 80), 3))), "nor for the node"
    assert refused(lambda: a.connect(vip, 81)), "no such port"
    put("slice", endpoints("web", {b: one.name, c: two.name}))
    settle()
    answers = {a.ask(vip, 80) for _ in range(40)}
    assert answers == {f"b {a.address}", f"c {a.address}"}, "both endpoints, and the client's own address"
    assert one.inside(lambda: read(socket.create_connection((vip, 80), 3))).split()[0] in "bc"
    held = {
        name: stream
        for name, stream in ((read(s).split()[0], s) for s in (a.connect(vip, 80) for _ in range(20)))
    }
    assert held.keys() == {"b", "c"}
    # Short connections while the endpoints change; established ones keep theirs.
    with load(lambda: a.ask(vip, 80)) as failures:
        for pods in ({c: two.name}, {b: one.name}, {b: one.name, c: two.name}, {c: two.name}) * 5:
            put("slice", endpoints("web", pods))
            settle()
    assert not failures
    assert {a.ask(vip, 80) for _ in range(10)} == {f"c {a.address}"}
    for stream in held.values():
        echo(stream, "through changes")
    # The agent restarts: its first transaction meets what the last one left.
    for node in tables:
        tables[node] = (tables[node][0], KernelTable(IPV4))
    with load(lambda: a.ask(vip, 80)) as failures:
        settle()
    assert not failures
    for stream in held.values():
        echo(stream, "through a restart")
    listed = one.inside(lambda: netns.run(["nft", "list", "table", "ip", "meshlight-services"], ""))
    assert listed.count("chain endpoints-") == 2, "of old endpoints nothing is left"
    # A pod behind its own Service; UDP; a NodePort and an external address from elsewhere.
    put("slice", endpoints("web", {c: two.name}))
    settle()
    assert c.ask(vip, 80).split()[0] == "c", "hairpin"
    assert a.ask("172.20.0.11", 30080).split()[0] == "c", "NodePort of the own node"
    assert a.ask("172.20.0.12", 30080) == "c 10.244.2.1", "and of another: it answers for the node"
    assert a.ask("192.0.2.7", 80).split()[0] == "c"
    assert read(socket.create_connection(("172.20.0.11", 30080), 3)).split()[0] == "c"
    put("service", service("dns", 53, "UDP", clusterIP="10.96.0.10"))
    put("slice", endpoints("dns", {b: one.name}, "UDP", 5353))
    settle()
    query = a.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    query.settimeout(3)
    query.sendto(b"?", ("10.96.0.10", 53))
    assert query.recvfrom(100) == (f"b {a.address}".encode(), ("10.96.0.10", 53))
    # Affinity: a client stays where it was while that endpoint lives.
    put("service", service("sticky", 80, clusterIP="10.96.0.60", sessionAffinity="ClientIP"))
    put("slice", endpoints("sticky", {b: one.name, c: two.name}))
    settle()
    (first,) = {a.ask("10.96.0.60", 80) for _ in range(12)}
    other, name = (c, two.name) if first.startswith("b") else (b, one.name)
    put("slice", endpoints("sticky", {b: one.name, c: two.name, a: one.name}))
    settle()
    assert {a.ask("10.96.0.60", 80) for _ in range(12)} == {first}
    put("slice", endpoints("sticky", {other: name}))
    settle()
    assert a.ask("10.96.0.60", 80) == f"{other.uid} {a.address}"
    # Nothing is left of what is deleted.
    for gone in ("sticky", "dns", "web"):
        put("service", service(gone, 80, clusterIP="None"), deleted=True)
    settle()
    assert refused(lambda: a.connect(vip, 80))
    names = json.loads(
        one.inside(lambda: netns.run(["nft", "-j", "list", "table", "ip", "meshlight-services"], ""))
    )
    left = [i["chain"]["name"] for i in names["nftables"] if "chain" in i and "-" in i["chain"]["name"]]
    assert sorted(left) == ["filter-forward", "filter-output"]


def live_connections() -> None:
    """Enrolment and un-enrolment take new connections only, and break none."""
    one, two = Node(1), Node(2)
    client, server, outside = one.pod("client"), one.pod("server"), two.pod("outside")
    for pod in (client, server, outside):
        pod.serve(80)
    before_out, before_in = client.connect(outside.address, 80), outside.connect(client.address, 80)
    for stream in (before_out, before_in):
        read(stream)
    proxy = Proxy(client)
    with (
        load(lambda: client.ask(outside.address, 80)) as out_failures,
        load(lambda: outside.ask(client.address, 80)) as in_failures,
    ):
        for _ in range(5):
            redirection.apply(client.path)
            wait_until(lambda: {s.split()[0] for s in proxy.seen} >= {"15001", "15006"}, "capture of both ways")
            echo(before_out, "applied")
            echo(before_in, "applied")
            redirection.flush(client.path)
            proxy.seen.clear()
            echo(before_out, "flushed")
            echo(before_in, "flushed")
    assert not out_failures and not in_failures, (out_failures[:3], in_failures[:3])
    redirection.apply(client.path)
    redirection.apply(client.path)
    assert redirection.redirected(client.path)
    proxy.seen.clear()
    out = client.connect(outside.address, 80)
    assert read(out) == f"outside {client.address}"
    assert proxy.seen == [f"15001 {client.address} {outside.address}:80"], "SO_ORIGINAL_DST is where it went"
    inbound = outside.connect(client.address, 80)
    assert read(inbound) == f"client {outside.address}", "the workload sees the client, not the proxy"
    assert proxy.seen[1:] == [f"15006 {outside.address} {client.address}:80"]
    with outside.connect(client.address, 15008) as stream:
        assert read(stream) == "hbone"
    with client.connect(client.address, 80) as own, client.connect("127.0.0.1", 80) as loopback:
        assert read(own) == f"client {client.address}" and read(loopback) == "client 127.0.0.1"
    assert len(proxy.seen) == 3, "neither HBONE nor the pod's own loopback is redirected"
    # Un-enrolment: carried connections go on, even when the listeners have closed.
    redirection.flush(client.path)
    assert not redirection.redirected(client.path)
    proxy.close()
    for stream in (out, inbound, before_in, before_out):
        echo(stream, "after the proxy left")
    assert client.ask(outside.address, 80) == f"outside {client.address}"
    assert outside.ask(client.address, 80) == f"client {outside.address}"
    assert len(proxy.seen) == 3
    redirection.flush(server.path)
    assert server.inside(lambda: netns.run(["nft", "list", "ruleset"], "")) == "", "never enrolled: untouched"
    redirection.apply(client.path, dns=True)
    assert redirection.redirected(client.path)


def probes() -> None:
    """The node's own processes reach enrolled pods in plaintext; nobody else does."""
    one, two = Node(1), Node(2)
    pod, neighbour, other = one.pod("pod"), one.pod("neighbour"), two.pod("other")
    for each in (pod, other):
        each.serve(80)
    proxy = Proxy(pod)
    redirection.apply(pod.path)
    probe = one.inside(lambda: socket.create_connection((pod.address, 80), 3))
    assert read(probe) == f"pod {network.PROBE_ADDRESS}" and not proxy.seen
    assert one.inside(lambda: read(socket.create_connection((other.address, 80), 3))) == "other 172.20.0.11"
    assert neighbour.ask(pod.address, 80) == f"pod {neighbour.address}" and len(proxy.seen) == 1
    table, kernel = ServiceTable(Place(one.name)), KernelTable(IPV4)
    table.service(service("web", 80, clusterIP="10.96.0.50"), False)
    table.slice(endpoints("web", {pod: one.name}, port=80), False)
    one.inside(lambda: asyncio.run(kernel.reach(table.claims)))
    assert neighbour.ask("10.96.0.50", 80) == f"pod {neighbour.address}", "a forwarded flow is no probe"
    assert proxy.seen[-1] == f"15006 {neighbour.address} {pod.address}:80"
    assert alive(probe)
