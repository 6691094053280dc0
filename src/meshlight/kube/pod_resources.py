"""What pods ask for and nodes have, in whole numbers: CPU in thousandths of a core, the rest in units. Pure.

Rules: Kubernetes' "Resource Management for Pods and Containers" (init containers, sidecars, overhead).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from meshlight.kube import quantity
from meshlight.kube.resources import Object

Amounts = dict[str, int]
"""By resource name."""

DEFAULT_CPU, DEFAULT_MEMORY = 100, 200 << 20
"""What a pod without requests counts for when nodes are compared, as in Kubernetes' scoring."""


def amount(name: str, text: object) -> int:
    """One quantity in the unit of its resource, rounded up."""
    value = quantity.value(str(text))
    return math.ceil(value * 1000) if name == "cpu" else math.ceil(value)


def amounts(found: Mapping[str, object] | None) -> Amounts:
    """A ResourceList."""
    return {name: amount(name, text) for name, text in (found or {}).items()}


def add(total: Amounts, more: Mapping[str, int], sign: int = 1) -> None:
    """Add amounts in place."""
    for name, value in more.items():
        total[name] = total.get(name, 0) + sign * value


def most(first: Mapping[str, int], second: Mapping[str, int]) -> Amounts:
    """The larger of both, by resource."""
    return {n: max(first.get(n, 0), second.get(n, 0)) for n in {*first, *second}}


def requests(container: Object, kind: str = "requests") -> Amounts:
    """A container's requests or limits."""
    return amounts((container.get("resources") or {}).get(kind))


def pod_requests(spec: Object, kind: str = "requests") -> Amounts:
    """What a pod needs at its peak: main containers and sidecars together, or an init container beside the
    sidecars that were started before it; `kind` may be `limits`."""
    running: Amounts = {}
    for container in spec.get("containers") or []:
        add(running, requests(container, kind))
    sidecars: Amounts = {}
    initial: Amounts = {}
    for container in spec.get("initContainers") or []:
        wanted = requests(container, kind)
        if container.get("restartPolicy") == "Always":
            add(sidecars, wanted)
            initial = most(initial, sidecars)
        else:
            beside = dict(sidecars)
            add(beside, wanted)
            initial = most(initial, beside)
    add(running, sidecars)
    total = most(running, initial)
    add(total, amounts(spec.get("overhead")))
    return {n: v for n, v in total.items() if v}


def total_requests(specs: Iterable[Object]) -> Amounts:
    """What several pods need together."""
    total: Amounts = {}
    for spec in specs:
        add(total, pod_requests(spec))
    return total


def allocatable(node: Object) -> Amounts:
    """What a node has for pods."""
    status = node.get("status") or {}
    return amounts(status.get("allocatable") or status.get("capacity"))
