"""Kubernetes objects parsed into exactly what the index needs of them.

Facts are frozen and comparable: an object change that leaves its facts equal (a heartbeat, a
managed-fields update) is seen as no change here, and costs nothing further on.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from meshlight.kube.resources import Object
from meshlight.proto import workload_pb2 as wds

REDIRECTION = "ambient.istio.io/redirection"
TUNNEL = "networking.istio.io/tunnel"
TRAFFIC_DISTRIBUTION = "networking.istio.io/traffic-distribution"
SERVICE_NAME = "kubernetes.io/service-name"


@dataclass(frozen=True, slots=True, order=True)
class ObjectKey:
    """A namespaced object's name; `namespace` is empty for cluster-wide objects."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @classmethod
    def of(cls, obj: Object) -> ObjectKey:
        """The key of an object."""
        metadata = obj["metadata"]
        return cls(metadata.get("namespace", ""), metadata["name"])


@dataclass(frozen=True, slots=True)
class Controller:
    """The workload a pod belongs to, `kind` as the node proxy's metrics know it."""

    kind: wds.WorkloadType
    name: str


@dataclass(frozen=True, slots=True)
class Pod:
    """A running pod that has an address."""

    key: ObjectKey
    addresses: tuple[bytes, ...]
    labels: tuple[tuple[str, str], ...]
    service_account: str
    node: str
    controller: Controller
    canonical_name: str
    canonical_revision: str
    hbone: bool
    native_tunnel: bool
    healthy: bool
    host_network: bool
    ports: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Node:
    """Where a node stands, from its topology labels."""

    region: str
    zone: str
    subzone: str


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A TCP port of a Service; `name` joins it to EndpointSlice ports, `target_name` to ports of pods."""

    name: str
    port: int
    target: int
    target_name: str
    app_protocol: wds.AppProtocol


@dataclass(frozen=True, slots=True)
class Service:
    """A Service that has endpoints (ExternalName has none and is left out)."""

    key: ObjectKey
    addresses: tuple[bytes, ...]
    ports: tuple[ServicePort, ...]
    ip_families: wds.IPFamilies
    local_only: bool
    distribution: str
    publish_not_ready: bool
    selector: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One member of an EndpointSlice; `pod` is None for addresses that belong to no pod."""

    address: str
    pod: ObjectKey | None
    ready: bool


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """Part of the members of a Service: its TCP ports by name, and its endpoints."""

    key: ObjectKey
    service: ObjectKey
    ports: tuple[tuple[str, int], ...]
    endpoints: tuple[Endpoint, ...]


def pod(obj: Object) -> Pod | None:
    """The pod's facts; None when it has ended or has no address yet."""
    status, spec, metadata = obj.get("status") or {}, obj.get("spec") or {}, obj["metadata"]
    if status.get("phase") in ("Succeeded", "Failed"):
        return None
    texts = [entry.get("ip") for entry in status.get("podIPs") or []] or [status.get("podIP")]
    addresses = tuple(packed for text in texts if (packed := pack_address(text)) is not None)
    if not addresses:
        return None
    labels: dict[str, str] = metadata.get("labels") or {}
    annotations: dict[str, str] = metadata.get("annotations") or {}
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions") or [])
    controller = _controller(metadata, labels)
    native = "http" in labels.get(TUNNEL, "").split(",")
    return Pod(
        key=ObjectKey.of(obj),
        addresses=addresses,
        labels=tuple(sorted(labels.items())),
        service_account=spec.get("serviceAccountName") or "default",
        node=spec.get("nodeName") or "",
        controller=controller,
        canonical_name=canonical_name(labels) or controller.name,
        canonical_revision=canonical_revision(labels),
        hbone=native or annotations.get(REDIRECTION) == "enabled",
        native_tunnel=native,
        healthy=ready and "deletionTimestamp" not in metadata,
        host_network=bool(spec.get("hostNetwork")),
        ports=tuple(
            (port["name"], port["containerPort"])
            for container in spec.get("containers") or []
            for port in container.get("ports") or []
            if port.get("name") and port.get("protocol", "TCP") == "TCP"
        ),
    )


