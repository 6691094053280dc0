"""Every route object, what it attaches to, and what it refers to. Pure.

Answers which routes a Service or Gateway has, which cluster a reference means, and what to tell a route's
author. ReferenceGrants decide about references across namespaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from meshlight.controlplane.envoy import http_route, l4_route, names, route_rules, soundness
from meshlight.controlplane.envoy.route_rules import Placed
from meshlight.controlplane.envoy.routing import BackendReference, ParentReference, Problem, Route, RouteKey
from meshlight.controlplane.facts import ObjectKey, Service
from meshlight.controlplane.settings import Mesh
from meshlight.kube.resources import Object

PARSERS: Mapping[str, Callable[[Object], Route]] = {
    "HTTPRoute": http_route.parse,
    "GRPCRoute": http_route.parse,
    "TCPRoute": l4_route.parse,
    "TLSRoute": l4_route.parse,
}

Name = TypeVar("Name")
Parent = tuple[str, ObjectKey]
"""Kind (`Service` or `Gateway`) and key."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a ReferenceGrant lets in: (group, kind, namespace) to refer to (group, kind, name or any)."""

    sources: frozenset[tuple[str, str, str]]
    targets: frozenset[tuple[str, str, str]]


@dataclass(slots=True)
class Effect:
    """What a change may have changed: attachments of these parents, and status of these routes."""

    parents: set[Parent] = field(default_factory=set)
    routes: set[RouteKey] = field(default_factory=set)


