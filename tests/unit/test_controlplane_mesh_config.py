"""MeshConfig as the L4 control plane follows it, and what discovery selectors leave out."""

from __future__ import annotations

from typing import Any, cast

import pytest
from controlplane_objects import pod, policy_names, security

from meshlight.controlplane.discovery_scope import DiscoveryScope
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.mesh_config import MeshConfig, MeshConfigError, parse
from meshlight.controlplane.resources import ADDRESS_TYPE
from meshlight.controlplane.settings import Mesh, NamespaceSelector
from meshlight.kube.client import Cache, Client
from meshlight.kube.resources import AUTHORIZATION_POLICIES, NAMESPACES, PODS


def config_map(text: str) -> dict[str, Any]:
    return {"metadata": {"name": "istio"}, "data": {"mesh": text}}


def test_what_is_read() -> None:
    assert parse(None) == MeshConfig()
    found = parse(
        config_map("{trustDomain: td1, trustDomainAliases: [td0], discoverySelectors: [{}], other: 1}")
    )
    mesh = found.laid_over(Mesh())
    assert (mesh.trust_domain, mesh.trust_domain_aliases) == ("td1", ("td0",))
    assert mesh.discovers({})
    assert parse(config_map("{}")).laid_over(Mesh(trust_domain="env")).trust_domain == "env"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[", "data.mesh"),
        ("[1]", "data.mesh"),
        ("trustDomain: a/b", "trustDomain"),
        ("trustDomainAliases: x", "trustDomainAliases"),
        ("discoverySelectors: [{matchExpressions: [{key: a, operator: Near}]}]", "discoverySelectors"),
        ("discoverySelectors: [{matchExpressions: [{operator: In}]}]", "discoverySelectors"),
    ],
)
def test_what_cannot_be_read_names_its_field(text: str, field: str) -> None:
    with pytest.raises(MeshConfigError, match=field):
        parse(config_map(text))


@pytest.mark.parametrize(
    ("selector", "labels", "expected"),
    [
        ({}, {}, True),
        ({"matchLabels": {"a": "b"}}, {"a": "b"}, True),
        ({"matchLabels": {"a": "b"}}, {}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}, {"a": "b"}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["b"]}]}, {"a": "b"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["b"]}]}, {}, True),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {}, False),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {}, True),
    ],
)
def test_selectors(selector: dict[str, Any], labels: dict[str, str], expected: bool) -> None:
    assert NamespaceSelector.parse(selector).matches(labels) is expected


def test_namespaces_come_and_go_with_their_labels_and_with_the_selectors() -> None:
    selecting = Mesh(discovery_selectors=(NamespaceSelector.parse({"matchLabels": {"mesh": "yes"}}),))
    index = Index(selecting)
    client = cast(Client, None)
    caches = {r.kind: Cache(client, r) for r in (NAMESPACES, PODS, AUTHORIZATION_POLICIES)}
    scope = DiscoveryScope(selecting, caches, index.observe)

    def show(obj: dict[str, Any]) -> None:
        key = ObjectKey.of(obj)
        caches[obj["kind"]].objects[key.namespace, key.name] = obj
        scope.observe(obj["kind"], key, obj)

    def seen() -> tuple[set[str], set[str]]:
        index.commit()
        return {r.name for r in index.collections[ADDRESS_TYPE]}, policy_names(index)

    def namespace(**labels: str) -> dict[str, Any]:
        return {"kind": "Namespace", "metadata": {"name": "shop", "labels": labels}}

    everything = ({"Kubernetes//Pod/shop/web-1"}, {"shop/p"})
    show(pod())
    show(security("AuthorizationPolicy"))
    show(security("AuthorizationPolicy", "root", "istio-system"))
    assert seen() == (set(), {"istio-system/root"})
    show(namespace(mesh="yes"))
    assert seen() == (everything[0], {"shop/p", "istio-system/root"})
    show(namespace())
    assert seen() == (set(), {"istio-system/root"})
    scope.reconfigure(Mesh())
    assert seen() == (everything[0], {"shop/p", "istio-system/root"})
    scope.observe("Pod", ObjectKey("shop", "web-1"), None)
    assert seen()[0] == set()
