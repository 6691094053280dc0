"""ConfigMap `istio-ca-root-cert` in every namespace: how workloads learn whom to trust.

Kept as it should be whatever happens to it: made when a namespace appears, put right when somebody
edits or deletes it. Works from caches, one namespace at a time, retrying with backoff.
"""

from __future__ import annotations

import asyncio

from meshlight.controlplane.logs import Scope
from meshlight.kube.client import ApiError, ApiUnreachable, Cache, Client
from meshlight.kube.resources import CONFIG_MAPS, Object

NAME = "istio-ca-root-cert"
KEY = "root-cert.pem"
_LABELS = {"istio.io/config": "true"}
_RETRY = (0.2, 0.5, 1, 2, 5, 10, 30)

log = Scope("namespace-controller")


def desired(namespace: str, root: str) -> Object:
    """The ConfigMap of a namespace."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": NAME, "namespace": namespace, "labels": _LABELS},
        "data": {KEY: root},
    }


class RootCertificates:
    """Follows namespaces and the ConfigMaps of that name in them."""

    def __init__(self, client: Client, namespaces: Cache, config_maps: Cache, root: str) -> None:
        self._client, self._root = client, root
        self._namespaces, self._config_maps = namespaces, config_maps
        self._due: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self._failures: dict[str, int] = {}
        self._following = False
        namespaces.on_change(lambda old, new: self._add((new or old or {})["metadata"]["name"]))
        config_maps.on_change(lambda old, new: self._add((new or old or {})["metadata"]["namespace"]))

    def _add(self, namespace: str) -> None:
        if namespace not in self._queued:
            self._queued.add(namespace)
            self._due.put_nowait(namespace)

    def publish(self, root: str) -> None:
        """Publish other roots from now on."""
        if root != self._root:
            self._root = root
            if self._following:
                for _, name in self._namespaces.objects:
                    self._add(name)

    async def run(self) -> None:
        """Work until cancelled; begins once both caches are complete."""
        await asyncio.gather(self._namespaces.synced.wait(), self._config_maps.synced.wait())
        self._following = True
        for _, name in self._namespaces.objects:
            self._add(name)
        while True:
            namespace = await self._due.get()
            self._queued.discard(namespace)
            try:
                await self._reconcile(namespace)
                self._failures.pop(namespace, None)
            except (ApiError, ApiUnreachable) as error:
                count = self._failures.get(namespace, 0)
                self._failures[namespace] = count + 1
                delay = _RETRY[min(count, len(_RETRY) - 1)]
                log.warn(
                    "root certificate not written", namespace=namespace, error=str(error), retry_after=delay
                )
                asyncio.get_running_loop().call_later(delay, self._add, namespace)

    async def _reconcile(self, name: str) -> None:
        namespace = self._namespaces.get(name)
        if namespace is None or "deletionTimestamp" in namespace["metadata"]:
            return
        present = self._config_maps.get(NAME, name)
        if present is None:
            try:
                await self._client.create(CONFIG_MAPS, desired(name, self._root))
                log.info("root certificate published", namespace=name)
            except ApiError as error:
                if error.code != 409:  # there already: its change will reach the cache and bring us back
                    raise
        elif (present.get("data") or {}) != {KEY: self._root}:
            fixed = {**present, "data": {KEY: self._root}}
            try:
                await self._client.replace(CONFIG_MAPS, fixed)
                log.info("root certificate put right", namespace=name)
            except ApiError as error:
                if error.code not in (404, 409):  # changed meanwhile: likewise
                    raise
