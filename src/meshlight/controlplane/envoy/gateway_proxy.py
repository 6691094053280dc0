"""What a gateway's Envoy at the edge does: its Gateway's listeners, and the routes attached to them. Pure.

HTTP listeners of one port share a connection manager and tell requests apart by host name; listeners with
TLS have a filter chain each, chosen by the name that the client asks for. The listener with the most specific
name takes a request, and only its routes: a route of `*.example.com`'s listener never sees a request for
`a.example.com` when that has a listener of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.config.listener.v3 import listener_components_pb2 as parts
from envoy.config.listener.v3 import listener_pb2
from envoy.extensions.filters.listener.tls_inspector.v3 import tls_inspector_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm

from meshlight.controlplane.envoy import (
    certificates,
    clusters,
    http,
    listeners,
    names,
    route_rules,
    routes,
    wire,
)
from meshlight.controlplane.envoy.backends import published
from meshlight.controlplane.envoy.certificates import Certificates
from meshlight.controlplane.envoy.gateway_api import Gateway, Listener, SecretReference, attach, covers
from meshlight.controlplane.envoy.route_index import RouteIndex
from meshlight.controlplane.envoy.routing import Problem, Route
from meshlight.controlplane.envoy.told import Told
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.resources import Published


@dataclass(slots=True)
class ListenerState:
    """A listener with what is attached to it: routes with the host names that both have."""

    listener: Listener
    routes: list[tuple[Route, tuple[str, ...]]] = field(default_factory=list)
    conflict: str = ""
    problem: Problem | None = None

    @property
    def serves(self) -> bool:
        """Whether it can be programmed."""
        return not self.conflict and self.problem is None and bool(self.listener.kinds)


def states(
    gateway: Gateway, known: RouteIndex, held: Certificates, labels: Callable[[str], Mapping[str, str]]
) -> list[ListenerState]:
    """Every listener of a gateway, in its order."""
    conflicts = gateway.conflicts()

    def permitted(reference: SecretReference) -> bool:
        own = reference.key.namespace == gateway.key.namespace
        source = ("gateway.networking.k8s.io", "Gateway", gateway.key.namespace)
        return own or known.permitted(source, ("", "Secret", reference.key))

    found = {
        listener.name: ListenerState(
            listener,
            conflict=conflicts.get(listener.name, ""),
            problem=certificates.problem(listener, held, permitted),
        )
        for listener in gateway.listeners
    }
    for route in known.attached(("Gateway", gateway.key)):
        for parent in route.parents:
            if (parent.kind, parent.key) != ("Gateway", gateway.key):
                continue
            attachments, _ = attach(route, parent, gateway, labels)
            for attachment in attachments:
                held_routes = found[attachment.listener.name].routes
                if all(other is not route for other, _ in held_routes):
                    held_routes.append((route, attachment.hostnames))
    return list(found.values())


@dataclass(slots=True)
class Edge:
    """A gateway compiled: its own resources, and the services that its routes refer to."""

    resources: list[Published] = field(default_factory=list)
    refers_to: set[ObjectKey] = field(default_factory=set)


def compile_gateway(
    serving: Iterable[ListenerState], known: RouteIndex, held: Certificates, filters: list[Any],
    rules: Mapping[str, Any], guards: list[Any], told: Told,
) -> Edge:  # fmt: skip
    """A gateway's listeners, routes and certificates."""
    result = Edge([published(wire.CLUSTER_TYPE, clusters.black_hole()), *told.clusters])
    by_port: dict[int, list[ListenerState]] = {}
    for state in serving:
        if state.serves:
            by_port.setdefault(state.listener.port, []).append(state)
            for route, _ in state.routes:
                result.refers_to.update(r.key for r in route.references() if r.kind == "Service")
            for reference in state.listener.certificates:
                if (certificate := held.get(reference.key)) and state.listener.terminates:
                    result.resources.append(certificates.secret(reference.key, certificate))
    for port, group in sorted(by_port.items()):
        chains: list[Any] = []
        plain = [state for state in group if state.listener.protocol == "HTTP"]
        if plain:
            name = f"http.{port}"
            result.resources.append(_routes(name, port, plain, known, rules))
            chains.append(_http_chain(name, filters, told))
        for state in group:
            if state.listener.protocol == "HTTPS":
                name = f"https.{port}.{state.listener.name}"
                result.resources.append(_routes(name, port, [state], known, rules))
                chains.append(_http_chain(name, filters, told, state.listener))
            elif state.listener.protocol in ("TLS", "TCP"):
                chains += _connection_chains(state, known, guards, told)
        if chains:
            result.resources.append(_listener(port, chains, tls=not plain))
    return result


