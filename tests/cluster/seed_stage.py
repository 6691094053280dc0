"""What the seed's commands are run against: stand-ins of its names where a component comes later, and files.

Nothing here replaces what a cluster has already: only what is missing is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clusters import Cluster, wait_until

Object = dict[str, Any]

WAYPOINT = "kubernetes/apps/1-network/istio/waypoints/observability-waypoint.yaml"
_LISTENER = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("X-Stand-In", sys.argv[2]); self.end_headers()
    do_HEAD = do_POST = do_GET
    def log_message(self, *_): pass
print("prometheus: serving as", sys.argv[2], flush=True)
http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Answer).serve_forever()
"""


def deployment(name: str, namespace: str, port: int, labels: dict[str, str] | None = None) -> Object:
    """A program that answers HTTP under a component's name."""
    labels = labels or {"app.kubernetes.io/name": name}
    container = {
        "name": name,
        "image": "local/program",
        "command": ["python3", "-c", _LISTENER, str(port), name],
        "ports": [{"containerPort": port}],
        "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [container], "terminationGracePeriodSeconds": 1},
            },
        },
    }


def service(name: str, namespace: str, port: int, selector: dict[str, str]) -> Object:
    """The Service in front of one."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": port, "targetPort": port}]},
    }


def release(name: str, namespace: str, chart: str) -> Object:
    """A HelmRelease as the seed's repository has it."""
    source = {"kind": "HelmRepository", "name": chart.split("/")[0]}
    spec = {"chart": chart.split("/")[1], "version": "1.24.1", "sourceRef": source}
    return {
        "apiVersion": "helm.toolkit.fluxcd.io/v2",
        "kind": "HelmRelease",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"interval": "30m", "chart": {"spec": spec}, "values": {"profile": "ambient"}},
    }


def route(name: str, port: int) -> Object:
    """An HTTPRoute of the seed."""
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": name, "namespace": "observability"},
        "spec": {
            "hostnames": [f"{name}.sulibot.com"],
            "parentRefs": [{"name": "gateway-internal", "namespace": "network"}],
            "rules": [{"backendRefs": [{"name": name, "port": port}]}],
        },
    }


def gateway(name: str, namespace: str, **spec: Any) -> Object:
    """A Gateway; the internal one is of a class that nobody here serves."""
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


RELEASES = (
    release("istio-base", "istio-system", "istio/base"),
    release("istiod", "istio-system", "istio/istiod"),
    release("ztunnel", "istio-system", "istio/ztunnel"),
    release("jaeger", "observability", "jaegertracing/jaeger"),
    release("kiali-server", "observability", "kiali/kiali-server"),
)
NAMESPACES = tuple(
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    for name in ("observability", "network")
)
_HTTP = [{"name": "http", "port": 80, "protocol": "HTTP"}]
STAND_INS = (
    *RELEASES,
    gateway("gateway-internal", "network", gatewayClassName="cilium", listeners=_HTTP),
    route("jaeger", 16686),
    route("kiali", 20001),
    deployment("jaeger", "observability", 9411),
    service("jaeger-collector", "observability", 9411, {"app.kubernetes.io/name": "jaeger"}),
    deployment("kiali-server", "observability", 20001, {"app.kubernetes.io/name": "kiali"}),
    deployment("prometheus", "observability", 9090),
    service("prometheus-operated", "observability", 9090, {"app.kubernetes.io/name": "prometheus"}),
    deployment("external-dns", "network", 7979),
)


def ensure(cluster: Cluster) -> list[Object]:
    """Make what is missing; returns what was made."""
    for namespace in NAMESPACES:
        cluster.kubectl("create", "-f", "-", stdin=json.dumps(namespace), check=False)
    made = []
    for obj in STAND_INS:
        shown = cluster.kubectl("create", "-f", "-", stdin=json.dumps(obj), check=False)
        if "AlreadyExists" not in shown:
            assert "created" in shown, shown
            made.append(obj)
    for obj in made:
        if obj["kind"] == "HelmRelease":
            name, namespace = obj["metadata"]["name"], obj["metadata"]["namespace"]
            ready = {"type": "Ready", "status": "True", "reason": "InstallSucceeded"}
            ready |= {"lastTransitionTime": "2025-12-02T00:00:00Z", "message": "Helm install succeeded"}
            body = json.dumps({"status": {"conditions": [ready]}})
            patch = ("--subresource=status", "--type=merge", "-p", body)
            cluster.kubectl("patch", "helmrelease", name, "-n", namespace, *patch)
    for namespace in ("observability", "network"):
        available = ("--all", "--for=condition=Available", "--timeout=90s")
        cluster.kubectl("wait", "deploy", *available, "-n", namespace, timeout=120)
    return made


def remove(cluster: Cluster, made: list[Object]) -> None:
    """Take away what `ensure` made."""
    for obj in reversed(made):
        where = ("-n", obj["metadata"]["namespace"])
        kind = (
            f"{obj['kind']}.{obj['apiVersion'].partition('/')[0]}" if "/" in obj["apiVersion"] else obj["kind"]
        )
        cluster.kubectl("delete", kind, obj["metadata"]["name"], *where, "--wait=false", check=False)
    wait_until(
        lambda: (
            not [p for p in cluster.get("pods", "-n", "observability")["items"] if "stand-in" in json.dumps(p)]
        ),
        60,
        "the stand-ins to go",
    )


def write_files(folder: Path) -> None:
    """The files of the seed's repository that its commands name."""
    path = folder / WAYPOINT
    path.parent.mkdir(parents=True)
    waypoint = gateway(
        "observability-waypoint",
        "observability",
        gatewayClassName="istio-waypoint",
        listeners=[{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
    )
    path.write_text(json.dumps(waypoint))
