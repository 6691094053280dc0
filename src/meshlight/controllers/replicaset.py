"""Keeps the number of pods each ReplicaSet asks for.

`plan` and `status` are pure; the shell creates and deletes pods and says so in Events.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial

from meshlight.controllers.ownership import Dependents, side_by_side
from meshlight.controllers.pods import (
    clock,
    condition,
    controller_of,
    deletion_order,
    from_template,
    is_active,
    is_available,
    is_ready,
    is_terminating,
    labels,
    reference,
    soonest,
    stamp,
)
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import REPLICA_SETS, Object
from meshlight.kube.selectors import match_labels

_BURST = 500
_WORKERS = 4


def plan(wanted: int, pods: Sequence[Object]) -> tuple[int, list[Object]]:
    """How many pods to create, and which of the active ones to delete."""
    if len(pods) <= wanted:
        return wanted - len(pods), []
    return 0, deletion_order(pods)[: len(pods) - wanted]


def status(item: Object, pods: Sequence[Object], refused: str, now: datetime) -> Object:
    """The status of a ReplicaSet with these active pods; `refused` is why the API took no more of them."""
    spec = item["spec"]
    min_ready = spec.get("minReadySeconds") or 0
    wanted = (spec["template"].get("metadata") or {}).get("labels") or {}
    made: Object = {
        "replicas": len(pods),
        "fullyLabeledReplicas": sum(match_labels({"matchLabels": wanted}, labels(p)) for p in pods),
        "readyReplicas": sum(is_ready(p) for p in pods),
        "availableReplicas": sum(is_available(p, min_ready, now) for p in pods),
        "observedGeneration": item["metadata"].get("generation", 0),
    }
    before = condition(item, "ReplicaFailure")
    kept = [c for c in (item.get("status") or {}).get("conditions") or [] if c["type"] != "ReplicaFailure"]
    if refused:
        failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": refused}
        failure["lastTransitionTime"] = before.get("lastTransitionTime") or stamp(now)
        kept.append(failure)
    if kept or before:
        made["conditions"] = kept
    return made


class ReplicaSets:
    """Reconciles ReplicaSets from the caches of ReplicaSets and pods."""

    def __init__(self, client: Client, sets: Cache, pods: Dependents, recorder: Recorder) -> None:
        self.client, self.sets, self.pods, self.recorder = client, sets, pods, recorder
        self.queue = WorkQueue("replicaset", self.reconcile, _WORKERS)
        sets.on_change(self._changed)
        pods.cache.on_change(self._pod_changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        metadata = (new or old or {})["metadata"]
        self.queue.add((metadata["namespace"], metadata["name"]))

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        for pod in (old, new):
            if pod is None:
                continue
            owner = controller_of(pod)
            namespace = pod["metadata"]["namespace"]
            if owner and owner["kind"] == "ReplicaSet":
                self.queue.add((namespace, owner["name"]))
            elif owner is None and labels(pod):
                for key, item in self.sets.objects.items():
                    if key[0] == namespace and match_labels(item["spec"].get("selector"), labels(pod)):
                        self.queue.add(key)

    async def reconcile(self, key: Key) -> None:
        """Create or delete pods of one ReplicaSet and write its status."""
        item = self.sets.objects.get(key)
        if item is None:
            return
        await self.pods.claim(item, "apps/v1", "ReplicaSet")
        refused = ""
        failure: ApiError | None = None
        if not is_terminating(item):
            active = self._active(item)
            create, surplus = plan(item["spec"].get("replicas", 1), active)
            try:
                await side_by_side([partial(self._create, item)] * min(create, _BURST))
                await side_by_side(partial(self._delete, item, pod) for pod in surplus[:_BURST])
            except ApiError as error:
                failure, refused = error, error.message
        now = clock()
        active = self._active(item)
        min_ready = item["spec"].get("minReadySeconds") or 0
        await self._write_status(item, status(item, active, refused, now))
        if (wait := soonest(active, min_ready, now)) is not None:
            self.queue.add_after(key, wait)
        if failure is not None:
            raise failure

    def _active(self, item: Object) -> list[Object]:
        return [p for p in self.pods.of(item["metadata"]["uid"]) if is_active(p)]

    async def _create(self, item: Object) -> None:
        pod = from_template(item, reference(item, "apps/v1", "ReplicaSet"), item["spec"]["template"])
        try:
            made = await self.pods.create(pod)
        except ApiError as error:
            if error.code == 404 or "being terminated" in error.message:
                return  # the namespace is going
            self.recorder.record(item, "Warning", "FailedCreate", f"Error creating: {error.message}")
            raise
        words = f"Created pod: {made['metadata']['name']}"
        self.recorder.record(item, "Normal", "SuccessfulCreate", words)

    async def _delete(self, item: Object, pod: Object) -> None:
        await self.pods.delete(pod)
        words = f"Deleted pod: {pod['metadata']['name']}"
        self.recorder.record(item, "Normal", "SuccessfulDelete", words)

    async def _write_status(self, item: Object, made: Object) -> None:
        known = item.get("status") or {}
        if any(known.get(k, 0) != v for k, v in made.items()):
            metadata = item["metadata"]
            try:
                answer = await self.client.patch(
                    REPLICA_SETS,
                    metadata["name"],
                    {"status": made},
                    metadata["namespace"],
                    subresource="status",
                )
            except ApiError as error:
                if error.code != 404:
                    raise
                return
            self.sets.wrote(answer)
