"""What the containers of a node use of CPU and memory, measured when somebody asks.

From cgroups, or without them from the processes in a container's mount namespace. A rate needs two looks: the
second is the asker's, the first is the one before it, or one taken shortly before when that is too long ago.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from meshlight.kube.resources import Object
from meshlight.node.cgroups import Cgroups, Usage
from meshlight.node.podstatus import timestamp
from meshlight.node.worker import PodWorker

_TOO_OLD, _TOO_FRESH, _GLANCE = 90.0, 1.0, 0.5
"""Seconds: an earlier look is no use any more, a look is repeated as it is, between two looks in a row."""
_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
Key = tuple[str, str]
"""Pod uid and container name."""


@dataclass(frozen=True, slots=True)
class Look:
    """All containers at one time (seconds of the monotonic clock)."""

    at: float
    used: Mapping[Key, Usage]


@dataclass(frozen=True, slots=True)
class Rate:
    """One container: CPU in nanocores over `window` seconds, and memory now in bytes."""

    nanocores: int
    window: float
    used: Usage


def process_usage(stat: str, resident_pages: int) -> Usage:
    """One process from the text of its `/proc/PID/stat`; what its reaped children used counts with it."""
    fields = stat.rpartition(")")[2].split()
    ticks = sum(int(fields[n]) for n in (11, 12, 13, 14))
    return Usage(ticks * _TICK, resident_pages * _PAGE, resident_pages * _PAGE, 1)


def add(first: Usage | None, second: Usage) -> Usage:
    """Both together."""
    if first is None:
        return second
    return Usage(
        first.cpu + second.cpu,
        first.working_set + second.working_set,
        first.resident + second.resident,
        first.processes + second.processes,
    )


def by_namespace(proc: Path = Path("/proc")) -> dict[str, Usage]:
    """What processes use, summed by their mount namespace."""
    found: dict[str, Usage] = {}
    for entry in os.listdir(proc):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            namespace = os.readlink(proc / entry / "ns/mnt")
            resident = int((proc / entry / "statm").read_text().split()[1])
            used = process_usage((proc / entry / "stat").read_text(), resident)
            found[namespace] = add(found.get(namespace), used)
    return found


def rates(before: Look, now: Look, ages: Mapping[Key, float]) -> dict[Key, Rate]:
    """How fast each container uses CPU; one that is new counts from its start (`ages` in seconds)."""
    found = {}
    for key, used in now.used.items():
        earlier = before.used.get(key)
        window = now.at - before.at
        spent = used.cpu - earlier.cpu if earlier else used.cpu
        if earlier is None or spent < 0:  # new, or counted anew
            window, spent = max(ages.get(key, window), 0.1), used.cpu
        found[key] = Rate(int(spent / max(window, 0.001)), window, used)
    return found


class UsageMeter:
    """Looks at the containers of the workers, which are keyed by pod uid."""

    def __init__(self, workers: Mapping[str, PodWorker]) -> None:
        self._workers = workers
        self._before: Look | None = None
        self._last: Look | None = None
        self._lock = asyncio.Lock()

    async def measure(self) -> dict[Key, Rate]:
        """The rates of all running containers."""
        async with self._lock:
            now = time.monotonic()
            if self._last is None or now - self._last.at > _TOO_OLD:
                self._last = await asyncio.to_thread(self._look)
                self._before = None
                await asyncio.sleep(_GLANCE)
            elif self._before is not None and now - self._last.at < _TOO_FRESH:
                return rates(self._before, self._last, self._ages())
            self._before, self._last = self._last, await asyncio.to_thread(self._look)
            return rates(self._before, self._last, self._ages())

    def _running(self) -> Iterable[tuple[Key, PodWorker, str]]:
        for uid, worker in list(self._workers.items()):
            if worker.sandbox is None:
                continue
            for name, attempts in list(worker.sandbox.attempts.items()):
                if attempts and not attempts[-1].finished:
                    yield (uid, name), worker, attempts[-1].namespace

    def _ages(self) -> dict[Key, float]:
        now = time.time()
        return {
            key: now - worker.sandbox.attempts[key[1]][-1].started / 1e9
            for key, worker, _ in self._running()
            if worker.sandbox is not None
        }

    def _look(self) -> Look:
        used: dict[Key, Usage] = {}
        processes: dict[str, Usage] | None = None
        for key, worker, namespace in self._running():
            cgroups: Cgroups = worker.node.cgroups
            found = cgroups.usage(*key)
            if found is None:
                processes = by_namespace() if processes is None else processes
                found = processes.get(namespace)
            if found is not None:
                used[key] = found
        return Look(time.monotonic(), used)


def own_usage() -> Usage:
    """What the node agent itself uses."""
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return process_usage(Path("/proc/self/stat").read_text(), resident)


def summary(name: str, workers: Mapping[str, PodWorker], measured: Mapping[Key, Rate], now: float) -> Object:
    """The kubelet's `/stats/summary`: the node, its pods and their containers."""
    stamp = timestamp(now)

    def stats(rate: Rate) -> Object:
        return {
            "cpu": {
                "time": stamp,
                "usageNanoCores": rate.nanocores,
                "usageCoreNanoSeconds": rate.used.cpu,
            },
            "memory": {
                "time": stamp,
                "usageBytes": rate.used.working_set,
                "workingSetBytes": rate.used.working_set,
                "rssBytes": rate.used.resident,
            },
            "process_stats": {"process_count": rate.used.processes},
            "windowSeconds": rate.window,
        }

    pods = []
    total = Rate(0, max((r.window for r in measured.values()), default=0.0), Usage(0, 0, 0))
    for uid, worker in workers.items():
        metadata = worker.pod["metadata"]
        containers = [
            {"name": container, **stats(rate)}
            for (owner, container), rate in sorted(measured.items())
            if owner == uid
        ]
        if not containers:
            continue
        whole = Rate(0, 0, Usage(0, 0, 0))
        for (owner, _), rate in measured.items():
            if owner == uid:
                whole = Rate(whole.nanocores + rate.nanocores, rate.window, add(whole.used, rate.used))
        total = Rate(total.nanocores + whole.nanocores, total.window, add(total.used, whole.used))
        reference = {"name": metadata["name"], "namespace": metadata.get("namespace", ""), "uid": uid}
        pods.append({"podRef": reference, "containers": containers, **stats(whole)})
    with_agent = Rate(total.nanocores, total.window, add(total.used, own_usage()))
    return {"node": {"nodeName": name, **stats(with_agent)}, "pods": pods}


