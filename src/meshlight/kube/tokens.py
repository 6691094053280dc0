"""Service-account tokens: minting (TokenRequest) and checking (bearer authentication, TokenReview).

JWTs signed with the cluster's own key (ES256) and bound to a service account, and usually to the Pod
that holds them, with the claims that Kubernetes writes. Pure but for the key files: objects are looked
up through a function, the clock is an argument.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from meshlight.kube.authentication import User
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause, StatusError, invalid

ISSUER = "https://kubernetes.default.svc.cluster.local"
ALGORITHM = "ES256"
DEFAULT_SECONDS = 3600
MINIMUM_SECONDS = 600
MAXIMUM_SECONDS = 1 << 32

Lookup = Callable[[str, str, str], Object | None]
"""(plural of the core group, namespace, name) to the stored object."""


class InvalidToken(Exception):
    """The token is not one of ours, is expired, or what it is bound to is gone."""


@dataclass(frozen=True, slots=True)
class Reviewed:
    """A valid token's user and the audiences that matched."""

    user: User
    audiences: tuple[str, ...]


class TokenIssuer:
    """Mints and checks tokens with one key pair."""

    def __init__(self, pki: Path, lookup: Lookup) -> None:
        key = serialization.load_pem_private_key((pki / "sa.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._public = key.public_key()
        der = self._public.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._key_id = hashlib.sha256(der).hexdigest()[:32]
        self._lookup = lookup

    def configuration(self) -> Object:
        """The OpenID discovery document: how others verify these tokens."""
        return {
            "issuer": ISSUER,
            "jwks_uri": f"{ISSUER}/openid/v1/jwks",
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": [ALGORITHM],
        }

    def keys(self) -> Object:
        """The public key, as a JSON Web Key Set."""
        key = jwt.get_algorithm_by_name(ALGORITHM).to_jwk(self._public, as_dict=True)
        return {"keys": [{**key, "use": "sig", "alg": ALGORITHM, "kid": self._key_id}]}

    def request(self, namespace: str, name: str, body: Object, now: int) -> Object:
        """Answer a TokenRequest for a service account. Raises StatusError 404, 409, 422."""
        spec = body.get("spec") or {}
        audiences = spec.get("audiences") or [ISSUER]
        seconds = spec.get("expirationSeconds") or DEFAULT_SECONDS
        if not MINIMUM_SECONDS <= seconds <= MAXIMUM_SECONDS:
            message = f"Invalid value: {seconds}: may not specify a duration less than 10 minutes"
            cause = Cause("spec.expirationSeconds", "FieldValueInvalid", message)
            raise invalid("authentication.k8s.io", "TokenRequest", "", [cause])
        account = self._lookup("serviceaccounts", namespace, name)
        if account is None:
            raise StatusError(404, "NotFound", f'serviceaccounts "{name}" not found')
        private: Object = {
            "namespace": namespace,
            "serviceaccount": {"name": name, "uid": account["metadata"]["uid"]},
        }
        if bound := spec.get("boundObjectRef"):
            private |= self._bound(namespace, name, bound)
        claims = {
            "aud": audiences,
            "exp": now + seconds,
            "iat": now,
            "nbf": now,
            "iss": ISSUER,
            "jti": str(uuid.uuid4()),
            "sub": f"system:serviceaccount:{namespace}:{name}",
            "kubernetes.io": private,
        }
        token = jwt.encode(claims, self._key, algorithm=ALGORITHM, headers={"kid": self._key_id})
        return {
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {**spec, "audiences": audiences, "expirationSeconds": seconds},
            "status": {"token": token, "expirationTimestamp": _timestamp(now + seconds)},
        }

    def _bound(self, namespace: str, account: str, reference: Object) -> Object:
        kind, name = reference.get("kind"), reference.get("name", "")
        if kind not in ("Pod", "Secret"):
            message = f'Invalid value: "{kind}": cannot bind token to object of this kind'
            cause = Cause("spec.boundObjectRef", "FieldValueInvalid", message)
            raise invalid("authentication.k8s.io", "TokenRequest", "", [cause])
        plural = kind.lower() + "s"
        obj = self._lookup(plural, namespace, name)
        if obj is None:
            raise StatusError(404, "NotFound", f'{plural} "{name}" not found')
        uid = obj["metadata"]["uid"]
        if reference.get("uid") not in (None, "", uid):
            message = (
                f"the UID in the bound object reference ({reference['uid']}) does not match the UID in record"
            )
            raise StatusError(
                409, "Conflict", f"{message} ({uid}); the object might have been deleted and recreated"
            )
        found: Object = {plural[:-1]: {"name": name, "uid": uid}}
        if kind == "Pod":
            if obj["spec"].get("serviceAccountName", "default") != account:
                raise StatusError(
                    409, "Conflict", f"cannot bind token for serviceaccount {account!r} to pod {name}"
                )
            node = self._lookup("nodes", "", obj["spec"].get("nodeName", ""))
            if node is not None:
                found["node"] = {"name": node["metadata"]["name"], "uid": node["metadata"]["uid"]}
        return found

    def check(self, token: str, audiences: tuple[str, ...], now: float) -> Reviewed:
        """The user of a token that is meant for one of `audiences`. Raises InvalidToken."""
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._public,
                algorithms=[ALGORITHM],
                issuer=ISSUER,
                audience=list(audiences),
                options={"require": ["exp", "iss", "sub", "aud"], "verify_exp": False, "verify_nbf": False,
                         "verify_iat": False},
            )  # fmt: skip
        except jwt.PyJWTError as error:
            raise InvalidToken(str(error)) from error
        if claims["exp"] < now:
            raise InvalidToken("service account token has expired")
        private = claims.get("kubernetes.io") or {}
        namespace = private.get("namespace", "")
        self._still("serviceaccounts", namespace, private.get("serviceaccount") or {})
        extra: dict[str, tuple[str, ...]] = {}
        for plural in ("pods", "nodes", "secrets"):
            word = plural[:-1]
            if reference := private.get(word):
                if word != "node":
                    self._still(plural, namespace, reference)
                extra[f"authentication.kubernetes.io/{word}-name"] = (reference["name"],)
                extra[f"authentication.kubernetes.io/{word}-uid"] = (reference["uid"],)
        groups = (
            "system:serviceaccounts",
            f"system:serviceaccounts:{namespace}",
            "system:authenticated",
        )
        user = User(claims["sub"], groups, private["serviceaccount"]["uid"], extra)
        matched = tuple(a for a in claims["aud"] if a in audiences)
        return Reviewed(user, matched)

    def _still(self, plural: str, namespace: str, reference: Object) -> None:
        obj = self._lookup(plural, namespace, reference.get("name", ""))
        if obj is None or obj["metadata"]["uid"] != reference.get("uid"):
            raise InvalidToken(f"{plural[:-1]} {namespace}/{reference.get('name')} of the token is gone")

    def review(self, body: Object, now: float) -> Object:
        """Answer a TokenReview."""
        spec = body.get("spec") or {}
        audiences = tuple(spec.get("audiences") or (ISSUER,))
        try:
            reviewed = self.check(spec.get("token") or "", audiences, now)
        except InvalidToken as error:
            status: Object = {"authenticated": False, "user": {}, "error": str(error)}
        else:
            status = {
                "authenticated": True,
                "user": reviewed.user.review(),
                "audiences": list(reviewed.audiences),
            }
        return {
            "kind": "TokenReview",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {},
            "spec": {"audiences": list(audiences)},
            "status": status,
        }


def _timestamp(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
