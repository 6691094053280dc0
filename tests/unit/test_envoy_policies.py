"""Which policies reach which waypoint's configuration, and how little a policy's change costs."""

from __future__ import annotations

from typing import Any

from controlplane_objects import endpoint_slice, service
from test_envoy_index import CLUSTER, KEY, Mirror, shop

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.envoy.policies import Target, targets_of
from meshlight.controlplane.settings import ExtensionProvider, Mesh

DENY, ALLOW, JWT = (
    "envoy.filters.http.rbac.deny",
    "envoy.filters.http.rbac.allow",
    "envoy.filters.http.jwt_authn",
)
URI = "http://issuer.example/keys"


def policy(
    kind: str = "AuthorizationPolicy",
    *,
    name: str = "p",
    namespace: str = "shop",
    target: Any = None,
    **spec: Any,
) -> dict[str, Any]:
    targets = {"targetRefs": [target]} if target else {}
    return {"kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": {**targets, **spec}}


def service_target(name: str = "web") -> dict[str, str]:
    return {"group": "", "kind": "Service", "name": name}


GATEWAY = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "waypoint"}
CLASS = {"group": "gateway.networking.k8s.io", "kind": "GatewayClass", "name": "istio-waypoint"}
RULES: dict[str, Any] = {"action": "DENY", "rules": [{"to": [{"operation": {"methods": ["POST"]}}]}]}


def rules_of(mirror: Mirror) -> set[str]:
    """The filters that the routes of `web` give rules."""
    (name,) = mirror.names(wire.SCOPED_ROUTE_TYPE)
    scope = mirror.resource(wire.SCOPED_ROUTE_TYPE, name)
    return set(scope.route_configuration.typed_per_filter_config)


def filters_of(mirror: Mirror) -> str:
    return str(mirror.resource(wire.LISTENER_TYPE, "main").SerializeToString())


def test_a_policy_of_a_service_is_in_its_routes_alone() -> None:
    mirror = shop()
    mirror.take(policy(target=service_target(), **RULES))
    changes = mirror.commit()
    assert {t for t, change in changes[KEY].items() if change} == {wire.SCOPED_ROUTE_TYPE}, "nothing is drained"
    assert rules_of(mirror) == {DENY}


def test_a_policy_of_another_service_changes_nothing() -> None:
    mirror = shop()
    mirror.take(policy(target=service_target("other"), **RULES))
    assert not any(mirror.commit().values())


def test_policies_of_the_waypoint_and_of_its_class_hold_for_every_service() -> None:
    for target, namespace in ((GATEWAY, "shop"), (CLASS, "istio-system")):
        mirror = shop()
        mirror.take(policy(target=target, namespace=namespace, **RULES))
        mirror.commit()
        assert rules_of(mirror) == {DENY}
        mirror.take(policy(target=target, namespace=namespace, **RULES), gone=True)
        mirror.commit()
        assert rules_of(mirror) == set()


def test_a_class_is_targeted_from_the_root_namespace_only() -> None:
    obj = policy(target=CLASS, **RULES)
    assert targets_of(obj, "istio-system") == frozenset()
    obj["metadata"]["namespace"] = "istio-system"
    assert targets_of(obj, "istio-system") == {Target.gateway_class("istio-waypoint")}


def test_policies_without_target_are_the_node_proxies() -> None:
    mirror = shop()
    mirror.take(policy(**RULES))
    assert not any(mirror.commit().values())


def test_an_allow_policy_beside_a_deny_policy() -> None:
    mirror = shop()
    mirror.take(policy(target=service_target(), **RULES))
    mirror.take(policy(name="q", target=GATEWAY, action="ALLOW", rules=[{}]))
    mirror.commit()
    assert rules_of(mirror) == {DENY, ALLOW}


def test_connections_that_are_not_http_are_guarded_too() -> None:
    ports = [{"port": 80, "targetPort": 8080, "name": "tcp-x", "appProtocol": "tcp"}]
    mirror = Mirror()
    mirror = shop(service(ports=ports), endpoint_slice("web-1"))
    before = filters_of(mirror)
    mirror.take(
        policy(target=service_target(), action="DENY", rules=[{"from": [{"source": {"namespaces": ["x"]}}]}])
    )
    mirror.commit()
    assert "envoy.filters.network.rbac" in filters_of(mirror) and "envoy.filters.network.rbac" not in before


def test_a_key_set_that_arrives_reaches_the_filter() -> None:
    mirror = shop()
    rules = [{"issuer": "i", "jwksUri": URI}]
    mirror.take(policy("RequestAuthentication", target=service_target(), jwtRules=rules))
    mirror.commit()
    assert rules_of(mirror) == {JWT}
    assert mirror.envoy.policies.key_set_uris() == {URI}
    mirror.envoy.set_key_set(URI, '{"keys":[{"kty":"oct","k":"arrived"}]}')
    assert mirror.envoy.pending()
    mirror.commit()
    assert "arrived" in filters_of(mirror)


def test_an_authorizer_outside_the_waypoints_services_is_known_to_it() -> None:
    mesh = Mesh(
        extension_providers=(
            ExtensionProvider(
                "ask", "envoyExtAuthzHttp", '{"port": 8000, "service": "judge.court.svc.cluster.local"}'
            ),
        )
    )
    mirror = shop()
    mirror.index.reconfigure(mesh)
    mirror.envoy.reconfigure()
    ports = [{"port": 8000, "targetPort": 8000}]
    mirror.take(service("judge", "court", ports=ports))
    mirror.take(policy(target=service_target(), action="CUSTOM", provider={"name": "ask"}, rules=[{}]))
    mirror.commit()
    assert mirror.names(wire.CLUSTER_TYPE) >= {CLUSTER, "outbound|8000||judge.court.svc.cluster.local"}
    assert "ext_authz.ask" in filters_of(mirror)
