"""Deletes what a deleted owner leaves behind (`metadata.ownerReferences`).

In the background after the owner, in the foreground before it (finalizer `foregroundDeletion`), or not at
all (finalizer `orphan`: the dependents lose their reference).

Knows only metadata: one index of uids and of who depends on whom, over every type that the API lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from meshlight.controllers.workqueue import Key, WorkQueue, log
from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import CUSTOM_RESOURCE_DEFINITIONS, Object, Resource

_SKIPPED = {("", "events")}
FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"


_HELD = "held"
"""The queue's word for an owner that waits for its dependents."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object is."""

    resource: Resource
    namespace: str
    name: str


class Graph:
    """Who owns whom, by uid. Pure."""

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        self._owners: dict[str, tuple[str, ...]] = {}
        self._dependents: dict[str, set[str]] = {}

    def put(self, uid: str, place: Place, owners: tuple[str, ...]) -> None:
        """An object exists, with the uids of its owners."""
        self._forget_owners(uid)
        self._places[uid] = place
        if owners:
            self._owners[uid] = owners
            for owner in owners:
                self._dependents.setdefault(owner, set()).add(uid)

    def remove(self, uid: str) -> set[str]:
        """An object is gone; returns the uids of its dependents."""
        self._places.pop(uid, None)
        self._forget_owners(uid)
        return self._dependents.pop(uid, set())

    def _forget_owners(self, uid: str) -> None:
        for owner in self._owners.pop(uid, ()):
            self._dependents.get(owner, set()).discard(uid)

    def orphan(self, uid: str) -> Place | None:
        """Where the object is, if it has owners and none of them exists any more."""
        owners = self._owners.get(uid)
        if not owners or any(owner in self._places for owner in owners):
            return None
        return self._places.get(uid)

    def place(self, uid: str) -> Place | None:
        """Where the object is, if it exists."""
        return self._places.get(uid)

    def owners(self, uid: str) -> tuple[str, ...]:
        """Uids of the object's owners."""
        return self._owners.get(uid, ())

    def dependents(self, uid: str) -> list[Place]:
        """Where the object's dependents are."""
        return [self._places[d] for d in sorted(self._dependents.get(uid, ())) if d in self._places]

    def owned(self) -> list[str]:
        """Uids of every object that has owners."""
        return list(self._owners)


