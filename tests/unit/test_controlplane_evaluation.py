"""The evaluator against policies as users write them: the same answers as the node proxy gives."""

from __future__ import annotations

import ipaddress

import pytest
import yaml

from meshlight.controlplane import peer_authentication
from meshlight.controlplane.evaluation import Connection, Outcome, Peer, applicable, decide
from meshlight.controlplane.policy import TrustDomains, compile_policy
from meshlight.proto import authorization_pb2 as rbac

WEB = Peer("cluster.local", "shop", "web")


def policy(spec: str, name: str = "p", **annotations: str) -> rbac.Authorization:
    metadata = {"name": name, "namespace": "shop", "annotations": annotations}
    obj = {"metadata": metadata, "spec": yaml.safe_load(spec) or {}}
    compiled = compile_policy(obj, "istio-system", TrustDomains("cluster.local", ("old.example",)))
    assert compiled.authorization is not None
    return compiled.authorization


def connection(peer: Peer | None = WEB, source: str = "10.244.1.5", port: int = 8080) -> Connection:
    destination = ipaddress.ip_address("10.244.2.7")
    return Connection(ipaddress.ip_address(source), peer, destination, port)


CASES = [
    ("{}", connection(), Outcome.NOT_ALLOWED),
    ("rules: [{}]", connection(None), Outcome.ALLOWED_BY),
    ("{action: DENY, rules: [{}]}", connection(), Outcome.DENIED_BY),
    ("rules: [{from: [{source: {principals: ['*']}}]}]", connection(), Outcome.ALLOWED_BY),
    ("rules: [{from: [{source: {principals: ['*']}}]}]", connection(None), Outcome.NOT_ALLOWED),
    ("rules: [{from: [{source: {principals: [cluster.local/ns/shop/*]}}]}]", connection(), Outcome.ALLOWED_BY),
    ("rules: [{from: [{source: {principals: ['*/sa/api']}}]}]", connection(), Outcome.NOT_ALLOWED),
    (
        "rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]",
        connection(Peer("old.example", "shop", "web")),
        Outcome.ALLOWED_BY,
    ),
    ("rules: [{from: [{source: {serviceAccounts: [web]}}]}]", connection(), Outcome.ALLOWED_BY),
    ("rules: [{from: [{source: {serviceAccounts: [bank/web]}}]}]", connection(), Outcome.NOT_ALLOWED),
    ("{action: DENY, rules: [{from: [{source: {notNamespaces: [shop]}}]}]}", connection(), Outcome.NO_POLICY),
    (
        "{action: DENY, rules: [{from: [{source: {notNamespaces: [shop]}}]}]}",
        connection(None),
        Outcome.DENIED_BY,
    ),
    ("rules: [{from: [{source: {ipBlocks: [10.244.0.0/16]}}]}]", connection(), Outcome.ALLOWED_BY),
    (
        "rules: [{from: [{source: {ipBlocks: [10.244.0.0/16]}}]}]",
        connection(source="::ffff:10.244.1.5"),
        Outcome.ALLOWED_BY,
    ),
    ("rules: [{from: [{source: {ipBlocks: ['::/0']}}]}]", connection(), Outcome.NOT_ALLOWED),
    ("rules: [{to: [{operation: {notPorts: ['8080']}}]}]", connection(), Outcome.NOT_ALLOWED),
    ("rules: [{when: [{key: destination.ip, values: [10.244.2.0/24]}]}]", connection(), Outcome.ALLOWED_BY),
    ("rules: [{to: [{operation: {methods: [GET]}}]}]", connection(), Outcome.NOT_ALLOWED),
    ("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}", connection(), Outcome.DENIED_BY),
]


@pytest.mark.parametrize(("spec", "judged", "outcome"), CASES)
def test_decisions(spec: str, judged: Connection, outcome: Outcome) -> None:
    assert decide([policy(spec)], judged).outcome is outcome


def test_deny_comes_first_and_dry_runs_decide_nothing() -> None:
    allow, deny = policy("rules: [{}]", "yes"), policy("{action: DENY, rules: [{}]}", "no")
    quiet = policy("{action: DENY, rules: [{}]}", "maybe", **{"istio.io/dry-run": "true"})
    decision = decide([allow, deny], connection())
    assert (decision.outcome, decision.decided_by) == (Outcome.DENIED_BY, ("shop/no",))
    decision = decide([allow, quiet], connection())
    assert (decision.allowed, decision.decided_by) == (True, ("shop/yes",))
    assert [one.rule for one in decision.examined if one.dry_run] == [0]


def test_what_kept_a_rule_from_matching_is_named() -> None:
    found = decide(
        [policy("rules: [{from: [{source: {namespaces: [bank]}}], to: [{operation: {ports: ['1']}}]}]")],
        connection(),
    )
    assert found.examined[0].misses == (("ports", "namespaces"),)


def test_strict_refuses_those_without_identity() -> None:
    strict = [peer_authentication.static_strict("istio-system")]
    assert applicable(strict, "shop", []) == []
    assert applicable(strict, "shop", ["istio-system/istio_converted_static_strict"]) == strict
    assert not decide(strict, connection(None)).allowed
    assert decide(strict, connection()).allowed
