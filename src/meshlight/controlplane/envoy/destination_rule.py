"""DestinationRule: how to reach a service, laid over its clusters. Pure.

Settings are looked up per port and subset, the most particular winning field by field as in Istio: the
subset's `portLevelSettings`, the subset's `trafficPolicy`, the rule's `portLevelSettings`, the rule's
`trafficPolicy`. What a DestinationRule does not say stays as the cluster had it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2
from envoy.config.core.v3 import base_pb2, protocol_pb2
from envoy.config.route.v3 import route_components_pb2 as route
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, secret_pb2, tls_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2 as http
from envoy.type.matcher.v3 import string_pb2

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.settings import Mesh
from meshlight.kube.resources import Object

HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_FIELDS = ("connectionPool", "loadBalancer", "outlierDetection", "tls", "proxyProtocol")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 1e-6, "ns": 1e-9}
Locality = tuple[str, str, str]
"""Region, zone and subzone."""


def seconds(text: object, default: float = 0.0) -> float:
    """Seconds of a Go duration, as protobuf writes them in Istio's objects; `default` when absent."""
    found = re.findall(r"(\d+(?:\.\d+)?)(ms|us|ns|h|m|s)", str(text or ""))
    return sum(float(number) * _UNITS[unit] for number, unit in found) if found else default


@dataclass(frozen=True, slots=True)
class Subset:
    """A named share of a service's endpoints: those whose pods have all of the labels."""

    name: str
    labels: tuple[tuple[str, str], ...]
    policy: Object

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether a pod of these labels belongs to it."""
        return all(labels.get(key) == value for key, value in self.labels)


@dataclass(frozen=True, slots=True)
class DestinationRule:
    """One DestinationRule read; `host` is a full host name, or a wildcard such as `*.example.com`."""

    key: ObjectKey
    created: str
    host: str
    policy: Object
    subsets: tuple[Subset, ...]
    export_to: tuple[str, ...]

    def subset(self, name: str) -> Subset | None:
        """A subset by name."""
        return next((subset for subset in self.subsets if subset.name == name), None)

    def visible_in(self, namespace: str) -> bool:
        """Whether `exportTo` lets a namespace see it."""
        if not self.export_to or "*" in self.export_to or namespace in self.export_to:
            return True
        return "." in self.export_to and namespace == self.key.namespace

    def settings(self, port: int, subset: str = "") -> Object:
        """What is said about a port, of a subset or of the whole."""
        chosen = self.subset(subset)
        layers = [self.policy, *([chosen.policy] if chosen else [])]
        merged: Object = {}
        for layer in layers:
            for settings in (layer, _of_port(layer, port)):
                merged.update({name: settings[name] for name in _FIELDS if settings.get(name) is not None})
        return merged


def _of_port(policy: Object, port: int) -> Object:
    for settings in policy.get("portLevelSettings") or []:
        if (settings.get("port") or {}).get("number") == port:
            found: Object = settings
            return found
    return {}


def parse(mesh: Mesh, obj: Object) -> DestinationRule | None:
    """Read a DestinationRule; None for one with a workloadSelector, which is for sidecars alone."""
    spec, metadata = obj.get("spec") or {}, obj["metadata"]
    if spec.get("workloadSelector"):
        return None
    subsets = tuple(
        Subset(
            entry.get("name") or "",
            tuple(sorted((entry.get("labels") or {}).items())),
            entry.get("trafficPolicy") or {},
        )
        for entry in spec.get("subsets") or []
    )
    return DestinationRule(
        key=ObjectKey.of(obj),
        created=metadata.get("creationTimestamp", ""),
        host=full_host(mesh, str(spec.get("host") or ""), metadata["namespace"]),
        policy=spec.get("trafficPolicy") or {},
        subsets=subsets,
        export_to=tuple(spec.get("exportTo") or ()),
    )


def full_host(mesh: Mesh, host: str, namespace: str) -> str:
    """A short name means a Service of the object's own namespace, as Istio completes it."""
    return mesh.hostname(host, namespace) if host and "." not in host and host != "*" else host


def covers(host: str, name: str) -> bool:
    """Whether a rule's host, which may be a wildcard, means a host name."""
    return host == name or host == "*" or (host.startswith("*") and name.endswith(host[1:]))


# Laying settings over a cluster.


def apply(cluster: Any, settings: Object, locality: Locality = ("", "", "")) -> None:
    """Change a cluster as `settings` (of `DestinationRule.settings`) say. `locality` is the proxy's own."""
    _connections(cluster, settings.get("connectionPool") or {})
    if balancer := settings.get("loadBalancer"):
        _balancer(cluster, balancer)
    if (detection := settings.get("outlierDetection")) is not None:
        _outliers(cluster, detection)
    if tls := settings.get("tls"):
        _tls(cluster, tls)


