"""Liveness, readiness and startup probes of running containers.

`Tally` (pure) turns single results into verdicts by thresholds; `check` performs one probe. HTTP and
TCP probes are sent from the node's network namespace, whose address ambient lets through.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp

from meshlight.kube.resources import Object

KINDS = ("startup", "readiness", "liveness")
_BODY_SHOWN = 200
_EAGER, _EAGER_FOR = 0.5, 30.0
"""Seconds between looks at what has just started, and for how long."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When a probe runs and how many results in a row count. Seconds."""

    initial_delay: float
    period: float
    timeout: float
    successes: int
    failures: int

    @classmethod
    def of(cls, probe: Object) -> Timing:
        """A probe's timing with Kubernetes' defaults."""
        return cls(
            float(probe.get("initialDelaySeconds") or 0),
            float(probe.get("periodSeconds") or 10),
            float(probe.get("timeoutSeconds") or 1),
            int(probe.get("successThreshold") or 1),
            int(probe.get("failureThreshold") or 3),
        )


@dataclass(slots=True)
class Tally:
    """Results in a row, and the verdict that they led to."""

    successes: int
    failures: int
    verdict: bool | None = None
    _row: int = 0
    _last: bool | None = None

    def add(self, result: bool) -> bool | None:
        """Count one result; returns the verdict, which stays until enough results contradict it."""
        self._row = self._row + 1 if result == self._last else 1
        self._last = result
        if self._row >= (self.successes if result else self.failures):
            self.verdict = result
        return self.verdict


Execute = Callable[[list[str], float], Awaitable[tuple[int, str]]]
"""Runs a command in the container: (argv, timeout) to (exit code, output)."""


def port_number(port: object, container: Object) -> int:
    """A port by number or by a containerPort's name. Raises ValueError."""
    if isinstance(port, int) or str(port).isdigit():
        return int(str(port))
    for entry in container.get("ports") or []:
        if entry.get("name") == port:
            return int(entry["containerPort"])
    raise ValueError(f"couldn't find port: {port}")


async def check(
    probe: Object, container: Object, address: str, execute: Execute, http: aiohttp.ClientSession
) -> str:
    """Perform a probe once; returns why it failed, or an empty string."""
    limit = Timing.of(probe).timeout
    try:
        async with asyncio.timeout(limit):
            if (action := probe.get("exec")) is not None:
                code, output = await execute(list(action.get("command") or []), limit)
                said = output[:_BODY_SHOWN].strip() or f"command terminated with exit code {code}"
                return said if code else ""
            if (action := probe.get("httpGet")) is not None:
                return await http_get(action, container, address, http)
            if (action := probe.get("tcpSocket")) is not None:
                port = port_number(action["port"], container)
                _, writer = await asyncio.open_connection(action.get("host") or address, port)
                writer.close()
                return ""
            if (action := probe.get("grpc")) is not None:
                from meshlight.node import grpc_health  # few pods need it, and it brings HTTP/2 along

                return await grpc_health.check(address, int(action["port"]), action.get("service") or "")
            return "missing probe handler"
    except TimeoutError:
        return _timed_out(probe, container, address, limit)
    except (OSError, ValueError, aiohttp.ClientError) as error:
        return _broken(probe, container, address, error)


def _target(probe: Object, container: Object, address: str) -> tuple[str, str]:
    """What a probe asks: (URL of an httpGet or empty, HOST:PORT)."""
    action = probe.get("httpGet") or probe.get("tcpSocket") or probe.get("grpc") or {}
    try:
        where = f"{action.get('host') or address}:{port_number(action.get('port'), container)}"
    except ValueError:
        return "", ""
    if "httpGet" not in probe:
        return "", where
    path = str(action.get("path") or "/")
    return f"{str(action.get('scheme') or 'HTTP').lower()}://{where}/{path.lstrip('/')}", where


def _timed_out(probe: Object, container: Object, address: str, limit: float) -> str:
    url, where = _target(probe, container, address)
    if url:
        return f'Get "{url}": context deadline exceeded (Client.Timeout exceeded while awaiting headers)'
    if probe.get("exec") is not None:
        return f"command timed out after {limit:g}s"
    return f"dial tcp {where}: i/o timeout"


