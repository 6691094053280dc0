"""Tracing in the cluster: the seed's checks of Jaeger, its storage across a restart, the verbs that read it."""

from __future__ import annotations

import json
import time
from typing import Any
from uuid import uuid4

from clusters import Cluster, wait_until

QUERY, COLLECTOR = "jaeger-query.observability", "jaeger-collector.observability"


def asked(cluster: Cluster, url: str, *arguments: str) -> str:
    """`curl` from a node of the cluster to a Service's address."""
    host = url.split("//")[1].split(":")[0]
    name, namespace = host.split(".")[:2]
    address = cluster.get("service", name, "-n", namespace)["spec"]["clusterIP"]
    node = cluster.get("nodes")["items"][0]["metadata"]["name"]
    import subprocess

    command = cluster.inside("curl", "-sS", "-m", "20", *arguments, url.replace(host, address), netns=node)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def zipkin_spans(identity: str, service: str) -> list[dict[str, Any]]:
    now = time.time_ns() // 1000
    common = {
        "traceId": identity,
        "timestamp": now,
        "duration": 5000,
        "localEndpoint": {"serviceName": service},
    }
    return [
        common | {"id": "00000000000000a1", "name": "root", "kind": "SERVER"},
        common
        | {"id": "00000000000000a2", "name": "leaf", "parentId": "00000000000000a1", "timestamp": now + 100},
    ]


def test_the_seeds_checks_and_a_restart_keeps_traces(cluster: Cluster) -> None:
    cluster.kubectl(
        "rollout", "status", "-n", "observability", "deployment/jaeger", "--timeout=90s", timeout=120
    )
    pods = cluster.get("pods", "-n", "observability", "-l", "app.kubernetes.io/name=jaeger")["items"]
    requests = pods[0]["spec"]["containers"][0]["resources"]["requests"]
    assert requests == {"cpu": "200m", "memory": "512Mi"}
    assert cluster.get("servicemonitor", "jaeger", "-n", "observability")
    route = cluster.get("httproute", "jaeger", "-n", "observability")
    assert route["spec"]["hostnames"] == ["jaeger.sulibot.com"]
    head = asked(cluster, f"http://{COLLECTOR}:9411/api/v2/spans", "-I")
    assert head.startswith("HTTP/1.1 405") and "Allow: POST" in head
    identity = uuid4().hex
    body = json.dumps(zipkin_spans(identity, "seed-shop"))
    url = f"http://{COLLECTOR}:9411/api/v2/spans"
    assert "202" in asked(
        cluster, url, "-d", body, "-H", "Content-Type: application/json", "-w", "%{http_code}"
    )
    assert "otelcol_receiver_accepted_spans_total" in asked(cluster, f"http://{QUERY}:16686/metrics")
    cluster.kubectl(
        "delete", "pod", "-n", "observability", pods[0]["metadata"]["name"], "--grace-period=0", "--force"
    )
    cluster.kubectl(
        "rollout", "status", "-n", "observability", "deployment/jaeger", "--timeout=90s", timeout=120
    )

    def found() -> Any:
        answer = asked(cluster, f"http://{QUERY}:16686/api/traces/{identity}")
        return json.loads(answer)["data"] if answer.startswith("{") else None

    (trace,) = wait_until(found, 60, "the trace after a restart of the pod")
    root, leaf = trace["spans"]
    assert leaf["references"][0]["spanID"] == root["spanID"]
    shown = cluster.meshlight("traces", "show", identity)
    assert "seed-shop root" in shown and "  seed-shop leaf" in shown and "\x1b" not in shown
    listed = json.loads(cluster.meshlight("traces", "find", "--service", "seed-shop", "-o", "json"))
    assert [line["traceId"] for line in listed] == [identity]
    exported = cluster.meshlight("traces", "export", identity, "--format", "otlp")
    assert len(json.loads(exported)["resourceSpans"][0]["scopeSpans"][0]["spans"]) == 2
    cluster.meshlight("flows", "--since", "1h")
