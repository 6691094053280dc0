"""What a cluster has running: its parts and its namespaces with their enrolment."""

from __future__ import annotations

from typing import Any

from meshlight.embedded.layout import Layout, Record
from meshlight.kube.client import Client
from meshlight.kube.resources import NAMESPACES, NODES, PODS

DATAPLANE_MODE = "istio.io/dataplane-mode"


async def status(layout: Layout) -> dict[str, Any]:
    """`{cluster, running, api, nodes[], namespaces[{name, dataplane_mode}], pods}`.

    Raises ApiUnreachable when the cluster is recorded but does not answer.
    """
    record = Record.read(layout)
    if record is None or not record.running():
        return {"cluster": layout.name, "running": False}
    async with Client.from_kubeconfig(layout.kubeconfig) as client:
        namespaces = await client.list(NAMESPACES)
        nodes = await client.list(NODES)
        pods = await client.list(PODS)
    return {
        "cluster": layout.name,
        "running": True,
        "api": f"https://127.0.0.1:{record.api_port}",
        "nodes": [node["metadata"]["name"] for node in nodes.items],
        "pods": len(pods.items),
        "namespaces": [
            {
                "name": item["metadata"]["name"],
                "dataplane_mode": (item["metadata"].get("labels") or {}).get(DATAPLANE_MODE),
            }
            for item in namespaces.items
        ],
    }
