"""Cluster addresses and node ports of Services: allotted when a Service is written, never shared.

What is taken is derived from the stored Services themselves, so that nothing can get out of step.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterable

from meshlight.kube.resources import Object
from meshlight.kube.status import Cause, invalid

CIDR = ipaddress.ip_network("10.96.0.0/16")
STATIC_BAND = 256
"""Lowest addresses of the range, left to those who ask for one (Kubernetes' allocation bands)."""
NODE_PORTS = range(30000, 32768)
_ATTEMPTS = 64


def _refuse(name: str, field: str, code: str, message: str) -> Exception:
    return invalid("", "Service", name, [Cause(field, code, message)])


def assign(service: Object, old: Object | None, others: Iterable[Object]) -> None:
    """Complete a Service's addresses and node ports in place.

    `old` is what is stored under its name; `others` the other Services. Raises StatusError 422.
    """
    spec, name = service["spec"], service["metadata"]["name"]
    kind = spec.get("type", "ClusterIP")
    before = (old or {}).get("spec") or {}
    if kind == "ExternalName":
        for field in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
            spec.pop(field, None)
        return
    others = list(others)
    wanted = spec.get("clusterIP") or (spec.get("clusterIPs") or [""])[0] or before.get("clusterIP", "")
    if before.get("clusterIP") and wanted != before["clusterIP"] and before.get("type") != "ExternalName":
        shown = f'Invalid value: ["{wanted}"]: may not change once set'
        raise _refuse(name, "spec.clusterIPs[0]", "FieldValueInvalid", shown)
    if wanted != "None":
        taken = {o["spec"].get("clusterIP") for o in others}
        wanted = _address(name, wanted, taken)
    spec["clusterIP"], spec["clusterIPs"] = wanted, [wanted]
    spec.setdefault("ipFamilies", ["IPv4"])
    spec.setdefault("ipFamilyPolicy", "SingleStack")
    spec.setdefault("internalTrafficPolicy", "Cluster")
    if kind in ("NodePort", "LoadBalancer") and spec.get("allocateLoadBalancerNodePorts") is not False:
        _node_ports(name, spec, before, others)


def _address(name: str, wanted: str, taken: set[str | None]) -> str:
    if not wanted:
        for _ in range(_ATTEMPTS):
            offset = random.randrange(STATIC_BAND, CIDR.num_addresses - 1)
            if (candidate := str(CIDR[offset])) not in taken:
                return candidate
        for address in CIDR.hosts():
            if str(address) not in taken:
                return str(address)
        message = "Internal error: failed to allocate a serviceIP: range is full"
        raise _refuse(name, "spec.clusterIPs", "InternalError", message)
    try:
        inside = ipaddress.ip_address(wanted) in CIDR
    except ValueError:
        shown = f'Invalid value: "{wanted}": must be a valid IP address'
        raise _refuse(name, "spec.clusterIPs[0]", "FieldValueInvalid", shown) from None
    prefix = f'Invalid value: "{wanted}": failed to allocate IP {wanted}: '
    if not inside:
        reason = f"the provided IP ({wanted}) is not in the valid range. The range of valid IPs is {CIDR}"
        raise _refuse(name, "spec.clusterIPs", "FieldValueInvalid", prefix + reason)
    if wanted in taken:
        raise _refuse(name, "spec.clusterIPs", "FieldValueInvalid", prefix + "provided IP is already allocated")
    return wanted


def _node_ports(name: str, spec: Object, before: Object, others: list[Object]) -> None:
    taken = {
        (p.get("protocol", "TCP"), p["nodePort"])
        for o in others
        for p in o["spec"].get("ports") or []
        if "nodePort" in p
    }
    kept = {(p.get("protocol", "TCP"), p["port"]): p.get("nodePort") for p in before.get("ports") or []}
    for index, port in enumerate(spec.get("ports") or []):
        protocol = port.get("protocol", "TCP")
        wanted = port.get("nodePort") or kept.get((protocol, port["port"]))
        if wanted:
            field = f"spec.ports[{index}].nodePort"
            if wanted not in NODE_PORTS:
                reason = "provided port is not in the valid range. The range of valid ports is 30000-32767"
                raise _refuse(name, field, "FieldValueInvalid", f"Invalid value: {wanted}: {reason}")
            if (protocol, wanted) in taken:
                shown = f"Invalid value: {wanted}: provided port is already allocated"
                raise _refuse(name, field, "FieldValueInvalid", shown)
        else:
            wanted = random.choice([n for n in NODE_PORTS if (protocol, n) not in taken])
        port["nodePort"] = wanted
        taken.add((protocol, wanted))
