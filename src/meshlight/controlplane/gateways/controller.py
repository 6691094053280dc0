"""The Gateway controller: deploys the proxies of waypoints and gateways, and writes Gateways' status.

What to deploy is `deployment`'s to say, what the status says `gateway_status`'s; this module watches,
applies and patches, each Gateway by itself, again when something fails.
"""

from __future__ import annotations

import asyncio
import datetime

import meshlight
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.gateways import deployment, gateway_status
from meshlight.controlplane.gateways.classes import CLASSES
from meshlight.controlplane.logs import Scope
from meshlight.controlplane.waypoints import GATEWAY_NAME
from meshlight.kube.client import ApiError, ApiUnreachable, Cache, Client
from meshlight.kube.resources import (
    DEPLOYMENTS,
    GATEWAY_CLASSES,
    GATEWAYS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Object,
    Resource,
)

FIELD_MANAGER = "istio.io/gateway-controller"
_RETRY_SECONDS = 2.0
_KINDS: dict[str, Resource] = {r.kind: r for r in (SERVICE_ACCOUNTS, DEPLOYMENTS, SERVICES)}

log = Scope("gateways")


class GatewayController:
    """Keeps what Gateways deploy, and what their status says, true."""

    def __init__(self, client: Client, classes: Cache, gateways: Cache, services: Cache) -> None:
        self._client, self._classes, self._gateways, self._services = client, classes, gateways, services
        self.deployments = Cache(client, DEPLOYMENTS, label_selector=GATEWAY_NAME)
        self._due: asyncio.Queue[ObjectKey] = asyncio.Queue()
        self._queued: set[ObjectKey] = set()
        self._applied: dict[ObjectKey, list[Object]] = {}
        gateways.on_change(lambda old, new: self.add(ObjectKey.of(new or old or {})))
        for owned in (services, self.deployments):
            owned.on_change(self._owned_changed)

    def _owned_changed(self, old: Object | None, new: Object | None) -> None:
        metadata = (new or old or {})["metadata"]
        name = (metadata.get("labels") or {}).get(GATEWAY_NAME)
        if name:
            key = ObjectKey(metadata["namespace"], name)
            if new is None or (old is not None and old.get("spec") != new.get("spec")):
                self._applied.pop(key, None)  # somebody's change, or their deletion: put it right
            self.add(key)

    def add(self, key: ObjectKey) -> None:
        """Have a Gateway looked at."""
        if key not in self._queued:
            self._queued.add(key)
            self._due.put_nowait(key)

    async def run(self) -> None:
        """Work until cancelled; the caller runs the caches."""
        for cache in (self._classes, self._gateways, self._services, self.deployments):
            await cache.synced.wait()
        await self._install_classes()
        while True:
            key = await self._due.get()
            self._queued.discard(key)
            try:
                await self._reconcile(key)
            except (ApiError, ApiUnreachable) as error:
                log.warn("gateway not reconciled", gateway=key, error=str(error), retry_after=_RETRY_SECONDS)
                asyncio.get_running_loop().call_later(_RETRY_SECONDS, self.add, key)

    async def _install_classes(self) -> None:
        for chosen in CLASSES.values():
            try:
                present = self._classes.get(chosen.name)
                if present is None:
                    present = await self._client.create(GATEWAY_CLASSES, chosen.manifest())
                if present["spec"].get("controllerName") == chosen.controller:
                    status = gateway_status.of_class(present, chosen, _now())
                    if status != present.get("status"):
                        await self._client.patch(
                            GATEWAY_CLASSES, chosen.name, {"status": status}, subresource="status"
                        )
            except (ApiError, ApiUnreachable) as error:
                log.warn("gateway class not installed", gateway_class=chosen.name, error=str(error))

    async def _reconcile(self, key: ObjectKey) -> None:
        gateway = self._gateways.get(key.name, key.namespace)
        if gateway is None or gateway["metadata"].get("deletionTimestamp"):
            self._applied.pop(key, None)
            return
        chosen = CLASSES.get((gateway.get("spec") or {}).get("gatewayClassName", ""))
        if chosen is None:
            return
        wanted = deployment.objects(gateway, chosen, meshlight.__version__)
        if self._applied.get(key) != wanted:
            for obj in wanted:
                await self._client.apply(_KINDS[obj["kind"]], obj, field_manager=FIELD_MANAGER)
            self._applied[key] = wanted
            log.info("gateway deployed", gateway=key, gateway_class=chosen.name)
        name = chosen.deployed_name(key.name)
        deployed = gateway_status.Deployed(
            self._services.get(name, key.namespace), self.deployments.get(name, key.namespace)
        )
        status = gateway_status.of_gateway(gateway, chosen, deployed, _now())
        if status != gateway.get("status"):
            try:
                await self._client.patch(
                    GATEWAYS, key.name, {"status": status}, key.namespace, subresource="status"
                )
            except ApiError as error:
                if error.code != 404:
                    raise


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
