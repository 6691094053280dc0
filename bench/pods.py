"""How fast pods start: one after the other, and many at once. Numbers on stdout as JSON.

`python bench/pods.py [--nodes 3] [--one 20] [--many 200] [--cluster NAME]`. Boots a cluster of its own unless
one is named. Latency is from sending the create to seeing the Ready condition in a watch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from meshlight.kube.client import Client
from meshlight.kube.resources import NAMESPACES, PODS

MESHLIGHT = Path(sys.executable).parent / "meshlight"
NAMESPACE = "bench-pods"
_CREATES_AT_ONCE = 16
"""More would measure TLS handshakes."""


def pod(name: str) -> dict[str, Any]:
    """A pod that is ready as soon as its program runs."""
    container = {"name": "main", "image": "local/program", "command": ["sleep", "1000000"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"terminationGracePeriodSeconds": 0, "containers": [container]},
    }


def is_ready(obj: dict[str, Any]) -> bool:
    """Whether the pod is ready."""
    conditions = (obj.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


class Watcher:
    """Notes when each pod became ready, and lets one wait for it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.ready: dict[str, float] = {}
        self.stages: dict[str, dict[str, float]] = {}
        self._news = asyncio.Condition()

    async def run(self) -> None:
        """Follow until cancelled."""
        async for event in self._client.watch(PODS, NAMESPACE):
            if event.type in ("SYNCED", "DELETED"):
                continue
            name, now = event.object["metadata"]["name"], time.perf_counter()
            stages = self.stages.setdefault(name, {})
            if event.object["spec"].get("nodeName"):
                stages.setdefault("bound", now)
            if (event.object.get("status") or {}).get("podIP"):
                stages.setdefault("networked", now)
            if is_ready(event.object) and name not in self.ready:
                self.ready[name] = now
                async with self._news:
                    self._news.notify_all()

    async def until(self, count: int, limit: float) -> None:
        """Return once `count` pods are ready. Raises TimeoutError."""
        async with asyncio.timeout(limit), self._news:
            await self._news.wait_for(lambda: len(self.ready) >= count)


async def start(client: Client, watcher: Watcher, names: list[str]) -> dict[str, float]:
    """Create pods, a few at a time as a controller does; seconds from each create to its readiness."""
    begun: dict[str, float] = {}
    before = len(watcher.ready)
    few = asyncio.Semaphore(_CREATES_AT_ONCE)

    async def one(name: str) -> None:
        async with few:
            begun[name] = time.perf_counter()
            await client.create(PODS, pod(name))

    await asyncio.gather(*(one(n) for n in names))
    await watcher.until(before + len(names), 300)
    return {n: watcher.ready[n] - begun[n] for n in names}


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, 90th percentile, worst."""
    ordered = sorted(seconds)
    return {
        "median_ms": round(statistics.median(ordered) * 1000, 1),
        "p90_ms": round(ordered[int(len(ordered) * 0.9) - 1] * 1000, 1),
        "worst_ms": round(ordered[-1] * 1000, 1),
    }


async def measure(kubeconfig: Path, one: int, many: int) -> dict[str, Any]:
    """Both measurements on one cluster."""
    async with Client.from_kubeconfig(kubeconfig) as client:
        space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        await client.create(NAMESPACES, space)
        watcher = Watcher(client)
        task = asyncio.create_task(watcher.run())
        try:
            await start(client, watcher, ["warm-0", "warm-1"])
            single: list[float] = []
            parts: dict[str, list[float]] = {"bound": [], "networked": []}
            for n in range(one):
                begun = time.perf_counter()
                single += (await start(client, watcher, [f"one-{n}"])).values()
                for stage, times in parts.items():
                    times.append(watcher.stages[f"one-{n}"][stage] - begun)
            begun = time.perf_counter()
            at_once = await start(client, watcher, [f"many-{n}" for n in range(many)])
            total = time.perf_counter() - begun
            return {
                "one_at_a_time": {
                    **summary(single),
                    **{f"{k}_ms": round(statistics.median(v) * 1000, 1) for k, v in parts.items()},
                },
                f"{many}_at_once": {
                    **summary(list(at_once.values())),
                    "all_ready_s": round(total, 2),
                    "each_ms": round(total / many * 1000, 1),
                },
            }
        finally:
            task.cancel()
            await client.delete(NAMESPACES, NAMESPACE)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="pod start latency")
    parser.add_argument("--nodes", default="3")
    parser.add_argument("--one", type=int, default=20)
    parser.add_argument("--many", type=int, default=200)
    parser.add_argument("--cluster", default="", help="measure this running cluster")
    given = parser.parse_args()
    if given.cluster:
        home = Path(os.environ.get("MESHLIGHT_HOME", Path.home() / ".meshlight"))
        kubeconfig = home / "clusters" / given.cluster / "kubeconfig"
        print(json.dumps(asyncio.run(measure(kubeconfig, given.one, given.many)), indent=1))
        return
    name = f"bench-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="meshlight-bench-") as home_name:
        environment = {**os.environ, "MESHLIGHT_HOME": home_name}
        try:
            up = [str(MESHLIGHT), "up", "--name", name, "--nodes", given.nodes]
            subprocess.run(up, env=environment, check=True, stdout=subprocess.DEVNULL)
            kubeconfig = Path(home_name) / "clusters" / name / "kubeconfig"
            print(json.dumps(asyncio.run(measure(kubeconfig, given.one, given.many)), indent=1))
        finally:
            down = [str(MESHLIGHT), "down", "--name", name, "--purge"]
            subprocess.run(down, env=environment, check=False, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
