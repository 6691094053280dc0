"""What pods send to addresses outside the cluster leaves through sockets of the machine's own network.

The fabric routes such packets over a pair of links back to itself, where the kernel hands them to sockets
here (TPROXY, which does not work on a bridge), keeping the address that was meant; the outlet connects to
it, and the two are joined. To the outside it is the machine that speaks: NAT without a
rule of the host's. TCP and UDP; what is refused outside is reset here. The machine's loopback and link-local
addresses are never reached, nor are reserved ones.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from meshlight.controllers.workqueue import log
from meshlight.node import netns
from meshlight.uplink import relay
from meshlight.uplink.machine import Machine

TABLE = "inet meshlight-uplink"
OUT, BACK = "uplink0", "uplink1"
"""The pair of links: the default route leads into the first, sockets take what comes out of the second."""
PORT = 15999
"""Of the sockets that take what leaves, in the fabric's namespace."""
MARK, ROUTES = "0x1", 101
IDLE = 60.0
"""Seconds of silence after which a UDP flow ends."""
MOST_STREAMS, MOST_FLOWS = 4096, 4096
_BACKLOG = 512
_PACKET = 65536
_SOMEWHERE = "2001:db8::1"
"""An address that nothing is sent to: whether there is a way to it says whether the machine has IPv6."""

INSIDE = {
    4: ("10.244.0.0/16", "10.96.0.0/16", "172.20.0.0/23"),
    6: ("fd6d:6c10::/32",),
}
"""The cluster's own ranges; parts of them that exist have routes of their own, as have pools' addresses."""
NEVER = {
    4: ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"),
    6: ("::/127", "fe80::/10"),
}
"""Addresses that mean something else to the machine than to a pod, or nothing."""

_MACS = ("ee:ee:ee:ee:00:01", "ee:ee:ee:ee:00:02")
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_IP_RECVORIGDSTADDR, _IPV6_RECVORIGDSTADDR = 20, 74

Address = tuple[str, int]


def capture_rules() -> str:
    """nft text: what comes out of the second link goes to our sockets, and nowhere else."""
    chain = f"{TABLE} prerouting"
    lines = [
        f"add table {TABLE}",
        f"delete table {TABLE}",
        f"add table {TABLE}",
        f"add chain {chain} {{ type filter hook prerouting priority -150 ; }}",
        # Of a flow that has its socket already, wherever it comes in.
        f"add rule {chain} meta l4proto {{ tcp, udp }} socket transparent 1 meta mark set {MARK} accept",
        f'add rule {chain} iifname != "{BACK}" accept',
    ]
    for ip in ("ip", "ip6"):
        taken = f"tproxy {ip} to :{PORT} meta mark set {MARK} accept"
        lines.append(f"add rule {chain} meta l4proto {{ tcp, udp }} {taken}")
    lines.append(f"add rule {chain} drop")
    return "\n".join(lines) + "\n"


def links() -> list[str]:
    """`ip` commands that make the pair of links."""
    ends = f"link add {OUT} address {_MACS[0]} type veth peer name {BACK} address {_MACS[1]}"
    return [ends, f"link set {OUT} up", f"link set {BACK} up"]


def routes(version: int) -> list[str]:
    """`ip` commands that lead what is meant for the outside over the links, and what is not nowhere."""
    everywhere, hop = ("0.0.0.0/0", "169.254.8.2") if version == 4 else ("::/0", "fe80::8:2")
    return [
        f"route replace local {everywhere} dev lo table {ROUTES}",
        f"rule add fwmark {MARK} lookup {ROUTES} priority 100",
        *(f"route replace unreachable {network} metric 4096" for network in INSIDE[version] + NEVER[version]),
        f"neighbour replace {hop} lladdr {_MACS[1]} dev {OUT} nud permanent",
        f"route replace default via {hop} dev {OUT} onlink",
    ]


def allowed(address: str) -> bool:
    """Whether an address may be meant to be outside: the kernel's rules once more, where sockets are opened."""
    parsed = ipaddress.ip_address(address)
    return not any(parsed in ipaddress.ip_network(n) for n in INSIDE[parsed.version] + NEVER[parsed.version])


@dataclass(slots=True)
class _Flow:
    """A UDP flow: its socket outside, its socket towards the pod, and when it last was heard."""

    onward: socket.socket
    back: socket.socket
    seen: float


