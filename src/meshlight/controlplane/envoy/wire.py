"""Building blocks of Envoy's messages, and the type URLs of what is published."""

from __future__ import annotations

from typing import Any

from envoy.config.core.v3 import address_pb2, config_source_pb2, extension_pb2
from google.protobuf import any_pb2, duration_pb2, wrappers_pb2
from google.protobuf.message import Message

from meshlight.controlplane.resources import TYPE_PREFIX

LISTENER_TYPE = TYPE_PREFIX + "envoy.config.listener.v3.Listener"
ROUTE_TYPE = TYPE_PREFIX + "envoy.config.route.v3.RouteConfiguration"
SCOPED_ROUTE_TYPE = TYPE_PREFIX + "envoy.config.route.v3.ScopedRouteConfiguration"
CLUSTER_TYPE = TYPE_PREFIX + "envoy.config.cluster.v3.Cluster"
ENDPOINT_TYPE = TYPE_PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
SECRET_TYPE = TYPE_PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"
TYPES = (CLUSTER_TYPE, ENDPOINT_TYPE, SECRET_TYPE, LISTENER_TYPE, SCOPED_ROUTE_TYPE, ROUTE_TYPE)
"""In the order in which a proxy must be told, so that nothing names what it does not have."""


def packed(message: Message) -> any_pb2.Any:
    """A message as google.protobuf.Any, the same bytes for the same message."""
    result = any_pb2.Any(type_url=TYPE_PREFIX + message.DESCRIPTOR.full_name)
    result.value = message.SerializeToString(deterministic=True)
    return result


def extension(name: str, message: Message) -> Any:
    """A TypedExtensionConfig."""
    return extension_pb2.TypedExtensionConfig(name=name, typed_config=packed(message))


def seconds(value: float) -> duration_pb2.Duration:
    """A duration."""
    result = duration_pb2.Duration()
    result.FromNanoseconds(round(value * 1e9))
    return result


def uint32(value: int) -> wrappers_pb2.UInt32Value:
    """An optional number."""
    return wrappers_pb2.UInt32Value(value=value)


def true(value: bool = True) -> wrappers_pb2.BoolValue:
    """An optional truth value."""
    return wrappers_pb2.BoolValue(value=value)


def socket_address(host: str, port: int) -> Any:
    """A TCP address."""
    return address_pb2.Address(socket_address=address_pb2.SocketAddress(address=host, port_value=port))


def ads() -> Any:
    """Resources come over the aggregated stream."""
    return config_source_pb2.ConfigSource(
        ads=config_source_pb2.AggregatedConfigSource(),
        resource_api_version=config_source_pb2.V3,
    )
