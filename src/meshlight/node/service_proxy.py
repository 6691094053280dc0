"""kube-proxy's role: Services and EndpointSlices, watched, become rules of the node's kernel.

`frontends` is Kubernetes' rules of which endpoints serve what, and pure; the text for nftables is
`service_rules`'. What is here besides keeps the kernel at the state that the API asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Iterable

from meshlight.controllers.workqueue import log
from meshlight.kube.client import Client
from meshlight.kube.resources import ENDPOINT_SLICES, SERVICES, Object, Resource
from meshlight.node import netns
from meshlight.node.netns import NetworkError
from meshlight.node.service_rules import (
    TABLE,
    Backend,
    Frontend,
    Ruleset,
    change,
    cleanup,
    compile_service,
    whole,
)

__all__ = ["Backend", "Frontend", "KernelTable", "ServiceTable", "backends", "frontends", "run"]

SERVICE_NAME = "kubernetes.io/service-name"
_DEBOUNCE = 0.005
_RETRY, _RETRY_MOST = 0.1, 10.0
_NAMED = ("chain", "set")
_PROTOCOLS = {"TCP": "tcp", "UDP": "udp"}
_AFFINITY_SECONDS = 10800
"""Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`."""
_Key = tuple[str, str]


def backends(slices: Iterable[Object], port: Object, node: str, local: bool) -> list[Backend]:
    """Ready endpoints of a Service's port; serving but terminating ones when nothing is ready.

    With `local` (a traffic policy Local) only those on `node`.
    """
    name, protocol = port.get("name") or "", port.get("protocol", "TCP")
    ready: set[Backend] = set()
    terminating: set[Backend] = set()
    for item in slices:
        ports = [
            p["port"]
            for p in item.get("ports") or []
            if (p.get("name") or "") == name and p.get("protocol", "TCP") == protocol and p.get("port")
        ]
        for endpoint in item.get("endpoints") or []:
            if local and endpoint.get("nodeName") != node:
                continue
            conditions = endpoint.get("conditions") or {}
            if conditions.get("ready") is not False:  # absent means ready
                chosen = ready
            elif conditions.get("serving") and conditions.get("terminating"):
                chosen = terminating
            else:
                continue
            chosen.update(Backend(address, p) for address in endpoint["addresses"][:1] for p in ports)
    return sorted(ready or terminating)


def frontends(service: Object, slices: Iterable[Object], node: str) -> dict[Frontend, list[Backend]]:
    """Every address of a Service on this node with the endpoints behind it (possibly none)."""
    spec, found = service["spec"], {}
    slices = [item for item in slices if item.get("addressType", "IPv4") == "IPv4"]
    cluster = [a for a in spec.get("clusterIPs") or [spec.get("clusterIP")] if a and a != "None"]
    cluster = [a for a in cluster if ":" not in a]
    if not cluster or spec.get("type") == "ExternalName":
        return {}
    balancer = (service.get("status") or {}).get("loadBalancer") or {}
    external = [a for a in spec.get("externalIPs") or [] if ":" not in a]
    external += [i["ip"] for i in balancer.get("ingress") or [] if i.get("ip") and ":" not in i["ip"]]
    internal_local = spec.get("internalTrafficPolicy") == "Local"
    external_local = spec.get("externalTrafficPolicy") == "Local"
    affinity = 0
    if spec.get("sessionAffinity") == "ClientIP":
        configured = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
        affinity = configured.get("timeoutSeconds") or _AFFINITY_SECONDS
    for port in spec.get("ports") or []:
        protocol = _PROTOCOLS.get(port.get("protocol", "TCP"))
        if protocol is None:
            continue
        inside = backends(slices, port, node, internal_local)
        for address in cluster:
            found[Frontend(address, protocol, port["port"], affinity=affinity)] = inside
        outside = backends(slices, port, node, external_local)
        for address in external:
            found[Frontend(address, protocol, port["port"], not external_local, affinity)] = outside
        if port.get("nodePort"):
            found[Frontend("", protocol, port["nodePort"], not external_local, affinity)] = outside
    return found


class ServiceTable:
    """Services and their slices as watched, compiled a Service at a time."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._services: dict[_Key, Object] = {}
        self._slices: dict[_Key, dict[str, Object]] = {}
        self._frontends: dict[_Key, dict[Frontend, list[Backend]]] = {}
        self._compiled: dict[_Key, Ruleset] = {}

    def service(self, obj: Object, deleted: bool) -> bool:
        """A Service changed; returns whether the node's rules change."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        if deleted:
            self._services.pop(key, None)
        else:
            self._services[key] = obj
        return self._compile(key)

    def slice(self, obj: Object, deleted: bool) -> bool:
        """An EndpointSlice changed; returns whether the node's rules change."""
        metadata = obj["metadata"]
        owner = (metadata.get("labels") or {}).get(SERVICE_NAME)
        if not owner:
            return False
        key = (metadata["namespace"], owner)
        slices = self._slices.setdefault(key, {})
        if deleted:
            slices.pop(metadata["name"], None)
        else:
            slices[metadata["name"]] = obj
        if not slices:
            del self._slices[key]
        return self._compile(key)

    def _compile(self, key: _Key) -> bool:
        service = self._services.get(key)
        slices = self._slices.get(key, {}).values()
        now = frontends(service, slices, self._node) if service else {}
        if now == self._frontends.get(key, {}):
            return False
        if now:
            self._frontends[key] = now
            self._compiled[key] = compile_service("/".join(key), now)
        else:
            del self._frontends[key], self._compiled[key]
        return True

    def ruleset(self) -> Ruleset:
        """The whole node's rules."""
        merged = Ruleset()
        for _, compiled in sorted(self._compiled.items()):
            merged.add(compiled)
        return merged

    def rules(self) -> str:
        """The whole node's rules as a transaction for an empty table."""
        return whole(self.ruleset())


class KernelTable:
    """The table in the node's namespace; `state` is None while what it holds is not known."""

    def __init__(self) -> None:
        self.state: Ruleset | None = None
        self._stale: tuple[set[str], set[str]] = (set(), set())

    async def reach(self, wanted: Ruleset) -> None:
        """Bring it to `wanted`. Raises NetworkError; its state is not known then."""
        before, self.state = self.state, None
        if before is None:
            self._stale = await netns.within(None, self._present)
            text = whole(wanted, self._stale[0])
        else:
            self._stale[0].update(before.chains)
            self._stale[1].update(before.affinity)
            text = change(before, wanted)
        if text:
            await netns.within(None, functools.partial(netns.nft, text))
        # Apart, because kernels before 6.2 refuse to delete a chain that this transaction unreferences.
        if remains := cleanup(*self._stale, wanted):
            await netns.within(None, functools.partial(netns.nft, remains))
        self._stale = (set(), set())
        self.state = wanted

    @staticmethod
    def _present() -> tuple[set[str], set[str]]:
        """Names of the table's chains and sets, as an earlier agent may have left them."""
        listed = json.loads(netns.run(["nft", "-j", "-t", "list", "ruleset", "ip"], ""))["nftables"]
        own = {
            kind: {i[kind]["name"] for i in listed if i.get(kind, {}).get("table") == TABLE} for kind in _NAMED
        }
        return own["chain"], own["set"]


async def run(client: Client, node: str) -> None:
    """Keep the node's rules up to date until cancelled. Raises ApiError when the API refuses us."""
    table, kernel = ServiceTable(node), KernelTable()
    changed = asyncio.Event()
    synced: set[Resource] = set()

    async def follow(resource: Resource) -> None:
        take = table.service if resource is SERVICES else table.slice
        async with contextlib.aclosing(client.watch(resource)) as events:
            async for event in events:
                if event.type == "SYNCED":
                    synced.add(resource)
                    changed.set()
                elif take(event.object, event.type == "DELETED"):
                    changed.set()

    async def write() -> None:
        delay = _RETRY
        while True:
            await changed.wait()
            await asyncio.sleep(_DEBOUNCE)
            changed.clear()
            if len(synced) < 2:  # half of the picture would take working addresses away
                continue
            try:
                await kernel.reach(table.ruleset())
                delay = _RETRY
            except NetworkError as error:
                log("error", "Service rules not written, trying again", error=str(error), seconds=delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, _RETRY_MOST)
                changed.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(follow(SERVICES))
        tasks.create_task(follow(ENDPOINT_SLICES))
        tasks.create_task(write())
