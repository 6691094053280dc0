"""The index: what workloads and services look like to the node proxy, and what a change touches."""

from __future__ import annotations

import pytest
from controlplane_objects import (
    apply,
    delete,
    endpoint_slice,
    names,
    node,
    pod,
    policy_names,
    published_service,
    security,
    service,
    workload,
)

from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from meshlight.controlplane.settings import Mesh
from meshlight.proto import workload_pb2 as wds

UID = "Kubernetes//Pod/shop/web-1"
WEB = "shop/web.shop.svc.cluster.local"
REDIRECTED = {"ambient.istio.io/redirection": "enabled"}
STRICT = "istio-system/istio_converted_static_strict"


@pytest.fixture
def index() -> Index:
    return Index(Mesh())


def test_a_pod_as_a_workload(index: Index) -> None:
    labels = {"app": "web", "version": "v2", "pod-template-hash": "5d8f"}
    apply(
        index,
        node(),
        service(),
        endpoint_slice("web-1"),
        pod(
            labels=labels,
            owner=("ReplicaSet", "web-5d8f"),
            annotations=REDIRECTED,
        ),
    )
    found = workload(index, UID)
    assert (found.uid, found.name, found.namespace) == (UID, "web-1", "shop")
    assert list(found.addresses) == [bytes([10, 244, 1, 5])]
    assert (found.network, found.cluster_id, found.trust_domain) == ("", "Kubernetes", "cluster.local")
    assert (found.service_account, found.node) == ("web", "node-1")
    assert (found.canonical_name, found.canonical_revision) == ("web", "v2")
    assert (found.workload_type, found.workload_name) == (wds.DEPLOYMENT, "web")
    assert found.tunnel_protocol == wds.HBONE
    assert not found.native_tunnel
    assert found.status == wds.HEALTHY
    assert found.network_mode == wds.STANDARD
    assert (found.locality.region, found.locality.zone) == ("r1", "z1")
    assert list(found.services) == [WEB]
    assert [(p.service_port, p.target_port) for p in found.services[WEB].ports] == [(80, 8080)]


@pytest.mark.parametrize(
    ("owner", "labels", "kind", "name"),
    [
        (None, {}, wds.POD, "web-1"),
        (("ReplicaSet", "web-5d8f"), {"pod-template-hash": "5d8f"}, wds.DEPLOYMENT, "web"),
        (("ReplicaSet", "web-5d8f"), {}, wds.POD, "web-5d8f"),
        (("DaemonSet", "ztunnel"), {}, wds.POD, "ztunnel"),
        (("StatefulSet", "db"), {}, wds.POD, "db"),
        (("Job", "load"), {}, wds.JOB, "load"),
        (("Job", "report-28123456"), {}, wds.CRONJOB, "report"),
        (("DaemonSet", "x"), {"service.istio.io/workload-name": "y"}, wds.POD, "y"),
    ],
)
def test_the_workload_behind_a_pod(
    index: Index, owner: tuple[str, str] | None, labels: dict[str, str], kind: int, name: str
) -> None:
    apply(index, pod(owner=owner, labels=labels))
    found = workload(index, UID)
    assert (found.workload_type, found.workload_name) == (kind, name)
    assert (found.canonical_name, found.canonical_revision) == (name, "latest")


@pytest.mark.parametrize(
    ("labels", "name", "revision"),
    [
        ({"app": "a", "version": "1"}, "a", "1"),
        (
            {"app": "a", "app.kubernetes.io/name": "b", "version": "1", "app.kubernetes.io/version": "2"},
            "b",
            "2",
        ),
        ({"app.kubernetes.io/name": "b", "service.istio.io/canonical-name": "c"}, "c", "latest"),
        ({"app": "a", "service.istio.io/canonical-revision": "3", "version": "1"}, "a", "3"),
    ],
)
def test_canonical_service(index: Index, labels: dict[str, str], name: str, revision: str) -> None:
    apply(index, pod(labels=labels))
    found = workload(index, UID)
    assert (found.canonical_name, found.canonical_revision) == (name, revision)


def test_tunnel_protocol_follows_redirection(index: Index) -> None:
    apply(index, pod())
    assert workload(index, UID).tunnel_protocol == wds.NONE
    apply(index, pod(annotations=REDIRECTED))
    assert workload(index, UID).tunnel_protocol == wds.HBONE
    apply(index, pod())
    assert workload(index, UID).tunnel_protocol == wds.NONE
    apply(index, pod(labels={"networking.istio.io/tunnel": "http"}))
    assert workload(index, UID).tunnel_protocol == wds.HBONE
    assert workload(index, UID).native_tunnel


@pytest.mark.parametrize("change", [{"ready": False}, {"deleted": True}])
def test_unready_and_leaving_pods_are_unhealthy(index: Index, change: dict[str, bool]) -> None:
    apply(index, pod(**change))  # type: ignore[arg-type]
    assert workload(index, UID).status == wds.UNHEALTHY


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_ended_pods_go(index: Index, phase: str) -> None:
    apply(index, pod())
    assert names(apply(index, pod(phase=phase))) == (set(), {UID})
    assert not index.collections[ADDRESS_TYPE].find("/10.244.1.5"), "its address may be another pod's by now"


