"""Failures of nodes, as the supervisor makes them: power off, power on, the link cut and mended.

A node that is off has no process, namespace, link or cgroup left; what it keeps is its disk, `hostfs`. Runs in
the fabric's network namespace. It does not know why.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

from meshlight.node import cgroups, netns, network

NODES = Path("/run/meshlight/nodes")


def pod_uids(node: str) -> list[str]:
    """The pods that a node has, by what they have in its run directory."""
    folder = NODES / node / "pods"
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def power_off(node: str, index: int, state: Path) -> None:
    """End every process of a node whose agent is gone, and take away what they had."""
    uids = pod_uids(node)
    for uid in uids:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((NODES / node / "pods" / uid / "sandbox.pid").read_text()), signal.SIGKILL)
    netns.ip([f"link delete {network.node_link(index)}"], tolerant=True)
    for name in (*uids, node):
        netns.remove(name)
    for mount in sorted(_mounts_below(NODES / node / "pods"), reverse=True):
        netns.detach(mount)
    shutil.rmtree(NODES / node / "pods", ignore_errors=True)
    for uid in uids:
        cgroups.clear_pod(state, uid)


def cut(node: str, index: int) -> None:
    """Cut the node's link: nothing comes through in either direction."""
    network.cut_mark(node).touch()
    netns.ip([f"link set {network.node_link(index)} down"], tolerant=True)


def mend(node: str, index: int) -> None:
    """Mend the node's link."""
    network.cut_mark(node).unlink(missing_ok=True)
    netns.ip([f"link set {network.node_link(index)} up"], tolerant=True)


def is_cut(node: str) -> bool:
    """Whether the node's link is cut."""
    return network.cut_mark(node).exists()


def _mounts_below(folder: Path) -> list[str]:
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if point.startswith(f"{folder}/")]
