"""PeerAuthentication: who must speak mutual TLS, compiled to what the node proxy enforces.

The node proxy knows no PeerAuthentication, only L4 policies. As in Istio, STRICT becomes a DENY of
connections without identity: one shared policy for workloads that are strict throughout, and one
converted policy for every PeerAuthentication that makes exceptions by port. A namespace in which no
PeerAuthentication selects workloads has one policy for all of them, so that turning STRICT on or off
touches policies and not every workload. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from meshlight.controlplane.facts import ObjectKey
from meshlight.kube.resources import Object
from meshlight.proto import authorization_pb2 as rbac

STATIC_STRICT = "istio_converted_static_strict"
NAMESPACE_STRICT = "istio_converted_static_strict_namespace"
CONVERTED_PREFIX = "converted_peer_authentication_"
"""All hold '_', which no Kubernetes name may, so that no user's policy can clash with them."""


class Mode(Enum):
    """`mtls.mode`; DISABLE and PERMISSIVE both accept plaintext at the node proxy."""

    UNSET = "UNSET"
    DISABLE = "DISABLE"
    PERMISSIVE = "PERMISSIVE"
    STRICT = "STRICT"


@dataclass(frozen=True, slots=True)
class PeerAuthentication:
    """A PeerAuthentication as the compiler needs it; `selector` is None for a whole namespace."""

    key: ObjectKey
    created: str
    selector: tuple[tuple[str, str], ...] | None
    mode: Mode
    ports: tuple[tuple[int, Mode], ...]

    @property
    def converted(self) -> ObjectKey:
        """The name under which its port exceptions reach the node proxy."""
        return ObjectKey(self.key.namespace, CONVERTED_PREFIX + self.key.name)


def parse(obj: Object) -> PeerAuthentication:
    """Read an object; a mode this version does not know counts as UNSET."""
    spec, metadata = obj.get("spec") or {}, obj["metadata"]
    labels = (spec.get("selector") or {}).get("matchLabels") or {}
    ports = spec.get("portLevelMtls") or {}
    return PeerAuthentication(
        key=ObjectKey.of(obj),
        created=metadata.get("creationTimestamp") or "",
        selector=tuple(sorted(labels.items())) or None,
        mode=_mode(spec.get("mtls")),
        ports=tuple(sorted((int(port), _mode(mtls)) for port, mtls in ports.items())),
    )


def _mode(mtls: Object | None) -> Mode:
    name = (mtls or {}).get("mode")
    return Mode(name) if name in Mode.__members__ else Mode.UNSET


def oldest(policies: Iterable[PeerAuthentication]) -> PeerAuthentication | None:
    """The one that counts where several claim the same scope: the oldest, then by name."""
    return min(policies, key=lambda p: (p.created, p.key), default=None)


def inherited_strict(mesh: PeerAuthentication | None, namespace: PeerAuthentication | None) -> bool:
    """Whether workloads of a namespace are strict before any selector is looked at."""
    for policy in (namespace, mesh):
        if policy is not None and policy.mode is not Mode.UNSET:
            return policy.mode is Mode.STRICT
    return False


def effective(policy: PeerAuthentication, inherited: bool) -> tuple[bool, tuple[int, ...]]:
    """Whether a selecting policy is strict by default, and the ports on which the contrary holds."""
    strict = inherited if policy.mode is Mode.UNSET else policy.mode is Mode.STRICT
    exceptions = tuple(
        port for port, mode in policy.ports if mode is not Mode.UNSET and (mode is Mode.STRICT) != strict
    )
    return strict, exceptions


def attached(policy: PeerAuthentication | None, inherited: bool, root_namespace: str) -> ObjectKey | None:
    """The policy that enforces mutual TLS on a workload; None where plaintext is accepted.

    `policy` is the selecting PeerAuthentication that counts for the workload, if there is one.
    """
    strict, exceptions = (inherited, ()) if policy is None else effective(policy, inherited)
    if policy is not None and exceptions:
        return policy.converted
    return ObjectKey(root_namespace, STATIC_STRICT) if strict else None


def static_strict(root_namespace: str) -> rbac.Authorization:
    """The policy shared by every workload that is strict throughout."""
    return _deny(ObjectKey(root_namespace, STATIC_STRICT), rbac.Match(not_principals=[_present()]))


def namespace_strict(namespace: str) -> rbac.Authorization:
    """The policy of a namespace all of whose workloads are strict throughout: none of them need name it."""
    policy = _deny(ObjectKey(namespace, NAMESPACE_STRICT), rbac.Match(not_principals=[_present()]))
    policy.scope = rbac.NAMESPACE
    return policy


def convert(policy: PeerAuthentication, inherited: bool) -> rbac.Authorization | None:
    """The policy for exceptions by port; None when there are none, so that nothing needs enforcing by port.

    A DENY cannot be excepted by another policy, hence the default and its exceptions are one policy.
    """
    if policy.selector is None:
        return None
    strict, exceptions = effective(policy, inherited)
    if not exceptions:
        return None
    if strict:
        match = rbac.Match(not_principals=[_present()], not_destination_ports=exceptions)
    else:
        match = rbac.Match(not_principals=[_present()], destination_ports=exceptions)
    return _deny(policy.converted, match)


def _present() -> rbac.StringMatch:
    return rbac.StringMatch(presence=rbac.StringMatch.Presence())


def _deny(key: ObjectKey, match: rbac.Match) -> rbac.Authorization:
    return rbac.Authorization(
        name=key.name,
        namespace=key.namespace,
        scope=rbac.WORKLOAD_SELECTOR,
        action=rbac.DENY,
        rules=[rbac.Rule(clauses=[rbac.Clause(matches=[match])])],
    )


def is_converted(policy: str) -> bool:
    """Whether a policy's name (`NAMESPACE/NAME`) is of one that stands for a PeerAuthentication."""
    name = policy.rpartition("/")[2]
    return name == STATIC_STRICT or name.startswith(CONVERTED_PREFIX)
