"""Which node answers for which Service address towards the fabric, as routes.

Pure. What a router outside a cluster learns by L2 or BGP announcements: cluster addresses lead to any
ready node; a LoadBalancer address to one ready node, and to one with endpoints where its traffic policy is
Local. Choices are by rendezvous hash, so a node that goes moves only its own addresses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from meshlight.kube.resources import Object
from meshlight.kube.service_addresses import RANGES, family


def node_addresses(nodes: Iterable[Object]) -> dict[str, list[str]]:
    """Ready nodes with their addresses on the fabric."""
    found = {}
    for node in nodes:
        status = node.get("status") or {}
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or [])
        addresses = [a["address"] for a in status.get("addresses") or [] if a["type"] == "InternalIP"]
        if ready and addresses:
            found[node["metadata"]["name"]] = addresses
    return found


def balanced(service: Object) -> list[str]:
    """Addresses of a Service that are announced."""
    spec = service["spec"]
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    return [i["ip"] for i in ingress if i.get("ip")] + list(spec.get("externalIPs") or [])


def _weight(address: str, node: str) -> bytes:
    return hashlib.sha256(f"{address}/{node}".encode()).digest()


def choose(service: Object, slices: Iterable[Object], nodes: Mapping[str, list[str]]) -> dict[str, str]:
    """Address → node address for each announced address of a Service."""
    candidates = set(nodes)
    if service["spec"].get("externalTrafficPolicy") == "Local":
        candidates &= {
            endpoint.get("nodeName") or ""
            for item in slices
            for endpoint in item.get("endpoints") or []
            if (endpoint.get("conditions") or {}).get("ready") is not False
        }
    found = {}
    for address in balanced(service):
        usable = {node: via for node in candidates for via in nodes[node] if family(via) == family(address)}
        if usable:
            found[address] = usable[max(usable, key=lambda node: _weight(address, node))]
    return found


def ranges(nodes: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Range of cluster addresses → addresses of the nodes that answer for it."""
    found = {}
    for name, cidr in RANGES.items():
        vias = sorted(a for addresses in nodes.values() for a in addresses if family(a) == name)
        if vias:
            found[str(cidr)] = vias
    return found


def commands(before: Mapping[str, list[str]], after: Mapping[str, list[str]], device: str) -> list[str]:
    """`ip` commands that bring routes (destination → next hops) from one state to another."""
    made = [f"route del {destination}" for destination in sorted(before.keys() - after.keys())]
    for destination, vias in sorted(after.items()):
        if before.get(destination) == vias:
            continue
        if len(vias) == 1:
            made.append(f"route replace {destination} via {vias[0]} dev {device}")
        else:
            hops = " ".join(f"nexthop via {via} dev {device}" for via in vias)
            made.append(f"route replace {destination} {hops}")
    return made
