"""Routes in the index: what attaches, what is refused, and what goes on when a change is not sound."""

from __future__ import annotations

from typing import Any

import pytest
from controlplane_objects import service
from test_envoy_index import KEY, Mirror, shop

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.envoy.gateway_api import attach, intersection, parse
from meshlight.controlplane.envoy.http_route import parse as parse_route
from meshlight.controlplane.envoy.names import ProxyKey
from meshlight.controlplane.envoy.routing import RouteKey
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.gateways.route_controller import routes_in
from meshlight.controlplane.gateways.route_status import conditions

TO_WEB = {"group": "", "kind": "Service", "name": "web"}
ROUTE = RouteKey("HTTPRoute", "shop", "r")


def route(
    *rules: dict[str, Any], parent: dict[str, Any] | None = None, namespace: str = "shop", **spec: Any
) -> dict[str, Any]:
    return {
        "kind": "HTTPRoute",
        "metadata": {"name": "r", "namespace": namespace, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"parentRefs": [parent or TO_WEB], "rules": list(rules), **spec},
    }


def backend(name: str, **more: Any) -> dict[str, Any]:
    return {"backendRefs": [{"name": name, "port": 80, **more}]}


def clusters(mirror: Mirror) -> list[str]:
    scope = mirror.resource(wire.SCOPED_ROUTE_TYPE, "10.96.0.7:80")
    return [r.route.cluster or str(r.direct_response.status) for r in found(scope)]


def found(scope: Any) -> list[Any]:
    return [r for host in scope.route_configuration.virtual_hosts for r in host.routes]


def grant(source: str, target: str = "bank") -> dict[str, Any]:
    return {
        "kind": "ReferenceGrant",
        "metadata": {"name": "g", "namespace": target},
        "spec": {
            "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": source}],
            "to": [{"group": "", "kind": "Service"}],
        },
    }


def test_a_backend_that_comes_later_is_found() -> None:
    mirror = shop(route(backend("late")))
    assert clusters(mirror) == ["500"]
    mirror.take(service("late", ip="10.96.0.9"))
    mirror.commit()
    assert clusters(mirror) == ["outbound|80||late.shop.svc.cluster.local"]
    assert "outbound|80||late.shop.svc.cluster.local" in mirror.names(wire.ENDPOINT_TYPE)


def test_references_across_namespaces_need_a_grant() -> None:
    mirror = shop(service("vault", "bank", ip="10.96.0.9"), route(backend("vault", namespace="bank")))
    assert clusters(mirror) == ["500"]
    [problem] = mirror.envoy.routes.problems(mirror.envoy.routes.routes[ROUTE])
    assert problem.reason == "RefNotPermitted"
    mirror.take(grant("shop"))
    mirror.commit()
    assert clusters(mirror) == ["outbound|80||vault.bank.svc.cluster.local"]
    assert not mirror.envoy.routes.problems(mirror.envoy.routes.routes[ROUTE])
    mirror.take(grant("elsewhere"))
    mirror.commit()
    assert clusters(mirror) == ["500"]


def test_a_change_of_a_route_changes_its_service_alone() -> None:
    mirror = shop(service("other", ip="10.96.0.9"))
    mirror.take(route(backend("other")))
    changes = mirror.commit()[KEY]
    assert set(changes) == {wire.SCOPED_ROUTE_TYPE}
    assert set(changes[wire.SCOPED_ROUTE_TYPE].updated) == {"10.96.0.7:80"}


def test_routes_of_other_namespaces_are_not_the_waypoints() -> None:
    parent = {**TO_WEB, "namespace": "shop"}
    mirror = shop(route(backend("web"), parent=parent, namespace="stranger"))
    assert clusters(mirror) == ["outbound|80||web.shop.svc.cluster.local"], "the service's own default"


def test_an_unsound_change_leaves_what_was_there_and_is_told() -> None:
    mirror = shop(route(backend("web")))
    before = clusters(mirror)
    bad = {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "a\nb", "value": "c"}]}}
    mirror.take(route({**backend("web"), "filters": [bad]}))
    mirror.commit()
    assert clusters(mirror) == before
    problems = mirror.envoy.routes.problems(mirror.envoy.routes.routes[ROUTE])
    accepted, _ = conditions(problems, None)
    assert (accepted.status, accepted.reason) == (False, "UnsupportedValue")
    assert "request_headers_to_add.header.key" in accepted.message
    mirror.take(route(backend("web")))
    mirror.commit()
    assert not mirror.envoy.routes.problems(mirror.envoy.routes.routes[ROUTE])


def test_what_a_proxy_refuses_is_told_to_the_routes_in_it() -> None:
    mirror = shop(route(backend("web")))
    assert routes_in([mirror.resource(wire.SCOPED_ROUTE_TYPE, "10.96.0.7:80")]) == {ROUTE}
    assert mirror.envoy.routes.set_refusals({ROUTE}, "no") == {ROUTE}
    assert mirror.envoy.routes.set_refusals({ROUTE}, "no") == set()
    assert "no" in mirror.envoy.routes.problems(mirror.envoy.routes.routes[ROUTE])[0].message
    mirror.take(route(backend("web"), backend("web")))
    mirror.commit()
    assert not mirror.envoy.routes.problems(mirror.envoy.routes.routes[ROUTE]), "it says something else now"


