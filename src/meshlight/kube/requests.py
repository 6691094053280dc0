"""Requests as the API reads them: path, verb, body, options. Turns HTTP into `rest`'s terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import orjson
import yaml
from aiohttp import web

from meshlight.kube import decoding, protobuf_wire
from meshlight.kube.authentication import User
from meshlight.kube.catalog import Catalog
from meshlight.kube.resources import Object
from meshlight.kube.rest import Target, WriteOptions
from meshlight.kube.status import StatusError, bad_request

MAX_BODY = 3 * 1024 * 1024
USER: web.RequestKey[User] = web.RequestKey("user", User)
TARGET: web.RequestKey[Target] = web.RequestKey("target", Target)
BODY: web.RequestKey[Any] = web.RequestKey("body", object)
DUPLICATES: web.RequestKey[tuple[str, ...]] = web.RequestKey("duplicates", tuple)
WARNINGS: web.RequestKey[tuple[str, ...]] = web.RequestKey("warnings", tuple)
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_R = TypeVar("_R", bound=web.StreamResponse)
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}


def no_such_path() -> StatusError:
    """404 for a path that leads nowhere."""
    return StatusError(404, "NotFound", "the server could not find the requested resource")


def not_allowed() -> StatusError:
    """405."""
    message = "the server does not allow this method on the requested resource"
    return StatusError(405, "MethodNotAllowed", message)


def target_of(catalog: Catalog, group: str, version: str, parts: Sequence[str]) -> Target:
    """What the rest of a path below a group-version is about. Raises StatusError 404."""
    namespace = None
    if parts[0] == "namespaces" and len(parts) > 2 and parts[2] not in ("status", "finalize"):
        namespace, parts = parts[1], parts[2:]
    served = catalog.lookup(group, version, parts[0])
    if served is None or len(parts) > 3 or (namespace and not served.resource.namespaced):
        raise no_such_path()
    name = parts[1] if len(parts) > 1 else ""
    subresource = parts[2] if len(parts) > 2 else ""
    if subresource and subresource not in {s.name for s in served.subresources}:
        raise no_such_path()
    if name and served.resource.namespaced and namespace is None:
        raise no_such_path()
    return Target(served, namespace, name, subresource)


def is_watch(request: web.Request) -> bool:
    """Whether a GET asks for a watch."""
    return request.query.get("watch") in ("true", "1")


def verb_of(request: web.Request, target: Target) -> str:
    """The API verb of a request, as RBAC names it."""
    match request.method:
        case "GET" | "HEAD":
            if is_watch(request):
                return "watch"
            return "get" if target.name else "list"
        case "DELETE":
            return "delete" if target.name else "deletecollection"
    return _VERBS.get(request.method, request.method.lower())


async def body_of(request: web.Request) -> Any:
    """The request's body as JSON, from JSON, YAML or Kubernetes protobuf. Raises StatusError 400, 413."""
    try:
        raw = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        message = f"Request entity too large: limit is {MAX_BODY}"
        raise StatusError(413, "RequestEntityTooLarge", message) from error
    try:
        if raw.startswith(protobuf_wire.MAGIC):
            body = protobuf_wire.decode(raw)
        elif request.content_type.endswith("yaml") and not raw.lstrip().startswith(b"{"):
            body = yaml.load(raw, _YAML)
        else:
            if raw and request.query.get("fieldValidation") in ("Strict", "Warn"):
                request[DUPLICATES] = tuple(decoding.duplicates(raw))
            body = orjson.loads(raw) if raw else {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise bad_request(f"the body cannot be decoded: {error}") from error
    request[BODY] = body
    return body


def options(request: web.Request) -> WriteOptions:
    """The options of a write, once its body has been read. Raises StatusError 400 or 422."""
    query = request.query
    manager = query.get("fieldManager") or request.headers.get("User-Agent", "").partition("/")[0]
    validation = query.get("fieldValidation") or "Warn"
    if validation not in ("Ignore", "Warn", "Strict"):
        raise bad_request(f"fieldValidation must be Ignore, Strict or Warn, not {validation!r}")
    if query.get("dryRun", "All") != "All":
        raise bad_request(f"dryRun must be All, not {query['dryRun']!r}")
    return WriteOptions(
        dry_run="dryRun" in query,
        field_validation=validation,
        field_manager=manager[:128],
        force=query.get("force") in ("true", "1"),
        duplicates=request.get(DUPLICATES, ()),
        user=request.get(USER),
    )


def answer(body: Object | bytes, status: int = 200, content_type: str = "application/json") -> web.Response:
    """A JSON response."""
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return web.Response(body=raw, status=status, headers={"Content-Type": content_type})


def warned(response: _R, warnings: Sequence[str]) -> _R:
    """The response with a Warning header for everything that the request is warned of."""
    for text in warnings:
        plain = " ".join(text.split())  # a header is one line
        escaped = plain.replace("\\", "\\\\").replace('"', '\\"')
        response.headers.add("Warning", f'299 - "{escaped}"')
    return response
