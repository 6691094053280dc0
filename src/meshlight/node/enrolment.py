"""istio-cni's role: moves pods into the mesh and out of it as labels say, without dropping a connection.

In: ztunnel listens in the pod, then new connections are redirected, then the annotation tells istiod.
Out: nothing new is redirected, then the annotation goes, then after a drain ztunnel stops listening.
Redirection goes first on the way out because peers that hear the news send plaintext, which a STRICT
policy would refuse at the capture; until they hear it, HBONE still finds its listener.

`next_step` decides, purely, from where a pod stands and where it belongs. What has been done is read
back from the kernel and the annotation after an agent's restart, so that nothing is dropped by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from meshlight.controllers.workqueue import log
from meshlight.kube.ambient import DATAPLANE_MODE, REDIRECTION, asked, obstacle
from meshlight.kube.client import ApiError, ApiUnreachable, Cache, Client
from meshlight.kube.resources import EVENTS, NAMESPACES, PODS, Object
from meshlight.node import netns, redirection
from meshlight.node.netns import NetworkError
from meshlight.node.zds import EnrolledPod, ZdsServer

DNS_CAPTURE = "ambient.istio.io/dns-capture"
"""A pod's annotation: `false` leaves its DNS queries alone."""
DRAIN = 5.0
"""Seconds for which a pod that left keeps its listeners: for peers that have not heard of it yet."""
UNHELD = "kube-system"
"""Its pods start before they are in the mesh: ztunnel itself needs the cluster's DNS."""
_CONCURRENT = 4
"""Pods whose rules are written at the same time."""
_RETRY, _RETRY_MOST, _NETWORK_POLL_MOST = 0.1, 10.0, 1.0
"""Seconds between attempts: the first, the longest, and the longest when the network is awaited."""


class Step(Enum):
    """What to do next for a pod."""

    REST = "rest"
    AWAIT_NETWORK = "await network"
    ASK = "ask ztunnel to listen"
    REDIRECT = "redirect"
    ANNOUNCE = "announce"
    FLUSH = "flush"
    WITHDRAW = "withdraw"
    DRAIN = "drain"
    FORGET = "tell ztunnel to stop listening"
    END = "end"


@dataclass(slots=True)
class Standing:
    """How far a pod is in the mesh.

    `asked`: it is among the pods that ztunnel is told of; `listening`: ztunnel has confirmed;
    `drained_at`: the monotonic time from which its listeners may close.
    """

    asked: bool = False
    listening: bool = False
    redirected: bool = False
    announced: bool = False
    drained_at: float = 0.0


def next_step(standing: Standing, *, wanted: bool, networked: bool, gone: bool, now: float) -> Step:
    """The one thing to do next for a pod; REST when only a change from outside can need more."""
    if gone:
        return Step.FORGET if standing.asked else Step.END
    if wanted:
        if not networked:
            return Step.AWAIT_NETWORK
        if not standing.asked:
            return Step.ASK
        if not standing.redirected:
            return Step.REDIRECT if standing.listening else Step.REST
        return Step.REST if standing.announced else Step.ANNOUNCE
    if standing.redirected:
        return Step.FLUSH
    if standing.announced:
        return Step.WITHDRAW
    if standing.asked:
        return Step.DRAIN if now < standing.drained_at else Step.FORGET
    return Step.REST


def wanted(pod: Object, namespace_mode: str | None) -> bool:
    """Whether a pod belongs in the mesh: its own label wins over its namespace's, `none` opts out.

    Left out are pods that cannot be captured, ztunnel itself, and pods that have ended.
    """
    metadata = pod["metadata"]
    labels = metadata.get("labels") or {}
    if obstacle(pod):
        return False
    if metadata["namespace"] == "istio-system" and labels.get("app") == "ztunnel":
        return False
    if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return False
    return asked(pod, namespace_mode)


def _mode_of(namespace: Object) -> str | None:
    """A namespace's own data-plane mode."""
    mode: str | None = (namespace["metadata"].get("labels") or {}).get(DATAPLANE_MODE)
    return mode


