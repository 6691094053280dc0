"""How the command line speaks with a running cluster's supervisor: one JSON line each way over a unix socket.

The socket is `supervisor.sock` of the state directory, for its owner only. Paths may be longer than a socket
address allows, hence the way through a descriptor of the folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meshlight.refusal import Refusal

SOCKET = "supervisor.sock"
_LINE = 1 << 20
_TIMEOUT = 30.0

Message = dict[str, Any]


class ControlError(Refusal):
    """The supervisor refused, or is not there; the message says why."""


@contextmanager
def _short(state: Path) -> Iterator[str]:
    """The socket's path in few characters."""
    folder = os.open(state, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{SOCKET}"
    finally:
        os.close(folder)


async def serve(state: Path, obey: Callable[[Message], Awaitable[Message]]) -> asyncio.Server:
    """Listen; `obey` answers a request or raises ControlError. Raises OSError."""

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await obey(json.loads(await reader.readline()))
        except (ControlError, ValueError, KeyError) as error:
            answer = {"error": str(error)}
        try:
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except ConnectionError:
            pass  # who asked did not wait
        finally:
            writer.close()

    (state / SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short(state) as path:
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
    return await asyncio.start_unix_server(conversation, sock=listener, limit=_LINE)


def peer(state: Path) -> int:
    """The pid, as we see it, of the supervisor that listens for this state directory; 0 if there is none."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream, _short(state) as path:
            stream.settimeout(_TIMEOUT)
            stream.connect(path)
            pid, _, _ = struct.unpack("3i", stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return int(pid)
    except OSError:
        return 0


def ask(state: Path, request: Message) -> Message:
    """Ask the supervisor of a running cluster. Raises ControlError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream, _short(state) as path:
            stream.settimeout(_TIMEOUT)
            stream.connect(path)
            stream.sendall(json.dumps(request).encode() + b"\n")
            with stream.makefile("rb") as answers:
                answer: Message = json.loads(answers.readline(_LINE))
    except (OSError, ValueError) as error:
        raise ControlError(f"the supervisor does not answer at {state / SOCKET}: {error}") from None
    if "error" in answer:
        raise ControlError(str(answer["error"]))
    return answer
