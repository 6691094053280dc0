"""DaemonSets, node lifecycle, garbage collection and Deployment conditions, without an API."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from meshlight.controllers.daemonset import HASH, placement, revision
from meshlight.controllers.deployment import conditions
from meshlight.controllers.deployment import revision as deployment_revision
from meshlight.controllers.garbage_collector import Graph, Place
from meshlight.controllers.node_lifecycle import NOT_READY, UNREACHABLE, silence, taints, unknown
from meshlight.kube.resources import PODS

STAMP = "2026-01-01T00:00:00Z"


def node(name: str, ready: str = "True", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": spec,
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }


def daemon_set(**template_spec: Any) -> dict[str, Any]:
    template = {"metadata": {"labels": {"app": "d"}}, "spec": {"containers": [], **template_spec}}
    return {"metadata": {"name": "d", "namespace": "x", "uid": "d1"}, "spec": {"template": template}}


def pod(name: str, on: str, item: dict[str, Any], ready: bool = True, phase: str = "Running") -> dict[str, Any]:
    return {
        "metadata": {"name": name, "creationTimestamp": STAMP, "labels": {HASH: revision(item)}},
        "spec": {"nodeName": on},
        "status": {"phase": phase, "conditions": [{"type": "Ready", "status": str(ready)}]},
    }


def test_every_node_gets_one_pod_even_cordoned_and_unready_ones() -> None:
    nodes = [node("a"), node("b", "False"), node("c", unschedulable=True)]
    assert placement(daemon_set(), nodes, []) == (["a", "b", "c"], [])


def test_taints_and_selectors_keep_pods_away() -> None:
    tainted = node("a", taints=[{"key": "gpu", "value": "", "effect": "NoSchedule"}])
    assert placement(daemon_set(), [tainted], []) == ([], [])
    tolerant = daemon_set(tolerations=[{"operator": "Exists"}])
    assert placement(tolerant, [tainted], []) == (["a"], [])
    chosen = daemon_set(nodeSelector={"kubernetes.io/hostname": "b"})
    assert placement(chosen, [node("a"), node("b")], []) == (["b"], [])


def test_doubled_ended_and_misplaced_pods_go() -> None:
    item = daemon_set()
    pods = [
        pod("1", "a", item),
        pod("2", "a", item, ready=False),
        pod("3", "gone", item),
        pod("4", "b", item, phase="Failed"),
    ]
    lacking, surplus = placement(item, [node("a"), node("b")], pods)
    assert lacking == ["b"]
    assert {p["metadata"]["name"] for p in surplus} == {"2", "3", "4"}


def test_a_new_template_replaces_one_ready_pod_at_a_time() -> None:
    old, new = daemon_set(), daemon_set(hostname="changed")
    pods = [pod("1", "a", old), pod("2", "b", old)]
    _, surplus = placement(new, [node("a"), node("b")], pods)
    assert len(surplus) == 1
    pods[1] = pod("3", "b", new, ready=False)
    assert placement(new, [node("a"), node("b")], pods) == ([], [])
    kept = {**new, "spec": {**new["spec"], "updateStrategy": {"type": "OnDelete"}}}
    assert placement(kept, [node("a"), node("b")], [pod("1", "a", old), pod("2", "b", old)]) == ([], [])


def test_silent_nodes() -> None:
    lease = {"spec": {"renewTime": "2026-01-01T00:00:00.500000Z"}}
    assert silence(lease, datetime(2026, 1, 1, 0, 1, tzinfo=UTC)) == 59.5
    mine = {"key": "mine", "effect": "NoSchedule"}
    keys = [(t["key"], t["effect"]) for t in taints(node("a", taints=[mine]), True)]
    assert keys == [("mine", "NoSchedule"), (UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]
    assert [t["key"] for t in taints(node("a", "False"), False)] == [NOT_READY, NOT_READY]
    assert taints(node("a", taints=[{"key": UNREACHABLE, "effect": "NoExecute"}]), False) == []
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


@pytest.mark.parametrize(
    ("updated", "available", "status", "reason"),
    [(3, 3, "True", "NewReplicaSetAvailable"), (1, 2, "False", "ReplicaSetUpdated")],
)
def test_conditions_of_a_deployment(updated: int, available: int, status: str, reason: str) -> None:
    item: dict[str, Any] = {"spec": {"replicas": 3}, "status": {}}
    fresh = {"metadata": {"name": "web-1"}}
    counts = {"updatedReplicas": updated, "replicas": 3, "availableReplicas": available}
    first = conditions(item, fresh, counts, STAMP)
    assert [(c["type"], c["status"]) for c in first] == [("Available", status), ("Progressing", "True")]
    assert first[1]["reason"] == reason
    item["status"]["conditions"] = first
    assert conditions(item, fresh, counts, "later") == first, "nothing new, no new times"


def test_revisions_grow_and_an_old_template_becomes_the_newest() -> None:
    def numbered(number: int) -> dict[str, Any]:
        return {"metadata": {"annotations": {"deployment.kubernetes.io/revision": str(number)}}}

    assert deployment_revision(None, []) == 1
    assert deployment_revision(None, [numbered(1), numbered(2)]) == 3
    assert deployment_revision(numbered(3), [numbered(2)]) == 3
    assert deployment_revision(numbered(1), [numbered(2)]) == 3
