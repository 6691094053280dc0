"""istiod's HTTP side: readiness, metrics, and what it knows of its clients, on 15014 and 8080.

Debug pages tell names and addresses of the whole mesh. They are given to loopback (a port-forward
ends there) and to callers with a token of a service account of the root namespace, as in Istio.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from aiohttp import web
from google.protobuf.json_format import MessageToDict

import meshlight
from meshlight.controlplane.discovery import Connection, Discovery, short_name
from meshlight.controlplane.identity import IdentityError, TokenReviewer, bearer_token
from meshlight.controlplane.metrics import Metrics
from meshlight.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE

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
    pages: Mapping[str, Callable[[], Any]] = {
        "/debug/syncz": lambda: [_sync_status(c) for c in _ordered(discovery)],
        "/debug/connections": lambda: {
            "totalClients": len(discovery.connections),
            "clients": [_client(c) for c in _ordered(discovery)],
        },
        "/debug/workloadz": lambda: _addresses(discovery, "workload"),
        "/debug/servicez": lambda: _addresses(discovery, "service"),
        "/debug/authorizationz": lambda: _policies(discovery),
    }

    async def metrics_page(_: web.Request) -> web.Response:
        return web.Response(
            body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def version(_: web.Request) -> web.Response:
        return web.Response(text=f"{meshlight.__version__}-meshlight\n")

    async def index(_: web.Request) -> web.Response:
        return _json(sorted(pages))

    def guarded(page: Callable[[], Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            if not _from_loopback(request):
                try:
                    caller = await reviewer.review(bearer_token(request.headers.get("Authorization")))
                except IdentityError as error:
                    raise web.HTTPUnauthorized(text=f"{error}\n") from error
                if caller.service_account.namespace != root_namespace:
                    raise web.HTTPForbidden(text=f"only service accounts of {root_namespace} may read this\n")
            return _json(page())

        return handle

    result = web.Application()
    result.router.add_get("/ready", _ready(missing))
    result.router.add_get("/metrics", metrics_page)
    result.router.add_get("/version", version)
    result.router.add_get("/debug", index)
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


def _ordered(discovery: Discovery) -> list[Connection]:
    return sorted(discovery.connections, key=lambda c: (c.session.proxy.id, c.session.id))


def _time(unix: float) -> str:
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).isoformat().replace("+00:00", "Z")


def _sync_status(connection: Connection) -> dict[str, Any]:
    """As Istio's syncz, with the acknowledgement's verdict beside its nonces."""
    session = connection.session
    statuses = {}
    for type_url, subscription in session.subscriptions.items():
        state = subscription.acknowledgement
        status: dict[str, Any] = {"status": state.status, "sent": state.sent_nonce, "acked": state.acked_nonce}
        if state.sent_at:
            status["sentTime"] = _time(state.sent_at)
        if state.last_error:
            status["lastError"] = state.last_error
        if state.rejected_responses:
            status["rejected"] = state.rejected_responses
        statuses[short_name(type_url)] = status
    return {
        "cluster_id": session.proxy.cluster,
        "proxy": session.proxy.name,
        "proxy_type": session.proxy.id.partition("~")[0],
        "istio_version": session.proxy.version,
        "node": session.proxy.node,
        "resources": statuses,
    }


def _client(connection: Connection) -> dict[str, Any]:
    session = connection.session
    return {
        "connectionId": f"{session.proxy.name}-{session.id}",
        "connectedAt": _time(connection.connected_at),
        "address": connection.peer,
        "watches": {
            short_name(url): subscription.names() for url, subscription in session.subscriptions.items()
        },
    }


def _addresses(discovery: Discovery, kind: str) -> list[Any]:
    found = []
    for resource in discovery.index.collections[ADDRESS_TYPE]:
        message: Any = resource.message
        if message.HasField(kind):
            found.append({"name": resource.name, "version": resource.version, **_dict(message)[kind]})
    return found


def _policies(discovery: Discovery) -> dict[str, Any]:
    """Policies as the node proxies have them, and what became of each AuthorizationPolicy."""
    return {
        "policies": [_dict(resource.message) for resource in discovery.index.collections[AUTHORIZATION_TYPE]],
        "findings": [
            {"policy": str(policy.key), "path": finding.path, "message": finding.message}
            for policy in discovery.index.policies.compiled()
            for finding in policy.findings
        ],
    }


def _dict(message: Any) -> dict[str, Any]:
    """A message as JSON, its packed addresses as people write them."""
    readable: dict[str, Any] = _readable(MessageToDict(message))
    return readable


def _readable(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _readable(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable(item, name) for item in value]
    if name in ("addresses", "address") and isinstance(value, str):
        return _address_text(value)
    return value


def _address_text(encoded: str) -> str:
    return str(ipaddress.ip_address(base64.b64decode(encoded)))
