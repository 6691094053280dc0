"""Pid 1 of a pod: starts its containers, reaps and logs them, so that they outlive the node agent.

Run alone (`python -I -S -c "import sandbox; …"`) it is a nursery: it forks pid 1s into pods' network, UTS, IPC
and PID namespaces. They must start in milliseconds and stay small, hence no imports beyond C modules. Each
listens on `FOLDER/sandbox.sock` (SOCK_SEQPACKET; each message is a marshalled dict) and obeys whoever
connects; it decides nothing by itself. It knows nothing of Kubernetes objects.

Requests (with `id`; each is answered by `{id, …}` or `{id, error, reason}`):
`start {name, attempt, spec}`, `signal {name, signal}`, `kill {name}`, `exec {name, spec}` with three
descriptors, `stop {}`. Answered with descriptors: `socket {}` (a TCP socket of the pod's namespace),
`pty {name}` (both ends of a terminal), `stdin {name}` (the writing end of a container's stdin).
Events: `{event: "containers", containers: […]}` at connection, `{event: "exited", …record}`,
`{event: "exec-exited", exec, code}`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import ctypes
import fcntl
import gc
import marshal
import os
import select
import sys
import time
from _json import encode_basestring_ascii as quote
from collections.abc import Callable
from typing import Any

from container_root import (  # type: ignore[import-not-found]
    CLONE_NEWNS,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    checked,
    enter_root,
    mount,
    unmount,
)

Record = dict[str, Any]

CLONE_NEWUTS, CLONE_NEWIPC = 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 24, 38
TIOCSCTTY, TIOCSPTLCK, TIOCGPTPEER = 0x540E, 0x40045431, 0x5441
CHUNK = 65536
LINE_LIMIT = 16384
"""Bytes of a log line after which it is written as a partial one, as CRI runtimes do."""
ROTATE_BYTES = 10 * 1024 * 1024

libc = ctypes.CDLL(None, use_errno=True)


def log(message: str, error: object) -> None:
    """One JSON object a line on stderr."""
    line = f'{{"ts":{time.time():.6f},"level":"warning","msg":{quote(message)},"error":{quote(str(error))}}}\n'
    os.write(2, line.encode())


def drop_privileges(spec: Record) -> None:
    """Bounding set, ids, no_new_privs; the program gets its capabilities at exec."""
    for capability in spec["drop"]:
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if spec["groups"] is not None:
        os.setgroups(spec["groups"])
    if spec["gid"] is not None:
        os.setgid(spec["gid"])
    if spec["uid"] is not None:
        os.setuid(spec["uid"])
    if spec["no_new_privileges"]:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def execute(argv: list[str], env: dict[str, str]) -> None:
    """exec(2) with a look-up in the program's own PATH. Raises OSError naming the program."""
    program = argv[0]
    if "/" in program:
        os.execve(program, argv, env)
    for folder in env.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").split(":"):
        try:
            os.execve(f"{folder}/{program}", argv, env)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
    raise FileNotFoundError(2, f'exec: "{program}": executable file not found in $PATH')


def run_program(spec: Record, descriptors: list[int], report: int, enter: Callable[[], None]) -> None:
    """The rest of a forked child's life before its program: never returns."""
    reason = "CreateContainerError"
    try:
        os.setsid()
        for path in spec["cgroups"]:
            with open(path, "w") as file:
                file.write("0")
        enter()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        if spec["tty"]:
            fcntl.ioctl(0, TIOCSCTTY, 0)
        say(report, {"namespace": os.readlink("/proc/self/ns/mnt")})
        reason = "RunContainerError"
        try:
            os.chdir(spec["cwd"])
        except FileNotFoundError:
            os.makedirs(spec["cwd"])
            os.chdir(spec["cwd"])
        for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # the two that Python ignores
            _signal.signal(number, _signal.SIG_DFL)
        os.umask(0o022)
        drop_privileges(spec)
        execute(spec["argv"], spec["env"])
    except BaseException as error:
        say(report, {"error": described(error), "reason": reason})
    os._exit(128)


