"""Rules as Envoy's routes. Pure.

`Clusters` answers which cluster a backend is; None is one that cannot be followed, whose share of the
requests is answered 500, as the Gateway API asks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2 as parts
from envoy.extensions.filters.http.cors.v3 import cors_pb2
from envoy.extensions.filters.http.fault.v3 import fault_pb2 as http_fault
from envoy.extensions.filters.http.stateful_session.v3 import stateful_session_pb2
from envoy.extensions.http.stateful_session.cookie.v3 import cookie_pb2
from envoy.extensions.http.stateful_session.header.v3 import header_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from envoy.type.http.v3 import cookie_pb2 as http_cookie
from envoy.type.matcher.v3 import regex_pb2, string_pb2
from envoy.type.v3 import percent_pb2

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.envoy.routing import (
    Backend,
    BackendReference,
    Comparison,
    Cors,
    Fault,
    HeaderChanges,
    PathChange,
    Redirect,
    RequestMatch,
    Retries,
    Route,
    Rule,
    Session,
    TextMatch,
)

Clusters = Callable[[BackendReference], str | None]
CORS, FAULT, SESSION = (
    "envoy.filters.http.cors",
    "envoy.filters.http.fault",
    "envoy.filters.http.stateful_session",
)
ROUTE_METADATA = "meshlight.route"
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Placed:
    """An Envoy route with its place among the routes of a virtual host."""

    place: tuple[Any, ...]
    route: Any


def compile_route(route: Route, clusters: Clusters, listener_port: int = 0) -> list[Placed]:
    """Every match of every rule as a route of its own. `listener_port` is what redirects keep."""
    placed = []
    for number, rule in enumerate(route.rules):
        for match in rule.matches or (RequestMatch(),):
            specific = tuple(-value for value in match.precedence)
            for order, made in enumerate(compile_rule(rule, match, clusters, listener_port)):
                made.metadata.filter_metadata[ROUTE_METADATA].update({"name": str(route.key)})
                placed.append(Placed((*specific, *route.age, number, order), made))
    return placed


def in_order(placed: Iterable[Placed]) -> list[Any]:
    """Routes by the Gateway API's precedence."""
    return [one.route for one in sorted(placed, key=lambda one: one.place)]


def compile_rule(rule: Rule, match: RequestMatch, clusters: Clusters, listener_port: int = 0) -> Iterator[Any]:
    """The routes of one match: one, or two where a share of it is answered 500."""
    result = parts.Route(name=rule.name, match=route_match(match))
    _headers(result, rule.request_headers, rule.response_headers)
    if rule.cors:
        result.typed_per_filter_config[CORS].CopyFrom(wire.packed(_cors(rule.cors)))
    if rule.fault:
        result.typed_per_filter_config[FAULT].CopyFrom(wire.packed(_fault(rule.fault)))
    if rule.redirect:
        result.redirect.CopyFrom(_redirect(rule.redirect, match, listener_port))
    elif rule.answer:
        result.direct_response.status = rule.answer.status
        result.direct_response.body.inline_string = rule.answer.body
    else:
        yield from _forwarding(result, rule, match, clusters)
        return
    yield result


def _forwarding(result: Any, rule: Rule, match: RequestMatch, clusters: Clusters) -> Iterator[Any]:
    known, lost = [], 0
    for backend in rule.backends:
        cluster = clusters(backend.reference) if backend.reference else None
        if cluster is None:
            lost += backend.weight
        elif backend.weight:
            known.append((backend, cluster))
    total = sum(backend.weight for backend, _ in known)
    if not known:
        result.direct_response.status = 500
        yield result
        return
    if lost:
        refused = parts.Route()
        refused.CopyFrom(result)
        share = percent_pb2.FractionalPercent(
            numerator=round(lost / (lost + total) * _MILLION), denominator=percent_pb2.FractionalPercent.MILLION
        )
        refused.match.runtime_fraction.default_value.CopyFrom(share)
        refused.direct_response.status = 500
        yield refused
    _destinations(result.route, known)
    _forward(result, rule, match)
    for mirror in rule.mirrors:
        if (cluster := clusters(mirror.reference)) is not None:
            result.route.request_mirror_policies.add(
                cluster=cluster,
                runtime_fraction={"default_value": _fraction(mirror.numerator / mirror.denominator)},
            )
    yield result


def _destinations(action: Any, known: list[tuple[Backend, str]]) -> None:
    backend, cluster = known[0]
    if len(known) == 1 and not (backend.request_headers or backend.response_headers):
        action.cluster = cluster
        return
    for backend, cluster in known:
        entry = action.weighted_clusters.clusters.add(name=cluster, weight=wire.uint32(backend.weight))
        _headers(entry, backend.request_headers, backend.response_headers)


