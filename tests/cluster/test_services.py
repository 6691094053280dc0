"""Services with live traffic: from pods, from nodes, and from the machine itself."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from typing import Any

from clusters import Cluster, pod, wait_until

SERVER = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{os.environ['HOSTNAME']} {self.client_address[0]}".encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
"""
READY = {"readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1}}


def web(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    made = pod(name, namespace, ["python3", "-c", SERVER], **spec)
    made["metadata"]["labels"] = {"app": "web"}
    made["spec"]["containers"][0] |= READY | {"env": [{"name": "HOSTNAME", "value": name}]}
    return made


def balancer(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": 80, "targetPort": 8080}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"type": "LoadBalancer", "selector": {"app": "web"}, "ports": ports, **spec},
    }


def address(cluster: Cluster, namespace: str, name: str) -> str:
    """The LoadBalancer address, once there is one."""

    def given() -> str:
        status = cluster.get("service", name, "-n", namespace)["status"]
        return (status["loadBalancer"].get("ingress") or [{}])[0].get("ip", "")

    return str(wait_until(given, what="a LoadBalancer address"))


def answers(command: list[str], count: int = 12) -> set[str]:
    """Who answers, of several requests."""
    found = set()
    for _ in range(count):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, (command, done.stderr)
        found.add(done.stdout.split()[0])
    return found


def listener(cluster: Cluster, namespace: str, name: str) -> int:
    """The machine's port of a Service, once it is open."""

    def number() -> int:
        path = cluster.state / "listeners.json"
        entries = json.loads(path.read_text())["listeners"] if path.exists() else []
        return next((e["hostPort"] for e in entries if (e["namespace"], e["service"]) == (namespace, name)), 0)

    return int(wait_until(number, what="a listener on the machine"))


def test_a_load_balancer_is_reached_from_pods_nodes_fabric_and_the_machine(
    cluster: Cluster, namespace: str
) -> None:
    nodes = [f"{cluster.name}-node-{n}" for n in (1, 2, 3)]
    cluster.apply(
        web("one", namespace, nodeName=nodes[0]),
        web("two", namespace, nodeName=nodes[1]),
        pod("client", namespace, ["sleep", "600"], nodeName=nodes[2]),
        balancer("web", namespace),
        balancer("local", namespace, externalTrafficPolicy="Local"),
    )
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod", "--all", "--timeout=60s")
    curl = ["curl", "-sS", "--max-time", "5", "--retry", "5", "--retry-all-errors", "--retry-delay", "1"]
    at, local = address(cluster, namespace, "web"), address(cluster, namespace, "local")
    environment = ["env", f"KUBECONFIG={cluster.state / 'kubeconfig'}", f"HOME={cluster.home}"]
    execute = [*environment, "kubectl", "exec", "-n", namespace, "client", "--", *curl]
    assert answers([*execute, f"http://{at}/"]) == {"one", "two"}
    assert answers([*execute, f"http://{local}/"]) == {"one", "two"}, "pods are not bound by the policy"
    assert answers(cluster.inside(*curl, f"http://{at}/", netns=nodes[2])) == {"one", "two"}
    assert answers(cluster.inside(*curl, f"http://{at}/")) == {"one", "two"}
    spec = cluster.get("service", "local", "-n", namespace)["spec"]
    node_port, health = spec["ports"][0]["nodePort"], spec["healthCheckNodePort"]
    assert answers(cluster.inside(*curl, f"http://172.20.0.11:{node_port}/"), 4) == {"one"}, "its own only"
    checks = {
        n: subprocess.run(
            cluster.inside(
                "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://172.20.0.1{n}:{health}/"
            ),
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout
        for n in (1, 2, 3)
    }
    assert checks == {1: "200", 2: "200", 3: "503"}
    source = subprocess.run(
        cluster.inside(*curl, f"http://{local}/"), capture_output=True, text=True, timeout=30
    ).stdout.split()[1]
    assert source == "172.20.0.1", "the policy Local keeps the client's address"
    # From the machine itself, by loopback listeners; numbers stay over a change.
    port = listener(cluster, namespace, "web")
    seen = set()
    for _ in range(12):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
            seen.add(answer.read().decode().split()[0])
    assert seen == {"one", "two"}
    assert f"127.0.0.1:{port}" in cluster.meshlight("status", "--name", cluster.name)
    cluster.kubectl("delete", "service", "web", "-n", namespace)

    def closed() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
        except OSError:
            return True
        return False

    wait_until(closed, what="the listener to go with its Service")


def test_pools_conditions_and_an_address_of_ones_own(cluster: Cluster, namespace: str) -> None:
    pool = {
        "apiVersion": "cilium.io/v2alpha1",
        "kind": "CiliumLoadBalancerIPPool",
        "metadata": {"name": namespace},
        "spec": {
            "blocks": [{"start": "172.20.2.1", "stop": "172.20.2.9"}],
            "serviceSelector": {"matchLabels": {"io.kubernetes.service.namespace": namespace}},
        },
    }
    wished = balancer("wished", namespace)
    wished["metadata"]["annotations"] = {"lbipam.cilium.io/ips": "172.20.2.7"}
    refused = balancer("refused", namespace, loadBalancerIP="203.0.113.1")
    try:
        cluster.apply(pool)
        cluster.apply(wished, refused)
        assert address(cluster, namespace, "wished") == "172.20.2.7"
        conditions = wait_until(
            lambda: cluster.get("service", "refused", "-n", namespace)["status"].get("conditions"),
            what="a condition",
        )
        assert (conditions[0]["status"], conditions[0]["reason"]) == ("False", "no_pool")
        assert "<pending>" in cluster.kubectl("get", "service", "refused", "-n", namespace)
        row = wait_until(
            lambda: (r := cluster.kubectl("get", "ippools", namespace, "--no-headers").split())[3] == "8" and r,
            what="the pool's count",
        )
        assert row[:4] == [namespace, "false", "False", "8"]
    finally:
        cluster.kubectl("delete", "ippools", namespace, check=False)
    wait_until(
        lambda: not cluster.get("service", "wished", "-n", namespace)["status"]["loadBalancer"].get("ingress"),
        what="the address to go with its pool",
    )


def test_any_service_may_be_exposed(cluster: Cluster) -> None:
    shown = cluster.meshlight(
        "expose", "--name", cluster.name, "-n", "kube-system", "kube-dns", "9153", "-o", "json"
    )
    (entry,) = json.loads(shown)
    with urllib.request.urlopen(f"http://127.0.0.1:{entry['hostPort']}/metrics", timeout=10) as answer:
        assert b"coredns_dns_requests_total" in answer.read()
    cluster.meshlight("expose", "--name", cluster.name, "-n", "kube-system", "kube-dns", "--remove")
    assert "no Service nothing" in cluster.meshlight("expose", "--name", cluster.name, "nothing", check=False)
