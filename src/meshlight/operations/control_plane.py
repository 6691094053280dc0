"""Questions to istiod: which proxies are connected, how far they are, which versions run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import orjson

from meshlight.kube.client import Client
from meshlight.kube.port_forward import fetch
from meshlight.kube.resources import PODS
from meshlight.operations.errors import OperationError

MONITORING_PORT = 15014

# istioctl's columns, by the end of the resource type they stand for.
_COLUMNS = {
    "CDS": ("Cluster",),
    "LDS": ("Listener",),
    "EDS": ("ClusterLoadAssignment",),
    "RDS": ("RouteConfiguration",),
    "ECDS": ("TypedExtensionConfig",),
    "WORKLOADS": ("istio.workload.Address", "istio.workload.Workload"),
    "POLICIES": ("istio.security.Authorization",),
}
COLUMNS = ("NAME", "CLUSTER", "CDS", "LDS", "EDS", "RDS", "ECDS", "ISTIOD", "VERSION", "WORKLOADS", "POLICIES")


class NoControlPlane(OperationError):
    """No istiod runs."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """One connected proxy; `types` is its state by resource type."""

    name: str
    cluster: str
    kind: str
    node: str
    version: str
    istiod: str
    types: dict[str, dict[str, Any]]

    def state(self, column: str) -> str:
        """A column's word: SYNCED, STALE, ERROR, NOT SENT, or IGNORED for what the proxy does not ask for."""
        states = [s for name, s in self.types.items() if name.endswith(_COLUMNS[column])]
        if not states:
            return "IGNORED"
        worst = ("ERROR", "STALE", "NOT SENT", "SYNCED")
        return min((str(s.get("status")) for s in states), key=lambda w: worst.index(w) if w in worst else 0)

    def row(self) -> tuple[str, ...]:
        """istioctl's columns, and what only node proxies have after them."""
        states = [self.state(column) for column in ("CDS", "LDS", "EDS", "RDS", "ECDS")]
        return (
            self.name, self.cluster, *states, self.istiod, self.version,
            self.state("WORKLOADS"), self.state("POLICIES"),
        )  # fmt: skip


async def instances(client: Client, namespace: str) -> list[str]:
    """The istiod pods that run. Raises NoControlPlane."""
    pods = (await client.list(PODS, namespace, label_selector="app=istiod")).items
    running = [p["metadata"]["name"] for p in pods if (p.get("status") or {}).get("phase") == "Running"]
    if not running:
        raise NoControlPlane(f"no running istiod in {namespace}: `kubectl get pods -n {namespace}` says more")
    return sorted(running)


async def debug(client: Client, namespace: str, path: str) -> dict[str, Any]:
    """A debug page of every istiod, by pod. Raises NoControlPlane, ForwardError, ApiError."""
    names = await instances(client, namespace)
    pages = await asyncio.gather(*(fetch(client, namespace, name, MONITORING_PORT, path) for name in names))
    return {name: orjson.loads(page) for name, page in zip(names, pages, strict=True)}


async def proxies(client: Client, namespace: str) -> list[Proxy]:
    """Every connected proxy, by name."""
    found = []
    for istiod, page in (await debug(client, namespace, "/debug/syncz")).items():
        for entry in page:
            found.append(
                Proxy(
                    name=entry["proxy"],
                    cluster=entry.get("cluster_id") or "",
                    kind=entry.get("proxy_type") or "",
                    node=entry.get("node") or "",
                    version=entry.get("istio_version") or "",
                    istiod=istiod,
                    types=entry.get("resources") or {},
                )
            )
    return sorted(found, key=lambda p: (p.name, p.istiod))


async def version(client: Client, namespace: str) -> list[str]:
    """The versions of the istiods that run."""
    names = await instances(client, namespace)
    pages = await asyncio.gather(
        *(fetch(client, namespace, name, MONITORING_PORT, "/version") for name in names)
    )
    return [page.decode().strip() for page in pages]
