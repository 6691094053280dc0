"""The outlet's life, as the command line sees it: started beside a cluster, gone when the cluster is.

The outlet opens sockets in the machine's network for the cluster (`meshlight.uplink.outlet`). It is the one
process of a cluster outside the cluster's namespaces.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from typing import Any

from meshlight.embedded.layout import Layout
from meshlight.uplink.exposure import FILE
from meshlight.uplink.outlet import LOCK


def spawn(layout: Layout, supervisor_pid: int) -> None:
    """Start an outlet for a running cluster; one that is there already stays the only one."""
    command = [sys.executable, "-m", "meshlight.uplink.outlet"]
    command += ["--state", str(layout.state), "--supervisor", str(supervisor_pid)]
    with (layout.logs / "outlet.log").open("ab") as log:
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )


def wait_until_gone(layout: Layout, timeout: float = 5) -> None:
    """Return once the cluster's outlet has ended, which it does by itself with the supervisor."""
    path = layout.state / LOCK
    if not path.exists():
        return
    deadline = time.monotonic() + timeout
    with path.open("w") as lock:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.01)


def listeners(layout: Layout) -> list[dict[str, Any]]:
    """The machine's listeners for exposed Services, as the uplink wrote them down."""
    try:
        found: list[dict[str, Any]] = json.loads((layout.state / FILE).read_text())["listeners"]
    except (OSError, ValueError, KeyError):
        return []
    return found
