"""How to reach a service: its clusters and their endpoints, ready to publish. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meshlight.controlplane.envoy import clusters, endpoints, names, wire
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


def compile_backend(index: Index, key: ObjectKey) -> Backend:
    """The backend of a service that exists."""
    service = index.service(key)
    assert service is not None, "only services that exist are compiled"
    hostname = index.mesh.hostname(key.name, key.namespace)
    made = [published(wire.CLUSTER_TYPE, clusters.of_port(hostname, service, port)) for port in service.ports]
    return Backend(made, endpoints_of(index, key))


def endpoints_of(index: Index, key: ObjectKey) -> list[Published]:
    """The endpoints of each of a service's clusters."""
    service = index.service(key)
    if service is None:
        return []
    hostname = index.mesh.hostname(key.name, key.namespace)
    slices = index.slices_of(key)
    result = []
    for port in service.ports:
        chosen = endpoints.members(port, slices, index.pod, index.node)
        name = names.cluster(hostname, port.port)
        result.append(publish(wire.ENDPOINT_TYPE, name, endpoints.assignment(index.mesh, name, chosen)))
    return result