_CANONICAL_NAME = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
_CANONICAL_REVISION = ("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
_CRON_JOB = re.compile(r"(.+)-\d{8,10}")


def canonical_name(labels: Mapping[str, str]) -> str:
    """The canonical service that labels name; empty where they name none."""
    return _first(labels, _CANONICAL_NAME)


def canonical_revision(labels: Mapping[str, str]) -> str:
    """The canonical revision that labels name."""
    return _first(labels, _CANONICAL_REVISION) or "latest"


def _first(labels: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((labels[name] for name in names if labels.get(name)), "")


def _controller(metadata: Object, labels: dict[str, str]) -> Controller:
    """What made the pod, found from its name as Istio does: the owner itself is not read.

    A kind the protocol has no word for (DaemonSet, StatefulSet) is announced as a pod type under
    the controller's name.
    """
    name: str = labels.get("service.istio.io/workload-name", "")
    owner = next((ref for ref in metadata.get("ownerReferences") or [] if ref.get("controller")), None)
    if owner is None:
        return Controller(wds.POD, name or metadata["name"])
    owner_name: str = owner["name"]
    template_hash = labels.get("pod-template-hash") or labels.get("rollouts-pod-template-hash")
    if owner["kind"] == "ReplicaSet" and template_hash and owner_name.endswith(f"-{template_hash}"):
        return Controller(wds.DEPLOYMENT, name or owner_name.removesuffix(f"-{template_hash}"))
    if owner["kind"] == "Job":
        if match := _CRON_JOB.fullmatch(owner_name):
            return Controller(wds.CRONJOB, name or match[1])
        return Controller(wds.JOB, name or owner_name)
    return Controller(wds.POD, name or owner_name)


def node(obj: Object) -> Node:
    """The node's locality."""
    labels = obj["metadata"].get("labels") or {}
    return Node(
        region=labels.get("topology.kubernetes.io/region", ""),
        zone=labels.get("topology.kubernetes.io/zone", ""),
        subzone=labels.get("topology.istio.io/subzone", ""),
    )


def namespace(obj: Object) -> str:
    """The namespace's default traffic distribution, lower case; empty for none."""
    annotations = obj["metadata"].get("annotations") or {}
    return str(annotations.get(TRAFFIC_DISTRIBUTION, "")).lower()


def service(obj: Object) -> Service | None:
    """The Service's facts; None for ExternalName, which is only a DNS alias."""
    spec, metadata = obj.get("spec") or {}, obj["metadata"]
    if spec.get("type") == "ExternalName":
        return None
    texts = spec.get("clusterIPs") or [spec.get("clusterIP")]
    families = spec.get("ipFamilies") or []
    annotations = metadata.get("annotations") or {}
    distribution = spec.get("trafficDistribution") or annotations.get(TRAFFIC_DISTRIBUTION) or ""
    return Service(
        key=ObjectKey.of(obj),
        addresses=tuple(packed for text in texts if (packed := pack_address(text)) is not None),
        ports=tuple(_service_port(p) for p in spec.get("ports") or [] if p.get("protocol", "TCP") == "TCP"),
        ip_families=_ip_families(families),
        local_only=spec.get("internalTrafficPolicy") == "Local",
        distribution=distribution.lower(),
        publish_not_ready=bool(spec.get("publishNotReadyAddresses")),
        selector=tuple(sorted((spec.get("selector") or {}).items())),
    )


def _service_port(port: Object) -> ServicePort:
    target = port.get("targetPort", port["port"])
    return ServicePort(
        name=port.get("name") or "",
        port=port["port"],
        target=target if isinstance(target, int) else 0,
        target_name=target if isinstance(target, str) else "",
        app_protocol=_app_protocol(port.get("appProtocol"), port.get("name") or ""),
    )


_PROTOCOLS = {
    "http": wds.HTTP11, "http2": wds.HTTP2, "kubernetes.io/h2c": wds.HTTP2, "grpc": wds.GRPC,
    "kubernetes.io/ws": wds.HTTP11, "https": wds.TLS, "kubernetes.io/wss": wds.TLS, "tls": wds.TLS,
    "tcp": wds.TCP,
}  # fmt: skip


def _app_protocol(declared: str | None, name: str) -> wds.AppProtocol:
    """`appProtocol`, or Istio's convention of port names: `PROTOCOL` or `PROTOCOL-suffix`."""
    if declared is not None:
        return _PROTOCOLS.get(declared.lower(), wds.UNKNOWN)
    if name.lower().startswith("grpc-web"):
        return wds.UNKNOWN
    return _PROTOCOLS.get(name.lower().partition("-")[0], wds.UNKNOWN)


def _ip_families(families: list[str]) -> wds.IPFamilies:
    if len(families) == 2:
        return wds.DUAL
    return {"IPv4": wds.IPV4_ONLY, "IPv6": wds.IPV6_ONLY}.get("".join(families), wds.AUTOMATIC)


def endpoint_slice(obj: Object) -> EndpointSlice | None:
    """The slice's facts; None when it belongs to no Service or holds names instead of addresses."""
    metadata = obj["metadata"]
    service_name = (metadata.get("labels") or {}).get(SERVICE_NAME)
    if not service_name or obj.get("addressType") == "FQDN":
        return None
    space = metadata.get("namespace", "")
    return EndpointSlice(
        key=ObjectKey.of(obj),
        service=ObjectKey(space, service_name),
        ports=tuple(
            (port.get("name") or "", port["port"])
            for port in obj.get("ports") or []
            if port.get("port") and port.get("protocol", "TCP") == "TCP"
        ),
        endpoints=tuple(_endpoint(e, space) for e in obj.get("endpoints") or [] if e.get("addresses")),
    )


def _endpoint(endpoint: Object, space: str) -> Endpoint:
    target = endpoint.get("targetRef") or {}
    is_pod = target.get("kind") == "Pod" and target.get("name")
    return Endpoint(
        address=endpoint["addresses"][0],
        pod=ObjectKey(target.get("namespace") or space, target["name"]) if is_pod else None,
        ready=(endpoint.get("conditions") or {}).get("ready") is not False,
    )


def pack_address(text: str | None) -> bytes | None:
    """An address in network byte order; None for absent, `None` (headless) and unreadable ones."""
    if not text or text == "None":
        return None
    try:
        return ipaddress.ip_address(text).packed
    except ValueError:
        return None


def address_text(packed: bytes) -> str:
    """The usual notation of an address in network byte order."""
    return str(ipaddress.ip_address(packed))