class RouteIndex:
    """Routes by key, by parent, and by what they refer to."""

    def __init__(self, mesh: Callable[[], Mesh], service: Callable[[ObjectKey], Service | None]) -> None:
        self._mesh, self._service = mesh, service
        self.routes: dict[RouteKey, Route] = {}
        self._by_parent: dict[Parent, set[RouteKey]] = {}
        self._by_service: dict[ObjectKey, set[RouteKey]] = {}
        self._grants: dict[ObjectKey, Grant] = {}
        self._placed: dict[RouteKey, dict[int, list[Placed]]] = {}
        self._last_sound: dict[RouteKey, dict[int, list[Placed]]] = {}
        self._faults: dict[RouteKey, str] = {}
        self._refusals: dict[RouteKey, str] = {}

    # Changes.

    def set_route(self, kind: str, key: ObjectKey, obj: Object | None) -> Effect:
        """Take a route, or its deletion."""
        name = RouteKey(kind, key.namespace, key.name)
        old, new = self.routes.get(name), None if obj is None else PARSERS[kind](obj)
        if old == new:
            return Effect()
        effect = Effect(routes={name})
        self._placed.pop(name, None)
        self._refusals.pop(name, None)  # of what it said before
        if old is not None:
            del self.routes[name]
            if new is None:
                self._last_sound.pop(name, None)
                self._faults.pop(name, None)
            self._relate(old, effect, add=False)
        if new is not None:
            self.routes[name] = new
            self._relate(new, effect, add=True)
        return effect

    def _relate(self, route: Route, effect: Effect, *, add: bool) -> None:
        for parent in route.parents:
            place = (parent.kind, parent.key)
            effect.parents.add(place)
            _member(self._by_parent, place, route.key, add)
        for reference in route.references():
            if reference.kind == "Service":
                _member(self._by_service, reference.key, route.key, add)

    def set_grant(self, key: ObjectKey, obj: Object | None) -> Effect:
        """Take a ReferenceGrant, or its deletion."""
        new = None if obj is None else _grant(obj)
        old = self._grants.get(key)
        if old == new:
            return Effect()
        if new is None:
            del self._grants[key]
        else:
            self._grants[key] = new
        sources = {source[2] for grant in (old, new) if grant for source in grant.sources}
        return self.of_routes(
            route.key
            for route in self.routes.values()
            if route.key.namespace in sources
            and any(reference.key.namespace == key.namespace for reference in route.references())
        )

    def service_changed(self, key: ObjectKey) -> Effect:
        """A Service came, went or has other ports."""
        attached = self._by_parent.get(("Service", key), set())
        return self.of_routes(self._by_service.get(key, set()) | attached)

    def parent_changed(self, parent: Parent) -> Effect:
        """A parent came, went or says something else."""
        return self.of_routes(self._by_parent.get(parent, set()))

    def of_routes(self, keys: Iterable[RouteKey]) -> Effect:
        """Everything that some routes have to do with."""
        effect = Effect()
        for key in keys:
            effect.routes.add(key)
            self._placed.pop(key, None)
            effect.parents.update((parent.kind, parent.key) for parent in self.routes[key].parents)
        return effect

    def set_refusals(self, keys: Iterable[RouteKey], message: str) -> set[RouteKey]:
        """Note that a proxy refused what was made of routes; returns those for whom that is news."""
        fresh = {key for key in keys if key in self.routes and self._refusals.get(key) != message}
        self._refusals.update(dict.fromkeys(fresh, message))
        return fresh

    # Questions.

    def placed(self, route: Route, port: int = 0) -> list[Placed]:
        """A route compiled, for a listener's port where redirects need it. One that Envoy would refuse does
        what it did while it was sound."""
        by_port = self._placed.setdefault(route.key, {})
        if port not in by_port:
            made = route_rules.compile_route(route, self.clusters_for(route.key), port)
            fault = next((what for one in made if (what := soundness.fault(one.route))), None)
            if fault is None:
                self._faults.pop(route.key, None)
                self._last_sound.setdefault(route.key, {})[port] = made
            else:
                self._faults[route.key] = fault
                made = self._last_sound.get(route.key, {}).get(port, [])
            by_port[port] = made
        return by_port[port]

    def attached(self, parent: Parent) -> list[Route]:
        """The routes that name a parent, oldest first."""
        found = (self.routes[key] for key in self._by_parent.get(parent, ()))
        return sorted(found, key=lambda route: route.age)

    def of_service(self, key: ObjectKey, port: int, kinds: Iterable[str]) -> list[Route]:
        """The routes of a service's port, as its waypoint follows them: those of the service's namespace."""
        return [
            route
            for route in self.attached(("Service", key))
            if route.key.kind in kinds
            and route.key.namespace == key.namespace
            and any(_names(parent, key, port) for parent in route.parents)
        ]

    def resolve(self, route: RouteKey, reference: BackendReference) -> str | Problem:
        """The cluster that a reference means, or why there is none."""
        where = f"{reference.kind} {reference.key}" if reference.key.namespace else reference.key.name
        if reference.kind == "Hostname":
            return names.cluster(reference.key.name, reference.port, reference.subset)
        if reference.key.namespace != route.namespace and not self.permitted(
            ("gateway.networking.k8s.io", route.kind, route.namespace), ("", "Service", reference.key)
        ):
            message = f"backendRef {where} not accessible to a {route.kind} in namespace {route.namespace!r}"
            return Problem("RefNotPermitted", f"{message} (missing a ReferenceGrant?)", False)
        service = self._service(reference.key)
        if service is None:
            return Problem("BackendNotFound", f"backend {where} not found", False)
        if all(port.port != reference.port for port in service.ports):
            return Problem("BackendNotFound", f"backend {where} has no port {reference.port}", False)
        hostname = self._mesh().hostname(reference.key.name, reference.key.namespace)
        return names.cluster(hostname, reference.port, reference.subset)

    def clusters_for(self, route: RouteKey) -> Callable[[BackendReference], str | None]:
        """`resolve` for compilers: None where there is a problem."""

        def cluster(reference: BackendReference) -> str | None:
            found = self.resolve(route, reference)
            return found if isinstance(found, str) else None

        return cluster

    def problems(self, route: Route) -> list[Problem]:
        """Everything of a route that cannot be done as it says, apart from its attachment."""
        found = list(route.problems)
        if fault := self._faults.get(route.key):
            found.append(Problem("UnsupportedValue", f"not given to proxies, which would refuse {fault}"))
        if refusal := self._refusals.get(route.key):
            found.append(Problem("UnsupportedValue", f"refused by a proxy, which goes on as before: {refusal}"))
        for reference in route.references():
            outcome = self.resolve(route.key, reference)
            if isinstance(outcome, Problem):
                found.append(outcome)
        return found

    def permitted(self, source: tuple[str, str, str], target: tuple[str, str, ObjectKey]) -> bool:
        """Whether a ReferenceGrant of the target's namespace lets an object refer to it."""
        group, kind, key = target
        return any(
            source in grant.sources
            and not grant.targets.isdisjoint({(group, kind, ""), (group, kind, key.name)})
            for place, grant in self._grants.items()
            if place.namespace == key.namespace
        )


def _names(parent: ParentReference, key: ObjectKey, port: int) -> bool:
    return (parent.kind, parent.key) == ("Service", key) and parent.port in (0, port)


def _grant(obj: Object) -> Grant:
    spec = obj.get("spec") or {}
    return Grant(
        frozenset((f.get("group", ""), f["kind"], f["namespace"]) for f in spec.get("from") or []),
        frozenset((t.get("group", ""), t["kind"], t.get("name") or "") for t in spec.get("to") or []),
    )


def _member(groups: dict[Name, set[RouteKey]], name: Name, key: RouteKey, add: bool) -> None:
    if add:
        groups.setdefault(name, set()).add(key)
    elif name in groups:
        groups[name].discard(key)
        if not groups[name]:
            del groups[name]
