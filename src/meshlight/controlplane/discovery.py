"""The push stage: object changes gathered into batches, and every connection told what it is owed.

A batch closes when no change came for the debounce time, or at its limit. Nothing is compiled or
sent before the first complete picture: a proxy that reconnects to a starting istiod must not be
told that what is not yet listed is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import meshlight
from meshlight.controlplane import key_sets
from meshlight.controlplane.envoy.index import EnvoyIndex
from meshlight.controlplane.envoy.names import ProxyKey, account_names
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.identity import Caller
from meshlight.controlplane.index import Index
from meshlight.controlplane.logs import Scope
from meshlight.controlplane.metrics import Metrics
from meshlight.controlplane.resources import TYPE_PREFIX, Changes
from meshlight.controlplane.settings import Mesh
from meshlight.controlplane.xds import NotYours, Proxy, Rejection, Response, Session
from meshlight.kube.resources import Object
from meshlight.proto import discovery_pb2 as ads

log = Scope("ads")


@dataclass(slots=True, eq=False)
class Connection:
    """One xDS stream. `owed` is set while there is something to send; times are Unix seconds."""

    session: Session
    peer: str
    connected_at: float
    caller: Caller | None = None
    owed: asyncio.Event = field(default_factory=asyncio.Event)
    owed_since: float | None = None


Verdict = Callable[[Connection, Rejection | None], None]


class Discovery:
    """The index, and the connections that follow it."""

    def __init__(self, mesh: Mesh, metrics: Metrics, debounce: timedelta, limit: timedelta) -> None:
        self.index = Index(mesh)
        self.envoy = EnvoyIndex(self.index, key_sets.unusable())
        self.key_sets = key_sets.KeySets(self._key_set)
        self.metrics = metrics
        self.connections: set[Connection] = set()
        self.synced = asyncio.Event()
        self._debounce, self._limit = debounce.total_seconds(), limit.total_seconds()
        self._changed = asyncio.Event()
        self._first_change = 0.0
        self._last_change = 0.0
        self._ids = itertools.count(1)
        self._on_verdict: list[Verdict] = []
        self._on_commit: list[Callable[[], None]] = []
        self._count_connections()

    def on_verdict(self, callback: Verdict) -> None:
        """Register what hears of every refusal, with its connection, and (None) of a connection's end."""
        self._on_verdict.append(callback)

    def on_commit(self, callback: Callable[[], None]) -> None:
        """Register what is called after each batch has been compiled."""
        self._on_commit.append(callback)

    def observe(self, kind: str, key: ObjectKey, obj: Object | None) -> None:
        """Take an object's present state. One that cannot be read keeps its last readable state."""
        try:
            if self.index.takes(kind):
                self.index.observe(kind, key, obj)
            self.envoy.observe(kind, key, obj)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.metrics.unreadable_objects.inc(kind)
            log.error(
                "object could not be read; its last readable state stays", kind=kind, key=key, error=repr(error)
            )
        if kind == "RequestAuthentication":
            self.key_sets.want(self.envoy.policies.key_set_uris())
        self._note_change()

    def _key_set(self, uri: str, text: str) -> None:
        self.envoy.set_key_set(uri, text)
        self._note_change()

    def _note_change(self) -> None:
        now = time.monotonic()
        if not self._changed.is_set():
            self._first_change = now
        self._last_change = now
        if self.index.pending() or self.envoy.pending():
            self._changed.set()

    def start(self) -> None:
        """Say that every object has been observed once; connections are served from now on."""
        self._push()
        self.synced.set()

    async def run(self) -> None:
        """Push batches until cancelled; `start` comes first."""
        await self.synced.wait()
        while True:
            await self._changed.wait()
            await self._batch_closed()
            self._push()

    async def _batch_closed(self) -> None:
        while True:
            end = min(self._last_change + self._debounce, self._first_change + self._limit)
            if (wait := end - time.monotonic()) <= 0:
                return
            await asyncio.sleep(wait)

    def _push(self) -> None:
        self._changed.clear()
        begun = time.monotonic()
        changes, of_proxies = self.index.commit(), self.envoy.commit()
        for failure in self.index.failures:
            self.metrics.internal_errors.inc()
            log.error(
                "object could not be compiled; what proxies have of it stays",
                key=failure.key,
                error=failure.error,
            )
        self.index.failures.clear()
        for callback in self._on_commit:
            callback()
        if not changes and not of_proxies:
            return
        since = self._first_change
        self.metrics.debounce.observe(max(begun - since, 0))
        for type_url in {*changes, *(url for change in of_proxies.values() for url in change)}:
            self.metrics.push_triggers.inc(metric_type(type_url))
        self.metrics.services.set(self.index.service_count())
        for connection in self.connections:
            gateway = connection.session.proxy.gateway
            concerned = changes if gateway is None else of_proxies.get(gateway, {})
            if connection.session.change(concerned):
                connection.owed_since = connection.owed_since or since
                connection.owed.set()
        summary: dict[str, object] = {
            type_url.rpartition(".")[2]: {"updated": len(change.updated), "removed": len(change.removed)}
            for type_url, change in changes.items()
        }
        summary |= {f"{key.namespace}/{key.gateway}": _counts(change) for key, change in of_proxies.items()}
        log.info("push", connections=len(self.connections), changes=summary)

    @contextlib.contextmanager
    def connection(self, peer: str, caller: Caller | None = None) -> Iterator[Connection]:
        """A connection for as long as its stream lives; `caller` None is one without credentials."""
        session = Session(
            self.index.collections, next(self._ids), lambda key: self.envoy.proxy(key).collections
        )
        connection = Connection(session, peer, time.time(), caller)
        self.connections.add(connection)
        self._count_connections()
        try:
            yield connection
        finally:
            self.connections.discard(connection)
            self._count_connections()
            for callback in self._on_verdict:
                callback(connection, None)
            log.info("xDS stream ended", proxy=session.proxy.id, peer=peer)

    def _count_connections(self) -> None:
        self.metrics.connections.labels(version=meshlight.__version__).set(len(self.connections))

    def receive(self, connection: Connection, request: ads.DeltaDiscoveryRequest) -> None:
        """Take a request of a client; raises xds.UnknownType and xds.NotYours."""
        session = connection.session
        if request.HasField("node"):
            _check(connection.caller, Proxy.of(request.node).gateway)
        fresh = request.type_url not in session.subscriptions
        rejection = session.receive(request, time.time())
        if rejection is not None:
            self.metrics.rejects.inc(metric_type(rejection.type_url))
            for callback in self._on_verdict:
                callback(connection, rejection)
            log.warn(
                "push rejected by proxy",
                proxy=session.proxy.id,
                type=short_name(rejection.type_url),
                nonce=rejection.nonce,
                code=rejection.code,
                error=rejection.message,
            )
        elif fresh:
            subscription = session.subscriptions[request.type_url]
            log.info(
                "xDS subscription",
                proxy=session.proxy.id,
                peer=connection.peer,
                type=short_name(request.type_url),
                wildcard=subscription.wildcard,
                held=len(request.initial_resource_versions),
            )
        connection.owed.set()

    def responses(self, connection: Connection) -> Iterator[Response]:
        """What is owed to a client now; account for each once sent with `sent`."""
        connection.owed.clear()
        yield from connection.session.respond(time.time())

    def sent(self, connection: Connection, response: Response) -> None:
        """Account for a response that left."""
        name = short_name(response.type_url)
        self.metrics.pushes.inc(metric_type(response.type_url))
        self.metrics.sizes.labels(type=metric_type(response.type_url)).observe(len(response.encoded))
        log.debug(
            "response sent",
            proxy=connection.session.proxy.id,
            type=name,
            nonce=response.nonce,
            resources=response.resources,
            removed=response.removed,
            size=len(response.encoded),
        )

    def converged(self, connection: Connection) -> None:
        """Account for a client having been sent everything it was owed."""
        if connection.owed_since is not None and not connection.owed.is_set():
            self.metrics.convergence.observe(time.monotonic() - connection.owed_since)
            connection.owed_since = None


