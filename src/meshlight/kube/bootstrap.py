"""What a new cluster's API holds from its first start: namespaces, default roles, its own Service."""

from __future__ import annotations

import copy

from meshlight.kube.authorization import GROUP
from meshlight.kube.default_roles import BINDINGS, PRIORITIES, ROLES
from meshlight.kube.resources import Object
from meshlight.kube.rest import Rest, Target, WriteOptions
from meshlight.kube.status import StatusError

NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")


API_SERVICE_ADDRESS = "10.96.0.1"


def bootstrap(rest: Rest, address: str, port: int) -> None:
    """Create what is missing; what exists stays as it is.

    `address` and `port` are where pods reach this server: the endpoint behind Service `kubernetes`.
    """
    for name in NAMESPACES:
        _ensure(rest, "", "v1", "namespaces", {"metadata": {"name": name}})
    for plural, found in (("clusterroles", ROLES), ("clusterrolebindings", BINDINGS)):
        for obj in found:
            _ensure(rest, GROUP, "v1", plural, obj)
    for priority in PRIORITIES:
        _ensure(rest, "scheduling.k8s.io", "v1", "priorityclasses", priority)
    labels = {"component": "apiserver", "provider": "kubernetes"}
    metadata: Object = {"name": "kubernetes", "namespace": "default", "labels": labels}
    ports = [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}]
    spec = {"clusterIP": API_SERVICE_ADDRESS, "type": "ClusterIP", "sessionAffinity": "None", "ports": ports}
    _ensure(rest, "", "v1", "services", {"metadata": metadata, "spec": spec})
    behind = [{"name": "https", "port": port, "protocol": "TCP"}]
    endpoints: Object = {"metadata": metadata, "subsets": [{"addresses": [{"ip": address}], "ports": behind}]}
    endpoints["metadata"] = {
        **metadata,
        "labels": {**labels, "endpointslice.kubernetes.io/skip-mirror": "true"},
    }
    _ensure(rest, "", "v1", "endpoints", endpoints)
    slice_metadata = {**metadata, "labels": {"kubernetes.io/service-name": "kubernetes"}}
    endpoint_slice = {
        "metadata": slice_metadata,
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": behind,
    }
    _ensure(rest, "discovery.k8s.io", "v1", "endpointslices", endpoint_slice)


def _ensure(rest: Rest, group: str, version: str, plural: str, obj: Object) -> None:
    served = rest.catalog.lookup(group, version, plural)
    assert served is not None
    try:
        rest.create(Target(served, obj["metadata"].get("namespace")), copy.deepcopy(obj), WriteOptions())
    except StatusError as error:
        if error.reason != "AlreadyExists":
            raise