class Egress:
    """Carries what leaves, for one cluster."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows: dict[tuple[Address, Address], _Flow] = {}
        self._opening: set[tuple[Address, Address]] = set()

    async def run(self) -> None:
        """Serve until cancelled; without an outlet everything is refused."""
        versions = [4]
        while not self._machine.reachable:
            await self._machine.arrival()
        if await self._has_ipv6():
            versions.append(6)
        loop = asyncio.get_running_loop()
        opened: list[socket.socket] = []
        netns.ip(links(), tolerant=True)
        # The fabric's own processes, such as the API server, may go out as well.
        netns.set_sysctls({f"net/ipv4/conf/{BACK}/accept_local": "1"})
        netns.nft(capture_rules())
        try:
            for version in versions:
                streams, datagrams = (
                    _transparent(version, socket.SOCK_STREAM),
                    _transparent(version, socket.SOCK_DGRAM),
                )
                opened += [streams, datagrams]
                loop.add_reader(datagrams, self._datagram, datagrams, version)
                self._start(self._accept(streams))
                netns.ip(routes(version), tolerant=True, six=version == 6)
            log("info", "pods reach the machine's outside", families=versions)
            while True:
                await asyncio.sleep(IDLE / 4)
                self._expire(loop.time() - IDLE)
        finally:
            for task in self._tasks:
                task.cancel()
            self._expire(float("inf"))
            for link in opened:
                loop.remove_reader(link)
                link.close()

    async def _has_ipv6(self) -> bool:
        try:
            (await self._machine.socket("connect", "udp", _SOMEWHERE, 9)).close()
        except OSError:
            return False
        return True

    def _start(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                stream, _ = await loop.sock_accept(listener)
            except OSError as error:
                log("warning", "connection to the outside not accepted", error=str(error))
                await asyncio.sleep(0.1)
                continue
            if len(self._tasks) > MOST_STREAMS:
                relay.linger(stream)
                stream.close()
            else:
                self._start(self._stream(stream))

    async def _stream(self, stream: socket.socket) -> None:
        address, port = stream.getsockname()[:2]
        try:
            if not allowed(address):
                raise OSError(errno.EACCES, "not outside")
            onward = await self._machine.socket("connect", "tcp", address, port)
        except OSError as error:
            log("info", "not reached", address=address, port=port, error=error.strerror)
            relay.linger(stream)
            stream.close()
            return
        await relay.join(stream, onward)

    def _datagram(self, link: socket.socket, version: int) -> None:
        try:
            packet, ancillary, _, client = link.recvmsg(_PACKET, 256)
        except OSError:
            return
        target = next(_destinations(ancillary), None)
        if target is None or not allowed(target[0]):
            return
        key = (client[:2], target)
        flow = self._flows.get(key)
        if flow is not None:
            flow.seen = asyncio.get_running_loop().time()
            with suppress(OSError):  # as a network would: lost
                flow.onward.send(packet)
        elif key not in self._opening and len(self._flows) + len(self._opening) < MOST_FLOWS:
            self._opening.add(key)
            self._start(self._open(key, packet, version))

    async def _open(self, key: tuple[Address, Address], packet: bytes, version: int) -> None:
        client, target = key
        loop = asyncio.get_running_loop()
        try:
            onward = await self._machine.socket("connect", "udp", *target)
            back = _transparent(version, socket.SOCK_DGRAM, target)
            back.connect(client)
        except OSError as error:
            log("info", "not reached", address=target[0], port=target[1], error=error.strerror)
            return
        finally:
            self._opening.discard(key)
        flow = self._flows[key] = _Flow(onward, back, loop.time())
        # From now on the kernel gives the flow's datagrams to the socket that is connected to the pod.
        loop.add_reader(onward, self._pass_on, flow, onward, back)
        loop.add_reader(back, self._pass_on, flow, back, onward)
        with suppress(OSError):
            onward.send(packet)

    @staticmethod
    def _pass_on(flow: _Flow, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):  # as a network would: lost
            packet = source.recv(_PACKET)
            flow.seen = asyncio.get_running_loop().time()
            target.send(packet)

    def _expire(self, horizon: float) -> None:
        for key in [k for k, flow in self._flows.items() if flow.seen < horizon]:
            flow = self._flows.pop(key)
            for link in (flow.onward, flow.back):
                asyncio.get_running_loop().remove_reader(link)
                link.close()


def _transparent(version: int, kind: socket.SocketKind, at: Address | None = None) -> socket.socket:
    """A socket that may have any address: all of them on our port, or the one that is given."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    made = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if version == 4:
        made.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
    else:
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if at is None and kind == socket.SOCK_DGRAM:
        if version == 4:
            made.setsockopt(socket.IPPROTO_IP, _IP_RECVORIGDSTADDR, 1)
        else:
            made.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR, 1)
    made.bind(at or ("0.0.0.0" if version == 4 else "::", PORT))
    if kind == socket.SOCK_STREAM:
        made.listen(_BACKLOG)
    return made


def _destinations(ancillary: list[tuple[int, int, bytes]]) -> Iterator[Address]:
    """Where a datagram was sent to, as the kernel tells beside it."""
    for level, kind, raw in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_RECVORIGDSTADDR:
            yield socket.inet_ntoa(raw[4:8]), struct.unpack("!H", raw[2:4])[0]
        elif level == socket.IPPROTO_IPV6 and kind == _IPV6_RECVORIGDSTADDR:
            yield socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack("!H", raw[2:4])[0]
