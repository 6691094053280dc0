"""LB-IPAM's rules: which address of which pool a LoadBalancer Service gets.

Pure. Pools have the form of Cilium's CiliumLoadBalancerIPPool, and its documented semantics: blocks by
CIDR or by first and last address, a selector of Services, pools that overlap an older one give nothing,
disabled ones keep what they gave, addresses may be asked for and may be shared by a key.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from meshlight.kube.resources import Object
from meshlight.kube.selectors import match_labels

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Key = tuple[str, str]

NAMESPACE_LABEL, NAME_LABEL = "io.kubernetes.service.namespace", "io.kubernetes.service.name"
"""Labels that every Service has for a pool's selector."""
REQUESTED = ("lbipam.cilium.io/ips", "io.cilium/lb-ipam-ips")
SHARING = ("lbipam.cilium.io/sharing-key", "io.cilium/lb-ipam-sharing-key")
SHARING_NAMESPACES = ("lbipam.cilium.io/sharing-cross-namespace", "io.cilium/lb-ipam-sharing-cross-namespace")
CLASSES = ("io.cilium/l2-announcer", "io.cilium/bgp-control-plane")
"""Values of `loadBalancerClass` that mean this allocator, besides none."""


class PoolError(ValueError):
    """A pool's block is not a range; the message names it."""


@dataclass(frozen=True, slots=True)
class Block:
    """Addresses from `first` to `last`, both included, of one family."""

    first: Address
    last: Address

    def __contains__(self, address: object) -> bool:
        if not isinstance(address, ipaddress.IPv4Address | ipaddress.IPv6Address):
            return False
        return address.version == self.first.version and int(self.first) <= int(address) <= int(self.last)

    def overlaps(self, other: Block) -> bool:
        """Whether an address lies in both."""
        return other.first in self or self.first in other

    def __len__(self) -> int:
        return int(self.last) - int(self.first) + 1

    def __iter__(self) -> Iterator[Address]:
        kind = type(self.first)
        return (kind(number) for number in range(int(self.first), int(self.last) + 1))

    @property
    def size(self) -> int:
        """Number of addresses; of an IPv6 block it may be more than `len` can say."""
        return int(self.last) - int(self.first) + 1


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool as parsed; `created` orders pools that overlap."""

    name: str
    created: str
    blocks: tuple[Block, ...]
    selector: Object | None = None
    disabled: bool = False

    def __contains__(self, address: object) -> bool:
        return any(address in block for block in self.blocks)

    def selects(self, labels: Mapping[str, str]) -> bool:
        """Whether a Service with these labels may have its addresses."""
        return self.selector is None or match_labels(self.selector, labels)


def parse(obj: Object) -> Pool:
    """A CiliumLoadBalancerIPPool as a Pool. Raises PoolError."""
    spec, blocks = obj.get("spec") or {}, []
    reserve = spec.get("allowFirstLastIPs") == "No"
    for index, block in enumerate([*(spec.get("blocks") or []), *(spec.get("cidrs") or [])]):
        where = f"spec.blocks[{index}]"
        try:
            if block.get("cidr"):
                network = ipaddress.ip_network(block["cidr"], strict=False)
                first, last = network[0], network[-1]
                if reserve and network.num_addresses > 2:
                    first, last = first + 1, last - 1
            else:
                first = ipaddress.ip_address(block["start"])
                last = ipaddress.ip_address(block.get("stop") or block["start"])
        except KeyError:
            raise PoolError(f"{where}: needs `cidr`, or `start` with `stop`") from None
        except ValueError as error:
            raise PoolError(f"{where}: {error}") from None
        if first.version != last.version or int(first) > int(last):
            raise PoolError(f"{where}: {first} to {last} is no range")
        blocks.append(Block(first, last))
    metadata = obj["metadata"]
    created = metadata.get("creationTimestamp") or ""
    selector = spec.get("serviceSelector")
    return Pool(metadata["name"], created, tuple(blocks), selector, bool(spec.get("disabled")))


def conflicts(pools: Iterable[Pool]) -> dict[str, str]:
    """Pools that overlap an older one, with a sentence that says how."""
    found: dict[str, str] = {}
    accepted: list[Pool] = []
    for pool in sorted(pools, key=lambda p: (p.created, p.name)):
        for other in accepted:
            pair = next(((a, b) for a in pool.blocks for b in other.blocks if a.overlaps(b)), None)
            if pair:
                one, two = (f"{block.first} - {block.last}" for block in pair)
                found[pool.name] = f"Pool conflict: {one} overlaps {two} of IP pool '{other.name}'"
                break
        else:
            accepted.append(pool)
    return found


@dataclass(frozen=True, slots=True)
class Request:
    """What a Service asks of the allocator. `required`: families without which it is not satisfied."""

    key: Key
    labels: Mapping[str, str]
    families: tuple[int, ...]
    required: tuple[int, ...]
    asked: tuple[Address, ...] = ()
    sharing: str = ""
    shared_with: frozenset[str] = frozenset()
    ports: frozenset[tuple[str, int]] = frozenset()


def wants(service: Object) -> bool:
    """Whether a Service is this allocator's business."""
    spec = service["spec"]
    kind = spec.get("loadBalancerClass")
    return spec.get("type") == "LoadBalancer" and (not kind or kind in CLASSES)


def _annotation(annotations: Mapping[str, str], names: Iterable[str]) -> str:
    return next((annotations[name] for name in names if annotations.get(name)), "")


