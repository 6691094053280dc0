"""Routes of requests. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from envoy.config.route.v3 import route_components_pb2 as parts
from envoy.config.route.v3 import route_pb2, scoped_route_pb2

from meshlight.controlplane.envoy import names, route_rules, wire


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
    """Everything to one cluster."""
    return parts.Route(
        name="default",
        match=parts.RouteMatch(prefix="/"),
        route=parts.RouteAction(
            cluster=cluster,
            timeout=wire.seconds(0),
            retry_policy=route_rules.retry_policy(None),
        ),
    )
