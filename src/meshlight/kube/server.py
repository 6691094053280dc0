"""The API server's process: HTTP over TLS, client certificates, routing, encoding.

Parses requests into `rest.Target`s and encodes answers as JSON or tables; the verbs' meaning is
`rest`'s. Listens on an inherited loopback socket and, inside a cluster, on the fabric.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import socket
import sqlite3
import ssl
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import uvloop
import yaml
from aiohttp import web

from meshlight.kube import (
    decoding,
    deletion,
    discovery,
    kubelet_streams,
    openapi,
    pod_subresources,
    protobuf_wire,
    tables,
    watch,
)
from meshlight.kube.authentication import User, from_certificate, unauthorized
from meshlight.kube.authorization import Attributes, Authorizer, node_may_touch
from meshlight.kube.bootstrap import bootstrap
from meshlight.kube.catalog import Catalog
from meshlight.kube.kubelet_proxy import KubeletProxy
from meshlight.kube.resources import Object
from meshlight.kube.rest import Rest, Target, WriteOptions, matcher
from meshlight.kube.status import StatusError, bad_request
from meshlight.kube.store import CompactedError, Store
from meshlight.kube.tokens import ISSUER, InvalidToken, TokenIssuer

VERSION = "v1.32.0+meshlight"
MAX_BODY = 3 * 1024 * 1024
AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
DUPLICATES: web.RequestKey[tuple[str, ...]] = web.RequestKey("duplicates", tuple)
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SUCCESS: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
USER: web.RequestKey[User] = web.RequestKey("user", User)
Authenticate = Callable[[web.Request], User]
AUTHENTICATE: web.AppKey[Authenticate] = web.AppKey("authenticate")


def log(message: str, **fields: object) -> None:
    """One JSON event a line."""
    print(json.dumps({"ts": time.time(), "level": "info", "msg": message, **fields}), file=sys.stderr)


def answer(body: Object, status: int = 200, content_type: str = "application/json") -> web.Response:
    """A JSON response."""
    return web.Response(body=orjson.dumps(body), status=status, headers={"Content-Type": content_type})


@web.middleware
async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
    """Authenticate, and turn every refusal into a Status."""
    try:
        if request.path not in ("/healthz", "/readyz", "/livez"):
            request[USER] = request.app[AUTHENTICATE](request)
        response: web.StreamResponse = await handler(request)
        return response
    except StatusError as error:
        return answer(error.body(), error.code)
    except CompactedError as error:
        return answer(StatusError(410, "Expired", str(error)).body(), 410)
    except web.HTTPRequestEntityTooLarge:
        message = f"limit is {MAX_BODY} bytes"
        return answer(StatusError(413, "RequestEntityTooLarge", message).body(), 413)
    except web.HTTPException as error:
        message = "the server could not find the requested resource"
        reason = "NotFound" if error.status == 404 else "MethodNotAllowed"
        return answer(StatusError(error.status, reason, message).body(), error.status)


class Server:
    """Routes and handlers over one Rest."""

    def __init__(self, rest: Rest, pki: Path) -> None:
        self.rest = rest
        self.catalog = rest.catalog
        self.tokens = TokenIssuer(pki, rest.core_object)
        self.kubelets = KubeletProxy(pki)
        self.authorizer = Authorizer(rest.rbac_objects)

    def authenticate(self, request: web.Request) -> User:
        """The user of a bearer token or of a verified client certificate. Raises StatusError 401."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            try:
                return self.tokens.check(token.strip(), (ISSUER,), time.time()).user
            except InvalidToken as error:
                log("token refused", reason=str(error))
                raise unauthorized() from error
        transport = request.transport
        return from_certificate(transport.get_extra_info("peercert") if transport else None)

    def authorize(self, request: web.Request, target: Target) -> None:
        """Refuse what no role allows the request's user. Raises StatusError 403."""
        user, resource = request[USER], target.served.resource
        asked = Attributes(
            verb_of(request, target),
            resource.group,
            resource.plural,
            target.subresource,
            target.namespace or "",
            target.name,
        )
        self.authorizer.check(user, asked)
        pod = None
        if resource.plural == "pods" and target.name:
            pod = self.rest.core_object("pods", target.namespace or "", target.name)
        if not node_may_touch(user, asked, pod):
            message = f"node {user.name} may change only itself and the pods bound to it"
            raise StatusError(403, "Forbidden", message)

    async def _cleanup(self, _: web.Application) -> None:
        await self.kubelets.close()

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(
            middlewares=[
                web.normalize_path_middleware(append_slash=False, remove_slash=True),
                guard,
            ],
            client_max_size=MAX_BODY,
        )
        app[AUTHENTICATE] = self.authenticate
        app.on_cleanup.append(self._cleanup)
        app.router.add_get("/version", self.version)
        for path in ("/healthz", "/readyz", "/livez"):
            app.router.add_get(path, self.healthy)
        app.router.add_get("/api", self.core)
        app.router.add_get("/apis", self.groups)
        app.router.add_get("/openapi/v2", self.openapi_v2)
        app.router.add_get("/openapi/v3", self.openapi_index)
        app.router.add_get("/openapi/v3/{path:.+}", self.openapi_document)
        app.router.add_route("*", "/api/{version}{rest:(/.*)?}", self.resource)
        app.router.add_get("/apis/{group}", self.group)
        app.router.add_route("*", "/apis/{group}/{version}{rest:(/.*)?}", self.resource)
        return app

    async def version(self, _: web.Request) -> web.Response:
        """`/version`."""
        return answer({"major": "1", "minor": "32", "gitVersion": VERSION, "platform": "linux/amd64"})

    async def healthy(self, _: web.Request) -> web.Response:
        """Liveness and readiness: we serve only once the store is open."""
        return web.Response(text="ok")

    async def core(self, request: web.Request) -> web.Response:
        """`/api`."""
        if "APIGroupDiscoveryList" in request.headers.get("Accept", ""):
            return answer(discovery.aggregated(self.catalog, True), content_type=AGGREGATED)
        return answer(discovery.api_versions())

    async def groups(self, request: web.Request) -> web.Response:
        """`/apis`."""
        if "APIGroupDiscoveryList" in request.headers.get("Accept", ""):
            return answer(discovery.aggregated(self.catalog, False), content_type=AGGREGATED)
        return answer(discovery.api_group_list(self.catalog))

    async def group(self, request: web.Request) -> web.Response:
        """`/apis/GROUP`."""
        found = discovery.api_group(self.catalog, request.match_info["group"])
        if found is None:
            raise web.HTTPNotFound
        return answer(found)

    async def openapi_v2(self, request: web.Request) -> web.Response:
        """`/openapi/v2`."""
        if "proto-openapi" not in request.headers.get("Accept", ""):
            return answer(openapi.SWAGGER)
        kind = openapi.SWAGGER_PROTOBUF_TYPE
        return web.Response(body=openapi.swagger_protobuf(), headers={"Content-Type": kind})

    async def openapi_index(self, _: web.Request) -> web.Response:
        """`/openapi/v3`."""
        return answer(openapi.index(self.catalog))

    async def openapi_document(self, request: web.Request) -> web.Response:
        """`/openapi/v3/apis/GROUP/VERSION`."""
        match request.match_info["path"].split("/"):
            case ["api", version]:
                found = openapi.document(self.catalog, "", version)
            case ["apis", group, version]:
                found = openapi.document(self.catalog, group, version)
            case _:
                found = None
        if found is None:
            raise web.HTTPNotFound
        response = answer(found)
        if "hash" in request.query:  # the index gives a new hash when the document changes
            response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response

    def _target(self, request: web.Request) -> Target | None:
        """Parse a REST path; None for the group-version itself."""
        group, version = request.match_info.get("group", ""), request.match_info["version"]
        parts = [p for p in request.match_info["rest"].split("/") if p]
        if not parts:
            return None
        namespace = None
        if parts[0] == "namespaces" and len(parts) > 2 and parts[2] not in ("status", "finalize"):
            namespace, parts = parts[1], parts[2:]
        served = self.catalog.lookup(group, version, parts[0])
        if served is None or len(parts) > 3 or (namespace and not served.resource.namespaced):
            raise web.HTTPNotFound
        name = parts[1] if len(parts) > 1 else ""
        subresource = parts[2] if len(parts) > 2 else ""
        if subresource and subresource not in {s.name for s in served.subresources}:
            raise web.HTTPNotFound
        return Target(served, namespace, name, subresource)

    async def resource(self, request: web.Request) -> web.StreamResponse:
        """Every path below a group-version."""
        target = self._target(request)
        if target is None:
            group = request.match_info.get("group", "")
            found = discovery.api_resource_list(self.catalog, group, request.match_info["version"])
            if found is None:
                raise web.HTTPNotFound
            return answer(found)
        self.authorize(request, target)
        match request.method:
            case "GET" if target.subresource == "log":
                return await self._logs(request, target)
            case "GET" | "POST" if target.subresource in kubelet_streams.SUBRESOURCES:
                return await self._stream(request, target)
            case "GET" if target.name:
                obj = self.rest.get(target)
                return answer(self._shown(request, target, [obj], obj))
            case "GET" if request.query.get("watch") in ("true", "1"):
                return await self._watch(request, target)
            case "GET":
                return self._list(request, target)
            case "POST":
                return await self._create(request, target)
            case "PUT" if target.name:
                body, write = await body_of(request), options(request)
                return warned(answer(self.rest.replace(target, body, write)), write)
            case "PATCH" if target.name:
                body, write = await body_of(request), options(request)
                obj, created = self.rest.patch(target, body, request.content_type, write)
                return warned(answer(obj, 201 if created else 200), write)
            case "DELETE":
                return await self._delete(request, target)
        raise web.HTTPMethodNotAllowed(request.method, ["GET", "POST", "PUT", "PATCH", "DELETE"])

    def _placed(self, target: Target) -> tuple[Object, Object]:
        """A pod and its node. Raises StatusError."""
        pod = self.rest.get(Target(target.served, target.namespace, target.name))
        node = self.rest.core_object("nodes", "", pod["spec"].get("nodeName", ""))
        if node is None:
            raise bad_request(f"pod {target.name} does not have a host assigned")
        return pod, node

    async def _logs(self, request: web.Request, target: Target) -> web.StreamResponse:
        return await self.kubelets.logs(request, *self._placed(target))

    async def _stream(self, request: web.Request, target: Target) -> web.StreamResponse:
        connections = self.kubelets.connections()
        return await kubelet_streams.serve(connections, request, target.subresource, *self._placed(target))

    def _list(self, request: web.Request, target: Target) -> web.Response:
        query = request.query
        matches = matcher(query.get("labelSelector", ""), query.get("fieldSelector", ""))
        limit = int(query.get("limit") or 0)
        version = str(self.rest.store.revision)
        items, after = self.rest.list(target, matches, limit, query.get("continue", ""))
        metadata: Object = {"resourceVersion": version}
        if after:
            metadata["continue"] = after
        r = target.served.resource
        listed = {
            "kind": f"{r.kind}List", "apiVersion": r.api_version, "metadata": metadata, "items": items,
        }  # fmt: skip
        shown = self._shown(request, target, items, listed)
        shown["metadata"] = metadata
        return answer(shown)

    def _shown(self, request: web.Request, target: Target, items: list[Object], plain: Object) -> Object:
        """`plain`, or the items as a Table when the reader asks for one."""
        if "as=Table" not in request.headers.get("Accept", ""):
            return plain
        include = request.query.get("includeObject", "Metadata")
        version = plain["metadata"].get("resourceVersion", "")
        return tables.render(target.served, items, version, include, datetime.now(UTC))

    async def _create(self, request: web.Request, target: Target) -> web.Response:
        body = await body_of(request)
        if target.subresource == "token":
            issued = self.tokens.request(target.namespace or "", target.name, body, int(time.time()))
            return answer(issued, 201)
        if target.served.resource.kind == "TokenReview":
            return answer(self.tokens.review(body, time.time()), 201)
        if target.subresource == "binding":
            pod_subresources.bind(self.rest, target, body, options(request))
            return answer(SUCCESS, 201)
        if target.subresource == "eviction":
            pod_subresources.evict(self.rest, target, body)
            return answer(SUCCESS, 201)
        if target.name:
            raise web.HTTPMethodNotAllowed("POST", ["GET", "PUT", "PATCH", "DELETE"])
        if (kind := target.served.resource.kind) in ("SelfSubjectAccessReview", "SubjectAccessReview"):
            spec = body.get("spec") or {}
            user = request[USER]
            if kind == "SubjectAccessReview":
                user = User(spec.get("user", ""), tuple(spec.get("groups") or ()))
            allowed = self.authorizer.allowed(user, review_attributes(spec))
            return answer({**body, "status": {"allowed": allowed}}, 201)
        if kind == "SelfSubjectReview":
            return answer({**body, "status": {"userInfo": request[USER].review()}}, 201)
        write = options(request)
        return warned(answer(self.rest.create(target, body, write), 201), write)

    async def _delete(self, request: web.Request, target: Target) -> web.Response:
        body = await body_of(request) if request.can_read_body else {}
        query = request.query
        asked = deletion.parse(body, query)
        if target.name:
            obj, gone = self.rest.delete(target, asked)
            r, uid = target.served.resource, obj["metadata"]["uid"]
            details = {"name": target.name, "kind": r.plural, "uid": uid}
            if r.group:
                details["group"] = r.group
            return answer({**SUCCESS, "details": details} if gone else obj)
        matches = matcher(query.get("labelSelector", ""), query.get("fieldSelector", ""))
        items, _ = self.rest.list(target, matches, 0, "")
        for item in items:
            metadata = item["metadata"]
            self.rest.delete(Target(target.served, metadata.get("namespace"), metadata["name"]), asked)
        return answer(SUCCESS)

    async def _watch(self, request: web.Request, target: Target) -> web.StreamResponse:
        query, served = request.query, target.served
        selected = matcher(query.get("labelSelector", ""), query.get("fieldSelector", ""))
        namespace = target.namespace

        def matches(obj: Object) -> bool:
            return (namespace is None or obj["metadata"].get("namespace") == namespace) and selected(obj)

        def render(obj: Object) -> Object:
            obj = self.rest.presented(served, obj)
            return self._shown(request, target, [obj], obj)

        def bookmark(version: str) -> Object:
            r = served.resource
            return {
                "kind": r.kind,
                "apiVersion": r.api_version,
                "metadata": {"resourceVersion": version},
            }

        since = query.get("resourceVersion") or "0"
        if not since.isdigit():
            raise bad_request(f"invalid resource version {since!r}")
        initial: list[Object] = []
        start = int(since)
        if start == 0:
            start = self.rest.store.revision
            initial, _ = self.rest.list(target, selected, 0, "")
        else:
            next(self.rest.store.changes(served.storage_key, start), None)  # 410 before the headers
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        timeout = float(query.get("timeoutSeconds") or 3600)
        events = watch.stream(
            self.rest.store, served.storage_key, start, matches, render,
            bookmarks=query.get("allowWatchBookmarks") == "true", bookmark=bookmark, initial=initial,
        )  # fmt: skip
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(timeout), contextlib.aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    await response.write(event)
        return response


