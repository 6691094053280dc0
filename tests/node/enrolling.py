"""Scenarios of enrolment: the node agent's real part, an API and a ztunnel small enough to see through."""

from __future__ import annotations

import asyncio
import copy
import os
import socket
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from typing import Any

from lab import Node, Pod, Proxy, echo, load, read, wait_until

from meshlight.kube.client import WatchEvent
from meshlight.kube.resources import EVENTS, NAMESPACES, PODS, Resource
from meshlight.node import enrolment, netns, redirection
from meshlight.node.enrolment import DATAPLANE_MODE, REDIRECTION, Enrolment
from meshlight.proto import zds_pb2

enrolment.DRAIN = 0.3


class Api:
    """Objects and their watches; the part of `Client` that enrolment uses. Any thread may change it."""

    def __init__(self) -> None:
        self.objects: dict[Resource, dict[str, dict[str, Any]]] = defaultdict(dict)
        self.watchers: list[tuple[Resource, asyncio.AbstractEventLoop, asyncio.Queue[WatchEvent]]] = []
        self.patches: list[str] = []

    def put(self, resource: Resource, obj: dict[str, Any]) -> None:
        uid = obj["metadata"]["uid"]
        kind = "MODIFIED" if uid in self.objects[resource] else "ADDED"
        self.objects[resource][uid] = obj
        self._tell(resource, WatchEvent(kind, copy.deepcopy(obj)))  # type: ignore[arg-type]

    def drop(self, resource: Resource, uid: str) -> None:
        self._tell(resource, WatchEvent("DELETED", self.objects[resource].pop(uid)))

    def _tell(self, resource: Resource, event: WatchEvent) -> None:
        for watched, loop, queue in self.watchers:
            if watched is resource:
                loop.call_soon_threadsafe(queue.put_nowait, event)

    async def watch(self, resource: Resource, **_: str) -> AsyncGenerator[WatchEvent, None]:
        queue: asyncio.Queue[WatchEvent] = asyncio.Queue()
        self.watchers.append((resource, asyncio.get_running_loop(), queue))
        try:
            for obj in list(self.objects[resource].values()):
                yield WatchEvent("ADDED", copy.deepcopy(obj))
            yield WatchEvent("SYNCED", {})
            while True:
                yield await queue.get()
        finally:
            self.watchers = [w for w in self.watchers if w[2] is not queue]

    async def patch(self, resource: Resource, name: str, patch: Any, namespace: str) -> dict[str, Any]:
        obj = copy.deepcopy(self.objects[resource][patch["metadata"]["uid"]])
        assert (obj["metadata"]["name"], obj["metadata"]["namespace"]) == (name, namespace)
        for key, value in patch["metadata"]["annotations"].items():
            self.patches.append(f"{name} {value}")
            annotations = obj["metadata"].setdefault("annotations", {})
            annotations.pop(key, None)
            if value is not None:
                annotations[key] = value
        self.put(resource, obj)
        return obj

    async def get(self, resource: Resource, name: str) -> dict[str, Any]:
        return next(o for o in self.objects[resource].values() if o["metadata"]["name"] == name)

    async def create(self, resource: Resource, obj: dict[str, Any]) -> dict[str, Any]:
        self.objects[resource][str(len(self.objects[resource]))] = obj
        return obj

    def label(self, mode: str) -> None:
        """Set the namespace's mode; empty removes it."""
        labels = {DATAPLANE_MODE: mode} if mode else {}
        self.put(NAMESPACES, {"metadata": {"name": "demo", "uid": "ns", "labels": labels}})

    def pod(self, pod: Pod, **status: Any) -> dict[str, Any]:
        """Create the API's object of a pod."""
        obj = {
            "metadata": {"name": pod.uid, "namespace": "demo", "uid": pod.uid},
            "spec": {"serviceAccountName": "cart"},
            "status": {"phase": "Running", "podIP": pod.address, **status},
        }
        self.put(PODS, obj)
        return obj

    def enrolled(self, uid: str) -> bool:
        annotations = self.objects[PODS][uid]["metadata"].get("annotations") or {}
        return annotations.get(REDIRECTION) == "enabled"


