"""The delta xDS protocol of one connection, without I/O.

Each type of a connection is a `Subscription`: requests and changes go in, responses come out. What
is owed to a client is a set of names, not a queue of messages, so that a slow client costs a bounded
amount of memory and is always sent the present state when it is ready for it.

Rules: Envoy's "xDS REST and gRPC protocol", incremental variant, and what Istio's ztunnel relies on
beyond it: subscribing to nothing by `*` in both lists, names of the form `NETWORK/IP`, services
bringing their workloads, and the workloads of the client's own node coming unasked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.envoy.names import ProxyKey
from meshlight.controlplane.resources import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    TYPE_PREFIX,
    WORKLOAD_TYPE,
    Change,
    Changes,
    Published,
    node_group,
    plain_workload,
)
from meshlight.proto import discovery_pb2 as ads

WILDCARD = "*"


class Resources(Protocol):
    """What a subscription reads: the present resources of one type."""

    def __iter__(self) -> Iterator[Published]: ...
    def get(self, name: str) -> Published | None:
        """The resource of exactly that name."""

    def find(self, name: str) -> list[Published]:
        """The resources a subscription to `name` means."""


@dataclass(frozen=True, slots=True)
class Response:
    """One DeltaDiscoveryResponse, ready to send."""

    type_url: str
    nonce: str
    resources: int
    removed: int
    encoded: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A client refused a response (NACK); `names` are the resources it was sent in it, if it was the last."""

    type_url: str
    nonce: str
    code: int
    message: str
    names: tuple[str, ...]


@dataclass(slots=True)
class Acknowledgement:
    """What was sent of a type and what the client made of it; times are the caller's clock."""

    sent_nonce: str = ""
    acked_nonce: str = ""
    sent_at: float = 0.0
    acked_at: float = 0.0
    last_error: str = ""
    sent_responses: int = 0
    rejected_responses: int = 0

    @property
    def status(self) -> str:
        """As `istioctl proxy-status` words it."""
        if self.last_error:
            return "ERROR"
        if not self.sent_nonce:
            return "NOT SENT"
        return "SYNCED" if self.sent_nonce == self.acked_nonce else "STALE"


