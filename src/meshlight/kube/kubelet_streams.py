"""Commands in pods and forwarded ports: WebSockets that the API server ties to the node of the pod.

Messages pass unread in both directions; the node's kubelet speaks the streaming protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import aiohttp
from aiohttp import WSMsgType, web

from meshlight.kube.kubelet_proxy import container_of, endpoint
from meshlight.kube.resources import Object
from meshlight.kube.status import StatusError, bad_request

SUBRESOURCES = {"exec": "exec", "attach": "attach", "portforward": "portForward"}
"""Subresources of pods, and the kubelet's path for each."""


def _path(subresource: str, pod: Object, asked: str | None) -> str:
    metadata = pod["metadata"]
    path = f"/{SUBRESOURCES[subresource]}/{metadata['namespace']}/{metadata['name']}"
    return path if subresource == "portforward" else f"{path}/{container_of(pod, asked)}"


async def serve(
    connections: aiohttp.ClientSession, request: web.Request, subresource: str, pod: Object, node: Object
) -> web.StreamResponse:
    """Tie a client's WebSocket to the kubelet's. Raises StatusError."""
    offered = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if p.strip()]
    if request.headers.get("Upgrade", "").lower() != "websocket" or not offered:
        raise bad_request(f"{subresource} is served over WebSockets: use kubectl 1.31 or newer")
    url = endpoint(node) + _path(subresource, pod, request.query.get("container"))
    try:
        upstream = await connections.ws_connect(
            url, params=request.query, protocols=offered, max_msg_size=0, heartbeat=30
        )
    except aiohttp.WSServerHandshakeError as error:
        raise StatusError(error.status, "BadRequest", await _why(connections, url, request)) from error
    except aiohttp.ClientError as error:
        message = f"the kubelet of node {node['metadata']['name']} does not answer: {error}"
        raise StatusError(503, "ServiceUnavailable", message) from error
    async with upstream:
        chosen = (upstream.protocol,) if upstream.protocol else ()
        client = web.WebSocketResponse(protocols=chosen, max_msg_size=0, heartbeat=30)
        await client.prepare(request)
        pumps = [
            asyncio.create_task(_pump(upstream, client)),
            asyncio.create_task(_pump(client, upstream)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            with contextlib.suppress(OSError, RuntimeError):
                await client.close()
    return client


async def _why(connections: aiohttp.ClientSession, url: str, request: web.Request) -> str:
    """The kubelet's own words: a refused handshake does not carry them."""
    try:
        async with connections.get(url, params=request.query) as answer:
            return (await answer.text()).strip()
    except aiohttp.ClientError as error:
        return str(error)


async def _pump(source: Any, target: Any) -> None:
    """Copy messages until either side is gone."""
    with contextlib.suppress(OSError, RuntimeError, aiohttp.ClientError):
        async for message in source:
            if message.type == WSMsgType.BINARY:
                await target.send_bytes(message.data)
            elif message.type == WSMsgType.TEXT:
                await target.send_str(message.data)
