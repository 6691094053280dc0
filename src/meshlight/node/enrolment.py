"""istio-cni's role: moves pods into the mesh and out of it as labels say, without dropping a connection.

In: ztunnel listens in the pod, then new connections are redirected, then the annotation tells istiod.
Out: the reverse, with a drain during which peers that have not heard yet still find the listeners.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import NAMESPACES, PODS, Object
from meshlight.node import netns, redirection
from meshlight.node.netns import NetworkError
from meshlight.node.zds import EnrolledPod, NotDelivered, ZdsServer

DATAPLANE_MODE = "istio.io/dataplane-mode"
REDIRECTION = "ambient.istio.io/redirection"
SIDECAR_STATUS = "sidecar.istio.io/status"
ANNOUNCE = 1.0
"""Seconds between telling istiod that a pod leaves and redirecting no more: peers hear of it first."""
DRAIN = 5.0
"""Seconds for which a pod that left keeps its listeners."""
_RETRY = 0.5


def log(message: str, **fields: object) -> None:
    """One JSON event a line."""
    record = {"ts": time.time(), "level": "info", "scope": "enrolment", "msg": message, **fields}
    print(json.dumps(record), file=sys.stderr, flush=True)


def wanted(pod: Object, namespace_mode: str | None) -> bool:
    """Whether a pod belongs in the mesh: its own label wins over its namespace's, `none` opts out.

    Left out are host-network pods, ztunnel itself, pods with a sidecar, and pods that have ended.
    """
    metadata = pod["metadata"]
    labels = metadata.get("labels") or {}
    if pod["spec"].get("hostNetwork") or SIDECAR_STATUS in (metadata.get("annotations") or {}):
        return False
    if metadata["namespace"] == "istio-system" and labels.get("app") == "ztunnel":
        return False
    status = pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed") or not status.get("podIP"):
        return False
    return bool(labels.get(DATAPLANE_MODE, namespace_mode) == "ambient")


def announced(pod: Object) -> bool:
    """Whether the pod's annotation says that it is redirected."""
    return (pod["metadata"].get("annotations") or {}).get(REDIRECTION) == "enabled"


class Enrolment:
    """This node's pods, which of them are in the mesh, and one task for each that changes."""

    def __init__(self, client: Client, node: str, uds: Path) -> None:
        self._client = client
        self._node = node
        self._zds = ZdsServer(uds, self._reconsider)
        self._pods: dict[str, Object] = {}
        self._modes: dict[str, str] = {}
        self._enrolled: set[str] = set()
        self._working: dict[str, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Follow namespaces and pods for ever. Raises ApiError when the API refuses us."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self._zds.run())
            tasks.create_task(self._follow_namespaces())
            tasks.create_task(self._follow_pods())

    async def _follow_namespaces(self) -> None:
        async for event in self._client.watch(NAMESPACES):
            if event.type == "SYNCED":
                continue
            name = event.object["metadata"]["name"]
            mode = (event.object["metadata"].get("labels") or {}).get(DATAPLANE_MODE, "")
            if event.type == "DELETED":
                mode = ""
            if self._modes.get(name, "") != mode:
                self._modes[name] = mode
                for uid, pod in list(self._pods.items()):
                    if pod["metadata"]["namespace"] == name:
                        self._consider(uid)

    async def _follow_pods(self) -> None:
        async for event in self._client.watch(PODS, field_selector=f"spec.nodeName={self._node}"):
            if event.type == "SYNCED":
                continue
            uid = event.object["metadata"]["uid"]
            if event.type == "DELETED":
                self._pods.pop(uid, None)
            else:
                self._pods[uid] = event.object
            self._consider(uid)

    def _reconsider(self) -> None:
        """A ztunnel connected: pods that waited for one can go in."""
        for uid in self._pods:
            self._consider(uid)

    def _wanted(self, uid: str) -> bool:
        pod = self._pods.get(uid)
        return pod is not None and wanted(pod, self._modes.get(pod["metadata"]["namespace"]))

    def _settled(self, uid: str) -> bool:
        pod = self._pods.get(uid)
        if not self._wanted(uid):
            return uid not in self._enrolled and not (pod and announced(pod))
        return uid in self._enrolled and pod is not None and announced(pod)

    def _consider(self, uid: str) -> None:
        if self._tasks is not None and uid not in self._working and not self._settled(uid):
            self._working[uid] = self._tasks.create_task(self._converge(uid))

    async def _converge(self, uid: str) -> None:
        try:
            while not self._settled(uid):
                if self._wanted(uid):
                    if not await self._enter(self._pods[uid]):
                        return
                else:
                    await self._leave(uid)
        finally:
            self._working.pop(uid, None)

    async def _enter(self, pod: Object) -> bool:
        """Take a pod in; returns False when ztunnel must connect first (we are woken then)."""
        metadata = pod["metadata"]
        uid, name, namespace = metadata["uid"], metadata["name"], metadata["namespace"]
        account = pod["spec"].get("serviceAccountName") or "default"
        fields = {"pod": name, "namespace": namespace}
        try:
            await self._zds.add(EnrolledPod(uid, name, namespace, account))
            await asyncio.to_thread(redirection.apply, netns.NETNS / uid)
        except NotDelivered as error:
            log("pod waits for ztunnel", **fields, reason=str(error))
            if self._zds.connected:
                await asyncio.sleep(_RETRY)
                return True
            return False
        except (NetworkError, OSError) as error:
            log("redirection failed", **fields, reason=str(error))
            await asyncio.sleep(_RETRY)
            return True
        self._enrolled.add(uid)
        await self._annotate(uid, "enabled")
        log("pod enrolled", **fields)
        return True

    async def _leave(self, uid: str) -> None:
        """Take a pod out; one that is deleted has no namespace to clean any more."""
        if uid in self._pods:
            await self._annotate(uid, None)
            await asyncio.sleep(ANNOUNCE)
            try:
                await asyncio.to_thread(redirection.flush, netns.NETNS / uid)
            except (NetworkError, OSError) as error:
                log("redirection could not be flushed", uid=uid, reason=str(error))
            await asyncio.sleep(DRAIN)
            if self._wanted(uid):
                return
        self._enrolled.discard(uid)
        await self._zds.remove(uid)
        log("pod left the mesh", uid=uid)

    async def _annotate(self, uid: str, value: str | None) -> None:
        pod = self._pods.get(uid)
        if pod is None:
            return
        metadata = pod["metadata"]
        patch = {"metadata": {"uid": uid, "annotations": {REDIRECTION: value}}}
        try:
            changed = await self._client.patch(PODS, metadata["name"], patch, metadata["namespace"])
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            self._pods.pop(uid, None)  # deleted, or another pod of the same name: the watch will say
            return
        if uid in self._pods:
            self._pods[uid] = changed


async def run(client: Client, node: str, uds: Path) -> None:
    """Enrol this node's pods for ever; `uds` is where ztunnel connects. Raises ApiError."""
    await Enrolment(client, node, uds).run()
