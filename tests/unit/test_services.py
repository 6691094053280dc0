"""Services: their addresses, their endpoints, and the rules that a node makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from meshlight.controllers.endpointslice import compile_endpoints, compile_groups, mirrored_groups, mirrors
from meshlight.controllers.slices import Group, Owner, distribute
from meshlight.kube.service_addresses import assign
from meshlight.kube.status import StatusError
from meshlight.kube.validation import services as validation
from meshlight.node.service_proxy import Place, ServiceTable, frontends
from meshlight.node.service_rules import (
    IPV4,
    IPV6,
    Backend,
    Claims,
    Endpoints,
    Frontend,
    change,
    compile_service,
)


def service(name: str = "web", **spec: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": 80, "targetPort": "web", "protocol": "TCP"}]
    return {
        "metadata": {"name": name, "namespace": "shop", "uid": f"uid-{name}"},
        "spec": {"type": "ClusterIP", "selector": {"app": name}, "ports": ports, **spec},
    }


def pod(name: str, address: str, *, ready: bool = True, leaving: bool = False) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": "shop", "uid": name, "labels": {"app": "web"}}
    if leaving:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {
        "metadata": metadata,
        "spec": {"nodeName": "n1", "containers": [{"ports": [{"name": "web", "containerPort": 8080}]}]},
        "status": {
            "phase": "Running",
            "podIP": address,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def test_an_address_is_allotted_and_kept() -> None:
    made = service()
    assign(made, None, [])
    address = made["spec"]["clusterIP"]
    assert address.startswith("10.96.") and made["spec"]["clusterIPs"] == [address]
    again = service()
    assign(again, made, [])
    assert again["spec"]["clusterIP"] == address


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"clusterIP": "10.97.0.1"}, "not in the valid range"),
        ({"clusterIP": "10.96.0.1"}, "already allocated"),
        ({"clusterIP": "house"}, "must be a valid IP address"),
        ({"type": "NodePort", "ports": [{"port": 80, "nodePort": 80}]}, "range of valid ports is 30000-32767"),
        ({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30001}]}, "already allocated"),
    ],
)
def test_refused_addresses(spec: dict[str, Any], reason: str) -> None:
    other = service("kubernetes", clusterIP="10.96.0.1", ports=[{"port": 1, "nodePort": 30001}])
    with pytest.raises(StatusError, match=reason):
        assign(service(**spec), None, [other])


def test_an_address_may_not_change() -> None:
    old = service(clusterIP="10.96.0.9")
    with pytest.raises(StatusError, match="may not change once set"):
        assign(service(clusterIP="10.96.0.10"), old, [])


def test_headless_and_external_services_have_no_address() -> None:
    headless, external = service(clusterIP="None"), service(type="ExternalName", externalName="a.b")
    for item in (headless, external):
        assign(item, None, [])
    assert headless["spec"]["clusterIP"] == "None"
    assert "clusterIP" not in external["spec"]


def test_families_are_completed_and_trimmed() -> None:
    both = service(ipFamilyPolicy="PreferDualStack")
    assign(both, None, [])
    assert both["spec"]["ipFamilies"] == ["IPv4", "IPv6"]
    assert [":" in a for a in both["spec"]["clusterIPs"]] == [False, True]
    trimmed = {**both, "spec": {**both["spec"], "ipFamilyPolicy": "SingleStack"}}
    assign(trimmed, both, [])
    assert trimmed["spec"]["clusterIPs"] == both["spec"]["clusterIPs"][:1]
    assert trimmed["spec"]["ipFamilies"] == ["IPv4"]
    grown = {**trimmed, "spec": {**trimmed["spec"], "ipFamilyPolicy": "RequireDualStack"}}
    assign(grown, trimmed, [])
    assert grown["spec"]["clusterIP"] == both["spec"]["clusterIP"] and len(grown["spec"]["clusterIPs"]) == 2
    six = service(ipFamilies=["IPv6"])
    assign(six, None, [])
    assert (
        six["spec"]["clusterIP"].startswith("fd6d:6c10:96::") and six["spec"]["ipFamilyPolicy"] == "SingleStack"
    )
    by_hand = service(clusterIP="None", selector=None)
    assign(by_hand, None, [])
    assert by_hand["spec"]["ipFamilies"] == ["IPv4", "IPv6"], "who keeps endpoints by hand may have both"
    with pytest.raises(StatusError, match="RequireDualStack or PreferDualStack"):
        assign(service(ipFamilies=["IPv4", "IPv6"], ipFamilyPolicy="SingleStack"), None, [])


def test_node_ports_of_load_balancers() -> None:
    ports = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    made = service(type="LoadBalancer", externalTrafficPolicy="Local", ports=ports)
    assign(made, None, [])
    udp, tcp = (p["nodePort"] for p in made["spec"]["ports"])
    assert udp == tcp, "one number for both protocols of a port"
    assert made["spec"]["healthCheckNodePort"] not in (0, tcp)
    none = service(type="LoadBalancer", allocateLoadBalancerNodePorts=False)
    assign(none, None, [])
    assert "nodePort" not in none["spec"]["ports"][0]
    again = {**made, "spec": {**made["spec"], "ports": [{"port": 53, "protocol": "UDP"}]}}
    assign(again, made, [])
    assert again["spec"]["ports"][0]["nodePort"] == udp


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"externalTrafficPolicy": "Local"}, "spec.externalTrafficPolicy"),
        ({"loadBalancerClass": "x/y"}, "spec.loadBalancerClass"),
        ({"type": "LoadBalancer", "loadBalancerSourceRanges": ["10/8"]}, "spec.loadBalancerSourceRanges[0]"),
        ({"type": "LoadBalancer", "healthCheckNodePort": 30000}, "spec.healthCheckNodePort"),
        ({"trafficDistribution": "Anywhere"}, "spec.trafficDistribution"),
        (
            {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 90000}}},
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        ),
    ],
)
def test_invalid_services(spec: dict[str, Any], field: str) -> None:
    assert [c.field for c in validation.service(service(**spec))] == [field]
    assert validation.service(service()) == []


def conditions(groups: dict[Group, list[dict[str, Any]]]) -> list[tuple[str, dict[str, bool]]]:
    return [(e["addresses"][0], e["conditions"]) for endpoints in groups.values() for e in endpoints]


def test_endpoints_of_pods() -> None:
    pods = [
        pod("a", "10.244.1.2"),
        pod("b", "10.244.1.3", ready=False),
        pod("c", "10.244.1.4", leaving=True),
        {**pod("d", "10.244.1.5"), "status": {"phase": "Succeeded", "podIP": "10.244.1.5"}},
    ]
    compiled = compile_groups(service(), pods)
    assert conditions(compiled) == [
        ("10.244.1.2", {"ready": True, "serving": True, "terminating": False}),
        ("10.244.1.3", {"ready": False, "serving": False, "terminating": False}),
        ("10.244.1.4", {"ready": False, "serving": True, "terminating": True}),
    ]
    assert [g.ports for g in compiled] == [(("http", "TCP", 8080, ""),)]
    (subset,) = compile_endpoints(service(), compiled)["subsets"]
    assert [a["ip"] for a in subset["addresses"]] == ["10.244.1.2"]
    assert [a["ip"] for a in subset["notReadyAddresses"]] == ["10.244.1.3", "10.244.1.4"]
    early = compile_groups(service(publishNotReadyAddresses=True), pods[1:2])
    assert conditions(early)[0][1]["ready"] is True


def test_pods_that_name_another_number_make_another_group() -> None:
    other = pod("z", "10.244.1.9")
    other["spec"]["containers"][0]["ports"][0]["containerPort"] = 9090
    compiled = compile_groups(service(), [pod("a", "10.244.1.2"), other])
    assert sorted(g.ports[0][2] for g in compiled) == [8080, 9090]
    ports = [s["ports"][0]["port"] for s in compile_endpoints(service(), compiled)["subsets"]]
    assert ports == [8080, 9090]


def test_endpoints_of_both_families_and_none() -> None:
    both = service(ipFamilies=["IPv4", "IPv6"])
    one = pod("a", "10.244.1.2")
    one["status"]["podIPs"] = [{"ip": "10.244.1.2"}, {"ip": "fd00::2"}]
    compiled = compile_groups(both, [one])
    assert [(g.family, e[0]["addresses"]) for g, e in compiled.items()] == [
        ("IPv4", ["10.244.1.2"]),
        ("IPv6", ["fd00::2"]),
    ]
    assert compile_groups(service(), []) == {Group("IPv4", ()): []}, "one empty slice"


def test_hints_follow_the_distribution() -> None:
    near = service(trafficDistribution="PreferClose")
    (endpoint,) = next(iter(compile_groups(near, [pod("a", "10.244.1.2")], {"n1": "z1"}).values()))
    assert endpoint["hints"] == {"forZones": [{"name": "z1"}]} and endpoint["zone"] == "z1"
    own = service(trafficDistribution="PreferSameNode")
    (endpoint,) = next(iter(compile_groups(own, [pod("a", "10.244.1.2")], {}).values()))
    assert endpoint["hints"] == {"forNodes": [{"name": "n1"}]}


OWNER = Owner(service(), {"uid": "u"}, "c")
GROUP = Group("IPv4", (("http", "TCP", 8080, ""),))


def some(count: int) -> list[dict[str, Any]]:
    return [{"addresses": [f"10.244.{n // 250}.{n % 250}"]} for n in range(count)]


def test_slices_hold_a_hundred_and_change_in_place() -> None:
    made, gone = distribute(OWNER, [], {GROUP: some(250)})
    assert [len(item["endpoints"]) for item in made] == [100, 100, 50] and not gone
    assert made == distribute(OWNER, [], {GROUP: some(250)})[0], "the same names again"
    fewer = [e for e in some(250) if e["addresses"] != made[0]["endpoints"][7]["addresses"]]
    after, gone = distribute(OWNER, made, {GROUP: fewer})
    assert [len(item["endpoints"]) for item in after] == [99, 100, 50] and not gone
    assert [i["endpoints"] for i in after[1:]] == [i["endpoints"] for i in made[1:]], "others are untouched"
    grown, _ = distribute(OWNER, after, {GROUP: some(252)})
    assert [len(item["endpoints"]) for item in grown] == [100, 100, 52], "the fullest with room is filled"
    few, gone = distribute(OWNER, grown, {GROUP: grown[1]["endpoints"]})
    assert [i["metadata"]["name"] for i in few] == [grown[1]["metadata"]["name"]] and len(gone) == 2


def test_no_endpoints_leave_one_empty_slice() -> None:
    made, _ = distribute(OWNER, [], {GROUP: some(150)})
    empty, gone = distribute(OWNER, made, {Group("IPv4", ()): []})
    assert [i["endpoints"] for i in empty] == [[]] and len(gone) == 2
    assert distribute(OWNER, empty, {Group("IPv4", ()): []}) == (empty, [])


def test_endpoints_kept_by_hand_are_mirrored() -> None:
    by_hand = {
        "metadata": {"name": "db", "namespace": "shop"},
        "subsets": [
            {
                "addresses": [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1", "hostname": "six"}],
                "notReadyAddresses": [{"ip": "192.0.2.2"}],
                "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}],
            }
        ],
    }
    plain = service("db", selector=None)
    assert mirrors(plain, by_hand) and not mirrors(service("db"), by_hand)
    found = {g.family: e for g, e in mirrored_groups(by_hand).items()}
    assert [(e["addresses"][0], e["conditions"]["ready"]) for e in found["IPv4"]] == [
        ("192.0.2.1", True),
        ("192.0.2.2", False),
    ]
    assert found["IPv6"][0]["hostname"] == "six"
    by_hand["metadata"]["labels"] = {"endpointslice.kubernetes.io/skip-mirror": "true"}
    assert not mirrors(plain, by_hand)


HERE = Place("n1", "z1")


def slices_of(item: dict[str, Any], pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    owner = Owner(item, {"uid": "u"}, "c")
    return distribute(owner, [], compile_groups(item, pods, {"n1": "z1", "n2": "z2"}))[0]


def on(node: str, made: dict[str, Any]) -> dict[str, Any]:
    made["spec"]["nodeName"] = node
    return made


def test_a_node_sends_to_ready_endpoints_and_refuses_when_there_are_none() -> None:
    table = ServiceTable(HERE)
    item = service(clusterIP="10.96.0.7", clusterIPs=["10.96.0.7"])
    assert table.service(item, False)
    assert table.claims.whole().refused == {"10.96.0.7 . tcp . 80": ""}
    (compiled,) = slices_of(item, [pod("a", "10.244.1.2"), pod("b", "10.244.1.3", ready=False)])
    assert table.slice(compiled, False)
    assert "0 : 10.244.1.2 . 8080" in table.rules()
    assert not table.slice(compiled, False), "the same slice again changes nothing"
    assert table.slice(compiled, True)
    assert "10.244.1.2" not in table.rules()


def test_terminating_endpoints_serve_only_when_nothing_else_does() -> None:
    item = service(clusterIP="10.96.0.7", clusterIPs=["10.96.0.7"])
    leaving = slices_of(item, [pod("c", "10.244.1.4", leaving=True)])
    frontend = Frontend("10.96.0.7", "tcp", 80)
    assert frontends(item, leaving, HERE)[frontend].chosen == (Backend("10.244.1.4", 8080),)
    both = slices_of(item, [pod("c", "10.244.1.4", leaving=True), pod("a", "10.244.1.2")])
    assert frontends(item, both, HERE)[frontend].chosen == (Backend("10.244.1.2", 8080),)


def test_traffic_policies() -> None:
    item = service(
        clusterIP="10.96.0.7",
        clusterIPs=["10.96.0.7"],
        type="LoadBalancer",
        internalTrafficPolicy="Local",
        externalTrafficPolicy="Local",
        loadBalancerSourceRanges=["10.0.0.0/8"],
    )
    item["status"] = {"loadBalancer": {"ingress": [{"ip": "172.20.1.1"}]}}
    away = Backend("10.244.2.2", 8080)
    found = frontends(item, slices_of(item, [on("n2", pod("a", "10.244.2.2"))]), HERE)
    assert found[Frontend("10.96.0.7", "tcp", 80)] == Endpoints((), (away,))
    outer = Frontend("172.20.1.1", "tcp", 80, sources=("10.0.0.0/8",))
    assert found[outer] == Endpoints((), (away,), inside_everywhere=True)
    rules = compile_service(IPV4, "shop/web", found)
    assert rules.refused == {}, "endpoints elsewhere: dropped here, not refused"
    inner = rules.chains[rules.services["10.96.0.7 . tcp . 80"]]
    assert inner == ("drop",)
    chain = rules.chains[rules.services["172.20.1.1 . tcp . 80"]]
    assert chain[0] == "ip saddr != { 10.0.0.0/8 } fib saddr type != local drop" and chain[-1] == "drop"
    assert chain[1].startswith("ip saddr 10.244.0.0/16 goto endpoints-")


def test_hints_narrow_the_choice_when_they_can() -> None:
    item = service(clusterIP="10.96.0.7", clusterIPs=["10.96.0.7"], trafficDistribution="PreferClose")
    near, far = on("n1", pod("a", "10.244.1.2")), on("n2", pod("b", "10.244.2.2"))
    frontend = Frontend("10.96.0.7", "tcp", 80)

    def addresses(*pods: dict[str, Any]) -> list[str]:
        return [b.address for b in frontends(item, slices_of(item, list(pods)), HERE)[frontend].chosen]

    assert addresses(near, far) == ["10.244.1.2"]
    assert addresses(far) == ["10.244.2.2"]


def test_families_have_tables_of_their_own() -> None:
    item = service(clusterIP="10.96.0.7", clusterIPs=["10.96.0.7", "fd6d:6c10:96::7"], type="NodePort")
    item["spec"] |= {"ipFamilies": ["IPv4", "IPv6"]}
    item["spec"]["ports"][0]["nodePort"] = 30080
    one = pod("a", "10.244.1.2")
    one["status"]["podIPs"] = [{"ip": "10.244.1.2"}, {"ip": "fd00::2"}]
    found = frontends(item, slices_of(item, [one]), HERE, IPV6)
    assert {f.key: e.chosen for f, e in found.items()} == {
        "fd6d:6c10:96::7 . tcp . 80": (Backend("fd00::2", 8080),),
        "tcp . 30080": (Backend("fd00::2", 8080),),
    }


def test_claims_change_by_what_was_touched() -> None:
    claims = Claims()
    first, second = Frontend("10.96.0.7", "tcp", 80), Frontend("10.96.0.8", "tcp", 80)
    behind = Endpoints((Backend("10.244.1.2", 80),))
    claims.put("a", compile_service(IPV4, "a", {first: behind}))
    claims.put("b", compile_service(IPV4, "b", {second: behind}))
    claims.taken()
    claims.put("a", compile_service(IPV4, "a", {first: Endpoints((Backend("10.244.1.3", 80),))}))
    before, after = claims.taken()
    assert set(before.services) == set(after.services) == {"10.96.0.7 . tcp . 80"}
    assert not before.chains, "another Service still uses the chain"
    assert len(after.chains) == 1 and "10.96.0.8" not in change(IPV4, before, after)
    claims.put("b", None)
    before, after = claims.taken()
    assert len(before.chains) == 1 and not after.chains and not after.services
    claims.put("c", compile_service(IPV4, "c", {first: behind}))
    assert claims.whole().services["10.96.0.7 . tcp . 80"] != "", "of two claims the first by name holds"
    assert claims.taken()[1].services == {}
