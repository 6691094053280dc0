"""Connects node agents to the machine's own network, as for pulling images from a registry of the user's.

Only processes of the cluster that are root in it see the socket; pods have a /run of their own.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from typing import Any

from meshlight.controllers.workqueue import log
from meshlight.node import dialing
from meshlight.uplink.machine import Machine

_BACKLOG = 32


class Dialer:
    """Serves until cancelled."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def run(self) -> None:
        """Answer one question a connection. Raises OSError when the socket cannot be made."""
        dialing.SOCKET.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
            before = os.umask(0o177)
            try:
                listener.bind(str(dialing.SOCKET))
            finally:
                os.umask(before)
            listener.listen(_BACKLOG)
            async with asyncio.TaskGroup() as group:
                while True:
                    link, _ = await loop.sock_accept(listener)
                    group.create_task(self._answer(link))

    async def _answer(self, link: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with link:
            try:
                question: Any = json.loads(await loop.sock_recv(link, dialing.PACKET))
                host, port = str(question["host"]), int(question["port"])
            except (OSError, ValueError, KeyError, TypeError):
                return
            try:
                with await self._machine.socket("connect", "tcp", host, port) as made:
                    socket.send_fds(link, [b"{}"], [made.fileno()])
            except OSError as error:
                log("warning", "machine not dialled", host=host, port=port, error=str(error))
                number = error.errno or errno.EIO
                answer = {"error": number, "text": error.strerror or os.strerror(number)}
                try:
                    await loop.sock_sendall(link, json.dumps(answer).encode())
                except OSError:
                    return
