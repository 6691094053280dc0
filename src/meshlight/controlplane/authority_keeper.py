"""The authority in force: read from the cluster, followed live, rotated when asked or due.

A plugged-in authority (Secret `cacerts`) wins over the mesh's own (`istio-ca-secret`). One that cannot be
used is told in the log and a metric, and the last usable one stays in force: certificates go on being
issued while somebody puts it right.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable

from meshlight.controlplane import root_secret, rotation
from meshlight.controlplane.authority import Authority, AuthorityError, Lifetimes
from meshlight.controlplane.logs import Scope
from meshlight.controlplane.metrics import Metrics
from meshlight.controlplane.settings import Mesh
from meshlight.kube.client import ApiError, ApiUnreachable, Cache, Client
from meshlight.kube.resources import SECRETS, Object

PLUGGED_IN = "cacerts"
_CHECK_SECONDS = 60.0

log = Scope("rootcertrotator")


class AuthorityKeeper:
    """Holds the authority in force and tells who must know when it changes."""

    def __init__(
        self,
        client: Client,
        mesh: Mesh,
        metrics: Metrics,
        lifetimes: Lifetimes,
        root_lifetime: datetime.timedelta,
        now: Callable[[], datetime.datetime],
    ) -> None:
        self._client, self._namespace, self._organization = client, mesh.root_namespace, mesh.trust_domain
        self._metrics, self._lifetimes, self._root_lifetime, self._now = metrics, lifetimes, root_lifetime, now
        self.caches = tuple(
            Cache(client, SECRETS, namespace=mesh.root_namespace, field_selector=f"metadata.name={name}")
            for name in (PLUGGED_IN, root_secret.NAME)
        )
        self._plugged, self._own = self.caches
        for cache in self.caches:
            cache.on_change(lambda old, new: self._changed.set())
        self._changed = asyncio.Event()
        self._longest = lifetimes.default
        self._listeners: list[Callable[[Authority], None]] = []
        self._current: Authority | None = None

    @property
    def current(self) -> Authority:
        """The authority in force; `load` has returned before anybody asks."""
        if self._current is None:
            raise AuthorityError("the certificate authority is not loaded yet")
        return self._current

    @property
    def loaded(self) -> bool:
        """Whether there is an authority."""
        return self._current is not None

    def on_change(self, listener: Callable[[Authority], None]) -> None:
        """Register what hears of every authority that comes into force."""
        self._listeners.append(listener)

    def granted(self, life: datetime.timedelta) -> None:
        """Hear of a certificate's life: a rotation waits for the longest."""
        if life > self._longest:
            self._longest = life
            self._changed.set()

    async def load(self) -> None:
        """Find the authority or make one. Raises AuthorityError when there is one that cannot be used."""
        await asyncio.gather(*(cache.synced.wait() for cache in self.caches))
        plugged = self._plugged.get(PLUGGED_IN, self._namespace)
        if plugged is not None:
            self._adopt(root_secret.from_secret(plugged), PLUGGED_IN)
            return
        authority = await root_secret.load_or_create(
            self._client, self._namespace, self._organization, self._root_lifetime
        )
        self._adopt(authority, root_secret.NAME)

    async def run(self) -> None:
        """Follow the Secrets until cancelled."""
        while True:
            self._changed.clear()  # first: what changes meanwhile is looked at in the next round
            try:
                self._follow()
                await self._rotate()
            except AuthorityError as error:
                self._metrics.root_load_errors.inc()
                log.error("CA not usable; the last usable one stays in force", error=str(error))
            except (ApiError, ApiUnreachable) as error:
                log.warn("CA's Secret not written", error=str(error), retry_after=_CHECK_SECONDS)
            try:
                await asyncio.wait_for(self._changed.wait(), _CHECK_SECONDS)
            except TimeoutError:
                continue

    def _follow(self) -> None:
        plugged = self._plugged.get(PLUGGED_IN, self._namespace)
        own = self._own.get(root_secret.NAME, self._namespace)
        if plugged is not None:
            self._adopt(root_secret.from_secret(plugged), PLUGGED_IN)
        elif own is not None:
            self._adopt(root_secret.from_secret(own), root_secret.NAME)

    def _adopt(self, authority: Authority, secret: str) -> None:
        old = self._current
        if old is not None and _same(old, authority):
            return
        authority.check(self._now())
        if old is not None and not old.trusted_by(authority):
            # Nobody who trusts only the old roots will trust what the new ones sign.
            log.warn(
                "the new CA's root-cert.pem lacks the root in force: put both in it until all certificates "
                "are renewed",
                secret=f"{self._namespace}/{secret}",
            )
        self._current = authority
        self._metrics.root_expiry.set(authority.earliest_root_expiry.timestamp())
        self._metrics.chain_expiry.set(authority.certificate.not_valid_after_utc.timestamp())
        log.info(
            "CA in force",
            secret=f"{self._namespace}/{secret}",
            serial=f"{authority.certificate.serial_number:x}",
            roots=len(authority.roots),
            expires=authority.certificate.not_valid_after_utc,
        )
        for listener in self._listeners:
            listener(authority)

    async def _rotate(self) -> None:
        secret = self._own.get(root_secret.NAME, self._namespace)
        if secret is None or self._plugged.get(PLUGGED_IN, self._namespace) is not None:
            return
        longest = await self._remembered(secret)
        standing = rotation.read(secret)
        if not rotation.advances(standing, self._now(), longest):
            return
        following = rotation.step(secret, self._now(), self._organization, self._root_lifetime)
        try:
            await self._client.replace(SECRETS, following)
        except ApiError as error:
            if error.code != 409:  # another replica was first: its change reaches us by the watch
                raise
            return
        log.info(
            "root rotation: step taken", was=standing.phase.value, now=rotation.read(following).phase.value
        )

    async def _remembered(self, secret: Object) -> datetime.timedelta:
        """The longest life granted, over restarts; written down when it grows."""
        text = (secret["metadata"].get("annotations") or {}).get(rotation.LONGEST, "0")
        known = datetime.timedelta(seconds=int(text) if text.isdigit() else 0)
        if known < self._longest and self._longest > self._lifetimes.default:
            note = {"metadata": {"annotations": {rotation.LONGEST: str(int(self._longest.total_seconds()))}}}
            await self._client.patch(SECRETS, root_secret.NAME, note, self._namespace)
        return max(known, self._longest)


def _same(one: Authority, other: Authority) -> bool:
    return (one.certificate, one.root_pem, one.intermediates) == (
        other.certificate,
        other.root_pem,
        other.intermediates,
    )
