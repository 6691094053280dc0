"""Limits, shares and accounting of memory, CPU and processes by cgroups, where the machine lets us make them.

Works with a delegated cgroup v2 tree or with writable v1 hierarchies; without either, limits are not
enforced and `available` says so. Every folder made here is removed with its pod: `LABEL/POD/CONTAINER`.
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
_CONTROLLERS = ("memory", "cpu", "cpuacct", "pids")
_V2_CONTROLLERS = ("memory", "cpu", "pids")
_NEEDED = ("memory", "cpu")
POD_PROCESSES = 4096
"""How many processes and threads a pod may have, so that one cannot take the machine's."""
_LEAST_SHARES = 2


def shares_of(millicores: float) -> int:
    """CPU shares (v1) for a request."""
    return max(_LEAST_SHARES, int(millicores * 1024 / 1000))


def weight_of(shares: int) -> int:
    """The v2 weight that stands for v1 shares."""
    return 1 + ((min(shares, 262144) - 2) * 9999) // 262142


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one cgroup; 0 means none. Memory in bytes, CPU quota in microseconds of each period."""

    memory: int = 0
    cpu: int = 0
    shares: int = _LEAST_SHARES
    processes: int = 0

    @classmethod
    def of(cls, container: Object) -> Limits:
        """From a container's `resources`. Raises ValueError for what is not a quantity."""
        resources = container.get("resources") or {}
        limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
        cpu = int(quantity(limits.get("cpu", 0)) * _PERIOD)
        asked = float(quantity(requests.get("cpu", limits.get("cpu", 0)))) * 1000
        return cls(int(quantity(limits.get("memory", 0))), max(cpu, 1000) if cpu else 0, shares_of(asked))

    @classmethod
    def of_pod(cls, pod: Object) -> Limits:
        """The sums of a pod's containers; a bound only where each of them has one."""
        spec = pod["spec"]
        sidecars = [c for c in spec.get("initContainers") or [] if c.get("restartPolicy") == "Always"]
        each = [cls.of(c) for c in [*spec["containers"], *sidecars]]
        initial = [cls.of(c) for c in spec.get("initContainers") or []]
        memory = sum(e.memory for e in each) if all(e.memory for e in [*each, *initial]) else 0
        cpu = sum(e.cpu for e in each) if all(e.cpu for e in [*each, *initial]) else 0
        return cls(
            max([memory, *(e.memory for e in initial)]) if memory else 0,
            max([cpu, *(e.cpu for e in initial)]) if cpu else 0,
            max(_LEAST_SHARES, sum(e.shares for e in each if e.shares > _LEAST_SHARES)),
            POD_PROCESSES,
        )


def settings(limits: Limits, version: int) -> dict[str, dict[str, str]]:
    """Files to write by controller (in v2 all lie in one folder)."""
    found: dict[str, dict[str, str]] = {}
    if limits.memory:
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        found["memory"] = {name: str(limits.memory)}
    if version == 2:
        found["cpu"] = {"cpu.weight": str(weight_of(limits.shares))}
        if limits.cpu:
            found["cpu"]["cpu.max"] = f"{limits.cpu} {_PERIOD}"
    else:
        found["cpu"] = {"cpu.shares": str(limits.shares)}
        if limits.cpu:
            found["cpu"] |= {"cpu.cfs_period_us": str(_PERIOD), "cpu.cfs_quota_us": str(limits.cpu)}
    if limits.processes:
        found["pids"] = {"pids.max": str(limits.processes)}
    return found


def cgroup_label(state: Path) -> str:
    """The name of a cluster's folder in cgroup hierarchies, known from its state directory alone."""
    return "meshlight-" + hashlib.sha256(str(state).encode()).hexdigest()[:12]


def leftovers(state: Path, root: Path = ROOT) -> list[Path]:
    """A cluster's folders in every hierarchy, wherever its processes were started from."""
    label = cgroup_label(state)
    return [Path(folder, label) for folder, below, _ in os.walk(root) if label in below]


