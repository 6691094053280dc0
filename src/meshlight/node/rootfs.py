"""What a container sees of the machine: the plan of the mounts over its overlay root.

Pure but for reading the machine's mount table once (`Machine.read`). The overlay's lower layer is the
machine's root file system, so only what is mounted elsewhere, private or secret needs a step.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import meshlight
from meshlight.kube.resources import Object
from meshlight.node.runtime import Mount

PRIVATE = ("/proc", "/sys", "/dev", "/run", "/tmp")
"""Folders whose content is the container's own."""
HOME = "/root"
"""Home of the user that programs run as."""
_PER_POD_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/hostname")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL",
    "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON",
    "BPF", "CHECKPOINT_RESTORE",
)  # fmt: skip
_DEFAULT_CAPABILITIES = frozenset((
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "NET_BIND_SERVICE",
    "NET_RAW", "SYS_CHROOT", "AUDIT_WRITE", "SETFCAP",
))  # fmt: skip
"""What container runtimes give by default, without MKNOD: devices of the machine stay out of reach."""


def _under(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts of this machine that every container's root depends on.

    `mounts` are real mounts outside the private folders; `needed` are folders with Meshlight's own
    programs; `hidden` hold clusters' credentials and are masked; `home` says that root's home is not
    ours to write to, so that pods get an empty one.
    """

    mounts: tuple[str, ...]
    needed: tuple[str, ...]
    hidden: tuple[str, ...]
    in_user_namespace: bool
    path: str
    home: bool = False

    @classmethod
    def read(cls, state: Path) -> Machine:
        """Look at the machine; `state` is this cluster's state directory."""
        points = _mount_points(Path("/proc/self/mountinfo").read_text())
        needed = {
            os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, Path(meshlight.__file__).parent)
        } | {sys.prefix, str(Path(meshlight.__file__).parent)}
        hidden = [state.parent, Path.home() / ".meshlight" / "clusters"]
        identity = Path("/proc/self/uid_map").read_text().split()
        return cls(
            mounts=tuple(sorted(p for p in points if p != "/" and not _under(p, (*PRIVATE, *_PER_POD_FILES)))),
            needed=tuple(sorted(needed)),
            hidden=tuple(sorted({os.path.realpath(p) for p in hidden if p.exists()})),
            in_user_namespace=identity != ["0", "0", "4294967295"],
            path=os.environ.get("PATH", os.defpath),
            home=not os.access(HOME, os.W_OK),
        )


def _mount_points(mountinfo: str) -> set[str]:
    unescape = re.compile(r"\\([0-7]{3})")
    return {
        unescape.sub(lambda m: chr(int(m[1], 8)), line.split()[4]) for line in mountinfo.splitlines() if line
    }


def plan(
    machine: Machine, files: dict[str, str], volumes: Iterable[Mount], words: Iterable[str] = ()
) -> list[Mount]:
    """Every mount of a container in order: the machine's view, `files` by path, then `volumes`.

    `words` is the command line: paths in it that lie in a private folder of the machine are shown
    read-only, so that a script in /tmp can be run.
    """
    steps = [Mount("tmpfs", "", "/run", "mode=755"), Mount("tmpfs", "", "/tmp", "mode=1777")]
    if machine.home:
        steps.append(Mount("tmpfs", "", HOME, "mode=700"))
    steps += [
        Mount("bind", point, point, "ro") for point in machine.mounts if not _under(point, machine.hidden)
    ]
    shown = [p for p in machine.needed if _under(p, PRIVATE)]
    shown += [w for w in words if _under(w, ("/tmp",)) and w != "/tmp" and not _under(w, machine.hidden)]
    steps += [Mount("bind", os.path.realpath(p), p, "ro") for p in shown if os.path.exists(p)]
    steps += [
        Mount("tmpfs", "", path, "mode=700,size=4k")
        for path in machine.hidden
        if not _under(path, PRIVATE) or _under(path, shown)
    ]
    return steps + own_plan(files, volumes)


def own_plan(files: dict[str, str], volumes: Iterable[Mount]) -> list[Mount]:
    """The mounts of a container that sees nothing of the machine: devices, `files` by path, `volumes`."""
    steps = [
        Mount("proc", "", "/proc"),
        Mount("sysfs", "", "/sys"),
        Mount("tmpfs", "", "/dev", "mode=755,size=64k"),
        *(Mount("bind", f"/dev/{name}", f"/dev/{name}") for name in _DEVICES),
        Mount("tmpfs", "", "/dev/shm", "mode=1777"),
        Mount("devpts", "", "/dev/pts", "newinstance,ptmxmode=0666,mode=620"),
        Mount("symlink", "pts/ptmx", "/dev/ptmx"),
        Mount("symlink", "/proc/self/fd", "/dev/fd"),
        *(Mount("symlink", f"/proc/self/fd/{n}", f"/dev/{name}")
          for n, name in enumerate(("stdin", "stdout", "stderr"))),
        *(Mount("file", content, path) for path, content in files.items()),
    ]  # fmt: skip
    return steps + sorted(volumes, key=lambda m: m.target.rstrip("/").count("/"))


def dropped_capabilities(context: Object) -> list[int]:
    """Numbers of the capabilities that a container's securityContext leaves out."""
    if context.get("privileged"):
        return []
    asked = context.get("capabilities") or {}
    add = {name.removeprefix("CAP_").upper() for name in asked.get("add") or []}
    drop = {name.removeprefix("CAP_").upper() for name in asked.get("drop") or []}
    kept = set() if "ALL" in drop else _DEFAULT_CAPABILITIES - drop
    kept = set(_CAPABILITIES) if "ALL" in add else kept | add
    return [number for number, name in enumerate(_CAPABILITIES) if name not in kept]
