"""NetworkPolicies with live traffic, in namespaces of a test's own; see `lab`."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from lab import Node, Pod, alive, read

from meshlight.node import netns
from meshlight.node.network_policy import PolicyTable
from meshlight.node.policies import KernelPolicies


def pod_object(pod: Pod, node: Node, namespace: str = "shop", **labels: str) -> dict[str, Any]:
    ports = [{"name": "web", "containerPort": 80, "protocol": "TCP"}]
    return {
        "metadata": {"name": pod.uid, "namespace": namespace, "uid": pod.uid, "labels": labels},
        "spec": {"nodeName": node.name, "containers": [{"name": "c", "ports": ports}]},
        "status": {"podIP": pod.address, "phase": "Running"},
    }


def policy(name: str, namespace: str = "shop", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace}, "spec": {"podSelector": {}, **spec}}


def passes(pod: Pod, address: str, port: int) -> bool:
    """Whether a connection is made; what is dropped is not refused."""
    try:
        with pod.connect(address, port, timeout=0.4) as stream:
            read(stream)
    except TimeoutError:
        return False
    return True


def policies() -> None:
    """Default deny, selectors, blocks, ports, both directions, changes by element, and what is exempt."""
    one, two = Node(1), Node(2)
    server, client = one.pod("server"), one.pod("client")
    other, foreign = two.pod("other"), two.pod("foreign")
    for pod in (server, client, other, foreign):
        for port in (80, 81, 90, 95, 15008):
            pod.serve(port)
    tables = {node: (PolicyTable(node.name), KernelPolicies()) for node in (one, two)}

    def put(kind: str, obj: dict[str, Any], deleted: bool = False) -> None:
        for node, (table, kernel) in tables.items():
            getattr(table, kind)(obj, deleted)
            node.inside(lambda table=table, kernel=kernel: asyncio.run(kernel.reach(table)))

    def listed(node: Node) -> str:
        return node.inside(lambda: netns.run(["nft", "list", "ruleset", "inet"], ""))

    for name in ("shop", "else"):
        put("namespace", {"metadata": {"name": name, "labels": {"team": name}}})
    put("pod", pod_object(server, one, app="server"))
    put("pod", pod_object(client, one, app="client"))
    put("pod", pod_object(other, two, app="other"))
    put("pod", pod_object(foreign, two, "else", app="client"))
    assert listed(one) == "", "no policy, no table"
    held = other.connect(server.address, 80)
    read(held)
    put("policy", policy("deny", podSelector={"matchLabels": {"app": "server"}}, policyTypes=["Ingress"]))
    assert not passes(other, server.address, 80) and not passes(client, server.address, 80)
    assert alive(held), "what is under way goes on"
    assert passes(server, other.address, 80) and passes(client, other.address, 80), "others are not isolated"
    assert one.inside(lambda: read(socket.create_connection((server.address, 80), 3))), (
        "nor is the node shut out"
    )
    assert passes(server, server.address, 80), "nor the pod from itself"
    # By pod, with ports by number, range and name.
    by_pod = policy(
        "allow",
        podSelector={"matchLabels": {"app": "server"}},
        ingress=[
            {
                "from": [{"podSelector": {"matchLabels": {"app": "client"}}}],
                "ports": [{"port": "web"}, {"port": 90, "endPort": 99}],
            }
        ],
    )
    put("policy", by_pod)
    allowed = {port: passes(client, server.address, port) for port in (80, 81, 90, 95, 15008)}
    assert allowed == {80: True, 81: False, 90: True, 95: True, 15008: False}
    assert not passes(other, server.address, 80) and not passes(foreign, server.address, 80), "of its namespace"
    # A pod that becomes a peer is an element; chains stay.
    chains = {line for line in listed(one).splitlines() if "chain" in line}
    put("pod", pod_object(other, two, app="client"))
    assert passes(other, server.address, 80)
    assert {line for line in listed(one).splitlines() if "chain" in line} == chains
    put("pod", pod_object(other, two, app="other"))
    assert not passes(other, server.address, 80)
    # In the mesh the allowed peers' HBONE is let in, and nobody else's.
    meshed = pod_object(server, one, app="server")
    meshed["metadata"]["annotations"] = {"ambient.istio.io/redirection": "enabled"}
    put("pod", meshed)
    assert passes(client, server.address, 15008) and not passes(other, server.address, 15008)
    put("pod", pod_object(server, one, app="server"))
    assert not passes(client, server.address, 15008)
    # By namespace, and by block with an exception.
    by_space = {"from": [{"namespaceSelector": {"matchLabels": {"team": "else"}}}]}
    put("policy", {**by_pod, "spec": {**by_pod["spec"], "ingress": [by_space]}})
    assert passes(foreign, server.address, 81) and not passes(client, server.address, 81)
    put("namespace", {"metadata": {"name": "else", "labels": {"team": "left"}}})
    assert not passes(foreign, server.address, 81)
    block = {"from": [{"ipBlock": {"cidr": "10.244.0.0/16", "except": [f"{other.address}/32"]}}]}
    put("policy", {**by_pod, "spec": {**by_pod["spec"], "ingress": [block]}})
    assert passes(foreign, server.address, 81) and not passes(other, server.address, 81)
    # Out: only to the server's named port; an accept outwards is none inwards.
    put("policy", by_pod, deleted=True)
    outwards = policy(
        "out",
        podSelector={"matchLabels": {"app": "client"}},
        policyTypes=["Egress"],
        egress=[{"to": [{"podSelector": {"matchLabels": {"app": "other"}}}], "ports": [{"port": "web"}]}],
    )
    put("policy", outwards)
    assert passes(client, other.address, 80) and not passes(client, other.address, 81)
    assert not passes(client, foreign.address, 80) and passes(foreign, client.address, 80)
    put("policy", policy("in", podSelector={"matchLabels": {"app": "other"}}))
    assert not passes(client, other.address, 80), "the other side is isolated too"
    # An agent that restarts meets what the last one left, and nothing of it remains in the end.
    for node in tables:
        tables[node] = (tables[node][0], KernelPolicies())
    put("namespace", {"metadata": {"name": "else", "labels": {"team": "again"}}})
    assert not passes(client, other.address, 80) and alive(held)
    for name in ("in", "out", "deny"):
        put("policy", policy(name), deleted=True)
    assert passes(client, other.address, 81) and listed(one) == listed(two) == ""
