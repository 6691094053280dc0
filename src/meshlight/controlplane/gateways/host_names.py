"""What names resolve to a gateway: the host names of its routes, as external-dns would publish them. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from meshlight.controlplane.envoy.gateway_proxy import ListenerState
from meshlight.controlplane.gateways.classes import GatewayClass
from meshlight.kube.resources import Object


def records(
    gateway: Object, chosen: GatewayClass, states: Iterable[ListenerState], addresses: list[str]
) -> Object | None:
    """The DNSEndpoint of a Gateway; None when it has no address or its routes no host names."""
    names = sorted({
        name for state in states if state.serves for _, hostnames in state.routes for name in hostnames
        if name != "*"
    })  # fmt: skip
    by_type: dict[str, list[str]] = {}
    for address in addresses:
        kind = "A" if ipaddress.ip_address(address).version == 4 else "AAAA"
        by_type.setdefault(kind, []).append(address)
    if not names or not by_type or chosen.is_waypoint:
        return None
    metadata = gateway["metadata"]
    endpoints = [
        {"dnsName": name, "recordType": kind, "recordTTL": 60, "targets": targets}
        for name in names
        for kind, targets in sorted(by_type.items())
    ]
    return {
        "apiVersion": "externaldns.k8s.io/v1alpha1",
        "kind": "DNSEndpoint",
        "metadata": {
            "name": f"gateway-{metadata['name']}",
            "namespace": metadata["namespace"],
            "ownerReferences": [
                {
                    "apiVersion": "gateway.networking.k8s.io/v1",
                    "kind": "Gateway",
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                }
            ],
        },
        "spec": {"endpoints": endpoints},
    }
