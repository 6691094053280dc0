"""Keeps one pod of each DaemonSet on every node that may run it, and rolls template changes out.

`placement` is pure. Pods are made with their node given, as they tolerate what keeps others away.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable

from meshlight.controllers.deployment import bound
from meshlight.controllers.replicaset import controller_of, is_ready
from meshlight.controllers.scheduler import refusal
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import Cache, Client
from meshlight.kube.resources import DAEMON_SETS, PODS, Object

HASH = "controller-revision-hash"
_TOLERATED = (
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
)


def revision(item: Object) -> str:
    """A short hash of the template: which pods are of the present one."""
    text = json.dumps(item["spec"]["template"], sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:10]


def pod_of(item: Object, node: str) -> Object:
    """The pod of a DaemonSet for a node."""
    meta = item["metadata"]
    template = copy.deepcopy(item["spec"]["template"])
    metadata = template.get("metadata") or {}
    spec = template["spec"]
    spec["nodeName"] = node
    tolerations = [{"key": k, "operator": "Exists", "effect": e} for k, e in _TOLERATED]
    spec["tolerations"] = [*(spec.get("tolerations") or []), *tolerations]
    owner = {"apiVersion": "apps/v1", "kind": "DaemonSet", "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": meta["name"] + "-",
            "namespace": meta["namespace"],
            "labels": {**(metadata.get("labels") or {}), HASH: revision(item)},
            "annotations": metadata.get("annotations") or {},
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
        },
        "spec": spec,
    }


def eligible(item: Object, node: Object) -> bool:
    """Whether the DaemonSet wants a pod on the node; readiness and cordons do not matter to it."""
    trial = pod_of(item, node["metadata"]["name"])
    able = copy.deepcopy(node)
    able["spec"].pop("unschedulable", None)
    able["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}
    return refusal(trial, able) is None


def placement(item: Object, nodes: Iterable[Object], pods: Iterable[Object]) -> tuple[list[str], list[Object]]:
    """Nodes that lack their pod, and pods to delete (misplaced, doubled, ended, or of an old template)."""
    wanted = {n["metadata"]["name"] for n in nodes if eligible(item, n)}
    kept: dict[str, Object] = {}
    surplus, stale = [], []
    for pod in sorted(pods, key=lambda p: (not is_ready(p), p["metadata"]["creationTimestamp"])):
        node = pod["spec"].get("nodeName")
        ended = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
        if node not in wanted or node in kept or ended:
            surplus.append(pod)
            continue
        kept[node] = pod
        if (pod["metadata"].get("labels") or {}).get(HASH) != revision(item):
            stale.append(pod)
    strategy = item["spec"].get("updateStrategy") or {}
    if strategy.get("type", "RollingUpdate") == "RollingUpdate" and stale:
        limit = (strategy.get("rollingUpdate") or {}).get("maxUnavailable", 1)
        allowed = max(1, bound(limit, len(wanted), up=True))
        missing = len(wanted - kept.keys()) + sum(not is_ready(p) for p in kept.values())
        broken = [p for p in stale if not is_ready(p)]
        working = [p for p in stale if is_ready(p)]
        surplus += broken + working[: max(0, allowed - missing)]
    return sorted(wanted - kept.keys()), surplus


class DaemonSets:
    """Reconciles DaemonSets from the caches of DaemonSets, pods and nodes."""

    def __init__(self, client: Client, items: Cache, pods: Cache, nodes: Cache) -> None:
        self.client, self.items, self.pods, self.nodes = client, items, pods, nodes
        self.queue = WorkQueue("daemonset", self.reconcile)
        self._created: dict[str, dict[str, Object]] = {}
        self._deleted: set[str] = set()
        items.on_change(self._changed)
        pods.on_change(self._pod_changed)
        nodes.on_change(self._node_changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        meta = (new or old or {})["metadata"]
        if new is None:
            self._created.pop(meta["uid"], None)
        self.queue.add((meta["namespace"], meta["name"]))

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        def relevant(node: Object | None) -> object:
            return node and (node["metadata"].get("labels"), node["spec"])

        if relevant(old) != relevant(new):
            for key in self.items.objects:
                self.queue.add(key)

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        pod = new or old or {}
        uid = pod["metadata"]["uid"]
        if new is None:
            self._deleted.discard(uid)
        owner = controller_of(pod)
        if owner and owner["kind"] == "DaemonSet":
            self._created.get(owner["uid"], {}).pop(uid, None)
            self.queue.add((pod["metadata"]["namespace"], owner["name"]))

    async def reconcile(self, key: Key) -> None:
        """Make what is missing of one DaemonSet, delete what is too much, and write its status."""
        item = self.items.objects.get(key)
        if item is None or item["metadata"].get("deletionTimestamp"):
            return
        uid = item["metadata"]["uid"]
        unseen = self._created.setdefault(uid, {})
        seen = [
            p
            for p in self.pods.objects.values()
            if (controller_of(p) or {}).get("uid") == uid
            and not p["metadata"].get("deletionTimestamp")
            and p["metadata"]["uid"] not in self._deleted
        ]
        nodes = list(self.nodes.objects.values())
        lacking, surplus = placement(item, nodes, [*seen, *unseen.values()])
        for node in lacking:
            made = await self.client.create(PODS, pod_of(item, node))
            if self.pods.get(made["metadata"]["name"], key[0]) is None:
                unseen[made["metadata"]["uid"]] = made
        for pod in surplus:
            await self.client.delete(PODS, pod["metadata"]["name"], key[0])
            self._deleted.add(pod["metadata"]["uid"])
        await self._write_status(item, nodes, seen)

    async def _write_status(self, item: Object, nodes: list[Object], pods: list[Object]) -> None:
        wanted = {n["metadata"]["name"] for n in nodes if eligible(item, n)}
        placed = [p for p in pods if p["spec"].get("nodeName") in wanted]
        ready = sum(is_ready(p) for p in placed)
        fresh = revision(item)
        status = {
            "observedGeneration": item["metadata"].get("generation", 0),
            "desiredNumberScheduled": len(wanted),
            "currentNumberScheduled": len(placed),
            "numberMisscheduled": len(pods) - len(placed),
            "numberReady": ready,
            "numberAvailable": ready,
            "numberUnavailable": len(wanted) - ready,
            "updatedNumberScheduled": sum(
                (p["metadata"].get("labels") or {}).get(HASH) == fresh for p in placed
            ),
        }
        known = item.get("status") or {}
        if any(known.get(k, 0) != v for k, v in status.items()):
            meta = item["metadata"]
            await self.client.patch(
                DAEMON_SETS, meta["name"], {"status": status}, meta["namespace"], subresource="status"
            )
