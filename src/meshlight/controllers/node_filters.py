"""Whether one node can take a pod by itself: taints, selectors, affinity to nodes, ports, resources. Pure.

Each rule answers with the scheduler's words for a refusal, or None. Rules: Kubernetes' "Assigning Pods to
Nodes" and "Taints and Tolerations".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from meshlight.kube.pod_resources import Amounts, add, allocatable, pod_requests
from meshlight.kube.resources import Object

UNSCHEDULABLE = "node(s) were unschedulable"
AFFINITY = "node(s) didn't match Pod's node affinity/selector"
PORTS = "node(s) didn't have free ports for the requested pod ports"
TOO_MANY = "Too many pods"
_CORDON = {"key": "node.kubernetes.io/unschedulable", "value": "", "effect": "NoSchedule"}


def tolerates(toleration: Object, taint: Object) -> bool:
    """Whether a toleration matches a taint."""
    if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return not toleration.get("key") or toleration["key"] == taint["key"]
    same_key = toleration.get("key", "") == taint["key"]
    return bool(same_key and (toleration.get("value") or "") == (taint.get("value") or ""))


def untolerated(pod: Object, node: Object, effects: Sequence[str]) -> Object | None:
    """The node's first taint of these effects that the pod does not tolerate."""
    for taint in node["spec"].get("taints") or []:
        tolerated = any(tolerates(t, taint) for t in pod["spec"].get("tolerations") or [])
        if taint.get("effect") in effects and not tolerated:
            return taint  # type: ignore[no-any-return]
    return None


def matches_expression(expression: Object, found: Mapping[str, str]) -> bool:
    """One requirement of a NodeSelectorTerm."""
    key, values = expression["key"], expression.get("values") or []
    value = found.get(key)
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt" as way:
            try:
                left, right = int(value or ""), int(values[0])
            except (ValueError, IndexError):
                return False
            return left > right if way == "Gt" else left < right
    return False


def matches_term(term: Object, node: Object) -> bool:
    """A NodeSelectorTerm; an empty one matches nothing."""
    expressions, fields = term.get("matchExpressions") or [], term.get("matchFields") or []
    if not expressions and not fields:
        return False
    found = node["metadata"].get("labels") or {}
    names = {"metadata.name": node["metadata"]["name"]}
    return all(matches_expression(e, found) for e in expressions) and all(
        matches_expression(e, names) for e in fields
    )


def matches_selector(selector: Object | None, node: Object) -> bool:
    """A NodeSelector; an absent one matches every node."""
    if selector is None:
        return True
    return any(matches_term(t, node) for t in selector.get("nodeSelectorTerms") or [])


def affinity_refusal(pod: Object, node: Object) -> str | None:
    """`nodeSelector` and required node affinity."""
    found = node["metadata"].get("labels") or {}
    if any(found.get(k) != v for k, v in (pod["spec"].get("nodeSelector") or {}).items()):
        return AFFINITY
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    return None if matches_selector(required, node) else AFFINITY


def host_ports(pod: Object) -> set[tuple[str, str, int]]:
    """(address, protocol, port) of what a pod takes of its node's ports."""
    containers = [*(pod["spec"].get("containers") or []), *(pod["spec"].get("initContainers") or [])]
    return {
        (port.get("hostIP") or "0.0.0.0", port.get("protocol") or "TCP", int(port["hostPort"]))
        for container in containers
        for port in container.get("ports") or []
        if port.get("hostPort")
    }


def ports_clash(wanted: Iterable[tuple[str, str, int]], taken: Iterable[tuple[str, str, int]]) -> bool:
    """Whether two sets of ports cannot be bound on one node."""
    every = list(taken)
    return any(
        (protocol, port) == (other, held) and (address == there or "0.0.0.0" in (address, there))
        for address, protocol, port in wanted
        for there, other, held in every
    )


@dataclass(slots=True)
class NodeState:
    """A node with the pods on it and their sums."""

    node: Object
    pods: dict[str, Object] = field(default_factory=dict)
    asked: Amounts = field(default_factory=dict)
    capacity: Amounts = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The node's name."""
        return str(self.node["metadata"]["name"])

    @property
    def labels(self) -> Mapping[str, str]:
        """The node's labels."""
        return self.node["metadata"].get("labels") or {}

    @classmethod
    def of(cls, node: Object, pods: Iterable[Object] = ()) -> NodeState:
        """A node with these pods."""
        made = cls(node, capacity=allocatable(node))
        for pod in pods:
            made.add(pod)
        return made

    def add(self, pod: Object) -> None:
        """A pod comes to the node, or has changed there."""
        self.remove(pod)
        self.pods[pod["metadata"]["uid"]] = pod
        add(self.asked, pod_requests(pod["spec"]))

    def remove(self, pod: Object) -> None:
        """A pod leaves the node."""
        if (held := self.pods.pop(pod["metadata"]["uid"], None)) is not None:
            add(self.asked, pod_requests(held["spec"]), -1)

    def without(self, victims: Iterable[Object]) -> NodeState:
        """The node as it would be without some pods."""
        made = NodeState(self.node, dict(self.pods), dict(self.asked), self.capacity)
        for pod in victims:
            made.remove(pod)
        return made


def resource_refusals(pod: Object, state: NodeState) -> list[str]:
    """What of a node's resources does not suffice; every one is named."""
    found = []
    if len(state.pods) + 1 > state.capacity.get("pods", 110):
        found.append(TOO_MANY)
    for name, wanted in sorted(pod_requests(pod["spec"]).items()):
        if wanted > state.capacity.get(name, 0) - state.asked.get(name, 0):
            found.append(f"Insufficient {name}")
    return found


def refusals(pod: Object, state: NodeState) -> tuple[list[str], bool]:
    """Why a node cannot take a pod (empty: it can), and whether fewer pods on it would help."""
    node = state.node
    if (wanted := pod["spec"].get("nodeName")) and wanted != state.name:
        return ["node(s) didn't match the requested node name"], False
    undeterred = any(tolerates(t, _CORDON) for t in pod["spec"].get("tolerations") or [])
    if node["spec"].get("unschedulable") and not undeterred:
        return [UNSCHEDULABLE], False
    if (taint := untolerated(pod, node, ("NoSchedule", "NoExecute"))) is not None:
        return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value') or ''}}}"], False
    if (why := affinity_refusal(pod, node)) is not None:
        return [why], False
    ports = host_ports(pod)
    if ports and any(ports_clash(ports, host_ports(p)) for p in state.pods.values()):
        return [PORTS], True
    return resource_refusals(pod, state), True
