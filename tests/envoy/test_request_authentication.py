"""RequestAuthentication as a real Envoy does it, and what AuthorizationPolicies then ask of tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from envoy_proxy import Proxy, listener, running

from meshlight.controlplane.envoy import authentication, authorization

KEY, STRANGER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
ISSUER, SECOND = "https://issuer.example/realm", "https://second.example"


def key_set(key: ec.EllipticCurvePrivateKey) -> str:
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    return json.dumps({"keys": [{**public, "kid": "k1", "alg": "ES256"}]})


UNUSABLE = key_set(ec.generate_private_key(ec.SECP256R1()))


def token(key: ec.EllipticCurvePrivateKey = KEY, **claims: Any) -> str:
    now = int(time.time())
    body = {"iss": ISSUER, "sub": "ann", "iat": now - 1, "exp": now + 3600, **claims}
    return jwt.encode(body, key, algorithm="ES256", headers={"kid": "k1"})


Filters = tuple[list[Any], dict[str, Any]]


def rules(*entries: dict[str, Any]) -> Filters:
    obj = {
        "metadata": {"name": "jwt", "namespace": "shop"},
        "spec": {"jwtRules": list(entries)},
    }
    compiled = [authentication.compile_authentication(obj)]
    filters = authentication.http_filter({"all": compiled}, lambda uri: None, UNUSABLE)
    return filters, authentication.route_rules("all", compiled)


def asks(*entries: dict[str, Any], action: str = "ALLOW") -> Filters:
    """The common rule for tokens, and a policy that asks something of them."""
    obj = {"metadata": {"name": "p", "namespace": "shop"}, "spec": {"action": action, "rules": list(entries)}}
    filters, per_route = rules(RULE)
    compiled = [authorization.compile_policy(obj)]
    return [*filters, *authorization.http_filters([], {})], {
        **per_route,
        **authorization.route_rules(compiled, {}),
    }


RULE = {"issuer": ISSUER, "jwks": key_set(KEY)}
FILTERS: dict[str, Filters] = {
    "plain": rules(RULE),
    "audience": rules({**RULE, "audiences": ["shop"]}),
    "two-issuers": rules(RULE, {"issuer": SECOND, "jwks": key_set(STRANGER)}),
    "keys-not-fetched": rules({"issuer": ISSUER, "jwksUri": "http://issuer.example/keys"}),
    "elsewhere": rules(
        {
            **RULE,
            "fromHeaders": [{"name": "x-token", "prefix": "T "}],
            "fromParams": ["t"],
            "fromCookies": ["c"],
        }
    ),
    "claims-to-headers": rules(
        {
            **RULE,
            "forwardOriginalToken": True,
            "outputClaimToHeaders": [{"header": "x-claim", "claim": "team"}],
        }
    ),
    "needs-token": asks({"from": [{"source": {"requestPrincipals": ["*"]}}]}),
    "needs-principal": asks({"from": [{"source": {"requestPrincipals": [f"{ISSUER}/ann", "*/bob"]}}]}),
    "needs-issuer": asks({"from": [{"source": {"requestPrincipals": [f"{ISSUER}/*"]}}]}),
    "needs-claim": asks({"when": [{"key": "request.auth.claims[groups]", "values": ["admin"]}]}),
    "needs-nested": asks({"when": [{"key": "request.auth.claims[realm][role]", "values": ["own*"]}]}),
    "needs-scope": asks({"when": [{"key": "request.auth.claims[scope]", "values": ["write"]}]}),
    "needs-audience": asks({"when": [{"key": "request.auth.audiences", "values": ["shop"]}]}),
    "denies-without": asks({"from": [{"source": {"notRequestPrincipals": ["*"]}}]}, action="DENY"),
}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("envoy")
    with running(folder, [listener(name, *filters) for name, filters in FILTERS.items()]) as started:
        yield started


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


GOOD = bearer(token())

CALLS: list[tuple[str, dict[str, str], str, int]] = [
    ("plain", {}, "/", 200),
    ("plain", GOOD, "/", 200),
    ("plain", bearer(token(STRANGER)), "/", 401),
    ("plain", bearer(token(exp=int(time.time()) - 3600)), "/", 401),
    ("plain", bearer("nonsense"), "/", 401),
    ("plain", bearer(token(iss=SECOND)), "/", 401),
    ("plain", {}, f"/?access_token={token()}", 200),
    ("plain", {}, "/?access_token=bad", 401),
    ("audience", bearer(token(aud="shop")), "/", 200),
    ("audience", bearer(token(aud=["x", "shop"])), "/", 200),
    ("audience", bearer(token(aud="bank")), "/", 403),
    ("two-issuers", {}, "/", 200),
    ("two-issuers", GOOD, "/", 200),
    ("two-issuers", bearer(token(STRANGER, iss=SECOND)), "/", 200),
    ("two-issuers", bearer(token(KEY, iss=SECOND)), "/", 401),
    ("keys-not-fetched", {}, "/", 200),
    ("keys-not-fetched", GOOD, "/", 401),
    ("elsewhere", {"x-token": f"T {token()}"}, "/", 200),
    ("elsewhere", {"x-token": f"T {token(STRANGER)}"}, "/", 401),
    ("elsewhere", {"cookie": f"c={token(STRANGER)}"}, "/", 401),
    ("elsewhere", {}, f"/?t={token(STRANGER)}", 401),
    ("elsewhere", bearer(token(STRANGER)), "/", 200),
    ("needs-token", {}, "/", 403),
    ("needs-token", GOOD, "/", 200),
    ("needs-principal", GOOD, "/", 200),
    ("needs-principal", bearer(token(sub="bob")), "/", 200),
    ("needs-principal", bearer(token(sub="eve")), "/", 403),
    ("needs-issuer", GOOD, "/", 200),
    ("needs-issuer", {}, "/", 403),
    ("needs-claim", bearer(token(groups=["dev", "admin"])), "/", 200),
    ("needs-claim", bearer(token(groups="admin")), "/", 200),
    ("needs-claim", bearer(token(groups=["administrator"])), "/", 403),
    ("needs-claim", GOOD, "/", 403),
    ("needs-nested", bearer(token(realm={"role": "owner"})), "/", 200),
    ("needs-nested", bearer(token(realm={"role": "guest"})), "/", 403),
    ("needs-scope", bearer(token(scope="read write")), "/", 200),
    ("needs-scope", bearer(token(scope="read")), "/", 403),
    ("needs-audience", bearer(token(aud=["bank", "shop"])), "/", 200),
    ("needs-audience", bearer(token(aud="bank")), "/", 403),
    ("denies-without", {}, "/", 403),
    ("denies-without", GOOD, "/", 200),
]


@pytest.mark.parametrize(
    ("name", "headers", "path", "status"), CALLS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(CALLS)]
)
def test_token(proxy: Proxy, name: str, headers: dict[str, str], path: str, status: int) -> None:
    assert proxy.request(name, path=path, headers=headers).status == status


def test_claims_become_headers_and_cannot_be_forged(proxy: Proxy) -> None:
    told = proxy.request("claims-to-headers", headers={**bearer(token(team="blue")), "x-claim": "forged"})
    assert told.headers["echo-x-claim"] == "blue"
    assert proxy.request("claims-to-headers", headers={"x-claim": "forged"}).headers["echo-x-claim"] == ""
