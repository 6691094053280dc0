"""What one proxy tells of its traffic, compiled: loggers, tracer, and the clusters that they need. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from meshlight.controlplane.envoy import clusters, telemetry, wire
from meshlight.controlplane.envoy.backends import published
from meshlight.controlplane.envoy.gateway_api import Gateway
from meshlight.controlplane.envoy.telemetry_settings import Reporter, TelemetrySettings
from meshlight.controlplane.gateways.classes import CLASSES
from meshlight.controlplane.resources import Published
from meshlight.controlplane.settings import Mesh


@dataclass(slots=True)
class Told:
    """The telemetry part of a proxy's configuration."""

    access_logs: list[Any] = field(default_factory=list)
    connection_logs: list[Any] = field(default_factory=list)
    tracing: Any = None
    clusters: list[Published] = field(default_factory=list)


def compile_told(mesh: Mesh, settings: TelemetrySettings, reporter: Reporter) -> Told:
    """Everything that a proxy tells."""
    host, port = telemetry.FLOW_COLLECTOR
    needed = [clusters.by_name(telemetry.FLOW_CLUSTER, f"{host}.{mesh.cluster_domain}", port, http2=True)]
    tracing = telemetry.tracing(settings, reporter)
    if tracing is not None:
        needed.append(_zipkin(mesh, settings.zipkin))
    return Told(
        telemetry.access_logs(settings, reporter),
        telemetry.connection_logs(settings, reporter),
        tracing,
        [published(wire.CLUSTER_TYPE, cluster) for cluster in needed],
    )


def _zipkin(mesh: Mesh, address: str) -> Any:
    """The collector; a Service's short name (`NAME.NAMESPACE`) is completed, for Envoy has no search path."""
    host, _, port = address.rpartition(":")
    if host.count(".") == 1:
        host = mesh.hostname(*host.split("."))
    elif host.endswith(".svc"):
        host = f"{host}.{mesh.cluster_domain}"
    return clusters.by_name(telemetry.ZIPKIN_CLUSTER, host, int(port), http2=False)


def reporter_of(mesh: Mesh, gateway: Gateway) -> Reporter:
    """Who a gateway's proxies are to those who read what they tell."""
    key, chosen = gateway.key, CLASSES.get(gateway.gateway_class)
    name = chosen.deployed_name(key.name) if chosen else key.name
    if chosen is None or chosen.is_waypoint:
        return Reporter("waypoint", "waypoint", name, key.namespace, mesh.cluster_id, "mutual_tls")
    own = {
        "workload": name,
        "namespace": key.namespace,
        "canonical_service": name,
        "canonical_revision": "latest",
        "principal": f"spiffe://{mesh.trust_domain}/ns/{key.namespace}/sa/{name}",
        "app": name,
        "version": "latest",
        "cluster": mesh.cluster_id,
    }
    return Reporter("source", "gateway", name, key.namespace, mesh.cluster_id, "unknown", own)
