"""Endpoints of Services as Envoy's ClusterLoadAssignments. Pure.

An endpoint's metadata says what workload it is, under the names the metrics' labels use, so that a
request's access log can tell it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.facts import EndpointSlice, Node, ObjectKey, Pod, ServicePort
from meshlight.controlplane.settings import Mesh

METADATA = "istio"


@dataclass(frozen=True, slots=True)
class Member:
    """One address behind a service's port, with the pod that it belongs to, if any."""

    address: str
    port: int
    pod: Pod | None = None
    node: Node | None = None
    namespace: str = ""


def members(
    port: ServicePort,
    slices: Iterable[EndpointSlice],
    pod: Callable[[ObjectKey], Pod | None],
    node: Callable[[str], Node | None],
) -> list[Member]:
    """The members of a service that take traffic on a port, in a stable order."""
    found: dict[tuple[str, int], Member] = {}
    for slice_ in slices:
        target = dict(slice_.ports).get(port.name)
        if target is None:
            continue
        for endpoint in slice_.endpoints:
            if not endpoint.ready:
                continue
            facts = pod(endpoint.pod) if endpoint.pod else None
            where = node(facts.node) if facts else None
            member = Member(endpoint.address, target, facts, where, slice_.key.namespace)
            found.setdefault((endpoint.address, target), member)
    return [found[key] for key in sorted(found)]


def assignment(mesh: Mesh, cluster: str, chosen: Iterable[Member]) -> Any:
    """A ClusterLoadAssignment of members, by locality."""
    localities: dict[tuple[str, str, str], Any] = {}
    for member in chosen:
        place = member.node
        where = (place.region, place.zone, place.subzone) if place else ("", "", "")
        group = localities.get(where)
        if group is None:
            group = endpoint_components_pb2.LocalityLbEndpoints(
                load_balancing_weight=wire.uint32(1),
                locality=base_pb2.Locality(region=where[0], zone=where[1], sub_zone=where[2]),
            )
            localities[where] = group
        group.lb_endpoints.append(_endpoint(mesh, member))
    ordered = [localities[where] for where in sorted(localities)]
    for group in ordered:
        group.load_balancing_weight.value = len(group.lb_endpoints)
    return endpoint_pb2.ClusterLoadAssignment(cluster_name=cluster, endpoints=ordered)


def _endpoint(mesh: Mesh, member: Member) -> Any:
    result = endpoint_components_pb2.LbEndpoint(
        endpoint=endpoint_components_pb2.Endpoint(address=wire.socket_address(member.address, member.port)),
        load_balancing_weight=wire.uint32(1),
    )
    described = workload_labels(mesh, member.pod) if member.pod else {"namespace": member.namespace}
    result.metadata.filter_metadata[METADATA].update(described)
    return result


def workload_labels(mesh: Mesh, pod: Pod) -> dict[str, str]:
    """What a workload is, by the names that metric labels end in."""
    labels = dict(pod.labels)
    described = {
        "workload": pod.controller.name,
        "namespace": pod.key.namespace,
        "pod": pod.key.name,
        "canonical_service": pod.canonical_name,
        "canonical_revision": pod.canonical_revision,
        "app": labels.get("app") or labels.get("app.kubernetes.io/name", ""),
        "version": labels.get("version") or labels.get("app.kubernetes.io/version", ""),
        "cluster": mesh.cluster_id,
    }
    if pod.hbone:
        described["principal"] = f"spiffe://{mesh.trust_domain}/ns/{pod.key.namespace}/sa/{pod.service_account}"
    return {name: value for name, value in described.items() if value}