_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}


def verb_of(request: web.Request, target: Target) -> str:
    """The API verb of a request, as RBAC names it."""
    match request.method:
        case "GET":
            if request.query.get("watch") in ("true", "1"):
                return "watch"
            return "get" if target.name else "list"
        case "DELETE":
            return "delete" if target.name else "deletecollection"
    return _VERBS.get(request.method, request.method.lower())


def review_attributes(spec: Object) -> Attributes:
    """What an access review asks about."""
    if asked := spec.get("nonResourceAttributes"):
        return Attributes(asked.get("verb", ""), path=asked.get("path", ""))
    asked = spec.get("resourceAttributes") or {}
    fields = ("verb", "group", "resource", "subresource", "namespace", "name")
    return Attributes(*(asked.get(field, "") for field in fields))


async def body_of(request: web.Request) -> Any:
    """The request's body as JSON, from JSON, YAML or Kubernetes protobuf. Raises StatusError 400."""
    raw = await request.read()
    try:
        if raw.startswith(protobuf_wire.MAGIC):
            return protobuf_wire.decode(raw)
        if request.content_type.endswith("yaml") and not raw.lstrip().startswith(b"{"):
            return yaml.load(raw, _YAML)
        if raw and request.query.get("fieldValidation") in ("Strict", "Warn"):
            request[DUPLICATES] = tuple(decoding.duplicates(raw))
        return orjson.loads(raw) if raw else {}
    except (ValueError, yaml.YAMLError) as error:
        raise bad_request(f"the body cannot be decoded: {error}") from error


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
    )


