"""What the API refuses of Istio's security and networking objects: each case is a spec and the field named."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from meshlight.kube import validation
from meshlight.kube.schema import Schema

SECURITY, NETWORKING = "security.istio.io/v1", "networking.istio.io/v1"


def faults(kind: str, spec: str, annotations: dict[str, str] | None = None) -> dict[str, str]:
    api = NETWORKING if kind.endswith("Entry") else SECURITY
    metadata = {"name": "p", "namespace": "shop", "annotations": annotations or {}}
    obj: dict[str, Any] = {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": yaml.safe_load(spec)}
    return {cause.field: cause.message for cause in validation.custom(obj, Schema())}


GOOD = [
    ("AuthorizationPolicy", "{}"),
    ("AuthorizationPolicy", "rules: [{}]"),
    ("AuthorizationPolicy", "{action: DENY, rules: [{}]}"),
    (
        "AuthorizationPolicy",
        "{action: CUSTOM, provider: {name: x}, rules: [{to: [{operation: {paths: [/a]}}]}]}",
    ),
    ("AuthorizationPolicy", "rules: [{from: [{source: {ipBlocks: [10.0.0.0/8, '2001:db8::1']}}]}]"),
    ("AuthorizationPolicy", "rules: [{from: [{source: {serviceAccounts: [web, shop/web]}}]}]"),
    ("AuthorizationPolicy", "rules: [{to: [{operation: {paths: ['/a/{*}/b', '/c/{**}']}}]}]"),
    ("AuthorizationPolicy", "rules: [{when: [{key: 'request.headers[x]', values: [a]}]}]"),
    ("AuthorizationPolicy", "{targetRefs: [{kind: Service, group: '', name: web}], rules: [{}]}"),
    ("PeerAuthentication", "{selector: {matchLabels: {a: b}}, portLevelMtls: {'80': {mode: STRICT}}}"),
    ("PeerAuthentication", "mtls: {mode: STRICT}"),
    (
        "ServiceEntry",
        "{hosts: [a.example.com], ports: [{number: 443, name: tls, protocol: TLS}], resolution: DNS}",
    ),
    ("ServiceEntry", "{hosts: ['*.example.com'], ports: [{number: 443, name: tls, protocol: TLS}]}"),
    (
        "ServiceEntry",
        "{hosts: [a.b], addresses: [10.0.0.0/8], ports: [{number: 1, name: t}], resolution: STATIC}",
    ),
    ("WorkloadEntry", "{address: 192.0.2.7, labels: {app: db}}"),
    ("WorkloadEntry", "{network: other}"),
]


@pytest.mark.parametrize(("kind", "spec"), GOOD)
def test_what_istio_takes_is_taken(kind: str, spec: str) -> None:
    assert faults(kind, spec) == {}


BAD = [
    ("AuthorizationPolicy", "action: DENY", "spec.rules"),
    ("AuthorizationPolicy", "action: CUSTOM", "spec.rules"),
    ("AuthorizationPolicy", "{action: CUSTOM, rules: [{}]}", "spec.provider.name"),
    ("AuthorizationPolicy", "{provider: {name: x}, rules: [{}]}", "spec.provider"),
    (
        "AuthorizationPolicy",
        "{action: CUSTOM, provider: {name: x}, rules: [{from: [{source: {principals: [a]}}]}]}",
        "spec.rules[0].from[0].source.principals",
    ),
    ("AuthorizationPolicy", "rules: [null]", "spec.rules[0]"),
    ("AuthorizationPolicy", "rules: {}", "spec.rules"),
    ("AuthorizationPolicy", "rules: [{from: []}]", "spec.rules[0].from"),
    ("AuthorizationPolicy", "rules: [{from: [{}]}]", "spec.rules[0].from[0].source"),
    ("AuthorizationPolicy", "rules: [{to: [{operation: {}}]}]", "spec.rules[0].to[0].operation"),
    (
        "AuthorizationPolicy",
        "rules: [{to: [{operation: {ports: [http]}}]}]",
        "spec.rules[0].to[0].operation.ports",
    ),
    (
        "AuthorizationPolicy",
        "rules: [{to: [{operation: {ports: [80]}}]}]",
        "spec.rules[0].to[0].operation.ports",
    ),
    (
        "AuthorizationPolicy",
        "rules: [{from: [{source: {notIpBlocks: [10.0.0.0/33]}}]}]",
        "spec.rules[0].from[0].source.notIpBlocks",
    ),
    (
        "AuthorizationPolicy",
        "rules: [{from: [{source: {serviceAccounts: [web], namespaces: [shop]}}]}]",
        "spec.rules[0].from[0].source.serviceAccounts",
    ),
    (
        "AuthorizationPolicy",
        "rules: [{from: [{source: {serviceAccounts: ['*']}}]}]",
        "spec.rules[0].from[0].source.serviceAccounts",
    ),
    (
        "AuthorizationPolicy",
        "rules: [{to: [{operation: {paths: ['/{**}/x']}}]}]",
        "spec.rules[0].to[0].operation.paths",
    ),
    ("AuthorizationPolicy", "rules: [{when: [{values: [a]}]}]", "spec.rules[0].when[0].key"),
    ("AuthorizationPolicy", "rules: [{when: [{key: source.ip}]}]", "spec.rules[0].when[0].values"),
    ("AuthorizationPolicy", "rules: [{when: [{key: source.port, values: [a]}]}]", "spec.rules[0].when[0].key"),
    (
        "AuthorizationPolicy",
        "rules: [{when: [{key: destination.port, values: ['0']}]}]",
        "spec.rules[0].when[0].values",
    ),
    ("AuthorizationPolicy", "selector: {matchLabels: {app: 'w*'}}", "spec.selector.matchLabels"),
    (
        "AuthorizationPolicy",
        "{selector: {matchLabels: {a: b}}, targetRefs: [{kind: Service, name: x}]}",
        "spec.targetRefs",
    ),
    ("AuthorizationPolicy", "targetRefs: [{kind: Pod, name: x}]", "spec.targetRefs[0].kind"),
    ("AuthorizationPolicy", "targetRefs: [{kind: Service}]", "spec.targetRefs[0].name"),
    ("PeerAuthentication", "portLevelMtls: {'80': {mode: STRICT}}", "spec.portLevelMtls"),
    ("PeerAuthentication", "{selector: {matchLabels: {a: b}}, portLevelMtls: {'0': {}}}", "spec.portLevelMtls"),
    ("PeerAuthentication", "{selector: {matchLabels: {a: b}}, portLevelMtls: {}}", "spec.portLevelMtls"),
    ("ServiceEntry", "ports: [{number: 80, name: http}]", "spec.hosts"),
    ("ServiceEntry", "hosts: ['*']", "spec.hosts"),
    ("ServiceEntry", "hosts: [10.0.0.1]", "spec.hosts"),
    ("ServiceEntry", "{hosts: ['*.a.com'], resolution: DNS}", "spec.hosts"),
    ("ServiceEntry", "{hosts: [a.com], resolution: SOMETIMES}", "spec.resolution"),
    ("ServiceEntry", "{hosts: [a.com], addresses: [10.0.0.0/8], resolution: DNS}", "spec.addresses"),
    ("ServiceEntry", "{hosts: [a.com], endpoints: [{address: 10.0.0.1}]}", "spec.endpoints"),
    (
        "ServiceEntry",
        "{hosts: [a.com], resolution: STATIC, endpoints: [{address: b.com}]}",
        "spec.endpoints[0].address",
    ),
    ("ServiceEntry", "{hosts: [a.com], ports: [{number: 0, name: http}]}", "spec.ports[0].number"),
    (
        "ServiceEntry",
        "{hosts: [a.com], ports: [{number: 1, name: a}, {number: 1, name: b}]}",
        "spec.ports[1].number",
    ),
    (
        "ServiceEntry",
        "{hosts: [a.com], ports: [{number: 1, name: a, protocol: QUICK}]}",
        "spec.ports[0].protocol",
    ),
    ("ServiceEntry", "{hosts: [a.com], exportTo: ['*', shop]}", "spec.exportTo"),
    ("WorkloadEntry", "{}", "spec.address"),
    ("WorkloadEntry", "{address: 10.0.0.1, ports: {http: 0}}", "spec.ports[http]"),
]


@pytest.mark.parametrize(("kind", "spec", "field"), BAD)
def test_what_istio_refuses_is_refused_by_field(kind: str, spec: str, field: str) -> None:
    assert field in faults(kind, spec)


def test_the_dry_run_annotation_is_for_allow_and_deny_alone() -> None:
    note = {"istio.io/dry-run": "true"}
    field = "metadata.annotations[istio.io/dry-run]"
    assert faults("AuthorizationPolicy", "rules: [{}]", note) == {}
    assert field in faults("AuthorizationPolicy", "rules: [{}]", {"istio.io/dry-run": "perhaps"})
    assert field in faults("AuthorizationPolicy", "{action: AUDIT, rules: [{}]}", note)
    assert field in faults("PeerAuthentication", "{}", note)


def test_warnings_are_told_of_what_is_stored() -> None:
    deny = {"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/x"]}}]}]}
    obj = {"apiVersion": SECURITY, "kind": "AuthorizationPolicy", "metadata": {"name": "p"}, "spec": deny}
    (warning,) = validation.warnings(obj)
    assert "spec.rules[0]" in warning
    deny["rules"][0]["to"][0]["operation"]["ports"] = ["80"]  # type: ignore[index]
    assert validation.warnings(obj) == []
