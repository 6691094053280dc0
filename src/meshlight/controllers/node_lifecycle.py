"""Tells which nodes are alive from their Leases: a silent node's condition becomes Unknown, and it is tainted.

Nothing polls: each renewal sets one timer for the time at which silence would mean that the node is
unreachable (Kubernetes' node-monitor-grace-period, 40 s).
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from meshlight.controllers.workqueue import Key, WorkQueue, log
from meshlight.kube.client import Cache, Client
from meshlight.kube.resources import NODES, PODS, Object

GRACE = 40.0
"""Seconds without a renewal after which a node counts as unreachable."""
UNREACHABLE = "node.kubernetes.io/unreachable"
NOT_READY = "node.kubernetes.io/not-ready"
UNSCHEDULABLE = "node.kubernetes.io/unschedulable"
PRESSURE = {
    "MemoryPressure": "node.kubernetes.io/memory-pressure",
    "DiskPressure": "node.kubernetes.io/disk-pressure",
    "PIDPressure": "node.kubernetes.io/pid-pressure",
}
"""Taints by the condition that they follow."""


def ready_status(node: Object) -> str:
    """The node's Ready condition: True, False or Unknown."""
    conditions = (node.get("status") or {}).get("conditions") or []
    return next((c["status"] for c in conditions if c["type"] == "Ready"), "Unknown")


def taints(node: Object, unreachable: bool, now: str) -> list[dict[str, Any]]:
    """The taints that the node should have: others' kept, ours as its conditions and its cordon say."""
    before = (node.get("spec") or {}).get("taints") or []
    conditions = {c["type"]: c["status"] for c in (node.get("status") or {}).get("conditions") or []}
    key = UNREACHABLE if unreachable else NOT_READY if ready_status(node) == "False" else None
    wanted = [(key, effect) for effect in ("NoSchedule", "NoExecute") if key]
    wanted += [(k, "NoSchedule") for kind, k in PRESSURE.items() if conditions.get(kind) == "True"]
    if (node.get("spec") or {}).get("unschedulable"):
        wanted.append((UNSCHEDULABLE, "NoSchedule"))
    ours = {UNREACHABLE, NOT_READY, UNSCHEDULABLE, *PRESSURE.values()}
    found = [t for t in before if t["key"] not in ours]
    for name, effect in wanted:
        known = next((t for t in before if (t["key"], t["effect"]) == (name, effect)), None)
        found.append(known or {"key": name, "effect": effect, "timeAdded": now})
    return found


def unknown(node: Object, now: str) -> list[Object]:
    """The node's conditions once nothing is heard of it."""
    found = []
    for condition in (node.get("status") or {}).get("conditions") or []:
        if condition["status"] == "Unknown":
            found.append(condition)
            continue
        found.append(
            {
                **condition,
                "status": "Unknown",
                "reason": "NodeStatusUnknown",
                "message": "Kubelet stopped posting node status.",
                "lastTransitionTime": now,
            }
        )
    return found


class NodeLifecycle:
    """Reconciles nodes from the caches of nodes, of the Leases of kube-node-lease, and of pods."""

    def __init__(self, client: Client, nodes: Cache, leases: Cache, pods: Cache) -> None:
        self.client, self.nodes, self.leases, self.pods = client, nodes, leases, pods
        self.queue = WorkQueue("node-lifecycle", self.reconcile)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._heard: dict[str, float] = {}  # when each Lease was last seen to change
        self._renewals: set[str] = set()
        nodes.on_change(self._node_changed)
        leases.on_change(self._renewed)

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        name = (new or old or {})["metadata"]["name"]
        if new is None and (timer := self._timers.pop(name, None)):
            timer.cancel()

        def relevant(node: Object) -> object:
            found = (node.get("status") or {}).get("conditions") or []
            return [(c["type"], c["status"]) for c in found], node["spec"]

        if old is None or new is None or relevant(old) != relevant(new):
            self.queue.add(("", name))

    def _renewed(self, old: Object | None, new: Object | None) -> None:
        lease = new or old or {}
        if lease["metadata"]["namespace"] != "kube-node-lease":
            return
        name = lease["metadata"]["name"]
        self._heard[name] = asyncio.get_running_loop().time()
        if old is not None:
            self._renewals.add(name)
        node = self.nodes.get(name)
        if node is not None and any(t["key"] == UNREACHABLE for t in node["spec"].get("taints") or []):
            self.queue.add(("", name))
        self._watch(name)

    def _watch(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(GRACE, self.queue.add, ("", name))

    def _silent(self, node: Object) -> bool:
        """Whether nothing was heard of a node for GRACE, by our own clock: no node is told dead for a time
        in which nobody listened. One that was told dead before is so until it renews its Lease."""
        name = node["metadata"]["name"]
        if name not in self._renewals and ready_status(node) == "Unknown":
            return True
        return asyncio.get_running_loop().time() - self._heard.get(name, 0.0) >= GRACE

    async def reconcile(self, key: Key) -> None:
        """Write one node's taints, and its conditions when it has fallen silent."""
        node = self.nodes.get(key[1])
        lease = self.leases.get(key[1], "kube-node-lease")
        if node is None or lease is None:
            return
        now = datetime.now(UTC)
        silent = self._silent(node)
        stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        if silent and ready_status(node) != "Unknown":
            log("warning", "node is unreachable", node=key[1])
            patch: Object = {"status": {"conditions": unknown(node, stamp)}}
            await self.client.patch(NODES, key[1], patch, subresource="status")
            await self._unready_pods(key[1], stamp)
        wanted = taints(node, silent, stamp)
        if wanted != ((node.get("spec") or {}).get("taints") or []):
            await self.client.patch(NODES, key[1], {"spec": {"taints": wanted or None}})

    async def _unready_pods(self, node: str, stamp: str) -> None:
        """Pods of a silent node are not ready: Services stop sending to them."""
        for (namespace, name), pod in list(self.pods.objects.items()):
            conditions = (pod.get("status") or {}).get("conditions") or []
            if pod["spec"].get("nodeName") != node or not any(
                c["type"] == "Ready" and c["status"] == "True" for c in conditions
            ):
                continue
            changed = [
                {**c, "status": "False", "lastTransitionTime": stamp} if c["type"] == "Ready" else c
                for c in conditions
            ]
            await self.client.patch(
                PODS, name, {"status": {"conditions": changed}}, namespace, subresource="status"
            )
