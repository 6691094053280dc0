"""The scheduler's decisions, table by table."""

from __future__ import annotations

from typing import Any

import pytest
from workload_objects import node, pod

from meshlight.controllers.node_filters import NodeState, matches_expression, refusals
from meshlight.controllers.scheduling import judge, message, no_preemption, preempt
from meshlight.kube.pod_resources import pod_requests


def states(*found: NodeState) -> list[NodeState]:
    return list(found)


@pytest.mark.parametrize(
    ("wanted", "found", "reason"),
    [
        ({}, node(), None),
        ({"nodeName": "b"}, node(), "node(s) didn't match the requested node name"),
        ({}, node(unschedulable=True), "node(s) were unschedulable"),
        ({"tolerations": [{"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]},
         node(unschedulable=True), None),
        ({}, node(taints=[{"key": "k", "value": "v", "effect": "NoSchedule"}]),
         "node(s) had untolerated taint {k: v}"),
        ({"tolerations": [{"key": "k", "value": "v", "effect": "NoSchedule"}]},
         node(taints=[{"key": "k", "value": "v", "effect": "NoSchedule"}]), None),
        ({}, node(taints=[{"key": "k", "effect": "PreferNoSchedule"}]), None),
        ({"nodeSelector": {"disk": "ssd"}}, node(), "node(s) didn't match Pod's node affinity/selector"),
        ({"nodeSelector": {"disk": "ssd"}}, node(labels={"disk": "ssd"}), None),
        ({"requests": {"cpu": "4100m"}}, node(), "Insufficient cpu"),
        ({"requests": {"cpu": "4"}}, node(), None),
        ({"requests": {"example.com/gpu": "1"}}, node(), "Insufficient example.com/gpu"),
    ],
)  # fmt: skip
def test_one_pod_on_one_node(wanted: dict[str, Any], found: dict[str, Any], reason: str | None) -> None:
    why, _ = refusals(pod(**wanted), NodeState.of(found))
    assert why == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("operator", "values", "holds"),
    [("In", ["5"], True), ("NotIn", ["5"], False), ("Exists", [], True), ("DoesNotExist", [], False),
     ("Gt", ["4"], True), ("Lt", ["4"], False)],
)  # fmt: skip
def test_node_selector_operators(operator: str, values: list[str], holds: bool) -> None:
    assert matches_expression({"key": "n", "operator": operator, "values": values}, {"n": "5"}) is holds


def test_what_a_pod_asks_for_at_its_peak() -> None:
    def asks(cpu: str, **more: str) -> dict[str, Any]:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    spec = {
        "containers": [asks("1"), asks("500m")],
        "initContainers": [asks("3"), asks("1", restartPolicy="Always"), asks("1")],
        "overhead": {"cpu": "10m"},
    }
    assert pod_requests(spec) == {"cpu": 3010}
    spec["initContainers"] = [asks("1", restartPolicy="Always")]
    assert pod_requests(spec) == {"cpu": 2510}


def test_messages_count_each_reason() -> None:
    found = states(
        NodeState.of(node("a", unschedulable=True)),
        NodeState.of(node("b"), [pod("big", requests={"cpu": "3", "memory": "8Gi"})]),
        NodeState.of(node("c", unschedulable=True)),
    )
    verdict = judge(pod(requests={"cpu": "2", "memory": "1Gi"}), found, {})
    said = message(verdict, 3, no_preemption(verdict, 3))
    assert said == (
        "0/3 nodes are available: 1 Insufficient cpu, 1 Insufficient memory, 2 node(s) were unschedulable. "
        "preemption: 0/3 nodes are available: 1 No preemption victims found for incoming pod, "
        "2 Preemption is not helpful for scheduling."
    )
    assert judge(pod(), [], {}).blocked == "no nodes available to schedule pods"


def test_emptier_nodes_first_and_siblings_apart() -> None:
    owner = {"ownerReferences": [{"uid": "o", "kind": "ReplicaSet", "controller": True}]}
    found = states(
        NodeState.of(node("a"), [pod("1", metadata=owner)]),
        NodeState.of(node("b"), [pod("2"), pod("3")]),
    )
    assert judge(pod(metadata=owner), found, {}).node == "b"
    assert judge(pod(), found, {}).node == "a"


def _apart(key: str = "kubernetes.io/hostname") -> dict[str, Any]:
    term = {"topologyKey": key, "labelSelector": {"matchLabels": {"app": "x"}}}
    return {"requiredDuringSchedulingIgnoredDuringExecution": [term]}


def test_affinity_and_anti_affinity_between_pods() -> None:
    zone = "topology.kubernetes.io/zone"
    found = states(
        NodeState.of(node("a", labels={zone: "1"}), [pod("x", labels={"app": "x"})]),
        NodeState.of(node("b", labels={zone: "1"})),
        NodeState.of(node("c", labels={zone: "2"})),
    )
    apart = judge(pod(affinity={"podAntiAffinity": _apart(zone)}), found, {})
    assert apart.node == "c"
    assert apart.reasons == {
        "a": ["node(s) didn't match pod anti-affinity rules"],
        "b": ["node(s) didn't match pod anti-affinity rules"],
    }
    near = judge(pod(affinity={"podAffinity": _apart()}), found, {})
    assert near.node == "a"
    first = pod(labels={"app": "x"}, affinity={"podAffinity": _apart()})
    assert judge(first, [NodeState.of(node("b"))], {}).node == "b", "the first of a group"
    shy = NodeState.of(node("d"), [pod("shy", affinity={"podAntiAffinity": _apart()})])
    refused = judge(pod(labels={"app": "x"}), [shy], {})
    assert refused.reasons == {"d": ["node(s) didn't satisfy existing pods anti-affinity rules"]}


def test_topology_spread() -> None:
    constraint = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "x"}},
    }
    mine = pod(labels={"app": "x"}, topologySpreadConstraints=[constraint])
    found = states(NodeState.of(node("a"), [pod("1", labels={"app": "x"})]), NodeState.of(node("b")))
    verdict = judge(mine, found, {})
    assert verdict.node == "b" and verdict.reasons["a"] == [
        "node(s) didn't match pod topology spread constraints"
    ]


def test_preemption_takes_the_least_important_and_no_more_than_needed() -> None:
    low = [pod(f"low{n}", requests={"cpu": "1"}, priority=n) for n in (1, 2, 3)]
    found = states(NodeState.of(node("a"), [*low, pod("high", requests={"cpu": "1"}, priority=100)]))
    wanted = pod("me", requests={"cpu": "2"}, priority=50)
    verdict = judge(wanted, found, {})
    chosen = preempt(wanted, found, verdict, {})
    assert chosen is not None and chosen.node == "a"
    assert sorted(v["metadata"]["name"] for v in chosen.victims) == ["low1", "low2"]
    assert (
        preempt(pod("weak", requests={"cpu": "2"}), found, judge(pod(requests={"cpu": "2"}), found, {}), {})
        is None
    )


def test_host_ports_clash() -> None:
    def ported(name: str, address: str) -> dict[str, Any]:
        found = pod(name)
        found["spec"]["containers"][0]["ports"] = [{"hostPort": 80, "containerPort": 80, "hostIP": address}]
        return found

    held = NodeState.of(node(), [ported("a", "10.0.0.1")])
    assert refusals(ported("b", "10.0.0.2"), held)[0] == []
    assert refusals(ported("c", "0.0.0.0"), held)[0] == [
        "node(s) didn't have free ports for the requested pod ports"
    ]