def _connections(cluster: Any, pool: Object) -> None:
    tcp, web = pool.get("tcp") or {}, pool.get("http") or {}
    if timeout := seconds(tcp.get("connectTimeout")):
        cluster.connect_timeout.CopyFrom(wire.seconds(timeout))
    if keepalive := tcp.get("tcpKeepalive"):
        target = cluster.upstream_connection_options.tcp_keepalive
        for name, into in (
            ("probes", "keepalive_probes"),
            ("time", "keepalive_time"),
            ("interval", "keepalive_interval"),
        ):
            if value := keepalive.get(name):
                number = int(value) if name == "probes" else round(seconds(value))
                getattr(target, into).value = number
        cluster.upstream_connection_options.SetInParent()
        target.SetInParent()
    limits = {
        "max_connections": tcp.get("maxConnections"),
        "max_pending_requests": web.get("http1MaxPendingRequests"),
        "max_requests": web.get("http2MaxRequests"),
        "max_retries": web.get("maxRetries"),
    }
    if any(limits.values()):
        if not cluster.circuit_breakers.thresholds:
            cluster.circuit_breakers.thresholds.append(circuit_breaker_pb2.CircuitBreakers.Thresholds())
        for name, value in limits.items():
            if value:
                getattr(cluster.circuit_breakers.thresholds[0], name).value = int(value)
    _http(cluster, tcp, web)


def _http(cluster: Any, tcp: Object, web: Object) -> None:
    common = protocol_pb2.HttpProtocolOptions()
    if requests := web.get("maxRequestsPerConnection"):
        common.max_requests_per_connection.value = int(requests)
    if idle := seconds(web.get("idleTimeout")) or seconds(tcp.get("idleTimeout")):
        common.idle_timeout.CopyFrom(wire.seconds(idle))
    if lifetime := seconds(tcp.get("maxConnectionDuration")):
        common.max_connection_duration.CopyFrom(wire.seconds(lifetime))
    upgrade = web.get("h2UpgradePolicy") == "UPGRADE"
    streams, as_client = web.get("maxConcurrentStreams"), bool(web.get("useClientProtocol"))
    if not (common.ByteSize() or upgrade or streams or as_client):
        return
    options = http.HttpProtocolOptions()
    cluster.typed_extension_protocol_options[HTTP_OPTIONS].Unpack(options)
    if common.ByteSize():
        options.common_http_protocol_options.MergeFrom(common)
    if as_client:
        options.use_downstream_protocol_config.http_protocol_options.SetInParent()
        options.use_downstream_protocol_config.http2_protocol_options.SetInParent()
    elif upgrade:
        options.explicit_http_config.http2_protocol_options.SetInParent()
    if streams:
        for kind in ("explicit_http_config", "use_downstream_protocol_config"):
            if options.HasField(kind) and getattr(options, kind).HasField("http2_protocol_options"):
                getattr(options, kind).http2_protocol_options.max_concurrent_streams.value = int(streams)
    if not options.WhichOneof("upstream_protocol_options"):
        options.explicit_http_config.http_protocol_options.SetInParent()
    cluster.typed_extension_protocol_options[HTTP_OPTIONS].CopyFrom(wire.packed(options))


_POLICIES = {
    "ROUND_ROBIN": cluster_pb2.Cluster.ROUND_ROBIN,
    "LEAST_REQUEST": cluster_pb2.Cluster.LEAST_REQUEST,
    "LEAST_CONN": cluster_pb2.Cluster.LEAST_REQUEST,
    "RANDOM": cluster_pb2.Cluster.RANDOM,
}


def _balancer(cluster: Any, balancer: Object) -> None:
    simple, hashing = balancer.get("simple"), balancer.get("consistentHash")
    if simple == "PASSTHROUGH":
        cluster.lb_policy = cluster_pb2.Cluster.CLUSTER_PROVIDED
        cluster.type = cluster_pb2.Cluster.ORIGINAL_DST
        cluster.ClearField("eds_cluster_config")
        return
    if hashing:
        if (maglev := hashing.get("maglev")) is not None:
            cluster.lb_policy = cluster_pb2.Cluster.MAGLEV
            if size := maglev.get("tableSize"):
                cluster.maglev_lb_config.table_size.value = int(size)
        else:
            cluster.lb_policy = cluster_pb2.Cluster.RING_HASH
            ring = hashing.get("ringHash") or hashing
            cluster.ring_hash_lb_config.minimum_ring_size.value = int(ring.get("minimumRingSize") or 1024)
    elif simple in _POLICIES:
        cluster.lb_policy = _POLICIES[simple]
    warmup = balancer.get("warmup") or {}
    window = seconds(warmup.get("duration") or balancer.get("warmupDurationSecs"))
    if window and cluster.lb_policy in (cluster_pb2.Cluster.ROUND_ROBIN, cluster_pb2.Cluster.LEAST_REQUEST):
        config = (
            cluster.round_robin_lb_config
            if cluster.lb_policy == cluster_pb2.Cluster.ROUND_ROBIN
            else cluster.least_request_lb_config
        )
        slow = config.slow_start_config
        slow.slow_start_window.CopyFrom(wire.seconds(window))
        slow.min_weight_percent.value = float(warmup.get("minimumPercent") or 10)
        if aggression := warmup.get("aggression"):
            slow.aggression.default_value = float(aggression)
            slow.aggression.runtime_key = "slow_start_aggression"
    locality = balancer.get("localityLbSetting") or {}
    if locality.get("enabled", True) and (locality.get("distribute") or locality.get("failover")):
        cluster.common_lb_config.locality_weighted_lb_config.SetInParent()


