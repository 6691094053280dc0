"""The life of a namespace: what an active one must hold, and how a deleted one is emptied.

An active namespace gets its `default` ServiceAccount and the CA that its pods mount. A terminating
one loses its contents, kind by kind through discovery, and then its `kubernetes` finalizer.
"""

from __future__ import annotations

from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import CONFIG_MAPS, NAMESPACES, SERVICE_ACCOUNTS, Object


class Namespaces:
    """Creates what each namespace must hold; creation again is harmless."""

    def __init__(self, client: Client, namespaces: Cache, ca: str) -> None:
        self.client, self.namespaces, self.ca = client, namespaces, ca
        self.queue = WorkQueue("namespace", self.reconcile)
        namespaces.on_change(self._changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        if new is not None:
            self.queue.add(("", new["metadata"]["name"]))

    async def reconcile(self, key: Key) -> None:
        """Fill an active namespace, empty a terminating one."""
        namespace = self.namespaces.objects.get(key)
        if namespace is None:
            return
        if namespace["metadata"].get("deletionTimestamp"):
            await self._empty(namespace)
            return
        account = {"metadata": {"name": "default", "namespace": key[1]}}
        bundle = {
            "metadata": {"name": "kube-root-ca.crt", "namespace": key[1]},
            "data": {"ca.crt": self.ca},
        }
        for resource, content in ((SERVICE_ACCOUNTS, account), (CONFIG_MAPS, bundle)):
            obj = {"apiVersion": "v1", "kind": resource.kind, **content}
            try:
                await self.client.create(resource, obj)
            except ApiError as error:
                if error.code != 409:
                    raise

    async def _empty(self, namespace: Object) -> None:
        """Delete the contents; finalize when none is left. Raises ContentRemains to come again."""
        name = namespace["metadata"]["name"]
        remaining = 0
        for resource in await self.client.discover("delete"):
            if not resource.namespaced:
                continue
            for item in (await self.client.list(resource, name)).items:
                remaining += 1
                if "deletionTimestamp" not in item["metadata"]:
                    await self.client.delete(resource, item["metadata"]["name"], name)
        if remaining:
            raise ContentRemains(f"{remaining} objects are being deleted")
        current = await self.client.get(NAMESPACES, name)
        current["spec"]["finalizers"] = []
        await self.client.replace(NAMESPACES, current, subresource="finalize")


class ContentRemains(Exception):
    """A terminating namespace still holds objects; its key is queued again."""
