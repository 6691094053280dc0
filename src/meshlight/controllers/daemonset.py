"""Keeps one pod of each DaemonSet on every node that may run it, and rolls template changes out.

`place` and `roll` are pure. A pod says by node affinity which node it is for, and the scheduler binds it, so
that resources and priorities count for it as for others.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from meshlight.controllers.node_filters import affinity_refusal, untolerated
from meshlight.controllers.ownership import Dependents, side_by_side
from meshlight.controllers.pods import (
    clock,
    controller_of,
    count_or_share,
    from_template,
    is_available,
    is_finished,
    is_ready,
    is_terminating,
    labels,
    phase,
    reference,
    soonest,
)
from meshlight.controllers.revisions import HASH, Revisions, digest_of, names_in_use
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import DAEMON_SETS, Object
from meshlight.kube.selectors import match_labels

_TOLERATED = (
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
)
_LONGEST_BACKOFF = 900.0
"""Seconds at most between two tries of a pod that ends by itself."""
_NETWORK = ("node.kubernetes.io/network-unavailable", "NoSchedule")


def pod_spec(item: Object, node: str) -> Object:
    """The spec of a DaemonSet's pod for a node."""
    spec: Object = copy.deepcopy(item["spec"]["template"]["spec"])
    required = {
        "nodeSelectorTerms": [
            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]},
        ]
    }
    affinity = spec.setdefault("affinity", {})
    affinity.setdefault("nodeAffinity", {})["requiredDuringSchedulingIgnoredDuringExecution"] = required
    wanted = [*_TOLERATED, *([_NETWORK] if spec.get("hostNetwork") else [])]
    tolerations = [{"key": k, "operator": "Exists", "effect": e} for k, e in wanted]
    spec["tolerations"] = [*(spec.get("tolerations") or []), *tolerations]
    return spec


def node_of(pod: Object) -> str:
    """The node that a DaemonSet's pod is on or for."""
    if name := pod["spec"].get("nodeName"):
        return str(name)
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in required.get("nodeSelectorTerms") or []:
        for each in term.get("matchFields") or []:
            if each.get("key") == "metadata.name" and len(each.get("values") or []) == 1:
                return str(each["values"][0])
    return ""


def wants(item: Object, node: Object) -> tuple[bool, bool]:
    """Whether a DaemonSet wants a pod on a node, and whether one that is there may stay.

    Readiness, cordons and pressure do not matter to it.
    """
    template = item["spec"]["template"]["spec"]
    if (name := template.get("nodeName")) and name != node["metadata"]["name"]:
        return False, False
    if affinity_refusal({"spec": template}, node):
        return False, False
    trial = {"spec": pod_spec(item, node["metadata"]["name"])}
    if untolerated(trial, node, ("NoExecute",)) is not None:
        return False, False
    return untolerated(trial, node, ("NoSchedule",)) is None, True


@dataclass(slots=True)
class Placement:
    """Nodes to make a pod for, pods to delete, and pods that ended and are replaced."""

    create: list[str] = field(default_factory=list)
    delete: list[Object] = field(default_factory=list)
    failed: list[Object] = field(default_factory=list)


def by_node(pods: Iterable[Object]) -> dict[str, list[Object]]:
    """Pods by the node they are on or for, the oldest first."""
    found: dict[str, list[Object]] = {}
    for pod in sorted(pods, key=lambda p: (p["metadata"].get("creationTimestamp", ""), p["metadata"]["name"])):
        found.setdefault(node_of(pod), []).append(pod)
    return found


def place(
    item: Object, nodes: Mapping[str, Object], pods: Mapping[str, Sequence[Object]], digest: str, surge: int
) -> Placement:
    """Which nodes lack their pod, and which pods are misplaced, doubled or ended."""
    made = Placement()
    for name, node in sorted(nodes.items()):
        here = list(pods.get(name, ()))
        run, stay = wants(item, node)
        if not stay:
            made.delete += [p for p in here if not is_terminating(p)]
            continue
        alive = [p for p in here if not is_terminating(p)]
        ended = [p for p in alive if is_finished(p)]
        active = [p for p in alive if not is_finished(p)]
        made.failed += ended
        if run and not here:
            made.create.append(name)
        old = [p for p in active if labels(p).get(HASH) != digest]
        new = [p for p in active if labels(p).get(HASH) == digest]
        if surge and new:
            kept = {p["metadata"]["uid"] for p in (*old[:1], new[0])}
        else:
            ready = sorted(active, key=lambda p: not is_ready(p))
            kept = {p["metadata"]["uid"] for p in ready[:1]}
        made.delete += [p for p in active if p["metadata"]["uid"] not in kept]
    for name, misplaced in pods.items():
        if name not in nodes:
            made.delete += [p for p in misplaced if not is_terminating(p)]
    return made


