"""Rules of Services and of the endpoints behind them."""

from __future__ import annotations

import ipaddress

from meshlight.kube import field_errors as faults
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause
from meshlight.kube.validation import names, pods

MAX_ENDPOINTS = 1000
"""Endpoints of one EndpointSlice."""
MAX_AFFINITY_SECONDS = 86400
TRAFFIC_DISTRIBUTIONS = ("PreferClose", "PreferSameNode", "PreferSameZone")


def service(obj: Object) -> list[Cause]:
    """Faults of a Service."""
    spec = obj.get("spec") or {}
    kind, ports = spec.get("type", "ClusterIP"), spec.get("ports") or []
    headless = spec.get("clusterIP") == "None"
    causes: list[Cause] = []
    if not ports and not headless and kind != "ExternalName":
        causes.append(faults.required("spec.ports"))
    if kind == "ExternalName":
        name = (spec.get("externalName") or "").rstrip(".")
        if not name:
            causes.append(faults.required("spec.externalName"))
        elif message := names.subdomain(name):
            causes.append(faults.invalid_value("spec.externalName", name, message))
        if spec.get("clusterIP"):
            detail = "may not be set when `type` is 'ExternalName'"
            causes.append(faults.forbidden("spec.clusterIP", detail))
    elif kind == "LoadBalancer" and headless:
        detail = "may not be set to 'None' for LoadBalancer services"
        causes.append(faults.invalid_value("spec.clusterIPs[0]", "None", detail))
    causes += _ports(ports, kind)
    causes += _traffic(spec, kind)
    causes += names.labels(spec.get("selector"), "spec.selector")
    for index, address in enumerate(spec.get("externalIPs") or ()):
        causes += ip_address(f"spec.externalIPs[{index}]", address)
    if not headless and spec.get("clusterIP"):
        causes += ip_address("spec.clusterIPs[0]", spec["clusterIP"])
    return causes


def _traffic(spec: Object, kind: str) -> list[Cause]:
    """Faults of the fields that say how traffic is spread and from where it may come."""
    causes: list[Cause] = []
    if spec.get("sessionAffinity") == "ClientIP":
        configured = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
        seconds = configured.get("timeoutSeconds", 1)
        if not 1 <= seconds <= MAX_AFFINITY_SECONDS:
            at = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
            detail = f"must be greater than 0 and less than {MAX_AFFINITY_SECONDS}"
            causes.append(faults.invalid_value(at, seconds, detail))
    elif spec.get("sessionAffinityConfig"):
        detail = "must not be set when session affinity is None"
        causes.append(faults.forbidden("spec.sessionAffinityConfig", detail))
    outside = kind in ("NodePort", "LoadBalancer") or spec.get("externalIPs")
    if spec.get("externalTrafficPolicy") and not outside:
        detail = "may only be set for externally-accessible services"
        at = "spec.externalTrafficPolicy"
        causes.append(faults.invalid_value(at, spec["externalTrafficPolicy"], detail))
    if spec.get("healthCheckNodePort") and not (
        kind == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"
    ):
        detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
        at = "spec.healthCheckNodePort"
        causes.append(faults.invalid_value(at, spec["healthCheckNodePort"], detail))
    for field in ("loadBalancerSourceRanges", "loadBalancerClass", "allocateLoadBalancerNodePorts"):
        if spec.get(field) is not None and kind != "LoadBalancer":
            detail = "may only be used when `type` is 'LoadBalancer'"
            causes.append(faults.forbidden(f"spec.{field}", detail))
    for index, text in enumerate(spec.get("loadBalancerSourceRanges") or ()):
        try:
            ipaddress.ip_network(text.strip(), strict=False)
        except ValueError:
            detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
            causes.append(faults.invalid_value(f"spec.loadBalancerSourceRanges[{index}]", text, detail))
    spread = spec.get("trafficDistribution")
    if spread and spread not in TRAFFIC_DISTRIBUTIONS:
        causes.append(faults.not_supported("spec.trafficDistribution", spread, TRAFFIC_DISTRIBUTIONS))
    return causes