_METRIC_TYPES = {
    "Cluster": "cds", "Listener": "lds", "RouteConfiguration": "rds", "ClusterLoadAssignment": "eds",
    "Secret": "sds", "TypedExtensionConfig": "ecds", "Address": "wds", "Workload": "wds",
    "Authorization": "wads",
}  # fmt: skip


def metric_type(type_url: str) -> str:
    """A type as Istio's metrics name it: `cds`, `wds` …; one they do not know by its URL."""
    return _METRIC_TYPES.get(type_url.rpartition(".")[2], type_url)


def short_name(type_url: str) -> str:
    """A type as logs and metrics name it: `istio.workload.Address`."""
    return type_url.removeprefix(TYPE_PREFIX)


def _check(caller: Caller | None, gateway: ProxyKey | None) -> None:
    """A waypoint or gateway shows the token of its own service account."""
    if caller is None or gateway is None:
        return
    account = caller.service_account
    if account.namespace != gateway.namespace or account.name not in account_names(gateway.gateway):
        raise NotYours(
            f"service account {account} is not that of gateway {gateway.namespace}/{gateway.gateway}"
        )


def _counts(changes: Changes) -> dict[str, str]:
    return {t.rpartition(".")[2]: f"+{len(c.updated)} -{len(c.removed)}" for t, c in changes.items()}
