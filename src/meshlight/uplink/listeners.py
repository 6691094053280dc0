"""Loopback listeners of the machine for exposed Services: opened by the outlet, served from the fabric.

Watch-driven: a port appears on the machine when its Service has an address, and goes with it. What is
open is written to `listeners.json` in the state directory, for the command line and for the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshlight.controllers.workqueue import log
from meshlight.kube.resources import Object
from meshlight.uplink import relay
from meshlight.uplink.datagrams import Datagrams
from meshlight.uplink.exposure import FILE, Exposed, ExposureError, Wish, candidates, remembered, wishes
from meshlight.uplink.machine import Machine

LOOPBACK = "127.0.0.1"
CONNECT_TIMEOUT = 10.0
_RETRY = 5.0

Report = Callable[[Object, str, str], None]
"""Tell users of a Service: (Service, reason, message)."""


@dataclass(slots=True)
class _Open:
    """A listener as it is open now."""

    wish: Wish
    number: int
    task: asyncio.Task[None]


class Listeners:
    """Keeps the machine's listeners in step with Services."""

    def __init__(self, machine: Machine, state: Path, report: Report) -> None:
        self._machine, self._path, self._report = machine, state / FILE, report
        self._wanted: dict[Exposed, Wish] = {}
        self._services: dict[tuple[str, str], Object] = {}
        self._open: dict[Exposed, _Open] = {}
        self._numbers = self._read()
        self._changed = asyncio.Event()
        machine.on_arrival(self._changed.set)

    def _read(self) -> dict[Exposed, int]:
        try:
            return remembered(json.loads(self._path.read_text())["listeners"])
        except (OSError, ValueError, KeyError):
            return {}

    def service(self, obj: Object, deleted: bool) -> None:
        """A Service changed."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        found: dict[Exposed, Wish] = {}
        if deleted:
            self._services.pop(key, None)
        else:
            self._services[key] = obj
            try:
                found = wishes(obj)
            except ExposureError as error:
                self._report(obj, "NotExposed", f"annotation meshlight.io/expose: {error}")
        before = {k: w for k, w in self._wanted.items() if (k.namespace, k.service) == key}
        if found != before:
            for gone in before.keys() - found.keys():
                del self._wanted[gone]
            self._wanted |= found
            self._changed.set()

    async def run(self) -> None:
        """Open and close until cancelled."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                if not await self._settle():
                    # Something took the number, or the outlet is away: its arrival wakes us sooner.
                    asyncio.get_running_loop().call_later(_RETRY, self._changed.set)
        finally:
            for item in self._open.values():
                item.task.cancel()

    async def _settle(self) -> bool:
        for key in [k for k, o in self._open.items() if self._wanted.get(k) != o.wish or o.task.done()]:
            item = self._open.pop(key)
            item.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await item.task
        complete = True
        for key, wish in sorted(self._wanted.items()):
            if key not in self._open:
                complete = await self._expose(key, wish) and complete
        self._write()
        return complete or not self._machine.reachable

    async def _expose(self, key: Exposed, wish: Wish) -> bool:
        taken = {o.number for k, o in self._open.items() if k.protocol == key.protocol}
        others = (k for k in self._numbers if k != key and k in self._wanted and k.protocol == key.protocol)
        reserved = {self._numbers[k] for k in others}
        protocol = "udp" if key.protocol == "UDP" else "tcp"
        for number in candidates(wish, self._numbers.get(key, 0), taken | reserved):
            try:
                listener = await self._machine.socket("listen", protocol, LOOPBACK, number)  # type: ignore[arg-type]
            except OSError as error:
                fault = error
                continue
            actual = listener.getsockname()[1]
            serve = (
                self._streams(listener, wish, key)
                if protocol == "tcp"
                else self._datagrams(listener, wish, key)
            )
            self._open[key] = _Open(wish, actual, asyncio.create_task(serve))
            self._numbers[key] = actual
            log("info", "exposed", service=key.text, address=f"{LOOPBACK}:{actual}", target=wish.target)
            service = self._services.get((key.namespace, key.service))
            if service is not None:
                message = f"Port {key.port}/{key.protocol} is at {LOOPBACK}:{actual} of this machine"
                self._report(service, "Exposed", message)
            return True
        if self._machine.reachable:
            log("warning", "not exposed", service=key.text, error=str(fault))
        return False

    def _write(self) -> None:
        listeners = [
            {
                "namespace": key.namespace,
                "service": key.service,
                "port": key.port,
                "protocol": key.protocol,
                "name": item.wish.name,
                "target": item.wish.target,
                "address": LOOPBACK,
                "hostPort": item.number,
            }
            for key, item in sorted(self._open.items())
        ]
        text = json.dumps({"listeners": listeners}, indent=2) + "\n"
        if not self._path.exists() or self._path.read_text() != text:
            temporary = self._path.with_suffix(".new")
            temporary.write_text(text)
            temporary.replace(self._path)

    async def _streams(self, listener: socket.socket, wish: Wish, key: Exposed) -> None:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        with listener:
            try:
                while True:
                    try:
                        stream, _ = await loop.sock_accept(listener)
                    except OSError as error:
                        log("warning", "connection not accepted", service=key.text, error=str(error))
                        await asyncio.sleep(0.1)
                        continue
                    task = asyncio.create_task(_carry(stream, wish.target, key.port))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            finally:
                for task in tasks:
                    task.cancel()

    async def _datagrams(self, listener: socket.socket, wish: Wish, key: Exposed) -> None:
        with listener:
            await Datagrams(listener, (wish.target, key.port)).run()


async def _carry(stream: socket.socket, address: str, port: int) -> None:
    """Join a connection of the machine to the Service's address; a refusal is passed on as a reset."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    onward = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await asyncio.get_running_loop().sock_connect(onward, (address, port))
    except (OSError, TimeoutError):
        onward.close()
        relay.linger(stream)
        stream.close()
        return
    await relay.join(stream, onward)
