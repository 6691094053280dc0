"""What a cluster has running: nodes, components, namespaces with their enrolment, and workloads.

Everything is read from the Kubernetes API, so it is the same for an embedded and a real cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from meshlight.embedded import outlet
from meshlight.embedded.layout import Layout, Record
from meshlight.kube.client import Client
from meshlight.kube.resources import DAEMON_SETS, DEPLOYMENTS, NAMESPACES, NODES, PODS, Object

DATAPLANE_MODE = "istio.io/dataplane-mode"
REDIRECTION = "ambient.istio.io/redirection"
TRUST_DOMAIN = "cluster.local"
COMPONENT_NAMESPACES = ("istio-system", "kube-system", "observability", "network")


@dataclass(frozen=True, slots=True)
class Objects:
    """The lists that a status is computed from."""

    nodes: list[Object]
    namespaces: list[Object]
    pods: list[Object]
    deployments: list[Object]
    daemon_sets: list[Object]


def is_ready(obj: Object) -> bool:
    """Whether a Pod or Node has the condition Ready=True."""
    conditions = obj.get("status", {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def protocol(pod: Object) -> str:
    """How traffic reaches a pod: HBONE once it is redirected to ztunnel, TCP otherwise."""
    annotations = pod["metadata"].get("annotations") or {}
    return "HBONE" if annotations.get(REDIRECTION) == "enabled" else "TCP"


def identity(pod: Object) -> str:
    """The SPIFFE identity of a pod's service account."""
    account = pod["spec"].get("serviceAccountName") or "default"
    return f"spiffe://{TRUST_DOMAIN}/ns/{pod['metadata']['namespace']}/sa/{account}"


def components(objects: Objects) -> list[dict[str, Any]]:
    """Deployments and DaemonSets of the system namespaces: how many pods are ready of how many."""
    found = []
    for kind, items in (("Deployment", objects.deployments), ("DaemonSet", objects.daemon_sets)):
        for item in items:
            if item["metadata"]["namespace"] not in COMPONENT_NAMESPACES:
                continue
            status = item.get("status") or {}
            if kind == "Deployment":
                ready, desired = status.get("readyReplicas", 0), item["spec"].get("replicas", 1)
            else:
                ready, desired = status.get("numberReady", 0), status.get("desiredNumberScheduled", 0)
            found.append(
                {
                    "name": item["metadata"]["name"],
                    "namespace": item["metadata"]["namespace"],
                    "kind": kind,
                    "ready": ready,
                    "desired": desired,
                }
            )
    return sorted(found, key=lambda c: (c["namespace"], c["name"]))


def workloads(pods: Iterable[Object]) -> list[dict[str, Any]]:
    """One entry for each live pod outside the host network, system namespaces left out."""
    found = []
    for pod in pods:
        metadata, status = pod["metadata"], pod.get("status") or {}
        if metadata["namespace"] in COMPONENT_NAMESPACES or pod["spec"].get("hostNetwork"):
            continue
        if status.get("phase") in ("Succeeded", "Failed"):
            continue
        found.append(
            {
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "node": pod["spec"].get("nodeName", ""),
                "address": status.get("podIP", ""),
                "identity": identity(pod),
                "protocol": protocol(pod),
                "ready": is_ready(pod),
            }
        )
    return sorted(found, key=lambda w: (w["namespace"], w["name"]))


def summarize(objects: Objects) -> dict[str, Any]:
    """`{nodes[], components[], namespaces[], workloads[]}`, plain values for any output format."""
    per_node: dict[str, int] = {}
    for pod in objects.pods:
        node = pod["spec"].get("nodeName", "")
        per_node[node] = per_node.get(node, 0) + 1
    return {
        "nodes": [
            {
                "name": node["metadata"]["name"],
                "ready": is_ready(node),
                "pod_cidr": node.get("spec", {}).get("podCIDR", ""),
                "pods": per_node.get(node["metadata"]["name"], 0),
            }
            for node in sorted(objects.nodes, key=lambda n: _natural(n["metadata"]["name"]))
        ],
        "components": components(objects),
        "namespaces": [
            {
                "name": item["metadata"]["name"],
                "dataplane_mode": (item["metadata"].get("labels") or {}).get(DATAPLANE_MODE),
            }
            for item in objects.namespaces
        ],
        "workloads": workloads(objects.pods),
    }


def _natural(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (name, 0)


async def status(layout: Layout) -> dict[str, Any]:
    """`{cluster, running, api, …}` with what `summarize` says of it.

    Raises ApiUnreachable when the cluster is recorded but does not answer.
    """
    record = Record.read(layout)
    if record is None or not record.running():
        return {"cluster": layout.name, "running": False}
    async with Client.from_kubeconfig(layout.kubeconfig) as client:
        lists = await asyncio.gather(
            *(client.list(r) for r in (NODES, NAMESPACES, PODS, DEPLOYMENTS, DAEMON_SETS))
        )
    return {
        "cluster": layout.name,
        "running": True,
        "api": f"https://127.0.0.1:{record.api_port}",
        "listeners": outlet.listeners(layout),
        **summarize(Objects(*(found.items for found in lists))),
    }
