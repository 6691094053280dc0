"""Chooses a node for each pending pod, so that pods run where their constraints allow.

Pure decision (`choose`) over nodes and pods; the shell binds. Rules: nodeSelector, taints and
tolerations and the spread of the fewest pods, as Kubernetes' documentation states them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import Cache, Client
from meshlight.kube.resources import PODS, Object


def tolerates(pod: Object, taint: Object) -> bool:
    """Whether one of the pod's tolerations matches the taint."""
    for item in pod["spec"].get("tolerations") or []:
        if item.get("effect") and item["effect"] != taint.get("effect"):
            continue
        if item.get("operator") == "Exists":
            if not item.get("key") or item["key"] == taint["key"]:
                return True
        elif item.get("key") == taint["key"] and item.get("value", "") == taint.get("value", ""):
            return True
    return False


def refusal(pod: Object, node: Object) -> str | None:
    """Why the node cannot take the pod, in Kubernetes' words; None if it can."""
    if node["spec"].get("unschedulable"):
        return "node(s) were unschedulable"
    for taint in node["spec"].get("taints") or []:
        if taint.get("effect") in ("NoSchedule", "NoExecute") and not tolerates(pod, taint):
            return f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"
    conditions = node.get("status", {}).get("conditions") or []
    if not any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
        return "node(s) were not ready"
    labels = node["metadata"].get("labels") or {}
    wanted = pod["spec"].get("nodeSelector") or {}
    if any(labels.get(k) != v for k, v in wanted.items()):
        return "node(s) didn't match Pod's node affinity/selector"
    return None


def choose(pod: Object, nodes: Iterable[Object], pods: Iterable[Object]) -> tuple[str | None, str]:
    """The node with the fewest pods among those allowed, or None and the reason."""
    load = Counter(p["spec"].get("nodeName") for p in pods)
    every = list(nodes)
    reasons = [(refusal(pod, n), n["metadata"]["name"]) for n in every]
    fit = [name for why, name in reasons if why is None]
    if fit:
        return min(fit, key=lambda name: (load[name], name)), ""
    why_count = Counter(why for why, _ in reasons if why)
    parts = ", ".join(f"{count} {why}" for why, count in sorted(why_count.items()))
    return None, f"0/{len(every)} nodes are available: {parts or 'no nodes'}."


class Scheduler:
    """Binds pending pods; a change of any node reconsiders every pending pod."""

    def __init__(self, client: Client, pods: Cache, nodes: Cache) -> None:
        self.client, self.pods, self.nodes = client, pods, nodes
        self.queue = WorkQueue("scheduler", self.reconcile)
        self._bound: dict[str, Object] = {}
        pods.on_change(self._pod_changed)
        nodes.on_change(lambda old, new: self._all())

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        if new is None and old is not None:
            self._bound.pop(old["metadata"]["uid"], None)
        elif new is not None and not new["spec"].get("nodeName"):
            self.queue.add((new["metadata"]["namespace"], new["metadata"]["name"]))
        elif new is not None:
            self._bound.pop(new["metadata"]["uid"], None)

    def _all(self) -> None:
        for key, pod in self.pods.objects.items():
            if not pod["spec"].get("nodeName"):
                self.queue.add(key)

    async def reconcile(self, key: Key) -> None:
        """Bind one pod, or state on it why no node can take it."""
        pod = self.pods.objects.get(key)
        if pod is None or pod["spec"].get("nodeName") or pod["metadata"].get("deletionTimestamp"):
            return
        if pod["metadata"]["uid"] in self._bound:
            return
        taken = [*self.pods.objects.values(), *self._bound.values()]
        node, why = choose(pod, self.nodes.objects.values(), taken)
        if node is not None:
            body = {
                "apiVersion": "v1",
                "kind": "Binding",
                "metadata": {"name": key[1], "namespace": key[0]},
                "target": {"apiVersion": "v1", "kind": "Node", "name": node},
            }
            await self.client.request("POST", PODS.path(*key) + "/binding", body)
            self._bound[pod["metadata"]["uid"]] = {"spec": {"nodeName": node}}
            return
        conditions = pod.get("status", {}).get("conditions") or []
        if any(c["type"] == "PodScheduled" and c.get("message") == why for c in conditions):
            return
        blocked = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": why,
        }
        kept = [c for c in conditions if c["type"] != "PodScheduled"]
        patch = {"status": {"conditions": [*kept, blocked]}}
        await self.client.patch(PODS, key[1], patch, key[0], subresource="status")
