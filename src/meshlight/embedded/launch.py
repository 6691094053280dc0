"""The host's side of an embedded cluster: start its supervisor in namespaces of its own, stop it.

Owns what touches the host: one loopback socket, the state directory, the supervisor process. It
knows nothing of what runs inside.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshlight.embedded import control, outlet, pki
from meshlight.embedded.layout import Layout, LayoutError, Record, start_time
from meshlight.node import cgroups
from meshlight.node.oci.store import remove_tree
from meshlight.refusal import Refusal

DEFAULT_API_PORT = 6443
_TOOLS = {"ip": "iproute2", "nft": "nftables", "unshare": "util-linux", "nsenter": "util-linux"}

_USER = ("--user", "--map-root-user", "--net", "--mount", "--pid", "--fork")
_MOUNT_TRIAL = "mount -t proc proc /proc && mount -t tmpfs tmpfs /run"
WITHOUT_ROOT = (
    "without root: limits of memory and CPU are not enforced, runAsUser is ignored, and pods see of this "
    "machine's files what you may read"
)
"""What is not to be had in a user namespace, in one line for the user."""


class LaunchError(Refusal):
    """The cluster cannot be started or stopped; the message says why and what to do."""


def missing_requirements() -> list[str]:
    """One line for each thing this machine lacks; empty when a cluster can run."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [
        f"{tool} is not installed: it comes with the package {package}"
        for tool, package in _TOOLS.items()
        if shutil.which(tool, path=path) is None
    ]
    if os.geteuid() != 0 and not missing:
        tried = subprocess.run(
            ["unshare", *_USER, "true"],
            capture_output=True,
            text=True,
        )
        if tried.returncode:
            missing.append(
                "user namespaces are not permitted to you on this kernel: run as root, or allow them "
                f"(sysctl user.max_user_namespaces, or your AppArmor policy): {tried.stderr.strip()}"
            )
        elif subprocess.run(["unshare", *_USER, "sh", "-c", _MOUNT_TRIAL], capture_output=True).returncode:
            missing.append(
                "your user namespace may not mount a /proc of its own here (a container hides parts of this "
                "one), and a cluster needs that: run as root"
            )
    return missing