def warned(response: web.Response, write: WriteOptions) -> web.Response:
    """The response with a Warning header for everything that the write warned of."""
    for text in write.warnings:
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        response.headers.add("Warning", f'299 - "{escaped}"')
    return response


def tls(pki: Path) -> ssl.SSLContext:
    """Server TLS; client certificates of the cluster's CA are verified when offered."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(pki / "server.crt", pki / "server.key")
    context.load_verify_locations(pki / "ca.crt")
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


async def serve(state: Path, listen_fd: int, fabric: str | None) -> None:
    """Open the store and serve until SIGTERM."""
    path = state / "store.db"
    try:
        store = Store(path)
    except sqlite3.Error as error:
        print(
            f"the store {path} cannot be opened ({error}): put a copy of it back, or start over with "
            "`meshlight down --purge`, which deletes the cluster's objects",
            file=sys.stderr,
        )
        sys.exit(1)
    rest = Rest(store, Catalog())
    host, _, port = (fabric or "127.0.0.1:6443").rpartition(":")
    bootstrap(rest, host, int(port))
    runner = web.AppRunner(Server(rest, state / "pki").application(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    sockets = [socket.socket(fileno=listen_fd)]
    if fabric:
        sockets.append(socket.create_server((host, int(port)), backlog=512))
    context = tls(state / "pki")
    for listener in sockets:
        await web.SockSite(runner, listener, ssl_context=context).start()
    log("serving", revision=store.revision, fabric=fabric)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    await runner.cleanup()
    store.close()


def main() -> None:
    """Entry point of `python -m meshlight.kube.server`."""
    parser = argparse.ArgumentParser(description="the Kubernetes API of an embedded cluster")
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--listen-fd", required=True, type=int)
    parser.add_argument("--fabric")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    uvloop.run(serve(arguments.state, arguments.listen_fd, arguments.fabric))


if __name__ == "__main__":
    main()
