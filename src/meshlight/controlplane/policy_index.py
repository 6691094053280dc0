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
    """What a change of one policy may have changed.

    `unknown_namespaces`: also the attachments of workloads whose namespaces this index has not heard of.
    """

    policies: set[ObjectKey] = field(default_factory=set)
    selections: list[Selection] = field(default_factory=list)
    unknown_namespaces: bool = False


class PolicyIndex:
    """Every AuthorizationPolicy and PeerAuthentication of the mesh."""

    def __init__(self, root_namespace: str, trust: TrustDomains = OWN_TRUST) -> None:
        self.root_namespace = root_namespace
        self._trust = trust
        self._compiled: dict[ObjectKey, CompiledPolicy] = {}
        self._selecting: defaultdict[str, dict[ObjectKey, CompiledPolicy]] = defaultdict(dict)
        self._peers: defaultdict[str, dict[ObjectKey, PeerAuthentication]] = defaultdict(dict)
        self._namespaces: set[str] = set()

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
        chosen = [p.selector if p is not None and p.authorization is not None else None for p in (old, new)]
        if chosen[0] != chosen[1]:  # else the same workloads name it as before
            reach = self._reach(key.namespace)
            effect.selections += [Selection(reach, selector) for selector in chosen if selector]
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
                self._inherit(key.namespace, effect)
            else:
                effect.selections.append(Selection(key.namespace, policy.selector))
                effect.policies.add(policy.converted)
        others = any(p.selector for k, p in here.items() if k != key)
        selected_before, selects_now = (p is not None and p.selector is not None for p in (old, new))
        if selected_before != selects_now and not others and key.namespace != self.root_namespace:
            # The first that selects, or the last: how the whole namespace is made strict changes.
            effect.policies.add(ObjectKey(key.namespace, peer.NAMESPACE_STRICT))
            effect.selections.append(Selection(key.namespace))
        return effect

    def _inherit(self, namespace: str, effect: Effect) -> None:
        """A whole namespace's or the mesh's policy changed: what those below inherit may have."""
        spaces = {*self._namespaces, *self._peers} if namespace == self.root_namespace else {namespace}
        for space in spaces:
            effect.policies.add(ObjectKey(space, peer.NAMESPACE_STRICT))
            effect.policies |= {p.converted for p in self._peers.get(space, {}).values() if p.selector}
            if not self._as_a_whole(space):
                effect.selections.append(Selection(space))
        effect.unknown_namespaces = namespace == self.root_namespace

    def set_namespace(self, name: str, *, exists: bool) -> Effect:
        """Take a namespace's existence."""
        if exists == (name in self._namespaces):
            return Effect()
        if exists:
            self._namespaces.add(name)
        else:
            self._namespaces.discard(name)
        attachments = [Selection(name)] if self.inherited_strict(name) else []
        return Effect({ObjectKey(name, peer.NAMESPACE_STRICT)}, attachments)

    def knows(self, namespace: str) -> bool:
        """Whether a namespace has been heard of."""
        return namespace in self._namespaces

    def _as_a_whole(self, namespace: str) -> bool:
        """Whether one policy makes a namespace strict, rather than attachments to its workloads."""
        if namespace not in self._namespaces:
            return False
        if namespace == self.root_namespace:
            return True
        return not any(p.selector for p in self._peers.get(namespace, {}).values())

    def authorization(self, key: ObjectKey) -> rbac.Authorization | None:
        """The policy as the node proxy is to have it; None when there is none of that name."""
        if key == ObjectKey(self.root_namespace, peer.STATIC_STRICT):
            return peer.static_strict(self.root_namespace) if any(self._peers.values()) else None
        if key.name == peer.NAMESPACE_STRICT:
            strict = self._as_a_whole(key.namespace) and self.inherited_strict(key.namespace)
            return peer.namespace_strict(key.namespace) if strict else None
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
        if self._as_a_whole(namespace):
            return names
        selecting = None
        if namespace != self.root_namespace:
            here = self._peers.get(namespace, {}).values()
            selecting = peer.oldest(p for p in here if p.selector and _carries(labels, p.selector))
        enforced = peer.attached(selecting, self.inherited_strict(namespace), self.root_namespace)
        return [*names, str(enforced)] if enforced else names


def _carries(labels: Mapping[str, str], selector: Labels) -> bool:
    return all(labels.get(name) == value for name, value in selector)
