"""Bring a cluster up and say what came up; the verbs `up` and `down` render this."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from meshlight.embedded import launch
from meshlight.embedded.install import COMPLETE
from meshlight.embedded.layout import Layout, Record
from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import CUSTOM_RESOURCE_DEFINITIONS, NAMESPACES

Progress = Callable[[str], None]


class BootError(Exception):
    """The cluster did not come up in time; the message names the part and its log."""


@dataclass(frozen=True, slots=True)
class Booted:
    """A cluster that is up: its record, whether this call started it, and how long it took."""

    record: Record
    started: bool
    seconds: float


async def up(
    layout: Layout, nodes: int | None, api_port: int | None, deadline: float, progress: Progress
) -> Booted:
    """Start (or find) the cluster and wait until the API serves cluster-101's objects.

    `deadline` is in seconds from now. Raises launch.LaunchError, BootError.
    """
    begun = time.monotonic()
    record, started = launch.start(layout, nodes, api_port)
    progress("supervisor")
    try:
        async with asyncio.timeout(deadline), Client.from_kubeconfig(layout.kubeconfig) as client:
            await _serving(layout, record, client)
            progress("Kubernetes API")
            await _installed(layout, record, client)
            definitions = await client.list(CUSTOM_RESOURCE_DEFINITIONS)
            progress(f"{len(definitions.items)} custom resource definitions")
    except TimeoutError:
        raise BootError(
            f"not everything came up within {deadline:g} s; the logs are in {layout.logs}"
        ) from None
    return Booted(record, started, time.monotonic() - begun)


def _alive(layout: Layout, record: Record) -> None:
    if not record.running():
        log = layout.logs / "supervisor.log"
        raise BootError(f"the supervisor ended; the last lines of {log}:\n{launch.tail(log)}")


async def _serving(layout: Layout, record: Record, client: Client) -> None:
    while True:
        _alive(layout, record)
        try:
            await client.request("GET", "/version", timeout=5)
            return
        except (ApiUnreachable, ApiError):
            await asyncio.sleep(0.05)


async def _installed(layout: Layout, record: Record, client: Client) -> None:
    async for event in client.watch(NAMESPACES, field_selector="metadata.name=kube-system"):
        _alive(layout, record)
        metadata = event.object.get("metadata") or {}
        if COMPLETE in (metadata.get("annotations") or {}):
            return
