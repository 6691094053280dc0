"""Evicts pods from nodes with NoExecute taints that they do not tolerate, or no longer.

`eviction_in` is pure. Pods of nodes that are no longer there, and of nodes that cannot be reached any more
although they are being deleted, are removed from the API without their kubelet.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from meshlight.controllers.node_filters import tolerates
from meshlight.controllers.ownership import Dependents
from meshlight.controllers.pods import clock, is_finished, is_terminating, moment, stamp
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import NODES, PODS, Object

_COMPONENT = "taint-eviction-controller"


def eviction_in(pod: Object, node: Object, seen: Mapping[str, datetime], now: datetime) -> float | None:
    """Seconds until a pod has to leave a node for its taints; None when it may stay.

    `seen` says since when the node has taints that do not say so themselves, by key.
    """
    waits: list[float] = []
    for taint in node["spec"].get("taints") or []:
        if taint.get("effect") != "NoExecute":
            continue
        matching = [t for t in pod["spec"].get("tolerations") or [] if tolerates(t, taint)]
        if not matching:
            return 0.0
        limits = [t["tolerationSeconds"] for t in matching if t.get("tolerationSeconds") is not None]
        if len(limits) < len(matching):
            continue  # one of them has no end
        since = moment(taint["timeAdded"]) if taint.get("timeAdded") else seen.get(taint["key"], now)
        waits.append(max(0.0, min(limits) - (now - since).total_seconds()))
    return min(waits, default=None)


class TaintEviction:
    """Reconciles pods that have a node, from the caches of pods and nodes."""

    def __init__(self, client: Client, pods: Dependents, nodes: Cache, recorder: Recorder) -> None:
        self.client, self.pods, self.nodes, self.recorder = client, pods, nodes, recorder
        self.queue = WorkQueue("taint-eviction", self.reconcile)
        self._seen: dict[str, dict[str, datetime]] = {}
        pods.cache.on_change(self._pod_changed)
        nodes.on_change(self._node_changed)

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        node = new["spec"].get("nodeName") if new else None
        if new is None or not node:
            return
        found = self.nodes.get(node)
        tainted = found is None or any(
            t.get("effect") == "NoExecute" for t in found["spec"].get("taints") or []
        )
        if tainted:
            self.queue.add((new["metadata"]["namespace"], new["metadata"]["name"]))

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        if old is not None and new is not None and old["spec"].get("taints") == new["spec"].get("taints"):
            return
        name = (new or old or {})["metadata"]["name"]
        keys = [t["key"] for t in (new["spec"].get("taints") or [] if new else [])]
        known = self._seen.pop(name, {})
        if keys:
            self._seen[name] = {k: known.get(k, clock()) for k in keys}
        elif new is not None:
            return
        for key, pod in self.pods.cache.objects.items():
            if pod["spec"].get("nodeName") == name:
                self.queue.add(key)

    async def reconcile(self, key: Key) -> None:
        """Evict one pod if its time has come."""
        pod = self.pods.cache.objects.get(key)
        if pod is None or not pod["spec"].get("nodeName"):
            return
        node = self.nodes.get(pod["spec"]["nodeName"])
        if node is None:
            await self._remove(pod)
            return
        if is_terminating(pod) or is_finished(pod):
            return
        wait = eviction_in(pod, node, self._seen.get(node["metadata"]["name"], {}), clock())
        if wait is None:
            return
        if wait > 0:
            self.queue.add_after(key, wait + 0.01)
            return
        words = f"Marking for deletion Pod {key[0]}/{key[1]}"
        self.recorder.record(pod, "Normal", "TaintManagerEviction", words, component=_COMPONENT)
        target = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "DeletionByTaintManager",
            "message": "Taint manager: deleting due to NoExecute taint",
            "lastTransitionTime": stamp(clock()),
        }
        others = [c for c in (pod.get("status") or {}).get("conditions") or [] if c["type"] != target["type"]]
        await self.pods.patch(pod, {"status": {"conditions": [*others, target]}}, "status")
        await self.pods.delete(pod)

    async def _remove(self, pod: Object) -> None:
        """Its node is gone, and with it the kubelet that would have ended it, if the API says so as well."""
        try:
            await self.client.get(NODES, pod["spec"]["nodeName"])
            return
        except ApiError as error:
            if error.code != 404:
                raise
        metadata = pod["metadata"]
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}}
        try:
            await self.client.request("DELETE", PODS.path(metadata["namespace"], metadata["name"]), options)
        except ApiError as error:
            if error.code not in (404, 409):
                raise
