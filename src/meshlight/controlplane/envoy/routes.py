"""Routes of requests. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from envoy.config.route.v3 import route_components_pb2 as parts
from envoy.config.route.v3 import route_pb2, scoped_route_pb2

from meshlight.controlplane.envoy import names, wire


def scope(destinations: Iterable[tuple[str, int]], configuration: Any) -> Iterable[Any]:
    """The routes of connections to some addresses and ports, one ScopedRouteConfiguration each."""
    for address, port in destinations:
        where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        fragment = scoped_route_pb2.ScopedRouteConfiguration.Key.Fragment(string_key=where)
        yield scoped_route_pb2.ScopedRouteConfiguration(
            name=where,
            key=scoped_route_pb2.ScopedRouteConfiguration.Key(fragments=[fragment]),
            route_configuration=configuration,
        )


def configuration(name: str, hosts: Iterable[Any], rules: Mapping[str, Any] | None = None) -> Any:
    """A RouteConfiguration; the proxy's own header never leaves it. `rules` are the filters' for it."""
    return route_pb2.RouteConfiguration(
        name=name,
        virtual_hosts=hosts,
        request_headers_to_remove=[names.DESTINATION_HEADER],
        typed_per_filter_config=rules or {},
        validate_clusters=wire.true(False),
        max_direct_response_body_size_bytes=wire.uint32(1 << 20),
    )


def host(name: str, domains: Iterable[str], routes: Iterable[Any]) -> Any:
    """A virtual host."""
    return parts.VirtualHost(name=name, domains=domains, routes=routes, include_request_attempt_count=True)


def default(cluster: str) -> Any:
    """Everything to one cluster, with Istio's retries of what certainly was not processed."""
    return parts.Route(
        name="default",
        match=parts.RouteMatch(prefix="/"),
        route=parts.RouteAction(
            cluster=cluster,
            timeout=wire.seconds(0),
            retry_policy=default_retries(),
            max_grpc_timeout=wire.seconds(0),
        ),
    )


def default_retries() -> Any:
    """Istio's default: two more tries, on other endpoints, of requests that no server has processed."""
    return parts.RetryPolicy(
        retry_on="connect-failure,refused-stream,unavailable,cancelled",
        num_retries=wire.uint32(2),
        retry_host_predicate=[
            parts.RetryPolicy.RetryHostPredicate(
                name="envoy.retry_host_predicates.previous_hosts",
                typed_config=wire.packed(_previous_hosts()),
            )
        ],
        host_selection_retry_max_attempts=5,
    )


def _previous_hosts() -> Any:
    from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2

    return previous_hosts_pb2.PreviousHostsPredicate()