def roll(
    item: Object, wanted: Sequence[str], pods: Mapping[str, Sequence[Object]], digest: str, now: datetime
) -> Placement:
    """The next step of a rolling update: old pods to delete, and nodes to make a second pod for."""
    made = Placement()
    rolling = (item["spec"].get("updateStrategy") or {}).get("rollingUpdate") or {}
    surge = count_or_share(rolling.get("maxSurge", 0), len(wanted), up=True)
    unavailable = count_or_share(rolling.get("maxUnavailable", 1), len(wanted), up=True)
    if not surge and not unavailable:
        unavailable = 1
    least = item["spec"].get("minReadySeconds") or 0
    missing = surging = 0
    broken: list[Object] = []
    working: list[Object] = []
    for name in wanted:
        alive = [p for p in pods.get(name, ()) if not is_terminating(p) and not is_finished(p)]
        old = next((p for p in alive if labels(p).get(HASH) != digest), None)
        new = next((p for p in alive if labels(p).get(HASH) == digest), None)
        if new is not None and old is not None:
            if is_available(new, least, now):
                made.delete.append(old)
            else:
                surging += 1
        elif old is None:
            missing += new is None or not is_available(new, least, now)
        elif is_available(old, least, now):
            working.append(old)
        else:
            missing += 1
            broken.append(old)
    if surge:
        # A pod of an earlier update that still ends (a node proxy, minutes long) holds up no later one.
        made.create += [node_of(p) for p in (*broken, *working[: max(0, surge - surging)])]
    else:
        made.delete += [*broken, *working[: max(0, unavailable - missing)]]
    return made


def status(
    item: Object,
    nodes: Mapping[str, Object],
    pods: Mapping[str, Sequence[Object]],
    digest: str,
    collisions: int,
    now: datetime,
) -> Object:
    """The status of a DaemonSet."""
    least = item["spec"].get("minReadySeconds") or 0
    desired = current = misplaced = ready = available = updated = 0
    for name, node in nodes.items():
        run, _ = wants(item, node)
        here = [p for p in pods.get(name, ()) if not is_terminating(p)]
        desired += run
        if not run:
            misplaced += bool(here)
            continue
        if here:
            current += 1
            newest = here[-1]
            ready += any(is_ready(p) for p in here)
            available += any(is_available(p, least, now) for p in here)
            updated += labels(newest).get(HASH) == digest
    made: Object = {
        "observedGeneration": item["metadata"].get("generation", 0),
        "desiredNumberScheduled": desired,
        "currentNumberScheduled": current,
        "numberMisscheduled": misplaced,
        "numberReady": ready,
        "numberAvailable": available,
        "numberUnavailable": desired - available,
        "updatedNumberScheduled": updated,
    }
    if collisions:
        made["collisionCount"] = collisions
    return made