def test_a_pod_without_address_is_not_announced(index: Index) -> None:
    assert not apply(index, pod(ip=None))


def test_pods_of_the_host_network_are_not_found_by_address(index: Index) -> None:
    apply(index, pod(host_network=True, ip="172.20.0.11"))
    assert workload(index, UID).network_mode == wds.HOST_NETWORK
    assert not index.collections[ADDRESS_TYPE].find("/172.20.0.11")


def test_a_service(index: Index) -> None:
    ports = [
        {"name": "http-web", "port": 80, "targetPort": 8080},
        {"name": "x", "port": 81, "targetPort": "named", "appProtocol": "kubernetes.io/h2c"},
        {"name": "grpc", "port": 82},
        {"name": "dns", "port": 53, "protocol": "UDP"},
    ]
    apply(index, service(ports=ports))
    found = published_service(index, WEB)
    assert (found.name, found.namespace, found.hostname) == ("web", "shop", "web.shop.svc.cluster.local")
    assert [bytes(a.address) for a in found.addresses] == [bytes([10, 96, 0, 7])]
    assert [(p.service_port, p.target_port, p.app_protocol) for p in found.ports] == [
        (80, 8080, wds.HTTP11),
        (81, 0, wds.HTTP2),
        (82, 82, wds.GRPC),
    ]
    assert found.ip_families == wds.IPV4_ONLY
    assert found.canonical
    assert not found.HasField("load_balancing")
    assert [r.name for r in index.collections[ADDRESS_TYPE].find("/10.96.0.7")] == [WEB]


def test_headless_and_external_services(index: Index) -> None:
    apply(index, service(ip="None"))
    assert not published_service(index, WEB).addresses
    assert names(apply(index, service(type="ExternalName"))) == (set(), {WEB})


@pytest.mark.parametrize(
    ("spec", "mode", "scopes"),
    [
        ({"internalTrafficPolicy": "Local"}, wds.LoadBalancing.STRICT, ["NODE"]),
        ({"trafficDistribution": "PreferClose"}, wds.LoadBalancing.FAILOVER, ["NETWORK", "REGION", "ZONE"]),
        (
            {"trafficDistribution": "PreferSameNode"},
            wds.LoadBalancing.FAILOVER,
            ["NETWORK", "REGION", "ZONE", "SUBZONE", "NODE"],
        ),
        (
            {"internalTrafficPolicy": "Local", "trafficDistribution": "PreferClose"},
            wds.LoadBalancing.STRICT,
            ["NODE"],
        ),
    ],
)
def test_load_balancing(index: Index, spec: dict[str, str], mode: int, scopes: list[str]) -> None:
    apply(index, service(**spec))
    found = published_service(index, WEB).load_balancing
    assert found.mode == mode
    assert [wds.LoadBalancing.Scope.Name(scope) for scope in found.routing_preference] == scopes


def test_a_namespace_sets_the_distribution_of_its_services(index: Index) -> None:
    apply(index, service())
    space = {"kind": "Namespace", "metadata": {"name": "shop", "annotations": {}}}
    space["metadata"]["annotations"] = {"networking.istio.io/traffic-distribution": "PreferClose"}
    assert names(apply(index, space)) == ({WEB}, set())
    assert published_service(index, WEB).load_balancing.mode == wds.LoadBalancing.FAILOVER


def test_addresses_to_be_published_unready(index: Index) -> None:
    apply(index, service(publishNotReadyAddresses=True))
    assert published_service(index, WEB).load_balancing.health_policy == wds.LoadBalancing.ALLOW_ALL


def test_ports_are_joined_by_name_over_slices(index: Index) -> None:
    apply(
        index,
        pod(),
        service(ports=[{"name": "http", "port": 80}, {"name": "admin", "port": 9000}]),
        endpoint_slice("web-1"),
        endpoint_slice("web-1", service="other", name="other-1"),
    )
    found = workload(index, UID).services
    assert list(found) == [WEB], "a slice of a Service that is not there says nothing"
    assert [(p.service_port, p.target_port) for p in found[WEB].ports] == [(80, 8080)]


def test_endpoints_that_are_no_pods(index: Index) -> None:
    name = "Kubernetes/discovery.k8s.io/EndpointSlice/shop/web-abc/172.20.0.1"
    apply(index, service(), endpoint_slice(addresses=("172.20.0.1", "not an address")))
    found = workload(index, name)
    assert found.network_mode == wds.HOST_NETWORK
    assert found.services[WEB].ports[0].target_port == 8080
    assert names(apply(index, endpoint_slice("web-1"))) == (set(), {name})


