"""ServiceEntries and WorkloadEntries parsed into exactly what the index needs, and compiled.

They bring into the mesh what Kubernetes does not know: hosts outside, programs on other machines. Facts
are frozen and comparable, as those of `facts`. Rules: Istio's ambient index of the same objects. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshlight.controlplane.facts import (
    REDIRECTION,
    TRAFFIC_DISTRIBUTION,
    TUNNEL,
    ObjectKey,
    Pod,
    Service,
    canonical_name,
    canonical_revision,
    pack_address,
)
from meshlight.controlplane.settings import Mesh
from meshlight.controlplane.workload import PortPairs, failover
from meshlight.kube.resources import Object
from meshlight.proto import workload_pb2 as wds

AUTO_ALLOCATE = "networking.istio.io/enable-autoallocate-ip"
Labels = tuple[tuple[str, str], ...]
DNS = ("DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")


@dataclass(frozen=True, slots=True)
class EntryPort:
    """A port of a ServiceEntry; `target` is 0 where it is the port itself."""

    name: str
    number: int
    target: int
    app_protocol: wds.AppProtocol


@dataclass(frozen=True, slots=True)
class Member:
    """A workload that Kubernetes does not run: an endpoint of a ServiceEntry, or a WorkloadEntry.

    `address` is packed; empty where only a host name is known.
    """

    address: bytes
    hostname: str
    ports: tuple[tuple[str, int], ...]
    labels: Labels
    network: str
    locality: str
    weight: int
    service_account: str


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """A ServiceEntry; `selector` is None where it selects nothing, `shown` False when exported to nobody."""

    key: ObjectKey
    created: str
    hosts: tuple[str, ...]
    blocks: tuple[tuple[bytes, int | None], ...]
    allocated: tuple[tuple[str, bytes], ...]
    ports: tuple[EntryPort, ...]
    resolution: str
    selector: Labels | None
    endpoints: tuple[Member, ...]
    labels: Labels
    alternative_names: tuple[str, ...]
    distribution: str
    namespace_only: bool
    shown: bool


@dataclass(frozen=True, slots=True)
class WorkloadEntry:
    """A WorkloadEntry and what its health check found."""

    key: ObjectKey
    member: Member
    name: str
    hbone: bool
    native_tunnel: bool
    healthy: bool


def service_entry(obj: Object) -> ServiceEntry:
    """The ServiceEntry's facts."""
    spec, metadata = obj.get("spec") or {}, obj["metadata"]
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    selector = (spec.get("workloadSelector") or {}).get("labels")
    export_to = spec.get("exportTo") or []
    namespace = metadata.get("namespace", "")
    return ServiceEntry(
        key=ObjectKey.of(obj),
        created=metadata.get("creationTimestamp") or "",
        hosts=tuple(dict.fromkeys(spec.get("hosts") or [])),
        blocks=tuple(_block(text) for text in spec.get("addresses") or []),
        allocated=tuple(_allocated(obj)) if allocates(obj) else (),
        ports=tuple(_port(port) for port in spec.get("ports") or []),
        resolution=spec.get("resolution") or "NONE",
        selector=tuple(sorted(selector.items())) if selector else None,
        endpoints=tuple(_member(endpoint) for endpoint in spec.get("endpoints") or []),
        labels=tuple(sorted(labels.items())),
        alternative_names=tuple(spec.get("subjectAltNames") or []),
        distribution=str(annotations.get(TRAFFIC_DISTRIBUTION, "")).lower(),
        namespace_only=bool(export_to) and set(export_to) <= {".", namespace},
        shown="~" not in export_to,
    )


def allocates(obj: Object) -> bool:
    """Whether istiod gives the hosts of a ServiceEntry addresses: it has none, and they could be served."""
    spec, labels = obj.get("spec") or {}, obj["metadata"].get("labels") or {}
    opted_out = str(labels.get(AUTO_ALLOCATE, "")).lower() == "false"
    return not spec.get("addresses") and (spec.get("resolution") or "NONE") != "NONE" and not opted_out


def allocatable_hosts(obj: Object) -> list[str]:
    """The hosts that are to have allocated addresses; wildcards only where their names are resolved."""
    spec = obj.get("spec") or {}
    if not allocates(obj):
        return []
    dynamic = spec.get("resolution") == "DYNAMIC_DNS"
    return list(dict.fromkeys(h for h in spec.get("hosts") or [] if dynamic or not h.startswith("*")))


def workload_entry(obj: Object) -> WorkloadEntry:
    """The WorkloadEntry's facts; its labels are those of its metadata and of its spec together."""
    metadata, spec = obj["metadata"], obj.get("spec") or {}
    labels = {**(metadata.get("labels") or {}), **(spec.get("labels") or {})}
    annotations = metadata.get("annotations") or {}
    conditions = (obj.get("status") or {}).get("conditions") or []
    native = "http" in labels.get(TUNNEL, "").split(",")
    return WorkloadEntry(
        key=ObjectKey.of(obj),
        member=_member({**spec, "labels": labels}),
        name=labels.get("service.istio.io/workload-name") or metadata["name"],
        hbone=native or annotations.get(REDIRECTION) == "enabled",
        native_tunnel=native,
        healthy=not any(c.get("type") == "Healthy" and c.get("status") == "False" for c in conditions),
    )


def carries(labels: Labels | Mapping[str, str], selector: Labels) -> bool:
    """Whether labels satisfy a selector; an empty one selects nothing."""
    found = dict(labels)
    return bool(selector) and all(found.get(name) == value for name, value in selector)


