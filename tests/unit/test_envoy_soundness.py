"""What Envoy's own schemas refuse is found before Envoy is told."""

from __future__ import annotations

from typing import Any

import pytest
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import base_pb2
from envoy.config.listener.v3 import listener_components_pb2
from envoy.config.route.v3 import route_components_pb2 as parts
from envoy.extensions.filters.http.fault.v3 import fault_pb2
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2

from meshlight.controlplane.envoy import routes, soundness, wire

ROUTE = parts.Route(match=parts.RouteMatch(prefix="/"), route=parts.RouteAction(cluster="c"))


def changed(**fields: Any) -> parts.Route:
    made = parts.Route()
    made.CopyFrom(ROUTE)
    made.MergeFrom(parts.Route(**fields))
    return made


@pytest.mark.parametrize(
    "sound",
    [ROUTE, routes.default("c"), cluster_pb2.Cluster(name="c", connect_timeout=wire.seconds(1))],
)
def test_what_is_sound(sound: Any) -> None:
    assert soundness.fault(sound) is None


@pytest.mark.parametrize(
    ("message", "where"),
    [
        (parts.Route(route=parts.RouteAction(cluster="c")), "match"),
        (parts.Route(match=parts.RouteMatch(prefix="/")), "action"),
        (parts.VirtualHost(name="h"), "domains"),
        (parts.VirtualHost(domains=["*"]), "name"),
        (cluster_pb2.Cluster(connect_timeout=wire.seconds(1)), "name"),
        (cluster_pb2.Cluster(name="c", connect_timeout=wire.seconds(-1)), "connect_timeout"),
        (parts.DirectResponseAction(status=9999), "status"),
        (
            changed(
                request_headers_to_add=[
                    base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key="", value="x"))
                ]
            ),
            "request_headers_to_add.header.key",
        ),
        (
            changed(
                request_headers_to_add=[
                    base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key="a", value="x\ny"))
                ]
            ),
            "request_headers_to_add.header.value",
        ),
        (
            changed(
                typed_per_filter_config={
                    "f": wire.packed(fault_pb2.HTTPFault(abort=fault_pb2.FaultAbort(http_status=7)))
                }
            ),
            "typed_per_filter_config.abort.http_status",
        ),
        (
            listener_components_pb2.Filter(name="f", typed_config=wire.packed(tcp_proxy_pb2.TcpProxy())),
            "typed_config.",
        ),
    ],
)
def test_what_is_not(message: Any, where: str) -> None:
    found = soundness.fault(message)
    assert found is not None and found.startswith(where), found