class Agent:
    """The node agent's enrolment in a thread of its node's namespace, as its process would run it."""

    def __init__(self, node: Node, api: Api, uds: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.enrolment = Enrolment(api, node.name, uds)  # type: ignore[arg-type]
        self.error: BaseException | None = None

        def body() -> None:
            netns.enter(node.path)
            asyncio.set_event_loop(self.loop)
            self.task = self.loop.create_task(self.enrolment.run())
            try:
                self.loop.run_until_complete(self.task)
            except asyncio.CancelledError:
                pass
            except BaseException as error:
                self.error = error
                raise

        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def admits(self, obj: dict[str, Any]) -> bool:
        """Whether the kubelet may start a pod's first process now."""
        return not self.do(self.enrolment.holds(obj, lambda: None))

    def admit(self, obj: dict[str, Any]) -> None:
        """Wait as the kubelet does: ask, and ask again when woken."""

        async def body() -> None:
            woken = asyncio.Event()
            while await self.enrolment.holds(obj, woken.set):
                await woken.wait()
                woken.clear()

        self.do(body())

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(10)
        assert not self.thread.is_alive() and self.error is None


class Ztunnel:
    """Connects, and keeps a `Proxy` in every pod that it is told of."""

    def __init__(self, uds: Path, *, refuse: int = 0) -> None:
        self.told: list[str] = []
        self.proxies: dict[str, Proxy] = {}
        self.refuse = refuse
        self.stream = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        wait_until(lambda: self._connect(uds), "the agent to listen")
        self.stream.send(zds_pb2.ZdsHello(version=zds_pb2.V1).SerializeToString())
        threading.Thread(target=self._run, daemon=True).start()

    def _connect(self, uds: Path) -> bool:
        # From its own mounts ztunnel knows the folder by a shorter name.
        try:
            folder = os.open(uds.parent, os.O_PATH)
            try:
                self.stream.connect(f"/proc/self/fd/{folder}/{uds.name}")
            finally:
                os.close(folder)
        except OSError:
            return False
        return True

    def _run(self) -> None:
        while True:
            packet, descriptors, _, _ = socket.recv_fds(self.stream, 65536, 4)
            if not packet:
                return
            error = self._obey(zds_pb2.WorkloadRequest.FromString(packet), descriptors)
            self.stream.send(zds_pb2.WorkloadResponse(ack=zds_pb2.Ack(error=error)).SerializeToString())

    def _obey(self, request: Any, descriptors: list[int]) -> str:
        what = request.WhichOneof("payload")
        uid = "" if what == "snapshot_sent" else getattr(request, what).uid
        self.told.append(f"{what} {uid}".strip())
        if what == "add":
            (descriptor,) = descriptors
            assert os.fstat(descriptor).st_ino == netns.identity(uid), "the pod's own namespace"
            os.close(descriptor)
            if self.refuse:
                self.refuse -= 1
                return "not today"
            self.proxies[uid] = Proxy(Pod(uid, ""))
        elif what == "del":
            self.proxies.pop(uid).close()
        return ""

    def die(self) -> None:
        self.stream.shutdown(socket.SHUT_RDWR)
        for proxy in self.proxies.values():
            proxy.close()


def lab() -> tuple[Node, Node, Api, Path]:
    one, two, api = Node(1), Node(2), Api()
    api.label("")
    return one, two, api, Path("/run", "a-node-with-a-long-name" * 5, "hostfs", "ztunnel.sock")


def captured(pod: Pod, peer: Pod, ztunnel: Ztunnel) -> bool:
    """Whether a new connection of the pod goes through ztunnel."""
    before = len(ztunnel.proxies[pod.uid].seen) if pod.uid in ztunnel.proxies else 0
    pod.ask(peer.address, 80)
    return pod.uid in ztunnel.proxies and len(ztunnel.proxies[pod.uid].seen) > before


def label_changes() -> None:
    """No connection fails, short or long, while a namespace's label comes and goes."""
    one, two, api, uds = lab()
    app, peer = one.pod("app"), two.pod("peer")
    for pod in (app, peer):
        pod.serve(80)
    api.pod(app)
    agent, ztunnel = Agent(one, api, uds), Ztunnel(uds)
    assert uds.stat().st_mode & 0o777 == 0o600 and uds.parent.stat().st_mode & 0o777 == 0o700
    held = [app.connect(peer.address, 80), peer.connect(app.address, 80)]
    assert [read(s) for s in held] == [f"peer {app.address}", f"app {peer.address}"]
    with load(lambda: app.ask(peer.address, 80)) as out, load(lambda: peer.ask(app.address, 80)) as into:
        for _ in range(3):
            api.label("ambient")
            wait_until(lambda: api.enrolled("app"), "enrolment")
            held += [app.connect(peer.address, 80), peer.connect(app.address, 80)]
            for stream in held[-2:]:
                read(stream)
            assert captured(app, peer, ztunnel)
            for stream in held:
                echo(stream, "inside")
            proxy = ztunnel.proxies["app"]
            api.label("")
            wait_until(lambda: not api.enrolled("app"), "un-enrolment")
            assert not redirection.redirected(app.path), "by the time istiod hears, plaintext is not captured"
            with peer.connect(app.address, 15008) as stream:
                assert read(stream) == "hbone", "a peer that has not heard still finds the listener"
            wait_until(lambda: "app" not in ztunnel.proxies, "ztunnel to stop listening")
            assert proxy is not ztunnel.proxies.get("app")
            for stream in held:
                echo(stream, "outside")
        # Wanted again while draining: the listeners stay, and ztunnel hears nothing.
        api.label("ambient")
        wait_until(lambda: api.enrolled("app"), "enrolment")
        told = list(ztunnel.told)
        api.label("")
        wait_until(lambda: not api.enrolled("app"), "un-enrolment")
        api.label("ambient")
        wait_until(lambda: api.enrolled("app"), "enrolment")
        assert ztunnel.told == told
    assert not out and not into, (out[:3], into[:3])
    assert ztunnel.told[:4] == ["snapshot_sent", "add app", "del app", "add app"]
    one.remove("app")
    api.drop(PODS, "app")
    wait_until(lambda: ztunnel.told[-1] == "del app", "ztunnel to hear of the deletion")
    agent.stop()


def restarts() -> None:
    """The agent and ztunnel come and go; what is redirected stays so, and is named in each snapshot."""
    one, two, api, uds = lab()
    app, other, peer = one.pod("app"), one.pod("other"), two.pod("peer")
    for pod in (app, peer, other):
        pod.serve(80)
    api.pod(app)
    api.label("ambient")
    agent, ztunnel = Agent(one, api, uds), Ztunnel(uds)
    wait_until(lambda: api.enrolled("app"), "enrolment")
    held = app.connect(peer.address, 80)
    read(held)
    patches = list(api.patches)
    # ztunnel's connection breaks, as with a restart whose old process still drains.
    ztunnel.stream.shutdown(socket.SHUT_RDWR)
    assert redirection.redirected(app.path) and api.enrolled("app")
    ztunnel.die()
    ztunnel = Ztunnel(uds)
    wait_until(lambda: "snapshot_sent" in ztunnel.told, "a snapshot")
    assert ztunnel.told == ["add app", "snapshot_sent"] and captured(app, peer, ztunnel)
    # The agent restarts; ztunnel goes on and connects again.
    agent.stop()
    assert captured(app, peer, ztunnel)
    ztunnel.die()
    agent, ztunnel = Agent(one, api, uds), Ztunnel(uds)
    wait_until(lambda: "snapshot_sent" in ztunnel.told, "a snapshot")
    assert ztunnel.told == ["add app", "snapshot_sent"] and captured(app, peer, ztunnel)
    assert api.patches == patches, "nothing was announced or withdrawn on the way"
    # An upgrade: the newest is told of everything, the older of departures.
    newer = Ztunnel(uds)
    wait_until(lambda: "snapshot_sent" in newer.told, "a snapshot")
    api.pod(other)
    wait_until(lambda: api.enrolled("other"), "enrolment by the newer one")
    assert newer.told == ["add app", "snapshot_sent", "add other"]
    assert ztunnel.told == ["add app", "snapshot_sent"]
    echo(held, "through it all")
    api.drop(PODS, "app")
    wait_until(lambda: ztunnel.told[-1] == newer.told[-1] == "del app", "both to hear of the departure")
    # The newest goes: the older one takes over what it has not heard of.
    newer.die()
    wait_until(lambda: ztunnel.told[-1] == "add other", "the older one to be told")
    # The label goes while no agent runs.
    agent.stop()
    api.label("")
    agent = Agent(one, api, uds)
    wait_until(lambda: not api.enrolled("other"), "un-enrolment")
    assert not redirection.redirected(other.path)
    agent.stop()


def new_pods() -> None:
    """A new pod waits until its first connection is captured; without ztunnel an Event says so."""
    one, two, api, uds = lab()
    early, peer = one.pod("early"), two.pod("peer")
    for pod in (early, peer):
        pod.serve(80)
    api.label("ambient")
    api.pod(early)
    agent = Agent(one, api, uds)
    (event,) = wait_until(lambda: list(api.objects[EVENTS].values()), "an Event")
    assert event["reason"] == "WaitingForZtunnel" and event["involvedObject"]["name"] == "early"
    assert early.ask(peer.address, 80) and not redirection.redirected(early.path)
    assert not api.enrolled("early")
    fresh = one.pod("fresh")
    waiting = api.pod(fresh)
    assert not agent.admits(waiting), "nothing leaks in clear while ztunnel is away"
    wait_until(lambda: len(api.objects[EVENTS]) == 2, "an Event for the new one")
    assert "do not start" in list(api.objects[EVENTS].values())[-1]["message"]
    ztunnel = Ztunnel(uds, refuse=2)
    agent.admit(waiting)
    assert captured(fresh, peer, ztunnel) and api.enrolled("fresh")
    wait_until(lambda: api.enrolled("early"), "enrolment once ztunnel is there, and willing")
    assert captured(early, peer, ztunnel)
    # As the kubelet starts a pod: its network, then this, then its containers.
    obj = api.pod(Pod("new", ""), podIP=None)
    new = one.pod("new")
    agent.admit(obj)
    assert captured(new, peer, ztunnel), "before the API knows its address"
    assert api.enrolled("new")
    # Its network is made anew, as after the end of its sandbox.
    one.remove("new")
    new = one.pod("new")
    agent.admit(obj)
    assert ztunnel.told[-2:] == ["del new", "add new"] and captured(new, peer, ztunnel)
    # Pods that stay out.
    out = one.pod("out")
    labelled = api.pod(out)
    labelled["metadata"]["labels"] = {DATAPLANE_MODE: "none"}
    api.put(PODS, labelled)
    assert agent.admits(labelled)
    assert not redirection.redirected(out.path)
    # The label goes while a pod waits.
    ztunnel.die()
    late = api.pod(one.pod("late"))
    assert not agent.admits(late)
    api.label("")
    agent.admit(late)
    agent.stop()
