"""Writes what became of routes into their status, when it differs from what is there."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from meshlight.controlplane.discovery import Connection, Discovery
from meshlight.controlplane.envoy.gateway_api import attach
from meshlight.controlplane.envoy.http_route import GATEWAY_GROUP
from meshlight.controlplane.envoy.route_rules import ROUTE_METADATA
from meshlight.controlplane.envoy.routing import ParentReference, Problem, Route, RouteKey
from meshlight.controlplane.gateways import route_status
from meshlight.controlplane.gateways.classes import CLASSES
from meshlight.controlplane.gateways.route_status import Outcome
from meshlight.controlplane.gateways.work import Work
from meshlight.controlplane.xds import Rejection
from meshlight.kube.client import Cache, Client
from meshlight.kube.resources import GRPC_ROUTES, HTTP_ROUTES, TCP_ROUTES, TLS_ROUTES

RESOURCES = {resource.kind: resource for resource in (HTTP_ROUTES, GRPC_ROUTES, TCP_ROUTES, TLS_ROUTES)}
MESH_CONTROLLER = "istio.io/gateway-controller"
"""Who answers for routes of Services."""


class RouteStatusWriter:
    """Keeps the status of every route true."""

    def __init__(self, client: Client, caches: Mapping[str, Cache], discovery: Discovery) -> None:
        self._client, self._caches, self._discovery = client, caches, discovery
        self._work: Work[RouteKey] = Work(self._write)
        discovery.on_commit(self._committed)
        discovery.on_verdict(self._refused)

    def _committed(self) -> None:
        due, self._discovery.envoy.routes_to_report = self._discovery.envoy.routes_to_report, set()
        for key in due:
            self._work.add(key)

    def _refused(self, connection: Connection, rejection: Rejection | None) -> None:
        """A proxy refused resources: it goes on with what it has, and the routes in them are told."""
        gateway = connection.session.proxy.gateway
        if rejection is None or gateway is None:
            return
        collections = self._discovery.envoy.proxy(gateway).collections
        held = [collections[rejection.type_url].get(name) for name in rejection.names]
        suspects = routes_in(resource.message for resource in held if resource is not None)
        named = {key for key in suspects if str(key) in rejection.message}
        for key in self._discovery.envoy.routes.set_refusals(named or suspects, rejection.message):
            self._work.add(key)

    async def run(self) -> None:
        """Work until cancelled."""
        await self._discovery.synced.wait()
        await self._work.run()

    async def _write(self, key: RouteKey) -> None:
        obj = self._caches[key.kind].get(key.name, key.namespace)
        route = self._discovery.envoy.routes.routes.get(key)
        if obj is None or route is None:
            return
        outcomes = [outcome for parent in route.parents if (outcome := self._outcome(route, parent))]
        problems = self._discovery.envoy.routes.problems(route)
        wanted = route_status.status(obj, route, outcomes, problems, datetime.datetime.now(datetime.UTC))
        if wanted["parents"] != ((obj.get("status") or {}).get("parents") or []):
            await self._client.patch(
                RESOURCES[key.kind], key.name, {"status": wanted}, key.namespace, subresource="status"
            )

    def _outcome(self, route: Route, parent: ParentReference) -> Outcome | None:
        """What became of a route at a parent; None for parents that are somebody else's."""
        envoy = self._discovery.envoy
        if (parent.group, parent.kind) == (GATEWAY_GROUP, "Gateway"):
            gateway = envoy.gateways.get(parent.key)
            chosen = CLASSES.get(gateway.gateway_class) if gateway else None
            if gateway is None or chosen is None:
                return None
            _, refusal = attach(route, parent, gateway, envoy.namespace_labels)
            return Outcome(parent, chosen.controller, refusal)
        if (parent.group, parent.kind) in (("", "Service"), ("core", "Service")):
            return Outcome(parent, MESH_CONTROLLER, self._at_service(route, parent))
        return None

    def _at_service(self, route: Route, parent: ParentReference) -> Problem | None:
        service = self._discovery.index.service(parent.key)
        if service is None:
            return Problem("NoMatchingParent", f"Service {parent.key} not found")
        if parent.port and all(port.port != parent.port for port in service.ports):
            return Problem("NoMatchingParent", f"Service {parent.key} has no port {parent.port}")
        if route.key.namespace != parent.key.namespace:
            message = "a waypoint follows only routes of its Service's own namespace"
            return Problem("NotAllowedByListeners", message)
        return None


def routes_in(messages: Iterable[Any]) -> set[RouteKey]:
    """The route objects that resources (RouteConfigurations, scoped or not) were made of."""
    found = set()
    for message in messages:
        configuration = getattr(message, "route_configuration", message)
        for host in getattr(configuration, "virtual_hosts", ()):
            for route in host.routes:
                name = route.metadata.filter_metadata[ROUTE_METADATA]["name"] if _named(route) else ""
                kind, _, rest = str(name).partition("/")
                namespace, _, own = rest.partition("/")
                if own:
                    found.add(RouteKey(kind, namespace, own))
    return found


def _named(route: Any) -> bool:
    metadata = route.metadata.filter_metadata
    return ROUTE_METADATA in metadata and "name" in metadata[ROUTE_METADATA]