def _listener(port: int, chains: list[Any], *, tls: bool) -> Published:
    message = listener_pb2.Listener(
        name=f"0.0.0.0_{port}",
        address=wire.socket_address("0.0.0.0", port),
        filter_chains=chains,
        traffic_direction=base_pb2.OUTBOUND,
    )
    if tls and any(
        chain.filter_chain_match.server_names or chain.HasField("transport_socket") for chain in chains
    ):
        inspector = tls_inspector_pb2.TlsInspector()
        message.listener_filters.add(
            name="envoy.filters.listener.tls_inspector", typed_config=wire.packed(inspector)
        )
    return published(wire.LISTENER_TYPE, message)


def _http_chain(name: str, filters: list[Any], told: Told, tls: Listener | None = None) -> Any:
    manager = http.manager(
        name,
        hcm.Rds(config_source=wire.ads(), route_config_name=name),
        filters,
        told.access_logs,
        told.tracing,
        edge=True,
    )
    chain = parts.FilterChain(
        name=name,
        filters=[
            listeners.source(),
            listeners.network_filter("envoy.filters.network.http_connection_manager", manager),
        ],
    )
    if tls is not None:
        _server_names(chain, [tls.hostname])
        chain.transport_socket.CopyFrom(certificates.transport_socket(tls))
    return chain


def _server_names(chain: Any, hostnames: Iterable[str]) -> None:
    chain.filter_chain_match.server_names.extend(name for name in hostnames if name not in ("", "*"))


def _routes(
    name: str, port: int, group: list[ListenerState], known: RouteIndex, rules: Mapping[str, Any]
) -> Published:
    """The routes of HTTP listeners that share a connection manager, by host name."""
    hosts: dict[str, list[route_rules.Placed]] = {}
    for state in group:
        # A listener without routes still takes its host name away from less specific ones.
        hosts.setdefault(state.listener.hostname or "*", [])
    for state in group:
        for route, hostnames in state.routes:
            placed = known.placed(route, port)
            for hostname in hostnames:
                if _owner(hostname, group) is state:
                    hosts.setdefault(hostname, []).extend(placed)
    made = [
        routes.host(hostname, [hostname], route_rules.in_order(placed))
        for hostname, placed in sorted(hosts.items())
    ]
    for host in made:
        for entry in host.routes:
            entry.decorator.operation = f"{host.name}:{port}/*"
    configuration = routes.configuration(name, made, rules)
    configuration.ignore_port_in_host_matching = True
    return published(wire.ROUTE_TYPE, configuration)


def _owner(hostname: str, group: Iterable[ListenerState]) -> ListenerState | None:
    """The listener that takes requests for a name: the most specific one."""
    covering = [state for state in group if covers(state.listener.hostname, hostname)]
    return max(covering, key=lambda state: _specificity(state.listener.hostname), default=None)


def _specificity(hostname: str) -> tuple[bool, int]:
    return hostname[:1] not in ("", "*"), len(hostname)


def _connection_chains(state: ListenerState, known: RouteIndex, guards: list[Any], told: Told) -> list[Any]:
    """Connections that are not HTTP here: TCP, TLS passed on, or TLS that ends here with TCP inside."""
    chains = []
    for route, hostnames in state.routes:
        resolve = known.clusters_for(route.key)
        for rule in route.rules[:1]:
            shares = [
                ((resolve(b.reference) if b.reference else None) or names.BLACK_HOLE, b.weight)
                for b in rule.backends
                if b.weight
            ]
            name = f"{state.listener.protocol.lower()}.{state.listener.port}.{route.key}"
            proxy = listeners.tcp_proxy(name, shares or [(names.BLACK_HOLE, 1)], told.connection_logs)
            chain = parts.FilterChain(name=name, filters=[listeners.source(), *guards, proxy])
            if state.listener.protocol == "TLS":
                _server_names(chain, hostnames)
            if state.listener.terminates:
                chain.transport_socket.CopyFrom(certificates.transport_socket(state.listener))
            chains.append(chain)
    # Chains that match the same would be refused: of TCP routes on one port the oldest wins.
    return list({c.filter_chain_match.SerializeToString(): c for c in reversed(chains)}.values())[::-1]
