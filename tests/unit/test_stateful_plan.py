"""StatefulSets: order, partitions, names, claims."""

from __future__ import annotations

from typing import Any

from workload_objects import NOW, pod

from meshlight.controllers import stateful_plan
from meshlight.controllers.revisions import HASH
from meshlight.controllers.stateful_plan import Create, Delete, Revision

OLD = Revision("db-old", {"metadata": {"labels": {"app": "db"}}, "spec": {"containers": []}})
NEW = Revision("db-new", {"metadata": {"labels": {"app": "db"}}, "spec": {"containers": [], "x": 1}})


def stateful_set(replicas: int = 3, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "db", "namespace": "x", "uid": "s"},
        "spec": {"replicas": replicas, "serviceName": "db", "selector": {"matchLabels": {"app": "db"}}, **spec},
        "status": {},
    }


def pods(*found: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return stateful_plan.by_ordinal(stateful_set(), found)


def member(ordinal: int, revision: Revision = NEW, **more: Any) -> dict[str, Any]:
    return pod(f"db-{ordinal}", labels={HASH: revision.name}, **more)


def plan(item: dict[str, Any], *found: dict[str, Any]) -> list[tuple[str, int]]:
    steps = stateful_plan.plan(item, pods(*found), OLD, NEW, NOW)
    return [
        ("create", s.ordinal)
        if isinstance(s, Create)
        else ("delete", stateful_plan.ordinal_of(item, s.pod) or 0)
        for s in steps
    ]


def test_in_order_one_at_a_time() -> None:
    item = stateful_set()
    assert plan(item) == [("create", 0)]
    assert plan(item, member(0, ready=False)) == []
    assert plan(item, member(0)) == [("create", 1)]
    assert plan(item, member(0), member(1), member(2)) == []


def test_parallel_all_at_once() -> None:
    item = stateful_set(podManagementPolicy="Parallel")
    assert plan(item, member(1, ready=False)) == [("create", 0), ("create", 2)]


def test_scaling_down_takes_the_highest_when_the_others_are_well() -> None:
    item = stateful_set(1)
    assert plan(item, member(0), member(1), member(2)) == [("delete", 2)]
    assert plan(item, member(0), member(1, ready=False), member(2)) == []
    assert plan(item, member(0), member(1), member(2, metadata={"deletionTimestamp": "t"})) == []


def test_failed_pods_are_replaced() -> None:
    assert plan(stateful_set(), member(0, phase="Failed")) == [("delete", 0)]


def test_updates_go_from_the_highest_down_to_the_partition() -> None:
    item = stateful_set()
    assert plan(item, member(0, OLD), member(1, OLD), member(2, OLD)) == [("delete", 2)]
    assert plan(item, member(0, OLD), member(1, OLD), member(2, ready=False)) == []
    assert plan(item, member(0, OLD), member(1, OLD), member(2)) == [("delete", 1)]
    part = stateful_set(updateStrategy={"type": "RollingUpdate", "rollingUpdate": {"partition": 1}})
    assert plan(part, member(0, OLD), member(1), member(2)) == []
    kept = stateful_set(updateStrategy={"type": "OnDelete"})
    assert plan(kept, member(0, OLD), member(1, OLD), member(2, OLD)) == []


def test_below_the_partition_a_new_pod_is_of_the_old_revision() -> None:
    item = stateful_set(updateStrategy={"type": "RollingUpdate", "rollingUpdate": {"partition": 2}})
    assert stateful_plan.plan(item, {}, OLD, NEW, NOW) == [Create(0, OLD)]


def test_names_labels_and_claims_are_stable() -> None:
    item = stateful_set(
        volumeClaimTemplates=[{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}]
    )
    made = stateful_plan.pod(item, 1, NEW)
    assert made["metadata"]["name"] == made["spec"]["hostname"] == "db-1"
    assert made["spec"]["subdomain"] == "db"
    assert made["metadata"]["labels"]["apps.kubernetes.io/pod-index"] == "1"
    assert made["spec"]["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": "data-db-1"}}]
    (claim,) = stateful_plan.claims(item, 1)
    assert claim["metadata"]["name"] == "data-db-1" and claim["metadata"]["labels"] == {"app": "db"}
    assert "ownerReferences" not in claim["metadata"]


def test_who_takes_the_claims_along() -> None:
    item = stateful_set(persistentVolumeClaimRetentionPolicy={"whenDeleted": "Delete", "whenScaled": "Delete"})
    assert list(stateful_plan.claim_owners(item, None)) == ["StatefulSet"]
    assert list(stateful_plan.claim_owners(item, member(2))) == ["Pod"]
    assert stateful_plan.claim_owners(stateful_set(), member(2)) == {}


def test_an_update_is_through_when_all_are_of_it() -> None:
    item = stateful_set(2)
    half = stateful_plan.status(item, pods(member(0, OLD), member(1)), OLD, NEW, 0, NOW)
    assert (half["currentReplicas"], half["updatedReplicas"], half["currentRevision"]) == (1, 1, "db-old")
    done = stateful_plan.status(item, pods(member(0), member(1)), OLD, NEW, 0, NOW)
    assert (done["currentReplicas"], done["currentRevision"]) == (2, "db-new")


def test_an_ended_pod_is_deleted_only_once() -> None:
    going = member(0, phase="Failed", metadata={"deletionTimestamp": "t"})
    assert not any(
        isinstance(s, Delete) for s in stateful_plan.plan(stateful_set(1), {0: going}, NEW, NEW, NOW)
    )
