"""Which waypoint stands before which service and workload.

Takes Gateways, Namespaces and the labels of Services and Pods, answers with the `GatewayAddress` to
announce and with what a change may have touched. Rules: Istio's `istio.io/use-waypoint` (on the
object, else on its namespace; `none` opts out), `istio.io/use-waypoint-namespace`,
`istio.io/waypoint-for` (on the Gateway), and the Gateway's `allowedRoutes` across namespaces. Pure.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.settings import Mesh
from meshlight.kube.resources import Object
from meshlight.proto import workload_pb2 as wds

WAYPOINT_CLASS = "istio-waypoint"
USE_WAYPOINT = "istio.io/use-waypoint"
USE_WAYPOINT_NAMESPACE = "istio.io/use-waypoint-namespace"
WAYPOINT_FOR = "istio.io/waypoint-for"
GATEWAY_NAME = "gateway.networking.k8s.io/gateway-name"
INBOUND_BINDING = "ambient.istio.io/waypoint-inbound-binding"
HBONE_PORT = 15008
APPLICATION_TUNNEL_PORT = 15088
"""Where a waypoint's Envoy takes connections with PROXY protocol from the node proxy."""

Member = TypeVar("Member", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Waypoint:
    """A Gateway of the waypoint class. `ready` once it has been given an address."""

    key: ObjectKey
    for_services: bool
    for_workloads: bool
    hbone_port: int
    tunnel_port: int
    ready: bool
    allowed: str
    selector: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Binding:
    """What an object asks for: a waypoint, or (None) explicitly none."""

    waypoint: ObjectKey | None


def binding(labels: Mapping[str, str], namespace: str) -> Binding | None:
    """The wish that an object's labels express; None when they say nothing."""
    name = labels.get(USE_WAYPOINT, "")
    if not name:
        return None
    if name == "none":
        return Binding(None)
    return Binding(ObjectKey(labels.get(USE_WAYPOINT_NAMESPACE) or namespace, name))


def parse(obj: Object) -> Waypoint | None:
    """The waypoint that a Gateway is; None for one of another class."""
    spec, metadata = obj.get("spec") or {}, obj["metadata"]
    if spec.get("gatewayClassName") != WAYPOINT_CLASS:
        return None
    listeners: list[Object] = spec.get("listeners") or []
    listener: Object = next((entry for entry in listeners if entry.get("protocol") == "HBONE"), {})
    traffic = (metadata.get("labels") or {}).get(WAYPOINT_FOR, "service")
    namespaces = (listener.get("allowedRoutes") or {}).get("namespaces") or {}
    chosen = (namespaces.get("selector") or {}) if namespaces.get("from") == "Selector" else {}
    protocol, _, port = (metadata.get("annotations") or {}).get(INBOUND_BINDING, "").partition("/")
    return Waypoint(
        key=ObjectKey.of(obj),
        for_services=traffic in ("service", "all"),
        for_workloads=traffic in ("workload", "all"),
        hbone_port=listener.get("port", HBONE_PORT),
        tunnel_port=int(port) if protocol == "PROXY" and port.isdigit() else APPLICATION_TUNNEL_PORT,
        ready=bool((obj.get("status") or {}).get("addresses")),
        allowed=namespaces.get("from", "Same"),
        selector=tuple(sorted((chosen.get("matchLabels") or {}).items())),
    )


class _Wishes(Generic[Member]):
    """Who wishes for which waypoint, both ways."""

    def __init__(self) -> None:
        self.of: dict[Member, Binding] = {}
        self.by: dict[ObjectKey, set[Member]] = {}

    def set(self, member: Member, wish: Binding | None) -> bool:
        old = self.of.get(member)
        if old == wish:
            return False
        if old is not None and old.waypoint is not None:
            self.by[old.waypoint].discard(member)
        self.of.pop(member, None)
        if wish is not None:
            self.of[member] = wish
            if wish.waypoint is not None:
                self.by.setdefault(wish.waypoint, set()).add(member)
        return True


@dataclass(slots=True)
class Touched:
    """What a change may have touched: whole namespaces, single services, single pods."""

    namespaces: set[str] = field(default_factory=set)
    services: set[ObjectKey] = field(default_factory=set)
    pods: set[ObjectKey] = field(default_factory=set)
    entries: set[ObjectKey] = field(default_factory=set)


class WaypointIndex:
    """Every waypoint of the mesh, and who is bound to it."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.waypoints: dict[ObjectKey, Waypoint] = {}
        self._namespace_labels: dict[str, Mapping[str, str]] = {}
        self._namespaces: _Wishes[str] = _Wishes()
        self._services: _Wishes[ObjectKey] = _Wishes()
        self._entries: _Wishes[ObjectKey] = _Wishes()
        self._pods: _Wishes[ObjectKey] = _Wishes()

    def set_gateway(self, key: ObjectKey, obj: Object | None) -> Touched:
        """Take a Gateway, or its deletion."""
        new = None if obj is None else parse(obj)
        if new == self.waypoints.get(key):
            return Touched()
        if new is None:
            del self.waypoints[key]
        else:
            self.waypoints[key] = new
        return Touched(
            # The waypoint's own pods and Service look different as well.
            {key.namespace, *self._namespaces.by.get(key, ())},
            set(self._services.by.get(key, ())),
            set(self._pods.by.get(key, ())),
            set(self._entries.by.get(key, ())),
        )

    def set_namespace(self, name: str, labels: Mapping[str, str] | None) -> bool:
        """Take a Namespace's labels; whether its services and pods may be bound differently."""
        if labels is None:
            self._namespace_labels.pop(name, None)
        else:
            self._namespace_labels[name] = labels
        selected = any(waypoint.selector for waypoint in self.waypoints.values())
        return self._namespaces.set(name, binding(labels or {}, name)) or selected

    def namespace_labels(self, name: str) -> Mapping[str, str]:
        """The labels of a namespace."""
        return self._namespace_labels.get(name, {})

    def set_service(self, key: ObjectKey, labels: Mapping[str, str] | None) -> bool:
        """Take a Service's labels; whether its binding may differ."""
        return self._services.set(key, binding(labels or {}, key.namespace))

    def set_entry(self, key: ObjectKey, labels: Mapping[str, str] | None) -> bool:
        """Take a ServiceEntry's labels; whether its binding may differ."""
        return self._entries.set(key, binding(labels or {}, key.namespace))

    def set_pod(self, key: ObjectKey, labels: Mapping[str, str] | None) -> bool:
        """Take a Pod's labels; whether its binding may differ."""
        return self._pods.set(key, binding(labels or {}, key.namespace))

    def of_service(self, key: ObjectKey) -> Waypoint | None:
        """The waypoint before a service, if there is one to announce."""
        found = self._resolve(self._services.of.get(key), key.namespace)
        own = found is not None and found.key == key
        return found if found is not None and found.for_services and not own else None

    def of_entry(self, key: ObjectKey) -> Waypoint | None:
        """The waypoint before the hosts of a ServiceEntry, if there is one to announce."""
        found = self._resolve(self._entries.of.get(key), key.namespace)
        return found if found is not None and found.for_services else None

    def of_pod(self, key: ObjectKey, labels: Mapping[str, str]) -> Waypoint | None:
        """The waypoint before a workload addressed directly, if there is one to announce."""
        if GATEWAY_NAME in labels:
            return None
        found = self._resolve(self._pods.of.get(key), key.namespace)
        return found if found is not None and found.for_workloads else None

    def instance_of(self, namespace: str, labels: Mapping[str, str]) -> Waypoint | None:
        """The waypoint that a pod is an instance of."""
        name = labels.get(GATEWAY_NAME)
        return self.waypoints.get(ObjectKey(namespace, name)) if name else None

    def address(self, waypoint: Waypoint) -> wds.GatewayAddress:
        """How the node proxies find a waypoint."""
        hostname = self._mesh.hostname(waypoint.key.name, waypoint.key.namespace)
        name = wds.NamespacedHostname(namespace=waypoint.key.namespace, hostname=hostname)
        return wds.GatewayAddress(hostname=name, hbone_mtls_port=waypoint.hbone_port)

    def served_by(self, key: ObjectKey) -> Waypoint | None:
        """The waypoint that must know a service: as `of_service`, even before it is ready."""
        found = self._resolve(self._services.of.get(key), key.namespace, ready=False)
        return found if found is not None and found.for_services and found.key != key else None

    def services_of(self, waypoint: ObjectKey, services: Iterable[ObjectKey]) -> set[ObjectKey]:
        """Those of `services` that stand behind a waypoint."""
        return {key for key in services if (found := self.served_by(key)) and found.key == waypoint}

    def wishing(self, waypoint: ObjectKey) -> Touched:
        """Who asks for a waypoint, whether or not it may have it."""
        return Touched(
            set(self._namespaces.by.get(waypoint, ())),
            set(self._services.by.get(waypoint, ())),
            set(self._pods.by.get(waypoint, ())),
        )

    def permitted(self, waypoint: Waypoint, namespace: str) -> bool:
        """Whether a waypoint takes the traffic of a namespace."""
        match waypoint.allowed:
            case "All":
                return True
            case "Selector":
                labels = self._namespace_labels.get(namespace, {})
                return all(labels.get(name) == value for name, value in waypoint.selector)
            case _:
                return namespace == waypoint.key.namespace

    def _resolve(self, own: Binding | None, namespace: str, *, ready: bool = True) -> Waypoint | None:
        wish = own if own is not None else self._namespaces.of.get(namespace)
        if wish is None or wish.waypoint is None:
            return None
        waypoint = self.waypoints.get(wish.waypoint)
        if waypoint is None or (ready and not waypoint.ready) or not self.permitted(waypoint, namespace):
            return None
        return waypoint
