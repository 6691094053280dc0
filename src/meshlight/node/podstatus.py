"""The status of a pod as the API shows it, from what the node observes.

Pure. Fields and words are those of Kubernetes' Pod v1 API.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from meshlight.kube.resources import Object
from meshlight.node.addresses import both
from meshlight.node.lifecycle import (
    Observed,
    Run,
    View,
    backoff,
    init_containers,
    initialized,
    is_sidecar,
    phase,
    restarts,
)

_OURS = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a pod is; empty when not known yet."""

    pod: str
    host: str


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as `metav1.Time`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def container_id(uid: str, name: str, attempt: int) -> str:
    """The id of one attempt: the same after the agent's restart."""
    return "meshlight://" + hashlib.sha256(f"{uid}/{name}/{attempt}".encode()).hexdigest()


def _reason(run: Run) -> str:
    return run.reason or ("Completed" if run.code == 0 else "Error")


def _terminated(uid: str, name: str, run: Run) -> Object:
    state: Object = {
        "exitCode": run.code,
        "reason": _reason(run),
        "startedAt": timestamp(run.started),
        "finishedAt": timestamp(run.finished),
        "containerID": container_id(uid, name, run.attempt),
    }
    if run.signal:
        state["signal"] = run.signal
    if run.message:
        state["message"] = run.message
    return state


def _container(
    pod: Object, container: Object, seen: Observed, waiting: str, crashes: int, now: float
) -> Object:
    uid, name = pod["metadata"]["uid"], container["name"]
    status: Object = {
        "name": name,
        "image": container.get("image") or "",
        "imageID": seen.image_id,
        "ready": seen.ready,
        "started": seen.started,
        "restartCount": seen.last.attempt if seen.last else 0,
        "state": {},
        "lastState": {},
    }
    if seen.last:
        status["containerID"] = container_id(uid, name, seen.last.attempt)
    if seen.running and seen.last:
        status["state"] = {"running": {"startedAt": timestamp(seen.last.started)}}
        if seen.previous:
            status["lastState"] = {"terminated": _terminated(uid, name, seen.previous)}
        return status
    if seen.last is None:
        status["state"] = {"waiting": _waiting(seen.waiting or waiting, seen.waiting_message)}
        return status
    ended = _terminated(uid, name, seen.last)
    again = is_sidecar(container) or restarts(pod, seen)
    terminating = bool(pod["metadata"].get("deletionTimestamp"))
    if again and not terminating and (seen.waiting or seen.not_before > now):
        metadata = pod["metadata"]
        words = (
            f"back-off {backoff(crashes):g}s restarting failed container={name} "
            f"pod={metadata['name']}_{metadata.get('namespace', '')}({uid})"
        )
        if seen.waiting:
            status["state"] = {"waiting": _waiting(seen.waiting, seen.waiting_message)}
        else:
            status["state"] = {"waiting": _waiting("CrashLoopBackOff", words)}
        status["lastState"] = {"terminated": ended}
    else:
        status["state"] = {"terminated": ended}
        if seen.previous:
            status["lastState"] = {"terminated": _terminated(uid, name, seen.previous)}
    return status


def _waiting(reason: str, message: str) -> Object:
    return {"reason": reason, "message": message} if message else {"reason": reason}


def quality_class(pod: Object) -> str:
    """Guaranteed, Burstable or BestEffort, from the containers' requests and limits."""
    guaranteed, anything = True, False
    for container in [*pod["spec"]["containers"], *init_containers(pod)]:
        resources = container.get("resources") or {}
        limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
        anything = anything or bool(limits or requests)
        for name in ("cpu", "memory"):
            if name not in limits or requests.get(name, limits[name]) != limits[name]:
                guaranteed = False
    return "BestEffort" if not anything else "Guaranteed" if guaranteed else "Burstable"


