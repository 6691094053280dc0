"""The status of Gateways and GatewayClasses, with the Gateway API's conditions. Pure."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from meshlight.controlplane.envoy.gateway_proxy import ListenerState
from meshlight.controlplane.envoy.http_route import GATEWAY_GROUP
from meshlight.controlplane.gateways.classes import GatewayClass
from meshlight.controlplane.gateways.conditions import Condition, settled
from meshlight.controlplane.gateways.features import supported_features
from meshlight.kube.resources import Object

PROTOCOLS = ("HTTP", "HTTPS", "TLS", "TCP", "HBONE")


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
    features = [{"name": name} for name in supported_features(chosen)]
    return {"conditions": settled(written, before.get("conditions") or []), "supportedFeatures": features}


def of_gateway(
    gateway: Object,
    chosen: GatewayClass,
    deployed: Deployed,
    states: list[ListenerState],
    now: datetime.datetime,
) -> Object:
    """The status of a Gateway. A waypoint has an address once a proxy of it has been ready, and keeps
    it: what is bound to it then waits for the proxy rather than passing it by."""
    before = gateway.get("status") or {}
    generation = gateway["metadata"].get("generation", 1)
    addresses = _addresses(chosen, deployed)
    if chosen.is_waypoint and not deployed.available and not before.get("addresses"):
        addresses = []
    invalid = [state for state in states if state.conflict or state.listener.protocol not in PROTOCOLS]
    accepted = Condition("Accepted", True, "Accepted", "Resource accepted")
    if invalid:
        named = ", ".join(state.listener.name for state in invalid)
        usable = len(invalid) < len(states)
        accepted = Condition(
            "Accepted", usable, "ListenersNotValid", f"listeners that cannot be served: {named}"
        )
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
        "listeners": [_listener(state, generation, before.get("listeners") or [], now) for state in states],
    }


def _addresses(chosen: GatewayClass, deployed: Deployed) -> list[Object]:
    service = deployed.service or {}
    if chosen.is_waypoint:
        address = (service.get("spec") or {}).get("clusterIP")
        return [{"type": "IPAddress", "value": address}] if address and address != "None" else []
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    return [{"type": "IPAddress", "value": entry["ip"]} for entry in ingress if entry.get("ip")]


def _listener(state: ListenerState, generation: int, before: list[Object], now: datetime.datetime) -> Object:
    listener = state.listener
    known = listener.protocol in PROTOCOLS
    if state.conflict:
        accepted = Condition("Accepted", False, state.conflict, "conflicts with another listener on its port")
        conflicted = Condition(
            "Conflicted", True, state.conflict, "conflicts with another listener on its port"
        )
    elif not known:
        message = f"protocol {listener.protocol} is not served; served are {', '.join(PROTOCOLS)}"
        accepted = Condition("Accepted", False, "UnsupportedProtocol", message)
        conflicted = Condition("Conflicted", False, "NoConflicts", "No errors found")
    else:
        accepted = Condition("Accepted", True, "Accepted", "No errors found")
        conflicted = Condition("Conflicted", False, "NoConflicts", "No errors found")
    resolved = Condition("ResolvedRefs", True, "ResolvedRefs", "No errors found")
    if state.problem is not None:
        resolved = Condition("ResolvedRefs", False, state.problem.reason, state.problem.message)
    elif listener.unknown_kinds:
        message = f"kinds of routes for {listener.protocol} are {', '.join(listener.kinds) or 'none'}"
        resolved = Condition("ResolvedRefs", False, "InvalidRouteKinds", message)
    programmed = Condition("Programmed", True, "Programmed", "No errors found")
    if not (accepted.status and state.problem is None):
        programmed = Condition("Programmed", False, "Invalid", "see Accepted and ResolvedRefs")
    old: Object = next((entry for entry in before if entry.get("name") == listener.name), {})
    written = [c.written(generation, now) for c in (accepted, conflicted, programmed, resolved)]
    return {
        "name": listener.name,
        "attachedRoutes": len(state.routes),
        "supportedKinds": [{"group": GATEWAY_GROUP, "kind": kind} for kind in listener.kinds],
        "conditions": settled(written, old.get("conditions") or []),
    }
