"""`metrics.k8s.io`: what nodes and pods use now, asked of the kubelets when somebody asks here.

Kept nowhere; a node that does not answer in time is left out, as metrics-server does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
import orjson

from meshlight.kube import selectors
from meshlight.kube.kubelet_proxy import endpoint
from meshlight.kube.resources import Object
from meshlight.kube.status import StatusError

GROUP = "metrics.k8s.io"
API_VERSION = f"{GROUP}/v1beta1"
_PATIENCE = aiohttp.ClientTimeout(total=5, connect=2)

Find = Callable[[str, str, str], Object | None]
"""(plural of the core group, namespace, name) to the stored object."""


def usage(stats: Object) -> Object:
    """A ResourceList from a kubelet's `cpu` and `memory`."""
    return {
        "cpu": f"{int(stats['cpu']['usageNanoCores'])}n",
        "memory": f"{int(stats['memory']['workingSetBytes']) // 1024}Ki",
    }


def _window(stats: Object) -> str:
    return f"{float(stats.get('windowSeconds') or 0):.3f}s"


def node_metrics(node: Object, summary: Object) -> Object:
    """The NodeMetrics of a node."""
    stats, metadata = summary["node"], node["metadata"]
    return {
        "apiVersion": API_VERSION,
        "kind": "NodeMetrics",
        "metadata": {
            "name": metadata["name"],
            "creationTimestamp": stats["cpu"]["time"],
            "labels": metadata.get("labels") or {},
        },
        "timestamp": stats["cpu"]["time"],
        "window": _window(stats),
        "usage": usage(stats),
    }


def pod_metrics(stats: Object, labels: Object) -> Object:
    """The PodMetrics of a pod."""
    reference = stats["podRef"]
    return {
        "apiVersion": API_VERSION,
        "kind": "PodMetrics",
        "metadata": {
            "name": reference["name"],
            "namespace": reference["namespace"],
            "creationTimestamp": stats["cpu"]["time"],
            "labels": labels,
        },
        "timestamp": stats["cpu"]["time"],
        "window": _window(stats),
        "containers": [{"name": c["name"], "usage": usage(c)} for c in stats["containers"]],
    }


async def _ask(connections: aiohttp.ClientSession, node: Object) -> tuple[Object, Object] | None:
    try:
        async with connections.get(f"{endpoint(node)}/stats/summary", timeout=_PATIENCE) as answer:
            if answer.status != 200:
                return None
            return node, orjson.loads(await answer.read())
    except (aiohttp.ClientError, TimeoutError, OSError, StatusError, orjson.JSONDecodeError):
        return None


async def serve(
    connections: aiohttp.ClientSession,
    nodes: Iterable[Object],
    find: Find,
    plural: str,
    namespace: str | None,
    name: str,
    query: Any,
) -> Object:
    """Answer a GET of one object or of a list. Raises StatusError 400, 404."""
    try:
        chosen = selectors.labels(query.get("labelSelector", ""))
    except ValueError as error:
        raise StatusError(400, "BadRequest", str(error)) from None
    wanted = [n for n in nodes if plural != "nodes" or not name or n["metadata"]["name"] == name]
    if plural == "pods" and name:
        pod = find("pods", namespace or "", name)
        where = ((pod or {}).get("spec") or {}).get("nodeName")
        wanted = [n for n in wanted if n["metadata"]["name"] == where]
    answers = [a for a in await asyncio.gather(*(_ask(connections, n) for n in wanted)) if a is not None]
    if plural == "nodes":
        items = [node_metrics(node, summary) for node, summary in answers]
    else:
        items = []
        for _, summary in answers:
            for stats in summary["pods"]:
                reference = stats["podRef"]
                if namespace is not None and reference["namespace"] != namespace:
                    continue
                pod = find("pods", reference["namespace"], reference["name"])
                if pod is not None and pod["metadata"]["uid"] == reference["uid"]:
                    items.append(pod_metrics(stats, pod["metadata"].get("labels") or {}))
    if name:
        for item in items:
            if item["metadata"]["name"] == name:
                return item
        kind = "podmetrics" if plural == "pods" else "nodemetrics"
        where = f"{namespace}/{name}" if namespace else name
        raise StatusError(404, "NotFound", f'{kind}.{GROUP} "{where}" not found')
    items = sorted(
        (i for i in items if chosen(i["metadata"]["labels"])),
        key=lambda i: (i["metadata"].get("namespace", ""), i["metadata"]["name"]),
    )
    kind = "PodMetricsList" if plural == "pods" else "NodeMetricsList"
    return {"kind": kind, "apiVersion": API_VERSION, "metadata": {}, "items": items}
