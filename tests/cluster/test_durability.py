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
from clusters import Cluster, pod, wait_until

from meshlight.node.cgroups import leftovers


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


def machine(state: Path) -> dict[str, object]:
    """Everything of this machine that a cluster might leave behind; other clusters' things left out."""
    rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True)
    sysctls = ("net/ipv4/ip_forward", "net/ipv4/conf/all/rp_filter", "net/ipv4/icmp_ratelimit")
    return {
        "links": subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout,
        "routes": subprocess.run(["ip", "route"], capture_output=True, text=True).stdout,
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "rules": rules.stdout,
        "sysctls": [Path("/proc/sys", name).read_text() for name in sysctls],
        "cgroups": leftovers(state),
        "processes": processes(str(state)),
        "namespaces": sorted(Path("/run/netns").glob("*")) if Path("/run/netns").exists() else [],
    }


def limited(name: str) -> dict[str, object]:
    """A pod with a limit, which has a cgroup where the machine allows it, and that ignores SIGTERM."""
    made = pod(name, "default", ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
    made["spec"]["containers"][0]["resources"] = {"limits": {"memory": "64Mi", "cpu": "500m"}}
    return made


def test_down_leaves_nothing_and_up_again_keeps_the_objects(tmp_path: Path) -> None:
    made = Cluster("cluster-101", tmp_path)
    clean = machine(made.state)
    assert not clean["processes"] and not clean["cgroups"]
    made.meshlight("up", "--nodes", "1", timeout=180)
    try:
        made.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}}, limited("limited"))
        made.kubectl("wait", "--for=condition=Ready", "pod/limited", "--timeout=60s")
        # The habit's own `make down`, as a user types it.
        checkout = Path(__file__).parents[2]
        done = subprocess.run(
            ["make", "-C", str(checkout), "down"], env=made.environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and "is down" in done.stdout, done.stdout + done.stderr
        assert machine(made.state) == clean
        before = datetime.now(UTC).replace(microsecond=0)
        made.meshlight("up", timeout=180)
        # Ready means ready in this start of the cluster, whatever the last one left in the API.
        system = [p for p in made.get("pods", "-A")["items"] if p["metadata"]["namespace"] != "default"]
        conditions = [c for p in system for c in p["status"]["conditions"] if c["type"] == "Ready"]
        assert {c["status"] for c in conditions} == {"True"} and len(conditions) > 2
        for status in [c for p in system for c in p["status"]["containerStatuses"]]:
            assert datetime.fromisoformat(status["state"]["running"]["startedAt"]) >= before, status
            assert status["restartCount"] == 1
        assert made.get("configmap", "kept")["metadata"]["name"] == "kept"
        made.kubectl("wait", "--for=condition=Ready", "pod/limited", "--timeout=60s")
        # A crash: processes and namespaces end with pid 1, the next `up` clears the rest.
        os.kill(made.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: not processes(str(tmp_path)), 20, "every process to end with pid 1")
        made.kubectl("version", check=False)
        made.meshlight("up", timeout=180)
        assert made.get("configmap", "kept")["metadata"]["name"] == "kept"
    finally:
        made.meshlight("down", "--purge", check=False)
    assert machine(made.state) == clean
    assert not (tmp_path / "clusters" / "cluster-101").exists()


RUNNER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from clusters import Cluster
from test_durability import limited
made = Cluster("killed", Path(sys.argv[2]))
made.meshlight("up", "--name", "killed", "--nodes", "1", timeout=180)
made.apply(limited("limited"))
made.kubectl("wait", "--for=condition=Ready", "pod/limited", "--timeout=60s")
print("up", flush=True)
input()
"""


def test_a_killed_test_run_leaves_nothing(tmp_path: Path) -> None:
    state = tmp_path / "clusters" / "killed"
    clean = machine(state)
    command = [sys.executable, "-c", RUNNER, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runner:
        try:
            assert runner.stdout is not None and runner.stdout.readline() == "up\n"
            assert len(processes(str(state))) > 4
        finally:
            runner.kill()
    wait_until(lambda: machine(state) == clean, 30, "everything of the cluster to be gone")


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
