"""What Istio's validating webhook refuses of ServiceEntries and WorkloadEntries, refused here.

The rules are those of `pkg/config/validation` of istio/istio; each names the field it is about. Pure.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from meshlight.kube import field_errors as faults
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause
from meshlight.kube.validation import names

_RESOLUTIONS = ("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")
_LOCATIONS = ("MESH_EXTERNAL", "MESH_INTERNAL")
_PROTOCOLS = ("HTTP", "HTTPS", "GRPC", "GRPC-WEB", "HTTP2", "MONGO", "REDIS", "MYSQL", "TCP", "TLS", "UDP",
              "HBONE", "HTTP_PROXY", "AUTO")  # fmt: skip
_BY_NAME = ("HTTP", "HTTP2", "GRPC", "GRPC-WEB", "HTTPS", "TLS")
_HOST = re.compile(
    r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
)
_LAST_NUMERIC = re.compile(r".*\.\d+")


def service_entry(obj: Object) -> list[Cause]:
    """Faults of a ServiceEntry."""
    spec = _mapping(obj.get("spec"))
    causes: list[Cause] = []
    hosts = _texts(spec.get("hosts"), "spec.hosts", causes)
    addresses = _texts(spec.get("addresses"), "spec.addresses", causes)
    resolution = spec.get("resolution") or "NONE"
    if not hosts:
        causes.append(faults.required("spec.hosts", "a ServiceEntry has at least one host"))
    for host in hosts:
        if host == "*" or not is_host(host):
            causes.append(faults.invalid_value("spec.hosts", host, "must be a DNS name, or *. and a DNS name"))
    if resolution not in _RESOLUTIONS:
        causes.append(faults.not_supported("spec.resolution", resolution, _RESOLUTIONS))
    if (spec.get("location") or "MESH_EXTERNAL") not in _LOCATIONS:
        causes.append(faults.not_supported("spec.location", spec["location"], _LOCATIONS))
    for address in addresses:
        if not is_block(address):
            causes.append(
                faults.invalid_value("spec.addresses", address, "must be an IP address or CIDR block")
            )
        elif "/" in address and resolution not in ("NONE", "STATIC"):
            detail = "CIDR blocks only with the resolution NONE or STATIC"
            causes.append(faults.invalid_value("spec.addresses", address, detail))
    if spec.get("workloadSelector") is not None and spec.get("endpoints") is not None:
        causes.append(faults.forbidden("spec.endpoints", "may not be set beside workloadSelector"))
    for name, value in _mapping(_mapping(spec.get("workloadSelector")).get("labels")).items():
        if not name or "*" in name or "*" in str(value):
            detail = "labels have names, and wildcards are not supported"
            causes.append(faults.invalid_value("spec.workloadSelector.labels", f"{name}={value}", detail))
    ports = _ports(spec.get("ports"), causes)
    causes += _endpoints(spec, resolution, hosts, {str(port.get("name")) for port in ports})
    many = len(hosts) > 1 and resolution != "NONE"
    if many and any(str(port.get("protocol") or "TCP").upper() not in _BY_NAME for port in ports):
        causes.append(faults.invalid_value("spec.hosts", hosts, "several hosts only with HTTP or TLS ports"))
    return causes + _export_to(spec.get("exportTo"), obj["metadata"].get("namespace") or "")


def workload_entry(obj: Object) -> list[Cause]:
    """Faults of a WorkloadEntry."""
    causes: list[Cause] = []
    _endpoint(_mapping(obj.get("spec")), "spec", None, True, causes)
    return causes


def service_entry_warnings(obj: Object) -> list[str]:
    """What is stored but probably not meant."""
    spec, found = _mapping(obj.get("spec")), []
    selector = spec.get("workloadSelector")
    if selector is not None and not _mapping(selector).get("labels"):
        found.append("spec.workloadSelector: without labels, it selects every workload of the namespace")
    if selector is not None and (spec.get("resolution") or "NONE") == "NONE":
        found.append("spec.workloadSelector: has no meaning with the resolution NONE")
    return found


def is_host(text: str) -> bool:
    """Whether a text is a DNS name, perhaps with a leading `*.`; addresses are not."""
    return len(text) <= 253 and bool(_HOST.fullmatch(text)) and not _LAST_NUMERIC.fullmatch(text)


def is_block(text: str) -> bool:
    """Whether a text is an address or a CIDR block."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _ports(values: Any, causes: list[Cause]) -> list[Object]:
    ports = [port for port in values or [] if isinstance(port, dict)]
    if len(ports) != len(values or []):
        causes.append(faults.wrong_type("spec.ports", "null", "object"))
    numbers: set[Any] = set()
    port_names: set[Any] = set()
    for index, port in enumerate(ports):
        path = f"spec.ports[{index}]"
        if not _is_port(port.get("number")):
            causes.append(faults.invalid_value(f"{path}.number", port.get("number"), "must be 1 to 65535"))
        if port.get("targetPort") and not _is_port(port["targetPort"]):
            causes.append(faults.invalid_value(f"{path}.targetPort", port["targetPort"], "must be 1 to 65535"))
        name = port.get("name") or ""
        if message := names.label(str(name)):
            causes.append(faults.invalid_value(f"{path}.name", name, message))
        protocol = str(port.get("protocol") or "TCP")
        if protocol.upper() not in _PROTOCOLS:
            causes.append(faults.not_supported(f"{path}.protocol", protocol, _PROTOCOLS))
        for field, value, seen in (("number", port.get("number"), numbers), ("name", name, port_names)):
            if value in seen:
                causes.append(faults.duplicate(f"{path}.{field}", value))
            seen.add(value)
    return ports