class DaemonSets:
    """Reconciles DaemonSets from the caches of DaemonSets, pods, nodes and their revisions."""

    def __init__(
        self,
        client: Client,
        items: Cache,
        pods: Dependents,
        nodes: Cache,
        revisions: Dependents,
        recorder: Recorder,
    ) -> None:
        self.client, self.items, self.pods, self.nodes = client, items, pods, nodes
        self.revisions, self.recorder = Revisions(revisions, "DaemonSet"), recorder
        self.queue = WorkQueue("daemonset", self.reconcile)
        self._ended: dict[tuple[str, str], tuple[int, float]] = {}
        items.on_change(self._changed)
        pods.cache.on_change(self._pod_changed)
        nodes.on_change(self._node_changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        metadata = (new or old or {})["metadata"]
        if new is None:
            self._ended = {k: v for k, v in self._ended.items() if k[0] != metadata["uid"]}
        self.queue.add((metadata["namespace"], metadata["name"]))

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        def relevant(node: Object | None) -> object:
            return node and (node["metadata"].get("labels"), node["spec"])

        if relevant(old) != relevant(new):
            for key in self.items.objects:
                self.queue.add(key)

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        for pod in (old, new):
            if pod is None:
                continue
            namespace = pod["metadata"]["namespace"]
            owner = controller_of(pod)
            if owner and owner["kind"] == "DaemonSet":
                self.queue.add((namespace, owner["name"]))
            elif owner is None and labels(pod):
                for key, item in self.items.objects.items():
                    if key[0] == namespace and match_labels(item["spec"].get("selector"), labels(pod)):
                        self.queue.add(key)

    async def reconcile(self, key: Key) -> None:
        """Make what is missing of one DaemonSet, delete what is too much, and write its status."""
        item = self.items.objects.get(key)
        if item is None or is_terminating(item):
            return
        await self.pods.claim(item, "apps/v1", "DaemonSet")
        revision, collisions = await self.revisions.sync(item)
        digest = digest_of(revision)
        nodes = {n["metadata"]["name"]: n for n in self.nodes.objects.values()}
        strategy = item["spec"].get("updateStrategy") or {}
        rolling = strategy.get("type", "RollingUpdate") == "RollingUpdate"
        limit = (strategy.get("rollingUpdate") or {}).get("maxSurge", 0) if rolling else 0
        now = clock()
        await self._do(item, digest, place(item, nodes, self._mine(item), digest, 1 if limit else 0))
        if rolling:
            wanted = [name for name, node in sorted(nodes.items()) if wants(item, node)[0]]
            await self._do(item, digest, roll(item, wanted, self._mine(item), digest, now))
        mine = self._mine(item)
        every = [p for here in mine.values() for p in here]
        await self._write_status(item, status(item, nodes, mine, digest, collisions, now))
        live = names_in_use(every, item["metadata"]["name"], whole=False)
        await self.revisions.prune(item, live, item["spec"].get("revisionHistoryLimit", 10))
        if (wait := soonest(every, item["spec"].get("minReadySeconds") or 0, now)) is not None:
            self.queue.add_after(key, wait)

    def _mine(self, item: Object) -> dict[str, list[Object]]:
        return by_node(self.pods.of(item["metadata"]["uid"]))

    async def _do(self, item: Object, digest: str, steps: Placement) -> None:
        failed = [p for p in steps.failed if self._may_replace(item, p)]
        for pod in failed:
            name, node = pod["metadata"]["name"], node_of(pod)
            if phase(pod) == "Failed":
                words = f"Found failed daemon pod {pod['metadata']['namespace']}/{name} on node {node}, "
                self.recorder.record(item, "Warning", "FailedDaemonPod", words + "will try to kill it")
            else:
                words = f"Found succeeded daemon pod {pod['metadata']['namespace']}/{name} on node {node}, "
                self.recorder.record(item, "Normal", "SucceededDaemonPod", words + "will try to delete it")
        await side_by_side(partial(self._delete, item, p) for p in (*steps.delete, *failed))
        await side_by_side(partial(self._create, item, digest, n) for n in steps.create)

    def _may_replace(self, item: Object, pod: Object) -> bool:
        """Whether an ended pod is replaced now: later and later where they end again and again."""
        place, now = (item["metadata"]["uid"], node_of(pod)), time.monotonic()
        count, until = self._ended.get(place, (0, 0.0))
        if now < until:
            self.queue.add_after((item["metadata"]["namespace"], item["metadata"]["name"]), until - now)
            return False
        if now > until + 2 * _LONGEST_BACKOFF:
            count = 0
        self._ended[place] = (count + 1, now + min(2.0**count, _LONGEST_BACKOFF))
        return True

    async def _create(self, item: Object, digest: str, node: str) -> None:
        owner = reference(item, "apps/v1", "DaemonSet")
        pod = from_template(item, owner, item["spec"]["template"], {HASH: digest})
        pod["spec"] = pod_spec(item, node)
        try:
            made = await self.pods.create(pod)
        except ApiError as error:
            if "being terminated" in error.message:
                return
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
            answer = await self.client.patch(
                DAEMON_SETS, metadata["name"], {"status": made}, metadata["namespace"], subresource="status"
            )
            self.items.wrote(answer)
