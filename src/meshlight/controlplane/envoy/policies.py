"""Which AuthorizationPolicies and RequestAuthentications hold for which waypoint, gateway and service. Pure.

Rules: Istio's `targetRefs`. A Gateway, Service or ServiceEntry is targeted in the policy's own namespace; a
GatewayClass from the root namespace. Policies without `targetRefs` are the node proxies', not a waypoint's.
What holds for a service behind a waypoint is what targets it, the waypoint, or the waypoint's class.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from meshlight.controlplane.envoy import authorization
from meshlight.controlplane.envoy.authentication import Authentication, compile_authentication
from meshlight.controlplane.envoy.authorization import Policy
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.policy import TrustDomains
from meshlight.controlplane.settings import Mesh
from meshlight.kube.resources import Object

Compiled = TypeVar("Compiled")


@dataclass(frozen=True, slots=True)
class Target:
    """What a policy is attached to; `namespace` is empty for a GatewayClass."""

    kind: str
    namespace: str
    name: str

    @classmethod
    def service(cls, key: ObjectKey) -> Target:
        """A Service."""
        return cls("Service", key.namespace, key.name)

    @classmethod
    def gateway(cls, key: ObjectKey) -> Target:
        """A Gateway: a waypoint or one at the edge."""
        return cls("Gateway", key.namespace, key.name)

    @classmethod
    def gateway_class(cls, name: str) -> Target:
        """All Gateways of a class."""
        return cls("GatewayClass", "", name)


def targets_of(obj: Object, root_namespace: str) -> frozenset[Target]:
    """What a policy's `targetRefs` (or `targetRef`) mean; empty without any."""
    spec, namespace = obj.get("spec") or {}, obj["metadata"]["namespace"]
    references = spec.get("targetRefs") or ([spec["targetRef"]] if spec.get("targetRef") else [])
    found = set()
    for reference in references:
        kind, name = reference.get("kind") or "", reference.get("name") or ""
        if kind == "GatewayClass":
            if namespace == root_namespace:
                found.add(Target.gateway_class(name))
        else:
            found.add(Target(kind, namespace, name))
    return frozenset(found)


class _Attached(Generic[Compiled]):
    """Compiled objects by what they are attached to, in the order of their names."""

    def __init__(self) -> None:
        self._objects: dict[ObjectKey, tuple[frozenset[Target], Compiled]] = {}
        self._by_target: dict[Hashable, set[ObjectKey]] = {}

    def put(self, key: ObjectKey, targets: frozenset[Target], compiled: Compiled | None) -> set[Target]:
        """Put, replace or (None) remove one; what it was or is attached to."""
        before, _ = self._objects.pop(key, (frozenset(), None))
        for target in before:
            self._by_target[target].discard(key)
        if compiled is not None and targets:
            self._objects[key] = (targets, compiled)
            for target in targets:
                self._by_target.setdefault(target, set()).add(key)
        return set(before | targets)

    def of(self, targets: Iterable[Target]) -> list[Compiled]:
        """Those attached to any of the targets."""
        keys = {key for target in targets for key in self._by_target.get(target, ())}
        return [self._objects[key][1] for key in sorted(keys)]

    def targets(self, chosen: Callable[[Compiled], bool]) -> set[Target]:
        """What the chosen ones are attached to."""
        return {t for targets, compiled in self._objects.values() if chosen(compiled) for t in targets}

    def all(self) -> list[Compiled]:
        """Every one that is attached to something."""
        return [compiled for _, compiled in self._objects.values()]


class PolicyTargets:
    """The policies of waypoints and gateways, by what they are attached to."""

    def __init__(self) -> None:
        self._authorization: _Attached[Policy] = _Attached()
        self._authentication: _Attached[Authentication] = _Attached()

    def set_authorization(self, mesh: Mesh, key: ObjectKey, obj: Object | None) -> set[Target]:
        """Take an AuthorizationPolicy, or its deletion; returns what it may change."""
        if obj is None:
            return self._authorization.put(key, frozenset(), None)
        trust = TrustDomains(mesh.trust_domain, mesh.trust_domain_aliases)
        policy = authorization.compile_policy(obj, trust)
        return self._authorization.put(key, targets_of(obj, mesh.root_namespace), policy)

    def set_authentication(self, mesh: Mesh, key: ObjectKey, obj: Object | None) -> set[Target]:
        """Take a RequestAuthentication, or its deletion; returns what it may change."""
        if obj is None:
            return self._authentication.put(key, frozenset(), None)
        targets = targets_of(obj, mesh.root_namespace)
        return self._authentication.put(key, targets, compile_authentication(obj))

    def needing(self, uri: str) -> set[Target]:
        """What is attached to by those that need a key set."""
        return self._authentication.targets(lambda authentication: uri in authentication.uris)

    def policies(self, targets: Iterable[Target]) -> list[Policy]:
        """The AuthorizationPolicies that hold for something of these targets."""
        return self._authorization.of(targets)

    def authentications(self, targets: Iterable[Target]) -> list[Authentication]:
        """The RequestAuthentications that hold for something of these targets."""
        return self._authentication.of(targets)

    def key_set_uris(self) -> set[str]:
        """Where key sets must be fetched from."""
        return {uri for authentication in self._authentication.all() for uri in authentication.uris}
