"""AuthorizationPolicy to L4 policies: each case is a policy as users write it and what the proxy gets."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from google.protobuf.json_format import MessageToDict

from meshlight.controlplane.policy import CompiledPolicy, compile_policy


def compiled(
    spec: str, *, namespace: str = "shop", annotations: dict[str, str] | None = None
) -> CompiledPolicy:
    metadata = {"name": "p", "namespace": namespace, "annotations": annotations or {}}
    return compile_policy({"metadata": metadata, "spec": yaml.safe_load(spec) or {}}, "istio-system")


def as_dict(policy: CompiledPolicy) -> dict[str, Any]:
    assert policy.authorization is not None
    result: dict[str, Any] = MessageToDict(policy.authorization, preserving_proto_field_name=True)
    return result


def exact(*values: str) -> list[dict[str, str]]:
    return [{"exact": value} for value in values]


RULES = {
    "allow nothing": ("{}", None),
    "allow everything": ("rules: [{}]", [{}]),
    "a principal": (
        "rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]",
        [{"clauses": [{"matches": [{"principals": exact("cluster.local/ns/shop/sa/web")}]}]}],
    ),
    "sources are alternatives, their fields are not": (
        'rules: [{from: [{source: {namespaces: [a], notPrincipals: ["*/x"]}}, {source: {namespaces: [b]}}]}]',
        [
            {
                "clauses": [
                    {
                        "matches": [
                            {"namespaces": exact("a"), "not_principals": [{"suffix": "/x"}]},
                            {"namespaces": exact("b")},
                        ]
                    }
                ]
            }
        ],
    ),
    "from, to and when must all hold": (
        """
        rules:
          - from: [{source: {namespaces: [a]}}]
            to: [{operation: {ports: ["80", "443"]}}]
            when: [{key: destination.port, notValues: ["443"]}]
        """,
        [
            {
                "clauses": [
                    {"matches": [{"destination_ports": [80, 443]}]},
                    {"matches": [{"namespaces": exact("a")}]},
                    {"matches": [{"not_destination_ports": [443]}]},
                ]
            }
        ],
    ),
    "rules are alternatives": (
        "rules: [{to: [{operation: {ports: ['1']}}]}, {to: [{operation: {notPorts: ['2']}}]}]",
        [
            {"clauses": [{"matches": [{"destination_ports": [1]}]}]},
            {"clauses": [{"matches": [{"not_destination_ports": [2]}]}]},
        ],
    ),
    "wildcards": (
        "rules: [{from: [{source: {principals: ['*', 'cluster.local/*', '*/sa/web']}}]}]",
        [
            {
                "clauses": [
                    {
                        "matches": [
                            {
                                "principals": [
                                    {"presence": {}},
                                    {"prefix": "cluster.local/"},
                                    {"suffix": "/sa/web"},
                                ]
                            }
                        ]
                    }
                ]
            }
        ],
    ),
    "address blocks": (
        "rules: [{from: [{source: {ipBlocks: [10.1.2.3/16], notIpBlocks: [10.1.9.9]}}]}]",
        [
            {
                "clauses": [
                    {
                        "matches": [
                            {
                                "source_ips": [{"address": "CgEAAA==", "length": 16}],
                                "not_source_ips": [{"address": "CgEJCQ==", "length": 32}],
                            }
                        ]
                    }
                ]
            }
        ],
    ),
    "service accounts, the policy's namespace by default": (
        "rules: [{from: [{source: {serviceAccounts: [web, other/api]}}]}]",
        [
            {
                "clauses": [
                    {
                        "matches": [
                            {
                                "service_accounts": [
                                    {"namespace": "shop", "service_account": "web"},
                                    {"namespace": "other", "service_account": "api"},
                                ]
                            }
                        ]
                    }
                ]
            }
        ],
    ),
    "conditions": (
        """
        rules:
          - when:
              - {key: source.namespace, values: [a]}
              - {key: source.principal, notValues: [b]}
              - {key: source.ip, values: [1.2.3.4]}
              - {key: destination.ip, notValues: ["fd00::/8"]}
        """,
        [
            {
                "clauses": [
                    {"matches": [{"namespaces": exact("a")}]},
                    {"matches": [{"not_principals": exact("b")}]},
                    {"matches": [{"source_ips": [{"address": "AQIDBA==", "length": 32}]}]},
                    {
                        "matches": [
                            {"not_destination_ips": [{"address": "/QAAAAAAAAAAAAAAAAAAAA==", "length": 8}]}
                        ]
                    },
                ]
            }
        ],
    ),
    "an alternative that says nothing makes its clause always hold": (
        "rules: [{from: [{source: {namespaces: [a]}}, {source: {}}], to: [{operation: {ports: ['1']}}]}]",
        [{"clauses": [{"matches": [{"destination_ports": [1]}]}]}],
    ),
}


@pytest.mark.parametrize(("spec", "rules"), RULES.values(), ids=RULES)
def test_rules(spec: str, rules: list[Any] | None) -> None:
    policy = compiled(spec)
    assert as_dict(policy).get("rules") == rules
    assert policy.findings == ()


HTTP = {
    "an HTTP rule of an ALLOW allows nothing": (
        "rules: [{to: [{operation: {methods: [GET]}}]}, {to: [{operation: {ports: ['80']}}]}]",
        [{"clauses": [{"matches": [{"destination_ports": [80]}]}]}],
        ["spec.rules[0].to[0].operation.methods"],
    ),
    "an ALLOW of HTTP rules alone allows nothing": (
        "rules: [{from: [{source: {requestPrincipals: ['*']}}]}]",
        None,
        ["spec.rules[0].from[0].source.requestPrincipals"],
    ),
    "one HTTP alternative spoils the whole ALLOW rule": (
        "rules: [{to: [{operation: {ports: ['80']}}, {operation: {paths: [/x]}}]}]",
        None,
        ["spec.rules[0].to[1].operation.paths"],
    ),
    "a DENY without its HTTP part denies more": (
        "{action: DENY, rules: [{from: [{source: {namespaces: [a]}}], to: [{operation: {methods: [POST]}}]}]}",
        [{"clauses": [{"matches": [{"namespaces": exact("a")}]}]}],
        ["spec.rules[0].to[0].operation.methods"],
    ),
    "a DENY of a port and a path denies the port": (
        "{action: DENY, rules: [{to: [{operation: {ports: ['80'], paths: [/x]}}]}]}",
        [{"clauses": [{"matches": [{"destination_ports": [80]}]}]}],
        ["spec.rules[0].to[0].operation.paths"],
    ),
    "a DENY of HTTP alone denies everything": (
        "{action: DENY, rules: [{when: [{key: 'request.headers[x]', values: [y]}]}]}",
        [{}],
        ["spec.rules[0].when[0].key"],
    ),
    "an unreadable value of an ALLOW allows nothing": (
        "rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]",
        None,
        ["spec.rules[0].from[0].source.ipBlocks"],
    ),
    "an unreadable value of a DENY denies more": (
        "{action: DENY, rules: [{to: [{operation: {ports: [http]}}], from: [{source: {namespaces: [a]}}]}]}",
        [{"clauses": [{"matches": [{"namespaces": exact("a")}]}]}],
        ["spec.rules[0].to[0].operation.ports"],
    ),
}


@pytest.mark.parametrize(("spec", "rules", "paths"), HTTP.values(), ids=HTTP)
def test_what_l4_cannot_see_fails_safe(spec: str, rules: list[Any] | None, paths: list[str]) -> None:
    policy = compiled(spec)
    assert as_dict(policy).get("rules") == rules
    assert [finding.path for finding in policy.findings] == paths


@pytest.mark.parametrize(
    ("namespace", "spec", "scope"),
    [
        ("istio-system", "{}", None),  # GLOBAL is the default value, which JSON leaves out
        ("shop", "{}", "NAMESPACE"),
        ("shop", "{selector: {}}", "NAMESPACE"),
        ("shop", "{selector: {matchLabels: {app: web}}}", "WORKLOAD_SELECTOR"),
        ("istio-system", "{selector: {matchLabels: {app: web}}}", "WORKLOAD_SELECTOR"),
    ],
)
def test_scope(namespace: str, spec: str, scope: str | None) -> None:
    assert as_dict(compiled(spec, namespace=namespace)).get("scope") == scope


@pytest.mark.parametrize("action", ["AUDIT", "CUSTOM"])
def test_other_actions_are_reported_and_not_sent(action: str) -> None:
    policy = compiled(f"action: {action}")
    assert policy.authorization is None
    assert [finding.path for finding in policy.findings] == ["spec.action"]


@pytest.mark.parametrize(
    "target", ["targetRef: {kind: Gateway, name: w}", "targetRefs: [{kind: Service, name: s}]"]
)
def test_policies_of_waypoints_are_not_the_node_proxys(target: str) -> None:
    policy = compiled(target)
    assert policy.authorization is None
    assert policy.findings == ()


def test_dry_run() -> None:
    assert as_dict(compiled("{}", annotations={"istio.io/dry-run": "true"}))["dry_run"] is True
