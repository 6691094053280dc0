"""What uplink and outlet say to each other: one JSON object a packet, and a descriptor with an answer.

Packets of a SOCK_SEQPACKET unix socket. The uplink asks (`listen`, `connect`, each for `tcp` or `udp`), the
outlet answers by the question's number, in any order.
"""

from __future__ import annotations

import array
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SOCKET = "uplink.sock"
"""Name of the unix socket in the cluster's state directory."""
NAMESERVER = "nameserver:"
"""Address that stands, with a number from 0 on after it, for one of the machine's own nameservers."""
_PACKET = 4096
_FD_SIZE = array.array("i").itemsize

Operation = Literal["listen", "connect"]
Protocol = Literal["tcp", "udp"]


@dataclass(frozen=True, slots=True)
class Ask:
    """Open a socket on the machine's side, bound to or connected to an address."""

    number: int
    operation: Operation
    protocol: Protocol
    address: str
    port: int

    def encode(self) -> bytes:
        """As a packet."""
        body = {
            "id": self.number,
            "op": self.operation,
            "protocol": self.protocol,
            "address": self.address,
            "port": self.port,
        }
        return json.dumps(body).encode()

    @classmethod
    def decode(cls, packet: bytes) -> Ask:
        """From a packet. Raises ValueError."""
        try:
            body = json.loads(packet)
            operation, protocol = body["op"], body["protocol"]
            if operation not in ("listen", "connect") or protocol not in ("tcp", "udp"):
                raise ValueError(f"unknown operation {operation} {protocol}")
            return cls(int(body["id"]), operation, protocol, str(body["address"]), int(body["port"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a question: {error!r}") from None


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a question: a socket comes with it unless `error` (an errno) is set."""

    number: int
    error: int = 0
    text: str = ""

    def encode(self) -> bytes:
        """As a packet."""
        return json.dumps({"id": self.number, "error": self.error, "text": self.text}).encode()

    @classmethod
    def decode(cls, packet: bytes) -> Answer:
        """From a packet. Raises ValueError."""
        try:
            body = json.loads(packet)
            return cls(int(body["id"]), int(body["error"]), str(body["text"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an answer: {error!r}") from None


def send(link: socket.socket, packet: bytes, descriptor: int | None = None) -> None:
    """Send one packet. Raises BlockingIOError when the socket is full, OSError when it is closed."""
    rights = (
        [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    )
    link.sendmsg([packet], rights, socket.MSG_NOSIGNAL)


def receive(link: socket.socket) -> tuple[bytes, int | None]:
    """One packet and its descriptor; an empty packet means the end. Raises BlockingIOError."""
    packet, rights, _, _ = link.recvmsg(_PACKET, socket.CMSG_SPACE(_FD_SIZE), socket.MSG_CMSG_CLOEXEC)
    descriptor = None
    for level, kind, raw in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            (descriptor,) = array.array("i", raw[:_FD_SIZE])
    return packet, descriptor


def at(folder: Path, perform: str, link: socket.socket) -> None:
    """`bind` or `connect` a unix socket in a folder, however long the folder's path is."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        getattr(link, perform)(f"/proc/self/fd/{descriptor}/{SOCKET}")
    finally:
        os.close(descriptor)
