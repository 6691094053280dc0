"""Which pods belong in the mesh, what a status says of them, and the objects that `run` makes."""

from __future__ import annotations

from typing import Any

import pytest

from meshlight.kube.ambient import asked, obstacle
from meshlight.node.enrolment import wanted
from meshlight.node.redirection import flushed, rules
from meshlight.operations.run import RunError, Workload, objects, resolve
from meshlight.operations.status import Objects, summarize


def pod(
    name: str = "p",
    namespace: str = "demo",
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    phase: str = "Running",
    **spec: Any,
) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": name,
            "labels": labels or {},
            "annotations": annotations or {},
        },
        "spec": {"serviceAccountName": "cart", "nodeName": "n1", **spec},
        "status": {"phase": phase, "podIP": "10.244.1.2"},
    }


@pytest.mark.parametrize(
    ("item", "namespace_mode", "expected"),
    [
        (pod(), "ambient", True),
        (pod(), None, False),
        (pod(labels={"istio.io/dataplane-mode": "ambient"}), None, True),
        (pod(labels={"istio.io/dataplane-mode": "none"}), "ambient", False),
        (pod(hostNetwork=True), "ambient", False),
        (pod(annotations={"sidecar.istio.io/status": "{}"}), "ambient", False),
        (pod(namespace="istio-system", labels={"app": "ztunnel"}), "ambient", False),
        (pod(phase="Succeeded"), "ambient", False),
    ],
)
def test_who_is_enrolled(item: dict[str, Any], namespace_mode: str | None, expected: bool) -> None:
    assert wanted(item, namespace_mode) is expected


def test_who_cannot_be_captured_is_told_why() -> None:
    assert obstacle(pod()) == ""
    host = pod(hostNetwork=True)
    assert "host's network" in obstacle(host)
    assert "sidecar" in obstacle(pod(annotations={"sidecar.istio.io/status": "{}"}))
    assert asked(host, "ambient") and not asked(host, None)
    assert not asked(pod(labels={"istio.io/dataplane-mode": "none", "istio.io/rev": "canary"}), "ambient")


def test_only_new_connections_are_captured_and_leaving_deletes_no_table() -> None:
    for line in rules(dns=True).splitlines():
        if "redirect to" in line and "udp" not in line:
            assert "syn" in line, line
    assert "delete" not in flushed() and "flush chain ip istio-ambient nat-output" in flushed()


def test_status_of_workloads() -> None:
    enrolled = pod("b", annotations={"ambient.istio.io/redirection": "enabled"})
    system = pod("s", namespace="istio-system")
    namespace = {"metadata": {"name": "demo", "labels": {"istio.io/dataplane-mode": "ambient"}}}
    node = {"metadata": {"name": "n1"}, "spec": {"podCIDR": "10.244.1.0/24"}, "status": {}}
    found = summarize(Objects([node], [namespace], [enrolled, pod("a"), system], [], []))
    assert [(w["name"], w["protocol"]) for w in found["workloads"]] == [("a", "TCP"), ("b", "HBONE")]
    assert found["workloads"][0]["identity"] == "spiffe://cluster.local/ns/demo/sa/cart"
    assert found["nodes"] == [{"name": "n1", "ready": False, "pod_cidr": "10.244.1.0/24", "pods": 3}]
    assert found["namespaces"] == [{"name": "demo", "dataplane_mode": "ambient"}]


def test_a_missing_program_is_named() -> None:
    with pytest.raises(RunError, match="no-such-program is not on PATH"):
        resolve("no-such-program")
    with pytest.raises(RunError, match="is not an executable file"):
        resolve("/no/such/program")


def test_a_workload_without_ports_has_no_service() -> None:
    plain = Workload("web", "demo", ("/bin/true",), "/")
    assert [r.kind for r, _ in objects(plain)] == ["ServiceAccount", "Pod"]
    serving = Workload("web", "demo", ("/bin/true",), "/", (80,))
    assert [r.kind for r, _ in objects(serving)] == ["ServiceAccount", "Pod", "Service"]
