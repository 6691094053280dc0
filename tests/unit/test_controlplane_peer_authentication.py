"""PeerAuthentication: on which ports does a workload accept plaintext, given mesh, namespace and own policy?

The answer is read from what the node proxy is sent, by the proxy's own rules of evaluation.
"""

from __future__ import annotations

from typing import Any

import pytest
from controlplane_objects import security

from meshlight.controlplane import peer_authentication as peer
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.policy_index import Effect, PolicyIndex, Selection

ROOT = "istio-system"
LABELS = {"app": "web"}


def policy(
    namespace: str,
    mode: str | None,
    *,
    name: str = "default",
    selector: dict[str, str] | None = None,
    ports: dict[int, str] | None = None,
    created: str = "2026-01-01T00:00:00Z",
) -> tuple[ObjectKey, dict[str, Any]]:
    spec: dict[str, Any] = {}
    if mode:
        spec["mtls"] = {"mode": mode}
    if selector is not None:
        spec["selector"] = {"matchLabels": selector}
    if ports:
        spec["portLevelMtls"] = {str(port): {"mode": m} for port, m in ports.items()}
    metadata = {"name": name, "namespace": namespace, "creationTimestamp": created}
    return ObjectKey(namespace, name), {"metadata": metadata, "spec": spec}


def index(*policies: tuple[ObjectKey, dict[str, Any]], known: bool = False) -> PolicyIndex:
    result = PolicyIndex(ROOT)
    for name in (ROOT, "shop") if known else ():
        result.set_namespace(name, exists=True)
    for key, obj in policies:
        result.set_peer_authentication(key, obj)
    return result


def plaintext_accepted(policies: PolicyIndex, port: int, namespace: str = "shop") -> bool:
    """Evaluate for a connection without identity. Every policy here is a DENY by port and presence."""
    attached = policies.attached(namespace, LABELS)
    whole = ObjectKey(namespace, peer.NAMESPACE_STRICT)
    if policies.authorization(whole) is not None:
        attached = [*attached, str(whole)]
    for name in attached:
        space, _, policy_name = name.partition("/")
        authorization = policies.authorization(ObjectKey(space, policy_name))
        assert authorization is not None, f"{name} is attached but not published"
        for rule in authorization.rules:
            if all(
                any(
                    (not match.destination_ports or port in match.destination_ports)
                    and port not in match.not_destination_ports
                    for match in clause.matches
                )
                for clause in rule.clauses
            ):
                return False
    return True


# mesh, namespace, own mode, own mode of port 80 → plaintext on 80, plaintext on any other port
MODES = [
    (None, None, None, None, True, True),
    ("STRICT", None, None, None, False, False),
    ("PERMISSIVE", None, None, None, True, True),
    ("DISABLE", None, None, None, True, True),
    ("STRICT", "PERMISSIVE", None, None, True, True),
    ("STRICT", "UNSET", None, None, False, False),
    ("PERMISSIVE", "STRICT", None, None, False, False),
    (None, "STRICT", "PERMISSIVE", None, True, True),
    (None, "STRICT", "DISABLE", None, True, True),
    ("STRICT", None, "UNSET", None, False, False),
    (None, None, "STRICT", None, False, False),
    (None, None, "STRICT", "PERMISSIVE", True, False),
    (None, None, "STRICT", "DISABLE", True, False),
    (None, None, "STRICT", "STRICT", False, False),
    (None, None, "STRICT", "UNSET", False, False),
    (None, None, "PERMISSIVE", "STRICT", False, True),
    (None, None, "PERMISSIVE", "PERMISSIVE", True, True),
    (None, None, "DISABLE", "STRICT", False, True),
    ("STRICT", None, "PERMISSIVE", "STRICT", False, True),
    ("STRICT", None, "UNSET", "PERMISSIVE", True, False),
    ("STRICT", None, "UNSET", "DISABLE", True, False),
    ("STRICT", None, "UNSET", "STRICT", False, False),
    ("PERMISSIVE", None, "UNSET", "STRICT", False, True),
    ("STRICT", "PERMISSIVE", "UNSET", "STRICT", False, True),
    ("PERMISSIVE", "STRICT", "UNSET", "PERMISSIVE", True, False),
    (None, None, "UNSET", "PERMISSIVE", True, True),
]


@pytest.mark.parametrize("known", [True, False], ids=["as a whole", "by attachment"])
@pytest.mark.parametrize(("mesh", "namespace", "own", "port", "on_port", "elsewhere"), MODES)
def test_inheritance(
    mesh: str | None,
    namespace: str | None,
    own: str | None,
    port: str | None,
    on_port: bool,
    elsewhere: bool,
    known: bool,
) -> None:
    policies = []
    if mesh:
        policies.append(policy(ROOT, mesh))
    if namespace:
        policies.append(policy("shop", namespace))
    if own:
        ports = {80: port} if port else None
        policies.append(policy("shop", own, name="own", selector=LABELS, ports=ports))
    present = index(*policies, known=known)
    assert plaintext_accepted(present, 80) is on_port
    assert plaintext_accepted(present, 81) is elsewhere


def test_several_ports_are_alternatives() -> None:
    present = index(policy("shop", "PERMISSIVE", selector=LABELS, ports={80: "STRICT", 81: "STRICT"}))
    assert [plaintext_accepted(present, port) for port in (80, 81, 82)] == [False, False, True]
    present = index(policy("shop", "STRICT", selector=LABELS, ports={80: "DISABLE", 81: "PERMISSIVE"}))
    assert [plaintext_accepted(present, port) for port in (80, 81, 82)] == [True, True, False]


