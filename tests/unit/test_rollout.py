"""Rollouts of Deployments: arithmetic, conditions, revisions."""

from __future__ import annotations

from datetime import timedelta
from itertools import product
from typing import Any

import pytest
from workload_objects import NOW, pod

from meshlight.controllers import deployment_status, rollout
from meshlight.controllers.deployment import DESIRED, HISTORY, REVISION, current, revision, set_annotations
from meshlight.controllers.pods import count_or_share, deletion_order, template_hash
from meshlight.controllers.rollout import Bounds, SetState


@pytest.mark.parametrize(
    ("value", "whole", "up", "expected"),
    [("25%", 4, True, 1), ("25%", 3, True, 1), ("25%", 3, False, 0), ("100%", 3, False, 3), (2, 10, True, 2)],
)
def test_counts_and_shares(value: int | str, whole: int, up: bool, expected: int) -> None:
    assert count_or_share(value, whole, up=up) == expected


@pytest.mark.parametrize(
    ("strategy", "replicas", "expected"),
    [
        ({}, 4, (1, 1)),
        ({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "10%"}}, 4, (0, 1)),
        ({"rollingUpdate": {"maxSurge": 2, "maxUnavailable": 9}}, 3, (2, 3)),
        ({"type": "Recreate"}, 3, (0, 0)),
    ],
)
def test_bounds(strategy: dict[str, Any], replicas: int, expected: tuple[int, int]) -> None:
    bounds = Bounds.of({"replicas": replicas, "strategy": strategy})
    assert (bounds.surge, bounds.unavailable) == expected


@pytest.mark.parametrize(
    ("wanted", "surge", "unavailable"),
    [(w, s, u) for w, s, u in product((1, 3, 4, 10), (0, 1, 3), (0, 1, 2)) if s or u],
)
def test_a_rollout_ends_and_keeps_its_bounds(wanted: int, surge: int, unavailable: int) -> None:
    bounds = Bounds(wanted, surge, min(unavailable, wanted))
    counts, available = {"new": 0, "old": wanted}, {"new": 0, "old": wanted}
    for _ in range(6 * wanted + 10):
        step = rollout.rolling_step(
            bounds,
            SetState("new", counts["new"], available["new"]),
            [SetState("old", counts["old"], available["old"])],
        )
        counts |= step
        assert sum(counts.values()) <= wanted + surge
        available["old"] = min(available["old"], counts["old"])
        assert sum(available.values()) >= wanted - bounds.unavailable
        if not step:
            available["new"] = min(counts["new"], available["new"] + 1)  # one more becomes available
    assert counts == {"new": wanted, "old": 0}


def test_broken_old_pods_go_before_those_that_work() -> None:
    bounds = Bounds(4, 1, 1)
    new, olds = SetState("new", 1, 0), [SetState("sick", 2, 0, "1"), SetState("well", 2, 2, "2")]
    assert rollout.rolling_step(bounds, new, olds) == {"sick": 1}
    assert rollout.rolling_step(Bounds(4, 1, 2), SetState("new", 1, 1), olds) == {"sick": 0, "well": 1}


def test_recreate_waits_for_the_last_old_pod() -> None:
    bounds = Bounds(3, 0, 0)
    old, new = SetState("old", 3), SetState("new", 0)
    assert rollout.recreate_step(bounds, None, [old], 3) == {"old": 0}
    assert rollout.recreate_step(bounds, new, [SetState("old", 0)], 1) == {}
    assert rollout.recreate_step(bounds, new, [SetState("old", 0)], 0) == {"new": 3}


@pytest.mark.parametrize(
    ("bounds", "new", "olds", "expected"),
    [
        (Bounds(6, 0, 1), SetState("new", 3, 3), [], {"new": 6}),
        (Bounds(10, 3, 2), SetState("new", 5, most=8), [SetState("old", 3, most=8)], {"new": 8, "old": 5}),
        (Bounds(0, 0, 0), SetState("new", 2), [SetState("old", 2)], {"new": 0, "old": 0}),
        (Bounds(3, 1, 1), SetState("new", 3, 3), [SetState("old", 2)], {"old": 0}),
    ],
)
def test_scaling_in_proportion(
    bounds: Bounds, new: SetState, olds: list[SetState], expected: dict[str, int]
) -> None:
    assert rollout.scaled(bounds, new, olds, rolling=True) == expected


