"""Addresses for ServiceEntries that have none, so that the node proxy can tell their hosts apart by address.

From Istio's own ranges, 240.240.0.0/16 and 2001:2::/48, written to `status.addresses` and never changed
while the host stays: an address is stable because it is stored, not because it is computed. The pools are
pure; `AddressAllocator` reads a cache and writes statuses.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
from collections.abc import Iterable

from meshlight.controlplane.external import allocatable_hosts
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.logs import Scope
from meshlight.kube.client import ApiError, ApiUnreachable, Cache, Client
from meshlight.kube.resources import SERVICE_ENTRIES, Object

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
IPV4 = ipaddress.IPv4Network("240.240.0.0/16")
IPV6 = ipaddress.IPv6Network("2001:2::/48")
_RETRY_SECONDS = 2.0

log = Scope("ip-autoallocate")


class Exhausted(Exception):
    """A pool has no free address left."""


class Pool:
    """The addresses of one range and who has them."""

    def __init__(self, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> None:
        self._network = network
        self._owners: dict[Address, ObjectKey] = {}
        self._next = 1

    def claim(self, address: Address, owner: ObjectKey) -> bool:
        """Take a certain address; False when someone else has it. Those of other ranges are free to all."""
        if address not in self._network:
            return True
        return self._owners.setdefault(address, owner) == owner

    def draw(self, owner: ObjectKey) -> Address:
        """Take the next free address; raises Exhausted."""
        size = self._network.num_addresses
        for step in range(min(size, len(self._owners) + 2)):
            offset = (self._next + step - 1) % (size - 1) + 1
            address = self._network[offset]
            if address not in self._owners:
                self._owners[address] = owner
                self._next = offset + 1
                return address
        raise Exhausted(f"no address of {self._network} is free")

    def release(self, addresses: Iterable[Address], owner: ObjectKey) -> None:
        """Give back addresses; those that are not the owner's stay."""
        for address in addresses:
            if self._owners.get(address) == owner:
                del self._owners[address]


class Allocation:
    """Both pools, and what each ServiceEntry's status is to say."""

    def __init__(self) -> None:
        self._pools: tuple[Pool, ...] = (Pool(IPV4), Pool(IPV6))
        self._known: dict[ObjectKey, frozenset[Address]] = {}

    def learn(self, key: ObjectKey, obj: Object) -> None:
        """Take note of the addresses an entry has, stored or its own, before any is drawn."""
        for address in (*itertools.chain(*_stored(obj).values()), *_own(obj)):
            for pool in self._pools:
                pool.claim(address, key)

    def wanted(self, key: ObjectKey, obj: Object) -> list[Object] | None:
        """The `status.addresses` an entry is to have; None when it has them."""
        stored, hosts = _stored(obj), allocatable_hosts(obj)
        present = (obj.get("status") or {}).get("addresses") or []
        addresses: list[Object] = []
        held: list[Address] = list(_own(obj))
        for host in hosts:
            found = [a for a in stored.get(host, ()) if all(pool.claim(a, key) for pool in self._pools)]
            mine = found if len(found) == len(self._pools) else [pool.draw(key) for pool in self._pools]
            held += mine
            addresses += [{"value": str(address), "host": host} for address in mine]
        before = self._known.get(key, frozenset(itertools.chain(*stored.values())))
        self._known[key] = frozenset(held)
        for pool in self._pools:
            pool.release(before - self._known[key], key)
        return None if addresses == present else addresses

    def forget(self, key: ObjectKey) -> None:
        """Give back what a deleted entry had."""
        before = self._known.pop(key, frozenset())
        for pool in self._pools:
            pool.release(before, key)


def _stored(obj: Object) -> dict[str, list[Address]]:
    found: dict[str, list[Address]] = {}
    for entry in (obj.get("status") or {}).get("addresses") or []:
        try:
            address = ipaddress.ip_address(entry.get("value") or "")
        except ValueError:
            continue
        found.setdefault(entry.get("host") or "", []).append(address)
    return found


def _own(obj: Object) -> list[Address]:
    addresses = []
    for text in (obj.get("spec") or {}).get("addresses") or []:
        try:
            addresses.append(ipaddress.ip_address(text))
        except ValueError:
            continue
    return addresses


class AddressAllocator:
    """Keeps `status.addresses` of every ServiceEntry as it should be."""

    def __init__(self, client: Client, entries: Cache) -> None:
        self._client, self._entries = client, entries
        self._allocation = Allocation()
        self._due: asyncio.Queue[ObjectKey] = asyncio.Queue()
        self._queued: set[ObjectKey] = set()
        entries.on_change(lambda old, new: self._add(ObjectKey.of(new or old or {})))

    def _add(self, key: ObjectKey) -> None:
        if key not in self._queued:
            self._queued.add(key)
            self._due.put_nowait(key)

    async def run(self) -> None:
        """Work until cancelled; begins once all entries are known, oldest first."""
        await self._entries.synced.wait()
        known = sorted(
            self._entries.objects.values(), key=lambda o: o["metadata"].get("creationTimestamp") or ""
        )
        for obj in known:
            self._allocation.learn(ObjectKey.of(obj), obj)
        while True:
            key = await self._due.get()
            self._queued.discard(key)
            try:
                await self._settle(key)
            except (ApiError, ApiUnreachable, Exhausted) as error:
                log.warn("addresses not allocated", entry=key, error=str(error), retry_after=_RETRY_SECONDS)
                asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._add, key)

    async def _settle(self, key: ObjectKey) -> None:
        obj = self._entries.get(key.name, key.namespace)
        if obj is None:
            self._allocation.forget(key)
            return
        addresses = self._allocation.wanted(key, obj)
        if addresses is None:
            return
        # With the version that was read: another replica, or a change meanwhile, brings us back by the watch.
        patch = {
            "metadata": {"resourceVersion": obj["metadata"].get("resourceVersion")},
            "status": {"addresses": addresses},
        }
        try:
            await self._client.patch(SERVICE_ENTRIES, key.name, patch, key.namespace, subresource="status")
            log.info("addresses allocated", entry=key, addresses=[a["value"] for a in addresses])
        except ApiError as error:
            if error.code not in (404, 409):
                raise
