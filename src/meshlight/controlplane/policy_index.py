"""Which security policies exist, what they compile to, and which workloads they are attached to.

Takes one object change at a time and answers with what it may have changed: names of policies to
publish anew, and selections of workloads whose attached policies may differ. Pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from meshlight.controlplane import peer_authentication as peer
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.peer_authentication import PeerAuthentication
from meshlight.controlplane.policy import OWN_TRUST, CompiledPolicy, TrustDomains, compile_policy
from meshlight.kube.resources import Object
from meshlight.proto import authorization_pb2 as rbac

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Workloads of a namespace (None: of every namespace) that carry all of `labels`."""

    namespace: str | None
    labels: Labels = ()


@dataclass(slots=True)
class Effect:
    """What a change of one policy may have changed."""

    policies: set[ObjectKey] = field(default_factory=set)
    selections: list[Selection] = field(default_factory=list)


class PolicyIndex:
    """Every AuthorizationPolicy and PeerAuthentication of the mesh."""

    def __init__(self, root_namespace: str, trust: TrustDomains = OWN_TRUST) -> None:
        self.root_namespace = root_namespace
        self._trust = trust
        self._compiled: dict[ObjectKey, CompiledPolicy] = {}
        self._selecting: defaultdict[str, dict[ObjectKey, CompiledPolicy]] = defaultdict(dict)
        self._peers: defaultdict[str, dict[ObjectKey, PeerAuthentication]] = defaultdict(dict)

    def set_trust(self, trust: TrustDomains) -> None:
        """Compile what is taken from now on for other trust domains; the caller sets all policies anew."""
        self._trust = trust

    def set_authorization_policy(self, key: ObjectKey, obj: Object | None) -> Effect:
        """Take an AuthorizationPolicy, or its deletion."""
        new = None if obj is None else compile_policy(obj, self.root_namespace, self._trust)
        old = self._compiled.get(key)
        if old == new:
            return Effect()
        effect = Effect({key})
        for policy in (old, new):
            if policy is not None and policy.selector and policy.authorization is not None:
                effect.selections.append(Selection(self._reach(key.namespace), policy.selector))
        self._selecting[key.namespace].pop(key, None)
        if new is None:
            self._compiled.pop(key, None)
        else:
            self._compiled[key] = new
            if new.selector and new.authorization is not None:
                self._selecting[key.namespace][key] = new
        return effect

    def _reach(self, namespace: str) -> str | None:
        return None if namespace == self.root_namespace else namespace

    def set_peer_authentication(self, key: ObjectKey, obj: Object | None) -> Effect:
        """Take a PeerAuthentication, or its deletion."""
        new = None if obj is None else peer.parse(obj)
        here = self._peers[key.namespace]
        old = here.get(key)
        if old == new:
            return Effect()
        if new is None:
            here.pop(key, None)
        else:
            here[key] = new
        effect = Effect({ObjectKey(self.root_namespace, peer.STATIC_STRICT)})
        for policy in (old, new):
            if policy is None:
                continue
            if policy.selector is None:
                reach = self._reach(key.namespace)
                effect.selections.append(Selection(reach))
                spaces = [key.namespace] if reach else list(self._peers)
                effect.policies |= {p.converted for s in spaces for p in self._peers[s].values() if p.selector}
            else:
                effect.selections.append(Selection(key.namespace, policy.selector))
                effect.policies.add(policy.converted)
        return effect

    def authorization(self, key: ObjectKey) -> rbac.Authorization | None:
        """The policy as the node proxy is to have it; None when there is none of that name."""
        if key == ObjectKey(self.root_namespace, peer.STATIC_STRICT):
            return peer.static_strict(self.root_namespace) if any(self._peers.values()) else None
        if key.name.startswith(peer.CONVERTED_PREFIX):
            source = ObjectKey(key.namespace, key.name.removeprefix(peer.CONVERTED_PREFIX))
            policy = self._peers[key.namespace].get(source)
            if policy is None or key.namespace == self.root_namespace:
                return None
            return peer.convert(policy, self.inherited_strict(key.namespace))
        compiled = self._compiled.get(key)
        return compiled.authorization if compiled else None

    def compiled(self) -> Iterator[CompiledPolicy]:
        """Every AuthorizationPolicy with what became of it, for status and diagnosis."""
        yield from self._compiled.values()

    def outcome(self, key: ObjectKey) -> CompiledPolicy | None:
        """What became of one AuthorizationPolicy."""
        return self._compiled.get(key)

    def inherited_strict(self, namespace: str) -> bool:
        """Whether a namespace's workloads must speak mutual TLS unless selected otherwise."""
        mesh = self._whole(self.root_namespace)
        return peer.inherited_strict(mesh, None if namespace == self.root_namespace else self._whole(namespace))

    def mutual_tls(
        self, namespace: str, labels: Mapping[str, str], port: int
    ) -> tuple[peer.Mode, PeerAuthentication | None]:
        """The mode in force on a workload's port, and the PeerAuthentication that says so (None: none does)."""
        here = () if namespace == self.root_namespace else self._peers.get(namespace, {}).values()
        selecting = peer.oldest(p for p in here if p.selector and _carries(labels, p.selector))
        if (
            selecting is not None
            and (mode := dict(selecting.ports).get(port, peer.Mode.UNSET)) is not peer.Mode.UNSET
        ):
            return mode, selecting
        whole = self._whole(namespace) if namespace != self.root_namespace else None
        for policy in (selecting, whole, self._whole(self.root_namespace)):
            if policy is not None and policy.mode is not peer.Mode.UNSET:
                return policy.mode, policy
        return peer.Mode.PERMISSIVE, None

    def _whole(self, namespace: str) -> PeerAuthentication | None:
        return peer.oldest(p for p in self._peers.get(namespace, {}).values() if p.selector is None)

    def attached(self, namespace: str, labels: Mapping[str, str]) -> list[str]:
        """Names (`NAMESPACE/NAME`) of the policies attached to a workload, in a stable order."""
        spaces = dict.fromkeys((namespace, self.root_namespace))
        names = sorted(
            str(key)
            for space in spaces
            for key, policy in self._selecting.get(space, {}).items()
            if policy.selector and _carries(labels, policy.selector)
        )
        selecting = None
        if namespace != self.root_namespace:
            here = self._peers.get(namespace, {}).values()
            selecting = peer.oldest(p for p in here if p.selector and _carries(labels, p.selector))
        enforced = peer.attached(selecting, self.inherited_strict(namespace), self.root_namespace)
        return [*names, str(enforced)] if enforced else names


def _carries(labels: Mapping[str, str], selector: Labels) -> bool:
    return all(labels.get(name) == value for name, value in selector)