class Subscription:
    """One type on one connection."""

    def __init__(self, type_url: str, resources: Resources, node: str) -> None:
        self.type_url = type_url
        self.wildcard = False
        self.acknowledgement = Acknowledgement()
        self._resources = resources
        self._node_group = node_group(node) if node else ""
        self._requested: set[str] = set()
        self._sent: set[str] = set()
        self._held: dict[str, str] = {}
        self._owed: set[str] = set()
        self._owed_removed: set[str] = set()
        self._in_flight: tuple[str, ...] = ()
        self._must_answer = False
        self._initial = True

    def names(self) -> list[str]:
        """What the client asked for."""
        return [WILDCARD] if self.wildcard else sorted(self._requested)

    def wanted(self) -> Iterator[Published]:
        """The present resources that the client asked for."""
        yield from (resource for resource in self._resources if self._wants(resource))

    def receive(self, request: ads.DeltaDiscoveryRequest, now: float) -> Rejection | None:
        """Take a request of this type: a subscription, an ACK or a NACK, or both at once."""
        rejection = self._acknowledge(request, now)
        subscribe, unsubscribe = set(request.resource_names_subscribe), set(request.resource_names_unsubscribe)
        if self._initial:
            self._initial = False
            self._must_answer = True
            self._held = dict(request.initial_resource_versions)
            self.wildcard = not subscribe
            if not self.wildcard and WILDCARD not in subscribe - unsubscribe:
                subscribe |= self._held.keys()  # a reconnecting client still wants what it holds
            if self.wildcard:
                self._owe_everything()
            elif self._node_group:
                self._owe_found(self._node_group)
        if WILDCARD in subscribe - unsubscribe:
            self.wildcard = True
            self._owe_everything()
        elif WILDCARD in unsubscribe:
            self.wildcard = False
        for name in unsubscribe - subscribe:
            self._requested.discard(name)
            self._sent.discard(name)
        for name in subscribe - unsubscribe - {WILDCARD}:
            self._requested.add(name)
            self._must_answer = True
            self._owe_found(name)
        return rejection

    def _acknowledge(self, request: ads.DeltaDiscoveryRequest, now: float) -> Rejection | None:
        state, nonce = self.acknowledgement, request.response_nonce
        if not nonce or not state.sent_nonce:
            return None
        if request.HasField("error_detail"):
            state.last_error = request.error_detail.message or f"code {request.error_detail.code}"
            state.rejected_responses += 1
            names = self._in_flight if nonce == state.sent_nonce else ()
            return Rejection(self.type_url, nonce, request.error_detail.code, state.last_error, names)
        state.acked_nonce, state.acked_at = nonce, now
        if nonce == state.sent_nonce:
            state.last_error = ""
            self._in_flight = ()
        return None

    def _owe_everything(self) -> None:
        self._must_answer = True
        present = {resource.name for resource in self._resources}
        self._owed |= present
        self._owed_removed |= self._held.keys() - present

    def _owe_found(self, name: str) -> None:
        found = self._resources.find(name)
        self._owed.update(resource.name for resource in found)
        if not found and name != self._node_group:
            # The protocol's answer for what does not exist, so that the client need not time out.
            self._owed_removed.add(name)

    def change(self, change: Change) -> bool:
        """Take what changed of this type; returns whether something is owed now."""
        for name, resource in change.updated.items():
            if self._wants(resource):
                self._owed.add(name)
                self._owed_removed.difference_update((name, *resource.aliases))
        for name, resource in change.removed.items():
            self._owed.discard(name)
            if self.wildcard or name in self._sent or not self._requested.isdisjoint((name, *resource.aliases)):
                self._owed_removed.add(name)
        return bool(self._owed or self._owed_removed)

    def _wants(self, resource: Published) -> bool:
        if self.wildcard or resource.name in self._sent or resource.name in self._requested:
            return True
        names = (*resource.aliases, *resource.groups)
        return self._node_group in names or not self._requested.isdisjoint(names)

    def owe_again(self, names: Iterable[str]) -> None:
        """Owe resources that the client has, where it asked for them."""
        self._owed.update(name for name in names if self.wildcard or name in self._requested)

    def respond(self, nonce: str, now: float, *, removals: bool = True) -> Response | None:
        """The response that is owed, if any; afterwards nothing is owed but, if held back, removals."""
        if not (self._owed or (self._owed_removed and removals) or self._must_answer):
            return None
        present = []
        for name in sorted(self._owed):
            resource = self._resources.get(name)
            if resource is not None and self._held.get(name) != resource.version:
                present.append(resource)
        if not self.wildcard:
            self._sent |= self._owed
            self._sent -= self._owed_removed
        removed = sorted(self._owed_removed) if removals else []
        if not (present or removed or self._must_answer):
            self._owed = set()
            return None
        head = ads.DeltaDiscoveryResponse(type_url=self.type_url, nonce=nonce, removed_resources=removed)
        encoded = head.SerializeToString() + b"".join(resource.fragment for resource in present)
        self._held = {}  # only a claim about the time before this stream
        self._owed, self._must_answer = set(), False
        self._owed_removed.difference_update(removed)
        self._in_flight = tuple(resource.name for resource in present)
        state = self.acknowledgement
        state.sent_nonce, state.sent_at = nonce, now
        state.sent_responses += 1
        return Response(self.type_url, nonce, len(present), len(removed), encoded)


class PlainWorkloads:
    """The workloads among the Address resources, under the older type of workloads alone."""

    def __init__(self, addresses: Resources) -> None:
        self._addresses = addresses

    def __iter__(self) -> Iterator[Published]:
        return _plain(self._addresses)

    def get(self, name: str) -> Published | None:
        """The workload of exactly that name."""
        resource = self._addresses.get(name)
        return plain_workload(resource) if resource is not None else None

    def find(self, name: str) -> list[Published]:
        """The workloads a subscription to `name` means; a service's name means its workloads."""
        return list(_plain(self._addresses.find(name)))


def _plain(resources: Iterable[Published]) -> Iterator[Published]:
    for resource in resources:
        if (plain := plain_workload(resource)) is not None:
            yield plain


