"""What a waypoint's Envoy does: the frontends of its services, and the listener that they share. Pure."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from meshlight.controlplane.envoy import (
    clusters,
    destination_rule,
    http,
    listeners,
    names,
    route_rules,
    routes,
    virtual_service,
    wire,
)
from meshlight.controlplane.envoy.backends import published
from meshlight.controlplane.envoy.endpoints import METADATA
from meshlight.controlplane.envoy.listeners import HTTP_CHAIN, Destination
from meshlight.controlplane.envoy.policy_view import PolicyView, group_of
from meshlight.controlplane.envoy.route_index import RouteIndex
from meshlight.controlplane.envoy.routing import BackendReference, Route
from meshlight.controlplane.envoy.told import Told
from meshlight.controlplane.envoy.traffic_index import TrafficIndex
from meshlight.controlplane.envoy.virtual_service import VirtualService
from meshlight.controlplane.facts import ObjectKey, ServicePort, address_text
from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import Published, publish
from meshlight.controlplane.waypoints import Waypoint
from meshlight.proto import workload_pb2 as wds

HTTP_KINDS = ("HTTPRoute", "GRPCRoute")


@dataclass(slots=True)
class Frontend:
    """A service at its waypoint: routes of its addresses, and which filter chain takes each.

    `tcp` holds network filters by chain; `refers_to` the services that its routes send requests to.
    """

    scopes: list[Published] = field(default_factory=list)
    destinations: list[Destination] = field(default_factory=list)
    tcp: dict[str, list[Any]] = field(default_factory=dict)
    refers_to: set[ObjectKey] = field(default_factory=set)

    def differs_in_routes_alone(self, other: Frontend) -> bool:
        """Whether a proxy that has `other` needs nothing but the routes."""
        return (
            self.destinations == other.destinations
            and self.refers_to == other.refers_to
            and self.tcp == other.tcp
            and {scope.name for scope in self.scopes} == {scope.name for scope in other.scopes}
        )


def compile_frontend(
    index: Index, known: RouteIndex, traffic: TrafficIndex, policies: PolicyView, key: ObjectKey
) -> Frontend:
    """The frontend of a service that exists. Routes of the Gateway API go before a VirtualService."""
    service = index.service(key)
    assert service is not None, "only services that exist are compiled"
    hostname = index.mesh.hostname(key.name, key.namespace)
    addresses = [address_text(address) for address in service.addresses]
    targets = policies.targets_of_service(key)
    rules, guards = policies.route_rules(group_of(key), targets), policies.guards(targets)
    result = Frontend()
    routing = traffic.routing(hostname, key.namespace)
    if routing is not None:
        result.refers_to.update(key for key in _services(routing) if index.service(key) is not None)
    for port in service.ports:
        cluster = names.cluster(hostname, port.port)
        http_routes = known.of_service(key, port.port, HTTP_KINDS)
        chain, other = _chains(port, cluster, has_http_routes=bool(http_routes))
        if chain != HTTP_CHAIN or other:
            tcp_routes = known.of_service(key, port.port, ("TCPRoute",))
            connections = _tcp(known, cluster, tcp_routes)
            if routing is not None and not tcp_routes:
                connections = _connections(index, routing, port.port, cluster)
            result.tcp[cluster] = [*guards, connections]
            _refer(result, tcp_routes)
        result.destinations += [Destination(a, port.port, chain, other) for a in addresses]
        if chain == HTTP_CHAIN:
            _refer(result, http_routes)
            made = _http(known, http_routes, cluster)
            if routing is not None and routing.http and not http_routes:
                made = virtual_service.compile_routes(
                    routing, virtual_service.MESH, port.port, _ports(index), _resolver(index)
                )
            for entry in made:
                _hash(index, traffic, entry)
                entry.decorator.operation = f"{hostname}:{port.port}/*"  # the spans' name, as Istio has it
                entry.metadata.filter_metadata[METADATA].update(clusters.described(hostname, key))
            host = routes.host(hostname, ["*"], made)
            configuration = routes.configuration(cluster, [host], rules)
            scopes = routes.scope([(a, port.port) for a in addresses], configuration)
            result.scopes += [published(wire.SCOPED_ROUTE_TYPE, scope) for scope in scopes]
    return result


def own(
    waypoint: Waypoint, frontends: Iterable[Frontend], policy_filters: Iterable[Any], told: Told
) -> list[Published]:
    """What belongs to the waypoint itself: its listener, and clusters that are no service's."""
    destinations: list[Destination] = []
    tcp: dict[str, list[Any]] = {}
    for frontend in frontends:
        destinations += frontend.destinations
        for chain, filters in frontend.tcp.items():
            tcp[chain] = listeners.with_access_logs(filters, told.connection_logs)
    rest = None
    if waypoint.for_workloads:
        rest = Destination("", 0, HTTP_CHAIN, other=names.ORIGINAL_DESTINATION)
        tcp[names.ORIGINAL_DESTINATION] = [
            listeners.tcp_proxy(names.ORIGINAL_DESTINATION, [(names.ORIGINAL_DESTINATION, 1)])
        ]
    manager = http.manager(
        "main",
        listeners.scoped_routes(),
        [*policy_filters, *http.filters()],
        told.access_logs,
        told.tracing,
        edge=False,
        early=listeners.destination_header(),
    )
    listener = listeners.waypoint(waypoint.tunnel_port, manager, destinations, tcp, rest=rest)
    return [
        publish(wire.LISTENER_TYPE, listener.name, listener),
        published(wire.CLUSTER_TYPE, clusters.original_destination()),
        published(wire.CLUSTER_TYPE, clusters.black_hole()),
        *told.clusters,
    ]


