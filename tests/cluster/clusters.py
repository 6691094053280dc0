"""Real embedded clusters as tests drive them: the command line, the real kubectl, and objects to give it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MESHLIGHT = Path(sys.executable).parent / "meshlight"
LIFELINE, _HELD = os.pipe()
"""Clusters of the tests end when this process does, however it ends: nobody else has the writing end."""


def wait_until(condition: Callable[[], Any], timeout: float = 60, what: str = "") -> Any:
    """Poll `condition` until it is truthy and return it; fail with `what` after `timeout` s."""
    deadline = time.monotonic() + timeout
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"timed out after {timeout:g} s: {what or condition}")
        time.sleep(0.1)


@dataclass
class Cluster:
    """A booted cluster: its home, name, and real kubectl against it."""

    name: str
    home: Path
    prefix: tuple[str, ...] = ()
    """Command that runs the command line as another user."""

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "MESHLIGHT_HOME": str(self.home),
            "KUBECONFIG": str(self.state / "kubeconfig"),
            "HOME": str(self.home),  # kubectl's discovery cache
            "NO_COLOR": "1",
        }

    @property
    def state(self) -> Path:
        return self.home / "clusters" / self.name

    @property
    def supervisor_pid(self) -> int:
        return int(json.loads((self.state / "cluster.json").read_text())["supervisor_pid"])

    def meshlight(self, *arguments: str, check: bool = True, timeout: float = 120) -> str:
        """Run the command line; returns stdout. With check=False, stderr is appended."""
        if arguments[0] == "up":
            arguments = (*arguments, "--lifeline", str(LIFELINE))
        done = subprocess.run(
            [*self.prefix, str(MESHLIGHT), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            pass_fds=[LIFELINE],
        )
        if check:
            assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
            return done.stdout
        return done.stdout + done.stderr

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 90
    ) -> str:
        """Run the real kubectl; returns stdout. With check=False, stderr is appended."""
        done = subprocess.run(
            ["kubectl", *arguments],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check:
            assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
            return done.stdout
        return done.stdout + done.stderr

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get … -o json`, decoded."""
        answer: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return answer

    def apply(self, *objects: dict[str, Any]) -> None:
        """`kubectl apply -f -` of the objects."""
        self.kubectl("apply", "-f", "-", stdin="\n".join(json.dumps(o) for o in objects))

    def inside(self, *command: str, netns: str | None = None) -> list[str]:
        """The command line that runs `command` inside the cluster (in a node's or pod's netns)."""
        enter = [
            "nsenter",
            "-t",
            str(self.supervisor_pid),
            "-m",
            "-n",
            "-U",
            "--preserve-credentials",
        ]
        if os.geteuid() == 0:
            enter = ["nsenter", "-t", str(self.supervisor_pid), "-m", "-n"]
        if netns:
            enter += ["nsenter", f"--net=/run/netns/{netns}"]
        return [*enter, *command]


def pod(name: str, namespace: str, command: list[str], **spec: Any) -> dict[str, Any]:
    """A one-container pod that runs a program of this machine."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": "local/program", "command": command}],
            **spec,
        },
    }


def service(name: str, namespace: str, port: int) -> dict[str, Any]:
    """A ClusterIP Service in front of `app: NAME`."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"app": name}, "ports": [{"port": port, "targetPort": port}]},
    }
