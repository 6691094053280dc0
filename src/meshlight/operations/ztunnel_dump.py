"""A node proxy's `/config_dump`: Istio's form, which ours has too but for the rules of policies. Pure."""

from __future__ import annotations

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
    """The dump with its policies' matches as Istio's ztunnel writes them; what is so already stays."""
    return {**dump, "policies": [_policy(policy) for policy in dump.get("policies") or []]}


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
