"""LB-IPAM: which address of which pool a LoadBalancer Service gets."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from meshlight.controllers.load_balancer import pool_conditions, service_status
from meshlight.controllers.load_balancer_pools import (
    Ledger,
    Outcome,
    Pool,
    PoolError,
    allocate,
    conflicts,
    parse,
    request,
    wants,
)


def pool(name: str = "blue", created: str = "1", **spec: Any) -> Pool:
    return parse({"metadata": {"name": name, "creationTimestamp": created}, "spec": spec})


def service(name: str = "web", annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop", "labels": {"app": name}, "annotations": annotations or {}}
    ports = [{"port": 80, "protocol": "TCP"}]
    return {"metadata": metadata, "spec": {"type": "LoadBalancer", "ports": ports, **spec}}


def give(item: dict[str, Any], pools: list[Pool], ledger: Ledger) -> Outcome:
    asked = request(item)
    outcome = allocate(asked, pools, conflicts(pools), ledger)
    ledger.put(asked, outcome.addresses)
    return outcome


def shown(outcome: Outcome) -> list[str]:
    return [str(a) for a in outcome.addresses]


def test_addresses_in_order_kept_and_given_back() -> None:
    pools, ledger = [pool(blocks=[{"start": "192.0.2.1", "stop": "192.0.2.2"}])], Ledger()
    assert shown(give(service("a"), pools, ledger)) == ["192.0.2.1"]
    assert shown(give(service("b"), pools, ledger)) == ["192.0.2.2"]
    assert shown(give(service("a"), pools, ledger)) == ["192.0.2.1"]
    full = give(service("c"), pools, ledger)
    assert (full.addresses, full.satisfied, full.reason) == ((), False, "out_of_ips")
    ledger.drop(("shop", "a"))
    assert shown(give(service("c"), pools, ledger)) == ["192.0.2.1"]
    assert ledger.used(pools[0]) == 2


def test_blocks() -> None:
    assert sum(b.size for b in pool(blocks=[{"cidr": "192.0.2.0/30"}]).blocks) == 4
    assert sum(b.size for b in pool(blocks=[{"cidr": "192.0.2.0/30"}], allowFirstLastIPs="No").blocks) == 2
    assert sum(b.size for b in pool(blocks=[{"start": "192.0.2.9"}]).blocks) == 1
    assert pool(blocks=[{"cidr": "fd00::/64"}]).blocks[0].size == 1 << 64
    for wrong in ({"cidr": "10/8"}, {"stop": "192.0.2.1"}, {"start": "192.0.2.9", "stop": "192.0.2.1"}):
        with pytest.raises(PoolError, match=r"spec\.blocks\[0\]"):
            pool(blocks=[wrong])


def test_selectors_know_name_and_namespace() -> None:
    only = pool(
        blocks=[{"cidr": "192.0.2.0/24"}],
        serviceSelector={"matchLabels": {"io.kubernetes.service.namespace": "shop", "app": "web"}},
    )
    assert give(service("web"), [only], Ledger()).satisfied
    refused = give(service("other"), [only], Ledger())
    assert (refused.satisfied, refused.reason) == (False, "no_pool")


def test_a_pool_that_overlaps_an_older_one_gives_nothing() -> None:
    old = pool("old", "1", blocks=[{"cidr": "192.0.2.0/24"}])
    new = pool("new", "2", blocks=[{"start": "192.0.2.250", "stop": "192.0.3.9"}])
    third = pool("third", "3", blocks=[{"cidr": "192.0.3.0/24"}])
    assert list(conflicts([new, third, old])) == ["new"]
    assert "overlaps" in conflicts([old, new])["new"] and "'old'" in conflicts([old, new])["new"]
    assert shown(give(service(), [new, old], Ledger())) == ["192.0.2.0"]


def test_disabled_pools_keep_what_they_gave() -> None:
    block, ledger = [{"cidr": "192.0.2.0/24"}], Ledger()
    before = give(service("a"), [pool(blocks=block)], ledger)
    disabled = [pool(blocks=block, disabled=True)]
    assert give(service("a"), disabled, ledger) == before
    assert not give(service("b"), disabled, ledger).satisfied


@pytest.mark.parametrize("key", ["lbipam.cilium.io/ips", "io.cilium/lb-ipam-ips"])
def test_addresses_may_be_asked_for(key: str) -> None:
    pools, ledger = [pool(blocks=[{"cidr": "192.0.2.0/24"}])], Ledger()
    both = give(service("a", {key: "192.0.2.7, 192.0.2.9"}), pools, ledger)
    assert shown(both) == ["192.0.2.7", "192.0.2.9"]
    taken = give(service("b", loadBalancerIP="192.0.2.7"), pools, ledger)
    assert (taken.satisfied, taken.reason) == (False, "already_allocated")
    outside = give(service("c", {key: "198.51.100.1"}), pools, ledger)
    assert outside.reason == "no_pool" and "198.51.100.1" in outside.message
    assert shown(give(service("b"), pools, ledger)) == ["192.0.2.0"], "without the wish: a free one"


def test_sharing_needs_one_key_and_other_ports() -> None:
    pools, ledger = [pool(blocks=[{"cidr": "192.0.2.0/24"}])], Ledger()
    key = {"lbipam.cilium.io/sharing-key": "k"}
    tls = [{"port": 443, "protocol": "TCP"}]
    assert shown(give(service("a", key), pools, ledger)) == ["192.0.2.0"]
    assert shown(give(service("b", key, ports=tls), pools, ledger)) == ["192.0.2.0"]
    assert shown(give(service("c", key, ports=tls), pools, ledger)) == ["192.0.2.1"], "the port is taken"
    assert shown(give(service("d", ports=tls), pools, ledger)) == ["192.0.2.2"], "no key"
    foreign = service("e", key, ports=[{"port": 9}])
    foreign["metadata"]["namespace"] = "else"
    assert shown(give(foreign, pools, ledger)) == ["192.0.2.3"], "another namespace has to be let in"


def test_families() -> None:
    pools = [pool(blocks=[{"cidr": "192.0.2.0/24"}, {"cidr": "fd00::/120"}])]
    both = {"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"}
    assert shown(give(service(**both), pools, Ledger())) == ["192.0.2.0", "fd00::"]
    four = [pool(blocks=[{"cidr": "192.0.2.0/24"}])]
    assert not give(service(**both), four, Ledger()).satisfied
    preferred = give(service(**{**both, "ipFamilyPolicy": "PreferDualStack"}), four, Ledger())
    assert preferred.satisfied and shown(preferred) == ["192.0.2.0"]


def test_classes() -> None:
    assert wants(service()) and wants(service(loadBalancerClass="io.cilium/l2-announcer"))
    assert not wants(service(loadBalancerClass="someone/else"))
    assert not wants({"metadata": {}, "spec": {"type": "NodePort"}})


def test_status() -> None:
    address = ipaddress.ip_address("192.0.2.1")
    item = service()
    status = service_status(item, Outcome((address,), True))
    assert status["loadBalancer"] == {"ingress": [{"ip": "192.0.2.1", "ipMode": "VIP"}]}
    assert [(c["type"], c["status"]) for c in status["conditions"]] == [
        ("cilium.io/IPAMRequestSatisfied", "True")
    ]
    item["status"] = status
    assert service_status(item, Outcome((address,), True)) == status, "nothing new, no new time"
    parsed = pool(blocks=[{"cidr": "192.0.2.0/30"}])
    conditions = {c["type"]: c for c in pool_conditions({"metadata": {}}, parsed, 1, "")}
    assert conditions["cilium.io/PoolConflict"]["status"] == "False"
    assert conditions["cilium.io/IPsAvailable"]["message"] == "3"
