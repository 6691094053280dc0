"""One HTTP request to a port of a pod, through the API server: how programs' loopback pages are read.

The client's half of `kubectl port-forward` (SPDY/3.1 frames in a WebSocket), so that it works the same on
an embedded and on a real cluster (Kubernetes 1.31 and later), and needs no way into the pods' network.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp

from meshlight.kube import spdy
from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import PODS
from meshlight.refusal import Refusal

PROTOCOL = "SPDY/3.1+portforward.k8s.io"
_ERRORS, _CONTENT = 1, 3
_LIMIT = 256 << 20
_PIECE = 32 << 10
_NAMES = {_ERRORS: "error", _CONTENT: "data"}


class ForwardError(Refusal):
    """A port of a pod could not be reached, or answered something else than the page."""


async def fetch(
    client: Client,
    namespace: str,
    pod: str,
    port: int,
    path: str,
    *,
    method: str = "GET",
    seconds: float = 15,
) -> bytes:
    """The body of a page at 127.0.0.1:`port` of a pod.

    Raises ForwardError, ApiError (no such pod, not allowed) and ApiUnreachable.
    """
    request = f"{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode()
    where = f"{namespace}/{pod}:{port}"
    try:
        async with asyncio.timeout(seconds):
            answer = await _exchange(client, f"{PODS.path(namespace, pod)}/portforward", port, request)
    except TimeoutError:
        raise ForwardError(f"{where} did not answer within {seconds:.0f} s") from None
    except aiohttp.WSServerHandshakeError as error:
        if error.status in (401, 403, 404):
            raise ApiError(error.status, error.message, f"port-forward to {where}: {error.message}") from error
        raise ForwardError(f"port-forward to {where} refused: {error.status} {error.message}") from error
    except aiohttp.ClientError as error:
        raise ApiUnreachable(f"{client.server} cannot be reached: {error}") from error
    head, separator, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].decode(errors="replace").split(" ", 2)
    if not separator or len(status) < 2 or not status[1].isdigit():
        raise ForwardError(f"{where}{path} answered no HTTP")
    if not 200 <= int(status[1]) < 300:
        words = body.decode(errors="replace").strip()[:200]
        raise ForwardError(f"{where}{path} answered {' '.join(status[1:])}: {words}")
    return body


async def _exchange(client: Client, path: str, port: int, request: bytes) -> bytes:
    received = bytearray()
    async for content in stream(client, path, port, request):
        received += content
        if len(received) > _LIMIT:
            raise ForwardError(f"the page is over {_LIMIT >> 20} MiB")
    return bytes(received)


async def stream(client: Client, path: str, port: int, request: bytes) -> AsyncIterator[bytes]:
    """What comes back of a request to a port of a pod, as it comes; `path` is the pod's portforward path.

    Raises ForwardError when the port refuses.
    """
    session = spdy.Session()
    async with client.websocket(path, PROTOCOL) as socket:
        for number, kind in _NAMES.items():
            headers = {"streamtype": kind, "port": str(port), "requestid": "0"}
            await socket.send_bytes(session.open(number, headers, fin=number == _ERRORS))
        for at in range(0, len(request), _PIECE):
            await socket.send_bytes(spdy.data(_CONTENT, request[at : at + _PIECE]))
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.BINARY:
                continue
            for frame in session.receive(message.data):
                if frame.kind == spdy.PING:
                    await socket.send_bytes(spdy.ping(frame.payload))
                elif frame.kind == spdy.RST_STREAM and frame.stream == _CONTENT:
                    raise ForwardError(f"port {port} of the pod refused the connection")
                elif frame.kind == 0 and frame.stream == _ERRORS and frame.payload:
                    raise ForwardError(frame.payload.decode(errors="replace").strip())
                elif frame.kind == 0 and frame.stream == _CONTENT:
                    yield frame.payload
                    if frame.flags & spdy.FIN:
                        return
