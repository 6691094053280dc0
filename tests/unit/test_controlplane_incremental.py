"""Whatever order objects come, change and go in, the index is what a fresh one would be of what is left."""

from __future__ import annotations

from typing import Any

from controlplane_objects import apply, delete, endpoint_slice, pod, security, service
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from meshlight.controlplane.settings import Mesh
from meshlight.controlplane.xds import Session
from meshlight.proto import discovery_pb2 as ads

SPACES = st.sampled_from(("shop", "bank", "istio-system"))
NAMES = st.sampled_from(("a", "b"))
LABELS = st.sampled_from(({"app": "web"}, {"app": "db"}, {"app": "web", "tier": "x"}))
MODES = st.sampled_from(("UNSET", "DISABLE", "PERMISSIVE", "STRICT"))
AGES = st.sampled_from(("2025-01-01", "2026-01-01"))
HOSTS = st.sampled_from(("x.example.com", "*.example.com", "a.shop.svc.cluster.local"))


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


@st.composite
def namespaces(draw: st.DrawFn) -> dict[str, Any]:
    labels = draw(st.sampled_from(({}, {"istio.io/use-waypoint": "wp"})))
    notes = draw(st.sampled_from(({}, {"networking.istio.io/traffic-distribution": "PreferClose"})))
    return {"kind": "Namespace", "metadata": {"name": draw(SPACES), "labels": labels, "annotations": notes}}


@st.composite
def pods(draw: st.DrawFn) -> dict[str, Any]:
    name, space = draw(NAMES), draw(SPACES)
    address = draw(maybe(st.sampled_from(("10.244.1.5", "10.244.1.6"))))
    return pod(name, space, ip=address, labels=draw(LABELS), ready=draw(st.booleans()), account=name)


@st.composite
def services(draw: st.DrawFn) -> dict[str, Any]:
    return service(draw(NAMES), draw(SPACES), selector=draw(LABELS))


@st.composite
def slices(draw: st.DrawFn) -> dict[str, Any]:
    members = draw(st.sets(NAMES))
    return endpoint_slice(*members, service=draw(NAMES), namespace=draw(SPACES), name=draw(NAMES))


@st.composite
def authorization(draw: st.DrawFn) -> dict[str, Any]:
    labels = draw(maybe(LABELS))
    spec: dict[str, Any] = {"action": draw(st.sampled_from(("ALLOW", "DENY", "AUDIT"))), "rules": [{}]}
    if labels is not None:
        spec["selector"] = {"matchLabels": labels}
    return security("AuthorizationPolicy", draw(NAMES), draw(SPACES), **spec)


@st.composite
def peers(draw: st.DrawFn) -> dict[str, Any]:
    labels, spec = draw(maybe(LABELS)), {"mtls": {"mode": draw(MODES)}}
    if labels is not None:
        spec |= {"selector": {"matchLabels": labels}, "portLevelMtls": {"80": {"mode": draw(MODES)}}}
    obj = security("PeerAuthentication", draw(NAMES), draw(SPACES), **spec)
    obj["metadata"]["creationTimestamp"] = draw(AGES)
    return obj


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "hosts": draw(st.lists(HOSTS, min_size=1, max_size=2, unique=True)),
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
        "resolution": draw(st.sampled_from(("NONE", "STATIC", "DNS"))),
        "exportTo": draw(st.sampled_from(([], ["."], ["~"]))),
    }
    if (labels := draw(maybe(LABELS))) is not None:
        spec["workloadSelector"] = {"labels": labels}
    elif spec["resolution"] == "STATIC":
        spec["endpoints"] = [{"address": "192.0.2.1"}]
    metadata = {"name": draw(NAMES), "namespace": draw(SPACES), "creationTimestamp": draw(AGES)}
    metadata["labels"] = draw(LABELS)
    return {"kind": "ServiceEntry", "metadata": metadata, "spec": spec}


@st.composite
def machines(draw: st.DrawFn) -> dict[str, Any]:
    metadata = {"name": draw(NAMES), "namespace": draw(SPACES)}
    spec = {"address": "192.0.2.7", "labels": draw(LABELS), "serviceAccount": "vm"}
    return {"kind": "WorkloadEntry", "metadata": metadata, "spec": spec}


@st.composite
def gateways(draw: st.DrawFn) -> dict[str, Any]:
    routes = {"namespaces": {"from": draw(st.sampled_from(("Same", "All")))}}
    listener = {"name": "mesh", "protocol": "HBONE", "port": 15008, "allowedRoutes": routes}
    status = draw(st.sampled_from(({}, {"addresses": [{"value": "10.96.0.9"}]})))
    spec = {"gatewayClassName": "istio-waypoint", "listeners": [listener]}
    return {
        "kind": "Gateway",
        "metadata": {"name": "wp", "namespace": draw(SPACES)},
        "spec": spec,
        "status": status,
    }


OBJECTS = st.one_of(
    namespaces(), pods(), services(), slices(), authorization(), peers(), entries(), machines(), gateways()
)
STEPS = st.lists(st.tuples(OBJECTS, st.sampled_from(("set", "set", "set", "delete", "commit"))), max_size=40)


def published(index: Index) -> dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]:
    return {r.name: (r.version, r.aliases, r.groups) for c in index.collections.values() for r in c}


class Follower:
    """A node proxy that follows everything, as it would hold it."""

    def __init__(self, index: Index) -> None:
        self.session = Session(index.collections, 1)
        self.held: dict[tuple[str, str], str] = {}
        for type_url in (AUTHORIZATION_TYPE, ADDRESS_TYPE):
            self.session.receive(
                ads.DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=["*"]), 0
            )
        self.take()

    def take(self) -> None:
        for response in self.session.respond(0):
            decoded = ads.DeltaDiscoveryResponse.FromString(response.encoded)
            for resource in decoded.resources:
                self.held[response.type_url, resource.name] = resource.version
            for name in decoded.removed_resources:
                self.held.pop((response.type_url, name), None)


@given(STEPS)
@settings(max_examples=300, deadline=None)
def test_incremental_is_the_same_as_anew(steps: list[tuple[dict[str, Any], str]]) -> None:
    index, left = Index(Mesh()), {}
    follower = Follower(index)
    for obj, act in steps:
        key = (obj["kind"], ObjectKey.of(obj))
        if act == "delete":
            left.pop(key, None)
            changes = delete(index, obj)
        else:
            left[key] = obj
            index.observe(obj["kind"], key[1], obj)
            if act == "set":
                continue
            changes = index.commit()
        follower.session.change(changes)
        follower.take()
    follower.session.change(index.commit())
    follower.take()
    fresh = Index(Mesh())
    apply(fresh, *left.values())
    assert published(index) == published(fresh)
    wanted = {(t, r.name): r.version for t, c in fresh.collections.items() for r in c}
    assert follower.held == wanted
