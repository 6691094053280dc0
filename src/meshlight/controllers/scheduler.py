"""Binds each pending pod to a node, says on it why none can take it, and makes room for more important ones.

The shell around `scheduling`: it keeps the nodes' sums current by the change, and counts what it has decided
before the API shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from meshlight.controllers import scheduling
from meshlight.controllers.disruption import covers
from meshlight.controllers.node_filters import NodeState
from meshlight.controllers.ownership import Dependents, side_by_side
from meshlight.controllers.pods import clock, condition, is_finished, is_terminating, stamp
from meshlight.controllers.volume_binding import VolumeBinder
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.pod_resources import allocatable
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import PODS, Object

_NAME = "default-scheduler"
_BINDINGS = 16


class NodeStates:
    """The nodes with the pods on them, those decided but not shown yet among them."""

    def __init__(self, pods: Cache, nodes: Cache) -> None:
        self.states: dict[str, NodeState] = {}
        self._homeless: dict[str, dict[str, Object]] = {}
        self._where: dict[str, tuple[str, Object]] = {}
        pods.on_change(self._pod_changed)
        nodes.on_change(self._node_changed)

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        name = (new or old or {})["metadata"]["name"]
        before = self.states.get(name)
        if new is None:
            self.states.pop(name, None)
            if before is not None and before.pods:
                self._homeless[name] = dict(before.pods)
        elif before is not None:
            before.node, before.capacity = new, allocatable(new)
        else:
            self.states[name] = NodeState.of(new, self._homeless.pop(name, {}).values())

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        uid = (new or old or {})["metadata"]["uid"]
        if new is None or is_finished(new):
            self.leave(uid)
        elif node := new["spec"].get("nodeName"):
            self.settle(new, node)

    def settle(self, pod: Object, node: str) -> None:
        """A pod is on a node, or has been given to it."""
        uid = pod["metadata"]["uid"]
        if (there := self._where.get(uid)) and there[0] != node:
            self.leave(uid)
        self._where[uid] = (node, pod)
        if state := self.states.get(node):
            state.add(pod)
        else:
            self._homeless.setdefault(node, {})[uid] = pod

    def leave(self, uid: str) -> None:
        """A pod has left its node, or was not given to it after all."""
        if (there := self._where.pop(uid, None)) is None:
            return
        node, pod = there
        if state := self.states.get(node):
            state.remove(pod)
        elif homeless := self._homeless.get(node):
            homeless.pop(uid, None)

    def given(self, uid: str) -> bool:
        """Whether a pod has a node, be it only decided."""
        return uid in self._where


class Scheduler:
    """Decides for pending pods; what may help them makes them be considered again."""

    def __init__(
        self,
        client: Client,
        pods: Dependents,
        nodes: Cache,
        namespaces: Cache,
        budgets: Cache,
        volumes: VolumeBinder,
        recorder: Recorder,
    ) -> None:
        self.client, self.pods, self.namespaces, self.budgets = client, pods, namespaces, budgets
        self.volumes, self.recorder = volumes, recorder
        self.nodes = NodeStates(pods.cache, nodes)
        self.queue = WorkQueue("scheduler", self.reconcile, _BINDINGS)
        self._pending: dict[Key, Object] = {}
        self._nominated: dict[str, tuple[str, Object]] = {}
        pods.cache.on_change(self._pod_changed)
        nodes.on_change(self._node_changed)
        volumes.on_change(self._all)

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        pod = new or old or {}
        key = (pod["metadata"].get("namespace", ""), pod["metadata"]["name"])
        waits = new is not None and not new["spec"].get("nodeName") and not is_terminating(new)
        if new is not None and waits and not is_finished(new):
            self._pending[key] = new
            if old is None or old["spec"] != new["spec"]:
                self.queue.add(key)
            if node := (new.get("status") or {}).get("nominatedNodeName"):
                self._nominated[new["metadata"]["uid"]] = (node, new)
            return
        self._pending.pop(key, None)
        self._nominated.pop(pod["metadata"]["uid"], None)
        left = old is not None and old["spec"].get("nodeName") and (new is None or is_finished(new))
        came = (
            new is not None and new["spec"].get("nodeName") and (old is None or not old["spec"].get("nodeName"))
        )
        if left or came:
            self._all()

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        def relevant(node: Object | None) -> object:
            return node and (
                node["metadata"].get("labels"),
                node["spec"],
                (node.get("status") or {}).get("allocatable"),
            )

        if relevant(old) != relevant(new):
            self._all()

    def _all(self) -> None:
        for key in sorted(self._pending, key=lambda k: -scheduling.priority(self._pending[k])):
            self.queue.add(key)

    async def reconcile(self, key: Key) -> None:
        """Bind one pod, or state on it why no node can take it."""
        pod = self._pending.get(key)
        if pod is None or self.nodes.given(pod["metadata"]["uid"]):
            return
        if pod["spec"].get("schedulerName", _NAME) != _NAME:
            return
        if pod["spec"].get("schedulingGates"):
            words = "Scheduling is blocked due to non-empty scheduling gates"
            await self._tell(pod, "SchedulingGated", words)
            return
        claims, blocked = self.volumes.claims(pod)
        states = self._states(pod)
        if blocked:
            total = len(states)
            await self._refuse(pod, f"0/{total} nodes are available: {blocked}.")
            return
        verdict = scheduling.judge(pod, states, self._namespaces(), partial(self.volumes.refusal, claims))
        if verdict.node:
            await self._bind(pod, verdict.node, claims)
        else:
            await self._make_room(pod, states, verdict)

    def _states(self, pod: Object) -> list[NodeState]:
        """The nodes, with room kept for more important pods that are nominated to them."""
        states = self.nodes.states
        reserved: dict[str, list[Object]] = {}
        for uid, (node, other) in self._nominated.items():
            if uid != pod["metadata"]["uid"] and scheduling.priority(other) >= scheduling.priority(pod):
                reserved.setdefault(node, []).append(other)
        found = []
        for name, state in sorted(states.items()):
            if kept := reserved.get(name):
                state = state.without(())
                for other in kept:
                    state.add(other)
            found.append(state)
        return found

    def _namespaces(self) -> Mapping[str, Mapping[str, str]]:
        return {k[1]: n["metadata"].get("labels") or {} for k, n in self.namespaces.objects.items()}

    async def _bind(self, pod: Object, node: str, claims: list[Object]) -> None:
        metadata = pod["metadata"]
        self.nodes.settle(pod, node)
        try:
            if not await self.volumes.bind(claims, node):
                self.nodes.leave(metadata["uid"])  # provisioned for the node first; its claims bring us back
                return
            target = {"apiVersion": "v1", "kind": "Node", "name": node}
            body = {
                "apiVersion": "v1",
                "kind": "Binding",
                "metadata": {
                    "name": metadata["name"],
                    "namespace": metadata["namespace"],
                    "uid": metadata["uid"],
                },
                "target": target,
            }
            await self.client.request(
                "POST", PODS.path(metadata["namespace"], metadata["name"]) + "/binding", body
            )
        except ApiError as error:
            self.nodes.leave(metadata["uid"])
            if error.code in (404, 409):
                return  # gone, or bound by somebody else: the watch will show
            raise
        except BaseException:
            self.nodes.leave(metadata["uid"])
            raise
        words = f"Successfully assigned {metadata['namespace']}/{metadata['name']} to {node}"
        self.recorder.record(pod, "Normal", "Scheduled", words, component=_NAME)

    async def _make_room(self, pod: Object, states: list[NodeState], verdict: scheduling.Verdict) -> None:
        total = len(states)
        if verdict.blocked:
            await self._refuse(pod, verdict.blocked)
            return
        if pod["spec"].get("preemptionPolicy") == "Never":
            await self._refuse(pod, scheduling.message(verdict, total, scheduling.NEVER))
            return
        nominated = (pod.get("status") or {}).get("nominatedNodeName")
        if nominated and self._leaving(pod, nominated):
            return  # its victims are on their way; their end brings us back
        found = scheduling.preempt(pod, states, verdict, self._namespaces(), self._protected)
        if found is None:
            refusal = scheduling.message(verdict, total, scheduling.no_preemption(verdict, total))
            await self._refuse(pod, refusal)
            return
        self._nominated[pod["metadata"]["uid"]] = (found.node, pod)
        await self._tell(
            pod, "Unschedulable", scheduling.message(verdict, total), {"nominatedNodeName": found.node}
        )
        await side_by_side(partial(self._preempt, pod, victim, found.node) for victim in found.victims)

    def _leaving(self, pod: Object, node: str) -> bool:
        state = self.nodes.states.get(node)
        level = scheduling.priority(pod)
        return bool(
            state and any(is_terminating(p) and scheduling.priority(p) < level for p in state.pods.values())
        )

    def _protected(self, pod: Object) -> bool:
        """Whether a budget forbids to disturb the pod."""
        return any(
            covers(budget, pod) and not int((budget.get("status") or {}).get("disruptionsAllowed") or 0)
            for budget in self.budgets.objects.values()
        )

    async def _preempt(self, pod: Object, victim: Object, node: str) -> None:
        target = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "PreemptionByScheduler",
            "message": f"{_NAME}: preempting to accommodate a higher priority pod",
            "lastTransitionTime": stamp(clock()),
        }
        others = [
            c for c in (victim.get("status") or {}).get("conditions") or [] if c["type"] != target["type"]
        ]
        await self.pods.patch(victim, {"status": {"conditions": [*others, target]}}, "status")
        await self.pods.delete(victim)
        words = f"Preempted by pod {pod['metadata']['uid']} on node {node}"
        self.recorder.record(victim, "Normal", "Preempted", words, component=_NAME)

    async def _refuse(self, pod: Object, why: str) -> None:
        if condition(pod, "PodScheduled").get("message") != why:
            self.recorder.record(pod, "Warning", "FailedScheduling", why, component=_NAME)
        await self._tell(pod, "Unschedulable", why)

    async def _tell(self, pod: Object, reason: str, why: str, more: Mapping[str, Any] | None = None) -> None:
        before = condition(pod, "PodScheduled")
        if before.get("message") == why and before.get("reason") == reason and not more:
            return
        status = pod.get("status") or {}
        blocked = {
            "type": "PodScheduled",
            "status": "False",
            "reason": reason,
            "message": why,
            "lastProbeTime": None,
            "lastTransitionTime": before.get("lastTransitionTime") or stamp(clock()),
        }
        kept = [c for c in status.get("conditions") or [] if c["type"] != "PodScheduled"]
        await self.pods.patch(pod, {"status": {"conditions": [*kept, blocked], **(more or {})}}, "status")
