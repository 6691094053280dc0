"""LB-IPAM's role: gives LoadBalancer Services addresses from CiliumLoadBalancerIPPools.

Decisions are `load_balancer_pools`'; this keeps the ledger of what is held, which it learns from the
Services' own status at its start, and writes status: of a Service its addresses, of a pool its counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from datetime import UTC, datetime
from typing import Any

from meshlight.controllers.load_balancer_pools import (
    Address,
    Ledger,
    Outcome,
    Pool,
    PoolError,
    allocate,
    conflicts,
    parse,
    request,
    wants,
)
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import (
    CUSTOM_RESOURCE_DEFINITIONS,
    LOAD_BALANCER_POOLS,
    SERVICES,
    Object,
    Resource,
)

SATISFIED = "cilium.io/IPAMRequestSatisfied"
CONFLICT = "cilium.io/PoolConflict"
COUNTS = ("cilium.io/IPsTotal", "cilium.io/IPsAvailable", "cilium.io/IPsUsed")
_POOL = "pool/"
"""First part of a queue key that means a pool; no namespace has a slash in its name."""


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _addresses(service: Object) -> tuple[Address, ...]:
    """What a Service's status says it holds."""
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    return tuple(ipaddress.ip_address(entry["ip"]) for entry in ingress if entry.get("ip"))


def _condition(known: list[Object], wanted: Object) -> list[Object]:
    """Conditions with one of them set; an unchanged status keeps its time."""
    before = next((c for c in known if c["type"] == wanted["type"]), {})
    since = before.get("lastTransitionTime") if before.get("status") == wanted["status"] else None
    made = {**wanted, "lastTransitionTime": since or _now()}
    return [*(c for c in known if c["type"] != wanted["type"]), made]


def service_status(service: Object, outcome: Outcome) -> dict[str, Any]:
    """`loadBalancer` and `conditions` of a Service that got these addresses."""
    status = service.get("status") or {}
    condition = {
        "type": SATISFIED,
        "status": "True" if outcome.satisfied else "False",
        "reason": outcome.reason,
        "message": outcome.message,
        "observedGeneration": service["metadata"].get("generation", 0),
    }
    ingress = [{"ip": str(address), "ipMode": "VIP"} for address in outcome.addresses]
    return {
        "loadBalancer": {"ingress": ingress} if ingress else {},
        "conditions": _condition(status.get("conditions") or [], condition),
    }


def released_status(service: Object) -> dict[str, Any]:
    """Status of a Service that is no LoadBalancer any more."""
    status = service.get("status") or {}
    kept = [c for c in status.get("conditions") or [] if c["type"] != SATISFIED]
    return {"loadBalancer": {}, "conditions": kept}


def pool_conditions(obj: Object, pool: Pool | None, used: int, fault: str) -> list[Object]:
    """Conditions of a pool; `fault` says why it cannot be used, if so. None: it could not be parsed."""
    generation = obj["metadata"].get("generation", 0)
    total = sum(block.size for block in pool.blocks) if pool else 0
    reason = "resolved" if not fault else "cidr_overlap" if pool else "invalid_block"
    conditions = (obj.get("status") or {}).get("conditions") or []
    wanted = [(CONFLICT, "True" if fault else "False", reason, fault)]
    wanted += [
        (kind, "Unknown", "noreason", str(count))
        for kind, count in zip(COUNTS, (total, total - used, used), strict=True)
    ]
    for kind, status, why, message in wanted:
        made = {
            "type": kind,
            "status": status,
            "reason": why,
            "message": message,
            "observedGeneration": generation,
        }
        conditions = _condition(conditions, made)
    return conditions


