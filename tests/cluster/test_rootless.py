"""The whole of it without root: boot, pods, Services, logs, exec and enrolment, for an unprivileged user."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster, pod, service, wait_until
from images import build
from test_durability import machine

USER = 65534
PROGRAMS = Path(__file__).with_name("programs.py")
SPAWN = ("unshare", "--mount", "--propagation", "private", sys.executable)


@pytest.fixture
def rootless() -> Iterator[Cluster]:
    """A two-node cluster of an unprivileged user's, in a home of their own."""
    home = Path(tempfile.mkdtemp(prefix="rootless-"))
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        os.chown(home, USER, USER)
        prefix = (*SPAWN, str(Path(__file__).with_name("unprivileged.py")), str(USER))
    made = Cluster("cluster-101", home, prefix)
    clean = machine(made.state)
    try:
        said = made.meshlight("up", "--nodes", "2", timeout=180)
        assert "without root" in said and "not enforced" in said
        yield made
    finally:
        made.meshlight("down", "--purge", check=False)
    try:
        assert machine(made.state) == clean
    finally:
        shutil.rmtree(home, ignore_errors=True)


def test_everything_works_for_an_unprivileged_user(rootless: Cluster) -> None:
    supervisor = Path(f"/proc/{rootless.supervisor_pid}")
    assert supervisor.stat().st_uid != 0
    program = ["python3", "-u", "-c", PROGRAMS.read_text()]
    mounted = ["sh", "-c", "cat /usr/share/new/key /usr/share/doc/key && touch /etc/mine && sleep 1000"]
    reader = pod("reader", "default", mounted, volumes=[{"name": "c", "configMap": {"name": "c"}}])
    reader["spec"]["containers"][0] |= {
        "volumeMounts": [
            {"name": "c", "mountPath": "/usr/share/new"},
            {"name": "c", "mountPath": "/usr/share/doc"},
        ],
        "securityContext": {"runAsUser": 1000},
        "resources": {"limits": {"memory": "64Mi"}},
    }
    layout = build().layout(rootless.home / "layout")
    imaged = pod("imaged", "default", [])
    imaged["spec"]["containers"][0] = {"name": "main", "image": f"oci:{layout}"}
    rootless.apply(
        imaged,
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"key": "found\n"}},
        pod("echo", "default", [*program, "serve", "7000"], nodeName="cluster-101-node-1"),
        service("echo", "default", 7000),
        reader,
    )
    rootless.kubectl("wait", "--for=condition=Ready", "pod/echo", "pod/reader", "--timeout=60s")
    wait_until(lambda: rootless.kubectl("logs", "reader") == "found\nfound\n", 30, "the mounted keys")
    # An image too, with its whiteouts; only its user is root, as an Event says.
    seen = "opaque\nstays.txt\nabove\n"
    wait_until(lambda: seen in rootless.kubectl("logs", "imaged", check=False), 60, "the image's files")
    assert rootless.kubectl("exec", "imaged", "--", "id", "-u") == "0\n"
    assert rootless.kubectl("exec", "reader", "--", "ls", "/etc/mine") == "/etc/mine\n"
    assert not Path("/etc/mine").exists() and not Path("/usr/share/new").exists()
    assert "runAsUser" in rootless.kubectl("get", "events", "--field-selector", "reason=SecurityContextIgnored")

    def connects(name: str) -> None:
        client = pod(
            name,
            "default",
            [*program, "once", "echo", "7000"],
            nodeName="cluster-101-node-2",
            restartPolicy="Never",
        )
        rootless.apply(client)
        wait_until(lambda: rootless.kubectl("logs", "echo") == "serving\n", 30, "the server")
        ended = "--for=jsonpath={.status.phase}=Succeeded"
        rootless.kubectl("wait", f"pod/{name}", ended, "--timeout=60s")

    connects("before")
    rootless.kubectl("label", "namespace", "default", "istio.io/dataplane-mode=ambient")

    def enrolled() -> bool:
        status = json.loads(rootless.meshlight("status", "-o", "json"))
        return {w["protocol"] for w in status["workloads"]} == {"HBONE"}

    wait_until(enrolled, 60, "workloads on HBONE")
    connects("after")
