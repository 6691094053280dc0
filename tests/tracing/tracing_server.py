"""A tracing server as a process of its own, on ports of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from meshlight.tracing.settings import PORTS


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all distinct."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Answer:
    """Status, headers and body of an HTTP answer."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Server:
    """`python -m meshlight.tracing` on loopback."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.arguments = arguments
        self.ports: dict[str, int] = {}
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Start and wait until it is ready; a later start takes the same ports."""
        if not self.ports:
            self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        ports = [f"--port={name}={port}" for name, port in self.ports.items()]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "meshlight.tracing", "--host", "127.0.0.1", *ports, *self.arguments],
                stderr=log,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.log.read_text()}")
            try:
                if self.get("admin", "/").status == 200:
                    return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.02)
        raise AssertionError(f"the server is not ready: {self.log.read_text()}")

    def kill(self) -> None:
        """As a machine that loses power would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """As Kubernetes ends a pod; returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)

    def url(self, port: str, path: str = "") -> str:
        """A URL on one of its ports."""
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    def get(self, port: str, path: str, method: str = "GET", **headers: str) -> Answer:
        """An answer, whatever its status."""
        return self._open(urllib.request.Request(self.url(port, path), method=method, headers=headers))

    def post(self, port: str, path: str, body: bytes, **headers: str) -> Answer:
        """An answer to a body; header names with `_` for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self._open(urllib.request.Request(self.url(port, path), data=body, headers=named))

    @staticmethod
    def _open(request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())
