"""One pod on its node: observes, asks `lifecycle` what to do, does it, and tells the API.

The only place where decisions meet processes. One worker a pod; it decides anew when the pod, its
sandbox, its probes or what it refers to changed, and at the times that a decision names.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import PODS, SERVICE_ACCOUNTS, Object
from meshlight.node import images, lifecycle, podstatus, resolver
from meshlight.node.containers import ContainerState, remembered, run_of
from meshlight.node.environment import ConfigError, Place, Sources, variables
from meshlight.node.events import Recorder, log
from meshlight.node.launching import Surroundings, base_environment, beside, program
from meshlight.node.netns import NetworkError
from meshlight.node.network import PodNetwork
from meshlight.node.probes import Health, Prober, check
from meshlight.node.references import References
from meshlight.node.rootfs import Machine
from meshlight.node.runtime import Sandbox, SandboxError
from meshlight.node.volumes import PodVolumes, VolumeError, with_api_access

_RETRY = 1.0
_OUTPUT_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class NodeContext:
    """What every worker of a node shares. `run` is node-local and private, `logs` outlives a restart."""

    client: Client
    name: str
    address: str
    run: Path
    logs: Path
    machine: Machine
    network: PodNetwork
    references: References
    recorder: Recorder
    http: aiohttp.ClientSession
    image_mapping: Mapping[str, str]

    def log_path(self, uid: str, container: str, attempt: int) -> Path:
        """Where an attempt's output is kept."""
        return self.logs / uid / container / f"{attempt}.log"


def _machine_resolver() -> str:
    path = Path("/etc/resolv.conf")
    return path.read_text() if path.exists() else ""


