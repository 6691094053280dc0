"""Waypoints and gateways on a real cluster: real Envoys behind real node proxies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from clusters import Cluster, pod, service, wait_until

PROGRAM = str(Path(__file__).with_name("http_programs.py"))
GATEWAY_API = "gateway.networking.k8s.io/v1"


def account(name: str, namespace: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}}


def server(name: str, namespace: str, *, app: str = "web") -> dict[str, Any]:
    made = pod(name, namespace, [sys.executable, PROGRAM, "serve", "8080"], serviceAccountName="web")
    made["metadata"]["labels"] = {"app": app, "version": name}
    container = made["spec"]["containers"][0]
    container["env"] = [{"name": "NAME", "value": name}]
    container["readinessProbe"] = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}
    return made


def client(namespace: str, *command: str, name: str = "client") -> dict[str, Any]:
    return pod(name, namespace, list(command) or ["sleep", "100000"], serviceAccountName="client")


def waypoint(namespace: str, name: str = "waypoint") -> dict[str, Any]:
    return {
        "apiVersion": GATEWAY_API,
        "kind": "Gateway",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "gatewayClassName": "istio-waypoint",
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    }


def route(name: str, namespace: str, parent: dict[str, Any], *rules: Any, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": GATEWAY_API,
        "kind": "HTTPRoute",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"parentRefs": [parent], "rules": list(rules), **spec},
    }


def web(name: str, namespace: str, app: str) -> dict[str, Any]:
    made = service(name, namespace, 8080)
    made["spec"]["selector"] = {"app": app}
    made["spec"]["ports"][0]["name"] = "http"
    return made


def call(cluster: Cluster, namespace: str, *arguments: str) -> tuple[int, Any]:
    """What curl in the client's pod got: the status, and the body (decoded if it is JSON)."""
    text = cluster.kubectl(
        "exec", "-n", namespace, "client", "--", "curl", "-s", "-m", "20", "-w", "\n%{http_code}", *arguments,
        check=False,
    )  # fmt: skip
    body, _, status = text.rpartition("\n")
    code = int(status) if status.strip().isdigit() else 0
    return code, json.loads(body) if body.startswith("{") else body


def counts(cluster: Cluster, namespace: str, name: str = "load") -> dict[str, Any]:
    text = cluster.kubectl("logs", "-n", namespace, name, "--tail=1", check=False).strip()
    return (
        dict(json.loads(text)) if text.startswith("{") else {"done": 0, "failed": 0, "waypoint": 0, "direct": 0}
    )


def ready(cluster: Cluster, namespace: str, *names: str) -> None:
    cluster.kubectl(
        "wait", "-n", namespace, "--for=condition=Ready", "--timeout=120s", *(f"pod/{n}" for n in names),
        timeout=150,
    )  # fmt: skip


def programmed(cluster: Cluster, namespace: str, name: str = "waypoint") -> None:
    cluster.kubectl(
        "wait", "-n", namespace, "--for=condition=Programmed", "--timeout=120s", f"gateway/{name}", timeout=150
    )


def metrics(cluster: Cluster, namespace: str) -> str:
    address = cluster.get("pod", "-n", namespace, "-l", "gateway.networking.k8s.io/gateway-name=waypoint")
    ip = address["items"][0]["status"]["podIP"]
    return str(call(cluster, namespace, f"http://{ip}:15020/stats/prometheus")[1])


def test_a_waypoint_routes_by_identity_path_and_header_and_tells(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode=ambient")
    cluster.apply(
        account("web", namespace), account("client", namespace), web("web", namespace, "web"),
        web("next", namespace, "next"), server("v1", namespace), server("v2", namespace, app="next"),
        client(namespace), waypoint(namespace),
    )  # fmt: skip
    ready(cluster, namespace, "v1", "v2", "client")
    programmed(cluster, namespace)
    assert "x-request-id" not in call(cluster, namespace, "http://web:8080/")[1]["headers"], "not asked for yet"
    cluster.kubectl("label", "namespace", namespace, "istio.io/use-waypoint=waypoint")
    wait_until(
        lambda: "x-request-id" in call(cluster, namespace, "http://web:8080/")[1]["headers"],
        what="requests through the waypoint",
    )
    to_service = {"group": "", "kind": "Service", "name": "web"}
    rules = (
        {
            "matches": [{"headers": [{"name": "user", "value": "tester"}]}],
            "backendRefs": [{"name": "next", "port": 8080}],
        },
        {
            "matches": [{"path": {"value": "/old"}}],
            "filters": [
                {
                    "type": "URLRewrite",
                    "urlRewrite": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}},
                }
            ],
            "backendRefs": [{"name": "web", "port": 8080}],
        },
        {"matches": [{"path": {"value": "/lost"}}], "backendRefs": [{"name": "nowhere", "port": 8080}]},
    )
    cluster.apply(route("web", namespace, to_service, *rules))
    wait_until(lambda: call(cluster, namespace, "http://web:8080/old/x")[0] == 200, what="the route")
    assert call(cluster, namespace, "http://web:8080/old/x")[1]["path"] == "/new/x"
    assert call(cluster, namespace, "-H", "user: tester", "http://web:8080/")[1]["name"] == "v2"
    assert call(cluster, namespace, "http://web:8080/other")[0] == 404
    assert call(cluster, namespace, "http://web:8080/lost")[0] == 500

    def conditions() -> dict[str, tuple[str, str]]:
        parents = cluster.get("httproute", "web", "-n", namespace).get("status", {}).get("parents", [])
        return {c["type"]: (c["status"], c["reason"]) for p in parents for c in p["conditions"]}

    expected = {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("False", "BackendNotFound")}
    wait_until(lambda: conditions() == expected, what="the route's status")
    told = metrics(cluster, namespace)
    line = next(
        line for line in told.splitlines() if line.startswith("istio_requests_total{") and '"v2"' in line
    )
    for label in (
        'reporter="waypoint"',
        f'source_principal="spiffe://cluster.local/ns/{namespace}/sa/client"',
        f'destination_service="next.{namespace}.svc.cluster.local"',
        f'destination_principal="spiffe://cluster.local/ns/{namespace}/sa/web"',
        'response_code="200"',
        'connection_security_policy="mutual_tls"',
    ):
        assert label in line
    bucket = "istio_request_duration_milliseconds_bucket{"  # merged by Envoy every few seconds
    wait_until(lambda: bucket in metrics(cluster, namespace), what="histograms")


