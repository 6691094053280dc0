"""What istiod knows, as the JSON of Istio's `/debug` pages: for istioctl, Kiali and people. Pure reading.

Istio's keys where Istio has the page; what only node proxies have stands beside them.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict

from meshlight.controlplane.discovery import Connection, Discovery, short_name
from meshlight.controlplane.facts import address_text
from meshlight.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, Published
from meshlight.proto import workload_pb2 as wds

Page = Callable[[Mapping[str, str]], Any]
"""From the query's parameters to what is shown."""

# Istio's flat names of the classic types in syncz.
_FLAT = {
    "cluster": "Cluster", "listener": "Listener", "route": "RouteConfiguration",
    "endpoint": "ClusterLoadAssignment", "extensionconfig": "TypedExtensionConfig",
}  # fmt: skip


class NoSuchProxy(LookupError):
    """No proxy of that name is connected here."""


def pages(discovery: Discovery) -> Mapping[str, Page]:
    """Every page by its path."""
    return {
        "/debug/syncz": lambda _: [_sync_status(c) for c in _ordered(discovery)],
        "/debug/connections": lambda _: _clients(discovery),
        "/debug/adsz": lambda _: _clients(discovery),
        "/debug/workloadz": lambda _: _addresses(discovery, "workload"),
        "/debug/servicez": lambda _: _addresses(discovery, "service"),
        "/debug/authorizationz": lambda _: _policies(discovery),
        "/debug/ambientz": lambda _: _ambient(discovery),
        "/debug/registryz": lambda _: [_registered(discovery, s) for s in _services(discovery)],
        "/debug/endpointz": lambda _: _endpoints(discovery),
        "/debug/endpointShardz": lambda _: _endpoints(discovery),
        "/debug/mesh": lambda _: _mesh(discovery),
        "/debug/config_dump": lambda query: _config_dump(discovery, query.get("proxyID", "")),
    }


def _ordered(discovery: Discovery) -> list[Connection]:
    return sorted(discovery.connections, key=lambda c: (c.session.proxy.id, c.session.id))


def _time(unix: float) -> str:
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).isoformat().replace("+00:00", "Z")


def _sync_status(connection: Connection) -> dict[str, Any]:
    """As Istio's syncz, with every type's verdict beside its nonces under `resources`."""
    session = connection.session
    statuses: dict[str, Any] = {}
    flat: dict[str, str] = {}
    for type_url, subscription in session.subscriptions.items():
        state = subscription.acknowledgement
        status: dict[str, Any] = {"status": state.status, "sent": state.sent_nonce, "acked": state.acked_nonce}
        if state.sent_at:
            status["sentTime"] = _time(state.sent_at)
        if state.acked_at:
            status["ackedTime"] = _time(state.acked_at)
        if state.last_error:
            status["lastError"] = state.last_error
        if state.rejected_responses:
            status["rejected"] = state.rejected_responses
        statuses[short_name(type_url)] = status
        for name, ending in _FLAT.items():
            if type_url.endswith(f".{ending}"):
                flat |= {f"{name}_sent": state.sent_nonce, f"{name}_acked": state.acked_nonce}
    return {
        "cluster_id": session.proxy.cluster,
        "proxy": session.proxy.name,
        "proxy_type": session.proxy.id.partition("~")[0],
        "istio_version": session.proxy.version,
        "node": session.proxy.node,
        **flat,
        "resources": statuses,
    }


def _clients(discovery: Discovery) -> dict[str, Any]:
    clients = [_client(connection) for connection in _ordered(discovery)]
    return {"totalClients": len(clients), "clients": clients}


def _client(connection: Connection) -> dict[str, Any]:
    session = connection.session
    return {
        "connectionId": f"{session.proxy.name}-{session.id}",
        "connectedAt": _time(connection.connected_at),
        "address": connection.peer,
        "watches": {
            short_name(url): subscription.names() for url, subscription in session.subscriptions.items()
        },
    }


def _messages(discovery: Discovery, kind: str) -> Iterator[tuple[Published, Any]]:
    for resource in discovery.index.collections[ADDRESS_TYPE]:
        message: Any = resource.message
        if message.HasField(kind):
            yield resource, getattr(message, kind)


def _addresses(discovery: Discovery, kind: str) -> list[Any]:
    return [
        {"name": resource.name, "version": resource.version, **_dict(message)}
        for resource, message in _messages(discovery, kind)
    ]


def _services(discovery: Discovery) -> list[Any]:
    return sorted((m for _, m in _messages(discovery, "service")), key=lambda s: (s.namespace, s.hostname))


