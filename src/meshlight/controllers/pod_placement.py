"""Where pods may stand in relation to each other: affinity, anti-affinity and topology spread. Pure.

Rules: Kubernetes' "Inter-pod affinity and anti-affinity" and "Pod Topology Spread Constraints".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from meshlight.controllers.node_filters import NodeState, affinity_refusal, untolerated
from meshlight.controllers.pods import is_active, labels
from meshlight.kube.resources import Object
from meshlight.kube.selectors import match_labels

AFFINITY = "node(s) didn't match pod affinity rules"
ANTI_AFFINITY = "node(s) didn't match pod anti-affinity rules"
EXISTING = "node(s) didn't satisfy existing pods anti-affinity rules"
SPREAD = "node(s) didn't match pod topology spread constraints"
SPREAD_LABEL = SPREAD + " (missing required label)"
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def _terms(pod: Object, kind: str) -> list[Object]:
    affinity = (pod["spec"].get("affinity") or {}).get(kind) or {}
    return list(affinity.get(_REQUIRED) or [])


def _preferred(pod: Object, kind: str) -> list[tuple[int, Object]]:
    affinity = (pod["spec"].get("affinity") or {}).get(kind) or {}
    return [(int(t["weight"]), t["podAffinityTerm"]) for t in affinity.get(_PREFERRED) or []]


def needs_others(pod: Object) -> bool:
    """Whether the pod's place depends on other pods."""
    affinity = pod["spec"].get("affinity") or {}
    return bool(
        affinity.get("podAffinity")
        or affinity.get("podAntiAffinity")
        or pod["spec"].get("topologySpreadConstraints")
    )


