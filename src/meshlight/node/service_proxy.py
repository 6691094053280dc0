"""kube-proxy's role: Services and EndpointSlices, watched, become rules of the node's kernel.

`frontends` is Kubernetes' rules of which endpoints serve what, and pure; the text for nftables is
`service_rules`'. What is here besides keeps the kernel at the state that the API asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from meshlight.controllers.workqueue import log
from meshlight.kube.client import Client
from meshlight.kube.resources import ENDPOINT_SLICES, NODES, SERVICES, Object, Resource
from meshlight.node import conntrack, netns
from meshlight.node.netns import NetworkError
from meshlight.node.service_health import HealthChecks
from meshlight.node.service_rules import (
    FAMILIES,
    IPV4,
    TABLE,
    Backend,
    Claims,
    Endpoints,
    Family,
    Frontend,
    change,
    cleanup,
    compile_service,
    whole,
)

__all__ = ["KernelTable", "Place", "ServiceTable", "backends", "frontends", "run"]

SERVICE_NAME = "kubernetes.io/service-name"
ZONE = "topology.kubernetes.io/zone"
_DEBOUNCE = 0.005
_RETRY, _RETRY_MOST = 0.1, 10.0
_NAMED = ("chain", "set")
_PROTOCOLS = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}
_AFFINITY_SECONDS = 10800
"""Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`."""
_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where this proxy is, for policies and hints that prefer what is near."""

    node: str
    zone: str = ""


def _hinted(endpoints: list[Object], place: Place) -> list[Object]:
    """Endpoints that hints give to this place; all of them where hints are not for all, or give none."""
    for field, own in (("forNodes", place.node), ("forZones", place.zone)):
        hints = [[h["name"] for h in (e.get("hints") or {}).get(field) or []] for e in endpoints]
        if own and hints and all(hints):
            near = [e for e, names in zip(endpoints, hints, strict=True) if own in names]
            if near:
                return near
    return endpoints


def backends(slices: Iterable[Object], port: Object, place: Place, local: bool) -> tuple[Backend, ...]:
    """Ready endpoints of a Service's port; serving but terminating ones when nothing is ready.

    With `local` (a traffic policy Local) only those on the node; without, hints narrow the choice.
    """
    name, protocol = port.get("name") or "", port.get("protocol", "TCP")
    ready: list[tuple[Object, list[int]]] = []
    terminating: list[tuple[Object, list[int]]] = []
    for item in slices:
        ports = [
            p["port"]
            for p in item.get("ports") or []
            if (p.get("name") or "") == name and p.get("protocol", "TCP") == protocol and p.get("port")
        ]
        for endpoint in item.get("endpoints") or []:
            if not ports or (local and endpoint.get("nodeName") != place.node):
                continue
            conditions = endpoint.get("conditions") or {}
            if conditions.get("ready") is not False:  # absent means ready
                ready.append((endpoint, ports))
            elif conditions.get("serving") and conditions.get("terminating"):
                terminating.append((endpoint, ports))
    chosen = ready or terminating
    if not local and ready:
        near = {id(e) for e in _hinted([e for e, _ in ready], place)}
        chosen = [(e, ports) for e, ports in ready if id(e) in near]
    return tuple(sorted({Backend(e["addresses"][0], p) for e, ports in chosen for p in ports}))


def frontends(
    service: Object, slices: Iterable[Object], place: Place, family: Family = IPV4
) -> dict[Frontend, Endpoints]:
    """Every address of a Service of one family with the endpoints behind it (possibly none)."""
    spec, found = service["spec"], {}
    slices = [item for item in slices if item.get("addressType", "IPv4") == family.name]
    cluster = [a for a in spec.get("clusterIPs") or [spec.get("clusterIP")] if a and a != "None"]
    if not cluster or spec.get("type") == "ExternalName":
        return {}
    of_family = [a for a in cluster if family.has(a)]
    balancer = (service.get("status") or {}).get("loadBalancer") or {}
    external = [a for a in spec.get("externalIPs") or [] if family.has(a)]
    balanced = [i["ip"] for i in balancer.get("ingress") or [] if i.get("ip") and i.get("ipMode") != "Proxy"]
    balanced = [a for a in balanced if family.has(a)]
    sources = tuple(sorted(r.strip() for r in spec.get("loadBalancerSourceRanges") or [] if family.has(r)))
    if spec.get("loadBalancerSourceRanges") and not sources:
        balanced = []  # nobody of this family may come in
    internal_local = spec.get("internalTrafficPolicy") == "Local"
    external_local = spec.get("externalTrafficPolicy") == "Local"
    affinity = 0
    if spec.get("sessionAffinity") == "ClientIP":
        configured = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
        affinity = configured.get("timeoutSeconds") or _AFFINITY_SECONDS
    for port in spec.get("ports") or []:
        protocol = _PROTOCOLS[port.get("protocol", "TCP")]
        everywhere = backends(slices, port, place, False)
        if internal_local:
            inside = Endpoints(backends(slices, port, place, True), everywhere)
        else:
            inside = Endpoints(everywhere)
        for address in of_family:
            found[Frontend(address, protocol, port["port"], affinity=affinity)] = inside
        if external_local:
            outside = Endpoints(backends(slices, port, place, True), everywhere, True)
        else:
            outside = Endpoints(everywhere)
        masquerade = not external_local
        for address in external:
            found[Frontend(address, protocol, port["port"], masquerade, affinity)] = outside
        for address in balanced:
            found[Frontend(address, protocol, port["port"], masquerade, affinity, sources)] = outside
        if port.get("nodePort") and of_family:
            found[Frontend("", protocol, port["nodePort"], masquerade, affinity)] = outside
    return found


class ServiceTable:
    """Services and their slices as watched, compiled a Service at a time, for one family."""

    def __init__(self, place: Place, family: Family = IPV4) -> None:
        self.place, self.family = place, family
        self.claims = Claims()
        self._services: dict[_Key, Object] = {}
        self._slices: dict[_Key, dict[str, Object]] = {}
        self._frontends: dict[_Key, dict[Frontend, Endpoints]] = {}

    def moved(self, place: Place) -> bool:
        """The node has another zone: compile everything anew; whether the rules change."""
        self.place = place
        return any([self._compile(key) for key in list(self._services)])

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
        now = frontends(service, slices, self.place, self.family) if service else {}
        if now == self._frontends.get(key, {}):
            return False
        owner = "/".join(key)
        if now:
            self._frontends[key] = now
            self.claims.put(owner, compile_service(self.family, owner, now))
        else:
            del self._frontends[key]
            self.claims.put(owner, None)
        return True

    def datagram_endpoints(self, key: _Key) -> set[Backend]:
        """Where a Service's UDP flows may go."""
        found: set[Backend] = set()
        for frontend, behind in self._frontends.get(key, {}).items():
            if frontend.protocol == "udp":
                found.update(behind.chosen, behind.everywhere or ())
        return found

    def rules(self) -> str:
        """The whole node's rules as a transaction for an empty table."""
        return whole(self.family, self.claims.whole())


class KernelTable:
    """One family's table in the node's namespace; `known` is false while what it holds is not known."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.known = False

    async def reach(self, claims: Claims) -> None:
        """Bring it to what is claimed. Raises NetworkError; what it holds is not known then."""
        known, self.known = self.known, False
        before, after = claims.taken()
        if known:
            chains, sets = (
                before.chains.keys() - after.chains.keys(),
                before.affinity.keys() - after.affinity.keys(),
            )
            text = change(self.family, before, after)
        else:
            after = claims.whole()
            present = await netns.within(None, self._present)
            chains, sets = present[0] - after.chains.keys(), present[1] - after.affinity.keys()
            text = whole(self.family, after, present[0])
        if text:
            await netns.within(None, functools.partial(netns.nft, text))
        # Apart, because kernels before 6.2 refuse to delete a chain that this transaction unreferences.
        if remains := cleanup(self.family, chains, sets):
            await netns.within(None, functools.partial(netns.nft, remains))
        self.known = True

    def _present(self) -> tuple[set[str], set[str]]:
        """Names of the table's chains and sets, as an earlier agent may have left them."""
        listed = json.loads(netns.run(["nft", "-j", "-t", "list", "ruleset", self.family.table], ""))[
            "nftables"
        ]
        own = {
            kind: {i[kind]["name"] for i in listed if i.get(kind, {}).get("table") == TABLE} for kind in _NAMED
        }
        return own["chain"], own["set"]


class ServiceProxy:
    """Follows the API and keeps the node's tables, health checks and UDP flows in step with it."""

    def __init__(self, client: Client, node: str, address: str) -> None:
        self._client, self._node = client, node
        self._tables = [(ServiceTable(Place(node), family), KernelTable(family)) for family in FAMILIES]
        self._health = HealthChecks(node, address)
        self._changed = asyncio.Event()
        self._synced: set[Resource] = set()
        self._stale: set[Backend] = set()

    async def run(self) -> None:
        """Keep the node's rules up to date until cancelled. Raises ApiError when the API refuses us."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(SERVICES, lambda t: t.service))
                tasks.create_task(self._follow(ENDPOINT_SLICES, lambda t: t.slice))
                tasks.create_task(self._follow_own_node())
                tasks.create_task(self._write())
        finally:
            await self._health.close()

    async def _follow(
        self, resource: Resource, taker: Callable[[ServiceTable], Callable[[Object, bool], bool]]
    ) -> None:
        async with contextlib.aclosing(self._client.watch(resource)) as events:
            async for event in events:
                if event.type == "SYNCED":
                    self._synced.add(resource)
                    self._changed.set()
                    continue
                obj, deleted = event.object, event.type == "DELETED"
                key = self._owner(resource, obj)
                before = self._datagram_endpoints(key)
                # Every table takes it in, so no short cut here.
                if any([taker(table)(obj, deleted) for table, _ in self._tables]):
                    self._stale |= before - self._datagram_endpoints(key)
                    self._changed.set()
                await self._health.take(resource, obj, deleted)

    @staticmethod
    def _owner(resource: Resource, obj: Object) -> _Key:
        metadata = obj["metadata"]
        if resource is SERVICES:
            return metadata["namespace"], metadata["name"]
        return metadata["namespace"], (metadata.get("labels") or {}).get(SERVICE_NAME, "")

    def _datagram_endpoints(self, key: _Key) -> set[Backend]:
        return set().union(*(table.datagram_endpoints(key) for table, _ in self._tables))

    async def _follow_own_node(self) -> None:
        selector = f"metadata.name={self._node}"
        async with contextlib.aclosing(self._client.watch(NODES, field_selector=selector)) as events:
            async for event in events:
                if event.type not in ("ADDED", "MODIFIED"):
                    continue
                zone = (event.object["metadata"].get("labels") or {}).get(ZONE, "")
                place = Place(self._node, zone)
                if place != self._tables[0][0].place and any([t.moved(place) for t, _ in self._tables]):
                    self._changed.set()

    async def _write(self) -> None:
        delay = _RETRY
        while True:
            await self._changed.wait()
            await asyncio.sleep(_DEBOUNCE)
            self._changed.clear()
            if len(self._synced) < 2:  # half of the picture would take working addresses away
                continue
            stale, self._stale = self._stale, set()
            try:
                for table, kernel in self._tables:
                    await kernel.reach(table.claims)
                delay = _RETRY
            except NetworkError as error:
                log("error", "Service rules not written, trying again", error=str(error), seconds=delay)
                self._stale |= stale
                await asyncio.sleep(delay)
                delay = min(delay * 2, _RETRY_MOST)
                self._changed.set()
                continue
            if stale:
                await asyncio.to_thread(_forget, stale)


def _forget(stale: set[Backend]) -> None:
    """End UDP flows to endpoints that serve no more: their clients would never be sent elsewhere."""
    try:
        conntrack.forget_datagrams({(backend.address, backend.port) for backend in stale})
    except OSError as error:
        log("warning", "UDP flows to former endpoints go on until they fall silent", error=str(error))


async def run(client: Client, node: str, address: str) -> None:
    """Keep the node's rules up to date until cancelled. Raises ApiError when the API refuses us."""
    await ServiceProxy(client, node, address).run()
