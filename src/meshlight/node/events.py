"""Logs of the node agent, and Events about its pods in the API, repeated ones counted.

Recording never waits: a full queue drops the oldest, because an Event is news and not state.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections import OrderedDict
from typing import Any

from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import EVENTS, Object
from meshlight.node.podstatus import timestamp

_KEPT = 512
_Key = tuple[str, str, str, str, str]


def log(level: str, msg: str, **fields: Any) -> None:
    """Write one JSON log object on stderr."""
    line = {"ts": time.time(), "level": level, "msg": msg, **fields}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)


class Recorder:
    """Writes core/v1 Events as component `kubelet` of one node."""

    def __init__(self, client: Client, node: str) -> None:
        self._client, self._node = client, node
        self._queue: asyncio.Queue[tuple[_Key, Object, float]] = asyncio.Queue(_KEPT)
        self._known: OrderedDict[_Key, tuple[str, int]] = OrderedDict()

    def record(self, obj: Object, kind: str, reason: str, message: str, container: str = "") -> None:
        """Tell something about an object; `kind` is Normal or Warning, `container` narrows to one."""
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
        key = (metadata["uid"], container, kind, reason, message)
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait((key, involved, time.time()))

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            key, involved, when = await self._queue.get()
            try:
                await self._write(key, involved, when)
            except (ApiError, ApiUnreachable) as error:
                log("warning", "event not recorded", reason=key[3], error=str(error))

    async def _write(self, key: _Key, involved: Object, when: float) -> None:
        namespace = involved.get("namespace", "default")
        if (known := self._known.get(key)) is not None:
            name, count = known
            patch = {"count": count + 1, "lastTimestamp": timestamp(when)}
            try:
                await self._client.patch(EVENTS, name, patch, namespace)
                self._known[key] = (name, count + 1)
                return
            except ApiError as error:
                if error.code != 404:
                    raise
        name = f"{involved['name']}.{uuid.uuid4().hex[:16]}"
        await self._client.create(
            EVENTS,
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": name, "namespace": namespace},
                "involvedObject": involved,
                "type": key[2],
                "reason": key[3],
                "message": key[4],
                "count": 1,
                "firstTimestamp": timestamp(when),
                "lastTimestamp": timestamp(when),
                "source": {"component": "kubelet", "host": self._node},
                "reportingComponent": "kubelet",
                "reportingInstance": self._node,
            },
        )
        self._known[key] = (name, 1)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
