"""Limits of memory, CPU and processes by cgroups, where the machine lets us make them.

Works with a delegated cgroup v2 tree or with writable v1 hierarchies; without either, limits are not
enforced and `available` says so. Every folder made here is removed with its pod.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meshlight.kube.resources import Object
from meshlight.node.environment import quantity

ROOT = Path("/sys/fs/cgroup")
_PERIOD = 100_000
"""Microseconds over which a CPU quota counts."""
_CONTROLLERS = ("memory", "cpu")


@dataclass(frozen=True, slots=True)
class Limits:
    """A container's limits; 0 means none. Memory in bytes, CPU in microseconds of each period."""

    memory: int = 0
    cpu: int = 0

    @classmethod
    def of(cls, container: Object) -> Limits:
        """From `resources.limits`. Raises ValueError for what is not a quantity."""
        limits = (container.get("resources") or {}).get("limits") or {}
        cpu = int(quantity(limits.get("cpu", 0)) * _PERIOD)
        return cls(int(quantity(limits.get("memory", 0))), max(cpu, 1000) if cpu else 0)


def settings(limits: Limits, version: int) -> dict[str, dict[str, str]]:
    """Files to write by controller (in v2 all lie in one folder)."""
    found: dict[str, dict[str, str]] = {}
    if limits.memory:
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        found["memory"] = {name: str(limits.memory)}
    if limits.cpu and version == 2:
        found["cpu"] = {"cpu.max": f"{limits.cpu} {_PERIOD}"}
    elif limits.cpu:
        found["cpu"] = {"cpu.cfs_period_us": str(_PERIOD), "cpu.cfs_quota_us": str(limits.cpu)}
    return found


def cgroup_label(state: Path) -> str:
    """The name of a cluster's folder in cgroup hierarchies, known from its state directory alone."""
    return "meshlight-" + hashlib.sha256(str(state).encode()).hexdigest()[:12]


def leftovers(state: Path, root: Path = ROOT) -> list[Path]:
    """A cluster's folders in every hierarchy, wherever its processes were started from."""
    label = cgroup_label(state)
    return [Path(folder, label) for folder, below, _ in os.walk(root) if label in below]


def clear(state: Path, root: Path = ROOT) -> list[Path]:
    """Take away every cgroup of a cluster that runs no more; returns those that are still in use."""
    for top in leftovers(state, root):
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
    return leftovers(state, root)


class Cgroups:
    """The cgroups of one node of one cluster, below `label` in each hierarchy."""

    def __init__(self, label: str) -> None:
        self._label = label
        self.version, self._parents = self._find()

    @property
    def available(self) -> bool:
        """Whether limits can be enforced here."""
        return bool(self._parents)

    def _find(self) -> tuple[int, dict[str, Path]]:
        """(version, folder to make ours in by controller)."""
        if (ROOT / "cgroup.controllers").exists():
            own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
            parent = ROOT / own.strip("/")
            with contextlib.suppress(OSError):
                enabled = (parent / "cgroup.subtree_control").read_text().split()
                if os.access(parent, os.W_OK) and all(c in enabled for c in _CONTROLLERS):
                    return 2, dict.fromkeys(_CONTROLLERS, parent)
            return 2, {}
        found = {}
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            for controller in controllers.split(","):
                parent = ROOT / controller / own.strip("/")
                if controller in _CONTROLLERS and os.access(parent, os.W_OK) and _writable(parent):
                    found[controller] = parent
        return 1, found

    def _folders(self, uid: str, container: str) -> Iterator[tuple[str, Path]]:
        for controller, parent in self._parents.items():
            yield controller, parent / self._label / uid / container

    def prepare(self, uid: str, container: Object) -> list[str]:
        """Make a container's cgroups; returns the files that its first process joins them by."""
        limits = Limits.of(container)
        wanted = settings(limits, self.version)
        files = []
        for controller, folder in self._folders(uid, container["name"]):
            if controller not in wanted:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            if self.version == 2:
                for above in (folder.parent, folder.parent.parent):
                    (above / "cgroup.subtree_control").write_text("+memory +cpu")
            for name, value in wanted[controller].items():
                (folder / name).write_text(value)
            files.append(str(folder / "cgroup.procs"))
        return sorted(set(files))

    def out_of_memory(self, uid: str, container: str) -> int:
        """How often the kernel ended a process of the container for want of memory."""
        for controller, folder in self._folders(uid, container):
            if controller != "memory":
                continue
            name = "memory.events" if self.version == 2 else "memory.oom_control"
            with contextlib.suppress(OSError):
                for line in (folder / name).read_text().splitlines():
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return int(value)
        return 0

    def remove(self, uid: str) -> None:
        """Take a pod's cgroups away."""
        for parent in set(self._parents.values()):
            pod = parent / self._label / uid
            if pod.exists():
                for folder in [*(p for p in pod.iterdir() if p.is_dir()), pod]:
                    with contextlib.suppress(OSError):  # a dying process is still in it: kept for the next
                        folder.rmdir()
            with contextlib.suppress(OSError):
                (parent / self._label).rmdir()


def _writable(parent: Path) -> bool:
    """Whether folders can really be made: a read-only mount passes an access check of root."""
    probe = parent / f"meshlight-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True
