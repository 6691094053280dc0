"""Who speaks to istiod: SPIFFE identities, and service-account tokens checked by the API server.

The rest of the package sees a `Caller` or an `Unauthenticated`, never a token. Reviewing stands
behind a Protocol, so that everything above it is tested without an API server.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from meshlight.controlplane.settings import ServiceAccount
from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import TOKEN_REVIEWS

_SPIFFE = re.compile(r"spiffe://([^/]+)/ns/([^/]+)/sa/([^/]+)")
_USER = re.compile(r"system:serviceaccount:([^:]+):([^:]+)")
_EXTRA = "authentication.kubernetes.io/"
_REMEMBERED = 4096


class IdentityError(Exception):
    """Base of this module's errors; the message may be shown to the caller."""


class Unauthenticated(IdentityError):
    """The caller did not prove who it is."""


class ReviewUnavailable(IdentityError):
    """The API server could not be asked; the caller may try again."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A workload identity of the mesh."""

    trust_domain: str
    service_account: ServiceAccount

    def __str__(self) -> str:
        account = self.service_account
        return f"spiffe://{self.trust_domain}/ns/{account.namespace}/sa/{account.name}"

    @classmethod
    def parse(cls, text: str) -> Identity:
        """Read `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/NAME`; raises ValueError."""
        match = _SPIFFE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/NAME")
        return cls(match[1], ServiceAccount(match[2], match[3]))


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated service account, with the pod and node its token is bound to, if any."""

    service_account: ServiceAccount
    pod_name: str = ""
    pod_uid: str = ""
    node_name: str = ""


class TokenReviewer(Protocol):
    """Tells whose a bearer token is."""

    async def review(self, token: str) -> Caller:
        """The caller; raises Unauthenticated or ReviewUnavailable."""


class KubernetesTokenReviewer:
    """Asks the API server by TokenReview, for one audience."""

    def __init__(self, client: Client, audience: str) -> None:
        self._client = client
        self._audience = audience

    async def review(self, token: str) -> Caller:
        """See TokenReviewer."""
        request = {
            "apiVersion": TOKEN_REVIEWS.api_version,
            "kind": TOKEN_REVIEWS.kind,
            "metadata": {},
            "spec": {"token": token, "audiences": [self._audience]},
        }
        try:
            answer = await self._client.request("POST", TOKEN_REVIEWS.path(), request, timeout=10)
        except (ApiError, ApiUnreachable) as error:
            raise ReviewUnavailable(f"the API server could not review the token: {error}") from error
        status = answer.get("status") or {}
        if not status.get("authenticated"):
            raise Unauthenticated(
                f"the token is not valid: {status.get('error') or 'rejected by the API server'}"
            )
        if self._audience not in (status.get("audiences") or []):
            raise Unauthenticated(f"the token is not for the audience {self._audience!r}")
        user = status.get("user") or {}
        match = _USER.fullmatch(user.get("username", ""))
        if match is None:
            raise Unauthenticated(f"{user.get('username')!r} is not a service account")
        extra = {name: values[0] for name, values in (user.get("extra") or {}).items() if values}
        return Caller(
            ServiceAccount(match[1], match[2]),
            pod_name=extra.get(f"{_EXTRA}pod-name", ""),
            pod_uid=extra.get(f"{_EXTRA}pod-uid", ""),
            node_name=extra.get(f"{_EXTRA}node-name", ""),
        )


class RememberingReviewer:
    """Remembers for a few seconds whose a token is, as the API server's own webhook authenticator does.

    A node proxy asks for many certificates with one token. What a token may do is still decided anew
    for each request. Only successes are remembered, by the token's hash.
    """

    def __init__(self, reviewer: TokenReviewer, clock: Callable[[], float], seconds: float = 10) -> None:
        self._reviewer, self._clock, self._seconds = reviewer, clock, seconds
        self._known: dict[bytes, tuple[float, Caller]] = {}

    async def review(self, token: str) -> Caller:
        """See TokenReviewer."""
        digest = hashlib.sha256(token.encode()).digest()
        found = self._known.get(digest)
        if found is not None and found[0] > self._clock():
            return found[1]
        caller = await self._reviewer.review(token)
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[digest] = (self._clock() + self._seconds, caller)
        return caller


def bearer_token(authorization: str | None) -> str:
    """The token of an `authorization` header; raises Unauthenticated."""
    kind, _, token = (authorization or "").partition(" ")
    if kind.lower() != "bearer" or not token.strip():
        raise Unauthenticated(
            "no bearer token: send 'authorization: Bearer TOKEN' with a service-account token"
        )
    return token.strip()