def _chains(port: ServicePort, cluster: str, *, has_http_routes: bool) -> tuple[str, str | None]:
    if port.app_protocol in (wds.TCP, wds.TLS):
        return cluster, None
    if port.app_protocol == wds.UNKNOWN and not has_http_routes:
        return HTTP_CHAIN, cluster
    return HTTP_CHAIN, None


def _http(known: RouteIndex, attached: list[Route], cluster: str) -> list[Any]:
    """A service's routes. One that has any answers 404 to what they do not match."""
    if not attached:
        return [routes.default(cluster)]
    placed = [one for route in attached for one in known.placed(route)]
    return [copy.deepcopy(one) for one in route_rules.in_order(placed)]


def _tcp(known: RouteIndex, cluster: str, attached: list[Route]) -> Any:
    """Connections to the shares of the oldest route's first rule, or to the service itself."""
    for route in attached:
        for rule in route.rules:
            resolve = known.clusters_for(route.key)
            shares = [
                ((resolve(b.reference) if b.reference else None) or names.BLACK_HOLE, b.weight)
                for b in rule.backends
                if b.weight
            ]
            return listeners.tcp_proxy(cluster, shares or [(names.BLACK_HOLE, 1)])
    return listeners.tcp_proxy(cluster, [(cluster, 1)])


def _refer(frontend: Frontend, attached: list[Route]) -> None:
    for route in attached:
        frontend.refers_to.update(r.key for r in route.references() if r.kind == "Service")


# Istio's own routing.


def _connections(index: Index, routing: VirtualService, port: int, cluster: str) -> Any:
    backends = routing.connection(virtual_service.MESH, port, None, _ports(index))
    resolve = _resolver(index)
    shares = [
        (resolve(backend.reference) or names.BLACK_HOLE, backend.weight)
        for backend in backends or ()
        if backend.reference and backend.weight
    ]
    return listeners.tcp_proxy(cluster, shares or [(cluster, 1)])


def _resolver(index: Index) -> route_rules.Clusters:
    """A VirtualService may name what is not there: such requests are answered 503, as in Istio."""

    def cluster(reference: BackendReference) -> str:
        host = reference.key.name
        if reference.kind == "Service":
            host = index.mesh.hostname(reference.key.name, reference.key.namespace)
        return names.cluster(host, reference.port, reference.subset)

    return cluster


def _ports(index: Index) -> virtual_service.Ports:
    def ports(reference: BackendReference) -> list[int]:
        service = index.service(reference.key) if reference.kind == "Service" else None
        return [port.port for port in service.ports] if service else []

    return ports


def _services(routing: VirtualService) -> Iterable[ObjectKey]:
    for rule in routing.http:
        for backend in rule.rule.backends:
            if backend.reference and backend.reference.kind == "Service":
                yield backend.reference.key
        for mirror in rule.rule.mirrors:
            if mirror.reference.kind == "Service":
                yield mirror.reference.key
    for connections in (*routing.tcp, *routing.tls):
        for backend in connections.backends:
            if backend.reference and backend.reference.kind == "Service":
                yield backend.reference.key


def _hash(index: Index, traffic: TrafficIndex, entry: Any) -> None:
    """Have a route hash requests as the DestinationRules of where it goes ask."""
    if not entry.HasField("route"):
        return
    action = entry.route
    for cluster in [action.cluster] if action.cluster else [c.name for c in action.weighted_clusters.clusters]:
        _, port, subset, host = cluster.split("|") if cluster.count("|") == 3 else ("", "0", "", "")
        name, _, rest = host.partition(".")
        namespace = rest.partition(".")[0]
        rule = traffic.rule(host, namespace, index.mesh.root_namespace) if name else None
        if rule is not None:
            action.hash_policy.extend(destination_rule.hash_policies(rule.settings(int(port), subset)))