def _endpoints(spec: Object, resolution: str, hosts: list[str], port_names: set[str]) -> list[Cause]:
    causes: list[Cause] = []
    endpoints = spec.get("endpoints") or []
    if resolution in ("NONE", "DYNAMIC_DNS") and endpoints:
        return [faults.forbidden("spec.endpoints", f"may not be set with the resolution {resolution}")]
    if resolution == "DYNAMIC_DNS":
        for host in hosts:
            if not host.startswith("*"):
                causes.append(faults.invalid_value("spec.hosts", host, "DYNAMIC_DNS is for wildcard hosts"))
        if spec.get("addresses"):
            causes.append(faults.forbidden("spec.addresses", "may not be set with the resolution DYNAMIC_DNS"))
    if resolution in ("DNS", "DNS_ROUND_ROBIN") and not endpoints:
        for host in hosts:
            if host.startswith("*"):
                detail = f"a wildcard host needs endpoints with the resolution {resolution}"
                causes.append(faults.invalid_value("spec.hosts", host, detail))
    if resolution == "DNS_ROUND_ROBIN" and len(endpoints) > 1:
        causes.append(faults.too_many("spec.endpoints", len(endpoints), 1))
    for index, endpoint in enumerate(endpoints):
        path = f"spec.endpoints[{index}]"
        if isinstance(endpoint, dict):
            _endpoint(endpoint, path, port_names, resolution != "STATIC", causes)
        else:
            causes.append(faults.wrong_type(path, "null", "object"))
    return causes


def _endpoint(
    endpoint: Object, path: str, port_names: set[str] | None, may_be_name: bool, causes: list[Cause]
) -> None:
    address, ports = str(endpoint.get("address") or ""), _mapping(endpoint.get("ports"))
    if address.startswith("unix://"):
        if not address.removeprefix("unix://").startswith(("/", "@")):
            causes.append(faults.invalid_value(f"{path}.address", address, "must be an absolute path"))
        if ports:
            causes.append(faults.forbidden(f"{path}.ports", "a unix endpoint has no ports"))
    elif not address:
        if not endpoint.get("network"):
            causes.append(faults.required(f"{path}.address"))
    elif not _is_address(address) and not (may_be_name and is_host(address) and not address.startswith("*")):
        kinds = "an IP address or a DNS name" if may_be_name else "an IP address"
        causes.append(faults.invalid_value(f"{path}.address", address, f"must be {kinds}"))
    for name, port in ports.items():
        if port_names is not None and name not in port_names:
            causes.append(faults.missing_reference(f"{path}.ports", name))
        if not _is_port(port):
            causes.append(faults.invalid_value(f"{path}.ports[{name}]", port, "must be 1 to 65535"))


def _export_to(values: Any, namespace: str) -> list[Cause]:
    causes: list[Cause] = []
    listed = _texts(values, "spec.exportTo", causes)
    resolved = [namespace if value == "." else value for value in listed]
    for index, value in enumerate(resolved):
        if value in resolved[:index]:
            causes.append(faults.duplicate(f"spec.exportTo[{index}]", listed[index]))
        elif value not in ("*", "~") and (message := names.label(value)):
            causes.append(faults.invalid_value(f"spec.exportTo[{index}]", value, message))
    for alone in ("*", "~"):
        if alone in resolved and len(resolved) > 1:
            causes.append(faults.invalid_value("spec.exportTo", listed, f"{alone} stands alone"))
    return causes


def _is_port(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536


def _mapping(value: Any) -> Object:
    return value if isinstance(value, dict) else {}


def _texts(values: Any, path: str, causes: list[Cause]) -> list[str]:
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        causes.append(faults.wrong_type(path, type(values).__name__, "array of strings"))
        return []
    return values
