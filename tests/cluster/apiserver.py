"""A real API server process alone, without nodes: for what needs nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from meshlight.embedded import pki


@dataclass
class ApiServer:
    """One API server on a loopback port; `kubectl` is the real one."""

    state: Path
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0), backlog=512))
    process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), "HOME": str(self.state), "NO_COLOR": "1"}

    def start(self) -> None:
        """Start, and wait until it answers; a connection waits in the socket's queue until then."""
        pki.ensure(self.state, "cluster-101", ["cluster-101-node-1"], self.port)
        descriptor = self.listener.fileno()
        command = [sys.executable, "-m", "meshlight.kube.server", "--state", str(self.state)]
        with (self.state / "apiserver.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--listen-fd", str(descriptor)], pass_fds=[descriptor], stderr=log
            )
        deadline = time.monotonic() + 60
        while self.kubectl("get", "--raw", "/readyz", check=False).strip() != "ok":
            assert self.process.poll() is None, (self.state / "apiserver.log").read_text()
            assert time.monotonic() < deadline, "the API server does not answer"

    def kill(self) -> None:
        """End it as a crash does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it in order."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)
        self.listener.close()

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run the real kubectl; returns stdout. With check=False, stderr is appended."""
        done = subprocess.run(
            ["kubectl", *arguments],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=90,
        )
        if check:
            assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
            return done.stdout
        return done.stdout + done.stderr
