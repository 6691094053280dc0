"""The loss table: how connections end, through two node proxies as without any.

Every case runs first between two pods outside of the mesh, then between two in it, on two nodes; what
both ends received, to the byte, and how each saw the connection end must be the same.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dataplane import Mesh
from lab import Pod

MIB = 1 << 20
BLOCK = hashlib.shake_256(b"payload").digest(MIB)


@dataclass(frozen=True)
class Heard:
    """What one end received and how its receiving ended (`fin` or `reset`)."""

    count: int
    digest: str
    end: str


Side = Callable[[socket.socket], Any]


def send(stream: socket.socket, count: int) -> str:
    """Send so many bytes; `ok`, or `reset` when the peer did not want them."""
    try:
        for _ in range(count // MIB):
            stream.sendall(BLOCK)
        stream.sendall(BLOCK[: count % MIB])
    except OSError as error:
        assert isinstance(error, (ConnectionError, BrokenPipeError)), error
        return "reset"
    return "ok"


def hear(stream: socket.socket, *, limit: int | None = None, pause: float = 0, piece: int = 1 << 16) -> Heard:
    """Receive to the end or up to a limit, `pause` seconds between pieces."""
    digest, count, end = hashlib.blake2b(digest_size=8), 0, "limit"
    try:
        while limit is None or count < limit:
            data = stream.recv(piece if limit is None else min(piece, limit - count))
            if not data:
                end = "fin"
                break
            digest.update(data)
            count += len(data)
            if pause:
                time.sleep(pause)
    except ConnectionError:
        end = "reset"
    return Heard(count, digest.hexdigest(), end)


def half_close(stream: socket.socket) -> None:
    stream.shutdown(socket.SHUT_WR)


def abort(stream: socket.socket) -> None:
    """Close with RST."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.close()


def small_window(stream: socket.socket) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)


def converse(client: Pod, server: Pod, port: int, ask: Side, answer: Side) -> tuple[Any, Any]:
    """One connection; what both sides make of it."""
    listener = server.inside(lambda: socket.create_server(("", port)))
    results: dict[str, Any] = {}

    def serve() -> None:
        stream, _ = listener.accept()
        stream.settimeout(30)
        with stream:
            results["server"] = answer(stream)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with client.connect(server.address, port, timeout=30) as stream:
        results["client"] = ask(stream)
    thread.join(40)
    listener.close()
    assert "server" in results, "the server did not end"
    return results["client"], results["server"]


def _slow(stream: socket.socket) -> Heard:
    small_window(stream)
    return hear(stream, pause=0.0005, piece=32 << 10)


def _then(*steps: Side) -> Side:
    def run(stream: socket.socket) -> list[Any]:
        return [step(stream) for step in steps]

    return run


def _sent(count: int) -> Side:
    return lambda stream: send(stream, count)


def _reset_after_greeting(stream: socket.socket) -> str:
    stream.sendall(b"hello")
    stream.recv(2)
    abort(stream)
    return "aborted"


def _meets_reset(stream: socket.socket) -> tuple[Heard, Heard]:
    greeting = hear(stream, limit=5)
    stream.sendall(b"ok")
    return greeting, hear(stream)


def _sends_into_reset(stream: socket.socket) -> str:
    for _ in range(1000):
        if send(stream, MIB) == "reset":
            return "reset"
    return "never"


def _abort_after_a_mib(stream: socket.socket) -> str:
    hear(stream, limit=MIB)
    abort(stream)
    return "aborted"


