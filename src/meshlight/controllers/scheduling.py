"""The scheduler's decision: a node for a pod, or why there is none in words, or whom to preempt. Pure.

Rules: Kubernetes' "kube-scheduler" (filter, then score) and "Pod Priority and Preemption".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from meshlight.controllers.node_filters import NodeState, matches_term, refusals, untolerated
from meshlight.controllers.pod_placement import Surroundings
from meshlight.controllers.pods import controller_of, is_terminating
from meshlight.kube.pod_resources import DEFAULT_CPU, DEFAULT_MEMORY, pod_requests
from meshlight.kube.resources import Object

NOT_HELPFUL = "Preemption is not helpful for scheduling"
NO_VICTIMS = "No preemption victims found for incoming pod"
NEVER = "not eligible due to preemptionPolicy=Never."


@dataclass(slots=True)
class Verdict:
    """Where a pod goes, or why it cannot: `reasons` by node, `helpful` nodes on which fewer pods would help."""

    node: str = ""
    reasons: dict[str, list[str]] = field(default_factory=dict)
    helpful: list[str] = field(default_factory=list)
    blocked: str = ""
    """Why no node at all is considered."""


Extra = Callable[[Object, NodeState], str | None]
"""A further rule for one node, as for its volumes: a refusal in words, or None."""


def priority(pod: Object) -> int:
    """A pod's priority."""
    return int(pod["spec"].get("priority") or 0)


def judge(
    pod: Object,
    states: Sequence[NodeState],
    namespaces: Mapping[str, Mapping[str, str]],
    extra: Extra | None = None,
) -> Verdict:
    """Filter, then score."""
    verdict = Verdict()
    if not states:
        verdict.blocked = "no nodes available to schedule pods"
        return verdict
    others = Surroundings(states, namespaces)
    apart = others.refusals(pod)
    fit = []
    for state in states:
        why, helps = refusals(pod, state)
        if not why and extra is not None and (said := extra(pod, state)) is not None:
            why, helps = [said], False
        if not why and state.name in apart:
            why, helps = [apart[state.name]], True
        if why:
            verdict.reasons[state.name] = why
            if helps:
                verdict.helpful.append(state.name)
        else:
            fit.append(state)
    if fit:
        wishes = others.preference(pod)
        verdict.node = max(fit, key=lambda s: (score(pod, s, fit) + wishes[s.name], _backwards(s.name))).name
    return verdict


def _backwards(name: str) -> tuple[int, ...]:
    return tuple(-ord(c) for c in name)


def score(pod: Object, state: NodeState, fit: Sequence[NodeState]) -> float:
    """How good a node is for a pod: emptier, balanced, preferred, away from its siblings."""
    wanted = pod_requests(pod["spec"])
    used = []
    for name, least in (("cpu", DEFAULT_CPU), ("memory", DEFAULT_MEMORY)):
        capacity = state.capacity.get(name, 0)
        share = (state.asked.get(name, 0) + max(wanted.get(name, 0), least)) / capacity if capacity else 1.0
        used.append(min(share, 1.0))
    points = 100 * (1 - sum(used) / 2) + 100 * (1 - abs(used[0] - used[1]))
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    for each in affinity.get("preferredDuringSchedulingIgnoredDuringExecution") or []:
        if matches_term(each["preference"], state.node):
            points += 2.0 * int(each["weight"])
    if untolerated(pod, state.node, ("PreferNoSchedule",)):
        points -= 300
    return points - 40 * siblings(pod, state) - 2 * len(state.pods)


def siblings(pod: Object, state: NodeState) -> int:
    """How many pods of the same controller the node has."""
    owner = controller_of(pod)
    if owner is None:
        return 0
    return sum((controller_of(p) or {}).get("uid") == owner["uid"] for p in state.pods.values())


def message(verdict: Verdict, total: int, preempting: str = "") -> str:
    """A refusal in the scheduler's words."""
    if verdict.blocked:
        return verdict.blocked
    counts = Counter(why for reasons in verdict.reasons.values() for why in reasons)
    parts = sorted(f"{count} {why}" for why, count in counts.items())
    said = f"0/{total} nodes are available: {', '.join(parts)}."
    return f"{said} preemption: {preempting}" if preempting else said


def no_preemption(verdict: Verdict, total: int) -> str:
    """Why preempting does not help, in the scheduler's words."""
    counts = Counter(NO_VICTIMS if name in verdict.helpful else NOT_HELPFUL for name in verdict.reasons)
    parts = sorted(f"{count} {why}" for why, count in counts.items())
    return f"0/{total} nodes are available: {', '.join(parts)}."


@dataclass(frozen=True, slots=True)
class Preemption:
    """The node to make room on, and the pods that have to go."""

    node: str
    victims: tuple[Object, ...]


def preempt(
    pod: Object,
    states: Sequence[NodeState],
    verdict: Verdict,
    namespaces: Mapping[str, Mapping[str, str]],
    protected: Callable[[Object], bool] = lambda pod: False,
) -> Preemption | None:
    """The node where making room costs least: fewest protected victims, lowest priorities, fewest pods."""
    found: list[tuple[tuple[int, int, int, int], Preemption]] = []
    for state in states:
        if state.name not in verdict.helpful:
            continue
        victims = _victims(pod, state, states, namespaces, protected)
        if victims:
            levels = [priority(v) for v in victims]
            cost = (sum(protected(v) for v in victims), max(levels), sum(levels), len(victims))
            found.append((cost, Preemption(state.name, tuple(victims))))
    return min(found, key=lambda each: (each[0], each[1].node))[1] if found else None


def _victims(
    pod: Object,
    state: NodeState,
    states: Sequence[NodeState],
    namespaces: Mapping[str, Mapping[str, str]],
    protected: Callable[[Object], bool],
) -> list[Object]:
    """The least that has to go from a node so that the pod fits; empty when that is not enough."""
    lower = [p for p in state.pods.values() if priority(p) < priority(pod)]

    def fits(victims: list[Object]) -> bool:
        trial = state.without(victims)
        every = [trial if s is state else s for s in states]
        if refusals(pod, trial)[0]:
            return False
        return state.name not in Surroundings(every, namespaces).refusals(pod)

    if not lower or not fits(lower):
        return []
    chosen = list(lower)
    for each in sorted(lower, key=lambda p: (protected(p), priority(p)), reverse=True):
        spared = [p for p in chosen if p is not each]
        if fits(spared):
            chosen = spared
    return [p for p in chosen if not is_terminating(p)]
