"""The authority kept in the cluster: Secret `istio-ca-secret`, in Istio's own format.

Whoever creates it first decides: a replica that loses the race, or that restarts, uses what is
there, so that the mesh has one root as long as the Secret lives.
"""

from __future__ import annotations

import asyncio
import base64
import datetime

from meshlight.controlplane.authority import Authority, AuthorityError
from meshlight.controlplane.logs import Scope
from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import SECRETS, Object

NAME = "istio-ca-secret"
TYPE = "istio.io/ca-root"

log = Scope("rootcertrotator")


def to_secret(authority: Authority, namespace: str) -> Object:
    """The Secret that keeps an authority."""
    parts = {
        "ca-cert.pem": authority.certificate_pem(),
        "ca-key.pem": authority.key_pem(),
        "root-cert.pem": authority.root_pem,
        "cert-chain.pem": b"".join(authority.intermediates),
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": NAME, "namespace": namespace, "labels": {"istio.io/config": "true"}},
        "type": TYPE,
        "data": {name: base64.b64encode(content).decode() for name, content in parts.items()},
    }


def from_secret(secret: Object) -> Authority:
    """The authority a Secret keeps; raises AuthorityError naming what is missing or wrong."""
    where = f"Secret {secret['metadata'].get('namespace')}/{secret['metadata'].get('name', NAME)}"
    stored = secret.get("data") or {}

    def part(name: str, *, required: bool) -> bytes:
        if required and not stored.get(name):
            raise AuthorityError(
                f"{where}: key {name} is missing; restore it, or delete the Secret for a new root"
            )
        try:
            return base64.b64decode(stored.get(name) or "", validate=True)
        except ValueError as error:
            raise AuthorityError(f"{where}: key {name} is not base64: {error}") from error

    certificate = part("ca-cert.pem", required=True)
    key = part("ca-key.pem", required=True)
    chain, root = part("cert-chain.pem", required=False), part("root-cert.pem", required=False)
    try:
        return Authority.load(key, certificate, chain, root or certificate)
    except AuthorityError as error:
        raise AuthorityError(f"{where}: {error}; restore it, or delete the Secret for a new root") from error


async def load_or_create(
    client: Client, namespace: str, organization: str, lifetime: datetime.timedelta
) -> Authority:
    """The mesh's authority; waits while the API cannot be reached or does not yet allow it.

    Raises AuthorityError when the Secret exists and is unusable: making another root by itself
    would cut off every workload that trusts the old one.
    """
    delay = 0.2
    while True:
        try:
            return await _attempt(client, namespace, organization, lifetime)
        except (ApiError, ApiUnreachable) as error:
            log.warn(
                "cannot read or create the CA's Secret yet", secret=f"{namespace}/{NAME}", error=str(error)
            )
        await asyncio.sleep(delay)
        delay = min(delay * 2, 5)


async def _attempt(
    client: Client, namespace: str, organization: str, lifetime: datetime.timedelta
) -> Authority:
    try:
        authority = from_secret(await client.get(SECRETS, NAME, namespace))
        log.info("CA loaded", secret=f"{namespace}/{NAME}", expires=authority.certificate.not_valid_after_utc)
        return authority
    except ApiError as error:
        if error.code != 404:
            raise
    fresh = Authority.create(organization, lifetime, datetime.datetime.now(datetime.UTC))
    try:
        await client.create(SECRETS, to_secret(fresh, namespace))
    except ApiError as error:
        if error.code != 409:
            raise
        return from_secret(await client.get(SECRETS, NAME, namespace))
    log.info("CA created", secret=f"{namespace}/{NAME}", expires=fresh.certificate.not_valid_after_utc)
    return fresh
