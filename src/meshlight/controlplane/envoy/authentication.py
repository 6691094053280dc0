"""RequestAuthentication as Envoy's JWT filter. Pure: key sets are handed in.

A request without a token passes, one with a token that does not verify is refused with 401; what a
token must say is AuthorizationPolicy's to ask. Verified claims are left in dynamic metadata under
`payload`, where the RBAC filters find them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.jwt_authn.v3 import config_pb2 as jwt
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm
from google.protobuf import any_pb2, empty_pb2

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


def http_filter(
    groups: Mapping[str, Sequence[Authentication]], keys: KeySets, unusable: str
) -> list[hcm.HttpFilter]:
    """The JWT filter of a proxy; none when nobody asks for it. `groups` are the RequestAuthentications of
    each target that has any, by a name which its routes then refer to (`route_rules`).

    `unusable` is a key set whose private keys nobody has: it stands where keys could not be fetched, so
    that tokens of that issuer are refused rather than believed.
    """
    message = jwt.JwtAuthentication(bypass_cors_preflight=True)
    for group, authentications in groups.items():
        required: list[Any] = []
        for authentication in authentications:
            for index, rule in enumerate(authentication.rules):
                name = f"{authentication.key.namespace}/{authentication.key.name}/{index}"
                if name not in message.providers:
                    message.providers[name].CopyFrom(_provider(rule, keys, unusable))
                required.append(jwt.JwtRequirement(provider_name=name))
        if required:
            message.requirement_map[group].CopyFrom(_requirement(required))
    if not message.requirement_map:
        return []
    return [hcm.HttpFilter(name=JWT_FILTER, typed_config=wire.packed(message))]


def route_rules(group: str, authentications: Sequence[Authentication]) -> dict[str, any_pb2.Any]:
    """`typed_per_filter_config` of the routes of a target whose RequestAuthentications are `group`."""
    if not any(authentication.rules for authentication in authentications):
        return {}
    return {JWT_FILTER: wire.packed(jwt.PerRouteConfig(requirement_name=group))}


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
