"""ResourceQuotas: what a namespace uses of what it may use. Admission asks their status.

What is used is `quota_usage`'s to count.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshlight.controllers.ownership import Dependents
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.quota_usage import used
from meshlight.kube.resources import CONFIG_MAPS, RESOURCE_QUOTAS, SECRETS, Object

_RECOUNT = 30.0
"""Seconds between counts of what is not watched."""


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
