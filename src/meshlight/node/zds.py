"""The node agent's side of ZDS: tells ztunnel of each enrolled pod and passes its network namespace.

One protobuf message a packet over a `SOCK_SEQPACKET` unix socket, the namespace as `SCM_RIGHTS`
(`istio.workload.zds`). `Dialogue` is the protocol without sockets: it compares what one ztunnel was
told with what it should know. `ZdsServer` owns the socket. Neither knows why a pod is enrolled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from meshlight.controllers.workqueue import log
from meshlight.node import netns
from meshlight.proto import zds_pb2

ACK_TIMEOUT = 10.0
"""Seconds that ztunnel has to greet, and to acknowledge a request."""
_MAX_PACKET = 1 << 16
_BACKLOG = 4


@dataclass(frozen=True, slots=True)
class EnrolledPod:
    """What ztunnel is told of a pod.

    `network` is the inode of its network namespace: a pod whose network was made anew is told anew.
    """

    uid: str
    name: str
    namespace: str
    service_account: str
    network: int


@dataclass(frozen=True, slots=True)
class Add:
    """Open listeners in this pod; its namespace's descriptor goes with the message."""

    pod: EnrolledPod


@dataclass(frozen=True, slots=True)
class Remove:
    """Close this pod's listeners; its streams go on."""

    uid: str


@dataclass(frozen=True, slots=True)
class SnapshotSent:
    """All pods have been named: forget any other."""


Request = Add | Remove | SnapshotSent


@dataclass(frozen=True, slots=True)
class Answer:
    """ztunnel's acknowledgement of a request; `error` is empty when it did as asked."""

    request: Request
    error: str


class ProtocolError(Exception):
    """ztunnel did not keep to ZDS; the message says how."""


def encode(request: Request) -> bytes:
    """The packet of a request."""
    message = zds_pb2.WorkloadRequest()
    match request:
        case Add(pod):
            message.add.uid = pod.uid
            about = message.add.workload_info
            about.name, about.namespace, about.service_account = pod.name, pod.namespace, pod.service_account
        case Remove(uid):
            getattr(message, "del").uid = uid  # `del` is a word of Python's
        case SnapshotSent():
            message.snapshot_sent.SetInParent()
    packet: bytes = message.SerializeToString()
    return packet


class Dialogue:
    """What one ztunnel knows, and hence what to send it next; one request is outstanding at a time."""

    def __init__(self) -> None:
        self.greeted = False
        self.told: dict[str, EnrolledPod] = {}
        self.outstanding: Request | None = None
        self._snapshot_sent = False
        self._refused: set[str] = set()

    def receive(self, packet: bytes) -> Answer | None:
        """Take a packet: the greeting (None), then acknowledgements. Raises ProtocolError."""
        try:
            if not self.greeted:
                version = zds_pb2.ZdsHello.FromString(packet).version
                if version != zds_pb2.V1:
                    raise ProtocolError(f"ztunnel speaks ZDS version {version}; this agent speaks 1")
                self.greeted = True
                return None
            response = zds_pb2.WorkloadResponse.FromString(packet)
        except DecodeError as error:
            raise ProtocolError(f"ztunnel sent what is no ZDS message: {error}") from error
        request, self.outstanding = self.outstanding, None
        if request is None:
            raise ProtocolError("ztunnel acknowledged a request that was not made")
        answer = Answer(request, response.ack.error)
        match request:
            case Add(pod) if answer.error:
                self._refused.add(pod.uid)
            case Add(pod):
                self.told[pod.uid] = pod
            case Remove(uid):
                self.told.pop(uid, None)
            case SnapshotSent():
                self._snapshot_sent = True
        return answer

    def next(self, pods: Mapping[str, EnrolledPod], *, newest: bool) -> Request | None:
        """The next request, or None while one is outstanding or there is nothing to tell.

        Only the newest ztunnel is told of pods; an older one, which an upgrade is replacing, is only
        told of those that leave. A refused pod is not named again until `retry`.
        """
        if not self.greeted or self.outstanding is not None:
            return None
        self._refused &= pods.keys()
        request: Request | None = None
        if gone := next((uid for uid, pod in self.told.items() if pods.get(uid) != pod), None):
            request = Remove(gone)
        elif newest:
            known = self.told.keys() | self._refused
            pod = next((pod for uid, pod in pods.items() if uid not in known), None)
            if pod is not None:
                request = Add(pod)
            elif not self._snapshot_sent:
                request = SnapshotSent()
        self.outstanding = request
        return request

    def abandon(self, pod: EnrolledPod) -> None:
        """The outstanding `Add` cannot be sent; it counts as refused."""
        self.outstanding = None
        self._refused.add(pod.uid)

    def retry(self, uid: str) -> None:
        """Name a refused pod again."""
        self._refused.discard(uid)


