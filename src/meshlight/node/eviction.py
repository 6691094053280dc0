"""Evicts pods that take more of the node's disk than they may, and, when memory runs short, who takes most.

The rules are pure (`over_disk`, `rank`, `short_of_memory`). Disk and memory can only be looked at, not watched:
every ten seconds, and disk only for pods that have a limit of it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshlight.kube.resources import Object
from meshlight.node.environment import quantity
from meshlight.node.events import log
from meshlight.node.usage import UsageMeter
from meshlight.node.worker import PodWorker

PERIOD = 10.0
"""Seconds between two looks, as kubelets have it."""
LEAST_MEMORY = 100 << 20
"""Bytes that must remain available: `memory.available<100Mi`."""
_CRITICAL = 2_000_000_000
"""Priorities from which on a pod of the node itself is not evicted."""


@dataclass(frozen=True, slots=True)
class Disk:
    """What a pod has on the node's disk, in bytes: by emptyDir, and by container (root and logs)."""

    volumes: Mapping[str, int]
    containers: Mapping[str, int]


def _limit(container: Object) -> int:
    limits = (container.get("resources") or {}).get("limits") or {}
    return int(quantity(limits.get("ephemeral-storage", 0)))


def has_disk_limit(pod: Object) -> bool:
    """Whether it matters how much of the disk a pod takes."""
    spec = pod["spec"]
    return any(_limit(c) for c in spec["containers"]) or any(
        (v.get("emptyDir") or {}).get("sizeLimit") and (v["emptyDir"].get("medium") != "Memory")
        for v in spec.get("volumes") or []
    )


def over_disk(pod: Object, disk: Disk) -> str:
    """Why a pod takes too much of the disk, in the kubelet's words; empty when it does not."""
    for volume in pod["spec"].get("volumes") or []:
        limit = (volume.get("emptyDir") or {}).get("sizeLimit")
        if limit and disk.volumes.get(volume["name"], 0) > quantity(limit):
            return f'Usage of EmptyDir volume "{volume["name"]}" exceeds the limit "{limit}". '
    total = sum(disk.volumes.values()) + sum(disk.containers.values())
    limits = [_limit(c) for c in pod["spec"]["containers"]]
    if all(limits) and total > sum(limits):
        return f'Pod ephemeral local storage usage exceeds the total limit of containers "{sum(limits)}". '
    for container in pod["spec"]["containers"]:
        limit = _limit(container)
        if limit and disk.containers.get(container["name"], 0) > limit:
            shown = container["resources"]["limits"]["ephemeral-storage"]
            return f'Container {container["name"]} exceeded its local ephemeral storage limit "{shown}". '
    return ""


def memory_request(pod: Object) -> int:
    """The memory that a pod's containers ask for."""
    return sum(
        int(quantity(((c.get("resources") or {}).get("requests") or {}).get("memory", 0)))
        for c in pod["spec"]["containers"]
    )


def rank(pods: Mapping[str, Object], used: Mapping[str, int]) -> list[str]:
    """Pods by uid in the order in which they are evicted for memory.

    Those that use more than they asked for, then those of lower priority, then those that exceed most.
    """

    def place(uid: str) -> tuple[bool, int, int]:
        asked = memory_request(pods[uid])
        priority = int(pods[uid]["spec"].get("priority") or 0)
        return used.get(uid, 0) <= asked, priority, asked - used.get(uid, 0)

    fit = [uid for uid, pod in pods.items() if int(pod["spec"].get("priority") or 0) < _CRITICAL]
    return sorted(fit, key=place)


def short_of_memory(pod: Object, used: Mapping[str, int], available: int) -> str:
    """The message of an eviction for memory; `used` by container."""
    words = (
        f"The node was low on resource: memory. Threshold quantity: {LEAST_MEMORY >> 20}Mi, "
        f"available: {available >> 10}Ki. "
    )
    for container in pod["spec"]["containers"]:
        taken = used.get(container["name"], 0)
        asked = ((container.get("resources") or {}).get("requests") or {}).get("memory", "0")
        if taken > quantity(asked):
            words += (
                f"Container {container['name']} was using {taken >> 10}Ki, request is {asked}, has larger "
                "consumption of memory. "
            )
    return words


def size_of(folder: Path) -> int:
    """Bytes that a folder takes on its disk."""
    total = 0
    stack = [folder]
    while stack:
        try:
            with os.scandir(stack.pop()) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    total += found.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(Path(entry.path))
        except OSError:
            continue
    return total


def available_memory() -> int:
    """Bytes that the machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


class Evictions:
    """Looks at the pods of the workers, which are keyed by uid."""

    def __init__(self, workers: Mapping[str, PodWorker]) -> None:
        self._workers = workers
        self._meter = UsageMeter(workers)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(PERIOD)
            for worker in list(self._workers.values()):
                if worker.sandbox is not None and has_disk_limit(worker.pod):
                    disk = await asyncio.to_thread(self._disk, worker)
                    if message := over_disk(worker.pod, disk):
                        worker.evict(message, now=True)
            if (available := available_memory()) < LEAST_MEMORY:
                await self._relieve(available)

    def _disk(self, worker: PodWorker) -> Disk:
        volumes = {n: size_of(p) for n, p in worker.execution.volumes.empty_folders(worker.pod).items()}
        containers = {
            c["name"]: size_of(worker.folder / "roots" / c["name"])
            + size_of(worker.node.logs / worker.uid / c["name"])
            for c in worker.pod["spec"]["containers"]
        }
        return Disk(volumes, containers)

    async def _relieve(self, available: int) -> None:
        """Evict one pod: the next look decides whether that was enough."""
        measured = await self._meter.measure()
        used: dict[str, int] = {}
        for (uid, _), rate in measured.items():
            used[uid] = used.get(uid, 0) + rate.used.working_set
        pods = {uid: w.pod for uid, w in self._workers.items() if uid in used and not w.ending}
        for uid in rank(pods, used)[:1]:
            each = {name: r.used.working_set for (owner, name), r in measured.items() if owner == uid}
            log("warning", "evicting a pod for memory", pod=uid, available=available)
            self._workers[uid].evict(short_of_memory(pods[uid], each, available), now=True)