def _forward(result: Any, rule: Rule, match: RequestMatch) -> None:
    action = result.route
    action.timeout.CopyFrom(wire.seconds(rule.timeout))
    action.retry_policy.CopyFrom(retry_policy(rule.retries))
    if rule.rewrite_host:
        action.host_rewrite_literal = rule.rewrite_host
    if rule.rewrite_path:
        _rewrite(action, rule.rewrite_path, match)
    if rule.session:
        result.typed_per_filter_config[SESSION].CopyFrom(wire.packed(_session(rule.session)))


# Matches.


def route_match(match: RequestMatch) -> Any:
    """Envoy's RouteMatch."""
    result = parts.RouteMatch()
    path = match.path or TextMatch(Comparison.PATH_PREFIX, "/")
    match path.comparison:
        case Comparison.EXACT:
            result.path = path.value
        case Comparison.REGEX:
            result.safe_regex.CopyFrom(regex_pb2.RegexMatcher(regex=path.value))
        case Comparison.PATH_PREFIX if path.value not in ("", "/"):
            result.path_separated_prefix = path.value
        case Comparison.PREFIX:
            result.prefix = path.value
        case _:
            result.prefix = "/"
    if path.ignore_case:
        result.case_sensitive.value = False
    pseudo = ((":method", match.method), (":scheme", match.scheme), (":authority", match.authority))
    for name, text in (*((n, t) for n, t in pseudo if t), *match.headers):
        result.headers.append(header_matcher(name, text))
    for name, text in match.query:
        if text.comparison is Comparison.PRESENT:
            result.query_parameters.add(name=name, present_match=True)
        else:
            result.query_parameters.add(name=name, string_match=string_matcher(text))
    return result


def header_matcher(name: str, text: TextMatch) -> Any:
    """Envoy's HeaderMatcher."""
    if text.comparison is Comparison.PRESENT:
        return parts.HeaderMatcher(name=name, present_match=True, invert_match=text.invert)
    return parts.HeaderMatcher(name=name, string_match=string_matcher(text), invert_match=text.invert)


def string_matcher(text: TextMatch) -> Any:
    """Envoy's StringMatcher."""
    match text.comparison:
        case Comparison.PREFIX | Comparison.PATH_PREFIX:
            return string_pb2.StringMatcher(prefix=text.value, ignore_case=text.ignore_case)
        case Comparison.SUFFIX:
            return string_pb2.StringMatcher(suffix=text.value, ignore_case=text.ignore_case)
        case Comparison.REGEX:
            return string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=text.value))
        case Comparison.PRESENT:
            return string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=".*"))
        case _:
            return string_pb2.StringMatcher(exact=text.value, ignore_case=text.ignore_case)


# Actions.


def _headers(target: Any, request: HeaderChanges, response: HeaderChanges) -> None:
    option = base_pb2.HeaderValueOption
    for changes, add, remove in (
        (request, target.request_headers_to_add, target.request_headers_to_remove),
        (response, target.response_headers_to_add, target.response_headers_to_remove),
    ):
        for pairs, action in (
            (changes.set, option.OVERWRITE_IF_EXISTS_OR_ADD),
            (changes.add, option.APPEND_IF_EXISTS_OR_ADD),
        ):
            for name, value in pairs:
                header = base_pb2.HeaderValue(key=name, value=value.replace("%", "%%"))
                add.append(option(header=header, append_action=action, keep_empty_value=True))
        remove.extend(changes.remove)


def _rewrite(action: Any, change: PathChange, match: RequestMatch) -> None:
    if change.pattern is not None:
        action.regex_rewrite.pattern.regex = change.pattern
        action.regex_rewrite.substitution = change.replacement
    elif change.full is not None:
        action.regex_rewrite.pattern.regex = r"^/[^?]*"
        action.regex_rewrite.substitution = _escaped(change.full)
    else:
        _prefix(action, match, change.prefix or "")


def _prefix(action: Any, match: RequestMatch, replacement: str) -> None:
    """`/a/b` under a match of `/a` becomes REPLACEMENT + `/b`, with neither a missing nor a double slash."""
    matched = match.path.value if match.path else "/"
    whole_segments = match.path is None or match.path.comparison is Comparison.PATH_PREFIX
    if not whole_segments:
        action.prefix_rewrite = replacement
    elif matched == "/":
        action.prefix_rewrite = replacement.rstrip("/") + "/"
    elif replacement.rstrip("/"):
        action.prefix_rewrite = replacement.rstrip("/")
    else:
        action.regex_rewrite.pattern.regex = f"^{re.escape(matched)}/*"
        action.regex_rewrite.substitution = "/"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\")


