"""Writes of a Pod through what is not the Pod: its binding to a node, its eviction."""

from __future__ import annotations

from typing import Any

from meshlight.kube import deletion, objects
from meshlight.kube.resources import Object
from meshlight.kube.rest import Rest, Target, WriteOptions
from meshlight.kube.selectors import match_labels
from meshlight.kube.status import StatusError, bad_request
from meshlight.kube.store import Key

_BUDGETS = "policy/poddisruptionbudgets"
_GONE = ("Succeeded", "Failed")


def bind(rest: Rest, target: Target, binding: Any, options: WriteOptions) -> None:
    """POST `pods/NAME/binding`: give a Pod its node. Raises StatusError 404, 409."""
    pod = rest.get(Target(target.served, target.namespace, target.name))
    if not isinstance(binding, dict) or not (binding.get("target") or {}).get("name"):
        raise bad_request("target.name: Required value: a binding names the node of the pod")
    if pod["spec"].get("nodeName"):
        raise StatusError(409, "Conflict", f"pod {target.name} is already assigned to a node")
    pod["spec"]["nodeName"] = binding["target"]["name"]
    for field in ("annotations", "labels"):
        if added := (binding.get("metadata") or {}).get(field):
            pod["metadata"][field] = {**(pod["metadata"].get(field) or {}), **added}
    conditions = [c for c in pod["status"].get("conditions") or [] if c["type"] != "PodScheduled"]
    conditions.append({"type": "PodScheduled", "status": "True", "lastTransitionTime": objects.now()})
    pod["status"]["conditions"] = conditions
    if not options.dry_run:
        rest.store.write(target.key, pod, int(pod["metadata"]["resourceVersion"]))


def evict(rest: Rest, target: Target, eviction: Any, options: WriteOptions) -> None:
    """POST `pods/NAME/eviction`: delete the Pod unless a disruption budget forbids it now.

    Raises StatusError 404, and 429 while the budget allows no disruption.
    """
    asked = deletion.parse((eviction or {}).get("deleteOptions") or {}, {})
    pod = rest.get(Target(target.served, target.namespace, target.name))
    deletion.check(target.served, pod, asked)
    status = pod.get("status") or {}
    counted = status.get("phase") not in (*_GONE, "Pending") and "deletionTimestamp" not in pod["metadata"]
    if counted:
        _take(rest, pod, dry_run=asked.dry_run)
    rest.delete(Target(target.served, target.namespace, target.name), asked, options)


def _take(rest: Rest, pod: Object, *, dry_run: bool) -> None:
    """Take one disruption from the budget of the pod, if it has one."""
    metadata = pod["metadata"]
    found = [
        budget
        for budget in rest.store.objects(_BUDGETS, metadata["namespace"])
        if match_labels((budget.get("spec") or {}).get("selector"), metadata.get("labels") or {})
    ]
    if len(found) > 1:
        message = (
            "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support."
        )
        raise StatusError(500, "InternalError", message)
    if not found:
        return
    budget = found[0]
    name, status = budget["metadata"]["name"], budget.setdefault("status", {})
    if not _ready(pod) and _unhealthy_may_go(budget, status):
        return
    if status.get("observedGeneration", 0) < budget["metadata"].get("generation", 1):
        raise _refused(f"The disruption budget {name} is still being processed by the server.")
    if status.get("disruptionsAllowed", 0) < 1:
        raise _refused(
            f"The disruption budget {name} needs {status.get('desiredHealthy', 0)} healthy pods "
            f"and has {status.get('currentHealthy', 0)} currently"
        )
    status["disruptionsAllowed"] -= 1
    status.setdefault("disruptedPods", {})[metadata["name"]] = objects.now()
    if not dry_run:
        key = Key(_BUDGETS, metadata["namespace"], name)
        rest.store.write(key, budget, int(budget["metadata"]["resourceVersion"]))


def _ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _unhealthy_may_go(budget: Object, status: Object) -> bool:
    """Whether a pod that is not ready may be evicted whatever the budget has left."""
    if (budget.get("spec") or {}).get("unhealthyPodEvictionPolicy") == "AlwaysAllow":
        return True
    wanted: int = status.get("desiredHealthy", 0)
    return wanted > 0 and bool(status.get("currentHealthy", 0) >= wanted)


def _refused(cause: str) -> StatusError:
    message = "Cannot evict pod as it would violate the pod's disruption budget."
    return StatusError(
        429, "TooManyRequests", message, {"causes": [{"reason": "DisruptionBudget", "message": cause}]}
    )