class PodWorker:
    """Runs one pod until it is gone from the API; `finished` is called then."""

    def __init__(self, node: NodeContext, pod: Object, finished: Callable[[str], None]) -> None:
        self.node, self.pod, self._finished = node, pod, finished
        self.uid = str(pod["metadata"]["uid"])
        self.folder = node.run / "pods" / self.uid
        self.sandbox: Sandbox | None = None
        self.containers: dict[str, ContainerState] = {}
        self._address = ""
        self._gone = False
        self._wake = asyncio.Event()
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self._probers: dict[str, asyncio.Task[None]] = {}
        self._stopped_for = self._stopped_message = ""
        self._volumes = PodVolumes(node.client, self.folder / "volumes", node.run / "hostfs")
        self._status: Object | None = None
        self._stale = False

    # What others tell the worker.

    def changed(self, pod: Object) -> None:
        """The object changed in the API."""
        self.pod = pod
        self._wake.set()

    def deleted(self) -> None:
        """The object is gone from the API: end at once."""
        self._gone = True
        self._wake.set()

    def poke(self) -> None:
        """Something that the pod depends on changed."""
        for state in self.containers.values():
            if state.waiting:
                state.clear()
        self._wake.set()

    def refresh(self) -> None:
        """A ConfigMap or Secret that the pod refers to changed: bring its files up to date."""
        self._stale = True
        self.poke()

    # The loop.

    async def run(self) -> None:
        """Work until the pod is gone."""
        try:
            await self._adopt()
            while True:
                self._wake.clear()
                delay = await self._turn()
                if delay is None:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), delay or None)
        finally:
            for task in [*self._probers.values(), *self._stopping.values()]:
                task.cancel()
            if self.sandbox is not None:
                self.sandbox.close()

    async def _turn(self) -> float | None:
        """Observe, decide, act, tell; seconds until the next turn (0: when woken), None at the end."""
        try:
            self._observe()
            if self._gone:
                await self._remove_everything()
                return None
            now = time.time()
            if lifecycle.deadline_passed(self.pod, now) and not self._stopped_for:
                self._stopped_for = "DeadlineExceeded"
                self._stopped_message = "Pod was active on the node longer than the specified deadline"
            if self.sandbox is not None and (self._stale or 0 < self._volumes.refresh_at <= now):
                self._stale = False
                await self._prepared()
            decision = lifecycle.decide(self.pod, self._view(), now)
            done = False
            for action in decision.actions:
                done = await self._act(action) or done
            self._observe()
            await self._tell()
            if done:
                return None
            if decision.actions and not all(isinstance(a, lifecycle.Stop) for a in decision.actions):
                return 0.001  # an action changes what is decided next
            times = [t for t in (decision.wake_at, self._volumes.refresh_at) if t]
            return max(0.001, min(times) - time.time()) if times else 0.0
        except (ApiError, OSError, NetworkError, SandboxError, VolumeError) as error:
            reason = "FailedMount" if isinstance(error, VolumeError) else "FailedCreatePodSandBox"
            self._event("Warning", reason, str(error))
            log("warning", "pod cannot go on", pod=self._name(), error=str(error))
            with contextlib.suppress(ApiError):
                await self._tell()
            return _RETRY

    async def _adopt(self) -> None:
        """Find what runs already, or what the API remembers of an earlier life of the machine."""
        if self.folder.exists():
            self.sandbox = await Sandbox.adopt(self.folder, self._wake.set)
        status = self.pod.get("status") or {}
        self._address = status.get("podIP") or ""
        if self.sandbox is None:
            if self._address and not self.pod["spec"].get("hostNetwork"):
                self._address = ""
            now = time.time()
            for entry in [
                *(status.get("initContainerStatuses") or []),
                *(status.get("containerStatuses") or []),
            ]:
                self.containers[entry["name"]] = remembered(entry, now)

    def _observe(self) -> None:
        if self.sandbox is None:
            return
        if not self.sandbox.alive:
            now = time.time()
            for name, state in self.containers.items():
                if (last := state.last) and not last.finished:
                    lost = lifecycle.Run(
                        last.attempt, last.started, now, 137, 9, "Error", "the pod's pid 1 ended"
                    )
                    state.put(lost)
                    state.ended(lost)
                state.floor = (state.last.attempt + 1) if state.last else 0
                self._stop_probing(name)
            self.sandbox = None
            return
        for name, attempts in self.sandbox.attempts.items():
            state = self.containers.setdefault(name, ContainerState())
            for attempt in attempts:
                run = run_of(attempt)
                if state.put(run):
                    state.ended(run)
                    self._stop_probing(name)
            if self.sandbox.running(name) and name not in self._probers:
                self._probe(name, state)

    def _view(self) -> lifecycle.View:
        return lifecycle.View(
            self.sandbox is not None,
            {name: state.observed() for name, state in self.containers.items()},
            frozenset(self._stopping),
            self._stopped_for,
        )

    async def _act(self, action: lifecycle.Action) -> bool:
        """Perform an action; whether the worker is done."""
        match action:
            case lifecycle.CreateSandbox():
                await self._create_sandbox()
            case lifecycle.Start(name, attempt):
                await self._start(name, attempt)
            case lifecycle.Stop(name, why):
                self._stopping[name] = asyncio.create_task(self._stop(name, why))
            case lifecycle.RemoveSandbox():
                await self._remove_sandbox()
            case lifecycle.Finish():
                await self._tell()
                metadata = self.pod["metadata"]
                options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
                path = PODS.path(metadata["namespace"], metadata["name"])
                with contextlib.suppress(ApiError):  # deleted by force, or replaced, meanwhile
                    await self.node.client.request("DELETE", path, options)
                await self._remove_everything()
                return True
        return False

    # Sandbox.

    def _host_network(self) -> bool:
        return bool(self.pod["spec"].get("hostNetwork"))

    async def _create_sandbox(self) -> None:
        if self._host_network():
            self._address = self.node.address
        else:
            self._address = await self.node.network.add(self.uid, None)
        netns = None if self._host_network() else self.uid
        self.sandbox = await Sandbox.create(self.folder, resolver.hostname(self.pod), netns, self._wake.set)
        for state in self.containers.values():
            state.floor = (state.last.attempt + 1) if state.last else 0

    async def _remove_sandbox(self) -> None:
        if self.sandbox is not None:
            await self.sandbox.stop()
            self._observe()
        if not self._host_network():
            await self.node.network.remove(self.uid)
        await asyncio.to_thread(shutil.rmtree, self.folder, True)

    async def _remove_everything(self) -> None:
        await self._remove_sandbox()
        self.node.references.release(self.uid)
        await asyncio.to_thread(shutil.rmtree, self.node.logs / self.uid, True)
        self._finished(self.uid)

    # Containers.

    def _container(self, name: str) -> Object:
        spec = self.pod["spec"]
        return next(c for c in [*lifecycle.init_containers(self.pod), *spec["containers"]] if c["name"] == name)

    def _place(self) -> Place:
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Place(self._address, self.node.address, os.cpu_count() or 1, pages)

    async def _prepared(self) -> tuple[Object, Sources]:
        """The pod with its token volume, its volumes written, and what it refers to."""
        metadata, spec = self.pod["metadata"], self.pod["spec"]
        automounts = True
        if spec.get("automountServiceAccountToken") is None:
            name = spec.get("serviceAccountName") or "default"
            account = await self.node.client.get(SERVICE_ACCOUNTS, name, metadata["namespace"])
            automounts = account.get("automountServiceAccountToken") is not False
        pod = with_api_access(self.pod, automounts)
        sources = await self.node.references.sources(pod)
        await self._volumes.update(pod, sources, self._place())
        return pod, sources

    async def _start(self, name: str, attempt: int) -> None:
        state = self.containers.setdefault(name, ContainerState())
        own = self._container(name)
        try:
            image_program = images.resolve(own, self.node.image_mapping)
            pod, sources = await self._prepared()
            container = next(
                c for c in [*lifecycle.init_containers(pod), *pod["spec"]["containers"]] if c["name"] == name
            )
            env = variables(pod, container, sources, self._place(), base_environment(pod, self.node.machine))
            log_path = self.node.log_path(self.uid, name, attempt)
            log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            around = Surroundings(
                self.folder / "roots" / name / str(attempt),
                log_path,
                resolver.files(pod, self._address, _machine_resolver()),
                self._volumes.mounts(container, env),
                [],
            )
            assert self.sandbox is not None
            state.image_id = " ".join(image_program) or " ".join(container.get("command") or [])[:200]
            self._event(
                "Normal", "Pulled", f'Container image "{own["image"]}" already present on machine', name
            )
            wanted = program(pod, container, image_program, env, self.node.machine, around)
            await self.sandbox.start(name, attempt, wanted, {})
        except images.UnknownImage as error:
            reason = "ImagePullBackOff" if state.failures else "ErrImagePull"
            self._refuse(state, name, reason, str(error))
        except ConfigError as error:
            self._refuse(state, name, "CreateContainerConfigError", str(error))
        except SandboxError as error:
            self._refuse(state, name, error.reason, str(error))
        else:
            state.clear()
            self._event("Normal", "Started", f"Started container {name}", name)

    def _refuse(self, state: ContainerState, name: str, reason: str, message: str) -> None:
        state.refuse(reason, message, time.time())
        self._event("Warning", "Failed", message, name)

    async def _stop(self, name: str, why: str) -> None:
        """SIGTERM, the grace period, then the end of every process of the container."""
        try:
            grace = self.pod["metadata"].get("deletionGracePeriodSeconds")
            if grace is None:
                grace = self.pod["spec"].get("terminationGracePeriodSeconds", 30)
            words = f"Stopping container {name}"
            if why:
                words = f"Container {name} {why}, will be restarted"
            self._event("Normal", "Killing", words, name)
            sandbox = self.sandbox
            if sandbox is None:
                return
            with contextlib.suppress(SandboxError):
                await self._pre_stop(name, float(grace))
                await sandbox.signal(name, int(signal.SIGTERM))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(sandbox.ended(name), float(grace))
                if sandbox.running(name):
                    await sandbox.kill(name)
                    await sandbox.ended(name)
        finally:
            self._stopping.pop(name, None)
            self._wake.set()

    async def _pre_stop(self, name: str, limit: float) -> None:
        hook = ((self._container(name).get("lifecycle") or {}).get("preStop") or {}).get("exec")
        if hook and limit > 0:
            code, output = await self.execute(name, list(hook.get("command") or []), limit)
            if code:
                self._event("Warning", "FailedPreStopHook", f"PreStopHook failed: {output[:200]}", name)

    # Probes and commands beside a container.

    def _probe(self, name: str, state: ContainerState) -> None:
        container = self._container(name)
        before = (self.pod.get("status") or {}).get("containerStatuses") or []
        adopted = any(
            s["name"] == name
            and s.get("ready")
            and (s.get("state") or {}).get("running")
            and s.get("restartCount") == (state.last.attempt if state.last else -1)
            for s in before
        )
        state.health = Health(started=adopted, ready=adopted)

        async def perform(probe: Object) -> str:
            return await check(
                probe, container, self._address, lambda a, t: self.execute(name, a, t), self.node.http
            )

        def failed(kind: str, why: str) -> None:
            self._event("Warning", "Unhealthy", f"{kind} probe failed: {why}", name)

        prober = Prober(container, state.health, perform, failed, self._wake.set)
        self._probers[name] = asyncio.create_task(prober.run())

    def _stop_probing(self, name: str) -> None:
        if task := self._probers.pop(name, None):
            task.cancel()

    async def execute(self, name: str, argv: list[str], limit: float) -> tuple[int, str]:
        """Run a command beside a running container: exit code and output. Raises SandboxError."""
        if self.sandbox is None:
            raise SandboxError("CreateContainerError", "the pod has no sandbox")
        container = self._container(name)
        base = base_environment(self.pod, self.node.machine)
        sources = await self.node.references.sources(self.pod)
        env = variables(self.pod, container, sources, self._place(), base)
        wanted = beside(self.pod, container, argv, env, self.node.machine)
        read, write = os.pipe()
        null = os.open(os.devnull, os.O_RDONLY)
        try:
            ended = await self.sandbox.execute(name, wanted, null, write, write)
        except SandboxError:
            os.close(read)
            raise
        finally:
            os.close(write)
            os.close(null)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        pipe, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb", 0)
        )
        try:
            async with asyncio.timeout(limit):
                output = await reader.read(_OUTPUT_LIMIT)
                return await ended, output.decode(errors="replace")
        finally:
            pipe.close()

    # The API.

    def _name(self) -> str:
        return f"{self.pod['metadata']['namespace']}/{self.pod['metadata']['name']}"

    def _event(self, kind: str, reason: str, message: str, container: str = "") -> None:
        self.node.recorder.record(self.pod, kind, reason, message, container)

    async def _tell(self) -> None:
        """Write the pod's status if it changed."""
        crashes = {name: max(0, state.crashes - 1) for name, state in self.containers.items()}
        where = podstatus.Addresses(self._address, self.node.address)
        made = podstatus.status(self.pod, self._view(), where, crashes, time.time(), self._stopped_message)
        before = self.pod.get("status") or {}
        if all(before.get(key) == value for key, value in made.items()):
            return
        if self._status == made:
            return
        metadata = self.pod["metadata"]
        # A merge patch leaves what it does not name: what must go is named as null.
        gone = {key: None for key in ("reason", "message") if key in before and key not in made}
        patch = {"metadata": {"uid": self.uid}, "status": {**made, **gone}}
        try:
            self.pod = await self.node.client.patch(
                PODS, metadata["name"], patch, metadata["namespace"], subresource="status"
            )
            self._status = made
        except ApiError as error:
            if error.code not in (404, 409):
                raise
