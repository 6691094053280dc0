"""Services: their addresses, their endpoints, and the rules that a node makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from meshlight.controllers.endpointslice import compile_endpoints, compile_slice
from meshlight.kube.service_addresses import assign
from meshlight.kube.status import StatusError
from meshlight.node.service_proxy import Backend, Frontend, ServiceTable


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


def test_endpoints_of_pods() -> None:
    pods = [
        pod("a", "10.244.1.2"),
        pod("b", "10.244.1.3", ready=False),
        pod("c", "10.244.1.4", leaving=True),
        {**pod("d", "10.244.1.5"), "status": {"phase": "Succeeded", "podIP": "10.244.1.5"}},
    ]
    compiled = compile_slice(service(), pods)
    assert [(e["addresses"][0], e["conditions"]) for e in compiled["endpoints"]] == [
        ("10.244.1.2", {"ready": True, "serving": True, "terminating": False}),
        ("10.244.1.3", {"ready": False, "serving": False, "terminating": False}),
        ("10.244.1.4", {"ready": False, "serving": True, "terminating": True}),
    ]
    assert compiled["ports"] == [{"name": "http", "port": 8080, "protocol": "TCP"}]
    (subset,) = compile_endpoints(service(), compiled)["subsets"]
    assert [a["ip"] for a in subset["addresses"]] == ["10.244.1.2"]
    assert [a["ip"] for a in subset["notReadyAddresses"]] == ["10.244.1.3", "10.244.1.4"]


def test_a_node_sends_to_ready_endpoints_and_refuses_when_there_are_none() -> None:
    table = ServiceTable("n1")
    item = service(clusterIP="10.96.0.7", clusterIPs=["10.96.0.7"])
    assert table.service(item, False)
    assert "10.96.0.7 . tcp . 80" in table.rules() and "dnat" not in table.rules().split("map services")[0]
    compiled = compile_slice(item, [pod("a", "10.244.1.2"), pod("b", "10.244.1.3", ready=False)])
    assert table.slice(compiled, False)
    assert "0 : 10.244.1.2 . 8080" in table.rules()
    assert not table.slice(compiled, False), "the same slice again changes nothing"
    assert table.slice(compiled, True)
    assert "10.244.1.2" not in table.rules()


def test_terminating_endpoints_serve_only_when_nothing_else_does() -> None:
    from meshlight.node.service_proxy import frontends

    item = service(clusterIP="10.96.0.7", clusterIPs=["10.96.0.7"])
    leaving = compile_slice(item, [pod("c", "10.244.1.4", leaving=True)])
    frontend = Frontend("10.96.0.7", "tcp", 80)
    assert frontends(item, [leaving], "n1")[frontend] == [Backend("10.244.1.4", 8080)]
    both = compile_slice(item, [pod("c", "10.244.1.4", leaving=True), pod("a", "10.244.1.2")])
    assert frontends(item, [both], "n1")[frontend] == [Backend("10.244.1.2", 8080)]
