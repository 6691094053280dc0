"""HTTPRoutes and GRPCRoutes as a real Envoy follows them: the Gateway API's rules, as tables."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from backends import Backend, serving
from envoy_proxy import Proxy, cluster, running
from routed import Table, ask, check_table, listener

from meshlight.controlplane.envoy import route_rules
from meshlight.controlplane.envoy.http_route import parse
from meshlight.controlplane.envoy.routing import BackendReference

NAMES = ("v1", "v2", "v3")


def to(name: str = "v1", **more: Any) -> dict[str, Any]:
    return {"name": name, "port": 80, **more}


def rule(*matches: dict[str, Any], backends: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"backendRefs": [to()] if backends is None else backends, **more}
    if matches:
        made["matches"] = list(matches)
    return made


def route(*rules: dict[str, Any], name: str = "r", created: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop", "creationTimestamp": created}
    return {"kind": "HTTPRoute", "metadata": metadata, "spec": {"rules": list(rules)}}


def grpc(*rules: dict[str, Any]) -> dict[str, Any]:
    return {**route(*rules), "kind": "GRPCRoute"}


def prefix(value: str, **more: Any) -> dict[str, Any]:
    return {"path": {"type": "PathPrefix", "value": value}, **more}


def exact(value: str, **more: Any) -> dict[str, Any]:
    return {"path": {"type": "Exact", "value": value}, **more}


def regex(value: str) -> dict[str, Any]:
    return {"path": {"type": "RegularExpression", "value": value}}


def header(name: str, value: str, **more: Any) -> dict[str, Any]:
    return {"headers": [{"name": name, "value": value, **more}]}


def changing(kind: str, **changes: Any) -> list[dict[str, Any]]:
    field = kind[0].lower() + kind[1:]
    return [{"type": kind, field: changes}]


def redirect(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "RequestRedirect", "requestRedirect": fields}]


def rewrite(kind: str, value: str, **more: Any) -> list[dict[str, Any]]:
    field = kind[0].lower() + kind[1:]
    return [{"type": "URLRewrite", "urlRewrite": {"path": {"type": kind, field: value}, **more}}]


CASES: dict[str, tuple[list[dict[str, Any]], Table]] = {
    "everything": ([route(rule())], [("/", "v1"), ("/a/b?c=d", "v1")]),
    "no match is 404": ([route(rule(exact("/a")))], [("/a", "v1"), ("/a/", 404), ("/b", 404)]),
    "a prefix is of whole segments": (
        [route(rule(prefix("/a")), rule(prefix("/c/")))],
        [("/a", "v1"), ("/a/", "v1"), ("/a/b", "v1"), ("/ab", 404), ("/c", "v1"), ("/c/d", "v1")],
    ),
    "exact before prefix, long before short, within one route": (
        [
            route(
                rule(prefix("/"), backends=[to("v1")]),
                rule(prefix("/a/b"), backends=[to("v2")]),
                rule(exact("/a/b"), backends=[to("v3")]),
            )
        ],
        [("/a/b", "v3"), ("/a/b/c", "v2"), ("/a", "v1")],
    ),
    "precedence holds across routes": (
        [
            route(rule(prefix("/a"), backends=[to("v1")]), name="a"),
            route(rule(prefix("/a/b"), backends=[to("v2")]), name="b"),
        ],
        [("/a/b", "v2"), ("/a/c", "v1")],
    ),
    "the oldest wins a tie, then the name, then the order": (
        [
            route(rule(prefix("/x"), backends=[to("v1")]), name="a", created="2026-02-01T00:00:00Z"),
            route(rule(prefix("/x"), backends=[to("v2")]), name="z"),
            route(rule(prefix("/y"), backends=[to("v3")]), name="b"),
            route(rule(prefix("/y"), backends=[to("v1")]), rule(prefix("/y"), backends=[to("v2")]), name="a2"),
        ],
        [("/x", "v2"), ("/y", "v1")],
    ),
    "methods": (
        [route(rule({"method": "POST"}, backends=[to("v2")]), rule(backends=[to("v1")]))],
        [({"method": "POST"}, "v2"), ({"method": "GET"}, "v1")],
    ),
    "headers": (
        [
            route(
                rule(header("Version", "two"), backends=[to("v2")]),
                rule(header("version", "th.*", type="RegularExpression"), backends=[to("v3")]),
                rule(
                    {"headers": [{"name": "version", "value": "two"}, {"name": "color", "value": "red"}]},
                    backends=[to("v1")],
                ),
            )
        ],
        [
            ({"headers": {"version": "two"}}, "v2"),
            ({"headers": {"version": "three"}}, "v3"),
            ({"headers": {"version": "two", "color": "red"}}, "v1"),
            ({"headers": {"version": "Two"}}, 404),
            ("/", 404),
        ],
    ),
    "query parameters": (
        [
            route(
                rule({"queryParams": [{"name": "a", "value": "1"}]}, backends=[to("v1")]),
                rule(
                    {"queryParams": [{"name": "a", "type": "RegularExpression", "value": "2.*"}]},
                    backends=[to("v2")],
                ),
            )
        ],
        [("/?a=1", "v1"), ("/?a=22", "v2"), ("/?b=1", 404), ("/?a=1&b=2", "v1")],
    ),
    "any match of a rule, all parts of a match": (
        [route(rule(prefix("/a", method="GET"), exact("/b")))],
        [("/a", "v1"), ({"path": "/a", "method": "PUT"}, 404), ("/b", "v1")],
    ),
    "regular expressions": (
        [route(rule(regex(r"/v\d+/.*")), rule(prefix("/v1/special"), backends=[to("v2")]))],
        [("/v12/x", "v1"), ("/vx/x", 404), ("/v1/special", "v2")],
    ),
    "a pattern of another syntax matches nothing": (
        [route(rule(regex(r"/(?=a).*")), rule(exact("/ok")))],
        [("/abc", 404), ("/ok", "v1")],
    ),
    "request headers": (
        [
            route(
                rule(
                    filters=changing(
                        "RequestHeaderModifier",
                        set=[{"name": "x-set", "value": "new"}],
                        add=[{"name": "x-add", "value": "100%"}],
                        remove=["x-gone"],
                    )
                )
            )
        ],
        [
            (
                {"headers": {"x-set": "old", "x-add": "a", "x-gone": "1"}},
                {"headers": {"x-set": "new", "x-add": "a,100%", "x-gone": None}},
            )
        ],
    ),
    "response headers": (
        [
            route(
                rule(
                    filters=changing(
                        "ResponseHeaderModifier", add=[{"name": "x-more", "value": "yes"}], remove=["x-from"]
                    )
                )
            )
        ],
        [("/", {"response": {"x-more": "yes", "x-from": None}})],
    ),
    "headers of one backend": (
        [
            route(
                rule(
                    backends=[
                        to(filters=changing("RequestHeaderModifier", set=[{"name": "x-of", "value": "one"}]))
                    ]
                )
            )
        ],
        [("/", {"headers": {"x-of": "one"}})],
    ),
    "redirects": (
        [
            route(
                rule(exact("/host"), backends=[], filters=redirect(hostname="other.example", statusCode=301)),
                rule(exact("/scheme"), backends=[], filters=redirect(scheme="https")),
                rule(exact("/port"), backends=[], filters=redirect(port=8080)),
                rule(
                    exact("/full"),
                    backends=[],
                    filters=redirect(path={"type": "ReplaceFullPath", "replaceFullPath": "/new"}),
                ),
                rule(
                    prefix("/pre"),
                    backends=[],
                    filters=redirect(
                        path={"type": "ReplacePrefixMatch", "replacePrefixMatch": "/after"}, statusCode=307
                    ),
                ),
            )
        ],
        [
            ("/host", {"status": 301, "response": {"location": "http://other.example/host"}}),
            ("/scheme", {"status": 302, "response": {"location": "https://shop.example/scheme"}}),
            ("/port", {"response": {"location": "http://shop.example:8080/port"}}),
            ("/full?q=1", {"response": {"location": "http://shop.example/new?q=1"}}),
            ("/pre/x", {"status": 307, "response": {"location": "http://shop.example/after/x"}}),
        ],
    ),
    "rewrites": (
        [
            route(
                rule(prefix("/a"), filters=rewrite("ReplacePrefixMatch", "/b")),
                rule(prefix("/root"), filters=rewrite("ReplacePrefixMatch", "/")),
                rule(prefix("/empty/"), filters=rewrite("ReplacePrefixMatch", "")),
                rule(prefix("/slash"), filters=rewrite("ReplacePrefixMatch", "/to/")),
                rule(prefix("/full"), filters=rewrite("ReplaceFullPath", "/one/two")),
                rule(prefix("/host"), filters=rewrite("ReplaceFullPath", "/h", hostname="inner.example")),
            ),
        ],
        [
            ("/a", {"path": "/b"}),
            ("/a/x?y=z", {"path": "/b/x?y=z"}),
            ("/root/x", {"path": "/x"}),
            ("/root", {"path": "/"}),
            ("/empty/x", {"path": "/x"}),
            ("/slash/x", {"path": "/to/x"}),
            ("/full/x?y=z", {"path": "/one/two?y=z"}),
            ("/host", {"path": "/h", "headers": {"host": "inner.example"}}),
        ],
    ),
    "backends that are not there are answered 500": (
        [
            route(
                rule(exact("/none"), backends=[to("nowhere")]),
                rule(exact("/no-backends"), backends=[]),
                rule(exact("/zero"), backends=[to(weight=0)]),
            )
        ],
        [("/none", 500), ("/no-backends", 500), ("/zero", 500)],
    ),
    "cross-origin requests": (
        [
            route(
                rule(
                    filters=[
                        {
                            "type": "CORS",
                            "cors": {
                                "allowOrigins": ["https://*.example"],
                                "allowMethods": ["GET", "PUT"],
                                "maxAge": 60,
                            },
                        }
                    ]
                )
            )
        ],
        [
            (
                {
                    "method": "OPTIONS",
                    "headers": {"origin": "https://a.example", "access-control-request-method": "PUT"},
                },
                {
                    "status": 200,
                    "response": {
                        "access-control-allow-origin": "https://a.example",
                        "access-control-allow-methods": "GET,PUT",
                        "access-control-max-age": "60",
                    },
                },
            ),
            (
                {"headers": {"origin": "https://evil.test"}},
                {"response": {"access-control-allow-origin": None}},
            ),
        ],
    ),
    "time is up": (
        [route(rule(timeouts={"request": "100ms"}))],
        [({"headers": {"x-sleep": "3"}}, 504), ("/", "v1")],
    ),
    "a try's time is up": (
        [route(rule(timeouts={"request": "10s", "backendRequest": "100ms"}))],
        [({"headers": {"x-sleep": "3"}}, 504)],
    ),
    "retries": (
        [route(rule(retry={"attempts": 2, "codes": [503], "backoff": "10ms"}))],
        [
            ({"path": "/once", "headers": {"x-fail-first": "503"}}, "v1"),
            ({"path": "/other", "headers": {"x-fail-first": "502"}}, 502),
        ],
    ),
    "gRPC methods": (
        [
            grpc(
                rule({"method": {"service": "shop.Cart", "method": "Add"}}, backends=[to("v1")]),
                rule({"method": {"service": "shop.Cart"}}, backends=[to("v2")]),
                rule({"method": {"method": "Ping"}}, backends=[to("v3")]),
            )
        ],
        [
            ("/shop.Cart/Add", "v1"),
            ("/shop.Cart/Remove", "v2"),
            ("/any.Thing/Ping", "v3"),
            ("/shop.Carts/Add", 404),
        ],
    ),
}  # fmt: skip


def routed(name: str, objects: list[dict[str, Any]]) -> Any:
    def resolve(reference: BackendReference) -> str | None:
        return reference.key.name if reference.key.name in NAMES else None

    placed = [one for obj in objects for one in route_rules.compile_route(parse(obj), resolve)]
    return listener(name, route_rules.in_order(placed))


EXTRA: dict[str, list[dict[str, Any]]] = {
    "weights": [route(rule(backends=[to("v1", weight=9), to("v2", weight=1), to("nowhere", weight=10)]))],
    "mirror": [route(rule(filters=[{"type": "RequestMirror", "requestMirror": {"backendRef": to("v3")}}]))],
    "cookie": [route(rule(backends=[to("v1"), to("v2")], sessionPersistence={"sessionName": "who"}))],
}


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, Backend]]:
    with serving(*NAMES) as servers:
        yield servers


@pytest.fixture(scope="module")
def proxy(backends: dict[str, Backend], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    clusters = [cluster(name, server.server_address[1]) for name, server in backends.items()]
    everything = {name: objects for name, (objects, _) in CASES.items()} | EXTRA
    with running(
        tmp_path_factory.mktemp("routes"), [routed(n, objects) for n, objects in everything.items()], clusters
    ) as made:
        yield made


@pytest.mark.parametrize("name", CASES)
def test_requests_go_where_the_route_says(proxy: Proxy, name: str) -> None:
    check_table(proxy, name, CASES[name][1])


def test_shares_are_by_weight_and_lost_backends_keep_theirs(proxy: Proxy) -> None:
    counts = {"v1": 0, "v2": 0, "500": 0}
    for _ in range(200):
        answer = ask(proxy, "weights", "/")
        counts[json.loads(answer.body)["backend"] if answer.status == 200 else "500"] += 1
    # Expected 90, 10, 100 of 200; the bounds are seven standard deviations away.
    assert 45 < counts["v1"] < 140
    assert 0 < counts["v2"] < 32
    assert 50 < counts["500"] < 150


def test_a_mirror_sees_a_copy(proxy: Proxy, backends: dict[str, Backend]) -> None:
    answer = ask(proxy, "mirror", "/mirrored")
    assert json.loads(answer.body)["backend"] == "v1"
    deadline = time.monotonic() + 30
    while "/mirrored" not in backends["v3"].seen:
        assert time.monotonic() < deadline, "the mirror saw nothing"
        time.sleep(0.02)


def test_a_session_has_a_cookie(proxy: Proxy) -> None:
    answer = ask(proxy, "cookie", "/")
    assert answer.headers["set-cookie"].startswith("who=")


def test_the_proxys_own_header_goes_nowhere(proxy: Proxy) -> None:
    answer = ask(proxy, "everything", {"headers": {"x-meshlight-destination": "10.96.0.1:1"}})
    assert "x-meshlight-destination" not in json.loads(answer.body)["headers"]
