"""The node agent's end of pod sandboxes: create or adopt one, start programs in it, hear of their ends.

Speaks `sandbox.py`'s protocol. It knows processes, namespaces and logs, nothing of pods' specs.
"""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_BOOT = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import sandbox; sandbox.nursery()"
"""Imported rather than run as a script: its compiled form is cached."""
_PATIENCE = 20.0
"""Seconds for a pod's pid 1 to come up."""
EXITS = Path("/run/meshlight/exits")
_BUFFER = 4 * 1024 * 1024
_SO_SNDBUFFORCE = 32


class SandboxError(Exception):
    """A sandbox refused or could not do what was asked; `reason` is a container status' word."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "sandbox.sock").unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Mount:
    """One step of a container's mount plan.

    `kind` is `bind` (source is a real path of the machine), `file` (source is the content),
    `symlink`, `tmpfs`, `proc`, `sysfs` or `devpts`; `options` is `ro` for binds, else mount data.
    """

    kind: str
    source: str
    target: str
    options: str = ""


@dataclass(frozen=True, slots=True)
class Program:
    """What a container runs and in which surroundings; ids of None are left as they are."""

    argv: list[str]
    env: dict[str, str]
    cwd: str = "/"
    root: str = ""
    mounts: list[Mount] = field(default_factory=list)
    overlay_options: str = ""
    private: tuple[str, ...] = ()
    """Folders of the machine of which the root shows nothing."""
    layers_folder: str = ""
    layers: tuple[str, ...] = ()
    """Where an image's layers are, and their names there, the topmost first; none for the machine's root."""
    read_only: bool = False
    log: str = ""
    drop: list[int] = field(default_factory=list)
    uid: int | None = None
    gid: int | None = None
    groups: list[int] | None = None
    no_new_privileges: bool = False
    cgroups: list[str] = field(default_factory=list)
    stdin: bool = False
    tty: bool = False

    def wire(self) -> dict[str, Any]:
        """As the sandbox reads it."""
        return {**asdict(self), "mounts": [(m.kind, m.source, m.target, m.options) for m in self.mounts]}


@dataclass(slots=True)
class Attempt:
    """One run of a container: times in nanoseconds since the epoch, 0 while unknown."""

    name: str
    attempt: int
    note: dict[str, Any]
    started: int
    finished: int
    code: int | None
    signal: int
    namespace: str = ""
    """Its mount namespace, as the kernel names it."""


class Nursery:
    """The process that forks pods' pid 1s; started when the first is wanted, and again if it is gone."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT], stdin=theirs.fileno(), start_new_session=True
            )
        ours.setblocking(False)
        self._sock = ours
        return ours

    async def bear(self, folder: Path, hostname: str, netns: str | None) -> int:
        """Make a pid 1 in a network namespace (None: our own); returns its pid. Raises SandboxError."""
        request = marshal.dumps((str(folder), hostname, f"/run/netns/{netns}" if netns else ""))
        read, write = os.pipe()
        try:
            try:
                socket.send_fds(self._sock or self._start(), [request], [write])
            except (BrokenPipeError, ConnectionError):  # it was killed
                if self._sock is not None:
                    self._sock.close()
                socket.send_fds(self._start(), [request], [write])
        except OSError as error:
            os.close(read)
            raise SandboxError("CreatePodSandboxError", f"pid 1 cannot be made: {error}") from error
        finally:
            os.close(write)
        said = await _read_once(read)
        if not said:
            raise SandboxError("CreatePodSandboxError", "pid 1 of the pod did not come up")
        return int(said)


