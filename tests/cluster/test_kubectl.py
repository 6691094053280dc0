"""Real kubectl, verbatim, against the embedded API server."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import Cluster, pod, wait_until

pytestmark = pytest.mark.xdist_group("cluster")

SEED = [
    # (command, what its output must match)
    (
        "get pods -n istio-system",
        r"(?m)^NAME\s+READY\s+STATUS\s+RESTARTS\s+AGE$[\s\S]*istiod-\S+\s+1/1\s+Running",
    ),
    (
        "get ds -n istio-system ztunnel",
        r"DESIRED\s+CURRENT\s+READY[\s\S]*ztunnel\s+3\s+3\s+3\s+3\s+3",
    ),
    ("describe ds -n istio-system ztunnel", r"Desired Number of Nodes Scheduled: 3"),
    ("get configmap istio -n istio-system -o yaml", r"tracing"),
    ("logs -n istio-system -l app=istiod", r"\{.*\}"),
    ("logs -n istio-system -l app=ztunnel", r"\{.*\}"),
    ("get namespace -L istio.io/dataplane-mode", r"NAME\s+STATUS\s+AGE\s+DATAPLANE-MODE"),
    (
        "get events -n istio-system --sort-by=.lastTimestamp",
        r"LAST SEEN\s+TYPE\s+REASON\s+OBJECT\s+MESSAGE",
    ),
    ("get nodes -o wide", r"INTERNAL-IP[\s\S]*node-1\s+Ready[\s\S]*172\.20\.0\.11"),
    ("get pods -A", r"NAMESPACE\s+NAME\s+READY[\s\S]*kube-system\s+coredns"),
    ("get peerauthentication -n istio-system", r"NAME\s+MODE\s+AGE\s+default\s+PERMISSIVE"),
    ("get httproute -A", r"No resources found"),
    ("get crd", r"peerauthentications\.security\.istio\.io"),
    ("get deploy,rs,svc,ep -n istio-system", r"deployment\.apps/istiod\s+1/1\s+1\s+1"),
    ("describe pods -n istio-system -l app=istiod", r"Service Account:\s+istiod[\s\S]*Events:"),
    ("api-resources", r"peerauthentications\s+pa\s+security\.istio\.io/v1"),
    ("explain pod.spec.containers", r"FIELD|KIND:\s+Pod"),
    ("version", r"Server Version: v1\.32"),
]


@pytest.mark.parametrize(("command", "expected"), SEED, ids=[c for c, _ in SEED])
def test_command_of_the_seed(cluster: Cluster, command: str, expected: str) -> None:
    done = cluster.kubectl(*command.split(), check=False)
    assert re.search(expected, done), done


def test_lifecycle_of_a_deployment_and_its_service(cluster: Cluster, namespace: str) -> None:
    program = [sys.executable, "-m", "http.server", "8000"]
    cluster.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "web", "namespace": namespace},
            "spec": {
                "replicas": 3,
                "selector": {"matchLabels": {"app": "web"}},
                "template": {
                    "metadata": {"labels": {"app": "web"}},
                    "spec": {
                        "terminationGracePeriodSeconds": 1,
                        "containers": [
                            {
                                "name": "web",
                                "image": "local/python",
                                "command": program,
                                "readinessProbe": {"httpGet": {"port": 8000}, "periodSeconds": 1},
                            }
                        ],
                    },
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": namespace},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8000}]},
        },
    )
    cluster.kubectl(
        "wait", "-n", namespace, "--for=condition=Available", "deploy/web", "--timeout=60s"
    )
    nodes = {p["spec"]["nodeName"] for p in cluster.get("pods", "-n", namespace)["items"]}
    assert len(nodes) == 3
    fetch = (
        "import urllib.request,sys;"
        f"print(urllib.request.urlopen('http://web.{namespace}.svc.cluster.local').status)"
    )
    cluster.apply(pod("fetch", namespace, [sys.executable, "-c", fetch], restartPolicy="Never"))
    cluster.kubectl(
        "wait",
        "-n",
        namespace,
        "--for=jsonpath={.status.phase}=Succeeded",
        "pod/fetch",
        "--timeout=60s",
    )
    assert cluster.kubectl("logs", "-n", namespace, "fetch").strip() == "200"
    cluster.kubectl("delete", "deploy", "web", "-n", namespace)
    wait_until(
        lambda: (
            not [
                p
                for p in cluster.get("pods", "-n", namespace)["items"]
                if p["metadata"]["name"] != "fetch"
            ]
        ),
        30,
        "the pods of a deleted Deployment to go",
    )


def test_volumes_environment_and_exit_codes(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl(
        "create", "configmap", "settings", "-n", namespace, "--from-literal=colour=teal"
    )
    cluster.kubectl(
        "create", "secret", "generic", "key", "-n", namespace, "--from-literal=pin=1234"
    )
    script = (
        "hostname; cat /etc/settings/colour; echo; cat /etc/key/pin; echo; echo $COLOUR $POD;"
        "test -s /var/run/secrets/kubernetes.io/serviceaccount/token && echo token; exit 7"
    )
    made = pod("probe", namespace, ["sh", "-c", script], restartPolicy="Never")
    made["spec"]["volumes"] = [
        {"name": "settings", "configMap": {"name": "settings"}},
        {"name": "key", "secret": {"secretName": "key"}},
    ]
    container = made["spec"]["containers"][0]
    container["volumeMounts"] = [
        {"name": "settings", "mountPath": "/etc/settings"},
        {"name": "key", "mountPath": "/etc/key"},
    ]
    container["env"] = [
        {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "colour"}}},
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]
    cluster.apply(made)
    cluster.kubectl(
        "wait",
        "-n",
        namespace,
        "--for=jsonpath={.status.phase}=Failed",
        "pod/probe",
        "--timeout=60s",
    )
    lines = cluster.kubectl("logs", "-n", namespace, "probe").split()
    assert lines == ["probe", "teal", "1234", "teal", "probe", "token"]
    status = cluster.get("pod", "probe", "-n", namespace)["status"]["containerStatuses"][0]
    assert status["state"]["terminated"]["exitCode"] == 7
    assert status["state"]["terminated"]["reason"] == "Error"


def test_bad_objects_are_refused_with_kubernetes_own_message(
    cluster: Cluster, namespace: str
) -> None:
    bad = pod("UPPER", namespace, ["true"])
    answer = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(bad), check=False)
    assert "metadata.name: Invalid value" in answer
    empty = pod("empty", namespace, ["true"])
    empty["spec"]["containers"] = []
    answer = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(empty), check=False)
    assert "spec.containers: Required value" in answer
    typo = pod("typo", namespace, ["true"])
    typo["spec"]["containerz"] = []
    answer = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(typo), check=False)
    assert 'unknown field "spec.containerz"' in answer
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "x", "namespace": namespace},
        "spec": {"mtls": {"mode": "SOMETIMES"}},
    }
    answer = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(policy), check=False)
    assert 'spec.mtls.mode: Unsupported value: "SOMETIMES"' in answer


def test_unknown_image_and_missing_program_say_what_to_do(cluster: Cluster, namespace: str) -> None:
    unknown = pod("unknown", namespace, ["true"])
    unknown["spec"]["containers"][0] = {"name": "main", "image": "example.com/nobody/knows:1"}
    cluster.apply(unknown, pod("missing", namespace, ["/no/such/program"]))

    def waiting(name: str) -> str:
        statuses = cluster.get("pod", name, "-n", namespace)["status"].get("containerStatuses") or [
            {}
        ]
        return json.dumps([statuses[0].get("state"), statuses[0].get("lastState")])

    wait_until(lambda: "ImagePull" in waiting("unknown"), 30, "ErrImagePull or ImagePullBackOff")
    assert "example.com/nobody/knows:1" in waiting("unknown")
    wait_until(lambda: "/no/such/program" in waiting("missing"), 30, "the missing program's name")


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


def test_logs_follow(cluster: Cluster, namespace: str) -> None:
    script = "for i in 1 2 3; do echo line-$i; sleep 0.3; done"
    cluster.apply(pod("talk", namespace, ["sh", "-c", script], restartPolicy="Never"))
    wait_until(
        lambda: (
            cluster.get("pod", "talk", "-n", namespace)["status"].get("phase")
            in ("Running", "Succeeded")
        ),
        30,
        "the pod to start",
    )
    followed = cluster.kubectl("logs", "-f", "-n", namespace, "talk", timeout=30)
    assert followed.split() == ["line-1", "line-2", "line-3"]


def test_deleting_a_namespace_deletes_what_is_in_it(cluster: Cluster) -> None:
    cluster.kubectl("create", "namespace", "doomed")
    cluster.apply(pod("inside", "doomed", ["sleep", "1000"]))
    cluster.kubectl("wait", "-n", "doomed", "--for=condition=Ready", "pod/inside", "--timeout=60s")
    cluster.kubectl("delete", "namespace", "doomed", timeout=60)
    assert "NotFound" in cluster.kubectl("get", "namespace", "doomed", check=False)
