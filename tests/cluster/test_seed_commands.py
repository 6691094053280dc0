"""Every kubectl command of the seed, verbatim, and the daily ones, run by a shell with the real kubectl."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import seed_stage
import yaml
from clusters import Cluster, pod, wait_until


def commands(name: str) -> list[tuple[str, str]]:
    """The command lines of a file, and what each must print."""
    rows = yaml.safe_load((Path(__file__).parent / "commands" / f"{name}.yaml").read_text())
    return [(row["run"], row["prints"]) for row in rows]


SEED = commands("seed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("repository")
    seed_stage.write_files(made)
    return made


@pytest.fixture(scope="module")
def stage(cluster: Cluster) -> Iterator[Cluster]:
    made = seed_stage.ensure(cluster)
    yield cluster
    cluster.kubectl("delete", "gateway", "observability-waypoint", "-n", "observability", check=False)
    cluster.kubectl("label", "namespace", "observability", "istio.io/dataplane-mode-", check=False)
    seed_stage.remove(cluster, made)


def shell(cluster: Cluster, command: str, folder: Path, check: bool = True) -> str:
    """Run a line in bash; returns stdout and stderr."""
    done = subprocess.run(
        ["bash", "-c", command],
        env={**cluster.environment, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert not check or done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


@pytest.mark.parametrize(("command", "expected"), SEED, ids=[c for c, _ in SEED])
def test_a_command_of_the_seed(stage: Cluster, folder: Path, command: str, expected: str) -> None:
    shown = wait_until(
        lambda: (
            (out := shell(stage, command, folder, check=False)) and re.search(expected, out) and out
            if "logs" in command or "get pods" in command or "curl" in command
            else shell(stage, command, folder, check=False)
        ),
        60,
        f"{command} to show {expected}",
    )
    assert re.search(expected, shown), shown


def test_the_collector_is_reached_through_a_forwarded_port(stage: Cluster, folder: Path) -> None:
    command = ["kubectl", "port-forward", "-n", "observability", "svc/jaeger-collector", "9411:9411"]
    with subprocess.Popen(command, env=stage.environment, stdout=subprocess.PIPE, text=True) as forward:
        try:
            assert forward.stdout is not None
            assert "Forwarding from 127.0.0.1:9411 -> 9411" in forward.stdout.readline()
            shown = shell(stage, "curl -sI http://localhost:9411/api/v2/spans", folder)
            assert re.match(r"HTTP/1\.\d \d{3}", shown), shown
        finally:
            forward.terminate()


# The daily commands: one story in one namespace

WEB = seed_stage.deployment("web", "", 8000, {"app": "web"})
WEB["metadata"].pop("namespace")


@pytest.fixture(scope="module")
def web(cluster: Cluster, folder: Path) -> Iterator[str]:
    """A namespace with a Deployment `web`, and files about it."""
    name = "daily"
    cluster.kubectl("create", "namespace", name)
    (folder / "web.json").write_text(json.dumps(WEB))
    more = json.loads(json.dumps(WEB))
    more["spec"]["replicas"] = 2
    (folder / "more.json").write_text(json.dumps(more))
    custom = folder / "kustom"
    custom.mkdir()
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a": "1"}}
    (custom / "settings.yaml").write_text(json.dumps(settings))
    (custom / "kustomization.yaml").write_text("resources: [settings.yaml]\nnamePrefix: made-\n")
    prune = folder / "prune"
    prune.mkdir()
    for number in "ab":
        labelled = {**settings, "metadata": {"name": f"pruned-{number}", "labels": {"set": "p"}}}
        (prune / f"{number}.yaml").write_text(json.dumps(labelled))
    (folder / "editor.sh").write_text('#!/bin/sh\nsed -i \'s/a: "1"/a: "edited"/\' "$1"\n')
    (folder / "editor.sh").chmod(0o755)
    cluster.kubectl("apply", "-n", name, "-f", str(folder / "web.json"))
    cluster.kubectl("rollout", "status", "deploy/web", "-n", name, "--timeout=90s", timeout=120)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false", check=False)


DAILY = commands("daily")


@pytest.mark.parametrize(("command", "expected"), DAILY, ids=[c[:60] for c, _ in DAILY])
def test_a_daily_command(cluster: Cluster, web: str, folder: Path, command: str, expected: str) -> None:
    cluster.kubectl("config", "set-context", "--current", f"--namespace={web}")
    try:
        shown = shell(cluster, command, folder, check=False)
    finally:
        cluster.kubectl("config", "set-context", "--current", "--namespace=default")
    assert re.search(expected, shown), shown


DESCRIBED = (
    "nodes", "namespaces", "serviceaccounts", "secrets", "endpoints", "clusterroles", "clusterrolebindings",
    "priorityclasses", "storageclasses", "crd", "leases -n kube-node-lease", "ippools", "peerauthentication -A",
    "helmrelease -A", "apiservices", "ingressclasses", "networkpolicies -A", "pdb -A", "pvc -A", "sts -A",
)  # fmt: skip


@pytest.mark.parametrize("kind", DESCRIBED)
def test_every_kind_can_be_described(stage: Cluster, kind: str) -> None:
    shown = stage.kubectl("describe", *kind.split(), check=False)
    assert re.search(r"(?m)^Name:\s|No resources found", shown), shown[:500]


def test_top_is_true(stage: Cluster) -> None:
    shown = wait_until(
        lambda: "%" in (out := stage.kubectl("top", "nodes", check=False)) and out, 60, "metrics"
    )
    assert re.search(r"(?m)^NAME\s+CPU\(cores\)\s+CPU\(%\)\s+MEMORY\(bytes\)\s+MEMORY\(%\)\s*$", shown), shown
    shown = stage.kubectl("top", "pods", "-n", "istio-system")
    assert re.search(r"(?m)^istiod-\S+\s+\d+m\s+[1-9]\d*Mi", shown), shown


def test_a_shell_in_a_pod_is_a_terminal(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("shell", namespace, ["sleep", "1000"]))
    cluster.kubectl("wait", "pod/shell", "-n", namespace, "--for=condition=Ready", "--timeout=60s")
    master, slave = pty.openpty()
    command = ["kubectl", "exec", "-it", "-n", namespace, "shell", "--", "sh"]
    seen = ""
    with subprocess.Popen(command, env=cluster.environment, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        os.write(master, b"test -t 0 && echo is-a-$((40+2))-terminal; exit 7\n")
        until = time.monotonic() + 60
        while "is-a-42-terminal" not in seen and time.monotonic() < until:
            if select.select([master], [], [], 1)[0]:
                with contextlib.suppress(OSError):
                    seen += os.read(master, 4096).decode(errors="replace")
        with contextlib.suppress(OSError):
            while select.select([master], [], [], 5)[0] and os.read(master, 4096):
                pass
    os.close(master)
    assert "is-a-42-terminal" in seen, seen
    assert process.returncode == 7


def test_a_node_is_cordoned_tainted_and_drained(cluster: Cluster, namespace: str) -> None:
    node = sorted(n["metadata"]["name"] for n in cluster.get("nodes")["items"])[-1]
    wanted = pod("moved", namespace, ["sleep", "1000"], nodeSelector={"kubernetes.io/hostname": node})
    cluster.apply(wanted)
    cluster.kubectl("wait", "pod/moved", "-n", namespace, "--for=condition=Ready", "--timeout=60s")
    try:
        assert f"node/{node} cordoned" in cluster.kubectl("cordon", node)
        assert re.search(rf"{node}\s+Ready,SchedulingDisabled", cluster.kubectl("get", "nodes"))
        only = "--pod-selector=app=moved"
        shown = cluster.kubectl("drain", node, "--force", "--ignore-daemonsets", only, "--timeout=60s")
        assert "evicting pod" in shown or "pod/moved evicted" in shown, shown
        assert f"node/{node} drained" in shown
        assert "tainted" in cluster.kubectl("taint", "nodes", node, "meshlight.io/test=x:PreferNoSchedule")
        assert "untainted" in cluster.kubectl("taint", "nodes", node, "meshlight.io/test-")
    finally:
        cluster.kubectl("uncordon", node, check=False)
    assert "NotFound" in cluster.kubectl("get", "pod", "moved", "-n", namespace, check=False)
