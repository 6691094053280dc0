"""What a namespace uses of what a ResourceQuota bounds. Pure.

Rules: Kubernetes' "Resource Quotas" (compute resources, counts of objects, scopes).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from meshlight.kube import quantity
from meshlight.kube.pod_resources import pod_requests
from meshlight.kube.resources import Object

_COUNTS = {
    "pods": "pods", "services": "services", "secrets": "secrets", "configmaps": "configmaps",
    "persistentvolumeclaims": "persistentvolumeclaims", "resourcequotas": "resourcequotas",
    "replicationcontrollers": "replicationcontrollers",
}  # fmt: skip
_COMPUTE = ("cpu", "memory", "ephemeral-storage")


def _ended(pod: Object) -> bool:
    """Whether a pod has ended for good: it uses nothing."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def in_scope(quota: Object, pod: Object) -> bool:
    """Whether a quota's scopes mean a pod."""
    spec = quota["spec"]
    rules = [{"scopeName": s, "operator": "Exists"} for s in spec.get("scopes") or []]
    rules += (spec.get("scopeSelector") or {}).get("matchExpressions") or []
    return all(_matches(rule, pod) for rule in rules)


def _matches(rule: Mapping[str, Any], pod: Object) -> bool:
    effort = (pod.get("status") or {}).get("qosClass") == "BestEffort"
    ends = pod["spec"].get("activeDeadlineSeconds") is not None
    match rule["scopeName"]:
        case "BestEffort":
            return effort
        case "NotBestEffort":
            return not effort
        case "Terminating":
            return ends
        case "NotTerminating":
            return not ends
        case "PriorityClass":
            name, values = pod["spec"].get("priorityClassName") or "", rule.get("values") or []
            operator = rule.get("operator", "Exists")
            held = {
                "In": name in values,
                "NotIn": name not in values,
                "Exists": bool(name),
                "DoesNotExist": not name,
            }
            return held[operator]
    return True


def used(quota: Object, pods: Iterable[Object], counts: Mapping[str, int], claims: Iterable[Object]) -> Object:
    """What is used of each bounded resource; `counts` are objects of the namespace by plural name."""
    mine = [p for p in pods if not _ended(p) and in_scope(quota, p)]
    totals: dict[str, int] = {}
    for pod in mine:
        for kind in ("requests", "limits"):
            for name, amount in pod_requests(pod["spec"], kind).items():
                totals[f"{kind}.{name}"] = totals.get(f"{kind}.{name}", 0) + amount
    found: Object = {}
    for name in quota["spec"].get("hard") or {}:
        asked = f"requests.{name}" if name in _COMPUTE else name
        if name == "pods" or name == "count/pods":
            found[name] = str(len(mine))
        elif name == "requests.storage":
            amounts = [
                (c["spec"].get("resources") or {}).get("requests", {}).get("storage", "0") for c in claims
            ]
            found[name] = _bytes(int(sum((quantity.value(a) for a in amounts), Decimal(0))))
        elif asked.partition(".")[0] in ("requests", "limits"):
            amount = totals.get(asked, 0)
            found[name] = quantity.canonical(f"{amount}m") if asked.endswith(".cpu") else _bytes(amount)
        elif name.startswith("count/"):
            found[name] = str(counts.get(name[6:].partition(".")[0], 0))
        else:
            found[name] = str(counts.get(_COUNTS.get(name, name), 0))
    return found


def _bytes(amount: int) -> str:
    text = f"{amount >> 10}Ki" if amount and amount % 1024 == 0 else str(amount)
    return quantity.canonical(text)
