"""kube-proxy's role: Service addresses become endpoints, by nftables in the node's namespace.

`compile_rules` is pure: Services and EndpointSlices to one ruleset. A new ruleset replaces the table in
one transaction; established flows keep their endpoint, because NAT is decided by a flow's first packet.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from meshlight.kube.client import Client
from meshlight.kube.resources import ENDPOINT_SLICES, SERVICES, Object
from meshlight.node.netns import nft

TABLE = "meshlight-services"
SERVICE_NAME = "kubernetes.io/service-name"
_DEBOUNCE = 0.005
_PROTOCOLS = {"TCP": "tcp", "UDP": "udp"}


@dataclass(frozen=True, slots=True, order=True)
class Frontend:
    """An address that a Service answers on; `protocol` is `tcp` or `udp`."""

    address: str
    protocol: str
    port: int


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    """An endpoint behind a frontend."""

    address: str
    port: int


def _slices_by_service(slices: Iterable[Object]) -> dict[tuple[str, str], list[Object]]:
    found: dict[tuple[str, str], list[Object]] = {}
    for item in slices:
        name = (item["metadata"].get("labels") or {}).get(SERVICE_NAME)
        if name and item.get("addressType", "IPv4") == "IPv4":
            found.setdefault((item["metadata"]["namespace"], name), []).append(item)
    return found


def backends(slices: Iterable[Object], port_name: str, node: str, local: bool) -> list[Backend]:
    """Ready endpoints of a named port; serving but terminating ones when nothing is ready.

    With `local` (internalTrafficPolicy Local) only those on `node`.
    """
    ready: set[Backend] = set()
    terminating: set[Backend] = set()
    for item in slices:
        ports = [p["port"] for p in item.get("ports") or [] if (p.get("name") or "") == port_name]
        for endpoint in item.get("endpoints") or []:
            if local and endpoint.get("nodeName") != node:
                continue
            conditions = endpoint.get("conditions") or {}
            if conditions.get("ready", True) is not False:
                chosen = ready
            elif conditions.get("serving") and conditions.get("terminating"):
                chosen = terminating
            else:
                continue
            chosen.update(Backend(a, p) for a in endpoint["addresses"][:1] for p in ports)
    return sorted(ready or terminating)


def frontends(service: Object, slices: Iterable[Object], node: str) -> dict[Frontend, list[Backend]]:
    """Every address of a Service on this node with the endpoints behind it (possibly none)."""
    spec, found = service["spec"], {}
    slices = list(slices)
    addresses = [
        a for a in spec.get("clusterIPs") or [spec.get("clusterIP")] if a and a != "None" and ":" not in a
    ]
    if not addresses or spec.get("type") == "ExternalName":
        return {}
    addresses += spec.get("externalIPs") or []
    balancer = (service.get("status") or {}).get("loadBalancer") or {}
    addresses += [i["ip"] for i in balancer.get("ingress") or [] if i.get("ip")]
    local = spec.get("internalTrafficPolicy") == "Local"
    for port in spec.get("ports") or []:
        protocol = _PROTOCOLS.get(port.get("protocol", "TCP"))
        if protocol is None:
            continue
        behind = backends(slices, port.get("name") or "", node, local)
        for address in addresses:
            found[Frontend(address, protocol, port["port"])] = behind
    return found


def compile_rules(table: dict[Frontend, list[Backend]]) -> str:
    """The nft ruleset: one map from frontend to chain, one chain a distinct set of endpoints."""
    chains: dict[str, str] = {}
    elements = []
    for frontend, behind in sorted(table.items()):
        key = f"{frontend.address} . {frontend.protocol} . {frontend.port}"
        if not behind:
            continue
        signature = frontend.protocol + ",".join(f"{b.address}:{b.port}" for b in behind)
        chain = "endpoints-" + hashlib.sha256(signature.encode()).hexdigest()[:12]
        choices = ", ".join(f"{n} : {b.address} . {b.port}" for n, b in enumerate(behind))
        chains[chain] = (
            f"meta l4proto {frontend.protocol} dnat ip addr . port to numgen random mod {len(behind)} map "
            f"{{ {choices} }}"
        )
        elements.append(f"{key} : goto {chain}")
    refused = [f"{f.address} . {f.protocol} . {f.port}" for f, behind in sorted(table.items()) if not behind]
    lines = [f"table ip {TABLE}", f"delete table ip {TABLE}", f"table ip {TABLE} {{"]
    for chain, rule in chains.items():
        lines += [f"  chain {chain} {{", f"    {rule}", "  }"]
    lines += ["  map services {", "    type ipv4_addr . inet_proto . inet_service : verdict"]
    if elements:
        lines.append(f"    elements = {{ {', '.join(elements)} }}")
    lines += ["  }", "  set refused {", "    type ipv4_addr . inet_proto . inet_service"]
    if refused:
        lines.append(f"    elements = {{ {', '.join(refused)} }}")
    lines.append("  }")
    for hook in ("prerouting", "output"):
        lines += [
            f"  chain {hook} {{",
            f"    type nat hook {hook} priority -100",
            "    ip daddr . meta l4proto . th dport vmap @services",
            "  }",
        ]
    for hook in ("forward", "output"):
        lines += [
            f"  chain filter-{hook} {{",
            f"    type filter hook {hook} priority 0",
            "    ip daddr . meta l4proto . th dport @refused ip protocol tcp reject with tcp reset",
            "    ip daddr . meta l4proto . th dport @refused reject",
            "  }",
        ]
    # A pod that reaches itself through a Service would see its own address as the peer and never match.
    own = sorted({b.address for behind in table.values() for b in behind})
    lines += ["  set hairpins {", "    type ipv4_addr . ipv4_addr"]
    if own:
        lines.append(f"    elements = {{ {', '.join(f'{a} . {a}' for a in own)} }}")
    lines += [
        "  }",
        "  chain hairpin {",
        "    type nat hook postrouting priority 90",
        "    ct status dnat ip saddr . ip daddr @hairpins masquerade",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"


class ServiceTable:
    """Services and their slices as watched, compiled incrementally per Service."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._services: dict[tuple[str, str], Object] = {}
        self._slices: dict[tuple[str, str], dict[str, Object]] = {}
        self._compiled: dict[tuple[str, str], dict[Frontend, list[Backend]]] = {}

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
        return self._compile(key)

    def _compile(self, key: tuple[str, str]) -> bool:
        service = self._services.get(key)
        slices = _slices_by_service(self._slices.get(key, {}).values()).get(key, [])
        compiled = frontends(service, slices, self._node) if service else {}
        before = self._compiled.get(key, {})
        if compiled:
            self._compiled[key] = compiled
        else:
            self._compiled.pop(key, None)
        return compiled != before

    def rules(self) -> str:
        """The whole node's ruleset."""
        merged: dict[Frontend, list[Backend]] = {}
        for compiled in self._compiled.values():
            merged.update(compiled)
        return compile_rules(merged)


async def run(client: Client, node: str) -> None:
    """Keep the node's rules up to date, for ever. Raises ApiError when the API refuses us."""
    table = ServiceTable(node)
    changed = asyncio.Event()

    async def follow_services() -> None:
        async for event in client.watch(SERVICES):
            if event.type != "SYNCED" and table.service(event.object, event.type == "DELETED"):
                changed.set()

    async def follow_slices() -> None:
        async for event in client.watch(ENDPOINT_SLICES):
            if event.type != "SYNCED" and table.slice(event.object, event.type == "DELETED"):
                changed.set()

    async def write() -> None:
        while True:
            await changed.wait()
            await asyncio.sleep(_DEBOUNCE)
            changed.clear()
            await asyncio.to_thread(nft, table.rules())

    async with asyncio.TaskGroup() as tasks:
        for work in (follow_services, follow_slices, write):
            tasks.create_task(work())
