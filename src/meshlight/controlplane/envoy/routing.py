"""What can be said about requests and where they go, whoever says it.

HTTPRoute, GRPCRoute and VirtualService are read into these; `route_rules` turns them into Envoy's routes.
Durations are seconds, 0 meaning none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from meshlight.controlplane.facts import ObjectKey


class Comparison(Enum):
    """How a text is compared."""

    EXACT = "exact"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    REGEX = "regex"
    PRESENT = "present"
    PATH_PREFIX = "path-prefix"
    """Whole segments: `/a` is a prefix of `/a` and `/a/b`, not of `/ab`."""


@dataclass(frozen=True, slots=True)
class TextMatch:
    """A text compared with `value`."""

    comparison: Comparison
    value: str = ""
    invert: bool = False
    ignore_case: bool = False


@dataclass(frozen=True, slots=True)
class RequestMatch:
    """All of these must hold; an empty one holds for every request."""

    path: TextMatch | None = None
    method: TextMatch | None = None
    headers: tuple[tuple[str, TextMatch], ...] = ()
    query: tuple[tuple[str, TextMatch], ...] = ()
    scheme: TextMatch | None = None
    authority: TextMatch | None = None
    source_namespace: str = ""

    @property
    def precedence(self) -> tuple[int, int, int, int, int]:
        """Greater is more specific, in the Gateway API's order: path, method, headers, query."""
        ranks = {Comparison.EXACT: 3, Comparison.PATH_PREFIX: 2, Comparison.PREFIX: 2, Comparison.REGEX: 1}
        path = self.path or TextMatch(Comparison.PATH_PREFIX, "/")
        rank = ranks.get(path.comparison, 0)
        length = len(path.value.rstrip("/")) if path.comparison is Comparison.PATH_PREFIX else len(path.value)
        return rank, length, int(self.method is not None), len(self.headers), len(self.query)


@dataclass(frozen=True, slots=True)
class HeaderChanges:
    """Headers to set (replacing), to add (beside), and to remove."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.set or self.add or self.remove)


@dataclass(frozen=True, slots=True)
class BackendReference:
    """A Service's port by reference (`kind` Service), or a host name known to the mesh (`kind` Hostname)."""

    kind: str
    key: ObjectKey
    port: int
    group: str = ""
    subset: str = ""


@dataclass(frozen=True, slots=True)
class Backend:
    """A share of the requests and where it goes. `reference` None is a reference nobody can follow."""

    reference: BackendReference | None
    weight: int = 1
    request_headers: HeaderChanges = HeaderChanges()
    response_headers: HeaderChanges = HeaderChanges()


@dataclass(frozen=True, slots=True)
class Mirror:
    """A copy of a share of the requests, whose answers are ignored; `numerator` of `denominator`."""

    reference: BackendReference
    numerator: int = 100
    denominator: int = 100


@dataclass(frozen=True, slots=True)
class PathChange:
    """The whole path replaced, or the prefix that matched, or what a pattern finds."""

    full: str | None = None
    prefix: str | None = None
    pattern: str | None = None
    replacement: str = ""


@dataclass(frozen=True, slots=True)
class Redirect:
    """An answer that sends the client elsewhere; what is None stays as it was."""

    status: int = 302
    scheme: str | None = None
    host: str | None = None
    port: int | None = None
    path: PathChange | None = None


@dataclass(frozen=True, slots=True)
class DirectAnswer:
    """An answer by the proxy itself."""

    status: int
    body: str = ""


@dataclass(frozen=True, slots=True)
class Retries:
    """Further tries. `on` are Envoy's conditions; `codes` are statuses beside them."""

    attempts: int
    on: tuple[str, ...] = ()
    codes: tuple[int, ...] = ()
    backoff: float = 0.0
    per_try: float = 0.0
    ignore_previous_hosts: bool = True


@dataclass(frozen=True, slots=True)
class Cors:
    """Cross-origin policy."""

    origins: tuple[TextMatch, ...] = ()
    methods: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    exposed: tuple[str, ...] = ()
    max_age: float | None = None
    credentials: bool | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Faults injected into a share (percent) of the requests."""

    delay: float = 0.0
    delay_percent: float = 0.0
    abort_status: int = 0
    abort_grpc: int | None = None
    abort_percent: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """Requests of one client stay with one endpoint, by a cookie or header of that name."""

    name: str
    in_header: bool = False
    lifetime: float = 0.0
    path: str = "/"


@dataclass(frozen=True, slots=True)
class Rule:
    """Requests that match any of `matches` (none: all), and what becomes of them."""

    name: str
    matches: tuple[RequestMatch, ...] = ()
    backends: tuple[Backend, ...] = ()
    mirrors: tuple[Mirror, ...] = ()
    request_headers: HeaderChanges = HeaderChanges()
    response_headers: HeaderChanges = HeaderChanges()
    redirect: Redirect | None = None
    answer: DirectAnswer | None = None
    rewrite_host: str | None = None
    rewrite_path: PathChange | None = None
    timeout: float = 0.0
    retries: Retries | None = None
    cors: Cors | None = None
    fault: Fault | None = None
    session: Session | None = None


@dataclass(frozen=True, slots=True, order=True)
class RouteKey:
    """A route object."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class ParentReference:
    """What a route attaches to. `section` is a listener's name, `port` a port, where given."""

    kind: str
    key: ObjectKey
    group: str = "gateway.networking.k8s.io"
    section: str = ""
    port: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """Something of a route that cannot be done as it says; `reason` as the Gateway API words it."""

    reason: str
    message: str
    resolved: bool = True
    """Whether it concerns acceptance (True) or references (False)."""


@dataclass(frozen=True, slots=True)
class Route:
    """A route object read: rules in its own order."""

    key: RouteKey
    created: str
    parents: tuple[ParentReference, ...]
    hostnames: tuple[str, ...]
    rules: tuple[Rule, ...]
    problems: tuple[Problem, ...] = field(default=())
    generation: int = 1

    @property
    def age(self) -> tuple[str, str]:
        """Older ones win, then by name."""
        return self.created, f"{self.key.namespace}/{self.key.name}"

    def references(self) -> list[BackendReference]:
        """Everything the rules refer to."""
        found = [b.reference for rule in self.rules for b in rule.backends if b.reference]
        return found + [m.reference for rule in self.rules for m in rule.mirrors]
