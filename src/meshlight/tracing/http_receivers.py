"""Receivers over HTTP: Zipkin on 9411, OTLP on 4318, Jaeger Thrift on 14268.

400 is for what is wrong with the request; 429 and 503 with Retry-After mean "send it again", as OTLP
and Zipkin's exporters understand them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from meshlight.proto import otlp_pb2 as otlp
from meshlight.tracing import otlp as codec
from meshlight.tracing.decoding import Decoded, Malformed
from meshlight.tracing.intake import MAX_BODY, Intake, Refused, TooLarge, unpacked

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_GRPC = {400: 3, 413: 3, 415: 3, 429: 8, 503: 14}


def application() -> web.Application:
    """An application that reads bodies as large as they may be, packed as they came."""
    return web.Application(client_max_size=MAX_BODY + 1)


async def _body(request: web.Request) -> bytes:
    # aiohttp's parser has unpacked what Content-Encoding it knows, unless told otherwise when serving.
    try:
        raw = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise TooLarge(f"the body has more than {MAX_BODY} bytes: send smaller batches") from None
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    return unpacked(raw, encoding)


async def _taken(
    intake: Intake, protocol: str, request: web.Request, failed: Callable[[int, str, int], web.Response]
) -> Decoded | web.Response:
    try:
        return await intake.take(protocol, "http", await _body(request))
    except Malformed as error:
        return failed(400, str(error), 0)
    except TooLarge as error:
        return failed(413, str(error), 0)
    except Refused as error:
        return failed(503 if error.full else 429, str(error), error.retry_after)


def _plain(status: int, message: str, retry_after: int) -> web.Response:
    headers = {"Retry-After": str(retry_after)} if retry_after else {}
    return web.Response(status=status, text=message + "\n", headers=headers)


def add_zipkin(app: web.Application, intake: Intake) -> None:
    """POST /api/v2/spans and /api/v1/spans, in JSON or protobuf."""

    def post(version: int) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            kind = request.content_type
            if version == 2 and kind in ("application/x-protobuf", "application/protobuf"):
                protocol = "zipkin-proto"
            elif kind in ("application/json", "text/plain", "application/octet-stream", "text/json"):
                protocol = "zipkin-json" if version == 2 else "zipkin-v1"
            else:
                known = "application/json or application/x-protobuf" if version == 2 else "application/json"
                return _plain(415, f"Content-Type {kind} is unknown here: send {known}", 0)
            taken = await _taken(intake, protocol, request, _plain)
            return taken if isinstance(taken, web.Response) else web.Response(status=202)

        return handle

    # aiohttp answers other methods with 405 and Allow: POST, as Zipkin does for GET and HEAD.
    app.router.add_post("/api/v2/spans", post(2))
    app.router.add_post("/api/v1/spans", post(1))


def add_otlp(app: web.Application, intake: Intake) -> None:
    """POST /v1/traces and /v1/logs, in protobuf or JSON; the answer is in the request's encoding."""

    def post(signal: str) -> Handler:
        rejected = "rejectedSpans" if signal == "traces" else "rejectedLogRecords"
        names = {"traces": ("otlp", "otlp-json"), "logs": ("otlp-logs", "otlp-logs-json")}[signal]

        async def handle(request: web.Request) -> web.StreamResponse:
            as_json = request.content_type == "application/json"
            if not as_json and request.content_type not in ("application/x-protobuf", "application/protobuf"):
                kinds = "application/x-protobuf or application/json"
                return _plain(415, f"Content-Type {request.content_type} is unknown here: send {kinds}", 0)

            def failed(status: int, message: str, retry_after: int) -> web.Response:
                headers = {"Retry-After": str(retry_after)} if retry_after else {}
                code = _GRPC[status]
                if as_json:
                    body = orjson.dumps({"code": code, "message": message})
                else:
                    # google.rpc.Status: code 1, message 2; a PartialSuccess has the same shape on the wire.
                    body = otlp.PartialSuccess(rejected=code, message=message).SerializeToString()
                return web.Response(
                    status=status, body=body, headers=headers, content_type=request.content_type
                )

            taken = await _taken(intake, names[as_json], request, failed)
            if isinstance(taken, web.Response):
                return taken
            if as_json:
                partial: dict[str, Any] = {}
                if taken.rejected:
                    partial = {"partialSuccess": {rejected: str(taken.rejected), "errorMessage": taken.message}}
                return web.Response(body=orjson.dumps(partial), content_type="application/json")
            return web.Response(body=codec.response(taken), content_type="application/x-protobuf")

        return handle

    app.router.add_post("/v1/traces", post("traces"))
    app.router.add_post("/v1/logs", post("logs"))


def add_jaeger(app: web.Application, intake: Intake) -> None:
    """POST /api/traces with a Thrift batch."""

    async def handle(request: web.Request) -> web.StreamResponse:
        kinds = ("application/x-thrift", "application/vnd.apache.thrift.binary", "application/octet-stream")
        if request.content_type not in kinds:
            return _plain(400, f"Content-Type {request.content_type} is unknown here: send {kinds[0]}", 0)
        if request.query.get("format", "jaeger.thrift") != "jaeger.thrift":
            return _plain(400, "the only format known here is jaeger.thrift", 0)
        taken = await _taken(intake, "jaeger-thrift", request, _plain)
        return taken if isinstance(taken, web.Response) else web.Response(status=202)

    app.router.add_post("/api/traces", handle)
