"""istiod put together: caches feed the index, the index feeds the proxies, the CA signs.

Every task has its owner here; leaving `serve` closes servers and ends all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import time
from collections.abc import Callable

from meshlight.controlplane import mesh_config, monitoring, serve
from meshlight.controlplane.address_allocation import AddressAllocator
from meshlight.controlplane.authority import Authority, Lifetimes
from meshlight.controlplane.authority_keeper import AuthorityKeeper
from meshlight.controlplane.certificate_service import CertificateService
from meshlight.controlplane.discovery import Discovery
from meshlight.controlplane.discovery_scope import DiscoveryScope
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.gateways.controller import GatewayController
from meshlight.controlplane.gateways.route_controller import RouteStatusWriter
from meshlight.controlplane.identity import KubernetesTokenReviewer, RememberingReviewer
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
    DESTINATION_RULES,
    ENDPOINT_SLICES,
    GATEWAY_CLASSES,
    GATEWAYS,
    GRPC_ROUTES,
    HTTP_ROUTES,
    NAMESPACES,
    NODES,
    PEER_AUTHENTICATIONS,
    PODS,
    REFERENCE_GRANTS,
    REQUEST_AUTHENTICATIONS,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICE_ENTRIES,
    SERVICES,
    TCP_ROUTES,
    TELEMETRIES,
    TLS_ROUTES,
    VIRTUAL_SERVICES,
    WORKLOAD_ENTRIES,
    Object,
    Resource,
)

WATCHED = (
    NAMESPACES, NODES, PODS, SERVICES, ENDPOINT_SLICES, PEER_AUTHENTICATIONS, AUTHORIZATION_POLICIES,
    GATEWAY_CLASSES, GATEWAYS, HTTP_ROUTES, GRPC_ROUTES, TCP_ROUTES, TLS_ROUTES, REFERENCE_GRANTS, SECRETS,
    SERVICE_ENTRIES, WORKLOAD_ENTRIES, REQUEST_AUTHENTICATIONS, VIRTUAL_SERVICES, DESTINATION_RULES,
    TELEMETRIES,
)  # fmt: skip

_REGISTRY = ("Pod", "Node", "Service", "EndpointSlice", "Namespace")
_Callback = Callable[[Object | None, Object | None], None]

log = Scope("istiod")


class Istiod:
    """One control plane, on one API."""

    def __init__(self, settings: Settings, client: Client) -> None:
        self._settings, self._client = settings, client
        mesh = self._mesh = settings.mesh
        self._metrics = Metrics()
        self._discovery = Discovery(mesh, self._metrics, settings.debounce, settings.debounce_limit)
        self._nodes = NodeAuthorizer(mesh.trust_domain, settings.trusted_node_accounts)
        reviewer = KubernetesTokenReviewer(client, settings.token_audience)
        self._reviewer = RememberingReviewer(reviewer, time.monotonic)
        self._caches = {resource.kind: Cache(client, resource, _trim(resource)) for resource in WATCHED}
        self._scope = DiscoveryScope(mesh, self._caches, self._discovery.observe)
        self._accounts = Cache(client, SERVICE_ACCOUNTS)
        selector = f"metadata.name={mesh_config.NAME}"
        self._mesh_config = Cache(client, CONFIG_MAPS, namespace=mesh.root_namespace, field_selector=selector)
        self._lifetimes = Lifetimes(
            settings.default_certificate_lifetime, settings.maximum_certificate_lifetime
        )
        self._keeper = AuthorityKeeper(
            client, mesh, self._metrics, self._lifetimes, settings.root_lifetime, _now
        )
        self._certificates: CertificateService | None = None
        self._serving = False
        for kind, cache in self._caches.items():
            cache.on_change(self._observer(kind))
        self._accounts.on_change(
            lambda old, new: self._nodes.observe_account(ObjectKey.of(new or old or {}), new is not None)
        )
        self._mesh_config.on_change(lambda old, new: self._configure(new))
        self._status = PolicyStatus(client, self._caches["AuthorizationPolicy"], self._discovery)
        self._addresses = AddressAllocator(client, self._caches["ServiceEntry"])
        self._gateways = GatewayController(client, self._caches, self._discovery)
        self._routes = RouteStatusWriter(client, self._caches, self._discovery)

    def _observer(self, kind: str) -> _Callback:
        def changed(old: Object | None, new: Object | None) -> None:
            key = ObjectKey.of(new or old or {})
            event = "delete" if new is None else "update" if old is not None else "add"
            counted = self._metrics.registry_changes if kind in _REGISTRY else self._metrics.object_changes
            counted.inc(kind, event)
            if kind == "Pod":
                self._nodes.observe(key, new)
            self._scope.observe(kind, key, new)
            if kind in ("Gateway", "Service", "Namespace"):
                self._status.recheck()

        return changed

    def _configure(self, config_map: Object | None) -> None:
        """Take the mesh configuration; one that cannot be read leaves the last readable one in force."""
        try:
            mesh = mesh_config.parse(config_map).laid_over(self._settings.mesh)
        except mesh_config.MeshConfigError as error:
            log.error("mesh configuration not usable; the last usable one stays in force", error=str(error))
            return
        if mesh == self._mesh:
            return
        self._mesh = mesh
        log.info(
            "mesh configuration", trust_domain=mesh.trust_domain, aliases=list(mesh.trust_domain_aliases),
            discovery_selectors=len(mesh.discovery_selectors),
        )  # fmt: skip
        self._discovery.index.reconfigure(mesh)
        self._discovery.envoy.reconfigure()
        self._nodes.set_trust_domain(mesh.trust_domain)
        if self._certificates is not None:
            self._certificates.trust_domain = mesh.trust_domain
        self._scope.reconfigure(mesh)
        policies = self._caches["AuthorizationPolicy"]
        for (namespace, name), obj in policies.objects.items():
            self._scope.observe("AuthorizationPolicy", ObjectKey(namespace, name), obj)

    def missing(self) -> list[str]:
        """What readiness waits for."""
        waits = [kind for kind, cache in self._caches.items() if not cache.synced.is_set()]
        if not self._keeper.loaded:
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
            followed = [*self._caches.values(), self._accounts, self._mesh_config, *self._keeper.caches]
            for cache in followed:
                group.create_task(_follow(cache))
            await self._keeper.load()
            config_maps = Cache(self._client, CONFIG_MAPS, field_selector=f"metadata.name={ROOT_CONFIG_MAP}")
            roots = RootCertificates(
                self._client, self._caches["Namespace"], config_maps, self._keeper.current.root_pem.decode()
            )
            self._keeper.on_change(lambda authority: roots.publish(authority.root_pem.decode()))
            group.create_task(_follow(config_maps))
            group.create_task(roots.run())
            group.create_task(self._keeper.run())
            await asyncio.gather(*(cache.synced.wait() for cache in followed))
            self._discovery.start()
            group.create_task(self._discovery.run())
            group.create_task(self._discovery.key_sets.run())
            group.create_task(self._status.run())
            group.create_task(self._addresses.run())
            group.create_task(_follow(self._gateways.deployments))
            group.create_task(self._gateways.run())
            group.create_task(self._routes.run())
            # Only now: which identities a node may have is known once all pods are.
            await self._open_grpc(stack, group, self._keeper.current)
            _settle_memory()
            log.info("istiod ready", objects={k: len(c.objects) for k, c in self._caches.items()})

    async def _open_grpc(
        self, stack: contextlib.AsyncExitStack, group: asyncio.TaskGroup, authority: Authority
    ) -> None:
        settings = self._settings
        certificate = ServingCertificate(authority, dns_names(settings.mesh), _now)
        group.create_task(certificate.run())
        certificates = self._certificates = CertificateService(
            authority,
            self._lifetimes,
            self._mesh.trust_domain,
            self._reviewer,
            self._nodes,
            self._metrics,
            _now,
            self._keeper.granted,
        )

        def adopt(changed: Authority) -> None:
            certificates.authority = changed
            certificate.reissue(changed)

        self._keeper.on_change(adopt)
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


def _trim(resource: Resource) -> Callable[[Object], None] | None:
    """What istiod never reads of the kinds that there are most of; half of their size."""
    return _slim if resource in (PODS, ENDPOINT_SLICES, NODES) else None


def _slim(obj: Object) -> None:
    obj["metadata"].pop("managedFields", None)
    if obj.get("kind") == "Pod":
        spec, status = obj.get("spec") or {}, obj.get("status") or {}
        for name in ("volumes", "tolerations", "affinity", "initContainers", "securityContext"):
            spec.pop(name, None)
        spec["containers"] = [
            {key: container[key] for key in ("name", "ports") if key in container}
            for container in spec.get("containers") or []
        ]
        for name in ("containerStatuses", "initContainerStatuses"):
            status.pop(name, None)


def _settle_memory() -> None:
    """Leave what is known by now out of garbage collections, and make full ones rare.

    The objects of the mesh live long and form no cycles; a full collection over 10,000 workloads holds every
    push up for a good part of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 200)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
