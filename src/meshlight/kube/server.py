"""The API server: which handler a path has, and the process that serves them over TLS.

Reads are `reading`'s, the verbs' meaning is `rest`'s; here requests find them. Listens on an inherited
loopback socket and, inside a cluster, on the fabric.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import ctypes
import functools
import gc
import json
import logging
import os
import signal
import socket
import sqlite3
import ssl
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import uvloop
from aiohttp import web

from meshlight.kube import (
    deletion,
    discovery,
    expiry,
    kubelet_streams,
    metrics_api,
    openapi,
    pod_subresources,
    reviews,
    webhooks,
)
from meshlight.kube.admission import Request
from meshlight.kube.audit import AuditLog
from meshlight.kube.authentication import Attributes
from meshlight.kube.authorization import node_may_touch
from meshlight.kube.bootstrap import bootstrap
from meshlight.kube.catalog import Catalog
from meshlight.kube.credentials import Credentials
from meshlight.kube.guard import Guard, Handler
from meshlight.kube.kubelet_proxy import KubeletProxy
from meshlight.kube.reading import Reader
from meshlight.kube.representation import Representation, shape_of
from meshlight.kube.requests import (
    MAX_BODY,
    TARGET,
    USER,
    WARNINGS,
    answer,
    body_of,
    is_watch,
    no_such_path,
    not_allowed,
    options,
    target_of,
    verb_of,
    warned,
)
from meshlight.kube.resources import Object
from meshlight.kube.rest import Rest, Target, WriteOptions
from meshlight.kube.status import StatusError, bad_request, conflict
from meshlight.kube.store import Store
from meshlight.kube.tokens import TokenIssuer

VERSION = "v1.32.0+meshlight"
AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
SUCCESS: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
T = TypeVar("T")
_HOOKED_ATTEMPTS = 5
"""Times that a write is tried whose object changes while its webhooks are asked."""
WATCH_SECONDS = 3600.0
"""A watch without a timeout of its own ends after this; its client resumes."""


def log(message: str, **fields: object) -> None:
    """One JSON event a line."""
    print(json.dumps({"ts": time.time(), "level": "info", "msg": message, **fields}), file=sys.stderr)


class Server:
    """Handlers over one Rest."""

    def __init__(self, rest: Rest, pki: Path, audit: AuditLog | None = None) -> None:
        self.rest = rest
        self.catalog = rest.catalog
        self.reader = Reader(rest)
        self.tokens = TokenIssuer(pki, rest.core_object)
        self.credentials = Credentials(self.tokens, log)
        self.kubelets = KubeletProxy(pki)
        self.authorizer = rest.authorizer
        self.webhooks = webhooks.Webhooks(rest.store, webhooks.ask)
        self._audit = audit
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="lists")

    def application(self) -> web.Application:
        """The aiohttp application: one route, so that every path passes the guard."""
        guard = Guard(self.rest.store, self.credentials.user, self.authorizer, self._audit, log)

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await guard(request, handler)

        app = web.Application(middlewares=[guarded], client_max_size=MAX_BODY)
        app.on_cleanup.append(self._cleanup)
        app.router.add_route("*", "/{path:.*}", self.dispatch)
        return app

    async def _cleanup(self, _: web.Application) -> None:
        await self.kubelets.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)
        if self._audit is not None:
            self._audit.close()

    async def dispatch(self, request: web.Request) -> web.StreamResponse:
        """Find the handler of a path."""
        parts = [part for part in request.path.split("/") if part]
        match parts:
            case ["api", version, *rest] if rest:
                return await self._resource(request, target_of(self.catalog, "", version, rest))
            case ["apis", group, version, *rest] if rest:
                return await self._resource(request, target_of(self.catalog, group, version, rest))
            case ["healthz" | "readyz" | "livez", *_]:
                return web.Response(text="ok")  # the store is open before we listen
        self.authorizer.check(request[USER], Attributes(request.method.lower(), path=request.path))
        if request.method not in ("GET", "HEAD"):
            raise not_allowed()
        return self._document(request, parts)

    def _document(self, request: web.Request, parts: list[str]) -> web.Response:
        """Discovery, OpenAPI and the other documents about the API."""
        aggregated = "APIGroupDiscoveryList" in request.headers.get("Accept", "")
        found: Object | None
        match parts:
            case []:
                found = discovery.paths(self.catalog)
            case ["version"]:
                found = {"major": "1", "minor": "32", "gitVersion": VERSION, "platform": "linux/amd64"}
            case ["api" | "apis" as kind] if aggregated:
                return answer(discovery.aggregated(self.catalog, kind == "api"), content_type=AGGREGATED)
            case ["api"]:
                found = discovery.api_versions()
            case ["apis"]:
                found = discovery.api_group_list(self.catalog)
            case ["api", version]:
                found = discovery.api_resource_list(self.catalog, "", version)
            case ["apis", group]:
                found = discovery.api_group(self.catalog, group)
            case ["apis", group, version]:
                found = discovery.api_resource_list(self.catalog, group, version)
            case ["openapi", "v2"]:
                return _swagger(request)
            case ["openapi", "v3"]:
                found = openapi.index(self.catalog)
            case ["openapi", "v3", *path]:
                return self._openapi(request, path)
            case [".well-known", "openid-configuration"]:
                found = self.tokens.configuration()
            case ["openid", "v1", "jwks"]:
                found = self.tokens.keys()
            case _:
                found = None
        if found is None:
            raise no_such_path()
        return answer(found)

    def _openapi(self, request: web.Request, path: list[str]) -> web.Response:
        match path:
            case ["api", version]:
                found = openapi.document(self.catalog, "", version)
            case ["apis", group, version]:
                found = openapi.document(self.catalog, group, version)
            case _:
                found = None
        if found is None:
            raise no_such_path()
        response = answer(found)
        if "hash" in request.query:  # the index gives a new hash when the document changes
            response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response

    def _authorize(self, request: web.Request, target: Target) -> None:
        """Refuse what no role allows the request's user. Raises StatusError 403."""
        user, resource = request[USER], target.served.resource
        asked = Attributes(
            verb_of(request, target),
            resource.group,
            resource.plural,
            target.subresource,
            target.name if resource.plural == "namespaces" else target.namespace or "",
            target.name,
        )
        self.authorizer.check(user, asked)
        pod = None
        if resource.plural == "pods" and target.name:
            pod = self.rest.core_object("pods", target.namespace or "", target.name)
        if not node_may_touch(user, asked, pod):
            message = f"node {user.name} may change only itself and the pods bound to it"
            raise StatusError(403, "Forbidden", message)

    async def _resource(self, request: web.Request, target: Target) -> web.StreamResponse:
        """Every path below a group-version."""
        request[TARGET] = target
        self._authorize(request, target)
        if target.served.deprecation:
            request[WARNINGS] = (target.served.deprecation,)
        if target.served.verbs == ("create",) and request.method != "POST":
            raise not_allowed()
        if target.served.resource.group == metrics_api.GROUP:
            return await self._metrics(request, target)
        match request.method:
            case "GET" if target.subresource == "log":
                return await self.kubelets.logs(request, *self._placed(target))
            case "GET" | "POST" if target.subresource in kubelet_streams.SUBRESOURCES:
                connections = self.kubelets.connections()
                placed = self._placed(target)
                return await kubelet_streams.serve(connections, request, target.subresource, *placed)
            case "GET" if is_watch(request):
                return await self._watch(request, target)
            case "GET" if target.name:
                return answer(self.reader.object(target, self._shape(request, target)))
            case "GET":
                return answer(await self._list(request, target))
            case "POST":
                return await self._create(request, target)
            case "PUT" if target.name:
                body, write = await body_of(request), options(request)

                def replaced(write: WriteOptions) -> Object:
                    return self.rest.replace(target, copy.deepcopy(body), write)

                return warned(answer(await self._hooked(target, write, replaced)), write.warnings)
            case "PATCH" if target.name:
                body, write = await body_of(request), options(request)

                def patched(write: WriteOptions) -> tuple[Object, bool]:
                    return self.rest.patch(target, copy.deepcopy(body), request.content_type, write)

                obj, created = await self._hooked(target, write, patched)
                return warned(answer(obj, 201 if created else 200), write.warnings)
            case "DELETE":
                return await self._delete(request, target)
        raise not_allowed()

    async def _metrics(self, request: web.Request, target: Target) -> web.Response:
        """What is used now: the kubelets know."""
        if request.method != "GET" or is_watch(request):
            raise not_allowed()
        nodes = self.rest.store.objects("/nodes", None)
        found = await metrics_api.serve(
            self.kubelets.connections(),
            nodes,
            self.rest.core_object,
            target.served.resource.plural,
            target.namespace,
            target.name,
            request.query,
        )
        return answer(found)

    def _shape(self, request: web.Request, target: Target) -> Representation:
        shape = shape_of(request.headers.get("Accept", ""))
        include = request.query.get("includeObject", "Metadata")
        return Representation(target.served, self.rest.presented, shape, include)

    async def _list(self, request: web.Request, target: Target) -> bytes:
        page, shape = self.reader.page(target, request.query), self._shape(request, target)
        if not page.large:
            return page.encode(shape)
        return await asyncio.get_running_loop().run_in_executor(self._encoders, page.encode, shape)

    def _placed(self, target: Target) -> tuple[Object, Object]:
        """A pod and its node. Raises StatusError."""
        pod = self.rest.get(Target(target.served, target.namespace, target.name))
        node = self.rest.core_object("nodes", "", pod["spec"].get("nodeName", ""))
        if node is None:
            raise bad_request(f"pod {target.name} does not have a host assigned")
        return pod, node

    async def _create(self, request: web.Request, target: Target) -> web.Response:
        body, write = await body_of(request), options(request)
        kind = target.served.resource.kind
        match target.subresource:
            case "token":
                issued = self.tokens.request(target.namespace or "", target.name, body, int(time.time()))
                return answer(issued, 201)
            case "binding":
                pod_subresources.bind(self.rest, target, body, write)
                return answer(SUCCESS, 201)
            case "eviction":
                pod_subresources.evict(self.rest, target, body, write)
                return answer(SUCCESS, 201)
        if target.name:
            raise not_allowed()
        if kind == "TokenReview":
            return answer(self.tokens.review(body, time.time()), 201)
        if kind in reviews.KINDS:
            found = reviews.review(self.authorizer, kind, body, request[USER], target.namespace)
            return answer(found, 201)

        def created(write: WriteOptions) -> Object:
            return self.rest.create(target, copy.deepcopy(body), write)

        return warned(answer(await self._hooked(target, write, created), 201), write.warnings)

    async def _hooked(self, target: Target, write: WriteOptions, act: Callable[[WriteOptions], T]) -> T:
        """Do a write after its webhooks were asked about it, tried without storing. Raises StatusError."""
        if not self.webhooks.any():
            return act(write)
        for _ in range(_HOOKED_ATTEMPTS):
            before = self.rest.store.body(target.key)
            review = self._tried(write, act, None)
            if review is None:
                return act(write)
            amend = None
            if found := await self.webhooks.mutate(review):
                amend = functools.partial(webhooks.amended, found=found)
                review = self._tried(write, act, amend) or review
            await self.webhooks.validate(review)
            if not target.name or self.rest.store.body(target.key) is before:
                write.warnings.extend(w for w in review.warnings if w not in write.warnings)
                return act(replace(write, amend=amend))
        r = target.served.resource
        raise conflict(r.group, r.plural, target.name)

    @staticmethod
    def _tried(
        write: WriteOptions, act: Callable[[WriteOptions], T], amend: webhooks.Amend | None
    ) -> Request | None:
        """The write as admission sees it, with nothing stored; None when nobody is asked about it."""
        seen: list[Request] = []
        act(replace(write, dry_run=True, seen=seen, amend=amend, warnings=[]))
        if not seen:
            return None
        review = replace(seen[-1], obj=copy.deepcopy(seen[-1].obj), dry_run=write.dry_run)
        return review

    async def _delete(self, request: web.Request, target: Target) -> web.Response:
        body = await body_of(request) if request.can_read_body else {}
        asked, write = deletion.parse(body, request.query), options(request)
        if target.name:

            def deleted(write: WriteOptions) -> tuple[Object, bool]:
                return self.rest.delete(target, replace(asked, dry_run=asked.dry_run or write.dry_run), write)

            obj, gone = await self._hooked(target, write, deleted)
            r, uid = target.served.resource, obj["metadata"]["uid"]
            details = {"name": target.name, "kind": r.plural, "uid": uid}
            if r.group:
                details["group"] = r.group
            return warned(answer({**SUCCESS, "details": details} if gone else obj), write.warnings)
        for namespace, name in self.reader.names(target, request.query):
            self.rest.delete(Target(target.served, namespace or None, name), asked, write)
        return answer(SUCCESS)

    async def _watch(self, request: web.Request, target: Target) -> web.StreamResponse:
        events = self.reader.events(target, request.query, self._shape(request, target))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        timeout = float(request.query.get("timeoutSeconds") or 0) or WATCH_SECONDS
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(timeout), contextlib.aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    await response.write(event)
        return response


