"""Claims and volumes, disruption budgets, quotas, evictions: the pure rules."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from workload_objects import NOW, node, pod

from meshlight.controllers.disruption import budget_status
from meshlight.controllers.persistent_volumes import provisioned, volume_phase
from meshlight.controllers.taint_eviction import eviction_in
from meshlight.controllers.volume_binding import best, claim_names, default_class
from meshlight.kube.quota_usage import used


def volume(name: str, size: str = "1Gi", modes: str = "ReadWriteOnce", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"disk": name}},
        "spec": {"capacity": {"storage": size}, "accessModes": modes.split(","), **spec},
    }


def claim(size: str = "1Gi", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "c", "namespace": "x", "uid": "cu", "resourceVersion": "1"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}, **spec},
    }


@pytest.mark.parametrize(
    ("volumes", "asked", "expected"),
    [
        ([volume("a"), volume("b", "5Gi")], claim("2Gi"), "b"),
        ([volume("big", "9Gi"), volume("small", "2Gi")], claim("1Gi"), "small"),
        ([volume("a", "1Gi")], claim("2Gi"), None),
        ([volume("a", modes="ReadOnlyMany")], claim(), None),
        ([volume("a", modes="ReadWriteMany,ReadWriteOnce")], claim(), "a"),
        ([volume("a", storageClassName="fast")], claim(), None),
        ([volume("a", storageClassName="fast")], claim(storageClassName="fast"), "a"),
        ([volume("a"), volume("b")], claim(selector={"matchLabels": {"disk": "b"}}), "b"),
        ([volume("a", claimRef={"namespace": "x", "name": "other", "uid": "o"})], claim(), None),
        ([volume("a"), volume("b", "9Gi", claimRef={"namespace": "x", "name": "c"})], claim(), "b"),
    ],
)
def test_the_volume_for_a_claim(
    volumes: list[dict[str, Any]], asked: dict[str, Any], expected: str | None
) -> None:
    found = best(volumes, asked)
    assert (found and found["metadata"]["name"]) == expected


def test_a_made_volume_belongs_to_its_claim() -> None:
    storage = {"metadata": {"name": "standard"}, "provisioner": "meshlight.io/disk", "reclaimPolicy": "Retain"}
    made = provisioned(claim("3Gi"), storage)
    assert made["spec"]["capacity"] == {"storage": "3Gi"} and made["spec"]["claimRef"]["uid"] == "cu"
    assert made["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    assert volume_phase(made, claim()) == "Bound" and volume_phase(made, None) == "Released"
    assert volume_phase(volume("a"), None) == "Available"


def test_claims_of_a_pod() -> None:
    volumes = [
        {"name": "a", "persistentVolumeClaim": {"claimName": "c1"}},
        {"name": "b", "ephemeral": {"volumeClaimTemplate": {}}},
        {"name": "d", "emptyDir": {}},
    ]
    assert claim_names(pod("p", volumes=volumes)) == ["c1", "p-b"]


def test_the_newest_default_class_counts() -> None:
    def storage(name: str, default: str, created: str) -> dict[str, Any]:
        notes = {"storageclass.kubernetes.io/is-default-class": default}
        return {"metadata": {"name": name, "annotations": notes, "creationTimestamp": created}}

    found = default_class([storage("a", "true", "1"), storage("b", "true", "2"), storage("c", "false", "3")])
    assert found is not None and found["metadata"]["name"] == "b"


@pytest.mark.parametrize(
    ("spec", "well", "sick", "expected", "allowed"),
    [
        ({"minAvailable": 2}, 3, 0, 3, 1),
        ({"minAvailable": "50%"}, 4, 0, 4, 2),
        ({"maxUnavailable": 1}, 3, 0, 3, 1),
        ({"maxUnavailable": 1}, 2, 1, 3, 0),
        ({"maxUnavailable": "30%"}, 10, 0, 10, 3),
        ({"minAvailable": 2}, 1, 1, 2, 0),
    ],
)
def test_disruptions_allowed(spec: dict[str, Any], well: int, sick: int, expected: int, allowed: int) -> None:
    pods = [pod(f"w{n}") for n in range(well)] + [pod(f"s{n}", ready=False) for n in range(sick)]
    made = budget_status({"metadata": {}, "spec": spec}, pods, expected, NOW)
    assert made["disruptionsAllowed"] == allowed and made["currentHealthy"] == well


def test_quota_usage() -> None:
    hard = {"requests.cpu": "4", "memory": "1Gi", "pods": "5", "services": "2", "requests.storage": "9Gi"}
    pods = [pod("a", requests={"cpu": "500m", "memory": "256Mi"}), pod("b", requests={"cpu": "1"})]
    pods.append(pod("done", phase="Succeeded", requests={"cpu": "9"}))
    found = used({"spec": {"hard": hard}}, pods, {"services": 1}, [claim("2Gi")])
    assert found == {
        "requests.cpu": "1500m",
        "memory": "256Mi",
        "pods": "2",
        "services": "1",
        "requests.storage": "2Gi",
    }
    best_effort = {"spec": {"hard": {"pods": "5"}, "scopes": ["BestEffort"]}}
    assert used(best_effort, [pod("a", status={"qosClass": "BestEffort"}), pod("b")], {}, []) == {"pods": "1"}


@pytest.mark.parametrize(
    ("tolerations", "expected"),
    [
        ([], 0.0),
        ([{"key": "k", "operator": "Exists"}], None),
        ([{"key": "k", "operator": "Exists", "tolerationSeconds": 60}], 50.0),
        ([{"key": "k", "operator": "Exists", "tolerationSeconds": 5}], 0.0),
        ([{"key": "other", "operator": "Exists"}], 0.0),
    ],
)
def test_when_a_pod_leaves_a_tainted_node(tolerations: list[dict[str, Any]], expected: float | None) -> None:
    found = node(taints=[{"key": "k", "effect": "NoExecute"}])
    seen = {"k": NOW - timedelta(seconds=10)}
    assert eviction_in(pod(tolerations=tolerations), found, seen, NOW) == expected
