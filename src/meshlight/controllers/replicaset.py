"""Keeps the number of pods each ReplicaSet asks for.

`plan` is pure. The shell remembers pods it made or removed until the watch shows them, so that a
cache that lags never leads to too many.
"""

from __future__ import annotations

import copy

from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import Cache, Client
from meshlight.kube.resources import PODS, REPLICA_SETS, Object


def is_ready(pod: Object) -> bool:
    """Whether the pod's Ready condition holds."""
    conditions = pod.get("status", {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def controller_of(obj: Object) -> Object | None:
    """The owner reference that is the object's controller."""
    for owner in obj["metadata"].get("ownerReferences") or []:
        if owner.get("controller"):
            return owner  # type: ignore[no-any-return]
    return None


def plan(wanted: int, pods: list[Object]) -> tuple[int, list[Object]]:
    """How many pods to create, and which to delete: unplaced and unready ones, then the newest."""
    if len(pods) <= wanted:
        return wanted - len(pods), []
    newest = sorted(pods, key=lambda p: p["metadata"]["creationTimestamp"], reverse=True)
    ranked = sorted(newest, key=lambda p: (bool(p["spec"].get("nodeName")), is_ready(p)))
    return 0, ranked[: len(pods) - wanted]


def pod_of(owner: Object) -> Object:
    """A new pod from the ReplicaSet's template, owned by it."""
    template = copy.deepcopy(owner["spec"]["template"])
    meta = owner["metadata"]
    metadata = template.get("metadata") or {}
    reference = {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "name": meta["name"],
        "uid": meta["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": meta["name"] + "-",
            "namespace": meta["namespace"],
            "labels": metadata.get("labels") or {},
            "annotations": metadata.get("annotations") or {},
            "ownerReferences": [reference],
        },
        "spec": template["spec"],
    }


class ReplicaSets:
    """Reconciles ReplicaSets from the caches of ReplicaSets and pods."""

    def __init__(self, client: Client, sets: Cache, pods: Cache) -> None:
        self.client, self.sets, self.pods = client, sets, pods
        self.queue = WorkQueue("replicaset", self.reconcile)
        self._created: dict[str, dict[str, Object]] = {}
        self._deleted: set[str] = set()
        sets.on_change(self._set_changed)
        pods.on_change(self._pod_changed)

    def _set_changed(self, old: Object | None, new: Object | None) -> None:
        meta = (new or old or {})["metadata"]
        if new is None:
            self._created.pop(meta["uid"], None)
        self.queue.add((meta["namespace"], meta["name"]))

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        pod = new or old or {}
        uid = pod["metadata"]["uid"]
        if new is None:
            self._deleted.discard(uid)
        owner = controller_of(pod)
        if owner and owner["kind"] == "ReplicaSet":
            self._created.get(owner["uid"], {}).pop(uid, None)
            self.queue.add((pod["metadata"]["namespace"], owner["name"]))

    async def reconcile(self, key: Key) -> None:
        """Create or delete pods of one ReplicaSet and write its status."""
        owner = self.sets.objects.get(key)
        if owner is None:
            return
        uid = owner["metadata"]["uid"]
        unseen = self._created.setdefault(uid, {})
        seen = [
            p
            for p in self.pods.objects.values()
            if (controller_of(p) or {}).get("uid") == uid
            and not p["metadata"].get("deletionTimestamp")
            and p["metadata"]["uid"] not in self._deleted
            and p.get("status", {}).get("phase") not in ("Succeeded", "Failed")
        ]
        if not owner["metadata"].get("deletionTimestamp"):
            create, surplus = plan(owner["spec"].get("replicas", 1), [*seen, *unseen.values()])
            for _ in range(create):
                made = await self.client.create(PODS, pod_of(owner))
                if self.pods.get(made["metadata"]["name"], key[0]) is None:
                    unseen[made["metadata"]["uid"]] = made
            for pod in surplus:
                await self.client.delete(PODS, pod["metadata"]["name"], key[0])
                self._deleted.add(pod["metadata"]["uid"])
        ready = sum(is_ready(p) for p in seen)
        status = {
            "replicas": len(seen),
            "fullyLabeledReplicas": len(seen),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "observedGeneration": owner["metadata"].get("generation", 0),
        }
        known = owner.get("status") or {}
        if any(known.get(k, 0) != v for k, v in status.items()):
            await self.client.patch(REPLICA_SETS, key[1], {"status": status}, key[0], subresource="status")
