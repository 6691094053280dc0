"""Stored objects that plug-ins decide by, decoded once for each change of their kind."""

from __future__ import annotations

from collections.abc import Sequence

from meshlight.kube.resources import Object
from meshlight.kube.store import Store


class Stored:
    """The objects of one resource; what is given out is shared and not to be changed."""

    def __init__(self, store: Store, resource: str) -> None:
        self._store = store
        self._resource = resource
        self._latest = -1
        self._all: list[Object] = []

    def all(self) -> Sequence[Object]:
        """Every object."""
        latest = self._store.latest(self._resource)
        if latest != self._latest:
            self._all, self._latest = list(self._store.objects(self._resource)), latest
        return self._all

    def of(self, namespace: str) -> Sequence[Object]:
        """The objects of a namespace."""
        return [obj for obj in self.all() if obj["metadata"].get("namespace") == namespace]

    def named(self, name: str) -> Object | None:
        """The cluster-wide object of a name."""
        return next((obj for obj in self.all() if obj["metadata"]["name"] == name), None)
