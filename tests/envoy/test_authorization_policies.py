"""AuthorizationPolicies as a real Envoy decides on them: who may call what, and which policy says no."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from envoy_proxy import Proxy, cluster, listener, running

from meshlight.controlplane.envoy import authorization
from meshlight.controlplane.facts import ObjectKey

CLIENT = "spiffe://cluster.local/ns/shop/sa/client"
OTHER = "spiffe://cluster.local/ns/bank/sa/teller"


def policy(name: str, action: str, *rules: Any, dry_run: bool = False, **spec: Any) -> dict[str, Any]:
    annotations = {"istio.io/dry-run": "true"} if dry_run else {}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "shop", "annotations": annotations},
        "spec": {"action": action, "rules": list(rules), **spec},
    }


def source(**fields: Any) -> dict[str, Any]:
    return {"from": [{"source": fields}]}


def operation(**fields: Any) -> dict[str, Any]:
    return {"to": [{"operation": fields}]}


def when(key: str, *values: str, **more: Any) -> dict[str, Any]:
    return {"when": [{"key": key, "values": list(values), **more}]}


Call = dict[str, Any]
YES, NO = 200, 403
A: Call = {"identity": CLIENT}
B: Call = {"identity": OTHER}
NOBODY: Call = {}

CASES: dict[str, tuple[list[dict[str, Any]], list[tuple[Call, int]]]] = {
    "no-policy": ([], [(A, YES), (NOBODY, YES)]),
    "allow-nothing": ([policy("none", "ALLOW")], [(A, NO), (NOBODY, NO)]),
    "allow-all": ([policy("all", "ALLOW", {})], [(A, YES), (NOBODY, YES)]),
    "deny-all": ([policy("all", "DENY", {})], [(A, NO)]),
    "principal": (
        [policy("p", "ALLOW", source(principals=["cluster.local/ns/shop/sa/client"]))],
        [(A, YES), (B, NO), (NOBODY, NO)],
    ),
    "principal-prefix": (
        [policy("p", "ALLOW", source(principals=["cluster.local/ns/shop/*"]))],
        [(A, YES), (B, NO)],
    ),
    "principal-suffix": (
        [policy("p", "ALLOW", source(principals=["*/sa/teller"]))],
        [(A, NO), (B, YES)],
    ),
    "anyone-with-identity": ([policy("p", "ALLOW", source(principals=["*"]))], [(A, YES), (NOBODY, NO)]),
    "not-principal": (
        [policy("p", "ALLOW", source(notPrincipals=["cluster.local/ns/bank/sa/teller"]))],
        [(A, YES), (B, NO), (NOBODY, YES)],
    ),
    "namespace": ([policy("p", "ALLOW", source(namespaces=["shop"]))], [(A, YES), (B, NO), (NOBODY, NO)]),
    "namespace-not-part-of-a-name": ([policy("p", "ALLOW", source(namespaces=["ho"]))], [(A, NO)]),
    "namespace-suffix": ([policy("p", "ALLOW", source(namespaces=["*ank"]))], [(A, NO), (B, YES)]),
    "account-of-own-namespace": (
        [policy("p", "ALLOW", source(serviceAccounts=["client", "bank/other"]))],
        [(A, YES), (B, NO)],
    ),
    "address": (
        [policy("p", "DENY", source(ipBlocks=["10.1.0.0/16"]))],
        [
            (A, NO),
            ({**A, "source": "10.2.0.1"}, YES),
            ({**A, "source": "10.2.0.1", "headers": {"x-forwarded-for": "10.1.0.1"}}, YES),
            ({**A, "headers": {"x-forwarded-for": "10.2.0.1"}}, NO),
        ],
    ),
    "forwarded-address": (
        [policy("p", "DENY", source(remoteIpBlocks=["203.0.113.0/24"]))],
        [(A, YES), ({**A, "headers": {"x-forwarded-for": "203.0.113.9"}}, NO)],
    ),
    "two-sources-two-operations": (
        [
            policy(
                "p",
                "ALLOW",
                {
                    "from": [{"source": {"namespaces": ["shop"]}}, {"source": {"namespaces": ["bank"]}}],
                    "to": [{"operation": {"methods": ["GET"]}}, {"operation": {"paths": ["/w"]}}],
                },
            )
        ],
        [
            (A, YES),
            (B, YES),
            ({**A, "method": "POST"}, NO),
            ({**B, "method": "POST", "path": "/w"}, YES),
            (NOBODY, NO),
        ],
    ),
    "paths": (
        [policy("p", "ALLOW", operation(paths=["/exact", "/pre/*", "*/end"]))],
        [
            ({"path": "/exact"}, YES),
            ({"path": "/exact?q=1"}, YES),
            ({"path": "/exact2"}, NO),
            ({"path": "/pre/a/b"}, YES),
            ({"path": "/a/end"}, YES),
            ({"path": "/"}, NO),
        ],
    ),
    "path-templates": (
        [policy("p", "ALLOW", operation(paths=["/u/{*}/orders", "/files/{**}"]))],
        [
            ({"path": "/u/7/orders"}, YES),
            ({"path": "/u/7/8/orders"}, NO),
            ({"path": "/files/a/b/c"}, YES),
            ({"path": "/u//orders"}, NO),
        ],
    ),
    "not-paths": (
        [policy("p", "DENY", operation(notPaths=["/healthz", "/public/*"]))],
        [({"path": "/healthz"}, YES), ({"path": "/public/x"}, YES), ({"path": "/x"}, NO)],
    ),
    "hosts": (
        [policy("p", "ALLOW", operation(hosts=["Shop.example", "*.internal"]))],
        [
            ({}, YES),
            ({"headers": {"host": "SHOP.EXAMPLE"}}, YES),
            ({"headers": {"host": "a.internal"}}, YES),
            ({"headers": {"host": "other.example"}}, NO),
        ],
    ),
    "methods-and-ports": (
        [policy("p", "ALLOW", operation(methods=["GET"], ports=["8080"]))],
        [({}, YES), ({"destination": ("10.96.0.20", 9090)}, NO), ({"method": "PUT"}, NO)],
    ),
    "not-ports": (
        [policy("p", "DENY", operation(notPorts=["8080"]))],
        [({}, YES), ({"destination": ("10.96.0.20", 9090)}, NO)],
    ),
    "header": (
        [policy("p", "ALLOW", when("request.headers[x-team]", "blue", "gr*"))],
        [({"headers": {"x-team": "blue"}}, YES), ({"headers": {"x-team": "green"}}, YES), ({}, NO)],
    ),
    "header-not": (
        [policy("p", "DENY", when("request.headers[x-team]", notValues=["blue"]))],
        [({"headers": {"x-team": "blue"}}, YES), ({}, NO)],
    ),
    "conditions-are-anded": (
        [
            policy(
                "p",
                "ALLOW",
                {
                    "when": [
                        {"key": "source.namespace", "values": ["shop"]},
                        {"key": "destination.port", "values": ["8080"]},
                        {"key": "request.headers[x-a]", "values": ["*"]},
                    ]
                },
            )
        ],
        [({**A, "headers": {"x-a": "1"}}, YES), (A, NO), ({**B, "headers": {"x-a": "1"}}, NO)],
    ),
    "deny-wins": (
        [
            policy("all", "ALLOW", {}),
            policy("no-post", "DENY", operation(methods=["POST"])),
        ],
        [(A, YES), ({**A, "method": "POST"}, NO)],
    ),
    "any-allow-is-enough": (
        [policy("a", "ALLOW", source(namespaces=["shop"])), policy("b", "ALLOW", operation(paths=["/open"]))],
        [(A, YES), (B, NO), ({**B, "path": "/open"}, YES)],
    ),
    "dry-run": (
        [policy("p", "DENY", source(namespaces=["shop"]), dry_run=True)],
        [(A, YES), (B, YES)],
    ),
    "unknown-condition-allows-nothing": ([policy("p", "ALLOW", when("source.moon", "full"))], [(A, NO)]),
    "unknown-condition-denies-more": ([policy("p", "DENY", when("source.moon", "full"))], [(A, NO)]),
    "custom-without-provider": (
        [policy("p", "CUSTOM", operation(paths=["/admin*"]), provider={"name": "gone"})],
        [(A, YES), ({**A, "path": "/admin"}, NO)],
    ),
}


def policed(
    name: str, policies: list[dict[str, Any]], authorizers: Mapping[str, authorization.ExternalAuthorizer]
) -> Any:
    """A listener under policies."""
    compiled = [authorization.compile_policy(obj) for obj in policies]
    filters = authorization.http_filters(authorization.providers_of(compiled), authorizers)
    return listener(name, filters, authorization.route_rules(compiled, authorizers))


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    listeners = [policed(name, policies, {}) for name, (policies, _) in CASES.items()]
    with running(tmp_path_factory.mktemp("envoy"), listeners) as started:
        yield started


@pytest.mark.parametrize("name", list(CASES))
def test_decision(proxy: Proxy, name: str) -> None:
    for call, expected in CASES[name][1]:
        assert proxy.request(name, **call).status == expected, call


def test_dry_run_is_counted(proxy: Proxy) -> None:
    proxy.request("dry-run", identity=CLIENT)
    stats = dict(line.split(": ", 1) for line in proxy.stats().splitlines() if ": " in line)
    assert int(stats["http.dry-run.rbac.istio_dry_run_deny_.shadow_denied"]) >= 1


def test_rule_names_lead_back_to_the_policy() -> None:
    name = authorization.rule_name(ObjectKey("shop", "no-post"), 2)
    assert authorization.policy_of(f"rbac_access_denied_matched_policy[{name}]") == (
        ObjectKey("shop", "no-post"),
        2,
    )
    assert authorization.policy_of("via_upstream") is None


def test_what_is_not_http_fails_safe() -> None:
    """Without methods and headers an ALLOW rule allows nothing, a DENY rule denies more."""
    allow = authorization.compile_policy(policy("p", "ALLOW", operation(methods=["GET"])))
    deny = authorization.compile_policy(policy("p", "DENY", operation(methods=["GET"], ports=["80"])))
    assert allow.http and not allow.tcp
    (rule,) = deny.tcp.values()
    assert [p.WhichOneof("rule") for p in rule.permissions] == ["destination_port"]


def test_findings_name_the_field() -> None:
    compiled = authorization.compile_policy(policy("p", "DENY", {}, when("source.moon", "full")))
    assert [f.path for f in compiled.findings] == ["spec.rules[1].when[0].key"]


class Authorizer(BaseHTTPRequestHandler):
    """An external authorizer: yes to whoever says please, and it tells the server who it is."""

    def do_GET(self) -> None:
        allowed = self.headers.get("x-please") == "yes"
        self.send_response(200 if allowed else 418)
        self.send_header("x-seen", f"{self.path} {self.headers.get('x-hint', '')}".strip())
        self.send_header("x-why", "no please")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Authorizer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = free.getsockname()[1]
    paths = operation(paths=["/admin*"])
    obj = policy("ask", "CUSTOM", paths, provider={"name": "web"})
    common = authorization.ExternalAuthorizer(
        "web",
        "up",
        grpc=False,
        timeout=5,
        headers_to_upstream=("x-seen",),
        headers_to_downstream_on_deny=("x-why",),
        include_request_headers=("x-please", "x-h*"),
        path_prefix="/check",
    )
    listeners = []
    for name, authorizer in {
        "up": common,
        "down": replace(common, cluster="down"),
        "open": replace(common, cluster="down", fail_open=True),
        "status": replace(common, cluster="down", status_on_error=503),
    }.items():
        listeners.append(policed(name, [obj], {"web": authorizer}))
    clusters = [cluster("up", server.server_address[1]), cluster("down", nobody)]
    with running(tmp_path_factory.mktemp("envoy"), listeners, clusters) as started:
        yield started
    server.shutdown()


@pytest.mark.parametrize(
    ("name", "path", "headers", "status"),
    [
        ("up", "/", {}, 200),
        ("up", "/admin", {"x-please": "yes"}, 200),
        ("up", "/admin", {}, 418),
        ("down", "/admin", {"x-please": "yes"}, 403),
        ("down", "/", {}, 200),
        ("open", "/admin", {}, 200),
        ("status", "/admin", {}, 503),
    ],
)
def test_external_authorizer(asking: Proxy, name: str, path: str, headers: Call, status: int) -> None:
    assert asking.request(name, path=path, headers=headers).status == status


def test_external_authorizer_sees_and_tells(asking: Proxy) -> None:
    allowed = asking.request(
        "up", path="/admin/x", headers={"x-please": "yes", "x-hint": "h", "x-seen": "forged"}
    )
    assert allowed.headers["echo-x-seen"] == "/check/admin/x h"
    assert asking.request("up", path="/admin/x").headers["x-why"] == "no please"
