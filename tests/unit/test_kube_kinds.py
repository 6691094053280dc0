"""Kinds in several versions, pods' subresources, printers and rules of what bounds others."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest

from meshlight.kube import pod_printer, pod_subresources, tables
from meshlight.kube.builtin_kinds import BUILTIN
from meshlight.kube.catalog import Catalog
from meshlight.kube.resources import Object
from meshlight.kube.rest import MERGE_PATCH, Rest, Target, WriteOptions
from meshlight.kube.status import StatusError
from meshlight.kube.store import Store

OPTIONS = WriteOptions(field_manager="test")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def rest() -> Rest:
    made = Rest(Store(":memory:"), Catalog())
    create(made, "v1", "namespaces", {"metadata": {"name": "x"}})
    return made


def target(rest: Rest, api_version: str, plural: str, name: str = "", sub: str = "") -> Target:
    group, _, version = api_version.rpartition("/")
    served = rest.catalog.lookup(group, version, plural)
    assert served is not None
    return Target(served, "x" if served.resource.namespaced else None, name, sub)


def create(rest: Rest, api_version: str, plural: str, obj: Object) -> Object:
    return rest.create(target(rest, api_version, plural), copy.deepcopy(obj), OPTIONS)


def pod(name: str = "p", **status: Any) -> Object:
    containers = [{"name": "main", "image": "x"}]
    metadata = {"name": name, "labels": {"app": "web"}}
    return {"metadata": metadata, "spec": {"containers": containers}, "status": status}


# Versions


def test_an_autoscaler_is_one_object_in_two_versions(rest: Rest) -> None:
    spec = {"scaleTargetRef": {"kind": "Deployment", "name": "d"}, "maxReplicas": 3}
    made = create(
        rest,
        "autoscaling/v1",
        "horizontalpodautoscalers",
        {"metadata": {"name": "h"}, "spec": {**spec, "targetCPUUtilizationPercentage": 50}},
    )
    assert (made["apiVersion"], made["spec"]["targetCPUUtilizationPercentage"]) == ("autoscaling/v1", 50)
    stored = rest.get(target(rest, "autoscaling/v2", "horizontalpodautoscalers", "h"))
    assert stored["apiVersion"] == "autoscaling/v2"
    assert stored["spec"]["metrics"][0]["resource"]["target"]["averageUtilization"] == 50
    old = target(rest, "autoscaling/v1", "horizontalpodautoscalers", "h")
    patched, _ = rest.patch(old, {"spec": {"targetCPUUtilizationPercentage": 70}}, MERGE_PATCH, OPTIONS)
    assert patched["spec"]["targetCPUUtilizationPercentage"] == 70


def test_events_of_both_groups_are_the_same_objects(rest: Rest) -> None:
    event = {
        "metadata": {"name": "e"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "kopf",
        "reportingInstance": "i",
        "action": "A",
        "reason": "Logging",
        "regarding": {"kind": "Pod", "name": "p"},
        "note": "hello",
        "type": "Normal",
    }
    create(rest, "events.k8s.io/v1", "events", event)
    core = rest.get(target(rest, "v1", "events", "e"))
    assert (core["message"], core["reportingComponent"]) == ("hello", "kopf")
    assert core["involvedObject"] == {"kind": "Pod", "name": "p", "namespace": "x"}
    assert rest.get(target(rest, "events.k8s.io/v1", "events", "e"))["note"] == "hello"


# Subresources of pods


def budget(rest: Rest, allowed: int) -> None:
    spec = {"selector": {"matchLabels": {"app": "web"}}, "minAvailable": 1}
    create(rest, "policy/v1", "poddisruptionbudgets", {"metadata": {"name": "b"}, "spec": spec})
    status = {
        "disruptionsAllowed": allowed, "currentHealthy": 1, "desiredHealthy": 1 - allowed, "expectedPods": 1,
        "observedGeneration": 1,
    }  # fmt: skip
    rest.patch(
        target(rest, "policy/v1", "poddisruptionbudgets", "b", "status"),
        {"status": status},
        MERGE_PATCH,
        OPTIONS,
    )


READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}


def test_an_eviction_takes_what_the_budget_allows(rest: Rest) -> None:
    create(rest, "v1", "pods", pod(**READY))
    budget(rest, 1)
    pod_subresources.evict(rest, target(rest, "v1", "pods", "p", "eviction"), {}, OPTIONS)
    with pytest.raises(StatusError) as gone:
        rest.get(target(rest, "v1", "pods", "p"))
    assert gone.value.code == 404
    status = rest.get(target(rest, "policy/v1", "poddisruptionbudgets", "b"))["status"]
    assert status["disruptionsAllowed"] == 0 and "p" in status["disruptedPods"]


def test_an_eviction_that_the_budget_forbids_changes_nothing(rest: Rest) -> None:
    create(rest, "v1", "pods", pod(**READY))
    budget(rest, 0)
    with pytest.raises(StatusError) as refused:
        pod_subresources.evict(rest, target(rest, "v1", "pods", "p", "eviction"), {}, OPTIONS)
    assert (refused.value.code, refused.value.reason) == (429, "TooManyRequests")
    cause = refused.value.details["causes"][0]
    assert cause["message"] == "The disruption budget b needs 1 healthy pods and has 1 currently"
    assert "deletionTimestamp" not in rest.get(target(rest, "v1", "pods", "p"))["metadata"]


def test_ephemeral_containers_are_added_through_their_subresource_alone(rest: Rest) -> None:
    create(rest, "v1", "pods", pod())
    change = {"spec": {"ephemeralContainers": [{"name": "debug", "image": "busybox"}]}}
    with pytest.raises(StatusError) as refused:
        rest.patch(target(rest, "v1", "pods", "p"), copy.deepcopy(change), MERGE_PATCH, OPTIONS)
    assert refused.value.code == 422
    through = target(rest, "v1", "pods", "p", "ephemeralcontainers")
    patched, _ = rest.patch(through, change, MERGE_PATCH, OPTIONS)
    assert patched["spec"]["ephemeralContainers"][0]["name"] == "debug"


def test_a_resize_changes_resources_alone(rest: Rest) -> None:
    create(rest, "v1", "pods", pod())
    containers = [{"name": "main", "image": "other", "resources": {"limits": {"cpu": "2"}}}]
    through = target(rest, "v1", "pods", "p", "resize")
    patched, _ = rest.patch(through, {"spec": {"containers": containers}}, MERGE_PATCH, OPTIONS)
    container = patched["spec"]["containers"][0]
    assert (container["image"], container["resources"]) == (
        "x",
        {"limits": {"cpu": "2"}, "requests": {"cpu": "2"}},
    )


# Printers


def state(name: str, **found: Any) -> Object:
    return {"name": name, "restartCount": found.pop("restarts", 0), "ready": found.pop("ready", False), **found}


RUNNING = {"running": {}}
DONE = {"terminated": {"exitCode": 0, "reason": "Completed"}}
CRASHED = {"terminated": {"exitCode": 1, "finishedAt": "2025-12-31T23:55:00Z"}}
POD_CASES: list[tuple[str, Object, tuple[str, str, str]]] = [
    ("pending", {"phase": "Pending"}, ("0/1", "Pending", "0")),
    (
        "running",
        {"phase": "Running", "containerStatuses": [state("main", ready=True, state=RUNNING)]},
        ("1/1", "Running", "0"),
    ),
    (
        "crashing",
        {
            "phase": "Running",
            "containerStatuses": [
                state("main", restarts=3, state={"waiting": {"reason": "CrashLoopBackOff"}}, lastState=CRASHED)
            ],
        },
        ("0/1", "CrashLoopBackOff", "3 (5m ago)"),
    ),
    (
        "first init container",
        {"phase": "Pending", "initContainerStatuses": [state("one", state=RUNNING)]},
        ("0/1", "Init:0/2", "0"),
    ),
    (
        "second init container failed",
        {"phase": "Pending", "initContainerStatuses": [state("one", state=DONE), state("two", state=CRASHED)]},
        ("0/1", "Init:ExitCode:1", "0"),
    ),
    (
        "completed",
        {"phase": "Succeeded", "containerStatuses": [state("main", state=DONE)]},
        ("0/1", "Completed", "0"),
    ),
    ("evicted", {"phase": "Failed", "reason": "Evicted"}, ("0/1", "Evicted", "0")),
]  # fmt: skip


@pytest.mark.parametrize(("status", "shown"), [c[1:] for c in POD_CASES], ids=[c[0] for c in POD_CASES])
def test_the_word_for_a_pods_status(status: Object, shown: tuple[str, str, str]) -> None:
    subject = pod(**status)
    subject["spec"]["initContainers"] = [{"name": "one"}, {"name": "two"}]
    assert pod_printer.status(subject, NOW) == shown


@pytest.mark.parametrize("served", BUILTIN, ids=lambda s: f"{s.resource.kind}-{s.resource.group}")
def test_every_kind_prints_even_an_empty_object(served: Any) -> None:
    table = tables.render(served, [{"metadata": {"name": "a"}}], "1", "None", NOW)
    assert len(table["rows"][0]["cells"]) == len(table["columnDefinitions"])
    assert "a" in table["rows"][0]["cells"]


# Rules


@pytest.mark.parametrize(
    ("api_version", "plural", "obj", "field"),
    [
        (
            "scheduling.k8s.io/v1",
            "priorityclasses",
            {"metadata": {"name": "a"}, "value": 2_000_000_000},
            "value",
        ),
        (
            "v1",
            "persistentvolumeclaims",
            {"metadata": {"name": "a"}, "spec": {"accessModes": ["ReadWriteOnce"]}},
            "spec.resources[storage]",
        ),
        (
            "v1",
            "persistentvolumes",
            {"metadata": {"name": "a"}, "spec": {"accessModes": ["RWO"], "capacity": {"storage": "1Gi"}}},
            "spec.accessModes[0]",
        ),
        (
            "v1",
            "limitranges",
            {
                "metadata": {"name": "a"},
                "spec": {"limits": [{"type": "Container", "min": {"cpu": "2"}, "max": {"cpu": "500m"}}]},
            },
            "spec.limits[0].min[cpu]",
        ),
        (
            "networking.k8s.io/v1",
            "networkpolicies",
            {
                "metadata": {"name": "a"},
                "spec": {
                    "podSelector": {},
                    "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/24"]}}]}],
                },
            },
            "spec.ingress[0].from[0].ipBlock.except[0]",
        ),
    ],
)
def test_bounds_are_checked(rest: Rest, api_version: str, plural: str, obj: Object, field: str) -> None:
    with pytest.raises(StatusError) as refused:
        create(rest, api_version, plural, obj)
    assert refused.value.code == 422
    assert field in [c["field"] for c in refused.value.details["causes"]]