def _conditions(pod: Object, view: View, ready: bool, now: float) -> list[Object]:
    old = {c["type"]: c for c in (pod.get("status") or {}).get("conditions") or []}
    over = phase(pod, view) in ("Succeeded", "Failed")
    completed = over and phase(pod, view) == "Succeeded"
    unready = [
        c["name"]
        for c in [*[c for c in init_containers(pod) if is_sidecar(c)], *pod["spec"]["containers"]]
        if not view.containers.get(c["name"], Observed()).ready
    ]
    lacking = (
        ("PodCompleted", "")
        if completed
        else ("ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]")
    )
    gates = [
        gate["conditionType"]
        for gate in pod["spec"].get("readinessGates") or []
        if old.get(gate["conditionType"], {}).get("status") != "True"
    ]
    gated = ("ReadinessGatesNotReady", f"corresponding conditions are not true: {' '.join(gates)}")
    begun = initialized(pod, view.containers) or any(
        view.containers.get(c["name"], Observed()).last for c in pod["spec"]["containers"]
    )
    incomplete = (
        "ContainersNotInitialized",
        "containers with incomplete status: ["
        + " ".join(c["name"] for c in init_containers(pod) if not _done(c, view.containers))
        + "]",
    )
    wanted: dict[str, tuple[bool, tuple[str, str]]] = {
        "PodReadyToStartContainers": (view.sandbox, ("", "")),
        "Initialized": (begun, ("PodCompleted", "") if completed else ("", "") if begun else incomplete),
        "Ready": (ready and not gates, ("", "") if ready and not gates else gated if ready else lacking),
        "ContainersReady": (ready, ("", "") if ready else lacking),
        "PodScheduled": (True, ("", "")),
    }
    conditions = []
    for kind, (holds, (reason, message)) in wanted.items():
        status = "True" if holds else "False"
        before = old.get(kind, {})
        changed = before.get("status") != status
        condition: Object = {
            "type": kind,
            "status": status,
            "lastProbeTime": None,
            "lastTransitionTime": timestamp(now) if changed else before.get("lastTransitionTime"),
        }
        if reason:
            condition["reason"] = reason
        if message:
            condition["message"] = message
        conditions.append(condition)
    return conditions + [c for kind, c in old.items() if kind not in _OURS]


def _done(container: Object, containers: Mapping[str, Observed]) -> bool:
    seen = containers.get(container["name"], Observed())
    return seen.started if is_sidecar(container) else bool(seen.ended and seen.last and seen.last.code == 0)


def status(
    pod: Object, view: View, where: Addresses, crashes: Mapping[str, int], now: float, message: str = ""
) -> Object:
    """The whole status, to replace the one in the API. `message` explains `view.stopped_for`."""
    initializing = not initialized(pod, view.containers)
    mains, inits = [], []
    for container in init_containers(pod):
        seen = view.containers.get(container["name"], Observed())
        inits.append(
            _container(pod, container, seen, "PodInitializing", crashes.get(container["name"], 0), now)
        )
    for container in pod["spec"]["containers"]:
        seen = view.containers.get(container["name"], Observed())
        waiting = "PodInitializing" if initializing else "ContainerCreating"
        mains.append(_container(pod, container, seen, waiting, crashes.get(container["name"], 0), now))
    sidecars = [s for s, c in zip(inits, init_containers(pod), strict=True) if is_sidecar(c)]
    ready = all(s["ready"] for s in [*mains, *sidecars])
    before = pod.get("status") or {}
    made: Object = {
        "phase": phase(pod, view),
        "conditions": _conditions(pod, view, ready, now),
        "hostIP": where.host,
        "hostIPs": [{"ip": address} for address in both(where.host)],
        "startTime": before.get("startTime") or timestamp(now),
        "containerStatuses": mains,
        "qosClass": before.get("qosClass") or quality_class(pod),
    }
    if where.pod:
        made |= {"podIP": where.pod, "podIPs": [{"ip": address} for address in both(where.pod)]}
    if inits:
        made["initContainerStatuses"] = inits
    if view.stopped_for:
        made["reason"] = view.stopped_for
        if message:
            made["message"] = message
    return made