def service_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change: the class of a load balancer is chosen once."""
    before, after = old.get("spec") or {}, new.get("spec") or {}
    kind, was = after.get("loadBalancerClass"), before.get("loadBalancerClass")
    stays = before.get("type") == after.get("type") == "LoadBalancer"
    if not stays or kind == was:
        return []
    return [faults.invalid_value("spec.loadBalancerClass", kind, "may not change once set")]


def _ports(ports: list[Object], kind: str) -> list[Cause]:
    causes = []
    seen_names: set[str] = set()
    seen_ports: set[tuple[int, str]] = set()
    for index, port in enumerate(ports):
        at, name, number = f"spec.ports[{index}]", port.get("name") or "", port.get("port")
        if not name:
            if len(ports) > 1:
                causes.append(faults.required(f"{at}.name"))
        elif message := names.label(name):
            causes.append(faults.invalid_value(f"{at}.name", name, message))
        elif name in seen_names:
            causes.append(faults.duplicate(f"{at}.name", name))
        seen_names.add(name)
        if number is not None:
            causes += pods.port_number(f"{at}.port", number)
            key = (number, port.get("protocol", "TCP"))
            if key in seen_ports:
                causes.append(faults.duplicate(at, {"protocol": key[1], "port": number}))
            seen_ports.add(key)
        if "targetPort" in port:
            causes += pods.port_reference(f"{at}.targetPort", port["targetPort"])
        if port.get("nodePort"):
            if kind in ("ClusterIP", "ExternalName"):
                detail = f"may not be used when `type` is '{kind}'"
                causes.append(faults.forbidden(f"{at}.nodePort", detail))
            else:
                causes += pods.port_number(f"{at}.nodePort", port["nodePort"])
    return causes


def ip_address(path: str, address: str) -> list[Cause]:
    """Faults of an IP address."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
        return [faults.invalid_value(path, address, detail)]
    return []


def endpoint_slice(obj: Object) -> list[Cause]:
    """Faults of an EndpointSlice."""
    causes: list[Cause] = []
    kind, endpoints = obj.get("addressType"), obj.get("endpoints") or []
    if len(endpoints) > MAX_ENDPOINTS:
        causes.append(faults.too_many("endpoints", len(endpoints), MAX_ENDPOINTS))
    for index, endpoint in enumerate(endpoints):
        addresses = endpoint.get("addresses") or []
        at = f"endpoints[{index}].addresses"
        if not addresses:
            causes.append(faults.required(at, "must contain at least 1 address"))
        if kind in ("IPv4", "IPv6"):
            for number, address in enumerate(addresses):
                causes += ip_address(f"{at}[{number}]", address)
    seen: set[str] = set()
    for index, port in enumerate(obj.get("ports") or ()):
        name = port.get("name") or ""
        if name in seen:
            causes.append(faults.duplicate(f"ports[{index}].name", name))
        seen.add(name)
    return causes


def endpoint_slice_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change: the address type stays."""
    if old.get("addressType") == new.get("addressType"):
        return []
    return [faults.invalid_value("addressType", new.get("addressType"), "field is immutable")]


def endpoints(obj: Object) -> list[Cause]:
    """Faults of an Endpoints object."""
    causes: list[Cause] = []
    for index, subset in enumerate(obj.get("subsets") or ()):
        for field in ("addresses", "notReadyAddresses"):
            for number, address in enumerate(subset.get(field) or ()):
                if address.get("ip"):
                    causes += ip_address(f"subsets[{index}].{field}[{number}].ip", address["ip"])
        for number, port in enumerate(subset.get("ports") or ()):
            at = f"subsets[{index}].ports[{number}]"
            if len(subset["ports"]) > 1 and not port.get("name"):
                causes.append(faults.required(f"{at}.name"))
            if "port" in port:
                causes += pods.port_number(f"{at}.port", port["port"])
    return causes
