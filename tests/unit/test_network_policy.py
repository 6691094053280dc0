"""NetworkPolicies: what they become, and that a change is as large as what changed."""

from __future__ import annotations

from typing import Any

import pytest

from meshlight.node.network_policy import PolicyTable
from meshlight.node.policy_rules import Wanted, change, cleanup, compile_policy


def policy(name: str = "p", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "shop"}, "spec": {"podSelector": {}, **spec}}


def pod(name: str, address: str, node: str = "n1", namespace: str = "shop", **labels: str) -> dict[str, Any]:
    ports = [{"name": "web", "containerPort": 8080}]
    return {
        "metadata": {"name": name, "namespace": namespace, "uid": name, "labels": labels},
        "spec": {"nodeName": node, "containers": [{"ports": ports}]},
        "status": {"podIP": address, "phase": "Running"},
    }


@pytest.mark.parametrize(
    ("spec", "statements"),
    [
        ({}, {"ingress": ()}),
        ({"egress": [{}]}, {"ingress": (), "egress": ("accept",)}),
        ({"policyTypes": ["Egress"]}, {"egress": ()}),
        ({"ingress": [{}]}, {"ingress": ("accept",)}),
        (
            {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]}]},
            {"ingress": ("ip saddr 10.0.0.0/8 ip saddr != { 10.1.0.0/16 } accept",)},
        ),
        (
            {"egress": [{"to": [{"ipBlock": {"cidr": "fd00::/8"}}], "ports": [{"protocol": "UDP"}]}]},
            {"ingress": (), "egress": ("ip6 daddr fd00::/8 meta l4proto udp accept",)},
        ),
        (
            {
                "ingress": [
                    {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 54, "endPort": 60, "protocol": "UDP"}]}
                ]
            },
            {"ingress": ("udp dport { 53, 54-60 } accept",)},
        ),
        (
            {"ingress": [{"ports": [{"port": 80}]}]},
            {
                "ingress": (
                    "tcp dport { 80 } accept",
                    "ip daddr @mesh-4 tcp dport 15008 accept",
                    "ip6 daddr @mesh-6 tcp dport 15008 accept",
                )
            },
        ),
    ],
)
def test_statements(spec: dict[str, Any], statements: dict[str, tuple[str, ...]]) -> None:
    assert compile_policy(policy(**spec)).statements == statements


def test_families_do_not_mix_in_a_statement() -> None:
    spec = {"ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": "web"}]}]}
    for statement in compile_policy(policy(**spec)).statements["ingress"]:
        assert not ("ip saddr" in statement and "ip6 daddr" in statement), statement


def test_only_local_pods_are_isolated_and_all_are_peers() -> None:
    table = PolicyTable("n1")
    table.policy(policy(ingress=[{"from": [{"podSelector": {}}]}]), False)
    for number, node in ((1, "n1"), (2, "n2")):
        table.pod(pod(f"p{number}", f"10.244.{number}.2", node), False)
    wanted = table.wanted()
    assert list(wanted.isolated["ingress"]) == ["10.244.1.2"] and not wanted.isolated["egress"]
    added, removed = table.members(everything=False)
    (peers,) = [elements for name, elements in added.items() if name.startswith("peers-")]
    assert peers == {"10.244.1.2", "10.244.2.2"} and not any(removed.values())


def test_a_change_is_as_large_as_what_changed() -> None:
    table = PolicyTable("n1")
    table.policy(policy(ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "a"}}}]}]), False)
    for number in range(2, 102):
        table.pod(pod(f"p{number}", f"10.244.1.{number}", app="a"), False)
    first = table.wanted()
    table.members(everything=True)
    table.pod(pod("new", "10.244.2.2", "n2", app="a"), False)
    after = table.wanted()
    text = change(first, after, *table.members(everything=False))
    assert text.count("10.244") == 1 and text.startswith("add element") and cleanup(first, after) == ""
    table.pod(pod("new", "10.244.2.2", "n2", app="b"), False)
    text = change(after, table.wanted(), *table.members(everything=False))
    assert text.startswith("delete element") and text.count("10.244") == 1
    table.pod(pod("new", "10.244.2.2", "n2", app="b"), True)
    assert change(after, table.wanted(), *table.members(everything=False)) == ""


def test_an_address_that_passes_from_pod_to_pod_stays_a_peer() -> None:
    table = PolicyTable("n1")
    table.policy(policy(ingress=[{"from": [{"podSelector": {}}]}]), False)
    table.pod(pod("old", "10.244.2.2", "n2"), False)
    table.members(everything=True)
    table.pod(pod("new", "10.244.2.2", "n2"), False)
    table.pod(pod("old", "10.244.2.2", "n2"), True)
    added, removed = table.members(everything=False)
    assert not any(added.values()) and not any(removed.values())


def test_a_selector_that_comes_back_between_two_writes_is_exact() -> None:
    table, item = PolicyTable("n1"), policy(ingress=[{"from": [{"podSelector": {}}]}])
    table.policy(item, False)
    table.pod(pod("a", "10.244.1.2"), False)
    table.pod(pod("b", "10.244.1.3"), False)
    table.members(everything=True)
    table.policy(item, True)
    table.pod(pod("b", "10.244.1.3"), True)
    table.policy(item, False)
    added, removed = table.members(everything=False)
    assert not any(added.values()) and set().union(*removed.values()) == {"10.244.1.3"}


def test_what_is_deleted_leaves_nothing() -> None:
    table, item = PolicyTable("n1"), policy(egress=[{"to": [{"namespaceSelector": {}}]}])
    table.policy(item, False)
    table.pod(pod("a", "10.244.1.2"), False)
    before = table.wanted()
    table.policy(item, True)
    assert not table.needed and table.wanted() == Wanted()
    text = cleanup(before, table.wanted())
    assert text.count("delete chain") == len(before.chains) and text.count("delete set") == 2
