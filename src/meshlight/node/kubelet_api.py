"""The kubelet's HTTPS API of a node: what runs here, containers' logs, commands and ports.

Only the API server may ask: clients present a certificate of the cluster's CA with group `system:masters`.
"""

from __future__ import annotations

import functools
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
from aiohttp import web

from meshlight.kube.resources import Object
from meshlight.node import portforward, streaming
from meshlight.node.containers import ContainerState
from meshlight.node.logfile import LogOptions, stream
from meshlight.node.runtime import Sandbox, SandboxError
from meshlight.node.usage import UsageMeter, exposition, summary
from meshlight.node.worker import PodWorker

MASTERS = "system:masters"


@dataclass(frozen=True, slots=True)
class Target:
    """A container of this node: its pod's worker, the log of the attempt, and whether that still grows."""

    worker: PodWorker
    container: str
    log: Path
    running: Callable[[], bool]


def _running(state: ContainerState, attempt: int) -> bool:
    return any(run.attempt == attempt and not run.finished for run in state.runs)


class KubeletApi:
    """Serves the node's API over its workers, which are keyed by pod uid."""

    def __init__(self, node: str, workers: Mapping[str, PodWorker]) -> None:
        self._node, self._workers = node, workers
        self._meter = UsageMeter(workers)

    async def serve(
        self, address: tuple[str, int], certificate: Path, key: Path, authority: Path
    ) -> web.AppRunner:
        """Listen at (address, port); the caller cleans the runner up."""
        app = web.Application(middlewares=[_masters_only])
        app.router.add_get("/healthz", self._healthy)
        app.router.add_get("/pods", self._list)
        app.router.add_get("/stats/summary", self._stats)
        app.router.add_get("/metrics/resource", self._metrics)
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        app.router.add_get("/exec/{namespace}/{pod}/{container}", self._exec)
        app.router.add_get("/attach/{namespace}/{pod}/{container}", self._attach)
        app.router.add_get("/portForward/{namespace}/{pod}", self._forward)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, *address, ssl_context=context).start()
        return runner

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _list(self, _: web.Request) -> web.Response:
        items = [worker.pod for worker in self._workers.values()]
        body = {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}
        return web.Response(body=orjson.dumps(body), content_type="application/json")

    async def _summary(self) -> Object:
        return summary(self._node, self._workers, await self._meter.measure(), time.time())

    async def _stats(self, _: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(await self._summary()), content_type="application/json")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=exposition(await self._summary()))

    def _worker(self, request: web.Request) -> PodWorker:
        wanted = (request.match_info["namespace"], request.match_info["pod"])
        for worker in self._workers.values():
            metadata = worker.pod["metadata"]
            if (metadata.get("namespace"), metadata["name"]) == wanted:
                return worker
        raise web.HTTPNotFound(text=f'pod "{wanted[1]}" not found on this node')

    def _target(self, request: web.Request, previous: bool = False) -> Target:
        worker, container = self._worker(request), request.match_info["container"]
        state = worker.containers.get(container)
        pod = worker.pod["metadata"]["name"]
        if state is None or state.last is None:
            why = (state.waiting_message or state.waiting) if state else ""
            text = f'container "{container}" in pod "{pod}" is waiting to start: {why or "ContainerCreating"}'
            raise web.HTTPBadRequest(text=text)
        if previous and len(state.runs) < 2:
            text = f'previous terminated container "{container}" in pod "{pod}" not found'
            raise web.HTTPBadRequest(text=text)
        attempt = state.runs[-2 if previous else -1].attempt
        path = worker.node.log_path(worker.uid, container, attempt)
        return Target(worker, container, path, functools.partial(_running, state, attempt))

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        target = self._target(request, request.query.get("previous") in ("true", "1"))
        try:
            options = LogOptions.of(request.query.items(), time.time())
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        async for block in stream(target.log, options, target.running):
            await response.write(block)
        await response.write_eof()
        return response

    def _sandbox(self, worker: PodWorker) -> Sandbox:
        if worker.sandbox is None or not worker.sandbox.alive:
            raise web.HTTPNotFound(text=f'pod "{worker.pod["metadata"]["name"]}" is not running')
        return worker.sandbox

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        target = self._target(request)
        sandbox, execution = self._sandbox(target.worker), target.worker.execution
        argv = request.query.getall("command", [])
        if not argv:
            raise web.HTTPBadRequest(text="you must specify at least one command for the container")
        if not target.running():
            raise web.HTTPNotFound(text=f'container "{target.container}" is not running')

        async def spawn(stdin: int, stdout: int, stderr: int, tty: bool) -> Awaitable[int]:
            return await execution.spawn(sandbox, target.container, argv, stdin, stdout, stderr, tty)

        try:
            return await streaming.execute(request, spawn, lambda: sandbox.terminal(target.container))
        except SandboxError as error:
            raise web.HTTPBadRequest(text=str(error)) from error

    async def _attach(self, request: web.Request) -> web.StreamResponse:
        target = self._target(request)
        return await streaming.attach(request, self._sandbox(target.worker), target.container, target.log)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        return await portforward.serve(request, self._sandbox(self._worker(request)))


@web.middleware
async def _masters_only(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    transport = request.transport
    certificate = transport.get_extra_info("peercert") if transport else None
    attributes = [pair for rdn in (certificate or {}).get("subject", ()) for pair in rdn]
    if ("organizationName", MASTERS) not in attributes:
        return web.Response(status=403, text="only the API server may ask a kubelet")
    return await handler(request)
