"""A node proxy's `/config_dump` in the form of Istio's own ztunnel, whichever of the two was asked.

Istio's tools know that form; ours is translated where it differs, so that everything after reads one. Pure.
"""

from __future__ import annotations

import datetime
from typing import Any

Dump = dict[str, Any]

_MATCHES = {
    "namespaces": "namespaces",
    "principals": "principals",
    "serviceAccounts": "serviceAccounts",
    "sourceIps": "sourceIps",
    "destinationIps": "destinationIps",
    "destinationPorts": "destinationPorts",
}


def istio_form(dump: Dump) -> Dump:
    """The dump under Istio's keys: workloads, services, policies, certificates, workloadState."""
    workloads = [_workload(workload) for workload in dump.get("workloads") or []]
    members = _members(dump.get("workloads") or [])
    return {
        **dump,
        "workloads": workloads,
        "services": [_service(service, members) for service in dump.get("services") or []],
        "policies": [_policy(policy) for policy in dump.get("policies") or []],
        "certificates": [_certificate(certificate) for certificate in dump.get("certificates") or []],
        "workloadState": dump.get("workloadState") or {},
    }


def _workload(workload: Dump) -> Dump:
    if "workloadIps" in workload:
        return workload
    tunnel = workload.get("tunnel")
    known = {
        "uid": workload["uid"],
        "workloadIps": workload.get("addresses") or [],
        "protocol": "HBONE" if tunnel == "HBONE" else "TCP",
        "status": "Healthy" if workload.get("healthy", True) else "Unhealthy",
        "clusterId": workload.get("cluster", ""),
        "authorizationPolicies": workload.get("policies") or [],
    }
    if waypoint := _gateway(workload.get("waypoint")):
        known["waypoint"] = waypoint
    if workload.get("proxyProtocolPort"):
        known["applicationTunnel"] = {"protocol": "PROXY", "port": workload["proxyProtocolPort"]}
    same = (
        "name", "namespace", "serviceAccount", "workloadName", "workloadType", "canonicalName",
        "canonicalRevision", "trustDomain", "locality", "node", "network", "hostname", "capacity",
    )  # fmt: skip
    return known | {name: workload[name] for name in same if name in workload}


def _members(workloads: list[Dump]) -> dict[str, Dump]:
    """Endpoints by service, from the workloads' own lists."""
    found: dict[str, Dump] = {}
    for workload in workloads:
        for service, ports in (workload.get("services") or {}).items():
            endpoint = {"workloadUid": workload["uid"], "service": service, "port": ports}
            found.setdefault(service, {})[workload["uid"]] = endpoint
    return found


def _service(service: Dump, members: dict[str, Dump]) -> Dump:
    if "vips" in service:
        return service
    namespace, _, hostname = service["key"].partition("/")
    known = {
        "name": service.get("name", ""),
        "namespace": namespace,
        "hostname": hostname,
        "vips": service.get("addresses") or [],
        "ports": {str(port["port"]): port["targetPort"] for port in service.get("ports") or []},
        "endpoints": members.get(service["key"], {}),
        "canonical": service.get("canonical", False),
    }
    if waypoint := _gateway(service.get("waypoint")):
        known["waypoint"] = waypoint
    if balancing := service.get("balancing"):
        known["loadBalancer"] = {
            "mode": balancing.get("mode"),
            "routingPreferences": balancing.get("preference") or [],
            "healthPolicy": "AllowAll" if balancing.get("anyHealth") else "OnlyHealthy",
        }
    return known


def _gateway(gateway: Any) -> Dump | None:
    if not gateway:
        return None
    destination = gateway.get("destination")
    if isinstance(destination, dict):  # tagged by its kind
        destination = next(iter(destination.values()), "")
    return {
        "destination": destination,
        "hboneMtlsPort": gateway.get("hbonePort") or gateway.get("hboneMtlsPort"),
    }


def _policy(policy: Dump) -> Dump:
    return {**policy, "rules": [[[_match(m) for m in c] for c in rule] for rule in policy.get("rules") or []]}


def _match(match: Dump) -> Dump:
    if not all(isinstance(value, dict) and "any" in value for value in match.values()):
        return match
    flat: Dump = {}
    for ours, name in _MATCHES.items():
        values = match.get(ours) or {}
        if values.get("any"):
            flat[name] = [_value(value) for value in values["any"]]
        if values.get("none"):
            flat["not" + name[0].upper() + name[1:]] = [_value(value) for value in values["none"]]
    return flat


def _value(value: Any) -> Any:
    if value == "Presence":
        return {"Presence": {}}
    if isinstance(value, dict) and set(value) == {"namespace", "name"}:
        return {"namespace": value["namespace"], "serviceAccount": value["name"]}
    return value


def _certificate(certificate: Dump) -> Dump:
    if "certChain" in certificate:
        return certificate
    known: Dump = {"identity": certificate["identity"], "state": certificate["state"], "certChain": []}
    if certificate.get("error"):
        known["state"] = f"Unavailable: {certificate['error']}"
    if certificate.get("serial"):
        known["certChain"] = [
            {
                "serialNumber": str(int(certificate["serial"], 16)),
                "validFrom": _time(certificate.get("not_before")),
                "expirationTime": _time(certificate.get("not_after")),
            }
        ]
    return known


def _time(unix: int | None) -> str:
    if unix is None:
        return ""
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).isoformat().replace("+00:00", "Z")
