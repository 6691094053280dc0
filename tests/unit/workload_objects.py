"""Small objects for the tests of controllers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
STAMP = "2026-01-01T11:00:00Z"


def node(name: str = "a", *, labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    """A node with 4 cores and 8 GiB, which may hold 10 pods."""
    room = {"cpu": "4", "memory": "8Gi", "pods": "10"}
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
        "spec": spec,
        "status": {"allocatable": room, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def pod(
    name: str = "p",
    *,
    phase: str = "Running",
    ready: bool = True,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    metadata: dict[str, Any] | None = None,
    status: dict[str, Any] | None = None,
    requests: dict[str, str] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A pod with one container."""
    container: dict[str, Any] = {"name": "main"}
    if requests:
        container["resources"] = {"requests": requests}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "x",
            "uid": f"uid-{name}",
            "creationTimestamp": STAMP,
            "labels": labels or {},
            "annotations": annotations or {},
            **(metadata or {}),
        },
        "spec": {"containers": [container], **spec},
        "status": {
            "phase": phase,
            "conditions": [{"type": "Ready", "status": str(ready), "lastTransitionTime": STAMP}],
            **(status or {}),
        },
    }