def say(report: int, facts: Record) -> None:
    """Tell pid 1 something about this child: length, then a marshalled dict."""
    raw = marshal.dumps(facts)
    os.write(report, len(raw).to_bytes(4, "big") + raw)


def heard(said: bytes) -> Record:
    """What a child told, later facts over earlier ones."""
    facts: Record = {}
    while said:
        size = 4 + int.from_bytes(said[:4], "big")
        facts.update(marshal.loads(said[4:size]))
        said = said[size:]
    return facts


def described(error: BaseException) -> str:
    """An error in words for a container's status."""
    if not isinstance(error, OSError):
        return repr(error)
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text


class LogFile:
    """The CRI log of one container attempt, rotated to `PATH.1` at 10 MB."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        self._open()
        self._second = -1
        self._stamp = ""

    def _open(self) -> None:
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.size = os.fstat(self.descriptor).st_size

    def stamp(self) -> str:
        """Now, as RFC 3339 with nanoseconds."""
        second, rest = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._stamp}.{rest:09d}Z"

    def write(self, stream: str, lines: bytes, tag: str) -> None:
        """Append complete lines (joined by newlines, without the last one)."""
        prefix = f"{self.stamp()} {stream} {tag} ".encode()
        block = prefix + lines.replace(b"\n", b"\n" + prefix) + b"\n"
        try:
            self.size += os.write(self.descriptor, block)
            if self.size > ROTATE_BYTES:
                os.rename(self.path, self.path + ".1")
                self.close()
                self._open()
        except OSError as error:  # a full disk must not stop the pod
            log("container log not written", error)

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class Pipe:
    """One output stream of a container on its way into the log."""

    def __init__(self, descriptor: int, stream: str, target: LogFile) -> None:
        self.descriptor, self.stream, self.target = descriptor, stream, target
        self.rest = b""
        os.set_blocking(descriptor, False)

    def pump(self) -> bool:
        """Read once; False at the end of the stream."""
        try:
            chunk = os.read(self.descriptor, CHUNK)
        except BlockingIOError:
            return True
        if not chunk:
            return False
        lines, newline, rest = (self.rest + chunk).rpartition(b"\n")
        if newline:
            self.target.write(self.stream, lines, "F")
        while len(rest) >= LINE_LIMIT:
            self.target.write(self.stream, rest[:LINE_LIMIT], "P")
            rest = rest[LINE_LIMIT:]
        self.rest = rest
        return True

    def drain(self) -> None:
        """Read what is left, when no writer is left."""
        before = -1
        while self.target.size != before or self.rest:
            before = self.target.size
            if not self.pump() or self.target.size == before:
                break
        if self.rest:
            self.target.write(self.stream, self.rest, "F")
            self.rest = b""


class Container:
    """One attempt at a container: its process, log and, in the end, its exit."""

    def __init__(self, name: str, attempt: int, note: Record) -> None:
        self.record: Record = {
            "name": name,
            "attempt": attempt,
            "note": note,
            "started": 0,
            "finished": 0,
            "code": None,
            "signal": 0,
            "namespace": "",
        }
        self.pid = 0
        self.namespace = ""
        self.pipes: list[Pipe] = []
        self.log: LogFile | None = None
        self.stdin = -1

    @property
    def running(self) -> bool:
        """Whether its program runs."""
        return self.pid > 0


class Connection:
    """A controller: the node agent, normally one."""

    def __init__(self, sock: _socket.socket) -> None:
        self.sock = sock
        self.gone = False

    def send(self, message: Record, descriptors: list[int] | None = None) -> None:
        """Send one message; a reader that is gone or does not read is dropped by the loop."""
        ancillary = []
        if descriptors:
            packed = b"".join(d.to_bytes(4, sys.byteorder) for d in descriptors)
            ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)]
        try:
            self.sock.sendmsg([marshal.dumps(message)], ancillary)
        except OSError as error:
            log("controller does not read", error)  # it connects anew and is told everything
            self.gone = True

    def receive(self) -> tuple[Record, list[int]] | None:
        """The next message with its descriptors, or None at the end."""
        size = self.sock.recv_into(bytearray(1), 1, _socket.MSG_PEEK | _socket.MSG_TRUNC)
        if not size:
            return None
        raw, ancillary, _, _ = self.sock.recvmsg(size, _socket.CMSG_SPACE(16))
        descriptors = [
            int.from_bytes(packed[at : at + 4], sys.byteorder)
            for _, kind, packed in ancillary
            if kind == _socket.SCM_RIGHTS
            for at in range(0, len(packed) - 3, 4)
        ]
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        request: Record = marshal.loads(raw)
        return request, descriptors


class Sandbox:
    """The loop: controllers, children and their output, in one thread."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.poll = select.epoll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self.connections: dict[int, Connection] = {}
        self.containers: dict[str, list[Container]] = {}
        self.execs: dict[int, tuple[int, str]] = {}
        self.starting: dict[int, int | None] = {}  # wait statuses of children not yet reported
        self.proc = self._own_proc()
        path = folder + "/sandbox.sock"
        self.listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        previous = os.umask(0o177)
        self.listener.bind(path + ".new")
        os.umask(previous)
        self.listener.listen(8)
        os.rename(path + ".new", path)
        self.watch(self.listener.fileno(), self._accept)
        wake, self._wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self._wake, False)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        _signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self.watch(wake, lambda: self._reap(wake))

    def _own_proc(self) -> int:
        """A descriptor of a /proc of our own PID namespace that is mounted nowhere."""
        place = self.folder + "/proc"
        os.makedirs(place, exist_ok=True)
        mount("proc", place, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        unmount(place)
        os.rmdir(place)
        return descriptor

    def watch(self, descriptor: int, handler: Callable[[], None]) -> None:
        """Call the handler whenever the descriptor can be read."""
        self.handlers[descriptor] = handler
        self.poll.register(descriptor, select.EPOLLIN)

    def forget(self, descriptor: int) -> None:
        """No longer watch a descriptor, and close it."""
        if self.handlers.pop(descriptor, None):
            self.poll.unregister(descriptor)
        os.close(descriptor)

    def run(self) -> None:
        """Serve for ever; `stop` ends the process."""
        while True:
            for descriptor, _ in self.poll.poll():
                handler = self.handlers.get(descriptor)
                if handler:
                    handler()
            for descriptor in [d for d, c in self.connections.items() if c.gone]:
                self._drop(descriptor)

    def _accept(self) -> None:
        descriptor, _ = self.listener._accept()  # type: ignore[attr-defined]
        os.set_blocking(descriptor, False)
        connection = Connection(_socket.socket(fileno=descriptor))
        self.connections[descriptor] = connection
        self.watch(descriptor, lambda: self._serve(descriptor))
        records = [c.record for attempts in self.containers.values() for c in attempts]
        connection.send({"event": "containers", "containers": records})

    def _drop(self, descriptor: int) -> None:
        self.forget(self.connections.pop(descriptor).sock.detach())

    def _serve(self, descriptor: int) -> None:
        connection = self.connections[descriptor]
        try:
            received = connection.receive()
        except BlockingIOError:
            return
        except OSError:
            received = None
        if received is None:
            self._drop(descriptor)
            return
        request, descriptors = received
        try:
            self._obey(connection, request, descriptors)
        except Exception as error:
            connection.send({"id": request["id"], "error": str(error), "reason": "SandboxError"})
        finally:
            for each in descriptors:
                os.close(each)

    def _obey(self, connection: Connection, request: Record, descriptors: list[int]) -> None:
        operation, number = request["op"], request["id"]
        if operation == "start":
            self._start(connection, request)
            return
        if operation == "exec":
            self._exec(connection, request, descriptors)
            return
        if operation == "socket":
            made = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
            connection.send({"id": number}, [made.fileno()])
            made.close()
            return
        if operation == "stop":
            connection.send({"id": number})
            os._exit(0)  # the kernel ends every process of the namespace with its pid 1
        container = self._running(request["name"])
        if operation == "pty":
            pair = self._terminal(container)
            connection.send({"id": number}, pair)
            for each in pair:
                os.close(each)
            return
        if operation == "signal":
            os.kill(container.pid, request["signal"])
        elif operation == "kill":
            self._kill_all(container)
        elif operation == "stdin":
            connection.send({"id": number}, [container.stdin] if container.stdin >= 0 else None)
            return
        connection.send({"id": number})

    def _running(self, name: str) -> Container:
        attempts = self.containers.get(name)
        if not attempts or not attempts[-1].running:
            raise ProcessLookupError(f"container {name} is not running")
        return attempts[-1]

    def _terminal(self, container: Container) -> list[int]:
        """Both ends of a new terminal of the container's own devpts."""
        path = f"{container.pid}/root/dev/pts/ptmx"
        leader = os.open(path, os.O_RDWR | os.O_NOCTTY, dir_fd=self.proc)
        try:
            fcntl.ioctl(leader, TIOCSPTLCK, bytes(4))
            follower = fcntl.ioctl(leader, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            os.close(leader)
            raise
        return [leader, follower]

    def _fork(
        self,
        spec: Record,
        descriptors: list[int],
        enter: Callable[[], None],
        done: Callable[[int, Record], None],
    ) -> None:
        """Start a child; `done(pid, result)` is called once its program runs or could not."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            run_program(spec, descriptors, write, enter)
        os.close(write)
        said = b""

        def finished() -> None:
            nonlocal said
            part = os.read(read, CHUNK)
            said += part
            if part:
                return
            self.forget(read)
            result = heard(said)
            if not result:
                result = {
                    "error": "the container's first process ended early",
                    "reason": "CreateContainerError",
                }
            status = self.starting.pop(pid)
            done(pid, result)
            if status is not None:  # it ended before its report was read
                self._ended(pid, status)

        self.starting[pid] = None
        self.watch(read, finished)

    def _start(self, connection: Connection, request: Record) -> None:
        name, spec = request["name"], request["spec"]
        attempts = self.containers.setdefault(name, [])
        if attempts and attempts[-1].running:
            raise ValueError(f"container {name} is already running")
        container = Container(name, request["attempt"], request["note"])
        container.log = LogFile(spec["log"])
        output, errors = os.pipe(), os.pipe()
        container.pipes = [
            Pipe(output[0], "stdout", container.log),
            Pipe(errors[0], "stderr", container.log),
        ]
        stdin = os.open("/dev/null", os.O_RDONLY)
        if spec["stdin"]:
            os.close(stdin)
            stdin, container.stdin = os.pipe()

        def done(pid: int, result: Record) -> None:
            for pipe in container.pipes:
                self.watch(pipe.descriptor, lambda p=pipe: self._pump(p))  # type: ignore[misc]
            if "error" in result:
                self._close(container)
                connection.send({"id": request["id"], **result})
                return
            container.pid, container.namespace = pid, result["namespace"]
            container.record.update(started=time.time_ns(), namespace=container.namespace)
            attempts.append(container)
            del attempts[:-2]
            told = {"started": container.record["started"], "namespace": container.namespace}
            connection.send({"id": request["id"], **told})

        self._fork(spec, [stdin, output[1], errors[1]], lambda: enter_root(spec), done)
        for descriptor in (stdin, output[1], errors[1]):
            os.close(descriptor)

    def _exec(self, connection: Connection, request: Record, descriptors: list[int]) -> None:
        container = self._running(request["name"])
        namespace = os.open(f"{container.pid}/ns/mnt", os.O_RDONLY, dir_fd=self.proc)

        def enter() -> None:
            checked(libc.setns(namespace, CLONE_NEWNS), "setns")

        def done(pid: int, result: Record) -> None:
            os.close(namespace)
            if "error" in result:
                connection.send({"id": request["id"], **result})
                return
            connection.send({"id": request["id"]})
            self.execs[pid] = (connection.sock.fileno(), request["exec"])

        self._fork(request["spec"], descriptors, enter, done)

    def _pump(self, pipe: Pipe) -> None:
        if not pipe.pump():
            self.poll.unregister(pipe.descriptor)
            self.handlers.pop(pipe.descriptor, None)

    def _reap(self, wake: int) -> None:
        try:
            os.read(wake, 4096)
        except BlockingIOError:
            return
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.starting:
                self.starting[pid] = status
            else:
                self._ended(pid, status)

    def _ended(self, pid: int, status: int) -> None:
        owner = next((a[-1] for a in self.containers.values() if a and a[-1].pid == pid), None)
        if owner:
            self._exited(owner, status)
        elif pid in self.execs:
            self._exec_ended(pid, status)
        # else an orphan of a container, which nobody asks about

    def _exited(self, container: Container, status: int) -> None:
        record = container.record
        self._kill_all(container)
        container.pid = 0
        code = os.waitstatus_to_exitcode(status)
        record.update(
            finished=time.time_ns(), code=128 - code if code < 0 else code, signal=-code if code < 0 else 0
        )
        self._close(container)
        for connection in list(self.connections.values()):
            connection.send({"event": "exited", **record})

    def _exec_ended(self, pid: int, status: int) -> None:
        descriptor, name = self.execs.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if connection := self.connections.get(descriptor):
            connection.send({"event": "exec-exited", "exec": name, "code": 128 - code if code < 0 else code})

    def _close(self, container: Container) -> None:
        for pipe in container.pipes:
            pipe.drain()
            self.forget(pipe.descriptor)
        if container.stdin >= 0:
            os.close(container.stdin)
            container.stdin = -1
        if container.log:
            container.log.close()
        container.pipes = []

    def _kill_all(self, container: Container) -> None:
        """SIGKILL to every process in the container's mount namespace, until there is none."""
        for _ in range(100):
            found = False
            for entry in os.listdir(self.proc):
                if not entry.isdigit() or entry == "1":
                    continue
                try:
                    if os.readlink(f"{entry}/ns/mnt", dir_fd=self.proc) != container.namespace:
                        continue
                    os.kill(int(entry), _signal.SIGKILL)
                    found = True
                except OSError:
                    continue
            if not found:
                return
            time.sleep(0.001)
        log("processes of a container do not end", container.record["name"])


def become_pid_1(folder: str, hostname: str, announce: int) -> None:
    """The life of a pod's pid 1; tells its pid, as the machine sees it, once it listens."""
    os.setsid()
    own_pid = os.readlink("/proc/self")
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if hostname:
        _socket.sethostname(hostname)
    sandbox = Sandbox(folder)
    os.write(announce, own_pid.encode())
    os.close(announce)
    sandbox.run()


def bring_up(folder: str, hostname: str, netns: str, report: int) -> None:
    """Enter a pod's namespaces and fork its pid 1 there; never returns."""
    try:
        if netns:
            descriptor = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            checked(libc.setns(descriptor, CLONE_NEWNET), "setns")
            os.close(descriptor)
        # A pod of the node's own network has the machine's host name too.
        own = CLONE_NEWIPC | CLONE_NEWPID | (CLONE_NEWUTS if netns else 0)
        checked(libc.unshare(own), "unshare")
        ready, announce = os.pipe()
        if os.fork():
            os.close(announce)
            os.write(report, os.read(ready, 64))
            os._exit(0)
        os.close(ready)
        os.close(report)
        become_pid_1(folder, hostname if netns else "", announce)
    except BaseException as error:
        log("pid 1 of a pod cannot be made", error)
    os._exit(1)


def nursery() -> None:
    """Fork pid 1s on request, for as long as the node agent keeps its end of the socket at descriptor 0.

    A request is a marshalled (folder, host name, path of the network namespace or "") with a pipe to report
    to. A process that has everything in memory makes a pid 1 in a few milliseconds, and all share that memory.
    """
    sock = _socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)
    os.close(null)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)
    gc.freeze()
    while True:
        raw, ancillary, _, _ = sock.recvmsg(65536, _socket.CMSG_SPACE(4))
        if not raw:
            os._exit(0)
        report = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
        if os.fork() == 0:
            os.close(sock.detach())
            folder, hostname, netns = marshal.loads(raw)
            bring_up(folder, hostname, netns, report)
        os.close(report)