def _outliers(cluster: Any, detection: Object) -> None:
    target = cluster.outlier_detection
    target.SetInParent()
    # Istio's own defaults: only what is asked for ejects.
    gateway = detection.get("consecutiveGatewayErrors")
    errors = detection.get("consecutive5xxErrors", detection.get("consecutiveErrors"))
    if gateway:
        target.consecutive_gateway_failure.value = int(gateway)
        target.enforcing_consecutive_gateway_failure.value = 100
        target.enforcing_consecutive_5xx.value = 0
    if errors is not None:
        target.consecutive_5xx.value = int(errors) or 5
        target.enforcing_consecutive_5xx.value = 100 if int(errors) else 0
    target.enforcing_success_rate.value = 0
    if interval := seconds(detection.get("interval")):
        target.interval.CopyFrom(wire.seconds(interval))
    if ejection := seconds(detection.get("baseEjectionTime")):
        target.base_ejection_time.CopyFrom(wire.seconds(ejection))
    if percent := detection.get("maxEjectionPercent"):
        target.max_ejection_percent.value = int(percent)
    if detection.get("splitExternalLocalOriginErrors"):
        target.split_external_local_origin_errors = True
        if failures := detection.get("consecutiveLocalOriginFailures"):
            target.consecutive_local_origin_failure.value = int(failures)
            target.enforcing_consecutive_local_origin_failure.value = 100
        target.enforcing_local_origin_success_rate.value = 0
    cluster.common_lb_config.healthy_panic_threshold.value = float(detection.get("minHealthPercent") or 0)


def _tls(cluster: Any, tls: Object) -> None:
    """TLS that the proxy itself starts; ISTIO_MUTUAL is the work of the node proxy already."""
    mode = tls.get("mode") or "DISABLE"
    cluster.ClearField("transport_socket")
    if mode not in ("SIMPLE", "MUTUAL"):
        return
    context = tls_pb2.UpstreamTlsContext(sni=tls.get("sni") or "")
    common = context.common_tls_context
    common.tls_params.tls_minimum_protocol_version = common_pb2.TlsParameters.TLSv1_2
    validation = common_pb2.CertificateValidationContext()
    for name in tls.get("subjectAltNames") or []:
        validation.match_typed_subject_alt_names.add(
            san_type=common_pb2.SubjectAltNameMatcher.DNS, matcher=string_pb2.StringMatcher(exact=name)
        )
    secret = tls.get("credentialName")
    if secret:
        common.tls_certificate_sds_secret_configs.append(_secret(f"kubernetes://{secret}"))
        if mode == "SIMPLE":
            common.ClearField("tls_certificate_sds_secret_configs")
    elif mode == "MUTUAL":
        common.tls_certificates.add(
            certificate_chain=base_pb2.DataSource(filename=tls.get("clientCertificate") or ""),
            private_key=base_pb2.DataSource(filename=tls.get("privateKey") or ""),
        )
    if not tls.get("insecureSkipVerify"):
        if secret:
            combined = common.combined_validation_context
            combined.default_validation_context.CopyFrom(validation)
            combined.validation_context_sds_secret_config.CopyFrom(_secret(f"kubernetes://{secret}-cacert"))
        else:
            bundle = tls.get("caCertificates") or ""
            if bundle in ("", "system"):
                bundle = SYSTEM_ROOTS
            validation.trusted_ca.filename = bundle
            common.validation_context.CopyFrom(validation)
    options = http.HttpProtocolOptions()
    if cluster.typed_extension_protocol_options[HTTP_OPTIONS].Unpack(options):
        explicit = options.explicit_http_config.HasField("http2_protocol_options")
        common.alpn_protocols.append("h2" if explicit else "http/1.1")
    cluster.transport_socket.name = "envoy.transport_sockets.tls"
    cluster.transport_socket.typed_config.CopyFrom(wire.packed(context))


SYSTEM_ROOTS = "/etc/ssl/certs/ca-certificates.crt"


def _secret(name: str) -> Any:
    return secret_pb2.SdsSecretConfig(name=name, sds_config=wire.ads())


def hash_policies(settings: Object) -> list[Any]:
    """What a route hashes requests by, for a cluster with consistent hashing."""
    hashing = (settings.get("loadBalancer") or {}).get("consistentHash") or {}
    policy = route.RouteAction.HashPolicy
    if name := hashing.get("httpHeaderName"):
        return [policy(header=policy.Header(header_name=name))]
    if cookie := hashing.get("httpCookie"):
        made = policy.Cookie(name=cookie.get("name") or "", path=cookie.get("path") or "")
        made.ttl.CopyFrom(wire.seconds(seconds(cookie.get("ttl"))))
        return [policy(cookie=made)]
    if hashing.get("useSourceIp"):
        return [policy(connection_properties=policy.ConnectionProperties(source_ip=True))]
    if name := hashing.get("httpQueryParameterName"):
        return [policy(query_parameter=policy.QueryParameter(name=name))]
    return []
