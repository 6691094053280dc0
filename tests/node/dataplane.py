"""The real node proxies under the lab's pods: one on each of two nodes, the mesh as a file they follow.

The part of a node agent is played here: a pod is announced over the agent's socket with a descriptor
of its namespace, and redirected once the proxy has answered.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import Node, Pod, wait_until

from meshlight.node import redirection
from meshlight.proto import zds_pb2

BINARY = Path(sys.executable).parent / "meshlight-ztunnel"
STRICT = {
    "name": "strict",
    "namespace": "istio-system",
    "scope": "global",
    "deny": True,
    "rules": [[[{"notPrincipals": ["*"]}]]],
}


class Agent:
    """A node agent's socket: tells every proxy that connects of all pods, and the newest of new ones."""

    def __init__(self, path: Path) -> None:
        self.pods: dict[str, tuple[Pod, str]] = {}
        self.lock = threading.Lock()
        self.peer: socket.socket | None = None
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen(4)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            peer, _ = self.listener.accept()
            zds_pb2.ZdsHello.FromString(peer.recv(65536))
            with self.lock:
                for pod, account in self.pods.values():
                    self._tell(peer, _add(pod, account), pod)
                snapshot = zds_pb2.WorkloadRequest()
                snapshot.snapshot_sent.SetInParent()
                self._tell(peer, snapshot, None)
                self.peer = peer

    @staticmethod
    def _tell(peer: socket.socket, request: Any, pod: Pod | None) -> None:
        descriptors = [os.open(pod.path, os.O_RDONLY)] if pod else []
        try:
            socket.send_fds(peer, [request.SerializeToString()], descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        answer = zds_pb2.WorkloadResponse.FromString(peer.recv(65536))
        assert not answer.ack.error, answer.ack.error

    def add(self, pod: Pod, account: str) -> None:
        with self.lock:
            self.pods[pod.uid] = (pod, account)
            if self.peer:
                self._tell(self.peer, _add(pod, account), pod)

    def remove(self, pod: Pod) -> None:
        with self.lock:
            del self.pods[pod.uid]
            request = zds_pb2.WorkloadRequest()
            getattr(request, "del").uid = pod.uid
            if self.peer:
                self._tell(self.peer, request, None)


def _add(pod: Pod, account: str) -> Any:
    request = zds_pb2.WorkloadRequest()
    request.add.uid = pod.uid
    request.add.workload_info.name = pod.uid
    request.add.workload_info.namespace = "shop"
    request.add.workload_info.service_account = account
    return request


@dataclass
class Ztunnel:
    """One running node proxy."""

    node: Node
    process: subprocess.Popen[bytes]
    log: Path
    ports: dict[str, int]

    def get(self, port: str, path: str, method: str = "GET") -> str:
        """What an HTTP port of the proxy answers; `port` is ADMIN, METRICS or READINESS."""
        url = f"http://127.0.0.1:{self.ports[port]}{path}"
        request = urllib.request.Request(url, method=method)
        return self.node.inside(lambda: urllib.request.urlopen(request, timeout=10).read().decode())

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            return "ready" in self.get("READINESS", "/healthz/ready")
        except OSError:
            return False

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that carry these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        total = 0.0
        for line in self.get("METRICS", "/metrics").splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(label in series for label in wanted):
                total += float(value)
        return total

    def access(self) -> list[dict[str, Any]]:
        """Access-log entries so far."""
        entries = []
        for line in self.log.read_text().splitlines():
            if line.startswith("{"):
                entry = json.loads(line)
                if entry.get("scope") == "access":
                    entries.append(entry)
        return entries

    def rss(self) -> int:
        """Resident bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Mesh:
    """Two nodes, their proxies, and what these are told of the mesh."""

    environment: dict[str, str] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=lambda: [Node(1), Node(2)])

    def __post_init__(self) -> None:
        self.folder = Path("/run/mesh")
        self.folder.mkdir()
        self.file = self.folder / "mesh.json"
        self.workloads: dict[str, dict[str, Any]] = {}
        self.services: list[dict[str, Any]] = []
        self.policies: list[dict[str, Any]] = []
        self.publish()
        self.agents = [Agent(self.folder / f"{node.name}.sock") for node in self.nodes]
        self.started = 0
        self.generation = 0
        self.proxies = [self.start(index) for index in range(len(self.nodes))]

    def start(self, index: int, **environment: str) -> Ztunnel:
        """Start a proxy on a node and wait until it is ready; beside one that runs already."""
        self.started += 1
        node = self.nodes[index]
        ports = {"ADMIN": 15000, "METRICS": 15020, "READINESS": 15021}
        if self.started > len(self.nodes):
            ports = {name: port + 1000 * self.started for name, port in ports.items()}
        log = self.folder / f"{node.name}-{self.started}.log"
        variables = {
            "PATH": os.environ["PATH"],
            "LOCAL_XDS_PATH": str(self.file),
            "FAKE_CA": "true",
            "FAKE_CA_ROOT": str(self.folder),
            "INPOD_UDS": str(self.folder / f"{node.name}.sock"),
            "NODE_NAME": node.name,
            "RUST_LOG": "info",
            "LOG_FORMAT": "json",
            **{f"{name}_PORT": str(port) for name, port in ports.items()},
            **self.environment,
            **environment,
        }
        process = node.inside(
            lambda: subprocess.Popen([BINARY], env=variables, stdout=log.open("wb"), stderr=subprocess.STDOUT)
        )
        proxy = Ztunnel(node, process, log, ports)
        wait_until(proxy.ready, f"the proxy of {node.name} to be ready", 30)
        return proxy

    def pod(self, index: int, name: str, *, account: str = "default", mesh: bool = True, **more: Any) -> Pod:
        """A pod on a node; enrolled unless `mesh` is false. `more` are fields of its workload."""
        node = self.nodes[index]
        pod = node.pod(name)
        self.workloads[name] = {
            "uid": f"Kubernetes//Pod/shop/{name}",
            "name": name,
            "namespace": "shop",
            "addresses": [pod.address],
            "hbone": mesh,
            "serviceAccount": account,
            "workloadName": name,
            "canonicalName": name,
            "node": node.name,
            **more,
        }
        self.publish()
        if mesh:
            self.agents[index].add(pod, account)
            redirection.apply(pod.path)
        return pod

    def publish(self) -> None:
        """Write the mesh file; the proxies read it within a fraction of a second."""
        mesh = {
            "workloads": list(self.workloads.values()),
            "services": self.services,
            "policies": self.policies,
        }
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(mesh))
        new.rename(self.file)

    def settle(self) -> None:
        """Publish, and wait until every proxy that lives has taken it in."""
        self.generation += 1
        mark = f"generation/{self.generation}"
        self.workloads["generation"] = {"uid": mark, "name": "generation", "namespace": "lab"}
        self.publish()
        for proxy in self.proxies:
            if proxy.process.poll() is None:
                wait_until(
                    lambda proxy=proxy: f'"{mark}"' in proxy.get("ADMIN", "/config_dump"),  # type: ignore[misc]
                    "the proxies to take the mesh in",
                )
