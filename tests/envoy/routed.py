"""Listeners whose routes are compiled from objects, and tables of what becomes of requests to them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy_proxy import Proxy, Response

from meshlight.controlplane.envoy import http, listeners, routes, wire

# (request, expected): a backend's name, a status, or a dictionary of what is to be seen.
Table = list[tuple[dict[str, Any] | str, Any]]


def listener(name: str, made: Iterable[Any]) -> Any:
    """A listener as a waypoint has it, with these Envoy routes."""
    host = routes.host(name, ["*"], made)
    manager = http.manager("test", routes.configuration(name, [host]), http.filters(), [], edge=False)
    manager.delayed_close_timeout.CopyFrom(wire.seconds(0))
    chain = listener_components_pb2.FilterChain(
        filters=[listeners.network_filter("envoy.filters.network.http_connection_manager", manager)]
    )
    return listener_pb2.Listener(
        name=name,
        address=wire.socket_address("127.0.0.1", 0),
        listener_filters=[listeners.proxy_protocol()],
        filter_chains=[chain],
    )


def ask(proxy: Proxy, name: str, request: dict[str, Any] | str) -> Response:
    """One request; a text is a path."""
    return proxy.request(name, **({"path": request} if isinstance(request, str) else request))


def check_table(proxy: Proxy, name: str, table: Table) -> None:
    """Send every request of a table and compare."""
    for request, expected in table:
        answer = ask(proxy, name, request)
        if isinstance(expected, int):
            assert answer.status == expected, request
        elif isinstance(expected, str):
            assert (answer.status, json.loads(answer.body or "{}").get("backend")) == (200, expected), request
        else:
            check(request, answer, expected)


def check(request: Any, answer: Response, expected: dict[str, Any]) -> None:
    """Compare an answer with what is to be seen of it."""
    if "status" in expected:
        assert answer.status == expected["status"], request
    for name, value in expected.get("response", {}).items():
        assert answer.headers.get(name) == value, (request, name)
    seen = json.loads(answer.body) if "path" in expected or "headers" in expected else {}
    if "path" in expected:
        assert seen["path"] == expected["path"], request
    for name, value in expected.get("headers", {}).items():
        assert seen["headers"].get(name) == value, (request, name)
