"""VirtualServices and DestinationRules in what a waypoint is told."""

from __future__ import annotations

from typing import Any

from controlplane_objects import endpoint_slice, pod, service
from test_envoy_index import CLUSTER, KEY, Mirror, endpoints, shop

from meshlight.controlplane.envoy import wire

SUBSET = "outbound|80|v2|web.shop.svc.cluster.local"


def virtual_service(name: str = "web", namespace: str = "shop", **spec: Any) -> dict[str, Any]:
    return {
        "kind": "VirtualService",
        "metadata": {"name": name, "namespace": namespace, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"hosts": ["web"], **spec},
    }


def destination_rule(name: str = "web", namespace: str = "shop", **spec: Any) -> dict[str, Any]:
    return {
        "kind": "DestinationRule",
        "metadata": {"name": name, "namespace": namespace, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"host": "web.shop.svc.cluster.local", **spec},
    }


def destinations(mirror: Mirror) -> list[str]:
    (name,) = mirror.names(wire.SCOPED_ROUTE_TYPE)
    (host,) = mirror.resource(wire.SCOPED_ROUTE_TYPE, name).route_configuration.virtual_hosts
    found = []
    for route in host.routes:
        shares = [f"{c.name}={c.weight.value}" for c in route.route.weighted_clusters.clusters]
        found += shares or [route.route.cluster]
    return found


V2 = {"name": "v2", "labels": {"version": "v2"}}


def test_a_subset_is_a_cluster_of_those_endpoints() -> None:
    mirror = shop(pod("web-2", ip="10.244.1.9", labels={"app": "web", "version": "v2"}))
    mirror.take(endpoint_slice("web-1"))
    mirror.take(destination_rule(subsets=[V2]))
    changes = mirror.commit()
    assert mirror.names(wire.CLUSTER_TYPE) >= {CLUSTER, SUBSET}
    assert endpoints(mirror, SUBSET) == [], "no endpoint of that label"
    assert endpoints(mirror) != []
    assert wire.LISTENER_TYPE not in {t for t, change in changes[KEY].items() if change}


def test_a_canary_by_weights_changes_routes_alone() -> None:
    mirror = shop(destination_rule(subsets=[V2]))
    rule = {
        "route": [
            {"destination": {"host": "web"}, "weight": 90},
            {"destination": {"host": "web", "subset": "v2"}, "weight": 10},
        ]
    }
    mirror.take(virtual_service(http=[rule]))
    changes = mirror.commit()
    assert destinations(mirror) == [f"{CLUSTER}=90", f"{SUBSET}=10"]
    assert {t for t, change in changes[KEY].items() if change} == {wire.SCOPED_ROUTE_TYPE}
    mirror.take(virtual_service(http=[rule]), gone=True)
    mirror.commit()
    assert destinations(mirror) == [CLUSTER]


def test_another_service_as_destination_is_known_to_the_waypoint() -> None:
    mirror = shop(service("other", "bank", ip="10.96.0.9"))
    mirror.take(virtual_service(http=[{"route": [{"destination": {"host": "other.bank.svc.cluster.local"}}]}]))
    mirror.commit()
    cluster = "outbound|80||other.bank.svc.cluster.local"
    assert destinations(mirror) == [cluster] and cluster in mirror.names(wire.CLUSTER_TYPE)


def test_settings_reach_the_cluster_and_hashing_the_routes() -> None:
    mirror = shop()
    policy = {
        "connectionPool": {"tcp": {"maxConnections": 5}},
        "loadBalancer": {"consistentHash": {"httpHeaderName": "x-user"}},
    }
    mirror.take(destination_rule(trafficPolicy=policy))
    mirror.commit()
    cluster = mirror.resource(wire.CLUSTER_TYPE, CLUSTER)
    assert cluster.circuit_breakers.thresholds[0].max_connections.value == 5
    (name,) = mirror.names(wire.SCOPED_ROUTE_TYPE)
    (route,) = mirror.resource(wire.SCOPED_ROUTE_TYPE, name).route_configuration.virtual_hosts[0].routes
    assert route.route.hash_policy[0].header.header_name == "x-user"


def test_rules_of_one_host_are_taken_together() -> None:
    mirror = shop()
    mirror.take(destination_rule("a", subsets=[V2]))
    mirror.take(destination_rule("b", subsets=[{"name": "v3", "labels": {"version": "v3"}}]))
    mirror.commit()
    assert {SUBSET, SUBSET.replace("v2", "v3")} <= mirror.names(wire.CLUSTER_TYPE)


def test_of_several_virtual_services_the_exact_and_older_holds() -> None:
    mirror = shop()
    mirror.take(
        virtual_service("wild", hosts=["*.shop.svc.cluster.local"], http=[{"directResponse": {"status": 1}}])
    )
    mirror.take(virtual_service("exact", http=[{"route": [{"destination": {"host": "web", "subset": "a"}}]}]))
    mirror.commit()
    assert destinations(mirror) == ["outbound|80|a|web.shop.svc.cluster.local"]


def test_what_is_for_another_gateway_or_namespace_is_not_followed() -> None:
    other = [{"route": [{"destination": {"host": "web", "subset": "a"}}]}]
    mirror = shop(
        virtual_service(http=other, gateways=["edge"]), virtual_service("b", exportTo=["bank"], http=other)
    )
    assert destinations(mirror) == [CLUSTER]
