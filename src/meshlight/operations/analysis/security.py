"""What can be wrong with AuthorizationPolicies and PeerAuthentications, and with wishes for waypoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.waypoints import USE_WAYPOINT, binding
from meshlight.kube.resources import Object
from meshlight.operations.analysis import messages as m
from meshlight.operations.analysis.messages import Message
from meshlight.operations.mesh_snapshot import Snapshot


def selectors(snapshot: Snapshot) -> Iterator[Message]:
    """Policies that select nothing."""
    for kind in ("AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication", "Telemetry"):
        for key, obj in snapshot.objects.get(kind, {}).items():
            labels = ((obj.get("spec") or {}).get("selector") or {}).get("matchLabels") or {}
            everywhere = key.namespace == snapshot.mesh.root_namespace
            if labels and not _selected(snapshot, None if everywhere else key.namespace, labels):
                said = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
                yield Message.about(m.NO_WORKLOADS, obj, f"no workload has the labels {said}")


def _selected(snapshot: Snapshot, namespace: str | None, labels: dict[str, str]) -> bool:
    for kind in ("Pod", "WorkloadEntry"):
        for key, obj in snapshot.objects.get(kind, {}).items():
            own = {**(obj["metadata"].get("labels") or {}), **((obj.get("spec") or {}).get("labels") or {})}
            if namespace in (None, key.namespace) and all(own.get(n) == v for n, v in labels.items()):
                return True
    return False


def namespaces(snapshot: Snapshot) -> Iterator[Message]:
    """Policies that speak of namespaces that there are not."""
    known = {key.name for key in snapshot.objects.get("Namespace", {})}
    for obj in snapshot.objects.get("AuthorizationPolicy", {}).values():
        for path, name in _named_namespaces(obj):
            if known and "*" not in name and name not in known:
                yield Message.about(
                    m.REFERENCE_NOT_FOUND, obj, f'referenced namespace not found: "{name}" ({path})'
                )


def _named_namespaces(obj: Object) -> Iterator[tuple[str, str]]:
    for index, rule in enumerate((obj.get("spec") or {}).get("rules") or []):
        for number, entry in enumerate((rule or {}).get("from") or []):
            source = (entry or {}).get("source") or {}
            for field in ("namespaces", "notNamespaces"):
                for name in source.get(field) or []:
                    yield f"spec.rules[{index}].from[{number}].source.{field}", str(name)


_TARGETS = {
    "Service": "Service",
    "ServiceEntry": "ServiceEntry",
    "Gateway": "Gateway",
    "GatewayClass": "GatewayClass",
}


def targets(snapshot: Snapshot) -> Iterator[Message]:
    """Policies bound to what there is not, or to what no waypoint stands before."""
    for kind in ("AuthorizationPolicy", "RequestAuthentication", "Telemetry"):
        for key, obj in snapshot.objects.get(kind, {}).items():
            spec: dict[str, Any] = obj.get("spec") or {}
            if spec.get("targetRef"):
                yield Message.about(m.DEPRECATED, obj, "spec.targetRef: use the list targetRefs")
            for ref in [
                *(spec.get("targetRefs") or []),
                *([spec["targetRef"]] if spec.get("targetRef") else []),
            ]:
                yield from _target(snapshot, key, obj, ref)


def _target(snapshot: Snapshot, key: ObjectKey, obj: Object, ref: dict[str, Any]) -> Iterator[Message]:
    kind, name = _TARGETS.get(ref.get("kind") or ""), ref.get("name") or ""
    if kind is None:
        return
    namespace = "" if kind == "GatewayClass" else key.namespace
    if snapshot.get(kind, namespace, name) is None:
        yield Message.about(m.REFERENCE_NOT_FOUND, obj, f'referenced {kind} not found: "{name}"')
        return
    waypoints, target = snapshot.index.waypoints, ObjectKey(namespace, name)
    if kind == "Service" and waypoints.of_service(target) is None:
        yield Message.about(
            m.INEFFECTIVE_POLICY, obj, f"Service {target} stands behind no waypoint that is ready"
        )
    if kind == "ServiceEntry" and waypoints.of_entry(target) is None:
        yield Message.about(
            m.INEFFECTIVE_POLICY, obj, f"ServiceEntry {target} stands behind no waypoint that is ready"
        )


def enforcement(snapshot: Snapshot) -> Iterator[Message]:
    """Policies that ztunnel cannot enforce as written, and modes that mean nothing in ambient."""
    for compiled in snapshot.index.policies.compiled():
        obj = snapshot.get("AuthorizationPolicy", compiled.key.namespace, compiled.key.name)
        if obj is None:
            continue
        for finding in compiled.findings:
            yield Message.about(m.INEFFECTIVE_POLICY, obj, f"{finding.path}: {finding.message}")
    for obj in snapshot.objects.get("PeerAuthentication", {}).values():
        spec = obj.get("spec") or {}
        if (spec.get("mtls") or {}).get("mode") == "DISABLE":
            text = (
                "spec.mtls.mode: DISABLE means PERMISSIVE in ambient: peers of the mesh go on using mutual TLS"
            )
            yield Message.about(m.INEFFECTIVE_POLICY, obj, text)


def shadowed(snapshot: Snapshot) -> Iterator[Message]:
    """PeerAuthentications that an older one of the same scope overrules."""
    scopes: dict[tuple[str, str], list[Object]] = {}
    for key, obj in snapshot.objects.get("PeerAuthentication", {}).items():
        labels = ((obj.get("spec") or {}).get("selector") or {}).get("matchLabels") or {}
        scopes.setdefault((key.namespace, repr(sorted(labels.items()))), []).append(obj)
    for found in scopes.values():
        first, *others = sorted(
            found, key=lambda o: (o["metadata"].get("creationTimestamp") or "~", o["metadata"]["name"])
        )
        for obj in others:
            text = f"{first['metadata']['name']} is older and counts for the same workloads"
            yield Message.about(m.INEFFECTIVE_POLICY, obj, text)


def waypoints(snapshot: Snapshot) -> Iterator[Message]:
    """Labels that wish for a waypoint that there is not."""
    for kind in ("Namespace", "Service", "ServiceEntry", "Pod", "WorkloadEntry"):
        for key, obj in snapshot.objects.get(kind, {}).items():
            space = key.name if kind == "Namespace" else key.namespace
            wish = binding(obj["metadata"].get("labels") or {}, space)
            if (
                wish is not None
                and wish.waypoint is not None
                and wish.waypoint not in snapshot.index.waypoints.waypoints
            ):
                text = f'referenced waypoint not found: "{wish.waypoint}" (label {USE_WAYPOINT})'
                yield Message.about(m.REFERENCE_NOT_FOUND, obj, text)


def conditions(snapshot: Snapshot) -> Iterator[Message]:
    """Conditions in which istiod said no."""
    for kind in ("AuthorizationPolicy", "ServiceEntry", "Service", "Gateway"):
        for obj in snapshot.objects.get(kind, {}).values():
            for condition in (obj.get("status") or {}).get("conditions") or []:
                name, status = str(condition.get("type")), condition.get("status")
                if (
                    name in ("ZtunnelAccepted", "WaypointAccepted", "Accepted", "Programmed")
                    and status == "False"
                ):
                    said = f"type={name}, reason={condition.get('reason')}, message={condition.get('message')}"
                    yield Message.about(m.NEGATIVE_CONDITION, obj, f"a condition has a negative status: {said}")


ANALYZERS = (selectors, namespaces, targets, enforcement, shadowed, waypoints, conditions)
