"""What a Gateway deploys: ServiceAccount, Deployment and Service. Pure.

Labels and names are Istio's. The proxy's pods belong to the mesh like any other: what they send is
captured and leaves as mutual TLS with their own identity; a waypoint also receives through the node proxy.
"""

from __future__ import annotations

from typing import Any

from meshlight.controlplane.envoy.bootstrap import METRICS_PORT, READINESS_PORT, STATS_PORT
from meshlight.controlplane.gateways.classes import GatewayClass
from meshlight.controlplane.waypoints import GATEWAY_NAME, HBONE_PORT
from meshlight.kube.resources import Object

CLASS_NAME = "gateway.networking.k8s.io/gateway-class-name"
MANAGED = "gateway.istio.io/managed"
IMAGE = "docker.io/istio/proxyv2:1.24.1"
DRAIN_SECONDS = 5
REQUESTS = {"cpu": "200m", "memory": "512Mi"}


def objects(gateway: Object, chosen: GatewayClass, version: str) -> list[Object]:
    """The objects to apply for a Gateway, owned by it."""
    metadata, spec = gateway["metadata"], gateway.get("spec") or {}
    name = chosen.deployed_name(metadata["name"])
    infrastructure = spec.get("infrastructure") or {}
    labels = {
        **(infrastructure.get("labels") or {}),
        GATEWAY_NAME: metadata["name"],
        CLASS_NAME: chosen.name,
        MANAGED: chosen.controller.replace("/", "-"),
    }
    common: Object = {
        "name": name,
        "namespace": metadata["namespace"],
        "labels": labels,
        "annotations": dict(infrastructure.get("annotations") or {}),
        "ownerReferences": [
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "name": metadata["name"],
                "uid": metadata["uid"],
            }
        ],
    }
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": common}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": common,
        "spec": {
            "selector": {"matchLabels": {GATEWAY_NAME: metadata["name"]}},
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": _template(name, metadata["name"], labels, common["annotations"], chosen, version),
        },
    }
    return [account, deployment, _service(common, metadata["name"], spec, chosen)]


def _template(
    name: str,
    gateway: str,
    labels: dict[str, str],
    annotations: dict[str, str],
    chosen: GatewayClass,
    version: str,
) -> Object:
    return {
        "metadata": {
            "labels": {
                **labels,
                "istio.io/dataplane-mode": "ambient",
                "sidecar.istio.io/inject": "false",
                "service.istio.io/canonical-name": name,
                "service.istio.io/canonical-revision": "latest",
            },
            "annotations": {
                **annotations,
                "prometheus.io/path": "/stats/prometheus",
                "prometheus.io/port": str(METRICS_PORT),
                "prometheus.io/scrape": "true",
            },
        },
        "spec": {
            "serviceAccountName": name,
            "terminationGracePeriodSeconds": 30,
            "containers": [_container(gateway, chosen, version)],
            "volumes": [
                {"name": "proxy-run", "emptyDir": {}},
                {"name": "istiod-ca-cert", "configMap": {"name": "istio-ca-root-cert"}},
                {
                    "name": "istio-token",
                    "projected": {
                        "sources": [
                            {
                                "serviceAccountToken": {
                                    "path": "istio-token",
                                    "expirationSeconds": 43200,
                                    "audience": "istio-ca",
                                }
                            }
                        ]
                    },
                },
            ],
        },
    }


def _container(gateway: str, chosen: GatewayClass, version: str) -> Object:
    program = ["python3", "-m", "meshlight.controlplane.gateways.proxy"]
    return {
        "name": "istio-proxy",
        "image": IMAGE,
        "args": ["proxy", chosen.kind, "--domain", "$(POD_NAMESPACE).svc.cluster.local"],
        "ports": [
            {"containerPort": METRICS_PORT, "name": "metrics", "protocol": "TCP"},
            {"containerPort": READINESS_PORT, "name": "status-port", "protocol": "TCP"},
            {"containerPort": STATS_PORT, "name": "http-envoy-prom", "protocol": "TCP"},
        ],
        "env": [
            *(_field(variable, path) for variable, path in _FIELDS.items()),
            {"name": "GATEWAY_NAME", "value": gateway},
            {"name": "CA_ADDR", "value": "istiod.istio-system.svc:15012"},
            {"name": "ISTIO_META_CLUSTER_ID", "value": "Kubernetes"},
            {"name": "ISTIO_META_VERSION", "value": version},
            {"name": "DRAIN_SECONDS", "value": str(DRAIN_SECONDS)},
        ],
        "resources": {"requests": dict(REQUESTS)},
        "startupProbe": {**_READY, "periodSeconds": 1, "failureThreshold": 60},
        "readinessProbe": {**_READY, "periodSeconds": 1, "failureThreshold": 4, "timeoutSeconds": 3},
        # A hung Envoy answers nothing; it is killed and started anew.
        "livenessProbe": {**_READY, "periodSeconds": 5, "failureThreshold": 3, "timeoutSeconds": 5},
        "lifecycle": {"preStop": {"exec": {"command": [*program, "drain"]}}},
        "volumeMounts": [
            {"name": "proxy-run", "mountPath": "/var/run/meshlight-proxy"},
            {"name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio"},
            {"name": "istio-token", "mountPath": "/var/run/secrets/tokens"},
        ],
    }


_READY: dict[str, Any] = {"httpGet": {"path": "/healthz/ready", "port": READINESS_PORT}}
_FIELDS = {
    "POD_NAME": "metadata.name",
    "POD_NAMESPACE": "metadata.namespace",
    "INSTANCE_IP": "status.podIP",
    "SERVICE_ACCOUNT": "spec.serviceAccountName",
    "NODE_NAME": "spec.nodeName",
}


def _field(variable: str, path: str) -> Object:
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _service(common: Object, gateway: str, spec: Object, chosen: GatewayClass) -> Object:
    ports = [{"name": "status-port", "port": READINESS_PORT, "protocol": "TCP", "appProtocol": "tcp"}]
    for listener in spec.get("listeners") or []:
        if listener["protocol"] == "HBONE":
            ports.append({"name": "mesh", "port": listener.get("port", HBONE_PORT), "protocol": "TCP"})
        elif all(port["port"] != listener["port"] for port in ports):
            name = f"{listener['protocol'].lower()}-{listener['port']}"
            ports.append({"name": name, "port": listener["port"], "protocol": "TCP"})
    service: Object = {"selector": {GATEWAY_NAME: gateway}, "ports": ports}
    if chosen.is_waypoint:
        service["type"] = "ClusterIP"
    else:
        service["type"] = "LoadBalancer"
        if wanted := [
            a["value"] for a in spec.get("addresses") or [] if a.get("type", "IPAddress") == "IPAddress"
        ]:
            service["loadBalancerIP"] = wanted[0]
    return {"apiVersion": "v1", "kind": "Service", "metadata": common, "spec": service}
