"""VirtualService read into rules, as a waypoint or a gateway follows them. Pure.

Unlike the Gateway API's routes its rules stand in their author's order: the first that matches wins. A short
host name means a Service of the VirtualService's own namespace. Delegates are merged into the rule that names
them (`with_delegates`). What cannot be followed is a `Problem`, never an exception.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshlight.controlplane.envoy import patterns, route_rules
from meshlight.controlplane.envoy.destination_rule import full_host, seconds
from meshlight.controlplane.envoy.routing import (
    Backend,
    BackendReference,
    Comparison,
    Cors,
    DirectAnswer,
    Fault,
    HeaderChanges,
    Mirror,
    PathChange,
    Problem,
    Redirect,
    RequestMatch,
    Retries,
    RouteKey,
    Rule,
    TextMatch,
)
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.settings import Mesh
from meshlight.kube.resources import Object

MESH = "mesh"
"""The gateway that stands for all traffic inside the mesh."""
_RETRY_ON = ("connect-failure", "refused-stream", "unavailable", "cancelled")
_ANY_PATH = TextMatch(Comparison.PREFIX, "/")
Ports = Callable[[BackendReference], Sequence[int]]
"""The ports of what a destination means; empty where it is not known."""


@dataclass(frozen=True, slots=True)
class Match:
    """A request match with what only connections have: `port` (0: any) and the gateways it is for."""

    request: RequestMatch
    port: int = 0
    gateways: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpRule:
    """One entry of `http`; `rule.matches` is empty, `matches` has them."""

    rule: Rule
    matches: tuple[Match, ...]
    delegate: ObjectKey | None = None


@dataclass(frozen=True, slots=True)
class ConnectionRule:
    """One entry of `tcp` or `tls`: any of its ports (none: all) and server names, and where it goes."""

    ports: tuple[int, ...]
    server_names: tuple[str, ...]
    gateways: tuple[str, ...]
    backends: tuple[Backend, ...]


@dataclass(frozen=True, slots=True)
class VirtualService:
    """A VirtualService read. `hosts` are full names, possibly wildcards; empty for a delegate."""

    key: ObjectKey
    created: str
    hosts: tuple[str, ...]
    gateways: tuple[str, ...]
    http: tuple[HttpRule, ...]
    tls: tuple[ConnectionRule, ...]
    tcp: tuple[ConnectionRule, ...]
    export_to: tuple[str, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def age(self) -> tuple[str, str]:
        """Older ones win, then by name."""
        return self.created, f"{self.key.namespace}/{self.key.name}"

    def applies_to(self, gateway: str) -> bool:
        """Whether it is for a gateway: MESH, or `NAMESPACE/NAME`."""
        return gateway in self.gateways

    def visible_in(self, namespace: str) -> bool:
        """Whether `exportTo` lets a namespace see it."""
        if not self.export_to or "*" in self.export_to or namespace in self.export_to:
            return True
        return "." in self.export_to and namespace == self.key.namespace

    def rules(self, gateway: str, port: int, ports: Ports) -> list[Rule]:
        """The rules for requests to a port, in order; destinations without a port get the one meant."""
        found = []
        for entry in self.http:
            chosen = [
                match.request
                for match in entry.matches
                if match.port in (0, port) and (not match.gateways or gateway in match.gateways)
            ]
            if entry.matches and not chosen:
                continue
            found.append(_placed(replace(entry.rule, matches=tuple(chosen)), port, ports))
        return found

    def connection(
        self, gateway: str, port: int, server_name: str | None, ports: Ports
    ) -> tuple[Backend, ...] | None:
        """Where connections to a port go: by `tls` rules with a server name, else by `tcp` rules."""
        for rule in self.tls if server_name is not None else self.tcp:
            if rule.ports and port not in rule.ports:
                continue
            if rule.gateways and gateway not in rule.gateways:
                continue
            if server_name is not None and not any(_covers(name, server_name) for name in rule.server_names):
                continue
            return tuple(_backend_port(backend, port, ports) for backend in rule.backends)
        return None


def _covers(pattern: str, name: str) -> bool:
    return pattern in ("*", name) or (pattern.startswith("*.") and name.endswith(pattern[1:]))


def _placed(rule: Rule, port: int, ports: Ports) -> Rule:
    return replace(
        rule,
        backends=tuple(_backend_port(backend, port, ports) for backend in rule.backends),
        mirrors=tuple(replace(m, reference=_port(m.reference, port, ports)) for m in rule.mirrors),
    )


def _backend_port(backend: Backend, port: int, ports: Ports) -> Backend:
    if backend.reference is None:
        return backend
    return replace(backend, reference=_port(backend.reference, port, ports))


def _port(reference: BackendReference, port: int, ports: Ports) -> BackendReference:
    """A destination without a port means its service's only one, else the one that was asked for."""
    if reference.port:
        return reference
    known = ports(reference)
    return replace(reference, port=known[0] if len(known) == 1 else port)