class Surroundings:
    """All nodes with their pods, asked about one pod at a time."""

    def __init__(self, states: Sequence[NodeState], namespaces: Mapping[str, Mapping[str, str]]) -> None:
        self.states, self.namespaces = states, namespaces

    def _selects(self, term: Object, owner: Object, other: Object) -> bool:
        """Whether an affinity term of `owner` means the pod `other`."""
        namespace = other["metadata"].get("namespace", "")
        selector = term.get("namespaceSelector")
        listed = term.get("namespaces") or []
        if selector is None and not listed:
            listed = [owner["metadata"].get("namespace", "")]
        if namespace not in listed and not (
            selector is not None and match_labels(selector, self.namespaces.get(namespace, {}))
        ):
            return False
        found = labels(other)
        if not match_labels(term.get("labelSelector"), found):
            return False
        own = labels(owner)
        same = all(found.get(k) == own[k] for k in term.get("matchLabelKeys") or [] if k in own)
        return same and all(found.get(k) != own[k] for k in term.get("mismatchLabelKeys") or [] if k in own)

    def _domains(self, term: Object, pod: Object) -> Counter[str]:
        """How many pods that a term means stand in each value of its topology key."""
        key, found = term["topologyKey"], Counter[str]()
        for state in self.states:
            if (value := state.labels.get(key)) is not None:
                found[value] += sum(self._selects(term, pod, p) for p in state.pods.values() if is_active(p))
        return found

    def refusals(self, pod: Object) -> dict[str, str]:
        """By node, why other pods keep this one away; a node that is not named can take it."""
        found: dict[str, str] = {}
        for refuse in (self._existing, self._anti, self._affine, self._spread):
            for name, why in refuse(pod).items():
                found.setdefault(name, why)
        return found

    def _existing(self, pod: Object) -> dict[str, str]:
        """Pods that are there already and do not want this one near."""
        shut: set[tuple[str, str]] = set()
        for state in self.states:
            for other in state.pods.values():
                for term in _terms(other, "podAntiAffinity"):
                    value = state.labels.get(term["topologyKey"])
                    if value is not None and self._selects(term, other, pod):
                        shut.add((term["topologyKey"], value))
        if not shut:
            return {}
        return {s.name: EXISTING for s in self.states if any(s.labels.get(k) == v for k, v in shut)}

    def _anti(self, pod: Object) -> dict[str, str]:
        found = {}
        for term in _terms(pod, "podAntiAffinity"):
            domains = self._domains(term, pod)
            for state in self.states:
                value = state.labels.get(term["topologyKey"])
                if value is not None and domains[value]:
                    found[state.name] = ANTI_AFFINITY
        return found

    def _affine(self, pod: Object) -> dict[str, str]:
        terms = _terms(pod, "podAffinity")
        if not terms:
            return {}
        domains = [self._domains(term, pod) for term in terms]
        # The first of a group that wants to be together has nobody to be with.
        first = not any(any(d.values()) for d in domains) and all(self._selects(t, pod, pod) for t in terms)
        found = {}
        for state in self.states:
            for term, domain in zip(terms, domains, strict=True):
                value = state.labels.get(term["topologyKey"])
                if value is None or not (domain[value] or first):
                    found[state.name] = AFFINITY
        return found

    def _counted(self, pod: Object, constraint: Object) -> list[NodeState]:
        """The nodes over which a constraint spreads."""
        keys = [c["topologyKey"] for c in pod["spec"].get("topologySpreadConstraints") or []]
        affine = constraint.get("nodeAffinityPolicy", "Honor") == "Honor"
        taints = constraint.get("nodeTaintsPolicy", "Ignore") == "Honor"
        return [
            s
            for s in self.states
            if all(k in s.labels for k in keys)
            and not (affine and affinity_refusal(pod, s.node))
            and not (taints and untolerated(pod, s.node, ("NoSchedule", "NoExecute")))
        ]

    def _matching(self, pod: Object, constraint: Object, states: Iterable[NodeState]) -> Counter[str]:
        selector = dict(constraint.get("labelSelector") or {})
        own = labels(pod)
        extra = {k: own[k] for k in constraint.get("matchLabelKeys") or [] if k in own}
        selector["matchLabels"] = {**(selector.get("matchLabels") or {}), **extra}
        namespace = pod["metadata"].get("namespace", "")
        found: Counter[str] = Counter()
        for state in states:
            found[state.labels[constraint["topologyKey"]]] += sum(
                p["metadata"].get("namespace", "") == namespace and match_labels(selector, labels(p))
                for p in state.pods.values()
                if is_active(p)
            )
        return found

    def _spread(self, pod: Object) -> dict[str, str]:
        found: dict[str, str] = {}
        for constraint in pod["spec"].get("topologySpreadConstraints") or []:
            if constraint.get("whenUnsatisfiable", "DoNotSchedule") != "DoNotSchedule":
                continue
            key = constraint["topologyKey"]
            counts = self._matching(pod, constraint, self._counted(pod, constraint))
            least = min(counts.values(), default=0)
            if len(counts) < int(constraint.get("minDomains") or 1):
                least = 0
            itself = int(match_labels(constraint.get("labelSelector"), labels(pod)))
            for state in self.states:
                value = state.labels.get(key)
                if value is None:
                    found[state.name] = SPREAD_LABEL
                elif counts[value] + itself - least > int(constraint["maxSkew"]):
                    found[state.name] = SPREAD
        return found

    def preference(self, pod: Object) -> dict[str, float]:
        """By node, how much preferred (anti-)affinity and soft spread speak for it."""
        found: dict[str, float] = {s.name: 0.0 for s in self.states}
        for sign, kind in ((1, "podAffinity"), (-1, "podAntiAffinity")):
            for weight, term in _preferred(pod, kind):
                domains = self._domains(term, pod)
                for state in self.states:
                    value = state.labels.get(term["topologyKey"])
                    if value is not None:
                        found[state.name] += sign * weight * domains[value]
        for constraint in pod["spec"].get("topologySpreadConstraints") or []:
            if constraint.get("whenUnsatisfiable") != "ScheduleAnyway":
                continue
            counts = self._matching(pod, constraint, self._counted(pod, constraint))
            for state in self.states:
                value = state.labels.get(constraint["topologyKey"])
                found[state.name] -= 20.0 * counts[value] if value is not None else 100.0
        return found