def replica_set(name: str = "web-1", replicas: int = 3, number: int = 1, **status: int) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "annotations": {REVISION: str(number)},
            "creationTimestamp": f"2026-01-01T00:00:0{number}Z",
        },
        "spec": {"replicas": replicas, "template": {"spec": {"containers": [{"name": name}]}}},
        "status": status,
    }


def deployment(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "web", "generation": 1}, "spec": {"replicas": 3, **spec}, "status": {}}


def test_conditions_follow_a_rollout() -> None:
    item = deployment()
    item["status"] = deployment_status.status(item, [replica_set(replicas=3, replicas_=0)], replica_set(), NOW)
    reasons = {c["type"]: (c["status"], c["reason"]) for c in item["status"]["conditions"]}
    assert reasons == {
        "Available": ("False", "MinimumReplicasUnavailable"),
        "Progressing": ("True", "NewReplicaSetCreated"),
    }
    some = replica_set(replicas=3, readyReplicas=1, availableReplicas=1)
    some["status"]["replicas"] = 3
    item["status"] = deployment_status.status(item, [some], some, NOW + timedelta(seconds=1))
    assert item["status"]["conditions"][1]["reason"] == "ReplicaSetUpdated"
    assert item["status"]["unavailableReplicas"] == 2
    stuck = deployment_status.status(item, [some], some, NOW + timedelta(seconds=602))
    assert stuck["conditions"][1]["reason"] == "ProgressDeadlineExceeded"
    done = replica_set(replicas=3, readyReplicas=3, availableReplicas=3)
    done["status"]["replicas"] = 3
    item["status"] = deployment_status.status(item, [done], done, NOW + timedelta(seconds=2))
    assert [c["status"] for c in item["status"]["conditions"]] == ["True", "True"]
    assert item["status"]["conditions"][1]["reason"] == "NewReplicaSetAvailable"
    later = deployment_status.status(item, [done], done, NOW + timedelta(seconds=50))
    assert later == item["status"], "nothing new, no new times"
    assert deployment_status.deadline_in(item, NOW) is None


def test_a_paused_deployment_says_so() -> None:
    item = deployment(paused=True)
    made = deployment_status.status(item, [], None, NOW)
    assert (
        made["conditions"][1]["reason"] == "DeploymentPaused" and made["conditions"][1]["status"] == "Unknown"
    )


def test_revisions_grow_and_an_old_template_becomes_the_newest() -> None:
    assert revision(None, []) == 1
    assert revision(None, [replica_set(number=1), replica_set(number=2)]) == 3
    assert revision(replica_set(number=3), [replica_set(number=2)]) == 3
    assert revision(replica_set(number=1), [replica_set(number=2)]) == 3


def test_a_replica_set_remembers_its_earlier_revisions() -> None:
    item = {"metadata": {"name": "web", "annotations": {"kubernetes.io/change-cause": "why", REVISION: "2"}}}
    made = set_annotations(item, replica_set(number=1), 3, Bounds(3, 1, 0))
    assert made[REVISION] == "3" and made[HISTORY] == "1" and made[DESIRED] == "3"
    assert made["kubernetes.io/change-cause"] == "why"


def test_the_replica_set_of_a_template_is_found_without_its_hash() -> None:
    item = deployment(template={"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "x"}]}})
    found = replica_set("x")
    found["spec"]["template"]["metadata"] = {"labels": {"a": "b", "pod-template-hash": "z"}}
    assert current(item, [replica_set("other"), found]) is found
    assert current(item, [replica_set("other")]) is None


def test_template_hashes_differ_by_template_and_salt() -> None:
    first = template_hash({"spec": {"a": 1}})
    assert first == template_hash({"spec": {"a": 1}}) and len(first) == 10
    assert len({first, template_hash({"spec": {"a": 2}}), template_hash({"spec": {"a": 1}}, 1)}) == 3


def test_who_goes_first() -> None:
    pods = [
        pod("old", nodeName="n", metadata={"creationTimestamp": "2026-01-01T00:00:00Z"}),
        pod("young", nodeName="n", metadata={"creationTimestamp": "2026-01-01T09:00:00Z"}),
        pod("cheap", nodeName="m", annotations={"controller.kubernetes.io/pod-deletion-cost": "-5"}),
        pod("unready", nodeName="n", ready=False),
        pod("pending", nodeName="n", ready=False, phase="Pending"),
        pod("unplaced", ready=False, phase="Pending"),
    ]
    order = [p["metadata"]["name"] for p in deletion_order(pods)]
    assert order == ["unplaced", "pending", "unready", "cheap", "young", "old"]
