"""The node agent: keeps its node registered and runs a worker for each pod that is bound to it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import CONFIG_MAPS, PODS, Object
from meshlight.node import images, service_proxy
from meshlight.node.cgroups import Cgroups, cgroup_label
from meshlight.node.context import NodeContext
from meshlight.node.enrolment import Enrolment
from meshlight.node.events import Recorder, log
from meshlight.node.eviction import Evictions
from meshlight.node.kubelet_api import KubeletApi
from meshlight.node.network import PodNetwork, run_routes
from meshlight.node.oci.store import ImageStore
from meshlight.node.policies import Policies
from meshlight.node.references import References
from meshlight.node.registration import KUBELET_PORT, NodeIdentity, Registration
from meshlight.node.rootfs import Machine
from meshlight.node.worker import PodWorker

RUN = Path("/run/meshlight/nodes")
ZTUNNEL_SOCKET = "var/run/ztunnel/ztunnel.sock"
_RETRY = 1.0


class Agent:
    """One node's agent. Pods go on without it and are found again by the next one."""

    def __init__(self, client: Client, node: NodeIdentity, state: Path) -> None:
        self.client, self.node, self.state = client, node, state
        self.workers: dict[str, PodWorker] = {}
        self.images: dict[str, str] = {}
        self.registries: dict[str, str] = {}
        self.recorder = Recorder(client, node.name)
        self.references = References(client, self._reference_changed)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._settled = asyncio.Event()
        self._settling: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until cancelled."""
        run = RUN / self.node.name
        for folder in (run / "pods", run / "hostfs"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        pki, stem = self.state / "pki", f"node-{self.node.name}"
        api = KubeletApi(self.node.name, self.workers)
        runner = await api.serve(
            (self.node.address, KUBELET_PORT), pki / f"{stem}.crt", pki / f"{stem}.key", pki / "ca.crt"
        )
        timeout = aiohttp.ClientTimeout(total=None)
        enrolment = Enrolment(self.client, self.node.name, run / "hostfs" / ZTUNNEL_SOCKET)
        policies = Policies(self.client, self.node.name)
        machine = Machine.read(self.state)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            context = NodeContext(
                self.client,
                self.node.name,
                self.node.address,
                run,
                self.state / "nodes" / self.node.name / "pods",
                self.state / "volumes",
                machine,
                PodNetwork(self.node.index),
                self.references,
                self.recorder,
                http,
                self.images,
                Cgroups(cgroup_label(self.state)),
                enrolment,
                policies,
                ImageStore(self.state / "images", user_namespace=machine.in_user_namespace),
                self.registries,
            )
            registration = Registration(self.client, self.node, self.state, self.recorder, self._settled)
            try:
                async with asyncio.TaskGroup() as group:
                    for name, work in (
                        ("events", self.recorder.run),
                        ("registration", registration.run),
                        ("routes", lambda: run_routes(self.client, self.node.name)),
                        ("services", lambda: service_proxy.run(self.client, self.node.name, self.node.address)),
                        ("policies", policies.run),
                        ("enrolment", enrolment.run),
                        ("images", lambda: self._follow_entries(images.CONFIG_MAP, self.images)),
                        ("registries", lambda: self._follow_entries(images.REGISTRIES, self.registries)),
                        ("pods", lambda: self._follow_pods(context)),
                        ("evictions", Evictions(self.workers).run),
                    ):
                        group.create_task(_persist(name, work))
            finally:
                tasks = [*self._tasks.values(), *([self._settling] if self._settling else [])]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self.references.close()
                await runner.cleanup()

    async def _follow_entries(self, name: str, entries: dict[str, str]) -> None:
        """Keep a copy of what a ConfigMap of kube-system says; pods that wait for it look again."""
        selector = f"metadata.name={name}"
        events = self.client.watch(CONFIG_MAPS, "kube-system", field_selector=selector)
        async with contextlib.aclosing(events):
            async for event in events:
                if event.type == "SYNCED":
                    continue
                entries.clear()
                if event.type != "DELETED":
                    entries.update(event.object.get("data") or {})
                for worker in self.workers.values():
                    worker.poke()

    async def _follow_pods(self, context: NodeContext) -> None:
        events = self.client.watch(PODS, field_selector=f"spec.nodeName={self.node.name}")
        async with contextlib.aclosing(events):
            async for event in events:
                if event.type == "SYNCED":
                    await self._clean(context)
                    if self._settling is None:
                        self._settling = asyncio.create_task(self._settle(list(self.workers.values())))
                    continue
                pod = event.object
                uid = pod["metadata"]["uid"]
                worker = self.workers.get(uid)
                if event.type == "DELETED":
                    if worker is not None:
                        worker.deleted()
                elif worker is not None:
                    worker.changed(pod)
                else:
                    self._employ(PodWorker(context, pod, self._finished))

    async def _settle(self, workers: list[PodWorker]) -> None:
        """Nothing that an earlier start of the node left in the API is believed any more."""
        for worker in workers:
            await worker.settled.wait()
        self._settled.set()

    def _employ(self, worker: PodWorker) -> None:
        self.workers[worker.uid] = worker
        self._tasks[worker.uid] = asyncio.create_task(self._run_worker(worker))

    async def _run_worker(self, worker: PodWorker) -> None:
        while True:
            try:
                await worker.run()
                return
            except Exception as error:  # one pod's fault must not take the node with it
                log("error", "pod worker failed", pod=worker.uid, error=repr(error))
                await asyncio.sleep(_RETRY)

    def _finished(self, uid: str) -> None:
        self.workers.pop(uid, None)
        self._tasks.pop(uid, None)

    async def _clean(self, context: NodeContext) -> None:
        """End pods that were deleted from the API while no agent was here."""
        networks = await asyncio.to_thread(context.network.existing)
        left = {folder.name for folder in (context.run / "pods").iterdir()} | set(networks)
        for uid in left - set(self.workers):
            worker = PodWorker(context, _forgotten(uid), self._finished)
            worker.deleted()
            self._employ(worker)
        if context.logs.exists():
            for folder in context.logs.iterdir():
                if folder.name not in self.workers:
                    await asyncio.to_thread(shutil.rmtree, folder, True)

    def _reference_changed(self, uid: str) -> None:
        if worker := self.workers.get(uid):
            worker.refresh()


def _forgotten(uid: str) -> Object:
    """What stands for a pod of which only its processes and files are left."""
    return {"metadata": {"uid": uid, "namespace": "", "name": uid}, "spec": {"containers": []}}


async def _persist(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run a part of the agent again when it fails, as when the API refuses it before roles are in place."""
    while True:
        try:
            await work()
        except Exception as error:
            level = "warning" if isinstance(error, ApiError) else "error"
            log(level, "part of the node agent failed", part=name, error=repr(error))
        await asyncio.sleep(_RETRY)


async def serve(client: Client, node: NodeIdentity, state: Path) -> None:
    """Run the agent until SIGTERM or SIGINT."""
    async with client:
        task = asyncio.create_task(Agent(client, node, state).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            log("info", "node agent stopped", node=node.name)