def with_delegates(
    root: VirtualService, delegate: Callable[[ObjectKey], VirtualService | None]
) -> VirtualService:
    """The rules of delegates in place of those that name them. One level deep, as in Istio: a delegate's own
    delegates are ignored, and one that does not exist leaves its rule without destination."""
    rules: list[HttpRule] = []
    for entry in root.http:
        if entry.delegate is None:
            rules.append(entry)
            continue
        found = delegate(entry.delegate)
        if found is None:
            rules.append(replace(entry, delegate=None))
            continue
        for inner in found.http:
            if inner.delegate is None and (merged := _merge(entry, inner)) is not None:
                rules.append(merged)
    return replace(root, http=tuple(rules))


def _merge(outer: HttpRule, inner: HttpRule) -> HttpRule | None:
    """A delegate's rule under the root's matches; None when they exclude each other."""
    if not outer.matches or not inner.matches:
        return replace(inner, matches=outer.matches or inner.matches)
    pairs = [_both(a, b) for a in outer.matches for b in inner.matches]
    kept = tuple(match for match in pairs if match is not None)
    return replace(inner, matches=kept) if kept else None


def _both(outer: Match, inner: Match) -> Match | None:
    a, b = outer.request, inner.request
    path = _narrower(a.path, b.path)
    if path is None and (a.path or b.path):
        return None
    if outer.port and inner.port and outer.port != inner.port:
        return None
    if a.method and b.method and a.method != b.method:
        return None
    request = RequestMatch(
        path=path,
        method=b.method or a.method,
        headers=(*a.headers, *b.headers),
        query=(*a.query, *b.query),
        scheme=b.scheme or a.scheme,
        authority=b.authority or a.authority,
        source_namespace=b.source_namespace or a.source_namespace,
    )
    return Match(request, inner.port or outer.port, inner.gateways or outer.gateways)


def _narrower(outer: TextMatch | None, inner: TextMatch | None) -> TextMatch | None:
    """The path that both match: the delegate's, if it lies within the root's."""
    if outer is None or inner is None:
        return inner or outer
    if outer.comparison is Comparison.PREFIX and inner.comparison in (Comparison.PREFIX, Comparison.EXACT):
        return inner if inner.value.startswith(outer.value) else None
    return inner if inner == outer else None


def compile_routes(
    routing: VirtualService, gateway: str, port: int, ports: Ports, clusters: route_rules.Clusters
) -> list[Any]:
    """Envoy's routes for requests to a port, in their author's order."""
    name = str(RouteKey("VirtualService", routing.key.namespace, routing.key.name))
    made = []
    for rule in routing.rules(gateway, port, ports):
        for match in rule.matches or (RequestMatch(),):
            for entry in route_rules.compile_rule(rule, match, clusters):
                entry.metadata.filter_metadata[route_rules.ROUTE_METADATA].update({"name": name})
                made.append(entry)
    return made


