"""Objects survive; errors are clear; `down` leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import Cluster, wait_until

pytestmark = pytest.mark.xdist_group("cluster")


def processes(of: str) -> list[int]:
    """Host pids whose command line contains `of`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if of in command:
            found.append(int(entry.name))
    return found


def test_objects_survive_kill_9_of_the_api_server(cluster: Cluster, namespace: str) -> None:
    for number in range(20):
        cluster.kubectl("create", "configmap", f"kept-{number}", "-n", namespace)
    (server,) = [
        p
        for p in processes("meshlight.kube.server")
        if str(cluster.state) in Path(f"/proc/{p}/cmdline").read_text()
    ]
    os.kill(server, signal.SIGKILL)
    wait_until(
        lambda: "kept-0" in cluster.kubectl("get", "configmaps", "-n", namespace, check=False),
        30,
        "the API to serve again",
    )
    names = {c["metadata"]["name"] for c in cluster.get("configmaps", "-n", namespace)["items"]}
    assert {f"kept-{n}" for n in range(20)} <= names


def test_a_second_cluster_of_the_same_name_is_not_made(cluster: Cluster) -> None:
    answer = cluster.meshlight("up", "--name", cluster.name, "--nodes", "3", check=False)
    assert "already" in answer
    assert "Traceback" not in answer


def test_a_port_in_use_is_a_clear_error_and_nothing_is_half_made(tmp_path: Path, cluster: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = Cluster("other", tmp_path)
        answer = other.meshlight("up", "--name", "other", "--api-port", str(port), check=False)
        assert str(port) in answer and "in use" in answer
        assert "Traceback" not in answer
    assert not processes(str(tmp_path))


def test_down_leaves_nothing_and_up_again_keeps_the_objects(tmp_path: Path) -> None:
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    mounts = Path("/proc/self/mountinfo").read_text()
    made = Cluster("short", tmp_path)
    made.meshlight("up", "--name", "short", "--nodes", "1", timeout=180)
    try:
        made.kubectl("create", "configmap", "kept")
        made.meshlight("down", "--name", "short")
        assert not processes(str(tmp_path))
        assert subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout == links
        assert Path("/proc/self/mountinfo").read_text() == mounts
        before = datetime.now(UTC).replace(microsecond=0)
        made.meshlight("up", "--name", "short", timeout=180)
        # Ready means ready in this start of the cluster, whatever the last one left in the API.
        pods = made.get("pods", "-A")["items"]
        ready = [
            p for p in pods for c in p["status"]["conditions"] if c["type"] == "Ready" and c["status"] == "True"
        ]
        assert len(ready) == len(pods) == 3
        for status in [c for p in ready for c in p["status"]["containerStatuses"]]:
            assert datetime.fromisoformat(status["state"]["running"]["startedAt"]) >= before, status
            assert status["restartCount"] == 1
        assert made.get("configmap", "kept")["metadata"]["name"] == "kept"
        # Even when everything is killed at once, nothing stays.
        os.kill(made.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: not processes(str(tmp_path)), 20, "every process to end with pid 1")
    finally:
        made.meshlight("down", "--name", "short", "--purge", check=False)
    assert not (tmp_path / "clusters" / "short").exists()


def test_the_api_asks_for_credentials_and_keeps_them_private(cluster: Cluster) -> None:
    port = json.loads((cluster.state / "cluster.json").read_text())["api_port"]
    context = ssl.create_default_context(cafile=cluster.state / "pki" / "ca.crt")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"https://127.0.0.1:{port}/api/v1/secrets", context=context)
    assert refused.value.code == 401
    for secret in [cluster.state / "kubeconfig", *(cluster.state / "pki").glob("*.key")]:
        assert secret.stat().st_mode & 0o077 == 0, secret


def test_run_launches_a_program_as_a_workload(cluster: Cluster, namespace: str) -> None:
    run = ("run", "--cluster", cluster.name, "-n", namespace)
    program = ("--", sys.executable, "-m", "http.server", "8000")
    shown = cluster.meshlight(*run, "--name", "web", "--port", "8000", *program)
    assert f"spiffe://cluster.local/ns/{namespace}/sa/web" in shown
    assert cluster.get("pod", "web", "-n", namespace)["status"]["phase"] == "Running"
    assert cluster.get("svc", "web", "-n", namespace)["spec"]["ports"][0]["port"] == 8000
    refused = cluster.meshlight(*run, "--name", "web", *program, check=False)
    assert "exists already" in refused and "Traceback" not in refused
    refused = cluster.meshlight(*run, "--name", "none", "--", "/no/such/program", check=False)
    assert "/no/such/program" in refused and "Traceback" not in refused
    assert cluster.get("pods", "-n", namespace)["items"][0]["metadata"]["name"] == "web"