def _redirect(redirect: Redirect, match: RequestMatch, listener_port: int) -> Any:
    result = parts.RedirectAction(response_code=_REDIRECTS.get(redirect.status, 1))
    if redirect.scheme:
        result.scheme_redirect = redirect.scheme
    if redirect.host:
        result.host_redirect = redirect.host
    port = redirect.port
    if port is None and not redirect.scheme and listener_port not in (0, 80, 443):
        port = listener_port
    if port is not None and (redirect.scheme, port) not in (("http", 80), ("https", 443)):
        result.port_redirect = port
    if redirect.path is not None:
        if redirect.path.full is not None:
            result.path_redirect = redirect.path.full
        else:
            _prefix(result, match, redirect.path.prefix or "")
    return result


_CODES = parts.RedirectAction.RedirectResponseCode
_REDIRECTS = {
    301: _CODES.Value("MOVED_PERMANENTLY"), 302: _CODES.Value("FOUND"), 303: _CODES.Value("SEE_OTHER"),
    307: _CODES.Value("TEMPORARY_REDIRECT"), 308: _CODES.Value("PERMANENT_REDIRECT"),
}  # fmt: skip
_DEFAULT_RETRIES = Retries(2, ("connect-failure", "refused-stream", "unavailable", "cancelled"))


def retry_policy(retries: Retries | None) -> Any:
    """Envoy's RetryPolicy. Unless told otherwise two more tries, on other endpoints, of requests that
    certainly were not processed: Istio's default."""
    chosen = retries or _DEFAULT_RETRIES
    result = parts.RetryPolicy(
        retry_on=",".join(chosen.on or _DEFAULT_RETRIES.on), num_retries=wire.uint32(chosen.attempts)
    )
    result.retriable_status_codes.extend(chosen.codes)
    if chosen.per_try:
        result.per_try_timeout.CopyFrom(wire.seconds(chosen.per_try))
    if chosen.backoff:
        result.retry_back_off.base_interval.CopyFrom(wire.seconds(chosen.backoff))
        result.retry_back_off.max_interval.CopyFrom(wire.seconds(chosen.backoff * 10))
    if chosen.ignore_previous_hosts:
        result.retry_host_predicate.add(
            name="envoy.retry_host_predicates.previous_hosts",
            typed_config=wire.packed(previous_hosts_pb2.PreviousHostsPredicate()),
        )
        result.host_selection_retry_max_attempts = 5
    return result


def _fraction(share: float) -> Any:
    return percent_pb2.FractionalPercent(
        numerator=min(round(share * _MILLION), _MILLION), denominator=percent_pb2.FractionalPercent.MILLION
    )


def _cors(cors: Cors) -> Any:
    result = cors_pb2.CorsPolicy(
        allow_origin_string_match=[string_matcher(origin) for origin in cors.origins],
        allow_methods=",".join(cors.methods),
        allow_headers=",".join(cors.headers),
        expose_headers=",".join(cors.exposed),
    )
    if cors.max_age is not None:
        result.max_age = f"{cors.max_age:g}"
    if cors.credentials is not None:
        result.allow_credentials.value = cors.credentials
    return result


def _fault(fault: Fault) -> Any:
    result = http_fault.HTTPFault()
    if fault.delay and fault.delay_percent:
        result.delay.fixed_delay.CopyFrom(wire.seconds(fault.delay))
        result.delay.percentage.CopyFrom(_fraction(fault.delay_percent / 100))
    if fault.abort_percent and (fault.abort_status or fault.abort_grpc is not None):
        if fault.abort_grpc is not None:
            result.abort.grpc_status = fault.abort_grpc
        else:
            result.abort.http_status = fault.abort_status
        result.abort.percentage.CopyFrom(_fraction(fault.abort_percent / 100))
    return result


def _session(session: Session) -> Any:
    if session.in_header:
        state = wire.extension(
            "envoy.http.stateful_session.header", header_pb2.HeaderBasedSessionState(name=session.name)
        )
    else:
        cookie = http_cookie.Cookie(name=session.name, path=session.path)
        if session.lifetime:
            cookie.ttl.CopyFrom(wire.seconds(session.lifetime))
        state = wire.extension(
            "envoy.http.stateful_session.cookie", cookie_pb2.CookieBasedSessionState(cookie=cookie)
        )
    inner = stateful_session_pb2.StatefulSession(session_state=state)
    return stateful_session_pb2.StatefulSessionPerRoute(stateful_session=inner)