def clear_pod(state: Path, uid: str, root: Path = ROOT) -> None:
    """Take away the cgroups of a pod whose node is gone; those still in use are left."""
    for top in leftovers(state, root):
        for folder, _, _ in os.walk(top / uid, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def clear(state: Path, root: Path = ROOT) -> list[Path]:
    """Take away every cgroup of a cluster that runs no more; returns those that are still in use."""
    for top in leftovers(state, root):
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
    return leftovers(state, root)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a container has used: CPU in nanoseconds since it began, memory in bytes, and its processes."""

    cpu: int
    working_set: int
    resident: int
    processes: int = 0


class Cgroups:
    """The cgroups of one node of one cluster, below `label` in each hierarchy."""

    def __init__(self, label: str) -> None:
        self._label = label
        self.version, self._parents = self._find()
        self._made: set[str] = set()

    @property
    def available(self) -> bool:
        """Whether limits can be enforced here."""
        return all(c in self._parents for c in _NEEDED)

    def _find(self) -> tuple[int, dict[str, Path]]:
        """(version, folder to make ours in by controller)."""
        if (ROOT / "cgroup.controllers").exists():
            own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
            parent = ROOT / own.strip("/")
            with contextlib.suppress(OSError):
                enabled = (parent / "cgroup.subtree_control").read_text().split()
                if os.access(parent, os.W_OK) and all(c in enabled for c in _NEEDED):
                    return 2, {c: parent for c in _V2_CONTROLLERS if c in enabled}
            return 2, {}
        found = {}
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            for controller in controllers.split(","):
                parent = ROOT / controller / own.strip("/")
                if controller in _CONTROLLERS and os.access(parent, os.W_OK) and _writable(parent):
                    found[controller] = parent
        return 1, found

    def _folders(self, *below: str) -> Iterator[tuple[str, Path]]:
        for controller, parent in self._parents.items():
            yield controller, parent.joinpath(self._label, *below)

    def _apply(self, folder: Path, controller: str, wanted: dict[str, dict[str, str]]) -> None:
        for name, value in wanted.get(controller, {}).items():
            (folder / name).write_text(value)

    def prepare(self, uid: str, pod: Object, container: Object) -> list[str]:
        """Make a container's cgroups; returns the files that its first process joins them by."""
        inner = settings(Limits.of(container), self.version)
        outer = settings(Limits.of_pod(pod), self.version)
        files = []
        for controller, folder in self._folders(uid, container["name"]):
            fresh = not folder.parent.exists()
            folder.mkdir(parents=True, exist_ok=True)
            if self.version == 2:
                enabled = " ".join(f"+{c}" for c in self._parents)
                for above in (folder.parent.parent, folder.parent):
                    (above / "cgroup.subtree_control").write_text(enabled)
            if controller == "cpu":
                self._weigh(folder.parent.parent)
            if fresh or self.version == 2:
                self._apply(folder.parent, controller, outer)
            self._apply(folder, controller, inner)
            files.append(str(folder / "cgroup.procs"))
        return sorted(set(files))

    def _weigh(self, top: Path) -> None:
        """All pods together count as much as the machine has cores, not as one process."""
        shares = (os.cpu_count() or 1) * 1024
        name, value = ("cpu.weight", weight_of(shares)) if self.version == 2 else ("cpu.shares", shares)
        if str(top) not in self._made or not (top / name).exists():
            (top / name).write_text(str(value))
            self._made.add(str(top))

    def out_of_memory(self, uid: str, container: str) -> int:
        """How often the kernel ended a process of the container for want of memory."""
        for controller, folder in self._folders(uid, container):
            if controller != "memory":
                continue
            name = "memory.events" if self.version == 2 else "memory.oom_control"
            with contextlib.suppress(OSError, ValueError):
                return _entry(folder / name, "oom_kill")
        return 0

    def usage(self, uid: str, container: str) -> Usage | None:
        """What a container has used so far; None where it has no cgroups."""
        if not self.available:
            return None
        folders = dict(self._folders(uid, container))
        try:
            processes = int((folders["pids"] / "pids.current").read_text()) if "pids" in folders else 0
            if self.version == 2:
                stat = folders["memory"] / "memory.stat"
                total = int((folders["memory"] / "memory.current").read_text())
                cpu = _entry(folders["cpu"] / "cpu.stat", "usage_usec") * 1000
                return Usage(
                    cpu, max(0, total - _entry(stat, "inactive_file")), _entry(stat, "anon"), processes
                )
            stat = folders["memory"] / "memory.stat"
            total = int((folders["memory"] / "memory.usage_in_bytes").read_text())
            cpu = int((folders["cpuacct"] / "cpuacct.usage").read_text())
            working = max(0, total - _entry(stat, "total_inactive_file"))
            return Usage(cpu, working, _entry(stat, "total_rss"), processes)
        except (OSError, KeyError, ValueError):
            return None

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


def _entry(file: Path, key: str) -> int:
    """One number of a file of `key value` lines. Raises ValueError."""
    for line in file.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    raise ValueError(f"{file} has no {key}")


def _writable(parent: Path) -> bool:
    """Whether folders can really be made: a read-only mount passes an access check of root."""
    probe = parent / f"meshlight-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True
