"""The Gateway controller: deploys the proxies of waypoints and gateways, and writes Gateways' status.

What to deploy is `deployment`'s to say, what the status says `gateway_status`'s, what names resolve to it
`host_names`'; this module watches, applies and patches, each Gateway by itself, again when something fails.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping

import meshlight
from meshlight.controlplane.discovery import Discovery
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.gateways import deployment, gateway_status, host_names, local_certificates
from meshlight.controlplane.gateways.classes import CLASSES, GatewayClass
from meshlight.controlplane.gateways.work import Work
from meshlight.controlplane.logs import Scope
from meshlight.controlplane.waypoints import GATEWAY_NAME
from meshlight.kube.client import ApiError, ApiUnreachable, Cache, Client
from meshlight.kube.resources import (
    DEPLOYMENTS,
    DNS_ENDPOINTS,
    GATEWAY_CLASSES,
    GATEWAYS,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Object,
    Resource,
)

FIELD_MANAGER = "istio.io/gateway-controller"
_KINDS: dict[str, Resource] = {r.kind: r for r in (SERVICE_ACCOUNTS, DEPLOYMENTS, SERVICES, DNS_ENDPOINTS)}

log = Scope("gateways")


class GatewayController:
    """Keeps what Gateways deploy, and what their status says, true."""

    def __init__(self, client: Client, caches: Mapping[str, Cache], discovery: Discovery) -> None:
        self._client, self._caches, self._discovery = client, caches, discovery
        self.deployments = Cache(client, DEPLOYMENTS, label_selector=GATEWAY_NAME)
        self._work: Work[ObjectKey] = Work(self._reconcile)
        self._applied: dict[ObjectKey, list[Object]] = {}
        caches["Gateway"].on_change(lambda old, new: self._work.add(ObjectKey.of(new or old or {})))
        for owned in (caches["Service"], self.deployments):
            owned.on_change(self._owned_changed)
        discovery.on_commit(self._committed)

    def _committed(self) -> None:
        due, self._discovery.envoy.gateways_to_report = self._discovery.envoy.gateways_to_report, set()
        for key in due:
            self._work.add(key)

    def _owned_changed(self, old: Object | None, new: Object | None) -> None:
        metadata = (new or old or {})["metadata"]
        name = (metadata.get("labels") or {}).get(GATEWAY_NAME)
        if name:
            key = ObjectKey(metadata["namespace"], name)
            if new is None or (old is not None and old.get("spec") != new.get("spec")):
                self._applied.pop(key, None)  # somebody's change, or their deletion: put it right
            self._work.add(key)

    async def run(self) -> None:
        """Work until cancelled; the caller runs the caches."""
        await self.deployments.synced.wait()
        await self._discovery.synced.wait()
        await self._install_classes()
        await self._work.run()

    async def _install_classes(self) -> None:
        for chosen in CLASSES.values():
            try:
                present = self._caches["GatewayClass"].get(chosen.name)
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
        gateway = self._caches["Gateway"].get(key.name, key.namespace)
        if gateway is None or gateway["metadata"].get("deletionTimestamp"):
            self._applied.pop(key, None)
            return
        chosen = CLASSES.get((gateway.get("spec") or {}).get("gatewayClassName", ""))
        parsed = self._discovery.envoy.gateways.get(key)
        if chosen is None or parsed is None:
            return
        for secret, names in local_certificates.wanted(gateway, parsed).items():
            if self._caches["Secret"].get(secret.name, secret.namespace) is None:
                await self._create(SECRETS, local_certificates.secret(secret, names, _now()))
        name = chosen.deployed_name(key.name)
        deployed = gateway_status.Deployed(
            self._caches["Service"].get(name, key.namespace), self.deployments.get(name, key.namespace)
        )
        states = self._discovery.envoy.listeners_of(parsed)
        status = gateway_status.of_gateway(gateway, chosen, deployed, states, _now())
        addresses = [entry["value"] for entry in status["addresses"]]
        await self._apply(key, gateway, chosen, host_names.records(gateway, chosen, states, addresses))
        if status != gateway.get("status"):
            await self._client.patch(
                GATEWAYS, key.name, {"status": status}, key.namespace, subresource="status"
            )

    async def _create(self, resource: Resource, obj: Object) -> None:
        try:
            await self._client.create(resource, obj)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise

    async def _apply(
        self, key: ObjectKey, gateway: Object, chosen: GatewayClass, records: Object | None
    ) -> None:
        wanted = deployment.objects(gateway, chosen, meshlight.__version__)
        wanted += [records] if records else []
        before = self._applied.get(key, [])
        if before == wanted:
            return
        for obj in wanted:
            if obj not in before:
                await self._client.apply(_KINDS[obj["kind"]], obj, field_manager=FIELD_MANAGER)
        self._applied[key] = wanted
        log.info("gateway deployed", gateway=key, gateway_class=chosen.name, objects=len(wanted))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
