"""What can be done with a cluster's nodes: fail them, mend them, and empty them in an orderly way.

Failures are made by the embedded cluster's supervisor; everything else goes through the Kubernetes API, as
`kubectl cordon` and `kubectl drain` do it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from meshlight.embedded import control
from meshlight.embedded.layout import Layout
from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import NODES, PODS, Object
from meshlight.operations.status import is_ready
from meshlight.refusal import Refusal

FAILURES = ("stop", "start", "partition", "heal")
_RETRY = 1.0


class NodeError(Refusal):
    """A node cannot be done with as asked; the message says why."""


def fail(layout: Layout, node: str, do: str) -> str:
    """Stop, start, partition or heal a node; its state then. Raises ControlError."""
    return str(control.ask(layout.state, {"do": do, "node": node})["state"])


def summarize(nodes: Iterable[Object], pods: Iterable[Object], states: dict[str, str]) -> list[dict[str, Any]]:
    """`{name, state, ready, schedulable, address, pod_cidr, pods}` of each node.

    `state` is what the supervisor does with the machine (running, stopped, partitioned), `ready` what the
    API believes of it.
    """
    count: dict[str, int] = {}
    for pod in pods:
        node = pod["spec"].get("nodeName", "")
        count[node] = count.get(node, 0) + 1
    found = []
    for node in nodes:
        name, spec = node["metadata"]["name"], node.get("spec") or {}
        addresses = (node.get("status") or {}).get("addresses") or []
        found.append(
            {
                "name": name,
                "state": states.get(name, "unknown"),
                "ready": is_ready(node),
                "schedulable": not spec.get("unschedulable"),
                "address": next((a["address"] for a in addresses if a["type"] == "InternalIP"), ""),
                "pod_cidr": spec.get("podCIDR", ""),
                "pods": count.get(name, 0),
            }
        )
    return sorted(found, key=lambda n: (len(n["name"]), n["name"]))


async def listed(layout: Layout) -> list[dict[str, Any]]:
    """The cluster's nodes. Raises ControlError, ApiUnreachable."""
    states = control.ask(layout.state, {"do": "nodes"})["nodes"]
    async with Client.from_kubeconfig(layout.kubeconfig) as client:
        nodes, pods = await asyncio.gather(client.list(NODES), client.list(PODS))
    return summarize(nodes.items, pods.items, states)


async def cordon(layout: Layout, node: str, on: bool) -> None:
    """Let the scheduler leave a node out, or use it again. Raises ApiError."""
    async with Client.from_kubeconfig(layout.kubeconfig) as client:
        await client.patch(NODES, node, {"spec": {"unschedulable": on or None}})


def to_evict(pods: Iterable[Object]) -> list[Object]:
    """The pods that a drain ends: not a DaemonSet's, which would be back at once, nor those that have ended."""
    return [
        pod
        for pod in pods
        if not any(o["kind"] == "DaemonSet" for o in pod["metadata"].get("ownerReferences") or [])
        and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
    ]


async def drain(layout: Layout, node: str, deadline: float, progress: Callable[[str], None]) -> int:
    """Cordon a node and evict its pods, within their disruption budgets; returns how many.

    Returns once they are gone. Raises NodeError after `deadline` seconds, ApiError.
    """
    left: dict[str, Object] = {}
    try:
        async with asyncio.timeout(deadline), Client.from_kubeconfig(layout.kubeconfig) as client:
            await client.patch(NODES, node, {"spec": {"unschedulable": True}})
            progress(f"{node} cordoned")
            pods = (await client.list(PODS, field_selector=f"spec.nodeName={node}")).items
            left = {pod["metadata"]["uid"]: pod for pod in to_evict(pods)}
            total = len(left)
            async with asyncio.TaskGroup() as evictions:
                for pod in left.values():
                    evictions.create_task(_evict(client, pod))
                await _gone(client, node, left, progress)
    except TimeoutError:
        held = [f"{p['metadata']['namespace']}/{p['metadata']['name']}" for p in left.values()]
        raise NodeError(
            f"{node} is cordoned, but after {deadline:g} s still has {', '.join(sorted(held))}: a disruption "
            "budget may hold them (kubectl get pdb -A)"
        ) from None
    return total


async def _evict(client: Client, pod: Object) -> None:
    """Evict a pod; a disruption budget may make that wait."""
    metadata = pod["metadata"]
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
        "deleteOptions": {"preconditions": {"uid": metadata["uid"]}},
    }
    while True:
        try:
            path = PODS.path(metadata["namespace"], metadata["name"])
            await client.request("POST", f"{path}/eviction", eviction)
            return
        except ApiError as error:
            if error.code in (404, 409):
                return
            if error.code != 429:
                raise
        await asyncio.sleep(_RETRY)


async def _gone(client: Client, node: str, left: dict[str, Object], progress: Callable[[str], None]) -> None:
    """Return once none of the pods is there."""
    present: set[str] = set()
    synced = False
    async for event in client.watch(PODS, field_selector=f"spec.nodeName={node}"):
        if event.type == "SYNCED":
            synced = True
        elif event.type != "BOOKMARK":
            uid = event.object["metadata"]["uid"]
            (present.discard if event.type == "DELETED" else present.add)(uid)
        if not synced:
            continue
        for uid in set(left) - present:
            metadata = left.pop(uid)["metadata"]
            progress(f"{metadata['namespace']}/{metadata['name']} evicted")
        if not left:
            return
