"""Services as Envoy's clusters. Pure.

Connections go to pods in plaintext: the node proxy takes them and carries them as mutual TLS.
"""

from __future__ import annotations

from typing import Any

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2
from envoy.config.core.v3 import protocol_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2 as http

from meshlight.controlplane.envoy import names, wire
from meshlight.controlplane.envoy.endpoints import METADATA
from meshlight.controlplane.facts import ObjectKey, Service, ServicePort
from meshlight.proto import workload_pb2 as wds

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_UNLIMITED = 0xFFFFFFFF
CONNECT_TIMEOUT = 10.0


def of_port(hostname: str, service: Service, port: ServicePort, subset: str = "") -> Any:
    """The cluster of one port of a service."""
    result = cluster_pb2.Cluster(
        name=names.cluster(hostname, port.port, subset),
        type=cluster_pb2.Cluster.EDS,
        eds_cluster_config=cluster_pb2.Cluster.EdsClusterConfig(eds_config=wire.ads()),
        connect_timeout=wire.seconds(CONNECT_TIMEOUT),
        lb_policy=cluster_pb2.Cluster.LEAST_REQUEST,
        circuit_breakers=unlimited(),
    )
    result.typed_extension_protocol_options[_HTTP_OPTIONS].CopyFrom(wire.packed(protocol(port.app_protocol)))
    result.metadata.filter_metadata[METADATA].update(described(hostname, service.key))
    return result


def described(hostname: str, key: ObjectKey) -> dict[str, str]:
    """A service, by the names of the metrics' labels."""
    return {"service": hostname, "service_name": key.name, "service_namespace": key.namespace}


def protocol(declared: int) -> Any:
    """How HTTP is spoken to a port: as declared, else as the client speaks."""
    if declared in (wds.HTTP2, wds.GRPC):
        explicit = http.HttpProtocolOptions.ExplicitHttpConfig(
            http2_protocol_options=protocol_pb2.Http2ProtocolOptions()
        )
        return http.HttpProtocolOptions(explicit_http_config=explicit)
    if declared == wds.HTTP11:
        explicit = http.HttpProtocolOptions.ExplicitHttpConfig(
            http_protocol_options=protocol_pb2.Http1ProtocolOptions()
        )
        return http.HttpProtocolOptions(explicit_http_config=explicit)
    as_client = http.HttpProtocolOptions.UseDownstreamHttpConfig(
        http_protocol_options=protocol_pb2.Http1ProtocolOptions(),
        http2_protocol_options=protocol_pb2.Http2ProtocolOptions(),
    )
    return http.HttpProtocolOptions(use_downstream_protocol_config=as_client)


def unlimited() -> Any:
    """No circuit breaker unless one is asked for: Envoy's default of 1024 would refuse requests."""
    limits = circuit_breaker_pb2.CircuitBreakers.Thresholds(
        max_connections=wire.uint32(_UNLIMITED),
        max_pending_requests=wire.uint32(_UNLIMITED),
        max_requests=wire.uint32(_UNLIMITED),
        max_retries=wire.uint32(_UNLIMITED),
        track_remaining=True,
    )
    return circuit_breaker_pb2.CircuitBreakers(thresholds=[limits])


def original_destination() -> Any:
    """Where a connection was going by itself."""
    result = cluster_pb2.Cluster(
        name=names.ORIGINAL_DESTINATION,
        type=cluster_pb2.Cluster.ORIGINAL_DST,
        lb_policy=cluster_pb2.Cluster.CLUSTER_PROVIDED,
        connect_timeout=wire.seconds(CONNECT_TIMEOUT),
        circuit_breakers=unlimited(),
    )
    result.typed_extension_protocol_options[_HTTP_OPTIONS].CopyFrom(wire.packed(protocol(wds.UNKNOWN)))
    return result


def black_hole() -> Any:
    """A cluster without members: requests for it are answered 503."""
    return cluster_pb2.Cluster(
        name=names.BLACK_HOLE,
        type=cluster_pb2.Cluster.STATIC,
        connect_timeout=wire.seconds(1),
    )


def by_name(name: str, host: str, port: int, *, http2: bool) -> Any:
    """A cluster of whatever a host name resolves to, such as a collector."""
    result = cluster_pb2.Cluster(
        name=name,
        type=cluster_pb2.Cluster.STRICT_DNS,
        dns_lookup_family=cluster_pb2.Cluster.V4_PREFERRED,
        connect_timeout=wire.seconds(CONNECT_TIMEOUT),
        circuit_breakers=unlimited(),
    )
    result.load_assignment.cluster_name = name
    endpoint = result.load_assignment.endpoints.add().lb_endpoints.add().endpoint
    endpoint.address.CopyFrom(wire.socket_address(host, port))
    spoken = protocol(wds.HTTP2 if http2 else wds.HTTP11)
    result.typed_extension_protocol_options[_HTTP_OPTIONS].CopyFrom(wire.packed(spoken))
    return result
