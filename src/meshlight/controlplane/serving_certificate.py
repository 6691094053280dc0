"""The certificate istiod serves TLS with: signed by the mesh's own authority, renewed at half its life.

Its key is never stored: a restarted istiod makes another. Renewal loads it into the same TLS
context, so that new handshakes use it and established connections stay.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

from meshlight.controlplane.authority import Authority, KeyPair
from meshlight.controlplane.logs import Scope
from meshlight.controlplane.settings import Mesh

LIFETIME = datetime.timedelta(days=1)

log = Scope("istiod-certificate")


def dns_names(mesh: Mesh) -> list[str]:
    """The names under which proxies reach istiod."""
    service = f"istiod.{mesh.root_namespace}"
    return [f"{service}.svc", service, mesh.hostname("istiod", mesh.root_namespace)]


def server_context() -> ssl.SSLContext:
    """A TLS context for gRPC servers, without a certificate yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    return context


def load(context: ssl.SSLContext, pair: KeyPair) -> None:
    """Serve new handshakes with a key pair."""
    # ssl loads only from files: this one is memory, seen by this process alone.
    descriptor = os.memfd_create("serving-certificate")
    with os.fdopen(descriptor, "wb") as file:
        file.write(pair.key + pair.chain)
        file.flush()
        context.load_cert_chain(Path(f"/proc/self/fd/{descriptor}"))


class ServingCertificate:
    """Keeps a TLS context supplied with a valid certificate."""

    def __init__(
        self, authority: Authority, names: Sequence[str], now: Callable[[], datetime.datetime]
    ) -> None:
        self.context = server_context()
        self._authority, self._names, self._now = authority, names, now
        self.not_after = self._renew()

    def _renew(self) -> datetime.datetime:
        pair = self._authority.issue_server(self._names, LIFETIME, self._now())
        load(self.context, pair)
        log.info("serving certificate issued", names=list(self._names), expires=pair.not_after)
        return pair.not_after

    def reissue(self, authority: Authority) -> None:
        """Serve a certificate of another authority from now on."""
        self._authority = authority
        self.not_after = self._renew()

    async def run(self) -> None:
        """Renew at half the certificate's life until cancelled."""
        while True:
            half = (self.not_after - self._now()) / 2
            await asyncio.sleep(max(half.total_seconds(), 1))
            self.not_after = self._renew()
