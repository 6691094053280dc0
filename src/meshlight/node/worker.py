"""One pod on its node: observes, asks `lifecycle` what to do, does it, and tells the API.

The only place where decisions meet processes. One worker a pod; it decides anew when the pod, its
sandbox, its probes or what it refers to changed, and at the times that a decision names.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace

from meshlight.kube.client import ApiError, ApiUnreachable
from meshlight.kube.resources import PODS, Object
from meshlight.node import lifecycle, podstatus, resolver
from meshlight.node.addresses import both
from meshlight.node.containers import ContainerState, remembered, run_of
from meshlight.node.context import NodeContext
from meshlight.node.environment import ConfigError
from meshlight.node.events import log
from meshlight.node.execution import Execution
from meshlight.node.images import UnknownImage
from meshlight.node.netns import NetworkError
from meshlight.node.oci.store import ImageError, ImageNeverPull, InvalidReference
from meshlight.node.probes import Health, Prober, check
from meshlight.node.runtime import Sandbox, SandboxError
from meshlight.node.volumes import VolumeError

_FIRST_RETRY, _LONGEST_RETRY = 0.5, 30.0
_UNREACHABLE_RETRY = 0.5
_DEFAULT_GRACE = 30
_OVER = ("Succeeded", "Failed")
_SETUP_REASONS = (
    "ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "CreateContainerConfigError", "ContainerCreating",
)  # fmt: skip
"""Why a container waits for something that others may put right at any moment."""


class PodWorker:
    """Runs one pod until it is gone from the API; `finished` is called then."""

    def __init__(self, node: NodeContext, pod: Object, finished: Callable[[str], None]) -> None:
        self.node, self._finished = node, finished
        self.uid = str(pod["metadata"]["uid"])
        self.folder = node.pod_folder(self.uid)
        self.execution = Execution(node, pod)
        self.sandbox: Sandbox | None = None
        self.containers: dict[str, ContainerState] = {}
        self.settled = asyncio.Event()
        """Set once the API says nothing of the pod that was only true of an earlier start of its node."""
        self._wake = asyncio.Event()
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}  # probes and hooks by container
        self._out_of_memory: dict[str, int] = {}
        self._gone = self._over = self._stale = False
        self._stopped_for = self._stopped_message = ""
        self._at_once = False
        self._told: Object | None = None
        self._retry = _FIRST_RETRY
        self._not_before = 0.0

    @property
    def pod(self) -> Object:
        """The pod as the API last showed it."""
        return self.execution.pod

    @pod.setter
    def pod(self, pod: Object) -> None:
        self.execution.pod = pod

    # What others tell the worker.

    def changed(self, pod: Object) -> None:
        """The object changed in the API."""
        before, self.pod = self.pod["metadata"], pod
        after = pod["metadata"]
        if any(before.get(k) != after.get(k) for k in ("labels", "annotations")):
            self._stale = True  # the downward API shows them in files
        shown = (pod.get("status") or {}).get("conditions")
        if self._told is not None and shown != self._told["conditions"]:
            self._told = None  # as when this node was thought dead: the truth is told again
        sooner = after.get("deletionGracePeriodSeconds"), before.get("deletionGracePeriodSeconds")
        if sooner[0] is not None and sooner[1] is not None and sooner[0] < sooner[1]:
            for task in self._stopping.values():  # the decision stops them anew, with less grace
                task.cancel()
        self._wake.set()

    def deleted(self) -> None:
        """The object is gone from the API: end at once."""
        self._gone = True
        self._wake.set()

    def poke(self) -> None:
        """Something that the pod waits for may have come."""
        for state in self.containers.values():
            if state.waiting in _SETUP_REASONS:
                state.clear()
        self._not_before, self._retry = 0.0, _FIRST_RETRY
        self._wake.set()

    def refresh(self) -> None:
        """A ConfigMap or Secret that the pod refers to changed: bring its files up to date."""
        self._stale = True
        self.poke()

    @property
    def ending(self) -> bool:
        """Whether the pod is on its way out, or over."""
        return (
            self._gone or self._over or bool(self._stopped_for or self.pod["metadata"].get("deletionTimestamp"))
        )

    def evict(self, message: str, *, now: bool) -> None:
        """Stop the pod for good to relieve the node; `now` leaves it no time to end by itself."""
        if self.ending:
            return
        self._stopped_for, self._stopped_message, self._at_once = "Evicted", message, now
        self._event("Warning", "Evicted", message)
        self._wake.set()

    # The loop.

    async def run(self) -> None:
        """Work until the pod is gone."""
        try:
            await self._adopt()
            await self._settle()
            while (delay := await self._turn()) is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay or None):
                        await self._wake.wait()
        finally:
            self.settled.set()
            for task in [*self._tasks.values(), *self._stopping.values()]:
                task.cancel()
            if self.sandbox is not None:
                self.sandbox.close()

    async def _turn(self) -> float | None:
        """Observe, decide, act, tell; seconds until the next turn (0: when woken), None at the end."""
        self._wake.clear()
        try:
            return await self._step()
        except ApiUnreachable:
            return _UNREACHABLE_RETRY
        except VolumeError as error:
            return await self._held_up("FailedMount", str(error))
        except (ApiError, OSError, NetworkError, SandboxError) as error:
            return await self._held_up("FailedCreatePodSandBox", str(error))

    async def _held_up(self, reason: str, message: str) -> float:
        """The pod as a whole cannot go on for now."""
        self._event("Warning", reason, message)
        log("warning", "pod cannot go on", pod=self._name(), reason=reason, error=message)
        with contextlib.suppress(ApiError, ApiUnreachable):
            await self._tell()
        delay = self._retry
        self._retry = min(self._retry * 2, _LONGEST_RETRY)
        self._not_before = time.time() + delay
        return delay

    async def _step(self) -> float | None:
        self._observe()
        if self._gone:
            await self._remove_everything()
            return None
        now = time.time()
        if lifecycle.deadline_passed(self.pod, now) and not self._stopped_for and not self._over:
            self._stopped_for = "DeadlineExceeded"
            self._stopped_message = "Pod was active on the node longer than the specified deadline"
        if self.sandbox is not None and (self._stale or 0 < self.execution.volumes.refresh_at <= now):
            self._stale = False
            await self.execution.prepared()
        decision = lifecycle.decide(self.pod, self._view(), now)
        if self._over and not self.pod["metadata"].get("deletionTimestamp"):
            return 0.0
        held = self._not_before > now
        progress = False
        for action in decision.actions:
            if held and isinstance(action, lifecycle.CreateSandbox | lifecycle.Start):
                decision.later(self._not_before)
                continue
            if isinstance(action, lifecycle.Start) and await self._held_by_mesh():
                continue  # woken once its first connection would be captured
            progress = progress or not isinstance(action, lifecycle.Stop)
            if await self._act(action):
                return None
        self._observe()
        await self._tell()
        if progress:
            self._retry = _FIRST_RETRY
            return 0.001  # an action changes what is decided next
        times = [t for t in (decision.wake_at, self.execution.volumes.refresh_at) if t]
        return max(0.001, min(times) - time.time()) if times else 0.0

    async def _adopt(self) -> None:
        """Find what runs already, or what the API remembers of an earlier life of the machine."""
        status = self.pod.get("status") or {}
        over = status.get("phase") in _OVER
        if over and status.get("reason"):
            self._stopped_for, self._stopped_message = status["reason"], status.get("message") or ""
        if self.folder.exists():
            self.sandbox = await Sandbox.adopt(self.folder, self._wake.set)
        self._over = over and self.sandbox is None
        now = time.time()
        for entry in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
            self.containers[entry["name"]] = remembered(entry, now)
        if self.sandbox is None or self._gone:
            return
        self.execution.address = status.get("podIP") or await self._network()
        for name, attempts in self.sandbox.attempts.items():
            state = self.containers[name] = ContainerState()
            for attempt in attempts:
                state.put(run_of(attempt))
            state.crashes = int(attempts[-1].note.get("crashes") or 0)
            if (last := state.last) and last.finished:
                state.put(self._told_end(name, last))
                state.ended(last)
            state.image_id = self._known_image(name)

    async def _settle(self) -> None:
        """Say at once that what ran in an earlier start of the node runs no more."""
        while not self.settled.is_set():
            try:
                begun = (self.pod.get("status") or {}).get("startTime")
                if self.sandbox is None and not self._gone and begun:
                    await self._tell()
                self.settled.set()
            except ApiUnreachable:
                await asyncio.sleep(_UNREACHABLE_RETRY)
            except ApiError as error:
                log("warning", "pod status not renewed", pod=self._name(), error=str(error))
                return

    def _known_image(self, name: str) -> str:
        status = self.pod.get("status") or {}
        entries = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
        return next((str(e.get("imageID") or "") for e in entries if e["name"] == name), "")

    def _observe(self) -> None:
        """Take in what pid 1 told."""
        if self.sandbox is None:
            return
        for name, attempts in self.sandbox.attempts.items():
            state = self.containers.setdefault(name, ContainerState())
            for attempt in attempts:
                run = run_of(attempt)
                known = next((r for r in state.runs if r.attempt == run.attempt), None)
                if run.finished and known and not known.finished:
                    run = self._told_end(name, run)
                if state.put(run):
                    self._ended(name, state, run)
        if not self.sandbox.alive:
            self._lost()
            return
        for name, state in self.containers.items():
            if self.sandbox.running(name) and state.health is None:
                self._probe(name, state)

    def _told_end(self, name: str, run: lifecycle.Run) -> lifecycle.Run:
        """An end with its message, and its cause where the kernel knows it."""
        message = self.execution.ending(name, run.attempt, run.code)
        count = self.node.cgroups.out_of_memory(self.uid, name)
        killed = run.code == 137 and count > self._out_of_memory.get(name, 0)
        self._out_of_memory[name] = count
        return replace(run, message=message, reason="OOMKilled" if killed else run.reason)

    def _ended(self, name: str, state: ContainerState, run: lifecycle.Run) -> None:
        state.ended(run)
        if task := self._tasks.pop(name, None):
            task.cancel()
        if state.not_before > run.finished and lifecycle.restarts(self.pod, state.observed()):
            words = f"Back-off restarting failed container {name} in pod {self._id()}"
            self._event("Warning", "BackOff", words, name)

    def _lost(self) -> None:
        """Pid 1 ended by itself, and with it every container."""
        now = time.time()
        for name, state in self.containers.items():
            if (last := state.last) and not last.finished:
                lost = replace(last, finished=now, code=137, signal=9, message="the pod's pid 1 ended")
                state.put(lost)
                self._ended(name, state, lost)
            state.floor = (state.last.attempt + 1) if state.last else 0
        self.sandbox = None

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
                async with self.node.starts:
                    await self._create_sandbox()
            case lifecycle.Start(name, attempt):
                if await self._pulled(name):
                    async with self.node.starts:
                        await self._start(name, attempt)
            case lifecycle.Stop(name, why):
                self._stopping[name] = asyncio.create_task(self._stop(name, why))
            case lifecycle.RemoveSandbox():
                await self._remove_sandbox()
            case lifecycle.Finish():
                await self._tell()
                await self.execution.delete()
                await self._remove_everything()
                return True
        return False

    async def _held_by_mesh(self) -> bool:
        """Whether nothing ran yet in the sandbox and its redirection is still to come."""
        begun = any(s.last is not None and s.last.attempt >= s.floor for s in self.containers.values())
        return not begun and await self.node.enrolment.holds(self.pod, self._wake.set)

    # Sandbox.

    def _host_network(self) -> bool:
        return bool(self.pod["spec"].get("hostNetwork"))

    async def _network(self) -> str:
        return self.node.address if self._host_network() else await self.node.network.add(self.uid, None)

    async def _create_sandbox(self) -> None:
        if any(state.runs for state in self.containers.values()):
            self._event("Normal", "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.")
        self.execution.address = await self._network()
        if not self._host_network():
            await self.node.policies.protect(self.pod, both(self.execution.address))
        netns = None if self._host_network() else self.uid
        hostname = resolver.hostname(self.pod)
        self.sandbox = await Sandbox.create(self.node.nursery, self.folder, hostname, netns, self._wake.set)
        for state in self.containers.values():
            state.floor = (state.last.attempt + 1) if state.last else 0
        await self._tell()  # the address is known before anything runs: the mesh can take the pod in

    async def _remove_sandbox(self) -> None:
        if self.sandbox is not None:
            await self.sandbox.stop()
            self._observe()
        if not self._host_network():
            await self.node.network.remove(self.uid)
        await asyncio.to_thread(self._clean)

    def _clean(self) -> None:
        self.execution.volumes.unmount(self.pod)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.node.cgroups.remove(self.uid)

    async def _remove_everything(self) -> None:
        await self._remove_sandbox()
        self.node.references.release(self.uid)
        await asyncio.to_thread(shutil.rmtree, self.node.logs / self.uid, True)
        self._finished(self.uid)

    # Containers.

    async def _pulled(self, name: str) -> bool:
        """See to the container's image; whether it is there. Others start meanwhile."""
        state = self.containers.setdefault(name, ContainerState())
        image = self.execution.container(name).get("image") or ""
        begun = time.monotonic()
        try:
            fetched = await self.execution.pull(
                name, lambda: self._event("Normal", "Pulling", f'Pulling image "{image}"', name)
            )
        except InvalidReference as error:
            self._refuse(state, name, "InvalidImageName", str(error), f"Error: InvalidImageName: {error}")
            return False
        except ImageNeverPull as error:
            self._refuse(state, name, "ErrImageNeverPull", str(error), f"Error: ErrImageNeverPull: {error}")
            return False
        except (ImageError, OSError) as error:
            self._not_pulled(state, name, image, str(error))
            return False
        state.fetched = fetched
        if fetched:
            took = f"{time.monotonic() - begun:.3f}s"
            self._event("Normal", "Pulled", f'Successfully pulled image "{image}" in {took}', name)
        return True

    def _not_pulled(self, state: ContainerState, name: str, image: str, why: str) -> None:
        reason = "ImagePullBackOff" if state.failures else "ErrImagePull"
        message = f'Back-off pulling image "{image}": {why}' if state.failures else why
        self._refuse(state, name, reason, message, f'Failed to pull image "{image}": {why}')

    async def _start(self, name: str, attempt: int) -> None:
        state = self.containers.setdefault(name, ContainerState())
        image = self.execution.container(name).get("image") or ""
        assert self.sandbox is not None
        try:
            started = await self.execution.start(self.sandbox, name, attempt, state.crashes)
        except UnknownImage as error:
            self._not_pulled(state, name, image, str(error))
            return
        except ConfigError as error:
            self._refuse(state, name, "CreateContainerConfigError", str(error), f"Error: {error}")
            return
        except SandboxError as error:
            if error.reason != "RunContainerError":
                self._refuse(state, name, error.reason, str(error), f"Error: {error}")
                return
            # As container runtimes have it, a program that cannot be started has run and ended.
            now = time.time()
            run = lifecycle.Run(attempt, now, now, 128, 0, "StartError", str(error))
            state.put(run)
            self._ended(name, state, run)
            state.waiting, state.waiting_message = error.reason, str(error)
            self._event("Warning", "Failed", f"Error: {error}", name)
            return
        state.clear()
        state.image_id = started.image_id
        if not state.fetched:
            self._event("Normal", "Pulled", f'Container image "{image}" already present on machine', name)
        self._event("Normal", "Created", f"Created container: {name}", name)
        self._event("Normal", "Started", f"Started container {name}", name)
        if started.ignored:
            self._event("Warning", "SecurityContextIgnored", started.ignored, name)
        if attempt > 0:
            await asyncio.to_thread(self.execution.forget_root, name, attempt - 1)

    def _refuse(self, state: ContainerState, name: str, reason: str, message: str, event: str) -> None:
        state.refuse(reason, message, time.time())
        self._event("Warning", "Failed", event, name)

    async def _stop(self, name: str, why: str) -> None:
        spec = self.pod["spec"]
        asked = spec.get("terminationGracePeriodSeconds")
        grace = float(_DEFAULT_GRACE if asked is None else asked)
        words = f"Stopping container {name}"
        if why:
            words = f"Container {name} {why}, will be restarted"
            kind = "startupProbe" if "startup" in why else "livenessProbe"
            probe = self.execution.container(name).get(kind) or {}
            asked = probe.get("terminationGracePeriodSeconds")
        else:
            asked = self.pod["metadata"].get("deletionGracePeriodSeconds")
        grace = 0.0 if self._at_once else grace if asked is None else float(asked)
        self._event("Normal", "Killing", words, name)

        def failed(reason: str) -> None:
            self._event("Warning", "FailedPreStopHook", f"PreStopHook failed: {reason}", name)

        try:
            if self.sandbox is not None:
                await self.execution.stop(self.sandbox, name, grace, failed)
        except Exception as error:  # tried again: a container that cannot be stopped keeps its pod
            log("error", "container not stopped", pod=self._name(), container=name, error=repr(error))
            await asyncio.sleep(_UNREACHABLE_RETRY)
        finally:
            self._stopping.pop(name, None)
            self._wake.set()

    # Probes and the postStart hook.

    def _probe(self, name: str, state: ContainerState) -> None:
        container = self.execution.container(name)
        adopted = self._ready_before(name, state)
        startup = bool(container.get("startupProbe"))
        state.health = Health(
            started=adopted or not startup,
            ready=adopted or not (startup or container.get("readinessProbe")),
        )
        kinds = ("startupProbe", "readinessProbe", "livenessProbe")
        hooked = bool((container.get("lifecycle") or {}).get("postStart")) and not adopted
        if hooked or any(container.get(kind) for kind in kinds):
            if hooked:
                state.health.started = state.health.ready = False
            self._tasks[name] = asyncio.create_task(self._attend(name, container, state.health, hooked))

    def _ready_before(self, name: str, state: ContainerState) -> bool:
        """Whether the API says that this very attempt was ready: an adopted pod does not flap."""
        status = self.pod.get("status") or {}
        entries = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
        attempt = state.last.attempt if state.last else -1
        wanted = podstatus.container_id(self.uid, name, attempt)
        return any(e.get("ready") and e.get("containerID") == wanted for e in entries)

    async def _attend(self, name: str, container: Object, health: Health, hooked: bool) -> None:
        """The postStart hook of a running container, then its probes."""
        sandbox = self.sandbox
        if sandbox is None:
            return
        if hooked and (why := await self.execution.hook(sandbox, name, "postStart", 3600)):
            self._event("Warning", "FailedPostStartHook", f"PostStartHook failed: {why}", name)
            with contextlib.suppress(SandboxError):
                await sandbox.kill(name)
            return

        async def execute(argv: list[str], limit: float) -> tuple[int, str]:
            return await self.execution.run(sandbox, name, argv, limit)

        async def perform(probe: Object) -> str:
            try:
                return await check(probe, container, self.execution.address, execute, self.node.http)
            except (SandboxError, ApiError, ApiUnreachable, ConfigError) as error:
                return str(error)

        def failed(kind: str, why: str) -> None:
            self._event("Warning", "Unhealthy", f"{kind} probe failed: {why}", name)

        await Prober(container, health, perform, failed, self._wake.set).run()

    # The API.

    def _name(self) -> str:
        return f"{self.pod['metadata']['namespace']}/{self.pod['metadata']['name']}"

    def _id(self) -> str:
        return f"{self.pod['metadata']['name']}_{self.pod['metadata']['namespace']}({self.uid})"

    def _event(self, kind: str, reason: str, message: str, container: str = "") -> None:
        self.node.recorder.record(self.pod, kind, reason, message, container)

    async def _tell(self) -> None:
        """Write the pod's status if it changed."""
        if self._over:
            return  # it ended in an earlier life of the machine; the API knows more than we do
        crashes = {name: max(0, state.crashes - 1) for name, state in self.containers.items()}
        where = podstatus.Addresses(self.execution.address, self.node.address)
        before = self.pod.get("status") or {}
        made = podstatus.status(self.pod, self._view(), where, crashes, time.time(), self._stopped_message)
        if made == self._told or all(before.get(key) == value for key, value in made.items()):
            return
        metadata = self.pod["metadata"]
        # A merge patch leaves what it does not name: what must go is named as null.
        gone = {key: None for key in ("reason", "message") if key in before and key not in made}
        patch = {"metadata": {"uid": self.uid}, "status": {**made, **gone}}
        try:
            self.pod = await self.node.client.patch(
                PODS, metadata["name"], patch, metadata["namespace"], subresource="status"
            )
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            return
        self._told = made
