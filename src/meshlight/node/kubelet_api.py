"""The kubelet's HTTPS API of a node: logs of containers and what runs here.

Only the API server may ask: clients present a certificate of the cluster's CA with group `system:masters`.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import orjson
from aiohttp import web

from meshlight.kube.resources import Object

PORT = 10250
MASTERS = "system:masters"
_FOLLOW = 0.1
"""Seconds between looks at a followed log."""
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What of a log is wanted: `since` in seconds of the epoch, `tail` lines from the end (-1: all)."""

    follow: bool = False
    timestamps: bool = False
    since: float = 0.0
    tail: int = -1
    limit: int = -1

    @classmethod
    def of(cls, query: Iterable[tuple[str, str]], now: float) -> LogOptions:
        """From a request's query. Raises ValueError naming the option."""
        given = dict(query)

        def number(key: str) -> int | None:
            if key not in given:
                return None
            if not given[key].isdigit():
                raise ValueError(f"{key} must be a number of at least 0, not {given[key]!r}")
            return int(given[key])

        since = 0.0
        if (seconds := number("sinceSeconds")) is not None:
            since = now - seconds
        elif "sinceTime" in given:
            since = datetime.fromisoformat(given["sinceTime"].replace("Z", "+00:00")).timestamp()
        tail, limit = number("tailLines"), number("limitBytes")
        return cls(
            given.get("follow") in ("true", "1"),
            given.get("timestamps") in ("true", "1"),
            since,
            -1 if tail is None else tail,
            -1 if limit is None else limit,
        )


def decode(line: bytes, options: LogOptions) -> bytes:
    """What a reader sees of a CRI line (`TIME STREAM TAG TEXT`); empty when it is too old.

    A partial line (tag P) has no line end of its own.
    """
    stamp, _, rest = line.partition(b" ")
    _, _, rest = rest.partition(b" ")
    tag, _, text = rest.partition(b" ")
    if options.since and _seconds(stamp) < options.since:
        return b""
    shown = stamp + b" " + text if options.timestamps else text
    return shown if tag == b"P" else shown + b"\n"


def _seconds(stamp: bytes) -> float:
    try:
        whole, _, fraction = stamp.decode().rstrip("Z").partition(".")
        return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")
    except ValueError:
        return 0.0


def rotated(path: Path) -> list[Path]:
    """The files of an attempt's log, oldest first."""
    older = path.with_name(path.name + ".1")
    return [p for p in (older, path) if p.exists()]


def kept(files: list[Path], options: LogOptions) -> Iterator[bytes]:
    """Decoded lines of what is there already."""
    lines: list[bytes] = []
    for file in files:
        lines += file.read_bytes().splitlines()
    if options.tail >= 0:
        lines = lines[len(lines) - min(options.tail, len(lines)) :]
    for line in lines:
        if shown := decode(line, options):
            yield shown


async def stream(path: Path, options: LogOptions, running: Callable[[], bool]) -> AsyncIterator[bytes]:
    """The log as a reader wants it; when followed, until the container has ended."""
    left = options.limit
    offset = _size(path)
    for shown in kept(rotated(path), options):
        if left >= 0:
            shown, left = shown[:left], left - len(shown[:left])
        yield shown
        if left == 0:
            return
    if not options.follow:
        return
    rest = b""
    while True:
        alive = running()
        if _size(path) < offset:
            offset = 0  # rotated
        chunk = _read(path, offset)
        offset += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if shown := decode(line, options):
                yield shown
        if not chunk:
            if not alive:
                return
            await asyncio.sleep(_FOLLOW)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(path: Path, offset: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_CHUNK)


@dataclass(frozen=True, slots=True)
class LoggedContainer:
    """Where a container's log is, and whether it still grows."""

    path: Path
    running: Callable[[], bool]


Find = Callable[[str, str, str, bool], LoggedContainer | str]
"""(namespace, pod, container, previous) to the log, or why there is none."""


class KubeletApi:
    """Serves the node's API."""

    def __init__(self, find: Find, pods: Callable[[], list[Object]]) -> None:
        self._find, self._pods = find, pods

    async def serve(self, address: str, certificate: Path, key: Path, authority: Path) -> web.AppRunner:
        """Listen; the caller cleans the runner up."""
        app = web.Application(middlewares=[_masters_only])
        app.router.add_get("/healthz", self._healthy)
        app.router.add_get("/pods", self._list)
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, address, PORT, ssl_context=context).start()
        return runner

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _list(self, _: web.Request) -> web.Response:
        body = {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self._pods()}
        return web.Response(body=orjson.dumps(body), content_type="application/json")

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        part = request.match_info
        previous = request.query.get("previous") in ("true", "1")
        found = self._find(part["namespace"], part["pod"], part["container"], previous)
        if isinstance(found, str):
            return web.Response(status=404, text=found)
        try:
            options = LogOptions.of(request.query.items(), time.time())
        except ValueError as error:
            return web.Response(status=400, text=str(error))
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        async for chunk in stream(found.path, options, found.running):
            await response.write(chunk)
        await response.write_eof()
        return response


@web.middleware
async def _masters_only(
    request: web.Request, handler: Callable[[web.Request], object]
) -> web.StreamResponse:  # fmt: skip
    transport = request.transport
    certificate = transport.get_extra_info("peercert") if transport else None
    attributes = [pair for rdn in (certificate or {}).get("subject", ()) for pair in rdn]
    if ("organizationName", MASTERS) not in attributes:
        return web.Response(status=403, text="only the API server may ask a kubelet")
    return await handler(request)  # type: ignore[misc,no-any-return]
