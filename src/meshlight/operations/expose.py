"""Put a Service's ports on the machine's loopback address, and take them away again."""

from __future__ import annotations

import asyncio
from typing import Any

from meshlight.embedded import outlet
from meshlight.embedded.layout import Layout, Record
from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import SERVICES
from meshlight.refusal import Refusal
from meshlight.uplink.exposure import ANNOTATION

_LOOK_AGAIN = 0.05


class ExposeError(Refusal):
    """The Service cannot be exposed; the message says why and what to do."""


async def expose(
    layout: Layout, namespace: str, name: str, ports: tuple[str, ...], deadline: float
) -> list[dict[str, Any]]:
    """Ask for listeners by annotation and wait for them; returns what `listeners.json` says of them.

    `ports`: `HOSTPORT:PORT` each; none: every port, at numbers of the uplink's choice. Raises
    ExposeError, ApiError.
    """
    _check(layout)
    for text in ports:
        host, colon, port = text.partition(":")
        if not host.isdigit() or (colon and not port.isdigit()):
            raise ExposeError(f"{text!r} is no port: write HOSTPORT:PORT, such as 8081:80, or PORT alone")
    async with Client.from_kubeconfig(layout.kubeconfig) as client:
        service = await _annotate(client, namespace, name, ",".join(ports) or "true")
    spec = service["spec"]
    if not spec.get("clusterIP") or spec["clusterIP"] == "None":
        raise ExposeError(f"Service {namespace}/{name} has no address of its own (headless or ExternalName)")
    offered = {p["port"] for p in spec.get("ports") or [] if p.get("protocol", "TCP") in ("TCP", "UDP")}
    wanted = {int(text.rpartition(":")[2]) for text in ports} or offered
    if unknown := wanted - offered:
        raise ExposeError(f"Service {namespace}/{name} has no port {min(unknown)}; it has {sorted(offered)}")
    try:
        async with asyncio.timeout(deadline):
            while True:
                found = [
                    entry
                    for entry in outlet.listeners(layout)
                    if (entry["namespace"], entry["service"]) == (namespace, name)
                ]
                if wanted <= {entry["port"] for entry in found}:
                    return found
                await asyncio.sleep(_LOOK_AGAIN)
    except TimeoutError:
        where = f"{layout.logs / 'uplink.log'} and {layout.logs / 'outlet.log'}"
        raise ExposeError(f"no listener for {namespace}/{name} after {deadline:g} s; see {where}") from None


async def withdraw(layout: Layout, namespace: str, name: str) -> None:
    """Close a Service's listeners, also those that a LoadBalancer has by itself. Raises ApiError."""
    _check(layout)
    async with Client.from_kubeconfig(layout.kubeconfig) as client:
        await _annotate(client, namespace, name, "false")


def _check(layout: Layout) -> None:
    record = Record.read(layout)
    if record is None or not record.running():
        raise ExposeError(f"cluster {layout.name} is not running: `meshlight up --name {layout.name}` boots it")


async def _annotate(client: Client, namespace: str, name: str, value: str) -> dict[str, Any]:
    patch = {"metadata": {"annotations": {ANNOTATION: value}}}
    try:
        return await client.patch(SERVICES, name, patch, namespace)
    except ApiError as error:
        if error.code == 404:
            raise ExposeError(
                f"there is no Service {name} in namespace {namespace}; `kubectl get svc -A` lists them"
            ) from None
        raise
