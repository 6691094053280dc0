"""The kubelet's decisions: from a pod and what is observed of it to what must be done next.

Pure: no clock, process or API. Rules: Kubernetes' "Pod Lifecycle" (restart policies, init and sidecar
containers, crash back-off, termination order).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshlight.kube.resources import Object

FIRST_BACKOFF, LONGEST_BACKOFF, BACKOFF_RESET = 10.0, 300.0, 600.0
"""Seconds: the second restart waits 10, each later one twice as long up to 300; 600 of health forget."""


@dataclass(frozen=True, slots=True)
class Run:
    """One attempt at a container; times in seconds since the epoch; `finished` is 0 while it runs."""

    attempt: int
    started: float
    finished: float = 0.0
    code: int = 0
    signal: int = 0
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of one container.

    `current` says that `last` ran in the sandbox of now; `started` that its startup probe passed;
    `unhealthy` why it must be restarted; `not_before` when it may start again; `waiting` and
    `waiting_message` why the latest try to start it failed.
    """

    last: Run | None = None
    previous: Run | None = None
    current: bool = True
    ready: bool = False
    started: bool = False
    unhealthy: str = ""
    not_before: float = 0.0
    waiting: str = ""
    waiting_message: str = ""
    image_id: str = ""

    @property
    def running(self) -> bool:
        """Whether its program runs now."""
        return self.last is not None and self.current and not self.last.finished

    @property
    def ended(self) -> bool:
        """Whether it has run and does not run now."""
        return self.last is not None and not self.running


@dataclass(frozen=True, slots=True)
class View:
    """A pod as observed: its sandbox, its containers by name, and why it was stopped for good, if so."""

    sandbox: bool
    containers: Mapping[str, Observed]
    stopping: frozenset[str] = frozenset()
    stopped_for: str = ""


@dataclass(frozen=True, slots=True)
class CreateSandbox:
    """Make the pod's namespaces and pid 1."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start a container's next attempt."""

    container: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop a container gracefully."""

    container: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class RemoveSandbox:
    """End pid 1, give back the network."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Everything has ended: remove the pod from the API."""


Action = CreateSandbox | Start | Stop | RemoveSandbox | Finish


@dataclass(slots=True)
class Decision:
    """What to do now, and when to decide anew although nothing changed (0: never)."""

    actions: list[Action] = field(default_factory=list)
    wake_at: float = 0.0

    def later(self, when: float) -> None:
        """Decide anew at `when` at the latest."""
        self.wake_at = min(self.wake_at, when) if self.wake_at else when


_NONE = Observed()


def init_containers(pod: Object) -> list[Object]:
    """The pod's init containers, sidecars among them."""
    return list(pod["spec"].get("initContainers") or [])


def is_sidecar(container: Object) -> bool:
    """Whether an init container goes on beside the others."""
    return bool(container.get("restartPolicy") == "Always")


def policy(pod: Object) -> str:
    """The pod's restart policy."""
    return str(pod["spec"].get("restartPolicy") or "Always")


def restarts(pod: Object, seen: Observed) -> bool:
    """Whether an ended container is to run again by the pod's restart policy."""
    assert seen.last is not None
    return policy(pod) == "Always" or (policy(pod) == "OnFailure" and seen.last.code != 0)


def backoff(crashes: int) -> float:
    """Seconds from an end to the next start, after `crashes` earlier restarts without a healthy spell."""
    return 0.0 if crashes == 0 else min(FIRST_BACKOFF * 2.0 ** min(crashes - 1, 10), LONGEST_BACKOFF)


def initialized(pod: Object, containers: Mapping[str, Observed]) -> bool:
    """Whether every init container has done its part."""
    for container in init_containers(pod):
        seen = containers.get(container["name"], _NONE)
        if is_sidecar(container):
            if not seen.started:
                return False
        elif not (seen.ended and seen.current and seen.last and seen.last.code == 0):
            return False
    return True


def failed_init(pod: Object, containers: Mapping[str, Observed]) -> bool:
    """Whether an init container failed in a pod that does not restart."""
    if policy(pod) != "Never":
        return False
    for container in init_containers(pod):
        seen = containers.get(container["name"], _NONE)
        if not is_sidecar(container) and seen.ended and seen.last and seen.last.code != 0:
            return True
    return False


