"""DestinationRules: which settings hold for a port and subset, and what they do to a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from envoy.config.cluster.v3 import cluster_pb2
from envoy.extensions.transport_sockets.tls.v3 import tls_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2 as http

from meshlight.controlplane.envoy import destination_rule, wire
from meshlight.controlplane.envoy.clusters import protocol
from meshlight.controlplane.settings import Mesh
from meshlight.proto import workload_pb2 as wds


def rule(**spec: Any) -> destination_rule.DestinationRule:
    obj = {
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"host": "web", **spec},
    }
    parsed = destination_rule.parse(Mesh(), obj)
    assert parsed is not None
    return parsed


def cluster(settings: Any, declared: int = wds.HTTP11) -> Any:
    made = cluster_pb2.Cluster(name="c", type=cluster_pb2.Cluster.EDS)
    made.typed_extension_protocol_options[destination_rule.HTTP_OPTIONS].CopyFrom(
        wire.packed(protocol(declared))
    )
    destination_rule.apply(made, settings)
    return made


def options(made: Any) -> http.HttpProtocolOptions:
    found = http.HttpProtocolOptions()
    assert made.typed_extension_protocol_options[destination_rule.HTTP_OPTIONS].Unpack(found)
    return found


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("web", "web.shop.svc.cluster.local"),
        ("web.bank.svc.cluster.local", "web.bank.svc.cluster.local"),
        ("*.example.com", "*.example.com"),
    ],
)
def test_hosts_are_completed(host: str, name: str) -> None:
    assert rule(host=host).host == name


def test_covers() -> None:
    assert destination_rule.covers("*.example.com", "a.example.com")
    assert not destination_rule.covers("*.example.com", "example.com")
    assert destination_rule.covers("*", "x")


def test_the_most_particular_settings_win_field_by_field() -> None:
    pool, other = {"tcp": {"maxConnections": 1}}, {"tcp": {"maxConnections": 2}}
    made = rule(
        trafficPolicy={
            "connectionPool": pool,
            "loadBalancer": {"simple": "RANDOM"},
            "portLevelSettings": [{"port": {"number": 80}, "loadBalancer": {"simple": "ROUND_ROBIN"}}],
        },
        subsets=[
            {
                "name": "v2",
                "labels": {"version": "v2"},
                "trafficPolicy": {
                    "connectionPool": other,
                    "portLevelSettings": [{"port": {"number": 81}, "outlierDetection": {}}],
                },
            }
        ],
    )
    assert made.settings(80) == {"connectionPool": pool, "loadBalancer": {"simple": "ROUND_ROBIN"}}
    assert made.settings(81) == {"connectionPool": pool, "loadBalancer": {"simple": "RANDOM"}}
    assert made.settings(80, "v2") == {"connectionPool": other, "loadBalancer": {"simple": "ROUND_ROBIN"}}
    assert made.settings(81, "v2")["outlierDetection"] == {}
    assert made.settings(80, "unknown") == made.settings(80)


def test_subsets_are_by_labels() -> None:
    made = rule(subsets=[{"name": "v2", "labels": {"version": "v2"}}])
    subset = made.subset("v2")
    assert subset and subset.holds({"version": "v2", "app": "web"}) and not subset.holds({"app": "web"})


def test_export_to() -> None:
    assert rule().visible_in("bank")
    assert not rule(exportTo=["."]).visible_in("bank") and rule(exportTo=["."]).visible_in("shop")
    assert rule(exportTo=["bank"]).visible_in("bank")


def test_rules_for_sidecars_are_not_for_waypoints() -> None:
    obj = {
        "metadata": {"name": "x", "namespace": "y"},
        "spec": {"host": "z", "workloadSelector": {"matchLabels": {}}},
    }
    assert (
        destination_rule.parse(Mesh(), {**obj, "spec": {**obj["spec"], "workloadSelector": {"a": 1}}}) is None
    )


def test_the_seeds_circuit_breaking() -> None:
    made = cluster(
        {
            "connectionPool": {
                "tcp": {"maxConnections": 100, "connectTimeout": "30ms"},
                "http": {"http1MaxPendingRequests": 10, "http2MaxRequests": 50, "maxRetries": 3},
            },
            "outlierDetection": {
                "consecutive5xxErrors": 7,
                "interval": "5m",
                "baseEjectionTime": "15m",
                "maxEjectionPercent": 50,
            },
        }
    )
    limits = made.circuit_breakers.thresholds[0]
    assert (limits.max_connections.value, limits.max_pending_requests.value) == (100, 10)
    assert (limits.max_requests.value, limits.max_retries.value) == (50, 3)
    assert made.connect_timeout.ToMilliseconds() == 30
    detection = made.outlier_detection
    assert (detection.consecutive_5xx.value, detection.enforcing_consecutive_5xx.value) == (7, 100)
    assert (detection.interval.seconds, detection.base_ejection_time.seconds) == (300, 900)
    assert detection.max_ejection_percent.value == 50
    assert detection.enforcing_success_rate.value == 0
    assert made.common_lb_config.healthy_panic_threshold.value == 0


def test_gateway_errors_alone_do_not_count_other_errors() -> None:
    detection = cluster({"outlierDetection": {"consecutiveGatewayErrors": 3}}).outlier_detection
    assert detection.consecutive_gateway_failure.value == 3
    assert detection.enforcing_consecutive_5xx.value == 0


@pytest.mark.parametrize(
    ("balancer", "policy"),
    [
        ({"simple": "ROUND_ROBIN"}, cluster_pb2.Cluster.ROUND_ROBIN),
        ({"simple": "LEAST_CONN"}, cluster_pb2.Cluster.LEAST_REQUEST),
        ({"simple": "RANDOM"}, cluster_pb2.Cluster.RANDOM),
        ({"consistentHash": {"httpHeaderName": "x"}}, cluster_pb2.Cluster.RING_HASH),
        ({"consistentHash": {"useSourceIp": True, "maglev": {}}}, cluster_pb2.Cluster.MAGLEV),
        ({"simple": "PASSTHROUGH"}, cluster_pb2.Cluster.CLUSTER_PROVIDED),
    ],
)
def test_load_balancers(balancer: dict[str, Any], policy: int) -> None:
    assert cluster({"loadBalancer": balancer}).lb_policy == policy


@pytest.mark.parametrize(
    ("hashing", "kind"),
    [
        ({"httpHeaderName": "x-user"}, "header"),
        ({"httpCookie": {"name": "c", "ttl": "60s"}}, "cookie"),
        ({"useSourceIp": True}, "connection_properties"),
        ({"httpQueryParameterName": "q"}, "query_parameter"),
    ],
)
def test_what_requests_are_hashed_by(hashing: dict[str, Any], kind: str) -> None:
    (policy,) = destination_rule.hash_policies({"loadBalancer": {"consistentHash": hashing}})
    assert policy.WhichOneof("policy_specifier") == kind


def test_http_settings_keep_the_protocol() -> None:
    made = options(cluster({"connectionPool": {"http": {"maxRequestsPerConnection": 1}}}, wds.HTTP2))
    assert made.common_http_protocol_options.max_requests_per_connection.value == 1
    assert made.explicit_http_config.HasField("http2_protocol_options")
    upgraded = options(cluster({"connectionPool": {"http": {"h2UpgradePolicy": "UPGRADE"}}}))
    assert upgraded.explicit_http_config.HasField("http2_protocol_options")


def test_tls_is_originated_and_verified() -> None:
    made = cluster({"tls": {"mode": "SIMPLE", "sni": "api.example", "subjectAltNames": ["api.example"]}})
    context = tls_pb2.UpstreamTlsContext()
    assert made.transport_socket.typed_config.Unpack(context) and context.sni == "api.example"
    validation = context.common_tls_context.validation_context
    assert validation.trusted_ca.filename == destination_rule.SYSTEM_ROOTS
    assert validation.match_typed_subject_alt_names[0].matcher.exact == "api.example"


def test_istio_mutual_is_the_node_proxys() -> None:
    assert not cluster({"tls": {"mode": "ISTIO_MUTUAL"}}).HasField("transport_socket")


def test_no_settings_no_change() -> None:
    before = cluster({}).SerializeToString(deterministic=True)
    assert cluster({"connectionPool": {}}).SerializeToString(deterministic=True) == before
