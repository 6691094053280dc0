"""What a node remembers of one pod's containers between two decisions.

Merges what pid 1 tells, what failed before pid 1 was asked, what probes say, and, after a restart of
the machine, what the API still knows. No I/O: times are passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from meshlight.kube.resources import Object
from meshlight.node.lifecycle import BACKOFF_RESET, LONGEST_BACKOFF, Observed, Run, backoff
from meshlight.node.probes import Health
from meshlight.node.runtime import Attempt

LOST_CODE = 255
"""Exit code of a container whose end nobody saw, as Kubernetes reports after a reboot."""


def _seconds(text: str | None) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0


@dataclass(slots=True)
class ContainerState:
    """One container: its last runs, and what keeps it from starting."""

    runs: list[Run] = field(default_factory=list)
    floor: int = 0
    """The first attempt made in the sandbox of now."""
    crashes: int = 0
    not_before: float = 0.0
    waiting: str = ""
    waiting_message: str = ""
    failures: int = 0
    image_id: str = ""
    fetched: bool = False
    """Whether its image had to be fetched for the latest start."""
    health: Health | None = None

    @property
    def last(self) -> Run | None:
        """The latest run."""
        return self.runs[-1] if self.runs else None

    def put(self, run: Run) -> bool:
        """Remember a run; whether this is news of its end."""
        before = next((r for r in self.runs if r.attempt == run.attempt), None)
        if before == run or (before and before.finished):
            return False
        kept = [r for r in self.runs if r.attempt != run.attempt]
        self.runs = sorted([*kept, run], key=lambda r: r.attempt)[-2:]
        return bool(run.finished)

    def ended(self, run: Run) -> None:
        """Account for an end: when it may start again, and that its probes say nothing any more."""
        if run.finished - run.started >= BACKOFF_RESET:
            self.crashes = 0
        self.not_before = run.finished + backoff(self.crashes)
        self.crashes += 1
        self.health = None

    def refuse(self, reason: str, message: str, now: float) -> None:
        """It could not be started; try again later, and later each time."""
        self.waiting, self.waiting_message = reason, message
        self.not_before = now + min(2.0**self.failures, LONGEST_BACKOFF)
        self.failures += 1

    def clear(self) -> None:
        """It started, or what kept it has changed."""
        self.waiting = self.waiting_message = ""
        self.not_before = 0.0
        self.failures = 0

    def observed(self) -> Observed:
        """As the decisions see it."""
        health = self.health
        last = self.last
        current = last is not None and last.attempt >= self.floor
        running = current and last is not None and not last.finished
        return Observed(
            last=last,
            previous=self.runs[-2] if len(self.runs) > 1 else None,
            current=current,
            ready=running and health is not None and health.ready,
            started=running and health is not None and health.started,
            unhealthy=health.unhealthy if health else "",
            not_before=self.not_before,
            waiting=self.waiting,
            waiting_message=self.waiting_message,
            image_id=self.image_id,
        )


def run_of(attempt: Attempt) -> Run:
    """A run as pid 1 tells it."""
    return Run(
        attempt.attempt,
        attempt.started / 1e9,
        attempt.finished / 1e9,
        attempt.code or 0,
        attempt.signal,
        str(attempt.note.get("reason", "")),
        str(attempt.note.get("message", "")),
    )


def remembered(status: Object, now: float) -> ContainerState:
    """A container by what the API knows of it; what ran then is lost."""
    state = ContainerState()
    count = int(status.get("restartCount") or 0)
    current, last = status.get("state") or {}, status.get("lastState") or {}
    state.image_id = status.get("imageID") or ""
    if (terminated := last.get("terminated")) and "waiting" not in current:
        state.runs.append(_terminated(count - 1, terminated))
    if terminated := current.get("terminated"):
        state.runs.append(_terminated(count, terminated))
    elif running := current.get("running"):
        started = _seconds(running.get("startedAt"))
        state.runs.append(Run(count, started, now, LOST_CODE, 0, "Unknown", "the node restarted"))
    elif terminated := last.get("terminated"):
        state.runs.append(_terminated(count, terminated))
    state.floor = count + 1 if state.runs else 0
    return state


def _terminated(attempt: int, state: Object) -> Run:
    return Run(
        attempt,
        _seconds(state.get("startedAt")),
        _seconds(state.get("finishedAt")) or 1.0,
        int(state.get("exitCode") or 0),
        int(state.get("signal") or 0),
        state.get("reason") or "",
        state.get("message") or "",
    )
