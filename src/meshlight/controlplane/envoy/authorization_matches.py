"""The parts of an AuthorizationPolicy's rule as Envoy's RBAC principals and permissions. Pure.

Who calls is what the node proxy proved: it is in the connection's filter state, never in a header that a
client could write. Istio's wildcards hold: `*` for any present value, else a star at one end.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from envoy.config.core.v3 import address_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.config.route.v3 import route_components_pb2 as route
from envoy.extensions.path.match.uri_template.v3 import uri_template_match_pb2
from envoy.type.matcher.v3 import (
    address_pb2 as address_matcher,
)
from envoy.type.matcher.v3 import (
    filter_state_pb2,
    metadata_pb2,
    path_pb2,
    regex_pb2,
    string_pb2,
    value_pb2,
)

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.envoy.listeners import SOURCE_ADDRESS, SOURCE_PRINCIPAL

JWT_FILTER = "envoy.filters.http.jwt_authn"
JWT_PAYLOAD = "payload"
"""Where a verified token's claims are in the JWT filter's dynamic metadata."""

Principal, Permission = rbac_pb2.Principal, rbac_pb2.Permission


def strings(value: str, prefix: str = "") -> Any:
    """A StringMatcher of Istio's wildcards; `prefix` (such as `spiffe://`) precedes what is compared."""
    if value == "*":
        return string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=".+"))
    if value.startswith("*"):
        return string_pb2.StringMatcher(suffix=value[1:])
    if value.endswith("*"):
        return string_pb2.StringMatcher(prefix=prefix + value[:-1])
    return string_pb2.StringMatcher(exact=prefix + value)


def _pattern(value: str) -> str:
    """A regular expression of one path segment for an Istio wildcard."""
    if value == "*":
        return "[^/]+"
    if value.startswith("*"):
        return "[^/]*" + re.escape(value[1:])
    if value.endswith("*"):
        return re.escape(value[:-1]) + "[^/]*"
    return re.escape(value)


def _identity(matcher: Any) -> Any:
    return Principal(
        filter_state=filter_state_pb2.FilterStateMatcher(key=SOURCE_PRINCIPAL, string_match=matcher)
    )


def _identity_like(pattern: str) -> Any:
    return _identity(string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=pattern)))


def principal(value: str) -> Any:
    """`TRUSTDOMAIN/ns/NAMESPACE/sa/ACCOUNT`, without scheme."""
    return _identity(strings(value, "spiffe://"))


def namespace(value: str) -> Any:
    """Any account of a namespace."""
    return _identity_like(f"spiffe://[^/]+/ns/{_pattern(value)}/sa/.+")


def service_account(value: str, own_namespace: str) -> Any:
    """`ACCOUNT` of the policy's namespace, or `NAMESPACE/ACCOUNT`."""
    space, slash, name = value.partition("/")
    where, account = (space, name) if slash else (own_namespace, value)
    return _identity_like(f"spiffe://[^/]+/ns/{re.escape(where)}/sa/{re.escape(account)}")


def block(value: str) -> Any:
    """An address or CIDR block as Envoy has it; raises ValueError."""
    network = ipaddress.ip_network(value, strict=False)
    return address_pb2.CidrRange(
        address_prefix=str(network.network_address), prefix_len=wire.uint32(network.prefixlen)
    )


def source_block(value: str) -> Any:
    """The address that the connection came from (`ipBlocks`, `source.ip`)."""
    network = ipaddress.ip_network(value, strict=False)
    ranges = address_matcher.AddressMatcher()
    ranges.ranges.add(address_prefix=str(network.network_address)).prefix_len.value = network.prefixlen
    return Principal(filter_state=filter_state_pb2.FilterStateMatcher(key=SOURCE_ADDRESS, address_match=ranges))


def remote_block(value: str) -> Any:
    """The original client's address, as trusted proxies forwarded it (`remoteIpBlocks`, `remote.ip`)."""
    return Principal(remote_ip=block(value))


def _claim(path: Sequence[str], matcher: Any) -> Any:
    """A claim that is the string, or a list that has it."""
    one = value_pb2.ValueMatcher(string_match=matcher)
    listed = value_pb2.ValueMatcher(list_match=value_pb2.ListMatcher(one_of=one))
    segments = [metadata_pb2.MetadataMatcher.PathSegment(key=key) for key in (JWT_PAYLOAD, *path)]
    either = value_pb2.ValueMatcher(or_match=value_pb2.OrMatcher(value_matchers=[one, listed]))
    return Principal(metadata=metadata_pb2.MetadataMatcher(filter=JWT_FILTER, path=segments, value=either))


