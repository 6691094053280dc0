"""Who controls what: an index of a cache by controller, adoption and release by selector, writes through it.

Work of a reconciliation stays proportional to what its owner owns, however many objects there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from meshlight.controllers.pods import controller_of, is_terminating, labels, reference
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import Object
from meshlight.kube.selectors import match_labels

_AT_ONCE = 16
_MERGE = "application/merge-patch+json"


class Dependents:
    """Objects of a cache by their controller's uid, and those without a controller by namespace."""

    def __init__(self, client: Client, cache: Cache) -> None:
        self.client, self.cache = client, cache
        self._owned: dict[str, dict[str, Object]] = {}
        self._free: dict[str, dict[str, Object]] = {}
        cache.on_change(self._changed)

    def _place(self, obj: Object) -> tuple[dict[str, dict[str, Object]], str]:
        owner = controller_of(obj)
        return (self._owned, owner["uid"]) if owner else (self._free, obj["metadata"].get("namespace", ""))

    def _changed(self, old: Object | None, new: Object | None) -> None:
        if old is not None:
            index, key = self._place(old)
            held = index.get(key, {})
            held.pop(old["metadata"]["uid"], None)
            if not held:
                index.pop(key, None)
        if new is not None:
            index, key = self._place(new)
            index.setdefault(key, {})[new["metadata"]["uid"]] = new

    def of(self, uid: str) -> list[Object]:
        """What the owner controls."""
        return list(self._owned.get(uid, {}).values())

    def free(self, namespace: str) -> list[Object]:
        """What nobody controls."""
        return list(self._free.get(namespace, {}).values())

    async def claim(self, owner: Object, api_version: str, kind: str) -> list[Object]:
        """What the owner controls by its selector: adopts what nobody controls, lets go what does not match."""
        metadata, selector = owner["metadata"], owner["spec"].get("selector")
        kept = []
        for obj in self.of(metadata["uid"]):
            if match_labels(selector, labels(obj)):
                kept.append(obj)
            elif not is_terminating(owner):
                await self._release(obj, metadata["uid"])
        if is_terminating(owner):
            return kept
        for obj in self.free(metadata["namespace"]):
            if is_terminating(obj) or not match_labels(selector, labels(obj)):
                continue
            if (adopted := await self._adopt(obj, reference(owner, api_version, kind))) is not None:
                kept.append(adopted)
        return kept

    async def _adopt(self, obj: Object, owner: Object) -> Object | None:
        owners = [*(obj["metadata"].get("ownerReferences") or []), owner]
        return await self._own(obj, owners)

    async def _release(self, obj: Object, uid: str) -> None:
        kept = [o for o in obj["metadata"].get("ownerReferences") or [] if o["uid"] != uid]
        await self._own(obj, kept)

    async def _own(self, obj: Object, owners: list[Object]) -> Object | None:
        metadata = obj["metadata"]
        version = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        patch = {"metadata": {**version, "ownerReferences": owners or None}}
        return await self.patch(obj, patch)

    async def create(self, obj: Object) -> Object:
        """Create an object of the cache's type."""
        made = await self.client.create(self.cache.resource, obj)
        self.cache.wrote(made)
        return made

    async def patch(self, obj: Object, patch: Any, subresource: str = "") -> Object | None:
        """Patch an object of the cache's type; None when it is gone."""
        metadata = obj["metadata"]
        try:
            made = await self.client.patch(
                self.cache.resource,
                metadata["name"],
                patch,
                metadata.get("namespace"),
                content_type=_MERGE,
                subresource=subresource,
            )
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        self.cache.wrote(made)
        return made

    async def delete(self, obj: Object) -> None:
        """Delete this very object in the background; one that is gone already is well."""
        metadata = obj["metadata"]
        path = self.cache.resource.path(metadata.get("namespace"), metadata["name"])
        options = {"propagationPolicy": "Background", "preconditions": {"uid": metadata["uid"]}}
        try:
            answer = await self.client.request("DELETE", path, options)
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            if error.code == 409 and "UID" not in error.message:
                raise
            answer = {}
        held = answer.get("kind") == self.cache.resource.kind and is_terminating(answer)
        if held:
            self.cache.wrote(answer)
        else:
            self.cache.erased(obj)


async def side_by_side(work: Iterable[Callable[[], Awaitable[Any]]]) -> None:
    """Do several writes at once, in growing batches: when the first is refused the rest are not tried.

    Raises the first failure.
    """
    waiting = list(work)
    size = 1
    while waiting:
        batch, waiting = waiting[:size], waiting[size:]
        results = await asyncio.gather(*(one() for one in batch), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        size = min(size * 2, _AT_ONCE)