def exposition(found: Object) -> str:
    """The kubelet's `/metrics/resource`, in Prometheus' text format."""
    lines = []

    def family(metric: str, kind: str, meaning: str, samples: Iterable[tuple[str, float]]) -> None:
        lines.extend([f"# HELP {metric} {meaning}", f"# TYPE {metric} {kind}"])
        lines.extend(f"{metric}{labels} {value:g}" for labels, value in samples)

    node = found["node"]
    seconds = 1e-9
    family(
        "node_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the node in core-seconds",
        [("", node["cpu"]["usageCoreNanoSeconds"] * seconds)],
    )  # fmt: skip
    family(
        "node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes",
        [("", node["memory"]["workingSetBytes"])],
    )  # fmt: skip
    containers = [
        (f'{{container="{c["name"]}",namespace="{p["podRef"]["namespace"]}",pod="{p["podRef"]["name"]}"}}', c)
        for p in found["pods"]
        for c in p["containers"]
    ]
    family(
        "container_cpu_usage_seconds_total", "counter",
        "Cumulative cpu time consumed by the container in core-seconds",
        [(labels, c["cpu"]["usageCoreNanoSeconds"] * seconds) for labels, c in containers],
    )  # fmt: skip
    family(
        "container_memory_working_set_bytes", "gauge", "Current working set of the container in bytes",
        [(labels, c["memory"]["workingSetBytes"]) for labels, c in containers],
    )  # fmt: skip
    return "\n".join(lines) + "\n"