@dataclass(frozen=True, slots=True)
class Proxy:
    """The client, from the node of its first request."""

    id: str
    node: str
    version: str
    cluster: str
    gateway: ProxyKey | None = None

    @classmethod
    def of(cls, node: ads.Node) -> Proxy:
        """Read a node; its `metadata` names are Istio's."""
        metadata = {name: value.string_value for name, value in node.metadata.fields.items()}
        return cls(
            id=node.id,
            node=metadata.get("NODE_NAME", ""),
            version=metadata.get("ISTIO_VERSION", ""),
            cluster=metadata.get("CLUSTER_ID", ""),
            gateway=ProxyKey(metadata["NAMESPACE"], metadata["GATEWAY_NAME"])
            if metadata.get("GATEWAY_NAME") and metadata.get("NAMESPACE")
            else None,
        )

    @property
    def name(self) -> str:
        """`POD.NAMESPACE` of `ztunnel~IP~POD.NAMESPACE~DOMAIN`."""
        parts = self.id.split("~")
        return parts[2] if len(parts) == 4 else self.id


class UnknownType(Exception):
    """A client asked for a resource type that is not served."""


class NotYours(Exception):
    """A client says it is a waypoint or gateway that its credentials are not of."""


Scopes = Callable[[ProxyKey], Mapping[str, Resources]]
"""The collections of a waypoint or gateway."""

_ORDER = {type_url: place for place, type_url in enumerate((AUTHORIZATION_TYPE, *wire.TYPES))}
_LAST = len(_ORDER)
# While something still counts on them: a policy that is replaced goes once its replacement is there.
_REMOVED_LAST = (wire.CLUSTER_TYPE, AUTHORIZATION_TYPE)


class Session:
    """All types of one connection. A waypoint's or gateway's has collections of its own, from `scopes`."""

    def __init__(self, collections: Mapping[str, Resources], id: int, scopes: Scopes | None = None) -> None:
        self.id = id
        self._scopes = scopes
        self.proxy = Proxy("", "", "", "")
        self.subscriptions: dict[str, Subscription] = {}
        self._sources: dict[str, Resources] = {
            **collections,
            WORKLOAD_TYPE: PlainWorkloads(collections[ADDRESS_TYPE]),
        }
        self._nonces = itertools.count(1)

    def receive(self, request: ads.DeltaDiscoveryRequest, now: float) -> Rejection | None:
        """Take one request. Raises UnknownType naming a type that is not served."""
        if request.HasField("node"):
            self.proxy = Proxy.of(request.node)
            if self.proxy.gateway is not None and self._scopes is not None:
                self._sources = dict(self._scopes(self.proxy.gateway))
        subscription = self.subscriptions.get(request.type_url)
        if subscription is None:
            source = self._sources.get(request.type_url)
            if source is None:
                known = ", ".join(name.removeprefix(TYPE_PREFIX) for name in self._sources)
                raise UnknownType(f"type_url {request.type_url!r} is not served; served are {known}")
            node = self.proxy.node if request.type_url != AUTHORIZATION_TYPE else ""
            subscription = Subscription(request.type_url, source, node)
            self.subscriptions[request.type_url] = subscription
        return subscription.receive(request, now)

    def change(self, changes: Changes) -> bool:
        """Take what changed; returns whether something is owed now."""
        owed = False
        for type_url, subscription in self.subscriptions.items():
            change = changes.get(ADDRESS_TYPE if type_url == WORKLOAD_TYPE else type_url)
            if change:
                owed |= subscription.change(_workloads_of(change) if type_url == WORKLOAD_TYPE else change)
        clusters, endpoints = changes.get(wire.CLUSTER_TYPE), self.subscriptions.get(wire.ENDPOINT_TYPE)
        if clusters and endpoints:
            # Envoy warms a changed cluster until it is told its endpoints anew, which it does not ask for.
            endpoints.owe_again(clusters.updated)
        return owed

    def respond(self, now: float) -> Iterator[Response]:
        """Every response that is owed, in an order in which nothing names what the client does not have:
        policies before workloads, clusters before routes, and removals of both after everything."""
        for type_url in sorted(self.subscriptions, key=lambda type_url: _ORDER.get(type_url, _LAST)):
            yield from self._respond(type_url, now, removals=type_url not in _REMOVED_LAST)
        for type_url in _REMOVED_LAST:
            if type_url in self.subscriptions:
                yield from self._respond(type_url, now, removals=True)

    def _respond(self, type_url: str, now: float, *, removals: bool) -> Iterator[Response]:
        nonce = f"{self.id}-{next(self._nonces)}"
        response = self.subscriptions[type_url].respond(nonce, now, removals=removals)
        if response is not None:
            yield response


def _workloads_of(change: Change) -> Change:
    return Change(
        {r.name: r for r in _plain(change.updated.values())},
        {r.name: r for r in _plain(change.removed.values())},
    )