def parse(mesh: Mesh, obj: Object) -> VirtualService:
    """Read a VirtualService; the API server has checked its shape."""
    return _Reader(mesh, obj).virtual_service()


class _Reader:
    def __init__(self, mesh: Mesh, obj: Object) -> None:
        self._mesh, self._obj = mesh, obj
        self._spec: Object = obj.get("spec") or {}
        self._namespace: str = obj["metadata"]["namespace"]
        self._route = RouteKey("VirtualService", self._namespace, obj["metadata"]["name"])
        self._problems: list[Problem] = []

    def virtual_service(self) -> VirtualService:
        spec = self._spec
        http = tuple(self._http(index, entry or {}) for index, entry in enumerate(spec.get("http") or []))
        tls = tuple(self._connection(entry or {}) for entry in spec.get("tls") or [])
        tcp = tuple(self._connection(entry or {}) for entry in spec.get("tcp") or [])
        return VirtualService(
            key=ObjectKey.of(self._obj),
            created=self._obj["metadata"].get("creationTimestamp", ""),
            hosts=tuple(full_host(self._mesh, host, self._namespace) for host in spec.get("hosts") or []),
            gateways=self._gateways(spec.get("gateways")) or (MESH,),
            http=http,
            tls=tls,
            tcp=tcp,
            export_to=tuple(spec.get("exportTo") or ()),
            problems=tuple(self._problems),
        )

    def _gateways(self, names: Sequence[str] | None) -> tuple[str, ...]:
        return tuple(
            name if name == MESH or "/" in name else f"{self._namespace}/{name}" for name in names or ()
        )

    def _problem(self, message: str) -> None:
        self._problems.append(Problem("UnsupportedValue", message))

    # Rules.

    def _http(self, index: int, entry: Object) -> HttpRule:
        where = f"spec.http[{index}]"
        delegate = entry.get("delegate") or {}
        rewriting = entry.get("rewrite") or {}
        matches = tuple(
            self._match(match or {}, f"{where}.match[{i}]") for i, match in enumerate(entry.get("match") or [])
        )
        if rewriting.get("uri") and not matches:
            matches = (Match(RequestMatch(path=_ANY_PATH)),)
        rule = Rule(
            name=f"{self._route}/{entry.get('name') or index}",
            backends=tuple(self._backend(share or {}) for share in entry.get("route") or []),
            mirrors=self._mirrors(entry),
            request_headers=_changes((entry.get("headers") or {}).get("request")),
            response_headers=_changes((entry.get("headers") or {}).get("response")),
            redirect=_redirect(entry["redirect"]) if entry.get("redirect") else None,
            answer=_answer(entry["directResponse"]) if entry.get("directResponse") else None,
            rewrite_host=rewriting.get("authority"),
            rewrite_path=self._rewrite(rewriting, matches, where),
            timeout=seconds(entry.get("timeout")),
            retries=_retries(entry["retries"]) if entry.get("retries") is not None else None,
            cors=self._cors(entry["corsPolicy"], where) if entry.get("corsPolicy") else None,
            fault=_fault(entry["fault"]) if entry.get("fault") else None,
        )
        to = ObjectKey(delegate.get("namespace") or self._namespace, delegate["name"]) if delegate else None
        return HttpRule(rule, matches, to)

    def _connection(self, entry: Object) -> ConnectionRule:
        matches = [match or {} for match in entry.get("match") or []]
        return ConnectionRule(
            ports=tuple(match["port"] for match in matches if match.get("port")),
            server_names=tuple(name for match in matches for name in match.get("sniHosts") or []),
            gateways=tuple(g for match in matches for g in self._gateways(match.get("gateways"))),
            backends=tuple(self._backend(share or {}) for share in entry.get("route") or []),
        )

    def _backend(self, share: Object) -> Backend:
        headers = share.get("headers") or {}
        weight = share.get("weight")
        alone = weight is None
        return Backend(
            self._reference(share.get("destination") or {}),
            1 if alone else int(weight or 0),
            _changes(headers.get("request")),
            _changes(headers.get("response")),
        )

    def _reference(self, destination: Object) -> BackendReference:
        host = full_host(self._mesh, str(destination.get("host") or ""), self._namespace)
        port = int((destination.get("port") or {}).get("number") or 0)
        subset = str(destination.get("subset") or "")
        suffix = f".svc.{self._mesh.cluster_domain}"
        name, dot, namespace = host.removesuffix(suffix).partition(".")
        if host.endswith(suffix) and dot and "." not in namespace:
            return BackendReference("Service", ObjectKey(namespace, name), port, subset=subset)
        return BackendReference("Hostname", ObjectKey("", host), port, subset=subset)

    def _mirrors(self, entry: Object) -> tuple[Mirror, ...]:
        found = []
        if entry.get("mirror"):
            percent = entry.get("mirrorPercentage") or entry.get("mirrorPercent")
            found.append(Mirror(self._reference(entry["mirror"]), *_share(percent)))
        for mirror in entry.get("mirrors") or []:
            share = _share(mirror.get("percentage"))
            found.append(Mirror(self._reference(mirror.get("destination") or {}), *share))
        return tuple(found)

    # Matches.

    def _match(self, match: Object, where: str) -> Match:
        ignore_case = bool(match.get("ignoreUriCase"))
        headers = [
            (name.lower(), self._text(value, f"{where}.headers[{name}]"))
            for name, value in (match.get("headers") or {}).items()
        ]
        headers += [
            (name.lower(), replace(self._text(value, f"{where}.withoutHeaders[{name}]"), invert=True))
            for name, value in (match.get("withoutHeaders") or {}).items()
        ]
        if match.get("sourceLabels"):
            self._problem(f"{where}.sourceLabels: a waypoint knows who calls by identity, not by labels")
        uri = match.get("uri")
        request = RequestMatch(
            path=replace(self._text(uri, f"{where}.uri"), ignore_case=ignore_case) if uri else None,
            method=self._optional(match, "method", where),
            headers=tuple(headers),
            query=tuple(
                (name, self._text(value, f"{where}.queryParams[{name}]"))
                for name, value in (match.get("queryParams") or {}).items()
            ),
            scheme=self._optional(match, "scheme", where),
            authority=self._optional(match, "authority", where),
            source_namespace=match.get("sourceNamespace") or "",
        )
        return Match(request, int(match.get("port") or 0), self._gateways(match.get("gateways")))

    def _optional(self, match: Object, name: str, where: str) -> TextMatch | None:
        return self._text(match[name], f"{where}.{name}") if match.get(name) else None

    def _text(self, value: Mapping[str, Any] | None, where: str) -> TextMatch:
        """Istio's StringMatch; an empty one asks for presence."""
        value = value or {}
        if "exact" in value:
            return TextMatch(Comparison.EXACT, value["exact"])
        if "prefix" in value:
            return TextMatch(Comparison.PREFIX, value["prefix"])
        if "regex" in value:
            if fault := patterns.fault(value["regex"]):
                self._problem(f"{where}.regex: {value['regex']!r}: {fault}")
                return TextMatch(Comparison.REGEX, patterns.NEVER)
            return TextMatch(Comparison.REGEX, value["regex"])
        return TextMatch(Comparison.PRESENT)

    # Actions.

    def _rewrite(self, rewrite: Object, matches: Sequence[Match], where: str) -> PathChange | None:
        if pattern := rewrite.get("uriRegexRewrite"):
            if fault := patterns.fault(pattern.get("match") or ""):
                self._problem(f"{where}.rewrite.uriRegexRewrite.match: {fault}")
                return None
            return PathChange(pattern=pattern.get("match") or "", replacement=pattern.get("rewrite") or "")
        uri = rewrite.get("uri")
        if not uri:
            return None
        by_pattern = any(m.request.path and m.request.path.comparison is Comparison.REGEX for m in matches)
        return PathChange(full=uri) if by_pattern else PathChange(prefix=uri)

    def _cors(self, cors: Object, where: str) -> Cors:
        origins = [
            self._text(value, f"{where}.corsPolicy.allowOrigins") for value in cors.get("allowOrigins") or []
        ]
        origins += [
            TextMatch(Comparison.REGEX, ".*") if origin == "*" else TextMatch(Comparison.EXACT, origin)
            for origin in cors.get("allowOrigin") or []
        ]
        return Cors(
            origins=tuple(origins),
            methods=tuple(cors.get("allowMethods") or ()),
            headers=tuple(cors.get("allowHeaders") or ()),
            exposed=tuple(cors.get("exposeHeaders") or ()),
            max_age=seconds(cors["maxAge"]) if cors.get("maxAge") else None,
            credentials=cors.get("allowCredentials"),
        )


