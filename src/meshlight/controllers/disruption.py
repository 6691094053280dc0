"""PodDisruptionBudgets: how many pods of each may be disturbed now. Evictions and preemption ask their status.

`budget_status` is pure. Rules: Kubernetes' "Specifying a Disruption Budget".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from meshlight.controllers.ownership import Dependents
from meshlight.controllers.pods import (
    clock,
    condition,
    controller_of,
    count_or_share,
    is_finished,
    is_ready,
    is_terminating,
    labels,
    moment,
    stamp,
)
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import POD_DISRUPTION_BUDGETS, Object
from meshlight.kube.selectors import match_labels

_FORGET_AFTER = timedelta(seconds=120)
"""How long an evicted pod counts as disturbed although it still seems well."""


def covers(budget: Object, pod: Object) -> bool:
    """Whether a budget is about a pod."""
    return bool(
        budget["metadata"].get("namespace") == pod["metadata"].get("namespace")
        and match_labels(budget["spec"].get("selector"), labels(pod))
    )


def budget_status(budget: Object, pods: Sequence[Object], expected: int, now: datetime) -> Object:
    """The status of a budget over these pods, of which their controllers want `expected`."""
    spec, before = budget["spec"], budget.get("status") or {}
    counted = [p for p in pods if not is_finished(p)]
    if (unavailable := spec.get("maxUnavailable")) is not None:
        desired = max(0, expected - count_or_share(unavailable, expected, up=True))
    else:
        least = spec.get("minAvailable", 1)
        if isinstance(least, int):
            expected = len(counted)
        desired = count_or_share(least, expected, up=True)
    present = {p["metadata"]["name"] for p in counted if not is_terminating(p)}
    disrupted = {
        name: when
        for name, when in (before.get("disruptedPods") or {}).items()
        if name in present and now - moment(when) < _FORGET_AFTER
    }
    healthy = sum(
        is_ready(p) and not is_terminating(p) and p["metadata"]["name"] not in disrupted for p in counted
    )
    allowed = max(0, healthy - desired) if expected else 0
    made: Object = {
        "currentHealthy": healthy,
        "desiredHealthy": desired,
        "expectedPods": expected,
        "disruptionsAllowed": allowed,
        "observedGeneration": budget["metadata"].get("generation", 0),
        "disruptedPods": disrupted or None,
    }
    known = condition(budget, "DisruptionAllowed")
    holds = "True" if allowed else "False"
    made["conditions"] = [
        {
            "type": "DisruptionAllowed",
            "status": holds,
            "reason": "SufficientPods" if allowed else "InsufficientPods",
            "message": "",
            "observedGeneration": made["observedGeneration"],
            "lastTransitionTime": known.get("lastTransitionTime")
            if known.get("status") == holds
            else stamp(now),
        }
    ]
    return made


Expected = Callable[[str, str, str], int | None]
"""How many pods the controller of (namespace, kind, name) wants; None when it is not known."""


class Disruption:
    """Reconciles budgets from the caches of budgets and pods."""

    def __init__(self, client: Client, budgets: Cache, pods: Dependents, expected: Expected) -> None:
        self.client, self.budgets, self.pods, self.expected = client, budgets, pods, expected
        self.queue = WorkQueue("disruption", self.reconcile)
        budgets.on_change(self._changed)
        pods.cache.on_change(self._pod_changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        if new is not None:
            self.queue.add((new["metadata"]["namespace"], new["metadata"]["name"]))

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        for key, budget in self.budgets.objects.items():
            if any(pod is not None and covers(budget, pod) for pod in (old, new)):
                self.queue.add(key)

    async def reconcile(self, key: Key) -> None:
        """Write one budget's status."""
        budget = self.budgets.objects.get(key)
        if budget is None:
            return
        pods = [p for p in self.pods.cache.objects.values() if covers(budget, p)]
        now = clock()
        made = budget_status(budget, pods, self._expected(key[0], pods), now)
        known = budget.get("status") or {}
        if any(known.get(k) != v for k, v in made.items()):
            try:
                answer = await self.client.patch(
                    POD_DISRUPTION_BUDGETS, key[1], {"status": made}, key[0], subresource="status"
                )
            except ApiError as error:
                if error.code != 404:
                    raise
                return
            self.budgets.wrote(answer)
        if made["disruptedPods"]:
            self.queue.add_after(key, _FORGET_AFTER.total_seconds())

    def _expected(self, namespace: str, pods: Sequence[Object]) -> int:
        """The sum of what the pods' controllers want; a pod without one counts for itself."""
        owners, total = set(), 0
        for pod in pods:
            owner = controller_of(pod)
            if owner is None:
                total += 1
                continue
            if owner["uid"] in owners:
                continue
            owners.add(owner["uid"])
            wanted = self.expected(namespace, owner["kind"], owner["name"])
            if wanted is None:
                wanted = sum((controller_of(p) or {}).get("uid") == owner["uid"] for p in pods)
            total += wanted
        return total
