"""The arithmetic of a Deployment's rollout: how many pods each of its ReplicaSets is to have next. Pure.

Rules: Kubernetes' "Deployments" (rolling updates within `maxSurge` and `maxUnavailable`, proportional
scaling, Recreate). One call is one step; the ReplicaSets' answers make the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshlight.controllers.pods import count_or_share
from meshlight.kube.resources import Object


@dataclass(frozen=True, slots=True)
class Bounds:
    """A rolling update's bounds, in pods."""

    wanted: int
    surge: int
    unavailable: int

    @classmethod
    def of(cls, spec: Object) -> Bounds:
        """From a Deployment's spec; both zero would stand still, so one may be missing then."""
        wanted = int(spec.get("replicas", 1))
        rolling = (spec.get("strategy") or {}).get("rollingUpdate") or {}
        if (spec.get("strategy") or {}).get("type") == "Recreate":
            return cls(wanted, 0, 0)
        surge = count_or_share(rolling.get("maxSurge", "25%"), wanted, up=True)
        unavailable = count_or_share(rolling.get("maxUnavailable", "25%"), wanted, up=False)
        if not surge and not unavailable:
            unavailable = 1
        return cls(wanted, surge, min(unavailable, wanted))

    @property
    def most(self) -> int:
        """How many pods there may be at once."""
        return self.wanted + self.surge


@dataclass(frozen=True, slots=True)
class SetState:
    """One ReplicaSet: what it was told to have, what it has, and when it was made."""

    name: str
    replicas: int
    available: int = 0
    created: str = ""
    most: int = 0
    """`most` of the bounds under which `replicas` was decided; 0 when not known."""


Counts = dict[str, int]
"""Wanted replicas by ReplicaSet's name; only what changes."""


def rolling_step(bounds: Bounds, new: SetState | None, olds: Sequence[SetState]) -> Counts:
    """The next step of a rolling update: grow the new ReplicaSet, or else shrink the old ones."""
    new = new or SetState("", 0)
    grown = _grown(bounds, new, olds)
    if grown != new.replicas:
        return {new.name: grown}
    return _shrunk(bounds, new, olds)


def first_count(bounds: Bounds, olds: Sequence[SetState]) -> int:
    """With how many pods a new ReplicaSet begins."""
    return _grown(bounds, SetState("", 0), olds)


def _grown(bounds: Bounds, new: SetState, olds: Sequence[SetState]) -> int:
    if new.replicas >= bounds.wanted:
        return bounds.wanted
    room = bounds.most - new.replicas - sum(s.replicas for s in olds)
    return new.replicas + max(0, min(room, bounds.wanted - new.replicas))


def _shrunk(bounds: Bounds, new: SetState, olds: Sequence[SetState]) -> Counts:
    """First what is not available anyway, then available ones as far as enough remain; the oldest first."""
    total = new.replicas + sum(s.replicas for s in olds)
    least = bounds.wanted - bounds.unavailable
    room = total - least - max(0, new.replicas - new.available)
    if room <= 0:
        return {}
    counts = {s.name: s.replicas for s in olds}
    by_age = sorted(olds, key=lambda s: (s.created, s.name))
    for old in by_age:
        broken = min(room, max(0, counts[old.name] - old.available))
        counts[old.name] -= broken
        room -= broken
    available = new.available + sum(min(s.available, counts[s.name]) for s in olds)
    spare = max(0, available - least)
    for old in by_age:
        drop = min(spare, counts[old.name])
        counts[old.name] -= drop
        spare -= drop
    return {s.name: counts[s.name] for s in olds if counts[s.name] != s.replicas}


def recreate_step(bounds: Bounds, new: SetState | None, olds: Sequence[SetState], old_pods: int) -> Counts:
    """Recreate: the old pods go first; `old_pods` is how many of them still exist in any form."""
    if any(s.replicas for s in olds):
        return {s.name: 0 for s in olds if s.replicas}
    if old_pods or new is None or new.replicas == bounds.wanted:
        return {}
    return {new.name: bounds.wanted}


def scaled(bounds: Bounds, new: SetState | None, olds: Sequence[SetState], *, rolling: bool) -> Counts:
    """A change of `replicas`, shared among the active ReplicaSets in proportion to their size."""
    sets = [*([new] if new else []), *olds]
    active = [s for s in sets if s.replicas]
    if len(active) <= 1:
        only = active[0] if active else new
        return {only.name: bounds.wanted} if only and only.replicas != bounds.wanted else {}
    if new and new.replicas == bounds.wanted and new.available == bounds.wanted:
        return {s.name: 0 for s in olds if s.replicas}
    if not rolling:
        return {}
    total = sum(s.replicas for s in active)
    allowed = bounds.most if bounds.wanted else 0
    change = allowed - total
    by_size = sorted(active, key=lambda s: (-s.replicas, s.created if change < 0 else _reversed(s.created)))
    counts: Counts = {}
    added = 0
    for each in by_size:
        share = _share(each, allowed, total)
        left = change - added
        part = min(share, left) if change > 0 else max(share, left)
        part = max(part, 0) if change > 0 else min(part, 0)
        counts[each.name] = max(0, each.replicas + part)
        added += part
    if by_size and change != added:  # what rounding left over
        first = by_size[0].name
        counts[first] = max(0, counts[first] + change - added)
    return {s.name: counts[s.name] for s in by_size if counts[s.name] != s.replicas}


def _share(each: SetState, allowed: int, total: int) -> int:
    """By how much one ReplicaSet changes: its part of the new whole, rounded to the nearest."""
    if not allowed:
        return -each.replicas
    before = each.most or total
    return int(each.replicas * allowed / before + 0.5) - each.replicas


def _reversed(text: str) -> tuple[int, ...]:
    return tuple(-ord(c) for c in text)