async def _read_once(descriptor: int) -> bytes:
    """What a pipe has next; nothing when it ends or stays silent for too long. Closes it."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def ready() -> None:
        loop.remove_reader(descriptor)
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(descriptor, ready)
    try:
        await asyncio.wait_for(readable, _PATIENCE)
        return os.read(descriptor, 64)
    except TimeoutError:
        return b""
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


class Sandbox:
    """A connection to one pod's pid 1. `on_change` is called when a container or pid 1 itself ended."""

    def __init__(self, folder: Path, pid: int, sock: socket.socket, on_change: Callable[[], None]) -> None:
        self.folder, self.pid, self._sock, self._on_change = folder, pid, sock, on_change
        self.alive = True
        self.attempts: dict[str, list[Attempt]] = {}
        self._told = asyncio.Event()
        self._number = 0
        self._answers: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._execs: dict[str, asyncio.Future[int]] = {}
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)

    @classmethod
    async def create(
        cls, nursery: Nursery, folder: Path, hostname: str, netns: str | None, on_change: Callable[[], None]
    ) -> Sandbox:
        """Start a pod's pid 1 in the named network namespace, or in our own. Raises SandboxError."""
        _prepare(folder)
        pid = await nursery.bear(folder, hostname, netns)
        (folder / "sandbox.pid").write_text(str(pid))
        found = await cls.adopt(folder, on_change)
        if found is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise SandboxError("CreatePodSandboxError", "pid 1 of the pod does not answer")
        return found

    @classmethod
    async def adopt(cls, folder: Path, on_change: Callable[[], None]) -> Sandbox | None:
        """Connect to a pid 1 that runs already; None when there is none."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(str(folder / "sandbox.sock"))
            pid = int((folder / "sandbox.pid").read_text())
        except (OSError, ValueError):
            sock.close()
            return None
        made = cls(folder, pid, sock, on_change)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(made._told.wait(), 10)
        return made if made.alive else None

    def _readable(self) -> None:
        try:
            size = self._sock.recv_into(bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC)
            raw, descriptors, _, _ = socket.recv_fds(self._sock, max(size, 1), 4)
        except BlockingIOError:
            return
        except OSError:
            raw, descriptors = b"", []
        if not raw:
            self._ended()
            return
        message: dict[str, Any] = marshal.loads(raw)
        match message.get("event"):
            case None:
                future = self._answers.pop(message["id"], None)
                if future and not future.done():
                    future.set_result((message, descriptors))
                else:
                    for descriptor in descriptors:
                        os.close(descriptor)
            case "containers":
                self.attempts = {}
                for record in message["containers"]:
                    self.attempts.setdefault(record["name"], []).append(Attempt(**record))
                self._told.set()
            case "exited":
                message.pop("event")
                ended = Attempt(**message)
                kept = [a for a in self.attempts.get(ended.name, []) if a.attempt != ended.attempt]
                self.attempts[ended.name] = [*kept, ended][-2:]
                self._release(ended.name)
                self._on_change()
            case "exec-exited":
                finished = self._execs.pop(message["exec"], None)
                if finished and not finished.done():
                    finished.set_result(message["code"])

    def _ended(self) -> None:
        """Pid 1 is gone, and with it every process of the pod."""
        if not self.alive:
            return
        self.alive = False
        self.close()
        (EXITS / str(self.pid)).unlink(missing_ok=True)
        waiting: list[asyncio.Future[Any]] = [*self._answers.values(), *self._execs.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(SandboxError("SandboxChanged", "the pod's pid 1 ended"))
                future.exception()  # whoever waits still sees it; nobody waiting is no fault
        self._told.set()
        self._release(None)
        self._on_change()

    def _release(self, name: str | None) -> None:
        for waited, future in self._waiting:
            if name in (None, waited) and not future.done():
                future.set_result(None)
        self._waiting = [(n, f) for n, f in self._waiting if not f.done()]

    async def ended(self, name: str) -> None:
        """Return once the container does not run."""
        if self.running(name):
            future: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append((name, future))
            await future

    def close(self) -> None:
        """Disconnect; the pod goes on."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    async def _ask(
        self, operation: str, descriptors: list[int] | None = None, **fields: Any
    ) -> tuple[dict[str, Any], list[int]]:
        if not self.alive:
            raise SandboxError("SandboxChanged", "the pod's pid 1 ended")
        self._number += 1
        number = self._number
        future = self._answers[number] = self._loop.create_future()
        try:
            socket.send_fds(
                self._sock, [marshal.dumps({"op": operation, "id": number, **fields})], descriptors or []
            )
        except OSError as error:
            del self._answers[number]
            raise SandboxError("CreateContainerError", f"pid 1 of the pod cannot be told: {error}") from error
        answer, received = await future
        if "error" in answer:
            raise SandboxError(answer["reason"], answer["error"])
        return answer, received

    async def start(self, name: str, attempt: int, program: Program, note: dict[str, Any]) -> None:
        """Start a container. `note` is kept with it for whoever adopts the sandbox. Raises SandboxError."""
        answer, _ = await self._ask("start", name=name, attempt=attempt, spec=program.wire(), note=note)
        known = self.attempts.setdefault(name, [])
        if not any(a.attempt == attempt for a in known):  # its end may have been told meanwhile
            known.append(Attempt(name, attempt, note, answer["started"], 0, None, 0, answer["namespace"]))
        del known[:-2]

    def last(self, name: str) -> Attempt | None:
        """The latest attempt at a container."""
        attempts = self.attempts.get(name)
        return attempts[-1] if attempts else None

    def running(self, name: str) -> bool:
        """Whether a container's program runs."""
        last = self.last(name)
        return self.alive and last is not None and not last.finished

    async def signal(self, name: str, number: int) -> None:
        """Send a signal to a container's program."""
        await self._ask("signal", name=name, signal=int(number))  # an enum cannot be marshalled

    async def kill(self, name: str) -> None:
        """End every process of a container."""
        await self._ask("kill", name=name)

    async def execute(
        self, name: str, program: Program, stdin: int, stdout: int, stderr: int
    ) -> asyncio.Future[int]:
        """Run a program beside a running container's; the future has its exit code."""
        self._number += 1
        label = str(self._number)
        finished = self._execs[label] = self._loop.create_future()
        try:
            await self._ask("exec", [stdin, stdout, stderr], name=name, exec=label, spec=program.wire())
        except SandboxError:
            self._execs.pop(label, None)
            raise
        return finished

    async def tcp_socket(self) -> socket.socket:
        """An unconnected TCP socket of the pod's network namespace."""
        _, descriptors = await self._ask("socket")
        made = socket.socket(fileno=descriptors[0])
        made.setblocking(False)
        return made

    async def terminal(self, name: str) -> tuple[int, int]:
        """Both ends of a new terminal of a running container, the caller closes them: (leader, follower)."""
        _, descriptors = await self._ask("pty", name=name)
        return descriptors[0], descriptors[1]

    async def stdin(self, name: str) -> int | None:
        """A descriptor that writes to a running container's stdin, if it has one; the caller closes it."""
        _, descriptors = await self._ask("stdin", name=name)
        return descriptors[0] if descriptors else None

    async def stop(self) -> None:
        """End the pod's pid 1 and everything in it."""
        if not self.alive:
            return
        with contextlib.suppress(SandboxError, TimeoutError):
            await asyncio.wait_for(self._ask("stop"), 2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._ended()
