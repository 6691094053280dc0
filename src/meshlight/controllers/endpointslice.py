"""Compiles each Service's pods into an EndpointSlice and Endpoints, from which traffic is routed.

`compile_slice` and `compile_endpoints` are pure. A Service without a selector is left to whoever keeps
its endpoints by hand, as in Kubernetes.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshlight.controllers.replicaset import is_ready
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import ENDPOINT_SLICES, ENDPOINTS, Object, Resource

MANAGED_BY = "endpointslice-controller.k8s.io"


def selected(service: Object, pod: Object) -> bool:
    """Whether the Service's selector matches the pod and the pod can be reached."""
    wanted = service["spec"].get("selector") or {}
    labels = pod["metadata"].get("labels") or {}
    status = pod.get("status") or {}
    alive = bool(status.get("podIP")) and status.get("phase") not in ("Succeeded", "Failed")
    return alive and all(labels.get(k) == v for k, v in wanted.items())


def port_number(wanted: int | str, pod: Object) -> int | None:
    """A target port as a number; a name is looked up in the pod's containers."""
    if isinstance(wanted, int):
        return wanted
    for container in pod["spec"]["containers"]:
        for port in container.get("ports") or []:
            if port.get("name") == wanted:
                return int(port["containerPort"])
    return None


def _owned(service: Object) -> Object:
    meta = service["metadata"]
    owner = {"apiVersion": "v1", "kind": "Service", "name": meta["name"], "uid": meta["uid"]}
    return {
        "name": meta["name"],
        "namespace": meta["namespace"],
        "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
    }


def compile_slice(service: Object, pods: Iterable[Object]) -> Object:
    """The EndpointSlice (IPv4) of a Service over the pods it selects; named ports resolved."""
    spec = service["spec"]
    chosen = sorted((p for p in pods if selected(service, p)), key=lambda p: str(p["metadata"]["name"]))
    unready_too = bool(spec.get("publishNotReadyAddresses"))
    endpoints = []
    for pod in chosen:
        leaving = "deletionTimestamp" in pod["metadata"]
        ready = is_ready(pod)
        endpoint = {
            "addresses": [pod["status"]["podIP"]],
            "conditions": {
                "ready": unready_too or (ready and not leaving),
                "serving": ready,
                "terminating": leaving,
            },
            "nodeName": pod["spec"].get("nodeName"),
            "targetRef": {"kind": "Pod", **{k: pod["metadata"][k] for k in ("name", "namespace", "uid")}},
        }
        if pod["spec"].get("hostname") and pod["spec"].get("subdomain") == service["metadata"]["name"]:
            endpoint["hostname"] = pod["spec"]["hostname"]
        endpoints.append(endpoint)
    ports = []
    for port in spec.get("ports") or []:
        target = port.get("targetPort", port["port"])
        numbers = [n for pod in chosen if (n := port_number(target, pod)) is not None]
        if numbers or isinstance(target, int):
            number = numbers[0] if numbers else target
            entry = {"name": port.get("name", ""), "port": number, "protocol": port.get("protocol", "TCP")}
            if "appProtocol" in port:
                entry["appProtocol"] = port["appProtocol"]
            ports.append(entry)
    metadata = _owned(service)
    metadata["labels"] = {
        "kubernetes.io/service-name": metadata["name"],
        "endpointslice.kubernetes.io/managed-by": MANAGED_BY,
    }
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": ports,
    }


def compile_endpoints(service: Object, endpoint_slice: Object) -> Object:
    """The older Endpoints object, from the slice."""
    groups: dict[str, list[Object]] = {"addresses": [], "notReadyAddresses": []}
    for endpoint in endpoint_slice["endpoints"]:
        group = "addresses" if endpoint["conditions"]["ready"] else "notReadyAddresses"
        groups[group].append(
            {
                "ip": endpoint["addresses"][0],
                "nodeName": endpoint["nodeName"],
                "targetRef": endpoint["targetRef"],
            }
        )
    subset: Object = {name: addresses for name, addresses in groups.items() if addresses}
    if subset and endpoint_slice["ports"]:
        subset["ports"] = endpoint_slice["ports"]
    return {
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": _owned(service) | {"labels": dict(service["metadata"].get("labels") or {})},
        "subsets": [subset] if subset else [],
    }


class EndpointSlices:
    """Reconciles each Service's slice and Endpoints from the caches of Services and pods."""

    def __init__(self, client: Client, services: Cache, pods: Cache, slices: Cache, endpoints: Cache) -> None:
        self.client, self.services, self.pods = client, services, pods
        self._kept = {ENDPOINT_SLICES: slices, ENDPOINTS: endpoints}
        self.queue = WorkQueue("endpointslice", self.reconcile)
        services.on_change(self._service_changed)
        pods.on_change(self._pod_changed)
        for cache in self._kept.values():
            cache.on_change(self._kept_changed)

    def _service_changed(self, old: Object | None, new: Object | None) -> None:
        meta = (new or old or {})["metadata"]
        self.queue.add((meta["namespace"], meta["name"]))

    def _kept_changed(self, old: Object | None, new: Object | None) -> None:
        if old is not None:  # someone changed or deleted what we keep
            self._service_changed(old, new)

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        pod = new or old or {}
        namespace = pod["metadata"]["namespace"]
        for (ns, name), service in self.services.objects.items():
            concerns = ns == namespace and service["spec"].get("selector")
            if concerns and any(p is not None and selected(service, p) for p in (old, new)):
                self.queue.add((ns, name))

    async def reconcile(self, key: Key) -> None:
        """Write the slice and Endpoints of one Service when they differ from what they should be."""
        service = self.services.objects.get(key)
        if service is None or not service["spec"].get("selector"):
            return
        pods = [p for (namespace, _), p in self.pods.objects.items() if namespace == key[0]]
        compiled = compile_slice(service, pods)
        await self._write(ENDPOINT_SLICES, compiled, ("endpoints", "ports"))
        await self._write(ENDPOINTS, compile_endpoints(service, compiled), ("subsets",))

    async def _write(self, resource: Resource, wanted: Object, parts: tuple[str, ...]) -> None:
        meta = wanted["metadata"]
        known = self._kept[resource].get(meta["name"], meta["namespace"])
        if known is None:
            try:
                await self.client.create(resource, wanted)
                return
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
        elif all((known.get(part) or []) == wanted[part] for part in parts):
            return
        patch = {part: wanted[part] for part in parts}
        await self.client.patch(resource, meta["name"], patch, meta["namespace"])
