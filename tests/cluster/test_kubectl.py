"""Real kubectl, verbatim, against the embedded API server."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest
from clusters import Cluster, wait_until

COMMANDS = [
    # (command, what its output must match)
    ("get configmap istio -n istio-system -o yaml", r"tracing:\s+sampling: 100\s+zipkin"),
    ("get namespace -L istio.io/dataplane-mode", r"NAME\s+STATUS\s+AGE\s+DATAPLANE-MODE"),
    ("get peerauthentication -n istio-system", r"NAME\s+MODE\s+AGE\s+default\s+PERMISSIVE"),
    ("get pa -A -o wide", r"NAMESPACE\s+NAME\s+MODE\s+AGE\s+istio-system\s+default\s+PERMISSIVE"),
    ("get httproute -n observability", r"NAME\s+HOSTNAMES\s+AGE\s+jaeger\s+\[\"jaeger\.sulibot\.com\"\]"),
    (
        "get pods -n istio-system",
        r"(?m)^NAME\s+READY\s+STATUS\s+RESTARTS\s+AGE$[\s\S]*istiod-\S+\s+1/1\s+Running",
    ),
    ("get ds -n istio-system ztunnel", r"DESIRED\s+CURRENT\s+READY[\s\S]*ztunnel\s+3\s+3\s+3\s+3\s+3"),
    ("describe ds -n istio-system ztunnel", r"Desired Number of Nodes Scheduled: 3"),
    ("logs -n istio-system -l app=istiod", r"\{.*\}"),
    ("logs -n istio-system -l app=ztunnel", r"\{.*\}"),
    ("get nodes -o wide", r"INTERNAL-IP[\s\S]*node-1\s+Ready[\s\S]*172\.20\.0\.11"),
    ("get pods -A", r"NAMESPACE\s+NAME\s+READY[\s\S]*kube-system\s+coredns"),
    ("get deploy,rs,svc,ep -n istio-system", r"deployment\.apps/istiod\s+1/1\s+1\s+1"),
    ("describe pods -n istio-system -l app=istiod", r"Service Account:\s+istiod[\s\S]*Events:"),
    ("get events -n istio-system --sort-by=.lastTimestamp", r"No resources found|LAST SEEN"),
    (
        "get gateway -n network gateway-internal",
        r'gateways\.gateway\.\S+ "gateway-internal" not found',
    ),
    ("get crd", r"NAME\s+CREATED AT[\s\S]*peerauthentications\.security\.istio\.io"),
    ("get serviceaccounts -n default", r"NAME\s+SECRETS\s+AGE\s+default\s+0"),
    ("api-resources", r"peerauthentications\s+pa\s+security\.istio\.io/v1\s+true"),
    ("describe namespace istio-system", r"Name:\s+istio-system[\s\S]*Status:\s+Active"),
    ("explain peerauthentication.spec.mtls", r"FIELD|KIND:\s+PeerAuthentication"),
    ("auth can-i create pods", r"yes"),
    ("version", r"Server Version: v1\.32"),
]


@pytest.mark.parametrize(("command", "expected"), COMMANDS, ids=[c for c, _ in COMMANDS])
def test_command(cluster: Cluster, command: str, expected: str) -> None:
    shown = cluster.kubectl(*command.split(), check=False)
    assert re.search(expected, shown), shown


def config_map(namespace: str, **values: str) -> str:
    """A ConfigMap `settings`, as JSON."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "settings", "namespace": namespace},
            "data": values,
        }
    )


def test_apply_creates_changes_and_prunes_fields(cluster: Cluster, namespace: str) -> None:
    apply = ["apply", "-f", "-"]
    assert "created" in cluster.kubectl(*apply, stdin=config_map(namespace, a="1", b="2"))
    assert "unchanged" in cluster.kubectl(*apply, stdin=config_map(namespace, a="1", b="2"))
    assert "configured" in cluster.kubectl(*apply, stdin=config_map(namespace, a="3"))
    assert cluster.get("configmap", "settings", "-n", namespace)["data"] == {"a": "3"}
    cluster.kubectl("delete", "configmap", "settings", "-n", namespace)
    assert "NotFound" in cluster.kubectl("get", "cm", "settings", "-n", namespace, check=False)


def test_label_annotate_and_selectors(cluster: Cluster, namespace: str) -> None:
    for name, tier in (("one", "front"), ("two", "back")):
        cluster.kubectl("create", "configmap", name, "-n", namespace)
        cluster.kubectl("label", "configmap", name, "-n", namespace, f"tier={tier}")
    chosen = cluster.kubectl("get", "cm", "-n", namespace, "-l", "tier in (front)", "-o", "name")
    assert chosen.split() == ["configmap/one"]
    chosen = cluster.kubectl(
        "get", "cm", "-n", namespace, "--field-selector", "metadata.name=two", "-o", "name"
    )
    assert chosen.split() == ["configmap/two"]
    shown = cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode=ambient")
    assert "labeled" in shown
    assert re.search(
        rf"{namespace}\s+Active\s+\S+\s+ambient",
        cluster.kubectl("get", "namespace", "-L", "istio.io/dataplane-mode"),
    )


