"""VirtualServices as a real Envoy follows them: Istio's rules, as tables."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from backends import Backend, serving
from envoy_proxy import Proxy, cluster, running
from routed import Table, ask, check_table, listener

from meshlight.controlplane.envoy import virtual_service
from meshlight.controlplane.envoy.routing import BackendReference
from meshlight.controlplane.envoy.virtual_service import MESH, VirtualService, parse, with_delegates
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.settings import Mesh

NAMES = ("v1", "v2", "v3")


def to(subset: str = "v1", weight: int | None = None, **more: Any) -> dict[str, Any]:
    share = {"destination": {"host": "web", "subset": subset}, **more}
    return share if weight is None else {**share, "weight": weight}


def http(*matches: dict[str, Any], route: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = dict(more)
    if route is not None or not ({"redirect", "directResponse", "delegate"} & more.keys()):
        made["route"] = route or [to()]
    if matches:
        made["match"] = list(matches)
    return made


def service(*rules: dict[str, Any], name: str = "web", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {
        "kind": "VirtualService",
        "metadata": metadata,
        "spec": {"hosts": ["web"], "http": list(rules), **spec},
    }


def uri(**text: str) -> dict[str, Any]:
    return {"uri": text}


CASES: dict[str, tuple[dict[str, Any], Table]] = {
    "everything": (service(http()), [("/", "v1"), ("/a?b", "v1")]),
    "the first that matches wins, whatever is more particular": (
        service(http(uri(prefix="/a"), route=[to("v1")]), http(uri(exact="/a/b"), route=[to("v2")])),
        [("/a/b", "v1"), ("/c", 404)],
    ),
    "a prefix is of letters": (service(http(uri(prefix="/a"))), [("/ab", "v1"), ("/b", 404)]),
    "any of the matches": (
        service(http(uri(exact="/a"), {"headers": {"x": {"exact": "1"}}})),
        [("/a", "v1"), ({"path": "/b", "headers": {"x": "1"}}, "v1"), ("/b", 404)],
    ),
    "all of a match": (
        service(http({"uri": {"prefix": "/a"}, "method": {"exact": "POST"}})),
        [({"path": "/a", "method": "POST"}, "v1"), ("/a", 404)],
    ),
    "regular expressions are of the whole": (
        service(http(uri(regex="/v[0-9]+"))),
        [("/v12", "v1"), ("/v12/x", 404)],
    ),
    "case may be ignored": (
        service(http({"uri": {"exact": "/Path"}, "ignoreUriCase": True})),
        [("/pATH", "v1"), ("/pathx", 404)],
    ),
    "headers present, absent, by prefix": (
        service(
            http({"headers": {"x-a": {}}}, route=[to("v1")]),
            http({"withoutHeaders": {"x-b": {}}}, route=[to("v2")]),
            http({"headers": {"x-b": {"prefix": "he"}}}, route=[to("v3")]),
        ),
        [
            ({"headers": {"x-a": "anything"}}, "v1"),
            ("/", "v2"),
            ({"headers": {"x-b": "hello"}}, "v3"),
            ({"headers": {"x-b": "other"}}, 404),
        ],
    ),
    "query parameters": (
        service(
            http({"queryParams": {"a": {"exact": "1"}}}), http({"queryParams": {"b": {}}}, route=[to("v2")])
        ),
        [("/?a=1", "v1"), ("/?b", "v2"), ("/?a=2", 404)],
    ),
    "authority": (
        service(http({"authority": {"prefix": "shop."}})),
        [("/", "v1"), ({"headers": {"host": "other.example"}}, 404)],
    ),
    "ports": (
        service(http({"port": 9090}, route=[to("v2")]), http({"port": 80}, route=[to("v1")])),
        [("/", "v1")],
    ),
    "another gateway's rule": (
        service(http({"gateways": ["edge"]}, route=[to("v2")]), http(route=[to("v1")])),
        [("/", "v1")],
    ),
    "headers changed": (
        service(
            http(
                headers={
                    "request": {"set": {"x-set": "1"}, "add": {"x-add": "2"}, "remove": ["x-gone"]},
                    "response": {"set": {"x-answer": "3"}},
                }
            )
        ),
        [
            (
                {"headers": {"x-gone": "x", "x-set": "0", "x-add": "1"}},
                {"headers": {"x-set": "1", "x-add": "1,2", "x-gone": None}, "response": {"x-answer": "3"}},
            )
        ],
    ),
    "headers of a share": (
        service(http(route=[to(headers={"request": {"set": {"x-share": "one"}}})])),
        [("/", {"headers": {"x-share": "one"}})],
    ),
    "a prefix rewritten": (
        service(http(uri(prefix="/old/"), rewrite={"uri": "/new/"})),
        [("/old/a", {"path": "/new/a"})],
    ),
    "an exact path and the authority rewritten": (
        service(http(uri(exact="/old"), rewrite={"uri": "/new", "authority": "inner.example"})),
        [("/old?q=1", {"path": "/new?q=1", "headers": {"host": "inner.example"}})],
    ),
    "a path rewritten by pattern": (
        service(http(rewrite={"uriRegexRewrite": {"match": "/a/([^/]+)/(.*)", "rewrite": "/\\2/\\1"}})),
        [("/a/x/y", {"path": "/y/x"})],
    ),
    "redirects": (
        service(
            http(uri(exact="/a"), redirect={"uri": "/b", "authority": "other.example"}),
            http(uri(prefix="/s"), redirect={"scheme": "https", "redirectCode": 308}),
            http(uri(prefix="/p"), redirect={"port": 8443}),
        ),
        [
            ("/a", {"status": 301, "response": {"location": "http://other.example/b"}}),
            ("/s/x", {"status": 308, "response": {"location": "https://shop.example/s/x"}}),
            ("/p", {"status": 301, "response": {"location": "http://shop.example:8443/p"}}),
        ],
    ),
    "an answer of its own": (
        service(http(directResponse={"status": 418, "body": {"string": "tea"}})),
        [("/", {"status": 418})],
    ),
    "a timeout": (service(http(timeout="0.2s")), [({"headers": {"x-sleep": "3"}}, 504)]),
    "retries on request": (
        service(http(retries={"attempts": 2, "retryOn": "5xx", "perTryTimeout": "5s", "backoff": "5ms"})),
        [({"path": "/vs-once", "headers": {"x-fail-first": "500"}}, "v1")],
    ),
    "retries by status": (
        service(http(retries={"attempts": 2, "retryOn": "418", "backoff": "5ms"})),
        [
            ({"path": "/vs-tea", "headers": {"x-fail-first": "418"}}, "v1"),
            ({"path": "/vs-other", "headers": {"x-fail-first": "500"}}, 500),
        ],
    ),
    "no retries": (
        service(http(retries={"attempts": 0})),
        [({"path": "/vs-none", "headers": {"x-fail-first": "503"}}, 503)],
    ),
    "a fault for all": (
        service(http(fault={"abort": {"httpStatus": 555, "percentage": {"value": 100}}})),
        [("/", 555)],
    ),
    "a fault for none": (
        service(http(fault={"abort": {"httpStatus": 555, "percentage": {"value": 0}}})),
        [("/", "v1")],
    ),
    "a fault for some": (
        service(
            http({"headers": {"x-user": {"exact": "jason"}}}, fault={"abort": {"httpStatus": 500}}), http()
        ),
        [({"headers": {"x-user": "jason"}}, 500), ("/", "v1")],
    ),
    "a delay, then the answer": (
        service(http(fault={"delay": {"fixedDelay": "0.05s", "percentage": {"value": 100}}})),
        [("/", "v1")],
    ),
    "cross-origin requests": (
        service(
            http(
                corsPolicy={
                    "allowOrigins": [{"prefix": "https://shop."}],
                    "allowMethods": ["GET", "PUT"],
                    "maxAge": "24h",
                    "allowCredentials": True,
                }
            )
        ),
        [
            (
                {
                    "method": "OPTIONS",
                    "headers": {"origin": "https://shop.example", "access-control-request-method": "PUT"},
                },
                {
                    "status": 200,
                    "response": {
                        "access-control-allow-origin": "https://shop.example",
                        "access-control-max-age": "86400",
                    },
                },
            )
        ],
    ),
    "a subset that does not exist": (service(http(route=[to("v9")])), [("/", 503)]),
    "a delegate": (
        service(http(uri(prefix="/d"), delegate={"name": "inner"}), http(route=[to("v3")])),
        [("/d/two", "v2"), ("/d/one", "v1"), ("/x/two", "v3"), ("/e", "v3")],
    ),
    "a delegate that is not there": (service(http(delegate={"name": "gone"})), [("/", 500)]),
}

INNER = service(
    http(uri(exact="/d/two"), route=[to("v2")]),
    http(uri(exact="/x/two"), route=[to("v2")]),
    http(route=[to("v1")]),
    name="inner",
    hosts=[],
)
EXTRA = {
    "weights": service(http(route=[to("v1", 75), to("v2", 25)])),
    "mirror": service(http(mirror={"host": "web", "subset": "v3"}, mirrorPercentage={"value": 100})),
    "some faults": service(http(fault={"abort": {"httpStatus": 500, "percentage": {"value": 50}}})),
}


def resolve(reference: BackendReference) -> str:
    return reference.subset


def ports(reference: BackendReference) -> Sequence[int]:
    return [80]


def delegate(key: ObjectKey) -> VirtualService | None:
    return parse(Mesh(), INNER) if key == ObjectKey("shop", "inner") else None


def routed(name: str, obj: dict[str, Any]) -> Any:
    whole = with_delegates(parse(Mesh(), obj), delegate)
    return listener(name, virtual_service.compile_routes(whole, MESH, 80, ports, resolve))


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, Backend]]:
    with serving(*NAMES) as servers:
        yield servers


@pytest.fixture(scope="module")
def proxy(backends: dict[str, Backend], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    clusters = [cluster(name, server.server_address[1]) for name, server in backends.items()]
    everything = {name: obj for name, (obj, _) in CASES.items()} | EXTRA
    folder = tmp_path_factory.mktemp("virtual")
    with running(folder, [routed(name, obj) for name, obj in everything.items()], clusters) as made:
        yield made


@pytest.mark.parametrize("name", CASES)
def test_requests_go_where_the_virtual_service_says(proxy: Proxy, name: str) -> None:
    check_table(proxy, name, CASES[name][1])


def test_weights(proxy: Proxy) -> None:
    seen = [json.loads(ask(proxy, "weights", "/").body)["backend"] for _ in range(200)]
    # Expected 150 of 200; the bounds are seven standard deviations away.
    assert 107 < seen.count("v1") < 193


def test_faults_by_chance(proxy: Proxy) -> None:
    seen = [ask(proxy, "some faults", "/").status for _ in range(100)]
    assert 15 < seen.count(500) < 85 and set(seen) == {200, 500}


def test_a_mirror_sees_a_copy(proxy: Proxy, backends: dict[str, Backend]) -> None:
    assert json.loads(ask(proxy, "mirror", "/vs-mirrored").body)["backend"] == "v1"
    deadline = time.monotonic() + 30
    while "/vs-mirrored" not in backends["v3"].seen:
        assert time.monotonic() < deadline, "the mirror saw nothing"
        time.sleep(0.02)


def test_problems_name_the_field() -> None:
    obj = service(http({"uri": {"regex": "(?=a)"}}), http({"sourceLabels": {"app": "x"}}))
    said = [problem.message for problem in parse(Mesh(), obj).problems]
    assert said[0].startswith("spec.http[0].match[0].uri.regex")
    assert said[1].startswith("spec.http[1].match[0].sourceLabels")


def test_hosts_and_destinations_are_completed() -> None:
    made = parse(
        Mesh(), service(http(route=[{"destination": {"host": "api.example.com", "port": {"number": 443}}}]))
    )
    assert made.hosts == ("web.shop.svc.cluster.local",)
    (backend,) = made.http[0].rule.backends
    assert backend.reference == BackendReference("Hostname", ObjectKey("", "api.example.com"), 443)
