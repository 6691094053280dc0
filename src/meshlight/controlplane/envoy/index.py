"""What every waypoint and gateway is told, kept current at a cost proportional to the change.

Each proxy has its own collections of resources, holding only what its services need. A service has two
sides, each compiled once and shared: its `Backend` (clusters and endpoints: how to reach it) and its
`Frontend` (routes and policies: what its waypoint does with requests for it). A change of endpoints alone
touches endpoints alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from meshlight.controlplane.envoy import (
    backends,
    destination_rule,
    gateway_api,
    gateway_proxy,
    http,
    waypoint_proxy,
    wire,
)
from meshlight.controlplane.envoy.backends import Backend
from meshlight.controlplane.envoy.certificates import Certificates
from meshlight.controlplane.envoy.gateway_api import Gateway
from meshlight.controlplane.envoy.gateway_proxy import ListenerState
from meshlight.controlplane.envoy.names import ProxyKey
from meshlight.controlplane.envoy.policies import PolicyTargets, Target
from meshlight.controlplane.envoy.policy_view import PolicyView, group_of
from meshlight.controlplane.envoy.route_index import PARSERS, Effect, RouteIndex
from meshlight.controlplane.envoy.routing import RouteKey
from meshlight.controlplane.envoy.telemetry_settings import TelemetryIndex
from meshlight.controlplane.envoy.told import Told, compile_told, reporter_of
from meshlight.controlplane.envoy.traffic_index import Hosts, TrafficIndex
from meshlight.controlplane.envoy.waypoint_proxy import Frontend
from meshlight.controlplane.facts import SERVICE_NAME, ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import Change, Changes, Collection, Published
from meshlight.controlplane.waypoints import WAYPOINT_CLASS, Waypoint
from meshlight.kube.resources import Object

Resources = dict[str, dict[str, Published]]
"""By type URL and name."""


@dataclass(slots=True)
class Proxy:
    """One waypoint's or gateway's resources, and the services that they are made of."""

    key: ProxyKey
    collections: dict[str, Collection] = field(default_factory=lambda: {t: Collection() for t in wire.TYPES})
    services: set[ObjectKey] = field(default_factory=set)


@dataclass(slots=True)
class Touched:
    """What the next commit must look at."""

    proxies: set[ProxyKey] = field(default_factory=set)
    backends: set[ObjectKey] = field(default_factory=set)
    frontends: set[ObjectKey] = field(default_factory=set)
    routes: set[ObjectKey] = field(default_factory=set)
    endpoints: set[ObjectKey] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.proxies or self.backends or self.frontends or self.routes or self.endpoints)


class EnvoyIndex:
    """Waypoints and gateways, and the resources of each."""

    def __init__(self, index: Index, unusable_keys: str) -> None:
        self._index = index
        self.policies = PolicyTargets()
        self._telemetry = TelemetryIndex()
        self._view = PolicyView(index, self.policies, unusable_keys)
        self.routes = RouteIndex(lambda: index.mesh, index.service)
        self.certificates = Certificates()
        self.traffic = TrafficIndex()
        self.gateways: dict[ObjectKey, Gateway] = {}
        self.proxies: dict[ProxyKey, Proxy] = {}
        self.routes_to_report: set[RouteKey] = set()
        self.gateways_to_report: set[ObjectKey] = set()
        self._backends: dict[ObjectKey, Backend] = {}
        self._frontends: dict[ObjectKey, Frontend] = {}
        self._users: dict[ObjectKey, set[ProxyKey]] = {}
        self._touched = Touched()
        self._observers: dict[str, Callable[[ObjectKey, Object | None], None]] = {
            "Gateway": self._gateway,
            "Namespace": self._namespace,
            "Service": self._service,
            "EndpointSlice": self._slice,
            "Secret": self._secret,
            "Telemetry": self._tell,
            "Pod": lambda key, _: self._touched.endpoints.update(self._index.services_of_pod(key)),
            "AuthorizationPolicy": lambda key, obj: self._retarget(
                self.policies.set_authorization(self._index.mesh, key, obj)
            ),
            "RequestAuthentication": lambda key, obj: self._retarget(
                self.policies.set_authentication(self._index.mesh, key, obj)
            ),
            "VirtualService": lambda key, obj: self._reroute(
                self.traffic.set_virtual_service(self._index.mesh, key, obj)
            ),
            "DestinationRule": lambda key, obj: self._reroute(
                self.traffic.set_destination_rule(self._index.mesh, key, obj)
            ),
            "ReferenceGrant": self._grant,
        }
        for kind in PARSERS:
            self._observers[kind] = self._route_observer(kind)

    # Observation: note what may differ. The index has taken the change already.

    def observe(self, kind: str, key: ObjectKey, obj: Object | None) -> None:
        """Take an object's present state, None once it is deleted."""
        if observer := self._observers.get(kind):
            observer(key, obj)

    def reconfigure(self) -> None:
        """Take other mesh-wide settings, which the index has taken already."""
        self._backends.clear()
        self._frontends.clear()
        self._touched.proxies.update(self.proxies)

    def _gateway(self, key: ObjectKey, obj: Object | None) -> None:
        new = None if obj is None else gateway_api.parse(obj)
        self._touched.proxies.add(ProxyKey.of(key))
        if new == self.gateways.get(key):
            return
        if new is None:
            del self.gateways[key]
        else:
            self.gateways[key] = new
        self._apply(self.routes.parent_changed(("Gateway", key)))
        self.gateways_to_report.add(key)

    def _namespace(self, key: ObjectKey, obj: Object | None) -> None:
        self._touched.proxies.update(self.proxies)
        for gateway in self.gateways.values():
            if any(listener.allowed == "Selector" for listener in gateway.listeners):
                self._apply(self.routes.parent_changed(("Gateway", gateway.key)))

    def _tell(self, key: ObjectKey, obj: Object | None) -> None:
        self._telemetry.set(self._index.mesh, key, obj)
        root = key.namespace == self._index.mesh.root_namespace
        self._touched.proxies.update(p for p in self.proxies if root or p.namespace == key.namespace)

    def _secret(self, key: ObjectKey, obj: Object | None) -> None:
        if self.certificates.set_secret(key, obj):
            for gateway in self.gateways.values():
                if any(ref.key == key for listener in gateway.listeners for ref in listener.certificates):
                    self._touched.proxies.add(ProxyKey.of(gateway.key))
                    self.gateways_to_report.add(gateway.key)

    def _service(self, key: ObjectKey, obj: Object | None) -> None:
        self._touched.backends.add(key)
        self._touched.frontends.add(key)
        self._apply(self.routes.service_changed(key))

    def _route_observer(self, kind: str) -> Callable[[ObjectKey, Object | None], None]:
        return lambda key, obj: self._apply(self.routes.set_route(kind, key, obj))

    def _grant(self, key: ObjectKey, obj: Object | None) -> None:
        self._apply(self.routes.set_grant(key, obj))
        for gateway in self.gateways.values():  # grants for their certificates
            if any(ref.key.namespace == key.namespace for lis in gateway.listeners for ref in lis.certificates):
                self._touched.proxies.add(ProxyKey.of(gateway.key))
                self.gateways_to_report.add(gateway.key)

    def _slice(self, key: ObjectKey, obj: Object | None) -> None:
        name = ((obj or {}).get("metadata", {}).get("labels") or {}).get(SERVICE_NAME)
        if name:
            self._touched.endpoints.add(ObjectKey(key.namespace, name))

    def set_key_set(self, uri: str, text: str) -> None:
        """Take what a `jwksUri` serves now."""
        self._retarget(self._view.set_key_set(uri, text))

    def _retarget(self, targets: Iterable[Target]) -> None:
        """Note what policies of these targets hold for: services, or all that their proxies serve."""
        for target in targets:
            if target.kind == "Service":
                self._touched.frontends.add(ObjectKey(target.namespace, target.name))
                continue
            for key, proxy in self.proxies.items():
                gateway = self.gateways.get(ObjectKey(key.namespace, key.gateway))
                if gateway and target in self._view.targets_of_proxy(key, gateway.gateway_class):
                    self._touched.proxies.add(key)
                    self._touched.frontends |= proxy.services

    def _reroute(self, hosts: Hosts) -> None:
        """Note the services that Istio's traffic objects for these hosts are about."""
        if not hosts:
            return
        for key in self._backends.keys() | self._frontends.keys():
            hostname = self._index.mesh.hostname(key.name, key.namespace)
            if any(destination_rule.covers(host, hostname) for host in hosts):
                self._touched.backends.add(key)
                self._touched.frontends.add(key)

    def _apply(self, effect: Effect) -> None:
        self.routes_to_report |= effect.routes
        for kind, key in effect.parents:
            if kind == "Service":
                self._touched.routes.add(key)
            elif kind == "Gateway":
                self._touched.proxies.add(ProxyKey.of(key))
                self.gateways_to_report.add(key)

    # Questions.

    def proxy(self, key: ProxyKey) -> Proxy:
        """The resources of a proxy; none yet for one whose Gateway is not known (yet)."""
        return self.proxies.setdefault(key, Proxy(key))

    def namespace_labels(self, name: str) -> Mapping[str, str]:
        """The labels of a namespace."""
        return self._index.waypoints.namespace_labels(name)

    def pending(self) -> bool:
        """Whether a commit may change something."""
        return bool(self._touched or self.routes_to_report or self.gateways_to_report)

    # Compilation.

    def commit(self) -> dict[ProxyKey, Changes]:
        """Compile what was touched; returns what differs, by proxy."""
        touched, self._touched = self._touched, Touched()
        for service in touched.backends:
            self._backends.pop(service, None)
            touched.proxies |= self._users.get(service, set())
        for service in touched.frontends:
            self._frontends.pop(service, None)
            touched.proxies |= self._users.get(service, set())
            if waypoint := self._index.waypoints.served_by(service):
                touched.proxies.add(ProxyKey.of(waypoint.key))
        changes: dict[ProxyKey, Changes] = {}
        for service in touched.routes - touched.frontends:
            self._refresh_routes(service, touched.proxies, changes)
        for service in touched.endpoints - touched.backends:
            self._refresh_endpoints(service, changes)
        for key in touched.proxies:
            self._refresh_proxy(key, changes)
        compact = {key: {t: c for t, c in change.items() if c} for key, change in changes.items()}
        return {key: change for key, change in compact.items() if change}

    def _refresh_routes(
        self, service: ObjectKey, proxies: set[ProxyKey], changes: dict[ProxyKey, Changes]
    ) -> None:
        """A service's routes; its proxies as a whole (added to `proxies`) if more than routes differs."""
        old = self._frontends.pop(service, None)
        waypoint = self._index.waypoints.served_by(service)
        if waypoint is None or self._index.service(service) is None:
            return
        key = ProxyKey.of(waypoint.key)
        new = self._frontend(service)
        if old is None or key in proxies or not new.differs_in_routes_alone(old):
            proxies.add(key)
            return
        change = changes.setdefault(key, _no_changes())[wire.SCOPED_ROUTE_TYPE]
        collection = self.proxy(key).collections[wire.SCOPED_ROUTE_TYPE]
        for resource in new.scopes:
            if collection.put(resource):
                change.updated[resource.name] = resource

    def _refresh_endpoints(self, service: ObjectKey, changes: dict[ProxyKey, Changes]) -> None:
        backend = self._backends.get(service)
        if backend is None:
            return
        backend.endpoints = backends.endpoints_of(self._index, self.traffic, service)
        for key in self._users.get(service, ()):
            change = changes.setdefault(key, _no_changes())[wire.ENDPOINT_TYPE]
            collection = self.proxies[key].collections[wire.ENDPOINT_TYPE]
            for resource in backend.endpoints:
                if collection.put(resource):
                    change.updated[resource.name] = resource

    def _refresh_proxy(self, key: ProxyKey, changes: dict[ProxyKey, Changes]) -> None:
        """A whole proxy: what it should have, against what it has."""
        gateway = self.gateways.get(ObjectKey(key.namespace, key.gateway))
        if gateway is None and key not in self.proxies:
            return
        proxy = self.proxy(key)
        needed, resources = self._compile(gateway) if gateway else (set(), {})
        for gone in proxy.services - needed:
            self._users[gone].discard(key)
        for service in needed:
            self._users.setdefault(service, set()).add(key)
        proxy.services = needed
        change = changes.setdefault(key, _no_changes())
        for type_url, collection in proxy.collections.items():
            _bring_to(collection, resources.get(type_url, {}), change[type_url])

    def _compile(self, gateway: Gateway) -> tuple[set[ObjectKey], Resources]:
        """A proxy's services and all of its resources."""
        if gateway.gateway_class != WAYPOINT_CLASS:
            return self._compile_edge(gateway)
        waypoint = self._index.waypoints.waypoints[gateway.key]
        frontends = {key: self._frontend(key) for key in sorted(self._served(waypoint))}
        needed = set(frontends).union(*(frontend.refers_to for frontend in frontends.values()))
        for key in frontends:
            needed |= self._view.authorizers(self._view.targets_of_service(key))
        needed = {key for key in needed if self._index.service(key) is not None}
        resources: Resources = {type_url: {} for type_url in wire.TYPES}
        for key in sorted(needed):
            backend = self._backend(key)
            _add(resources, backend.clusters, backend.endpoints)
        for frontend in frontends.values():
            _add(resources, frontend.scopes)
        groups = [(group_of(key), self._view.targets_of_service(key)) for key in frontends]
        told = self._told(gateway)
        _add(resources, waypoint_proxy.own(waypoint, frontends.values(), self._view.filters(groups), told))
        return needed, resources

    def _compile_edge(self, gateway: Gateway) -> tuple[set[ObjectKey], Resources]:
        targets = self._view.targets_of_proxy(ProxyKey.of(gateway.key), gateway.gateway_class)
        group = group_of(gateway.key)
        edge = gateway_proxy.compile_gateway(
            self.listeners_of(gateway),
            self.routes,
            self.certificates,
            [*self._view.filters([(group, targets)]), *http.filters()],
            self._view.route_rules(group, targets),
            self._view.guards(targets),
            self._told(gateway),
        )
        needed = edge.refers_to | self._view.authorizers(targets)
        needed = {key for key in needed if self._index.service(key) is not None}
        resources: Resources = {type_url: {} for type_url in wire.TYPES}
        for key in sorted(needed):
            backend = self._backend(key)
            _add(resources, backend.clusters, backend.endpoints)
        _add(resources, edge.resources)
        return needed, resources

    def _told(self, gateway: Gateway) -> Told:
        targets = self._view.targets_of_proxy(ProxyKey.of(gateway.key), gateway.gateway_class)
        settings = self._telemetry.of_proxy(self._index.mesh, gateway.key.namespace, targets)
        return compile_told(self._index.mesh, settings, reporter_of(self._index.mesh, gateway))

    def listeners_of(self, gateway: Gateway) -> list[ListenerState]:
        """A gateway's listeners with what is attached to them."""
        return gateway_proxy.states(gateway, self.routes, self.certificates, self.namespace_labels)

    def _served(self, waypoint: Waypoint) -> set[ObjectKey]:
        if not waypoint.for_services:
            return set()
        wishing = self._index.waypoints.wishing(waypoint.key)
        candidates = set(wishing.services)
        for namespace in wishing.namespaces:
            candidates |= self._index.services_in(namespace)
        return {
            key
            for key in self._index.waypoints.services_of(waypoint.key, candidates)
            if self._index.service(key) is not None
        }

    def _backend(self, key: ObjectKey) -> Backend:
        backend = self._backends.get(key)
        if backend is None:
            backend = self._backends[key] = backends.compile_backend(self._index, self.traffic, key)
        return backend

    def _frontend(self, key: ObjectKey) -> Frontend:
        frontend = self._frontends.get(key)
        if frontend is None:
            frontend = waypoint_proxy.compile_frontend(self._index, self.routes, self.traffic, self._view, key)
            self._frontends[key] = frontend
        return frontend


def _no_changes() -> dict[str, Change]:
    return {type_url: Change() for type_url in wire.TYPES}


def _add(resources: Resources, *groups: Iterable[Published]) -> None:
    for group in groups:
        for resource in group:
            resources[resource.type_url][resource.name] = resource


def _bring_to(collection: Collection, wanted: Mapping[str, Published], change: Change) -> None:
    for resource in [held for held in collection if held.name not in wanted]:
        collection.remove(resource.name)
        change.removed[resource.name] = resource
    for name, resource in wanted.items():
        if collection.get(name) is not resource and collection.put(resource):
            change.updated[name] = resource
