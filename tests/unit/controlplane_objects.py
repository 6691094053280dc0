"""Kubernetes objects for the control plane's tests, with only what the tests are about."""

from __future__ import annotations

from typing import Any

from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, Changes

Object = dict[str, Any]


def pod(
    name: str = "web-1",
    namespace: str = "shop",
    *,
    ip: str | None = "10.244.1.5",
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    owner: tuple[str, str] | None = None,
    node: str = "node-1",
    account: str = "web",
    ready: bool = True,
    phase: str = "Running",
    host_network: bool = False,
    deleted: bool = False,
) -> Object:
    metadata: Object = {"name": name, "namespace": namespace, "uid": f"uid-{name}"}
    metadata["labels"] = {"app": "web"} if labels is None else labels
    metadata["annotations"] = annotations or {}
    if owner:
        metadata["ownerReferences"] = [{"kind": owner[0], "name": owner[1], "controller": True}]
    if deleted:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    status: Object = {
        "phase": phase,
        "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
    }
    if ip:
        status["podIP"], status["podIPs"] = ip, [{"ip": ip}]
    spec: Object = {"nodeName": node, "serviceAccountName": account}
    if host_network:
        spec["hostNetwork"] = True
    return {"kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def service(name: str = "web", namespace: str = "shop", *, ip: str = "10.96.0.7", **spec: Any) -> Object:
    ports = [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]
    full = {"clusterIP": ip, "clusterIPs": [ip], "ports": ports, "ipFamilies": ["IPv4"], **spec}
    return {"kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": full}


def endpoint_slice(
    *pods: str,
    service: str = "web",
    namespace: str = "shop",
    name: str = "web-abc",
    port: int = 8080,
    addresses: tuple[str, ...] = (),
) -> Object:
    endpoints: list[Object] = [
        {
            "addresses": ["10.244.1.5"],
            "conditions": {"ready": True},
            "targetRef": {"kind": "Pod", "name": pod, "namespace": namespace},
        }
        for pod in pods
    ]
    endpoints += [{"addresses": [address], "conditions": {"ready": True}} for address in addresses]
    metadata = {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": service}}
    ports = [{"name": "http", "port": port, "protocol": "TCP"}]
    return {
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": endpoints,
    }


def node(name: str = "node-1", zone: str = "z1") -> Object:
    labels = {"topology.kubernetes.io/region": "r1", "topology.kubernetes.io/zone": zone}
    return {"kind": "Node", "metadata": {"name": name, "labels": labels}}


def security(kind: str, name: str = "p", namespace: str = "shop", **spec: Any) -> Object:
    return {"kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def apply(index: Index, *objects: Object) -> Changes:
    """Observe objects and commit."""
    for obj in objects:
        index.observe(obj["kind"], ObjectKey.of(obj), obj)
    return index.commit()


def delete(index: Index, *objects: Object) -> Changes:
    """Observe deletions and commit."""
    for obj in objects:
        index.observe(obj["kind"], ObjectKey.of(obj), None)
    return index.commit()


def names(changes: Changes, type_url: str = ADDRESS_TYPE) -> tuple[set[str], set[str]]:
    """Names updated and removed."""
    if type_url not in changes:
        return set(), set()
    return set(changes[type_url].updated), set(changes[type_url].removed)


def workload(index: Index, name: str) -> Any:
    """A published workload's message."""
    resource = index.collections[ADDRESS_TYPE].get(name)
    assert resource is not None, f"no resource {name}"
    message: Any = resource.message
    return message.workload


def published_service(index: Index, name: str) -> Any:
    """A published service's message."""
    resource = index.collections[ADDRESS_TYPE].get(name)
    assert resource is not None, f"no resource {name}"
    message: Any = resource.message
    return message.service


def policy_names(index: Index) -> set[str]:
    """Names of published policies."""
    return {resource.name for resource in index.collections[AUTHORIZATION_TYPE]}
