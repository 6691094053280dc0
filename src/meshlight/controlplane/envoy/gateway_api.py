"""Gateways read, and which of their listeners a route attaches to. Pure.

Rules of attachment: the Gateway API's `sectionName`, `port`, `allowedRoutes` (namespaces and kinds) and
the intersection of hostnames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshlight.controlplane.envoy.http_route import GATEWAY_GROUP
from meshlight.controlplane.envoy.routing import ParentReference, Problem, Route
from meshlight.controlplane.facts import ObjectKey
from meshlight.kube.resources import Object

Labels = Callable[[str], Mapping[str, str]]
"""The labels of a namespace."""

_KINDS = {
    "HTTP": ("HTTPRoute", "GRPCRoute"),
    "HTTPS": ("HTTPRoute", "GRPCRoute"),
    "TLS": ("TLSRoute", "TCPRoute"),
    "TCP": ("TCPRoute",),
    "HBONE": (),
}


@dataclass(frozen=True, slots=True)
class SecretReference:
    """A certificate that a listener names."""

    key: ObjectKey
    group: str = ""
    kind: str = "Secret"


@dataclass(frozen=True, slots=True)
class Listener:
    """One listener of a Gateway. `kinds` are those it takes; `unknown_kinds` those it asks for in vain."""

    name: str
    port: int
    protocol: str
    hostname: str = ""
    passthrough: bool = False
    certificates: tuple[SecretReference, ...] = ()
    allowed: str = "Same"
    selector: tuple[tuple[str, str], ...] = ()
    expressions: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    kinds: tuple[str, ...] = ()
    unknown_kinds: bool = False

    @property
    def terminates(self) -> bool:
        """Whether TLS ends here."""
        return self.protocol in ("HTTPS", "TLS") and not self.passthrough


@dataclass(frozen=True, slots=True)
class Gateway:
    """A Gateway of one of our classes."""

    key: ObjectKey
    gateway_class: str
    listeners: tuple[Listener, ...]

    def conflicts(self) -> dict[str, str]:
        """Reasons, by name, of the listeners that cannot stand beside another on the same port."""
        found: dict[str, str] = {}
        for listener in self.listeners:
            for other in self.listeners:
                if other.name == listener.name or other.port != listener.port:
                    continue
                layers = {_layer(listener), _layer(other)}
                if len(layers) > 1:
                    found[listener.name] = "ProtocolConflict"
                elif listener.hostname == other.hostname and listener.protocol == other.protocol:
                    found[listener.name] = "HostnameConflict"
        return found


def _layer(listener: Listener) -> str:
    return "TLS" if listener.protocol in ("HTTPS", "TLS") else listener.protocol


def parse(obj: Object) -> Gateway:
    """A Gateway."""
    spec = obj.get("spec") or {}
    namespace = obj["metadata"].get("namespace", "")
    listeners = tuple(_listener(entry, namespace) for entry in spec.get("listeners") or [])
    return Gateway(ObjectKey.of(obj), spec.get("gatewayClassName", ""), listeners)


def _listener(entry: Object, namespace: str) -> Listener:
    allowed = entry.get("allowedRoutes") or {}
    namespaces = allowed.get("namespaces") or {}
    selector = namespaces.get("selector") or {}
    tls = entry.get("tls") or {}
    protocol = entry.get("protocol", "HTTP")
    possible = _KINDS.get(protocol, ())
    asked = [(kind.get("group", GATEWAY_GROUP), kind["kind"]) for kind in allowed.get("kinds") or []]
    kinds = tuple(k for g, k in asked if g == GATEWAY_GROUP and k in possible) if asked else possible
    return Listener(
        name=entry["name"],
        port=entry.get("port", 0),
        protocol=protocol,
        hostname=(entry.get("hostname") or "").lower(),
        passthrough=tls.get("mode") == "Passthrough",
        certificates=tuple(
            SecretReference(
                ObjectKey(ref.get("namespace") or namespace, ref["name"]),
                ref.get("group") or "",
                ref.get("kind") or "Secret",
            )
            for ref in tls.get("certificateRefs") or []
        ),
        allowed=namespaces.get("from", "Same"),
        selector=tuple(sorted((selector.get("matchLabels") or {}).items())),
        expressions=tuple(
            (e["key"], e["operator"], tuple(e.get("values") or ()))
            for e in selector.get("matchExpressions") or []
        ),
        kinds=kinds,
        unknown_kinds=len(kinds) < len(asked),
    )


@dataclass(frozen=True, slots=True)
class Attachment:
    """A route at a listener, for those host names that both have; `*` is every name."""

    listener: Listener
    hostnames: tuple[str, ...]


def attach(
    route: Route, parent: ParentReference, gateway: Gateway, labels: Labels
) -> tuple[list[Attachment], Problem | None]:
    """Where a route attaches, or why nowhere. Of several reasons the last hurdle taken is told."""
    listeners = [
        listener
        for listener in gateway.listeners
        if parent.section in ("", listener.name) and parent.port in (0, listener.port)
    ]
    if not listeners:
        return [], Problem("NoMatchingParent", "no listener of the Gateway has that name and port")
    allowed = [
        listener
        for listener in listeners
        if route.key.kind in listener.kinds
        and admits(listener, gateway.key.namespace, route.key.namespace, labels)
    ]
    if not allowed:
        return [], Problem("NotAllowedByListeners", "no listener of the Gateway allows this route")
    attachments = [
        Attachment(listener, hostnames)
        for listener in allowed
        if (hostnames := intersection(listener.hostname, route.hostnames))
    ]
    if not attachments:
        return [], Problem("NoMatchingListenerHostname", "no host name of the route is one of a listener's")
    return attachments, None


def admits(listener: Listener, own: str, namespace: str, labels: Labels) -> bool:
    """Whether a listener takes routes of a namespace."""
    match listener.allowed:
        case "All":
            return True
        case "Selector":
            return _selects(listener, labels(namespace))
        case "None":
            return False
        case _:
            return own == namespace


def _selects(listener: Listener, labels: Mapping[str, str]) -> bool:
    if any(labels.get(name) != value for name, value in listener.selector):
        return False
    for name, operator, values in listener.expressions:
        held = {
            "In": labels.get(name) in values,
            "NotIn": labels.get(name) not in values,
            "Exists": name in labels,
            "DoesNotExist": name not in labels,
        }
        if not held.get(operator, False):
            return False
    return True


def intersection(listener: str, hostnames: tuple[str, ...]) -> tuple[str, ...]:
    """The names that a listener's name and a route's names have in common; `*` stands for every name."""
    if not hostnames:
        return (listener or "*",)
    if not listener:
        return hostnames
    return tuple(dict.fromkeys(common for name in hostnames if (common := _common(listener, name))))


def _common(a: str, b: str) -> str:
    if a == b or covers(a, b):
        return b
    return a if covers(b, a) else ""


def covers(wildcard: str, name: str) -> bool:
    """Whether `*.example.com` stands for a name (one that is a wildcard itself included)."""
    if wildcard in ("*", ""):
        return True
    if not wildcard.startswith("*."):
        return wildcard == name
    return name.removeprefix("*").endswith(wildcard[1:]) and name != wildcard[2:]
