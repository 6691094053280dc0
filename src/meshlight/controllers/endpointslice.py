"""Compiles each Service's pods into EndpointSlices and Endpoints, from which traffic is routed.

`compile_groups` and `compile_endpoints` are pure. A Service without a selector is left to whoever keeps
its endpoints by hand, as in Kubernetes; `EndpointMirror` makes slices of such Endpoints.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from meshlight.controllers.pods import is_ready
from meshlight.controllers.slices import Group, Owner, Ports, SliceWriter, port_objects
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import ENDPOINTS, Object

CONTROLLER = "endpointslice-controller.k8s.io"
MIRROR = "endpointslicemirroring-controller.k8s.io"
ZONE = "topology.kubernetes.io/zone"
SKIP_MIRROR = "endpointslice.kubernetes.io/skip-mirror"
LEADER = "control-plane.alpha.kubernetes.io/leader"
OVER_CAPACITY = "endpoints.kubernetes.io/over-capacity"
MAX_ADDRESSES = 1000
"""Addresses that an Endpoints object may have (Kubernetes' limit)."""
_NEAR = {"PreferClose": "forZones", "PreferSameZone": "forZones", "PreferSameNode": "forNodes"}


def selected(service: Object, pod: Object) -> bool:
    """Whether the Service's selector matches the pod and the pod can be reached."""
    wanted = service["spec"].get("selector") or {}
    labels = pod["metadata"].get("labels") or {}
    status = pod.get("status") or {}
    alive = bool(status.get("podIP")) and status.get("phase") not in ("Succeeded", "Failed")
    return alive and all(labels.get(k) == v for k, v in wanted.items())


def port_number(wanted: int | str, pod: Object, protocol: str = "TCP") -> int | None:
    """A target port as a number; a name is looked up in the pod's containers."""
    if isinstance(wanted, int):
        return wanted
    for container in [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]:
        for port in container.get("ports") or []:
            if port.get("name") == wanted and port.get("protocol", "TCP") == protocol:
                return int(port["containerPort"])
    return None


def _ports(service: Object, pod: Object) -> Ports:
    found = []
    for port in service["spec"].get("ports") or []:
        protocol = port.get("protocol", "TCP")
        number = port_number(port.get("targetPort", port["port"]), pod, protocol)
        if number is not None:
            found.append((port.get("name", ""), protocol, number, port.get("appProtocol", "")))
    return tuple(sorted(found))


def _address(pod: Object, family: str) -> str:
    status = pod["status"]
    for entry in status.get("podIPs") or [{"ip": status["podIP"]}]:
        if (":" in entry["ip"]) == (family == "IPv6"):
            return str(entry["ip"])
    return ""


def compile_groups(
    service: Object, pods: Iterable[Object], zones: Mapping[str, str] | None = None
) -> dict[Group, list[Object]]:
    """A Service's endpoints over the pods it selects, by family and ports; named ports resolved.

    `zones`: node → zone, for `trafficDistribution`.
    """
    spec = service["spec"]
    groups: dict[Group, list[Object]] = {}
    chosen = sorted((p for p in pods if selected(service, p)), key=lambda p: str(p["metadata"]["name"]))
    for family in spec.get("ipFamilies") or ["IPv4"]:
        for pod in chosen:
            if address := _address(pod, family):
                group = Group(family, _ports(service, pod))
                groups.setdefault(group, []).append(_endpoint(service, pod, address, zones or {}))
        if not any(group.family == family for group in groups):
            groups[Group(family, ())] = []
    return groups


def _endpoint(service: Object, pod: Object, address: str, zones: Mapping[str, str]) -> Object:
    spec, node = service["spec"], pod["spec"].get("nodeName")
    leaving, ready = "deletionTimestamp" in pod["metadata"], is_ready(pod)
    endpoint: Object = {
        "addresses": [address],
        "conditions": {
            "ready": bool(spec.get("publishNotReadyAddresses")) or (ready and not leaving),
            "serving": ready,
            "terminating": leaving,
        },
        "nodeName": node,
        "targetRef": {"kind": "Pod", **{k: pod["metadata"][k] for k in ("name", "namespace", "uid")}},
    }
    if pod["spec"].get("hostname") and pod["spec"].get("subdomain") == service["metadata"]["name"]:
        endpoint["hostname"] = pod["spec"]["hostname"]
    zone = zones.get(node or "")
    if zone:
        endpoint["zone"] = zone
    field = _NEAR.get(spec.get("trafficDistribution") or "")
    near = zone if field == "forZones" else node
    if field and near and endpoint["conditions"]["ready"]:
        endpoint["hints"] = {field: [{"name": near}]}
    return endpoint


def _owned(service: Object) -> Object:
    meta = service["metadata"]
    owner = {"apiVersion": "v1", "kind": "Service", "name": meta["name"], "uid": meta["uid"]}
    return {**owner, "controller": True, "blockOwnerDeletion": True}


def compile_endpoints(service: Object, groups: Mapping[Group, list[Object]]) -> Object:
    """The older Endpoints object: the first family alone, at most 1000 addresses."""
    subsets, left, over = [], MAX_ADDRESSES, False
    family = (service["spec"].get("ipFamilies") or ["IPv4"])[0]
    for group, endpoints in sorted(groups.items(), key=lambda entry: repr(entry[0])):
        if group.family != family:
            continue
        subset: Object = {}
        for field, ready in (("addresses", True), ("notReadyAddresses", False)):
            some = [e for e in endpoints if e["conditions"]["ready"] is ready]
            over = over or len(some) > left
            if some[:left]:
                subset[field] = [_endpoint_address(e) for e in some[:left]]
                left -= len(subset[field])
        if subset:
            if group.ports:
                subset["ports"] = port_objects(group.ports)
            subsets.append(subset)
    meta = service["metadata"]
    metadata: Object = {
        "name": meta["name"],
        "namespace": meta["namespace"],
        "ownerReferences": [_owned(service)],
        "labels": dict(meta.get("labels") or {}),
    }
    if over:
        metadata["annotations"] = {OVER_CAPACITY: "truncated"}
    return {"apiVersion": "v1", "kind": "Endpoints", "metadata": metadata, "subsets": subsets}


def _endpoint_address(endpoint: Object) -> Object:
    made = {"ip": endpoint["addresses"][0], "targetRef": endpoint["targetRef"]}
    return made | {k: endpoint[k] for k in ("nodeName", "hostname") if endpoint.get(k)}


def mirrored_groups(endpoints: Object) -> dict[Group, list[Object]]:
    """Endpoints kept by hand as endpoints of slices, by family and ports."""
    groups: dict[Group, list[Object]] = {}
    for subset in endpoints.get("subsets") or []:
        ports = tuple(
            sorted(
                (p.get("name", ""), p.get("protocol", "TCP"), p["port"], p.get("appProtocol", ""))
                for p in subset.get("ports") or []
            )
        )
        for field, ready in (("addresses", True), ("notReadyAddresses", False)):
            for address in (subset.get(field) or [])[:MAX_ADDRESSES]:
                try:
                    version = ipaddress.ip_address(address["ip"]).version
                except ValueError:
                    continue
                made = {"addresses": [address["ip"]], "conditions": {"ready": ready}}
                made |= {k: address[k] for k in ("nodeName", "hostname", "targetRef") if address.get(k)}
                groups.setdefault(Group(f"IPv{version}", ports), []).append(made)
    return groups


def mirrors(service: Object | None, endpoints: Object | None) -> bool:
    """Whether slices are made of an Endpoints object: its Service has no selector, nobody objects."""
    if service is None or endpoints is None:
        return False
    metadata, spec = endpoints["metadata"], service["spec"]
    return (
        not spec.get("selector")
        and spec.get("type") != "ExternalName"
        and (metadata.get("labels") or {}).get(SKIP_MIRROR) != "true"
        and LEADER not in (metadata.get("annotations") or {})
    )


class EndpointSlices:
    """Reconciles each Service's slices and Endpoints from the caches of Services, pods and nodes."""

    def __init__(
        self, client: Client, services: Cache, pods: Cache, slices: Cache, endpoints: Cache, nodes: Cache
    ) -> None:
        self.client, self.services, self.endpoints = client, services, endpoints
        self.writer = SliceWriter(client, slices)
        self._zones: dict[str, str] = {}
        self._pods: dict[str, dict[str, Object]] = {}
        self._selecting: dict[str, dict[str, Object]] = {}
        self.queue = WorkQueue("endpointslice", self.reconcile)
        services.on_change(self._service_changed)
        pods.on_change(self._pod_changed)
        nodes.on_change(self._node_changed)
        slices.on_change(self._slice_changed)
        endpoints.on_change(self._endpoints_changed)

    def _service_changed(self, old: Object | None, new: Object | None) -> None:
        meta = (new or old or {})["metadata"]
        known = self._selecting.setdefault(meta["namespace"], {})
        if new is not None and new["spec"].get("selector"):
            known[meta["name"]] = new
        else:
            known.pop(meta["name"], None)
        self.queue.add((meta["namespace"], meta["name"]))

    def _slice_changed(self, old: Object | None, new: Object | None) -> None:
        if old is not None:  # someone changed or deleted what we keep
            self.queue.add(self.writer.service_of(old))

    def _endpoints_changed(self, old: Object | None, new: Object | None) -> None:
        meta = (new or old or {})["metadata"]
        self.queue.add((meta["namespace"], meta["name"]))

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        meta = (new or old or {})["metadata"]
        pods = self._pods.setdefault(meta["namespace"], {})
        if new is None:
            pods.pop(meta["name"], None)
        else:
            pods[meta["name"]] = new
        for name, service in self._selecting.get(meta["namespace"], {}).items():
            if any(p is not None and selected(service, p) for p in (old, new)):
                self.queue.add((meta["namespace"], name))

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        name = (new or old or {})["metadata"]["name"]
        zone = ((new or {}).get("metadata", {}).get("labels") or {}).get(ZONE, "")
        if self._zones.get(name, "") == zone:
            return
        self._zones[name] = zone
        for namespace, services in self._selecting.items():
            for service in services:
                self.queue.add((namespace, service))

    async def reconcile(self, key: Key) -> None:
        """Write the slices and Endpoints of one Service when they differ from what they should be."""
        service = self.services.objects.get(key)
        by_hand = self.endpoints.objects.get(key)
        if service is not None and service["spec"].get("selector"):
            groups = compile_groups(service, self._pods.get(key[0], {}).values(), self._zones)
            await self.writer.write(Owner(service, _owned(service), CONTROLLER), groups)
            await self.writer.remove(key, MIRROR)
            await self._write_endpoints(compile_endpoints(service, groups))
        elif service is not None and by_hand is not None and mirrors(service, by_hand):
            meta = by_hand["metadata"]
            owner = {"apiVersion": "v1", "kind": "Endpoints", "name": meta["name"], "uid": meta["uid"]}
            owner |= {"controller": True, "blockOwnerDeletion": True}
            await self.writer.write(Owner(service, owner, MIRROR), mirrored_groups(by_hand))
        else:
            await self.writer.remove(key, MIRROR)

    async def _write_endpoints(self, wanted: Object) -> None:
        meta = wanted["metadata"]
        known = self.endpoints.get(meta["name"], meta["namespace"])
        if known is None:
            try:
                await self.client.create(ENDPOINTS, wanted)
                return
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
        elif (known.get("subsets") or []) == wanted["subsets"]:
            return
        await self.client.patch(ENDPOINTS, meta["name"], {"subsets": wanted["subsets"]}, meta["namespace"])
