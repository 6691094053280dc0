"""Node lifecycle and garbage collection, without an API."""

from __future__ import annotations

from typing import Any

from meshlight.controllers.garbage_collector import Graph, Place
from meshlight.controllers.node_lifecycle import (
    GRACE,
    NOT_READY,
    UNREACHABLE,
    UNSCHEDULABLE,
    NodeLifecycle,
    taints,
    unknown,
)
from meshlight.kube.resources import PODS

STAMP = "2026-01-01T00:00:00Z"


def node(name: str, ready: str = "True", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": spec,
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }


class Quiet:
    """A cache that holds nothing and never changes."""

    def on_change(self, _: object) -> None: ...

    def get(self, name: str, namespace: str = "") -> None: ...


async def test_nobody_is_told_dead_for_a_time_in_which_nobody_listened() -> None:
    quiet: Any = Quiet()
    lifecycle = NodeLifecycle(quiet, quiet, quiet, quiet)
    lease = {"metadata": {"name": "a", "namespace": "kube-node-lease"}}
    lifecycle._renewed(None, lease)  # as read at the start, however old it is
    assert not lifecycle._silent(node("a"))
    assert lifecycle._silent(node("a", "Unknown")), "told dead before, and not heard of since"
    lifecycle._renewed(lease, lease)
    assert not lifecycle._silent(node("a", "Unknown"))
    lifecycle._heard["a"] -= GRACE
    assert lifecycle._silent(node("a")) and lifecycle._silent(node("never heard of"))


def test_silent_nodes() -> None:
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
