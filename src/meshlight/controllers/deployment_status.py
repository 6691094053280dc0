"""What a Deployment says of itself: counts, and the conditions Available, Progressing, ReplicaFailure. Pure.

Words and rules are Kubernetes' own ("Deployment status"); `kubectl rollout status` and `wait` read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from meshlight.controllers.pods import condition, moment, stamp
from meshlight.controllers.rollout import Bounds
from meshlight.kube.resources import Object

_NO_DEADLINE = 2**31 - 1


def _sum(sets: Sequence[Object], field: str) -> int:
    return sum(int((s.get("status") or {}).get(field) or 0) for s in sets)


def counts(item: Object, sets: Sequence[Object], fresh: Object | None) -> Object:
    """The numbers of the status."""
    available, ready = _sum(sets, "availableReplicas"), _sum(sets, "readyReplicas")
    total = sum(int(s["spec"].get("replicas", 1)) for s in sets)
    return {
        "observedGeneration": item["metadata"].get("generation", 0),
        "replicas": _sum(sets, "replicas"),
        "updatedReplicas": _sum([fresh], "replicas") if fresh else 0,
        "readyReplicas": ready,
        "availableReplicas": available,
        "unavailableReplicas": max(0, total - available),
    }


def _is_complete(spec: Object, numbers: Object) -> bool:
    wanted = spec.get("replicas", 1)
    return bool(
        numbers["updatedReplicas"] == wanted
        and numbers["replicas"] == wanted
        and numbers["availableReplicas"] == wanted
    )


def complete(item: Object, sets: Sequence[Object], fresh: Object | None) -> bool:
    """Whether the rollout is through."""
    return _is_complete(item["spec"], counts(item, sets, fresh))


def _progressed(before: Object, after: Object) -> bool:
    """Whether something got better since the last status."""

    def old(field: str) -> int:
        return int(before.get(field) or 0)

    return bool(
        after["updatedReplicas"] > old("updatedReplicas")
        or after["replicas"] - after["updatedReplicas"] < old("replicas") - old("updatedReplicas")
        or after["readyReplicas"] > old("readyReplicas")
        or after["availableReplicas"] > old("availableReplicas")
    )


def _deadline(spec: Object) -> int | None:
    seconds = spec.get("progressDeadlineSeconds", 600)
    return None if seconds is None or seconds >= _NO_DEADLINE else int(seconds)


def deadline_in(item: Object, now: datetime) -> float | None:
    """Seconds until the rollout counts as stuck; None when it does not wait for anything."""
    seconds = _deadline(item["spec"])
    progress = condition(item, "Progressing")
    if seconds is None or item["spec"].get("paused") or progress.get("status") != "True":
        return None
    if progress.get("reason") == "NewReplicaSetAvailable" or not progress.get("lastUpdateTime"):
        return None
    return max(0.1, seconds - (now - moment(progress["lastUpdateTime"])).total_seconds())


def _progress(
    item: Object, fresh: Object | None, numbers: Object, now: datetime
) -> tuple[str, str, str, bool] | None:
    """(status, reason, message, whether it is news) of Progressing; None leaves it as it is."""
    spec, before = item["spec"], condition(item, "Progressing")
    name = fresh["metadata"]["name"] if fresh else ""
    if spec.get("paused"):
        if before.get("reason") == "DeploymentPaused":
            return None
        return "Unknown", "DeploymentPaused", "Deployment is paused", True
    if before.get("reason") == "DeploymentPaused":
        return "Unknown", "DeploymentResumed", "Deployment is resumed", True
    seconds = _deadline(spec)
    if seconds is None:
        return None
    what = f'ReplicaSet "{name}"' if fresh else f'Deployment "{item["metadata"]["name"]}"'
    if fresh is not None and _is_complete(spec, numbers):
        done = ("True", "NewReplicaSetAvailable", f"{what} has successfully progressed.")
        return *done, before.get("reason") != done[1] or before.get("message") != done[2]
    finished = before.get("reason") == "NewReplicaSetAvailable" and f'"{name}"' in before.get("message", "")
    if finished and numbers["updatedReplicas"] == numbers["replicas"]:
        # A finished rollout that loses pods is a matter of Available, until its template changes.
        return None
    if fresh is not None and f'"{name}"' not in before.get("message", ""):
        return "True", "NewReplicaSetCreated", f'Created new replica set "{name}"', True
    if not before or _progressed(item.get("status") or {}, numbers):
        return "True", "ReplicaSetUpdated", f"{what} is progressing.", True
    if before.get("reason") == "ProgressDeadlineExceeded":
        return None
    since = before.get("lastUpdateTime")
    if since and (now - moment(since)).total_seconds() >= seconds:
        return "False", "ProgressDeadlineExceeded", f"{what} has timed out progressing.", True
    return None


def _available(spec: Object, numbers: Object) -> tuple[str, str, str]:
    bounds = Bounds.of(spec)
    if numbers["availableReplicas"] >= bounds.wanted - bounds.unavailable:
        return "True", "MinimumReplicasAvailable", "Deployment has minimum availability."
    return "False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability."


def _condition(before: Object, kind: str, values: tuple[str, str, str], now: datetime, news: bool) -> Object:
    status, reason, message = values
    same = not news and (before.get("status"), before.get("reason")) == (status, reason)
    if same and before.get("message") == message:
        return before
    turned = before.get("status") != status
    return {
        "type": kind,
        "status": status,
        "lastUpdateTime": stamp(now),
        "lastTransitionTime": stamp(now) if turned else before.get("lastTransitionTime") or stamp(now),
        "reason": reason,
        "message": message,
    }


def conditions(
    item: Object, sets: Sequence[Object], fresh: Object | None, numbers: Object, now: datetime
) -> list[Object]:
    """The conditions; an unchanged one keeps its times."""
    found: dict[str, Object] = {c["type"]: c for c in (item.get("status") or {}).get("conditions") or []}
    found["Available"] = _condition(
        found.get("Available", {}), "Available", _available(item["spec"], numbers), now, False
    )
    if (progress := _progress(item, fresh, numbers, now)) is not None:
        *values, news = progress
        before = found.get("Progressing", {})
        found["Progressing"] = _condition(before, "Progressing", (values[0], values[1], values[2]), now, news)
    failure = next((c for s in [fresh, *sets] if s and (c := condition(s, "ReplicaFailure"))), None)
    if failure and failure.get("status") == "True":
        values3 = ("True", failure["reason"], failure.get("message", ""))
        found["ReplicaFailure"] = _condition(
            found.get("ReplicaFailure", {}), "ReplicaFailure", values3, now, False
        )
    else:
        found.pop("ReplicaFailure", None)
    return list(found.values())


def status(item: Object, sets: Sequence[Object], fresh: Object | None, now: datetime) -> Object:
    """The status of a Deployment with these ReplicaSets, of which `fresh` is its template's."""
    numbers = counts(item, sets, fresh)
    return {**numbers, "conditions": conditions(item, sets, fresh, numbers, now)}
