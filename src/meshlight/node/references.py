"""ConfigMaps and Secrets that this node's pods refer to, kept current by narrow watches.

A node must not copy every Secret of the cluster: only named objects are followed, each for as long
as a pod refers to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from meshlight.kube.client import Client
from meshlight.kube.resources import CONFIG_MAPS, SECRETS, Object, Resource
from meshlight.node.environment import Sources
from meshlight.node.events import log

_Key = tuple[str, str, str]


@dataclass(slots=True)
class _Followed:
    task: asyncio.Task[None]
    synced: asyncio.Event = field(default_factory=asyncio.Event)
    owners: dict[str, set[str]] = field(default_factory=dict)  # pod uid -> namespaces
    objects: dict[str, Object] = field(default_factory=dict)  # by namespace


def referenced(pod: Object) -> set[tuple[str, str]]:
    """(`configmaps` or `secrets`, name) of everything that a pod's spec refers to."""
    found: set[tuple[str, str]] = set()
    spec = pod["spec"]

    def add(reference: Object | None, resource: Resource, key: str = "name") -> None:
        if reference and reference.get(key):
            found.add((resource.plural, reference[key]))

    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        for source in container.get("envFrom") or []:
            add(source.get("configMapRef"), CONFIG_MAPS)
            add(source.get("secretRef"), SECRETS)
        for entry in container.get("env") or []:
            origin = entry.get("valueFrom") or {}
            add(origin.get("configMapKeyRef"), CONFIG_MAPS)
            add(origin.get("secretKeyRef"), SECRETS)
    for volume in spec.get("volumes") or []:
        add(volume.get("configMap"), CONFIG_MAPS)
        add(volume.get("secret"), SECRETS, "secretName")
        for source in (volume.get("projected") or {}).get("sources") or []:
            add(source.get("configMap"), CONFIG_MAPS)
            add(source.get("secret"), SECRETS)
    return found


class References:
    """Follows what is referred to. `on_change` is called with a pod's uid when something of it changed."""

    def __init__(self, client: Client, on_change: Callable[[str], None]) -> None:
        self._client, self._on_change = client, on_change
        self._followed: dict[_Key, _Followed] = {}

    async def sources(self, pod: Object) -> Sources:
        """The current ConfigMaps and Secrets of a pod, followed until `release`."""
        namespace, uid = pod["metadata"]["namespace"], pod["metadata"]["uid"]
        found = Sources({}, {})
        config_maps: dict[str, Object | None] = {}
        secrets: dict[str, Object | None] = {}
        wanted = [(self._follow(plural, namespace, name), plural, name) for plural, name in referenced(pod)]
        for followed, _, _ in wanted:
            followed.owners.setdefault(uid, set()).add(namespace)
        for followed, plural, name in wanted:
            await followed.synced.wait()
            target = config_maps if plural == CONFIG_MAPS.plural else secrets
            target[name] = followed.objects.get(namespace)
        found.config_maps, found.secrets = config_maps, secrets
        return found

    def release(self, uid: str) -> None:
        """A pod is gone; what nobody else refers to is no longer followed."""
        for key, followed in list(self._followed.items()):
            if followed.owners.pop(uid, None) is not None and not followed.owners:
                followed.task.cancel()
                del self._followed[key]

    async def close(self) -> None:
        """Stop following anything."""
        tasks = [followed.task for followed in self._followed.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _follow(self, plural: str, namespace: str, name: str) -> _Followed:
        # The same ConfigMap name stands in every namespace (kube-root-ca.crt): one watch for all of them.
        scope = "" if plural == CONFIG_MAPS.plural else namespace
        key = (plural, scope, name)
        if key not in self._followed:
            task = asyncio.create_task(self._run(key))
            self._followed[key] = _Followed(task)
        return self._followed[key]

    async def _run(self, key: _Key) -> None:
        plural, scope, name = key
        resource = CONFIG_MAPS if plural == CONFIG_MAPS.plural else SECRETS
        selector = f"metadata.name={name}"
        while True:
            try:
                events = self._client.watch(resource, scope or None, field_selector=selector)
                async with contextlib.aclosing(events):
                    async for event in events:
                        self._heard(key, event.type, event.object)
            except Exception as error:  # refused: the pod waits, and says for what
                log("warning", "reference cannot be watched", resource=plural, name=name, error=str(error))
                await asyncio.sleep(5)

    def _heard(self, key: _Key, kind: str, obj: Object) -> None:
        followed = self._followed.get(key)
        if followed is None:
            return
        if kind == "SYNCED":
            followed.synced.set()
            return
        namespace = obj["metadata"]["namespace"]
        if kind == "DELETED":
            followed.objects.pop(namespace, None)
        else:
            followed.objects[namespace] = obj
        if followed.synced.is_set():
            for uid, namespaces in followed.owners.items():
                if namespace in namespaces:
                    self._on_change(uid)
