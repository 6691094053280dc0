"""Boot time, memory, and the L4 path through two node proxies against the direct path.

Run by `make bench`. Boots a cluster of its own, measures the same load between two pods on two
nodes first in clear, then enrolled, and prints ratios; nothing is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
LOAD = ROOT / "load" / "target" / "release" / "load"
MESHLIGHT = Path(sys.executable).parent / "meshlight"
TICKS = os.sysconf("SC_CLK_TCK")
SECONDS = "4"


def main() -> None:
    """Boot, measure, print a table, tear down."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--ztunnel", metavar="PATH", help="measure this node proxy, Istio's for example")
    path = arguments.parse_args().ztunnel
    proxy = ["--ztunnel", path] if path else []
    subprocess.run(["cargo", "build", "-q", "--release"], cwd=ROOT / "load", check=True)
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "MESHLIGHT_HOME": home,
            "KUBECONFIG": f"{home}/clusters/bench/kubeconfig",
        }
        try:
            for number in ("cold", "warm"):
                start = time.monotonic()
                run(environment, MESHLIGHT, "up", "--name", "bench", "--nodes", "6", *proxy)
                print(f"boot of 6 nodes, {number}: {time.monotonic() - start:.1f} s")
                if number == "cold":
                    run(environment, MESHLIGHT, "down", "--name", "bench")
            processes = cluster_processes(home)
            print(f"memory of everything: {sum(pss(p) for p in processes) / 1024:.0f} MiB PSS")
            print(f"resident: {sum(rss(p) for p in processes) / 1024:.0f} MiB RSS")
            measure(environment, home)
        finally:
            subprocess.run(
                [MESHLIGHT, "down", "--name", "bench", "--purge"],
                env=environment,
                check=False,
                capture_output=True,
            )


def run(environment: dict[str, str], *command: object, stdin: str | None = None) -> str:
    """Run a command and return its stdout; a failure ends the benchmark with its stderr."""
    done = subprocess.run(
        [str(c) for c in command], env=environment, input=stdin, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


def measure(environment: dict[str, str], home: str) -> None:
    """Every row, direct and meshed, in one run."""
    nodes = ["bench-node-1", "bench-node-2"]
    run(environment, "kubectl", "create", "namespace", "bench")
    server = pod("server", nodes[0], "serve", "9000")
    run(environment, "kubectl", "apply", "-f", "-", stdin=json.dumps(server))
    run(environment, "kubectl", "wait", "-n", "bench", "--for=condition=Ready", "pod/server")
    address = run(
        environment,
        "kubectl",
        "get",
        "pod",
        "server",
        "-n",
        "bench",
        "-o",
        "jsonpath={.status.podIP}",
    )
    rows = [
        ("throughput", 1),
        ("throughput", 4),
        ("requests", 1),
        ("requests", 32),
        ("connects", 32),
    ]
    results: dict[str, list[dict[str, Any]]] = {"direct": [], "mesh": []}
    for path in results:
        if path == "mesh":
            run(
                environment,
                "kubectl",
                "label",
                "namespace",
                "bench",
                "istio.io/dataplane-mode=ambient",
            )
            run(
                environment,
                "kubectl",
                "wait",
                "-n",
                "bench",
                "pod/server",
                "--for=jsonpath={.metadata.annotations.ambient\\.istio\\.io/redirection}=enabled",
            )
        for kind, connections in rows:
            before = proxy_cpu(home)
            result = load(environment, nodes[1], f"{address}:9000", kind, connections)
            result["cpu"] = proxy_cpu(home) - before
            results[path].append(result)
    print(f"\n{'row':<18}{'direct':>14}{'mesh':>14}{'ratio':>8}{'p50/p99 µs':>22}{'proxy CPU':>24}")
    for (kind, connections), direct, mesh in zip(rows, results["direct"], results["mesh"], strict=True):
        rate = [r["count"] / r["seconds"] for r in (direct, mesh)]
        if kind == "throughput":
            shown = [f"{r * 8 / 1e9:.2f} Gbit/s" for r in rate]
            cost = f"{mesh['cpu'] / (mesh['count'] / 1e9):.2f} s/GB"
        else:
            shown = [f"{r:,.0f}/s" for r in rate]
            cost = f"{mesh['cpu'] / (mesh['count'] / 1e4):.2f} s/10k"
        latency = f"{mesh['p50_us']}/{mesh['p99_us']}" if kind != "throughput" else ""
        print(
            f"{kind + ' x' + str(connections):<18}{shown[0]:>14}{shown[1]:>14}"
            f"{rate[1] / rate[0]:>8.2f}{latency:>22}{cost:>24}"
            + (f"  failed: {mesh['failed']}" if mesh["failed"] else "")
        )
    memory = [rss(p) for p in proxies(home)]
    print(f"\nnode proxies: {max(memory) / 1024:.1f} MiB RSS the largest of {len(memory)}")


def pod(name: str, node: str, *arguments: str) -> dict[str, Any]:
    """A pod of the load program on a node."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "bench"},
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "load", "image": "local/load", "command": [str(LOAD), *arguments]}],
        },
    }


def load(environment: dict[str, str], node: str, target: str, kind: str, connections: int) -> dict[str, Any]:
    """Run one row as a pod of its own and read its result from the log."""
    name = f"{kind}-{connections}-{time.monotonic_ns()}"
    manifest = pod(name, node, kind, target, str(connections), SECONDS)
    run(environment, "kubectl", "apply", "-f", "-", stdin=json.dumps(manifest))
    run(
        environment,
        "kubectl",
        "wait",
        "-n",
        "bench",
        f"pod/{name}",
        "--timeout=60s",
        "--for=jsonpath={.status.phase}=Succeeded",
    )
    result: dict[str, Any] = json.loads(run(environment, "kubectl", "logs", "-n", "bench", name))
    run(environment, "kubectl", "delete", "pod", "-n", "bench", name)
    return result


def cluster_processes(home: str) -> list[int]:
    """Host pids of the supervisor of the cluster and of everything below it."""
    supervisor = json.loads(Path(home, "clusters/bench/cluster.json").read_text())["supervisor_pid"]
    found, waiting = [], [supervisor]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                waiting += [int(child) for child in task.read_text().split()]
    return found


def proxies(home: str) -> list[int]:
    """Host pids of the node proxies."""

    def program(pid: int) -> str:
        return Path(Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]).name

    return [p for p in cluster_processes(home) if "ztunnel" in program(p)]


def proxy_cpu(home: str) -> float:
    """CPU seconds used so far by all node proxies."""
    total = 0
    for pid in proxies(home):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def rss(pid: int) -> int:
    """Resident KiB."""
    return _kib(Path(f"/proc/{pid}/status"), "VmRSS:")


def pss(pid: int) -> int:
    """Proportional KiB: shared pages counted once over their users."""
    return _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")


def _kib(path: Path, key: str) -> int:
    try:
        return next((int(x.split()[1]) for x in path.read_text().splitlines() if x.startswith(key)), 0)
    except OSError:
        return 0


if __name__ == "__main__":
    main()
