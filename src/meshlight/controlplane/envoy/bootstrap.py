"""What an Envoy knows at its start: who it is and where istiod is; everything else comes over xDS. Pure.

Ports are Istio's: 15021 readiness, 15020 and 15090 metrics, 15000 administration (loopback only).
Imports nothing but the standard library: a proxy's start must not wait for a control plane's modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TYPE = "type.googleapis.com/"
ADMIN_PORT, METRICS_PORT, READINESS_PORT, STATS_PORT = 15000, 15020, 15021, 15090

_RENAME = """
function envoy_on_response(handle)
  local body = handle:body()
  if body then
    local text = body:getBytes(0, body:length())
    text = string.gsub(text, "envoy_istio_", "istio_")
    text = string.gsub(text, '([%w_]+)="%-?"', function(label)
      if label == "response_flags" then return label .. '="-"' end
      if label == "grpc_response_status" then return label .. '=""' end
      return label .. '="unknown"'
    end)
    body:setBytes(text)
  end
end
"""
"""Envoy puts its own name before every metric, Istio none; where Envoy says `-`, Istio says `unknown`."""

_BUCKETS_OF_SIZES = [1.0, 5.0, 10.0, 50.0, 100.0, 500.0] + [10.0**n for n in range(3, 8)]


@dataclass(frozen=True, slots=True)
class ProxyNode:
    """Who a proxy is. `discovery` is istiod's HOST:PORT; paths are files of the pod."""

    kind: str
    pod: str
    namespace: str
    address: str
    gateway: str
    service_account: str
    node: str
    discovery: str
    cluster_id: str = "Kubernetes"
    cluster_domain: str = "cluster.local"
    version: str = ""
    root_certificate: str = "/var/run/secrets/istio/root-cert.pem"
    token: str = "/var/run/secrets/tokens/istio-token"

    @property
    def id(self) -> str:
        """The node's id as Istio writes it."""
        domain = f"{self.namespace}.svc.{self.cluster_domain}"
        return f"{self.kind}~{self.address}~{self.pod}.{self.namespace}~{domain}"


def bootstrap(node: ProxyNode) -> dict[str, Any]:
    """The bootstrap configuration, as JSON."""
    return {
        "node": {
            "id": node.id,
            "cluster": f"{node.gateway}.{node.namespace}",
            "metadata": {
                "NAMESPACE": node.namespace,
                "GATEWAY_NAME": node.gateway,
                "CLUSTER_ID": node.cluster_id,
                "NODE_NAME": node.node,
                "ISTIO_VERSION": node.version,
                "SERVICE_ACCOUNT": node.service_account,
                "INSTANCE_IPS": node.address,
            },
        },
        "admin": {"address": _address("127.0.0.1", ADMIN_PORT)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
            },
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {
            "listeners": [
                _serving("metrics", METRICS_PORT, [_STATS, _READY]),
                _serving("prometheus", STATS_PORT, [_STATS]),
                _serving("readiness", READINESS_PORT, [_READY]),
            ],
            "clusters": [_admin_cluster(), _discovery_cluster(node)],
        },
        "layered_runtime": {
            "layers": [
                {
                    "name": "static",
                    "static_layer": {
                        "re2.max_program_size.error_level": 32768,
                        # A request to the collector for 20 spans or a second's: more at once cost more.
                        "tracing.zipkin.min_flush_spans": 20,
                        "tracing.zipkin.flush_interval_ms": 1000,
                    },
                }
            ]
        },
        "stats_config": {
            "use_all_default_tags": False,
            "stats_matcher": {"inclusion_list": {"patterns": _KEPT}},
            "histogram_bucket_settings": [
                {"match": {"prefix": f"istio.{name}"}, "buckets": _BUCKETS_OF_SIZES}
                for name in ("request_bytes", "response_bytes")
            ],
        },
    }


_KEPT = [
    *(
        {"prefix": text}
        for text in ("cluster_manager", "listener_manager", "server", "cluster.xds-grpc", "istio", "peer.")
    ),
    *({"suffix": text} for text in ("rbac.allowed", "rbac.denied", "shadow_allowed", "shadow_denied")),
    {"contains": "circuit_breakers"},
    {"contains": "outlier_detection"},
    {"contains": "upstream_rq_pending_overflow"},
    {"contains": "downstream_cx_active"},
]

