"""Envoy's flow records brought to the form of docs/reference/flow-records.md. Pure.

Envoy's OpenTelemetry access logger writes texts only, `-` for what it does not know, and the event's name as an
attribute; of a refusal it knows the RBAC rule, whose name has the policy in it.
"""

from __future__ import annotations

import re

from meshlight.tracing.model import Attributes, Value

EVENT = "mesh.flow"
_NUMBERS = {
    "source.port", "destination.port", "duration_ns", "bytes_sent", "bytes_received",
    "http.response.status_code", "rpc.grpc.status_code", "upstream.attempts",
}  # fmt: skip
_RULE = re.compile(r"ns\[([^\]]+)\]-policy\[([^\]]+)\]-rule\[(\d+)\]")
_IDENTITY = re.compile(r"spiffe://[^/]+/ns/([^/]+)/sa/([^/]+)")
_SERVICE = re.compile(r"([^.]+)\.([^.]+)\.svc\..+")


def is_flow(attributes: Attributes) -> bool:
    """Whether a log record without an event name is a flow record as Envoy writes it."""
    return attributes.get("event.name") == EVENT


def normal(attributes: Attributes) -> Attributes:
    """The record's attributes: numbers as numbers, nothing for what is not known, the policy by its name.

    Where Envoy does not know a workload, its identity tells the namespace and the account, and a request that
    was refused before an endpoint was chosen has the namespace of the service that it was for.
    """
    known: dict[str, Value] = {}
    for name, value in attributes.items():
        text = str(value)
        if name == "event.name" or text in ("", "-") or text.startswith("%ENVIRONMENT("):
            continue
        if name in _NUMBERS:
            if text.lstrip("-").isdigit():
                known[name] = int(text)
            continue
        known[name] = value
    if isinstance(address := known.get("source.address"), str) and address.count(":") == 1:
        known["source.address"] = address.partition(":")[0]
    details = str(known.pop("policy.details", ""))
    if found := _RULE.search(details):
        known["policy.name"] = f"{found[1]}/{found[2]}"
    elif "rbac" in details or "ext_authz" in details:
        known["error"] = details
    for side in ("source", "destination"):
        if found := _IDENTITY.match(str(known.get(f"{side}.principal", ""))):
            known.setdefault(f"{side}.namespace", found[1])
            known.setdefault(f"{side}.workload", found[2])
    if found := _SERVICE.fullmatch(str(known.get("destination.service", ""))):
        known.setdefault("destination.workload", found[1])
        known.setdefault("destination.namespace", found[2])
    return known
