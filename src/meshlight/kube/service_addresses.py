"""Cluster addresses and ports of Services: allotted when a Service is written, never shared.

What is taken is derived from the stored Services themselves, so that nothing can get out of step; they
are read only when something has to be allotted. Families follow Kubernetes' dual-stack rules, in a
cluster whose first family is IPv4.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterable

from meshlight.kube.resources import Object
from meshlight.kube.status import Cause, invalid

RANGES = {
    "IPv4": ipaddress.ip_network("10.96.0.0/16"),
    "IPv6": ipaddress.ip_network("fd6d:6c10:96::/112"),
}
"""Where cluster addresses come from, by family; the first family is the cluster's own."""
STATIC_BAND = 256
"""Lowest addresses of a range, left to those who ask for one (Kubernetes' allocation bands)."""
NODE_PORTS = range(30000, 32768)
_ATTEMPTS = 64
_OF_ADDRESSES = ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy")


def _refuse(name: str, field: str, code: str, message: str) -> Exception:
    return invalid("", "Service", name, [Cause(field, code, message)])


def _invalid(name: str, field: str, value: object, reason: str) -> Exception:
    return _refuse(name, field, "FieldValueInvalid", f"Invalid value: {value}: {reason}")


def family(address: str) -> str:
    """`IPv4` or `IPv6`."""
    return "IPv6" if ":" in address else "IPv4"


class Taken:
    """What the other Services hold, read from them when it is first asked for."""

    def __init__(self, others: Iterable[Object]) -> None:
        self._others = others
        self._known: tuple[set[str], set[tuple[str, int]]] | None = None

    def _read(self) -> tuple[set[str], set[tuple[str, int]]]:
        if self._known is None:
            addresses: set[str] = set()
            ports: set[tuple[str, int]] = set()
            for other in self._others:
                spec = other["spec"]
                addresses.update(a for a in spec.get("clusterIPs") or [spec.get("clusterIP")] if a)
                ports.update(
                    (p.get("protocol", "TCP"), p["nodePort"])
                    for p in spec.get("ports") or []
                    if p.get("nodePort")
                )
                if spec.get("healthCheckNodePort"):
                    ports.add(("TCP", spec["healthCheckNodePort"]))
            self._known = addresses, ports
        return self._known

    @property
    def addresses(self) -> set[str]:
        """Cluster addresses."""
        return self._read()[0]

    @property
    def ports(self) -> set[tuple[str, int]]:
        """Node ports with their protocols; a health check's is TCP."""
        return self._read()[1]


def assign(service: Object, old: Object | None, others: Iterable[Object]) -> None:
    """Complete a Service's addresses and node ports in place.

    `old` is what is stored under its name; `others` the other Services. Raises StatusError 422.
    """
    spec, name = service["spec"], service["metadata"]["name"]
    kind = spec.get("type", "ClusterIP")
    before = (old or {}).get("spec") or {}
    if kind == "ExternalName":
        for field in _OF_ADDRESSES:
            spec.pop(field, None)
        return
    if before.get("type") == "ExternalName":
        before = {}
    taken = Taken(others)
    _addresses(name, spec, before, taken)
    spec.setdefault("internalTrafficPolicy", "Cluster")
    if kind in ("NodePort", "LoadBalancer"):
        _node_ports(name, spec, before, taken)
    _health_check(name, spec, before, taken)


def _addresses(name: str, spec: Object, before: Object, taken: Taken) -> None:
    stated = list(spec.get("clusterIPs") or ([spec["clusterIP"]] if spec.get("clusterIP") else []))
    if spec.get("clusterIP") and stated[0] != spec["clusterIP"]:
        if spec["clusterIP"] == before.get("clusterIP"):
            stated[0] = spec["clusterIP"]
        elif stated == before.get("clusterIPs"):
            stated = [spec["clusterIP"]]  # an older client knows the first address only
        else:
            raise _invalid(name, "spec.clusterIPs", stated, "first value must match `clusterIP`")
    kept = list(before.get("clusterIPs") or ([before["clusterIP"]] if before.get("clusterIP") else []))
    if kept and stated and stated[0] != kept[0]:
        shown = f'["{stated[0]}"]'
        raise _invalid(name, "spec.clusterIPs[0]", shown, "may not change once set")
    families = _families(name, spec, before, stated)
    if (stated or kept or [""])[0] == "None":
        spec["clusterIP"], spec["clusterIPs"] = "None", ["None"]
        return
    chosen = []
    for index, wanted_family in enumerate(families):
        wanted = next((a for a in [*stated, *kept] if a and family(a) == wanted_family), "")
        own = wanted in kept
        chosen.append(wanted if own else _address(name, index, wanted, wanted_family, taken))
    spec["clusterIP"], spec["clusterIPs"] = chosen[0], chosen


