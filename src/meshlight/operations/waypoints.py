"""Waypoints by verb, as istioctl has them: made, listed, watched and taken away through the Kubernetes API."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from meshlight.controlplane.waypoints import (
    HBONE_PORT,
    USE_WAYPOINT,
    WAYPOINT_CLASS,
    WAYPOINT_FOR,
    Binding,
    binding,
)
from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import GATEWAYS, NAMESPACES, PODS, SERVICES, Object
from meshlight.operations.errors import OperationError

FOR = ("service", "workload", "all", "none")
_FIELD_MANAGER = "istioctl"


@dataclass(frozen=True, slots=True)
class Row:
    """A waypoint as a list shows it."""

    namespace: str
    name: str
    revision: str
    programmed: str
    traffic: str
    address: str


@dataclass(frozen=True, slots=True)
class Use:
    """Something that asks for a waypoint."""

    kind: str
    namespace: str
    name: str


def manifest(name: str, namespace: str, traffic: str = "", revision: str = "") -> Object:
    """The Gateway that a waypoint is."""
    labels = {}
    if traffic:
        labels[WAYPOINT_FOR] = traffic
    if revision:
        labels["istio.io/rev"] = revision
    metadata: Object = {"name": name, "namespace": namespace}
    if labels:
        metadata["labels"] = labels
    listener = {"name": "mesh", "port": HBONE_PORT, "protocol": "HBONE"}
    return {
        "apiVersion": GATEWAYS.api_version,
        "kind": "Gateway",
        "metadata": metadata,
        "spec": {"gatewayClassName": WAYPOINT_CLASS, "listeners": [listener]},
    }


async def apply(client: Client, obj: Object, *, enroll: bool, overwrite: bool) -> list[str]:
    """Make a waypoint, and have its namespace use it; what was done, in words."""
    name, namespace = obj["metadata"]["name"], obj["metadata"]["namespace"]
    said = []
    if enroll:
        labels = (await _namespace(client, namespace))["metadata"].get("labels") or {}
        if labels.get("istio.io/dataplane-mode") != "ambient":
            said.append(
                f"namespace {namespace} is not in the mesh: label it with istio.io/dataplane-mode=ambient, "
                "or the waypoint gets no traffic"
            )
        if (used := labels.get(USE_WAYPOINT)) not in (None, name) and not overwrite:
            raise OperationError(
                f"namespace {namespace} uses waypoint {used} already: give --overwrite to replace the label"
            )
    await client.apply(GATEWAYS, obj, field_manager=_FIELD_MANAGER)
    said.append(f"waypoint {namespace}/{name} applied")
    if enroll:
        await client.patch(NAMESPACES, namespace, {"metadata": {"labels": {USE_WAYPOINT: name}}})
        said.append(f"namespace {namespace} labeled with {USE_WAYPOINT}: {name}")
    return said


async def wait(client: Client, name: str, namespace: str, seconds: float) -> None:
    """Until a waypoint is programmed. Raises OperationError when time is up, with the reason it gives."""
    try:
        async with asyncio.timeout(seconds):
            async for event in client.watch(GATEWAYS, namespace):
                if event.type == "SYNCED" or event.object["metadata"]["name"] != name:
                    continue
                if condition(event.object, "Programmed").get("status") == "True":
                    return
    except TimeoutError:
        found = condition(await client.get(GATEWAYS, name, namespace), "Programmed")
        why = found.get("message") or "it has no status: is istiod running?"
        raise OperationError(
            f"waypoint {namespace}/{name} is not programmed after {seconds:g} s: {why}"
        ) from None


async def found(client: Client, namespace: str | None) -> list[Object]:
    """The waypoints of a namespace, or of all."""
    gateways = (await client.list(GATEWAYS, namespace)).items
    return [g for g in gateways if (g.get("spec") or {}).get("gatewayClassName") == WAYPOINT_CLASS]


def row(obj: Object) -> Row:
    """How a list shows a waypoint."""
    metadata, labels = obj["metadata"], obj["metadata"].get("labels") or {}
    addresses = (obj.get("status") or {}).get("addresses") or []
    return Row(
        metadata["namespace"],
        metadata["name"],
        labels.get("istio.io/rev", "default"),
        condition(obj, "Programmed").get("status", "Unknown"),
        labels.get(WAYPOINT_FOR, "service"),
        ",".join(entry["value"] for entry in addresses),
    )


def condition(obj: Object, kind: str) -> Object:
    """A condition of an object's status; empty when it has none of that type."""
    conditions: list[Object] = (obj.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c.get("type") == kind), {})


async def uses(client: Client, name: str, namespace: str) -> list[Use]:
    """Namespaces, Services and Pods whose labels ask for a waypoint."""
    result = []
    for resource in (NAMESPACES, SERVICES, PODS):
        for obj in (await client.list(resource, label_selector=f"{USE_WAYPOINT}={name}")).items:
            metadata = obj["metadata"]
            own = metadata["name"] if resource is NAMESPACES else metadata["namespace"]
            wish: Binding | None = binding(metadata.get("labels") or {}, own)
            if wish and wish.waypoint and wish.waypoint.namespace == namespace:
                result.append(Use(resource.kind, metadata.get("namespace", ""), metadata["name"]))
    return result


async def delete(client: Client, namespace: str, names: list[str]) -> list[str]:
    """Delete waypoints (none named: all of the namespace); what was done, in words."""
    if not names:
        names = [obj["metadata"]["name"] for obj in await found(client, namespace)]
        if not names:
            return [f"no waypoints in namespace {namespace}"]
    said = []
    for name in names:
        obj = await client.get(GATEWAYS, name, namespace)
        if obj["spec"].get("gatewayClassName") != WAYPOINT_CLASS:
            raise OperationError(f"gateway {namespace}/{name} is not a waypoint: kubectl deletes others")
        await client.delete(GATEWAYS, name, namespace)
        said.append(f"waypoint {namespace}/{name} deleted")
        for use in await uses(client, name, namespace):
            where = f"{use.kind} {use.namespace + '/' if use.namespace else ''}{use.name}"
            said.append(f"{where} still asks for it ({USE_WAYPOINT}): its traffic goes without a waypoint now")
    return said


async def _namespace(client: Client, name: str) -> Object:
    try:
        return await client.get(NAMESPACES, name)
    except ApiError as error:
        if error.code != 404:
            raise
        raise OperationError(f"namespace {name} not found: create it first") from None
