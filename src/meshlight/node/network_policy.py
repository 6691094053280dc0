"""NetworkPolicies, pods and namespaces as one node sees them: who is isolated, and who their peers are.

Pure index, changed by one object at a time; `policy_rules` makes text of it. Rules: Kubernetes' "Network
Policies" (networking.k8s.io/v1). Pods of the host's network are neither isolated nor peers by selector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from meshlight.kube.resources import Object
from meshlight.kube.selectors import match_labels
from meshlight.node.policy_rules import (
    Compiled,
    Direction,
    PortName,
    Selector,
    Wanted,
    compile_policy,
    family_of,
)

REDIRECTION = "ambient.istio.io/redirection"
_DIRECTIONS: tuple[Direction, ...] = ("ingress", "egress")
_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Pod:
    """What policies ask of a pod."""

    namespace: str
    labels: Mapping[str, str]
    addresses: tuple[str, ...]
    ports: Mapping[PortName, int]
    local: bool
    meshed: bool


def pod_of(obj: Object, node: str) -> Pod | None:
    """A pod that takes part in the pod network; None for one that does not, or no more, or not yet."""
    spec, status, metadata = obj["spec"], obj.get("status") or {}, obj["metadata"]
    if spec.get("hostNetwork") or status.get("phase") in ("Succeeded", "Failed"):
        return None
    addresses = [entry["ip"] for entry in status.get("podIPs") or []]
    addresses = addresses or ([status["podIP"]] if status.get("podIP") else [])
    if not addresses:
        return None
    ports = {
        PortName(port["name"], port.get("protocol", "TCP").lower()): int(port["containerPort"])
        for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
        for port in container.get("ports") or []
        if port.get("name")
    }
    meshed = (metadata.get("annotations") or {}).get(REDIRECTION) == "enabled"
    labels = metadata.get("labels") or {}
    return Pod(metadata["namespace"], labels, tuple(addresses), ports, spec.get("nodeName") == node, meshed)


@dataclass(slots=True)
class Members:
    """A set's elements, and what changed since they were last written."""

    elements: dict[str, int] = field(default_factory=dict)
    """Element → how many pods stand behind it (while one address passes from pod to pod, two do)."""
    before: set[str] = field(default_factory=set)

    def put(self, element: str, count: int) -> None:
        """Count a pod in (1) or out (-1)."""
        number = self.elements.get(element, 0) + count
        if number > 0:
            self.elements[element] = number
        else:
            self.elements.pop(element, None)

    def changed(self) -> tuple[set[str], set[str]]:
        """(added, removed) since the last call."""
        now = set(self.elements)
        added, removed = now - self.before, self.before - now
        self.before = now
        return added, removed