CASES: dict[str, tuple[Side, Side]] = {
    "nothing at all": (hear, lambda s: half_close(s)),
    "client says nothing and leaves": (half_close, hear),
    "16 MiB, then the server closes": (hear, _sent(16 * MIB)),
    "16 MiB to a slow reader, then the server closes": (_slow, _sent(16 * MIB)),
    "16 MiB up, then the client closes": (_sent(16 * MIB), hear),
    "16 MiB up to a slow server": (_sent(16 * MIB), _slow),
    "client half-closes, server answers": (
        _then(_sent(3 * MIB), half_close, hear),
        _then(hear, _sent(16 * MIB)),
    ),
    "server half-closes, client goes on": (
        _then(hear, _sent(16 * MIB)),
        _then(_sent(MIB), half_close, hear),
    ),
    "server half-closes at once, client goes on": (_then(hear, _sent(5 * MIB)), _then(half_close, hear)),
    "client half-closes at once, server goes on": (_then(half_close, hear), _then(hear, _sent(5 * MIB))),
    "both half-close and read": (
        _then(_sent(40_000), half_close, hear),
        _then(_sent(50_000), half_close, hear),
    ),
    "server resets": (_meets_reset, _reset_after_greeting),
    "client resets": (_reset_after_greeting, _meets_reset),
    "server resets while the client sends": (_sends_into_reset, _abort_after_a_mib),
    "client resets while the server sends": (_abort_after_a_mib, _sends_into_reset),
    "server resets after the client half-closed": (
        _then(half_close, hear),
        _then(lambda s: hear(s), lambda s: abort(s)),
    ),
    "client resets after the server half-closed": (
        _then(lambda s: hear(s), lambda s: abort(s)),
        _then(half_close, hear),
    ),
    "server closes with unread bytes": (
        lambda s: (s.sendall(b"unread"), hear(s))[1],
        lambda s: s.recv(6, socket.MSG_PEEK | socket.MSG_WAITALL) and s.close(),
    ),
}


def table() -> None:
    """All cases, direct and through the mesh."""
    mesh = Mesh()
    direct = mesh.pod(0, "plain-client", mesh=False), mesh.pod(1, "plain-server", mesh=False)
    meshed = mesh.pod(0, "client"), mesh.pod(1, "server")
    mesh.settle()
    wrong = []
    for number, (name, (ask, answer)) in enumerate(CASES.items()):
        expected = converse(*direct, 7000 + number, ask, answer)
        for attempt in range(3):
            got = converse(*meshed, 7000 + number, ask, answer)
            if got != expected:
                wrong.append(f"{name} (attempt {attempt}):\n  direct {expected}\n  mesh   {got}")
                break
    assert not wrong, "\n".join(wrong)
    entries = mesh.proxies[1].access()
    assert all(
        e["dst.identity"] == "spiffe://cluster.local/ns/shop/sa/default" for e in entries if "dst.identity" in e
    )
    assert sum("src.identity" in e for e in entries) >= len(CASES), "the second round went through tunnels"


def _http10(stream: socket.socket, length: bool) -> None:
    stream.recv(4096)
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
    head += f"Content-Length: {16 * MIB}\r\n".encode() if length else b""
    stream.sendall(head + b"\r\n")
    send(stream, 16 * MIB)


def curl() -> None:
    """`Connection: close`, with and without a length, at 12 MB/s and at full speed: whole every time."""
    mesh = Mesh()
    client, server = mesh.pod(0, "client"), mesh.pod(1, "server")
    mesh.settle()
    listener = server.inside(lambda: socket.create_server(("", 80)))
    lengths = iter([True, False] * 100)

    def serve() -> None:
        while True:
            stream, _ = listener.accept()
            with stream:
                _http10(stream, next(lengths))

    threading.Thread(target=serve, daemon=True).start()
    for rate in ["12M", "12M", "1G", "1G", "1G", "1G"]:
        command = ["curl", "-sS", "--limit-rate", rate, "-o", "/dev/null", "-w", "%{size_download}"]
        done = client.inside(
            lambda command=command: subprocess.run(  # type: ignore[misc]
                [*command, f"http://{server.address}/"], capture_output=True, text=True, timeout=60
            )
        )
        assert (done.returncode, done.stdout) == (0, str(16 * MIB)), (rate, done.stderr)