def _swagger(request: web.Request) -> web.Response:
    if "proto-openapi" not in request.headers.get("Accept", ""):
        return answer(openapi.SWAGGER)
    kind = openapi.SWAGGER_PROTOBUF_TYPE
    return web.Response(body=openapi.swagger_protobuf(), headers={"Content-Type": kind})


def tls(pki: Path) -> ssl.SSLContext:
    """Server TLS; client certificates of the cluster's CA are verified when offered."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(pki / "server.crt", pki / "server.key")
    context.load_verify_locations(pki / "ca.crt")
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _stop_at_once(error: BaseException) -> None:
    """What could not be written must not be answered: end, so that the next start serves what is on disk."""
    log("the store cannot be written, stopping", error=str(error))
    os._exit(70)


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
    store.attach(_stop_at_once)
    logs = state / "logs"
    logs.mkdir(exist_ok=True, mode=0o700)
    server = Server(rest, state / "pki", AuditLog(logs / "audit.log"))
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    sockets = [socket.socket(fileno=listen_fd)]
    if fabric:
        sockets.append(socket.create_server((host, int(port)), backlog=512))
    context = tls(state / "pki")
    for listener in sockets:
        await web.SockSite(runner, listener, ssl_context=context).start()
    gc.collect()
    gc.freeze()
    log("serving", revision=store.revision, fabric=fabric)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sweeper = asyncio.create_task(expiry.run(store))
    await stop.wait()
    sweeper.cancel()
    await sweeper
    await runner.cleanup()
    store.close()


def _settle_memory() -> None:
    """Give the memory of large answers back, and look for cycles seldom: objects here have none."""
    gc.set_threshold(50_000, 20, 100)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 * 1024)  # glibc's own threshold grows


_M_MMAP_THRESHOLD = -3


def main() -> None:
    """Entry point of `python -m meshlight.kube.server`."""
    parser = argparse.ArgumentParser(description="the Kubernetes API of an embedded cluster")
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--listen-fd", required=True, type=int)
    parser.add_argument("--fabric")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    _settle_memory()
    uvloop.run(serve(arguments.state, arguments.listen_fd, arguments.fabric))


if __name__ == "__main__":
    main()