class PolicyTable:
    """What a node has to enforce."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._pods: dict[_Key, Pod] = {}
        self._namespaces: dict[str, Mapping[str, str]] = {}
        self._policies: dict[_Key, Compiled] = {}
        self._sets: dict[str, Members] = {f"mesh-{family}": Members() for family in (4, 6)}
        self._selectors: dict[Selector, int] = {}
        self._names: dict[PortName, int] = {}
        self._dirty: set[str] = set(self._sets)

    # Changes.

    def pod(self, obj: Object, deleted: bool) -> None:
        """A pod changed."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        self._put(key, None if deleted else pod_of(obj, self._node))

    def _put(self, key: _Key, now: Pod | None) -> None:
        before = self._pods.get(key)
        if before == now:
            return
        for pod, count in ((before, -1), (now, 1)):
            if pod is not None:
                self._count(pod, count)
        if now is None:
            self._pods.pop(key, None)
        else:
            self._pods[key] = now

    def namespace(self, obj: Object, deleted: bool) -> None:
        """A namespace's labels may have changed: its pods are other peers."""
        name = obj["metadata"]["name"]
        labels = {} if deleted else obj["metadata"].get("labels") or {}
        if self._namespaces.get(name) == labels:
            return
        own = [pod for (namespace, _), pod in self._pods.items() if namespace == name]
        for pod in own:
            self._count(pod, -1)
        if deleted:
            self._namespaces.pop(name, None)
        else:
            self._namespaces[name] = labels
        for pod in own:
            self._count(pod, 1)

    def policy(self, obj: Object, deleted: bool) -> None:
        """A policy changed."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        before = self._policies.pop(key, None)
        now = None if deleted else compile_policy(obj)
        if now is not None:
            self._policies[key] = now
            self._refer(now, 1)
        if before is not None:
            self._refer(before, -1)

    def clear(self) -> None:
        """Forget pods and namespaces, as when they are no longer followed."""
        for key in list(self._pods):
            self._put(key, None)
        self._namespaces.clear()

    def _refer(self, compiled: Compiled, count: int) -> None:
        for selector in compiled.selectors:
            known = self._selectors.get(selector, 0)
            self._selectors[selector] = known + count
            if not known:
                for pod in self._pods.values():
                    self._count_peer(selector, pod, 1)
            elif known + count == 0:
                del self._selectors[selector]
                self._drop(selector.name)
        for name in compiled.names:
            known = self._names.get(name, 0)
            self._names[name] = known + count
            if not known:
                for pod in self._pods.values():
                    self._count_port(name, pod, 1)
            elif known + count == 0:
                del self._names[name]
                self._drop(name.stem)

    def _drop(self, stem: str) -> None:
        for family in (4, 6):
            if members := self._sets.get(f"{stem}-{family}"):
                members.elements.clear()
                self._dirty.add(f"{stem}-{family}")

    def _count(self, pod: Pod, count: int) -> None:
        for selector in self._selectors:
            self._count_peer(selector, pod, count)
        for name in self._names:
            self._count_port(name, pod, count)
        if pod.meshed:
            for address in pod.addresses:
                self._member("mesh", address, address, count)

    def _count_peer(self, selector: Selector, pod: Pod, count: int) -> None:
        if self._matches(selector, pod):
            for address in pod.addresses:
                self._member(selector.name, address, address, count)

    def _count_port(self, name: PortName, pod: Pod, count: int) -> None:
        if (number := pod.ports.get(name)) is not None:
            for address in pod.addresses:
                self._member(name.stem, address, f"{address} . {number}", count)

    def _member(self, stem: str, address: str, element: str, count: int) -> None:
        name = f"{stem}-{family_of(address)}"
        self._sets.setdefault(name, Members()).put(element, count)
        self._dirty.add(name)

    def _matches(self, selector: Selector, pod: Pod) -> bool:
        if selector.namespaces:
            labels = self._namespaces.get(pod.namespace)
            if labels is None or not match_labels(json.loads(selector.namespaces), labels):
                return False
        elif pod.namespace != selector.namespace:
            return False
        return not selector.pods or match_labels(json.loads(selector.pods), pod.labels)

    # What follows.

    @property
    def needed(self) -> bool:
        """Whether there is any policy."""
        return bool(self._policies)

    def isolated(self, namespace: str) -> bool:
        """Whether some policy of a namespace may isolate a pod of it."""
        return any(key[0] == namespace for key in self._policies)

    def wanted(self) -> Wanted:
        """Chains and isolated pods, as they should be."""
        wanted = Wanted()
        by_namespace: dict[str, list[Compiled]] = {}
        for (namespace, _), compiled in sorted(self._policies.items()):
            by_namespace.setdefault(namespace, []).append(compiled)
        for pod in self._pods.values():
            if not pod.local:
                continue
            selecting = [c for c in by_namespace.get(pod.namespace, ()) if match_labels(c.pods, pod.labels)]
            for direction in _DIRECTIONS:
                policies = [c.statements[direction] for c in selecting if direction in c.statements]
                if policies:
                    wanted.isolate(direction, pod.addresses, policies)
        stems = [s.name for s in self._selectors] + [n.stem for n in self._names]
        wanted.sets = {f"{stem}-{family}" for stem in stems for family in (4, 6)}
        for name in self._sets.keys() - wanted.sets - {"mesh-4", "mesh-6"}:
            del self._sets[name]
        return wanted

    def members(self, *, everything: bool) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """(added, removed) elements by set since the last call; with `everything` all there are."""
        added: dict[str, set[str]] = {}
        removed: dict[str, set[str]] = {}
        for name in self._sets if everything else self._dirty:
            members = self._sets.get(name)
            if members is None:
                continue
            if everything:
                members.before = set()
            added[name], removed[name] = members.changed()
        self._dirty.clear()
        return added, removed
