"""Where an embedded cluster keeps its files; see docs/architecture.md, "Files"."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from meshlight.refusal import Refusal

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")


class LayoutError(Refusal):
    """A cluster's name or record cannot be used; the message says why and what to do."""


def home() -> Path:
    """The folder of all clusters: `$MESHLIGHT_HOME`, or `~/.meshlight`."""
    return Path(os.environ.get("MESHLIGHT_HOME") or Path.home() / ".meshlight")


def clusters() -> list[str]:
    """Names of the clusters that have a state directory, sorted."""
    folder = home() / "clusters"
    found = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return sorted(name for name in found if _NAME.fullmatch(name))


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one cluster, by its name."""

    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise LayoutError(
                f"{self.name!r} cannot be a cluster's name: its nodes are named after it, so it is lower-case "
                "letters, digits and '-', at most 40, beginning and ending with a letter or digit"
            )

    @property
    def state(self) -> Path:
        """The state directory."""
        return home() / "clusters" / self.name

    @property
    def kubeconfig(self) -> Path:
        """The user's kubeconfig."""
        return self.state / "kubeconfig"

    @property
    def logs(self) -> Path:
        """Logs of the parts."""
        return self.state / "logs"

    @property
    def record_path(self) -> Path:
        """`cluster.json`."""
        return self.state / "cluster.json"

    def node_names(self, count: int) -> list[str]:
        """`<cluster>-node-1` …"""
        return [f"{self.name}-node-{index}" for index in range(1, count + 1)]


@dataclass(slots=True)
class Record:
    """What `cluster.json` remembers; `supervisor_pid` is 0 when the cluster is stopped.

    `boot_id` names the latest start: nodes report it once nothing of an earlier one is told of them.
    `isolated`: pods reach nothing outside the cluster.
    """

    name: str
    nodes: int
    api_port: int
    supervisor_pid: int = 0
    supervisor_started: int = 0
    boot_id: str = ""
    isolated: bool = False

    @classmethod
    def read(cls, layout: Layout) -> Record | None:
        """The cluster's record, or None if it was never made. Raises LayoutError for what is no record."""
        try:
            found = json.loads(layout.record_path.read_text())
            known = {field.name for field in fields(cls)}
            return cls(**{key: value for key, value in found.items() if key in known})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            anew = json.dumps({"name": layout.name, "nodes": 6, "api_port": 6443})
            raise LayoutError(
                f"{layout.record_path} cannot be read ({error}): write it anew as {anew} to keep the cluster's "
                f"objects, or start over with `meshlight down --purge --name {layout.name}`"
            ) from None

    def write(self, layout: Layout) -> None:
        """Keep it, atomically."""
        temporary = layout.record_path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(layout.record_path)

    def running(self) -> bool:
        """Whether the recorded supervisor is the process that now has its pid."""
        return self.supervisor_pid > 0 and start_time(self.supervisor_pid) == self.supervisor_started


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 when there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
