"""What `kubectl get pods` shows: readiness, the one word of STATUS, restarts.

The word comes from init containers first, then from containers, then from the phase.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from meshlight.kube.columns import AGE, NONE, Column, age, at
from meshlight.kube.resources import Object


def status(pod: Object, now: datetime) -> tuple[str, str, str]:
    """READY, STATUS and RESTARTS of a Pod, as Kubernetes' printer derives them."""
    spec, found = pod.get("spec") or {}, pod.get("status") or {}
    sidecars = {c["name"] for c in spec.get("initContainers") or [] if c.get("restartPolicy") == "Always"}
    total, ready, last = len(spec.get("containers") or []) + len(sidecars), 0, ""
    reason = found.get("reason") or found.get("phase") or "Unknown"
    conditions = {c["type"]: c for c in found.get("conditions") or []}
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("reason") == "SchedulingGated":
        reason = "SchedulingGated"
    word, restarts, last, ready = _initializing(found, spec, sidecars)
    if word:
        reason = word
    if not word or (conditions.get("Initialized") or {}).get("status") == "True":
        states = found.get("containerStatuses") or []
        if word:
            reason = word
        else:
            restarts = sum(
                int(c.get("restartCount", 0)) for c in found.get("initContainerStatuses") or []
                if c["name"] in sidecars
            )  # fmt: skip
        running = False
        for container in reversed(states):
            restarts += int(container.get("restartCount", 0))
            last = max(last, _ended(container))
            state = container.get("state") or {}
            if reported := _reported(state):
                reason = reported
            elif container.get("ready") and "running" in state:
                running = True
            ready += bool(container.get("ready") and "running" in state)
        if reason == "Completed" and running:
            is_ready = (conditions.get("Ready") or {}).get("status") == "True"
            reason = "Running" if is_ready else "NotReady"
    if pod["metadata"].get("deletionTimestamp"):
        if found.get("reason") == "NodeLost":
            reason = "Unknown"
        elif found.get("phase") not in ("Succeeded", "Failed"):
            reason = "Terminating"
    shown = f"{restarts} ({age(last, now)} ago)" if restarts and last else str(restarts)
    return f"{ready}/{total}", reason, shown


def _reported(state: Object) -> str:
    """The reason that a container's state gives, or "" when it runs or waits for nothing in particular."""
    if (waiting := state.get("waiting")) and waiting.get("reason"):
        return str(waiting["reason"])
    if ended := state.get("terminated"):
        return ended.get("reason") or _exit(ended)
    return ""


def _exit(ended: Object) -> str:
    return f"Signal:{ended['signal']}" if ended.get("signal") else f"ExitCode:{ended.get('exitCode')}"


def _ended(container: Object) -> str:
    """When the container's last run ended, or ""."""
    return str(((container.get("lastState") or {}).get("terminated") or {}).get("finishedAt") or "")


def _initializing(found: Object, spec: Object, sidecars: set[str]) -> tuple[str, int, str, int]:
    """The word while init containers run ("" after), their restarts, the last one's time, ready sidecars."""
    restarts, last, ready = 0, "", 0
    for index, container in enumerate(found.get("initContainerStatuses") or []):
        restarts += int(container.get("restartCount", 0))
        last = max(last, _ended(container))
        state = container.get("state") or {}
        ended = state.get("terminated")
        if ended and ended.get("exitCode") == 0:
            continue
        if container["name"] in sidecars and container.get("started"):
            ready += bool(container.get("ready"))
            continue
        if ended:
            return "Init:" + (ended.get("reason") or _exit(ended)), restarts, last, ready
        waiting = (state.get("waiting") or {}).get("reason")
        if waiting and waiting != "PodInitializing":
            return f"Init:{waiting}", restarts, last, ready
        return f"Init:{index}/{len(spec.get('initContainers') or [])}", restarts, last, ready
    return "", restarts, last, ready


def _gates(pod: Object, _: datetime) -> str:
    gates = (pod.get("spec") or {}).get("readinessGates") or []
    if not gates:
        return NONE
    held = {c["type"]: c["status"] for c in (pod.get("status") or {}).get("conditions") or []}
    return f"{sum(held.get(g['conditionType']) == 'True' for g in gates)}/{len(gates)}"


_last: tuple[Object, tuple[str, str, str]] = ({}, ("", "", ""))
"""The row that is being made: three of its cells come from one look at the pod."""


def _part(index: int) -> Callable[[Object, datetime], str]:
    def cell(pod: Object, now: datetime) -> str:
        global _last
        last = _last  # another thread may be at another pod
        if last[0] is not pod:
            last = _last = (pod, status(pod, now))
        found: str = last[1][index]
        if index == 2:
            _last = ({}, ("", "", ""))
        return found

    return cell


POD = [
    Column("Ready", _part(0)),
    Column("Status", _part(1)),
    Column("Restarts", _part(2)),
    AGE,
    Column("IP", at("status", "podIP"), wide=True),
    Column("Node", at("spec", "nodeName"), wide=True),
    Column("Nominated Node", at("status", "nominatedNodeName"), wide=True),
    Column("Readiness Gates", _gates, wide=True),
]
