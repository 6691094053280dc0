"""How to reach a service: its clusters and their endpoints, ready to publish. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meshlight.controlplane.envoy import clusters, destination_rule, endpoints, names, wire
from meshlight.controlplane.envoy.destination_rule import DestinationRule
from meshlight.controlplane.envoy.traffic_index import TrafficIndex
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import Published, publish


@dataclass(slots=True)
class Backend:
    """A service's clusters and endpoints."""

    clusters: list[Published]
    endpoints: list[Published]


def published(type_url: str, message: Any) -> Published:
    """A message that has a name, ready to publish."""
    return publish(type_url, message.name, message)


def compile_backend(index: Index, traffic: TrafficIndex, key: ObjectKey) -> Backend:
    """The backend of a service that exists: a cluster a port, and one more for each subset."""
    service = index.service(key)
    assert service is not None, "only services that exist are compiled"
    hostname = index.mesh.hostname(key.name, key.namespace)
    rule = rule_of(index, traffic, key)
    made = []
    for port in service.ports:
        for subset in _subsets(rule):
            cluster = clusters.of_port(hostname, service, port, subset)
            if rule is not None:
                destination_rule.apply(cluster, rule.settings(port.port, subset))
            made.append(published(wire.CLUSTER_TYPE, cluster))
    return Backend(made, endpoints_of(index, traffic, key))


def rule_of(index: Index, traffic: TrafficIndex, key: ObjectKey) -> DestinationRule | None:
    """The DestinationRule of a service."""
    hostname = index.mesh.hostname(key.name, key.namespace)
    return traffic.rule(hostname, key.namespace, index.mesh.root_namespace)


def _subsets(rule: DestinationRule | None) -> list[str]:
    """Names of subsets, the whole service (an empty name) first."""
    return ["", *(subset.name for subset in rule.subsets)] if rule else [""]


def endpoints_of(index: Index, traffic: TrafficIndex, key: ObjectKey) -> list[Published]:
    """The endpoints of each of a service's clusters."""
    service = index.service(key)
    if service is None:
        return []
    hostname = index.mesh.hostname(key.name, key.namespace)
    slices = index.slices_of(key)
    rule = rule_of(index, traffic, key)
    result = []
    for port in service.ports:
        members = endpoints.members(port, slices, index.pod, index.node)
        for name in _subsets(rule):
            subset = rule.subset(name) if rule else None
            chosen = [m for m in members if subset is None or subset.holds(dict(m.pod.labels) if m.pod else {})]
            cluster = names.cluster(hostname, port.port, name)
            assignment = endpoints.assignment(index.mesh, cluster, chosen)
            result.append(publish(wire.ENDPOINT_TYPE, cluster, assignment))
    return result
