"""What every waypoint and gateway is told, kept current at a cost proportional to the change.

Each proxy has its own collections of resources, holding only what its services need. A service's
resources are compiled once and shared. A change of endpoints alone touches endpoints alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from meshlight.controlplane.envoy import (
    authentication,
    authorization,
    clusters,
    endpoints,
    external_authorizers,
    http,
    listeners,
    names,
    routes,
    wire,
)
from meshlight.controlplane.envoy.listeners import HTTP_CHAIN, Destination
from meshlight.controlplane.envoy.names import ProxyKey
from meshlight.controlplane.envoy.policies import PolicyTargets, Target
from meshlight.controlplane.facts import SERVICE_NAME, ObjectKey, address_text
from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import Change, Changes, Collection, Published, publish
from meshlight.controlplane.waypoints import WAYPOINT_CLASS, Waypoint
from meshlight.kube.resources import Object
from meshlight.proto import workload_pb2 as wds

Resources = dict[str, dict[str, Published]]
"""By type URL and name."""


@dataclass(slots=True)
class Proxy:
    """One waypoint's or gateway's resources, and the services they are made of."""

    key: ProxyKey
    collections: dict[str, Collection] = field(default_factory=lambda: {t: Collection() for t in wire.TYPES})
    services: set[ObjectKey] = field(default_factory=set)


@dataclass(slots=True)
class ServiceResources:
    """A service compiled: its clusters and endpoints, and the routes of its addresses."""

    clusters: list[Published]
    endpoints: list[Published]
    scopes: list[Published]
    destinations: list[Destination]
    other_chains: dict[str, str]


class EnvoyIndex:
    """Waypoints and gateways, and the resources of each."""

    def __init__(self, index: Index, unusable_keys: str) -> None:
        self._index, self._unusable_keys = index, unusable_keys
        self.policies = PolicyTargets()
        self._key_sets: dict[str, str] = {}
        self.proxies: dict[ProxyKey, Proxy] = {}
        self._compiled: dict[ObjectKey, ServiceResources] = {}
        self._touched_proxies: set[ProxyKey] = set()
        self._touched_services: set[ObjectKey] = set()
        self._touched_endpoints: set[ObjectKey] = set()
        self._users: dict[ObjectKey, set[ProxyKey]] = {}
        self._observers: dict[str, Callable[[ObjectKey, Object | None], None]] = {
            "Gateway": lambda key, _: self._touched_proxies.add(ProxyKey.of(key)),
            "Namespace": lambda key, _: self._touched_proxies.update(self.proxies),
            "Service": lambda key, _: self._touched_services.add(key),
            "EndpointSlice": self._slice,
            "Pod": lambda key, _: self._touched_endpoints.update(self._index.services_of_pod(key)),
            "AuthorizationPolicy": lambda key, obj: self._retarget(
                self.policies.set_authorization(self._index.mesh, key, obj)
            ),
            "RequestAuthentication": lambda key, obj: self._retarget(
                self.policies.set_authentication(self._index.mesh, key, obj)
            ),
        }

    def observe(self, kind: str, key: ObjectKey, obj: Object | None) -> None:
        """Note what an object's change may touch; the index has taken the change already."""
        if observer := self._observers.get(kind):
            observer(key, obj)

    def reconfigure(self) -> None:
        """Take other mesh-wide settings, which the index has taken already."""
        self._compiled.clear()
        self._touched_proxies.update(self.proxies)

    def proxy(self, key: ProxyKey) -> Proxy:
        """The resources of a proxy; none yet for one whose Gateway is not known (yet)."""
        return self.proxies.setdefault(key, Proxy(key))

    def set_key_set(self, uri: str, text: str) -> None:
        """Take what a `jwksUri` serves now."""
        self._key_sets[uri] = text
        self._retarget(self.policies.needing(uri))

    def pending(self) -> bool:
        """Whether a commit may change something."""
        return bool(self._touched_proxies or self._touched_services or self._touched_endpoints)

    def commit(self) -> dict[ProxyKey, Changes]:
        """Compile what was touched; returns what differs, by proxy."""
        touched = set(self._touched_proxies)
        for service in self._touched_services:
            self._compiled.pop(service, None)
            touched |= self._users.get(service, set())
            if waypoint := self._index.waypoints.served_by(service):
                touched.add(ProxyKey.of(waypoint.key))
        changes: dict[ProxyKey, Changes] = {}
        for service in self._touched_endpoints - self._touched_services:
            self._refresh_endpoints(service, changes)
        for key in touched:
            self._refresh_proxy(key, changes)
        self._touched_proxies.clear()
        self._touched_services.clear()
        self._touched_endpoints.clear()
        return {key: {t: c for t, c in change.items() if c} for key, change in changes.items()}

    def _slice(self, key: ObjectKey, obj: Object | None) -> None:
        name = ((obj or {}).get("metadata", {}).get("labels") or {}).get(SERVICE_NAME)
        if name:
            self._touched_endpoints.add(ObjectKey(key.namespace, name))

    def _retarget(self, targets: Iterable[Target]) -> None:
        """Note what policies of these targets hold for: services, or all that their waypoints serve."""
        for target in targets:
            if target.kind == "Service":
                self._touched_services.add(ObjectKey(target.namespace, target.name))
                continue
            for key, proxy in self.proxies.items():
                if target in self._targets_of_proxy(key):
                    self._touched_proxies.add(key)
                    self._touched_services |= proxy.services

    def _targets_of_proxy(self, key: ProxyKey) -> tuple[Target, ...]:
        gateway = ObjectKey(key.namespace, key.gateway)
        return Target.gateway(gateway), Target.gateway_class(WAYPOINT_CLASS)

    def _targets_of_service(self, key: ObjectKey) -> tuple[Target, ...]:
        waypoint = self._index.waypoints.served_by(key)
        above = self._targets_of_proxy(ProxyKey.of(waypoint.key)) if waypoint else ()
        return Target.service(key), *above

    # Endpoints alone.

    def _refresh_endpoints(self, service: ObjectKey, changes: dict[ProxyKey, Changes]) -> None:
        compiled = self._compiled.get(service)
        if compiled is None:
            return
        compiled.endpoints = self._endpoints(service)
        for key in self._users.get(service, ()):
            change = changes.setdefault(key, _no_changes())[wire.ENDPOINT_TYPE]
            collection = self.proxies[key].collections[wire.ENDPOINT_TYPE]
            for resource in compiled.endpoints:
                if collection.put(resource):
                    change.updated[resource.name] = resource

    # A whole proxy: what it should have, against what it has.

    def _refresh_proxy(self, key: ProxyKey, changes: dict[ProxyKey, Changes]) -> None:
        waypoint = self._index.waypoints.waypoints.get(ObjectKey(key.namespace, key.gateway))
        services = self._served(waypoint) if waypoint else set()
        if waypoint is None and key not in self.proxies:
            return
        proxy = self.proxy(key)
        for gone in proxy.services:
            self._users[gone].discard(key)
        asked = self._authorizer_services(services) - services
        for service in services | asked:
            self._users.setdefault(service, set()).add(key)
        proxy.services = services | asked
        wanted = self._waypoint(waypoint, sorted(services)) if waypoint else {}
        for service in asked:
            compiled = self._service(service)
            _add(wanted, compiled.clusters, compiled.endpoints)
        change = changes.setdefault(key, _no_changes())
        for type_url, collection in proxy.collections.items():
            _bring_to(collection, wanted.get(type_url, {}), change[type_url])

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

    def _waypoint(self, waypoint: Waypoint, services: Iterable[ObjectKey]) -> Resources:
        resources: Resources = {type_url: {} for type_url in wire.TYPES}
        destinations: list[Destination] = []
        tcp = {}
        for service in services:
            compiled = self._service(service)
            _add(resources, compiled.clusters, compiled.endpoints, compiled.scopes)
            destinations += compiled.destinations
            guards = authorization.network_filters(self.policies.policies(self._targets_of_service(service)))
            for chain, cluster in compiled.other_chains.items():
                tcp[chain] = [*guards, listeners.tcp_proxy(chain, cluster)]
        rest = None
        if waypoint.for_workloads:
            rest = Destination("", 0, HTTP_CHAIN, other=names.ORIGINAL_DESTINATION)
            tcp[names.ORIGINAL_DESTINATION] = [
                listeners.tcp_proxy(names.ORIGINAL_DESTINATION, names.ORIGINAL_DESTINATION)
            ]
        manager = http.manager(
            "main",
            listeners.scoped_routes(),
            self._policy_filters(services),
            [],
            edge=False,
            early=listeners.destination_header(),
        )
        listener = listeners.waypoint(waypoint.tunnel_port, manager, destinations, tcp, rest=rest)
        _add(
            resources,
            [publish(wire.LISTENER_TYPE, listener.name, listener)],
            [
                _published(wire.CLUSTER_TYPE, c)
                for c in (clusters.original_destination(), clusters.black_hole())
            ],
        )
        return resources

    def _policy_filters(self, services: Iterable[ObjectKey]) -> list[Any]:
        """The filters that policies of these services need; what they ask of a request is in its routes."""
        groups: dict[str, list[authentication.Authentication]] = {}
        providers: set[str] = set()
        for service in services:
            targets = self._targets_of_service(service)
            providers.update(authorization.providers_of(self.policies.policies(targets)))
            if tokens := self.policies.authentications(targets):
                groups[_group(service)] = tokens
        return [
            *authentication.http_filter(groups, self._key_sets.get, self._unusable_keys),
            *authorization.http_filters(providers, external_authorizers.authorizers(self._index.mesh)),
        ]

    def _authorizer_services(self, services: Iterable[ObjectKey]) -> set[ObjectKey]:
        """The services of the external authorizers that policies of these services name."""
        known = external_authorizers.authorizers(self._index.mesh)
        found = set()
        for service in services:
            policies = self.policies.policies(self._targets_of_service(service))
            for provider in authorization.providers_of(policies):
                if provider in known:
                    key = external_authorizers.service_of(self._index.mesh, known[provider])
                    if key is not None and self._index.service(key) is not None:
                        found.add(key)
        return found

    def _route_rules(self, service: ObjectKey) -> dict[str, Any]:
        """What policies ask of a service's requests."""
        targets = self._targets_of_service(service)
        known = external_authorizers.authorizers(self._index.mesh)
        return {
            **authentication.route_rules(_group(service), self.policies.authentications(targets)),
            **authorization.route_rules(self.policies.policies(targets), known),
        }

    # A service, whoever asks.

    def _service(self, key: ObjectKey) -> ServiceResources:
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._compile(key)
        return compiled

    def _compile(self, key: ObjectKey) -> ServiceResources:
        service = self._index.service(key)
        assert service is not None, "only services that exist are compiled"
        hostname = self._index.mesh.hostname(key.name, key.namespace)
        result = ServiceResources([], self._endpoints(key), [], [], {})
        addresses = [address_text(address) for address in service.addresses]
        for port in service.ports:
            cluster = names.cluster(hostname, port.port)
            result.clusters.append(_published(wire.CLUSTER_TYPE, clusters.of_port(hostname, service, port)))
            chain, other = HTTP_CHAIN, None
            if port.app_protocol in (wds.TCP, wds.TLS):
                chain = cluster
            elif port.app_protocol == wds.UNKNOWN:
                other = cluster
            if chain != HTTP_CHAIN or other:
                result.other_chains[cluster] = cluster
            result.destinations += [Destination(a, port.port, chain, other) for a in addresses]
            if chain == HTTP_CHAIN:
                host = routes.host(hostname, ["*"], [routes.default(cluster)])
                configuration = routes.configuration(cluster, [host], self._route_rules(key))
                scopes = routes.scope([(a, port.port) for a in addresses], configuration)
                result.scopes += [_published(wire.SCOPED_ROUTE_TYPE, scope) for scope in scopes]
        return result

    def _endpoints(self, key: ObjectKey) -> list[Published]:
        service = self._index.service(key)
        if service is None:
            return []
        hostname = self._index.mesh.hostname(key.name, key.namespace)
        slices = self._index.slices_of(key)
        result = []
        for port in service.ports:
            chosen = endpoints.members(port, slices, self._index.pod, self._index.node)
            name = names.cluster(hostname, port.port)
            result.append(
                publish(wire.ENDPOINT_TYPE, name, endpoints.assignment(self._index.mesh, name, chosen))
            )
        return result


def _group(service: ObjectKey) -> str:
    """The name of a service's RequestAuthentications."""
    return f"{service.namespace}/{service.name}"


def _published(type_url: str, message: object) -> Published:
    return publish(type_url, message.name, message)  # type: ignore[attr-defined,arg-type]


def _no_changes() -> dict[str, Change]:
    return {type_url: Change() for type_url in wire.TYPES}


def _add(resources: Resources, *groups: Iterable[Published]) -> None:
    for group in groups:
        for resource in group:
            resources[resource.type_url][resource.name] = resource


def _bring_to(collection: Collection, wanted: dict[str, Published], change: Change) -> None:
    for resource in [held for held in collection if held.name not in wanted]:
        collection.remove(resource.name)
        change.removed[resource.name] = resource
    for name, resource in wanted.items():
        if collection.get(name) is not resource and collection.put(resource):
            change.updated[name] = resource
