"""Features of the Gateway API that are supported, by the names of its conformance suite. Pure."""

from __future__ import annotations

from meshlight.controlplane.gateways.classes import GatewayClass

_ROUTES = (
    "GRPCRoute", "HTTPRoute", "HTTPRouteBackendProtocolH2C", "HTTPRouteBackendProtocolWebSocket",
    "HTTPRouteBackendRequestHeaderModification", "HTTPRouteBackendTimeout", "HTTPRouteCORS",
    "HTTPRouteHostRewrite", "HTTPRouteMethodMatching", "HTTPRouteNamedRouteRule", "HTTPRoutePathRedirect",
    "HTTPRoutePathRewrite", "HTTPRoutePortRedirect", "HTTPRouteQueryParamMatching", "HTTPRouteRequestMirror",
    "HTTPRouteRequestMultipleMirrors", "HTTPRouteRequestPercentageMirror", "HTTPRouteRequestTimeout",
    "HTTPRouteResponseHeaderModification", "HTTPRouteSchemeRedirect",
)  # fmt: skip
_GATEWAY = (
    "Gateway", "GatewayHTTPListenerIsolation", "GatewayInfrastructurePropagation", "GatewayPort8080",
    "HTTPRouteDestinationPortMatching", "HTTPRouteParentRefPort", "ReferenceGrant", "TCPRoute", "TLSRoute",
)  # fmt: skip
_MESH = ("Mesh", "ReferenceGrant", "TCPRoute")


def supported_features(chosen: GatewayClass) -> list[str]:
    """Sorted, as GatewayClass status wants them."""
    return sorted({*_ROUTES, *(_MESH if chosen.is_waypoint else _GATEWAY)})