class _Connection:
    """One connected ztunnel."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.dialogue = Dialogue()
        self.wake = asyncio.Event()


class ZdsServer:
    """Serves the socket; keeps the set of pods, and brings every ztunnel that connects up to it.

    `on_answer(uid, error)` is called when the newest ztunnel has opened a pod's listeners (error
    empty) or has not; `on_connection(connected)` when the first one came or the last one went.
    """

    def __init__(
        self, uds: Path, on_answer: Callable[[str, str], None], on_connection: Callable[[bool], None]
    ) -> None:
        self._uds = uds
        self._on_answer = on_answer
        self._on_connection = on_connection
        self._pods: dict[str, EnrolledPod] = {}
        self._connections: list[_Connection] = []  # greeted ones, the newest last

    @property
    def connected(self) -> bool:
        """Whether a ztunnel is there."""
        return bool(self._connections)

    def add(self, pod: EnrolledPod) -> None:
        """Have ztunnel open its listeners in the pod, now or when it connects; asks anew if it refused."""
        self._pods[pod.uid] = pod
        for connection in self._connections:
            connection.dialogue.retry(pod.uid)
        self._wake()

    def remove(self, uid: str) -> None:
        """Have every ztunnel close the pod's listeners; its streams go on."""
        self._pods.pop(uid, None)
        self._wake()

    def _wake(self) -> None:
        for connection in self._connections:
            connection.wake.set()

    def _listen(self) -> socket.socket:
        folder = self._uds.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        self._uds.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        # Addresses of unix sockets hold 107 bytes, and a node's folder may be longer.
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{descriptor}/{self._uds.name}")
        finally:
            os.close(descriptor)
        self._uds.chmod(0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        return listener

    async def run(self) -> None:
        """Accept ztunnels until cancelled. Raises OSError when the socket cannot be made."""
        loop = asyncio.get_running_loop()
        with self._listen() as listener:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    stream, _ = await loop.sock_accept(listener)
                    stream.setblocking(False)
                    tasks.create_task(self._converse(_Connection(stream)))

    async def _converse(self, connection: _Connection) -> None:
        reason = "ztunnel closed its connection"
        with connection.stream:
            try:
                await self._exchange(connection)
            except (ProtocolError, OSError) as error:  # a timeout is an OSError too
                reason = str(error) or f"ztunnel did not answer within {ACK_TIMEOUT:g} s"
            finally:
                if connection in self._connections:
                    self._connections.remove(connection)
                    log("info", "ztunnel disconnected", reason=reason, connections=len(self._connections))
                    self._wake()  # an older one may be the newest now
                    if not self._connections:
                        self._on_connection(False)

    async def _exchange(self, connection: _Connection) -> None:
        """Talk until ztunnel closes. Raises ProtocolError, OSError."""
        loop = asyncio.get_running_loop()
        receiving = asyncio.ensure_future(loop.sock_recv(connection.stream, _MAX_PACKET))
        waking = asyncio.ensure_future(connection.wake.wait())
        try:
            while True:
                self._send_next(connection)
                due = not connection.dialogue.greeted or connection.dialogue.outstanding is not None
                # A wake-up does not prolong the wait for an answer: requests go one after the other.
                awaited = {receiving} if due else {receiving, waking}
                timeout = ACK_TIMEOUT if due else None
                done, _ = await asyncio.wait(awaited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    raise TimeoutError
                if waking.done():
                    connection.wake.clear()
                    waking = asyncio.ensure_future(connection.wake.wait())
                if receiving.done():
                    packet = receiving.result()
                    if not packet:
                        return
                    receiving = asyncio.ensure_future(loop.sock_recv(connection.stream, _MAX_PACKET))
                    self._receive(connection, packet)
        finally:
            for pending in (receiving, waking):
                pending.cancel()
            # Their outcome is of no interest; the socket may only be closed once nothing reads it.
            await asyncio.gather(receiving, waking, return_exceptions=True)

    def _receive(self, connection: _Connection, packet: bytes) -> None:
        answer = connection.dialogue.receive(packet)
        if answer is None:
            self._connections.append(connection)
            log("info", "ztunnel connected", connections=len(self._connections), pods=len(self._pods))
            if len(self._connections) == 1:
                self._on_connection(True)
        elif isinstance(answer.request, Add) and connection is self._connections[-1]:
            self._on_answer(answer.request.pod.uid, answer.error)
        elif answer.error:
            log("warning", "ztunnel refused", request=str(answer.request), error=answer.error)

    def _send_next(self, connection: _Connection) -> None:
        newest = bool(self._connections) and connection is self._connections[-1]
        dialogue = connection.dialogue
        while request := dialogue.next(self._pods, newest=newest):
            with contextlib.ExitStack() as stack:
                descriptors = []
                if isinstance(request, Add):
                    try:
                        path = netns.NETNS / request.pod.uid
                        descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                    except FileNotFoundError:
                        dialogue.abandon(request.pod)
                        self._on_answer(request.pod.uid, "the pod has no network namespace")
                        continue
                    stack.callback(os.close, descriptors[0])
                socket.send_fds(connection.stream, [encode(request)], descriptors)
            return
