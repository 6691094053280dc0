"""Pid 1 of an embedded cluster: makes its fabric, starts its parts, restarts them, reaps orphans.

Runs in PID, mount, network, UTS and IPC namespaces of its own, so that its end is the end of
everything in the cluster. It knows how parts are started, and nothing of what they do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from meshlight.embedded import control, machines
from meshlight.embedded.control import ControlError
from meshlight.embedded.layout import Layout
from meshlight.node import addresses, cgroups
from meshlight.uplink.name_service import NODE_FILE, node_file

FABRIC_ADDRESS = "172.20.0.1"
FABRIC_PREFIX = 24
API_PORT = 6443
RUN = Path("/run/meshlight")
STOP_GRACE = 8.0
"""Seconds that parts have to stop in order before they are killed."""
API_REFUSALS = 3
"""Refusals to start after which the API server, and with it the cluster, is given up."""
REAP_GRACE = 3.0
"""Seconds in which killed processes and their cgroups are gone."""


def log(message: str, **fields: object) -> None:
    """One JSON event a line on stderr, which is `logs/supervisor.log`."""
    record = {"ts": time.time(), "level": "info", "msg": message, **fields}
    print(json.dumps(record), file=sys.stderr, flush=True)


@dataclass(slots=True)
class Part:
    """A supervised process: its command, and when and how often it was started."""

    name: str
    command: list[str]
    pass_fds: tuple[int, ...] = ()
    pid: int = 0
    started: float = 0.0
    failures: int = 0
    refusals: int = 0
    """Ends in a row by its own decision (not a signal) soon after a start."""
    held: bool = False
    """Whether it is not to run for now."""

    def restart_delay(self, now: float) -> float:
        """Seconds until the next start: at once after a long life, doubling to 10 s otherwise."""
        if now - self.started > 30:
            self.failures = 0
        self.failures += 1
        return 0.0 if self.failures == 1 else min(0.1 * 2 ** (self.failures - 1), 10.0)


def prepare_namespaces(name: str, boot_id: str, isolated: bool) -> None:
    """Mounts, loopback and the fabric bridge, all inside the namespaces we were born into."""
    # Read before /run is covered: the machine's file is often a link into it.
    resolvers = Path("/etc/resolv.conf").read_text() if Path("/etc/resolv.conf").exists() else ""
    for command in (
        ["mount", "-t", "proc", "proc", "/proc"],
        ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"],
        ["ip", "link", "set", "lo", "up"],
        ["ip", "link", "add", "fabric0", "type", "bridge"],
        ["ip", "address", "add", f"{FABRIC_ADDRESS}/{FABRIC_PREFIX}", "dev", "fabric0"],
        ["ip", "link", "set", "fabric0", "up"],
    ):
        subprocess.run(command, check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    if addresses.has_ipv6():
        for setting in ("all/forwarding", "fabric0/forwarding"):
            Path("/proc/sys/net/ipv6/conf", setting).write_text("1")
        own = f"{addresses.FABRIC_GATEWAY}/64"
        subprocess.run(["ip", "address", "add", own, "dev", "fabric0", "nodad"], check=True)
    for folder in (Path("/run/netns"), RUN / "nodes", RUN / "exits"):
        folder.mkdir(parents=True)
    (RUN / "boot_id").write_text(boot_id)
    NODE_FILE.write_text(node_file(resolvers, FABRIC_ADDRESS, isolated=isolated))
    subprocess.run(["hostname", name], check=False, stderr=subprocess.DEVNULL)


class Supervisor:
    """Keeps the parts running until SIGTERM, or until the lifeline, a descriptor, is closed elsewhere."""

    def __init__(
        self, layout: Layout, listen_fd: int, nodes: list[str], lifeline: int = -1, *, isolated: bool = False
    ) -> None:
        self.layout, self.lifeline = layout, lifeline
        self.stopping = asyncio.Event()
        self.hopeless = False
        self.ended = asyncio.Event()
        state = layout.state
        credentials = str(state / "pki" / "controllers.kubeconfig")

        def module(name: str, *arguments: str) -> list[str]:
            return [sys.executable, "-m", name, *arguments]

        serving = ["--listen-fd", str(listen_fd), "--fabric", f"{FABRIC_ADDRESS}:{API_PORT}"]
        self.api = Part(
            "apiserver", module("meshlight.kube.server", "--state", str(state), *serving), (listen_fd,)
        )
        disk = ["--disk", str(state / "volumes")]
        controllers = Part("controllers", module("meshlight.controllers", "--kubeconfig", credentials, *disk))
        install = ("--kubeconfig", credentials, "--cluster", layout.name, "--nodes", str(len(nodes)))
        installer = Part("install", module("meshlight.embedded.install", *install))
        agents = [
            Part(
                f"node-{name}",
                module(
                    "meshlight.node",
                    *("--name", name, "--index", str(index)),
                    *("--kubeconfig", str(state / "pki" / f"node-{name}.kubeconfig"), "--state", str(state)),
                ),
            )
            for index, name in enumerate(nodes, start=1)
        ]
        self.nodes = {
            name: (index, part) for index, (name, part) in enumerate(zip(nodes, agents, strict=True), 1)
        }
        way_out = ["--isolated"] if isolated else []
        uplink = Part(
            "uplink",
            module("meshlight.uplink", "--kubeconfig", credentials, "--state", str(state), *way_out),
        )
        self.once = {installer.name}
        self.parts = [controllers, installer, uplink, *agents]
        self.by_pid: dict[int, Part] = {}

    async def run(self) -> None:
        """Start everything, supervise, and stop in order at SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        if self.lifeline >= 0:
            loop.add_reader(self.lifeline, self._lifeline_closed)
        self._start(self.api)
        # The parts wait for the API by themselves: their clients reconnect.
        for part in self.parts:
            self._start(part)
        server = await control.serve(self.layout.state, self._obey)
        await self.stopping.wait()
        server.close()
        (self.layout.state / control.SOCKET).unlink(missing_ok=True)
        await self._stop()

    async def _obey(self, request: control.Message) -> control.Message:
        """Do what the command line asks for. Raises ControlError, KeyError."""
        if request["do"] == "nodes":
            return {"nodes": {name: self._node_state(name) for name in self.nodes}}
        name = str(request["node"])
        if name not in self.nodes:
            raise ControlError(f"the cluster has no node {name}; its nodes are {', '.join(self.nodes)}")
        index, part = self.nodes[name]
        match request["do"]:
            case "stop":
                part.held = True
                if part.pid:
                    os.kill(part.pid, signal.SIGKILL)
                while part.pid:
                    self.ended.clear()
                    await self.ended.wait()
                await asyncio.to_thread(machines.power_off, name, index, self.layout.state)
            case "start":
                part.held = False
                self._start(part)
            case "partition":
                machines.cut(name, index)
            case "heal":
                machines.mend(name, index)
            case unknown:
                raise ControlError(f"{unknown} is nothing that can be done with a node")
        log("node", node=name, done=request["do"])
        return {"state": self._node_state(name)}

    def _node_state(self, name: str) -> str:
        if self.nodes[name][1].held:
            return "stopped"
        return "partitioned" if machines.is_cut(name) else "running"

    def _lifeline_closed(self) -> None:
        """Whoever wanted the cluster is gone, however it ended."""
        asyncio.get_running_loop().remove_reader(self.lifeline)
        self.stopping.set()

    def _start(self, part: Part) -> None:
        if self.stopping.is_set() or part.held or part.pid:
            return
        with (self.layout.logs / f"{part.name}.log").open("ab") as output:
            process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=part.pass_fds,
                start_new_session=True,
            )
        part.pid, part.started = process.pid, time.monotonic()
        process.returncode = 0  # ours to reap, not subprocess's
        self.by_pid[part.pid] = part
        log("part started", part=part.name, pid=part.pid)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            part = self.by_pid.pop(pid, None)
            if part is None:
                # An orphan: a container of a node agent that died. The next agent reads its exit here.
                (RUN / "exits" / str(pid)).write_text(str(code))
                continue
            part.pid = 0
            self.ended.set()
            log("part ended", part=part.name, exit_code=code)
            if self.stopping.is_set() or (part.name in self.once and code == 0):
                continue
            refused = code > 0 and time.monotonic() - part.started < 10
            part.refusals = part.refusals + 1 if refused else 0
            delay = part.restart_delay(time.monotonic())
            if part is self.api and part.refusals >= API_REFUSALS:
                # Without the API nothing else can be, and what keeps it from starting will not go by itself.
                log("the API server does not start", exit_code=code)
                self.hopeless = True
                self.stopping.set()
                return
            asyncio.get_running_loop().call_later(delay, self._start, part)

    async def _stop(self) -> None:
        """Readers first, the API last; the kernel ends what is left after the grace."""
        log("stopping")
        for group in (self.parts, [self.api]):
            for part in group:
                if part.pid:
                    os.kill(part.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_GRACE):
                    while any(part.pid for part in group):
                        self.ended.clear()
                        await self.ended.wait()
        await self._clear()
        log("stopped")

    async def _clear(self) -> None:
        """End every process that is left, pods above all, so that their cgroups can go too."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        deadline = time.monotonic() + REAP_GRACE
        while left := cgroups.clear(self.layout.state):
            if time.monotonic() > deadline:
                log("cgroups are still in use", folders=[str(folder) for folder in left])
                return
            await asyncio.sleep(0.01)


def main() -> None:
    """Entry point of `python -m meshlight.embedded.supervisor`."""
    parser = argparse.ArgumentParser(description="pid 1 of an embedded cluster")
    parser.add_argument("--name", required=True)
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--listen-fd", required=True, type=int)
    parser.add_argument("--nodes", required=True, type=int)
    parser.add_argument("--boot-id", required=True)
    parser.add_argument("--isolated", action="store_true", help="pods reach nothing outside the cluster")
    parser.add_argument("--lifeline", type=int, default=-1, help="descriptor whose end ends the cluster")
    arguments = parser.parse_args()
    os.environ["MESHLIGHT_HOME"] = str(arguments.state.parent.parent)
    prepare_namespaces(arguments.name, arguments.boot_id, arguments.isolated)
    layout = Layout(arguments.name)
    names = layout.node_names(arguments.nodes)
    supervisor = Supervisor(layout, arguments.listen_fd, names, arguments.lifeline, isolated=arguments.isolated)
    asyncio.run(supervisor.run())
    sys.exit(supervisor.hopeless)


if __name__ == "__main__":
    main()
