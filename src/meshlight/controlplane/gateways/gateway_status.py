"""The status of Gateways and GatewayClasses, with the Gateway API's conditions. Pure."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from meshlight.controlplane.gateways.classes import GatewayClass
from meshlight.controlplane.gateways.conditions import Condition, settled
from meshlight.kube.resources import Object


@dataclass(frozen=True, slots=True)
class Deployed:
    """What runs for a Gateway."""

    service: Object | None
    deployment: Object | None

    @property
    def available(self) -> bool:
        """Whether a proxy is ready."""
        status = (self.deployment or {}).get("status") or {}
        return bool(status.get("availableReplicas") or status.get("readyReplicas"))


def of_class(present: Object, chosen: GatewayClass, now: datetime.datetime) -> Object:
    """The status of a GatewayClass."""
    accepted = Condition("Accepted", True, "Accepted", "Handled by Meshlight's control plane")
    before = present.get("status") or {}
    written = [accepted.written(present["metadata"].get("generation", 1), now)]
    return {"conditions": settled(written, before.get("conditions") or [])}


def of_gateway(gateway: Object, chosen: GatewayClass, deployed: Deployed, now: datetime.datetime) -> Object:
    """The status of a Gateway. A waypoint has an address once a proxy of it has been ready, and keeps
    it: what is bound to it then waits for the proxy rather than passing it by."""
    before = gateway.get("status") or {}
    generation = gateway["metadata"].get("generation", 1)
    addresses = _addresses(chosen, deployed)
    if chosen.is_waypoint and not deployed.available and not before.get("addresses"):
        addresses = []
    accepted = Condition("Accepted", True, "Accepted", "Resource accepted")
    if addresses and deployed.available:
        programmed = Condition("Programmed", True, "Programmed", "Resource programmed, assigned to service(s)")
    elif addresses:
        programmed = Condition("Programmed", False, "Pending", "no proxy is ready")
    else:
        reason = "Pending" if chosen.is_waypoint else "AddressNotAssigned"
        programmed = Condition("Programmed", False, reason, "no address yet: waiting for the proxy's Service")
    conditions = [c.written(generation, now) for c in (accepted, programmed)]
    return {
        "addresses": addresses,
        "conditions": settled(conditions, before.get("conditions") or []),
        "listeners": _listeners(gateway, generation, before.get("listeners") or [], now),
    }


def _addresses(chosen: GatewayClass, deployed: Deployed) -> list[Object]:
    service = deployed.service or {}
    if chosen.is_waypoint:
        address = (service.get("spec") or {}).get("clusterIP")
        return [{"type": "IPAddress", "value": address}] if address and address != "None" else []
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    return [{"type": "IPAddress", "value": entry["ip"]} for entry in ingress if entry.get("ip")]


def _listeners(gateway: Object, generation: int, before: list[Object], now: datetime.datetime) -> list[Object]:
    present = {entry.get("name"): entry for entry in before}
    result = []
    for listener in gateway["spec"].get("listeners") or []:
        conditions = [
            Condition("Accepted", True, "Accepted", "No errors found"),
            Condition("Conflicted", False, "NoConflicts", "No errors found"),
            Condition("Programmed", True, "Programmed", "No errors found"),
            Condition("ResolvedRefs", True, "ResolvedRefs", "No errors found"),
        ]
        old = present.get(listener["name"], {})
        written = [condition.written(generation, now) for condition in conditions]
        result.append(
            {
                "name": listener["name"],
                "attachedRoutes": 0,
                "supportedKinds": [],
                "conditions": settled(written, old.get("conditions") or []),
            }
        )
    return result
