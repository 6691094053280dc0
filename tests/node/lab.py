"""A fabric, nodes and pods in namespaces of a test's own, which end with the test.

`run(scenario)` starts `python lab.py SCENARIO` as pid 1 of fresh namespaces: whatever happens to it,
the kernel takes processes, links and mounts away. A scenario is a function of `scenarios.py`, or
`module:function` of this folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from meshlight.node import addresses, netns, network

T = TypeVar("T")
SO_ORIGINAL_DST, SO_MARK, IP_TRANSPARENT = 80, 36, 19


def run(scenario: str) -> None:
    """Run a scenario of this folder in namespaces of its own; fails with what it wrote."""
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    command += [sys.executable, __file__, scenario]
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, f"{scenario}:\n{done.stdout}\n{done.stderr}"


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 10) -> Any:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.005)
    return value


class Pod:
    """A pod's namespace: sockets made here stay in it."""

    def __init__(self, uid: str, address: str) -> None:
        self.uid, self.address = uid, address
        self.path = netns.NETNS / uid

    def inside(self, function: Callable[[], T]) -> T:
        return netns.inside(self.path, function)

    def connect(self, address: str, port: int, *, source: int = 0, timeout: float = 3) -> socket.socket:
        """A TCP connection from the pod."""
        bind = ("", source) if source else None
        return self.inside(lambda: socket.create_connection((address, port), timeout, bind))

    def ask(self, address: str, port: int) -> str:
        """Connect, and read what the answering side says of itself."""
        with self.connect(address, port) as stream:
            return read(stream)

    def serve(self, port: int, *, name: str = "", kind: int = socket.SOCK_STREAM) -> Server:
        """A server that tells its name and its client's address, then echoes lines."""
        return self.inside(lambda: Server(port, name or self.uid, kind))


def read(stream: socket.socket) -> str:
    """One line."""
    line = b""
    while not line.endswith(b"\n"):
        piece = stream.recv(1)
        if not piece:
            raise ConnectionError(f"closed after {line!r}")
        line += piece
    return line.decode().strip()


def echo(stream: socket.socket, text: str) -> None:
    """The connection still works: a line goes there and back."""
    stream.sendall(text.encode() + b"\n")
    assert read(stream) == text


def alive(stream: socket.socket, text: str = "still here") -> bool:
    """Whether `echo` would succeed."""
    try:
        echo(stream, text)
    except OSError:
        return False
    return True


def refused(pod: Pod, address: str, port: int) -> bool:
    """Whether a connection of the pod is refused or reset, and not merely closed."""
    try:
        answer = pod.ask(address, port)
    except ConnectionError as error:
        return "closed after" not in str(error)
    raise AssertionError(f"answered {answer!r}")


