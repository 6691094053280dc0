"""Traffic policies, source ranges, SCTP, and UDP flows whose endpoint goes, in namespaces of a test's own."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from lab import Node, Pod
from scenarios import endpoints, refused, service

from meshlight.node import conntrack
from meshlight.node.service_proxy import KernelTable, Place, ServiceTable
from meshlight.node.service_rules import IPV4


def traffic() -> None:
    """What Services promise beside reaching an endpoint."""
    one, two = Node(1), Node(2)
    a, b, c = one.pod("a"), one.pod("b"), two.pod("c")
    for pod in (a, b, c):
        pod.serve(8080)
        pod.serve(5353, kind=socket.SOCK_DGRAM)
    tables = {node: (ServiceTable(Place(node.name)), KernelTable(IPV4)) for node in (one, two)}

    def put(kind: str, obj: dict[str, Any], deleted: bool = False) -> None:
        for node, (table, kernel) in tables.items():
            getattr(table, kind)(obj, deleted)
            node.inside(lambda table=table, kernel=kernel: asyncio.run(kernel.reach(table.claims)))

    def fabric_asks(address: str, port: int) -> str:
        with socket.create_connection((address, port), 1) as stream:
            return stream.makefile().readline().strip()

    def dropped(connect: Any) -> bool:
        try:
            connect()
        except TimeoutError:
            return True
        return False

    # Local: the client's address is kept, traffic stays on the node it came to; pods are served by all.
    local = service(
        "local", 80, clusterIP="10.96.0.70", type="LoadBalancer", externalTrafficPolicy="Local",
        internalTrafficPolicy="Local", port_fields={"nodePort": 30070},
    )  # fmt: skip
    local["status"] = {"loadBalancer": {"ingress": [{"ip": "172.20.1.70"}]}}
    put("service", local)
    put("slice", endpoints("local", {c: two.name}))
    assert fabric_asks("172.20.0.12", 30070) == "c 172.20.0.1"
    assert dropped(lambda: fabric_asks("172.20.0.11", 30070)), "this node has no endpoint"
    assert a.ask("172.20.1.70", 80).split()[0] == "c", "pods are not bound to it"
    assert dropped(lambda: a.connect("10.96.0.70", 80, timeout=0.5)), "but to the internal policy"
    assert c.ask("10.96.0.70", 80).split()[0] == "c"
    put("slice", endpoints("local", {}))
    assert refused(lambda: a.connect("10.96.0.70", 80)), "no endpoint anywhere"
    # Source ranges hold for the LoadBalancer address.
    ranged = service("ranged", 80, clusterIP="10.96.0.71", type="LoadBalancer")
    ranged["spec"]["loadBalancerSourceRanges"] = [f"{a.address}/32"]
    ranged["status"] = {"loadBalancer": {"ingress": [{"ip": "172.20.1.71"}]}}
    put("service", ranged)
    put("slice", endpoints("ranged", {c: two.name}))
    assert a.ask("172.20.1.71", 80).split()[0] == "c"
    assert dropped(lambda: b.connect("172.20.1.71", 80, timeout=0.5)) and b.ask("10.96.0.71", 80)
    # A UDP client that keeps its port is led to another endpoint once its own is gone.
    put("service", service("dns", 53, "UDP", clusterIP="10.96.0.72"))
    put("slice", endpoints("dns", {b: one.name}, "UDP", 5353))
    query = a.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    query.settimeout(1)

    def asked(link: socket.socket) -> str:
        link.sendto(b"?", ("10.96.0.72", 53))
        return link.recvfrom(100)[0].decode().split()[0]

    assert asked(query) == "b"
    put("slice", endpoints("dns", {c: two.name}, "UDP", 5353))
    assert asked(query) == "b", "the kernel goes on with a flow that it knows"
    gone: set[tuple[str, int]] = {(b.address, 5353)}
    assert one.inside(lambda: conntrack.forget_datagrams(gone)) == 1
    assert asked(query) == "c"
    assert one.inside(lambda: conntrack.forget_datagrams(gone)) == 0
    _stream_control(put, a, c, two.name)


def _stream_control(put: Any, client: Pod, server: Pod, node: str) -> None:
    """SCTP rules are accepted, and work where the kernel speaks SCTP."""
    put("service", service("sctp", 80, "SCTP", clusterIP="10.96.0.73"))
    put("slice", endpoints("sctp", {server: node}, "SCTP", 9000))
    try:
        listener = server.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP))
    except OSError:
        return  # a kernel without it: the rules were taken all the same
    listener.bind(("", 9000))
    listener.listen(4)
    stream = client.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP))
    stream.settimeout(3)
    stream.connect(("10.96.0.73", 80))
    stream.close()
