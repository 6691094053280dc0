"""The L7 hop: requests through a waypoint against the direct path, L4 alone, and one bare Envoy.

Run by `make bench`. Boots a cluster of its own, measures the same requests on every path in one run, and prints
ratios; nothing is asserted.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from l4 import MESHLIGHT, ROOT, TICKS, cluster_processes, pod, rss, run

from meshlight.controlplane.gateways.proxy import envoy

SECONDS = "4"
CONNECTIONS = (1, 32)


def main() -> None:
    """Boot, measure, print a table, tear down."""
    subprocess.run(["cargo", "build", "-q", "--release"], cwd=ROOT / "load", check=True)
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "MESHLIGHT_HOME": home,
            "KUBECONFIG": f"{home}/clusters/bench/kubeconfig",
        }
        try:
            run(environment, MESHLIGHT, "up", "--name", "bench", "--nodes", "2")
            measure(environment, home)
        finally:
            down = [MESHLIGHT, "down", "--name", "bench", "--purge"]
            subprocess.run(down, env=environment, check=False, capture_output=True)


def measure(environment: dict[str, str], home: str) -> None:
    """Every path in one run."""

    def kubectl(*arguments: str, stdin: Any = None) -> str:
        return run(environment, "kubectl", *arguments, stdin=json.dumps(stdin) if stdin else None)

    kubectl("create", "namespace", "bench")
    server = pod("server", "bench-node-1", "serve", "9000")
    server["metadata"]["labels"] = {"app": "server"}
    kubectl("apply", "-f", "-", stdin=server)
    service = {"selector": {"app": "server"}, "ports": [{"name": "http", "port": 9000}]}
    metadata = {"name": "server", "namespace": "bench"}
    kubectl(
        "apply", "-f", "-", stdin={"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service}
    )
    kubectl("wait", "-n", "bench", "--for=condition=Ready", "pod/server")
    address = kubectl("get", "service", "server", "-n", "bench", "-o", "jsonpath={.spec.clusterIP}") + ":9000"
    endpoint = kubectl("get", "pod", "server", "-n", "bench", "-o", "jsonpath={.status.podIP}")
    bare = bare_envoy(endpoint)
    kubectl("apply", "-f", "-", stdin=bare)
    kubectl("wait", "-n", "bench", "--for=condition=Ready", "pod/bare")
    bare_address = kubectl("get", "pod", "bare", "-n", "bench", "-o", "jsonpath={.status.podIP}") + ":8080"

    results: dict[str, list[dict[str, Any]]] = {}

    def row(path: str, target: str) -> None:
        print(f"measuring: {path}", flush=True)
        results[path] = [load(environment, home, target, connections) for connections in CONNECTIONS]

    row("direct", address)
    row("bare Envoy", bare_address)
    kubectl("label", "namespace", "bench", "istio.io/dataplane-mode=ambient")
    redirected = "--for=jsonpath={.metadata.annotations.ambient\\.istio\\.io/redirection}=enabled"
    kubectl("wait", "-n", "bench", "pod/server", redirected)
    row("L4", address)
    run(environment, MESHLIGHT, "waypoint", "apply", "-n", "bench", "--enroll-namespace", "--wait")
    time.sleep(1)
    row("waypoint", address)
    print(
        f"{'path':<14}{'connections':>12}{'requests/s':>12}{'of direct':>11}{'p50/p99 µs':>16}"
        f"{'Envoy CPU s/10k':>17}"
    )
    for path, rows in results.items():
        for index, connections in enumerate(CONNECTIONS):
            found, direct = rows[index], results["direct"][index]
            rate, base = (r["count"] / r["seconds"] for r in (found, direct))
            cost = f"{found['envoy'] / (found['count'] / 1e4):.2f}" if found["envoy"] else ""
            latency = f"{found['p50_us']}/{found['p99_us']}"
            failed = f"  failed: {found['failed']}" if found["failed"] else ""
            print(
                f"{path:<14}{connections:>12}{rate:>12,.0f}{rate / base:>11.2f}{latency:>16}{cost:>17}{failed}"
            )
    largest = max(rss(p) for p in processes(home, "envoy"))
    print(f"\nEnvoy: {largest / 1024:.1f} MiB RSS the largest")


def bare_envoy(endpoint: str) -> dict[str, Any]:
    """A pod of one Envoy with the same single route and nothing else."""
    filters = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bare",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "server"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{filters}.http.router.v3.Router"},
            }
        ],
    }
    config = {
        "static_resources": {
            "listeners": [
                {
                    "address": {"socket_address": {"address": "0.0.0.0", "port_value": 8080}},
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [
                {
                    "name": "server",
                    "type": "STATIC",
                    "load_assignment": {
                        "cluster_name": "server",
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {
                                        "endpoint": {
                                            "address": {
                                                "socket_address": {"address": endpoint, "port_value": 9000}
                                            }
                                        }
                                    }
                                ]
                            }
                        ],
                    },
                }
            ],
        }
    }
    made = pod("bare", "bench-node-1")
    command = [envoy(), "--config-yaml", json.dumps(config), "--concurrency", "2", "--log-level", "error"]
    made["spec"]["containers"][0]["command"] = [*command, "--use-dynamic-base-id"]
    made["spec"]["containers"][0]["readinessProbe"] = {"tcpSocket": {"port": 8080}, "periodSeconds": 1}
    return made


def load(environment: dict[str, str], home: str, target: str, connections: int) -> dict[str, Any]:
    """Requests from a pod of its own; with the CPU seconds that Envoys used meanwhile."""
    name = f"load-{time.monotonic_ns()}"
    manifest = pod(name, "bench-node-2", "http", target, str(connections), SECONDS)
    before = cpu(home)
    run(environment, "kubectl", "apply", "-f", "-", stdin=json.dumps(manifest))
    done = "--for=jsonpath={.status.phase}=Succeeded"
    run(environment, "kubectl", "wait", "-n", "bench", f"pod/{name}", "--timeout=60s", done)
    result: dict[str, Any] = json.loads(run(environment, "kubectl", "logs", "-n", "bench", name))
    result["envoy"] = cpu(home) - before
    run(environment, "kubectl", "delete", "pod", "-n", "bench", name)
    return result


def processes(home: str, program: str) -> list[int]:
    """Host pids of the cluster's processes of a program."""
    return [
        p for p in cluster_processes(home) if Path(f"/proc/{p}/comm").read_text().strip().startswith(program)
    ]


def cpu(home: str) -> float:
    """CPU seconds used so far by all Envoys."""
    total = 0
    for pid in processes(home, "envoy"):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


if __name__ == "__main__":
    main()
