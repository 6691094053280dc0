"""istiod's HTTP side: readiness, metrics, and what it knows of its clients, on 15014 and 8080.

Debug pages tell names and addresses of the whole mesh. They are given to loopback (a port-forward
ends there) and to callers with a token of a service account of the root namespace, as in Istio.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

import meshlight
from meshlight.controlplane import debug_pages
from meshlight.controlplane.discovery import Discovery
from meshlight.controlplane.identity import IdentityError, TokenReviewer, bearer_token
from meshlight.controlplane.metrics import Metrics

Missing = Callable[[], list[str]]
"""What readiness still waits for; empty when ready."""


def probe_application(missing: Missing) -> web.Application:
    """`/ready` alone, for the pod's probe port."""
    application = web.Application()
    application.router.add_get("/ready", _ready(missing))
    return application


def application(
    discovery: Discovery, metrics: Metrics, missing: Missing, reviewer: TokenReviewer, root_namespace: str
) -> web.Application:
    """Everything of the monitoring port."""
    pages = debug_pages.pages(discovery)

    async def metrics_page(_: web.Request) -> web.Response:
        return web.Response(
            body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def version(_: web.Request) -> web.Response:
        return web.Response(text=f"{meshlight.__version__}-meshlight\n")

    async def index(_: web.Request) -> web.Response:
        return _json(sorted(pages))

    def guarded(page: debug_pages.Page) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            if not _from_loopback(request):
                try:
                    caller = await reviewer.review(bearer_token(request.headers.get("Authorization")))
                except IdentityError as error:
                    raise web.HTTPUnauthorized(text=f"{error}\n") from error
                if caller.service_account.namespace != root_namespace:
                    raise web.HTTPForbidden(text=f"only service accounts of {root_namespace} may read this\n")
            try:
                return _json(page(request.query))
            except debug_pages.NoSuchProxy as error:
                raise web.HTTPNotFound(text=f"{error}\n") from error

        return handle

    result = web.Application()
    result.router.add_get("/ready", _ready(missing))
    result.router.add_get("/metrics", metrics_page)
    result.router.add_get("/version", version)
    result.router.add_get("/debug", index)
    result.router.add_get("/debug/list", index)
    for path, page in pages.items():
        result.router.add_get(path, guarded(page))
    return result


async def listen(app: web.Application, host: str, port: int) -> web.AppRunner:
    """Serve an application on a TCP port; close with `cleanup()`. Raises OSError."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner


def _ready(missing: Missing) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def ready(_: web.Request) -> web.Response:
        if waits := missing():
            return web.Response(status=503, text=f"not ready, waiting for: {', '.join(waits)}\n")
        return web.Response(text="ready\n")

    return ready


def _from_loopback(request: web.Request) -> bool:
    try:
        return ipaddress.ip_address((request.remote or "").partition("%")[0]).is_loopback
    except ValueError:
        return False


def _json(content: Any) -> web.Response:
    body = orjson.dumps(content, option=orjson.OPT_INDENT_2)
    return web.Response(body=body, content_type="application/json")