def phase(pod: Object, view: View) -> str:
    """The pod's phase."""
    if view.stopped_for:
        return "Failed"
    containers = view.containers
    if failed_init(pod, containers):
        return "Failed"
    mains = [containers.get(c["name"], _NONE) for c in pod["spec"]["containers"]]
    if any(m.last is None for m in mains) or not mains:
        return "Pending"
    if any(m.running for m in mains) or any(restarts(pod, m) for m in mains if m.ended):
        return "Running"
    return "Succeeded" if all(m.last and m.last.code == 0 for m in mains) else "Failed"


def decide(pod: Object, view: View, now: float) -> Decision:
    """What to do next. Called again after each action and each change."""
    deleted = bool(pod["metadata"].get("deletionTimestamp"))
    deadline = _deadline(pod)
    over = phase(pod, view) in ("Succeeded", "Failed")
    if deleted or over:
        return _terminate(pod, view, deleted)
    decision = Decision()
    if deadline:
        decision.later(deadline)
    if not view.sandbox:
        decision.actions.append(CreateSandbox())
        return decision
    if _run_init(pod, view, now, decision):
        for container in pod["spec"]["containers"]:
            _run_main(pod, container["name"], view, now, decision)
    return decision


def deadline_passed(pod: Object, now: float) -> bool:
    """Whether `activeDeadlineSeconds` is over."""
    deadline = _deadline(pod)
    return bool(deadline) and now >= deadline


def _deadline(pod: Object) -> float:
    seconds = pod["spec"].get("activeDeadlineSeconds")
    started = (pod.get("status") or {}).get("startTime")
    if not seconds or not started:
        return 0.0
    from datetime import datetime

    return datetime.fromisoformat(started).timestamp() + float(seconds)


def _terminate(pod: Object, view: View, deleted: bool) -> Decision:
    """Main containers first, then sidecars in reverse order, then the sandbox, then the object."""
    decision = Decision()
    sidecars = [c["name"] for c in init_containers(pod) if is_sidecar(c)]
    running = [name for name, seen in view.containers.items() if seen.running]
    first = [name for name in running if name not in sidecars]
    last = [name for name in reversed(sidecars) if name in running][:1]
    for name in first or last:
        if name not in view.stopping:
            decision.actions.append(Stop(name))
    if running:
        return decision
    if view.sandbox:
        decision.actions.append(RemoveSandbox())
    elif deleted:
        decision.actions.append(Finish())
    return decision


def _start(name: str, seen: Observed, now: float, decision: Decision) -> None:
    if seen.not_before > now:
        decision.later(seen.not_before)
    else:
        decision.actions.append(Start(name, seen.last.attempt + 1 if seen.last else 0))


def _run_init(pod: Object, view: View, now: float, decision: Decision) -> bool:
    """Bring the init containers on; whether the main containers may run."""
    begun = any(
        seen.last is not None and seen.current
        for c in pod["spec"]["containers"]
        if (seen := view.containers.get(c["name"], _NONE))
    )
    for container in init_containers(pod):
        name = container["name"]
        seen = view.containers.get(name, _NONE)
        if is_sidecar(container):
            if seen.running and seen.unhealthy:
                _stop_unhealthy(name, seen, view, decision)
            elif not seen.running:
                _start(name, seen, now, decision)
            if not seen.started and not begun:
                return False
            continue
        if begun or (seen.ended and seen.current and seen.last and seen.last.code == 0):
            continue
        if not seen.running:
            _start(name, seen, now, decision)
        return False
    return True


def _run_main(pod: Object, name: str, view: View, now: float, decision: Decision) -> None:
    seen = view.containers.get(name, _NONE)
    if seen.running:
        if seen.unhealthy:
            _stop_unhealthy(name, seen, view, decision)
    elif not seen.ended or restarts(pod, seen):
        _start(name, seen, now, decision)


def _stop_unhealthy(name: str, seen: Observed, view: View, decision: Decision) -> None:
    if name not in view.stopping:
        decision.actions.append(Stop(name, seen.unhealthy))
