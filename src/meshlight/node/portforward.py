"""`kubectl port-forward` into a pod: SPDY/3.1 frames inside WebSocket messages.

For each connection the client opens two streams with one `requestid`: `streamtype: error`, on which
we tell a failure, and `streamtype: data`, which is tied to a TCP connection to 127.0.0.1:PORT in the pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from aiohttp import WSMsgType, web

from meshlight.kube import spdy
from meshlight.node.runtime import Sandbox, SandboxError

PROTOCOL = "SPDY/3.1+portforward.k8s.io"
_CHUNK = 64 * 1024
_QUEUE = 64
"""Data frames that wait for a slow program before the client is no longer read."""


class _Forward:
    """One forwarded connection: from a data stream to a port of the pod, and back."""

    def __init__(self, session: _Session, stream: int, error: int, port: int) -> None:
        self._session, self._stream, self._error, self._port = session, stream, error, port
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUE)

    async def run(self) -> None:
        """Connect and copy in both directions until both have ended."""
        try:
            reader, writer = await self._connect()
        except (OSError, SandboxError) as error:
            words = f"error forwarding port {self._port} to pod: {error}"
            await self._session.send(spdy.data(self._error, words.encode(), fin=True))
            await self._session.send(spdy.data(self._stream, b"", fin=True))
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._up(writer))
                group.create_task(self._down(reader))
        except* (OSError, RuntimeError):
            pass  # either side is gone
        finally:
            writer.close()
            while not self.queue.empty():  # whoever waits to put more in must not wait for ever
                self.queue.get_nowait()
            with contextlib.suppress(OSError, RuntimeError):
                await self._session.send(spdy.data(self._error, b"", fin=True))

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        made: socket.socket = await self._session.sandbox.tcp_socket()
        try:
            await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", self._port))
        except BaseException:
            made.close()
            raise
        return await asyncio.open_connection(sock=made, limit=_CHUNK)

    async def _up(self, writer: asyncio.StreamWriter) -> None:
        while (content := await self.queue.get()) is not None:
            writer.write(content)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async def _down(self, reader: asyncio.StreamReader) -> None:
        while content := await reader.read(_CHUNK):
            await self._session.send(spdy.data(self._stream, content))
        await self._session.send(spdy.data(self._stream, b"", fin=True))


class _Session:
    """One client's WebSocket and the connections forwarded through it."""

    def __init__(self, ws: web.WebSocketResponse, sandbox: Sandbox) -> None:
        self._ws, self.sandbox = ws, sandbox
        self._spdy = spdy.Session()
        self._errors: dict[str, int] = {}
        self._forwards: dict[int, tuple[_Forward, asyncio.Task[None]]] = {}
        self._sending = asyncio.Lock()

    async def send(self, frame: bytes) -> None:
        """Send one frame whole."""
        async with self._sending:
            await self._ws.send_bytes(frame)

    async def run(self) -> None:
        """Serve until the client leaves."""
        try:
            async for message in self._ws:
                if message.type != WSMsgType.BINARY:
                    continue
                for frame in self._spdy.receive(message.data):
                    await self._take(frame)
        finally:
            tasks = [task for _, task in self._forwards.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, frame: spdy.Frame) -> None:
        match frame.kind:
            case spdy.SYN_STREAM:
                await self.send(self._spdy.reply(frame.stream))
                request = frame.header("requestid")
                if frame.header("streamtype") == "error":
                    self._errors[request] = frame.stream
                elif frame.header("port").isdigit():
                    error = self._errors.pop(request, 0)
                    forward = _Forward(self, frame.stream, error, int(frame.header("port")))
                    task = asyncio.create_task(forward.run())
                    self._forwards[frame.stream] = (forward, task)
                    stream = frame.stream
                    task.add_done_callback(lambda _: self._forwards.pop(stream, None))
                else:
                    await self.send(spdy.reset(frame.stream))
            case spdy.PING:
                await self.send(spdy.ping(frame.payload))
            case spdy.RST_STREAM:
                if found := self._forwards.get(frame.stream):
                    found[1].cancel()
            case 0:
                found = self._forwards.get(frame.stream)
                if found is None:
                    return
                if frame.payload:
                    await found[0].queue.put(frame.payload)
                if frame.flags & spdy.FIN:
                    await found[0].queue.put(None)


async def serve(request: web.Request, sandbox: Sandbox) -> web.WebSocketResponse:
    """Forward ports of a pod for one client."""
    ws = web.WebSocketResponse(protocols=(PROTOCOL,), heartbeat=30)
    await ws.prepare(request)
    with contextlib.suppress(OSError, spdy.SpdyError):
        await _Session(ws, sandbox).run()
    if not ws.closed:
        await ws.close()
    return ws