def test_the_oldest_wins() -> None:
    older = policy("shop", "STRICT", name="z", created="2026-01-01T00:00:00Z")
    newer = policy("shop", "PERMISSIVE", name="a", created="2026-01-02T00:00:00Z")
    assert not plaintext_accepted(index(newer, older), 80)
    same_age = policy("shop", "PERMISSIVE", name="a", created="2026-01-01T00:00:00Z")
    assert plaintext_accepted(index(older, same_age), 80), "by name where the age is the same"


def test_only_carriers_of_all_labels_are_selected() -> None:
    present = index(policy("shop", "STRICT", selector={"app": "web", "tier": "front"}))
    assert plaintext_accepted(present, 80)
    assert present.attached("shop", {"app": "web", "tier": "front"}) == [
        f"{ROOT}/istio_converted_static_strict"
    ]


def test_a_selector_in_the_root_namespace_selects_nothing() -> None:
    present = index(policy(ROOT, "STRICT", selector=LABELS, ports={80: "DISABLE"}))
    assert present.attached(ROOT, LABELS) == []
    assert present.attached("shop", LABELS) == []


def test_the_root_namespace_obeys_the_mesh_policy() -> None:
    assert not plaintext_accepted(index(policy(ROOT, "STRICT")), 80, namespace=ROOT)


def test_names_are_istios() -> None:
    present = index(policy("shop", "STRICT", name="own", selector=LABELS, ports={80: "DISABLE"}))
    assert present.attached("shop", LABELS) == ["shop/converted_peer_authentication_own"]
    assert present.authorization(ObjectKey(ROOT, "istio_converted_static_strict")) is not None
    assert index().authorization(ObjectKey(ROOT, "istio_converted_static_strict")) is None


def test_a_mesh_change_renews_converted_policies_of_every_namespace() -> None:
    own = policy("shop", "UNSET", name="own", selector=LABELS, ports={80: "PERMISSIVE"})
    present = index(own)
    effect = present.set_peer_authentication(*policy(ROOT, "STRICT"))
    assert ObjectKey("shop", "converted_peer_authentication_own") in effect.policies
    assert "shop" in [selection.namespace for selection in effect.selections]
    assert effect.unknown_namespaces
    assert present.authorization(ObjectKey("shop", "converted_peer_authentication_own")) is not None


def test_an_unchanged_policy_has_no_effect() -> None:
    present = index(policy("shop", "STRICT"))
    effect = present.set_peer_authentication(*policy("shop", "STRICT"))
    assert not effect.policies
    assert not effect.selections


class TestNamespacesAsAWhole:
    """A namespace in which nothing is selected is made strict by one policy, whatever it holds."""

    def strict(self, present: PolicyIndex, space: str = "shop") -> bool:
        return present.authorization(ObjectKey(space, peer.NAMESPACE_STRICT)) is not None

    def known(self) -> PolicyIndex:
        present = PolicyIndex(ROOT)
        for name in (ROOT, "shop", "bank"):
            present.set_namespace(name, exists=True)
        return present

    def put(self, present: PolicyIndex, name: str, space: str, **spec: Any) -> Effect:
        return present.set_peer_authentication(
            ObjectKey(space, name), security("PeerAuthentication", name, space, **spec)
        )

    def test_turning_strict_on_and_off_touches_no_workload(self) -> None:
        present = self.known()
        effect = self.put(present, "default", ROOT, mtls={"mode": "STRICT"})
        assert effect.selections == []
        wanted = {ObjectKey(space, peer.NAMESPACE_STRICT) for space in (ROOT, "shop", "bank")}
        assert wanted <= effect.policies
        assert self.strict(present) and self.strict(present, ROOT)
        assert present.attached("shop", {"app": "web"}) == []
        assert present.attached("new", {}) == [f"{ROOT}/{peer.STATIC_STRICT}"], "not heard of yet: attached"
        assert effect.unknown_namespaces
        self.put(present, "default", "shop", mtls={"mode": "PERMISSIVE"})
        assert not self.strict(present) and self.strict(present, "bank")
        effect = self.put(present, "default", ROOT, mtls={"mode": "PERMISSIVE"})
        assert effect.selections == []
        assert not self.strict(present, "bank")

    def test_where_workloads_are_selected_each_names_its_policy(self) -> None:
        present = self.known()
        self.put(present, "default", ROOT, mtls={"mode": "STRICT"})
        chosen = {"matchLabels": {"app": "web"}}
        effect = self.put(present, "web", "shop", selector=chosen, mtls={"mode": "PERMISSIVE"})
        assert Selection("shop") in effect.selections
        assert not self.strict(present) and self.strict(present, "bank")
        assert present.attached("shop", {"app": "web"}) == []
        assert present.attached("shop", {"app": "db"}) == [f"{ROOT}/{peer.STATIC_STRICT}"]
        again = self.put(
            present, "db", "shop", selector={"matchLabels": {"app": "db"}}, mtls={"mode": "STRICT"}
        )
        assert Selection("shop") not in again.selections, "the way stays the same"
        for name in ("web", "db"):
            effect = present.set_peer_authentication(ObjectKey("shop", name), None)
        assert Selection("shop") in effect.selections
        assert self.strict(present)

    def test_a_namespace_that_comes_and_goes(self) -> None:
        present = self.known()
        self.put(present, "default", ROOT, mtls={"mode": "STRICT"})
        effect = present.set_namespace("new", exists=True)
        assert effect.policies == {ObjectKey("new", peer.NAMESPACE_STRICT)}
        assert effect.selections == [Selection("new")]
        assert self.strict(present, "new")
        assert present.set_namespace("new", exists=True) == Effect()
        present.set_namespace("new", exists=False)
        assert not self.strict(present, "new")
