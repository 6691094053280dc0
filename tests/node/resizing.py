"""Tunnels that carried something and rest while the windows of their connection change.

A receiver gives window back in large pieces, so a resting tunnel has always used some. When many
tunnels open, the windows shrink by more than what is left of it; whoever does not give the rest
back then leaves the sender waiting for ever.
"""

from __future__ import annotations

import random
import socket

from dataplane import Mesh
from lab import Pod, read

LARGEST = 4 << 20
"""The window of a lone tunnel (windows.rs)."""


def exchange(stream: socket.socket, count: int) -> None:
    """Send bytes in small requests, each answered with itself."""
    piece = random.randbytes(4000)
    while count > 0:
        sent = piece[: min(count, len(piece))]
        stream.sendall(sent)
        answer = b""
        while len(answer) < len(sent):
            received = stream.recv(len(sent) - len(answer))
            assert received, "closed"
            answer += received
        assert answer == sent
        count -= len(sent)


def connected(client: Pod, server: Pod) -> socket.socket:
    stream = client.connect(server.address, 9000, timeout=5)
    read(stream)
    return stream


def resting() -> None:
    """Old connections answer after crowds of new ones came and went."""
    mesh = Mesh()
    client, server = mesh.pod(0, "client"), mesh.pod(1, "server")
    server.serve(9000)
    mesh.settle()
    old = connected(client, server)
    # Below a third of the window: not given back yet.
    exchange(old, LARGEST * 3 // 10)
    olds = [old, connected(client, server)]
    for crowd in (32, 100, 5, 64, 200, 40):
        news = [connected(client, server) for _ in range(crowd)]
        for stream in olds:
            exchange(stream, 306)
        for stream in news:
            stream.close()
        for stream in olds:
            exchange(stream, random.randrange(306, LARGEST // 4))
        olds.append(connected(client, server))
