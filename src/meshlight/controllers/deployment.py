"""Turns each Deployment into ReplicaSets, so that a new template replaces the old step by step.

`targets` is the pure arithmetic of a rollout; scaling carries the resourceVersion it was computed
from, so a lagging cache ends in a conflict and a retry.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from datetime import UTC, datetime

from meshlight.controllers.replicaset import controller_of
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import DEPLOYMENTS, REPLICA_SETS, Object, Resource

REVISION = "deployment.kubernetes.io/revision"


def bound(value: int | str, wanted: int, *, up: bool) -> int:
    """A count or percentage of `wanted`, rounded up (surge) or down (unavailable)."""
    if isinstance(value, int):
        return value
    share = int(value.rstrip("%")) * wanted / 100
    return math.ceil(share) if up else math.floor(share)


def targets(
    wanted: int, new: int, new_available: int, old: int, surge: int, unavailable: int
) -> tuple[int, int]:
    """The next replica counts (new, old) of a rolling update, given the present ones."""
    if surge == 0 and unavailable == 0:
        unavailable = 1
    grown = wanted if new > wanted else max(new, min(wanted, wanted + surge - old))
    spare = new + old - (wanted - unavailable) - (new - min(new, new_available))
    return grown, max(0, old - max(0, spare))


def conditions(item: Object, fresh: Object | None, status: Object, now: str) -> list[Object]:
    """Available and Progressing as Kubernetes words them; unchanged ones keep their times (`now` else)."""
    spec = item["spec"]
    wanted = spec.get("replicas", 1)
    rolling = (spec.get("strategy") or {}).get("rollingUpdate") or {}
    missing = bound(rolling.get("maxUnavailable", "25%"), wanted, up=False)
    available = status["availableReplicas"] >= wanted - missing
    done = (
        status["updatedReplicas"] == wanted
        and status["replicas"] == wanted
        and status["availableReplicas"] >= wanted
    )
    name = fresh["metadata"]["name"] if fresh else ""
    if done:
        progress = ("NewReplicaSetAvailable", f'ReplicaSet "{name}" has successfully progressed.')
    elif fresh is None:
        progress = ("NewReplicaSetCreated", "Created new replica set")
    else:
        progress = ("ReplicaSetUpdated", f'ReplicaSet "{name}" is progressing.')
    found: list[Object] = [
        {
            "type": "Available",
            "status": "True" if available else "False",
            "reason": f"MinimumReplicas{'Available' if available else 'Unavailable'}",
            "message": f"Deployment {'has' if available else 'does not have'} minimum availability.",
        },
        {"type": "Progressing", "status": "True", "reason": progress[0], "message": progress[1]},
    ]
    before = {c["type"]: c for c in (item.get("status") or {}).get("conditions") or []}
    for condition in found:
        known = before.get(condition["type"], {})
        same = all(known.get(k) == v for k, v in condition.items())
        turned = known.get("status") != condition["status"]
        condition["lastUpdateTime"] = known["lastUpdateTime"] if same else now
        condition["lastTransitionTime"] = now if turned else known["lastTransitionTime"]
    kept = [c for c in before.values() if c["type"] not in ("Available", "Progressing")]
    return [*found, *kept]


def now() -> str:
    """The time as `metav1.Time` has it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _revision_of(item: Object) -> int:
    return int((item["metadata"].get("annotations") or {}).get(REVISION, "0"))


def revision(fresh: Object | None, olds: list[Object]) -> int:
    """The number of the present template: one more than any other's, kept while it is the newest."""
    newest = max((_revision_of(s) for s in olds), default=0)
    present = _revision_of(fresh) if fresh else 0
    return present if present > newest else newest + 1


