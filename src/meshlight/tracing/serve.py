"""A tracing server: a store, the receivers in front of it and the query APIs behind, each on its port."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from meshlight.tracing import (
    api_v3,
    flows,
    grpc_services,
    http_receivers,
    internal_api,
    pages,
    query_api,
    sampling,
)
from meshlight.tracing.intake import Intake
from meshlight.tracing.logs import report
from meshlight.tracing.measures import Measures
from meshlight.tracing.query import Traces
from meshlight.tracing.remote import Cluster
from meshlight.tracing.settings import Settings
from meshlight.tracing.storage import Storage, TraceStore
from meshlight.tracing.store.blocks import Damaged


class _Arrivals:
    """Wakes those who follow flow records when some came."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self) -> None:
        """Return when something came, or after ten seconds (records of other stores make no noise here)."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                await self._event.wait()


class _Notified(Intake):
    arrivals: _Arrivals

    async def take(self, protocol: str, transport: str, body: bytes) -> Any:
        decoded = await Intake.take(self, protocol, transport, body)
        if "logs" in protocol:
            self.arrivals.notify()
        return decoded


class Server:
    """Everything of one process; `ports` tells the ports in use once it is running."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.measures = Measures()
        self.storage: Storage | None = None
        self.ready = False
        self._arrivals = _Arrivals()
        self._runners: list[web.AppRunner] = []
        self._servers: list[Any] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        """Open the store and listen. Raises OSError, Damaged, SettingsError, StrategyError."""
        settings = self.settings
        strategies = sampling.Strategies(sampling.probabilistic(settings.sampling_rate))
        if settings.sampling_file is not None:
            strategies = sampling.read(settings.sampling_file)
        async with contextlib.AsyncExitStack() as stack:
            store: TraceStore
            if settings.peers:
                store = await stack.enter_async_context(Cluster(settings.peers))
            else:
                self.storage = store = Storage(
                    settings.storage, settings.retention, report, settings.max_traces
                )
                await self.storage.open()
                stack.push_async_callback(self.storage.close)
            stack.push_async_callback(self._stop)
            await self._listen(store, strategies)
            self.ready = True
            report(
                "tracing server is ready",
                level="info",
                ports=settings.ports,
                storage=str(settings.storage or "memory"),
            )
            yield self

    async def _listen(self, store: TraceStore, strategies: sampling.Strategies) -> None:
        intake = _Notified(store, self.measures)
        intake.arrivals = self._arrivals
        traces = Traces(store)
        ports = self.settings.ports
        zipkin, otlp, jaeger, samples, query, admin, health = (http_receivers.application() for _ in range(7))
        http_receivers.add_zipkin(zipkin, intake)
        api_v3.add_zipkin_query(zipkin, traces, self.measures)
        zipkin.router.add_get("/health", self._health)
        http_receivers.add_otlp(otlp, intake)
        http_receivers.add_jaeger(jaeger, intake)
        sampling.add_sampling(samples, strategies, "/", "/sampling")
        sampling.add_sampling(jaeger, strategies, "/api/sampling")
        query_api.add_query_api(query, traces, self.measures)
        api_v3.add_api_v3(query, traces, self.measures)
        flows.add_flows(query, traces, self.measures, self._arrivals.wait)
        pages.add_pages(query, traces)
        internal_api.add_internal(query, intake, store)
        for app in (query, admin):
            app.router.add_get("/metrics", self._metrics)
        for path in ("/", "/ready", "/health", "/status"):
            admin.router.add_get(path, self._health)
            health.router.add_get(path, self._health)
        self._add_operations(admin)
        for name, app in (
            ("zipkin", zipkin), ("otlp-http", otlp), ("jaeger-http", jaeger), ("sampling", samples),
            ("query", query), ("admin", admin), ("health", health),
        ):  # fmt: skip
            if ports[name]:
                await self._site(app, ports[name])
        receivers = grpc_services.otlp_receivers(intake)
        jaeger_receivers = grpc_services.jaeger_receivers(intake, strategies)
        for name, handlers in (
            ("otlp-grpc", receivers), ("jaeger-grpc", jaeger_receivers),
            ("query-grpc", grpc_services.query_services(traces)),
        ):  # fmt: skip
            if ports[name]:
                self._servers.append(
                    await grpc_services.listen(f"{self.settings.host or '[::]'}:{ports[name]}", handlers)
                )

    async def _site(self, app: web.Application, port: int) -> None:
        # Bodies are unpacked by intake.unpacked, which bounds them.
        runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=2)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, self.settings.host or None, port).start()

    async def _stop(self) -> None:
        self.ready = False
        for runner in self._runners:
            await runner.cleanup()
        for server in self._servers:
            await server.stop(1)

    async def _health(self, _: web.Request) -> web.Response:
        status = 200 if self.ready else 503
        body = {"status": "Server available" if self.ready else "starting"}
        return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")

    async def _metrics(self, _: web.Request) -> web.Response:
        if self.storage is not None:
            for collection in self.storage.collections:
                name = collection.name
                self.measures.records.labels(name).set(collection.records)
                self.measures.bytes.labels(name).set(collection.bytes)
                self.measures.parts.labels(name).set(len(collection.parts))
                self.measures.pending.labels(name).set(collection.pending)
                self.measures.expired.labels(name).set(collection.counters.expired)
                self.measures.damaged.labels(name).set(collection.counters.damaged)
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self.measures.exposition(), headers=headers)

    def _add_operations(self, admin: web.Application) -> None:
        """POST /backup and /restore with `dir`, a folder of this machine; from loopback only."""

        async def run(request: web.Request, verb: str) -> web.Response:
            if request.remote not in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
                return web.Response(status=403, text="only from this machine\n")
            if self.storage is None:
                return web.Response(status=409, text="this server keeps nothing itself: ask its stores\n")
            folder = request.query.get("dir", "")
            if not folder.startswith("/"):
                return web.Response(status=400, text="dir must be an absolute path\n")
            try:
                work = self.storage.backup if verb == "backup" else self.storage.restore
                records = await work(Path(folder))
            except (OSError, Damaged) as error:
                return web.Response(status=409, text=f"{error}\n")
            return web.Response(
                body=orjson.dumps({"records": records, "dir": folder}), content_type="application/json"
            )

        async def backup(request: web.Request) -> web.Response:
            return await run(request, "backup")

        async def restore(request: web.Request) -> web.Response:
            return await run(request, "restore")

        admin.router.add_post("/backup", backup)
        admin.router.add_post("/restore", restore)