GATEWAY = {
    "kind": "Gateway",
    "metadata": {"name": "edge", "namespace": "infra"},
    "spec": {
        "gatewayClassName": "istio",
        "listeners": [
            {"name": "same", "port": 80, "protocol": "HTTP", "hostname": "*.one.test"},
            {
                "name": "all",
                "port": 81,
                "protocol": "HTTP",
                "hostname": "two.test",
                "allowedRoutes": {"namespaces": {"from": "All"}},
            },
            {
                "name": "some",
                "port": 82,
                "protocol": "HTTP",
                "allowedRoutes": {
                    "namespaces": {"from": "Selector", "selector": {"matchLabels": {"edge": "yes"}}},
                    "kinds": [{"kind": "GRPCRoute"}],
                },
            },
        ],
    },
}


@pytest.mark.parametrize(
    ("namespace", "parent", "hostnames", "expected"),
    [
        ("infra", {}, (), ["same", "all"]),
        ("shop", {}, (), ["all"]),
        ("shop", {"sectionName": "same"}, (), "NotAllowedByListeners"),
        ("shop", {"sectionName": "some"}, (), "NotAllowedByListeners"),
        ("shop", {"sectionName": "none"}, (), "NoMatchingParent"),
        ("shop", {"port": 81}, (), ["all"]),
        ("shop", {"port": 8080}, (), "NoMatchingParent"),
        ("shop", {}, ("three.test",), "NoMatchingListenerHostname"),
        ("infra", {}, ("a.one.test",), ["same"]),
        ("infra", {}, ("one.test",), "NoMatchingListenerHostname"),
        ("infra", {}, ("two.test", "b.one.test"), ["same", "all"]),
    ],
)
def test_attachment(namespace: str, parent: dict[str, Any], hostnames: tuple[str, ...], expected: Any) -> None:
    ref = {"name": "edge", "namespace": "infra", **parent}
    read = parse_route(route(backend("web"), parent=ref, namespace=namespace, hostnames=list(hostnames)))
    attachments, problem = attach(read, read.parents[0], parse(GATEWAY), lambda _: {})
    found = problem.reason if problem else [attachment.listener.name for attachment in attachments]
    assert found == expected


@pytest.mark.parametrize(
    ("listener", "route_names", "expected"),
    [
        ("", (), ("*",)),
        ("a.test", (), ("a.test",)),
        ("", ("a.test",), ("a.test",)),
        ("*.test", ("a.test", "b.test", "other"), ("a.test", "b.test")),
        ("a.test", ("*.test",), ("a.test",)),
        ("*.a.test", ("*.test",), ("*.a.test",)),
        ("*.test", ("*.a.test",), ("*.a.test",)),
        ("a.test", ("b.test",), ()),
        ("*.test", ("test",), ()),
    ],
)
def test_names_in_common(listener: str, route_names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert intersection(listener, route_names) == expected


def test_listeners_that_conflict_are_named() -> None:
    listeners = [
        {"name": "a", "port": 80, "protocol": "HTTP", "hostname": "x.test"},
        {"name": "b", "port": 80, "protocol": "HTTP", "hostname": "x.test"},
        {"name": "c", "port": 80, "protocol": "HTTP", "hostname": "y.test"},
        {"name": "d", "port": 81, "protocol": "HTTP"},
        {"name": "e", "port": 81, "protocol": "TCP"},
    ]
    conflicts = parse({**GATEWAY, "spec": {"gatewayClassName": "istio", "listeners": listeners}}).conflicts()
    assert conflicts == {
        "a": "HostnameConflict", "b": "HostnameConflict", "d": "ProtocolConflict", "e": "ProtocolConflict",
    }  # fmt: skip


def edge(*listeners: dict[str, Any]) -> dict[str, Any]:
    spec = {"gatewayClassName": "istio", "listeners": list(listeners)}
    return {"kind": "Gateway", "metadata": {"name": "edge", "namespace": "shop"}, "spec": spec}


def test_the_most_specific_listener_takes_a_name_from_the_others() -> None:
    wide = {"name": "wide", "port": 80, "protocol": "HTTP", "hostname": "*.test"}
    narrow = {"name": "narrow", "port": 80, "protocol": "HTTP", "hostname": "a.test"}
    parent = {"name": "edge", "sectionName": "wide"}
    mirror = shop(edge(wide, narrow), route(backend("web"), parent=parent, hostnames=["a.test", "b.test"]))

    configuration = mirror.resource(wire.ROUTE_TYPE, "http.80", ProxyKey("shop", "edge"))
    routed = {host.domains[0]: len(host.routes) for host in configuration.virtual_hosts}
    assert routed == {"*.test": 0, "a.test": 0, "b.test": 1}


def test_a_deleted_route_is_gone() -> None:
    mirror = shop(route(backend("web")), route(backend("web")))
    mirror.take(route(), gone=True)
    mirror.commit()
    assert ObjectKey("shop", "r") not in {ObjectKey(k.namespace, k.name) for k in mirror.envoy.routes.routes}
    assert clusters(mirror) == ["outbound|80||web.shop.svc.cluster.local"]
