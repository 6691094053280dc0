"""Built-in kinds in their other versions: Events of events.k8s.io, autoscalers of autoscaling/v1.

Objects are stored in one version; these functions write them in another. Pure; arguments stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meshlight.kube.resources import Object

_EVENT_FIELDS = {
    # core/v1: events.k8s.io/v1
    "involvedObject": "regarding", "message": "note", "source": "deprecatedSource",
    "firstTimestamp": "deprecatedFirstTimestamp", "lastTimestamp": "deprecatedLastTimestamp",
    "count": "deprecatedCount", "reportingComponent": "reportingController",
}  # fmt: skip


def convert(obj: Object, api_version: str) -> Object:
    """The object in another version of its kind; only the version's name changes where no rule is known."""
    rule = _RULES.get((obj.get("apiVersion", ""), api_version, obj.get("kind", "")))
    converted = rule(obj) if rule else dict(obj)
    converted["apiVersion"] = api_version
    return converted


def _renamed(names: dict[str, str]) -> Callable[[Object], Object]:
    return lambda obj: {names.get(field, field): value for field, value in obj.items()}


def _event_to_core(obj: Object) -> Object:
    event = _renamed({new: old for old, new in _EVENT_FIELDS.items()})(obj)
    event.setdefault("involvedObject", {})
    if "involvedObject" in event and not event["involvedObject"].get("namespace"):
        event["involvedObject"] = {**event["involvedObject"], "namespace": event["metadata"].get("namespace")}
    return event


def _cpu_target(metric: Object) -> int | None:
    resource = metric.get("resource") or {}
    target: Any = (resource.get("target") or {}).get("averageUtilization")
    return target if resource.get("name") == "cpu" else None


def _autoscaler_to_v1(obj: Object) -> Object:
    spec = {k: v for k, v in (obj.get("spec") or {}).items() if k not in ("metrics", "behavior")}
    targets = [t for m in (obj.get("spec") or {}).get("metrics") or () if (t := _cpu_target(m)) is not None]
    if targets:
        spec["targetCPUUtilizationPercentage"] = targets[0]
    seen = obj.get("status") or {}
    status = {k: v for k, v in seen.items() if k not in ("currentMetrics", "conditions")}
    for metric in seen.get("currentMetrics") or ():
        resource = metric.get("resource") or {}
        if resource.get("name") == "cpu":
            status["currentCPUUtilizationPercentage"] = (resource.get("current") or {}).get(
                "averageUtilization", 0
            )
    return {**obj, "spec": spec, "status": {"currentReplicas": 0, "desiredReplicas": 0, **status}}


def _autoscaler_to_v2(obj: Object) -> Object:
    spec = dict(obj.get("spec") or {})
    wanted = spec.pop("targetCPUUtilizationPercentage", None)
    if wanted is not None:
        target = {"type": "Utilization", "averageUtilization": wanted}
        spec["metrics"] = [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]
    status = dict(obj.get("status") or {})
    status.pop("currentCPUUtilizationPercentage", None)
    return {**obj, "spec": spec, "status": status}


_RULES: dict[tuple[str, str, str], Callable[[Object], Object]] = {
    ("v1", "events.k8s.io/v1", "Event"): _renamed(_EVENT_FIELDS),
    ("events.k8s.io/v1", "v1", "Event"): _event_to_core,
    ("autoscaling/v2", "autoscaling/v1", "HorizontalPodAutoscaler"): _autoscaler_to_v1,
    ("autoscaling/v1", "autoscaling/v2", "HorizontalPodAutoscaler"): _autoscaler_to_v2,
}
