"""RequestAuthentication as Envoy's JWT filter. Pure: key sets are handed in.

A request without a token passes, one with a token that does not verify is refused with 401; what a
token must say is AuthorizationPolicy's to ask. Verified claims are left in dynamic metadata under
`payload`, where the RBAC filters find them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2 as route
from envoy.extensions.filters.http.jwt_authn.v3 import config_pb2 as jwt
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm
from google.protobuf import empty_pb2

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.envoy.authorization_matches import JWT_FILTER, JWT_PAYLOAD
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.settings import parse_duration
from meshlight.kube.resources import Object

KeySets = Callable[[str], str | None]
"""The JSON Web Key Set that a `jwksUri` serves, None while it could not be fetched."""

_DEFAULT_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Authentication:
    """The JWT rules of one RequestAuthentication; `uris` are the key sets that they need."""

    key: ObjectKey
    rules: tuple[Object, ...]

    @property
    def uris(self) -> tuple[str, ...]:
        """Where key sets must be fetched from."""
        return tuple(rule["jwksUri"] for rule in self.rules if rule.get("jwksUri") and not rule.get("jwks"))


def compile_authentication(obj: Object) -> Authentication:
    """Take one RequestAuthentication object; the API has validated it."""
    return Authentication(ObjectKey.of(obj), tuple((obj.get("spec") or {}).get("jwtRules") or []))


def http_filters(
    authentications: Sequence[Authentication], keys: KeySets, unusable: str
) -> list[hcm.HttpFilter]:
    """The JWT filter for all RequestAuthentications of one target; none when they have no rules.

    `unusable` is a key set whose private keys nobody has: it stands where keys could not be fetched, so
    that tokens of that issuer are refused rather than believed.
    """
    rules = [rule for authentication in authentications for rule in authentication.rules]
    if not rules:
        return []
    message = jwt.JwtAuthentication()
    required: list[Any] = []
    for index, rule in enumerate(rules):
        name = f"origins-{index}"
        message.providers[name].CopyFrom(_provider(rule, keys, unusable))
        required.append(jwt.JwtRequirement(provider_name=name))
    message.rules.append(
        jwt.RequirementRule(match=route.RouteMatch(prefix="/"), requires=_requirement(required))
    )
    message.bypass_cors_preflight = True
    return [hcm.HttpFilter(name=JWT_FILTER, typed_config=wire.packed(message))]


def _requirement(required: Sequence[Any]) -> Any:
    """Any one issuer's token; or, of each issuer, a good token or none at all."""
    missing = jwt.JwtRequirement(allow_missing=empty_pb2.Empty())
    each = [_any([one, missing]) for one in required]
    if len(each) == 1:
        return each[0]
    together = jwt.JwtRequirement(requires_all=jwt.JwtRequirementAndList(requirements=each))
    return _any([*required, together])


def _any(requirements: Iterable[Any]) -> Any:
    return jwt.JwtRequirement(requires_any=jwt.JwtRequirementOrList(requirements=requirements))


def _provider(rule: Object, keys: KeySets, unusable: str) -> Any:
    inline = rule.get("jwks") or (keys(rule["jwksUri"]) if rule.get("jwksUri") else None) or unusable
    provider = jwt.JwtProvider(
        issuer=rule.get("issuer") or "",
        audiences=rule.get("audiences") or [],
        local_jwks=base_pb2.DataSource(inline_string=inline),
        forward=bool(rule.get("forwardOriginalToken")),
        payload_in_metadata=JWT_PAYLOAD,
        forward_payload_header=rule.get("outputPayloadToHeader") or "",
        from_params=rule.get("fromParams") or [],
        from_cookies=rule.get("fromCookies") or [],
    )
    # OAuth 2.0 writes scopes as one string of words (RFC 8693, 4.2); policies ask for single ones.
    provider.normalize_payload_in_metadata.space_delimited_claims.extend(["scope", "permission"])
    for header in rule.get("fromHeaders") or []:
        provider.from_headers.add(name=header["name"], value_prefix=header.get("prefix") or "")
    if not (provider.from_headers or provider.from_params or provider.from_cookies):
        provider.from_headers.add(name="Authorization", value_prefix="Bearer ")
        provider.from_params.append("access_token")
    for claim in rule.get("outputClaimToHeaders") or []:
        provider.claim_to_headers.add(header_name=claim["header"], claim_name=claim["claim"])
    return provider


def fetch_timeout(rule: Object) -> float:
    """Seconds that fetching the rule's key set may take."""
    text = str(rule.get("timeout") or "")
    return parse_duration(text).total_seconds() if re.fullmatch(r"[\d.hmsu]+", text) else _DEFAULT_TIMEOUT
