"""How many replicas a HorizontalPodAutoscaler wants, from what its pods use. Pure.

Rules: Kubernetes' "Horizontal Pod Autoscaling" (ratio of usage to target with a tolerance, pods without
metrics, stabilization windows and policies of `behavior`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshlight.controllers.pods import is_active, is_ready
from meshlight.kube.pod_resources import amount, requests
from meshlight.kube.resources import Object

TOLERANCE = 0.1
"""A ratio this close to one changes nothing."""
_DOWN_WINDOW = 300
_DEFAULT_UP = [
    {"type": "Percent", "value": 100, "periodSeconds": 15},
    {"type": "Pods", "value": 4, "periodSeconds": 15},
]
_DEFAULT_DOWN = [{"type": "Percent", "value": 100, "periodSeconds": 15}]

Usage = Mapping[str, Mapping[str, Mapping[str, int]]]
"""By pod, container and resource, in the resource's unit (CPU in thousandths)."""


class NoMetrics(Exception):
    """The metric says nothing: reason and message of the condition ScalingActive."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


@dataclass(frozen=True, slots=True)
class Reading:
    """One metric: replicas it asks for, its present value for the status, and how it is named in Events."""

    replicas: int
    current: Object
    name: str


def _containers(pod: Object, metric: Object) -> list[Object]:
    wanted = (metric.get("containerResource") or {}).get("container")
    return [c for c in pod["spec"]["containers"] if wanted in (None, c["name"])]


def reading(metric: Object, pods: Sequence[Object], used: Usage, replicas: int) -> Reading:
    """What one resource metric asks for. Raises NoMetrics."""
    kind = "containerResource" if metric.get("containerResource") else "resource"
    source = metric.get(kind)
    if not source:
        raise NoMetrics("InvalidMetricSourceType", f"metrics of type {metric.get('type')} are not served here")
    name, target = source["name"], source["target"]
    active = [p for p in pods if is_active(p)]
    values: dict[str, int] = {}
    for pod in active:
        own = used.get(pod["metadata"]["name"])
        if own is not None and (is_ready(pod) or name != "cpu"):
            chosen = [c["name"] for c in _containers(pod, metric)]
            values[pod["metadata"]["name"]] = sum(own.get(c, {}).get(name, 0) for c in chosen)
    if not values:
        words = f"unable to get metrics for resource {name}: no metrics returned from resource metrics API"
        raise NoMetrics("FailedGetResourceMetric", f"the HPA was unable to compute the replica count: {words}")
    average = sum(values.values()) / len(values)
    if target["type"] == "Utilization":
        asked = {}
        for pod in active:
            total = 0
            for container in _containers(pod, metric):
                given = requests(container)
                if name not in given:
                    where = f"container {container['name']} of Pod {pod['metadata']['name']}"
                    raise NoMetrics("FailedGetResourceMetric", f"missing request for {name} in {where}")
                total += given[name]
            asked[pod["metadata"]["name"]] = total
        base = sum(asked[n] for n in values) / len(values)
        wanted = base * int(target["averageUtilization"]) / 100
        shown = {
            "averageUtilization": int(average * 100 / base) if base else 0,
            "averageValue": _text(name, average),
        }
        words = f"{name} resource utilization (percentage of request)"
    else:
        wanted = float(amount(name, target.get("averageValue") or target.get("value") or 0))
        shown = {"averageValue": _text(name, average)}
        words = f"{name} resource"
    count = _replicas(values, [p["metadata"]["name"] for p in active], wanted, replicas)
    current: Object = {"type": metric["type"], kind: {"name": name, "current": shown}}
    if kind == "containerResource":
        current[kind]["container"] = source["container"]
    return Reading(count, current, words)


def _text(name: str, value: float) -> str:
    return f"{round(value)}m" if name == "cpu" else str(round(value))


def _replicas(values: Mapping[str, int], active: Sequence[str], wanted: float, replicas: int) -> int:
    """The ratio's answer; pods that said nothing count against a change in either direction."""
    if wanted <= 0:
        return replicas
    ratio = sum(values.values()) / len(values) / wanted
    if abs(ratio - 1) <= TOLERANCE:
        return replicas
    silent = [n for n in active if n not in values]
    if not silent:
        return math.ceil(ratio * len(values))
    assumed = 0.0 if ratio > 1 else wanted
    total = sum(values.values()) + assumed * len(silent)
    corrected = total / len(active) / wanted
    if abs(corrected - 1) <= TOLERANCE or (corrected > 1) != (ratio > 1):
        return replicas
    return math.ceil(corrected * len(active))


@dataclass(slots=True)
class History:
    """What was recommended and changed, with times in seconds, as far back as the windows reach."""

    recommended: list[tuple[float, int]] = field(default_factory=list)
    changed: list[tuple[float, int]] = field(default_factory=list)

    def forget(self, now: float) -> None:
        """Drop what no window reaches any more."""
        self.recommended = [(t, n) for t, n in self.recommended if now - t <= 3600]
        self.changed = [(t, n) for t, n in self.changed if now - t <= 1800]


def settled(spec: Object, asked: int, replicas: int, history: History, now: float) -> tuple[int, str]:
    """The replicas after windows, policies and bounds; and why fewer or more than asked, if so."""
    history.forget(now)
    history.recommended.append((now, asked))
    behavior = spec.get("behavior") or {}
    up, down = behavior.get("scaleUp") or {}, behavior.get("scaleDown") or {}

    def within(rules: Object, default: int) -> list[int]:
        window = rules.get("stabilizationWindowSeconds")
        return [n for t, n in history.recommended if now - t <= (default if window is None else window)]

    wanted = min(
        max(replicas, min(within(up, 0), default=asked)), max(within(down, _DOWN_WINDOW), default=asked)
    )
    why = "" if wanted == asked else "stabilized"
    if wanted > replicas:
        limit = _policy_limit(up, _DEFAULT_UP, replicas, history, now, 1)
        wanted, why = (limit, "ScaleUpLimit") if wanted > limit else (wanted, why)
    elif wanted < replicas:
        limit = _policy_limit(down, _DEFAULT_DOWN, replicas, history, now, -1)
        wanted, why = (limit, "ScaleDownLimit") if wanted < limit else (wanted, why)
    least, most = int(spec.get("minReplicas", 1)), int(spec["maxReplicas"])
    if wanted > most:
        return most, "TooManyReplicas"
    if wanted < least:
        return least, "TooFewReplicas"
    return wanted, why


def _policy_limit(
    rules: Object, default: list[Object], replicas: int, history: History, now: float, sign: int
) -> int:
    """How far the policies let the replicas go in one direction."""
    select = rules.get("selectPolicy") or "Max"
    if select == "Disabled":
        return replicas
    limits = []
    for policy in rules.get("policies") or default:
        recent = sum(n for t, n in history.changed if now - t < policy["periodSeconds"] and n * sign > 0)
        before = replicas - recent
        step = policy["value"] if policy["type"] == "Pods" else before * policy["value"] / 100
        limits.append(math.ceil(before + step) if sign > 0 else max(0, math.floor(before - step)))
    farthest = max if (select == "Max") == (sign > 0) else min
    return int(farthest(limits))
