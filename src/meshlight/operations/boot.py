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
    PODS,
    Object,
    Resource,
)
from meshlight.operations.status import is_ready
from meshlight.refusal import Refusal

Progress = Callable[[str], None]
COMPONENTS: tuple[tuple[Resource, str, str], ...] = (
    (DEPLOYMENTS, "kube-system", "coredns"),
    (DEPLOYMENTS, "istio-system", "istiod"),
    (DAEMON_SETS, "istio-system", "ztunnel"),
)
"""What must be ready before a cluster is up, in the order in which it is told."""


class BootError(Refusal):
    """The cluster did not come up in time; the message names the part and its log."""


@dataclass(frozen=True, slots=True)
class Booted:
    """A cluster that is up: its record, whether this call started it, and how long it took."""

    record: Record
    started: bool
    seconds: float


async def up(
    layout: Layout,
    nodes: int | None,
    api_port: int | None,
    deadline: float,
    progress: Progress,
    lifeline: int | None = None,
    isolated: bool | None = None,
) -> Booted:
    """Start (or find) the cluster and wait until everything of cluster-101 is ready.

    `deadline` is in seconds from now; `lifeline`, `isolated` as `launch.start` has them. Raises
    launch.LaunchError, BootError.
    """
    begun = time.monotonic()
    record, started = launch.start(layout, nodes, api_port, lifeline, isolated)
    progress("supervisor")
    waiting = "the Kubernetes API with its nodes"
    try:
        async with asyncio.timeout(deadline), Client.from_kubeconfig(layout.kubeconfig) as client:
            await _serving(layout, record, client)
            progress("Kubernetes API")
            await _installed(layout, record, client)
            definitions = await client.list(CUSTOM_RESOURCE_DEFINITIONS)
            progress(f"{len(definitions.items)} custom resource definitions")
            await _nodes_ready(client, record)
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
    if record.running():
        return
    for name in ("apiserver", "supervisor"):
        log = layout.logs / f"{name}.log"
        if log.exists() and (last := launch.tail(log, 1)):
            raise BootError(f"the cluster ended by itself; the last line of {log}:\n{last}")
    raise BootError(f"the cluster ended by itself; its logs are in {layout.logs}")


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


def booted(node: Object, record: Record) -> bool:
    """Whether a node is ready in this start of the cluster, not only by what an earlier one left."""
    told = ((node.get("status") or {}).get("nodeInfo") or {}).get("bootID")
    return is_ready(node) and (told == record.boot_id or not record.boot_id)


async def _nodes_ready(client: Client, record: Record) -> None:
    ready: set[str] = set()
    async for event in client.watch(NODES):
        if event.type in ("ADDED", "MODIFIED") and booted(event.object, record):
            ready.add(event.object["metadata"]["name"])
        if len(ready) >= record.nodes:
            return


async def _component_ready(client: Client, resource: Resource, namespace: str, name: str) -> None:
    """Wait until a workload counts as complete and as many of its pods say so themselves.

    Pods are asked too because a controller's count may be older than this start of the cluster.
    """
    workload = await _workload_complete(client, resource, namespace, name)
    labels = workload["spec"]["selector"]["matchLabels"]
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    ready: dict[str, bool] = {}
    async for event in client.watch(PODS, namespace, label_selector=selector):
        if event.type in ("ADDED", "MODIFIED", "DELETED"):
            ready[event.object["metadata"]["name"]] = event.type != "DELETED" and is_ready(event.object)
        if sum(ready.values()) >= _wanted(workload):
            break
    await _workload_complete(client, resource, namespace, name)


async def _workload_complete(client: Client, resource: Resource, namespace: str, name: str) -> Object:
    while True:
        async for event in client.watch(resource, namespace, field_selector=f"metadata.name={name}"):
            if event.type in ("ADDED", "MODIFIED") and _complete(event.object):
                return event.object


def _wanted(item: Object) -> int:
    if item["kind"] == "DaemonSet":
        return int((item.get("status") or {}).get("desiredNumberScheduled", 0))
    return int(item["spec"].get("replicas", 1))


def _complete(item: Object) -> bool:
    status = item.get("status") or {}
    if status.get("observedGeneration") != item["metadata"].get("generation"):
        return False
    if item["kind"] == "DaemonSet":
        return 0 < _wanted(item) <= int(status.get("numberReady", 0))
    return bool(status.get("readyReplicas", 0) >= _wanted(item))
