"""Connections into the machine's own network, which a node's network does not reach.

A cluster's uplink answers at a unix socket: one JSON object asks, one answers, with the connected socket.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

SOCKET = Path("/run/meshlight/dial.sock")
PACKET = 4096
_TIMEOUT = 20.0


def dial(host: str, port: int) -> socket.socket:
    """A TCP connection from the machine itself, by name or address. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(_TIMEOUT)
        link.connect(str(SOCKET))
        link.send(json.dumps({"host": host, "port": port}).encode())
        packet, descriptors, _, _ = socket.recv_fds(link, PACKET, 1)
    if not descriptors:
        answer = json.loads(packet) if packet else {}
        number = int(answer.get("error") or 5)
        raise OSError(number, answer.get("text") or os.strerror(number))
    made = socket.socket(fileno=descriptors[0])
    made.setblocking(True)
    return made
