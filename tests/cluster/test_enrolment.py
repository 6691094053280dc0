"""The promise of enrolment: traffic becomes mTLS and goes back, and no connection is dropped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clusters import Cluster, pod, service, wait_until

PROGRAMS = str(Path(__file__).with_name("programs.py"))


class Sniffer:
    """Runs `programs.py sniff` on the link of a node and tells its latest counts."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def counts(self) -> dict[str, int]:
        """The next report, which is at most a fifth of a second old."""
        assert self.process.stdout is not None
        latest: dict[str, int] = json.loads(self.process.stdout.readline())
        return latest


@contextmanager
def sniffing(cluster: Cluster, node: str) -> Iterator[Sniffer]:
    command = cluster.inside(sys.executable, PROGRAMS, "sniff", "eth0", netns=node)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Sniffer(process)
        finally:
            process.kill()


def last(cluster: Cluster, namespace: str, name: str, key: str) -> dict[str, int]:
    """The last JSON line of a pod's log that has `key`."""
    lines = cluster.kubectl("logs", "-n", namespace, name, check=False).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return next((entry for entry in reversed(found) if key in entry), {key: 0})


def protocols(cluster: Cluster, namespace: str) -> set[str]:
    status = json.loads(cluster.meshlight("status", "--name", cluster.name, "-o", "json"))
    return {w["protocol"] for w in status["workloads"] if w["namespace"] == namespace}


def test_label_moves_traffic_to_mtls_and_back_and_drops_nothing(cluster: Cluster, namespace: str) -> None:
    nodes = [n["metadata"]["name"] for n in cluster.get("nodes")["items"]]
    python = sys.executable
    cluster.apply(
        pod("echo", namespace, [python, PROGRAMS, "serve", "7000"], nodeName=nodes[0]),
        service("echo", namespace, 7000),
    )
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/echo", "--timeout=60s")
    host = f"echo.{namespace}.svc.cluster.local"
    cluster.apply(
        pod("hold", namespace, [python, PROGRAMS, "hold", host, "7000"], nodeName=nodes[1]),
        pod("load", namespace, [python, PROGRAMS, "load", host, "7000"], nodeName=nodes[1]),
    )
    wait_until(lambda: last(cluster, namespace, "hold", "held")["held"] > 5, 60, "a held connection")
    wait_until(lambda: last(cluster, namespace, "load", "done")["done"] > 20, 60, "some load")

    with sniffing(cluster, nodes[1]) as sniffer:
        wait_until(lambda: sniffer.counts()["clear"] > 20, 30, "the marker in clear")
        assert sniffer.counts()["hbone"] == 0

        cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode=ambient")
        wait_until(lambda: protocols(cluster, namespace) == {"HBONE"}, 30, "workloads on HBONE")
        wait_until(lambda: sniffer.counts()["hbone"] > 50, 30, "TLS records on 15008")
    # The connection opened before the label stays as it was, in clear; a new client shows the rest.
    held = last(cluster, namespace, "hold", "held")["held"]
    wait_until(lambda: last(cluster, namespace, "hold", "held")["held"] > held + 20, 30, "held on")
    cluster.kubectl("delete", "pod", "-n", namespace, "hold")
    cluster.apply(pod("later", namespace, [python, PROGRAMS, "hold", host, "7000"], nodeName=nodes[1]))
    wait_until(lambda: last(cluster, namespace, "later", "held")["held"] > 5, 60, "a held connection")
    with sniffing(cluster, nodes[1]) as sniffer:
        wait_until(lambda: sniffer.counts()["hbone"] > 50, 30, "TLS records on 15008")
        assert sniffer.counts()["clear"] == 0

    cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode-")
    wait_until(lambda: protocols(cluster, namespace) == {"TCP"}, 30, "workloads on TCP")
    held = last(cluster, namespace, "later", "held")["held"]
    with sniffing(cluster, nodes[1]) as sniffer:
        wait_until(lambda: sniffer.counts()["clear"] > 50, 30, "the marker in clear again")
    # Past the drain of un-enrolment the tunnelled connection still lives.
    wait_until(lambda: last(cluster, namespace, "later", "held")["held"] > held + 160, 60, "held on")

    result = last(cluster, namespace, "load", "done")
    errors = cluster.kubectl("logs", "-n", namespace, "load").count('"error"')
    assert result["failed"] == 0 and errors == 0, cluster.kubectl("logs", "-n", namespace, "load")
    for item in cluster.get("pods", "-n", namespace)["items"]:
        assert item["status"]["containerStatuses"][0]["restartCount"] == 0


