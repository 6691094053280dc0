"""`extensionProviders` of the mesh configuration that CUSTOM policies may ask. Pure."""

from __future__ import annotations

from typing import Any

from meshlight.controlplane.envoy import names
from meshlight.controlplane.envoy.authorization import ExternalAuthorizer
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.settings import ExtensionProvider, Mesh, parse_duration

HTTP, GRPC = "envoyExtAuthzHttp", "envoyExtAuthzGrpc"


def authorizers(mesh: Mesh) -> dict[str, ExternalAuthorizer]:
    """Those of the mesh, by name."""
    return {
        provider.name: _authorizer(mesh, provider)
        for provider in mesh.extension_providers
        if provider.kind in (HTTP, GRPC)
    }


def service_of(mesh: Mesh, provider: ExternalAuthorizer) -> ObjectKey | None:
    """The Kubernetes Service that answers for a provider, None when its host is none."""
    hostname = provider.cluster.rpartition("|")[2]
    name, _, rest = hostname.partition(".")
    namespace = rest.removesuffix(f".svc.{mesh.cluster_domain}")
    return ObjectKey(namespace, name) if namespace != rest and "." not in namespace else None


def _authorizer(mesh: Mesh, provider: ExtensionProvider) -> ExternalAuthorizer:
    config = provider.settings
    body = config.get("includeRequestBodyInCheck") or {}
    timeout = config.get("timeout")
    return ExternalAuthorizer(
        name=provider.name,
        cluster=names.cluster(_hostname(mesh, str(config.get("service") or "")), int(config.get("port") or 0)),
        grpc=provider.kind == GRPC,
        timeout=parse_duration(str(timeout)).total_seconds() if timeout else 600.0,
        fail_open=bool(config.get("failOpen")),
        status_on_error=int(config.get("statusOnError") or 403),
        path_prefix=str(config.get("pathPrefix") or ""),
        headers_to_upstream=_names(config, "headersToUpstreamOnAllow"),
        headers_to_downstream_on_deny=_names(config, "headersToDownstreamOnDeny"),
        headers_to_downstream_on_allow=_names(config, "headersToDownstreamOnAllow"),
        include_request_headers=_names(config, "includeRequestHeadersInCheck"),
        additional_headers=tuple(sorted((config.get("includeAdditionalHeadersInCheck") or {}).items())),
        body_bytes=int(body.get("maxRequestBytes") or 0),
        body_allow_partial=bool(body.get("allowPartialMessage")),
        body_raw=bool(body.get("packAsBytes")),
    )


def _hostname(mesh: Mesh, service: str) -> str:
    """`HOST` or `NAMESPACE/HOST`; a short host is completed as Kubernetes' search path would."""
    namespace, slash, host = service.rpartition("/")
    if slash and "." not in host:
        return mesh.hostname(host, namespace)
    if host.count(".") == 1 and not host.endswith("."):
        name, _, space = host.partition(".")
        return mesh.hostname(name, space)
    return f"{host}.{mesh.cluster_domain}" if host.endswith(".svc") else host


def _names(config: dict[str, Any], field: str) -> tuple[str, ...]:
    return tuple(str(name) for name in config.get(field) or [])
