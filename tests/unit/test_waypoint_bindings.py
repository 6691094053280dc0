"""Which waypoint stands before what: Istio's labels, as a table."""

from __future__ import annotations

from typing import Any

import pytest
from controlplane_objects import endpoint_slice, pod, service

from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import ADDRESS_TYPE
from meshlight.controlplane.settings import Mesh

SERVICE = "shop/web.shop.svc.cluster.local"


def gateway(
    name: str = "waypoint",
    namespace: str = "shop",
    *,
    traffic: str | None = None,
    allowed: dict[str, Any] | None = None,
    ready: bool = True,
    port: int = 15008,
) -> dict[str, Any]:
    listener: dict[str, Any] = {"name": "mesh", "port": port, "protocol": "HBONE"}
    if allowed is not None:
        listener["allowedRoutes"] = {"namespaces": allowed}
    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    if traffic:
        metadata["labels"] = {"istio.io/waypoint-for": traffic}
    status = {"addresses": [{"type": "IPAddress", "value": "10.96.0.50"}]} if ready else {}
    return {
        "kind": "Gateway",
        "metadata": metadata,
        "spec": {"gatewayClassName": "istio-waypoint", "listeners": [listener]},
        "status": status,
    }


def namespace(name: str = "shop", **labels: str) -> dict[str, Any]:
    return {"kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def labelled(obj: dict[str, Any], **labels: str) -> dict[str, Any]:
    obj["metadata"]["labels"] = {**obj["metadata"].get("labels", {}), **_labels(labels)}
    return obj


def _labels(labels: dict[str, str]) -> dict[str, str]:
    return {f"istio.io/{name.replace('_', '-')}": value for name, value in labels.items()}


def ambient(name: str = "shop", **labels: str) -> dict[str, Any]:
    return namespace(name, **_labels(labels))


def waypoints_of(*objects: dict[str, Any]) -> tuple[str, str]:
    """The waypoints announced for service `web` and pod `web-1`."""
    index = Index(Mesh())
    for obj in objects:
        index.observe(obj["kind"], ObjectKey.of(obj), obj)
    index.commit()
    return announced(index)


def announced(index: Index) -> tuple[str, str]:
    found = []
    for name, kind in ((SERVICE, "service"), ("Kubernetes//Pod/shop/web-1", "workload")):
        resource = index.collections[ADDRESS_TYPE].get(name)
        assert resource is not None
        message: Any = getattr(resource.message, kind)
        found.append(message.waypoint.hostname.hostname if message.HasField("waypoint") else "")
    return found[0], found[1]


HERE = "waypoint.shop.svc.cluster.local"
AWAY = "shared.infra.svc.cluster.local"
SELECTED = {"from": "Selector", "selector": {"matchLabels": {"a": "b"}}}
PLAIN = (service(), pod(), endpoint_slice("web-1"))


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ((gateway(), ambient(), *PLAIN), ("", "")),
        ((gateway(), ambient(use_waypoint="waypoint"), *PLAIN), (HERE, "")),
        ((gateway(traffic="all"), ambient(use_waypoint="waypoint"), *PLAIN), (HERE, HERE)),
        ((gateway(traffic="workload"), ambient(use_waypoint="waypoint"), *PLAIN), ("", HERE)),
        ((gateway(traffic="none"), ambient(use_waypoint="waypoint"), *PLAIN), ("", "")),
        ((gateway(ready=False), ambient(use_waypoint="waypoint"), *PLAIN), ("", "")),
        ((ambient(use_waypoint="waypoint"), *PLAIN), ("", "")),
        ((gateway(), ambient(), labelled(service(), use_waypoint="waypoint"), *PLAIN[1:]), (HERE, "")),
        (
            (gateway(), ambient(use_waypoint="waypoint"), labelled(service(), use_waypoint="none"), *PLAIN[1:]),
            ("", ""),
        ),
        (
            (
                gateway(traffic="all"),
                ambient(),
                labelled(pod(), use_waypoint="waypoint"),
                PLAIN[0],
                PLAIN[2],
            ),
            ("", HERE),
        ),
        (
            (
                gateway("shared", "infra", allowed={"from": "All"}),
                ambient(use_waypoint="shared", use_waypoint_namespace="infra"),
                *PLAIN,
            ),
            (AWAY, ""),
        ),
        (
            (
                gateway("shared", "infra"),
                ambient(use_waypoint="shared", use_waypoint_namespace="infra"),
                *PLAIN,
            ),
            ("", ""),
        ),
        (
            (
                gateway("shared", "infra", allowed=SELECTED),
                labelled(namespace(a="b"), use_waypoint="shared", use_waypoint_namespace="infra"),
                *PLAIN,
            ),
            (AWAY, ""),
        ),
    ],
)  # fmt: skip
def test_labels_bind(objects: tuple[dict[str, Any], ...], expected: tuple[str, str]) -> None:
    assert waypoints_of(*objects) == expected
    assert waypoints_of(*reversed(objects)) == expected, "in whatever order they are learned"


def test_a_waypoint_comes_and_goes() -> None:
    index = Index(Mesh())

    def take(obj: dict[str, Any], gone: bool = False) -> None:
        index.observe(obj["kind"], ObjectKey.of(obj), None if gone else obj)
        index.commit()

    for obj in (*PLAIN, ambient(use_waypoint="waypoint")):
        take(obj)
    assert announced(index) == ("", "")
    take(gateway(traffic="all"))
    assert announced(index) == (HERE, HERE)
    take(gateway(), gone=True)
    assert announced(index) == ("", "")


def test_instances_are_handed_connections_with_proxy_protocol() -> None:
    index = Index(Mesh())
    name = {"gateway.networking.k8s.io/gateway-name": "waypoint"}
    instance = pod("waypoint-1", labels=name, ip="10.244.1.50")
    for obj in (gateway(traffic="all"), ambient(use_waypoint="waypoint"), instance):
        index.observe(obj["kind"], ObjectKey.of(obj), obj)
    index.commit()
    resource = index.collections[ADDRESS_TYPE].get("Kubernetes//Pod/shop/waypoint-1")
    assert resource is not None
    message: Any = resource.message
    assert (message.workload.application_tunnel.protocol, message.workload.application_tunnel.port) == (
        1,
        15088,
    )
    assert not message.workload.HasField("waypoint"), "a waypoint is not behind itself"