def _changes(headers: Mapping[str, Any] | None) -> HeaderChanges:
    headers = headers or {}
    return HeaderChanges(
        set=tuple((headers.get("set") or {}).items()),
        add=tuple((headers.get("add") or {}).items()),
        remove=tuple(headers.get("remove") or ()),
    )


def _percent(value: object) -> float:
    """A Percent object, or the older plain number; 100 when absent."""
    if isinstance(value, Mapping):
        return float(value.get("value") or 0)
    return 100.0 if value is None else float(str(value))


def _share(value: object) -> tuple[int, int]:
    return round(_percent(value) * 10_000), 1_000_000


def _redirect(redirect: Object) -> Redirect:
    uri = redirect.get("uri")
    path = None
    if uri:
        path = (
            PathChange(prefix=uri.removeprefix("%PREFIX()%")) if "%PREFIX()%" in uri else PathChange(full=uri)
        )
    port = redirect.get("port")
    if redirect.get("derivePort") == "FROM_PROTOCOL_DEFAULT" and redirect.get("scheme"):
        port = 443 if redirect["scheme"] == "https" else 80
    return Redirect(
        status=int(redirect.get("redirectCode") or 301),
        scheme=redirect.get("scheme"),
        host=redirect.get("authority"),
        port=port,
        path=path,
    )