def request(service: Object) -> Request:
    """The request that a LoadBalancer Service makes; addresses that are none are left out."""
    metadata, spec = service["metadata"], service["spec"]
    annotations = metadata.get("annotations") or {}
    key = (metadata["namespace"], metadata["name"])
    families = tuple(6 if one == "IPv6" else 4 for one in spec.get("ipFamilies") or ["IPv4"])
    required = families[:1] if spec.get("ipFamilyPolicy") == "PreferDualStack" else families
    asked = []
    for text in [spec.get("loadBalancerIP") or "", *_annotation(annotations, REQUESTED).split(",")]:
        try:
            asked.append(ipaddress.ip_address(text.strip()))
        except ValueError:
            continue
    ports = frozenset((p.get("protocol", "TCP"), p["port"]) for p in spec.get("ports") or [])
    labels = {**(metadata.get("labels") or {}), NAMESPACE_LABEL: key[0], NAME_LABEL: key[1]}
    spaces = frozenset(s.strip() for s in _annotation(annotations, SHARING_NAMESPACES).split(",") if s.strip())
    sharing = _annotation(annotations, SHARING)
    return Request(key, labels, families, required, tuple(asked), sharing, spaces, ports)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The addresses a Service has, and the condition `cilium.io/IPAMRequestSatisfied`."""

    addresses: tuple[Address, ...]
    satisfied: bool
    reason: str = "satisfied"
    message: str = ""


@dataclass(slots=True)
class Ledger:
    """Who holds what now."""

    holders: dict[Address, dict[Key, Request]] = field(default_factory=dict)
    held: dict[Key, tuple[Address, ...]] = field(default_factory=dict)

    def put(self, asked: Request, addresses: tuple[Address, ...]) -> None:
        """A Service holds these addresses and no others."""
        self.drop(asked.key)
        if addresses:
            self.held[asked.key] = addresses
        for address in addresses:
            self.holders.setdefault(address, {})[asked.key] = asked

    def drop(self, key: Key) -> None:
        """A Service holds nothing any more."""
        for address in self.held.pop(key, ()):
            holders = self.holders[address]
            holders.pop(key, None)
            if not holders:
                del self.holders[address]

    def used(self, pool: Pool) -> int:
        """How many addresses of a pool are held."""
        return sum(address in pool for address in self.holders)

    def admits(self, asked: Request, address: Address) -> bool:
        """Whether a Service may have an address beside those who hold it: same key, other ports."""
        others = [r for key, r in self.holders.get(address, {}).items() if key != asked.key]
        return all(_shares(asked, other) for other in others)

    def shareable(self, asked: Request) -> Iterator[Address]:
        """Addresses held under the Service's sharing key that it may join."""
        if asked.sharing:
            for address, holders in self.holders.items():
                if asked.key not in holders and self.admits(asked, address):
                    yield address


def _shares(one: Request, two: Request) -> bool:
    if not one.sharing or one.sharing != two.sharing or one.ports & two.ports:
        return False

    def open_to(a: Request, b: Request) -> bool:
        return a.key[0] == b.key[0] or bool(a.shared_with & {"*", b.key[0]})

    return open_to(one, two) and open_to(two, one)


def allocate(asked: Request, pools: Iterable[Pool], refused: Mapping[str, str], ledger: Ledger) -> Outcome:
    """The addresses of one Service, kept where they may be; `refused` are the pools in conflict."""
    usable = [p for p in pools if p.name not in refused and p.selects(asked.labels)]
    if asked.asked:
        return _requested(asked, usable, ledger)
    chosen: list[Address] = []
    for version in asked.families:
        kept = next((a for a in ledger.held.get(asked.key, ()) if a.version == version), None)
        if kept is not None and any(kept in p for p in usable) and ledger.admits(asked, kept):
            chosen.append(kept)
            continue
        address = _free(asked, version, [p for p in usable if not p.disabled], ledger)
        if address is not None:
            chosen.append(address)
    missing = [v for v in asked.required if v not in {a.version for a in chosen}]
    if not missing:
        return Outcome(tuple(chosen), True)
    if any(block.first.version in missing for p in usable for block in p.blocks):
        return Outcome(tuple(chosen), False, "out_of_ips", "No IPs available in the pools that match")
    message = "There are no enabled CiliumLoadBalancerIPPools that match this service"
    return Outcome(tuple(chosen), False, "no_pool", message)


def _requested(asked: Request, usable: list[Pool], ledger: Ledger) -> Outcome:
    chosen, faults = [], []
    for address in asked.asked:
        pool = next((p for p in usable if address in p), None)
        kept = address in ledger.held.get(asked.key, ())
        if pool is None or (pool.disabled and not kept):
            faults.append(("no_pool", f"no pool that matches this service has the requested IP {address}"))
        elif not ledger.admits(asked, address):
            faults.append(("already_allocated", f"the IP {address} is already allocated to another service"))
        else:
            chosen.append(address)
    if not faults:
        return Outcome(tuple(chosen), True)
    return Outcome(tuple(chosen), False, faults[0][0], "; ".join(text for _, text in faults))


def _free(asked: Request, version: int, pools: list[Pool], ledger: Ledger) -> Address | None:
    for address in ledger.shareable(asked):
        if address.version == version and any(address in p for p in pools):
            return address
    for pool in sorted(pools, key=lambda p: (p.created, p.name)):
        for block in pool.blocks:
            if block.first.version == version:
                for address in block:
                    if address not in ledger.holders:
                        return address
    return None
