"""Speak to a tracing server: at a URL, or in a cluster, through the API's port-forward to its pod."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlencode

import aiohttp
import orjson

from meshlight.kube import port_forward
from meshlight.kube.client import ApiUnreachable, Client
from meshlight.kube.port_forward import ForwardError
from meshlight.kube.resources import PODS
from meshlight.operations.errors import OperationError

if TYPE_CHECKING:
    # Its codecs are imported where they are used: every verb of the command line imports this module.
    from meshlight.tracing.model import Trace

NAMESPACE, SELECTOR = "observability", "app.kubernetes.io/name=jaeger"
QUERY_PORT = 16686


class Tracing(Protocol):
    """A tracing server's query port."""

    def lines(self, method: str, path: str, body: bytes = b"", kind: str = "") -> AsyncIterator[bytes]:
        """The body of an answer, piece by piece. Raises OperationError for a status of 400 and above."""
        ...


class AtUrl:
    """A tracing server at a URL of its query port."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url.rstrip("/")
        self._session = session

    async def lines(self, method: str, path: str, body: bytes = b"", kind: str = "") -> AsyncIterator[bytes]:
        """Pieces of an answer's body."""
        headers = {"Content-Type": kind} if kind else {}
        try:
            async with self._session.request(
                method, self._url + path, data=body or None, headers=headers
            ) as answer:
                if answer.status >= 400:
                    raise _refused(path, answer.status, await answer.read())
                async for piece in answer.content.iter_any():
                    yield piece
        except aiohttp.ClientError as error:
            raise ApiUnreachable(f"{self._url} cannot be reached: {error}") from error


class InPod:
    """The tracing server of a cluster."""

    def __init__(self, client: Client, namespace: str, pod: str) -> None:
        self._client, self._path = client, f"{PODS.path(namespace, pod)}/portforward"

    async def lines(self, method: str, path: str, body: bytes = b"", kind: str = "") -> AsyncIterator[bytes]:
        """Pieces of an answer's body."""
        head = f"{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += f"Content-Type: {kind}\r\n\r\n" if kind else "\r\n"
        begun, status, buffer = False, 0, b""
        try:
            async for piece in port_forward.stream(self._client, self._path, QUERY_PORT, head.encode() + body):
                if begun:
                    if status < 400:
                        yield piece
                    else:
                        buffer += piece
                    continue
                buffer += piece
                headers, blank, rest = buffer.partition(b"\r\n\r\n")
                if blank:
                    begun, buffer = True, rest
                    status = int(headers.split(b" ", 2)[1])
                    if status < 400:
                        yield rest
        except aiohttp.WSServerHandshakeError as error:
            raise ForwardError(f"port-forward refused: {error.status} {error.message}") from error
        except aiohttp.ClientError as error:
            raise ApiUnreachable(f"{self._client.server} cannot be reached: {error}") from error
        if not begun:
            raise OperationError(
                "the tracing pod answered no HTTP; is it ready? `kubectl get pods -n observability`"
            )
        if status >= 400:
            raise _refused(path, status, buffer)


def _refused(path: str, status: int, body: bytes) -> OperationError:
    try:
        message = orjson.loads(body)["errors"][0]["msg"]
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
        message = body.decode(errors="replace").strip()[:300]
    return OperationError(f"{path.partition('?')[0]}: {message or status}")


@contextlib.asynccontextmanager
async def at_url(url: str) -> AsyncIterator[Tracing]:
    """The tracing server at a URL."""
    async with aiohttp.ClientSession() as session:
        yield AtUrl(url, session)


async def in_cluster(client: Client) -> Tracing:
    """The tracing server of a cluster. Raises OperationError when there is none that is ready."""
    found = await client.list(PODS, NAMESPACE, label_selector=SELECTOR)
    for pod in found.items:
        conditions = (pod.get("status") or {}).get("conditions") or []
        if any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
            return InPod(client, NAMESPACE, pod["metadata"]["name"])
    raise OperationError(
        f"no ready tracing pod in namespace {NAMESPACE}: look with `kubectl get pods -n {NAMESPACE}`, "
        "or name a server with --url http://HOST:16686"
    )


def path(base: str, **parameters: Any) -> str:
    """A path with the parameters that are given."""
    given = [(k, str(v)) for k, v in parameters.items() if v not in (None, "", False)]
    return f"{base}?{urlencode(given)}" if given else base


async def read(tracing: Tracing, where: str, method: str = "GET", body: bytes = b"", kind: str = "") -> Any:
    """A JSON answer. Raises OperationError."""
    content = b"".join([piece async for piece in tracing.lines(method, where, body, kind)])
    try:
        return orjson.loads(content) if content else {}
    except orjson.JSONDecodeError:
        raise OperationError(f"{where} answered no JSON: is that a tracing server's query port?") from None


async def trace(tracing: Tracing, identity: str) -> Trace:
    """A trace, adjusted by the server."""
    from meshlight.tracing.otlp_json import decode_traces
    from meshlight.tracing.rows import span

    answer = await read(tracing, f"/api/v3/traces/{identity}")
    return [span(row) for row in decode_traces(orjson.dumps(answer["result"])).rows]


async def find(tracing: Tracing, **parameters: Any) -> list[Trace]:
    """Traces in the order in which the server found them: newest first."""
    tags = parameters.pop("tags", ())
    where = path("/api/traces", **parameters)
    for tag in tags:
        where += ("&" if "?" in where else "?") + urlencode({"tag": tag})
    answer = await read(tracing, where)
    from meshlight.tracing import jaeger_json
    from meshlight.tracing.model import by_trace
    from meshlight.tracing.rows import span

    rows = jaeger_json.decode(orjson.dumps(answer)).rows
    return list(by_trace([span(row) for row in rows]).values())


async def import_file(tracing: Tracing, content: bytes) -> int:
    """Send the spans of a Jaeger or OTLP JSON file (an object, or one a line); returns how many.

    Raises OperationError when the file is neither.
    """
    from meshlight.tracing import jaeger_json, otlp
    from meshlight.tracing.decoding import Malformed
    from meshlight.tracing.otlp_json import decode_traces

    rows = []
    for document in _documents(content):
        try:
            decoded = (
                decode_traces(document) if b'"resourceSpans"' in document else jaeger_json.decode(document)
            )
        except Malformed as error:
            raise OperationError(f"neither Jaeger's JSON nor OTLP's: {error}") from None
        if decoded.rejected:
            raise OperationError(f"{decoded.rejected} spans cannot be imported: {decoded.message}")
        rows += decoded.rows
    for at in range(0, len(rows), 2000):
        body = otlp.encode_rows(rows[at : at + 2000])
        async for _ in tracing.lines("POST", "/internal/v1/spans", body, "application/x-protobuf"):
            pass
    return len(rows)


def _documents(content: bytes) -> list[bytes]:
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        lines = [line for line in content.splitlines() if line.strip()]
        return lines or [content]
    if isinstance(found, dict) and "result" in found:
        return [orjson.dumps(found["result"])]
    return [content]
