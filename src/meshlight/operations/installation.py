"""`istioctl verify-install`: is everything of the mesh there, and does it run? Pure over lists of objects."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import (
    CONFIG_MAPS,
    CUSTOM_RESOURCE_DEFINITIONS,
    DAEMON_SETS,
    DEPLOYMENTS,
    SERVICES,
    Object,
    Resource,
)

DEFINITIONS = (
    "authorizationpolicies.security.istio.io", "destinationrules.networking.istio.io",
    "gateways.networking.istio.io", "peerauthentications.security.istio.io",
    "requestauthentications.security.istio.io", "serviceentries.networking.istio.io",
    "telemetries.telemetry.istio.io", "virtualservices.networking.istio.io",
    "workloadentries.networking.istio.io",
)  # fmt: skip
_DEFINITION_GROUPS = (".istio.io",)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    kind: str
    name: str
    good: bool
    detail: str = ""

    def line(self) -> str:
        """As istioctl words it."""
        if self.good:
            return f"✔ {self.kind}: {self.name} checked successfully"
        return f"✘ {self.kind}: {self.name}: {self.detail}"


async def verify(client: Client, namespace: str) -> list[Check]:
    """Look at definitions, istiod, ztunnel and what they need. Raises ApiError, ApiUnreachable."""
    definitions, deployments, daemon_sets, services, config = await asyncio.gather(
        _list(client, CUSTOM_RESOURCE_DEFINITIONS, None),
        _list(client, DEPLOYMENTS, namespace),
        _list(client, DAEMON_SETS, namespace),
        _list(client, SERVICES, namespace),
        _list(client, CONFIG_MAPS, namespace),
    )
    return [
        *_definitions(definitions),
        *_named("Service", services, ("istiod",), namespace),
        *_named("ConfigMap", config, ("istio", "istio-ca-root-cert"), namespace),
        *(_running(obj, "Deployment") for obj in deployments),
        *_named("Deployment", deployments, ("istiod",), namespace, missing_only=True),
        *(_running(obj, "DaemonSet") for obj in daemon_sets),
        *_named("DaemonSet", daemon_sets, ("ztunnel",), namespace, missing_only=True),
    ]


async def _list(client: Client, resource: Resource, namespace: str | None) -> list[Object]:
    try:
        return (await client.list(resource, namespace)).items
    except ApiError as error:
        if error.code == 404:
            return []
        raise


def _definitions(objects: Iterable[Object]) -> list[Check]:
    known = {obj["metadata"]["name"]: obj for obj in objects}
    checks = []
    for name in sorted({*DEFINITIONS, *(n for n in known if n.endswith(_DEFINITION_GROUPS))}):
        obj = known.get(name)
        conditions = ((obj or {}).get("status") or {}).get("conditions") or []
        established = any(c.get("type") == "Established" and c.get("status") == "True" for c in conditions)
        detail = "is not installed" if obj is None else "is not established"
        checks.append(Check("CustomResourceDefinition", name, established, detail))
    return checks


def _named(
    kind: str, objects: Iterable[Object], names: Iterable[str], namespace: str, *, missing_only: bool = False
) -> list[Check]:
    present = {obj["metadata"]["name"] for obj in objects}
    return [
        Check(kind, f"{name}.{namespace}", name in present, "is not there")
        for name in names
        if not (missing_only and name in present)
    ]


def _running(obj: Object, kind: str) -> Check:
    """Whether a workload has all its pods ready, of its present template."""
    metadata, status, spec = obj["metadata"], obj.get("status") or {}, obj.get("spec") or {}
    if kind == "Deployment":
        wanted = spec.get("replicas", 1)
        ready, fresh = status.get("readyReplicas", 0), status.get("updatedReplicas", 0)
    else:
        wanted = status.get("desiredNumberScheduled", 0)
        ready, fresh = status.get("numberReady", 0), status.get("updatedNumberScheduled", wanted)
    detail = f"{ready} of {wanted} pods are ready"
    if ready >= wanted and fresh < wanted:
        detail = f"{fresh} of {wanted} pods are of the present template"
    return Check(
        kind, f"{metadata['name']}.{metadata['namespace']}", ready >= wanted and fresh >= wanted, detail
    )