def test_a_connection_opened_before_the_label_lives_through_both_changes(
    cluster: Cluster, namespace: str
) -> None:
    nodes = [n["metadata"]["name"] for n in cluster.get("nodes")["items"]]
    python = sys.executable
    cluster.apply(
        pod("echo", namespace, [python, PROGRAMS, "serve", "7000"], nodeName=nodes[0]),
        service("echo", namespace, 7000),
    )
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/echo", "--timeout=60s")
    host = f"echo.{namespace}.svc.cluster.local"
    cluster.apply(pod("hold", namespace, [python, PROGRAMS, "hold", host, "7000"], nodeName=nodes[2]))
    wait_until(lambda: last(cluster, namespace, "hold", "held")["held"] > 5, 60, "a held connection")
    for label, protocol in (("=ambient", "HBONE"), ("-", "TCP")):
        cluster.kubectl("label", "namespace", namespace, f"istio.io/dataplane-mode{label}")
        wait_until(lambda p=protocol: protocols(cluster, namespace) == {p}, 30, protocol)  # type: ignore[misc]
        held = last(cluster, namespace, "hold", "held")["held"]
        wait_until(
            lambda h=held: last(cluster, namespace, "hold", "held")["held"] > h + 130,  # type: ignore[misc]
            60,
            "the held connection goes on",
        )
    item = cluster.get("pod", "hold", "-n", namespace)
    assert item["status"]["containerStatuses"][0]["restartCount"] == 0


def test_strict_refuses_plaintext_from_outside_the_mesh(cluster: Cluster, namespace: str) -> None:
    python = sys.executable
    cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode=ambient")
    cluster.apply(
        pod("echo", namespace, [python, PROGRAMS, "serve", "7000"]),
        service("echo", namespace, 7000),
        pod("inside", namespace, [python, PROGRAMS, "load", f"echo.{namespace}", "7000"]),
    )
    outside = pod("outside", namespace, [python, PROGRAMS, "load", f"echo.{namespace}", "7000"])
    outside["metadata"]["labels"]["istio.io/dataplane-mode"] = "none"
    cluster.apply(outside)
    for name in ("inside", "outside"):
        wait_until(lambda n=name: last(cluster, namespace, n, "done")["done"] > 20, 60, name)  # type: ignore[misc]
    cluster.apply(
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "PeerAuthentication",
            "metadata": {"name": "default", "namespace": namespace},
            "spec": {"mtls": {"mode": "STRICT"}},
        }
    )
    wait_until(lambda: last(cluster, namespace, "outside", "failed").get("failed", 0) > 20, 60, "denials")
    before = last(cluster, namespace, "inside", "done")
    wait_until(
        lambda: last(cluster, namespace, "inside", "done")["done"] > before["done"] + 40,
        60,
        "mTLS goes on",
    )
    assert last(cluster, namespace, "inside", "done")["failed"] == before["failed"]


@contextmanager
def frozen_ztunnel(cluster: Cluster, node: str) -> Iterator[None]:
    """The node's ztunnel does not act meanwhile, nor one of an earlier rollout that ends its connections."""
    theirs = f"NODE_NAME={node}\0".encode()
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # processes come and go
            if b"meshlight-ztunnel" in (entry / "cmdline").read_bytes():
                pids += [int(entry.name)] if theirs in (entry / "environ").read_bytes() else []
    assert pids, f"no ztunnel on {node}"
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_a_new_pods_first_connection_is_in_the_mesh(cluster: Cluster, namespace: str) -> None:
    """Init containers and main containers alike wait for ztunnel: their first act goes through it."""
    nodes = [n["metadata"]["name"] for n in cluster.get("nodes")["items"]]
    python = sys.executable
    cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode=ambient")
    cluster.apply(pod("echo", namespace, [python, PROGRAMS, "serve", "7000"], nodeName=nodes[0]))
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/echo", "--timeout=60s")
    address = cluster.get("pod", "echo", "-n", namespace)["status"]["podIP"]
    wait_until(lambda: protocols(cluster, namespace) == {"HBONE"}, 30, "the server on HBONE")
    connect = [python, PROGRAMS, "once", address, "7000"]
    init = [{"name": "init", "image": "local/program", "command": connect}]

    def clients() -> list[dict[str, Any]]:
        return [
            p["status"]
            for p in cluster.get("pods", "-n", namespace)["items"]
            if p["metadata"]["name"] != "echo"
        ]

    def ended() -> bool:
        phases = [status["phase"] for status in clients()]
        assert "Failed" not in phases, cluster.kubectl("logs", "-n", namespace, "-l", "app")
        return phases == ["Succeeded"] * 4

    with sniffing(cluster, nodes[1]) as sniffer:
        sniffer.counts()
        with frozen_ztunnel(cluster, nodes[1]):
            cluster.apply(
                *(
                    pod(
                        f"c-{n}",
                        namespace,
                        connect,
                        nodeName=nodes[1],
                        restartPolicy="Never",
                        initContainers=init,
                    )
                    for n in range(4)
                )
            )
            wait_until(lambda: all(s.get("podIP") for s in clients()), 30, "their networks")
            # Another pod of the node, outside the mesh, starts and ends meanwhile.
            outside = pod("out", "default", ["true"], nodeName=nodes[1], restartPolicy="Never")
            cluster.apply(outside)
            cluster.kubectl("wait", "pod/out", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
            cluster.kubectl("delete", "pod", "out", "--wait=false")
            assert all("waiting" in s["initContainerStatuses"][0]["state"] for s in clients())
        wait_until(ended, 60, "every pod to have connected twice")
        wait_until(lambda: sniffer.counts()["hbone"] >= 16, 30, "TLS records on 15008")
        assert sniffer.counts()["clear"] == 0
