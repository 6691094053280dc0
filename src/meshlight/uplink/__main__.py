"""The uplink's process, in the fabric's namespace: routes to Service addresses, and the machine's listeners."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from meshlight.controllers.workqueue import log
from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import ENDPOINT_SLICES, EVENTS, NODES, SERVICES, Object, Resource
from meshlight.node import netns
from meshlight.node.netns import NetworkError
from meshlight.uplink import announcement
from meshlight.uplink.dialer import Dialer
from meshlight.uplink.egress import Egress
from meshlight.uplink.listeners import Listeners
from meshlight.uplink.machine import Machine
from meshlight.uplink.name_service import NameRelay

FABRIC, GATEWAY = "fabric0", "172.20.0.1"
_SERVICE_NAME = "kubernetes.io/service-name"
_DEBOUNCE = 0.02
_Key = tuple[str, str]


class Routes:
    """Keeps the fabric's routes to Service addresses."""

    def __init__(self) -> None:
        self._nodes: dict[str, Object] = {}
        self._services: dict[_Key, Object] = {}
        self._slices: dict[_Key, dict[str, Object]] = {}
        self._chosen: dict[_Key, dict[str, str]] = {}
        self._current: dict[str, list[str]] = {}
        self._dirty: set[_Key] = set()
        self._changed = asyncio.Event()

    def take(self, resource: Resource, obj: Object, deleted: bool) -> None:
        """An object changed."""
        metadata = obj["metadata"]
        if resource is NODES:
            before = announcement.node_addresses(self._nodes.values())
            self._nodes.pop(metadata["name"], None)
            if not deleted:
                self._nodes[metadata["name"]] = obj
            if announcement.node_addresses(self._nodes.values()) == before:
                return
            self._dirty.update(self._services)
        elif resource is SERVICES:
            key = (metadata["namespace"], metadata["name"])
            self._services.pop(key, None)
            if not deleted:
                self._services[key] = obj
            self._dirty.add(key)
        else:
            key = (metadata["namespace"], (metadata.get("labels") or {}).get(_SERVICE_NAME, ""))
            slices = self._slices.setdefault(key, {})
            slices.pop(metadata["name"], None)
            if not deleted:
                slices[metadata["name"]] = obj
            self._dirty.add(key)
        self._changed.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_DEBOUNCE)
            self._changed.clear()
            nodes = announcement.node_addresses(self._nodes.values())
            for key in self._dirty:
                service = self._services.get(key)
                slices = self._slices.get(key, {}).values()
                chosen = announcement.choose(service, slices, nodes) if service else {}
                if chosen:
                    self._chosen[key] = chosen
                else:
                    self._chosen.pop(key, None)
            self._dirty.clear()
            wanted = announcement.ranges(nodes)
            for chosen in self._chosen.values():
                wanted |= {address: [via] for address, via in chosen.items()}
            if commands := announcement.commands(self._current, wanted, FABRIC):
                await asyncio.to_thread(netns.ip, commands, tolerant=True)
            self._current = wanted


class Uplink:
    """Follows the API for everything the uplink does."""

    def __init__(self, client: Client, state: Path, *, isolated: bool) -> None:
        self._client, self._isolated = client, isolated
        self._machine = Machine(state)
        self._routes = Routes()
        self._listeners = Listeners(self._machine, state, self._report)
        self._events: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled."""
        self._machine.open()
        try:
            async with asyncio.TaskGroup() as group:
                for resource in (NODES, SERVICES, ENDPOINT_SLICES):
                    group.create_task(self._follow(resource))
                group.create_task(self._routes.run())
                group.create_task(self._listeners.run())
                group.create_task(Dialer(self._machine).run())  # for nodes; what pods reach is another matter
                if not self._isolated:
                    group.create_task(_optional("nameservers", NameRelay(self._machine, GATEWAY).run))
                    group.create_task(_optional("outside", Egress(self._machine).run))
        finally:
            self._machine.close()

    async def _follow(self, resource: Resource) -> None:
        async with contextlib.aclosing(self._client.watch(resource)) as events:
            async for event in events:
                if event.type == "SYNCED":
                    continue
                deleted = event.type == "DELETED"
                self._routes.take(resource, event.object, deleted)
                if resource is SERVICES:
                    self._listeners.service(event.object, deleted)

    def _report(self, service: Object, reason: str, message: str) -> None:
        task = asyncio.create_task(self._tell(service, reason, message))
        self._events.add(task)
        task.add_done_callback(self._events.discard)

    async def _tell(self, service: Object, reason: str, message: str) -> None:
        metadata = service["metadata"]
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}",
                "namespace": metadata["namespace"],
            },
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Service",
                **{k: metadata[k] for k in ("name", "namespace", "uid")},
            },
            "type": "Normal" if reason == "Exposed" else "Warning",
            "reason": reason,
            "message": message,
            "source": {"component": "meshlight-uplink"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._client.create(EVENTS, event)
        except (ApiError, ApiUnreachable) as error:
            log("warning", "event not written", service=metadata["name"], error=str(error))


async def _optional(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Do without a part that this kernel refuses: Services must be reached all the same."""
    try:
        await work()
    except (NetworkError, OSError) as error:
        log("error", "pods do not reach what is outside", part=what, error=str(error))


async def main(kubeconfig: str, state: Path, *, isolated: bool) -> None:
    """Serve until SIGTERM or SIGINT, then leave with status 0."""
    async with Client.from_kubeconfig(kubeconfig) as client:
        task = asyncio.create_task(Uplink(client, state, isolated=isolated).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m meshlight.uplink")
    parser.add_argument("--kubeconfig", required=True)
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--isolated", action="store_true", help="nothing outside is reached")
    arguments = parser.parse_args()
    uvloop.run(main(arguments.kubeconfig, arguments.state, isolated=arguments.isolated))
