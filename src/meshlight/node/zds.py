"""The node agent's side of ZDS: tells ztunnel of each enrolled pod and passes its network namespace.

One protobuf message a packet over a `SOCK_SEQPACKET` unix socket, the namespace as `SCM_RIGHTS`
(`istio.workload.zds`). Each request is acknowledged before the next is sent.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshlight.node import netns
from meshlight.proto import zds_pb2

ACK_TIMEOUT = 10.0
"""Seconds that ztunnel has to open a pod's listeners."""
_MAX_PACKET = 1 << 16


@dataclass(frozen=True, slots=True)
class EnrolledPod:
    """What ztunnel is told of a pod."""

    uid: str
    name: str
    namespace: str
    service_account: str


class NotDelivered(Exception):
    """ztunnel is not connected, went away, or refused; the message says which."""


class _Proxy:
    """One connected ztunnel."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.turn = asyncio.Lock()

    async def ask(self, request: Any, descriptor: int | None = None) -> None:
        """Send a request and await its acknowledgement. Raises NotDelivered."""
        loop = asyncio.get_running_loop()
        async with self.turn:
            try:
                ancillary: list[Any] = []
                if descriptor is not None:
                    rights = array.array("i", [descriptor])
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                self.connection.sendmsg([request.SerializeToString()], ancillary)
                async with asyncio.timeout(ACK_TIMEOUT):
                    packet = await loop.sock_recv(self.connection, _MAX_PACKET)
            except TimeoutError:
                self.connection.close()
                raise NotDelivered(f"ztunnel did not acknowledge within {ACK_TIMEOUT:g} s") from None
            except OSError as error:
                raise NotDelivered(f"ztunnel's connection broke: {error}") from error
        if not packet:
            raise NotDelivered("ztunnel closed its connection")
        response = zds_pb2.WorkloadResponse.FromString(packet)
        if response.ack.error:
            raise NotDelivered(f"ztunnel refused: {response.ack.error}")


class ZdsServer:
    """Serves the socket; keeps the set of pods, and brings every ztunnel that connects up to it."""

    def __init__(self, uds: Path, on_connected: Callable[[], None]) -> None:
        self._uds = uds
        self._on_connected = on_connected
        self._pods: dict[str, EnrolledPod] = {}
        self._proxies: list[_Proxy] = []
        self._greeting: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        """Whether a ztunnel has received the snapshot."""
        return bool(self._proxies)

    async def run(self) -> None:
        """Accept ztunnels for ever. Raises OSError when the socket cannot be made."""
        self._uds.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._uds.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with listener:
            listener.bind(str(self._uds))
            self._uds.chmod(0o600)
            listener.listen(4)
            listener.setblocking(False)
            loop = asyncio.get_running_loop()
            while True:
                connection, _ = await loop.sock_accept(listener)
                connection.setblocking(False)
                task = asyncio.create_task(self._greet(connection))
                self._greeting.add(task)
                task.add_done_callback(self._greeting.discard)

    async def _greet(self, connection: socket.socket) -> None:
        proxy = _Proxy(connection)
        try:
            hello = await asyncio.get_running_loop().sock_recv(connection, _MAX_PACKET)
            if zds_pb2.ZdsHello.FromString(hello).version != zds_pb2.V1:
                connection.close()
                return
            told: set[str] = set()
            while missing := [p for p in self._pods.values() if p.uid not in told]:
                for pod in missing:
                    told.add(pod.uid)
                    await self._add(proxy, pod)
            await proxy.ask(zds_pb2.WorkloadRequest(snapshot_sent=zds_pb2.SnapshotSent()))
        except (NotDelivered, OSError):
            connection.close()
            return
        # The newest ztunnel comes first: during an upgrade it is the one that stays.
        self._proxies.insert(0, proxy)
        self._on_connected()

    async def _add(self, proxy: _Proxy, pod: EnrolledPod) -> None:
        try:
            descriptor = os.open(netns.NETNS / pod.uid, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # the pod went away meanwhile
        try:
            request = zds_pb2.WorkloadRequest(
                add=zds_pb2.AddWorkload(
                    uid=pod.uid,
                    workload_info=zds_pb2.WorkloadInfo(
                        name=pod.name, namespace=pod.namespace, service_account=pod.service_account
                    ),
                )
            )
            await proxy.ask(request, descriptor)
        finally:
            os.close(descriptor)

    async def add(self, pod: EnrolledPod) -> None:
        """Have ztunnel open its listeners in the pod; returns once it has. Raises NotDelivered."""
        self._pods[pod.uid] = pod
        if not self._proxies:
            raise NotDelivered("ztunnel is not connected")
        for proxy in list(self._proxies):
            try:
                await self._add(proxy, pod)
            except NotDelivered:
                self._drop(proxy)
        if not self._proxies:
            raise NotDelivered("ztunnel went away or refused the pod")

    async def remove(self, uid: str) -> None:
        """Have ztunnel close the pod's listeners; its streams go on. A missing ztunnel is no error."""
        if self._pods.pop(uid, None) is None:
            return
        for proxy in list(self._proxies):
            try:
                request = zds_pb2.WorkloadRequest()
                getattr(request, "del").uid = uid  # `del` is a word of Python's
                await proxy.ask(request)
            except NotDelivered:
                self._drop(proxy)

    def _drop(self, proxy: _Proxy) -> None:
        proxy.connection.close()
        if proxy in self._proxies:
            self._proxies.remove(proxy)
