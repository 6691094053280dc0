"""Facts of pods that controllers decide by, and pods made from templates. Pure.

Rules: Kubernetes' Pod v1 API and what its controllers make of it (readiness and `minReadySeconds`, who goes
first when there are too many).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from meshlight.kube.resources import Object

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
_PHASES = {"Pending": 0, "Unknown": 1, "Running": 2}


def stamp(now: datetime) -> str:
    """A time as `metav1.Time` has it."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str) -> datetime:
    """A `metav1.Time` or `MicroTime`."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def clock() -> datetime:
    """Now."""
    return datetime.now(UTC)


def condition(obj: Object, kind: str) -> Object:
    """A condition of an object's status; empty if it has none of that type."""
    for found in (obj.get("status") or {}).get("conditions") or []:
        if found["type"] == kind:
            return found  # type: ignore[no-any-return]
    return {}


def is_ready(pod: Object) -> bool:
    """Whether the pod's Ready condition holds."""
    return bool(condition(pod, "Ready").get("status") == "True")


def available_in(pod: Object, min_ready: int, now: datetime) -> float | None:
    """Seconds until a ready pod counts as available (0: it does now); None for one that is not ready."""
    ready = condition(pod, "Ready")
    if ready.get("status") != "True":
        return None
    if not min_ready or not ready.get("lastTransitionTime"):
        return 0.0
    return max(0.0, min_ready - (now - moment(ready["lastTransitionTime"])).total_seconds())


def is_available(pod: Object, min_ready: int, now: datetime) -> bool:
    """Whether a pod has been ready for long enough."""
    return available_in(pod, min_ready, now) == 0.0


def soonest(pods: Iterable[Object], min_ready: int, now: datetime) -> float | None:
    """Seconds until the next pod becomes available; None when none is about to."""
    waits = [w for p in pods if (w := available_in(p, min_ready, now))]
    return min(waits, default=None)


def phase(pod: Object) -> str:
    """The pod's phase."""
    return str((pod.get("status") or {}).get("phase") or "Pending")


def is_finished(pod: Object) -> bool:
    """Whether every container has ended for good."""
    return phase(pod) in ("Succeeded", "Failed")


def is_terminating(obj: Object) -> bool:
    """Whether the object is being deleted."""
    return bool(obj["metadata"].get("deletionTimestamp"))


def is_active(pod: Object) -> bool:
    """Whether the pod runs or will run."""
    return not is_finished(pod) and not is_terminating(pod)


def labels(obj: Object) -> dict[str, str]:
    """An object's labels."""
    return obj["metadata"].get("labels") or {}


def notes(obj: Object) -> dict[str, str]:
    """An object's annotations."""
    return obj["metadata"].get("annotations") or {}


def controller_of(obj: Object) -> Object | None:
    """The owner reference that is the object's controller."""
    for owner in obj["metadata"].get("ownerReferences") or []:
        if owner.get("controller"):
            return owner  # type: ignore[no-any-return]
    return None


def reference(owner: Object, api_version: str, kind: str) -> Object:
    """An owner reference that makes `owner` the controller."""
    metadata = owner["metadata"]
    return {
        "apiVersion": api_version,
        "kind": kind,
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def restarts(pod: Object) -> int:
    """How often the pod's containers have been restarted: of the one that was restarted most."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return max((int(s.get("restartCount") or 0) for s in statuses), default=0)


def count_or_share(value: int | str | None, whole: int, *, up: bool) -> int:
    """A count, or a percentage of `whole` rounded up (surge) or down (unavailable)."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value
    share = int(value.rstrip("%")) * whole
    return -(-share // 100) if up else share // 100


def deletion_order(pods: Iterable[Object], on_node: Mapping[str, int] | None = None) -> list[Object]:
    """Pods in the order in which a ReplicaSet gives them up.

    Unplaced, pending and unready ones, cheap ones by `pod-deletion-cost`, those beside more of their kind on
    their node (`on_node`, by node name), those ready for less time, restarted ones, younger ones.
    """
    every = list(pods)
    crowd = on_node or Counter(p["spec"].get("nodeName", "") for p in every)

    def rank(pod: Object) -> tuple[Any, ...]:
        node = pod["spec"].get("nodeName") or ""
        ready = condition(pod, "Ready")
        since = ready.get("lastTransitionTime") or ""
        age = moment(since).timestamp() if since and ready.get("status") == "True" else float("inf")
        cost = notes(pod).get(DELETION_COST, "0")
        created = pod["metadata"].get("creationTimestamp") or "9"
        return (
            bool(node),
            _PHASES.get(phase(pod), 0),
            ready.get("status") == "True",
            int(cost) if cost.lstrip("-").isdigit() else 0,
            -crowd.get(node, 0),
            -age,
            -restarts(pod),
            tuple(-ord(c) for c in created),
        )

    return sorted(every, key=rank)


def template_hash(template: Object, salt: int = 0) -> str:
    """A short name for a pod template, in the letters that Kubernetes uses for it."""
    text = json.dumps(template, sort_keys=True).encode() + (str(salt).encode() if salt else b"")
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    letters = []
    for _ in range(10):
        number, digit = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[digit])
    return "".join(letters)


def from_template(
    owner: Object, owner_reference: Object, template: Object, extra: Mapping[str, str] | None = None
) -> Object:
    """A new pod of a template, owned, with a name of its own still to be made. `extra` are more labels."""
    metadata = owner["metadata"]
    given = template.get("metadata") or {}
    made: Object = {
        "generateName": metadata["name"][:57] + "-",
        "namespace": metadata["namespace"],
        "labels": {**(given.get("labels") or {}), **(extra or {})},
        "ownerReferences": [owner_reference],
    }
    if given.get("annotations"):
        made["annotations"] = dict(given["annotations"])
    if given.get("finalizers"):
        made["finalizers"] = list(given["finalizers"])
    return {"apiVersion": "v1", "kind": "Pod", "metadata": made, "spec": copy.deepcopy(template["spec"])}
