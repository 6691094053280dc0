"""Node lifecycle and garbage collection, without an API."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from meshlight.controllers.garbage_collector import Graph, Place
from meshlight.controllers.node_lifecycle import NOT_READY, UNREACHABLE, UNSCHEDULABLE, silence, taints, unknown
from meshlight.kube.resources import PODS

STAMP = "2026-01-01T00:00:00Z"


def node(name: str, ready: str = "True", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": spec,
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }


def test_silent_nodes() -> None:
    lease = {"spec": {"renewTime": "2026-01-01T00:00:00.500000Z"}}
    assert silence(lease, datetime(2026, 1, 1, 0, 1, tzinfo=UTC)) == 59.5
    mine = {"key": "mine", "effect": "NoSchedule"}
    keys = [(t["key"], t["effect"]) for t in taints(node("a", taints=[mine]), True, STAMP)]
    assert keys == [("mine", "NoSchedule"), (UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]
    assert [t["key"] for t in taints(node("a", "False"), False, STAMP)] == [NOT_READY, NOT_READY]
    assert taints(node("a", taints=[{"key": UNREACHABLE, "effect": "NoExecute"}]), False, STAMP) == []
    cordoned = taints(node("a", unschedulable=True), False, STAMP)
    assert cordoned == [{"key": UNSCHEDULABLE, "effect": "NoSchedule", "timeAdded": STAMP}]
    kept = {"key": UNREACHABLE, "effect": "NoExecute", "timeAdded": "earlier"}
    assert kept in taints(node("a", taints=[kept]), True, STAMP)
    assert unknown(node("a"), STAMP)[0]["reason"] == "NodeStatusUnknown"


def test_an_object_is_orphaned_when_all_its_owners_are_gone() -> None:
    graph, place = Graph(), Place(PODS, "x", "p")
    graph.put("owner-1", Place(PODS, "x", "o1"), ())
    graph.put("owner-2", Place(PODS, "x", "o2"), ())
    graph.put("p", place, ("owner-1", "owner-2"))
    assert graph.remove("owner-1") == {"p"} and graph.orphan("p") is None
    assert graph.remove("owner-2") == {"p"} and graph.orphan("p") == place
    graph.put("p", place, ())
    assert graph.orphan("p") is None and graph.owned() == []


def test_an_owner_knows_its_dependents_and_they_their_owners() -> None:
    graph, place = Graph(), Place(PODS, "x", "p")
    graph.put("p", place, ("owner",))
    assert graph.dependents("owner") == [place] and graph.owners("p") == ("owner",)
    assert graph.place("owner") is None and graph.place("p") == place
    graph.remove("p")
    assert graph.dependents("owner") == [] and graph.owners("p") == ()
