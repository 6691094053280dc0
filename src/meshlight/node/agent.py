"""The node agent: registers its node, keeps its Lease, and runs a worker for each of its pods."""

from __future__ import annotations

import asyncio
import functools
import os
import platform
import signal
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from meshlight import __version__
from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import CONFIG_MAPS, LEASES, NODES, PODS, Object
from meshlight.node import enrolment, images, service_proxy
from meshlight.node.containers import ContainerState
from meshlight.node.events import Recorder, log
from meshlight.node.kubelet_api import PORT, KubeletApi, LoggedContainer
from meshlight.node.network import PodNetwork, node_address, pod_cidr, run_routes
from meshlight.node.podstatus import timestamp
from meshlight.node.references import References
from meshlight.node.rootfs import Machine
from meshlight.node.worker import NodeContext, PodWorker

RUN = Path("/run/meshlight/nodes")
LEASE_SECONDS = 40
RENEWAL = 10.0
MAX_PODS = 110


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Which node this is; `index` is 1-based."""

    name: str
    index: int

    @property
    def address(self) -> str:
        """The node's own address."""
        return node_address(self.index)


def node_object(node: NodeIdentity, now: float) -> Object:
    """The Node as it registers, status included."""
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 1024}Ki"
    resources = {"cpu": str(os.cpu_count() or 1), "memory": memory, "pods": str(MAX_PODS)}
    stamp = timestamp(now)
    good = {"lastHeartbeatTime": stamp, "lastTransitionTime": stamp}
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {
                "kubernetes.io/hostname": node.name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": machine,
                "beta.kubernetes.io/os": "linux",
                "beta.kubernetes.io/arch": machine,
            },
        },
        "spec": {"podCIDR": pod_cidr(node.index), "podCIDRs": [pod_cidr(node.index)]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": node.address},
                {"type": "Hostname", "address": node.name},
            ],
            "capacity": resources,
            "allocatable": resources,
            "conditions": [
                {"type": "MemoryPressure", "status": "False", "reason": "KubeletHasSufficientMemory",
                 "message": "kubelet has sufficient memory available", **good},
                {"type": "DiskPressure", "status": "False", "reason": "KubeletHasNoDiskPressure",
                 "message": "kubelet has no disk pressure", **good},
                {"type": "PIDPressure", "status": "False", "reason": "KubeletHasSufficientPID",
                 "message": "kubelet has sufficient PID available", **good},
                {"type": "Ready", "status": "True", "reason": "KubeletReady",
                 "message": "kubelet is posting ready status", **good},
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": PORT}},
            "nodeInfo": {
                "architecture": machine,
                "operatingSystem": "linux",
                "kernelVersion": platform.release(),
                "osImage": _os_name(),
                "containerRuntimeVersion": f"meshlight://{__version__}",
                "kubeletVersion": f"v1.32.0-meshlight.{__version__}",
                "kubeProxyVersion": "",
                "machineID": boot_id.replace("-", ""),
                "systemUUID": boot_id,
                "bootID": boot_id,
            },
        },
    }  # fmt: skip


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


