"""Nodes fail and come back; parts are killed at any moment: nothing is lost, doubled, restarted or leaked."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster, service, wait_until
from test_durability import machine, processes

REPLICAS = 4
PROGRAM = "while :; do sleep 86399; done"
"""Unlike any other program of the machine, so that its processes can be counted."""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A three-node cluster to break, with a Deployment and its Service."""
    made = Cluster("failing", tmp_path_factory.mktemp("failing"))
    clean = machine(made.state)
    try:
        made.meshlight("up", "--name", "failing", "--nodes", "3", timeout=180)
        soon = [
            {
                "key": f"node.kubernetes.io/{key}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": 0,
            }
            for key in ("not-ready", "unreachable")
        ]
        spec = {
            "terminationGracePeriodSeconds": 1,
            "tolerations": soon,
            "containers": [{"name": "main", "image": "local/program", "command": ["sh", "-c", PROGRAM]}],
        }
        made.apply(
            {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": "web", "namespace": "default"},
                "spec": {
                    "replicas": REPLICAS,
                    "selector": {"matchLabels": {"app": "web"}},
                    "template": {"metadata": {"labels": {"app": "web"}}, "spec": spec},
                },
            },
            service("web", "default", 80),
        )
        made.kubectl("rollout", "status", "deployment/web", "--timeout=90s")
        yield made
    finally:
        if os.environ.get("MESHLIGHT_KEEP_LOGS"):
            subprocess.run(["cp", "-r", str(made.state), os.environ["MESHLIGHT_KEEP_LOGS"]], check=False)
        made.meshlight("down", "--name", "failing", "--purge", check=False)
    assert machine(made.state) == clean


