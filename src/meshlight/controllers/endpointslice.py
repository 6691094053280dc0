"""Compiles each Service's ready pods into an EndpointSlice, from which traffic is routed."""

from __future__ import annotations

from collections.abc import Iterable

from meshlight.controllers.replicaset import is_ready
from meshlight.kube.resources import Object


def compile_slice(service: Object, pods: Iterable[Object]) -> Object:
    """The EndpointSlice (IPv4) of a Service over the pods of its namespace; named ports resolved."""
    meta, spec = service["metadata"], service["spec"]
    wanted = spec.get("selector") or {}
    endpoints, named = [], {}
    for pod in pods:
        labels = pod["metadata"].get("labels") or {}
        address = pod.get("status", {}).get("podIP")
        if not address or any(labels.get(k) != v for k, v in wanted.items()):
            continue
        for container in pod["spec"]["containers"]:
            named.update({p.get("name"): p["containerPort"] for p in container.get("ports") or []})
        leaving = "deletionTimestamp" in pod["metadata"]
        ready = is_ready(pod)
        target = {k: pod["metadata"][k] for k in ("name", "namespace", "uid")}
        endpoints.append(
            {
                "addresses": [address],
                "conditions": {
                    "ready": ready and not leaving,
                    "serving": ready,
                    "terminating": leaving,
                },
                "nodeName": pod["spec"].get("nodeName"),
                "targetRef": {"kind": "Pod", **target},
            }
        )
    ports = []
    for port in spec.get("ports") or []:
        number = port.get("targetPort", port["port"])
        number = named.get(number) if isinstance(number, str) else number
        if number is not None:
            protocol = port.get("protocol", "TCP")
            ports.append({"name": port.get("name", ""), "port": number, "protocol": protocol})
    owner = {"apiVersion": "v1", "kind": "Service", "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": meta["name"],
            "namespace": meta["namespace"],
            "labels": {
                "kubernetes.io/service-name": meta["name"],
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": ports,
    }
