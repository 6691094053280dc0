"""`meshlight why` and `policy test`: decisions over a mesh of a few objects, and which objects are named."""

from __future__ import annotations

from typing import Any

import pytest
from controlplane_objects import endpoint_slice, pod, security, service

from meshlight.operations import denials, parties, why
from meshlight.operations.mesh_snapshot import Snapshot
from meshlight.operations.parties import UnknownParty
from meshlight.operations.policy_test import trials

ENROLLED = {"ambient.istio.io/redirection": "enabled"}


def namespace(name: str, mode: str | None = "ambient", **labels: str) -> dict[str, Any]:
    own = {**labels, **({"istio.io/dataplane-mode": mode} if mode else {})}
    return {"kind": "Namespace", "metadata": {"name": name, "labels": own}}


def client(**settings: Any) -> dict[str, Any]:
    settings = {
        "annotations": ENROLLED,
        "ip": "10.244.2.5",
        "account": "client",
        "labels": {"app": "client"},
        **settings,
    }
    return pod("client-1", "demo", **settings)


def server(**settings: Any) -> dict[str, Any]:
    settings = {
        "annotations": ENROLLED,
        "ip": "10.244.1.5",
        "account": "server",
        "labels": {"app": "server"},
        **settings,
    }
    return pod("server-1", "demo", **settings)


BASE = [
    namespace("demo"),
    service("server", "demo", ip="10.96.0.7"),
    endpoint_slice("server-1", service="server", namespace="demo", name="server-abc"),
]


def mesh(*objects: dict[str, Any]) -> Snapshot:
    """A client and a server, both enrolled unless given otherwise, and more."""
    given = {(o["kind"], o["metadata"]["name"]) for o in objects}
    usual = [o for o in (client(), server()) if ("Pod", o["metadata"]["name"]) not in given]
    return Snapshot.of([*BASE, *usual, *objects])


def ask(
    snapshot: Snapshot, source: str = "client-1.demo", destination: str = "server.demo:80"
) -> why.Explanation:
    begin = parties.source(snapshot, source, "default")
    return why.explain(snapshot, begin, parties.destination(snapshot, destination, "default"))


def told(found: why.Explanation) -> str:
    return "\n".join(f"{s.stage}: {s.text} {' '.join(s.objects)}" for r in found.routes for s in r.steps)


def policy(name: str = "p", **spec: Any) -> dict[str, Any]:
    return security("AuthorizationPolicy", name, "demo", **spec)


def peers(mode: str, name: str = "default", space: str = "istio-system", **spec: Any) -> dict[str, Any]:
    return security("PeerAuthentication", name, space, mtls={"mode": mode}, **spec)


FROM_BANK = [{"from": [{"source": {"namespaces": ["bank"]}}]}]
CASES: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "nothing forbids": ([], why.ALLOWED, "HBONE: mutual TLS"),
    "an ALLOW that fits": ([policy(rules=[{}])], why.ALLOWED, "allowed by demo/p AuthorizationPolicy/demo/p"),
    "an ALLOW for others": (
        [policy(rules=FROM_BANK)],
        why.DENIED,
        "ALLOW demo/p does not match (spec.rules[0]: namespaces)",
    ),
    "a DENY": (
        [policy(action="DENY", rules=[{"to": [{"operation": {"ports": ["9"]}}]}, {}])],
        why.DENIED,
        "DENY demo/p matches by spec.rules[1]",
    ),
    "the port is the pod's": (
        [policy(action="DENY", rules=[{"to": [{"operation": {"ports": ["8080"]}}]}])],
        why.DENIED,
        "denied by demo/p",
    ),
    "a policy of others": (
        [policy(selector={"matchLabels": {"app": "else"}}, action="DENY", rules=[{}])],
        why.ALLOWED,
        "no ALLOW policy applies",
    ),
    "what ztunnel cannot see": (
        [policy(rules=[{"to": [{"operation": {"methods": ["GET"]}}]}, FROM_BANK[0]])],
        why.DENIED,
        "spec.rules[0].to[0].operation.methods: an HTTP attribute",
    ),
    "STRICT between enrolled pods": (
        [peers("STRICT")],
        why.ALLOWED,
        "PeerAuthentication istio-system/default says STRICT",
    ),
    "STRICT and a source outside": (
        [peers("STRICT"), client(annotations={})],
        why.DENIED,
        "says STRICT; the source proves no identity PeerAuthentication/istio-system/default",
    ),
    "a port that is excepted": (
        [
            client(annotations={}),
            peers("STRICT"),
            peers(
                "STRICT",
                "web",
                "demo",
                selector={"matchLabels": {"app": "server"}},
                portLevelMtls={"8080": {"mode": "DISABLE"}},
            ),
        ],
        why.ALLOWED,
        "PeerAuthentication demo/web says DISABLE",
    ),
    "nobody stands before it": (
        [peers("STRICT"), policy(action="DENY", rules=[{}]), server(annotations={})],
        why.ALLOWED,
        "no proxy stands before server-1.demo",
    ),
    "the namespace is not labelled": (
        [namespace("demo", None), client(annotations={})],
        why.ALLOWED,
        "label istio.io/dataplane-mode of namespace demo is not set",
    ),
    "a pod that opted out": (
        [client(annotations={}, labels={"istio.io/dataplane-mode": "none"})],
        why.ALLOWED,
        "its label istio.io/dataplane-mode is 'none'",
    ),
    "the host's network": (
        [client(annotations={}, host_network=True)],
        why.ALLOWED,
        "it is on the host's network",
    ),
    "nobody is ready": ([server(ready=False)], why.UNREACHABLE, "no healthy endpoint (1 known)"),
}