class LoadBalancers:
    """Reconciles LoadBalancer Services and pools from their caches."""

    def __init__(self, client: Client, services: Cache) -> None:
        self.client, self.services = client, services
        self.pools = Cache(client, LOAD_BALANCER_POOLS)
        self.ledger = Ledger()
        self._parsed: dict[str, Pool] = {}
        self._faults: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self.queue = WorkQueue("load-balancer", self.reconcile)
        services.on_change(self._service_changed)
        self.pools.on_change(self._pool_changed)
        for service in services.objects.values():
            self._service_changed(None, service)

    async def run(self) -> None:
        """Work until cancelled, from the time when pools are a kind that the API serves."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_pools())
            await self.pools.synced.wait()
            group.create_task(self.queue.run())

    async def _follow_pools(self) -> None:
        name = f"{LOAD_BALANCER_POOLS.plural}.{LOAD_BALANCER_POOLS.group}"
        definitions = self.client.watch(CUSTOM_RESOURCE_DEFINITIONS, field_selector=f"metadata.name={name}")
        async with contextlib.aclosing(definitions) as events:
            async for event in events:
                if event.type in ("ADDED", "MODIFIED"):
                    try:
                        await self.pools.run()
                    except ApiError as error:
                        if error.code != 404:  # the definition went, and may come back
                            raise

    def _service_changed(self, old: Object | None, new: Object | None) -> None:
        meta = (new or old or {})["metadata"]
        key = (meta["namespace"], meta["name"])
        if old is None and new is not None and wants(new) and key not in self.ledger.held:
            # What an earlier controller gave is kept; new ones are given only after all are known.
            asked = request(new)
            self.ledger.put(asked, tuple(a for a in _addresses(new) if self.ledger.admits(asked, a)))
        if any(obj is not None and (wants(obj) or key in self.ledger.held) for obj in (old, new)):
            self.queue.add(key)

    def _pool_changed(self, old: Object | None, new: Object | None) -> None:
        before, after = (old or {}).get("spec"), (new or {}).get("spec")
        if old is not None and new is not None and before == after:
            return
        name = (new or old or {})["metadata"]["name"]
        self._parsed.pop(name, None)
        self._faults.pop(name, None)
        if new is not None:
            try:
                self._parsed[name] = parse(new)
            except PoolError as error:
                self._faults[name] = str(error)
        self._refused = conflicts(self._parsed.values())
        for _, pool in self.pools.objects:
            self.queue.add((_POOL, pool))
        for key, service in self.services.objects.items():
            if wants(service):
                self.queue.add(key)

    async def reconcile(self, key: Key) -> None:
        """Bring one Service, or one pool's status, to what it should be."""
        if key[0] == _POOL:
            await self._reconcile_pool(key[1])
            return
        service = self.services.objects.get(key)
        before = self.ledger.held.get(key, ())
        if service is None or not wants(service) or service["metadata"].get("deletionTimestamp"):
            self.ledger.drop(key)
            held = service is not None and bool(before) and service["spec"].get("type") != "LoadBalancer"
            if service is not None and held:
                await self._write(service, released_status(service))
        else:
            asked = request(service)
            outcome = allocate(asked, self._parsed.values(), self._refused, self.ledger)
            self.ledger.put(asked, outcome.addresses)
            await self._write(service, service_status(service, outcome))
        after = self.ledger.held.get(key, ())
        if before != after:
            self._touched({*before, *after})

    def _touched(self, addresses: set[Address]) -> None:
        """Counts of pools changed; Services that wait may have their turn."""
        for name, pool in self._parsed.items():
            if any(address in pool for address in addresses):
                self.queue.add((_POOL, name))
        for key, service in self.services.objects.items():
            if wants(service) and not self.ledger.held.get(key):
                self.queue.add(key)

    async def _write(self, service: Object, wanted: dict[str, Any]) -> None:
        status = service.get("status") or {}
        if all((status.get(part) or type(value)()) == value for part, value in wanted.items()):
            return
        meta = service["metadata"]
        # A merge patch would keep the addresses that go: absent lists are named as null.
        balancer = wanted["loadBalancer"] or {"ingress": None}
        patch = {"status": {**wanted, "loadBalancer": balancer}, "metadata": {"uid": meta["uid"]}}
        await self._patch(SERVICES, meta["name"], patch, meta["namespace"])

    async def _reconcile_pool(self, name: str) -> None:
        obj = self.pools.get(name)
        if obj is None:
            return
        pool = self._parsed.get(name)
        fault = self._faults.get(name) or self._refused.get(name, "")
        conditions = pool_conditions(obj, pool, self.ledger.used(pool) if pool else 0, fault)
        if conditions != ((obj.get("status") or {}).get("conditions") or []):
            await self._patch(LOAD_BALANCER_POOLS, name, {"status": {"conditions": conditions}}, None)

    async def _patch(self, resource: Resource, name: str, patch: Any, namespace: str | None) -> None:
        try:
            await self.client.patch(resource, name, patch, namespace, subresource="status")
        except ApiError as error:
            if error.code not in (404, 409):  # gone, or another one of that name
                raise
