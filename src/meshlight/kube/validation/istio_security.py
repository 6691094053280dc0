"""What Istio's validating webhook refuses of AuthorizationPolicies and PeerAuthentications, refused here.

The rules are those of `pkg/config/validation` of istio/istio; each names the field it is about. Warnings
are what Istio stores all the same but tells its author. Pure.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from meshlight.kube import field_errors as faults
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause

DRY_RUN = "istio.io/dry-run"
_BOOLEANS = {"1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"}
_TARGETS = {("", "Service"), ("core", "Service"), ("networking.istio.io", "ServiceEntry"),
            ("gateway.networking.k8s.io", "Gateway"),
            ("gateway.networking.k8s.io", "GatewayClass")}  # fmt: skip
_SOURCE_IDENTITIES = ("principals", "notPrincipals", "namespaces", "notNamespaces")
_SOURCE_ACCOUNTS = ("serviceAccounts", "notServiceAccounts")
_SOURCE_BLOCKS = ("ipBlocks", "notIpBlocks", "remoteIpBlocks", "notRemoteIpBlocks")
_SOURCE_OTHERS = ("requestPrincipals", "notRequestPrincipals", "trustDomains", "notTrustDomains")
_SOURCE = (*_SOURCE_IDENTITIES, *_SOURCE_ACCOUNTS, *_SOURCE_BLOCKS, *_SOURCE_OTHERS)
_TCP_SOURCE = (*_SOURCE_IDENTITIES, *_SOURCE_ACCOUNTS, *_SOURCE_BLOCKS)
_TCP_OPERATION = ("ports", "notPorts")
_OPERATION = (*_TCP_OPERATION, "methods", "notMethods", "paths", "notPaths", "hosts", "notHosts")
_NOT_CUSTOM = {*_SOURCE_IDENTITIES, *_SOURCE_ACCOUNTS, *_SOURCE_OTHERS}
_NOT_CUSTOM_KEYS = ("source.namespace", "source.serviceAccount", "source.trustDomain", "source.principal")
_KEYS = {"source.namespace", "source.principal", "source.trustDomain", "request.auth.principal",
         "request.auth.audiences", "request.auth.presenter", "connection.sni"}  # fmt: skip
_BLOCK_KEYS = {"source.ip", "remote.ip", "destination.ip"}
_MAP_KEYS = ("request.headers", "request.auth.claims", "experimental.envoy.filters.")
_REPLACED = {
    "destination.namespace": "is replaced by metadata.namespace",
    "destination.name": "is of v1alpha1; use the selector",
    "destination.user": "is of v1alpha1; use the selector",
}
_MAP_KEY = re.compile(r"[^\[]+\[.+\]")
_TEMPLATES = ("{*}", "{**}")
_LITERAL = re.compile(r"[a-zA-Z0-9\-._~%!$&'()+,;:@=]+")


def authorization_policy(obj: Object) -> list[Cause]:
    """Faults of an AuthorizationPolicy."""
    spec = _mapping(obj.get("spec"))
    action = spec.get("action") or "ALLOW"
    causes = _dry_run(obj, action) + selection(spec)
    provider = _mapping(spec.get("provider"))
    rules = spec.get("rules")
    if rules is None and action in ("DENY", "CUSTOM"):
        detail = f"{action} without rules can never match; use an empty rule, {{}}, to match every request"
        causes.append(faults.required("spec.rules", detail))
    elif action == "CUSTOM" and not provider.get("name"):
        causes.append(faults.required("spec.provider.name", "CUSTOM needs an extension provider"))
    if provider and action != "CUSTOM":
        causes.append(faults.forbidden("spec.provider", f"only of the action CUSTOM, not {action}"))
    for path, rule in _elements(rules, "spec.rules", causes):
        causes += _rule(rule, path, action)
    return causes


def authorization_policy_warnings(obj: Object) -> list[str]:
    """What is stored but probably not meant."""
    spec = _mapping(obj.get("spec"))
    found = selection_warnings(spec)
    if spec.get("action") != "DENY":
        return found
    for index, rule in enumerate(r for r in spec.get("rules") or [] if isinstance(r, dict)):
        sources = [_mapping(_mapping(entry).get("source")) for entry in rule.get("from") or []]
        operations = [_mapping(_mapping(entry).get("operation")) for entry in rule.get("to") or []]
        tcp_from = any(name in source for source in sources for name in _TCP_SOURCE)
        tcp_to = any(name in operation for operation in operations for name in _TCP_OPERATION)
        if (sources and not operations and not tcp_from) or (operations and not tcp_to):
            found.append(
                f"spec.rules[{index}]: a DENY by HTTP attributes alone denies all traffic of TCP ports in its "
                "scope; name the ports"
            )
    return found


def peer_authentication(obj: Object) -> list[Cause]:
    """Faults of a PeerAuthentication."""
    spec = _mapping(obj.get("spec"))
    causes = _no_dry_run(obj) + selection(spec)
    ports = spec.get("portLevelMtls")
    if ports is not None:
        if not ports:
            causes.append(faults.required("spec.portLevelMtls", "must have at least one port where it is set"))
        elif not _mapping(spec.get("selector")).get("matchLabels"):
            detail = "needs spec.selector: a whole mesh or namespace has no ports"
            causes.append(faults.forbidden("spec.portLevelMtls", detail))
        for port in _mapping(ports):
            if not str(port).isdigit() or not 0 < int(port) < 65536:
                causes.append(faults.invalid_value("spec.portLevelMtls", port, "must be in the range 1..65535"))
    return causes


def peer_authentication_warnings(obj: Object) -> list[str]:
    """What is stored but probably not meant."""
    return selection_warnings(_mapping(obj.get("spec")))


def selection(spec: Object) -> list[Cause]:
    """Faults of `selector`, `targetRef` and `targetRefs`, as several kinds have them."""
    causes: list[Cause] = []
    selector, refs = spec.get("selector"), spec.get("targetRefs") or []
    given = [selector is not None, spec.get("targetRef") is not None, bool(refs)]
    if sum(given) > 1:
        causes.append(faults.forbidden("spec.targetRefs", "only one of targetRefs and selector may be set"))
    for name, value in _mapping(_mapping(selector).get("matchLabels")).items():
        if not name:
            causes.append(faults.invalid_value("spec.selector.matchLabels", name, "a label has a name"))
        if "*" in name or "*" in str(value):
            pair = f"{name}={value}"
            causes.append(
                faults.invalid_value("spec.selector.matchLabels", pair, "wildcards are not supported")
            )
    listed = list(_elements(refs, "spec.targetRefs", causes))
    if spec.get("targetRef") is not None:
        listed.append(("spec.targetRef", _mapping(spec["targetRef"])))
    for path, ref in listed:
        causes += _target(ref, path)
    return causes


def selection_warnings(spec: Object) -> list[str]:
    """What is stored but probably not meant of a selector."""
    selector = spec.get("selector")
    if selector is not None and not _mapping(selector).get("matchLabels"):
        return ["spec.selector: without labels, it selects every workload of the namespace"]
    return []


def _target(ref: Object, path: str) -> list[Cause]:
    causes = []
    if not ref.get("name"):
        causes.append(faults.required(f"{path}.name"))
    if ref.get("namespace"):
        causes.append(faults.forbidden(f"{path}.namespace", "targets are of the policy's own namespace"))
    if (ref.get("group") or "", ref.get("kind") or "") not in _TARGETS:
        supported = sorted({kind for _, kind in _TARGETS})
        causes.append(faults.not_supported(f"{path}.kind", ref.get("kind") or "", supported))
    return causes


def _dry_run(obj: Object, action: str) -> list[Cause]:
    value = (obj["metadata"].get("annotations") or {}).get(DRY_RUN)
    field = f"metadata.annotations[{DRY_RUN}]"
    if value is None:
        return []
    if action not in ("ALLOW", "DENY"):
        return [faults.forbidden(field, f"supported for ALLOW and DENY, not {action}")]
    if value not in _BOOLEANS:
        return [faults.invalid_value(field, value, "must be true or false")]
    return []


def _no_dry_run(obj: Object) -> list[Cause]:
    if DRY_RUN in (obj["metadata"].get("annotations") or {}):
        return [faults.forbidden(f"metadata.annotations[{DRY_RUN}]", "only AuthorizationPolicies support it")]
    return []


def _rule(rule: Object, path: str, action: str) -> list[Cause]:
    causes: list[Cause] = []
    for side, inner, names, check in (
        ("from", "source", _SOURCE, _source),
        ("to", "operation", _OPERATION, _operation),
    ):
        if rule.get(side) is not None and not rule[side]:
            causes.append(faults.required(f"{path}.{side}", "must not be empty where it is set"))
        for at, entry in _elements(rule.get(side), f"{path}.{side}", causes):
            part, where = entry.get(inner), f"{at}.{inner}"
            if not isinstance(part, dict) or not any(part.get(name) for name in names):
                causes.append(faults.required(where, "must not be empty"))
                continue
            for name in names:
                causes += _texts(part.get(name), f"{where}.{name}")
                if action == "CUSTOM" and part.get(name) and name in _NOT_CUSTOM:
                    causes.append(faults.forbidden(f"{where}.{name}", "not supported with the action CUSTOM"))
            causes += check(part, where)
    for at, condition in _elements(rule.get("when"), f"{path}.when", causes):
        causes += _condition(condition, at, action)
    return causes


def _source(source: Object, path: str) -> list[Cause]:
    causes: list[Cause] = []
    accounts = [name for name in _SOURCE_ACCOUNTS if source.get(name)]
    if accounts and any(source.get(name) for name in _SOURCE_IDENTITIES):
        detail = "may not be set beside principals or namespaces"
        causes.append(faults.forbidden(f"{path}.{accounts[0]}", detail))
    for name in accounts:
        causes += _accounts(source[name], f"{path}.{name}")
    for name in _SOURCE_BLOCKS:
        causes += _blocks(source.get(name), f"{path}.{name}")
    for name in ("trustDomains", "notTrustDomains"):
        for value in source.get(name) or []:
            if "/" in str(value) or not _one_wildcard(str(value)):
                detail = "a trust domain with at most one * at its start or end"
                causes.append(faults.invalid_value(f"{path}.{name}", value, detail))
    return causes


def _operation(operation: Object, path: str) -> list[Cause]:
    causes: list[Cause] = []
    for name in _TCP_OPERATION:
        causes += _ports(operation.get(name), f"{path}.{name}")
    for name in ("paths", "notPaths"):
        for value in operation.get(name) or []:
            if message := _template_fault(str(value)):
                causes.append(faults.invalid_value(f"{path}.{name}", value, message))
    return causes


def _condition(condition: Object, path: str, action: str) -> list[Cause]:
    key, causes = condition.get("key") or "", []
    if not key:
        return [faults.required(f"{path}.key")]
    if not condition.get("values") and not condition.get("notValues"):
        causes.append(faults.required(f"{path}.values", "at least one of values and notValues"))
    if action == "CUSTOM" and (key in _NOT_CUSTOM_KEYS or key.startswith("request.auth.")):
        causes.append(faults.forbidden(f"{path}.key", f"{key} is not supported with the action CUSTOM"))
    if key in _REPLACED:
        causes.append(faults.invalid_value(f"{path}.key", key, _REPLACED[key]))
    elif key.startswith("destination.labels"):
        causes.append(faults.invalid_value(f"{path}.key", key, "is replaced by spec.selector"))
    elif key.startswith(_MAP_KEYS):
        if not _MAP_KEY.fullmatch(key):
            causes.append(faults.invalid_value(f"{path}.key", key, "must have the form NAME[KEY]"))
    elif key not in _KEYS | _BLOCK_KEYS | {"destination.port", "source.serviceAccount"}:
        causes.append(faults.invalid_value(f"{path}.key", key, "is no attribute that Istio knows"))
    for name in ("values", "notValues"):
        values, where = condition.get(name), f"{path}.{name}"
        causes += _texts(values, where)
        if key in _BLOCK_KEYS:
            causes += _blocks(values, where)
        elif key == "destination.port":
            causes += _ports(values, where)
        elif key == "source.serviceAccount":
            causes += _accounts(values or [], where)
    return causes


def _texts(values: Any, path: str) -> list[Cause]:
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return [faults.wrong_type(path, type(values).__name__, "array of strings")]
    return [faults.invalid_value(path, "", "empty values are not allowed")] if "" in values else []


def _accounts(values: list[Any], path: str) -> list[Cause]:
    causes = []
    if len(values) > 16:
        causes.append(faults.too_many(path, len(values), 16))
    for value in values:
        parts = str(value).split("/")
        if "*" in str(value) or len(parts) > 2 or not all(parts) or len(str(value)) > 320:
            detail = "must be SERVICE-ACCOUNT or NAMESPACE/SERVICE-ACCOUNT, without wildcards"
            causes.append(faults.invalid_value(path, value, detail))
    return causes


def _blocks(values: Any, path: str) -> list[Cause]:
    causes = []
    for value in values or []:
        try:
            ipaddress.ip_network(str(value), strict=False)
        except ValueError:
            causes.append(faults.invalid_value(path, value, "must be an IP address or a CIDR block"))
    return causes


def _ports(values: Any, path: str) -> list[Cause]:
    return [
        faults.invalid_value(path, value, "must be a port number, 1 to 65535")
        for value in values or []
        if not str(value).isdigit() or not 0 < int(value) < 65536
    ]


def _one_wildcard(value: str) -> bool:
    return bool(value) and "*" not in value[1:-1] and value != "**"


def _template_fault(path: str) -> str:
    """What is wrong with a path that may hold `{*}` for a segment and a last `{**}` for the rest."""
    segments, any_seen = path.strip("/").split("/"), False
    for segment in segments:
        if any_seen:
            return "{**} must be the last segment"
        if segment in _TEMPLATES:
            any_seen = segment == "{**}"
        elif "{" in segment or "}" in segment:
            return "braces only as {*} and {**}, each a whole segment"
        elif any(t in path for t in _TEMPLATES) and not _LITERAL.fullmatch(segment):
            return f"{segment!r} is no literal segment beside {{*}} and {{**}}"
    return ""


def _mapping(value: Any) -> Object:
    return value if isinstance(value, dict) else {}


def _elements(values: Any, path: str, causes: list[Cause]) -> Iterator[tuple[str, Object]]:
    """Members of a list of objects with their paths; what has another type is reported."""
    if values is None:
        return
    if not isinstance(values, list):
        causes.append(faults.wrong_type(path, type(values).__name__, "array"))
        return
    for index, value in enumerate(values):
        if isinstance(value, dict):
            yield f"{path}[{index}]", value
        else:
            found = "null" if value is None else type(value).__name__
            causes.append(faults.wrong_type(f"{path}[{index}]", found, "object"))
