"""What can be wrong with Services, ServiceEntries, VirtualServices and DestinationRules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from meshlight.controlplane.facts import ObjectKey
from meshlight.kube.resources import Object
from meshlight.operations.analysis import messages as m
from meshlight.operations.analysis.messages import Message
from meshlight.operations.mesh_snapshot import Snapshot

_PREFIXES = (
    "http",
    "http2",
    "https",
    "grpc",
    "grpc-web",
    "tcp",
    "tls",
    "mongo",
    "mysql",
    "redis",
    "udp",
    "hbone",
)
_SYSTEM = ("kube-system", "kube-public", "kube-node-lease")


def port_names(snapshot: Snapshot) -> Iterator[Message]:
    """Ports whose protocol is left to guessing."""
    for key, obj in snapshot.objects.get("Service", {}).items():
        if key.namespace in _SYSTEM or (obj.get("spec") or {}).get("type") == "ExternalName":
            continue
        for port in (obj.get("spec") or {}).get("ports") or []:
            name = port.get("name") or ""
            if port.get("appProtocol") or port.get("protocol", "TCP") != "TCP":
                continue
            if not any(name == prefix or name.startswith(f"{prefix}-") for prefix in _PREFIXES):
                target = port.get("targetPort", port.get("port"))
                text = f"port name {name!r} (port: {port.get('port')}, targetPort: {target}) names no protocol"
                yield Message.about(m.PORT_NAME, obj, text)


def shared_ports(snapshot: Snapshot) -> Iterator[Message]:
    """Deployments whose port several Services give different protocols."""
    for key, deployment in snapshot.objects.get("Deployment", {}).items():
        template = ((deployment.get("spec") or {}).get("template") or {}).get("metadata") or {}
        labels = template.get("labels") or {}
        protocols: dict[Any, set[str]] = {}
        for other, service in snapshot.objects.get("Service", {}).items():
            spec = service.get("spec") or {}
            selector = spec.get("selector") or {}
            if other.namespace != key.namespace or not selector:
                continue
            if all(labels.get(n) == v for n, v in selector.items()):
                for port in spec.get("ports") or []:
                    said = port.get("appProtocol") or str(port.get("name") or "").partition("-")[0]
                    protocols.setdefault(port.get("targetPort", port.get("port")), set()).add(said)
        for target, said_of in protocols.items():
            if len(said_of) > 1:
                listed = ", ".join(sorted(said_of))
                text = f"several Services select it and give port {target} different protocols: {listed}"
                yield Message.about(m.CONFLICTING_PROTOCOLS, deployment, text)


def service_entries(snapshot: Snapshot) -> Iterator[Message]:
    """ServiceEntries that disagree about a port of one host."""
    said: dict[tuple[str, int], dict[str, list[Object]]] = {}
    for obj in snapshot.objects.get("ServiceEntry", {}).values():
        spec = obj.get("spec") or {}
        for host in spec.get("hosts") or []:
            for port in spec.get("ports") or []:
                protocol = str(port.get("protocol") or "TCP").upper()
                said.setdefault((host, port.get("number", 0)), {}).setdefault(protocol, []).append(obj)
    for (host, port), by in sorted(said.items()):
        if len(by) > 1:
            for obj in (obj for objects in by.values() for obj in objects):
                listed = ", ".join(sorted(by))
                text = f"several ServiceEntries give {host}:{port} different protocols: {listed}"
                yield Message.about(m.CONFLICTING_ENTRIES, obj, text)


def virtual_services(snapshot: Snapshot) -> Iterator[Message]:
    """VirtualServices that lead to what there is not, or that claim one host of the mesh."""
    claimed: dict[tuple[str, str], list[Object]] = {}
    for key, obj in snapshot.objects.get("VirtualService", {}).items():
        spec = obj.get("spec") or {}
        gateways = spec.get("gateways") or ["mesh"]
        for gateway in gateways:
            space, slash, name = gateway.partition("/")
            at = ObjectKey(space if slash else key.namespace, name if slash else space)
            if gateway != "mesh" and snapshot.get("IstioGateway", at.namespace, at.name) is None:
                yield Message.about(m.REFERENCE_NOT_FOUND, obj, f'referenced gateway not found: "{gateway}"')
        if "mesh" in gateways:
            for host in spec.get("hosts") or []:
                claimed.setdefault((key.namespace, _qualified(snapshot, host, key.namespace)), []).append(obj)
        for path, destination in _destinations(spec):
            yield from _destination(snapshot, key, obj, path, destination)
    for (_, host), objects in claimed.items():
        if len(objects) > 1:
            names = ", ".join(sorted(o["metadata"]["name"] for o in objects))
            for obj in objects:
                yield Message.about(
                    m.CONFLICTING_HOSTS, obj, f"{names} define the same host {host}: merge them"
                )


def _destinations(spec: Object) -> Iterator[tuple[str, Object]]:
    for protocol in ("http", "tls", "tcp"):
        for index, rule in enumerate(spec.get(protocol) or []):
            for number, route in enumerate((rule or {}).get("route") or []):
                at = f"spec.{protocol}[{index}].route[{number}].destination"
                yield at, (route or {}).get("destination") or {}


def _destination(
    snapshot: Snapshot, key: ObjectKey, obj: Object, path: str, destination: Object
) -> Iterator[Message]:
    host = _qualified(snapshot, str(destination.get("host") or ""), key.namespace)
    services = [s for s in snapshot.services() if _covers(s.hostname, host)]
    if not services:
        yield Message.about(
            m.REFERENCE_NOT_FOUND, obj, f'referenced host not found: "{destination.get("host")}" ({path})'
        )
        return
    if len(services[0].ports) > 1 and not (destination.get("port") or {}).get("number"):
        ports = [p.service_port for p in services[0].ports]
        yield Message.about(m.PORT_REQUIRED, obj, f"{host} has the ports {ports}: name one ({path}.port)")
    subset = destination.get("subset")
    if subset and not any(
        subset == s.get("name") for _, rule in _rules(snapshot, host) for s in _subsets(rule)
    ):
        named = f"{host}+{subset}"
        yield Message.about(
            m.REFERENCE_NOT_FOUND, obj, f'referenced host+subset in DestinationRule not found: "{named}"'
        )


def destination_rules(snapshot: Snapshot) -> Iterator[Message]:
    """DestinationRules for unknown hosts, and subsets that select no pods."""
    for key, obj in snapshot.objects.get("DestinationRule", {}).items():
        host = _qualified(snapshot, str((obj.get("spec") or {}).get("host") or ""), key.namespace)
        if not any(_covers(s.hostname, host) or _covers(host, s.hostname) for s in snapshot.services()):
            yield Message.about(m.UNKNOWN_HOST, obj, f"host {host} is no service of the mesh")
            continue
        members = _members(snapshot, host)
        for subset in _subsets(obj):
            labels = subset.get("labels") or {}
            if members and labels and not any(all(p.get(n) == v for n, v in labels.items()) for p in members):
                yield Message.about(
                    m.SUBSET_EMPTY, obj, f"subset {subset.get('name')} selects no pod of {host}"
                )


def _members(snapshot: Snapshot, host: str) -> list[dict[str, str]]:
    """Labels of the pods that a host's Service selects."""
    for key, service in snapshot.objects.get("Service", {}).items():
        selector = (service.get("spec") or {}).get("selector") or {}
        if selector and snapshot.mesh.hostname(key.name, key.namespace) == host:
            pods = [o for k, o in snapshot.objects.get("Pod", {}).items() if k.namespace == key.namespace]
            labels = [o["metadata"].get("labels") or {} for o in pods]
            return [own for own in labels if all(own.get(n) == v for n, v in selector.items())]
    return []


def _rules(snapshot: Snapshot, host: str) -> Iterator[tuple[ObjectKey, Object]]:
    for key, obj in snapshot.objects.get("DestinationRule", {}).items():
        if _qualified(snapshot, str((obj.get("spec") or {}).get("host") or ""), key.namespace) == host:
            yield key, obj


def _subsets(rule: Object) -> list[Object]:
    return (rule.get("spec") or {}).get("subsets") or []


def _qualified(snapshot: Snapshot, host: str, namespace: str) -> str:
    """A host as the mesh knows it: a short name is a Service of the object's namespace."""
    return host if "." in host or host == "*" else snapshot.mesh.hostname(host, namespace)


def _covers(pattern: str, host: str) -> bool:
    return pattern == host or (pattern.startswith("*") and host.endswith(pattern[1:]))


ANALYZERS = (port_names, shared_ports, service_entries, virtual_services, destination_rules)