class Deployments:
    """Reconciles Deployments from the caches of Deployments and ReplicaSets."""

    def __init__(self, client: Client, deployments: Cache, sets: Cache) -> None:
        self.client, self.deployments, self.sets = client, deployments, sets
        self.queue = WorkQueue("deployment", self.reconcile)
        deployments.on_change(self._changed)
        sets.on_change(self._set_changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        meta = (new or old or {})["metadata"]
        self.queue.add((meta["namespace"], meta["name"]))

    def _set_changed(self, old: Object | None, new: Object | None) -> None:
        obj = new or old or {}
        owner = controller_of(obj)
        if owner and owner["kind"] == "Deployment":
            self.queue.add((obj["metadata"]["namespace"], owner["name"]))

    async def _scale(self, item: Object, count: int) -> None:
        meta = item["metadata"]
        if item["spec"].get("replicas", 1) != count:
            version = {"resourceVersion": meta["resourceVersion"]}
            patch = {"metadata": version, "spec": {"replicas": count}}
            await self.client.patch(REPLICA_SETS, meta["name"], patch, meta["namespace"])

    async def reconcile(self, key: Key) -> None:
        """Take one step of the rollout of one Deployment and write its status."""
        item = self.deployments.objects.get(key)
        if item is None or item["metadata"].get("deletionTimestamp"):
            return
        meta, spec = item["metadata"], item["spec"]
        text = json.dumps(spec["template"], sort_keys=True).encode()
        digest = hashlib.sha256(text).hexdigest()[:10]
        name = f"{key[1]}-{digest}"
        mine = [s for s in self.sets.objects.values() if (controller_of(s) or {}).get("uid") == meta["uid"]]
        fresh = next((s for s in mine if s["metadata"]["name"] == name), None)
        olds = [s for s in mine if s is not fresh]
        wanted = spec.get("replicas", 1)
        strategy = spec.get("strategy") or {}
        rolling = strategy.get("rollingUpdate") or {}
        new = fresh["spec"].get("replicas", 1) if fresh else 0
        ready = fresh.get("status", {}).get("readyReplicas", 0) if fresh else 0
        old = sum(s["spec"].get("replicas", 1) for s in olds)
        if strategy.get("type") == "Recreate":
            alive = any(s.get("status", {}).get("replicas", 0) for s in olds)
            grown, left = (0 if old or alive else wanted), 0
        else:
            surge = bound(rolling.get("maxSurge", "25%"), wanted, up=True)
            missing = bound(rolling.get("maxUnavailable", "25%"), wanted, up=False)
            grown, left = targets(wanted, new, ready, old, surge, missing)
        number = revision(fresh, olds)
        if fresh is None:
            await self._create(item, name, digest, grown, number)
        else:
            await self._number(REPLICA_SETS, fresh, number)
            await self._scale(fresh, grown)
        await self._number(DEPLOYMENTS, item, number)
        surplus = old - left
        for stale in sorted(olds, key=lambda s: s.get("status", {}).get("readyReplicas", 0)):
            count = stale["spec"].get("replicas", 1)
            drop = min(count, surplus)
            surplus -= drop
            await self._scale(stale, count - drop)
        await self._prune(olds, spec.get("revisionHistoryLimit", 10))
        await self._write_status(item, mine, fresh, wanted)

    async def _number(self, resource: Resource, obj: Object, number: int) -> None:
        meta = obj["metadata"]
        if (meta.get("annotations") or {}).get(REVISION) != str(number):
            patch = {"metadata": {"annotations": {REVISION: str(number)}}}
            changed = await self.client.patch(resource, meta["name"], patch, meta["namespace"])
            # Scaling states the version it saw; ours is now a newer one.
            meta["resourceVersion"] = changed["metadata"]["resourceVersion"]

    async def _prune(self, olds: list[Object], limit: int) -> None:
        """Delete the oldest empty ReplicaSets beyond the history that is kept for `rollout undo`."""
        empty = [
            s for s in olds if not s["spec"].get("replicas", 1) and not s.get("status", {}).get("replicas", 0)
        ]
        for stale in sorted(empty, key=_revision_of)[: max(0, len(empty) - limit)]:
            meta = stale["metadata"]
            await self.client.delete(REPLICA_SETS, meta["name"], meta["namespace"])

    async def _create(self, item: Object, name: str, digest: str, count: int, number: int) -> None:
        meta, mark = item["metadata"], {"pod-template-hash": digest}
        template = copy.deepcopy(item["spec"]["template"])
        labels = {**(template["metadata"].get("labels") or {}), **mark}
        template["metadata"]["labels"] = labels
        selector = copy.deepcopy(item["spec"]["selector"])
        selector["matchLabels"] = {**(selector.get("matchLabels") or {}), **mark}
        owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": meta["name"]}
        owner |= {"uid": meta["uid"], "controller": True, "blockOwnerDeletion": True}
        made = {
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {
                "name": name,
                "namespace": meta["namespace"],
                "labels": labels,
                "annotations": {REVISION: str(number)},
                "ownerReferences": [owner],
            },
            "spec": {"replicas": count, "selector": selector, "template": template},
        }
        try:
            await self.client.create(REPLICA_SETS, made)
        except ApiError as error:
            if error.code != 409:
                raise

    async def _write_status(self, item: Object, mine: list[Object], fresh: Object | None, wanted: int) -> None:
        ready = sum(s.get("status", {}).get("readyReplicas", 0) for s in mine)
        status: Object = {
            "observedGeneration": item["metadata"].get("generation", 0),
            "replicas": sum(s.get("status", {}).get("replicas", 0) for s in mine),
            "updatedReplicas": (fresh or {}).get("status", {}).get("replicas", 0),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "unavailableReplicas": max(0, wanted - ready),
        }
        known = item.get("status") or {}
        status["conditions"] = conditions(item, fresh, status, now())
        if any(known.get(k, 0) != v for k, v in status.items()):
            meta = item["metadata"]
            await self.client.patch(
                DEPLOYMENTS,
                meta["name"],
                {"status": status},
                meta["namespace"],
                subresource="status",
            )