def _policies(discovery: Discovery) -> dict[str, Any]:
    """Policies as the node proxies have them, and what became of each AuthorizationPolicy."""
    return {
        "policies": [_dict(resource.message) for resource in discovery.index.collections[AUTHORIZATION_TYPE]],
        "findings": [
            {"policy": str(policy.key), "path": finding.path, "message": finding.message}
            for policy in discovery.index.policies.compiled()
            for finding in policy.findings
        ],
    }


def _ambient(discovery: Discovery) -> dict[str, Any]:
    waypoints = discovery.index.waypoints.waypoints.values()
    return {
        "workloads": _addresses(discovery, "workload"),
        "services": _addresses(discovery, "service"),
        "policies": _policies(discovery)["policies"],
        "waypoints": [
            {"namespace": w.key.namespace, "name": w.key.name, "ready": w.ready, "hboneMtlsPort": w.hbone_port}
            for w in waypoints
        ],
    }


def _registered(discovery: Discovery, service: Any) -> dict[str, Any]:
    """A service as Istio's registry shows it."""
    mesh = discovery.index.mesh
    kubernetes = service.hostname == mesh.hostname(service.name, service.namespace)
    vips = [address_text(a.address) for a in service.addresses if not a.HasField("length")]
    return {
        "Attributes": {
            "ServiceRegistry": "Kubernetes" if kubernetes else "External",
            "Name": service.name,
            "Namespace": service.namespace,
        },
        "hostname": service.hostname,
        "ports": [
            {"port": port.service_port, "protocol": wds.AppProtocol.Name(port.app_protocol)}
            for port in service.ports
        ],
        "clusterVIPs": {"Addresses": {mesh.cluster_id: vips}},
        "defaultAddress": vips[0] if vips else "0.0.0.0",
        "MeshExternal": not kubernetes,
    }


def _endpoints(discovery: Discovery) -> dict[str, Any]:
    """Endpoints by host name and namespace, as Istio's shards."""
    found: dict[str, Any] = {}
    shard = f"Kubernetes/{discovery.index.mesh.cluster_id}"
    for _, workload in _messages(discovery, "workload"):
        for key, ports in sorted(workload.services.items()):
            namespace, _, hostname = key.partition("/")
            shards = found.setdefault(hostname, {}).setdefault(namespace, {"Shards": {shard: []}})["Shards"]
            for port in ports.ports:
                shards[shard].append(
                    {
                        "Addresses": [address_text(a) for a in workload.addresses] or [workload.hostname],
                        "EndpointPort": port.target_port,
                        "ServicePort": port.service_port,
                        "WorkloadName": workload.workload_name,
                        "Namespace": workload.namespace,
                        "HealthStatus": 1 if workload.status == wds.HEALTHY else 2,
                        "TLSMode": "istio" if workload.tunnel_protocol == wds.HBONE else "disabled",
                    }
                )
    return found


def _mesh(discovery: Discovery) -> dict[str, Any]:
    mesh = discovery.index.mesh
    return {
        "rootNamespace": mesh.root_namespace,
        "trustDomain": mesh.trust_domain,
        "trustDomainAliases": list(mesh.trust_domain_aliases),
        "discoverySelectors": len(mesh.discovery_selectors),
        "clusterDomain": mesh.cluster_domain,
        "clusterId": mesh.cluster_id,
        "network": mesh.network,
    }


def _config_dump(discovery: Discovery, proxy: str) -> dict[str, Any]:
    """What a proxy, `NAME.NAMESPACE`, has been sent or is owed."""
    for connection in _ordered(discovery):
        session = connection.session
        if proxy in (session.proxy.name, session.proxy.id):
            return {
                "proxy": session.proxy.name,
                "configs": [
                    {
                        "@type": url,
                        "name": resource.name,
                        "version": resource.version,
                        "resource": _dict(resource.message),
                    }
                    for url, subscription in session.subscriptions.items()
                    for resource in subscription.wanted()
                ],
            }
    connected = ", ".join(c.session.proxy.name for c in _ordered(discovery)) or "none"
    raise NoSuchProxy(f"no proxy {proxy!r} is connected; connected are: {connected}; name it as ?proxyID=")


def _dict(message: Any) -> dict[str, Any]:
    """A message as JSON, its packed addresses as people write them."""
    readable: dict[str, Any] = _readable(MessageToDict(message))
    return readable


def _readable(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _readable(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable(item, name) for item in value]
    if name in ("addresses", "address") and isinstance(value, str):
        return _address_text(value)
    return value


def _address_text(encoded: str) -> str:
    """A packed address as text; what is none (Envoy has addresses that are texts) stays."""
    try:
        return str(ipaddress.ip_address(base64.b64decode(encoded, validate=True)))
    except ValueError:
        return encoded
