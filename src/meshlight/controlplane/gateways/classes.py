"""The GatewayClasses that this control plane serves, and what pods each deploys. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from meshlight.kube.resources import Object


@dataclass(frozen=True, slots=True)
class GatewayClass:
    """A class: who controls it, and how what it deploys is named (`{}` is the Gateway's name)."""

    name: str
    controller: str
    deployment: str
    kind: str
    description: str

    @property
    def is_waypoint(self) -> bool:
        """Whether its gateways stand inside the mesh."""
        return self.kind == "waypoint"

    def deployed_name(self, gateway: str) -> str:
        """The name of a Gateway's Deployment, Service and ServiceAccount."""
        return self.deployment.format(gateway)

    def manifest(self) -> Object:
        """The GatewayClass object."""
        return {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "GatewayClass",
            "metadata": {"name": self.name},
            "spec": {"controllerName": self.controller, "description": self.description},
        }


CLASSES = {
    found.name: found
    for found in (
        GatewayClass(
            "istio-waypoint", "istio.io/mesh-controller", "{}", "waypoint",
            "The default Istio Waypoint GatewayClass",
        ),
        GatewayClass(
            "istio", "istio.io/gateway-controller", "{}-istio", "router", "The default Istio GatewayClass",
        ),
        GatewayClass(
            "cilium", "io.cilium/gateway-controller", "cilium-gateway-{}", "router",
            "Gateways at the edge of the cluster",
        ),
    )
}  # fmt: skip
