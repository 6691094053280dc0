"""What the API server does, measured over HTTPS against one started for it: `make bench`.

Writes and reads with 10,000 objects there, watch fan-out to 100 watchers, a list of 10,000 pods as a table,
memory and disk, and the time from `kill -9` to serving again. Each line has its target beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from meshlight.embedded import pki

TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
Body = dict[str, Any]


class Server:
    """An API server process on a loopback port."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]
        pki.ensure(state, "bench", ["node"], self.port)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process."""
        descriptor = self.listener.fileno()
        command = [sys.executable, "-m", "meshlight.kube.server", "--state", str(self.state)]
        self.process = subprocess.Popen(
            [*command, "--listen-fd", str(descriptor)], pass_fds=[descriptor], stderr=subprocess.DEVNULL
        )
        return self.process

    def memory(self) -> float:
        """Resident MiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def disk(self) -> float:
        """MiB of the store's files."""
        return sum(f.stat().st_size for f in self.state.glob("store.db*")) / 2**20

    def session(self) -> aiohttp.ClientSession:
        """Connections with the administrator's certificate."""
        context = ssl.create_default_context(cafile=str(self.state / "pki" / "ca.crt"))
        context.load_cert_chain(self.state / "pki" / "admin.crt", self.state / "pki" / "admin.key")
        return aiohttp.ClientSession(
            f"https://127.0.0.1:{self.port}", connector=aiohttp.TCPConnector(ssl=context, limit=0)
        )


def config_map(number: int) -> Body:
    """A small object."""
    return {"metadata": {"name": f"c-{number:05}"}, "data": {"key": "value", "number": str(number)}}


def pod(number: int) -> Body:
    """A pod as a Deployment makes it, with a status."""
    container = {
        "name": "main",
        "image": "registry.example/app:1",
        "command": ["/app"],
        "ports": [{"containerPort": 8080}],
        "env": [{"name": "A", "value": "1"}],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
        "readinessProbe": {"httpGet": {"path": "/", "port": 8080}},
    }
    metadata = {"name": f"p-{number:05}", "labels": {"app": f"app-{number % 100}", "tier": "back"}}
    status = {
        "phase": "Running",
        "podIP": f"10.244.{number >> 8}.{number & 255}",
        "conditions": [{"type": t, "status": "True"} for t in ("PodScheduled", "Initialized", "Ready")],
        "containerStatuses": [
            {"name": "main", "ready": True, "restartCount": 0, "image": "x", "imageID": "x",
             "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
        ],
    }  # fmt: skip
    return {"metadata": metadata, "spec": {"containers": [container]}, "status": status}


async def concurrently(count: int, width: int, act: Callable[[int], Awaitable[None]]) -> float:
    """Do `act(0…count-1)`, `width` at a time; returns how many a second."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await act(number)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(width)))
    return count / (time.perf_counter() - started)


async def ready(session: aiohttp.ClientSession) -> None:
    """Wait until the server answers."""
    while True:
        try:
            async with session.get("/readyz") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            await asyncio.sleep(0.005)


async def post(session: aiohttp.ClientSession, path: str, body: Body) -> None:
    """Create an object; anything but 201 ends the run."""
    async with session.post(path, json=body) as answer:
        if answer.status != 201:
            raise SystemExit(f"{path}: {await answer.text()}")
        await answer.read()


def report(what: str, value: float, unit: str, target: str = "") -> None:
    """One line."""
    print(f"{what:52} {value:10,.1f} {unit:10} {target}", flush=True)


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of the values lies."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


async def fan_out(session: aiohttp.ClientSession, watchers: int, changes: int) -> list[float]:
    """Milliseconds from sending a write to each watcher's event."""
    path = "/api/v1/namespaces/default/configmaps"
    sent: dict[str, float] = {}
    late: list[float] = []
    waiting = watchers * changes
    done, connected = asyncio.Event(), asyncio.Semaphore(0)

    async def watch() -> None:
        nonlocal waiting
        async with session.get(path, params={"limit": "1"}) as answer:
            version = (await answer.json())["metadata"]["resourceVersion"]
        async with session.get(path, params={"watch": "true", "resourceVersion": version}) as answer:
            connected.release()
            async for line in answer.content:
                now = time.perf_counter()
                name = line.partition(b'"name":"')[2].partition(b'"')[0].decode()
                if name in sent:
                    late.append((now - sent[name]) * 1000)
                    waiting -= 1
                    if not waiting:
                        done.set()

    tasks = [asyncio.create_task(watch()) for _ in range(watchers)]
    for _ in range(watchers):
        await connected.acquire()
    for number in range(changes):
        name = f"w-{number}"
        sent[name] = time.perf_counter()
        await post(session, path, {"metadata": {"name": name}, "data": {"a": "b"}})
        await asyncio.sleep(0.03)
    await asyncio.wait_for(done.wait(), 60)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return late


async def run(objects: int, width: int) -> None:
    """Measure everything once."""
    with tempfile.TemporaryDirectory(prefix="meshlight-bench-") as folder:
        server = Server(Path(folder))
        try:
            await measure(server, objects, width)
        finally:
            server.process.kill()
            server.process.wait()


async def measure(server: Server, objects: int, width: int) -> None:
    """Every number, against a running server."""
    async with server.session() as session:
        await ready(session)
        memory, disk = server.memory(), server.disk()
        maps, pods = "/api/v1/namespaces/default/configmaps", "/api/v1/namespaces/default/pods"
        rate = await concurrently(objects, width, lambda n: post(session, maps, config_map(n)))
        report(f"durable writes, {width} writers, small objects", rate, "1/s", "target 1,000")
        rate = await concurrently(objects, width, lambda n: post(session, pods, pod(n)))
        report(f"durable writes, {width} writers, pods", rate, "1/s")

        async def get(number: int) -> None:
            async with session.get(f"{pods}/p-{number % objects:05}") as answer:
                await answer.read()

        report(f"reads, {width} readers", await concurrently(objects, width, get), "1/s")
        for what, accept in (("pods as a table", TABLE), ("pods as JSON", "application/json")):
            started = time.perf_counter()
            async with session.get(pods, headers={"Accept": accept}) as answer:
                size = len(await answer.read())
            target = "target < 1,000" if "table" in what else ""
            report(f"list of {objects:,} {what}", (time.perf_counter() - started) * 1000, "ms", target)
            report("  its size", size / 2**20, "MiB")
        started = time.perf_counter()
        environment = {**os.environ, "KUBECONFIG": str(server.state / "kubeconfig"), "HOME": str(server.state)}
        kubectl = await asyncio.create_subprocess_exec(
            "kubectl", "get", "pods", env=environment, stdout=subprocess.DEVNULL
        )
        await kubectl.wait()
        report(f"kubectl get pods, {objects:,} of them", (time.perf_counter() - started) * 1000, "ms")
        used, stored = server.memory() - memory, server.disk() - disk
        late = await fan_out(session, 100, 100)
        report("write to event at 100 watchers, median", percentile(late, 0.5), "ms")
        report("write to event at 100 watchers, p99", percentile(late, 0.99), "ms", "target < 20")
        scale = 10_000 / (2 * objects)
        report("memory for 10,000 objects (half pods)", used * scale, "MiB")
        report("disk for 10,000 objects (half pods)", stored * scale, "MiB")
        started = time.perf_counter()
        server.process.kill()
        server.process.wait()
        server.start()
        await ready(session)
        report(
            f"kill -9 to serving again, {2 * objects:,} objects", (time.perf_counter() - started) * 1000, "ms"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="measure the API server")
    parser.add_argument("--objects", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    uvloop.run(run(arguments.objects, arguments.width))