def from_service_entry(
    mesh: Mesh, entry: ServiceEntry, host: str, distribution: str, canonical: bool
) -> wds.Service:
    """The Service message of one host; `distribution` is the namespace's, where the entry has none."""
    addresses = [
        wds.NetworkAddress(network=mesh.network, address=packed, length=length)
        for packed, length in entry.blocks
    ]
    addresses += [
        wds.NetworkAddress(network=mesh.network, address=packed)
        for name, packed in entry.allocated
        if name == host
    ]
    if entry.resolution == "NONE":
        balancing = wds.LoadBalancing(
            mode=wds.LoadBalancing.PASSTHROUGH, health_policy=wds.LoadBalancing.ALLOW_ALL
        )
    else:
        balancing = failover(entry.distribution or distribution) or wds.LoadBalancing()
    message = wds.Service(
        name=entry.key.name,
        namespace=entry.key.namespace,
        hostname=host,
        addresses=addresses,
        ports=[
            wds.Port(service_port=p.number, target_port=p.target or p.number, app_protocol=p.app_protocol)
            for p in entry.ports
        ],
        subject_alt_names=entry.alternative_names,
        canonical=canonical,
        visibility=wds.Service.NAMESPACE if entry.namespace_only else wds.Service.PUBLIC,
    )
    if balancing.ByteSize():
        message.load_balancing.CopyFrom(balancing)
    return message


def entry_uid(mesh: Mesh, key: ObjectKey, address: str) -> str:
    """The resource name of an endpoint of a ServiceEntry."""
    return f"{mesh.cluster_id}/networking.istio.io/ServiceEntry/{key}/{address}"


def workload_entry_uid(mesh: Mesh, key: ObjectKey) -> str:
    """The resource name of a WorkloadEntry."""
    return f"{mesh.cluster_id}/networking.istio.io/WorkloadEntry/{key}"


def from_member(
    mesh: Mesh,
    uid: str,
    key: ObjectKey,
    workload_name: str,
    member: Member,
    services: Mapping[str, PortPairs],
    policies: Iterable[str],
) -> wds.Workload:
    """The Workload message of something that Kubernetes does not run."""
    labels = dict(member.labels)
    message = wds.Workload(
        uid=uid,
        name=key.name,
        namespace=key.namespace,
        addresses=[member.address] if member.address else [],
        hostname=member.hostname,
        network=member.network or mesh.network,
        cluster_id=mesh.cluster_id,
        trust_domain=mesh.trust_domain,
        service_account=member.service_account,
        canonical_name=canonical_name(labels) or workload_name,
        canonical_revision=canonical_revision(labels),
        workload_type=wds.POD,
        workload_name=workload_name,
        services={
            name: wds.PortList(
                ports=[wds.Port(service_port=port, target_port=target) for port, target in pairs]
            )
            for name, pairs in services.items()
        },
        authorization_policies=policies,
    )
    if member.locality:
        region, zone, subzone = (*member.locality.split("/"), "", "")[:3]
        message.locality.CopyFrom(wds.Locality(region=region, zone=zone, subzone=subzone))
    if member.weight:
        message.capacity.value = member.weight
    return message


def ports_of_entry(entry: ServiceEntry, named: Mapping[str, int]) -> PortPairs:
    """A ServiceEntry's ports on a member: its own port of that name, else the target, else the same."""
    return tuple((p.number, named.get(p.name) or p.target or p.number) for p in entry.ports)


def ports_of_service(service: Service, member: Member) -> PortPairs:
    """A Service's ports on a member; one whose named target it does not have is left out."""
    named = dict(member.ports)
    pairs = []
    for port in service.ports:
        target = named.get(port.target_name, 0) if port.target_name else named.get(port.name) or port.target
        if target:
            pairs.append((port.port, target))
    return tuple(pairs)


def pod_ports(pod: Pod) -> dict[str, int]:
    """A pod's named ports."""
    return dict(pod.ports)


_PROTOCOLS = {"HTTP": wds.HTTP11, "HTTP2": wds.HTTP2, "GRPC": wds.GRPC, "TCP": wds.TCP, "TLS": wds.TLS,
              "HTTPS": wds.TLS}  # fmt: skip


def _port(port: Object) -> EntryPort:
    protocol = str(port.get("protocol") or "").upper()
    return EntryPort(
        port.get("name") or "",
        port["number"],
        port.get("targetPort") or 0,
        _PROTOCOLS.get(protocol, wds.UNKNOWN),
    )


def _block(text: str) -> tuple[bytes, int | None]:
    network = ipaddress.ip_network(text, strict=False)
    single = network.prefixlen == network.max_prefixlen
    return network.network_address.packed, None if single else network.prefixlen


def _allocated(obj: Object) -> Iterable[tuple[str, bytes]]:
    for entry in (obj.get("status") or {}).get("addresses") or []:
        packed = pack_address(entry.get("value"))
        if packed is not None and entry.get("host"):
            yield entry["host"], packed


def _member(endpoint: Object) -> Member:
    address = endpoint.get("address") or ""
    packed = pack_address(address) or b""
    return Member(
        address=packed,
        hostname="" if packed else address,
        ports=tuple(sorted((endpoint.get("ports") or {}).items())),
        labels=tuple(sorted((endpoint.get("labels") or {}).items())),
        network=endpoint.get("network") or "",
        locality=endpoint.get("locality") or "",
        weight=endpoint.get("weight") or 0,
        service_account=endpoint.get("serviceAccount") or "",
    )