def test_secrets_sent_as_protobuf_keep_their_bytes(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("create", "secret", "generic", "key", "-n", namespace, "--from-literal=pin=1234")
    secret = cluster.get("secret", "key", "-n", namespace)
    assert (secret["type"], secret["data"]) == ("Opaque", {"pin": "MTIzNA=="})


@pytest.mark.parametrize("kind", ["merge", "json", "strategic"])
def test_patch(cluster: Cluster, namespace: str, kind: str) -> None:
    cluster.kubectl("create", "configmap", "settings", "-n", namespace, "--from-literal=a=1")
    body = {
        "merge": {"data": {"b": "2"}},
        "json": [{"op": "add", "path": "/data/b", "value": "2"}],
        "strategic": {"data": {"b": "2"}},
    }[kind]
    cluster.kubectl("patch", "configmap", "settings", "-n", namespace, f"--type={kind}", "-p", json.dumps(body))
    assert cluster.get("configmap", "settings", "-n", namespace)["data"] == {"a": "1", "b": "2"}


def test_bad_objects_are_refused_with_kubernetes_own_message(cluster: Cluster, namespace: str) -> None:
    bad = config_map(namespace).replace("settings", "UPPER")
    shown = cluster.kubectl("apply", "-f", "-", stdin=bad, check=False)
    assert 'ConfigMap "UPPER" is invalid: metadata.name: Invalid value: "UPPER"' in shown
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "x", "namespace": namespace},
        "spec": {"mtls": {"mode": "SOMETIMES"}},
    }
    shown = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(policy), check=False)
    assert 'spec.mtls.mode: Unsupported value: "SOMETIMES": supported values:' in shown
    policy["spec"] = {"mlts": {}}
    shown = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(policy), check=False)
    assert 'unknown field "spec.mlts"' in shown
    assert "No resources found" in cluster.kubectl("get", "pa", "-n", namespace, check=False)


def test_watch_prints_changes(cluster: Cluster, namespace: str) -> None:
    with subprocess.Popen(
        ["kubectl", "get", "configmaps", "-n", namespace, "-w", "--no-headers"],
        env=cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as watch:
        try:
            cluster.kubectl("create", "configmap", "first", "-n", namespace)
            assert watch.stdout is not None
            while "first" not in watch.stdout.readline():
                pass
        finally:
            watch.kill()


def test_wait_for_a_condition(cluster: Cluster) -> None:
    shown = cluster.kubectl("wait", "--for=condition=Established", "crd/peerauthentications.security.istio.io")
    assert "condition met" in shown


def test_a_custom_resource_definition_serves_its_kind(cluster: Cluster) -> None:
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "lamps.example.com"},
        "spec": {
            "group": "example.com",
            "scope": "Cluster",
            "names": {"kind": "Lamp", "plural": "lamps", "singular": "lamp"},
            "versions": [
                {
                    "name": "v1",
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [
                        {"name": "Colour", "type": "string", "jsonPath": ".spec.colour"}
                    ],
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "properties": {
                                "spec": {
                                    "type": "object",
                                    "required": ["colour"],
                                    "properties": {"colour": {"type": "string"}},
                                }
                            },
                        }
                    },
                }
            ],
        },
    }
    lamp = {
        "apiVersion": "example.com/v1",
        "kind": "Lamp",
        "metadata": {"name": "desk"},
        "spec": {},
    }
    cluster.apply(definition)
    shown = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(lamp), check=False)
    assert "spec.colour: Required value" in shown
    lamp["spec"] = {"colour": "teal"}
    cluster.apply(lamp)
    assert re.search(r"NAME\s+COLOUR\s+desk\s+teal", cluster.kubectl("get", "lamps"))
    cluster.kubectl("delete", "crd", "lamps.example.com")
    wait_until(
        lambda: re.search(
            "could not find the requested resource|doesn't have a resource type",
            cluster.kubectl("get", "lamps", check=False),
        ),
        30,
        "the kind to go with its definition",
    )


def test_deleting_a_namespace_deletes_what_is_in_it(cluster: Cluster) -> None:
    cluster.kubectl("create", "namespace", "doomed")
    cluster.kubectl("create", "configmap", "inside", "-n", "doomed")
    cluster.kubectl("delete", "namespace", "doomed", timeout=60)
    assert "NotFound" in cluster.kubectl("get", "namespace", "doomed", check=False)
    cluster.kubectl("create", "namespace", "doomed")
    assert "NotFound" in cluster.kubectl("get", "cm", "inside", "-n", "doomed", check=False)


def test_a_deployment_sent_as_protobuf_makes_pods_whose_image_is_unknown(
    cluster: Cluster, namespace: str
) -> None:
    cluster.kubectl("create", "deployment", "web", "-n", namespace, "--image=x", "--replicas=2")

    def pods() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = cluster.get("pods", "-n", namespace)["items"]
        return found

    wait_until(lambda: len(pods()) == 2, 30, "two pods")
    assert {p["metadata"]["labels"]["app"] for p in pods()} == {"web"}
    assert {p["metadata"]["ownerReferences"][0]["kind"] for p in pods()} == {"ReplicaSet"}
    wait_until(
        lambda: all("meshlight-images" in json.dumps(p["status"]) for p in pods()),
        60,
        "the pods to say how to map their image",
    )
