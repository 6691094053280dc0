"""Istio's own traffic objects, VirtualServices and DestinationRules, by the hosts that they are about. Pure.

Which one holds: as in Istio the oldest VirtualService whose host fits, an exact host before a wildcard; the
DestinationRules of the service's namespace before those of the root namespace, all for one host together (the
oldest's settings, everyone's subsets).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from meshlight.controlplane.envoy import destination_rule, virtual_service
from meshlight.controlplane.envoy.destination_rule import DestinationRule
from meshlight.controlplane.envoy.virtual_service import MESH, VirtualService
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.settings import Mesh
from meshlight.kube.resources import Object

Hosts = set[str]
"""Host names, possibly wildcards, whose traffic a change may concern."""


class TrafficIndex:
    """VirtualServices and DestinationRules of the mesh."""

    def __init__(self) -> None:
        self.virtual_services: dict[ObjectKey, VirtualService] = {}
        self.destination_rules: dict[ObjectKey, DestinationRule] = {}

    def set_virtual_service(self, mesh: Mesh, key: ObjectKey, obj: Object | None) -> Hosts:
        """Take a VirtualService, or its deletion; returns the hosts that may be routed differently."""
        new = None if obj is None else virtual_service.parse(mesh, obj)
        old = _put(self.virtual_services, key, new)
        if old == new:
            return set()
        changed = [one for one in (old, new) if one is not None]
        hosts = {host for one in changed for host in one.hosts}
        if any(not one.hosts for one in changed):
            hosts |= {host for root in self._delegating_to(key) for host in root.hosts}
        return hosts

    def set_destination_rule(self, mesh: Mesh, key: ObjectKey, obj: Object | None) -> Hosts:
        """Take a DestinationRule, or its deletion; returns the hosts that may be reached differently."""
        new = None if obj is None else destination_rule.parse(mesh, obj)
        old = _put(self.destination_rules, key, new)
        return set() if old == new else {one.host for one in (old, new) if one is not None}

    def _delegating_to(self, key: ObjectKey) -> Iterable[VirtualService]:
        return (
            root for root in self.virtual_services.values() if any(rule.delegate == key for rule in root.http)
        )

    def routing(self, host: str, namespace: str, gateway: str = MESH) -> VirtualService | None:
        """The VirtualService for requests to a host, delegates merged; `namespace` is the proxy's own."""
        fitting = [
            one
            for one in self.virtual_services.values()
            if one.applies_to(gateway)
            and one.visible_in(namespace)
            and any(destination_rule.covers(pattern, host) for pattern in one.hosts)
        ]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda one: (host not in one.hosts, one.age))
        return virtual_service.with_delegates(chosen, self.virtual_services.get)

    def rule(self, host: str, namespace: str, root_namespace: str) -> DestinationRule | None:
        """The DestinationRule of a host whose service lives in `namespace`."""
        for place in dict.fromkeys((namespace, root_namespace)):
            fitting = [
                one
                for one in self.destination_rules.values()
                if one.key.namespace == place
                and one.visible_in(namespace)
                and destination_rule.covers(one.host, host)
            ]
            if fitting:
                best = max(len(one.host) for one in fitting)
                return _merged([one for one in fitting if len(one.host) == best])
        return None


def _merged(rules: list[DestinationRule]) -> DestinationRule:
    """Several rules for one host: the oldest one's settings, each subset once."""
    ordered = sorted(rules, key=lambda one: (one.created, one.key))
    policy = next((one.policy for one in ordered if one.policy), {})
    subsets = {subset.name: subset for one in reversed(ordered) for subset in one.subsets}
    return replace(ordered[0], policy=policy, subsets=tuple(subsets[name] for name in sorted(subsets)))


def _put(things: dict[ObjectKey, Any], key: ObjectKey, new: Any) -> Any:
    old = things.pop(key, None)
    if new is not None:
        things[key] = new
    return old
