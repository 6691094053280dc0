"""Events about objects, as Kubernetes' components write them; repeated ones are counted.

Recording never waits: a full queue drops the oldest, because an Event is news and not state.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import EVENTS, Object

_KEPT = 4096
_WRITERS = 4


@dataclass(frozen=True, slots=True)
class _Said:
    """What makes two Events the same."""

    component: str
    uid: str
    field_path: str
    kind: str
    reason: str
    message: str


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def involved_object(obj: Object, container: str = "") -> Object:
    """The reference to an object in an Event; `container` narrows it to one of a Pod's."""
    metadata = obj["metadata"]
    involved: Object = {
        "apiVersion": obj.get("apiVersion", "v1"),
        "kind": obj.get("kind", "Pod"),
        "name": metadata["name"],
        "uid": metadata["uid"],
        "resourceVersion": metadata.get("resourceVersion", ""),
    }
    if metadata.get("namespace"):
        involved["namespace"] = metadata["namespace"]
    if container:
        initial = any(c["name"] == container for c in obj["spec"].get("initContainers") or [])
        involved["fieldPath"] = f"spec.{'initContainers' if initial else 'containers'}{{{container}}}"
    return involved


class Recorder:
    """Writes core/v1 Events in the name of a component, of one host where it has one."""

    def __init__(
        self, client: Client, component: str, host: str = "", failed: Callable[[str, str], None] | None = None
    ) -> None:
        self._client, self._component, self._host = client, component, host
        self._failed = failed or (lambda reason, error: None)
        self._queue: asyncio.Queue[tuple[_Said, Object, float]] = asyncio.Queue(_KEPT)
        self._known: OrderedDict[_Said, tuple[str, int]] = OrderedDict()
        self._writing: set[_Said] = set()

    def record(
        self, obj: Object, kind: str, reason: str, message: str, container: str = "", component: str = ""
    ) -> None:
        """Tell something about an object; `kind` is Normal or Warning."""
        involved = involved_object(obj, container)
        who = component or self._component
        said = _Said(who, involved["uid"], involved.get("fieldPath", ""), kind, reason, message)
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait((said, involved, time.time()))

    async def run(self) -> None:
        """Write until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(_WRITERS):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            said, involved, when = await self._queue.get()
            if said in self._writing:  # another writer makes the Event that this one counts up
                await asyncio.sleep(0.02)
                if not self._queue.full():
                    self._queue.put_nowait((said, involved, when))
                continue
            self._writing.add(said)
            try:
                await self._write(said, involved, when)
            except (ApiError, ApiUnreachable) as error:
                self._failed(said.reason, str(error))
            finally:
                self._writing.discard(said)

    async def _write(self, said: _Said, involved: Object, when: float) -> None:
        namespace = involved.get("namespace", "default")
        if (known := self._known.get(said)) is not None:
            name, count = known
            patch = {"count": count + 1, "lastTimestamp": _timestamp(when)}
            try:
                await self._client.patch(EVENTS, name, patch, namespace)
                self._known[said] = (name, count + 1)
                self._known.move_to_end(said)
                return
            except ApiError as error:
                if error.code != 404:
                    raise
        name = f"{involved['name'][:230]}.{uuid.uuid4().hex[:16]}"
        source = {"component": said.component, **({"host": self._host} if self._host else {})}
        await self._client.create(
            EVENTS,
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": name, "namespace": namespace},
                "involvedObject": involved,
                "type": said.kind,
                "reason": said.reason,
                "message": said.message[:1024],
                "count": 1,
                "firstTimestamp": _timestamp(when),
                "lastTimestamp": _timestamp(when),
                "source": source,
                "reportingComponent": said.component,
                "reportingInstance": self._host,
            },
        )
        self._known[said] = (name, 1)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
