"""istiod put together: caches feed the index, the index feeds the proxies, the CA signs.

Every task has its owner here; leaving `serve` closes servers and ends all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Callable

from meshlight.controlplane import monitoring, root_secret, serve
from meshlight.controlplane.authority import Authority, Lifetimes
from meshlight.controlplane.certificate_service import CertificateService
from meshlight.controlplane.discovery import Discovery
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.identity import KubernetesTokenReviewer
from meshlight.controlplane.logs import Scope
from meshlight.controlplane.metrics import Metrics
from meshlight.controlplane.node_authorization import NodeAuthorizer
from meshlight.controlplane.root_certificates import NAME as ROOT_CONFIG_MAP
from meshlight.controlplane.root_certificates import RootCertificates
from meshlight.controlplane.serving_certificate import ServingCertificate, dns_names
from meshlight.controlplane.settings import Settings
from meshlight.controlplane.status import PolicyStatus
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import (
    AUTHORIZATION_POLICIES,
    CONFIG_MAPS,
    ENDPOINT_SLICES,
    NAMESPACES,
    NODES,
    PEER_AUTHENTICATIONS,
    PODS,
    SERVICES,
    Object,
)

WATCHED = (NAMESPACES, NODES, PODS, SERVICES, ENDPOINT_SLICES, PEER_AUTHENTICATIONS, AUTHORIZATION_POLICIES)

_Callback = Callable[[Object | None, Object | None], None]

log = Scope("istiod")


class Istiod:
    """One control plane, on one API."""

    def __init__(self, settings: Settings, client: Client) -> None:
        self._settings, self._client = settings, client
        mesh = settings.mesh
        self._metrics = Metrics()
        self._discovery = Discovery(mesh, self._metrics, settings.debounce, settings.debounce_limit)
        self._nodes = NodeAuthorizer(mesh.trust_domain, settings.trusted_node_accounts)
        self._reviewer = KubernetesTokenReviewer(client, settings.token_audience)
        self._caches = {resource.kind: Cache(client, resource) for resource in WATCHED}
        self._authority: Authority | None = None
        self._serving = False
        for kind, cache in self._caches.items():
            cache.on_change(self._observer(kind))
        self._status = PolicyStatus(client, self._caches["AuthorizationPolicy"], self._discovery)

    def _observer(self, kind: str) -> _Callback:
        def changed(old: Object | None, new: Object | None) -> None:
            key = ObjectKey.of(new or old or {})
            event = "delete" if new is None else "update" if old is not None else "add"
            self._metrics.object_changes.inc(kind, event)
            if kind == "Pod":
                self._nodes.observe(key, new)
            self._discovery.observe(kind, key, new)

        return changed

    def missing(self) -> list[str]:
        """What readiness waits for."""
        waits = [kind for kind, cache in self._caches.items() if not cache.synced.is_set()]
        if self._authority is None:
            waits.append("CA")
        if not waits and not (self._discovery.synced.is_set() and self._serving):
            waits.append("servers")
        return waits

    async def serve(self) -> None:
        """Serve until cancelled. Raises AuthorityError, OSError or ApiError when it cannot go on."""
        settings = self._settings
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            page = monitoring.application(
                self._discovery, self._metrics, self.missing, self._reviewer, settings.mesh.root_namespace
            )
            for app, port in (
                (page, settings.monitoring_port),
                (monitoring.probe_application(self.missing), settings.probe_port),
            ):
                runner = await monitoring.listen(app, settings.bind_address, port)
                stack.push_async_callback(runner.cleanup)
            for cache in self._caches.values():
                group.create_task(_follow(cache))
            self._authority = await root_secret.load_or_create(
                self._client, settings.mesh.root_namespace, settings.mesh.trust_domain, settings.root_lifetime
            )
            self._metrics.root_expiry.set(self._authority.certificate.not_valid_after_utc.timestamp())
            config_maps = Cache(self._client, CONFIG_MAPS, field_selector=f"metadata.name={ROOT_CONFIG_MAP}")
            roots = RootCertificates(
                self._client, self._caches["Namespace"], config_maps, self._authority.root_pem.decode()
            )
            group.create_task(_follow(config_maps))
            group.create_task(roots.run())
            await asyncio.gather(*(cache.synced.wait() for cache in self._caches.values()))
            self._discovery.start()
            group.create_task(self._discovery.run())
            group.create_task(self._status.run())
            # Only now: which identities a node may have is known once all pods are.
            await self._open_grpc(stack, group, self._authority)
            log.info("istiod ready", objects={k: len(c.objects) for k, c in self._caches.items()})

    async def _open_grpc(
        self, stack: contextlib.AsyncExitStack, group: asyncio.TaskGroup, authority: Authority
    ) -> None:
        settings = self._settings
        certificate = ServingCertificate(authority, dns_names(settings.mesh), _now)
        group.create_task(certificate.run())
        certificates = CertificateService(
            authority,
            Lifetimes(settings.default_certificate_lifetime, settings.maximum_certificate_lifetime),
            settings.mesh.trust_domain,
            self._reviewer,
            self._nodes,
            self._metrics,
            _now,
        )
        plain = serve.DiscoveryService(
            self._discovery, self._reviewer if settings.plaintext_needs_token else None, trust_loopback=True
        )
        secure = serve.DiscoveryService(self._discovery, self._reviewer, trust_loopback=False)
        certifying = serve.CertificateEndpoint(certificates)
        host = settings.bind_address
        for server in (
            await serve.listen([plain], host, settings.grpc_port),
            await serve.listen([secure, certifying], host, settings.secure_grpc_port, certificate.context),
        ):
            stack.callback(server.close)
        self._serving = True


async def _follow(cache: Cache) -> None:
    """Keep a cache current; a refusal (a kind not installed yet, a right not granted yet) is retried.

    One that comes later ends istiod: deletions would be missed, and only a fresh start is exact.
    """
    delay = 0.5
    while True:
        try:
            await cache.run()
        except ApiError as error:
            if cache.synced.is_set():
                raise
            log.warn("cannot watch", resource=cache.resource.plural, code=error.code, error=str(error))
        await asyncio.sleep(delay)
        delay = min(delay * 2, 5)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
