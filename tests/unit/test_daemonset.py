"""DaemonSets: which nodes have their pod, and how a new template replaces the old."""

from __future__ import annotations

from typing import Any

import pytest
from workload_objects import NOW, node, pod

from meshlight.controllers.daemonset import by_node, node_of, place, pod_spec, roll, status, wants
from meshlight.controllers.revisions import HASH


def daemon_set(strategy: dict[str, Any] | None = None, **template: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "d", "namespace": "x", "uid": "d1"},
        "spec": {
            "template": {"metadata": {"labels": {"app": "d"}}, "spec": {"containers": [], **template}},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": strategy or {}},
        },
    }


def on(name: str, where: str, digest: str = "new", **more: Any) -> dict[str, Any]:
    return pod(name, labels={HASH: digest}, nodeName=where, **more)


def test_a_pod_says_which_node_it_is_for() -> None:
    made = pod("p")
    made["spec"] = pod_spec(daemon_set(), "a")
    assert node_of(made) == "a"
    assert {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"} in made[
        "spec"
    ]["tolerations"]


@pytest.mark.parametrize(
    ("found", "template", "expected"),
    [
        (node(), {}, (True, True)),
        (node(unschedulable=True), {}, (True, True)),
        (node(taints=[{"key": "gpu", "effect": "NoSchedule"}]), {}, (False, True)),
        (node(taints=[{"key": "gpu", "effect": "NoExecute"}]), {}, (False, False)),
        (node(taints=[{"key": "gpu", "effect": "NoExecute"}]), {"tolerations": [{"operator": "Exists"}]},
         (True, True)),
        (node(), {"nodeSelector": {"kubernetes.io/hostname": "b"}}, (False, False)),
        (node(taints=[{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]), {}, (True, True)),
    ],
)  # fmt: skip
def test_where_a_pod_is_wanted_and_may_stay(
    found: dict[str, Any], template: dict[str, Any], expected: tuple[bool, bool]
) -> None:
    assert wants(daemon_set(**template), found) == expected


def test_missing_doubled_ended_and_misplaced_pods() -> None:
    nodes = {n: node(n) for n in "abc"}
    pods = by_node([on("1", "a"), on("2", "a", ready=False), on("3", "gone"), on("4", "b", phase="Failed")])
    steps = place(daemon_set(), nodes, pods, "new", 0)
    assert steps.create == ["c"]
    assert [p["metadata"]["name"] for p in steps.delete] == ["2", "3"]
    assert [p["metadata"]["name"] for p in steps.failed] == ["4"]


def test_one_pod_at_a_time_is_replaced() -> None:
    pods = by_node([on("1", "a", "old"), on("2", "b", "old"), on("3", "c", "old")])
    steps = roll(daemon_set(), ["a", "b", "c"], pods, "new", NOW)
    assert len(steps.delete) == 1 and not steps.create
    pods = by_node([on("1", "a", "new", ready=False), on("2", "b", "old"), on("3", "c", "old")])
    assert roll(daemon_set(), ["a", "b", "c"], pods, "new", NOW).delete == []
    pods = by_node([on("1", "a", "old", ready=False), on("2", "b", "old"), on("3", "c", "old")])
    assert [p["metadata"]["name"] for p in roll(daemon_set(), ["a", "b", "c"], pods, "new", NOW).delete] == [
        "1"
    ]


def test_with_surge_the_new_pod_comes_first() -> None:
    item = daemon_set({"maxSurge": 1, "maxUnavailable": 0})
    pods = by_node([on("1", "a", "old"), on("2", "b", "old")])
    steps = roll(item, ["a", "b"], pods, "new", NOW)
    assert (steps.create, steps.delete) == (["a"], [])
    pods = by_node([on("1", "a", "old"), on("3", "a", "new"), on("2", "b", "old")])
    assert place(item, {"a": node("a"), "b": node("b")}, pods, "new", 1).delete == []
    steps = roll(item, ["a", "b"], pods, "new", NOW)
    assert [p["metadata"]["name"] for p in steps.delete] == ["1"]


def test_the_status_counts() -> None:
    nodes = {"a": node("a"), "b": node("b", taints=[{"key": "x", "effect": "NoSchedule"}]), "c": node("c")}
    pods = by_node([on("1", "a"), on("2", "b"), on("3", "c", "old", ready=False)])
    made = status(daemon_set(), nodes, pods, "new", 0, NOW)
    assert made["desiredNumberScheduled"] == 2 and made["numberMisscheduled"] == 1
    assert (made["numberReady"], made["updatedNumberScheduled"], made["numberUnavailable"]) == (1, 1, 1)