def _broken(probe: Object, container: Object, address: str, error: Exception) -> str:
    url, where = _target(probe, container, address)
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, ConnectionRefusedError) or "Connect call failed" in str(cause):
        words = f"dial tcp {where}: connect: connection refused"
    elif isinstance(error, aiohttp.ServerDisconnectedError):
        words = "EOF"
    else:
        words = str(error) or repr(error)
    return f'Get "{url}": {words}' if url else words


async def http_get(action: Object, container: Object, address: str, http: aiohttp.ClientSession) -> str:
    """An `httpGet` of a probe or hook; why it failed, or an empty string. Raises aiohttp.ClientError."""
    scheme = str(action.get("scheme") or "HTTP").lower()
    host = action.get("host") or address
    path = str(action.get("path") or "/")
    slash = "" if path.startswith("/") else "/"
    url = f"{scheme}://{host}:{port_number(action['port'], container)}{slash}{path}"
    headers = {"User-Agent": "kube-probe/1.32", "Accept": "*/*", "Connection": "close"}
    headers.update({h["name"]: h["value"] for h in action.get("httpHeaders") or []})
    tls: ssl.SSLContext | bool = scheme != "https"  # never verified, as documented
    async with http.get(url, headers=headers, allow_redirects=False, ssl=tls) as response:
        if 200 <= response.status < 400:
            return ""
        body = (await response.content.read(_BODY_SHOWN)).decode(errors="replace")
        return f"HTTP probe failed with statuscode: {response.status} {body}".strip()


@dataclass(slots=True)
class Health:
    """What the probes of one running container say."""

    started: bool
    ready: bool
    unhealthy: str = ""


class Prober:
    """Probes one running container until cancelled. `on_change` follows each change of `health`."""

    def __init__(
        self,
        container: Object,
        health: Health,
        perform: Callable[[Object], Awaitable[str]],
        failed: Callable[[str, str], None],
        on_change: Callable[[], None],
    ) -> None:
        self._container, self.health = container, health
        self._perform, self._failed, self._on_change = perform, failed, on_change
        self._poke = asyncio.Event()

    async def run(self) -> None:
        """The startup probe first; then liveness and readiness beside each other."""
        startup = self._container.get("startupProbe")
        if startup and not self.health.started and not await self._start(startup):
            return
        readiness, liveness = self._container.get("readinessProbe"), self._container.get("livenessProbe")
        if not self.health.started:
            self.health.started = True
            self._on_change()
        if not readiness and not self.health.ready:
            self.health.ready = True
            self._on_change()
        async with asyncio.TaskGroup() as group:
            if readiness:
                group.create_task(self._readiness(readiness))
            if liveness:
                group.create_task(self._liveness(liveness))

    async def _start(self, probe: Object) -> bool:
        timing = Timing.of(probe)
        tally = Tally(1, timing.failures)
        await asyncio.sleep(timing.initial_delay)
        counted = time.monotonic()
        while True:
            why = await self._once("Startup", probe)
            if not why:
                return True
            # Asked more often than its period, so that start-up is not rounded up; counted by its period.
            if time.monotonic() - counted >= timing.period:
                counted = time.monotonic()
                tally.add(False)
            if tally.verdict is False:
                self.health.unhealthy = "failed startup probe"
                self._on_change()
                return False
            await asyncio.sleep(min(timing.period, _EAGER))

    async def _readiness(self, probe: Object) -> None:
        timing = Timing.of(probe)
        tally = Tally(timing.successes, timing.failures, self.health.ready)
        await asyncio.sleep(timing.initial_delay)
        eager_until = time.monotonic() + _EAGER_FOR
        while True:
            ready = bool(tally.add(not await self._once("Readiness", probe)))
            if ready != self.health.ready:
                self.health.ready = ready
                self._on_change()
            if ready:
                eager_until = 0.0
            eager = time.monotonic() < eager_until
            await asyncio.sleep(min(timing.period, _EAGER) if eager else timing.period)

    async def _liveness(self, probe: Object) -> None:
        timing = Timing.of(probe)
        tally = Tally(1, timing.failures)
        await asyncio.sleep(timing.initial_delay)
        while True:
            if tally.add(not await self._once("Liveness", probe)) is False:
                self.health.unhealthy = "failed liveness probe"
                self._on_change()
                return
            await asyncio.sleep(timing.period)

    async def _once(self, kind: str, probe: Object) -> str:
        why = await self._perform(probe)
        if why:
            self._failed(kind, why)
        return why