class Server:
    """Says `NAME CLIENT-ADDRESS` to each client, then echoes; UDP answers each datagram so."""

    def __init__(self, port: int, name: str, kind: int) -> None:
        self.name = name
        self.socket = socket.socket(socket.AF_INET, kind)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("", port))
        if kind == socket.SOCK_STREAM:
            self.socket.listen(128)
        threading.Thread(
            target=self._stream if kind == socket.SOCK_STREAM else self._datagrams, daemon=True
        ).start()

    def _stream(self) -> None:
        while True:
            try:
                stream, (client, _) = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(stream, client), daemon=True).start()

    def _talk(self, stream: socket.socket, client: str) -> None:
        with contextlib.suppress(OSError), stream:
            stream.sendall(f"{self.name} {client}\n".encode())
            while data := stream.recv(4096):
                stream.sendall(data)

    def _datagrams(self) -> None:
        while True:
            _, client = self.socket.recvfrom(4096)
            self.socket.sendto(f"{self.name} {client[0]}".encode(), client)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Proxy:
    """ztunnel's place in a pod: takes what is redirected to 15001 and 15006, and passes it on.

    `seen` has `port client original-destination` of each connection. Inbound connections go to the
    workload from the client's own address, as ztunnel's do; every socket carries its mark.
    """

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self.seen: list[str] = []
        self.listeners = {
            port: pod.inside(lambda port=port: self._listen(port)) for port in (15001, 15006, 15008)
        }  # type: ignore[misc]
        for port, listener in self.listeners.items():
            threading.Thread(target=self._accept, args=(port, listener), daemon=True).start()

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # beside its successor's
        listener.bind(("", port))
        listener.listen(128)
        return listener

    def _accept(self, port: int, listener: socket.socket) -> None:
        while True:
            try:
                stream, client = listener.accept()
            except OSError:
                return
            raw = stream.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16) if port != 15008 else b""
            target = (socket.inet_ntoa(raw[4:8]), struct.unpack("!H", raw[2:4])[0]) if raw else ("-", 0)
            self.seen.append(f"{port} {client[0]} {target[0]}:{target[1]}")
            if port == 15008:
                stream.sendall(b"hbone\n")
                stream.close()
                continue
            source = client[0] if port == 15006 else ""
            try:
                upstream = self.pod.inside(lambda source=source, target=target: self._dial(source, target))  # type: ignore[misc]
            except OSError:
                stream.close()
                continue
            for a, b in ((stream, upstream), (upstream, stream)):
                threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    @staticmethod
    def _dial(source: str, target: tuple[str, int]) -> socket.socket:
        upstream = socket.socket()
        upstream.settimeout(3)
        upstream.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x539)
        if source:
            upstream.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            upstream.bind((source, 0))
        upstream.connect(target)
        upstream.settimeout(None)
        return upstream

    @staticmethod
    def _copy(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
        with contextlib.suppress(OSError):
            b.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Stop listening; what is carried goes on."""
        for listener in self.listeners.values():
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


class Node:
    """A node of the fabric and its pods."""

    def __init__(self, index: int) -> None:
        self.index, self.name = index, f"node-{index}"
        netns.inside(None, lambda: network.enter_node(self.name, index))
        self.path = netns.NETNS / self.name
        self.network = network.PodNetwork(index)

    def inside(self, function: Callable[[], T]) -> T:
        return netns.inside(self.path, function)

    def pod(self, uid: str, address: str | None = None) -> Pod:
        return Pod(uid, self.inside(lambda: asyncio.run(self.network.add(uid, address))))

    def remove(self, uid: str) -> None:
        self.inside(lambda: asyncio.run(self.network.remove(uid)))

    def sent(self) -> int:
        """Packets that left through the node's eth0."""
        out = self.inside(lambda: netns.run(["ip", "-s", "-j", "link", "show", "eth0"], ""))
        return int(json.loads(out)[0]["stats64"]["tx"]["packets"])


def fabric() -> None:
    """What the supervisor makes before nodes start."""
    for command in (
        "mount -t tmpfs -o mode=755 tmpfs /run",
        "ip link set lo up",
        "ip link add fabric0 type bridge",
        "ip address add 172.20.0.1/24 dev fabric0",
        "ip link set fabric0 up",
        f"ip address add {addresses.FABRIC_GATEWAY}/64 dev fabric0 nodad",
    ):
        subprocess.run(command.split(), check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    netns.NETNS.mkdir()


@contextlib.contextmanager
def load(connect: Callable[[], str]) -> Iterator[list[str]]:
    """Short connections one after the other for as long as the block lasts; yields the failures."""
    failures: list[str] = []
    stop = threading.Event()
    count = 0

    def body() -> None:
        nonlocal count
        while not stop.is_set():
            try:
                connect()
            except OSError as error:
                failures.append(repr(error))
            count += 1

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    wait_until(lambda: count > 3, "the load to begin")
    try:
        yield failures
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    fabric()
    module, _, name = sys.argv[1].rpartition(":")
    getattr(importlib.import_module(module or "scenarios"), name)()
    os._exit(0)