def test_nothing_is_lost_as_waypoints_come_change_and_go(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode=ambient")
    cluster.kubectl("label", "namespace", namespace, "istio.io/use-waypoint=waypoint")
    cluster.apply(
        account("web", namespace), account("client", namespace), web("web", namespace, "web"),
        server("v1", namespace), server("v2", namespace), client(namespace),
    )  # fmt: skip
    ready(cluster, namespace, "v1", "v2", "client")
    wait_until(lambda: call(cluster, namespace, "http://web:8080/")[0] == 200, what="the servers")
    cluster.apply(client(namespace, sys.executable, PROGRAM, "load", "web", "8080", name="load"))
    ready(cluster, namespace, "load")

    def more(way: str, number: int = 30) -> None:
        before = counts(cluster, namespace)[way]
        wait_until(lambda: counts(cluster, namespace)[way] > before + number, 120, f"requests {way}")

    more("direct")
    cluster.apply(waypoint(namespace))
    programmed(cluster, namespace)
    more("waypoint")
    cluster.kubectl("scale", "deployment", "waypoint", "-n", namespace, "--replicas=2")
    cluster.kubectl("rollout", "status", "deployment/waypoint", "-n", namespace, "--timeout=120s", timeout=150)
    more("waypoint")
    cluster.kubectl("rollout", "restart", "deployment/waypoint", "-n", namespace)
    cluster.kubectl("rollout", "status", "deployment/waypoint", "-n", namespace, "--timeout=120s", timeout=150)
    more("waypoint")
    cluster.kubectl("delete", "gateway", "waypoint", "-n", namespace)
    more("direct", 60)
    seen = counts(cluster, namespace)
    assert seen["failed"] == 0, seen


def test_a_gateway_at_the_edge(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode=ambient")
    host = f"{namespace}.example.test"
    gateway = {
        "apiVersion": GATEWAY_API,
        "kind": "Gateway",
        "metadata": {
            "name": "edge",
            "namespace": namespace,
            "annotations": {"meshlight.io/certificates": "generate"},
        },
        "spec": {
            "gatewayClassName": "cilium",
            "listeners": [
                {"name": "http", "port": 80, "protocol": "HTTP", "hostname": "*.example.test"},
                {
                    "name": "https",
                    "port": 443,
                    "protocol": "HTTPS",
                    "hostname": "*.example.test",
                    "tls": {"certificateRefs": [{"name": "example-tls"}]},
                },
            ],
        },
    }
    cluster.apply(
        account("web", namespace), account("client", namespace), web("web", namespace, "web"),
        server("v1", namespace), client(namespace), gateway,
        route(
            "web", namespace, {"name": "edge"}, {"backendRefs": [{"name": "web", "port": 8080}]},
            hostnames=[host],
        ),
    )  # fmt: skip
    ready(cluster, namespace, "v1", "client")
    programmed(cluster, namespace, "edge")
    status = cluster.get("gateway", "edge", "-n", namespace)["status"]
    address = status["addresses"][0]["value"]
    for scheme, port in (("http", 80), ("https", 443)):
        ask = ("-k", "--resolve", f"{host}:{port}:{address}", f"{scheme}://{host}/x")
        wait_until(
            lambda ask=ask: call(cluster, namespace, *ask)[0] == 200, what=f"{scheme} through the gateway"
        )  # type: ignore[misc]
    other = ("--resolve", f"other.example.test:80:{address}", "http://other.example.test/")
    assert call(cluster, namespace, *other)[0] == 404
    # The cluster's DNS server answers for the route's name.
    wait_until(lambda: call(cluster, namespace, f"http://{host}/dns")[0] == 200, what="the name")
    listeners = cluster.get("gateway", "edge", "-n", namespace)["status"]["listeners"]
    assert {entry["name"]: entry["attachedRoutes"] for entry in listeners} == {"http": 1, "https": 1}
