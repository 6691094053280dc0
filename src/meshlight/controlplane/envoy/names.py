"""Names of Envoy's resources, as Istio gives them where it has a name."""

from __future__ import annotations

from dataclasses import dataclass

from meshlight.controlplane.facts import ObjectKey

WAYPOINT_LISTENER = "main"
ORIGINAL_DESTINATION = "original-destination"
BLACK_HOLE = "BlackHoleCluster"
DESTINATION_HEADER = "x-meshlight-destination"
"""Header that carries a connection's destination to the choice of its routes; never leaves the proxy."""


@dataclass(frozen=True, slots=True, order=True)
class ProxyKey:
    """All replicas of one waypoint or gateway: they are told the same."""

    namespace: str
    gateway: str

    @classmethod
    def of(cls, key: ObjectKey) -> ProxyKey:
        """The proxies of a Gateway."""
        return cls(key.namespace, key.name)


def cluster(hostname: str, port: int, subset: str = "") -> str:
    """The cluster of a service's port, or of a subset of its endpoints."""
    return f"outbound|{port}|{subset}|{hostname}"


def account_names(gateway: str) -> tuple[str, ...]:
    """The names that a Gateway's service account may have: a waypoint's, and those of gateway classes."""
    return (gateway, f"{gateway}-istio", f"cilium-gateway-{gateway}")
