"""Gives every active namespace its `default` ServiceAccount and the CA that its pods mount."""

from __future__ import annotations

from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import CONFIG_MAPS, SERVICE_ACCOUNTS, Object


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
        """Create the ServiceAccount and ConfigMap of one namespace unless they exist."""
        namespace = self.namespaces.objects.get(key)
        if namespace is None or namespace["metadata"].get("deletionTimestamp"):
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
