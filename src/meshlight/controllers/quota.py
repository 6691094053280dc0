"""ResourceQuotas: what a namespace uses of what it may use. Admission asks their status.

`used` is pure. Rules: Kubernetes' "Resource Quotas" (compute resources, counts of objects, scopes).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from meshlight.controllers.ownership import Dependents
from meshlight.controllers.pod_resources import pod_requests
from meshlight.controllers.pods import is_finished
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube import quantity
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import CONFIG_MAPS, RESOURCE_QUOTAS, SECRETS, Object

_COUNTS = {
    "pods": "pods", "services": "services", "secrets": "secrets", "configmaps": "configmaps",
    "persistentvolumeclaims": "persistentvolumeclaims", "resourcequotas": "resourcequotas",
    "replicationcontrollers": "replicationcontrollers",
}  # fmt: skip
_RECOUNT = 30.0
"""Seconds between counts of what is not watched."""
_COMPUTE = ("cpu", "memory", "ephemeral-storage")


def in_scope(quota: Object, pod: Object) -> bool:
    """Whether a quota's scopes mean a pod."""
    spec = quota["spec"]
    rules = [{"scopeName": s, "operator": "Exists"} for s in spec.get("scopes") or []]
    rules += (spec.get("scopeSelector") or {}).get("matchExpressions") or []
    return all(_matches(rule, pod) for rule in rules)


def _matches(rule: Mapping[str, Any], pod: Object) -> bool:
    effort = (pod.get("status") or {}).get("qosClass") == "BestEffort"
    ends = pod["spec"].get("activeDeadlineSeconds") is not None
    match rule["scopeName"]:
        case "BestEffort":
            return effort
        case "NotBestEffort":
            return not effort
        case "Terminating":
            return ends
        case "NotTerminating":
            return not ends
        case "PriorityClass":
            name, values = pod["spec"].get("priorityClassName") or "", rule.get("values") or []
            operator = rule.get("operator", "Exists")
            held = {
                "In": name in values,
                "NotIn": name not in values,
                "Exists": bool(name),
                "DoesNotExist": not name,
            }
            return held[operator]
    return True


def used(quota: Object, pods: Iterable[Object], counts: Mapping[str, int], claims: Iterable[Object]) -> Object:
    """What is used of each bounded resource; `counts` are objects of the namespace by plural name."""
    mine = [p for p in pods if not is_finished(p) and in_scope(quota, p)]
    totals: dict[str, int] = {}
    for pod in mine:
        for kind in ("requests", "limits"):
            for name, amount in pod_requests(pod["spec"], kind).items():
                totals[f"{kind}.{name}"] = totals.get(f"{kind}.{name}", 0) + amount
    found: Object = {}
    for name in quota["spec"].get("hard") or {}:
        asked = f"requests.{name}" if name in _COMPUTE else name
        if name == "pods" or name == "count/pods":
            found[name] = str(len(mine))
        elif name == "requests.storage":
            amounts = [
                (c["spec"].get("resources") or {}).get("requests", {}).get("storage", "0") for c in claims
            ]
            found[name] = _bytes(int(sum((quantity.value(a) for a in amounts), Decimal(0))))
        elif asked.partition(".")[0] in ("requests", "limits"):
            amount = totals.get(asked, 0)
            found[name] = quantity.canonical(f"{amount}m") if asked.endswith(".cpu") else _bytes(amount)
        elif name.startswith("count/"):
            found[name] = str(counts.get(name[6:].partition(".")[0], 0))
        else:
            found[name] = str(counts.get(_COUNTS.get(name, name), 0))
    return found


def _bytes(amount: int) -> str:
    text = f"{amount >> 10}Ki" if amount and amount % 1024 == 0 else str(amount)
    return quantity.canonical(text)


class Quotas:
    """Reconciles ResourceQuotas from the caches of quotas, pods and claims, and of what else is counted."""

    def __init__(
        self, client: Client, quotas: Cache, pods: Dependents, claims: Cache, counted: Iterable[Cache]
    ) -> None:
        self.client, self.quotas, self.pods, self.claims = client, quotas, pods, claims
        self.counted = {c.resource.plural: c for c in counted}
        self.queue = WorkQueue("resourcequota", self.reconcile)
        quotas.on_change(self._namespace_changed)
        for cache in (pods.cache, claims, *self.counted.values()):
            cache.on_change(self._namespace_changed)

    def _namespace_changed(self, old: Object | None, new: Object | None) -> None:
        if not self.quotas.objects:
            return
        namespace = (new or old or {})["metadata"].get("namespace", "")
        for key in self.quotas.objects:
            if key[0] == namespace:
                self.queue.add(key)

    async def reconcile(self, key: Key) -> None:
        """Write one quota's status."""
        quota = self.quotas.objects.get(key)
        if quota is None:
            return
        pods = [p for k, p in self.pods.cache.objects.items() if k[0] == key[0]]
        claims = [c for k, c in self.claims.objects.items() if k[0] == key[0]]
        counts = {
            plural: sum(k[0] == key[0] for k in cache.objects)
            for plural, cache in {**self.counted, "persistentvolumeclaims": self.claims}.items()
        }
        for resource in (CONFIG_MAPS, SECRETS):  # too large to be kept for the rare quota that counts them
            if {resource.plural, f"count/{resource.plural}"} & (quota["spec"].get("hard") or {}).keys():
                counts[resource.plural] = len((await self.client.list(resource, key[0])).items)
                self.queue.add_after(key, _RECOUNT)
        made = {"hard": quota["spec"].get("hard") or {}, "used": used(quota, pods, counts, claims)}
        known = quota.get("status") or {}
        if any(known.get(k) != v for k, v in made.items()):
            try:
                answer = await self.client.patch(
                    RESOURCE_QUOTAS, key[1], {"status": made}, key[0], subresource="status"
                )
            except ApiError as error:
                if error.code != 404:
                    raise
                return
            self.quotas.wrote(answer)
