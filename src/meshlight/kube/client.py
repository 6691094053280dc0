"""Typed asynchronous client of a Kubernetes API, embedded or real.

Owns connections, credentials and watch resumption. Every other part of Meshlight reaches the API
through it, so that none can tell an embedded cluster from a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
import orjson

from meshlight import __version__
from meshlight.kube import kubeconfig
from meshlight.kube.resources import Object, Resource
from meshlight.refusal import Refusal

SERVICE_ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")

MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"


class ApiError(Refusal):
    """The API answered with a `Status` of failure.

    `code` is the HTTP status, `reason` Kubernetes' machine word (`NotFound`, `Conflict`, …).
    """

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message


class ApiUnreachable(Refusal):
    """No answer from the API server; the message names its address and the cause."""

    advice = "is the cluster up? `meshlight up` boots it"


@dataclass(slots=True)
class ObjectList:
    """A list answer: its items, and the revision from which a watch continues it."""

    items: list[Object]
    resource_version: str


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change. SYNCED is the client's own: the list is complete; its object is empty."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "SYNCED"]
    object: Object


def program() -> str:
    """This process's name at the API: its writes are its own in managedFields, as `meshlight-controllers`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).stem
    return str(name).replace(".", "-") or "meshlight"


@dataclass
class Client:
    """A connection to one API server; made by a classmethod, closed by `close()` or `async with`."""

    server: str
    ssl_context: ssl.SSLContext
    token_file: Path | None = None
    token: str | None = None
    _session: aiohttp.ClientSession | None = field(default=None, repr=False)

    @classmethod
    def from_kubeconfig(cls, path: Path | str, context: str | None = None) -> Client:
        """Read the (current) context of a kubeconfig; raises ValueError naming what is missing."""
        found = kubeconfig.load(Path(path), context)
        return cls(found.server, found.tls, token=found.token)

    @classmethod
    def in_pod(cls) -> Client:
        """Use the pod's mounted service account and KUBERNETES_SERVICE_HOST/_PORT."""
        host = os.environ["KUBERNETES_SERVICE_HOST"]
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        context_tls = ssl.create_default_context(cafile=str(SERVICE_ACCOUNT_DIR / "ca.crt"))
        return cls(f"https://{host}:{port}", context_tls, token_file=SERVICE_ACCOUNT_DIR / "token")

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close idle connections; requests under way fail."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _headers(self) -> dict[str, str]:
        token = self.token_file.read_text().strip() if self.token_file else self.token
        return {"Authorization": f"Bearer {token}"} if token else {}

    def session(self) -> aiohttp.ClientSession:
        """The underlying HTTP session, for streaming requests of the command line."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self.ssl_context, limit=0, socket_factory=_attentive_socket),
                timeout=aiohttp.ClientTimeout(total=None, connect=10),
                headers={"User-Agent": f"{program()}/{__version__}"},
            )
        return self._session

    async def text(self, path: str, params: dict[str, str] | None = None) -> str:
        """A page that is no JSON, such as a container's log. Raises ApiError or ApiUnreachable."""
        try:
            async with self.session().get(
                self.server + path,
                params=params,
                headers=self._headers(),
                timeout=aiohttp.ClientTimeout(total=60),
            ) as answer:
                content = await answer.text()
                if answer.status >= 400:
                    raise ApiError(answer.status, answer.reason or "", content.strip())
                return content
        except aiohttp.ClientError as error:
            raise ApiUnreachable(f"{self.server} cannot be reached: {error}") from error

    @contextlib.asynccontextmanager
    async def websocket(self, path: str, protocol: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A WebSocket to a path of the API; raises aiohttp.ClientError, WSServerHandshakeError among them."""
        async with self.session().ws_connect(
            self.server + path, protocols=(protocol,), headers=self._headers(), max_msg_size=0
        ) as socket:
            yield socket

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: dict[str, str] | None = None,
        content_type: str = "application/json",
        timeout: float = 60,  # noqa: ASYNC109 - a bound on one request, as aiohttp names it
    ) -> Object:
        """One JSON request; returns the decoded answer. Raises ApiError or ApiUnreachable."""
        headers = self._headers()
        data = None
        if body is not None:
            data = orjson.dumps(body)
            headers["Content-Type"] = content_type
        try:
            async with self.session().request(
                method,
                self.server + path,
                data=data,
                headers=headers,
                params=params,
                timeout=aiohttp.ClientTimeout(total=timeout),
            ) as response:
                raw = await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiUnreachable(f"no answer from the API server at {self.server}: {error}") from error
        try:
            answer: Object = orjson.loads(raw) if raw else {}
        except orjson.JSONDecodeError:
            answer = {"message": raw.decode(errors="replace")}
        if status >= 400:
            raise ApiError(status, answer.get("reason", ""), answer.get("message", f"HTTP {status}"))
        return answer

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """Read one object."""
        return await self.request("GET", resource.path(namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
    ) -> ObjectList:
        """List a collection, in one namespace or in all."""
        params = _selectors(label_selector, field_selector)
        answer = await self.request("GET", resource.path(namespace), params=params)
        items = answer.get("items") or []
        for item in items:  # list items carry no type of their own
            item.setdefault("apiVersion", resource.api_version)
            item.setdefault("kind", resource.kind)
        return ObjectList(items, answer["metadata"]["resourceVersion"])

    async def create(self, resource: Resource, obj: Object) -> Object:
        """Create; the namespace is the object's own."""
        return await self.request("POST", resource.path(_namespace(obj)), obj)

    async def replace(self, resource: Resource, obj: Object, *, subresource: str = "") -> Object:
        """Replace (PUT) the object, or its `status` with `subresource='status'`."""
        path = resource.path(_namespace(obj), obj["metadata"]["name"])
        return await self.request("PUT", path + (f"/{subresource}" if subresource else ""), obj)

    async def patch(
        self,
        resource: Resource,
        name: str,
        patch: Any,
        namespace: str | None = None,
        *,
        content_type: str = MERGE_PATCH,
        subresource: str = "",
    ) -> Object:
        """Patch the object or a subresource of it (`status`, `scale`)."""
        path = resource.path(namespace, name) + (f"/{subresource}" if subresource else "")
        return await self.request("PATCH", path, patch, content_type=content_type)

    async def apply(self, resource: Resource, obj: Object, *, field_manager: str, force: bool = True) -> Object:
        """Server-side apply."""
        return await self.request(
            "PATCH",
            resource.path(_namespace(obj), obj["metadata"]["name"]),
            obj,
            content_type=APPLY_PATCH,
            params={"fieldManager": field_manager, "force": "true" if force else "false"},
        )

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        grace_period_seconds: int | None = None,
    ) -> None:
        """Delete in the background; absence is not an error."""
        options: Object = {"propagationPolicy": "Background"}
        if grace_period_seconds is not None:
            options["gracePeriodSeconds"] = grace_period_seconds
        try:
            await self.request("DELETE", resource.path(namespace, name), options)
        except ApiError as error:
            if error.code != 404:
                raise

    async def discover(self, verb: str = "list") -> tuple[Resource, ...]:
        """Resource types that the API serves with a verb, one for each served version."""
        groups = await self.request("GET", "/apis")
        versions = ["v1", *(v["groupVersion"] for g in groups["groups"] for v in g["versions"])]
        found = []
        for api_version in versions:
            group, _, version = api_version.rpartition("/")
            path = f"/apis/{api_version}" if group else f"/api/{version}"
            for entry in (await self.request("GET", path))["resources"]:
                if "/" not in entry["name"] and verb in entry["verbs"]:
                    found.append(Resource(group, version, entry["name"], entry["kind"], entry["namespaced"]))
        return tuple(found)

    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
    ) -> AsyncGenerator[WatchEvent, None]:
        """List, then follow for ever, reconnecting by itself.

        Yields ADDED for what exists, SYNCED once the list is complete, then changes. After a gap
        (410 Gone) it lists anew and yields the difference, DELETED included, so a reader's copy is
        always exact. Ends only by cancellation, or by ApiError when the API refuses the request.
        """
        known: dict[tuple[str, str], Object] = {}
        synced = False
        delay = 0.1
        params = _selectors(label_selector, field_selector)
        while True:
            try:
                current = await self.list(
                    resource,
                    namespace,
                    label_selector=label_selector,
                    field_selector=field_selector,
                )
                fresh = {_key(item): item for item in current.items}
                for key in [k for k in known if k not in fresh]:
                    yield WatchEvent("DELETED", known.pop(key))
                for key, item in fresh.items():
                    before = known.get(key)
                    known[key] = item
                    if before is None:
                        yield WatchEvent("ADDED", item)
                    elif before["metadata"].get("resourceVersion") != item["metadata"].get("resourceVersion"):
                        yield WatchEvent("MODIFIED", item)
                if not synced:
                    synced = True
                    yield WatchEvent("SYNCED", {})
                version = current.resource_version
                while True:  # one turn a connection; each resumes at the last version seen
                    async for kind, obj in self._watch_once(resource, namespace, version, params):
                        delay = 0.1
                        version = obj["metadata"]["resourceVersion"]
                        if kind == "BOOKMARK":
                            continue
                        if kind == "DELETED":
                            known.pop(_key(obj), None)
                        else:
                            known[_key(obj)] = obj
                        yield WatchEvent(kind, obj)
            except ApiError as error:
                # 410: our revision was compacted; list anew. Others are worth a retry when transient.
                if error.code not in (410, 429, 500, 502, 503, 504):
                    raise
            except ApiUnreachable:
                pass
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5)

    async def _watch_once(
        self, resource: Resource, namespace: str | None, version: str, params: dict[str, str]
    ) -> AsyncIterator[tuple[Any, Object]]:
        query = {
            **params,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
        }
        try:
            async with self.session().get(
                self.server + resource.path(namespace),
                params=query,
                headers=self._headers(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                read_bufsize=1 << 22,
            ) as response:
                if response.status >= 400:
                    status = orjson.loads(await response.read())
                    raise ApiError(response.status, status.get("reason", ""), status.get("message", ""))
                async for line in _lines(response.content):
                    event = orjson.loads(line)
                    if event["type"] == "ERROR":
                        status = event["object"]
                        raise ApiError(
                            status.get("code", 500),
                            status.get("reason", ""),
                            status.get("message", ""),
                        )
                    yield event["type"], event["object"]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiUnreachable(f"watch of {resource.plural} at {self.server}: {error}") from error
        # The server closed the stream in good order; do not spin on one that does so at once.
        await asyncio.sleep(0.05)


_SILENCE = 20
"""Seconds after which a peer that answers nothing counts as gone, as behind a cut link."""


def _attentive_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket that notices within half a minute that nothing comes through any more."""
    made = socket.socket(address[0], address[1], address[2])
    made.setblocking(False)
    if made.family in (socket.AF_INET, socket.AF_INET6):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE // 2)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENCE // 4)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE * 1000)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Split without aiohttp's line limit: one object may be a megabyte."""
    rest = b""
    async for chunk in stream.iter_any():
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            if line:
                yield line


def _namespace(obj: Object) -> str | None:
    namespace: str | None = obj["metadata"].get("namespace")
    return namespace


def _key(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _selectors(label_selector: str, field_selector: str) -> dict[str, str]:
    params = {"labelSelector": label_selector, "fieldSelector": field_selector}
    return {k: v for k, v in params.items() if v}


class Cache:
    """A local copy of one collection, kept current by a watch.

    `objects` maps (namespace, name) to the object. Each callback is called after the copy changed,
    as `callback(old | None, new | None)`. Run it as a task: `async with asyncio.TaskGroup`.
    A writer hands in the answers of its writes (`wrote`, `erased`), so that it never decides on a copy
    that is older than what it did itself. `trim` takes from each object what its reader never needs.
    """

    def __init__(
        self,
        client: Client,
        resource: Resource,
        trim: Callable[[Object], None] | None = None,
        **selectors: str,
    ) -> None:
        self.client = client
        self.resource = resource
        self.selectors = selectors
        self._trim = trim
        self.objects: dict[tuple[str, str], Object] = {}
        self.synced = asyncio.Event()
        self._callbacks: list[Callable[[Object | None, Object | None], None]] = []
        self._seen = 0
        self._ahead: dict[tuple[str, str], int] = {}  # versions that the watch has not shown yet
        self._erased: set[str] = set()

    def on_change(self, callback: Callable[[Object | None, Object | None], None]) -> None:
        """Register a callback; it must not block."""
        self._callbacks.append(callback)

    def get(self, name: str, namespace: str = "") -> Object | None:
        """The object of that name, if known."""
        return self.objects.get((namespace, name))

    def wrote(self, obj: Object) -> None:
        """Take in the answer of a write before the watch shows it; one the watch has passed says nothing."""
        key, version = _key(obj), _version(obj)
        if version > max(self._seen, self._ahead.get(key, 0)):
            self._ahead[key] = version
            obj.setdefault("apiVersion", self.resource.api_version)
            obj.setdefault("kind", self.resource.kind)
            self._put(key, obj)

    def erased(self, obj: Object) -> None:
        """Forget an object whose deletion was answered, although the watch may still show it for a while."""
        known = self.objects.get(_key(obj))
        if known is not None and known["metadata"]["uid"] == obj["metadata"]["uid"]:
            self._erased.add(known["metadata"]["uid"])
            self._put(_key(obj), None)

    async def run(self) -> None:
        """Follow the collection until cancelled."""
        async with contextlib.aclosing(self.client.watch(self.resource, **self.selectors)) as events:
            async for event in events:
                if event.type == "SYNCED":
                    self.synced.set()
                    continue
                if self._trim is not None:
                    self._trim(event.object)
                self._heard(event)

    def _heard(self, event: WatchEvent) -> None:
        key, version, uid = _key(event.object), _version(event.object), event.object["metadata"]["uid"]
        self._seen = max(self._seen, version)
        ahead = self._ahead.get(key, 0)
        if version >= ahead:
            self._ahead.pop(key, None)
        # The watch tells in order: what it has passed without telling is not there any more.
        for ghost in [k for k, written in self._ahead.items() if written < version and k != key]:
            if _version(self.objects.get(ghost, event.object)) == self._ahead.pop(ghost):
                self._put(ghost, None)
        if event.type == "DELETED":
            self._erased.discard(uid)
            known = self.objects.get(key)
            if known is not None and known["metadata"]["uid"] == uid:
                self._put(key, None)
        elif uid not in self._erased and version >= ahead:
            self._put(key, event.object)

    def _put(self, key: tuple[str, str], new: Object | None) -> None:
        old = self.objects.pop(key, None)
        if new is not None:
            self.objects[key] = new
        if old is None and new is None:
            return
        for callback in self._callbacks:
            callback(old, new)


def _version(obj: Object) -> int:
    """A revision as a number: of one collection they can be compared."""
    text = obj["metadata"].get("resourceVersion") or "0"
    return int(text) if text.isdigit() else 0