@contextmanager
def _locked(layout: Layout) -> Iterator[None]:
    """Only one `up` or `down` of a cluster at a time."""
    layout.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (layout.state / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def start(
    layout: Layout,
    nodes: int | None,
    api_port: int | None,
    lifeline: int | None = None,
    isolated: bool | None = None,
) -> tuple[Record, bool]:
    """Start the cluster unless it runs; returns its record and whether this call started it.

    `nodes` and `api_port` default to what the cluster had before, then to 6 and to 6443 or a free
    port. The cluster ends when all writers of the pipe `lifeline` have closed it. What a crashed one
    left is cleared. Raises LaunchError; nothing is half-made then.
    """
    if lacking := missing_requirements():
        raise LaunchError("this machine lacks:\n  " + "\n  ".join(lacking))
    existed = layout.state.exists()
    try:
        with _locked(layout):
            before = Record.read(layout)
            if before and before.running():
                _unchanged(before, nodes, api_port)
                outlet.spawn(layout, before.supervisor_pid)  # should it have died; one alive stays the only one
                return before, False
            _end_orphan(layout)
            cgroups.clear(layout.state)
            return _launch(layout, before, nodes, api_port, lifeline, isolated), True
    except BaseException as error:
        if not existed:
            shutil.rmtree(layout.state, ignore_errors=True)
        if isinstance(error, OSError):
            raise LaunchError(f"the state directory {layout.state} cannot be used: {error}") from None
        raise


def _unchanged(running: Record, nodes: int | None, api_port: int | None) -> None:
    """Refuse to change what is fixed while a cluster runs."""
    name = running.name
    again = f"`meshlight down --name {name}`, then `up` again; objects are kept"
    if nodes not in (None, running.nodes):
        raise LaunchError(f"{name} is up with {running.nodes} nodes, not {nodes}: to change that, {again}")
    if api_port not in (None, running.api_port):
        raise LaunchError(f"{name} is up on port {running.api_port}, not {api_port}: to change that, {again}")


def _launch(
    layout: Layout,
    before: Record | None,
    nodes: int | None,
    api_port: int | None,
    lifeline: int | None,
    isolated: bool | None,
) -> Record:
    with _listen(api_port or (before.api_port if before else None)) as listener:
        port = listener.getsockname()[1]
        count = nodes or (before.nodes if before else 6)
        record = Record(layout.name, count, port, boot_id=str(uuid.uuid4()))
        record.isolated = bool(before and before.isolated) if isolated is None else isolated
        try:
            pki.ensure(layout.state, layout.name, layout.node_names(record.nodes), port)
        except (ValueError, TypeError) as error:
            raise LaunchError(
                f"a key or certificate in {layout.state / 'pki'} cannot be read ({error}): delete the file, "
                f"it is made anew, or `meshlight down --purge --name {layout.name}` and start over"
            ) from None
        layout.logs.mkdir(exist_ok=True, mode=0o700)
        record.supervisor_pid = _spawn(layout, listener.fileno(), record, lifeline)
        record.supervisor_started = start_time(record.supervisor_pid)
        record.write(layout)
        outlet.spawn(layout, record.supervisor_pid)
    return record


def _listen(port: int | None) -> socket.socket:
    candidates = [port] if port else [DEFAULT_API_PORT, 0]
    for candidate in candidates:
        try:
            return socket.create_server(("127.0.0.1", candidate), backlog=512)
        except OSError as error:
            cause = error
    raise LaunchError(
        f"port {port} of 127.0.0.1 is in use or not permitted ({cause.strerror}); "
        "choose another with --api-port"
    )


def _spawn(layout: Layout, listener: int, record: Record, lifeline: int | None) -> int:
    """Start pid 1 of the cluster; returns its pid as the host sees it."""
    command = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--net", "--uts"]
    command += ["--ipc", "--propagation", "private"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    command += [sys.executable, "-m", "meshlight.embedded.supervisor"]
    command += ["--name", layout.name, "--state", str(layout.state)]
    command += ["--listen-fd", str(listener), "--nodes", str(record.nodes)]
    command += ["--boot-id", record.boot_id]
    inherited = [listener]
    if record.isolated:
        command.append("--isolated")
    if lifeline is not None:
        inherited.append(lifeline)
        command += ["--lifeline", str(lifeline)]
    log_path = layout.logs / "supervisor.log"
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    with log_path.open("ab") as log:
        wrapper = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=inherited,
            start_new_session=True,
            env=environment,
            cwd="/",
        )
    children = Path(f"/proc/{wrapper.pid}/task/{wrapper.pid}/children")
    deadline = time.monotonic() + 10
    while wrapper.poll() is None and time.monotonic() < deadline:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.005)
    raise LaunchError(f"the supervisor did not start; its log is {log_path}:\n{tail(log_path)}")


def wait(record: Record) -> None:
    """Return once the cluster has ended."""
    try:
        descriptor = os.pidfd_open(record.supervisor_pid)
    except ProcessLookupError:
        return
    try:
        select.select([descriptor], [], [])
    finally:
        os.close(descriptor)


def tail(path: Path, lines: int = 5) -> str:
    """The last lines of a log, for an error message. Raises OSError."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _end_orphan(layout: Layout, timeout: float = 20) -> bool:
    """End a supervisor that the record does not know, as when `up` was killed before it wrote one."""
    pid = control.peer(layout.state)
    if not pid:
        return False
    _end(Record(layout.name, 0, 0, pid, start_time(pid)), timeout)
    outlet.wait_until_gone(layout)
    return True


def _end(record: Record, timeout: float) -> None:
    """SIGTERM to the supervisor, and SIGKILL when it is not gone in time; returns when it is."""
    deadline = time.monotonic() + timeout
    with suppress(ProcessLookupError):
        os.kill(record.supervisor_pid, signal.SIGTERM)
        while record.running():
            if time.monotonic() > deadline:
                os.kill(record.supervisor_pid, signal.SIGKILL)
            time.sleep(0.02)


def stop(layout: Layout, *, purge: bool, timeout: float = 20) -> bool:
    """Stop the cluster; returns whether it was running. With `purge` its state goes too.

    The supervisor stops its parts in order; if it is not gone after `timeout` seconds the kernel
    ends it, and with it every process, namespace, interface and mount of the cluster.
    """
    if not layout.state.exists():
        return False
    with _locked(layout):
        try:
            record = Record.read(layout)
        except LayoutError:
            if not purge:
                raise
            record = None
        was_running = record is not None and record.running()
        if record and was_running:
            _end(record, timeout)
            outlet.wait_until_gone(layout)
        elif _end_orphan(layout, timeout):
            was_running = True
        cgroups.clear(layout.state)
        if record:
            record.supervisor_pid = record.supervisor_started = 0
            record.write(layout)
        if purge:
            remove_tree(layout.state)  # images' folders may have any mode
    return was_running