def announced(pod: Object) -> bool:
    """Whether the pod's annotation says that it is redirected."""
    return (pod["metadata"].get("annotations") or {}).get(REDIRECTION) == "enabled"


class _Pod:
    """One pod of the node, with its task's wake-up."""

    def __init__(self, obj: Object) -> None:
        self.object = obj
        self.standing = Standing(announced=announced(obj))
        self.gone = False
        self.prepared = False
        self.network = 0
        self.refusal = ""
        self.told: set[str] = set()
        self.changed = asyncio.Event()
        self.wake: Callable[[], None] | None = None

    @property
    def uid(self) -> str:
        """The pod's uid, also the name of its network namespace."""
        return str(self.object["metadata"]["uid"])

    @property
    def where(self) -> dict[str, str]:
        """Fields for a log line."""
        metadata = self.object["metadata"]
        return {"pod": metadata["name"], "namespace": metadata["namespace"]}

    def networked(self) -> bool:
        """Whether the pod has its whole network: the address is known last."""
        known = self.prepared or bool((self.object.get("status") or {}).get("podIP"))
        return known and netns.exists(self.uid)

    def captures_dns(self) -> bool:
        """Whether ztunnel answers the pod's DNS queries: unless the pod says no."""
        annotations = self.object["metadata"].get("annotations") or {}
        return bool(annotations.get(DNS_CAPTURE) != "false")

    def notice_network(self) -> None:
        """Start anew if the pod's network was made anew: nothing is redirected in the new one."""
        network = netns.identity(self.uid)
        if network and network != self.network:
            if self.network:
                self.standing.asked = self.standing.listening = self.standing.redirected = False
            self.network = network

    @property
    def in_mesh(self) -> bool:
        """Whether its new connections are captured and istiod knows."""
        return self.standing.redirected and self.standing.announced

    def release(self) -> None:
        """Tell whoever holds the pod's first process to ask again."""
        wake, self.wake = self.wake, None
        if wake is not None:
            wake()

    def enrolled(self) -> EnrolledPod:
        """What ztunnel is told of it."""
        metadata = self.object["metadata"]
        account = self.object["spec"].get("serviceAccountName") or "default"
        return EnrolledPod(self.uid, metadata["name"], metadata["namespace"], account, self.network)