class TestChangesTouchOnlyWhatTheyConcern:
    @pytest.fixture
    def full(self, index: Index) -> Index:
        apply(
            index,
            node(),
            service(),
            service("api", ip="10.96.0.8"),
            pod(),
            pod("web-2", ip="10.244.1.6"),
            pod("api-1", ip="10.244.1.7", labels={"app": "api"}),
            pod("lone", "other", ip="10.244.2.1", node="node-2"),
            endpoint_slice("web-1", "web-2"),
            endpoint_slice("api-1", service="api", name="api-abc"),
        )
        return index

    def test_the_same_object_again(self, full: Index) -> None:
        assert not apply(full, pod(), service(), endpoint_slice("web-1", "web-2"), node())

    def test_a_field_nobody_needs(self, full: Index) -> None:
        heartbeat = pod()
        heartbeat["metadata"]["resourceVersion"] = "77"
        full.observe("Pod", ObjectKey.of(heartbeat), heartbeat)
        assert not full.pending()

    def test_one_pod(self, full: Index) -> None:
        assert names(apply(full, pod(ready=False))) == ({UID}, set())

    def test_an_endpoint_leaves(self, full: Index) -> None:
        assert names(apply(full, endpoint_slice("web-2"))) == ({UID}, set())
        assert not workload(full, UID).services

    def test_a_service_s_ports(self, full: Index) -> None:
        renamed = service(ports=[{"name": "http", "port": 81}])
        assert names(apply(full, renamed)) == ({WEB, UID, "Kubernetes//Pod/shop/web-2"}, set())

    def test_a_service_s_address(self, full: Index) -> None:
        assert names(apply(full, service(ip="10.96.0.70"))) == ({WEB}, set())
        assert not full.collections[ADDRESS_TYPE].find("/10.96.0.7")

    def test_a_service_goes(self, full: Index) -> None:
        assert names(delete(full, service())) == ({UID, "Kubernetes//Pod/shop/web-2"}, {WEB})

    def test_a_node_moves(self, full: Index) -> None:
        updated, _ = names(apply(full, node(zone="z2")))
        assert updated == {UID, "Kubernetes//Pod/shop/web-2", "Kubernetes//Pod/shop/api-1"}

    def test_a_selecting_policy(self, full: Index) -> None:
        policy = security("AuthorizationPolicy", selector={"matchLabels": {"app": "api"}})
        changes = apply(full, policy)
        assert names(changes) == ({"Kubernetes//Pod/shop/api-1"}, set())
        assert names(changes, AUTHORIZATION_TYPE) == ({"shop/p"}, set())
        assert list(workload(full, "Kubernetes//Pod/shop/api-1").authorization_policies) == ["shop/p"]
        changes = delete(full, policy)
        assert names(changes) == ({"Kubernetes//Pod/shop/api-1"}, set())
        assert names(changes, AUTHORIZATION_TYPE) == (set(), {"shop/p"})

    def test_a_namespace_policy_touches_no_workload(self, full: Index) -> None:
        changes = apply(full, security("AuthorizationPolicy"))
        assert names(changes) == (set(), set())
        assert names(changes, AUTHORIZATION_TYPE) == ({"shop/p"}, set())

    def test_a_root_policy_selects_in_every_namespace(self, full: Index) -> None:
        selector = {"matchLabels": {"app": "web"}}
        apply(full, security("AuthorizationPolicy", namespace="istio-system", selector=selector))
        for uid in (UID, "Kubernetes//Pod/other/lone"):
            assert list(workload(full, uid).authorization_policies) == ["istio-system/p"]

    def test_strict_in_a_namespace(self, full: Index) -> None:
        policy = security("PeerAuthentication", mtls={"mode": "STRICT"})
        changes = apply(full, policy)
        assert names(changes)[0] == {f"Kubernetes//Pod/shop/{name}" for name in ("web-1", "web-2", "api-1")}
        assert list(workload(full, UID).authorization_policies) == [STRICT]
        assert policy_names(full) == {STRICT}
        delete(full, policy)
        assert not workload(full, UID).authorization_policies
        assert policy_names(full) == set()

    def test_a_relabelled_pod_changes_its_policies(self, full: Index) -> None:
        apply(full, security("AuthorizationPolicy", selector={"matchLabels": {"app": "api"}}))
        apply(full, pod(labels={"app": "api"}))
        assert list(workload(full, UID).authorization_policies) == ["shop/p"]

    def test_a_pod_s_address_passes_on(self, full: Index) -> None:
        delete(full, pod())
        apply(full, pod("web-3", ip="10.244.1.5"))
        found = full.collections[ADDRESS_TYPE].find("/10.244.1.5")
        assert [resource.name for resource in found] == ["Kubernetes//Pod/shop/web-3"]

    def test_everything_goes(self, full: Index) -> None:
        delete(full, pod(), pod("web-2"), pod("api-1"), pod("lone", "other"), service(), service("api"))
        delete(full, endpoint_slice(), endpoint_slice(name="api-abc"), node())
        assert len(full.collections[ADDRESS_TYPE]) == 0