def _answer(answer: Object) -> DirectAnswer:
    body = answer.get("body") or {}
    return DirectAnswer(int(answer.get("status") or 200), str(body.get("string") or body.get("bytes") or ""))


def _retries(retries: Object) -> Retries:
    words = [word.strip() for word in str(retries.get("retryOn") or "").split(",") if word.strip()]
    codes = tuple(int(word) for word in words if re.fullmatch(r"\d{3}", word))
    on = tuple(word for word in words if not word.isdigit())
    if codes:
        on = (*on, "retriable-status-codes")
    return Retries(
        attempts=int(retries.get("attempts", 2)),
        on=on or _RETRY_ON,
        codes=codes,
        backoff=seconds(retries.get("backoff")),
        per_try=seconds(retries.get("perTryTimeout")),
        ignore_previous_hosts=retries.get("retryIgnorePreviousHosts", True) is not False,
    )


def _fault(fault: Object) -> Fault:
    delay, abort = fault.get("delay") or {}, fault.get("abort") or {}
    grpc = abort.get("grpcStatus")
    return Fault(
        delay=seconds(delay.get("fixedDelay")),
        delay_percent=_percent(delay.get("percentage", delay.get("percent"))) if delay else 0.0,
        abort_status=int(abort.get("httpStatus") or 0),
        abort_grpc=_GRPC_CODES.get(str(grpc)) if grpc else None,
        abort_percent=_percent(abort.get("percentage", abort.get("percent"))) if abort else 0.0,
    )


_GRPC_CODES = {
    name: number
    for number, name in enumerate(
        (
            "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
            "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
            "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
        )
    )
}  # fmt: skip
