"""Replacing the node proxies drops nothing: connections that are open end where they began."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from clusters import Cluster, pod, service, wait_until

PROGRAMS = str(Path(__file__).with_name("programs.py"))


def test_a_rollout_of_ztunnel_drops_no_connection(cluster: Cluster, namespace: str) -> None:
    nodes = [n["metadata"]["name"] for n in cluster.get("nodes")["items"]]

    def last(name: str, key: str) -> int:
        lines = cluster.kubectl("logs", "-n", namespace, name, check=False).splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return next((int(entry[key]) for entry in reversed(found) if key in entry), 0)

    def proxies(*, leaving: bool) -> set[str]:
        items = cluster.get("pods", "-n", "istio-system", "-l", "app=ztunnel")["items"]
        return {i["metadata"]["name"] for i in items if ("deletionTimestamp" in i["metadata"]) == leaving}

    cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode=ambient")
    cluster.apply(
        pod("echo", namespace, [sys.executable, PROGRAMS, "serve", "7000"], nodeName=nodes[0]),
        service("echo", namespace, 7000),
    )
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/echo", "--timeout=60s")
    for name in ("hold", "load"):
        command = [sys.executable, PROGRAMS, name, f"echo.{namespace}", "7000"]
        cluster.apply(pod(name, namespace, command, nodeName=nodes[1]))
    wait_until(lambda: last("hold", "held") > 5 and last("load", "done") > 20, 60, "traffic")
    before = proxies(leaving=False)
    cluster.kubectl("rollout", "restart", "-n", "istio-system", "daemonset/ztunnel")
    wait_until(lambda: not proxies(leaving=False) & before, 120, "every proxy to be replaced")
    assert len(proxies(leaving=False)) == len(nodes)
    held, done = last("hold", "held"), last("load", "done")
    wait_until(lambda: last("hold", "held") > held + 60 and last("load", "done") > done + 20, 60, "traffic")
    assert proxies(leaving=True) & before, "one stays for what it carries"
    assert last("load", "failed") == 0 and '"error"' not in cluster.kubectl("logs", "-n", namespace, "load")
    for item in cluster.get("pods", "-n", namespace)["items"]:
        assert item["status"]["containerStatuses"][0]["restartCount"] == 0