_STATS = {
    "match": {"prefix": "/stats/prometheus"},
    "route": {"cluster": "prometheus_stats", "prefix_rewrite": "/stats/prometheus?usedonly"},
}
_READY = {
    "match": {"path": "/healthz/ready"},
    "route": {"cluster": "prometheus_stats", "prefix_rewrite": "/ready"},
    "typed_per_filter_config": {
        "envoy.filters.http.lua": {
            "@type": TYPE + "envoy.extensions.filters.http.lua.v3.LuaPerRoute",
            "disabled": True,
        }
    },
}


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _serving(name: str, port: int, routes: list[Any]) -> dict[str, Any]:
    manager = {
        "@type": TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "route_config": {"virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.lua",
                "typed_config": {
                    "@type": TYPE + "envoy.extensions.filters.http.lua.v3.Lua",
                    "default_source_code": {"inline_string": _RENAME},
                },
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": TYPE + "envoy.extensions.filters.http.router.v3.Router"},
            },
        ],
    }
    return {
        "name": name,
        "address": _address("0.0.0.0", port),
        "ignore_global_conn_limit": True,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _admin_cluster() -> dict[str, Any]:
    return {
        "name": "prometheus_stats",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": _single("prometheus_stats", "127.0.0.1", ADMIN_PORT),
    }


def _single(cluster: str, host: str, port: int) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(host, port)}}
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": [endpoint]}]}


def _discovery_cluster(node: ProxyNode) -> dict[str, Any]:
    """istiod over TLS, with the pod's own service-account token, read anew when it is renewed."""
    host, _, port = node.discovery.rpartition(":")
    token = {
        "name": "istio-token",
        "generic_secret": {
            "secret": {"filename": node.token, "watched_directory": {"path": _folder(node.token)}}
        },
    }
    injector = {
        "@type": TYPE + "envoy.extensions.filters.http.credential_injector.v3.CredentialInjector",
        "overwrite": True,
        "credential": {
            "name": "envoy.http.injected_credentials.generic",
            "typed_config": {
                "@type": TYPE + "envoy.extensions.http.injected_credentials.generic.v3.Generic",
                "header_value_prefix": "Bearer ",
                "credential": {"name": token["name"], "sds_config": _secret_file(node)},
            },
        },
    }
    options = {
        "@type": TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {
            "http2_protocol_options": {"connection_keepalive": {"interval": "30s", "timeout": "10s"}}
        },
        "http_filters": [
            {"name": "envoy.filters.http.credential_injector", "typed_config": injector},
            {
                "name": "envoy.filters.http.upstream_codec",
                "typed_config": {
                    "@type": TYPE + "envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec"
                },
            },
        ],
    }
    validation = {
        "trusted_ca": {
            "filename": node.root_certificate,
            "watched_directory": {"path": _folder(node.root_certificate)},
        },
        "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": host}}],
    }
    return {
        "name": "xds-grpc",
        "type": "STRICT_DNS",
        "connect_timeout": "5s",
        "load_assignment": _single("xds-grpc", host, int(port)),
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": TYPE + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": host,
                "common_tls_context": {"alpn_protocols": ["h2"], "validation_context": validation},
            },
        },
        "circuit_breakers": {"thresholds": [{"max_connections": 100000, "max_requests": 100000}]},
    }


SECRET_FILE = "token-secret.json"


def token_secret(node: ProxyNode) -> dict[str, Any]:
    """The file that tells Envoy where its token is; it follows the token's own file."""
    return {
        "resources": [
            {
                "@type": TYPE + "envoy.extensions.transport_sockets.tls.v3.Secret",
                "name": "istio-token",
                "generic_secret": {"secret": {"filename": node.token}},
            }
        ]
    }


def _secret_file(node: ProxyNode) -> dict[str, Any]:
    return {
        "path_config_source": {
            "path": f"{RUN}/{SECRET_FILE}",
            "watched_directory": {"path": _folder(node.token)},
        }
    }


RUN = "/var/run/meshlight-proxy"
"""Where the launcher writes what Envoy reads."""


def _folder(path: str) -> str:
    return path.rpartition("/")[0]
