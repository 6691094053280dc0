"""What a waypoint's Envoy is told, and how little a change costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from controlplane_objects import endpoint_slice, pod, service
from test_waypoint_bindings import ambient, gateway

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.envoy.index import EnvoyIndex
from meshlight.controlplane.envoy.names import ProxyKey
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import Changes
from meshlight.controlplane.settings import Mesh

KEY = ProxyKey("shop", "waypoint")
CLUSTER = "outbound|80||web.shop.svc.cluster.local"


class Mirror:
    """Both indexes, fed as istiod feeds them."""

    def __init__(self, *objects: dict[str, Any]) -> None:
        self.index = Index(Mesh())
        self.envoy = EnvoyIndex(self.index, '{"keys": []}')
        for obj in objects:
            self.take(obj)

    def take(self, obj: dict[str, Any], gone: bool = False) -> None:
        key, state = ObjectKey.of(obj), None if gone else obj
        if self.index.takes(obj["kind"]):
            self.index.observe(obj["kind"], key, state)
        self.envoy.observe(obj["kind"], key, state)

    def commit(self) -> dict[ProxyKey, Changes]:
        self.index.commit()
        return self.envoy.commit()

    def names(self, type_url: str, key: ProxyKey = KEY) -> set[str]:
        return {resource.name for resource in self.envoy.proxy(key).collections[type_url]}

    def resource(self, type_url: str, name: str, key: ProxyKey = KEY) -> Any:
        found = self.envoy.proxy(key).collections[type_url].get(name)
        assert found is not None, f"no {name} among {self.names(type_url, key)}"
        return found.message


def shop(*more: dict[str, Any]) -> Mirror:
    mirror = Mirror(
        ambient(use_waypoint="waypoint"), gateway(), service(), pod(), endpoint_slice("web-1"), *more
    )
    mirror.commit()
    return mirror


def endpoints(mirror: Mirror, name: str = CLUSTER) -> list[tuple[str, int]]:
    return [(e.address, e.port_value) for e in _addresses(mirror.resource(wire.ENDPOINT_TYPE, name))]


def _addresses(assignment: Any) -> Iterator[Any]:
    for group in assignment.endpoints:
        for endpoint in group.lb_endpoints:
            yield endpoint.endpoint.address.socket_address


def test_a_waypoint_knows_its_services() -> None:
    mirror = shop()
    assert CLUSTER in mirror.names(wire.CLUSTER_TYPE)
    assert endpoints(mirror) == [("10.244.1.5", 8080)]
    assert mirror.names(wire.LISTENER_TYPE) == {"main"}
    assert mirror.names(wire.SCOPED_ROUTE_TYPE) == {"10.96.0.7:80"}


def test_it_knows_nothing_else() -> None:
    mirror = shop(service("other", "elsewhere", ip="10.96.0.8"), service("own", labels={}, ip="10.96.0.9"))
    assert not any("elsewhere" in name for name in mirror.names(wire.CLUSTER_TYPE))
    assert "outbound|80||own.shop.svc.cluster.local" in mirror.names(wire.CLUSTER_TYPE)


def test_an_endpoint_changes_endpoints_alone() -> None:
    mirror = shop()
    mirror.take(pod("web-2", ip="10.244.1.6"))
    more = endpoint_slice("web-1", "web-2")
    more["endpoints"][1]["addresses"] = ["10.244.1.6"]
    mirror.take(more)
    changes = mirror.commit()[KEY]
    assert set(changes) == {wire.ENDPOINT_TYPE}
    assert endpoints(mirror) == [("10.244.1.5", 8080), ("10.244.1.6", 8080)]


def test_endpoints_that_are_not_ready_are_left_out() -> None:
    unready = endpoint_slice("web-1")
    unready["endpoints"][0]["conditions"]["ready"] = False
    assert endpoints(shop(unready)) == []


def test_what_becomes_undone_is_withdrawn() -> None:
    mirror = shop()
    mirror.take(service(), gone=True)
    changes = mirror.commit()[KEY]
    assert CLUSTER in changes[wire.CLUSTER_TYPE].removed
    assert "10.96.0.7:80" in changes[wire.SCOPED_ROUTE_TYPE].removed
    mirror.take(gateway(), gone=True)
    mirror.commit()
    assert all(not mirror.names(type_url) for type_url in wire.TYPES)


def test_the_same_again_is_no_change() -> None:
    mirror = shop()
    for obj in (service(), gateway(), endpoint_slice("web-1")):
        mirror.take(obj)
    assert not any(mirror.commit().values())


def test_ports_that_are_not_http_have_a_chain_of_their_own() -> None:
    ports = [
        {"name": "tcp-db", "port": 5432, "protocol": "TCP"},
        {"name": "http", "port": 80, "protocol": "TCP"},
        {"name": "unnamed", "port": 9000, "protocol": "TCP"},
    ]
    mirror = shop(service(ports=ports))
    listener = mirror.resource(wire.LISTENER_TYPE, "main")
    host = "web.shop.svc.cluster.local"
    assert {chain.name for chain in listener.filter_chains} == {
        "http", f"outbound|5432||{host}", f"outbound|9000||{host}",
    }  # fmt: skip
    # A server may speak first on 5432: nobody may wait for the client there.
    assert listener.listener_filters[1].filter_disabled.destination_port_range.start == 5432
    assert mirror.names(wire.SCOPED_ROUTE_TYPE) == {"10.96.0.7:80", "10.96.0.7:9000"}
