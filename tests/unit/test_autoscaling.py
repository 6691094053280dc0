"""Autoscalers: ratios, silent pods, windows, policies, bounds."""

from __future__ import annotations

from typing import Any

import pytest
from workload_objects import pod

from meshlight.controllers.autoscaling import History, NoMetrics, reading, settled


def metric(**target: Any) -> dict[str, Any]:
    kind = "Utilization" if "averageUtilization" in target else "AverageValue"
    return {"type": "Resource", "resource": {"name": "cpu", "target": {"type": kind, **target}}}


def use(*millicores: int | None) -> Any:
    """Pods with a request of 100m each, and what those that are known use."""
    pods = [pod(f"p{n}", requests={"cpu": "100m"}) for n in range(len(millicores))]
    return pods, {f"p{n}": {"main": {"cpu": m}} for n, m in enumerate(millicores) if m is not None}


@pytest.mark.parametrize(
    ("target", "millicores", "expected"),
    [
        ({"averageUtilization": 50}, (100, 100), 4),
        ({"averageUtilization": 50}, (53, 53), 2),
        ({"averageUtilization": 100}, (10, 10, 10, 10), 1),
        ({"averageValue": "50m"}, (200,), 4),
        ({"averageUtilization": 50}, (100, None), 2),
        ({"averageUtilization": 50}, (200, None), 4),
        ({"averageUtilization": 50}, (10, None), 2),
    ],
)
def test_replicas_by_usage(target: dict[str, Any], millicores: tuple[int | None, ...], expected: int) -> None:
    pods, used = use(*millicores)
    assert reading(metric(**target), pods, used, len(pods)).replicas == expected


def test_what_cannot_be_computed_says_why() -> None:
    with pytest.raises(NoMetrics, match="no metrics returned"):
        reading(metric(averageUtilization=50), [pod(requests={"cpu": "1"})], {}, 1)
    with pytest.raises(NoMetrics, match="missing request for cpu in container main of Pod p"):
        reading(metric(averageUtilization=50), [pod()], {"p": {"main": {"cpu": 5}}}, 1)


def test_up_at_once_down_after_its_window() -> None:
    spec, history = {"maxReplicas": 10, "minReplicas": 1}, History()
    assert settled(spec, 5, 3, history, 0.0) == (5, "")
    assert settled(spec, 2, 5, history, 100.0) == (5, "stabilized")
    assert settled(spec, 2, 5, history, 301.0) == (2, "")


def test_bounds_and_policies() -> None:
    spec: dict[str, Any] = {"maxReplicas": 6, "minReplicas": 2}
    assert settled(spec, 8, 4, History(), 0.0) == (6, "TooManyReplicas")
    assert settled(spec, 1, 2, History(), 0.0) == (2, "TooFewReplicas")
    assert settled({"maxReplicas": 100}, 50, 3, History(), 0.0) == (7, "ScaleUpLimit")
    slow = {"scaleDown": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}}
    history = History(changed=[(0.0, -1)])
    assert settled({"maxReplicas": 9, "behavior": slow}, 1, 5, History(), 10.0) == (4, "ScaleDownLimit")
    assert settled({"maxReplicas": 9, "behavior": slow}, 1, 5, history, 10.0) == (5, "ScaleDownLimit")
    never = {"scaleUp": {"selectPolicy": "Disabled"}}
    assert settled({"maxReplicas": 9, "behavior": never}, 8, 3, History(), 0.0) == (3, "ScaleUpLimit")
