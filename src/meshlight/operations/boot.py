"""Bring a cluster up and say what came up; the verbs `up` and `down` render this."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from meshlight.embedded import launch
from meshlight.embedded.install import COMPLETE
from meshlight.embedded.layout import Layout, Record
from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import (
    CUSTOM_RESOURCE_DEFINITIONS,
    DAEMON_SETS,
    DEPLOYMENTS,
    NAMESPACES,
    NODES,
    Object,
    Resource,
)
from meshlight.operations.status import is_ready

Progress = Callable[[str], None]
COMPONENTS: tuple[tuple[Resource, str, str], ...] = (
    (DEPLOYMENTS, "kube-system", "coredns"),
    (DEPLOYMENTS, "istio-system", "istiod"),
    (DAEMON_SETS, "istio-system", "ztunnel"),
)
"""What must be ready before a cluster is up, in the order in which it is told."""


class BootError(Exception):
    """The cluster did not come up in time; the message names the part and its log."""


@dataclass(frozen=True, slots=True)
class Booted:
    """A cluster that is up: its record, whether this call started it, and how long it took."""

    record: Record
    started: bool
    seconds: float


async def up(
    layout: Layout, nodes: int | None, api_port: int | None, deadline: float, progress: Progress
) -> Booted:
    """Start (or find) the cluster and wait until the API serves cluster-101's objects.

    `deadline` is in seconds from now. Raises launch.LaunchError, BootError.
    """
    begun = time.monotonic()
    record, started = launch.start(layout, nodes, api_port)
    progress("supervisor")
    waiting = "the Kubernetes API with its nodes"
    try:
        async with asyncio.timeout(deadline), Client.from_kubeconfig(layout.kubeconfig) as client:
            await _serving(layout, record, client)
            progress("Kubernetes API")
            await _installed(layout, record, client)
            definitions = await client.list(CUSTOM_RESOURCE_DEFINITIONS)
            progress(f"{len(definitions.items)} custom resource definitions")
            await _nodes_ready(client, record.nodes)
            progress(f"{record.nodes} nodes ready")
            for resource, namespace, name in COMPONENTS:
                waiting = f"{resource.kind} {namespace}/{name}"
                await _component_ready(client, resource, namespace, name)
                progress(f"{name} ready")
    except TimeoutError:
        raise BootError(
            f"{waiting} did not come up within {deadline:g} s; `meshlight status` shows what did, "
            f"the logs are in {layout.logs}"
        ) from None
    return Booted(record, started, time.monotonic() - begun)


def _alive(layout: Layout, record: Record) -> None:
    if not record.running():
        log = layout.logs / "supervisor.log"
        raise BootError(f"the supervisor ended; the last lines of {log}:\n{launch.tail(log)}")


async def _serving(layout: Layout, record: Record, client: Client) -> None:
    while True:
        _alive(layout, record)
        try:
            await client.request("GET", "/version", timeout=5)
            return
        except (ApiUnreachable, ApiError):
            await asyncio.sleep(0.05)


async def _installed(layout: Layout, record: Record, client: Client) -> None:
    async for event in client.watch(NAMESPACES, field_selector="metadata.name=kube-system"):
        _alive(layout, record)
        metadata = event.object.get("metadata") or {}
        if COMPLETE in (metadata.get("annotations") or {}):
            return


async def _nodes_ready(client: Client, count: int) -> None:
    ready: set[str] = set()
    async for event in client.watch(NODES):
        if event.type in ("ADDED", "MODIFIED") and is_ready(event.object):
            ready.add(event.object["metadata"]["name"])
        if len(ready) >= count:
            return


async def _component_ready(client: Client, resource: Resource, namespace: str, name: str) -> None:
    async for event in client.watch(resource, namespace, field_selector=f"metadata.name={name}"):
        if event.type in ("ADDED", "MODIFIED") and _complete(event.object):
            return


def _complete(item: Object) -> bool:
    status = item.get("status") or {}
    if status.get("observedGeneration") != item["metadata"].get("generation"):
        return False
    if item["kind"] == "DaemonSet":
        wanted = status.get("desiredNumberScheduled", 0)
        return bool(wanted) and status.get("numberReady", 0) == wanted
    return bool(status.get("readyReplicas", 0) >= item["spec"].get("replicas", 1))
