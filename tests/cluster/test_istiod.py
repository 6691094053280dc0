"""istiod in a real cluster: policies bite as `why` says, istioctl's verbs work, roots rotate."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster, pod, service, wait_until

PROGRAMS = str(Path(__file__).with_name("programs.py"))


def last(cluster: Cluster, namespace: str, name: str) -> dict[str, int]:
    lines = cluster.kubectl("logs", "-n", namespace, name, "--tail=200", check=False).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return next((entry for entry in reversed(found) if "done" in entry), {"done": 0, "failed": 0})


@pytest.fixture
def talking(cluster: Cluster, namespace: str) -> Iterator[str]:
    """An enrolled namespace in which `load` opens connection after connection to `echo`."""
    cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode=ambient")
    cluster.apply(
        pod("echo", namespace, [sys.executable, PROGRAMS, "serve", "7000"]), service("echo", namespace, 7000)
    )
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/echo", "--timeout=90s")
    host = f"echo.{namespace}.svc.cluster.local"
    cluster.apply(pod("load", namespace, [sys.executable, PROGRAMS, "load", host, "7000"]))
    wait_until(lambda: last(cluster, namespace, "load")["done"] > 20, 90, "connections over HBONE")
    yield namespace


def policy(namespace: str, kind: str = "AuthorizationPolicy", name: str = "p", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def why(cluster: Cluster, namespace: str) -> dict[str, Any]:
    command = ("why", f"pod/load.{namespace}", f"echo.{namespace}:7000", "-o", "json")
    found: dict[str, Any] = json.loads(cluster.meshlight(*command, check=False))
    return found


def test_policies_bite_as_they_are_explained(cluster: Cluster, talking: str) -> None:
    assert why(cluster, talking)["verdict"] == "allowed"
    denying = policy(talking, action="DENY", rules=[{"to": [{"operation": {"ports": ["7000"]}}]}])
    test = (
        "policy",
        "test",
        "/dev/stdin",
        "--connection",
        f"pod/load.{talking}",
        f"echo.{talking}:7000",
        "-o",
        "json",
    )
    done = subprocess.run(
        [sys.executable, "-m", "meshlight.cli.main", *test], input=json.dumps(denying), text=True,
        capture_output=True, env=cluster.environment, check=True,
    )  # fmt: skip
    (trial,) = json.loads(done.stdout)
    assert (trial["before"], trial["after"]) == ("allowed", "denied")

    cluster.apply(denying)
    failed = last(cluster, talking, "load")["failed"]
    wait_until(lambda: last(cluster, talking, "load")["failed"] > failed + 20, 60, "refused connections")
    found = why(cluster, talking)
    assert found["verdict"] == "denied"
    deciding = [step for step in found["routes"][0]["steps"] if step["verdict"] == "denied"]
    assert deciding[0]["objects"] == [f"AuthorizationPolicy/{talking}/p"]
    told = wait_until(
        lambda: [
            d for d in json.loads(cluster.meshlight("why", "--last", "50", "-o", "json"))
            if d["source"] == f"load.{talking}"
        ], 30, "denials in the logs",
    )  # fmt: skip
    assert f"{talking}/p" in told[-1]["error"]

    cluster.kubectl("delete", "authorizationpolicy", "-n", talking, "p")
    done_before = last(cluster, talking, "load")["done"]
    wait_until(lambda: last(cluster, talking, "load")["done"] > done_before + 20, 60, "connections again")
    assert why(cluster, talking)["verdict"] == "allowed"


def test_strict_turns_plaintext_away_and_keeps_the_mesh(cluster: Cluster, talking: str) -> None:
    cluster.apply(
        pod(
            "outside",
            "default",
            [sys.executable, PROGRAMS, "load", f"echo.{talking}.svc.cluster.local", "7000"],
        )
    )
    try:
        wait_until(lambda: last(cluster, "default", "outside")["done"] > 10, 60, "plaintext from outside")
        cluster.apply(policy(talking, "PeerAuthentication", "default", mtls={"mode": "STRICT"}))
        failed = last(cluster, "default", "outside")["failed"]
        wait_until(lambda: last(cluster, "default", "outside")["failed"] > failed + 10, 60, "refused plaintext")
        before = last(cluster, talking, "load")
        wait_until(lambda: last(cluster, talking, "load")["done"] > before["done"] + 20, 60, "the mesh goes on")
        assert last(cluster, talking, "load")["failed"] == before["failed"]
        answer = cluster.meshlight("why", "pod/outside.default", f"echo.{talking}:7000", check=False)
        assert f"PeerAuthentication {talking}/default says STRICT" in answer
    finally:
        cluster.kubectl("delete", "pod", "-n", "default", "outside", "--now", check=False)


def test_a_policy_says_what_became_of_it(cluster: Cluster, namespace: str) -> None:
    cluster.apply(policy(namespace, rules=[{"to": [{"operation": {"methods": ["GET"]}}]}]))
    kind = "authorizationpolicy/p"

    def condition() -> dict[str, Any]:
        status = cluster.get(kind, "-n", namespace).get("status") or {}
        return next((c for c in status.get("conditions") or [] if c["type"] == "ZtunnelAccepted"), {})

    wait_until(lambda: condition().get("reason") == "UnsupportedValue", 30, "the condition")
    assert "spec.rules[0].to[0].operation.methods" in condition()["message"]
    cluster.apply(policy(namespace, rules=[{}]))
    wait_until(lambda: condition().get("reason") == "Accepted", 30, "the condition after the change")
    refused = cluster.kubectl(
        "apply", "-f", "-", stdin=json.dumps(policy(namespace, name="q", action="DENY")), check=False
    )
    assert "spec.rules: Required value" in refused


def test_istioctls_verbs_work_verbatim(cluster: Cluster, talking: str) -> None:
    script = f'eval "$({sys.executable} -m meshlight.cli.main env --name {cluster.name})"; '

    def shell(command: str) -> str:
        done = subprocess.run(
            ["sh", "-c", script + command], env=cluster.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    wait_until(lambda: "STALE" not in shell("istioctl proxy-status"), 30, "every proxy synced")
    status = shell("istioctl proxy-status").splitlines()
    assert status[0].split()[:2] == ["NAME", "CLUSTER"]
    assert sum("ztunnel-" in line and line.count("SYNCED") == 2 for line in status) == 3
    assert "✔ Istio is installed and verified successfully" in shell("istioctl verify-install")
    assert "control plane version: " in shell("istioctl version")
    rows = [line.split() for line in shell("istioctl ztunnel-config workloads").splitlines()]
    assert rows[0] == ["NAMESPACE", "POD", "NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL"]
    assert [r[-1] for r in rows if r[:2] == [talking, "echo"]] == ["HBONE"]
    identity = f"spiffe://cluster.local/ns/{talking}/sa/default"
    certificates = json.loads(shell("istioctl ztunnel-config certificate -o json"))
    assert any(c["identity"] == identity and c["certChain"] for c in certificates)
    assert any(line.split()[:2] == [talking, "echo"] for line in shell("istioctl zc svc").splitlines())
    assert shell(f"istioctl analyze -n {talking} --output-threshold Warning") == ""


def test_external_hosts_get_addresses_and_machines_become_workloads(cluster: Cluster, namespace: str) -> None:
    base = {"apiVersion": "networking.istio.io/v1"}
    ports = [{"number": 5432, "name": "tcp", "protocol": "TCP"}]
    host = f"db-{uuid.uuid4().hex[:6]}.example.com"
    chosen = {"workloadSelector": {"labels": {"app": "db"}}}
    entry = {"hosts": [host], "ports": ports, "resolution": "STATIC", **chosen}
    machine = {"address": "192.0.2.7", "labels": {"app": "db"}}
    cluster.apply(
        {**base, "kind": "ServiceEntry", "metadata": {"name": "db", "namespace": namespace}, "spec": entry},
        {**base, "kind": "WorkloadEntry", "metadata": {"name": "vm", "namespace": namespace}, "spec": machine},
    )

    def addresses() -> list[str]:
        status = cluster.get("serviceentry", "db", "-n", namespace).get("status") or {}
        return [a["value"] for a in status.get("addresses") or [] if a["host"] == host]

    given = wait_until(addresses, 30, "allocated addresses")
    assert given[0].startswith("240.240.") and given[1].startswith("2001:2:")

    def row() -> list[str]:
        lines = cluster.meshlight("ztunnel-config", "service", "--service-namespace", namespace).splitlines()
        return next((line.split() for line in lines if line.startswith(f"{namespace} ")), [])

    wait_until(lambda: row()[-1:] == ["1/1"], 30, "the machine behind the host")
    cluster.kubectl("annotate", "serviceentry", "-n", namespace, "db", "touched=yes")
    assert addresses() == given, "they stay"


def test_the_root_rotates_under_traffic(cluster: Cluster, talking: str) -> None:
    before = json.loads(cluster.meshlight("ca", "status", "-o", "json"))
    said = cluster.meshlight("ca", "rotate", "--timeout", "240", timeout=260)
    assert said.count("✔") == 6
    after = json.loads(cluster.meshlight("ca", "status", "-o", "json"))
    assert after["serial"] != before["serial"]
    assert (after["roots"], after["phase"]) == ([after["serial"]], "none")
    standing = last(cluster, talking, "load")
    wait_until(
        lambda: last(cluster, talking, "load")["done"] > standing["done"] + 20, 60, "connections afterwards"
    )
    root = cluster.get("configmap", "istio-ca-root-cert", "-n", talking)["data"]["root-cert.pem"]
    assert root.count("BEGIN CERTIFICATE") == 1
