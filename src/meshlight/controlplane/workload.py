"""Facts compiled to the Workload and Service messages that the node proxy receives. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshlight.controlplane.facts import Endpoint, EndpointSlice, Node, ObjectKey, Pod, Service, pack_address
from meshlight.controlplane.settings import Mesh
from meshlight.proto import workload_pb2 as wds

PortPairs = tuple[tuple[int, int], ...]
"""(service port, target port) pairs of one service on one workload."""


def pod_uid(mesh: Mesh, key: ObjectKey) -> str:
    """The resource name of a pod."""
    return f"{mesh.cluster_id}//Pod/{key}"


def endpoint_uid(mesh: Mesh, key: ObjectKey, address: str) -> str:
    """The resource name of a member of an EndpointSlice that is no pod."""
    return f"{mesh.cluster_id}/discovery.k8s.io/EndpointSlice/{key}/{address}"


def service_name(mesh: Mesh, key: ObjectKey) -> str:
    """The resource name of a Service, also its key in `Workload.services`."""
    return f"{key.namespace}/{mesh.hostname(key.name, key.namespace)}"


def join_ports(service: Service, slice_: EndpointSlice) -> PortPairs:
    """The service's ports with the port each has on the members of a slice, joined by name."""
    targets = dict(slice_.ports)
    return tuple((port.port, targets[port.name]) for port in service.ports if port.name in targets)


def from_pod(
    mesh: Mesh,
    pod: Pod,
    node: Node | None,
    services: Mapping[str, PortPairs],
    policies: Iterable[str],
) -> wds.Workload:
    """The workload of a pod; `services` is by resource name, `policies` are attached policy names."""
    return wds.Workload(
        uid=pod_uid(mesh, pod.key),
        name=pod.key.name,
        namespace=pod.key.namespace,
        addresses=pod.addresses,
        network=mesh.network,
        cluster_id=mesh.cluster_id,
        trust_domain=mesh.trust_domain,
        service_account=pod.service_account,
        node=pod.node,
        tunnel_protocol=wds.HBONE if pod.hbone else wds.NONE,
        native_tunnel=pod.native_tunnel,
        canonical_name=pod.canonical_name,
        canonical_revision=pod.canonical_revision,
        workload_type=pod.controller.kind,
        workload_name=pod.controller.name,
        status=wds.HEALTHY if pod.healthy else wds.UNHEALTHY,
        network_mode=wds.HOST_NETWORK if pod.host_network else wds.STANDARD,
        locality=_locality(node),
        services=_services(services),
        authorization_policies=policies,
    )


def from_endpoint(
    mesh: Mesh, slice_: EndpointSlice, endpoint: Endpoint, services: Mapping[str, PortPairs]
) -> wds.Workload | None:
    """The workload of a bare address behind a Service, such as the API server; None if unreadable.

    Nothing is known of it but the address, which may belong to something else as well: hence the
    network mode, under which the node proxy never looks a workload up by address.
    """
    packed = pack_address(endpoint.address)
    if packed is None:
        return None
    return wds.Workload(
        uid=endpoint_uid(mesh, slice_.key, endpoint.address),
        name=slice_.key.name,
        namespace=slice_.key.namespace,
        addresses=[packed],
        network=mesh.network,
        cluster_id=mesh.cluster_id,
        trust_domain=mesh.trust_domain,
        status=wds.HEALTHY if endpoint.ready else wds.UNHEALTHY,
        network_mode=wds.HOST_NETWORK,
        services=_services(services),
    )


def from_service(mesh: Mesh, service: Service, namespace_distribution: str) -> wds.Service:
    """The Service message; the namespace's traffic distribution holds where the Service has none."""
    return wds.Service(
        name=service.key.name,
        namespace=service.key.namespace,
        hostname=mesh.hostname(service.key.name, service.key.namespace),
        addresses=[wds.NetworkAddress(network=mesh.network, address=packed) for packed in service.addresses],
        ports=[
            wds.Port(service_port=port.port, target_port=port.target, app_protocol=port.app_protocol)
            for port in service.ports
        ],
        ip_families=service.ip_families,
        load_balancing=_load_balancing(service, service.distribution or namespace_distribution),
        canonical=True,
    )


_CLOSE = [wds.LoadBalancing.NETWORK, wds.LoadBalancing.REGION, wds.LoadBalancing.ZONE]
_DISTRIBUTIONS = {
    "preferclose": _CLOSE,
    "prefersamezone": _CLOSE,
    "prefersamenode": [*_CLOSE, wds.LoadBalancing.SUBZONE, wds.LoadBalancing.NODE],
}


def failover(distribution: str) -> wds.LoadBalancing | None:
    """What a traffic distribution (in lower case) prefers; None for one that prefers nothing."""
    if distribution not in _DISTRIBUTIONS:
        return None
    scopes = _DISTRIBUTIONS[distribution]
    return wds.LoadBalancing(routing_preference=scopes, mode=wds.LoadBalancing.FAILOVER)


def _load_balancing(service: Service, distribution: str) -> wds.LoadBalancing | None:
    """`internalTrafficPolicy: Local` is a promise, a traffic distribution a preference."""
    if service.local_only:
        result = wds.LoadBalancing(routing_preference=[wds.LoadBalancing.NODE], mode=wds.LoadBalancing.STRICT)
    elif preferred := failover(distribution):
        result = preferred
    elif service.publish_not_ready:
        result = wds.LoadBalancing()
    else:
        return None
    if service.publish_not_ready:
        result.health_policy = wds.LoadBalancing.ALLOW_ALL
    return result


def _locality(node: Node | None) -> wds.Locality | None:
    if node is None or not (node.region or node.zone or node.subzone):
        return None
    return wds.Locality(region=node.region, zone=node.zone, subzone=node.subzone)


def _services(services: Mapping[str, PortPairs]) -> dict[str, wds.PortList]:
    return {
        name: wds.PortList(ports=[wds.Port(service_port=port, target_port=target) for port, target in pairs])
        for name, pairs in services.items()
    }
