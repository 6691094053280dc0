"""Istio's annotations that nobody knows, that stand on the wrong kind, or whose value means nothing."""

from __future__ import annotations

from collections.abc import Iterator

from meshlight.operations.analysis import messages as m
from meshlight.operations.analysis.messages import Message
from meshlight.operations.mesh_snapshot import Snapshot

_ANY = ""
# Where each may stand; Istio's annotation reference, https://istio.io/latest/docs/reference/config/annotations/.
KNOWN: dict[str, tuple[str, ...]] = {
    "ambient.istio.io/bypass-inbound-capture": ("Pod",),
    "ambient.istio.io/dns-capture": ("Pod",),
    "ambient.istio.io/redirection": ("Pod", "WorkloadEntry"),
    "ambient.istio.io/waypoint-inbound-binding": ("Gateway", "GatewayClass"),
    "galley.istio.io/analyze-suppress": (_ANY,),
    "gateway.istio.io/controller-version": ("Gateway",),
    "gateway.istio.io/name-override": ("Gateway",),
    "gateway.istio.io/service-account": ("Gateway",),
    "install.operator.istio.io/chart-owner": (_ANY,),
    "install.operator.istio.io/owner-generation": (_ANY,),
    "internal.istio.io/parents": (_ANY,),
    "istio.io/autoRegistrationGroup": ("WorkloadEntry",),
    "istio.io/connectedAt": ("WorkloadEntry",),
    "istio.io/disconnectedAt": ("WorkloadEntry",),
    "istio.io/dry-run": ("AuthorizationPolicy",),
    "istio.io/rev": ("Pod",),
    "istio.io/workloadController": ("WorkloadEntry",),
    "kubernetes.io/ingress.class": ("Ingress",),
    "networking.istio.io/address-type": ("Gateway", "Service"),
    "networking.istio.io/exportTo": ("Service",),
    "networking.istio.io/service-type": ("Gateway",),
    "networking.istio.io/traffic-distribution": ("Service", "ServiceEntry", "Namespace"),
    "prometheus.istio.io/merge-metrics": ("Pod",),
    "proxy.istio.io/config": ("Pod",),
    "proxy.istio.io/overrides": ("Pod",),
    "sidecar.istio.io/inject": ("Pod", "Namespace"),
    "sidecar.istio.io/status": ("Pod",),
    "topology.istio.io/controlPlaneClusters": ("Namespace",),
    "traffic.istio.io/nodeSelector": ("Service",),
}
_VALUES = {
    "istio.io/dry-run": ("true", "false"),
    "networking.istio.io/traffic-distribution": ("PreferClose", "PreferSameZone", "PreferSameNode", "Any"),
}
_SIDECAR = ("sidecar.istio.io/", "traffic.sidecar.istio.io/", "proxy.istio.io/", "inject.istio.io/",
            "readiness.status.sidecar.istio.io/", "status.sidecar.istio.io/")  # fmt: skip


def misused(snapshot: Snapshot) -> Iterator[Message]:
    """Unknown, misplaced and meaningless annotations of Istio's."""
    for kind, objects in snapshot.objects.items():
        for obj in objects.values():
            for name, value in (obj["metadata"].get("annotations") or {}).items():
                if "istio.io/" not in name:
                    continue
                places = KNOWN.get(name)
                if places is None:
                    if not name.startswith(_SIDECAR):
                        yield Message.about(m.UNKNOWN_ANNOTATION, obj, f"unknown annotation: {name}")
                elif _ANY not in places and kind not in places:
                    listed = ", ".join(places)
                    yield Message.about(m.MISPLACED_ANNOTATION, obj, f"{name} can only be applied to {listed}")
                elif name in _VALUES and value.lower() not in (v.lower() for v in _VALUES[name]):
                    listed = ", ".join(_VALUES[name])
                    yield Message.about(m.INVALID_ANNOTATION, obj, f"{name}: {value!r} is none of {listed}")


ANALYZERS = (misused,)