class Agent:
    """One node's agent."""

    def __init__(self, client: Client, node: NodeIdentity, state: Path) -> None:
        self.client, self.node, self.state = client, node, state
        self.workers: dict[str, PodWorker] = {}
        self.images: dict[str, str] = {}
        self.recorder = Recorder(client, node.name)
        self.references = References(client, self._poke)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Serve until cancelled; pods go on without us."""
        run = RUN / self.node.name
        for folder in (run / "pods", run / "hostfs"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        pki, stem = self.state / "pki", f"node-{self.node.name}"
        api = KubeletApi(self._find_log, lambda: [w.pod for w in self.workers.values()])
        runner = await api.serve(self.node.address, pki / f"{stem}.crt", pki / f"{stem}.key", pki / "ca.crt")
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            context = NodeContext(
                self.client,
                self.node.name,
                self.node.address,
                run,
                self.state / "nodes" / self.node.name / "pods",
                Machine.read(self.state),
                PodNetwork(self.node.index),
                self.references,
                self.recorder,
                http,
                self.images,
            )
            uds = run / "hostfs/var/run/ztunnel/ztunnel.sock"
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.recorder.run())
                    group.create_task(self._keep_registered())
                    for work in (
                        lambda: run_routes(self.client, self.node.name),
                        lambda: service_proxy.run(self.client, self.node.name),
                        lambda: enrolment.run(self.client, self.node.name, uds),
                        self._follow_images,
                        lambda: self._follow_pods(context),
                    ):
                        group.create_task(_persist(work))
            finally:
                for task in self._tasks.values():
                    task.cancel()
                await asyncio.gather(*self._tasks.values(), return_exceptions=True)
                await self.references.close()
                await runner.cleanup()

    # Registration.

    async def _keep_registered(self) -> None:
        while True:
            try:
                await self._register()
                await self._renew()
            except (ApiError, ApiUnreachable) as error:
                log("warning", "cannot register", error=str(error))
                await asyncio.sleep(0.2)

    async def _register(self) -> None:
        wanted = node_object(self.node, time.time())
        try:
            await self.client.create(NODES, wanted)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            labels = {"labels": wanted["metadata"]["labels"]}
            await self.client.patch(NODES, self.node.name, {"metadata": labels, "spec": wanted["spec"]})
        await self.client.patch(NODES, self.node.name, {"status": wanted["status"]}, subresource="status")
        log("info", "node registered", node=self.node.name)

    async def _renew(self) -> None:
        """Renew the Lease until something fails, or the node was told dead meanwhile."""
        while True:
            renewed = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            spec = {
                "holderIdentity": self.node.name,
                "leaseDurationSeconds": LEASE_SECONDS,
                "renewTime": renewed,
            }
            namespace = "kube-node-lease"
            try:
                await self.client.patch(LEASES, self.node.name, {"spec": spec}, namespace)
            except ApiError as error:
                if error.code != 404:
                    raise
                metadata = {"name": self.node.name, "namespace": namespace}
                await self.client.create(LEASES, {"metadata": metadata, "spec": spec})
            await asyncio.sleep(RENEWAL)
            known = await self.client.get(NODES, self.node.name)
            conditions = (known.get("status") or {}).get("conditions") or []
            if any(c["type"] == "Ready" and c["status"] != "True" for c in conditions):
                return  # we were silent for too long: say that we are well

    # Pods.

    async def _follow_images(self) -> None:
        selector = f"metadata.name={images.CONFIG_MAP}"
        async for event in self.client.watch(CONFIG_MAPS, "kube-system", field_selector=selector):
            if event.type == "SYNCED":
                continue
            self.images.clear()
            if event.type != "DELETED":
                self.images.update(event.object.get("data") or {})
            for worker in self.workers.values():
                worker.poke()

    async def _follow_pods(self, context: NodeContext) -> None:
        async for event in self.client.watch(PODS, field_selector=f"spec.nodeName={self.node.name}"):
            if event.type == "SYNCED":
                await self._clean(context)
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
                worker = self.workers[uid] = PodWorker(context, pod, self._finished)
                self._tasks[uid] = asyncio.create_task(self._run_worker(worker))

    async def _run_worker(self, worker: PodWorker) -> None:
        try:
            await worker.run()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # one pod's fault must not take the node with it
            log("error", "pod worker failed", pod=worker.uid, error=repr(error))
            self._finished(worker.uid)

    def _finished(self, uid: str) -> None:
        self.workers.pop(uid, None)
        self._tasks.pop(uid, None)

    async def _clean(self, context: NodeContext) -> None:
        """End pods that were deleted from the API while no agent was here."""
        for folder in (context.run / "pods").iterdir():
            if folder.name not in self.workers:
                placeholder: Object = {
                    "metadata": {"uid": folder.name, "namespace": "", "name": folder.name},
                    "spec": {"containers": []},
                }
                worker = self.workers[folder.name] = PodWorker(context, placeholder, self._finished)
                worker.deleted()
                self._tasks[folder.name] = asyncio.create_task(self._run_worker(worker))

    def _poke(self, uid: str) -> None:
        if worker := self.workers.get(uid):
            worker.refresh()

    def _find_log(self, namespace: str, name: str, container: str, previous: bool) -> LoggedContainer | str:
        for worker in self.workers.values():
            metadata = worker.pod["metadata"]
            if (metadata["namespace"], metadata["name"]) != (namespace, name):
                continue
            state = worker.containers.get(container)
            if state is None or state.last is None:
                return f'container "{container}" in pod "{name}" has not started'
            runs = state.runs
            if previous and len(runs) < 2:
                return f'previous terminated container "{container}" in pod "{name}" not found'
            attempt = runs[-2 if previous else -1].attempt
            folder = self.state / "nodes" / self.node.name / "pods"

            running = functools.partial(_running, state, attempt)
            return LoggedContainer(folder / worker.uid / container / f"{attempt}.log", running)
        return f'pods "{name}" not found on this node'


def _running(state: ContainerState, attempt: int) -> bool:
    return any(run.attempt == attempt and not run.finished for run in state.runs)


async def _persist(work: Any) -> None:
    """Begin a watch anew when the API refuses it, as before roles are in place."""
    while True:
        try:
            coroutine: Coroutine[Any, Any, None] = work()
            await coroutine
        except ApiError as error:
            log("warning", "refused", error=str(error))
            await asyncio.sleep(1)


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