def _families(name: str, spec: Object, before: Object, stated: list[str]) -> list[str]:
    """Settle `ipFamilies` and `ipFamilyPolicy`; returns the families."""
    families = list(spec.get("ipFamilies") or before.get("ipFamilies") or [])
    if not families:
        families = [family(a) for a in stated if a and a != "None"]
    if len(families) != len(set(families)):
        raise _invalid(name, "spec.ipFamilies", families, "each family may be named once")
    for index, one in enumerate(families):
        if one not in RANGES:
            raise _invalid(name, f"spec.ipFamilies[{index}]", f'"{one}"', "supported: IPv4, IPv6")
    policy = spec.get("ipFamilyPolicy")
    if not policy:
        headless_by_hand = stated[:1] == ["None"] and not spec.get("selector")
        two = len(families) == 2 or len(stated) == 2
        policy = "RequireDualStack" if two or (headless_by_hand and not families) else "SingleStack"
    was = list(before.get("ipFamilies") or [])
    if was and families and families[0] != was[0]:
        raise _invalid(name, "spec.ipFamilies[0]", f'"{families[0]}"', "may not change once set")
    if not families:
        families = [next(iter(RANGES))]
    if policy == "SingleStack":
        if len(families) == 2 and families != was:
            shown = "must be RequireDualStack or PreferDualStack when multiple `ipFamilies` are specified"
            raise _invalid(name, "spec.ipFamilyPolicy", f'"{policy}"', shown)
        families = families[:1]
    else:
        families += [one for one in RANGES if one not in families]
    for index, address in enumerate(a for a in stated if a and a != "None"):
        if index < len(families) and family(address) != families[index]:
            shown = f"expected an {families[index]} value as indicated by `ipFamilies[{index}]`"
            raise _invalid(name, f"spec.clusterIPs[{index}]", f'"{address}"', shown)
    spec["ipFamilies"], spec["ipFamilyPolicy"] = families, policy
    return families


def _address(name: str, index: int, wanted: str, wanted_family: str, taken: Taken) -> str:
    cidr = RANGES[wanted_family]
    if not wanted:
        for _ in range(_ATTEMPTS):
            offset = random.randrange(STATIC_BAND, cidr.num_addresses - 1)
            if (candidate := str(cidr[offset])) not in taken.addresses:
                return candidate
        for address in cidr.hosts():
            if str(address) not in taken.addresses:
                return str(address)
        message = "Internal error: failed to allocate a serviceIP: range is full"
        raise _refuse(name, "spec.clusterIPs", "InternalError", message)
    try:
        parsed = ipaddress.ip_address(wanted)
    except ValueError:
        raise _invalid(name, f"spec.clusterIPs[{index}]", f'"{wanted}"', "must be a valid IP address") from None
    failed = f"failed to allocate IP {wanted}: "
    if parsed not in cidr:
        reason = f"the provided IP ({wanted}) is not in the valid range. The range of valid IPs is {cidr}"
        raise _invalid(name, "spec.clusterIPs", f'"{wanted}"', failed + reason)
    if str(parsed) in taken.addresses:
        raise _invalid(name, "spec.clusterIPs", f'"{wanted}"', failed + "provided IP is already allocated")
    return str(parsed)


def _node_ports(name: str, spec: Object, before: Object, taken: Taken) -> None:
    kept = {(p.get("protocol", "TCP"), p["port"]): p.get("nodePort") for p in before.get("ports") or []}
    optional = spec.get("type") == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts") is False
    used: set[tuple[str, int]] = set()
    for index, port in enumerate(spec.get("ports") or []):
        protocol, field = port.get("protocol", "TCP"), f"spec.ports[{index}].nodePort"
        wanted = port.get("nodePort") or kept.get((protocol, port["port"])) or 0
        if not wanted and optional:
            continue
        # One number may serve TCP and UDP of one Service, as for DNS.
        twin = next((p["nodePort"] for p in spec["ports"][:index] if p["port"] == port["port"]), 0)
        if not wanted and twin and (protocol, twin) not in taken.ports:
            wanted = twin
        elif not wanted:
            wanted = _free_port(name, field, protocol, taken.ports | used)
        elif (protocol, wanted) not in kept_ports(before):
            _check_port(name, field, protocol, wanted, taken)
        port["nodePort"] = wanted
        used.add((protocol, wanted))


def kept_ports(before: Object) -> set[tuple[str, int]]:
    """Node ports that a Service holds already."""
    return {(p.get("protocol", "TCP"), p["nodePort"]) for p in before.get("ports") or [] if p.get("nodePort")}


def _free_port(name: str, field: str, protocol: str, taken: set[tuple[str, int]]) -> int:
    free = [number for number in NODE_PORTS if (protocol, number) not in taken]
    if not free:
        raise _refuse(
            name, field, "InternalError", "Internal error: failed to allocate a nodePort: range is full"
        )
    return random.choice(free)


def _check_port(name: str, field: str, protocol: str, wanted: int, taken: Taken) -> None:
    if wanted not in NODE_PORTS:
        reason = "provided port is not in the valid range. The range of valid ports is 30000-32767"
        raise _invalid(name, field, wanted, reason)
    if (protocol, wanted) in taken.ports:
        raise _invalid(name, field, wanted, "provided port is already allocated")


def _health_check(name: str, spec: Object, before: Object, taken: Taken) -> None:
    """The port on which nodes tell a balancer before them whether they have local endpoints."""
    wanted = spec.get("healthCheckNodePort") or 0
    kept = before.get("healthCheckNodePort") or 0
    if spec.get("type") != "LoadBalancer" or spec.get("externalTrafficPolicy") != "Local":
        if wanted and wanted == kept:
            del spec["healthCheckNodePort"]
        return
    field = "spec.healthCheckNodePort"
    if kept and wanted not in (0, kept):
        raise _invalid(name, field, wanted, "field is immutable")
    if kept:
        spec["healthCheckNodePort"] = kept
        return
    if wanted:
        _check_port(name, field, "TCP", wanted, taken)
        return
    own = {("TCP", p["nodePort"]) for p in spec.get("ports") or [] if p.get("nodePort")}
    spec["healthCheckNodePort"] = _free_port(name, field, "TCP", taken.ports | own)
