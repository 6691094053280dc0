"""Commands in containers over a WebSocket: the `v5.channel.k8s.io` protocol of `kubectl exec` and `attach`.

Binary messages begin with a channel: 0 stdin, 1 stdout, 2 stderr, 3 the final Status, 4 the terminal's
size as JSON; 255 closes the channel that its second byte names.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
from aiohttp import WSMsgType, web

from meshlight.kube.client import ApiError, ApiUnreachable
from meshlight.kube.resources import Object
from meshlight.node.environment import ConfigError
from meshlight.node.logfile import LogOptions, stream
from meshlight.node.runtime import Sandbox, SandboxError

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
STDIN, STDOUT, STDERR, STATUS, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
_CHUNK = 32 * 1024

Spawn = Callable[[int, int, int, bool], Awaitable[Awaitable[int]]]
"""(stdin, stdout, stderr, tty) to the future exit code."""
OpenTerminal = Callable[[], Awaitable[tuple[int, int]]]
"""A new terminal in the container: (our end, the program's end)."""


def ended(code: int) -> Object:
    """The Status that tells a command's exit code."""
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def failed(message: str) -> Object:
    """The Status of a command that could not be run."""
    return {
        "metadata": {},
        "status": "Failure",
        "reason": "InternalError",
        "message": f"Internal error occurred: error executing command in container: {message}",
        "code": 500,
    }


def _asked(request: web.Request, *names: str) -> bool:
    """Whether an option is on; the kubelet and the API server name some differently."""
    return any(request.query.get(name) in ("1", "true") for name in names)


class _Input:
    """What the client types, on its way to the program."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Begin to write without blocking."""
        loop = asyncio.get_running_loop()
        file = os.fdopen(self._descriptor, "wb", 0)
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, file)
        self._writer = asyncio.StreamWriter(transport, protocol, None, loop)

    async def write(self, content: bytes) -> None:
        """Hand over; a program that no longer reads is no error."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.write(content)
                await self._writer.drain()

    def close(self) -> None:
        """The client has no more to say."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


async def _listen(ws: web.WebSocketResponse, typed: _Input | None, resize: Callable[[bytes], None]) -> None:
    """Take the client's messages until it leaves."""
    async for message in ws:
        if message.type != WSMsgType.BINARY or not message.data:
            continue
        channel, content = message.data[0], message.data[1:]
        if channel == STDIN and typed is not None and content:
            await typed.write(content)
        elif channel == RESIZE:
            resize(content)
        elif channel == CLOSE and content[:1] == b"\0" and typed is not None:
            typed.close()
    if typed is not None:
        typed.close()


async def _show(ws: web.WebSocketResponse, channel: int, descriptor: int) -> None:
    """Send what a program writes, until all writers are gone."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
    )
    try:
        while chunk := await reader.read(_CHUNK):
            await ws.send_bytes(bytes([channel]) + chunk)
    except OSError:
        return  # a terminal's end, or the client's
    finally:
        transport.close()


def _set_size(terminal: int, content: bytes) -> None:
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
        size = orjson.loads(content)
        packed = struct.pack("HHHH", int(size["Height"]), int(size["Width"]), 0, 0)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, packed)


async def execute(request: web.Request, spawn: Spawn, terminal_of: OpenTerminal) -> web.WebSocketResponse:
    """Run a command for a client, with the streams that it asked for. Raises SandboxError before it begins."""
    tty = _asked(request, "tty")
    with_stdin = _asked(request, "input", "stdin")
    terminal, follower = await terminal_of() if tty else (-1, -1)
    ws = web.WebSocketResponse(protocols=PROTOCOLS, heartbeat=30)
    await ws.prepare(request)
    null = os.open(os.devnull, os.O_RDWR)
    theirs: list[int] = []
    shown: list[tuple[int, int]] = []
    typed: _Input | None = None
    if tty:
        theirs = [follower]
        streams = (follower, follower, follower)
        shown = [(STDOUT, os.dup(terminal))]
        typed = _Input(os.dup(terminal)) if with_stdin else None
    else:
        chosen = [null, null, null]
        if with_stdin:
            chosen[0], write = os.pipe()
            typed = _Input(write)
            theirs.append(chosen[0])
        for number, channel, names in ((1, STDOUT, ("output", "stdout")), (2, STDERR, ("error", "stderr"))):
            if _asked(request, *names):
                read, chosen[number] = os.pipe()
                shown.append((channel, read))
                theirs.append(chosen[number])
        streams = (chosen[0], chosen[1], chosen[2])
    if typed is not None:
        await typed.open()
    showing = [asyncio.create_task(_show(ws, *pair)) for pair in shown]
    listening: asyncio.Task[None] | None = None
    try:
        exit_code = await spawn(*streams, tty)
        for descriptor in theirs:
            os.close(descriptor)
        theirs = []
        listening = asyncio.create_task(_listen(ws, typed, lambda content: _set_size(terminal, content)))
        status = ended(await exit_code)
        # A command that left children holding its output does not hold its caller.
        await asyncio.wait(showing, timeout=1) if showing else None
    except (SandboxError, ConfigError, ApiError, ApiUnreachable) as error:
        status = failed(str(error))
    finally:
        for descriptor in [*theirs, null, *([terminal] if tty else [])]:
            os.close(descriptor)
        for task in [*showing, *([listening] if listening else [])]:
            task.cancel()
        await asyncio.gather(*showing, *([listening] if listening else []), return_exceptions=True)
        if typed is not None:
            typed.close()
    with contextlib.suppress(OSError):
        await ws.send_bytes(bytes([STATUS]) + orjson.dumps(status))
        await ws.close()
    return ws


async def attach(request: web.Request, sandbox: Sandbox, container: str, log: Path) -> web.WebSocketResponse:
    """Show a running container's output from now on; pass on stdin where the container has one."""
    ws = web.WebSocketResponse(protocols=PROTOCOLS, heartbeat=30)
    await ws.prepare(request)
    typed: _Input | None = None
    if _asked(request, "input", "stdin") and (descriptor := await sandbox.stdin(container)) is not None:
        typed = _Input(descriptor)
        await typed.open()

    async def show(channel: int, name: str) -> None:
        options = LogOptions(follow=True, tail=0, stream=name)
        async for block in stream(log, options, lambda: sandbox.running(container)):
            await ws.send_bytes(bytes([channel]) + block)

    showing = [asyncio.create_task(show(STDOUT, "Stdout")), asyncio.create_task(show(STDERR, "Stderr"))]
    listening = asyncio.create_task(_listen(ws, typed, lambda _: None))
    both = asyncio.gather(*showing)
    try:
        waited: list[asyncio.Future[Any]] = [both, listening]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        both.cancel()
        listening.cancel()
        await asyncio.gather(both, listening, return_exceptions=True)
    if not ws.closed:
        last = sandbox.last(container)
        with contextlib.suppress(OSError):
            await ws.send_bytes(bytes([STATUS]) + orjson.dumps(ended(last.code or 0 if last else 0)))
            await ws.close()
    return ws