class Enrolment:
    """This node's pods and where they belong; one task a pod takes its steps in order."""

    def __init__(self, client: Client, node: str, uds: Path) -> None:
        self._client = client
        self._node = node
        self._zds = ZdsServer(uds, self._answered, self._connection_changed)
        self._namespaces = Cache(client, NAMESPACES)
        self._pods: dict[str, _Pod] = {}
        self._early: list[Callable[[], None]] = []  # who asked before anything was known
        self._tasks: asyncio.TaskGroup | None = None
        self._turns = asyncio.Semaphore(_CONCURRENT)

    async def run(self) -> None:
        """Keep pods where they belong until cancelled; may be run again after it failed.

        Raises ApiError when the API refuses us, OSError when the socket cannot be made.
        """
        self._tasks = None
        self._pods.clear()
        self._namespaces = Cache(self._client, NAMESPACES)
        self._namespaces.on_change(self._namespace_changed)
        own = Cache(self._client, PODS, field_selector=f"spec.nodeName={self._node}")
        own.on_change(self._pod_changed)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._namespaces.run())
            tasks.create_task(own.run())
            await self._namespaces.synced.wait()
            await own.synced.wait()
            await self._recover()
            # ztunnel forgets what a snapshot does not name: it must not connect before we know all.
            self._tasks = tasks
            for pod in list(self._pods.values()):
                tasks.create_task(self._keep(pod))
            early, self._early = self._early, []
            for wake in early:
                wake()
            tasks.create_task(self._zds.run())

    async def holds(self, obj: Object, wake: Callable[[], None]) -> bool:
        """Whether a pod that has its network, but ran nothing yet, must wait for the mesh to take it in.

        A pod that belongs in the mesh starts when its connections are captured and istiod knows, however
        long ztunnel is away: its first connection must not leak in clear. `wake` is called when the answer
        may have changed. Raises ApiError, ApiUnreachable.
        """
        metadata = obj["metadata"]
        if metadata["namespace"] == UNHELD or not wanted(obj, "ambient"):
            return False
        if self._tasks is None:
            self._early.append(wake)
            return True
        mode = self._mode(metadata["namespace"])
        if mode != "ambient":  # the label may be younger than what the watch has told
            mode = _mode_of(await self._client.get(NAMESPACES, metadata["namespace"]))
        if not wanted(obj, mode):
            return False
        pod = self._learn(obj)
        pod.prepared = True
        pod.notice_network()
        if pod.in_mesh:
            return False
        pod.wake = wake
        pod.changed.set()
        return True

    async def _recover(self) -> None:
        """Learn from the kernel which pods an earlier agent left redirected, and keep those in the set."""

        async def look(pod: _Pod) -> None:
            async with self._turns:
                path = netns.NETNS / pod.uid
                pod.notice_network()
                pod.standing.redirected = await netns.within(None, lambda: redirection.redirected(path))
            if pod.standing.redirected or pod.standing.announced:
                pod.standing.asked = True
                pod.standing.drained_at = time.monotonic() + DRAIN
                self._zds.add(pod.enrolled())

        async with asyncio.TaskGroup() as tasks:
            for pod in self._pods.values():
                if pod.networked():
                    tasks.create_task(look(pod))

    def _mode(self, namespace: str) -> str | None:
        found = self._namespaces.get(namespace)
        return _mode_of(found) if found else None

    def _learn(self, obj: Object) -> _Pod:
        uid = obj["metadata"]["uid"]
        pod = self._pods.get(uid)
        if pod is None:
            pod = self._pods[uid] = _Pod(obj)
            if self._tasks is not None:
                self._tasks.create_task(self._keep(pod))
        return pod

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        if old is not None and (new is None or new["metadata"]["uid"] != old["metadata"]["uid"]):
            gone = self._pods.get(old["metadata"]["uid"])
            if gone is not None:
                gone.gone = True
                gone.changed.set()
        if new is not None:
            pod = self._learn(new)
            pod.object = new
            pod.standing.announced = announced(new)
            pod.changed.set()

    def _namespace_changed(self, old: Object | None, new: Object | None) -> None:
        name = (new or old or {})["metadata"]["name"]
        for pod in self._pods.values():
            if pod.object["metadata"]["namespace"] == name:
                pod.changed.set()

    def _answered(self, uid: str, error: str) -> None:
        pod = self._pods.get(uid)
        if pod is not None:
            pod.standing.listening = not error
            pod.refusal = error
            pod.changed.set()

    def _connection_changed(self, connected: bool) -> None:
        for pod in self._pods.values():
            if not connected:
                pod.standing.listening = False
            pod.changed.set()

    async def _keep(self, pod: _Pod) -> None:
        """Take a pod's steps until it is gone."""
        delay = _RETRY
        while True:
            pod.changed.clear()
            if pod.refusal:
                log("warning", "ztunnel cannot take the pod", **pod.where, error=pod.refusal)
                pod.refusal = ""
                await self._pause(pod, delay)
                delay = min(delay * 2, _RETRY_MOST)
                if pod.standing.asked:
                    self._zds.add(pod.enrolled())
                continue
            if not pod.gone:
                pod.notice_network()
            belongs = wanted(pod.object, self._mode(pod.object["metadata"]["namespace"]))
            if pod.wake and (pod.in_mesh or not belongs or pod.gone):
                pod.release()
            step = next_step(
                pod.standing,
                wanted=belongs,
                networked=pod.networked(),
                gone=pod.gone,
                now=time.monotonic(),
            )
            try:
                if step is Step.END:
                    self._pods.pop(pod.uid, None)
                    return
                if step is Step.REST:
                    await self._tell_obstacle(pod)
                    await pod.changed.wait()
                elif step is Step.AWAIT_NETWORK:
                    await self._pause(pod, delay)
                    delay = min(delay * 2, _NETWORK_POLL_MOST)
                elif step is Step.DRAIN:
                    await self._pause(pod, pod.standing.drained_at - time.monotonic())
                else:
                    await self._take(pod, step)
                    delay = _RETRY
            except (NetworkError, OSError, ApiError, ApiUnreachable) as error:
                log("warning", "enrolment step failed", **pod.where, step=step.value, error=str(error))
                await self._pause(pod, delay)
                delay = min(delay * 2, _RETRY_MOST)

    async def _pause(self, pod: _Pod, seconds: float) -> None:
        """Wait, but not longer than until something changes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0)):
                await pod.changed.wait()

    async def _take(self, pod: _Pod, step: Step) -> None:
        """One step. Raises NetworkError, OSError, ApiError, ApiUnreachable; it is then taken again."""
        standing, path = pod.standing, netns.NETNS / pod.uid
        match step:
            case Step.ASK:
                standing.asked = True
                self._zds.add(pod.enrolled())
                if not self._zds.connected:
                    consequence = (
                        "its containers do not start" if pod.wake else "the pod's traffic is plaintext"
                    )
                    why = f"ztunnel is not connected on {self._node}: {consequence} until it is"
                    await self._tell(pod, "WaitingForZtunnel", why)
            case Step.REDIRECT:
                async with self._turns:
                    dns = pod.captures_dns()
                    await netns.within(None, lambda: redirection.apply(path, dns=dns))
                standing.redirected = True
                log("info", "pod redirected", **pod.where)
            case Step.ANNOUNCE:
                await self._annotate(pod, "enabled")
                log("info", "pod enrolled", **pod.where)
            case Step.FLUSH:
                async with self._turns:
                    with contextlib.suppress(FileNotFoundError):  # its network is gone already
                        await netns.within(None, lambda: redirection.flush(path))
                standing.redirected = False
                standing.drained_at = time.monotonic() + DRAIN
            case Step.WITHDRAW:
                await self._annotate(pod, None)
                standing.drained_at = time.monotonic() + DRAIN
            case Step.FORGET:
                with contextlib.suppress(OSError, NetworkError):  # its network may be gone already
                    await netns.within(path, redirection.forget_queries)
                self._zds.remove(pod.uid)
                standing.asked = standing.listening = False
                log("info", "pod left the mesh", **pod.where)

    async def _annotate(self, pod: _Pod, value: str | None) -> None:
        metadata = pod.object["metadata"]
        # The uid keeps the patch from another pod of the same name.
        patch = {"metadata": {"uid": pod.uid, "annotations": {REDIRECTION: value}}}
        await self._client.patch(PODS, metadata["name"], patch, metadata["namespace"])
        pod.standing.announced = value is not None

    async def _tell_obstacle(self, pod: _Pod) -> None:
        """Say of a pod that was asked into the mesh why it is not captured."""
        mode = self._mode(pod.object["metadata"]["namespace"])
        why = obstacle(pod.object)
        if why and not pod.gone and asked(pod.object, mode):
            await self._tell(pod, "NotCaptured", f"the pod is labelled for the mesh but not captured: {why}")

    async def _tell(self, pod: _Pod, reason: str, message: str) -> None:
        """An Event, once a pod, for whoever asks why it is not in the mesh; losing it does no harm."""
        if reason in pod.told:
            return
        pod.told.add(reason)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        metadata = pod.object["metadata"]
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": pod.uid,
            },
            "type": "Warning",
            "reason": reason,
            "message": message,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": "enrolment", "host": self._node},
            "reportingComponent": "meshlight.io/enrolment",
            "reportingInstance": self._node,
        }
        with contextlib.suppress(ApiError, ApiUnreachable):
            await self._client.create(EVENTS, event)