@pytest.mark.parametrize(("objects", "verdict", "words"), CASES.values(), ids=CASES)
def test_decisions(objects: list[dict[str, Any]], verdict: str, words: str) -> None:
    found = ask(mesh(*objects))
    assert found.verdict == verdict, told(found)
    assert words in told(found)


@pytest.mark.parametrize(
    ("source", "destination", "first"),
    [
        ("client-1.demo", "server.demo.svc.cluster.local:80", "server-1.demo:8080"),
        ("pod/client-1.demo", "svc/server.demo", "server-1.demo:8080"),
        ("10.244.2.5", "10.96.0.7:80", "server-1.demo:8080"),
        ("203.0.113.9", "10.244.1.5:8080", "server-1.demo:8080"),
        ("client-1.demo", "pod/server-1.demo:9", "server-1.demo:9"),
        ("client-1.demo", "203.0.113.9:443", "203.0.113.9:443"),
        ("client-1.demo", "[2001:db8::1]:443", "2001:db8::1:443"),
    ],
)
def test_parties_may_be_named_in_many_ways(source: str, destination: str, first: str) -> None:
    assert ask(mesh(), source, destination).routes[0].destination == first


@pytest.mark.parametrize(
    "name", ["nobody.demo", "deploy/nobody.demo", "thing/x", "server.demo:http", "server.demo:0"]
)
def test_unknown_parties_are_told_in_words(name: str) -> None:
    with pytest.raises(UnknownParty, match=name.split(":")[0]):
        parties.destination(mesh(), name, "default")


def test_a_deployment_names_its_pods() -> None:
    owned = server(owner=("ReplicaSet", "server-5d"), labels={"app": "server", "pod-template-hash": "5d"})
    found = ask(mesh(owned), destination="deploy/server.demo:8080")
    assert found.routes[0].destination == "server-1.demo:8080"


def test_a_port_that_the_service_lacks() -> None:
    found = ask(mesh(), destination="server.demo:81")
    assert found.verdict == why.UNREACHABLE
    assert "no port 81; its ports are 80" in told(found)


def test_the_way_leads_through_a_waypoint() -> None:
    gateway = {
        "kind": "Gateway",
        "metadata": {"name": "wp", "namespace": "demo"},
        "spec": {"gatewayClassName": "istio-waypoint", "listeners": [{"protocol": "HBONE", "port": 15008}]},
        "status": {"addresses": [{"value": "10.96.0.9"}]},
    }
    instance = pod("wp-1", "demo", ip="10.244.1.9", account="wp", annotations=ENROLLED, labels={"app": "wp"})
    front = [
        namespace("demo", **{"istio.io/use-waypoint": "wp"}),
        gateway,
        instance,
        service("wp", "demo", ip="10.96.0.9"),
        endpoint_slice("wp-1", service="wp", namespace="demo", name="wp-abc"),
    ]
    bound = policy("l7", targetRefs=[{"kind": "Service", "name": "server"}], rules=FROM_BANK)
    only_waypoint = policy(
        "l4",
        selector={"matchLabels": {"app": "server"}},
        rules=[{"from": [{"source": {"principals": ["cluster.local/ns/demo/sa/wp"]}}]}],
    )
    found = ask(mesh(*front, bound, only_waypoint))
    assert found.verdict == why.ALLOWED, told(found)
    assert "wp.demo.svc.cluster.local stands before it" in told(found)
    assert "AuthorizationPolicy/demo/l7" in told(found)
    assert "policy behind the waypoint: allowed by demo/l4" in told(found)
    plain = ask(mesh(*front, only_waypoint, client(annotations={})))
    assert plain.verdict == why.DENIED
    assert "not on the way: the source is not captured" in told(plain)


def test_a_proposal_is_compared_with_what_is() -> None:
    before = mesh()
    after = Snapshot.of([*BASE, client(), server(), policy(rules=FROM_BANK)])
    connections = [("client-1.demo", "server.demo:80"), ("client-1.demo", "203.0.113.9:443")]
    first, second = trials(before, after, connections, "default")
    assert (first.before, first.after, first.changed) == (why.ALLOWED, why.DENIED, True)
    assert "demo/p" in first.because
    assert not second.changed


LINE = (
    '{"level":"error","time":"2026-05-01T12:00:00Z","scope":"access","message":"connection complete",'
    '"src.addr":"10.244.2.5:48252","src.workload":"client-1","src.namespace":"demo",'
    '"src.identity":"spiffe://cluster.local/ns/demo/sa/client","dst.addr":"10.244.1.5:15008",'
    '"dst.hbone_addr":"10.244.1.5:8080","dst.workload":"server-1","dst.namespace":"demo","direction":"%s",'
    '"error":"connection closed due to policy rejection: explicitly denied by: demo/p"}'
)


def test_denials_are_read_from_access_logs_and_judged_again() -> None:
    denial = denials.parse(LINE % "inbound")
    assert denial is not None
    assert (denial.source, denial.destination) == ("client-1.demo", "server-1.demo:8080")
    assert denials.parse(LINE % "outbound") is None, "the destination's proxy tells of it as well"
    assert denials.parse("{") is None
    assert denials.parse('{"direction":"inbound","error":"connection reset"}') is None
    still = denials.today(mesh(policy(action="DENY", rules=[{}])), denial)
    assert still is not None
    assert still.verdict == why.DENIED
    mended = denials.today(mesh(), denial)
    assert mended is not None
    assert mended.verdict == why.ALLOWED
    assert denials.today(Snapshot.of([]), denial) is None