class GarbageCollector:
    """Watches every listable type; types of new CustomResourceDefinitions join as they appear."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.graph = Graph()
        self.queue = WorkQueue("garbage-collector", self.reconcile)
        self._watching: dict[tuple[str, str], asyncio.Event] = {}

    async def run(self) -> None:
        """Collect until cancelled."""
        async with asyncio.TaskGroup() as group:
            await self._join(group)
            # Absence can be told from ignorance only once every type has been listed.
            await asyncio.gather(*(synced.wait() for synced in self._watching.values()))
            for uid in self.graph.owned():
                self.queue.add(("", uid))
            group.create_task(self.queue.run())
            async for event in self.client.watch(CUSTOM_RESOURCE_DEFINITIONS):
                if event.type in ("ADDED", "MODIFIED"):
                    await self._join(group)

    async def _join(self, group: asyncio.TaskGroup) -> None:
        for resource in await self.client.discover("watch"):
            kind = (resource.group, resource.plural)
            if kind not in self._watching and kind not in _SKIPPED:
                self._watching[kind] = asyncio.Event()
                group.create_task(self._follow(resource, self._watching[kind]))

    async def _follow(self, resource: Resource, synced: asyncio.Event) -> None:
        try:
            async for event in self.client.watch(resource):
                if event.type == "SYNCED":
                    synced.set()
                else:
                    self._changed(resource, event.object, event.type == "DELETED")
        except ApiError as error:
            if error.code != 404:
                raise
            synced.set()  # the type was taken away
            self._watching.pop((resource.group, resource.plural), None)

    def _changed(self, resource: Resource, obj: Object, deleted: bool) -> None:
        metadata = obj["metadata"]
        if deleted:
            for owner in self.graph.owners(metadata["uid"]):
                self.queue.add((_HELD, owner))
            for dependent in self.graph.remove(metadata["uid"]):
                self.queue.add(("", dependent))
            return
        owners = tuple(owner["uid"] for owner in metadata.get("ownerReferences") or [])
        place = Place(resource, metadata.get("namespace", ""), metadata["name"])
        self.graph.put(metadata["uid"], place, owners)
        if "deletionTimestamp" in metadata and {FOREGROUND, ORPHAN} & set(metadata.get("finalizers") or ()):
            self.queue.add((_HELD, metadata["uid"]))
        if owners and self.graph.orphan(metadata["uid"]):
            self.queue.add(("", metadata["uid"]))

    async def reconcile(self, key: Key) -> None:
        """Delete one object whose owners are all gone, after asking the API about each of them.

        Or take care of the dependents of one that is held until then.
        """
        if key[0] == _HELD:
            await self._release(key[1])
            return
        place = self.graph.orphan(key[1])
        if place is None:
            return
        try:
            obj = await self.client.get(place.resource, place.name, place.namespace or None)
        except ApiError as error:
            if error.code == 404:
                return
            raise
        if obj["metadata"]["uid"] != key[1] or await self._any_owner(obj):
            return
        await self.client.delete(place.resource, place.name, place.namespace or None)
        log("info", "collected", kind=place.resource.kind, namespace=place.namespace, name=place.name)

    async def _release(self, uid: str) -> None:
        """Delete the dependents of a held owner, or set them free; then let the owner go."""
        place = self.graph.place(uid)
        if place is None:
            return
        try:
            owner = await self.client.get(place.resource, place.name, place.namespace or None)
        except ApiError as error:
            if error.code == 404:
                return
            raise
        metadata = owner["metadata"]
        held_by = {FOREGROUND, ORPHAN} & set(metadata.get("finalizers") or ())
        if metadata["uid"] != uid or "deletionTimestamp" not in metadata or not held_by:
            return
        waiting = False
        for dependent in self.graph.dependents(uid):
            if ORPHAN in held_by:
                await self._set_free(dependent, uid)
            else:
                waiting = True
                await self._delete_first(dependent)
        if waiting:
            return  # the last dependent's end brings us back
        left = [f for f in metadata["finalizers"] if f not in held_by]
        change = {"metadata": {"finalizers": left, "resourceVersion": metadata["resourceVersion"]}}
        await self._ignoring_absence(
            self.client.patch(place.resource, place.name, change, place.namespace or None)
        )

    async def _delete_first(self, place: Place) -> None:
        path = place.resource.path(place.namespace or None, place.name)
        options = {"propagationPolicy": "Foreground"}
        await self._ignoring_absence(self.client.request("DELETE", path, options))

    async def _set_free(self, place: Place, owner: str) -> None:
        try:
            obj = await self.client.get(place.resource, place.name, place.namespace or None)
        except ApiError as error:
            if error.code == 404:
                return
            raise
        metadata = obj["metadata"]
        kept = [o for o in metadata.get("ownerReferences") or [] if o["uid"] != owner]
        change = {"metadata": {"ownerReferences": kept, "resourceVersion": metadata["resourceVersion"]}}
        await self._ignoring_absence(
            self.client.patch(place.resource, place.name, change, place.namespace or None)
        )

    @staticmethod
    async def _ignoring_absence(request: Coroutine[Any, Any, Object]) -> None:
        try:
            await request
        except ApiError as error:
            if error.code != 404:
                raise

    async def _any_owner(self, obj: Object) -> bool:
        kinds = {(r.api_version, r.kind): r for r in await self.client.discover("get")}
        for owner in obj["metadata"].get("ownerReferences") or []:
            resource = kinds.get((owner["apiVersion"], owner["kind"]))
            if resource is None:
                return True  # of a type that is not served: nothing can be known of it
            namespace = obj["metadata"].get("namespace") if resource.namespaced else None
            try:
                found = await self.client.get(resource, owner["name"], namespace)
            except ApiError as error:
                if error.code != 404:
                    raise
                continue
            if found["metadata"]["uid"] == owner["uid"]:
                return True
        return False
