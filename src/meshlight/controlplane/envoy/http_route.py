"""HTTPRoute and GRPCRoute read into rules. Pure.

The API server has checked the objects' shape; what is left is meaning. What cannot be done is a `Problem`
that the route's status shows, never an exception.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from meshlight.controlplane.envoy import patterns
from meshlight.controlplane.envoy.routing import (
    Backend,
    BackendReference,
    Comparison,
    Cors,
    HeaderChanges,
    Mirror,
    ParentReference,
    PathChange,
    Problem,
    Redirect,
    RequestMatch,
    Retries,
    Route,
    RouteKey,
    Rule,
    Session,
    TextMatch,
)
from meshlight.controlplane.facts import ObjectKey
from meshlight.kube.resources import Object

GATEWAY_GROUP = "gateway.networking.k8s.io"
_DURATION = re.compile(r"(\d{1,5})(h|ms|m|s)")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_RETRY_ON = ("connect-failure", "refused-stream", "unavailable", "cancelled")


def parse(obj: Object) -> Route:
    """An HTTPRoute or GRPCRoute."""
    return _Reader(obj).route()


def duration(text: str | None) -> float:
    """Seconds of a Gateway API duration (GEP-2257); 0 when absent."""
    return sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(text or ""))


class _Reader:
    def __init__(self, obj: Object) -> None:
        self._obj, self._spec = obj, obj.get("spec") or {}
        metadata = obj["metadata"]
        self._namespace: str = metadata.get("namespace", "")
        self._key = RouteKey(obj["kind"], self._namespace, metadata["name"])
        self._grpc = obj["kind"] == "GRPCRoute"
        self._problems: list[Problem] = []

    def route(self) -> Route:
        metadata = self._obj["metadata"]
        rules = tuple(self._rule(i, rule) for i, rule in enumerate(self._spec.get("rules") or [{}]))
        return Route(
            key=self._key,
            created=metadata.get("creationTimestamp", ""),
            parents=parents(self._spec, self._namespace),
            hostnames=tuple(name.lower() for name in self._spec.get("hostnames") or ()),
            rules=rules,
            problems=tuple(self._problems),
            generation=metadata.get("generation", 1),
        )

    def _unsupported(self, what: str) -> None:
        self._problems.append(Problem("UnsupportedValue", f"{what} is not supported"))

    def _rule(self, index: int, rule: Object) -> Rule:
        read: dict[str, Any] = {
            "name": f"{self._key}/{rule.get('name') or index}",
            "backends": tuple(self._backend(ref) for ref in rule.get("backendRefs") or []),
            "matches": tuple(self._match(match) for match in rule.get("matches") or []),
        }
        for entry in rule.get("filters") or []:
            self._filter(entry, read)
        timeouts = rule.get("timeouts") or {}
        read["timeout"] = duration(timeouts.get("request"))
        per_try = duration(timeouts.get("backendRequest"))
        if retry := rule.get("retry"):
            read["retries"] = _retries(retry, per_try)
        elif per_try:
            read["retries"] = Retries(0, (), per_try=per_try)
        if persistence := rule.get("sessionPersistence"):
            read["session"] = _session(persistence, self._key)
        return Rule(**read)

    # Matches.

    def _match(self, match: Object) -> RequestMatch:
        headers = tuple(
            (entry["name"].lower(), self._text(entry, "header")) for entry in match.get("headers") or []
        )
        if self._grpc:
            return RequestMatch(path=self._grpc_path(match.get("method") or {}), headers=headers)
        query = tuple((entry["name"], self._text(entry, "query")) for entry in match.get("queryParams") or [])
        method = match.get("method")
        return RequestMatch(
            path=self._path(match["path"]) if match.get("path") else None,
            method=TextMatch(Comparison.EXACT, method) if method else None,
            headers=headers,
            query=query,
        )

    def _path(self, path: Object) -> TextMatch:
        value = path.get("value") or "/"
        match path.get("type", "PathPrefix"):
            case "Exact":
                return TextMatch(Comparison.EXACT, value)
            case "RegularExpression":
                return self._regex(value, "path")
            case _:
                return TextMatch(Comparison.PATH_PREFIX, value.rstrip("/") or "/")

    def _grpc_path(self, method: Object) -> TextMatch | None:
        service, name = method.get("service") or "", method.get("method") or ""
        if not service and not name:
            return None
        if method.get("type") == "RegularExpression":
            return self._regex(f"/{service or '[^/]+'}/{name or '[^/]+'}", "method")
        if service and name:
            return TextMatch(Comparison.EXACT, f"/{service}/{name}")
        if service:
            return TextMatch(Comparison.PREFIX, f"/{service}/")
        return TextMatch(Comparison.REGEX, f"/[^/]+/{re.escape(name)}")

    def _text(self, entry: Object, what: str) -> TextMatch:
        if entry.get("type") == "RegularExpression":
            return self._regex(entry.get("value", ""), f"{what} {entry['name']}")
        return TextMatch(Comparison.EXACT, entry.get("value", ""))

    def _regex(self, pattern: str, where: str) -> TextMatch:
        if fault := patterns.fault(pattern):
            self._problems.append(Problem("UnsupportedValue", f"{where}: {fault}"))
            return TextMatch(Comparison.REGEX, patterns.NEVER)
        return TextMatch(Comparison.REGEX, pattern)

    # Filters.

    def _filter(self, entry: Object, read: dict[str, Any]) -> None:
        match entry.get("type"):
            case "RequestHeaderModifier":
                read["request_headers"] = _changes(entry.get("requestHeaderModifier") or {})
            case "ResponseHeaderModifier":
                read["response_headers"] = _changes(entry.get("responseHeaderModifier") or {})
            case "RequestRedirect":
                read["redirect"] = _redirect(entry.get("requestRedirect") or {})
            case "URLRewrite":
                rewrite = entry.get("urlRewrite") or {}
                read["rewrite_host"] = rewrite.get("hostname")
                read["rewrite_path"] = _path_change(rewrite.get("path"))
            case "RequestMirror":
                mirror = self._mirror(entry.get("requestMirror") or {})
                read["mirrors"] = (*read.get("mirrors", ()), *([mirror] if mirror else []))
            case "CORS":
                read["cors"] = _cors(entry.get("cors") or {})
            case other:
                self._unsupported(f"filter {other}")

    def _mirror(self, mirror: Object) -> Mirror | None:
        reference = self._reference(mirror.get("backendRef") or {})
        if reference is None:
            return None
        if fraction := mirror.get("fraction"):
            return Mirror(reference, fraction["numerator"], fraction.get("denominator", 100))
        return Mirror(reference, mirror.get("percent", 100))

    # Backends.

    def _backend(self, ref: Object) -> Backend:
        changes: dict[str, HeaderChanges] = {}
        for entry in ref.get("filters") or []:
            match entry.get("type"):
                case "RequestHeaderModifier":
                    changes["request_headers"] = _changes(entry.get("requestHeaderModifier") or {})
                case "ResponseHeaderModifier":
                    changes["response_headers"] = _changes(entry.get("responseHeaderModifier") or {})
                case other:
                    self._unsupported(f"filter {other} of a backend")
        return Backend(self._reference(ref), ref.get("weight", 1), **changes)

    def _reference(self, ref: Object) -> BackendReference | None:
        reference = backend_reference(ref, self._namespace)
        if isinstance(reference, Problem):
            self._problems.append(reference)
            return None
        return reference


def backend_reference(ref: Object, namespace: str) -> BackendReference | Problem:
    """Read a BackendRef; whether it can be followed is for the compiler to find out."""
    group, kind = ref.get("group") or "", ref.get("kind") or "Service"
    key = ObjectKey(ref.get("namespace") or namespace, ref.get("name", ""))
    if (group, kind) == ("networking.istio.io", "Hostname"):
        return BackendReference("Hostname", ObjectKey("", key.name), ref.get("port", 0), group)
    if (group, kind) != ("", "Service"):
        return Problem(
            "InvalidKind", f"referencing unsupported backendRef: group {group!r} kind {kind!r}", False
        )
    if not ref.get("port"):
        return Problem("UnsupportedValue", f"backendRef {key.name}: port is required for a Service", False)
    return BackendReference("Service", key, ref["port"])


def parents(spec: Object, namespace: str) -> tuple[ParentReference, ...]:
    """The parentRefs of a route."""
    return tuple(
        ParentReference(
            kind=ref.get("kind") or "Gateway",
            key=ObjectKey(ref.get("namespace") or namespace, ref["name"]),
            group=GATEWAY_GROUP if ref.get("group") is None else ref["group"],
            section=ref.get("sectionName") or "",
            port=ref.get("port") or 0,
            index=index,
        )
        for index, ref in enumerate(spec.get("parentRefs") or [])
    )


def _changes(modifier: Object) -> HeaderChanges:
    return HeaderChanges(
        set=tuple((entry["name"], entry["value"]) for entry in modifier.get("set") or []),
        add=tuple((entry["name"], entry["value"]) for entry in modifier.get("add") or []),
        remove=tuple(modifier.get("remove") or ()),
    )


def _path_change(path: Mapping[str, Any] | None) -> PathChange | None:
    if not path:
        return None
    if path.get("type") == "ReplaceFullPath":
        return PathChange(full=path.get("replaceFullPath", ""))
    return PathChange(prefix=path.get("replacePrefixMatch", ""))


def _redirect(redirect: Object) -> Redirect:
    return Redirect(
        status=redirect.get("statusCode", 302),
        scheme=redirect.get("scheme"),
        host=redirect.get("hostname"),
        port=redirect.get("port"),
        path=_path_change(redirect.get("path")),
    )


def _cors(cors: Object) -> Cors:
    return Cors(
        origins=tuple(_origin(origin) for origin in cors.get("allowOrigins") or []),
        methods=tuple(cors.get("allowMethods") or ()),
        headers=tuple(cors.get("allowHeaders") or ()),
        exposed=tuple(cors.get("exposeHeaders") or ()),
        max_age=float(cors.get("maxAge", 5)),
        credentials=cors.get("allowCredentials"),
    )


def _origin(origin: str) -> TextMatch:
    if "*" not in origin:
        return TextMatch(Comparison.EXACT, origin)
    return TextMatch(Comparison.REGEX, ".*".join(re.escape(part) for part in origin.split("*")))


def _retries(retry: Object, per_try: float) -> Retries:
    codes = tuple(retry.get("codes") or ())
    on = (*_RETRY_ON, *(("retriable-status-codes",) if codes else ()))
    return Retries(
        retry.get("attempts", 2),
        on,
        codes,
        duration(retry.get("backoff")),
        per_try,
        ignore_previous_hosts=False,
    )


def _session(persistence: Object, key: RouteKey) -> Session:
    cookie = (persistence.get("cookieConfig") or {}).get("lifetimeType", "Session")
    return Session(
        name=persistence.get("sessionName") or f"session-{key.namespace}-{key.name}",
        in_header=persistence.get("type") == "Header",
        lifetime=duration(persistence.get("absoluteTimeout")) if cookie == "Permanent" else 0.0,
    )
