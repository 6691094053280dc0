"""ServiceEntries and WorkloadEntries in the index: what is published of them, and what a change touches."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from controlplane_objects import (
    apply,
    delete,
    endpoint_slice,
    names,
    pod,
    published_service,
    security,
    service,
    workload,
)

from meshlight.controlplane.address_allocation import IPV4, Allocation, Exhausted, Pool
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.settings import Mesh
from meshlight.proto import workload_pb2 as wds

PORTS = [{"number": 443, "name": "tls", "protocol": "TLS"}]


@pytest.fixture
def index() -> Index:
    return Index(Mesh())


def entry(name: str = "ext", namespace: str = "shop", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "creationTimestamp": spec.pop("created", "2026-01-01")}
    metadata |= spec.pop("metadata", {})
    full = {"hosts": ["api.example.com"], "ports": PORTS, **spec}
    obj = {"kind": "ServiceEntry", "metadata": metadata, "spec": full}
    if "status" in full:
        obj["status"] = full.pop("status")
    return obj


def machine(name: str = "vm-1", *, status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": "shop", "annotations": spec.pop("annotations", {})}
    full = {"address": "192.0.2.7", "labels": {"app": "db"}, "serviceAccount": "db", **spec}
    return {"kind": "WorkloadEntry", "metadata": metadata, "spec": full, "status": status or {}}


def addresses(message: Any) -> list[str]:
    return [str(ipaddress.ip_address(a.address)) for a in message.addresses]


def test_a_static_entry_brings_its_service_and_endpoints(index: Index) -> None:
    endpoints = [
        {"address": "192.0.2.1", "ports": {"tls": 8443}, "locality": "r/z", "weight": 3},
        {"address": "2001:db8::1"},
    ]
    changes = apply(
        index, entry(resolution="STATIC", addresses=["198.51.100.0/24", "198.51.101.1"], endpoints=endpoints)
    )
    base = "Kubernetes/networking.istio.io/ServiceEntry/shop/ext/"
    assert names(changes)[0] == {"shop/api.example.com", base + "192.0.2.1", base + "2001:db8::1"}
    message = published_service(index, "shop/api.example.com")
    assert addresses(message) == ["198.51.100.0", "198.51.101.1"]
    assert [a.length for a in message.addresses] == [24, 0]
    assert message.canonical
    first = workload(index, base + "192.0.2.1")
    (port,) = first.services["shop/api.example.com"].ports
    assert (port.service_port, port.target_port) == (443, 8443)
    assert (first.locality.region, first.locality.zone, first.capacity.value) == ("r", "z", 3)
    assert workload(index, base + "2001:db8::1").services["shop/api.example.com"].ports[0].target_port == 443
    assert names(delete(index, entry()))[1] == {
        "shop/api.example.com",
        base + "192.0.2.1",
        base + "2001:db8::1",
    }


def test_by_dns_the_hosts_themselves_are_the_endpoints(index: Index) -> None:
    status = {"addresses": [{"host": "api.example.com", "value": "240.240.0.1"}]}
    apply(index, entry(resolution="DNS", status=status))
    found = workload(index, "Kubernetes/networking.istio.io/ServiceEntry/shop/ext/api.example.com")
    assert (found.hostname, list(found.addresses)) == ("api.example.com", [])
    assert addresses(published_service(index, "shop/api.example.com")) == ["240.240.0.1"]


def test_without_resolution_traffic_goes_where_it_was_going(index: Index) -> None:
    apply(index, entry(hosts=["*.example.com"]))
    balancing = published_service(index, "shop/*.example.com").load_balancing
    assert balancing.mode == wds.LoadBalancing.PASSTHROUGH


def test_a_selector_picks_pods_and_workload_entries_of_its_namespace(index: Index) -> None:
    apply(
        index, pod(labels={"app": "db"}), pod("far-1", "bank", ip="10.244.1.9", labels={"app": "db"}), machine()
    )
    selecting = entry(resolution="STATIC", hosts=["db.example.com"], workloadSelector={"labels": {"app": "db"}})
    changed, _ = names(apply(index, selecting))
    vm = "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm-1"
    assert changed == {"shop/db.example.com", "Kubernetes//Pod/shop/web-1", vm}
    assert set(workload(index, "Kubernetes//Pod/shop/web-1").services) == {"shop/db.example.com"}
    assert set(workload(index, vm).services) == {"shop/db.example.com"}
    changed, removed = names(delete(index, selecting))
    assert changed == {"Kubernetes//Pod/shop/web-1", vm}
    assert removed == {"shop/db.example.com"}
    assert not workload(index, vm).services


def test_a_workload_entry(index: Index) -> None:
    apply(index, machine(annotations={"ambient.istio.io/redirection": "enabled"}, network="vms"))
    uid = "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm-1"
    found = workload(index, uid)
    assert found.tunnel_protocol == wds.HBONE
    assert (found.service_account, found.canonical_name, found.workload_name) == ("db", "db", "vm-1")
    assert found.status == wds.HEALTHY
    assert [
        r.name for r in index.collections["type.googleapis.com/istio.workload.Address"].find("vms/192.0.2.7")
    ] == [uid]
    unhealthy = {"conditions": [{"type": "Healthy", "status": "False"}]}
    apply(index, machine(status=unhealthy))
    assert workload(index, uid).status == wds.UNHEALTHY


def test_services_select_workload_entries_by_named_ports(index: Index) -> None:
    apply(index, service("db", selector={"app": "db"}), machine(ports={"http": 5432}))
    uid = "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm-1"
    (port,) = workload(index, uid).services["shop/db.shop.svc.cluster.local"].ports
    assert (port.service_port, port.target_port) == (80, 5432)
    apply(index, service("db", selector={"app": "other"}))
    assert not workload(index, uid).services


def test_policies_are_attached_to_what_they_select(index: Index) -> None:
    apply(index, machine(), entry(resolution="DNS", metadata={"labels": {"app": "db"}}))
    uid = "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm-1"
    policy = security("AuthorizationPolicy", selector={"matchLabels": {"app": "db"}})
    changed, _ = names(apply(index, policy))
    assert changed == {uid, "Kubernetes/networking.istio.io/ServiceEntry/shop/ext/api.example.com"}
    assert list(workload(index, uid).authorization_policies) == ["shop/p"]
    changed, _ = names(apply(index, security("PeerAuthentication", "strict", mtls={"mode": "STRICT"})))
    assert uid in changed
    assert "istio-system/istio_converted_static_strict" in workload(index, uid).authorization_policies


def test_a_host_has_one_owner(index: Index) -> None:
    older = entry("older", created="2025-01-01", addresses=["192.0.2.1"])
    newer = entry("newer", created="2026-01-01", addresses=["192.0.2.2"])
    apply(index, newer)
    apply(index, older)
    assert addresses(published_service(index, "shop/api.example.com")) == ["192.0.2.1"]
    changed, removed = names(delete(index, older))
    assert (changed, removed) == ({"shop/api.example.com"}, set())
    assert addresses(published_service(index, "shop/api.example.com")) == ["192.0.2.2"]
    assert names(delete(index, newer))[1] == {"shop/api.example.com"}


def test_a_service_owns_its_name(index: Index) -> None:
    claiming = entry(hosts=["web.shop.svc.cluster.local"], addresses=["192.0.2.1"])
    apply(index, claiming)
    apply(index, service())
    name = "shop/web.shop.svc.cluster.local"
    assert addresses(published_service(index, name)) == ["10.96.0.7"]
    assert names(delete(index, claiming)) == (set(), set())
    apply(index, claiming)
    apply(index, endpoint_slice())
    delete(index, service())
    assert addresses(published_service(index, name)) == ["192.0.2.1"]


def test_one_entry_of_the_mesh_is_canonical_for_a_host(index: Index) -> None:
    apply(index, entry("a", "bank", created="2025-01-01"), entry("b", "shop"))
    assert published_service(index, "bank/api.example.com").canonical
    assert not published_service(index, "shop/api.example.com").canonical
    delete(index, entry("a", "bank"))
    assert published_service(index, "shop/api.example.com").canonical


def test_export_to(index: Index) -> None:
    apply(index, entry(exportTo=["."]))
    found = published_service(index, "shop/api.example.com")
    assert (found.visibility, found.canonical) == (wds.Service.NAMESPACE, False)
    _, removed = names(apply(index, entry(exportTo=["~"])))
    assert removed == {"shop/api.example.com"}


def test_a_waypoint_before_an_entry(index: Index) -> None:
    gateway = {
        "kind": "Gateway",
        "metadata": {"name": "egress", "namespace": "shop"},
        "spec": {"gatewayClassName": "istio-waypoint", "listeners": [{"protocol": "HBONE", "port": 15008}]},
        "status": {"addresses": [{"value": "10.96.0.9"}]},
    }
    apply(index, entry(resolution="DNS", metadata={"labels": {"istio.io/use-waypoint": "egress"}}))
    assert not published_service(index, "shop/api.example.com").HasField("waypoint")
    apply(index, gateway)
    waypoint = published_service(index, "shop/api.example.com").waypoint
    assert waypoint.hostname.hostname == "egress.shop.svc.cluster.local"


def test_what_cannot_be_compiled_keeps_nothing_else_back(index: Index) -> None:
    apply(index, entry(addresses=["192.0.2.1"]))
    broken = entry(addresses=["192.0.2.2"], ports=[{"number": "many", "name": "x"}])
    changed, _ = names(apply(index, broken, pod(), machine()))
    assert {"Kubernetes//Pod/shop/web-1", "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm-1"} <= changed
    assert [failure.key for failure in index.failures] == [ObjectKey("shop", "ext")]
    assert addresses(published_service(index, "shop/api.example.com")) == ["192.0.2.1"], "the last good state"


class TestAllocation:
    def test_addresses_are_given_once_and_stay(self) -> None:
        allocation, key = Allocation(), ObjectKey("shop", "ext")
        obj = entry(resolution="DNS", hosts=["a.example.com", "*.wild.example.com"])
        given = allocation.wanted(key, obj)
        assert given == [
            {"value": "240.240.0.1", "host": "a.example.com"},
            {"value": "2001:2::1", "host": "a.example.com"},
        ]
        obj["status"] = {"addresses": given}
        assert allocation.wanted(key, obj) is None
        obj["spec"]["hosts"] = ["b.example.com", "a.example.com"]
        again = allocation.wanted(key, obj)
        assert again is not None
        assert [a["value"] for a in again] == ["240.240.0.2", "2001:2::2", "240.240.0.1", "2001:2::1"]

    def test_after_a_restart_what_is_stored_is_kept(self) -> None:
        stored = [
            {"value": "240.240.0.1", "host": "api.example.com"},
            {"value": "2001:2::1", "host": "api.example.com"},
        ]
        old = entry("old", resolution="DNS", status={"addresses": stored})
        allocation = Allocation()
        allocation.learn(ObjectKey("shop", "old"), old)
        fresh = allocation.wanted(ObjectKey("shop", "new"), entry("new", resolution="DNS"))
        assert fresh is not None
        assert [a["value"] for a in fresh] == ["240.240.0.2", "2001:2::2"]
        assert allocation.wanted(ObjectKey("shop", "old"), old) is None

    def test_a_stolen_address_is_replaced(self) -> None:
        allocation = Allocation()
        allocation.learn(ObjectKey("shop", "own"), entry("own", addresses=["240.240.0.1"]))
        stored = [
            {"value": "240.240.0.1", "host": "api.example.com"},
            {"value": "2001:2::1", "host": "api.example.com"},
        ]
        given = allocation.wanted(
            ObjectKey("shop", "ext"), entry(resolution="DNS", status={"addresses": stored})
        )
        assert given is not None
        assert given[0]["value"] == "240.240.0.2"

    @pytest.mark.parametrize(
        "spec",
        [
            {"resolution": "NONE"},
            {"resolution": "DNS", "addresses": ["192.0.2.1"]},
            {
                "resolution": "DNS",
                "metadata": {"labels": {"networking.istio.io/enable-autoallocate-ip": "false"}},
            },
        ],
    )
    def test_who_has_none(self, spec: dict[str, Any]) -> None:
        obj = entry(**spec)
        assert Allocation().wanted(ObjectKey("shop", "ext"), obj) is None
        obj["status"] = {"addresses": [{"value": "240.240.0.1", "host": "api.example.com"}]}
        assert Allocation().wanted(ObjectKey("shop", "ext"), obj) == [], "no longer needed"

    def test_a_pool_gives_each_address_once_and_takes_them_back(self) -> None:
        pool, key = Pool(ipaddress.IPv4Network("192.0.2.0/29")), ObjectKey("shop", "ext")
        drawn = [pool.draw(key) for _ in range(7)]
        assert len(set(drawn)) == 7
        with pytest.raises(Exhausted):
            pool.draw(key)
        pool.release(drawn[6:], key)
        assert pool.draw(key) == drawn[6]
        assert drawn[0] not in IPV4
