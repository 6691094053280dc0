"""IPv6 beside IPv4: links, Services, policies and redirection, in namespaces of a test's own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable

from lab import Node, Pod, read
from scenarios import endpoints, service

from meshlight.node import addresses, netns, redirection
from meshlight.node.network_policy import PolicyTable
from meshlight.node.policies import KernelPolicies
from meshlight.node.service_proxy import KernelTable, Place, ServiceTable
from meshlight.node.service_rules import IPV6


def serve(pod: Pod, port: int, *, name: str = "") -> None:
    """A server at the pod's IPv6 addresses that tells its name and its client's address."""

    def listen() -> socket.socket:
        listener = socket.socket(socket.AF_INET6)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(("::", port))
        listener.listen(64)
        return listener

    listener = pod.inside(listen)

    def accept() -> None:
        while True:
            stream, client = listener.accept()
            stream.sendall(f"{name or pod.uid} {client[0]}\n".encode())
            stream.close()

    threading.Thread(target=accept, daemon=True).start()


def ask(inside: Callable[[Callable[[], socket.socket]], socket.socket], address: str, port: int) -> str:
    with inside(lambda: socket.create_connection((address, port), 1)) as stream:
        return read(stream)


def dual_stack() -> None:
    """Pods, nodes and the fabric reach pods and Services over IPv6 as they do over IPv4."""
    one, two = Node(1), Node(2)
    a, b, c = one.pod("a"), one.pod("b"), two.pod("c")
    six = {pod: addresses.second(pod.address) for pod in (a, b, c)}
    assert six[c] == "fd6d:6c10:244:2::2"
    for pod in (a, b, c):
        serve(pod, 80)
    # Routes to other nodes are the agent's; here by hand.
    for node, other in ((one, 2), (two, 1)):
        via = addresses.second(f"172.20.0.{10 + other}")
        route = f"route replace {addresses.pod_cidr(other)} via {via} dev eth0"
        node.inside(lambda route=route: netns.ip([route]))
    assert ask(a.inside, six[c], 80) == f"c {six[a]}"
    assert ask(a.inside, six[b], 80) == f"b {six[a]}"
    assert ask(a.inside, six[a], 80) == f"a {six[a]}"
    assert ask(two.inside, six[c], 80) == f"c {addresses.PROBE_ADDRESS}"
    with socket.create_connection((six[a], 80), 3) as stream:
        assert read(stream) == f"a {addresses.FABRIC_GATEWAY}"
    # Services: endpoints, refusal, NodePort.
    vip, item = "fd6d:6c10:96::50", service("web", 80, clusterIP="10.96.0.50", type="NodePort")
    item["spec"] |= {"clusterIPs": ["10.96.0.50", vip], "ipFamilies": ["IPv4", "IPv6"]}
    item["spec"]["ports"][0]["nodePort"] = 30080
    tables = {node: (ServiceTable(Place(node.name), IPV6), KernelTable(IPV6)) for node in (one, two)}

    def put(kind: str, obj: dict[str, object]) -> None:
        for node, (table, kernel) in tables.items():
            getattr(table, kind)(obj, False)
            node.inside(lambda table=table, kernel=kernel: asyncio.run(kernel.reach(table.claims)))

    put("service", item)
    try:
        ask(a.inside, vip, 80)
        raise AssertionError("no endpoints: refused")
    except ConnectionRefusedError:
        pass
    behind = endpoints("web", {c: two.name}, port=80)
    behind |= {"addressType": "IPv6"}
    behind["endpoints"][0]["addresses"] = [six[c]]
    put("slice", behind)
    assert ask(a.inside, vip, 80) == f"c {six[a]}"
    assert ask(c.inside, vip, 80).startswith("c "), "hairpin"
    assert ask(one.inside, vip, 80).startswith("c ")
    assert ask(a.inside, addresses.second("172.20.0.11"), 30080).startswith("c ")
    # Policies.
    policy, kernel = PolicyTable(two.name), KernelPolicies()
    policy.pod({
        "metadata": {"name": "c", "namespace": "shop"}, "spec": {"nodeName": two.name, "containers": []},
        "status": {"podIPs": [{"ip": c.address}, {"ip": six[c]}], "podIP": c.address},
    }, False)  # fmt: skip
    block = {"from": [{"ipBlock": {"cidr": f"{six[b]}/128"}}]}
    policy.policy({"metadata": {"name": "p", "namespace": "shop"},
                   "spec": {"podSelector": {}, "ingress": [block]}}, False)  # fmt: skip
    two.inside(lambda: asyncio.run(kernel.reach(policy)))
    assert ask(b.inside, six[c], 80) == f"c {six[b]}"
    try:
        ask(a.inside, six[c], 80)
        raise AssertionError("dropped")
    except TimeoutError:
        pass
    # Redirection, both ways, and the node's own processes beside it.
    for port, name in ((15001, "out"), (15006, "in"), (15008, "hbone")):
        serve(b, port, name=name)
    redirection.apply(b.path)
    assert ask(b.inside, six[a], 80) == f"out {six[b]}"
    assert ask(a.inside, six[b], 80) == f"in {six[a]}"
    assert ask(a.inside, six[b], 15008) == f"hbone {six[a]}"
    assert ask(one.inside, six[b], 80) == f"b {addresses.PROBE_ADDRESS}"
    redirection.flush(b.path)
    assert ask(a.inside, six[b], 80) == f"b {six[a]}" and ask(b.inside, six[a], 80) == f"a {six[b]}"