def web(cluster: Cluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.get("pods", "-l", "app=web")["items"]
    return found


def ready(pod: dict[str, Any]) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions") or [])


def settled(cluster: Cluster) -> bool:
    """Exactly the wanted pods, all ready, none on its way out."""
    pods = web(cluster)
    return len(pods) == REPLICAS and all(ready(p) and "deletionTimestamp" not in p["metadata"] for p in pods)


def serving(cluster: Cluster) -> set[str]:
    """Nodes of the Service's ready endpoints."""
    slices = cluster.get("endpointslices", "-l", "kubernetes.io/service-name=web")["items"]
    endpoints = [e for s in slices for e in s.get("endpoints") or []]
    return {e["nodeName"] for e in endpoints if e["conditions"]["ready"]}


def programs(cluster: Cluster) -> int:
    """Processes of the Deployment's pods, wherever they are: in the API or not."""
    return sum(1 for p in processes(PROGRAM) if _below(p, cluster.supervisor_pid))


def _below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
    return False


def namespaces(cluster: Cluster) -> set[str]:
    listed = subprocess.run(cluster.inside("ls", "/run/netns"), capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def nothing_leaked(cluster: Cluster) -> bool:
    """One network namespace a node and a pod, one pod folder a pod, no other."""
    nodes = {n["metadata"]["name"] for n in cluster.get("nodes")["items"]}
    uids = {p["metadata"]["uid"] for p in cluster.get("pods", "-A")["items"]}
    script = "for n in /run/meshlight/nodes/*/pods/*; do basename $n; done"
    folders = subprocess.run(cluster.inside("sh", "-c", script), capture_output=True, text=True, check=True)
    return namespaces(cluster) == nodes | uids and set(folders.stdout.split()) == uids


def believed(cluster: Cluster) -> dict[str, str]:
    """The Ready condition of every node."""
    return {
        n["metadata"]["name"]: next(c["status"] for c in n["status"]["conditions"] if c["type"] == "Ready")
        for n in cluster.get("nodes")["items"]
    }


def node(cluster: Cluster, *arguments: str) -> str:
    return cluster.meshlight("node", *arguments, "--name", cluster.name)


def test_parts_killed_at_any_moment_lose_nothing(failing: Cluster) -> None:
    def standing() -> list[tuple[str, ...]]:
        """What must not change: the very pods, their containers, and since when they are ready."""
        return sorted(
            (
                p["metadata"]["uid"],
                status["containerID"],
                status["state"]["running"]["startedAt"],
                str(status["restartCount"]),
                next(c["lastTransitionTime"] for c in p["status"]["conditions"] if c["type"] == "Ready"),
            )
            for p in failing.get("pods", "-A")["items"]
            for status in p["status"]["containerStatuses"]
        )

    before, acknowledged, stop = standing(), [], threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            if "created" in failing.kubectl("create", "configmap", f"kept-{number}", check=False, timeout=60):
                acknowledged.append(f"kept-{number}")

    def part(words: str) -> int:
        found = [p for p in processes(words) if _below(p, failing.supervisor_pid)]
        return found[0] if len(found) == 1 else 0

    parts = [
        "meshlight.kube.server",
        "meshlight.controllers --kubeconfig",
        *(f"--name failing-node-{n}" for n in (1, 2, 3)),
    ]
    moments = random.Random(20)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for victims in ([p] for p in parts), (parts[:1] + parts[2:3], parts[1:], parts):
            for killed in victims:
                pids = {words: wait_until(lambda w=words: part(w), 30, words) for words in killed}  # type: ignore[misc]
                time.sleep(moments.uniform(0, 0.5))  # the moment is the point
                for pid in pids.values():
                    os.kill(pid, signal.SIGKILL)
                for words, pid in pids.items():
                    wait_until(lambda w=words, p=pid: part(w) not in (0, p), 30, f"{words} again")  # type: ignore[misc]
                wait_until(
                    lambda: "ok" in failing.kubectl("get", "--raw", "/readyz", check=False), 30, "the API"
                )
    finally:
        stop.set()
        writer.join()
    kept = {c["metadata"]["name"] for c in failing.get("configmaps")["items"]}
    assert acknowledged and set(acknowledged) <= kept
    wait_until(lambda: set(believed(failing).values()) == {"True"}, 60, "every node ready")
    failing.kubectl("scale", "deployment", "web", f"--replicas={REPLICAS + 1}")
    failing.kubectl("rollout", "status", "deployment/web", "--timeout=60s")
    assert set(before) <= set(standing()), "no pod was restarted, replaced or unready for it"
    failing.kubectl("scale", "deployment", "web", f"--replicas={REPLICAS}")
    wait_until(lambda: settled(failing), 60, "the Deployment as it was")
    wait_until(lambda: nothing_leaked(failing), 30, "nothing to be left over")
    assert programs(failing) == REPLICAS


def test_nodes_fail_and_come_back(failing: Cluster) -> None:
    one, off, cut = (f"failing-node-{n}" for n in (1, 2, 3))
    wait_until(lambda: settled(failing) and serving(failing) == {one, off, cut}, 60, "a pod on every node")
    before = {p["metadata"]["uid"]: p["spec"]["nodeName"] for p in web(failing)}
    node(failing, "stop", off)
    node(failing, "partition", cut)
    states = {n["name"]: n["state"] for n in json.loads(node(failing, "list", "-o", "json"))}
    assert states == {one: "running", off: "stopped", cut: "partitioned"}
    assert off not in namespaces(failing)
    unknown = {one: "True", off: "Unknown", cut: "Unknown"}
    wait_until(lambda: believed(failing) == unknown, 90, "the failed nodes to be missed")
    wait_until(lambda: serving(failing) == {one}, 30, "their endpoints to be withdrawn")

    def moved() -> bool:
        there = [p for p in web(failing) if ready(p) and p["spec"]["nodeName"] == one]
        return len(there) == REPLICAS

    wait_until(moved, 60, "the pods to run on the node that is left")
    node(failing, "start", off)
    node(failing, "heal", cut)
    wait_until(lambda: set(believed(failing).values()) == {"True"}, 90, "the nodes to be back")
    wait_until(lambda: settled(failing), 90, "no pod twice, none on its way out")
    wait_until(lambda: programs(failing) == REPLICAS, 30, "no program twice")
    stayed = {uid for uid, name in before.items() if name == one}
    assert stayed <= {p["metadata"]["uid"] for p in web(failing)}, "the healthy node's pods are the same"
    assert not {t["key"] for n in failing.get("nodes")["items"] for t in n["spec"].get("taints") or []}
    wait_until(lambda: nothing_leaked(failing), 60, "nothing to be left over")
    # A pod of the node that was cut off is ready again, and so are the system's.
    wait_until(lambda: all(ready(p) for p in failing.get("pods", "-A")["items"]), 90, "every pod ready")

    said = node(failing, "drain", one)
    assert "default/web" in said and "drained" in said
    wait_until(lambda: settled(failing) and one not in serving(failing), 60, "the pods to be elsewhere")
    assert failing.get("node", one)["spec"]["unschedulable"]
    node(failing, "uncordon", one)
    assert "unschedulable" not in failing.get("node", one)["spec"]
    refused = failing.meshlight("node", "stop", "nope", "--name", failing.name, check=False)
    assert "no node nope" in refused and "Traceback" not in refused
