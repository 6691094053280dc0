"""HTTP connection managers: what a proxy does with the requests of its connections. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import protocol_pb2
from envoy.extensions.filters.http.cors.v3 import cors_pb2
from envoy.extensions.filters.http.fault.v3 import fault_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.http.stateful_session.v3 import stateful_session_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm

from meshlight.controlplane.envoy import route_rules, wire

Manager = hcm.HttpConnectionManager


def manager(
    stat_prefix: str,
    routes: Any,
    filters: Iterable[Any],
    access_logs: Sequence[accesslog_pb2.AccessLog],
    tracing: Any = None,
    *,
    edge: bool,
    early: Any = None,
) -> Any:
    """A connection manager without its routes' specifier kind decided: `routes` is Rds, ScopedRoutes or inline.

    `edge`: it faces clients outside the mesh, whose address is the connection's and whose `x-forwarded-for`
    is not believed; else what the mesh wrote is passed on.
    """
    result = Manager(
        stat_prefix=stat_prefix,
        codec_type=Manager.AUTO,
        http_filters=[*filters, http_filter("envoy.filters.http.router", router_pb2.Router())],
        access_log=access_logs,
        use_remote_address=wire.true(edge),
        skip_xff_append=not edge,
        generate_request_id=wire.true(),
        preserve_external_request_id=True,
        always_set_request_id_in_response=False,
        normalize_path=wire.true(),
        path_with_escaped_slashes_action=Manager.KEEP_UNCHANGED,
        server_header_transformation=Manager.OVERWRITE if edge else Manager.PASS_THROUGH,
        server_name="istio-envoy",
        stream_idle_timeout=wire.seconds(0),
        common_http_protocol_options=protocol_pb2.HttpProtocolOptions(idle_timeout=wire.seconds(3600)),
        http_protocol_options=protocol_pb2.Http1ProtocolOptions(accept_http_10=True),
        upgrade_configs=[Manager.UpgradeConfig(upgrade_type="websocket")],
        proxy_100_continue=True,
        strip_trailing_host_dot=False,
    )
    # Resets of one client must not cost the others; the bound is Envoy's own advice for edges.
    result.http2_protocol_options.max_concurrent_streams.value = 1000
    if isinstance(routes, hcm.Rds):
        result.rds.CopyFrom(routes)
    elif isinstance(routes, hcm.ScopedRoutes):
        result.scoped_routes.CopyFrom(routes)
    else:
        result.route_config.CopyFrom(routes)
    if tracing is not None:
        result.tracing.CopyFrom(tracing)
    if early is not None:
        result.early_header_mutation_extensions.append(early)
    return result


def filters() -> list[Any]:
    """The filters of every proxy, idle unless a route configures them."""
    return [
        http_filter(route_rules.FAULT, fault_pb2.HTTPFault()),
        http_filter(route_rules.CORS, cors_pb2.Cors()),
        http_filter(route_rules.SESSION, stateful_session_pb2.StatefulSession()),
    ]


def http_filter(name: str, message: Any) -> Any:
    """An HTTP filter."""
    return hcm.HttpFilter(name=name, typed_config=wire.packed(message))
