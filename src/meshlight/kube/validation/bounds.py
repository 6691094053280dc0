"""Rules of what bounds others: priorities, quotas, limit ranges, network policies."""

from __future__ import annotations

import ipaddress

from meshlight.kube import field_errors as faults
from meshlight.kube import quantity
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause
from meshlight.kube.validation import names, pods

HIGHEST_USER_PRIORITY = 1_000_000_000
_SYSTEM = {"system-cluster-critical": 2_000_000_000, "system-node-critical": 2_000_001_000}


def priority_class(obj: Object) -> list[Cause]:
    """Faults of a PriorityClass."""
    name, value = obj["metadata"].get("name") or "", obj.get("value", 0)
    if name.startswith("system-"):
        if _SYSTEM.get(name) != value:
            detail = "priority class names with 'system-' prefix are reserved for system use only"
            return [faults.forbidden("metadata.name", f"{detail}. error: {name} is not a known system class")]
    elif value > HIGHEST_USER_PRIORITY:
        detail = f"maximum allowed value of a user defined priority is {HIGHEST_USER_PRIORITY}"
        return [faults.forbidden("value", detail)]
    return []


def priority_class_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change: the value stays."""
    return [
        faults.forbidden(field, "may not be changed in an update.")
        for field in ("value", "preemptionPolicy")
        if old.get(field) != new.get(field)
    ]  # fmt: skip


def resource_quota(obj: Object) -> list[Cause]:
    """Faults of a ResourceQuota."""
    hard = (obj.get("spec") or {}).get("hard") or {}
    return [
        faults.invalid_value(f"spec.hard[{name}]", value, "must be greater than or equal to 0")
        for name, value in hard.items()
        if quantity.value(value) < 0
    ]


def limit_range(obj: Object) -> list[Cause]:
    """Faults of a LimitRange: its bounds are in order."""
    causes: list[Cause] = []
    seen: set[str] = set()
    for index, item in enumerate((obj.get("spec") or {}).get("limits") or ()):
        at, kind = f"spec.limits[{index}]", item.get("type") or ""
        if kind in seen:
            causes.append(faults.duplicate(f"{at}.type", kind))
        seen.add(kind)
        for field in ("default", "defaultRequest"):
            if kind == "Pod" and item.get(field):
                causes.append(faults.forbidden(f"{at}.{field}", "may not be specified when `type` is 'Pod'"))
        for lower, upper in (
            ("min", "max"),
            ("min", "default"),
            ("defaultRequest", "default"),
            ("default", "max"),
        ):
            least, most = item.get(lower) or {}, item.get(upper) or {}
            for name in least.keys() & most.keys():
                if quantity.value(least[name]) > quantity.value(most[name]):
                    detail = f"{lower} value {least[name]} is greater than {upper} value {most[name]}"
                    causes.append(faults.invalid_value(f"{at}.{lower}[{name}]", least[name], detail))
    return causes


def network_policy(obj: Object) -> list[Cause]:
    """Faults of a NetworkPolicy."""
    spec = obj.get("spec") or {}
    causes = names.selector(spec.get("podSelector"), "spec.podSelector")
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(spec.get(direction) or ()):
            at = f"spec.{direction}[{index}]"
            for number, peer in enumerate(rule.get(peers) or ()):
                causes += _peer(peer, f"{at}.{peers}[{number}]")
            for number, port in enumerate(rule.get("ports") or ()):
                causes += _port(port, f"{at}.ports[{number}]")
    for index, kind in enumerate(spec.get("policyTypes") or ()):
        if kind not in ("Ingress", "Egress"):
            causes.append(faults.not_supported(f"spec.policyTypes[{index}]", kind, ["Egress", "Ingress"]))
    return causes


def _peer(peer: Object, at: str) -> list[Cause]:
    causes = names.selector(peer.get("podSelector"), f"{at}.podSelector")
    causes += names.selector(peer.get("namespaceSelector"), f"{at}.namespaceSelector")
    block = peer.get("ipBlock")
    if block is None:
        return causes or ([] if peer else [faults.required(at, "must specify a peer")])
    if len(peer) > 1:
        causes.append(faults.forbidden(at, "may not specify both ipBlock and another peer"))
    try:
        network = ipaddress.ip_network(block.get("cidr") or "", strict=False)
    except ValueError:
        detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
        return [*causes, faults.invalid_value(f"{at}.ipBlock.cidr", block.get("cidr") or "", detail)]
    for index, text in enumerate(block.get("except") or ()):
        path = f"{at}.ipBlock.except[{index}]"
        try:
            hole = ipaddress.ip_network(text, strict=False)
        except ValueError:
            causes.append(faults.invalid_value(path, text, "must be a valid CIDR value"))
            continue
        if hole.version != network.version or not hole.subnet_of(network) or hole == network:  # type: ignore[arg-type]
            causes.append(
                faults.invalid_value(path, text, f'must be a strict subset of `cidr`: "{block["cidr"]}"')
            )
    return causes


def _port(port: Object, at: str) -> list[Cause]:
    if "port" not in port:
        return [faults.forbidden(f"{at}.endPort", "may not be specified when `port` is not specified")] * (
            "endPort" in port
        )
    causes = pods.port_reference(f"{at}.port", port["port"])
    end = port.get("endPort")
    if end is not None and isinstance(port["port"], str):
        causes.append(faults.forbidden(f"{at}.endPort", "may not be specified when `port` is non-numeric"))
    elif end is not None and end < port["port"]:
        causes.append(faults.invalid_value(f"{at}.endPort", end, "must be greater than or equal to `port`"))
    return causes