def claim(path: Sequence[str], value: str) -> Any:
    """`request.auth.claims[a][b]`, `request.auth.audiences` (`aud`), `request.auth.presenter` (`azp`)."""
    return _claim(path, strings(value))


def request_principal(value: str) -> Any:
    """`ISSUER/SUBJECT` of a verified token; issuers have slashes too, so each is tried as the border."""
    present = strings("*")
    if value == "*":
        return all_of([_claim(["iss"], present), _claim(["sub"], present)])
    exact = string_pb2.StringMatcher
    starred = value.startswith("*") or value.endswith("*")
    text = value.strip("*") if starred else value
    pairs: list[tuple[Any, Any]] = []
    for border in (i for i, letter in enumerate(text) if letter == "/"):
        issuer, subject = text[:border], text[border + 1 :]
        if value.startswith("*"):
            pairs.append((exact(suffix=issuer) if issuer else present, exact(exact=subject)))
        elif value.endswith("*"):
            pairs.append((exact(exact=issuer), exact(prefix=subject) if subject else present))
        else:
            pairs.append((exact(exact=issuer), exact(exact=subject)))
    if value.startswith("*"):
        pairs.append((present, exact(suffix=text)))
    elif value.endswith("*"):
        pairs.append((exact(prefix=text), present))
    return any_of([all_of([_claim(["iss"], iss), _claim(["sub"], sub)]) for iss, sub in pairs])


def request_header(name: str, value: str) -> Any:
    """`request.headers[NAME]`."""
    return Principal(header=_header(name, value))


def _header(name: str, value: str, *, ignore_case: bool = False) -> Any:
    if value == "*":
        return route.HeaderMatcher(name=name, present_match=True)
    matcher = strings(value)
    matcher.ignore_case = ignore_case
    return route.HeaderMatcher(name=name, string_match=matcher)


# What is called.


def host(value: str) -> Any:
    """The request's authority, whatever its case."""
    return Permission(header=_header(":authority", value, ignore_case=True))


def method(value: str) -> Any:
    """The request's method; gRPC is always POST."""
    return Permission(header=_header(":method", value))


def path(value: str) -> Any:
    """The request's path without query, with Istio's wildcards, or with templates: `{*}` is one
    segment, `{**}` any number."""
    if "{*}" in value or "{**}" in value:
        template = value.replace("{**}", "**").replace("{*}", "*")
        message = uri_template_match_pb2.UriTemplateMatchConfig(path_template=template)
        return Permission(
            uri_template=wire.extension("envoy.path.match.uri_template.uri_template_matcher", message)
        )
    return Permission(url_path=path_pb2.PathMatcher(path=strings(value)))


def port(value: str) -> Any:
    """The port that the client connected to; raises ValueError."""
    number = int(value)
    if not 0 < number < 65536:
        raise ValueError(f"{value!r} is no port")
    return Permission(destination_port=number)


def destination_block(value: str) -> Any:
    """The address that the client connected to."""
    return Permission(destination_ip=block(value))


def sni(value: str) -> Any:
    """The server name that a TLS client asked for."""
    return Permission(requested_server_name=strings(value))


# Combinations.


def any_of(parts: Sequence[Any]) -> Any:
    """Any of them; a single one stands for itself."""
    if len(parts) == 1:
        return parts[0]
    kind = type(parts[0])
    if kind is Principal:
        return Principal(or_ids=Principal.Set(ids=parts))
    return Permission(or_rules=Permission.Set(rules=parts))


def all_of(parts: Sequence[Any]) -> Any:
    """All of them; a single one stands for itself."""
    if len(parts) == 1:
        return parts[0]
    kind = type(parts[0])
    if kind is Principal:
        return Principal(and_ids=Principal.Set(ids=parts))
    return Permission(and_rules=Permission.Set(rules=parts))


def none_of(parts: Sequence[Any]) -> Any:
    """None of them."""
    together = any_of(parts)
    return Principal(not_id=together) if type(together) is Principal else Permission(not_rule=together)


def values(build: Callable[[str], Any], wanted: Iterable[str], unwanted: Iterable[str]) -> list[Any]:
    """A field and its `not` form: what must hold of them, empty when neither says anything."""
    held = [build(value) for value in wanted]
    refused = [build(value) for value in unwanted]
    return ([any_of(held)] if held else []) + ([none_of(refused)] if refused else [])
