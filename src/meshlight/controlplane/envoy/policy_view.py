"""Policies as the compilers of proxies ask for them: what holds for a service, and what that needs. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshlight.controlplane.envoy import authentication, authorization, external_authorizers
from meshlight.controlplane.envoy.names import ProxyKey
from meshlight.controlplane.envoy.policies import PolicyTargets, Target
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.waypoints import WAYPOINT_CLASS


class PolicyView:
    """The policies of waypoints and gateways, and the key sets that they need."""

    def __init__(self, index: Index, targets: PolicyTargets, unusable_keys: str) -> None:
        self._index, self._targets, self._unusable_keys = index, targets, unusable_keys
        self._key_sets: dict[str, str] = {}

    def set_key_set(self, uri: str, text: str) -> set[Target]:
        """Take what a `jwksUri` serves now; returns what it may change."""
        self._key_sets[uri] = text
        return self._targets.needing(uri)

    def targets_of_proxy(self, key: ProxyKey, gateway_class: str = WAYPOINT_CLASS) -> tuple[Target, ...]:
        """What a policy for all that a proxy serves may be attached to."""
        gateway = ObjectKey(key.namespace, key.gateway)
        return Target.gateway(gateway), Target.gateway_class(gateway_class)

    def targets_of_service(self, key: ObjectKey) -> tuple[Target, ...]:
        """What a policy for a service may be attached to."""
        waypoint = self._index.waypoints.served_by(key)
        above = self.targets_of_proxy(ProxyKey.of(waypoint.key)) if waypoint else ()
        return Target.service(key), *above

    def guards(self, targets: Iterable[Target]) -> list[Any]:
        """Network filters for connections that are not HTTP."""
        return authorization.network_filters(self._targets.policies(targets))

    def filters(self, targets: Iterable[tuple[str, tuple[Target, ...]]]) -> list[Any]:
        """The HTTP filters that policies need; what they ask of a request is in its routes. By group."""
        groups: dict[str, list[authentication.Authentication]] = {}
        providers: set[str] = set()
        for group, attached in targets:
            providers.update(authorization.providers_of(self._targets.policies(attached)))
            if tokens := self._targets.authentications(attached):
                groups[group] = tokens
        known = external_authorizers.authorizers(self._index.mesh)
        return [
            *authentication.http_filter(groups, self._key_sets.get, self._unusable_keys),
            *authorization.http_filters(providers, known),
        ]

    def authorizers(self, targets: Iterable[Target]) -> set[ObjectKey]:
        """The services of the external authorizers that policies name."""
        known = external_authorizers.authorizers(self._index.mesh)
        found = set()
        for provider in authorization.providers_of(self._targets.policies(targets)):
            if provider in known:
                key = external_authorizers.service_of(self._index.mesh, known[provider])
                if key is not None and self._index.service(key) is not None:
                    found.add(key)
        return found

    def route_rules(self, group: str, targets: tuple[Target, ...]) -> dict[str, Any]:
        """What policies ask of requests, by filter."""
        known = external_authorizers.authorizers(self._index.mesh)
        return {
            **authentication.route_rules(group, self._targets.authentications(targets)),
            **authorization.route_rules(self._targets.policies(targets), known),
        }


def group_of(service: ObjectKey) -> str:
    """The name of a service's RequestAuthentications."""
    return f"{service.namespace}/{service.name}"
