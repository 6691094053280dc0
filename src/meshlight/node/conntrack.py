"""Connection tracking entries of this namespace, listed and deleted over netlink (ctnetlink).

Why: a UDP flow has no end that the kernel sees, so a client that keeps its port would go on being sent
to an endpoint that is gone. Message formats: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_GET, _DELETE = _SUBSYSTEM | 1, _SUBSYSTEM | 2
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_TUPLE_ORIG, _TUPLE_REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_V4_SRC, _IP_V6_SRC = 1, 3
_PROTO_NUM, _PROTO_SRC_PORT = 1, 2
_NESTED, _TYPE = 0x8000, 0x3FFF
_UDP = 17
_HEADER = struct.Struct("=IHHII")
_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Flow:
    """One tracked flow: its family, its first direction as the kernel names it, and who answers."""

    family: int
    original: bytes
    protocol: int
    answerer: tuple[str, int]
    """Source of the answers: the endpoint, after translation."""


def _attributes(raw: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 4 <= len(raw):
        length, kind = struct.unpack_from("=HH", raw, position)
        if length < 4:
            return
        yield kind & _TYPE, raw[position + 4 : position + length]
        position += (length + 3) & ~3


def _flow(family: int, raw: bytes) -> Flow | None:
    parts = dict(_attributes(raw))
    if _TUPLE_ORIG not in parts or _TUPLE_REPLY not in parts:
        return None
    reply = dict(_attributes(parts[_TUPLE_REPLY]))
    addresses, protocol = dict(_attributes(reply[_TUPLE_IP])), dict(_attributes(reply[_TUPLE_PROTO]))
    source = addresses.get(_IP_V4_SRC) or addresses.get(_IP_V6_SRC)
    if source is None or _PROTO_SRC_PORT not in protocol:
        return None
    port = struct.unpack("!H", protocol[_PROTO_SRC_PORT][:2])[0]
    answerer = (str(ipaddress.ip_address(source)), port)
    return Flow(family, parts[_TUPLE_ORIG], protocol[_PROTO_NUM][0], answerer)


def _message(kind: int, flags: int, family: int, payload: bytes = b"") -> bytes:
    body = struct.pack("=BBH", family, 0, 0) + payload
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body


def _answers(link: socket.socket) -> Iterator[bytes]:
    """Payloads until the kernel is done. Raises OSError as the kernel answers."""
    while True:
        raw = link.recv(_BUFFER)
        position = 0
        while position + _HEADER.size <= len(raw):
            length, kind, _, _, _ = _HEADER.unpack_from(raw, position)
            body = raw[position + _HEADER.size : position + length]
            position += (length + 3) & ~3
            if kind == _DONE:
                return
            if kind == _ERROR:
                code = -struct.unpack_from("=i", body)[0]
                if code:
                    raise OSError(code, f"conntrack: error {code}")
                return
            yield body


def flows(family: int) -> list[Flow]:
    """Every tracked flow of a family (AF_INET, AF_INET6) in the calling thread's namespace."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as link:
        link.send(_message(_GET, _REQUEST | _DUMP, family))
        found = (_flow(body[0], body[4:]) for body in _answers(link))
        return [flow for flow in found if flow is not None]


def forget(flow: Flow) -> None:
    """Delete a flow: its next packet is a first one again. One that is gone already is fine."""
    attribute = struct.pack("=HH", 4 + len(flow.original), _TUPLE_ORIG | _NESTED) + flow.original
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as link:
        link.send(_message(_DELETE, _REQUEST | _ACK, flow.family, attribute))
        try:
            for _ in _answers(link):
                pass
        except FileNotFoundError:
            pass


def forget_datagrams(endpoints: set[tuple[str, int]]) -> int:
    """Delete UDP flows that these endpoints (address, port) answer; returns how many."""
    count = 0
    families = {socket.AF_INET6 if ":" in address else socket.AF_INET for address, _ in endpoints}
    for family in families:
        for flow in flows(family):
            if flow.protocol == _UDP and flow.answerer in endpoints:
                forget(flow)
                count += 1
    return count
